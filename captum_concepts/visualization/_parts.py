"""The parts of a figure, each placed in inches from the top left corner, so that nothing can meet by accident."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_concepts.visualization._text import DETAIL, FAINT, INK, PLAIN, TICK, Fitted, fit, text_width, tick_texts
from captum_concepts.visualization.overlay import grey
from captum_concepts.visualization.scale import ColorScale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The colours of the bars are near the ends of the diverging colour map.
POSITIVE, NEGATIVE, ABSENT = "#b2182b", "#2166ac", "#c4c4c4"
NOT_ENCODED = "not encoded here"
BAR_WIDTH, BAR_GAP, _TICK_GAP = 0.08, 0.06, 0.07
#: Width of the axis of contributions.
BARS = 1.1
#: Least height of a colour bar: room for its three numbers.
SHORTEST = 0.55
_PIXELS = 400  # an inch: as fine as print needs, and bounded for large photographs


class Canvas:
    """A figure of ``width`` x ``height`` inches."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure: Figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
        self.figure.set_layout_engine("none")  # whatever the user's settings: places are fixed here

    def axes(self, x: float, y: float, width: float, height: float, **options: Any) -> Axes:
        """Axes whose top left corner is at ``(x, y)``."""
        bottom = self.height - y - height
        box = (x / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box, **options)

    def text(self, x: float, y: float, fitted: Fitted, **options: Any) -> None:
        """Text whose bottom (``va="bottom"``, the default) or top is at y."""
        style: dict[str, Any] = {"color": INK, "ha": "center", "va": "bottom", **PLAIN, **options}
        self.figure.text(x / self.width, 1 - y / self.height, fitted.text, fontsize=fitted.size, **style)

    def caption(self, x: float, y: float, parts: Sequence[Fitted], *, faint: bool = False) -> None:
        """A bold line and lines below it, centred, that end at y."""
        for k, part in reversed(list(enumerate(parts))):
            colour = FAINT if faint or k else INK
            self.text(x, y, part, color=colour, fontweight="normal" if k else "bold")
            y -= part.height

    def picture(self, x: float, y: float, width: float, height: float, pixels: Tensor, label: str) -> Axes:
        axes = self.axes(x, y, width, height, label=label)
        array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        axes.imshow(array, interpolation="antialiased", aspect="auto")
        axes.set_axis_off()
        return axes

    def colorbar(self, x: float, y: float, height: float, scale: ColorScale, label: str = "") -> None:
        """A vertical bar with both end values, the middle where there is room, and what the values are."""
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        axes = self.axes(x, y, BAR_WIDTH, height, label="colorbar")
        mappable = ScalarMappable(Normalize(scale.low, scale.high), scale.colormap())
        bar = self.figure.colorbar(mappable, cax=axes)
        bar.outline.set_linewidth(0.5)
        bar.outline.set_edgecolor(FAINT)
        ticks, labels, factor = ticks_of(scale, height)
        bar.set_ticks(ticks, labels=labels)
        bar.minorticks_off()
        axes.tick_params(which="major", length=2, pad=2, width=0.5, color=FAINT, labelcolor=INK, labelsize=TICK)
        plain_ticks(axes.get_yticklabels())
        if len(labels) > 1:  # the end labels stay within the height of the bar
            axes.get_yticklabels()[0].set_verticalalignment("bottom")
            axes.get_yticklabels()[-1].set_verticalalignment("top")
        words = _beside(label, factor, height)
        shift = BAR_WIDTH + _TICK_GAP + max(text_width(t, TICK) for t in labels) + 0.04
        self.text(x + shift, y + height / 2, words, rotation=90, ha="left", va="center")

    def bars(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        labels: Sequence[Fitted],
        values: Sequence[float],
        encoded: Sequence[bool],
        bound: float,
    ) -> None:
        """Signed bars from a common zero, the first on top, with a symmetric axis of ``bound`` below."""
        axes = self.axes(x, y, width, height, label="contributions", facecolor="none")
        places = list(range(len(values)))
        colours = [POSITIVE if v >= 0 else NEGATIVE for v in values]
        colours = [colour if yes else ABSENT for colour, yes in zip(colours, encoded, strict=True)]
        thickness = min(0.62, 0.2 * len(values) / height)
        drawn = [v if math.isfinite(v) else 0.0 for v in values]
        axes.barh(places, drawn, height=thickness, color=colours, linewidth=0)
        axes.axvline(0, color=INK, linewidth=0.7)
        axes.set_xlim(-bound, bound)
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.set_yticks([])
        ticks = [-bound, 0.0, bound]
        texts, factor = tick_texts(ticks)
        axes.set_xticks(ticks, texts)
        axes.minorticks_off()
        axes.tick_params(axis="x", length=2, pad=2, width=0.5, color=FAINT, labelcolor=INK, labelsize=TICK)
        plain_ticks(axes.get_xticklabels())
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set(linewidth=0.5, color=FAINT)
        pitch = height / len(values)
        for k, label in enumerate(labels):
            colour = INK if encoded[k] else FAINT
            self.text(x - 0.06, y + (k + 0.5) * pitch, label, ha="right", va="center", color=colour)
        if factor:
            self.text(x + width, y + height + axis_space(bound), Fitted(factor, TICK))


