"""The command line on real files: what it writes, what it says, and its exit codes."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from captum_concepts.__main__ import main, parser, run
from captum_concepts.commands.explain import line_of
from captum_concepts.commands.models import load_model, without_head
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.errors import InputError, InputWarning
from captum_concepts.images import load_image

MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(inplace=True)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )

def tensor():
    return torch.zeros(1)
"""


@pytest.fixture
def model_file(tmp_path: Path) -> str:
    path = tmp_path / "my_model.py"
    path.write_text(MODEL)
    return f"{path}:build"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two readable photographs of different sizes, one of them twice under one name, and a broken file."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name, size in (("a.jpg", (40, 60)), ("b.png", (90, 50)), ("more/a.jpg", (64, 64))):
        Image.effect_noise(size, 80).convert("RGB").save(folder / name)
    (folder / "broken.jpg").write_bytes(b"nothing")
    return folder


@pytest.fixture
def references(tmp_path: Path) -> Path:
    for colour in ("blue", "red"):
        (tmp_path / "classes" / colour).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (64, 64 + i), colour).save(tmp_path / "classes" / colour / f"{i}.png")
    return tmp_path / "classes"


def test_explains_what_it_can_and_names_the_rest(model_file, photos, tmp_path, capsys):
    out = tmp_path / "out"
    code = main(
        ["explain", str(photos), "--model", model_file, "--output", str(out), "--size", "64", "--batch-size", "2"]
    )
    assert code == 1
    said = capsys.readouterr()
    assert "3 explained at layer 0" in said.out
    assert "broken.jpg" in said.err
    report = json.loads((out / "explanations.json").read_text())
    assert [Path(e["image"]).name for e in report["failed"]] == ["broken.jpg"]
    assert sorted(p.name for p in out.iterdir()) == ["a.png", "b.png", "explanations.json", "more"]
    assert [p.name for p in (out / "more").iterdir()] == ["a.png"]
    for entry in report["explained"]:
        assert load_image(out / entry["picture"]).shape[2] > 300
        assert len(entry["top"]) == 3


@pytest.mark.parametrize("size", [(1024, 751), (1000, 371), (799, 887), (603, 1024)])
def test_no_size_of_a_photograph_is_refused(size: tuple[int, int], model_file, tmp_path):
    """What the model saw of it ends, rounded, a little beyond the picture that is drawn."""
    Image.new("RGB", size, "gray").save(tmp_path / "photo.png")
    line = ["explain", str(tmp_path / "photo.png"), "--model", model_file, "--size", "64"]
    assert main([*line, "--output", str(tmp_path / "out"), "--report", str(tmp_path / "page.html")]) == 0


def test_a_run_that_fails_leaves_no_folder(model_file, photos, tmp_path, capsys):
    (tmp_path / "two.txt").write_text("a\nb\n")
    for more in (["--classes", str(tmp_path / "two.txt")], ["--layer", "nowhere"], ["--batch-size", "0"]):
        out = ["--output", str(tmp_path / "new" / "out")]
        assert main(["explain", str(photos), "--model", model_file, "--size", "64", *out, *more]) == 2
        assert not (tmp_path / "new").exists(), more


def test_a_model_of_pixels_is_told_what_to_do(photos, tmp_path, capsys):
    (tmp_path / "pixels.py").write_text("from torch import nn\n\ndef build():\n    return nn.Conv2d(3, 2, 1)\n")
    line = ["explain", str(photos), "--model", f"{tmp_path / 'pixels.py'}:build", "--output", str(tmp_path / "out")]
    assert main([*line, "--size", "32"]) == 2
    assert "returns (1, 2, 32, 32), not (N, classes)" in (said := capsys.readouterr().err)
    assert "captum_concepts.targets" in said


@pytest.mark.parametrize("last", ["nn.Identity()", "nn.Softmax(1)", "nn.Sigmoid()"])
def test_the_predicted_class_has_its_probability(last: str, photos, tmp_path, capsys):
    (photos / "broken.jpg").unlink()
    (tmp_path / "own.py").write_text(MODEL.replace("nn.Linear(8, 4),", f"nn.Linear(8, 4), {last},"))
    loaded = load_model(f"{tmp_path / 'own.py'}:build", size=64)
    out = str(tmp_path / "out")
    main(["explain", str(photos), "--model", f"{tmp_path / 'own.py'}:build", "--size", "64", "--output", out, "--json"])
    entries = json.loads(capsys.readouterr().out)["explained"]
    for entry, image in zip(entries, loaded.open(photos), strict=True):
        output = loaded.model(loaded.prepare(image[None]))[0]
        chance = output.softmax(0) if last == "nn.Identity()" else output
        assert entry["target"] == f"output {int(output.argmax())}"
        assert entry["target_probability"] == pytest.approx(float(chance.max()), rel=1e-4)


