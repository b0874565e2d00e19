"""`fit-concepts`, then `explain`, `report` and `evaluate` with what it saved, with broken files among the images."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captum_concepts import ConceptExplanation, SpatialACV, demo
from captum_concepts.__main__ import main
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.errors import InputError, InputWarning
from captum_concepts.images import load_image

MODEL = ["--model", "demo:classifier"]


def save(image: torch.Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(path)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Thirty scenes and a file that is no image."""
    folder = tmp_path_factory.mktemp("scenes")
    for i, image in enumerate(CaptionedScenes(30, seed=77, size=64).stack().image):
        save(image, folder / f"{i:02}.png")
    (folder / "broken.png").write_bytes(b"nothing")
    return folder


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    """Two concepts that differ in colour, and a file that is no image."""
    folder = tmp_path_factory.mktemp("colours")
    generator = torch.Generator().manual_seed(0)
    for k, name in enumerate(("reddish", "bluish")):
        tint = torch.tensor([0.9, 0.2, 0.2] if k == 0 else [0.2, 0.2, 0.9]).view(3, 1, 1)
        for i in range(8):
            save(torch.rand(3, 64, 64, generator=generator) * 0.3 + tint * 0.7, folder / name / f"{i}.png")
    (folder / "bluish" / "broken.png").write_bytes(b"nothing")
    return folder


@pytest.fixture(scope="module")
def vectors(colours, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("vectors") / "new" / "colours.safetensors"
    options = ["--concepts", str(colours), "--layer", "layer2", "--n-random", "5", "--output", str(out)]
    assert main(["fit-concepts", *MODEL, *options]) == 1  # the broken file
    return out


@pytest.fixture(scope="module")
def words(scenes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("words") / "words.safetensors"
    options = ["--train", str(scenes), "--encoder", "demo:clip", "--words", "red,circle,grass", "--output", str(out)]
    assert main(["fit-concepts", *MODEL, *options, "--layers", "layer3,layer4"]) == 1
    return out


@pytest.fixture(scope="module")
def mask_folder(tmp_path_factory) -> Path:
    """Twelve scenes as images/, masks/ of shapes and grounds, and classes.json; one image of them is broken."""
    root = tmp_path_factory.mktemp("masks")
    scenes = CaptionedScenes(12, seed=5, size=64)
    names = {0: "unlabeled"} | {k + 1: name.upper() for k, name in enumerate(scenes.concepts)}
    (root / "classes.json").write_text(json.dumps(names))
    (root / "masks").mkdir()
    shown = [scenes.concepts.index(n) for group in ("ground", "shape") for n in scenes.concept_groups[group]]
    for i in range(12):
        scene = scenes[i]
        ids = np.zeros((64, 64), np.uint8)
        for concept in shown:
            ids[scene.masks[concept].numpy()] = concept + 1
        save(scene.image, root / "images" / f"{i}.png")
        Image.fromarray(ids).save(root / "masks" / f"{i}.png")
    (root / "images" / "11.png").write_bytes(b"nothing")
    return root


class TestFitConcepts:
    def test_vectors_are_those_of_the_library(self, vectors, colours):
        model = demo.load("classifier")
        loaded = SpatialACV.load(vectors, model)
        images = {}
        for name in ("bluish", "reddish"):
            files = sorted(path for path in (colours / name).iterdir() if path.name != "broken.png")
            images[name] = torch.stack([load_image(path, 64) for path in files])
        own = SpatialACV(model, "layer2", batch_size=8).fit(images, n_random=5)
        assert loaded.concepts == own.concepts == ["bluish", "reddish"]
        torch.testing.assert_close(loaded.vectors, own.vectors)

    def test_it_says_what_was_learned_and_names_the_broken_file(self, colours, tmp_path, capsys):
        options = ["--concepts", str(colours), "--layer", "layer2", "--n-random", "0", "--json"]
        assert main(["fit-concepts", *MODEL, *options, "--output", str(tmp_path / "c.safetensors")]) == 1
        said = capsys.readouterr()
        fitted = json.loads(said.out)
        assert [row["name"] for row in fitted["concepts"]] == ["bluish", "reddish"]
        assert [row["images"] for row in fitted["concepts"]] == [8, 8]
        assert all(row["accuracy"] > 0.9 for row in fitted["concepts"])
        assert [Path(entry["image"]).name for entry in fitted["failed"]] == ["broken.png"]
        assert "broken.png" in said.err

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ([], "pass either --concepts"),
            (["--concepts", "{colours}", "--train", "{colours}"], "pass either --concepts"),
            (["--concepts", "{colours}", "--words", "red"], "are for --train"),
            (["--concepts", "{colours}/bluish"], "contains no folders"),
            (["--concepts", "{colours}", "--layer", "nowhere"], "nowhere"),
            (["--train", "{colours}", "--layer", "layer2"], "are for --concepts"),
            (["--train", "{colours}"], "requires --encoder"),
            (["--train", "missing", "--encoder", "demo:clip"], "no file or folder at missing"),
            (["--concepts", "{colours}", "--output", "{colours}"], "is a folder"),
            (["--concepts", "{colours}", "--output", "concepts.png"], "must end in .safetensors"),
            (["--concepts", "{colours}", "--encoder", "demo:clip"], "--encoder would have no effect"),
            (["--train", "{colours}", "--encoder", "demo:clip", "--seed", "1"], "--seed would have no effect"),
            (
                ["--train", "{colours}", "--encoder", "demo:clip", "--words", "words.txt"],
                "there is no concept file at words.txt",
            ),
        ],
    )
    def test_what_is_wrong_is_said(self, more, message, colours, tmp_path, capsys):
        more = [part.replace("{colours}", str(colours)) for part in more]
        assert main(["fit-concepts", *MODEL, "--output", str(tmp_path / "c.safetensors"), *more]) == 2
        assert message in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    def test_an_interrupt_writes_nothing(self, colours, tmp_path, monkeypatch, capsys):
        def interrupted(*arguments, **options):
            raise KeyboardInterrupt

        monkeypatch.setattr(SpatialACV, "fit", interrupted)
        options = ["--concepts", str(colours), "--layer", "layer2", "--output", str(tmp_path / "c.safetensors")]
        assert main(["fit-concepts", *MODEL, *options]) == 130
        assert list(tmp_path.iterdir()) == []


