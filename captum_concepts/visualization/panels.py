"""Figures of a `ConceptExplanation` (what, where and how much, for several images), and writing of figures to files."""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_concepts._artifacts import check_destination, replacing
from captum_concepts._checks import integer, number, one_of
from captum_concepts.errors import InputError, InputWarning
from captum_concepts.explanation import RANKINGS, SEEN, ConceptExplanation
from captum_concepts.visualization.canvas import (
    BAR_GAP,
    BARS,
    DETAIL,
    FAINT,
    LEADING,
    NAME,
    NOT_ENCODED,
    NOT_SEEN,
    SHORTEST,
    TITLE,
    Canvas,
    FigureCanvas,
    Fitted,
    at_print_size,
    axis_space,
    colorbar_space,
    faded,
    fit,
    join,
    number as in_words,
    round_up,
    text_width,
)
from captum_concepts.visualization.overlay import ALPHA, as_heatmap, as_image, as_images, blend
from captum_concepts.visualization.raster import Raster
from captum_concepts.visualization.regions import Box, frame, outlines, per_image
from captum_concepts.visualization.scale import ColorScale, schemes

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

SCALES = {
    "map": "each map has its own color scale",
    "row": "the maps of a row share one color scale",
    "panel": "all maps share one color scale",
}
#: Note on an image without a concept of its own, such as one that did not select the only one of ``e["stripes"]``.
NONE_SELECTED = "none of these concepts is selected"
#: Maximum number of concepts per image if ``top_k`` is None.
MOST = 8
_MARGIN, _ABOVE, _GAP, _ROW_GAP, _FOOT_GAP = 0.12, 0.05, 0.1, 0.18, 0.1
_LABELS, _TALLEST = 1.3, 1.5


def panel(
    explanation: ConceptExplanation,
    images: Any,
    *,
    top_k: int | None = None,
    rank_by: str | None = None,
    title: str | None = None,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    image_names: Sequence[str] | None = None,
    significant: Any = None,
    points: Any = None,
    boxes: Any = None,
    mask: Any = None,
    crop: Any = None,
    scale: str = "row",
    map_label: str = "",
    cell_size: float = 1.7,
    alpha: float = ALPHA,
    cmap: Any = None,
    signed: bool | str = "auto",
    mode: str = "bicubic",
) -> Figure:
    """Figure with one row per image: the input, its own concepts with score and map, and signed contributions as bars.

    Args:
        explanation: an explanation of N images.
        images: these N images, as in :func:`overlay` (a tensor ``(N, 3, H, W)`` or a list; sizes may differ), or a
            single image for an explanation of one.
        top_k: concepts per image; None: those that the explanation selected, at most 8.
        rank_by: ``"scores"`` or ``"contributions"`` (by magnitude); None keeps the explanation's own order (or ranks by
            scores if it has no ranking and some concepts must be left out). Concepts that are not encoded, or not seen
            (``presence`` below .5), always come last.
        title: title above the figure.
        class_names: names of the targets, by index; None: the explanation's own.
        image_names: names above the inputs; None: the explanation's own.
        significant: a fitted ``SpatialACV``, a mapping of concepts to bool, or ``(T,)`` or ``(N, T)`` bool in the order
            of ``explanation.concepts`` (``SpatialACV.significant_`` has the order of the fit, which differs); where
            False, the concept is gray and labeled "not encoded here".
        points, boxes, mask: the queried region, in pixels of ``images`` as in ``SALFCBM.explain_region``, which is
            outlined on the inputs.
        crop: ``(x0, y0, x1, y1)`` in pixels, or one per image: the part of the photograph that the model saw and the
            maps cover. The rest is pale.
        scale: maps that share a color scale: those of a ``"row"``, all of the ``"panel"``, or ``"map"`` for none. The
            figure states it.
        map_label: description of the maps' values, written next to the color bar.
        cell_size: width of an image in inches; text keeps its size and wraps.
        alpha, cmap, mode: as in :func:`overlay`.
        signed: True: a diverging color map; False: a sequential one; ``"auto"``: diverging for the whole figure if
            negative values matter in any of its maps.

    Returns:
        A matplotlib figure outside pyplot; write it with :func:`save_figure`. Red is positive and blue negative, in
        signed maps and in bars. Each row's bars have their own axis, shared by all rows if ``scale="panel"``.

    Raises:
        InputError: the numbers of images, names or flags differ from the explanation's, or there is nothing to draw.

    Warns:
        InputWarning: maps contain NaN or infinite values, which are left uncolored.

    Example:
        To find out why a cow on a beach was classified as a camel, look for negative contributions to "cow"::

            e = method.explain(image, target="cow")
            panel(e, image, rank_by="contributions", image_names=["cow, called a camel"])

        >>> e = ConceptExplanation(["sand", "grass"], torch.rand(1, 2), torch.rand(1, 2, 7, 7), torch.randn(1, 2))
        >>> figure = panel(e, torch.rand(1, 3, 32, 32), title="what, where, how much")
    """
    return _panel(FigureCanvas, **locals()).figure


