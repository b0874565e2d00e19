"""``python -m captum_concepts fit-salf``: what it writes, says and refuses, and that it goes on after Ctrl-C."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import salf_tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from salf_tiny import backbone, images_and_labels
from torchvision.transforms.functional import to_pil_image

from captum_concepts.__main__ import main
from captum_concepts.commands import fit_salf_config
from captum_concepts.commands.fit_salf_config import EXAMPLE, TRIAL, fit_options, read_config
from captum_concepts.commands.image_files import LabelledImages
from captum_concepts.errors import InputError
from captum_concepts.models.salf_cbm import SALFCBM

CODE = """
import os
import sys
import time
sys.path.insert(0, {tests!r})
import salf_tiny

class Colours(salf_tiny.Colours):
    def encode_image(self, batch):
        time.sleep(float(os.environ.get("SECONDS_PER_BATCH", "0")))
        return super().encode_image(batch)

def model():
    return salf_tiny.backbone()

def encoder():
    return Colours()
"""


@pytest.fixture
def config(tmp_path, monkeypatch) -> dict:
    """A configuration of the small problem, with images as files."""
    (tmp_path / "own.py").write_text(CODE.format(tests=str(Path(salf_tiny.__file__).parent)))
    for name, seed in (("train", 0), ("val", 1)):
        x, y = images_and_labels(60, seed)
        for i, (image, label) in enumerate(zip(x, y, strict=True)):
            folder = tmp_path / name / ["c-red", "a-green", "b-none"][label]
            folder.mkdir(parents=True, exist_ok=True)
            to_pil_image(image).save(folder / f"{i:03d}.png")
    monkeypatch.chdir(tmp_path)
    return {
        "model": "own.py:model",
        "layer": "1",
        "size": 16,
        "encoder": "own.py:encoder",
        "train": "train",
        "val": "val",
        "concepts": ["red", "green", "blue", "yellow", "white"],
        "prompt": {"kind": "crop", "grid": 2, "radius": 4},
        "presence_cutoff": None,
        "interpretability_cutoff": None,
        "lam": 0.01,
        "bottleneck": {"max_epochs": 5, "batch_size": 32},
        "store": "store",
        "output": "model",
    }


def run(config: dict, *options: str) -> int:
    Path("config.json").write_text(json.dumps(config))
    return main(["fit-salf", "--config", "config.json", *options])


def test_model_report_and_card(config, capsys):
    assert run(config) == 0
    printed = capsys.readouterr().out
    for file in ("model.safetensors", "config.json", "README.md", "report.md", "report.json"):
        assert (Path("model") / file).is_file(), file
    assert printed.strip() == Path("model/report.md").read_text().strip()
    report = json.loads(Path("model/report.json").read_text())
    assert report["concepts"] == {"kept": 5, "started": 5, "dropped": {}}
    assert set(report["rules"]) == {"a-green", "b-none", "c-red"}
    assert report["accuracy"]["validation"] > 0.6
    model = SALFCBM.from_pretrained("model", backbone=backbone())
    assert model.class_names == ["a-green", "b-none", "c-red"]
    assert model.metadata["preprocessing"]["size"] == 16
    assert model.metadata["configuration"]["lam"] == 0.01
    x, y = images_and_labels(60, seed=1)
    right = (model((x * 255).round() / 255).argmax(1) == torch.tensor([2, 0, 1])[y]).float().mean().item()
    assert report["accuracy"]["validation"] == pytest.approx(right, abs=0.034)


def test_json(config, capsys):
    assert run(config, "--json") == 0
    assert json.loads(capsys.readouterr().out)["accuracy"]["train"] > 0.6


def test_again_takes_what_is_there(config, capsys):
    assert run(config) == 0
    first = load_file("model/model.safetensors")
    capsys.readouterr()
    assert run(config) == 0
    told = capsys.readouterr().err
    assert "bottleneck: taken from an earlier run" in told
    assert told.count("head: taken from an earlier run") == 1
    assert all(torch.equal(value, first[name]) for name, value in load_file("model/model.safetensors").items())
    logger = logging.getLogger("captum_concepts")
    assert logger.propagate
    assert not logger.handlers


def test_dry_run_writes_nothing(config, capsys):
    before = sorted(Path().rglob("*"))
    assert run(config, "--dry-run") == 0
    assert [p for p in sorted(Path().rglob("*")) if "__pycache__" not in str(p)] == sorted(
        [*before, Path("config.json")]
    )
    printed = capsys.readouterr().out
    assert "60 images of train, 60 images of val; 4 cells, 5 concepts, 3 classes" in printed
    assert "machines like this one needed to finish in 24 hours: 1" in printed
    assert run({**config, "within_hours": 1e-9}, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["plan"]["processes"] > 1


def test_concepts_from_file_and_from_classes(config, capsys):
    Path("concepts.txt").write_text("red\na red\n# no concept\ngreen\nblue\n")
    assert (
        run({**config, "concepts": "concepts.txt", "clean": True, "filter": {"max_length": 4, "similarity": False}})
        == 0
    )
    report = json.loads(Path("model/report.json").read_text())
    assert report["concepts"] == {"kept": 2, "started": 4, "dropped": {"duplicate": 1, "too long": 1}}
    capsys.readouterr()
    assert run({**config, "concepts": "classes"}) == 2
    assert "An image of a a-green" in capsys.readouterr().err


def test_unreadable_images(config, capsys):
    (Path("train") / "c-red" / "broken.png").write_bytes(b"nothing")
    assert run(config) == 2
    assert "broken.png cannot be read" in capsys.readouterr().err
    assert run({**config, "skip_unreadable": True, "store": "other"}) == 1
    out = capsys.readouterr()
    assert "1 images could not be read" in out.out
    assert "broken.png" in out.out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": "nowhere"}, "no folder at nowhere"),
        ({"train": "demo:scenes:many"}, "is not demo:scenes:N"),
        ({"train": "demo:scenes:0"}, "is not demo:scenes:N"),
        ({"val": 3}, "must be a folder"),
        ({"concepts": "nowhere.txt"}, "there is no concept file"),
        ({"concepts": 3}, "a list, a file, or 'classes'"),
        ({"concepts": ["red", "mauve"]}, "mauve"),
        ({"lam": 0.1, "nonzeros_per_class": 2}, "not both"),
        ({"prompt": {"kind": "square"}}, "must be one of"),
        ({"prompt": {"size": 3}}, "RegionPrompt has no setting .size."),
        ({"prompt": "circle"}, "must be an object"),
        ({"filter": {"cutoff": 1}}, "filter"),
        ({"feature_dtype": "bfloat16"}, "'float16', 'float32'"),
        ({"layr": "1"}, r"unknown key 'layr'. Did you mean 'layer'"),
        ({"layer": "9"}, "no layer '9'"),
        ({"output": "own.py"}, "is a file"),
        ({"model": "own.py:encoder"}, "must return a torch.nn.Module"),
        ({"weights": "nowhere.pt"}, "no weights file at nowhere.pt"),
        ({"num_classes": 3}, "--num-classes is for torchvision and timm names"),
        ({"store": "train"}, "store train is inside the folder of train"),
        ({"store": "val/store"}, "store val/store is inside the folder of val"),
        ({"output": "train/model"}, "output train/model is inside the folder of train"),
        ({"store": "./model"}, "output and store are the same folder"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused(config, capsys, change, message):
    assert run({**config, **change}) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not Path("model").exists()


@pytest.mark.parametrize("name", ["config.json", "README.md", "model.safetensors"])
def test_files_of_something_else_stay(name, config, capsys):
    Path("project").mkdir()
    (Path("project") / name).write_text("{}")
    assert run({**config, "output": "project"}) == 2
    assert f"contains a {name} that does not belong to a SALF-CBM" in capsys.readouterr().err
    assert (Path("project") / name).read_text() == "{}"
    assert [path.name for path in Path("project").iterdir()] == [name]


def test_classes_of_val_in_another_order(config, tmp_path):
    """As they are where one of the two is not a folder."""
    x, y = images_and_labels(30, 1)
    mixed = LabelledImages(list(x), ["b-none", "c-red", "a-green"], [(int(label) + 1) % 3 for label in y])
    plain = LabelledImages(list(x), ["a-green", "b-none", "c-red"], [(2, 0, 1)[int(label)] for label in y])
    accuracies = []
    for k, val in enumerate((mixed, plain)):
        with pytest.MonkeyPatch.context() as patch:
            opened = fit_salf_config.labelled_images
            patch.setattr(
                fit_salf_config,
                "labelled_images",
                lambda source, *a, val=val, opened=opened, **o: val if source == "val" else opened(source, *a, **o),
            )
            assert run({**config, "output": f"model{k}", "store": f"store{k}"}) == 0
        accuracies.append(json.loads(Path(f"model{k}/report.json").read_text())["accuracy"]["validation"])
    assert accuracies[0] == accuracies[1] > 0.5


def test_broken_configurations(config, capsys):
    for text in ("", "[1]", "{", "{}", '{"model": "x"}'):
        Path("config.json").write_text(text)
        assert main(["fit-salf", "--config", "config.json"]) == 2
    assert main(["fit-salf", "--config", "nowhere.json"]) == 2
    assert "no configuration file at nowhere.json" in capsys.readouterr().err


def test_val_with_other_classes(config, capsys):
    folder = Path("val") / "d-other"
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(folder / "0.png")
    assert run(config) == 2
    assert "different classes: ['d-other']" in capsys.readouterr().err


def test_read_only_store(config, capsys, monkeypatch):
    def full(*_args, **_options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("captum_concepts.commands.fit_salf.fit_salf_cbm", full)
    assert run(config) == 2
    assert "Read-only file system" in capsys.readouterr().err


def start(config: dict, *prefix: str, **more: str) -> subprocess.Popen:
    Path("config.json").write_text(json.dumps(config))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"} | more
    command = [sys.executable, *prefix, "-m", "captum_concepts", "fit-salf", "--config", "config.json"]
    return subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)


def test_ctrl_c_leaves_whole_files_and_goes_on(config):
    assert run({**config, "store": "other", "output": "expected"}) == 0
    program = start(config, SECONDS_PER_BATCH="0.05")  # so that there is something left to interrupt
    while program.poll() is None and not list(Path("store").glob("regions-train/shard-*")):
        time.sleep(0.005)
    program.send_signal(signal.SIGINT)
    _, told = program.communicate(timeout=60)
    assert program.returncode == 130, told
    assert "interrupted" in told
    assert not Path("model/model.safetensors").exists()
    assert not list(Path("store").rglob("*.partial"))
    assert run(config) == 0
    expected = load_file("expected/model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in load_file("model/model.safetensors").items())


def test_torchrun(config):
    program = start(config, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    printed, told = program.communicate(timeout=120)
    assert program.returncode == 0, told
    assert printed.count("# SALF-CBM") == 1
    assert told.count("bottleneck: computing") == 1
    assert run({**config, "store": "other", "output": "alone"}) == 0
    alone, together = (load_file(f"{folder}/model.safetensors") for folder in ("alone", "model"))
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, atol=1e-4, rtol=1e-4)


def test_help_shows_examples_that_are_understood(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["fit-salf", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for example in (EXAMPLE, TRIAL):
        assert json.dumps(example, indent=2) in printed
        (tmp_path / "config.json").write_text(json.dumps(example))
        assert read_config(tmp_path / "config.json") == example
    for name in fit_options():
        assert name in printed
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="lacks"):
        read_config(tmp_path / "config.json")