class TestReport:
    def test_of_images_and_saved_words(self, words, scenes, tmp_path, capsys):
        out = tmp_path / "new" / "r.html"
        images = [str(scenes / name) for name in ("00.png", "01.png", "broken.png")]
        assert main(["report", *images, *MODEL, "--explainer", str(words), "--output", str(out)]) == 1
        page = out.read_text()
        assert page.count("<article") == 2
        for part in ("00.png", "circle", "grass", "Fingerprints", "explainer file", "Not explained", "broken.png"):
            assert part in page
        assert "2 explained in" in capsys.readouterr().out
        assert [path.name for path in out.parent.iterdir()] == ["r.html"]

    def test_the_page_lists_the_settings_that_were_given(self, words, scenes, tmp_path):
        out = tmp_path / "r.html"
        options = ["--explainer", str(words), "--top-k", "2", "--output", str(out)]
        assert main(["report", str(scenes / "00.png"), *MODEL, *options]) == 0
        rows = re.findall(r"<tr><th.*?><bdi>(.*?)</bdi></th><td>(.*?)</td></tr>", out.read_text(), flags=re.DOTALL)
        shown = {name: re.sub("<.*?>", "", value).strip() for name, value in rows}
        assert {name: shown.get(name) for name in ("explainer", "device", "concepts")} == {
            "explainer": str(words), "device": "cpu", "concepts": "3",
        }  # fmt: skip
        assert "weights" not in shown

    def test_of_vectors_marks_what_is_not_encoded(self, vectors, scenes, tmp_path, monkeypatch):
        monkeypatch.setattr(SpatialACV, "significant_", torch.tensor([True, False]))
        out = tmp_path / "r.html"
        assert main(["report", str(scenes / "00.png"), *MODEL, "--explainer", str(vectors), "--output", str(out)]) == 0
        assert out.read_text().count("not encoded here") >= 1

    def test_explain_keeps_explanations_that_report_shows(self, words, scenes, tmp_path, capsys):
        first, again = tmp_path / "first.html", tmp_path / "again.html"
        images = [str(scenes / name) for name in ("00.png", "01.png")]
        options = ["--explainer", str(words), "--output", str(tmp_path / "out"), "--save", "--report", str(first)]
        assert main(["explain", *images, *MODEL, *options]) == 0
        saved = ConceptExplanation.load(tmp_path / "out" / "00.safetensors")
        assert len(saved.concepts) == 3
        capsys.readouterr()
        assert main(["report", "--explanations", str(tmp_path / "out"), "--output", str(again), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["explained"] == 2
        pages = [path.read_text() for path in (first, again)]
        cards = [page.split("<article")[1:3] for page in pages]
        assert cards[0][0] == cards[1][0]
        titles = [page.split("<title>")[1].split("</title>")[0] for page in pages]
        assert titles[0] == titles[1]
        assert "saw" in titles[0]

    def test_an_image_that_was_not_kept_is_read_at_the_size_that_was_explained(self, words, scenes, tmp_path):
        out = tmp_path / "out"
        options = ["--explainer", str(words), "--output", str(out), "--save", "--size", "48", "--resize", "squash"]
        assert main(["explain", str(scenes / "00.png"), *MODEL, *options]) == 0
        index = json.loads((out / "explanations.json").read_text())
        for entry in index["explained"]:
            del entry["input"]
        (out / "explanations.json").write_text(json.dumps(index))
        pages = []
        for more in ([], ["--size", "32"]):
            page = tmp_path / "page.html"
            given = [str(scenes / "00.png"), "--output", str(page), *more]
            assert main(["report", "--explanations", str(out), *given]) == 0
            pages.append(re.search(r'viewBox="0 0 (\d+ \d+)"', page.read_text()).group(1))
        assert pages == ["48 48", "32 32"]

    def test_an_image_without_explanation_is_not_ignored(self, words, scenes, tmp_path, capsys):
        out = tmp_path / "out"
        options = ["--explainer", str(words), "--output", str(out), "--save"]
        assert main(["explain", str(scenes / "00.png"), *MODEL, *options]) == 0
        given = [str(scenes / "00.png"), str(scenes / "01.png"), "--output", str(tmp_path / "page.html")]
        assert main(["report", "--explanations", str(out), *given]) == 2
        assert "contains no explanation of '01.png'" in capsys.readouterr().err
        assert not (tmp_path / "page.html").exists()

    def test_of_one_file_and_its_images(self, scenes, tmp_path, capsys):
        e = ConceptExplanation(["a", "b"], torch.rand(2, 2), torch.rand(2, 2, 4, 4))
        e.save(tmp_path / "e.safetensors")
        options = ["--explanations", str(tmp_path / "e.safetensors"), "--output", str(tmp_path / "r.html")]
        images = [str(scenes / "00.png"), str(scenes / "01.png")]
        assert main(["report", *images, *options, "--title", "Two <b>images</b>"]) == 0
        assert "Two &lt;b&gt;images" in (tmp_path / "r.html").read_text()
        assert main(["report", images[0], *options]) == 2
        assert "1 images for the 2 explanations" in capsys.readouterr().err

    def test_of_one_file_whose_images_have_names(self, scenes, tmp_path, capsys):
        """Maps never land on the image of another name; names that are no files are of no use here."""
        e = ConceptExplanation(["a", "b"], torch.rand(2, 2), torch.rand(2, 2, 4, 4), image_names=["00.png", "01.png"])
        options = ["--explanations", str(e.save(tmp_path / "e.safetensors")), "--output", str(tmp_path / "r.html")]
        images = [str(scenes / "00.png"), str(scenes / "01.png")]
        assert main(["report", *images, *options]) == 0
        assert main(["report", *reversed(images), *options]) == 2
        assert "explains 00.png, 01.png; pass the images in that order" in capsys.readouterr().err
        dataclasses.replace(e, image_names=["first", "second"]).save(tmp_path / "e.safetensors")
        assert main(["report", *reversed(images), *options]) == 0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "pass --model and IMAGE, or --explanations"),
            (["--explanations", "missing"], "no saved explanations at missing"),
            (["--explanations", "{tmp}"], "no explanations.json"),
            (["{scenes}/00.png", *MODEL, "--output", "{tmp}"], "is a folder"),
            (["{scenes}/broken.png", *MODEL], "none of the 1 images can be read"),
            (["--explanations", "{tmp}", "--layer", "layer1"], "--layer would have no effect"),
            (
                ["--explanations", "{tmp}", "--weights", "w.pt", "--words", "a"],
                "--weights, --words would have no effect",
            ),
        ],
    )
    def test_what_is_wrong_is_said(self, arguments, message, scenes, tmp_path, capsys):
        arguments = [a.replace("{scenes}", str(scenes)).replace("{tmp}", str(tmp_path)) for a in arguments]
        assert main(["report", "--output", str(tmp_path / "r.html"), *arguments]) == 2
        assert message in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    def test_an_interrupt_leaves_a_whole_page_of_what_was_done(self, scenes, tmp_path, monkeypatch):
        from captum_concepts.commands import explain

        done = []

        def entry(*arguments):
            if done:
                raise KeyboardInterrupt
            done.append(arguments)
            return {"top": {}}

        monkeypatch.setattr(explain, "_entry", entry)
        images = [str(scenes / "00.png"), str(scenes / "01.png")]
        assert main(["report", *images, *MODEL, "--output", str(tmp_path / "r.html")]) == 130
        page = (tmp_path / "r.html").read_text()
        assert page.count("<article") == 1
        assert page.endswith("</html>\n")


