"""What a figure draws where, beside a baseline: for tests of figures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

BASELINE = Path(__file__).parent / "baseline"
#: Inches; also of colors and numbers, whose range is 1.
PLACE = 0.03


def compare_with_baseline(figure: Figure, name: str) -> None:
    """The figure as it was when ``BASELINE=write`` was set."""
    found = json.loads(json.dumps(drawn(figure)))
    file = BASELINE / f"{name.replace(' ', '_')}.json"
    if os.environ.get("BASELINE") == "write":
        BASELINE.mkdir(exist_ok=True)
        file.write_text(json.dumps(found, indent=None).replace("]], [", "]],\n [").replace('], ["', '],\n ["') + "\n")
    compare(found, json.loads(file.read_text()), PLACE, name)


def color_of(value: Any) -> list[float]:
    return [round(float(v), 3) for v in to_rgba(value)]


def drawn(figure: Figure) -> dict[str, list[Any]]:
    """Everything with its place in inches from the lower left corner, its color, and its words."""
    FigureCanvasAgg(figure).draw()
    inches = 1 / figure.dpi

    def place(artist: Any) -> list[float]:
        return [round(float(v) * inches, 3) for v in artist.get_window_extent().extents]

    def place_of(points: Any, axes: Any) -> list[float]:
        ends = axes.transData.transform(points) * inches
        return [round(float(v), 3) for v in (*ends.min(0), *ends.max(0))]

    found: dict[str, list[Any]] = {"size": [round(float(v), 3) for v in figure.get_size_inches()]}

    def anchor(text: Any) -> list[Any]:  # where it is put, not how far it reaches: that is FreeType's
        point = text.get_transform().transform(text.get_position())
        return [round(float(v) * inches, 3) for v in point] + [text.get_ha(), text.get_va()]

    found["texts"] = [
        [text.get_text(), str(text.get_weight()), float(text.get_fontsize()), anchor(text), color_of(text.get_color())]
        for owner in (figure, *figure.axes)
        for text in owner.texts
        if text.get_text()
    ]
    found["axes"] = [[axes.get_label(), place(axes.patch), color_of(axes.get_facecolor())] for axes in figure.axes]
    found["patches"] = [
        [type(patch).__name__, place(patch), color_of(patch.get_facecolor())]
        for owner in (figure, *figure.axes)
        for patch in owner.patches
    ]
    found["pictures"] = [
        [list(np.shape(image.get_array())[:2]), place(image), [round(float(v), 2) for v in pixels_of(image)]]
        for a in figure.axes
        for image in a.images
    ]
    found["lines"] = [
        [place(line), color_of(line.get_color()), float(line.get_linewidth())]
        for owner in (figure, *figure.axes)
        for line in (*owner.lines, *(artist for artist in owner.artists if isinstance(artist, Line2D)))
    ]
    found["outlines"] = [
        [len(c.get_paths()), place_of(np.concatenate([path.vertices for path in c.get_paths()]), axes),
         color_of(c.get_edgecolor()[0])]
        for axes in figure.axes
        for c in axes.collections
        if isinstance(c, LineCollection) and c.get_paths()
    ]  # fmt: skip
    return found


def pixels_of(image: Any) -> np.ndarray:
    """The corners and the middle of a picture, as numbers from 0 to 1 (or of the color map)."""
    array = np.asarray(image.get_array(), dtype=float)
    array = array / 255 if array.max() > 1.01 else array
    rows, columns = (np.linspace(0, n - 1, 3).astype(int) for n in array.shape[:2])
    return array[np.ix_(rows, columns)].ravel()


def compare(found: Any, known: Any, tolerance: float, path: str) -> None:
    if isinstance(known, dict):
        assert found.keys() == known.keys(), path
        for key in known:
            compare(found[key], known[key], tolerance, f"{path}, {key}")
    elif isinstance(known, list):
        assert len(found) == len(known), path
        for k, (one, other) in enumerate(zip(found, known, strict=True)):
            compare(one, other, tolerance, f"{path}[{k}]")
    elif isinstance(known, float):
        assert found == pytest.approx(known, abs=tolerance), path
    else:
        assert found == known, path