def panel_image(explanation: ConceptExplanation, images: Any, *, dpi: float = 200, **options: Any) -> Image:
    """The figure of :func:`panel` as a PIL image, which is drawn much faster.

    Args:
        explanation, images, options: as in :func:`panel`.
        dpi: pixels per inch.

    Returns:
        A PIL image; write it with :func:`save_figure`.

    Raises:
        InputError: as in :func:`panel`, or a ``dpi`` that is not positive.

    Example:
        >>> e = ConceptExplanation(["sand", "grass"], torch.rand(1, 2), torch.rand(1, 2, 7, 7))
        >>> panel_image(e, torch.rand(1, 3, 32, 32), dpi=100).mode
        'RGB'
    """
    number("dpi", dpi, lambda pixels: pixels > 0, "positive")
    given = signature(panel).bind(explanation, images, **options)
    given.apply_defaults()
    return _panel(partial(Raster, dpi=dpi), **given.arguments).image


def _panel(
    surface: Callable[[float, float], Any], explanation: Any, images: Any, top_k: int | None, rank_by: str | None,
    title: str | None, class_names: Any, image_names: Sequence[str] | None, significant: Any, points: Any, boxes: Any,
    mask: Any, crop: Any, scale: str, map_label: str, cell_size: float, alpha: float, cmap: Any, signed: bool | str,
    mode: str,
) -> Any:  # fmt: skip
    """The canvas that ``surface`` creates for a width and a height, with :func:`panel` drawn on it."""
    explanation = check_explanation("panel", explanation, images)
    n = len(explanation)
    check_selected(explanation)
    pictures = as_images(images, n)
    limit = MOST if top_k is None else integer("top_k", top_k)
    one_of("rank_by", rank_by, (*RANKINGS, None))
    one_of("scale", scale, tuple(SCALES))
    number("cell_size", cell_size, lambda inches: 0.8 <= inches <= 20, "0.8 to 20 inches")
    names = explanation.image_names if image_names is None else image_names
    if names is not None and len(names) != n:
        raise InputError(f"{len(names)} image_names for {n} images")
    explanation = explanation.to("cpu")
    flags = significance(significant, explanation.concepts, n)
    sizes = [(p.shape[1], p.shape[2]) for p in pictures]
    regions = outlines(sizes, (explanation.maps.shape[2], explanation.maps.shape[3]), points, boxes, mask)
    crops = [None] * n if crop is None else crop_boxes(crop, sizes)
    rows = []
    for i in range(n):
        one, states = ordered(explanation, i, flags[i], rank_by, limit)
        cell = Cell(pictures[i], regions[i], crops[i], "input" if names is None else str(names[i]))
        rows.append(make_row(one, states, cell, class_names, cell_size))
    if any(row.unknown for row in rows):
        warnings.warn("maps contain NaN or infinite values; they are left uncolored", InputWarning, stacklevel=3)
    _share_scales(rows, scale, signed, cmap)
    hidden = max(int(explanation.selected.sum(1).max()) - limit, 0)
    note = _note(explanation, rows, scale, map_label, hidden)
    return _draw(surface, rows, scale, title, note, map_label, cell_size, {"alpha": alpha, "mode": mode})


