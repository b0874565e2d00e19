"""``demo --photos``: a user's own photographs and a real network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torchvision.transforms.functional import to_pil_image

from captum_concepts.__main__ import main
from captum_concepts.demo import photos
from captum_concepts.errors import InputError


@pytest.fixture
def folder(photographs, tmp_path):
    for name in ("palace", "flower"):
        to_pil_image(photographs[name]).save(tmp_path / f"{name}.png")
    return tmp_path


def test_photographs_are_explained(folder, tmp_path, capsys):
    (folder / "broken.png").write_bytes(b"no image")
    assert main(["demo", "--photos", str(folder), "--output", str(tmp_path / "out"), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    seen = {one["photo"]: one for one in said["photos"]}
    assert {name: one["predicted"] for name, one in seen.items()} == {"flower.png": "daisy", "palace.png": "palace"}
    flower = seen["flower.png"]
    assert flower["concepts"]["daisy"] == pytest.approx(flower["probability"], rel=1e-2)
    assert max(flower["contributions"], key=flower["contributions"].get) == "daisy"
    assert [Path(one["image"]).name for one in said["skipped"]] == ["broken.png"]
    page = (tmp_path / "out" / photos.PAGE).read_text()
    assert "daisy" in page
    assert "flower.png" in page


def test_a_missing_package_is_named(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(photos.importlib, "import_module", absent)
    with pytest.raises(InputError, match=r"efficientnet-lite-pytorch.*pip install"):
        photos.load_classifier()


def test_class_names_are_different():
    assert len(set(photos.class_names())) == 1000
