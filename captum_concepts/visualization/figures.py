"""Figures as files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_concepts.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_METADATA: dict[str, dict[str, Any]] = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
# Type 42 fonts are what publishers ask for; the rest makes the file depend on the figure alone.
_SETTINGS: dict[Any, Any] = {
    "pdf.fonttype": 42,
    "svg.hashsalt": "captum_concepts",
    "savefig.bbox": None,
    "savefig.transparent": False,
}


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: float = 200) -> Path:
    """Write a figure as PNG, PDF or SVG (by suffix), whole or not at all, at the size it was made.

    Args:
        figure: of :func:`panel`, :func:`heatmap_figure` or any other matplotlib figure.
        path: an existing file is replaced.
        dpi: pixels an inch; in PDF and SVG only pictures have pixels, text and lines are drawn as such.

    Returns:
        The path written.

    Raises:
        InputError: another suffix, or a ``dpi`` that is not positive.
        FileNotFoundError: the folder does not exist.
    """
    from matplotlib import rc_context

    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _METADATA:
        raise InputError(f"figures are written as .png, .pdf or .svg, got {path.name!r}")
    if not 0 < dpi < float("inf"):
        raise InputError(f"dpi must be positive, got {dpi}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into")
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{suffix}")
    try:
        with rc_context(_SETTINGS):
            figure.savefig(partial, dpi=dpi, facecolor="white", metadata=_METADATA[suffix])
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