def check_explanation(function: str, explanation: Any, images: Any) -> ConceptExplanation:
    """``explanation``, after a check of its type.

    Raises:
        InputError: it is not a ``ConceptExplanation``; the message points out swapped arguments.
    """
    if isinstance(explanation, ConceptExplanation):
        return explanation
    swapped = isinstance(images, ConceptExplanation)
    hint = f"; the explanation comes first: {function}(explanation, images)" if swapped else ""
    raise InputError(f"{function} requires a ConceptExplanation, got {type(explanation).__name__}{hint}")


def check_selected(explanation: ConceptExplanation) -> None:
    """Check that there is an image, and a concept that is selected for one of them.

    Raises:
        InputError: there is nothing to draw.
    """
    n, t = len(explanation), len(explanation.concepts)
    if not n or not t:
        raise InputError(f"nothing to draw: {n} images, {t} concepts")
    if not bool(explanation.selected.any()):
        raise InputError(f"nothing to draw: none of the {t} concepts is selected for any of the {n} images")


def significance(significant: Any, concepts: Sequence[str], n: int) -> Tensor:
    """``(n, t)`` bool for the t ``concepts``, looked up by name where the flags have names; all True for None.

    >>> significance({"sand": True, "grass": False}, ["grass", "sand"], 1)
    tensor([[False,  True]])
    """
    t = len(concepts)
    if hasattr(significant, "significant_") and hasattr(significant, "concepts"):  # a fitted method
        fitted = significant.significant_
        significant = None if fitted is None else dict(zip(significant.concepts, fitted.tolist(), strict=True))
    if significant is None or not t:
        return torch.ones(n, t, dtype=torch.bool)
    if isinstance(significant, Mapping):
        if missing := [name for name in concepts if name not in significant]:
            raise InputError(f"significant lacks {missing[:5]}; give True or False for each concept")
        significant = [significant[name] for name in concepts]
    try:
        flags = torch.as_tensor(significant).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        wanted = "a fitted SpatialACV, a mapping of concepts to bool, or flags"
        raise InputError(f"significant must be {wanted}, got {type(significant).__name__}") from error
    if tuple(flags.shape) not in ((t,), (n, t)):
        raise InputError(f"significant must be ({t},) or ({n}, {t}), got {tuple(flags.shape)}")
    if flags.dtype != torch.bool:
        raise InputError(f"significant must be bool, got {flags.dtype}; compare p-values with a level first")
    return flags.expand(n, t)


def crop_boxes(crop: Any, sizes: Sequence[tuple[int, int]]) -> list[Box | None]:
    """One box per image, checked to lie within it."""
    found: list[Box | None] = []
    single = isinstance(crop, Sequence) and len(crop) == len(sizes) and not isinstance(crop[0], (int, float))
    values = [[one] for one in crop] if single or getattr(crop, "ndim", 1) == 2 else crop
    for (height, width), own in zip(sizes, per_image(values, len(sizes), 4, "crop"), strict=True):
        x0, y0, x1, y1 = own[0]
        x1, y1 = (min(end, side) if end < side + 1e-6 else end for end, side in ((x1, width), (y1, height)))  # rounded
        if len(own) != 1 or not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise InputError(f"crop must be one box (x0, y0, x1, y1) within the {width} x {height} image, got {own}")
        found.append((x0, y0, x1, y1))
    return found


def ordered(
    explanation: ConceptExplanation, i: int, encoded: Tensor, rank_by: str | None, limit: int
) -> tuple[ConceptExplanation, list[str]]:
    """Image i with its ``limit`` leading concepts in display order, and the state of each (empty, not seen, or not
    encoded). Without a ranking the order is kept, unless some must be left out, which are chosen by score."""
    one = explanation[i]
    by = rank_by or ("" if one.rank_by or len(one.concepts) <= limit else "scores")
    if by:
        one = one.top(len(one.concepts), by=by)
    state = {}
    for j, name in enumerate(one.concepts):
        seen = one.presence is None or not float(one.presence[0, j]) < SEEN
        state[name] = ("" if seen else NOT_SEEN) if encoded[explanation.index(name)] else NOT_ENCODED
    order = sorted(one.concepts, key=lambda name: ("", NOT_SEEN, NOT_ENCODED).index(state[name]))[:limit]
    return one[:, order], [state[name] for name in order]