def test_an_assumed_size_is_said(model_file: str, photos):
    with pytest.warns(InputWarning, match=r"does not specify .* read at 224 x 224 pixels; pass --size"):
        load_model(model_file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_model(model_file, size=64).size == 64


def test_defaults_are_the_same_in_python_and_on_the_command_line():
    """Each is written twice, because the help must not import torch."""
    from captum_concepts.commands import evaluate, explain, explore, fit_concepts, fit_salf, list_layers

    commands = next(a.choices for a in parser()._actions if isinstance(a.choices, dict))
    settings = {
        "evaluate": evaluate.EvaluateSettings, "explain": explain.ExplainSettings, "models": list_layers.ModelsSettings,
        "fit-concepts": fit_concepts.FitConceptsSettings, "explore": explore.ExploreSettings,
        "audit": explore.AuditSettings, "fit-salf": fit_salf.FitSettings,
    }  # fmt: skip
    for name, kind in settings.items():
        declared = {action.dest: action.default for action in commands[name]._actions}
        for field in dataclasses.fields(kind):
            if field.default is not dataclasses.MISSING:
                assert declared[field.name] == field.default, f"{name}: {field.name}"


def test_a_warning_is_one_line_without_source(model_file: str, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    command = [sys.executable, "-m", "captum_concepts", "explain", str(tmp_path / "a.png"), "--model", model_file]
    done = subprocess.run([*command, "--output", str(tmp_path / "out")], capture_output=True, text=True, check=True)
    assert re.search(r"^warning: the model of .* read at 224 x 224 pixels; pass --size .*$", done.stderr, re.MULTILINE)
    assert "InputWarning" not in done.stderr
    assert "load_model" not in done.stderr


def test_references_are_the_class_folders(model_file, photos, references, tmp_path, capsys):
    (photos / "broken.jpg").unlink()
    Image.new("RGB", (64, 64), "red").save(photos / "b.png")
    code = main(
        [
            "explain",
            str(photos / "b.png"),
            "--model",
            model_file,
            "--references",
            str(references),
            "--output",
            str(tmp_path / "out"),
            "--size",
            "64",
            "--json",
        ]
    )
    assert code == 0
    report = json.loads(capsys.readouterr().out)
    top = report["explained"][0]["top"]
    assert next(iter(top)) == "red"
    assert top["red"] == pytest.approx(1.0, abs=1e-4)


def test_weights_from_a_local_file(tmp_path, photos):
    torch.manual_seed(0)
    net = torchvision.models.squeezenet1_1(num_classes=5)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    loaded = load_model("squeezenet1_1", weights=str(tmp_path / "w.safetensors"), num_classes=5, size=64)
    assert all(
        torch.equal(a, b) for a, b in zip(net.state_dict().values(), loaded.model.state_dict().values(), strict=True)
    )
    assert not loaded.model.training
    with pytest.raises(InputError, match="does not contain weights of resnet18"):
        load_model("resnet18", weights=str(tmp_path / "w.safetensors"))


def test_weights_and_outputs_of_models_from_outside(tmp_path, model_file, photos, capsys):
    """An own network takes ``--weights`` as a zoo's does; a number of outputs alone leaves a zoo's names behind."""
    other = load_model(model_file, size=64).model
    torch.nn.init.constant_(other[3].bias, 3.0)
    torch.save(other.state_dict(), tmp_path / "w.pt")
    loaded = load_model(model_file, weights=str(tmp_path / "w.pt"), size=64).model
    assert torch.equal(loaded[3].bias, torch.full((4,), 3.0))
    with pytest.raises(InputError, match="does not contain weights"):
        load_model("resnet18", weights=str(tmp_path / "w.pt"))
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), tmp_path / "three.pt")
    line = ["explain", str(photos / "a.jpg"), "--model", "resnet18", "--weights", str(tmp_path / "three.pt")]
    assert main([*line, "--num-classes", "3", "--size", "64", "--output", str(tmp_path / "out")]) == 0
    assert "output " in capsys.readouterr().out


