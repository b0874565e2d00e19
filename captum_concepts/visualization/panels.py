"""A `ConceptExplanation` as one figure: what, where and how much, for several images."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from captum_concepts.errors import InputError
from captum_concepts.explanation import ConceptExplanation
from captum_concepts.visualization.overlay import DIVERGING, SEQUENTIAL, as_image, overlay, value_range

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CELL = 1.9  # inches a picture
_TEXT: dict[str, Any] = {"fontsize": 8, "color": "#222222"}
POSITIVE, NEGATIVE = "#b2182b", "#2166ac"  # the ends of the diverging colour map


def panel(
    images: Any,
    explanation: ConceptExplanation,
    *,
    top_k: int = 4,
    title: str | None = None,
    class_names: Sequence[str] | None = None,
    image_titles: Sequence[str] | None = None,
    significant: Tensor | None = None,
    alpha: float = 0.55,
) -> Figure:
    """One row an image: the input, its leading concepts with score and region, and signed contributions.

    Args:
        images: N images, as for :func:`overlay` (a tensor ``(N, 3, H, W)`` or a list; sizes may differ).
        explanation: of these N images.
        top_k: concepts shown an image, each image's own strongest (by score).
        title: over the whole figure.
        class_names: names of the targets.
        image_titles: one over each input.
        significant: ``(T,)`` or ``(N, T)`` bool; where False, the concept is drawn grey and called "not encoded here".
        alpha: as for :func:`overlay`.

    Each map has its own colour bar; its ends are the values it takes.

    Raises:
        InputError: other numbers of images, titles or flags than the explanation has.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    pictures = [as_image(image) for image in images]
    n, t = len(explanation), min(top_k, len(explanation.concepts))
    if len(pictures) != n:
        raise InputError(f"{len(pictures)} images for an explanation of {n} examples")
    if image_titles is not None and len(image_titles) != n:
        raise InputError(f"{len(image_titles)} image_titles for {n} images")
    if top_k < 1:
        raise InputError(f"top_k must be at least 1, got {top_k}")
    with_bars = explanation.contributions is not None
    columns = 1 + t + with_bars
    ratio = max(p.shape[1] / p.shape[2] for p in pictures)
    cell_h = _CELL * min(max(ratio, 0.6), 1.6) + 0.62
    head = 0.45 if title else 0.1
    layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.05, wspace=0.05, hspace=0.04)
    figure = Figure(figsize=(_CELL * 1.25 * columns, cell_h * n + head), dpi=150, layout=layout)
    axes = figure.subplots(n, columns, squeeze=False)
    if title:
        figure.suptitle(_wrap(title, 16 * columns), fontsize=10, color="#222222")
    for i, one in enumerate(explanation):
        shown = one.top(t)
        name = image_titles[i] if image_titles is not None else "input"
        target = "" if one.target is None else f"\n{_target_name(int(one.target), class_names)}"
        _image(axes[i][0], pictures[i], _wrap(name, 24) + _wrap(target, 24))
        flags = _flags(significant, explanation, i)
        for j, concept in enumerate(shown.concepts):
            encoded = flags is None or bool(flags[explanation.index(concept)])
            _concept(figure, axes[i][1 + j], pictures[i], shown, j, encoded, alpha)
        if with_bars:
            _bars(axes[i][-1], shown)
    return figure


def heatmap_figure(
    image: Any, heatmap: Tensor, *, title: str | None = None, label: str = "", alpha: float = 0.55
) -> Figure:
    """One image with one map and its colour bar.

    Example:
        >>> import torch
        >>> figure = heatmap_figure(torch.rand(3, 32, 32), torch.rand(4, 4), title="stripes")
    """
    from matplotlib.figure import Figure

    picture = as_image(image)
    figure = Figure(figsize=(4.2, 3.4 * min(max(picture.shape[1] / picture.shape[2], 0.5), 2.0) + 0.5), dpi=150,
                    layout="constrained")  # fmt: skip
    axis = figure.subplots()
    _map(figure, axis, picture, heatmap, alpha, label)
    if title:
        axis.set_title(_wrap(title, 48), fontsize=10, color="#222222")
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 150) -> Path:
    """Write a figure as PNG, PDF or SVG (by suffix), whole or not at all."""
    path = Path(path)
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise InputError(f"figures are written as .png, .pdf or .svg, got {path.name!r}")
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        figure.savefig(partial, dpi=dpi, facecolor="white")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _image(axis: Axes, picture: Tensor, title: str) -> None:
    axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set_title(title, **_TEXT)
    axis.set_axis_off()


