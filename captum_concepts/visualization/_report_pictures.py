"""The pictures inside a report: small, of bounded size, as ``data:`` URIs, and in words for those who do not see."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_concepts.visualization._parts import faded
from captum_concepts.visualization.overlay import _filled as filled, grey, upsample
from captum_concepts.visualization.scale import ColorScale

#: Longest sides in pixels. Thumbnails are shown at half their pixels, so that they are sharp on dense screens.
INPUT_SIDE, THUMB_SIDE, MAP_SIDE = 640, 152, 64
#: Most bytes of an input and of a thumbnail. A map has at most 64 x 64 bytes of pixels, a palette of 768 and a frame of
#: about 400. With base64, 20 images of 8 concepts then stay below 4.8 MB, whatever they show.
INPUT_BYTES, THUMB_BYTES = 72_000, 6_500
#: Up to this many pixels a picture is kept without loss, and shown in its own pixels.
_LOSSLESS = 128 * 128
_TRANSPARENT = 255
_PLACES = (("upper left", "top", "upper right"), ("left", "centre", "right"), ("lower left", "bottom", "lower right"))


@dataclass(frozen=True)
class Picture:
    """An encoded picture.

    Args:
        uri: ``data:image/...;base64,...``.
        width, height: in pixels.
    """

    uri: str
    width: int
    height: int


def input_picture(picture: Tensor) -> Picture:
    """``(3, H, W)`` in [0, 1] as JPEG; a tiny one as PNG."""
    return _photo(picture, INPUT_SIDE, INPUT_BYTES)


def thumbnail(picture: Tensor, heatmap: Tensor | None, scale: ColorScale, alpha: float, mode: str) -> Picture:
    """The map over the picture, ready to look at and to print; without a map the picture in pale grey."""
    _, height, width = picture.shape
    factor = THUMB_SIDE / max(height, width)
    size = (max(round(height * factor), 1), max(round(width * factor), 1))
    if factor < 1:
        small = F.interpolate(picture[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
    else:
        small = F.interpolate(picture[None], size, mode="nearest-exact")[0]
    if heatmap is None:
        return _photo(faded(small.clamp(0, 1)), THUMB_SIDE, THUMB_BYTES)
    share, finite = _shares(heatmap, scale, size, mode)
    opacity = _opacity(share, scale, alpha).where(finite, 0.0)
    ground = torch.lerp(grey(small), small, 0.3).where(finite, small)
    colours = scale.colors(scale.low + share * (scale.high - scale.low))
    return _photo(torch.lerp(ground, colours, opacity), THUMB_SIDE, THUMB_BYTES)


def map_picture(heatmap: Tensor, scale: ColorScale, alpha: float, mode: str) -> Picture:
    """A map ``(h, w)`` as PNG whose palette has colours and opacities; the page lays it over the input, enlarged.

    Cells that are not finite are transparent.
    """
    from PIL import Image

    height, width = heatmap.shape
    factor = MAP_SIDE / max(height, width)
    size = (max(round(height * factor), 1), max(round(width * factor), 1))
    share, finite = _shares(heatmap, scale, size, mode)
    index = (share * (_TRANSPARENT - 1)).round().byte()
    index[~finite] = _TRANSPARENT
    image = Image.fromarray(index.numpy())
    steps = torch.linspace(0, 1, _TRANSPARENT)
    colours = (scale.colors(scale.low + steps * (scale.high - scale.low)).T * 255).round().byte()
    image.putpalette(torch.cat([colours, colours[:1]]).flatten().tolist(), "RGB")
    opacity = (_opacity(steps, scale, alpha) * 255).round().byte().tolist()
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True, transparency=bytes([*opacity, 0]))
    return Picture(_uri(file, "png"), size[1], size[0])


def _shares(heatmap: Tensor, scale: ColorScale, size: tuple[int, int], mode: str) -> tuple[Tensor, Tensor]:
    """The map at ``size`` as shares in [0, 1] of the scale, and which of its pixels are known."""
    known = heatmap.isfinite()
    values = upsample(filled(heatmap), size, mode=mode)
    share = ((values - scale.low) / (scale.high - scale.low)).clamp(0, 1)
    return share, upsample(known.float(), size, mode="nearest") > 0.5


def _opacity(share: Tensor, scale: ColorScale, alpha: float) -> Tensor:
    """More where there is more to see, so that the picture stays visible where there is nothing: from half of
    ``alpha`` at zero to one and a half of it at the end of the scale."""
    strength = (2 * share - 1).abs() if scale.signed else share
    return (alpha * (0.5 + strength)).clamp(max=0.9)


def gradient(scale: ColorScale, steps: int = 9) -> str:
    """The colour scale as stops of a CSS gradient, from low to high."""
    colours = (scale.colors(torch.linspace(scale.low, scale.high, steps)).T * 255).round().int().tolist()
    return ",".join("#" + "".join(f"{part:02x}" for part in colour) for colour in colours)


def place_in_words(heatmap: Tensor) -> str:
    """Where a map is strongest, and how large that place is.

    >>> place_in_words(torch.tensor([[0.0, 0.0, 5.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    'strongest at the upper right; 11 % of the picture above half of that'
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
    return f"strongest at the {_PLACES[row][column]}; {max(share, 1):.0f} % of the picture above half of that"


def _photo(picture: Tensor, side: int, most: int) -> Picture:
    """JPEG of at most ``most`` bytes: first less quality, then fewer pixels."""
    from PIL import Image

    _, height, width = picture.shape
    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(pixels)
    if height * width <= _LOSSLESS and max(height, width) <= side:
        file = io.BytesIO()
        image.save(file, "PNG", optimize=True)
        if file.tell() <= most:
            return Picture(_uri(file, "png"), width, height)
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


def _uri(file: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
