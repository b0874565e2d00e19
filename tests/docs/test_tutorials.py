"""Tutorials run from start to end, and the committed notebooks are what their sources give."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = ROOT / "tutorials"
SOURCES = sorted(TUTORIALS.glob("[0-9]*.py"))
#: Fewer images and epochs for the tests; `make tutorials` runs them as they are.
QUICK = {
    "01_what_where_how": [
        ("CaptionedScenes(400, seed=7, size=64)", "CaptionedScenes(120, seed=7, size=64)"),
        ("batch_size=100)", "batch_size=60)"),
        (".flatten()[:40]", ".flatten()[:6]"),
    ],
    "04_own_words": [
        ("CaptionedScenes(400, seed=42, size=64)", "CaptionedScenes(120, seed=42, size=64)"),
        ("batch_size=100)", "batch_size=60)"),
        ("CaptionedScenes(32, seed=41", "CaptionedScenes(20, seed=41"),
        ("n_bootstrap=300", "n_bootstrap=20"),
    ],
    "05_show_and_tell": [
        ("CaptionedScenes(240, seed=51", "CaptionedScenes(90, seed=51"),
        ("CaptionedScenes(120, seed=52", "CaptionedScenes(60, seed=52"),
        ('RegionPrompt("circle", (7, 7)', 'RegionPrompt("circle", (5, 5)'),
        ("shown = [9, 24, 31, 39]", "shown = [6, 12, 16, 20]"),
        ("n_bootstrap=300", "n_bootstrap=20"),
    ],
    "09_find_the_shortcut": [
        ("CaptionedScenes(480, seed=91", "CaptionedScenes(240, seed=91"),
        ('["layer2", "layer3", "layer4"]', '["layer4"]'),
        ("crops=2", "crops=1"),
        ("map_layer=-1, batch_size=100", "map_layer=-1, n_channels=3, batch_size=100"),
        ("max_rows=10_000", "max_rows=1000"),
        ("top_k=3, store_path", "top_k=1, store_path"),
    ],
}


def cells(source: Path) -> list[tuple[str, str]]:
    """Kind and text of each cell of a source in percent format."""
    found = []
    for part in re.split(r"^# %%", source.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        kind = "markdown" if head.strip() == "[markdown]" else "code"
        lines = body.strip("\n").split("\n")
        if kind == "markdown":
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        else:
            lines = [line.removeprefix("# ") if line.startswith("# %") else line for line in lines]
        found.append((kind, "\n".join(lines).strip()))
    return found


def test_there_are_nine():
    assert [source.name[:2] for source in SOURCES] == [f"{k:02d}" for k in range(1, 10)]


@pytest.mark.parametrize("name", QUICK)
def test_runs_from_start_to_end(name, tmp_path):
    code = (TUTORIALS / f"{name}.py").read_text(encoding="utf-8")
    for written, quick in QUICK[name]:
        assert written in code, f"the quick settings of {name} are out of date: {written}"
        code = code.replace(written, quick)
    script = tmp_path / f"{name}.py"
    script.write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert list(tmp_path.rglob("*.safetensors")), "nothing was saved"


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_notebook_is_what_its_source_gives(source):
    notebook = json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))
    given = [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in notebook["cells"]]
    assert given == cells(source), "run `make tutorials` and commit the notebooks"


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_notebook_is_executed_small_and_quick(source):
    path = source.with_suffix(".ipynb")
    assert path.stat().st_size < 1_000_000
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["metadata"]["captum_concepts"]["cpu_seconds"] < 180
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code), "a cell was not executed"
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    pictures = [output for output in outputs if any(kind.startswith("image/") for kind in output.get("data", {}))]
    assert pictures, "a tutorial shows something"


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_tells_how_to_take_ones_own_and_explains_a_new_image(source):
    text = source.read_text(encoding="utf-8")
    assert re.search(r'weights="DEFAULT"|from_pretrained\(|PascalVOC', text)
    assert "new image" in text
    if re.search(r"\.fit\(|fit_salf_cbm\(", text.replace("from captum_concepts import", "")):
        assert re.search(r"\.(save|save_pretrained|to_json)\(", text)
        assert re.search(r"\.(load|from_pretrained|from_json)\(", text)


def test_pictures_of_the_documentation_are_those_of_the_notebooks():
    import base64

    images = {path.read_bytes() for path in (ROOT / "docs" / "images").iterdir()}
    for source in SOURCES:
        notebook = json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if "picture" not in cell["metadata"]:
                continue
            data = next(output["data"] for output in cell["outputs"] if "data" in output)
            kind = next(kind for kind in data if kind.startswith("image/"))
            assert base64.b64decode(data[kind]) in images, (
                f"{source.stem}: docs/images lacks {cell['metadata']['picture']}"
            )
