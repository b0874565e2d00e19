"""``--resize``: what the commands show a model of a wide photograph, and where they draw what it found."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from captum_concepts import ConceptExplanation
from captum_concepts.__main__ import main
from captum_concepts.commands.models import load_model

#: Brightness of each cell of 16 x 16 pixels is what output 0 sees.
MODEL = """
import torch
from torch import nn

def build():
    conv = nn.Conv2d(3, 2, 16, stride=16, bias=False)
    conv.weight.data.fill_(1 / 768)
    head = nn.Linear(2, 2, bias=False)
    head.weight.data = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    return nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
"""


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """A photograph of 256 x 128 pixels, dark, white from x = 0 to 48, y = 32 to 64, stored turned by its camera."""
    (tmp_path / "model.py").write_text(MODEL)
    image = Image.new("RGB", (256, 128), (51, 51, 51))
    image.paste((255, 255, 255), (0, 32, 48, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "wide.png", exif=exif)
    return [str(tmp_path / "wide.png"), "--model", f"{tmp_path}/model.py:build", "--size", "64"]


@pytest.mark.parametrize(
    ("resize", "white", "viewbox", "drawn"),
    [
        # How much of the second row of 4 x 4 cells is white. Above and below what is padded all is white.
        ("crop", [0.0, 0.0, 0.0, 0.0], "256 128", ("64.0", "0.0", "128.0", "128.0")),
        ("squash", [0.75, 0.0, 0.0, 0.0], "256 128", ("0", "0", "256", "128")),
        ("pad", [0.375, 0.0, 0.0, 0.0], "256 256", ("0", "0", "256", "256")),
    ],
)
def test_explain_draws_the_whole_photograph(given, tmp_path, resize, white, viewbox, drawn):
    out, page = tmp_path / "out", tmp_path / "page.html"
    arguments = ["--resize", resize, "--output", str(out), "--save", "--report", str(page), "--top-k", "1"]
    assert main(["explain", *given, *arguments]) == 0
    index = json.loads((out / "explanations.json").read_text())
    entry = index["explained"][0]
    assert index["resize"] == resize
    assert entry["seen"] == ([64, 0, 192, 128] if resize == "crop" else [0, 0, 256, 128])
    maps = ConceptExplanation.load(out / entry["explanation"])["output 0"].maps[0, 0]
    seen = (maps / 2 - 0.2) / 0.8  # of two channels, on gray of 0.2
    assert seen[1].tolist() == pytest.approx(white, abs=0.02)
    again = tmp_path / "again.html"
    assert main(["report", "--explanations", str(out), "--output", str(again)]) == 0
    for text in (page.read_text(), again.read_text()):
        card = text[text.index("<article") :]
        assert f'viewBox="0 0 {viewbox}"' in card
        found = re.search(r'<image id="e1-m0"[^>]* x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', card)
        assert found is not None
        assert found.groups() == drawn
        assert ("outside of the model's input" in card) == (resize == "crop")
        assert ("of the part that the model received" in card) == (resize == "crop")


def test_another_way_is_another_folder(given, tmp_path, capsys):
    assert main(["explain", *given, "--output", str(tmp_path / "out")]) == 0
    assert main(["explain", *given, "--output", str(tmp_path / "out"), "--resize", "pad"]) == 2
    assert "explanations of another run (resize: 'crop', not 'pad')" in capsys.readouterr().err


def test_evaluate_cuts_masks_like_photographs(given, tmp_path, capsys):
    """The concept lies at the border: unseen where the center is cut out, found where the photograph is squashed."""
    root = tmp_path / "masks_at_the_border"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    image, mask = Image.new("RGB", (256, 128)), Image.new("L", (256, 128))
    image.paste((255, 255, 255), (0, 32, 48, 64))
    mask.paste(1, (0, 32, 48, 64))
    image.save(root / "images" / "a.png")
    mask.save(root / "masks" / "a.png")
    (root / "classes.json").write_text('{"1": "output 0"}')
    options = [str(root), *given[1:], "--metrics", "epg", "--no-baselines"]
    assert main(["evaluate", *options, "--json"]) == 2
    assert "shows any of output 0" in capsys.readouterr().err
    for resize in ("squash", "pad"):
        assert main(["evaluate", *options, "--resize", resize, "--json", "--unlabelled", "background"]) == 0
        assert json.loads(capsys.readouterr().out)["regions"] == 1


def test_what_is_squashed_is_whole():
    """A model's own crop of 224 of 256 belongs to cropping."""
    ways = (None, "crop", "squash", "pad")
    found = [load_model("resnet18", random_weights=True, resize=way).preprocessing for way in ways]
    assert [(p.resize, p.crop) for p in found] == [("crop", 0.875), ("crop", 0.875), ("squash", 1.0), ("pad", 1.0)]


@pytest.mark.parametrize("command", ["explain", "report", "evaluate", "audit", "explore", "fit-concepts"])
def test_other_ways_are_refused(command, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([command, "photos", "--model", "resnet18", "--output", "out", "--resize", "stretch"])
    assert "crop" in capsys.readouterr().err