def class_of(one: ConceptExplanation, names: Sequence[str] | Mapping[int, str] | None) -> str | None:
    """Name of the target of an explanation of one image."""
    if one.target is None:
        return None
    target = int(one.target)
    if names is None:
        return one.class_name(target)
    known = target in names if isinstance(names, Mapping) else 0 <= target < len(names)
    if not known:
        raise InputError(f"no name for target {target} among {len(names)} class_names")
    return str(names[target])


def absence(one: ConceptExplanation, j: int, target: str) -> str:
    """Note for a contribution from a score below average, whose sign differs from that of the weight.

    Empty unless scores are standardized, so that 0 is the concept's average over the training images.
    """
    score, how = float(one.scores[0, j]), 0.0 if one.contributions is None else float(one.contributions[0, j])
    if not (score < 0 and how and "deviation" in one.score_unit):
        return ""
    return f"its absence {'supports' if how > 0 else 'opposes'} {target}"


@dataclass
class Cell:
    """The first column of a row, with the image, the queried region, the part that the maps cover, and its name."""

    picture: Tensor
    region: list[Box]
    crop: Box | None
    name: str


@dataclass
class Row:
    """One image, with its explanation (concepts in the order of the columns) and texts fitted to the cells."""

    cell: Cell
    shown: ConceptExplanation
    states: list[str]
    width: float
    height: float
    input_caption: list[Fitted]
    captions: list[list[Fitted]]
    bars_caption: list[Fitted] = field(default_factory=list)
    bar_names: list[Fitted] = field(default_factory=list)
    scales: list[ColorScale] = field(default_factory=list)
    bound: float = 1.0

    @property
    def encoded(self) -> list[bool]:
        """Whether each concept's map is drawn."""
        return [state != NOT_ENCODED for state in self.states]

    @property
    def maps(self) -> list[Tensor]:
        """Maps of the concepts that are encoded."""
        return [self.shown.maps[0, j].float() for j, yes in enumerate(self.encoded) if yes]

    @property
    def unknown(self) -> bool:
        """Whether a map has values that are not finite."""
        return not all(bool(m.isfinite().all()) for m in self.maps)

    @property
    def head(self) -> float:
        """Inches above the image."""
        return max(sum(part.height for part in c) for c in (self.input_caption, self.bars_caption, *self.captions))

    @property
    def body(self) -> float:
        """Inches for the image, the color bar and the bars."""
        return max(self.height, SHORTEST, 0.15 * len(self.states) if self.with_bars else 0.0)

    @property
    def axis(self) -> float:
        """Inches for the numbers below the bars."""
        return axis_space(self.bound) if self.with_bars else 0.0

    @property
    def with_bars(self) -> bool:
        """Whether there are contributions."""
        return self.shown.contributions is not None

    @property
    def contributions(self) -> list[float]:
        """Contributions of the displayed concepts."""
        return [] if self.shown.contributions is None else self.shown.contributions[0].float().tolist()


def make_row(shown: ConceptExplanation, states: list[str], cell: Cell, class_names: Any, size: float) -> Row:
    """A row with its texts fitted to cells of ``size`` inches."""
    width, height = picture_size(cell.picture, size)
    target = class_of(shown, class_names)
    heading = [fit(cell.name, size, NAME, weight="bold")]
    if target is not None:
        sure = "" if shown.target_probability is None else f" {in_words(float(shown.target_probability))}"
        heading.append(fit(f"target: {target}{sure}", size, DETAIL, lines=2))
    if not states:
        heading.append(fit(NONE_SELECTED, size, DETAIL, lines=2))
    row = Row(cell, shown, states, width, height, heading, [])
    row.captions = _captions(row, target, size)
    if row.with_bars:
        words = "contribution" if target is None else f"contribution to {target}"
        row.bars_caption = [fit(words, BARS + 0.2, NAME, weight="bold")]
        if shown.contribution_unit:
            row.bars_caption.append(fit(shown.contribution_unit, BARS + 0.2, DETAIL, lines=2))
        lines = int(row.body / max(len(states), 1) / (DETAIL * LEADING / 72))
        row.bar_names = [fit(name, _LABELS, DETAIL, lines=min(max(lines, 1), 3)) for name in shown.concepts]
    return row