class TestEvaluate:
    def run(self, capsys, *arguments: str, code: int = 0) -> dict:
        assert main(["evaluate", *arguments, *MODEL, "--n-bootstrap", "20", "--json"]) == code
        return json.loads(capsys.readouterr().out)

    def test_masks_of_a_folder(self, mask_folder, words, capsys):
        found = self.run(capsys, str(mask_folder), "--explainer", str(words), code=1)
        assert sorted(name.lower() for name in found["matched"]) == ["circle", "grass", "red"]
        assert "STAR" in found["unmatched"]
        assert len(found["failed"]) == 1
        assert "11.png" in found["failed"][0]["reason"]
        rows = {(row["explainer"], row["metric"]): row for row in found["rows"]}
        methods = list(dict.fromkeys(row["explainer"] for row in found["rows"]))
        assert methods[1:] == ["activation energy", "centre Gaussian", "random"]
        assert rows["centre Gaussian", "concept_specificity"]["value"] in (None, pytest.approx(0, abs=1e-6))
        assert all(row["examples"] == found["images"] <= 11 for row in rows.values())
        assert found["images"] + found["images_without"] + len(found["failed"]) == 12

    def test_object_masks_on_background(self, mask_folder, words, tmp_path, capsys):
        """Where 0 is ignored any map lies in the one region; the command says so instead of an EPG of 1 for noise."""
        scenes = CaptionedScenes(12, seed=5, size=64)
        circle = scenes.concepts.index("circle")
        for i in (k for k in range(11) if scenes[k].presence[circle]):
            (tmp_path / "data" / "images").mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / "masks").mkdir(exist_ok=True)
            shutil.copy(mask_folder / "images" / f"{i}.png", tmp_path / "data" / "images")
            Image.fromarray(scenes[i].masks[circle].byte().numpy()).save(tmp_path / "data" / "masks" / f"{i}.png")
        names = tmp_path / "data" / "classes.json"
        names.write_text('{"1": "circle"}')
        line = [str(tmp_path / "data"), "--explainer", str(words), "--metrics", "epg"]
        with pytest.warns(InputWarning, match="pass --unlabelled background"):
            rows = self.run(capsys, *line)["rows"]
        assert rows[-1]["value"] == pytest.approx(1)
        rows = self.run(capsys, *line, "--unlabelled", "background")["rows"]
        values = {row["explainer"]: row["value"] for row in rows}
        assert all(0 < value < 0.9 for value in values.values())
        assert self.run(capsys, *line, "--unlabelled", "ignore")["rows"][-1]["value"] == pytest.approx(1)
        names.write_text('{"0": "_background_", "1": "circle"}')
        assert {row["explainer"]: row["value"] for row in self.run(capsys, *line)["rows"]} == values
        names.write_text('{"0": "circle", "1": "square"}')
        with pytest.warns(InputWarning, match="'circle', but 0 means unlabeled"):
            assert main(["evaluate", *line, *MODEL]) == 2
        assert "none of the data set's concepts (square, ...)" in capsys.readouterr().err

    def test_images_that_show_none_of_the_concepts_are_counted(self, words, capsys):
        found = self.run(capsys, "demo:scenes:12", "--explainer", str(words), "--metrics", "nra", "--no-baselines")
        scenes = CaptionedScenes(12, seed=1_000_003, size=64).stack()
        columns = [name in found["matched"] for name in CaptionedScenes(1, seed=0, size=64).concepts]
        shown = int(scenes.presence[:, columns].any(1).sum())
        assert (found["images"], found["images_without"]) == (shown, 12 - shown)

    def test_the_numbers_are_those_of_the_library(self, words, capsys):
        from captum_concepts import ConceptFusionMap
        from captum_concepts.metrics import nra

        arguments = ["--explainer", str(words), "--metrics", "nra", "--no-baselines", "--seed", "3"]
        found = self.run(capsys, "demo:scenes:12", *arguments)
        cefam = ConceptFusionMap.load(words, demo.load("classifier"))
        scenes = CaptionedScenes(12, seed=1_000_006, size=64)
        values = []
        for i in range(12):
            scene = scenes[i]
            for k, name in enumerate(cefam.concepts):
                row = scenes.concepts.index(name)
                if scene.presence[row]:
                    own = cefam.attribute(scene.image[None], target=k)[:, 0]
                    values.append(nra(own, scene.masks[row][None]))
        assert found["regions"] == len(values)
        assert len(found["rows"]) == 1
        assert found["rows"][0]["value"] == pytest.approx(float(torch.cat(values).nanmean()), abs=1e-4)

    def test_words_of_the_data_set_and_a_table_as_file(self, words, tmp_path, capsys):
        out = tmp_path / "new" / "t.csv"
        arguments = ["--explainer", str(words), "--encoder", "demo:clip", "--metrics", "epg", "--output", str(out)]
        found = self.run(capsys, "demo:scenes:3", *arguments)
        assert len(found["matched"]) == 21
        assert out.read_text().startswith("explainer,metric,value")

    @pytest.mark.parametrize("name", ["folder", "voc", "broden", "imagenet-s", "coco"])
    def test_split_area_and_sizes_reach_the_reader(self, name, monkeypatch, capsys):
        from captum_concepts.commands import evaluate

        asked = []

        def reader(root, **options):
            asked.append((root, options))
            raise InputError("was here")

        monkeypatch.setitem(evaluate.FORMATS, name, reader)
        arguments = ["evaluate", "data", "--format", name, "--min-area", "0.02", *MODEL]
        assert main(arguments) == 2
        assert "was here" in capsys.readouterr().err
        assert asked[0][0] == "data"
        assert asked[0][1]["min_area"] == 0.02
        assert tuple(asked[0][1]["size"]) == (64, 64)
        assert "split" not in asked[0][1]
        assert main([*arguments, "--split", "train"]) == 2
        said = capsys.readouterr().err
        if name == "folder":
            assert "--split does not apply" in said
            assert len(asked) == 1
        else:
            assert asked[1][1]["split"] == "train"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["demo:scenes:0"], "demo:scenes:N"),
            (["missing"], "missing"),
            (["demo:scenes:2", "--metrics", "nar"], "Did you mean 'nra'"),
            (["demo:scenes:2", "--metrics", "deletion"], "measures a score"),
            (["demo:scenes:2", "--metrics", "top1_present"], "measures whether concepts are detected"),
            (["demo:scenes:2", "--format", "x", "--output", "t.xls"], "must end in .csv"),
            (["missing", "--format", "x"], "is not one of folder"),
            (["demo:scenes:2", "--min-area", "0.9"], "--min-area would have no effect"),
            (["missing", "--format", "voc", "--unlabelled", "ignore"], "--unlabelled is for --format folder and coco"),
            (["demo:scenes:2", "--similarity", "dot"], "--similarity would have no effect"),
            (["demo:scenes:2", "--train", "x"], "--train would have no effect"),
            (["demo:scenes:2"], "none of the data set's concepts"),
            (["demo:scenes:1", "--classes", "{classes}"], "none of the 1 images shows"),
        ],
    )
    def test_what_is_wrong_is_said(self, arguments, message, tmp_path, capsys):
        concepts = CaptionedScenes(1, seed=1_000_003, size=64)
        absent = concepts.concepts[int(torch.nonzero(~concepts[0].presence)[0])]
        (tmp_path / "classes.txt").write_text("\n".join([absent, *"uvwxy"]))
        arguments = [a.replace("{classes}", str(tmp_path / "classes.txt")) for a in arguments]
        assert main(["evaluate", *arguments, *MODEL]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "explain {} --output out", "report {} --output r.html", "explore {} --output r.html",
        "audit {} --output r.html", "evaluate demo:scenes:2", "fit-concepts --concepts {} --output c.safetensors",
    ],
)  # fmt: skip
def test_a_batch_has_an_image(line, scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for size in ("0", "-1"):
        assert main([*line.format(scenes).split(), *MODEL, "--batch-size", size]) == 2
        assert f"--batch-size must be an integer of at least 1, got {size}" in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("option", ["explain {} --output out --top-k 0", "evaluate demo:scenes:2 --limit 0"])
def test_numbers_of_at_least_one(option, scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*option.format(scenes).split(), *MODEL]) == 2
    assert f"{option.split()[-2]} must be an integer of at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["models", "fit-concepts", "evaluate", "report"])
