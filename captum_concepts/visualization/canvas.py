"""Drawing primitives of figures, with text measured before placement and positions in inches."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_concepts.errors import InputWarning
from captum_concepts.explanation import short
from captum_concepts.visualization.overlay import gray
from captum_concepts.visualization.scale import ColorScale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#222222", "#6e6e6e"  # contrast with white 15.9 : 1 and 5.1 : 1
TITLE, NAME, DETAIL, TICK = 10.0, 8.0, 7.0, 6.5  # points
LEADING = 1.3
#: Names are plain text, without "$" formulas or LaTeX, whatever the user's settings.
PLAIN: dict[str, Any] = {"parse_math": False, "usetex": False, "linespacing": 1.15}


@dataclass(frozen=True)
class Fitted:
    """Text broken into lines, with its size in points and the height to reserve in inches."""

    text: str
    size: float

    @property
    def height(self) -> float:
        """Height in inches."""
        return (self.text.count("\n") + 1) * self.size * LEADING / 72 if self.text else 0.0


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Width on one line in inches, with the font of the user's settings; line breaks count as spaces."""
    line = " ".join(text.splitlines())
    if not line:
        return 0.0
    return float(font_of(line, 100, weight).getlength(line)) / 100 * size / 72 * 1.03  # hinting widens letters a little


def font_of(text: str, pixels: int, weight: str = "normal", *, warn: bool = False) -> Any:
    """Pillow's font for ``text``, the first of matplotlib's ``font.family`` that covers most of its characters.

    Pillow measures and draws a line much faster than matplotlib.

    Warns:
        InputWarning: no font covers all of them, and ``warn`` is True.
    """
    from matplotlib import rcParams

    settings: Any = rcParams
    file, *others = _font_files(weight, *(tuple(settings[f"font.{kind}"]) for kind in _KINDS))
    if not text.isascii():
        shown = {ord(c) for c in text if c.isprintable()}
        file = max((file, *others), key=lambda file: len(shown & _characters(file)))
        missing = "".join(map(chr, sorted(shown - _characters(file))))
        if warn and missing:
            message = f"no font of matplotlib's rcParams['font.family'] has {missing!r}; drawn as boxes"
            warnings.warn(f"{message}. Name a font that has them there", InputWarning, stacklevel=2)
    return _font(file, pixels)


_KINDS = ("family", "sans-serif", "serif", "monospace", "cursive", "fantasy")


@lru_cache(maxsize=16)
def _font_files(weight: str, families: Sequence[str], *_: Sequence[str]) -> tuple[str, ...]:
    from matplotlib.font_manager import FontProperties, findfont

    found = []
    for family in families:
        try:
            found.append(findfont(FontProperties(family=family, weight=weight), fallback_to_default=False))
        except ValueError:  # not installed
            continue
    return tuple(found) or (findfont(FontProperties(family="DejaVu Sans", weight=weight)),)


@lru_cache(maxsize=16)
def _characters(file: str) -> frozenset[int]:
    from matplotlib.font_manager import get_font

    return frozenset(get_font(file).get_charmap())


@lru_cache(maxsize=64)
def _font(file: str, pixels: int) -> Any:
    from PIL import ImageFont

    return ImageFont.truetype(str(file), pixels, index=getattr(file, "face_index", 0))


def fit(
    text: str, width: float, size: float, *, lines: int = 3, smallest: float = 6.0, weight: str = "normal"
) -> Fitted:
    """``text`` in at most ``lines`` lines of ``width`` inches.

    The text is wrapped between words, then reduced from ``size`` down to ``smallest`` points, then broken inside words,
    and finally cut with an ellipsis.
    """
    text = " ".join(text.splitlines()) if lines == 1 else text
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
    """The parts of each cell on one line if they fit in every cell, otherwise on separate lines in all cells.

    Parts contain numbers, so they may be wrapped in very narrow cells but are never cut.
    """
    joined = ["   ".join(parts) for parts in cells]
    if all(text_width(line, size) <= width for line in joined):
        return [Fitted(line, size) for line in joined]
    fitted = [[fit(part, width, size, lines=4) for part in parts] for parts in cells]
    return [Fitted("\n".join(f.text for f in c), min(f.size for f in c)) for c in fitted]


