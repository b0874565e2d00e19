"""What figures are drawn with: text that is measured before it is placed, and parts placed in inches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_concepts.explanation import short
from captum_concepts.visualization.overlay import gray
from captum_concepts.visualization.scale import ColorScale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#222222", "#6e6e6e"  # contrast with white 15.9 : 1 and 5.1 : 1
TITLE, NAME, DETAIL, TICK = 10.0, 8.0, 7.0, 6.5  # points
LEADING = 1.3
#: Names are text: no "$" formula, no LaTeX, whatever the user's settings.
PLAIN: dict[str, Any] = {"parse_math": False, "usetex": False, "linespacing": 1.15}


@dataclass(frozen=True)
class Fitted:
    """Text broken into lines, its size in points, and the height to reserve, in inches."""

    text: str
    size: float

    @property
    def height(self) -> float:
        """Inches."""
        return (self.text.count("\n") + 1) * self.size * LEADING / 72 if self.text else 0.0


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """The width of one line, in inches, with the font of the user's settings."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    if not text:
        return 0.0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # drawing says so, once is enough
        width, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(size=size, weight=weight), False)
    return float(width) / 72 * 1.03  # hinting on screen makes letters a little wider


def fit(
    text: str, width: float, size: float, *, lines: int = 3, smallest: float = 6.0, weight: str = "normal"
) -> Fitted:
    """``text`` in at most ``lines`` lines of ``width`` inches.

    Tried in this order: wrapping between words at ``size``, smaller down to ``smallest`` points, breaking inside words,
    and at last an ellipsis.
    """
    sizes = [size - 0.5 * k for k in range(max(1, math.floor((size - smallest) / 0.5) + 1))]
    for break_words in (False, True):
        for points in sizes:
            found = _wrap(text, width, points, weight, break_words)
            if found is not None and len(found) <= lines:
                return Fitted("\n".join(found), points)
    found = _wrap(text, width, sizes[-1], weight, True) or [""]
    last = found[lines - 1].rstrip()
    while last and text_width(last + "…", sizes[-1], weight) > width:
        last = last[:-1].rstrip()
    return Fitted("\n".join([*found[: lines - 1], last + "…"]), sizes[-1])


def join(cells: Sequence[Sequence[str]], width: float, size: float) -> list[Fitted]:
    """The parts of each cell side by side where that fits in every cell, otherwise one below the other in all.

    Parts hold numbers, so they are wrapped where a cell is very narrow, never cut.
    """
    joined = ["   ".join(parts) for parts in cells]
    if all(text_width(line, size) <= width for line in joined):
        return [Fitted(line, size) for line in joined]
    fitted = [[fit(part, width, size, lines=4) for part in parts] for parts in cells]
    return [Fitted("\n".join(f.text for f in c), min(f.size for f in c)) for c in fitted]


def _wrap(text: str, width: float, size: float, weight: str, break_words: bool) -> list[str] | None:
    """Lines, or None where a word is wider than a line and must not be broken."""
    lines: list[str] = []
    for paragraph in text.strip().splitlines() or [""]:
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}" if line else word
            if text_width(joined, size, weight) <= width:
                line = joined
                continue
            if line:
                lines.append(line)
            line = word
            while text_width(line, size, weight) > width:
                if not break_words:
                    return None
                cut = len(line) - 1
                while cut > 1 and text_width(line[:cut], size, weight) > width:
                    cut -= 1
                if cut < 1:
                    break
                lines.append(line[:cut])
                line = line[cut:]
        lines.append(line)
    return lines


def number(value: float, *, sign: bool = False) -> str:
    """A number for people (:func:`~captum_concepts.explanation.short`); ``n/a`` where it is not finite."""
    return short(value, sign=sign).replace("-", "−") if math.isfinite(value) else "n/a"


def tick_texts(values: Sequence[float]) -> tuple[list[str], str]:
    """Labels for a few ticks of one scale, and a common factor (``"×1e-5"``) where they would be long."""
    top = max((abs(v) for v in values), default=0.0)
    power = math.floor(math.log10(top)) if top > 0 else 0
    small = -2 <= power <= 3
    texts = [f"{v if small else v / 10.0**power:.3g}".replace("-", "−") for v in values]
    return ["0" if text == "−0" else text for text in texts], "" if small else f"×1e{power}"