def plain_ticks(labels: Sequence[Any]) -> None:
    for label in labels:
        label.set(parse_math=False, usetex=False)


def ticks_of(scale: ColorScale, height: float) -> tuple[list[float], list[str], str]:
    """Values, labels and common factor of a colour bar's ticks: its ends, and its middle where there is room."""
    middle = [(scale.low + scale.high) / 2] if height >= SHORTEST else []
    ticks = [scale.low, *middle, scale.high]
    return ticks, *tick_texts(ticks)


def _beside(label: str, factor: str, height: float) -> Fitted:
    """One line along a colour bar: what its values are, cut or left out where it is too long, and their factor."""
    factor = f"({factor})" if label and factor else factor
    words = fit(label, height - text_width(f" {factor}", DETAIL), DETAIL, lines=1) if label else Fitted("", DETAIL)
    if words.text.endswith("…") and len(words.text) < 6:
        return Fitted(factor.strip("()"), DETAIL)
    return Fitted(f"{words.text} {factor}".strip(), words.size)


def axis_space(bound: float) -> float:
    """Inches under the bars for the numbers of their axis, and for their factor where there is one."""
    return 0.3 if tick_texts([bound])[1] else 0.18


def colorbar_space(scale: ColorScale, height: float, label: str) -> float:
    """Inches from the left end of a colour bar to the right end of its texts."""
    _, labels, factor = ticks_of(scale, height)
    space = BAR_WIDTH + _TICK_GAP + max(text_width(t, TICK) for t in labels)
    return space + (DETAIL * 1.3 / 72 + 0.04 if label or factor else 0.0)


def at_print_size(picture: Tensor, inches: float) -> Tensor:
    """A picture with enough pixels for print and no more: small ones in whole blocks, so that they stay sharp and the
    map over them is smooth; large ones antialiased."""
    _, height, width = picture.shape
    target = max(round(inches * _PIXELS), 1)
    longest = max(height, width)
    if longest > target:
        size = (max(round(height * target / longest), 1), max(round(width * target / longest), 1))
        picture = F.interpolate(picture[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
        return picture.clamp(0, 1)
    blocks = max(target // longest, 1)
    return picture.repeat_interleave(blocks, 1).repeat_interleave(blocks, 2)


def faded(picture: Tensor) -> Tensor:
    """The picture in pale grey, for a concept that has no place in it."""
    return torch.lerp(torch.ones_like(picture), grey(picture), 0.45).clamp(0, 1)


def round_up(value: float) -> float:
    """The next of 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10 times a power of ten: an axis end that reads well."""
    if not (math.isfinite(value) and value > 0):
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10):
        if value <= step * unit * (1 + 1e-9):
            return step * unit
    return 10 * unit