def _wrap(text: str, width: float, size: float, weight: str, break_words: bool) -> list[str] | None:
    """Lines, or None if a word is wider than a line and must not be broken."""
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
    """A number with three digits (:func:`~captum_concepts.explanation.short`), or ``n/a`` if it is not finite."""
    return short(value, sign=sign).replace("-", "−") if math.isfinite(value) else "n/a"


def tick_texts(values: Sequence[float]) -> tuple[list[str], str]:
    """Labels for a few ticks of one scale, and a common factor (``"×1e-5"``) if they would be long."""
    top = max((abs(v) for v in values), default=0.0)
    power = math.floor(math.log10(top)) if top > 0 else 0
    small = -2 <= power <= 3
    texts = [f"{v if small else v / 10.0**power:.3g}".replace("-", "−") for v in values]
    return ["0" if text == "−0" else text for text in texts], "" if small else f"×1e{power}"


#: The colors of the bars are near the ends of the diverging color map.
POSITIVE, NEGATIVE, ABSENT = "#b2182b", "#2166ac", "#c4c4c4"
#: Outline of a queried region, which has a dark rim and is visible on any background.
MARK = "#ffd92f"
#: States of concepts that are drawn pale.
NOT_ENCODED, NOT_SEEN = "not encoded here", "not seen"
BAR_WIDTH, BAR_GAP, _TICK_GAP, _TICK = 0.08, 0.06, 0.07, 2 / 72
#: Width of the axis of contributions.
BARS = 1.1
#: Minimum height of a color bar with three numbers.
SHORTEST = 0.55


#: Left, top, width and height, in inches.
Place = tuple[float, float, float, float]