#: The colors of the bars are near the ends of the diverging color map.
POSITIVE, NEGATIVE, ABSENT = "#b2182b", "#2166ac", "#c4c4c4"
#: A region that was asked about: yellow on any background, with a dark rim.
MARK = "#ffd92f"
#: States of a concept that is drawn pale.
NOT_ENCODED, NOT_SEEN = "not encoded here", "not seen"
BAR_WIDTH, BAR_GAP, _TICK_GAP = 0.08, 0.06, 0.07
#: Width of the axis of contributions.
BARS = 1.1
#: Least height of a color bar: room for its three numbers.
SHORTEST = 0.55
_PIXELS = 400  # per inch: as fine as print needs, and bounded for large photographs


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
        """A bold line and lines below it, centered, that end at y."""
        for k, part in reversed(list(enumerate(parts))):
            color = FAINT if faint or k else INK
            self.text(x, y, part, color=color, fontweight="normal" if k else "bold")
            y -= part.height

    def picture(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        pixels: Tensor,
        label: str,
        size: tuple[int, int] | None = None,
    ) -> Axes:
        """An image; with ``size`` (its H, W before it was resized for print) as the coordinates of its axes."""
        axes = self.axes(x, y, width, height, label=label)
        array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        extent = None if size is None else (0, size[1], size[0], 0)
        axes.imshow(array, interpolation="antialiased", aspect="auto", extent=extent)
        axes.set_axis_off()
        return axes

    def outline(self, axes: Axes, lines: Sequence[tuple[float, float, float, float]], color: str = MARK) -> None:
        """Lines over an image that stay visible on any background."""
        from matplotlib.collections import LineCollection

        ends = [[(x0, y0), (x1, y1)] for x0, y0, x1, y1 in lines]
        for width, own in ((2.6, "black"), (1.3, color)):
            axes.add_collection(
                LineCollection(ends, colors=own, linewidths=width, capstyle="projecting"), autolim=False
            )

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
        states: Sequence[str],
        bound: float,
    ) -> None:
        """Signed bars from a common zero, the first on top, with a symmetric axis of ``bound`` below; pale and gray
        where the state is not empty."""
        axes = self.axes(x, y, width, height, label="contributions", facecolor="none")
        places = list(range(len(values)))
        colors = [POSITIVE if v >= 0 else NEGATIVE for v in values]
        colors = [ABSENT if state == NOT_ENCODED else color for color, state in zip(colors, states, strict=True)]
        thickness = min(0.62, 0.2 * len(values) / height)
        drawn = [v if math.isfinite(v) else 0.0 for v in values]
        bars = axes.barh(places, drawn, height=thickness, color=colors, linewidth=0)
        for bar, state in zip(bars, states, strict=True):
            bar.set_alpha(0.45 if state == NOT_SEEN else None)
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
            color = FAINT if states[k] else INK
            self.text(x - 0.06, y + (k + 0.5) * pitch, label, ha="right", va="center", color=color)
        if factor:
            self.text(x + width, y + height + axis_space(bound), Fitted(factor, TICK))


def plain_ticks(labels: Sequence[Any]) -> None:
    """Numbers are text, whatever the user's settings."""
    for label in labels:
        label.set(parse_math=False, usetex=False)


def ticks_of(scale: ColorScale, height: float) -> tuple[list[float], list[str], str]:
    """Values, labels and common factor of a color bar's ticks: its ends, and its middle where there is room."""
    middle = [(scale.low + scale.high) / 2] if height >= SHORTEST else []
    ticks = [scale.low, *middle, scale.high]
    return ticks, *tick_texts(ticks)


def _beside(label: str, factor: str, height: float) -> Fitted:
    """One line along a color bar: what its values are, cut or left out where it is too long, and their factor."""
    factor = f"({factor})" if label and factor else factor
    words = fit(label, height - text_width(f" {factor}", DETAIL), DETAIL, lines=1) if label else Fitted("", DETAIL)
    if words.text.endswith("…") and len(words.text) < 6:
        return Fitted(factor.strip("()"), DETAIL)
    return Fitted(f"{words.text} {factor}".strip(), words.size)


def axis_space(bound: float) -> float:
    """Inches under the bars for the numbers of their axis, and for their factor where there is one."""
    return 0.3 if tick_texts([bound])[1] else 0.18


def colorbar_space(scale: ColorScale, height: float, label: str) -> float:
    """Inches from the left end of a color bar to the right end of its texts."""
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
    """The picture in pale gray, for a concept that has no place in it."""
    return torch.lerp(torch.ones_like(picture), gray(picture), 0.45).clamp(0, 1)


def round_up(value: float) -> float:
    """The next of 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10 times a power of ten: an axis end that reads well."""
    if not (math.isfinite(value) and value > 0):
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10):
        if value <= step * unit * (1 + 1e-9):
            return step * unit
    return 10 * unit
