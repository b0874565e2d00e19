"""What every command does to files: outputs that are inputs, a second run into one folder, signals, full disks."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import full_disk, read_only
from PIL import Image
from several import FORKS
from torchvision.utils import save_image

from captum_concepts import ConceptExplanation
from captum_concepts.__main__ import _say, main
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.errors import InputWarning
from captum_concepts.images import load_image, source as image_source

MODEL = ["--model", "demo:classifier"]
SCENES = CaptionedScenes(8, seed=77, size=64)


def save(number: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(SCENES[number].image, path)


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: photographs, class folders, masks, and files that commands read."""
    for k, name in enumerate(("photos/0.png", "photos/1.png", "classes/a/2.png", "classes/a/3.png", "classes/b/4.png",
                              "classes/b/5.png", "masks/images/6.png")):  # fmt: skip
        save(k, tmp_path / name)
    (tmp_path / "masks" / "masks").mkdir()
    Image.fromarray((SCENES[6].masks[0].byte() + 1).numpy()).save(tmp_path / "masks" / "masks" / "6.png")
    names = [*SCENES.concepts[:6]]
    (tmp_path / "masks" / "classes.json").write_text(json.dumps({0: "none", 1: names[0], 2: names[1]}))
    (tmp_path / "names.html").write_text("\n".join(names))
    (tmp_path / "own.py").write_text(
        "from captum_concepts import demo\ndef build():\n    return demo.load('classifier')"
    )
    (tmp_path / "w.safetensors").write_bytes(b"weights")
    (tmp_path / "salf").mkdir()
    (tmp_path / "salf" / "config.json").write_text("{}")
    (tmp_path / "config.json").write_text(
        json.dumps({"model": "own.py:build", "encoder": "demo:clip", "train": "classes", "concepts": ["red"],
                    "store": "store", "output": ".", "size": 64, "weights": "w.safetensors"})
    )  # fmt: skip
    os.link(tmp_path / "photos" / "0.png", tmp_path / "hard.html")
    (tmp_path / "soft.html").symlink_to("photos/1.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


REFUSED = [
    "explain photos --output photos",
    "explain photos/0.png --output photos",
    "explain photos --output ./photos/../photos/",
    "explain photos --references classes --output classes",
    "explain classes --output classes/a",
    "explain photos --output out --report photos/0.png",
    "explain photos/0.png --output out --report hard.html",
    "explain photos --output out --report names.html --classes names.html",
    "report photos/0.png --output photos/0.png",
    "report photos --output photos/1.png",
    "report photos/0.png --output hard.html",
    "report photos --output soft.html",
    "report photos --output names.html --classes names.html",
    "report photos --output page.jpg",
    "report --explanations w.safetensors --output w.safetensors",
    "explore photos --output photos/0.png",
    "explore photos/0.png --output hard.html",
    "audit classes --output soft.html --references classes --train photos",
    "audit classes --output page.html --save classes/a/2.png",
    "audit classes --output page.html --save w.safetensors --against w.safetensors",
    "audit classes --output page.html --save page.html",
    "audit classes --output page.html --save own.py --model own.py:build",
    "evaluate masks --output masks/classes.json",
    "evaluate masks --output salf/config.json --explainer salf",
    "fit-concepts --concepts classes --output classes/a/2.png",
    "fit-concepts --concepts classes --output own.py --model own.py:build",
    "fit-concepts --concepts classes --output w.safetensors --weights w.safetensors",
    "fit-concepts --train photos --output soft.html",
    "fit-salf --config config.json",
]


@pytest.mark.parametrize("line", REFUSED)
def test_an_output_that_is_an_input_is_refused(line: str, space: Path, capsys: pytest.CaptureFixture[str]):
    before = contents(space)
    arguments = line.split()
    if "--model" not in arguments and "--config" not in arguments:
        arguments += MODEL
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert any(words in said for words in ("would overwrite a file that", "contains input images",
                                           "must end in .html", "is used twice")), said  # fmt: skip
    assert contents(space) == before


@pytest.mark.parametrize(
    ("line", "reader"),
    [
        ("report photos/0.png --output hard.html", "the command"),
        ("report photos --output names.html --classes names.html", "--classes"),
        ("fit-concepts --concepts classes --output w.safetensors --weights w.safetensors", "--weights"),
    ],
)
def test_what_reads_the_file_is_named(line: str, reader: str, space: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*line.split(), *MODEL]) == 2
    assert f"would overwrite a file that {reader} reads" in capsys.readouterr().err