class Canvas(ABC):
    """A drawing surface of ``width`` x ``height`` inches, with the origin at the top left."""

    width: float
    height: float
    #: Pixels per inch of images, enough for print and a limit for large photographs.
    density: float = 400

    @abstractmethod
    def text(self, x: float, y: float, fitted: Fitted, **options: Any) -> None:
        """Draw text whose bottom (``va="bottom"``, the default) or top is at y."""

    @abstractmethod
    def picture(self, place: Place, pixels: Tensor, label: str, size: tuple[int, int] | None = None) -> Any:
        """Draw an image; ``size``, its H, W before it was resized for print, sets the coordinates of its axes."""

    @abstractmethod
    def outline(self, axes: Any, lines: Sequence[tuple[float, float, float, float]], color: str = MARK) -> None:
        """Draw lines over an image that are visible on any background."""

    @abstractmethod
    def stroke(self, x0: float, y0: float, x1: float, y1: float, color: str = FAINT, points: float = 0.5) -> None:
        """Draw a straight line."""

    @abstractmethod
    def gradient(self, x: float, y: float, height: float, scale: ColorScale) -> None:
        """Draw the colors of a color bar."""

    @abstractmethod
    def rows(self, place: Place, bound: float, count: int) -> Any:
        """Axes for ``count`` bars, one below the other, from ``-bound`` to ``bound``."""

    @abstractmethod
    def bar(self, axes: Any, k: int, value: float, thickness: float, color: str, alpha: float | None) -> None:
        """Draw the bar of row k of :meth:`rows`, starting at zero."""

    def caption(self, x: float, y: float, parts: Sequence[Fitted], *, faint: bool = False) -> None:
        """Draw a bold line and lines below it, centered and ending at y."""
        for k, part in reversed(list(enumerate(parts))):
            color = FAINT if faint or k else INK
            self.text(x, y, part, color=color, fontweight="normal" if k else "bold")
            y -= part.height

    def colorbar(self, x: float, y: float, height: float, scale: ColorScale, label: str = "") -> None:
        """Draw a vertical color bar with both end values, the middle one if there is room, and a label."""
        self.gradient(x, y, height, scale)
        end = x + BAR_WIDTH
        for line in (
            (x, y, end, y),
            (x, y + height, end, y + height),
            (x, y, x, y + height),
            (end, y, end, y + height),
        ):
            self.stroke(*line)
        ticks, labels, factor = ticks_of(scale, height)
        for value, text in zip(ticks, labels, strict=True):
            at = y + height * (scale.high - value) / (scale.high - scale.low)
            self.stroke(end, at, end + _TICK, at)
            # End labels stay within the height of the bar.
            side = "center" if value not in (scale.low, scale.high) else "bottom" if value == scale.low else "top"
            self.text(end + 2 * _TICK, at, Fitted(text, TICK), ha="left", va=side)
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
        """Draw signed bars from a common zero, the first on top, above a symmetric axis of ``bound``; bars are pale for
        concepts that are not seen and gray for those that are not encoded."""
        axes = self.rows((x, y, width, height), bound, len(values))
        thickness, pitch = min(0.62, 0.2 * len(values) / height), height / len(values)
        for k, (label, value, state) in enumerate(zip(labels, values, states, strict=True)):
            color = ABSENT if state == NOT_ENCODED else POSITIVE if value >= 0 else NEGATIVE
            drawn = value if math.isfinite(value) else 0.0
            self.bar(axes, k, drawn, thickness, color, 0.45 if state == NOT_SEEN else None)
            color = FAINT if state else INK
            self.text(x - 0.06, y + (k + 0.5) * pitch, label, ha="right", va="center", color=color)
        self.stroke(x + width / 2, y, x + width / 2, y + height, INK, 0.7)
        self.stroke(x, y + height, x + width, y + height)
        ends = (-bound, 0.0, bound)
        texts, factor = tick_texts(ends)
        for k, text in enumerate(texts):
            at = x + k * width / 2
            self.stroke(at, y + height, at, y + height + _TICK)
            self.text(at, y + height + 2 * _TICK, Fitted(text, TICK), va="top")
        if factor:
            self.text(x + width, y + height + axis_space(bound), Fitted(factor, TICK))


class FigureCanvas(Canvas):
    """A matplotlib figure."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure: Figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
        self.figure.set_layout_engine("none")  # positions are fixed, whatever the user's settings

    def axes(self, place: Place, **options: Any) -> Axes:
        """New matplotlib axes at ``place``."""
        x, y, width, height = place
        bottom = self.height - y - height
        box = (x / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box, **options)

    def text(self, x: float, y: float, fitted: Fitted, **options: Any) -> None:
        style: dict[str, Any] = {"color": INK, "ha": "center", "va": "bottom", **PLAIN, **options}
        self.figure.text(x / self.width, 1 - y / self.height, fitted.text, fontsize=fitted.size, **style)

    def picture(self, place: Place, pixels: Tensor, label: str, size: tuple[int, int] | None = None) -> Any:
        axes = self.axes(place, label=label)
        array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        extent = None if size is None else (0, size[1], size[0], 0)
        axes.imshow(array, interpolation="antialiased", aspect="auto", extent=extent, origin="upper")
        axes.set_axis_off()
        return axes

    def outline(self, axes: Any, lines: Sequence[tuple[float, float, float, float]], color: str = MARK) -> None:
        from matplotlib.collections import LineCollection

        ends = [[(x0, y0), (x1, y1)] for x0, y0, x1, y1 in lines]
        for width, own in ((2.6, "black"), (1.3, color)):
            axes.add_collection(
                LineCollection(ends, colors=own, linewidths=width, capstyle="projecting"), autolim=False
            )

    def stroke(self, x0: float, y0: float, x1: float, y1: float, color: str = FAINT, points: float = 0.5) -> None:
        from matplotlib.lines import Line2D

        xs, ys = (x0 / self.width, x1 / self.width), (1 - y0 / self.height, 1 - y1 / self.height)
        self.figure.add_artist(Line2D(xs, ys, color=color, linewidth=points, linestyle="-", marker="", snap=True))

    def gradient(self, x: float, y: float, height: float, scale: ColorScale) -> None:
        axes = self.axes((x, y, BAR_WIDTH, height), label="colorbar")
        edges = torch.linspace(scale.low, scale.high, 257).numpy()
        values = ((edges[1:] + edges[:-1]) / 2)[:, None]
        colors, low, high = scale.colormap(), scale.low, scale.high
        axes.pcolormesh([0, 1], edges, values, cmap=colors, vmin=low, vmax=high, shading="flat")
        axes.set_ylim(scale.low, scale.high)
        axes.set_axis_off()

    def rows(self, place: Place, bound: float, count: int) -> Any:
        axes = self.axes(place, label="contributions", facecolor="none")
        axes.set(xlim=(-bound, bound), ylim=(count - 0.5, -0.5))
        axes.set_axis_off()
        return axes

    def bar(self, axes: Any, k: int, value: float, thickness: float, color: str, alpha: float | None) -> None:
        from matplotlib.patches import Rectangle

        place = (0.0, k - thickness / 2)
        axes.add_patch(Rectangle(place, value, thickness, facecolor=color, alpha=alpha, linewidth=0))


def ticks_of(scale: ColorScale, height: float) -> tuple[list[float], list[str], str]:
    """Values, labels and common factor of a color bar's ticks at its ends and, if there is room, its middle."""
    middle = [(scale.low + scale.high) / 2] if height >= SHORTEST else []
    ticks = [scale.low, *middle, scale.high]
    return ticks, *tick_texts(ticks)


