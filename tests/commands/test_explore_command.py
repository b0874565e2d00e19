"""`explore` on files: one page that knows names, true labels and failures, and lets a SALF-CBM be edited."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torchvision.utils import save_image

from captum_concepts import SALFCBM, demo
from captum_concepts.__main__ import main
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.images.pixels import Reading

SCENES = CaptionedScenes(5, seed=3, size=64)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Scenes in folders that are called after their classes, and a file that is not an image."""
    scenes = SCENES.stack()
    for i, (image, label) in enumerate(zip(scenes.image, scenes.label.tolist(), strict=True)):
        folder = tmp_path / "photos" / SCENES.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        save_image(image, folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"nothing")
    return tmp_path / "photos"


@pytest.fixture
def salf(tmp_path: Path) -> SALFCBM:
    """Saved in ``salf``; its concepts are random."""
    torch.manual_seed(0)
    backbone = demo.load("classifier")
    model = SALFCBM(backbone, "layer3", ["red", "dotted", "grass"], len(SCENES.classes), class_names=SCENES.classes)
    with torch.no_grad():
        pooled = model.concept_maps(SCENES.stack().image).mean((2, 3))
        model.set_standardization(pooled.mean(0), pooled.std(0))
        model.head.weight.normal_()
    model.save_pretrained(tmp_path / "salf")
    return model.eval()


def contents(page: Path) -> tuple[dict, list[dict]]:
    """What the page knows: of all images, and of each."""
    found = re.findall(r'<script type="application/json" id="(.*?)">(.*?)</script>', page.read_text(encoding="utf-8"))
    values = {name: json.loads(text) for name, text in found}
    return values.pop("about"), list(values.values())


def test_a_page_of_files(photos, tmp_path, capsys):
    page = tmp_path / "pages" / "e.html"
    arguments = ["explore", str(photos), "--model", "demo:classifier", "--output", str(page), "--json"]
    assert main([*arguments, "--title", "Five scenes"]) == 1  # one file could not be read
    said = capsys.readouterr()
    made = json.loads(said.out)
    assert made["images"] == 5
    assert [Path(entry["image"]).name for entry in made["failed"]] == ["broken.png"]
    assert "broken.png" in said.err
    about, images = contents(page)
    assert len(images) == len(about["images"]) == 5
    assert about["title"] == "Five scenes"
    assert not about["editable"]
    assert set(about["concepts"]) == set(about["classes"])
    assert set(about["classes"]) == set(SCENES.classes)
    labels = {one["name"]: one["label"] for one in about["images"]}
    assert labels == {f"{i}.png": SCENES.classes[k] for i, k in enumerate(SCENES.labels.tolist())}
    made: dict = {}
    exec(about["setup"], made)  # reads them as the command did; the broken one shifts no number
    assert about["reader"] == "images[images.names.index(FILE)][None]"
    scenes = SCENES.stack().image
    for one in about["images"]:
        read = made["images"][made["images"].names.index(one["file"])]
        assert torch.allclose(read, scenes[int(Path(one["file"]).stem)], atol=1 / 255)


def test_no_image_is_read_twice(photos, tmp_path, monkeypatch):
    read = []
    upright = Reading.upright
    monkeypatch.setattr(Reading, "upright", lambda self, image: (read.append(image), upright(self, image))[1])
    assert main(["explore", str(photos), "--model", "demo:classifier", "--output", str(tmp_path / "e.html")]) == 1
    assert len(read) == 5


def test_a_saved_model_can_be_edited(photos, salf, tmp_path, capsys):
    page = tmp_path / "e.html"
    arguments = ["explore", str(photos), "--model", "demo:classifier", "--explainer", str(tmp_path / "salf")]
    assert main([*arguments, "--output", str(page)]) == 1
    assert "5 images to explore" in capsys.readouterr().out
    about, _ = contents(page)
    assert about["editable"]
    assert about["concepts"] == salf.concepts
    expected = salf(SCENES.stack().image).argmax(1)
    found = {int(Path(one["name"]).stem): one["predicted"] for one in about["images"]}
    assert [found[i] for i in range(5)] == expected.tolist()


def test_folders_of_other_names_are_no_labels(photos, tmp_path):
    next(photos.iterdir()).rename(photos / "holidays")
    page = tmp_path / "e.html"
    main(["explore", str(photos), "--model", "demo:classifier", "--output", str(page)])
    assert {one["label"] for one in contents(page)[0]["images"]} == {None}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output", "."], "is a folder"),
        (["--output", "e.html", "--explainer", "absent"], "no explainer file"),
        (["--output", "e.html", "--size", "-1"], "size"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_written(photos, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    assert main(["explore", str(photos), "--model", "demo:classifier", *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "e.html").exists()


def test_true_labels_reach_the_report(photos, tmp_path):
    page, out = tmp_path / "r.html", tmp_path / "out"
    arguments = ["--model", "demo:classifier", "--output", str(page)]
    main(["report", str(photos), *arguments])
    assert page.read_text().count("true label <strong>") == 5
    main(["explain", str(photos), "--model", "demo:classifier", "--output", str(out), "--save"])
    main(["report", "--explanations", str(out), "--output", str(page)])
    assert page.read_text().count("true label <strong>") == 5
