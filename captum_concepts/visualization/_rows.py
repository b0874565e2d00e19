"""What one row of a panel holds, before it is known where it goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from captum_concepts.explanation import ConceptExplanation
from captum_concepts.visualization._parts import BARS, NOT_ENCODED, SHORTEST, axis_space, round_up
from captum_concepts.visualization._text import DETAIL, LEADING, NAME, Fitted, fit, join, number
from captum_concepts.visualization.scale import ColorScale

_LABELS, _TALLEST = 1.3, 1.5


@dataclass
class Row:
    """One image.

    Args:
        picture: ``(3, H, W)``, drawn ``width`` x ``height`` inches.
        shown: one example, its concepts in the order of the columns.
        encoded: for each concept, whether its map is drawn.
        input_caption, captions, bars_caption: over the input, over each concept, over the bars.
        bar_names: beside the bars.
        scales: a colour scale for each concept.
        bound: the end of the bars' axis.
    """

    picture: Tensor
    shown: ConceptExplanation
    encoded: list[bool]
    width: float
    height: float
    input_caption: list[Fitted]
    captions: list[list[Fitted]]
    bars_caption: list[Fitted]
    bar_names: list[Fitted] = field(default_factory=list)
    scales: list[ColorScale] = field(default_factory=list)
    bound: float = 1.0

    @property
    def head(self) -> float:
        """Inches over the picture."""
        return max(sum(part.height for part in c) for c in (self.input_caption, self.bars_caption, *self.captions))

    @property
    def body(self) -> float:
        """Inches for the picture, the colour bar and the bars."""
        return max(self.height, SHORTEST, 0.15 * len(self.encoded) if self.with_bars else 0.0)

    @property
    def axis(self) -> float:
        """Inches for the numbers under the bars."""
        return axis_space(self.bound) if self.with_bars else 0.0

    @property
    def with_bars(self) -> bool:
        return self.shown.contributions is not None

    @property
    def contributions(self) -> list[float]:
        return [] if self.shown.contributions is None else self.shown.contributions[0].float().tolist()


def make_row(
    picture: Tensor, shown: ConceptExplanation, encoded: list[bool], heading: str, target: str | None, cell: float
) -> Row:
    """Fit the texts of a row to cells of ``cell`` inches."""
    width, height = picture_size(picture, cell)
    input_caption = [fit(heading, cell, NAME, weight="bold")]
    if target is not None:
        input_caption.append(fit(f"target: {target}", cell, DETAIL, lines=2))
    row = Row(picture, shown, encoded, width, height, input_caption, _captions(shown, encoded, cell), [])
    if row.with_bars:
        words = "contribution" if target is None else f"contribution to {target}"
        row.bars_caption = [fit(words, BARS + 0.2, NAME, weight="bold")]
        lines = int(row.body / len(encoded) / (DETAIL * LEADING / 72))
        row.bar_names = [fit(name, _LABELS, DETAIL, lines=min(max(lines, 1), 3)) for name in shown.concepts]
    return row


def _captions(shown: ConceptExplanation, encoded: Sequence[bool], cell: float) -> list[list[Fitted]]:
    details = []
    for j in range(len(shown.concepts)):
        details.append([NOT_ENCODED])
        if encoded[j]:
            details[j] = [f"score {number(float(shown.scores[0, j]))}"]
            if shown.contributions is not None:
                details[j].append(f"contribution {number(float(shown.contributions[0, j]), sign=True)}")
            if not isinstance(shown.layer, str):
                details[j].append(f"layer {shown.layer[0][j]}")
    names = [fit(name, cell, NAME, weight="bold") for name in shown.concepts]
    return [list(pair) for pair in zip(names, join(details, cell, DETAIL), strict=True)]


def picture_size(picture: Tensor, cell: float) -> tuple[float, float]:
    """Width and height in inches: as wide as the cell, but not much higher than it is wide."""
    ratio = picture.shape[1] / picture.shape[2]
    height = min(cell * ratio, _TALLEST * cell)
    return max(height / ratio, 0.02), max(height, 0.02)


def share_scales(rows: Sequence[Row], shared: str, signed: bool | str, cmap: Any) -> None:
    """Give each concept of each row its colour scale, and all rows one axis of contributions."""
    every = [[row.shown.maps[0, j] for j, yes in enumerate(row.encoded) if yes] for row in rows]
    whole = ColorScale.of([m for maps in every for m in maps], signed, cmap=cmap)
    for row, maps in zip(rows, every, strict=True):
        one = whole if shared == "panel" else ColorScale.of(maps, signed, cmap=cmap)
        row.scales = [one] * len(row.encoded)
        if shared == "map":
            row.scales = [ColorScale.of(m, signed, cmap=cmap) for m in row.shown.maps[0]]
    values = [abs(v) for row in rows for v in row.contributions if abs(v) < float("inf")]
    bound = round_up(max(values, default=0.0))
    for row in rows:
        row.bound = bound