WRONG = [
    ("report photos --output photos", "is a folder"),
    ("evaluate masks --output pipe.md", "not a regular file"),
    ("fit-concepts --concepts classes --output names.html/c.safetensors", "cannot be written"),
    ("evaluate masks --output names.html/t.md", "cannot be written"),
    ("explain photos --output names.html/out", "cannot be written"),
    (
        "explain photos --output out --words red --train photos --encoder demo:clip --explainer names.html/w",
        "cannot be",
    ),
]


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_what_cannot_be_written_is_said_before_the_work(
    line: str, message: str, space: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from captum_concepts.commands import settings

    monkeypatch.setattr(settings, "load_model", lambda *_, **__: pytest.fail("the work began"))
    os.mkfifo("pipe.md")
    before = contents(space)
    assert main([*line.split(), *MODEL]) == 2
    assert message in capsys.readouterr().err
    assert contents(space) == before


def explained(folder: Path) -> dict[str, str]:
    """Images and pictures in the index, all of which are there and whole."""
    index = json.loads((folder / "explanations.json").read_text())
    found = {entry["image"]: entry["picture"] for entry in index["explained"]}
    assert len(set(found.values())) == len(index["explained"])
    for picture in found.values():
        assert load_image(folder / picture).shape[0] == 3
    return found


class TestTwoRuns:
    def explain(self, *arguments: str, code: int = 0) -> None:
        assert main(["explain", *arguments, *MODEL]) == code

    def test_the_same_again(self, space: Path):
        self.explain("photos", "--output", "out", "--save")
        first = contents(space / "out")
        self.explain("photos", "--output", "out", "--save")
        assert contents(space / "out").keys() == first.keys()
        assert first["explanations.json"] == (space / "out" / "explanations.json").read_bytes()
        assert list(explained(space / "out")) == ["photos/0.png", "photos/1.png"]

    def test_other_images_are_added(self, space: Path, monkeypatch: pytest.MonkeyPatch):
        self.explain("photos", "--output", "out")
        save(7, space / "more" / "0.jpg")
        save(7, space / "out" / "0-2.png")  # the user's own, by whatever way it came there
        before = (space / "out" / "0-2.png").read_bytes(), (space / "out" / "0.png").read_bytes()
        monkeypatch.chdir(space / "more")
        self.explain("0.jpg", "--output", "../out")
        assert explained(space / "out") == {"photos/0.png": "0.png", "photos/1.png": "1.png", "0.jpg": "0-3.png"}
        assert before == ((space / "out" / "0-2.png").read_bytes(), (space / "out" / "0.png").read_bytes())

    def test_sub_folders_are_kept(self, space: Path):
        save(6, space / "classes" / "a" / "sub" / "2.png")
        self.explain("classes", "photos/0.png", "--output", "out", "--save")
        named = {
            **{f"classes/{name}": name for name in ("a/2.png", "a/3.png", "a/sub/2.png", "b/4.png", "b/5.png")},
            "photos/0.png": "0.png",
        }
        assert explained(space / "out") == named
        save(7, space / "more" / "a" / "2.png")
        self.explain("more", "classes", "--output", "out", "--save")
        assert explained(space / "out") == named | {"more/a/2.png": "a/2-2.png"}
        assert main(["report", "--explanations", "out", "--output", "page.html"]) == 0
        page = (space / "page.html").read_text()
        assert "<title>What demo:classifier saw</title>" in page
        for name in ("more/a/2.png", "classes/a/2.png", "a/sub/2.png"):  # all called 2.png
            assert page.count(f"<bdi>{name}</bdi></h2>") == 1

    @pytest.mark.parametrize("key", ["begun", "picture", "explanation", "input"])
    @pytest.mark.parametrize("name", ["../photos/1", "/tmp/1", "a/../../photos/1", ".."])
    def test_an_index_cannot_lead_out_of_its_folder(self, key: str, name: str, space: Path):
        self.explain("photos/0.png", "--output", "out", "--save")
        file = space / "out" / "explanations.json"
        index = json.loads(file.read_text())
        if key == "begun":
            index["begun"] = {str(space / "photos" / "1.png"): name}
        else:
            index["explained"][0][key] = name
        file.write_text(json.dumps(index))
        before = contents(space)
        self.explain("photos", "--output", "out", code=2)
        assert main(["report", "--explanations", "out", "--output", "page.html"]) == 2
        assert contents(space) == before

    def test_of_another_model_is_refused(self, space: Path, capsys: pytest.CaptureFixture[str]):
        self.explain("photos/0.png", "--output", "out")
        before = contents(space / "out")
        self.explain("photos/0.png", "--output", "out", "--layer", "layer3", code=2)
        assert "contains explanations of another run (layer: 'layer4', not 'layer3')" in capsys.readouterr().err
        (space / "out" / "explanations.json").write_text('{"notes": "mine"}')
        self.explain("photos/0.png", "--output", "out", code=2)
        assert "explanations.json is damaged or foreign" in capsys.readouterr().err
        assert before.keys() == contents(space / "out").keys()

    def test_at_the_same_time_is_refused(self, space: Path, capsys: pytest.CaptureFixture[str]):
        from captum_concepts.store import FolderLock

        with FolderLock(space / "out"):
            self.explain("photos/0.png", "--output", "out", code=2)
        assert "is being written by" in capsys.readouterr().err

    def test_own_pictures_are_no_photographs(self, space: Path):
        self.explain("photos", "--output", "photos/out")
        with pytest.warns(InputWarning, match=r"photos/out holds pictures that 'explain' drew"):
            self.explain("photos", "--output", "photos/out")
        assert list(explained(space / "photos" / "out")) == ["photos/0.png", "photos/1.png"]
        with pytest.warns(InputWarning, match="are skipped"):
            assert main(["report", "photos", *MODEL, "--output", "page.html"]) == 0
        assert (space / "page.html").read_text().count("<article") == 2

    def test_after_a_kill_what_was_explained_is_in_the_index(self, space: Path, monkeypatch: pytest.MonkeyPatch):
        """And is shown by ``report``; the run that follows explains the rest as well."""
        from captum_concepts.commands import explain

        written, drawn = explain.PictureFolder.note, []

        def dies(folder: Any) -> None:
            written(folder)
            drawn.append(folder)
            raise SystemExit(9)

        with monkeypatch.context() as patch:
            patch.setattr(explain, "_NOTED", 0.0)
            patch.setattr(explain.PictureFolder, "note", dies)
            patch.setattr(explain.PictureFolder, "__exit__", lambda self, *_: self._lock.__exit__(None, None, None))
            with pytest.raises(SystemExit):
                self.explain("photos", "--output", "out", "--save")
        assert len(drawn) == 1
        assert main(["report", "--explanations", "out", "--output", "page.html"]) == 0
        assert (space / "page.html").read_text().count("<article") == 1
        self.explain("photos", "--output", "out", "--save")
        assert len(explained(space / "out")) == 2

    def test_after_a_kill_nothing_is_left_over(self, space: Path, monkeypatch: pytest.MonkeyPatch):
        from captum_concepts.commands import explain

        draw, drawn = explain._draw, []

        def dies(*arguments: Any) -> None:
            drawn.append(arguments)
            if len(drawn) == 2:
                raise SystemExit(9)
            draw(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(explain, "_draw", dies)
            patch.setattr(explain.PictureFolder, "__exit__", lambda self, *_: self._lock.__exit__(None, None, None))
            with pytest.raises(SystemExit):
                self.explain("photos", "--output", "out")
        self.explain("photos", "--output", "out")
        assert sorted(p.name for p in (space / "out").iterdir()) == ["0.png", "1.png", "explanations.json"]


@dataclass(frozen=True)
class Run:
    """A command that reads images: its options, and what must be whole when it was stopped after the first."""

    line: str
    left: Callable[[Path], None]


def _nothing(space: Path) -> None:
    assert not [p for p in space.iterdir() if p.name in ("new.html", "new.md", "new.safetensors", "model")]


def _index_and_page(space: Path) -> None:
    assert explained(space / "out") == {"photos/0.png": "0.png"}
    _page(space)


def _page(space: Path) -> None:
    page = (space / "new.html").read_text()
    assert page.count("<article") == 1
    assert page.endswith("</html>\n")


RUNS = [
    Run("explain photos --output out --save --report new.html", _index_and_page),
    Run("report photos --output new.html", _page),
    Run("explore photos --output new.html", _nothing),
    Run("audit photos --output new.html --save new.safetensors --store work", _nothing),
    Run("evaluate masks --classes names.html --output new.md", _nothing),
    Run("fit-concepts --concepts classes --output new.safetensors", _nothing),
    Run("fit-concepts --train photos --words red,blue --encoder demo:clip --output new.safetensors", _nothing),
    Run("fit-salf --config fit.json", _nothing),
]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("run", RUNS, ids=lambda run: " ".join(run.line.split()[:2]))
def test_signals(run: Run, sent: signal.Signals, code: int, space: Path, monkeypatch, capsys):
    read, seen = image_source.read_image, []

    def signalled(*arguments: Any) -> Any:
        seen.append(arguments)
        if len(seen) == (1 if run.line.startswith("evaluate") else 3):  # one batch is one image, and one is read ahead
            os.kill(os.getpid(), sent)
        return read(*arguments)

    save(7, space / "photos" / "2.png")
    for k in range(6):  # fit-salf needs eight
        save(k, space / "classes" / "a" / f"more-{k}.png")
    fit = json.loads((space / "config.json").read_text())
    del fit["weights"]
    (space / "fit.json").write_text(json.dumps({**fit, "output": "model", "layer": "layer4"}))
    monkeypatch.setattr(image_source, "read_image", signalled)
    monkeypatch.setattr("captum_concepts.datasets.annotation.opened_image", signalled)
    before = signal.getsignal(signal.SIGTERM)
    assert main([*run.line.split(), *([] if "--config" in run.line else MODEL)]) == code
    assert {130: "interrupted", 143: "terminated"}[code] in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    run.left(space)
    assert not [path for path in space.rglob(".*") if path.name.endswith(".partial") or path.name == ".lock"]


def _one_of_two(rank: int, line: str, space: Path) -> None:
    """A command in one of two processes; the second is killed when it reads its third image."""
    file = os.open(space / f"said-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 2)
    sys.stderr = os.fdopen(2, "w")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{space}/meet", rank=rank, world_size=2)
    os.environ["WORLD_SIZE"] = "2"
    if rank:
        read, seen = image_source.read_image, []

        def killed(*arguments: Any) -> Any:
            seen.append(arguments)
            if len(seen) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return read(*arguments)

        image_source.read_image = killed
    code = main([*line.split(), *([] if "--config" in line else MODEL)])
    sys.stderr.flush()
    os._exit(code)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forks")
@pytest.mark.parametrize("line", ["audit photos --output new.html --store work", "fit-salf --config fit.json"])
def test_one_of_two_processes_is_killed(line: str, space: Path):
    """Without torchrun, which ends the others: the survivor says what happened and exits with 2, soon."""
    for k in range(24):
        save(k % 8, space / "classes" / "a" / f"more-{k}.png")
    fit = json.loads((space / "config.json").read_text())
    del fit["weights"]
    (space / "fit.json").write_text(json.dumps({**fit, "output": "model", "layer": "layer4"}))
    started = [FORKS.Process(target=_one_of_two, args=(rank, line, space)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [2, -signal.SIGKILL]
    said = (space / "said-0").read_text()
    assert (
        "another of the 2 processes, which ended without an error message; start all of them again, or one alone"
        in said
    )
    assert "Traceback" not in said
    _nothing(space)


def test_sigterm_of_a_real_process(space: Path):
    for k in range(8):
        for copy in range(10):
            save(k, space / "many" / f"{k}-{copy}.png")
    command = [
        sys.executable,
        "-m",
        "captum_concepts",
        "explain",
        "many",
        *MODEL,
        "--output",
        "out",
        "--report",
        "p.html",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while len(list(space.glob("out/*.png"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert "terminated; the files written so far are complete" in said
    pictures = sorted(p.name for p in (space / "out").glob("*.png"))
    listed = sorted(explained(space / "out").values())
    assert set(listed) <= set(pictures)
    assert len(pictures) - len(listed) <= 1  # drawn, and stopped before it was noted
    assert (space / "p.html").read_text().count("<article") in (len(listed), len(listed) + 1)


def test_what_nobody_foresaw_has_its_own_code(space: Path, monkeypatch, capsys):
    from captum_concepts.commands import explain

    def fails(*_: Any) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(explain, "_draw", fails)
    assert main(["explain", "photos", *MODEL, "--output", "out"]) == 70
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "RuntimeError: a mistake" in said
    assert explained(space / "out") == {}


FULL = [
    ("explain photos --output out", "captum_concepts.commands.explain._draw", "0.png: "),
    ("evaluate masks --classes names.html --output new.md", "captum_concepts.metrics.table.write_atomically", "| nra"),
    ("audit photos --output new.html --save new.safetensors", "captum_concepts.audit.ConceptAudit.save", "images"),
    ("fit-concepts --concepts classes --n-random 0 --output new.safetensors",
     "captum_concepts.attr.spatial_acv.SpatialACV.save", "accuracy"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "writer", "printed"), FULL)
def test_on_a_full_disk_the_result_is_printed(line, writer, printed, space: Path, monkeypatch, capsys):
    from captum_concepts.commands import explain

    draw, calls = explain._draw, []

    def full(*arguments: Any, **_: Any) -> None:
        calls.append(arguments)
        if "explain" in line and len(calls) == 1:
            draw(*arguments)
        else:
            raise OSError(28, "No space left on device", "new")

    monkeypatch.setattr(writer, full)
    assert main([*line.split(), *MODEL]) == 2
    said = capsys.readouterr()
    assert printed in said.out
    assert "No space left on device" in said.err


FULL_PAGE = [
    ("report photos --output old.html", "0.png: ", 40_000),
    ("report photos --output old.html", "", 16),
    ("explore photos --output old.html", "", 16),
    ("audit photos --output old.html", "images", 16),
    ("explain photos --output out --report old.html", "", 16),
]


@pytest.mark.parametrize(("line", "printed", "size"), FULL_PAGE)
def test_on_a_full_disk_the_old_page_stays(line, printed, size, space: Path, capsys):
    """Every write beyond some bytes fails, as on a disk without more room."""
    (space / "old.html").write_text("the only copy")
    before = contents(space)
    with full_disk(size):
        code = main([*line.split(), *MODEL])
    said = capsys.readouterr()
    assert code == 2
    assert printed in said.out
    assert "error: " in said.err
    assert "old.html" in said.err or "explanations.json" in said.err
    assert "Traceback" not in said.err
    assert contents(space) == before


@pytest.mark.parametrize("line", [line for line, _, size in FULL_PAGE if size == 16])
def test_a_read_only_disk_is_told_before_the_work(line, space: Path, capsys, monkeypatch):
    from captum_concepts.commands import settings

    (space / "old.html").write_text("the only copy")
    before = contents(space)
    monkeypatch.setattr(settings, "load_model", lambda *_, **__: pytest.fail("the work began"))
    with read_only(space):
        assert main([*line.split(), *MODEL]) == 2
    assert "cannot be written: " in capsys.readouterr().err
    assert contents(space) == before


class TestWhatIsPrinted:
    def test_names_do_not_steer_the_terminal(self, space: Path, capsys: pytest.CaptureFixture[str]):
        name = b"photos/\x1b[2J\xe9\n.png"
        os.rename(b"photos/0.png", name)  # noqa: PTH104
        Path(os.fsdecode(b"photos/\x1b[31m.png")).write_bytes(b"nothing")
        assert main(["explain", "photos", *MODEL, "--output", "out", "--save", "--report", "page.html"]) == 1
        said = capsys.readouterr()
        assert "\x1b" not in said.out + said.err
        assert "\\x1b[2J\\xe9" in said.out
        assert "\\x1b[31m.png" in said.err
        assert "[2J" in (space / "page.html").read_text()
        assert main(["report", "--explanations", "out", "--output", "again.html"]) == 0

    def test_names_as_long_as_names_can_be(self, space: Path):
        for ending, letter in ((".jpeg", "a"), (".png", "é")):
            stem = letter * ((255 - len(ending)) // len(letter.encode()))
            save(0, space / "long" / f"{stem}{ending}")
        assert main(["explain", "long", *MODEL, "--output", "out", "--save"]) == 0
        assert len(explained(space / "out")) == 2

    def test_an_encoding_without_the_letter(self):
        file = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", newline="\n")
        _say("NRA ↑ café\n", file)
        assert file.buffer.getvalue() == "NRA \\u2191 café\n\n".encode("cp1252")

    def test_words_longer_than_a_name_of_a_file(self, space: Path, capsys: pytest.CaptureFixture[str]):
        words = ", ".join(f"word {k}" for k in range(100))
        assert main(["explain", "photos", *MODEL, "--output", "out", "--words", words]) == 2
        assert "--train" in capsys.readouterr().err
        assert main(["explain", "x" * 5000, *MODEL, "--output", "out"]) == 2
        assert "is not a path: File name too long" in capsys.readouterr().err

    @pytest.mark.parametrize("size", ["0", "-1", "1000000"])
    @pytest.mark.parametrize("command", ["explain", "models"])
    def test_sizes(self, command: str, size: str, space: Path, capsys: pytest.CaptureFixture[str]):
        options = ["demo:classifier"] if command == "models" else ["photos", *MODEL, "--output", "out"]
        assert main([command, *options, "--size", size]) == 2
        assert f"from 1 to 10,000 pixels, got {size}" in capsys.readouterr().err


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photographs, what `explain --save` wrote of them in ``out``, and a secret beside it."""
    root = tmp_path_factory.mktemp("made")
    for k in range(2):
        save(k, root / "photos" / f"{k}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["explain", "photos", *MODEL, "--output", "out", "--save"]) == 0
    save(7, root / "secret" / "a.png")
    e = ConceptExplanation(["a"], torch.rand(1, 1), torch.rand(1, 1, 2, 2))
    e.save(root / "secret" / "e.safetensors")
    return root


class TestSavedExplanations:
    """`report --explanations FOLDER` reads that folder, and what is named beside it."""

    @pytest.fixture
    def folder(self, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Its ``out`` in a copy that is the current folder."""
        shutil.copytree(made, tmp_path, dirs_exist_ok=True)
        index = tmp_path / "out" / "explanations.json"
        index.write_text(index.read_text().replace(str(made), str(tmp_path)))
        monkeypatch.chdir(tmp_path)
        return tmp_path / "out"

    def report(self, folder: Path, *images: str, **changed: Any) -> tuple[int, str]:
        index = json.loads((folder / "explanations.json").read_text())
        first = index["explained"][0]
        first.update(changed)
        for key in [key for key, value in changed.items() if value is None]:
            del first[key]
        index["explained"] = [first]
        (folder / "explanations.json").write_text(json.dumps(index))
        code = main(["report", *images, "--explanations", str(folder), "--output", "page.html"])
        page = Path("page.html")
        return code, page.read_text() if page.exists() else ""

    def test_without_the_photographs(self, folder: Path):
        (folder.parent / "photos" / "0.png").unlink()
        assert self.report(folder)[0] == 0

    @pytest.mark.parametrize(
        "changed",
        [
            {"input": "../secret/a.png"},
            {"input": "{space}/secret/a.png"},
            {"input": "link.png"},
            {"explanation": "../secret/e.safetensors"},
            {"explanation": "link.safetensors"},
            {"input": None, "path": "{space}/secret/a.png"},
            {"input": None, "path": None, "image": "secret/a.png"},
        ],
    )
    def test_other_files_are_not_read(self, changed: dict[str, Any], folder: Path, capsys):
        (folder / "link.png").symlink_to("../secret/a.png")
        (folder / "link.safetensors").symlink_to("../secret/e.safetensors")
        changed = {key: value and value.replace("{space}", str(folder.parent)) for key, value in changed.items()}
        code, page = self.report(folder, **changed)
        assert (code, page) == (2, "")
        assert "outside" in (said := capsys.readouterr().err) or "not in" in said or "file in its folder" in said

    def test_unless_they_are_asked_for(self, folder: Path):
        assert self.report(folder, "photos", input=None)[0] == 0
        assert self.report(folder, "secret", input=None, path="/gone/a.png")[0] == 0

    @pytest.mark.parametrize("text", ["[]", "{}", '{"explained": 3}', '{"explained": [{"image": 1}]}', "{", "[" * 9999,
                                      '{"explained": [{"image": "a", "explanation": "b"}], "size": [1048576, 1048576]}',
                                      '{"explained": [{"image": "a", "explanation": "b"}], "size": 1e9}'])  # fmt: skip
    def test_forged(self, text: str, folder: Path, capsys):
        (folder / "explanations.json").write_text(text)
        assert main(["report", "--explanations", str(folder), "--output", "page.html"]) == 2
        assert "explanations.json" in capsys.readouterr().err