def test_without_head_gives_the_input_of_the_last_linear_layer():
    net = torchvision.models.mobilenet_v2(num_classes=7).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        pooled = net.features(x).mean((2, 3))
        torch.testing.assert_close(without_head(net, x)(x), pooled)
    headless = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    assert without_head(headless, x) is headless


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet5"], "Did you mean"),
        (["--model", "resnet18"], "--weights FILE"),
        (["--model", "resnet18", "--weights", "missing.safetensors"], "no weights file"),
        (["--model", "nowhere.py:build"], "no file at nowhere.py"),
        (["--model", "{file}:biuld"], "Did you mean 'build'"),
        (["--model", "{file}:tensor"], "must return a torch.nn.Module"),
        (["--model", "demo:nothing"], "demo:classifier"),
        (["--model", "{file}:build", "--layer", "0.7"], "no layer '0.7'"),
        (["--model", "{file}:build", "--references", "missing"], "no folder at missing"),
        (["--model", "{file}:build", "--classes", "missing.txt"], "cannot be read"),
        (["--model", "{file}:build", "--top-k", "0"], "at least 1"),
        (["--model", "{file}:build", "--output", ""], "output is empty"),
        (["--model", "{file}:build", "--weights", "missing.pt"], "no weights file at missing.pt"),
        (["--model", "{file}:build", "--weights", "pretrained"], "comes with its weights"),
        (["--model", "{file}:build", "--num-classes", "9"], "--num-classes is for torchvision and timm names"),
        (["--model", "demo:vit", "--weights", "w.pt"], "comes with its weights"),
        (["--model", "{file}:build", "--encoder", "demo:clip"], "--encoder would have no effect"),
        (["--model", "{file}:build", "--similarity", "dot"], "--similarity would have no effect"),
        (["--model", "{file}:build", "--title", "x"], "--title would have no effect"),
        (["--model", "{file}:build", "--words", "words.csv"], "text concepts need a translator"),
    ],
)
def test_bad_settings_exit_with_2_and_say_why(arguments, message, model_file, photos, tmp_path, capsys):
    file = model_file.removesuffix(":build")
    arguments = [a.replace("{file}", file) for a in arguments]
    assert main(["explain", str(photos / "a.jpg"), "--output", str(tmp_path / "out"), "--size", "64", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["explain", "{photos}", "--model", "m.py:build", "--output", "out", "--references", ""],
            "references is empty",
        ),
        (["explain", "{photos}", "--model", "m.py:build", "--output", " "], "output is empty"),
        (["explain", "", "--model", "m.py:build", "--output", "out"], "images is empty"),
        (["demo", "--output", ""], "output is empty"),
        (["fit-salf", "--config", "config.json"], "store is empty in config.json"),
        (["models", "resnet18", "--num-classes", "-3"], "--num-classes must be an integer"),
        (["evaluate", "demo:scenes:²", "--model", "demo:classifier", "--explainer", "x"], "not demo:scenes:N"),
    ],
)
def test_values_of_unset_variables_and_strange_numbers(arguments, message, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    required = ("output", "model", "encoder", "concepts", "train", "store")
    Path("config.json").write_text(json.dumps({**dict.fromkeys(required, "x"), "store": ""}))
    before = set(tmp_path.iterdir())
    assert main([value.replace("{photos}", str(photos)) for value in arguments]) == 2
    assert message in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before


def test_nothing_readable_exits_with_2(model_file, photos, tmp_path, capsys):
    arguments = ["explain", str(photos / "broken.jpg"), "--model", model_file, "--output", str(tmp_path / "out")]
    assert main([*arguments, "--size", "64"]) == 2
    assert "none of the 1 images can be read" in capsys.readouterr().err


def test_an_interrupt_leaves_whole_files(model_file, photos, tmp_path, monkeypatch, capsys):
    from captum_concepts.commands import explain

    drawn = []

    def draw(*arguments):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(arguments)

    monkeypatch.setattr(explain, "_draw", draw)
    assert (
        main(["explain", str(photos), "--model", model_file, "--output", str(tmp_path / "out"), "--size", "64"]) == 130
    )
    assert len(json.loads((tmp_path / "out" / "explanations.json").read_text())["explained"]) == 1


@pytest.mark.parametrize("command", [[], ["demo"], ["explain"]])
def test_help_has_examples_and_exit_codes(command):
    run = subprocess.run(
        [sys.executable, "-m", "captum_concepts", *command, "--help"], capture_output=True, text=True, check=True
    )
    assert "exit codes" in run.stdout


def test_the_console_script_is_this_command_line():
    """Whether or not it is installed: `pip install` makes it from this line."""
    line = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    module, function = re.search(r'^captum-concepts = "([\w.]+):(\w+)"$', line, re.MULTILINE).groups()
    assert getattr(importlib.import_module(module), function) is run


def test_the_installed_console_script_runs():
    script = Path(sys.executable).with_name("captum-concepts")
    if not script.is_file():
        pytest.skip("the console script is not installed (pip install of this version makes it)")
    ran = subprocess.run([script, "--version"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.split()[0]) == (0, "captum_concepts")


def test_closed_standard_error(model_file, photos, tmp_path, capsys, monkeypatch):
    """As by `2>&-`: what would be said there is dropped, and the command does its work."""
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["explain", str(photos), "--model", model_file, "--output", str(tmp_path / "out"), "--size", "64"]) == 1
    assert sys.stderr is None
    assert "explained at layer" in capsys.readouterr().out


def test_what_is_not_seen_is_marked_however_unlikely_it_is():
    entry = {"image": "a.jpg", "top": {"x": 0.3, "y": 0.2, "z": None}, "presence": {"x": 0.0, "y": 0.9, "z": None}}
    assert line_of(entry) == "a.jpg: x 0.3 (not seen), y 0.2, z n/a"


def test_version():
    run = subprocess.run(
        [sys.executable, "-m", "captum_concepts", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("captum_concepts 0.")


def test_real_network_and_photographs(shared_data, tmp_path, capsys):
    """MobileNetV2 and prototypes of two Caltech-101 classes: photographs of each are closest to their own."""
    for name in ("dalmatian", "grand_piano"):
        files = sorted((shared_data / "images" / "caltech101" / name).iterdir())
        (tmp_path / "classes" / name).mkdir(parents=True)
        for file in files[:5]:
            (tmp_path / "classes" / name / file.name).write_bytes(file.read_bytes())
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / f"{name}.jpg").write_bytes(files[8].read_bytes())
    code = main(
        [
            "explain",
            str(tmp_path / "photos"),
            "--model",
            f"{shared_data / 'real_models.py'}:mobilenet_v2",
            "--size",
            "224",
            "--json",
            "--references",
            str(tmp_path / "classes"),
            "--layer",
            "net.features.18",
            "--output",
            str(tmp_path / "out"),
        ]
    )
    assert code == 0
    for entry in json.loads(capsys.readouterr().out)["explained"]:
        assert next(iter(entry["top"])) == Path(entry["image"]).stem


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    for i, image in enumerate(CaptionedScenes(40, seed=77, size=64).stack().image):
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(folder / f"{i:02}.png")
    return folder


class TestWords:
    """`--words`: CE-FAM with a translator trained on a folder, kept in a file, and used with other words."""

    def run(self, scenes: Path, out: Path, *more: str) -> int:
        images = [str(scenes / "00.png"), str(scenes / "01.png")]
        return main(["explain", *images, "--model", "demo:classifier", "--output", str(out), *more])

    def test_train_keep_and_reuse(self, scenes, tmp_path, capsys):
        file = tmp_path / "words.safetensors"
        train = [
            "--words",
            "red, circle,wood",
            "--encoder",
            "demo:clip",
            "--train",
            str(scenes),
            "--explainer",
            str(file),
        ]
        assert self.run(scenes, tmp_path / "a", *train, "--json") == 0
        first = json.loads(capsys.readouterr().out)
        assert set(first["explained"][0]["contributions"]) == {"red", "circle", "wood"}
        assert first["explained"][0]["target"] in CaptionedScenes(1, seed=0, size=64).classes
        kept = file.read_bytes()
        assert self.run(scenes, tmp_path / "b", "--explainer", str(file), "--json") == 0
        again = json.loads(capsys.readouterr().out)
        assert again["explained"][0]["top"] == pytest.approx(first["explained"][0]["top"], abs=1e-5)
        other = ["--explainer", str(file), "--words", "star,snow", "--encoder", "demo:clip", "--json"]
        assert self.run(scenes, tmp_path / "c", *other) == 0
        assert set(json.loads(capsys.readouterr().out)["explained"][0]["top"]) == {"star", "snow"}
        assert file.read_bytes() == kept

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--words", "red"], "--train DIR"),
            (["--words", "red", "--train", "{scenes}"], "--words requires --encoder"),
            (["--words", " , ", "--train", "{scenes}", "--encoder", "demo:clip"], "contains no concept"),
            (["--words", "red,zebra", "--train", "{scenes}", "--encoder", "demo:clip"], "zebra"),
            (["--words", "red,sky", "--train", "{scenes}", "--encoder", "ViT-B-32"], "--encoder-weights"),
            (["--explainer", "missing.safetensors"], "no explainer file at missing.safetensors"),
        ],
    )
    def test_what_is_missing_is_said(self, scenes, tmp_path, capsys, more, message):
        more = [part.replace("{scenes}", str(scenes)) for part in more]
        assert self.run(scenes, tmp_path / "out", *more) == 2
        assert message in capsys.readouterr().err