def _concept(
    figure: Figure, axis: Axes, picture: Tensor, shown: ConceptExplanation, j: int, encoded: bool, alpha: float
) -> None:
    score = float(shown.scores[0, j])
    name = _wrap(shown.concepts[j], 22)
    if encoded:
        _map(figure, axis, picture, shown.maps[0, j], alpha, "")
        text = f"{name}\nscore {score:.3g}"
    else:
        grey = picture.mean(0, keepdim=True).expand(3, -1, -1) * 0.4 + 0.5
        axis.imshow(grey.permute(1, 2, 0).numpy())
        text = f"{name}\nnot encoded here"
    axis.set_title(text, **{**_TEXT, "color": "#222222" if encoded else "#777777"})
    axis.set_axis_off()


def _map(figure: Figure, axis: Axes, picture: Tensor, heatmap: Tensor, alpha: float, label: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    low, high = value_range(heatmap)
    signed = low == -high
    axis.imshow(overlay(picture, heatmap, alpha=alpha).permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set_axis_off()
    scale = ScalarMappable(Normalize(low, high), DIVERGING if signed else SEQUENTIAL)
    numbers = ScalarFormatter()
    numbers.set_powerlimits((-2, 3))
    # An inset is as high as the image, whatever its aspect.
    bar = figure.colorbar(scale, cax=axis.inset_axes((1.03, 0.0, 0.05, 1.0)), ticks=MaxNLocator(3), format=numbers)
    bar.ax.tick_params(labelsize=6, length=2, colors="#444444")
    bar.ax.yaxis.get_offset_text().set_fontsize(6)
    bar.outline.set_linewidth(0.4)
    if label:
        bar.set_label(label, fontsize=8)


def _bars(axis: Axes, shown: ConceptExplanation) -> None:
    values = shown.contributions[0].float().tolist() if shown.contributions is not None else []
    places = range(len(values))
    axis.barh(places, values, color=[POSITIVE if v >= 0 else NEGATIVE for v in values], height=0.6)
    axis.axvline(0, color="#444444", linewidth=0.6)
    axis.set_yticks(list(places), [_wrap(name, 16) for name in shown.concepts], fontsize=7)
    axis.invert_yaxis()
    axis.tick_params(axis="x", labelsize=6)
    axis.locator_params(axis="x", nbins=3)
    axis.set_title("contribution", **_TEXT)
    bound = max((abs(v) for v in values), default=0.0) or 1.0
    axis.set_xlim(-1.15 * bound, 1.15 * bound)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _flags(significant: Tensor | None, explanation: ConceptExplanation, i: int) -> Tensor | None:
    if significant is None:
        return None
    n, t = len(explanation), len(explanation.concepts)
    if tuple(significant.shape) not in ((t,), (n, t)):
        raise InputError(f"significant must be ({t},) or ({n}, {t}), got {tuple(significant.shape)}")
    return significant if significant.ndim == 1 else significant[i]


def _target_name(target: int, names: Sequence[str] | None) -> str:
    return f"target {target}" if names is None else str(names[target])


def _wrap(text: str, width: int) -> str:
    lines = [line for part in text.split("\n") for line in (textwrap.wrap(part, width) or [""])]
    return "\n".join(lines[:4]) if len(lines) <= 4 else "\n".join([*lines[:3], lines[3][: width - 1] + "…"])
