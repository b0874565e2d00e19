"""What is drawn where: every text, patch, line and picture of the figures beside a baseline.

A change that is meant: ``BASELINE=write pytest tests/visualization/test_drawings.py``, and look at the difference.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image

from captum_concepts import ConceptExplanation
from captum_concepts.visualization import heatmap_figure, legend, panel, panel_image, sankey

BASELINE = Path(__file__).parent / "baseline"
#: Inches; also of colors and numbers, whose range is 1.
PLACE = 0.03
NAMES = ["stripes", "a name that goes on and on, longer than any cell is wide", "grass", "beak"]


def values(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """Numbers all over the range, the same on every machine."""
    count = int(np.prod(shape))
    return (low + (high - low) * (torch.arange(count).double() * 0.618034 % 1)).float().reshape(shape)


def photographs(n: int) -> list[torch.Tensor]:
    """Of several shapes, with a gradient so that each pixel has its own color."""
    sizes = [(40, 60), (60, 40), (32, 32)]
    return [
        torch.stack([torch.linspace(0, 1, w).expand(h, w), torch.linspace(0, 1, h)[:, None].expand(h, w),
                     torch.full((h, w), 0.2 * k)]).clamp(0, 1)
        for k, (h, w) in enumerate(sizes[:n])
    ]  # fmt: skip


def explained(n: int = 2, **more: Any) -> ConceptExplanation:
    maps = values(n, 4, 5, 6)
    maps[:, 1::2] -= 0.6
    how = values(n, 4, low=-1)
    return ConceptExplanation(NAMES, values(n, 4), maps, how, torch.arange(n), "layer4", "test", **more)


class Rules:
    class_names = ("cat", "dog", "a class with a very long name that has to be shortened somewhere")

    def __init__(self, classes: int = 3, concepts: int = 4) -> None:
        self.class_names, self.concepts = self.class_names[:classes], concepts

    def decision_rules(self, target: Any, top_k: Any = None) -> list[tuple[str, float]]:
        k = self.class_names.index(target) if isinstance(target, str) else int(target)
        names = [*NAMES, *(f"concept {j}" for j in range(self.concepts - 4))]
        rules = [(names[(k + j) % len(names)], (-1) ** j * (3.0 - j / 2 + 0.3 * k)) for j in range(len(names))]
        return rules[:top_k]


FIGURES: dict[str, Callable[[], Figure]] = {
    "panel": lambda: panel(explained(), photographs(2), title="What, where, how much", image_names=["first", "second"]),
    "panel of states": lambda: panel(
        explained(presence=values(2, 4), class_names=["cat", "dog"], target_probability=torch.tensor([0.9, 0.1])),
        photographs(2), significant=[True, False, True, True], scale="map", boxes=[[3, 4, 20, 30]] * 2,
        crop=[(0, 0, 40, 40)] * 2, map_label="score", top_k=4,
    ),
    "panel of one scale": lambda: panel(
        ConceptExplanation(NAMES, values(2, 4), values(2, 4, 5, 6)), photographs(2), scale="panel", cell_size=1.2
    ),
    "legend": lambda: legend(
        explained(3, presence=values(3, 4)), photographs(3), title="Several at once", threshold=0.6
    ),
    "sankey": lambda: sankey(Rules(), title="The rules of these classes", top_k=4),
    "sankey of many concepts": lambda: sankey(Rules(3, 12), top_k=6),
    "sankey of one class": lambda: sankey(Rules(1), width=4.0, top_k=3),
    "heatmap": lambda: heatmap_figure(photographs(1)[0], values(5, 6, low=-1), title="one map", label="cosine"),
}  # fmt: skip


def color_of(value: Any) -> list[float]:
    return [round(float(v), 3) for v in to_rgba(value)]


def drawn(figure: Figure) -> dict[str, list[Any]]:
    """Everything with its place in inches from the lower left corner, its color, and its words."""
    FigureCanvasAgg(figure).draw()
    inches = 1 / figure.dpi

    def place(artist: Any) -> list[float]:
        return [round(float(v) * inches, 3) for v in artist.get_window_extent().extents]

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
        for line in owner.lines
    ]
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


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_drawn_as_before(name: str):
    found = json.loads(json.dumps(drawn(FIGURES[name]())))
    file = BASELINE / f"{name.replace(' ', '_')}.json"
    if os.environ.get("BASELINE") == "write":
        BASELINE.mkdir(exist_ok=True)
        file.write_text(json.dumps(found, indent=None).replace("]], [", "]],\n [").replace('], ["', '],\n ["') + "\n")
    compare(found, json.loads(file.read_text()), PLACE, name)


@pytest.mark.parametrize("name", ["panel", "states"])
def test_panels_of_pixels_are_drawn_as_before(name: str):
    """Blocks of 8 x 8 pixels, whose mean hardly depends on the version of FreeType."""
    more = {} if name == "panel" else {"presence": values(2, 4)}
    options: dict[str, Any] = {"title": "As pixels"} if name == "panel" else {"scale": "map", "points": [[12, 9]] * 2}
    image = panel_image(explained(**more), photographs(2), dpi=80, **options).convert("RGB")
    small = image.resize((image.width // 8, image.height // 8), Image.Resampling.BOX)
    file = BASELINE / f"pixels_{name}.png"
    if os.environ.get("BASELINE") == "write":
        BASELINE.mkdir(exist_ok=True)
        small.save(file)
    known = Image.open(file)
    assert small.size == known.size
    difference = np.abs(np.asarray(small, dtype=float) - np.asarray(known, dtype=float))
    assert difference.max() < 25
    assert difference.mean() < 1
