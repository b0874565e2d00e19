"""`models`: which layers there are, and which suit which method."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from captum_concepts.__main__ import main
from captum_concepts.activations import capture
from captum_concepts.commands.models import load_model
from captum_concepts.errors import InputError


def run(capsys, *arguments: str) -> dict:
    assert main(["models", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["demo:classifier", "demo:vit", "squeezenet1_1"])
def test_what_is_listed_is_what_the_network_gives(name, capsys):
    found = run(capsys, name)
    model = load_model(name, random_weights=True).model
    names = [row["name"] for row in found["layers"]]
    seen = capture(model, torch.rand(1, 3, *found["input"]), names)
    assert list(seen.output.shape[1:]) == found["outputs"]
    for row, raw in zip(found["layers"], seen.layers, strict=True):
        positions = row["grid"][0] * row["grid"][1] + row["prefix_tokens"]
        assert raw.numel() == (row["channels"] * positions)
        assert min(row["grid"]) > 1
    advised = {layer for value in found["advice"].values() for layer in ([value] if isinstance(value, str) else value)}
    assert advised <= set(names)


def test_all_lists_the_layers_inside_blocks_as_well(capsys):
    few = {row["name"] for row in run(capsys, "demo:classifier")["layers"]}
    many = {row["name"] for row in run(capsys, "demo:classifier", "--all")["layers"]}
    assert few < many
    assert "layer4.0.conv1" in many - few


def test_a_layer_whose_positions_do_not_reach_the_output_is_for_relevance_only(tmp_path, capsys):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.first = nn.Conv2d(3, 4, 3, stride=8)\n"
        "        self.aside = nn.Conv2d(4, 4, 1)\n"
        "        self.head = nn.Linear(4, 2)\n"
        "    def forward(self, x):\n"
        "        x = self.first(x)\n"
        "        self.aside(x)\n"
        "        return self.head(x.mean((2, 3)))\n"
    )
    rows = {row["name"]: row for row in run(capsys, f"{tmp_path / 'net.py'}:Net", "--size", "64")["layers"]}
    assert rows["first"]["reaches_output"]
    assert not rows["aside"]["reaches_output"]
    assert rows["aside"]["suits"][0] == "SpatialACV (relevance only)"
    assert "FAM*" in rows["first"]["suits"]


def test_spatial_acv_is_advised_a_layer_whose_gradient_depends_on_the_image(capsys):
    """Between layer4 and the logits there is a mean and a linear map."""
    listed = run(capsys, "resnet18", "--size", "64")
    assert listed["advice"]["FAM"] == "layer4"
    assert listed["advice"]["SpatialACV"] == "layer4.0"
    suits = {row["name"]: row["suits"] for row in listed["layers"]}
    assert "FAM*" in suits["layer4"]
    assert "SpatialACV" in suits["layer4"]
    assert "SpatialACV*" in suits["layer4.0"]
    assert main(["models", "resnet18", "--size", "64"]) == 0
    assert "--layer layer4 for FAM and SALF-CBM; --layer layer4.0 for SpatialACV" in capsys.readouterr().out


def test_the_table_is_for_people(capsys):
    assert main(["models", "demo:classifier"]) == 0
    said = capsys.readouterr().out
    assert "input 64 x 64" in said
    assert "--layer layer4" in said


def test_names_are_found_by_pattern(capsys):
    assert run(capsys, "--find", "resnet1?")["torchvision"] == ["resnet18"]
    assert "demo:vit" in run(capsys, "--find", "vit")["bundled"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--find PATTERN"),
        (["resnet5"], "Did you mean"),
        (["--find", "no such network"], "no model matches"),
        (["resnet18", "--weights", "missing.pt"], "no weights file"),
    ],
)
def test_what_is_wrong_is_said(arguments, message, capsys):
    assert main(["models", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_device_that_is_not_there_is_named(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"")
    folder, out = str(tmp_path), str(tmp_path / "out")
    command = ["explain", folder, "--model", "demo:classifier", "--device", "abacus", "--output", out]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "device 'abacus' cannot be used here" in error
    assert "pass cpu, cuda or mps" in error
    assert "Traceback" not in error


def test_weights_of_another_network_are_named_in_short():
    from captum_concepts import demo
    from captum_concepts.errors import InputError

    with pytest.raises(InputError, match="does not contain weights of resnet18") as caught:
        load_model("resnet18", weights=str(demo.WEIGHTS / "classifier.safetensors"))
    assert len(str(caught.value)) < 1200


NET = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2)
        self.head = nn.Linear(4, 2)
    def forward(self, x):
        {first}
        return self.head(self.first(x).relu().mean((2, 3)))
"""


