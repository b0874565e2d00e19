"""The README is true: its code runs as printed, and its numbers are those of the recorded benchmarks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def rows_of_table(first_header: str) -> dict[str, list[str]]:
    """The cells of the table whose header begins with ``first_header``, by first cell."""
    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_header}"))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        first, *rest = [cell.strip().strip("*") for cell in line.strip("|").split("|")]
        rows[first] = rest
    return rows


def test_every_code_block_runs_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 4
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    written = {"explanation.png", "explanation.safetensors", "report.html", "words.safetensors", "store", "salf"}
    assert {p.name for p in tmp_path.iterdir()} == written
    assert namespace["maps"].shape == (6, 1, 7, 7)
    assert namespace["contribution"].shape == (4, 1, 16, 16)
    assert namespace["after"].shape == (1, 6)
    assert not namespace["after"].equal(namespace["before"])


def test_the_first_lines_are_the_two_commands():
    assert README.splitlines()[2].split()[:2] == ["make", "demo"]
    assert README.splitlines()[3].split()[:2] == ["make", "test"]


def test_cost_table_is_the_record():
    recorded = json.loads((ROOT / "benchmarks/results/fam.json").read_text())["ratio_to_bare_forward"]
    for method, (ratio,) in rows_of_table("ResNet-50, 8 x 224 px").items():
        assert float(ratio) == pytest.approx(recorded[method], abs=0.005)


def test_regions_table_is_the_record():
    recorded = json.loads((ROOT / "benchmarks/results/concept_regions_coco_half1.json").read_text())["rows"]
    names = {
        'CE-FAM, `layer="fused"`': "fused",
        "CE-FAM as published": "published (auto layer)",
        "HiResCAM of the word": "HiResCAM, 4 layers",
        "LayerCAM of the word": "LayerCAM, 4 layers",
        "single channel (CLIP-Dissect, WWW)": "single channel",
    }
    for shown, (nra, special, epg) in rows_of_table("regions of words on COCO").items():
        row = recorded[names.get(shown, shown)]
        expected = f"{row['nra'][0]:.2f} ({row['nra_exact'][0]:.2f})"
        assert (nra, special, epg) == (expected, f"{row['specificity'][0]:.2f}", f"{row['epg'][0]:.2f}")


def test_every_linked_file_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).is_file()
