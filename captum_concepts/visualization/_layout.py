"""Where everything in a panel goes, in inches: measured first, then drawn, so that nothing overlaps or is cut off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from captum_concepts.visualization._parts import BAR_GAP, BARS, SHORTEST, Canvas, at_print_size, colorbar_space, faded
from captum_concepts.visualization._rows import Row
from captum_concepts.visualization._text import DETAIL, FAINT, TITLE, Fitted, fit, text_width
from captum_concepts.visualization.overlay import blend

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARGIN, ABOVE = 0.12, 0.05
_GAP, _ROW_GAP, _FOOT_GAP = 0.1, 0.18, 0.1


@dataclass(frozen=True)
class _Columns:
    """Left ends of the columns: the input at the margin, maps, bars; and the width of the figure."""

    cell: float
    first: float
    step: float
    bars: float
    width: float

    @classmethod
    def measure(cls, rows: Sequence[Row], per_map: bool, label: str, cell: float) -> _Columns:
        spaces = [BAR_GAP + colorbar_space(s, max(r.height, SHORTEST), label) for r in rows for s in r.scales]
        space = max(spaces, default=0.0)
        step = cell + _GAP + (space if per_map else 0.0)
        first = MARGIN + cell + 1.5 * _GAP
        bars = end = first + len(rows[0].encoded) * step - _GAP + (0.0 if per_map else space)
        if rows[0].with_bars:
            lines = [line for row in rows for name in row.bar_names for line in name.text.split("\n")]
            bars = end + 0.2 + max(text_width(line, DETAIL) for line in lines)
            end = bars + BARS + 0.16
        return cls(cell, first, step, bars, end + MARGIN)


def draw_panel(
    rows: Sequence[Row], shared: str, title: str | None, note: str, label: str, cell: float, style: dict[str, Any]
) -> Figure:
    """A figure as large as its rows, with a title over and a note under them."""
    columns = _Columns.measure(rows, shared == "map", label, cell)
    head = fit(title, columns.width - 2 * MARGIN, TITLE, lines=4, weight="bold") if title else Fitted("", TITLE)
    foot = fit(note, columns.width - 2 * MARGIN, DETAIL, lines=4)
    heights = [row.head + ABOVE + row.body + row.axis for row in rows]
    y = MARGIN + (head.height + _ROW_GAP if title else 0.0)
    bottom = y + sum(heights) + _ROW_GAP * (len(rows) - 1)
    canvas = Canvas(columns.width, bottom + (_FOOT_GAP + foot.height if note else 0.0) + MARGIN)
    canvas.text(columns.width / 2, MARGIN, head, va="top", fontweight="bold")
    canvas.text(MARGIN, canvas.height - MARGIN, foot, ha="left", color=FAINT)
    for row, height in zip(rows, heights, strict=True):
        _draw_row(canvas, columns, row, y, shared == "map", label, style)
        y += height + _ROW_GAP
    return canvas.figure


def _draw_row(
    canvas: Canvas, columns: _Columns, row: Row, top: float, per_map: bool, label: str, style: dict[str, Any]
) -> None:
    y, cell = top + row.head + ABOVE, columns.cell
    indent = (cell - row.width) / 2
    picture = at_print_size(row.picture, max(row.width, row.height))
    canvas.caption(MARGIN + cell / 2, y - ABOVE, row.input_caption)
    canvas.picture(MARGIN + indent, y, row.width, row.height, picture, "input")
    last = len(row.encoded) - 1
    for j, (name, encoded, scale) in enumerate(zip(row.shown.concepts, row.encoded, row.scales, strict=True)):
        x = columns.first + j * columns.step
        canvas.caption(x + cell / 2, y - ABOVE, row.captions[j], faint=not encoded)
        pixels = blend(picture, row.shown.maps[0, j].float(), scale, **style) if encoded else faded(picture)
        canvas.picture(x + indent, y, row.width, row.height, pixels, name)
        if encoded if per_map else j == last and any(row.encoded):
            canvas.colorbar(x + cell - indent + BAR_GAP, y, max(row.height, SHORTEST), scale, label)
    if row.with_bars:
        canvas.caption(columns.bars + BARS / 2, y - ABOVE, row.bars_caption)
        values = row.contributions
        canvas.bars(columns.bars, y, BARS, row.body, row.bar_names, values, row.encoded, row.bound)