def _beside(label: str, factor: str, height: float) -> Fitted:
    """One line along a color bar with its label, cut or left out if it is too long, and the factor."""
    factor = f"({factor})" if label and factor else factor
    words = fit(label, height - text_width(f" {factor}", DETAIL), DETAIL, lines=1) if label else Fitted("", DETAIL)
    if words.text.endswith("…") and len(words.text) < 6:
        return Fitted(factor.strip("()"), DETAIL)
    return Fitted(f"{words.text} {factor}".strip(), words.size)


def axis_space(bound: float) -> float:
    """Inches below the bars for the numbers of their axis and, if there is one, their factor."""
    return 0.3 if tick_texts([bound])[1] else 0.18


def colorbar_space(scale: ColorScale, height: float, label: str) -> float:
    """Inches from the left end of a color bar to the right end of its text."""
    _, labels, factor = ticks_of(scale, height)
    space = BAR_WIDTH + _TICK_GAP + max(text_width(t, TICK) for t in labels)
    return space + (DETAIL * 1.3 / 72 + 0.04 if label or factor else 0.0)


def at_print_size(picture: Tensor, inches: float, density: float = Canvas.density) -> Tensor:
    """The image at a resolution for print; small images are enlarged in whole blocks, so that their pixels stay sharp
    under a smooth map, and large ones are reduced with antialiasing."""
    _, height, width = picture.shape
    target = max(round(inches * density), 1)
    longest = max(height, width)
    if longest > target:
        size = (max(round(height * target / longest), 1), max(round(width * target / longest), 1))
        picture = F.interpolate(picture[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
        return picture.clamp(0, 1)
    blocks = max(target // longest, 1)
    return picture.repeat_interleave(blocks, 1).repeat_interleave(blocks, 2)


def faded(picture: Tensor) -> Tensor:
    """The image in pale gray, for a concept without a map."""
    return torch.lerp(torch.ones_like(picture), gray(picture), 0.45).clamp(0, 1)


def round_up(value: float) -> float:
    """A readable axis limit, the next of 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10 times a power of ten."""
    if not (math.isfinite(value) and value > 0):
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10):
        if value <= step * unit * (1 + 1e-9):
            return step * unit
    return 10 * unit
