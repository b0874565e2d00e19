"""Text that fits: wrapped by measured width, shrunk, and only then cut."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    """A number with three digits; ``n/a`` where it is not finite."""
    from matplotlib import rcParams

    if not math.isfinite(value):
        return "n/a"
    text = f"{value:+.3g}" if sign else f"{value:.3g}"
    if text.strip("+-") == "0":
        text = "0"
    return text.replace("-", "−") if rcParams["axes.unicode_minus"] else text


def tick_texts(values: Sequence[float]) -> tuple[list[str], str]:
    """Labels for a few ticks of one scale, and a common factor (``"×1e-5"``) where they would be long."""
    top = max((abs(v) for v in values), default=0.0)
    power = math.floor(math.log10(top)) if top > 0 else 0
    if -2 <= power <= 3:
        return [number(v) for v in values], ""
    return [number(v / 10.0**power) for v in values], f"×1e{power}"