def _captions(row: Row, target: str | None, size: float) -> list[list[Fitted]]:
    shown, details = row.shown, []
    for j, state in enumerate(row.states):
        details.append([state] if state else [])
        if state == NOT_ENCODED:
            continue
        details[j].append(f"score {in_words(float(shown.scores[0, j]))} {shown.score_unit}".rstrip())
        if shown.contributions is not None:
            details[j].append(f"contribution {in_words(float(shown.contributions[0, j]), sign=True)}")
        details[j].append(absence(shown, j, target or "the output"))
        if not isinstance(shown.layer, str):
            details[j].append(f"layer {shown.layer[0][j]}")
    names = [fit(name, size, NAME, weight="bold") for name in shown.concepts]
    parts = join([list(filter(None, own)) for own in details], size, DETAIL)
    return [list(pair) for pair in zip(names, parts, strict=True)]


def picture_size(picture: Tensor, cell: float) -> tuple[float, float]:
    """Width and height in inches, as wide as the cell unless the image would be too tall."""
    ratio = picture.shape[1] / picture.shape[2]
    height = min(cell * ratio, _TALLEST * cell)
    return max(height / ratio, 0.02), max(height, 0.02)


def _share_scales(rows: Sequence[Row], shared: str, signed: bool | str, cmap: Any) -> None:
    """Set the color scale of each concept in each row, with one color scheme for the figure; each row has its own axis
    of contributions, unless the whole panel shares one scale."""
    if shared == "panel":
        groups = [[m for row in rows for m in row.maps]]
    else:
        groups = [group for row in rows for group in ([row.maps] if shared == "row" else [[m] for m in row.maps])]
    signed = schemes(groups, signed)
    whole = ColorScale.of(groups[0], signed, cmap=cmap) if shared == "panel" else None
    for row in rows:
        one = whole or ColorScale.of(row.maps, signed, cmap=cmap)
        row.scales = [one] * len(row.states)
        if shared == "map":
            row.scales = [ColorScale.of(m, signed, cmap=cmap) for m in row.shown.maps[0]]
    largest = [max((abs(v) for v in row.contributions if abs(v) < float("inf")), default=0.0) for row in rows]
    for row, own in zip(rows, largest, strict=True):
        row.bound = round_up(max(largest) if shared == "panel" else own)


def _note(explanation: ConceptExplanation, rows: Sequence[Row], shared: str, map_label: str, hidden: int) -> str:
    """Note below the figure on its contents and how to read it."""
    states = {state for row in rows for state in row.states}
    differ = any(
        not state and scale.signed and float(m.nan_to_num().sum()) * how < 0 and not absence(row.shown, j, "")
        for row in rows
        for j, (state, scale, m, how) in enumerate(
            zip(row.states, row.scales, row.shown.maps[0].float(), row.contributions, strict=False)
        )
    )
    layer = explanation.layer if isinstance(explanation.layer, str) else ""
    parts = [
        explanation.method,
        layer and f"layer {layer}",
        map_label and f"maps: {map_label}",
        SCALES[shared] if sum(len(row.maps) for row in rows) > 1 else "",
        "a map shows where a concept is (blue: its opposite), a bar what it does to the target" if differ else "",
        f"not seen (pale): probability of presence below {SEEN:g}" if NOT_SEEN in states else "",
        "outlined: the region asked about" if any(row.cell.region for row in rows) else "",
        "framed: the part of the image that the model saw" if any(row.cell.crop for row in rows) else "",
        f"{hidden} more concept{'s' * (hidden > 1)} not shown" if hidden else "",
    ]
    return "   ·   ".join(filter(None, parts))


@dataclass(frozen=True)
class _Columns:
    """Left ends of the columns (input, maps, bars), and the width of the figure."""

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
        first = _MARGIN + cell + 1.5 * _GAP
        count = max(len(row.states) for row in rows)
        bars = end = first + count * step - _GAP + (0.0 if per_map else space)
        if rows[0].with_bars:
            lines = [line for row in rows for name in row.bar_names for line in name.text.split("\n")]
            bars = end + 0.2 + max(text_width(line, DETAIL) for line in lines)
            end = bars + BARS + 0.16
        return cls(cell, first, step, bars, end + _MARGIN)


