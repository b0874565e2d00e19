"""What is drawn where: every text, patch, line and picture of the figures beside a baseline.

A change that is meant: ``BASELINE=write pytest tests/visualization/test_drawings.py``, and look at the difference.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from drawings import BASELINE, compare_with_baseline
from matplotlib.figure import Figure
from PIL import Image

from captum_concepts import ConceptExplanation
from captum_concepts.visualization import heatmap_figure, legend, panel, panel_image, sankey

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
    "panel of rows": lambda: panel(explained(), photographs(2), scale="row"),
    "legend": lambda: legend(
        explained(3, presence=values(3, 4)), photographs(3), title="Several at once", threshold=0.6
    ),
    "sankey": lambda: sankey(Rules(), title="The rules of these classes", top_k=4),
    "sankey of many concepts": lambda: sankey(Rules(3, 12), top_k=6),
    "sankey of one class": lambda: sankey(Rules(1), width=4.0, top_k=3),
    "heatmap": lambda: heatmap_figure(photographs(1)[0], values(5, 6, low=-1), title="one map", label="cosine"),
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_drawn_as_before(name: str):
    compare_with_baseline(FIGURES[name](), name)


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
