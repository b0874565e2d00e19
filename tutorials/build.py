"""Run the tutorials and write the notebooks: ``python tutorials/build.py [NAME ...]``.

The sources are ``[0-9]*.py`` in jupytext's percent format. Each is run from start to end in a fresh kernel, in a
temporary folder; its outputs and pictures go into the ``.ipynb`` beside it. A cell with ``picture="NAME"`` in its
head also gives its picture to ``docs/images``. The CPU time that a notebook took on one thread is in its metadata.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import resource
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
IMAGES = HERE.parent / "docs" / "images"
LARGEST = 1_000_000
LARGEST_PNG = 60_000
WIDEST = 1400
SLOWEST = 180.0


def sources() -> list[Path]:
    """The tutorials, in order."""
    return sorted(HERE.glob("[0-9]*.py"))


def run(source: Path) -> float:
    """Run one tutorial and write its notebook; returns its CPU seconds (wall time depends on who else computes).

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
        RuntimeError: the notebook is too large or took too long.
    """
    import jupytext
    import nbformat
    from nbclient import NotebookClient

    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"  # the same each time, so that diffs show what changed
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    with tempfile.TemporaryDirectory() as folder:
        began = _cpu_seconds()
        NotebookClient(
            notebook,
            timeout=3600,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,
        ).execute()
        seconds = _cpu_seconds() - began
    notebook.metadata = nbformat.from_dict(
        {
            "captum_concepts": {"cpu_seconds": round(seconds, 1)},
            "kernelspec": notebook.metadata["kernelspec"],
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        pictures = _shrink(cell)
        name = cell.metadata.get("picture")
        if name:
            suffix = ".jpg" if pictures[0].startswith(b"\xff\xd8") else ".png"
            (IMAGES / name).with_suffix(suffix).write_bytes(pictures[0])
    target = source.with_suffix(".ipynb")
    if seconds > SLOWEST:
        raise RuntimeError(f"{target.name} took {seconds:.0f} CPU seconds, more than {SLOWEST:.0f}")
    _write(target, nbformat.writes(notebook) + "\n")
    return seconds


def update_texts(source: Path) -> bool:
    """Take over changed texts without running anything; False where code has changed (or there is no notebook)."""
    import jupytext
    import nbformat

    target = source.with_suffix(".ipynb")
    if not target.is_file():
        return False
    old, new = nbformat.read(target, as_version=4), jupytext.read(source)
    if [c.source for c in old.cells if c.cell_type == "code"] != [c.source for c in new.cells if c.cell_type == "code"]:
        return False
    ran = iter([cell for cell in old.cells if cell.cell_type == "code"])
    for number, cell in enumerate(new.cells):
        if cell.cell_type == "code":
            new.cells[number] = next(ran)
            new.cells[number].metadata = cell.metadata
    old.cells = new.cells
    for number, cell in enumerate(old.cells):
        cell["id"] = f"cell-{number:02d}"
    _write(target, nbformat.writes(old) + "\n")
    return True


def _write(target: Path, text: str) -> None:
    if len(text) > LARGEST:
        raise RuntimeError(f"{target.name} has {len(text):,} bytes, more than {LARGEST:,}: fewer or smaller pictures")
    partial = target.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(target)


def _cpu_seconds() -> float:
    """Of all processes that were started here and have ended: the kernels."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _shrink(cell: Any) -> list[bytes]:
    """Large pictures (photographs under heat maps) become JPEG, which has no visible steps; drawings stay PNG."""
    from PIL import Image

    pictures = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "image/png" not in data:
            continue
        data.pop("text/plain", None)  # "<Figure size ...>"
        given = base64.b64decode(data.pop("image/png"))
        image = Image.open(io.BytesIO(given)).convert("RGB")
        if image.width > WIDEST:
            image = image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS)
        kind = "png" if len(given) < LARGEST_PNG else "jpeg"
        options = {"optimize": True} if kind == "png" else {"quality": 88, "subsampling": 0, "optimize": True}
        small = io.BytesIO()
        image.save(small, kind, **options)
        pictures.append(small.getvalue())
        data[f"image/{kind}"] = base64.b64encode(small.getvalue()).decode()
    return pictures


def main() -> None:
    """Run those whose names begin with one of the arguments, or all."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("names", nargs="*", help="beginnings of file names; all tutorials if none")
    arguments.add_argument("--texts", action="store_true", help="run only those whose code has changed")
    given = arguments.parse_args()
    names = given.names
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", PYTHONPATH=str(HERE.parent))
    for source in sources():
        if not names or any(source.name.startswith(name) for name in names):
            if given.texts and update_texts(source):
                print(f"{source.name}: texts")
                continue
            print(f"{source.name}: {run(source):.1f} CPU seconds", flush=True)


if __name__ == "__main__":
    main()