def _draw(
    surface: Callable[[float, float], Any], rows: Sequence[Row], shared: str, title: str | None, note: str, label: str,
    cell: float, style: dict[str, Any],
) -> Any:  # fmt: skip
    """A canvas that fits its rows, with a title above and a note below them."""
    columns = _Columns.measure(rows, shared == "map", label, cell)
    head = fit(title, columns.width - 2 * _MARGIN, TITLE, lines=4, weight="bold") if title else Fitted("", TITLE)
    foot = fit(note, columns.width - 2 * _MARGIN, DETAIL, lines=6)
    heights = [row.head + _ABOVE + row.body + row.axis for row in rows]
    y = _MARGIN + (head.height + _ROW_GAP if title else 0.0)
    bottom = y + sum(heights) + _ROW_GAP * (len(rows) - 1)
    canvas = surface(columns.width, bottom + (_FOOT_GAP + foot.height if note else 0.0) + _MARGIN)
    canvas.text(columns.width / 2, _MARGIN, head, va="top", fontweight="bold")
    canvas.text(_MARGIN, canvas.height - _MARGIN, foot, ha="left", color=FAINT)
    for row, height in zip(rows, heights, strict=True):
        _draw_row(canvas, columns, row, y, shared == "map", label, style)
        y += height + _ROW_GAP
    return canvas


def _draw_row(
    canvas: Canvas, columns: _Columns, row: Row, top: float, per_map: bool, label: str, style: dict[str, Any]
) -> None:
    y, cell, size = top + row.head + _ABOVE, columns.cell, (row.cell.picture.shape[1], row.cell.picture.shape[2])
    indent = (cell - row.width) / 2
    picture = at_print_size(row.cell.picture, max(row.width, row.height), canvas.density)
    canvas.caption(_MARGIN + cell / 2, y - _ABOVE, row.input_caption)
    axes = canvas.picture((_MARGIN + indent, y, row.width, row.height), picture, "input", size)
    if row.cell.crop is not None:
        canvas.outline(axes, frame(row.cell.crop), "white")
    canvas.outline(axes, row.cell.region)
    last, pale = len(row.states) - 1, faded(picture)
    for j, (name, state, scale) in enumerate(zip(row.shown.concepts, row.states, row.scales, strict=True)):
        x = columns.first + j * columns.step
        canvas.caption(x + cell / 2, y - _ABOVE, row.captions[j], faint=bool(state))
        pixels = pale
        if state != NOT_ENCODED:
            pixels = _covered(picture, pale, row.shown.maps[0, j].float(), scale, row.cell.crop, size, style)
            pixels = torch.lerp(torch.ones_like(pixels), pixels, 0.45) if state else pixels
        axes = canvas.picture((x + indent, y, row.width, row.height), pixels, name, size)
        if row.cell.crop is not None:
            canvas.outline(axes, frame(row.cell.crop), "white")
        if state != NOT_ENCODED if per_map else j == last and any(row.encoded):
            canvas.colorbar(x + cell - indent + BAR_GAP, y, max(row.height, SHORTEST), scale, label)
    if row.with_bars and row.states:
        canvas.caption(columns.bars + BARS / 2, y - _ABOVE, row.bars_caption)
        canvas.bars(columns.bars, y, BARS, row.body, row.bar_names, row.contributions, row.states, row.bound)


def _covered(
    picture: Tensor, pale: Tensor, heatmap: Tensor, scale: ColorScale, crop: Box | None, size: tuple[int, int],
    style: dict[str, Any],
) -> Tensor:  # fmt: skip
    """The map over the part of the image that it covers, with the rest pale."""
    if crop is None:
        return blend(picture, heatmap, scale, **style)
    dy, dx = picture.shape[1] / size[0], picture.shape[2] / size[1]
    x0, x1 = round(crop[0] * dx), max(round(crop[2] * dx), round(crop[0] * dx) + 1)
    y0, y1 = round(crop[1] * dy), max(round(crop[3] * dy), round(crop[1] * dy) + 1)
    pixels = pale.clone()
    pixels[:, y0:y1, x0:x1] = blend(picture[:, y0:y1, x0:x1], heatmap, scale, **style)
    return pixels


