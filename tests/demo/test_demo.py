"""One run of the demo: every picture is there, and the table says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from captum_concepts.__main__ import main
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
