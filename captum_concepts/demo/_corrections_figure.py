"""The figure of `show_and_tell`, with the rules of all classes, and each correction before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from captum_concepts.demo.show_and_tell import Correction
from captum_concepts.models.salf_cbm import SALFCBM
from captum_concepts.visualization.canvas import (
    ABSENT,
    BAR_GAP,
    DETAIL,
    FAINT,
    INK,
    NAME,
    NEGATIVE,
    POSITIVE,
    TITLE,
    FigureCanvas,
    Fitted,
    at_print_size,
    fit,
    number,
    round_up,
    text_width,
)
from captum_concepts.visualization.overlay import blend
from captum_concepts.visualization.regions import frame
from captum_concepts.visualization.scale import ColorScale

_MARGIN, _CELL, _GAP = 0.15, 1.55, 0.14
_BAR, _PITCH, _RULES = 0.85, 0.165, 4
_AFTER, _TRUE = "#3b3b3b", "#1b7837"


def corrections_figure(model: SALFCBM, found: Sequence[Correction], title: str, note: str) -> Figure:
    """Figure with rules on top and one row per correction: image, concepts in the box, maps and classes."""
    names = list(model.class_names or [])
    labels = max(text_width(c, DETAIL) for c in model.concepts)
    classes = max(text_width(c, DETAIL, "bold") for c in names)
    columns = [_MARGIN, _MARGIN + _CELL + _GAP + 0.1 + labels]
    columns.append(columns[1] + _BAR + 0.3 + _GAP)
    columns.append(columns[2] + _CELL + _GAP)
    columns.append(columns[3] + _CELL + BAR_GAP + 0.5 + _GAP + classes)
    width = columns[4] + 1.15 + 0.34 + _MARGIN
    head = fit(title, width - 2 * _MARGIN, TITLE, weight="bold")
    foot = fit(note, width - 2 * _MARGIN, DETAIL, lines=4)
    rules_top = _MARGIN + head.height + 0.14
    rules_height = 0.2 + _RULES * _PITCH
    rows_top = rules_top + 0.24 + rules_height + 0.24
    row = 0.36 + _CELL + 0.2
    canvas = FigureCanvas(width, rows_top + row * len(found) + foot.height + _MARGIN)
    canvas.text(width / 2, _MARGIN, head, va="top", fontweight="bold")
    canvas.text(_MARGIN, canvas.height - _MARGIN, foot, ha="left", color=FAINT)
    _rules(canvas, model, names, rules_top, width)
    for k, correction in enumerate(found):
        _correction(canvas, correction, names, columns, rows_top + 0.36 + k * row)
    return canvas.figure


def _rules(canvas: FigureCanvas, model: SALFCBM, names: list[str], top: float, width: float) -> None:
    canvas.text(_MARGIN, top, Fitted("What each class relies on: the largest weights of its sparse rule", NAME),
                ha="left", va="top", fontweight="bold")  # fmt: skip
    rules = [model.decision_rules(c, _RULES) for c in range(len(names))]
    weights = [weight for rule in rules for _, weight in rule]
    limits = (min(0.0, *weights), round_up(max(weights)))
    step = (width - 2 * _MARGIN) / len(names)
    label = max(text_width(word, DETAIL) for rule in rules for word, _ in rule)
    for c, (name, rule) in enumerate(zip(names, rules, strict=True)):
        x, y = _MARGIN + c * step, top + 0.24
        canvas.text(x + step / 2, y + 0.15, fit(name, step - 0.1, NAME, lines=1), va="baseline", fontweight="bold")
        bars = step - label - 0.2
        _bars(canvas, x + label + 0.1, y + 0.2, bars, rule, limits,
              [POSITIVE if w > 0 else NEGATIVE for _, w in rule])  # fmt: skip


def _correction(canvas: FigureCanvas, c: Correction, names: list[str], columns: list[float], y: float) -> None:
    middle = [columns[0] + _CELL / 2, *(x + _CELL / 2 for x in columns[2:4])]
    picture = at_print_size(c.image, _CELL)
    axes = canvas.picture((columns[0], y, _CELL, _CELL), picture, "input", (c.image.shape[-2], c.image.shape[-1]))
    canvas.outline(axes, frame(c.box))
    _caption(canvas, middle[0], y, f"predicted: {c.called}", f"true label: {c.truth}", _CELL)
    _caption(canvas, columns[1] + _BAR / 2 - 0.2, y, "seen in the box", "standard deviations", _BAR + 0.9)
    top = max(v for _, v in c.seen)
    colours = [POSITIVE if word == c.concept else ABSENT for word, _ in c.seen]
    _bars(canvas, columns[1], y + (_CELL - _PITCH * 1.4 * len(c.seen)) / 2, _BAR, c.seen, (0, max(top, 1e-6)), colours,
          values=True, pitch=_PITCH * 1.4, bold=c.concept)  # fmt: skip
    scale = ColorScale.of([c.map_before, c.map_after])
    _caption(canvas, middle[1], y, f"“{c.concept}” before", "concept map", _CELL)
    _caption(canvas, middle[2], y, f"“{c.concept}” after", f"{number(c.beta, sign=True)} in the box", _CELL)
    for x, heat in ((columns[2], c.map_before), (columns[3], c.map_after)):
        canvas.picture((x, y, _CELL, _CELL), blend(picture, heat, scale), c.concept)
    canvas.colorbar(columns[3] + _CELL + BAR_GAP, y, _CELL, scale)
    _caption(canvas, columns[4] + 0.35, y, "class", "gray before, colored after the edit", 2.4)
    pitch = _CELL / len(names)
    for k, name in enumerate(names):
        bold = "bold" if name in (c.truth, c.called) else "normal"
        colour = _TRUE if name == c.truth else INK
        canvas.text(columns[4] - 0.06, y + (k + 0.5) * pitch, Fitted(name, DETAIL), ha="right", va="center",
                    fontweight=bold, color=colour)  # fmt: skip
    shown = canvas.axes((columns[4], y, 1.15, _CELL), label="classes", facecolor="none")
    places = list(range(len(names)))
    shown.barh([p - 0.19 for p in places], c.before.tolist(), height=0.34, color=ABSENT, linewidth=0)
    after = [_TRUE if name == c.truth else _AFTER for name in names]
    shown.barh([p + 0.19 for p in places], c.after.tolist(), height=0.34, color=after, linewidth=0)
    _plain(shown, (0, 1), len(names))
    for k in places:
        for value, offset in ((c.before[k], -0.19), (c.after[k], 0.19)):
            if value >= 0.05:
                at = columns[4] + 1.15 * float(value) + 0.04
                canvas.text(at, y + (k + 0.5 + offset) * pitch, Fitted(f"{100 * float(value):.0f} %", 6), ha="left",
                            va="center", color=FAINT if offset < 0 else INK)  # fmt: skip


def _caption(canvas: FigureCanvas, x: float, y: float, first: str, second: str, width: float) -> None:
    canvas.caption(x, y - 0.04, [fit(first, width, NAME, lines=1, weight="bold"), fit(second, width, DETAIL, lines=1)])


def _bars(
    canvas: FigureCanvas, x: float, y: float, width: float, items: Sequence[tuple[str, float]],
    limits: tuple[float, float], colours: Sequence[str], *, values: bool = False, pitch: float = _PITCH, bold: str = "",
) -> None:  # fmt: skip
    """Draw named bars, the first on top; with ``values``, a number follows each."""
    axes = canvas.axes((x, y, width, pitch * len(items)), label="bars", facecolor="none")
    axes.barh(list(range(len(items))), [v for _, v in items], height=0.62, color=list(colours), linewidth=0)
    axes.axvline(0, color=INK, linewidth=0.7)
    _plain(axes, limits, len(items))
    for k, (word, value) in enumerate(items):
        middle = y + (k + 0.5) * pitch
        weight = "bold" if word == bold else "normal"
        canvas.text(x - 0.05, middle, Fitted(word, DETAIL), ha="right", va="center", fontweight=weight)
        if values:
            at = x + width * max(value, 0) / limits[1] + 0.04
            canvas.text(at, middle, Fitted(f"{value:.1f}", DETAIL), ha="left", va="center", color=FAINT)


def _plain(axes: Any, limits: tuple[float, float], count: int) -> None:
    axes.set_xlim(*limits)
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_axis_off()