def heatmap_figure(
    image: Any,
    heatmap: Any,
    *,
    title: str | None = None,
    label: str = "",
    width: float = 4.2,
    alpha: float = ALPHA,
    cmap: Any = None,
    signed: bool | str = "auto",
    vmin: float | None = None,
    vmax: float | None = None,
    mode: str = "bicubic",
) -> Figure:
    """Figure of one image with one map and its color bar.

    Args:
        image, heatmap, alpha, cmap, signed, vmin, vmax, mode: as in :func:`overlay`.
        title: title above the image, wrapped and reduced in size as needed.
        label: description of the map's values, written next to the color bar.
        width: width of the image in inches.

    Example:
        >>> figure = heatmap_figure(torch.rand(3, 32, 32), torch.rand(4, 4), title="stripes", label="cosine")
    """
    number("width", width, lambda inches: 0.8 <= inches <= 20, "0.8 to 20 inches")
    picture, heatmap = as_image(image), as_heatmap(heatmap)
    if not heatmap.isfinite().all():
        warnings.warn("the map contains NaN or infinite values; they are left uncolored", InputWarning, stacklevel=2)
    scale = ColorScale.of(heatmap, signed, vmin, vmax, cmap)
    shown_width, height = picture_size(picture, width)
    bar = max(height, SHORTEST)
    head = fit(title, shown_width, TITLE, lines=4) if title else Fitted("", TITLE)
    full = shown_width + BAR_GAP + colorbar_space(scale, bar, label) + 2 * _MARGIN
    top = _MARGIN + head.height + (_ABOVE if title else 0.0)
    canvas = FigureCanvas(full, top + bar + _MARGIN)
    canvas.text(_MARGIN + shown_width / 2, _MARGIN, head, va="top")
    picture = at_print_size(picture, max(shown_width, height))
    pixels = blend(picture, heatmap, scale, alpha=alpha, mode=mode)
    canvas.picture((_MARGIN, top, shown_width, height), pixels, "map")
    canvas.colorbar(_MARGIN + shown_width + BAR_GAP, top, bar, scale, label)
    return canvas.figure


_METADATA: dict[str, dict[str, Any]] = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
# Publishers require Type 42 fonts; the other settings make the file depend only on the figure.
_SETTINGS: dict[Any, Any] = {
    "pdf.fonttype": 42,
    "svg.hashsalt": "captum_concepts",
    "savefig.bbox": None,
    "savefig.transparent": False,
}


def save_figure(figure: Figure | Image, path: str | os.PathLike[str], dpi: float = 200) -> Path:
    """Write a figure atomically as PNG, PDF or SVG (by suffix), at its own size.

    Args:
        figure: result of :func:`panel` or :func:`heatmap_figure`, or any other matplotlib figure; an image of
            :func:`panel_image` for PNG.
        path: where to write; an existing file is replaced.
        dpi: pixels per inch of a matplotlib figure; in PDF and SVG it only affects images, as text and lines are
            vector graphics.

    Returns:
        The path.

    Raises:
        InputError: another suffix (for a PIL image: other than .png), or a ``dpi`` that is not positive.
        FileNotFoundError: the folder does not exist.
    """
    from matplotlib import rc_context

    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _METADATA:
        raise InputError(f"figures are written as .png, .pdf or .svg, got {path.name!r}")
    number("dpi", dpi, lambda pixels: pixels > 0, "positive")
    check_destination(path)
    # The default compression saves a tenth but takes two to four times as long, as much as all the drawing.
    fast: Any = {"compress_level": 1, "compress_type": zlib.Z_RLE}
    if not hasattr(figure, "savefig"):
        if suffix != ".png":
            raise InputError(f"an image is written as .png, got {path.name!r}; pass the figure of panel()")
        with replacing(path) as file:
            figure.save(file, "PNG", **fast)
        return path
    options: dict[str, Any] = {"pil_kwargs": fast} if suffix == ".png" else {}
    with replacing(path) as file, rc_context(_SETTINGS):
        figure.savefig(file, format=suffix[1:], dpi=dpi, facecolor="white", metadata=_METADATA[suffix], **options)
    return path
