"""A canvas that draws with Pillow, which is much faster than a matplotlib figure (:class:`FigureCanvas`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_concepts.visualization.canvas import BAR_WIDTH, FAINT, INK, MARK, Canvas, Fitted, Place, font_of
from captum_concepts.visualization.scale import ColorScale

#: Height of text above and below the baseline, and distance of baselines, as fractions of the font size.
_ABOVE, _BELOW, _PITCH = 0.82, 0.31, 1.15


class Area(NamedTuple):
    """A rectangle in pixels, and the axis coordinates of its left, top, right and bottom."""

    left: int
    top: int
    right: int
    bottom: int
    span: tuple[float, float, float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """A point in axis coordinates, converted to pixels."""
        x0, y0, x1, y1 = self.span
        across, down = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return self.left + across * (self.right - self.left), self.top + down * (self.bottom - self.top)


class Raster(Canvas):
    """An image of ``width`` x ``height`` inches with ``dpi`` pixels per inch."""

    def __init__(self, width: float, height: float, dpi: float) -> None:
        from PIL import Image, ImageDraw

        self.width, self.height, self.density = width, height, dpi
        self.image = Image.new("RGB", (max(int(width * dpi), 1), max(int(height * dpi), 1)), "white")
        self._draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, fitted: Fitted, **options: Any) -> None:
        """As :meth:`Canvas.text`; ``rotation`` is 0 or 90, for one line."""
        from PIL import Image, ImageDraw

        lines, size = fitted.text.split("\n"), fitted.size * self.density / 72
        color, weight = options.get("color", INK), options.get("fontweight", "normal")
        fonts = [font_of(line, max(round(size), 1), weight, warn=True) for line in lines]
        x, y = x * self.density, y * self.density
        if options.get("rotation"):
            mask = Image.new("L", (round(fonts[0].getlength(lines[0])) + 1, round(size * (_ABOVE + _BELOW)) + 1))
            ImageDraw.Draw(mask).text((0, round(size * _ABOVE)), lines[0], 255, fonts[0], anchor="ls")
            mask = mask.transpose(Image.Transpose.ROTATE_90)
            self.image.paste(color, (round(x), round(y - mask.height / 2)), mask)
            return
        height = size * (_ABOVE + _BELOW + _PITCH * (len(lines) - 1))
        top = y - height * {"top": 0.0, "center": 0.5, "bottom": 1.0}[options.get("va", "bottom")] + size * _ABOVE
        anchor = {"left": "ls", "center": "ms", "right": "rs"}[options.get("ha", "center")]
        for k, (line, font) in enumerate(zip(lines, fonts, strict=True)):
            self._draw.text((round(x), round(top + k * size * _PITCH)), line, color, font, anchor=anchor)

    def picture(self, place: Place, pixels: Tensor, label: str, size: tuple[int, int] | None = None) -> Area:  # noqa: ARG002
        """As :meth:`Canvas.picture`; an image that already has the pixels of its place is not resampled."""
        from PIL import Image

        rows, columns = (pixels.shape[1], pixels.shape[2]) if size is None else size
        area = self._area(place, (0, 0, columns, rows))
        colors = (pixels * 255).round_().clamp_(0, 255).byte()
        image = Image.fromarray(colors.permute(1, 2, 0).contiguous().numpy())
        self.image.paste(image.resize((area.right - area.left, area.bottom - area.top)), (area.left, area.top))
        return area

    def outline(self, axes: Area, lines: Sequence[tuple[float, float, float, float]], color: str = MARK) -> None:
        """As :meth:`Canvas.outline`, for horizontal and vertical lines."""
        for points, own in ((2.6, "black"), (1.3, color)):
            for x0, y0, x1, y1 in lines:
                self._fill(axes, x0, y0, x1, y1, own, points)

    def stroke(self, x0: float, y0: float, x1: float, y1: float, color: str = FAINT, points: float = 0.5) -> None:
        """As :meth:`Canvas.stroke`, for horizontal and vertical lines."""
        x0, y0, x1, y1 = (v * self.density for v in (x0, y0, x1, y1))
        wide = max(round(points * self.density / 72), 1)
        left, top = round(x0 - wide / 2), round(y0 - wide / 2)
        right, bottom = (left + wide - 1, round(y1) - 1) if x0 == x1 else (round(x1) - 1, top + wide - 1)
        self._draw.rectangle((left, top, max(left, right), max(top, bottom)), fill=color)

    def gradient(self, x: float, y: float, height: float, scale: ColorScale) -> None:
        values = torch.linspace(scale.high, scale.low, max(round(height * self.density), 2))
        self.picture((x, y, BAR_WIDTH, height), scale.colors(values)[:, :, None], "colorbar")

    def rows(self, place: Place, bound: float, count: int) -> Area:
        return self._area(place, (-bound, -0.5, bound, count - 0.5))

    def bar(self, axes: Area, k: int, value: float, thickness: float, color: str, alpha: float | None) -> None:
        """As :meth:`Canvas.bar`, on white."""
        from PIL import ImageColor

        pale = tuple(round(255 - (alpha or 1.0) * (255 - part)) for part in ImageColor.getrgb(color))
        self._fill(axes, 0.0, k - thickness / 2, value, k + thickness / 2, pale)

    def _area(self, place: Place, span: tuple[float, float, float, float]) -> Area:
        x, y, width, height = place
        left, top = round(x * self.density), round(y * self.density)
        wide, high = max(round(width * self.density), 1), max(round(height * self.density), 1)
        return Area(left, top, left + wide, top + high, span)

    def _fill(self, area: Area, x0: float, y0: float, x1: float, y1: float, color: Any, points: float = 0.0) -> None:
        """Fill a rectangle between two points of an area, wider by half a line of ``points`` on each side."""
        half = points * self.density / 144
        (left, top), (right, bottom) = area.at(min(x0, x1), min(y0, y1)), area.at(max(x0, x1), max(y0, y1))
        left, top = max(round(left - half), area.left), max(round(top - half), area.top)
        right, bottom = min(round(right + half), area.right) - 1, min(round(bottom + half), area.bottom) - 1
        if left <= right and top <= bottom:
            self._draw.rectangle((left, top, right, bottom), fill=color)