def test_help_has_examples_and_exit_codes(command):
    run = subprocess.run(
        [sys.executable, "-m", "captum_concepts", command, "--help"], capture_output=True, text=True, check=True
    )
    assert "examples:" in run.stdout
    assert "exit codes" in run.stdout


class TestBottleneck:
    """A folder of `fit-salf` is an explainer too."""

    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        from captum_concepts import SALFCBM

        torch.manual_seed(0)
        salf = SALFCBM(
            demo.load("classifier"), "layer4", ["red", "circle", "grass"], 2, (4, 4), class_names=["first", "second"]
        )
        salf.save_pretrained(tmp_path / "salf")
        return tmp_path / "salf"

    def test_explained_reported_and_measured(self, folder, scenes, tmp_path, capsys):
        out = tmp_path / "r.html"
        options = [*MODEL, "--explainer", str(folder)]
        assert main(["report", str(scenes / "00.png"), *options, "--output", str(out), "--json"]) == 0
        made = json.loads(capsys.readouterr().out)
        assert set(made["explained"][0]["top"]) == {"red", "circle", "grass"}
        assert made["explained"][0]["target"] in ("first", "second")
        assert main(["evaluate", "demo:scenes:4", *options, "--metrics", "nra", "--n-bootstrap", "0", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["rows"][0]["explainer"] == "SALF-CBM"

    def test_another_folder_is_refused(self, scenes, tmp_path, capsys):
        options = ["--explainer", str(scenes), "--output", str(tmp_path / "r.html")]
        assert main(["report", str(scenes / "00.png"), *MODEL, *options]) == 2
        assert str(scenes) in capsys.readouterr().err


def test_numbers_that_are_not_finite_are_null_in_json(scenes, tmp_path, capsys):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv2d(3, 4, 3, stride=8)\n"
        "        self.head = nn.Linear(4, 2)\n"
        "        self.head.bias.data[1] = torch.inf\n"
        "    def forward(self, x):\n"
        "        return self.head(self.conv(x).mean((2, 3)))\n"
    )
    options = ["--model", f"{tmp_path / 'net.py'}:Net", "--layer", "conv", "--size", "64", "--json"]
    assert main(["report", str(scenes / "00.png"), *options, "--output", str(tmp_path / "r.html")]) == 0

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    made = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert None in made["explained"][0]["top"].values()
    assert "n/a" in (tmp_path / "r.html").read_text()


def test_a_folder_that_cannot_be_made_is_said(scenes, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for command in ("explain", "report"):
        output = str(tmp_path / "file" / "out")
        assert main([command, str(scenes / "00.png"), *MODEL, "--output", output]) == 2
        assert "error:" in capsys.readouterr().err
