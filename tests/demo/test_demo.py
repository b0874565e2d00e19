"""One run of the demo: every picture is there, and the table says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from captum_concepts.__main__ import main
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.demo.run import texture_guidance
from captum_concepts.images import load_image


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", "--output", str(folder), "--seed", "5"]) == 0
    return folder


@pytest.fixture(scope="module")
def rows(output) -> list[dict]:
    return json.loads((output / "demo.json").read_text())["rows"]


def test_every_row_has_its_picture_and_nothing_else_is_left(output, rows):
    pictures = {row["picture"] for row in rows}
    assert {p.name for p in output.iterdir()} == {*pictures, "report.html", "demo.json"}
    for name in pictures:
        assert min(load_image(output / name).shape[1:]) > 400


def test_the_methods_hit_the_masks(rows):
    by_name = {(row["method"], row["model"]): row for row in rows}
    for key in (
        ("FAM", "classifier"),
        ("FAM", "vit"),
        ("FAM", "clip"),
        ("CE-FAM", "classifier"),
        ("CE-FAM", "classifier-spurious"),
    ):
        assert by_name[key]["nra"] > by_name[key]["nra_centre"] + 0.1
    assert by_name["SALF-CBM", "classifier"]["nra"] > by_name["SALF-CBM", "classifier"]["nra_centre"] + 0.2
    for key in (("FAM", "clip"), ("SACV", "classifier"), ("CE-FAM", "classifier"), ("SALF-CBM", "classifier")):
        assert by_name[key]["specificity"] > 0.1
    assert by_name["CE-FAM", "classifier"]["nra"] > 0.65


def test_negatives_of_textures_show_an_object_with_its_surroundings():
    """Half-size windows around the middle of an object that no other object reaches, found by a plain search."""
    scenes = CaptionedScenes(40, seed=5, size=64)
    examples, negatives = texture_guidance(scenes)
    expected = {word: [] for word in scenes.concept_groups["texture"]}
    for scene in scenes:
        for n, (concepts, box) in enumerate(zip(scene.objects.tolist(), scene.boxes.tolist(), strict=True)):
            if concepts[2] < 0:
                continue
            corner = []
            for low, high in ((box[1], box[3]), (box[0], box[2])):
                middle = round((low + high) / 2)
                corner.append(sorted((0, middle - 16, 32))[1])
            own = scene.object_masks[n, corner[0] : corner[0] + 32, corner[1] : corner[1] + 32]
            part = scene.object_masks[:, corner[0] : corner[0] + 32, corner[1] : corner[1] + 32]
            if int(part.sum()) == int(own.sum()):
                window = scene.image[:, corner[0] : corner[0] + 32, corner[1] : corner[1] + 32]
                expected[scenes.concepts[concepts[2]]].append(window)
    for word, windows in expected.items():
        count = len(negatives[word]) - len(examples[word])
        assert torch.equal(negatives[word][:count], torch.stack(windows)[:100]), word