@pytest.fixture
def users(tmp_path):
    """A model file of the user, with a line of its forward and lines after the class; its function is `make`."""

    def write(after: str, first: str = "pass") -> str:
        path = tmp_path / "users.py"
        path.write_text(NET.format(first=first) + after)
        return f"{path}:make"

    return write


@pytest.mark.parametrize(
    "after",
    [
        "make = Net()\n",
        "make = Net\n",
        "def make():\n    return Net().train()\n",
        "import os, tempfile\nos.chdir(tempfile.mkdtemp())\ndef make():\n    return Net()\n",
        "import sys\nsys.path.clear()\nsys.path.append('')\ndef make():\n    return Net()\n",
    ],
)
def test_what_a_file_may_have_in_it(users, after, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    here = Path.cwd()
    assert [row["name"] for row in run(capsys, users(after), "--size", "16")["layers"]] == ["first"]
    assert Path.cwd() == here


def test_a_neighbor_that_is_imported_when_the_model_runs(users, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "imported_later_by_the_user.py").write_text("")
    run(capsys, users("make = Net\n", "import imported_later_by_the_user"), "--size", "16")


@pytest.mark.parametrize(
    ("after", "first", "said"),
    [
        (
            "make = Net\n",
            "raise RuntimeError('in forward')",
            r"failed with RuntimeError: in forward \(line 10 of users.py\)",
        ),
        ("make = 3\n", "pass", "'make' in .* is int, not a function"),
        ("def make():\n    raise GeneratorExit\n", "pass", "failed with GeneratorExit"),
        ("def make():\n    return Net().half()\n", "pass", "float16"),
        (
            "import warnings\ndef make():\n    with warnings.catch_warnings():\n"
            "        warnings.simplefilter('ignore')\n"
            "        return torch.jit.trace(Net().eval(), torch.rand(1, 3, 16, 16))\n",
            "pass",
            "torch.jit model",
        ),
        ("make = Net\n", "assert x.shape[-1] == 64, 'Wrong image width!'", "does not take images of 16 x 16 pixels"),
    ],
)
def test_what_goes_wrong_in_it_is_said(users, after, first, said, capsys):
    assert main(["models", users(after, first), "--size", "16", "--json"]) == 2
    printed, told = capsys.readouterr()
    assert printed == ""
    assert re.search(said, told), told
    assert len(told) < 700


def test_what_it_prints_below_python_goes_to_standard_error(users, capfd):
    source = "import os\nos.write(1, b'written\\n')\nprint('printed')\n"
    source += "def make():\n    os.system('echo run')\n    return Net()\n"
    assert main(["models", users(source), "--size", "16", "--json"]) == 0
    printed, told = capfd.readouterr()
    json.loads(printed)
    assert {"written", "printed", "run"} <= set(told.split())


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_of_a_training_script(wrapper, prefix, tmp_path):
    """As ``torch.save`` keeps them, alone or beside an optimizer, of a plain or a distributed model."""
    torch.manual_seed(0)
    trained = torchvision.models.squeezenet1_1(num_classes=3)
    state = {prefix + key: value for key, value in trained.state_dict().items()}
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "w.pt")
    loaded = load_model("squeezenet1_1", weights=str(tmp_path / "w.pt"), num_classes=3)
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(loaded.model.eval()(x), trained.eval()(x))


@pytest.mark.parametrize("name", ["w.safetensors", "W.SAFETENSORS"])
def test_weights_as_safetensors(name, tmp_path):
    trained = torchvision.models.squeezenet1_1(num_classes=3)
    save_file(trained.state_dict(), tmp_path / name)
    loaded = load_model("squeezenet1_1", weights=str(tmp_path / name), num_classes=3)
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(loaded.model.eval()(x), trained.eval()(x))


class Harmful:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_weights_that_are_a_program_are_not_run(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "epoch": Harmful(tmp_path / "was here")}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="does not contain weights of squeezenet1_1"):
        load_model("squeezenet1_1", weights=str(tmp_path / "w.pt"))
    assert not (tmp_path / "was here").exists()
