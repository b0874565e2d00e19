"""A `ConceptExplanation` as one figure: what, where and how much, for several images."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_concepts.errors import InputError, InputWarning
from captum_concepts.explanation import ConceptExplanation
from captum_concepts.visualization._layout import ABOVE, MARGIN, draw_panel
from captum_concepts.visualization._parts import BAR_GAP, SHORTEST, Canvas, at_print_size, colorbar_space
from captum_concepts.visualization._rows import Row, make_row, picture_size, share_scales
from captum_concepts.visualization._text import TITLE, Fitted, fit
from captum_concepts.visualization.overlay import as_heatmap, as_image, blend
from captum_concepts.visualization.scale import ColorScale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHARED = {
    "map": "each map has its own colour scale",
    "row": "the maps of a row share one colour scale",
    "panel": "all maps share one colour scale",
}


def panel(
    images: Any,
    explanation: ConceptExplanation,
    *,
    top_k: int = 4,
    by: str | None = "scores",
    title: str | None = None,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    image_titles: Sequence[str] | None = None,
    significant: Any = None,
    scale: str = "row",
    map_label: str = "",
    cell_size: float = 1.7,
    alpha: float = 0.55,
    cmap: Any = None,
    signed: bool | str = "auto",
    mode: str = "bicubic",
) -> Figure:
    """One row an image: the input, its leading concepts with score and region, and signed contributions as bars.

    Args:
        images: N images, as for :func:`overlay` (a tensor ``(N, 3, H, W)`` or a list; sizes may differ), or one
            image where the explanation has one example.
        explanation: of these N images.
        top_k: concepts shown an image.
        by: each image's own strongest come first by ``"scores"`` or by ``"contributions"`` (magnitude: this shows
            what spoke against the target as well); None keeps the explanation's order, the same in all rows. Concepts
            that are not significant come last.
        title: over the whole figure.
        class_names: names of the targets, by index.
        image_titles: one over each input.
        significant: ``(T,)`` or ``(N, T)`` bool; where False, the concept is drawn grey and called "not encoded here".
        scale: maps that share one colour scale: those of a ``"row"``, all of the ``"panel"``, or ``"map"`` for none.
            The figure states it.
        map_label: what the maps' values are, written beside the colour bar.
        cell_size: width of a picture in inches; the texts keep their size and wrap.
        alpha, cmap, signed, mode: as for :func:`overlay`.

    Returns:
        A figure outside pyplot, to be written by :func:`save_figure`. Red is positive and blue negative, in maps and
        in bars; the bars of all rows share one axis.

    Raises:
        InputError: other numbers of images, titles, names or flags than the explanation has, or nothing to draw.

    Warns:
        InputWarning: maps hold NaN or infinite values, which are left uncoloured.

    Example:
        Why was a cow on a beach called a camel? A concept with a negative contribution held the right class down::

            e = method.explain(image, target=cow)
            panel(image, e, by="contributions", class_names=names, image_titles=["cow, called a camel"])

        >>> e = ConceptExplanation(["sand", "grass"], torch.rand(1, 2), torch.rand(1, 2, 7, 7), torch.randn(1, 2))
        >>> figure = panel(torch.rand(1, 3, 32, 32), e, title="what, where, how much")
    """
    pictures = _pictures(images, explanation)
    n, t = len(explanation), len(explanation.concepts)
    if top_k < 1:
        raise InputError(f"top_k must be at least 1, got {top_k}")
    if by not in ("scores", "contributions", None):
        raise InputError(f"by must be 'scores', 'contributions' or None, got {by!r}")
    if scale not in _SHARED:
        raise InputError(f"scale must be 'map', 'row' or 'panel', got {scale!r}")
    if not 0.8 <= cell_size <= 20:
        raise InputError(f"cell_size must be 0.8 to 20 inches, got {cell_size}")
    if image_titles is not None and len(image_titles) != n:
        raise InputError(f"{len(image_titles)} image_titles for {n} images")
    explanation = explanation.to("cpu")
    flags = _flags(significant, n, t)
    rows: list[Row] = []
    for i, one in enumerate(explanation):
        order = one.top(t, by=by).concepts if by else list(one.concepts)
        order.sort(key=lambda name: not flags[i, one.index(name)])
        shown = one[order[:top_k]]
        encoded = [bool(flags[i, one.index(name)]) for name in shown.concepts]
        target = None if one.target is None else _class_name(int(one.target), class_names)
        heading = str(image_titles[i]) if image_titles is not None else "input"
        rows.append(make_row(pictures[i], shown, encoded, heading, target, cell_size))
    drawn = [row.shown.maps[0, j] for row in rows for j, yes in enumerate(row.encoded) if yes]
    if not all(bool(m.isfinite().all()) for m in drawn):
        warnings.warn("maps hold NaN or infinite values; they are left uncoloured", InputWarning, stacklevel=2)
    share_scales(rows, scale, signed, cmap)
    layer = explanation.layer if isinstance(explanation.layer, str) else ""
    values = map_label and f"maps show the {map_label}"
    notes = [explanation.method, layer and f"layer {layer}", values, _SHARED[scale] if len(drawn) > 1 else ""]
    note = "   ·   ".join(filter(None, notes))
    return draw_panel(rows, scale, title, note, map_label, cell_size, {"alpha": alpha, "mode": mode})


def heatmap_figure(
    image: Any,
    heatmap: Any,
    *,
    title: str | None = None,
    label: str = "",
    width: float = 4.2,
    alpha: float = 0.55,
    cmap: Any = None,
    signed: bool | str = "auto",
    vmin: float | None = None,
    vmax: float | None = None,
    mode: str = "bicubic",
) -> Figure:
    """One image with one map and its colour bar.

    Args:
        image, heatmap, alpha, cmap, signed, vmin, vmax, mode: as for :func:`overlay`.
        title: over the picture; wrapped, and made smaller where needed.
        label: what the map's values are, beside the colour bar.
        width: of the picture, in inches.

    Example:
        >>> figure = heatmap_figure(torch.rand(3, 32, 32), torch.rand(4, 4), title="stripes", label="cosine")
    """
    if not 0.8 <= width <= 20:
        raise InputError(f"width must be 0.8 to 20 inches, got {width}")
    picture, heatmap = as_image(image), as_heatmap(heatmap)
    if not heatmap.isfinite().all():
        warnings.warn("the map holds NaN or infinite values; they are left uncoloured", InputWarning, stacklevel=2)
    scale = ColorScale.of(heatmap, signed, vmin, vmax, cmap)
    shown_width, height = picture_size(picture, width)
    bar = max(height, SHORTEST)
    head = fit(title, shown_width, TITLE, lines=4) if title else Fitted("", TITLE)
    full = shown_width + BAR_GAP + colorbar_space(scale, bar, label) + 2 * MARGIN
    top = MARGIN + head.height + (ABOVE if title else 0.0)
    canvas = Canvas(full, top + bar + MARGIN)
    canvas.text(MARGIN + shown_width / 2, MARGIN, head, va="top")
    picture = at_print_size(picture, max(shown_width, height))
    pixels = blend(picture, heatmap, scale, alpha=alpha, mode=mode)
    canvas.picture(MARGIN, top, shown_width, height, pixels, "map")
    canvas.colorbar(MARGIN + shown_width + BAR_GAP, top, bar, scale, label)
    return canvas.figure


def _pictures(images: Any, explanation: ConceptExplanation) -> list[Tensor]:
    n = len(explanation)
    if not n or not explanation.concepts:
        raise InputError(f"nothing to draw: {n} examples, {len(explanation.concepts)} concepts")
    single = hasattr(images, "convert") or (getattr(images, "ndim", 4) == 3 and n == 1)
    pictures = [as_image(image) for image in ([images] if single else images)]
    if len(pictures) != n:
        raise InputError(f"{len(pictures)} images for an explanation of {n} examples")
    return pictures


def _flags(significant: Any, n: int, t: int) -> Tensor:
    if significant is None:
        return torch.ones(n, t, dtype=torch.bool)
    flags = torch.as_tensor(significant).detach().cpu()
    if tuple(flags.shape) not in ((t,), (n, t)):
        raise InputError(f"significant must be ({t},) or ({n}, {t}), got {tuple(flags.shape)}")
    if flags.dtype != torch.bool:
        raise InputError(f"significant must be bool, got {flags.dtype}; compare p-values with a level first")
    return flags.expand(n, t)


def _class_name(target: int, names: Sequence[str] | Mapping[int, str] | None) -> str:
    if names is None:
        return f"class {target}"
    known = target in names if isinstance(names, Mapping) else 0 <= target < len(names)
    if not known:
        raise InputError(f"no name for target {target} among {len(names)} class_names")
    return str(names[target])
