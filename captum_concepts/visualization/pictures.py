"""Images embedded in a page as ``data:`` URIs of bounded size, and their text alternatives."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_concepts.visualization.overlay import filled, upsample
from captum_concepts.visualization.scale import ColorScale

#: Longest sides in pixels.
INPUT_SIDE, MAP_SIDE = 640, 64
#: Pixels of a map per position, and its minimum side; the page smooths them when it enlarges the map.
_PER_CELL, _LEAST_SIDE = 4, 32
#: Maximum size of an input. A map has at most 64 x 64 bytes of pixels, a palette of 384 and about 250 bytes of other
#: data. With base64, 20 images of 8 concepts then stay below 3 MB, whatever they show.
INPUT_BYTES = 72_000
#: Up to this many pixels, an image is stored losslessly and displayed pixelated.
_LOSSLESS = 128 * 128
#: Colors of a map, and the index after them for cells without a value.
_COLORS = 127
_PLACES = (("upper left", "top", "upper right"), ("left", "center", "right"), ("lower left", "bottom", "lower right"))


@dataclass(frozen=True)
class Picture:
    """An encoded image.

    Args:
        uri: ``data:image/...;base64,...``.
        width, height: in pixels.
        pixelated: whether it is enlarged without smoothing.
    """

    uri: str
    width: int
    height: int
    pixelated: bool = False


def photo(picture: Tensor, side: int = INPUT_SIDE, most: int = INPUT_BYTES) -> Picture:
    """An image ``(3, H, W)`` in [0, 1] with sides of at most ``side`` pixels, as PNG if it is tiny, otherwise as JPEG
    of at most ``most`` bytes (reducing first quality, then size)."""
    from PIL import Image

    _, height, width = picture.shape
    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(pixels)
    if height * width <= _LOSSLESS and max(height, width) <= side:
        file = io.BytesIO()
        image.save(file, "PNG", optimize=True)
        if file.tell() <= most:
            return Picture(_uri(file, "png"), width, height, pixelated=True)
    while True:
        factor = min(side / max(width, height), 1.0)
        size = (max(round(width * factor), 1), max(round(height * factor), 1))
        shown = image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
        for quality in (86, 76, 64, 50):
            file = io.BytesIO()
            shown.save(file, "JPEG", quality=quality, optimize=True)
            if file.tell() <= most or max(size) <= 16:
                return Picture(_uri(file, "jpeg"), *size)
        side = max(size) * 4 // 5


def map_picture(heatmap: Tensor, scale: ColorScale, alpha: float, mode: str) -> Picture:
    """A map ``(h, w)`` as PNG with colors and opacities in its palette, which the page enlarges over the input.

    Values that are not finite are transparent.
    """
    from PIL import Image

    height, width = heatmap.shape
    factor = min(max(_PER_CELL * max(height, width), _LEAST_SIDE), MAP_SIDE) / max(height, width)
    size = (max(round(height * factor), 1), max(round(width * factor), 1))
    index = (scale.fraction(upsample(filled(heatmap), size, mode=mode)) * (_COLORS - 1)).round().byte()
    known = heatmap.isfinite()
    if not known.all():
        index[upsample(known.float(), size, mode="nearest") < 0.5] = _COLORS
    image = Image.fromarray(index.numpy())
    colors, opacity = palette(scale, alpha)
    image.putpalette([*colors, 0, 0, 0], "RGB")
    file = io.BytesIO()
    image.save(file, "PNG", transparency=bytes([*opacity, 0]))
    return Picture(_uri(file, "png"), size[1], size[0], pixelated=mode == "nearest")


def palette(scale: ColorScale, alpha: float, steps: int = _COLORS) -> tuple[list[int], list[int]]:
    """``steps`` colors (R, G, B, R, ...) from the low to the high end of a scale, and their opacities, in 0 to 255."""
    values = torch.linspace(scale.low, scale.high, steps)
    colors = (scale.colors(values).T * 255).round().int().flatten().tolist()
    return colors, (scale.opacity(values, alpha) * 255).round().int().tolist()


def gradient(scale: ColorScale, steps: int = 9) -> str:
    """Stops of a CSS gradient for the color scale, from low to high."""
    colors, _ = palette(scale, 1.0, steps)
    return ",".join("#{:02x}{:02x}{:02x}".format(*colors[3 * k : 3 * k + 3]) for k in range(steps))


def place_in_words(heatmap: Tensor) -> str:
    """Description of where a map is strongest, and of how large this region is.

    >>> place_in_words(torch.tensor([[0.0, 0.0, 5.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    'strongest at the upper right; 11 % of the image above half of that'
    >>> place_in_words(torch.zeros(2, 2)), place_in_words(-torch.ones(2, 2))
    ('nowhere above zero', 'nowhere above zero')
    """
    positive = heatmap.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp_min(0)
    top = float(positive.max())
    if not top > 0:
        return "nowhere above zero"
    strong = positive >= top / 2
    weight = positive * strong
    height, width = heatmap.shape
    y = float((weight.sum(1) * (torch.arange(height) + 0.5)).sum() / weight.sum() / height)
    x = float((weight.sum(0) * (torch.arange(width) + 0.5)).sum() / weight.sum() / width)
    row, column = (0 if v < 0.36 else 2 if v > 0.64 else 1 for v in (y, x))
    share = 100 * float(strong.float().mean())
    return f"strongest at the {_PLACES[row][column]}; {max(share, 1):.0f} % of the image above half of that"


def figure_uri(figure: Any) -> str:
    """A matplotlib figure as a deterministic SVG."""
    from matplotlib import rc_context

    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "captum_concepts", "savefig.bbox": None}):
        figure.savefig(file, format="svg", facecolor="white", metadata={"Date": None})
    return _uri(file, "svg+xml")


def _uri(file: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