class TestWhatIsRead:
    """Every size, mean and deviation from the library's own metadata; junk, names and words as people have them."""

    def test_every_model_of_torchvision(self):
        import torchvision

        from captum_concepts.commands.models import LoadedModel
        from captum_concepts.images import preprocessing_of

        sizes = {}
        for name in torchvision.models.list_models(module=torchvision.models):
            theirs = torchvision.models.get_model_weights(name).DEFAULT.transforms()
            loaded = LoadedModel(torch.nn.Identity(), preprocessing_of(name))
            assert loaded.size == theirs.crop_size[0]
            white = loaded.prepare(torch.ones(1, 3, 2, 2))[0, :, 0, 0]
            assert torch.allclose(white, (1 - torch.tensor(theirs.mean)) / torch.tensor(theirs.std))
            sizes[name] = loaded.size
        assert sum(size != 224 for size in sizes.values()) == 16

    def test_a_model_by_name(self):
        from captum_concepts.commands.models import load_model

        loaded = load_model("efficientnet_b1", random_weights=True)
        assert (loaded.size, loaded.preprocessing.interpolation) == (240, "bilinear")
        assert loaded.empty().shape == (1, 3, 240, 240)
        assert load_model("efficientnet_b1", random_weights=True, size=96).size == 96
        assert load_model("timm/efficientnet_b1", random_weights=True).preprocessing.mean == (0.5,) * 3

    def test_gray_models(self, tmp_path, photos, capsys):
        (tmp_path / "gray.py").write_text(
            "import torch\nfrom torch import nn\n"
            "def build():\n"
            "    torch.manual_seed(0)\n"
            "    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),"
            " nn.Linear(4, 2))\n"
        )
        arguments = ["--model", f"{tmp_path}/gray.py:build", "--size", "64", "--output", str(tmp_path / "out")]
        assert main(["explain", str(photos / "b.png"), *arguments]) == 0

    def test_names_junk_and_words(self, model_file, photos, tmp_path, capsys):
        import shutil

        for folder in ("a", "b"):
            (tmp_path / "in" / folder / "__MACOSX").mkdir(parents=True)
            shutil.copy(photos / "b.png", tmp_path / "in" / folder / "same.png")
            for junk in ("._same.png", "Thumbs.db", "__MACOSX/same.png"):
                (tmp_path / "in" / folder / junk).write_bytes(b"junk")
        (tmp_path / "classes.txt").write_bytes("café\r\nzebra\r\nox\r\ncat".encode("cp1252"))
        page = tmp_path / "page.html"
        arguments = ["explain", str(tmp_path / "in"), "--model", model_file, "--output", str(tmp_path / "out")]
        assert (
            main([*arguments, "--size", "64", "--classes", str(tmp_path / "classes.txt"), "--report", str(page)]) == 0
        )
        found = json.loads((tmp_path / "out" / "explanations.json").read_text())
        assert found["classes"] == ["café", "zebra", "ox", "cat"]
        assert found["failed"] == []
        assert "a/same.png" in page.read_text()
        assert "b/same.png" in page.read_text()

    def test_broken_files_are_said_once(self, model_file, photos, tmp_path, capsys):
        arguments = ["explain", str(photos), "--model", model_file, "--size", "64", "--output", str(tmp_path / "out")]
        assert main(arguments) == 1
        assert capsys.readouterr().err.count("broken.jpg (") == 1
