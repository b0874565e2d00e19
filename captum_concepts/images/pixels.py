"""Stored pixels as ``(C, H, W)`` in [0, 1], with modes, depths, transparency, bands and resizing."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from captum_concepts._checks import number, one_of
from captum_concepts.errors import InputError, InputWarning

MODES = ("RGB", "L", "any")
RESIZES = ("crop", "squash", "pad")
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box")
Size = tuple[int, int]
_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")


@dataclass(frozen=True)
class Reading:
    r"""The options by which :func:`~captum_concepts.images.open_images` and ``load_image`` read images.

    Args:
        size: ``(H, W)`` in pixels, or one side for a square; None keeps each image's own size.
        mode: ``"RGB"`` is three channels (gray is repeated), ``"L"`` one channel (the luma of ITU-R 601); with
            ``"any"``, tensors keep their channels and files are read as RGB.
        resize: with ``size``, ``"crop"`` scales the image until it covers ``size`` and crops the center;
            ``"squash"`` changes its aspect ratio; ``"pad"`` shows all of it, on ``background``.
        interpolation: ``"bicubic"`` (default), ``"bilinear"``, ``"lanczos"``, ``"box"`` or ``"nearest"``; always
            antialiased. Files and tensors are resized by the same code (Pillow's).
        crop: unless padded, the fraction of the side to keep; 224 / 256 matches torchvision's "resize to 256,
            crop 224".
        background: gray value in [0, 1] under transparent pixels and around padded images; 1 is white.
        bands: indices of the stored channels to read unchanged, such as ``(0, 1, 2)`` of a 4-band file. None
            composes transparency over ``background``, and rejects tensors with more channels than ``mode`` has.
        value_range: pixel values that become 0 and 1. None: 8 bits 0 to 255; 16 bits 0 to 65535; 32-bit integers
            0 to 65535 if all values are, else 0 to :math:`2^{31}-1`; floats 0 to 1 if all are, else as integers.
            A 32-bit image whose maximum is at most 255 is read as 8 bits, with a warning. Negative values raise,
            because it is unknown which of them is black.
        transform: replaces all of the above by a function of the upright 8-bit PIL image (or of the tensor) that
            returns a tensor ``(C, H, W)``.
        normalize: a function of images in [0, 1], such as a model's :class:`Preprocessing`, applied last. Float
            tensors are then assumed to be preprocessed, and stay unchanged.

    Raises:
        InputError: an option is out of range.
    """

    size: Any = None
    mode: str = "RGB"
    resize: str = "crop"
    interpolation: str = "bicubic"
    crop: float = 1.0
    background: float = 1.0
    bands: tuple[int, ...] | None = None
    value_range: tuple[float, float] | None = None
    transform: Callable[[Any], Any] | None = None
    normalize: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        one_of("mode", self.mode, MODES)
        one_of("resize", self.resize, RESIZES)
        one_of("interpolation", self.interpolation, INTERPOLATIONS)
        if self.crop is False:
            raise InputError("crop is the fraction to keep, in (0, 1]; to change the aspect ratio pass resize='squash'")
        checked = {
            "size": checked_size(self.size),
            "crop": number("crop", float(self.crop), lambda v: 0 < v <= 1, "in (0, 1]"),
            "background": number("background", self.background, lambda v: 0 <= v <= 1, "a gray value in [0, 1]"),
            "bands": _checked_bands(self.bands),
            "value_range": _checked_range(self.value_range),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.transform is not None and not callable(self.transform):
            raise InputError(f"transform must be a function of an image, got {type(self.transform).__name__}")
        if self.transform is not None and self.size is not None:
            raise InputError("size and transform were both passed; resize in the transform, or leave one of them out")

    # ---------------------------------------------------------------------------------------- files and PIL images

    def upright(self, image: Any) -> Any:
        """A PIL image with its EXIF orientation applied."""
        image.info.setdefault("stored_as", image.format)  # the format is lost on the way
        return turned(image, orientation(image))

    def tensor_of(self, image: Any) -> Tensor:
        """A PIL image as ``(C, H, W)``, resized."""
        if self.bands is not None or image.mode in ("F", "I") or image.mode.startswith("I;"):
            planes = self._channels(self._resized(torch.from_numpy(self._stored(image))))
            gray = self.mode == "any" and self.bands is None and len(planes) == 1  # as for files of 8 bits
            return planes.expand(3, -1, -1) if gray else planes
        image = self.eight_bits(image)
        if self.size is not None:
            image = self.fit(image)
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
        pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        return torch.empty(pixels.shape).copy_(pixels).div_(255)  # one copy: a photograph may have 100 million pixels

    def eight_bits(self, image: Any) -> Any:
        """A PIL image as 8-bit RGB (or L), with transparency composed over the background."""
        from PIL import Image

        if image.mode in ("F", "I") or image.mode.startswith("I;"):
            image = Image.fromarray(np.round(self._stored(image)[0] * 255).astype(np.uint8))
        if image.mode in _ALPHA or "transparency" in image.info:
            image = image.convert("RGBA")
            gray = round(self.background * 255)
            image = Image.alpha_composite(Image.new("RGBA", image.size, (gray, gray, gray, 255)), image)
        return image.convert("L" if self.mode == "L" else "RGB")

    def _stored(self, image: Any) -> NDArray[np.float32]:
        """``(C, H, W)`` stored channels in [0, 1]."""
        if image.mode in ("1", "P"):
            image = image.convert("L" if image.mode == "1" else "RGB")
        pixels = np.asarray(image)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        if self.bands is not None:
            pixels = pixels[list(_within(self.bands, len(pixels), "file"))]
        deep = image.info.get("stored_as") in ("PNG", "PPM")  # Pillow reads 16 of their bits into 32
        low, high = self.value_range or _range(pixels, deep or image.mode.startswith("I;"))
        scaled = (pixels.astype(np.float64) - low) / (high - low)
        return np.clip(scaled, 0, 1).astype(np.float32)

    def fit(self, image: Any, interpolation: str | None = None, fill: Any = None) -> Any:
        """A PIL image of any mode, resized to ``size``.

        Args:
            image: the image.
            interpolation: replaces the field of that name, as label images need "nearest".
            fill: pixel value around a padded image; None uses the background.
        """
        from PIL import Image

        if self.size is None:
            return image
        place = placement(image.height, image.width, self.size, resize=self.resize, crop=self.crop)
        method = Image.Resampling[(interpolation or self.interpolation).upper()]
        whole = (place.left, place.top, place.right, place.bottom)
        resized = image.resize((place.width, place.height), method, box=whole)
        if (place.height, place.width) == self.size:
            return resized
        if fill is None:
            scale = self.background if image.mode == "F" else round(self.background * 255)
            fill = scale if len(image.getbands()) == 1 else (scale,) * len(image.getbands())
        height, width = self.size
        canvas = Image.new(image.mode, (width, height), fill)
        canvas.paste(resized, ((width - place.width) // 2, (height - place.height) // 2))
        return canvas

    # ------------------------------------------------------------------------------------------------------ tensors

    def from_tensor(self, images: Tensor) -> Tensor:
        """Float images ``(C, H, W)`` or ``(N, C, H, W)`` from a tensor, scaled, with ``bands``, ``mode`` and size."""
        self.check_pixels(images)
        if self.normalize is not None and images.is_floating_point():
            return self._channels(self._chosen(images).detach())
        if self.transform is not None:
            if images.ndim == 3:
                return self.transformed(images)
            return torch.stack([self.transformed(image) for image in images])
        return self.normalized(self._channels(self._resized(self._scaled(self._chosen(images).detach()))))

    def check_pixels(self, images: Tensor) -> None:
        """Raise for tensors without pixels or values, and for sparse ones."""
        if images.layout != torch.strided or images.is_meta or 0 in images.shape[-3:]:
            what = "no values" if images.is_meta else "no pixels"
            what = what if images.layout == torch.strided else f"the layout {images.layout}"
            raise InputError(f"images of shape {tuple(images.shape)} have {what}; pass dense tensors (N, C, H, W)")

    def _chosen(self, images: Tensor) -> Tensor:
        """The chosen bands, or all if ``mode`` allows their number."""
        if self.bands is None:
            self._check_channels(images)
            return images
        return images[..., list(_within(self.bands, images.shape[-3], "tensor")), :, :]

    def normalized(self, images: Tensor) -> Tensor:
        """Images in [0, 1], normalized for the model."""
        return images if self.normalize is None else self.normalize(images)

    def _scaled(self, images: Tensor) -> Tensor:
        if self.value_range is not None:
            low, high = self.value_range
            return ((images.float() - low) / (high - low)).clamp(0, 1)
        if images.is_floating_point():
            if images.numel() and images.amax() > 16 and images.amin() >= 0:
                warnings.warn(
                    "float images with values far above 1 are used unchanged; if they are pixels from 0 to 255, pass "
                    "value_range=(0, 255), or integers (uint8)",
                    InputWarning,
                    stacklevel=2,
                )
            return images
        if images.dtype == torch.uint8:
            return images.float() / 255
        if images.dtype == torch.uint16:
            return images.float() / 65535
        raise InputError(
            f"images have dtype {images.dtype}; pass floats in [0, 1] or uint8, or value_range=(darkest, brightest)"
        )

    def _check_channels(self, images: Tensor) -> None:
        channels = images.shape[-3]
        if self.mode == "any" or channels in (1, 3):
            return
        if images.shape[-1] in (1, 3, 4):
            raise InputError(
                f"images have shape {tuple(images.shape)}, channels last; pass channels first, as in "
                "images.movedim(-1, -3)"
            )
        example = (0, 1, 2) if channels > 3 else (0,)
        raise InputError(
            f"images have {channels} channels (shape {tuple(images.shape)}), but {self.mode} has "
            f"{3 if self.mode == 'RGB' else 1}; select some with bands=, for example bands={example}"
        )

    def _channels(self, images: Tensor) -> Tensor:
        """RGB or L from one or three channels."""
        channels = images.shape[-3]
        if self.mode == "any" or channels == {"RGB": 3, "L": 1}[self.mode]:
            return images
        if self.mode == "RGB" and channels == 1:
            return images.expand(*images.shape[:-3], 3, *images.shape[-2:])
        if self.mode == "L" and channels == 3:
            weight = images.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
            return (images * weight).sum(-3, keepdim=True)
        if self.bands is not None:  # the user chose them
            return images
        raise InputError(f"{channels} channels cannot be read as {self.mode}; select some with bands=")

    def _resized(self, images: Tensor) -> Tensor:
        from PIL import Image

        if self.size is None or tuple(images.shape[-2:]) == self.size:
            return images
        planes = images.detach().float().cpu().reshape(-1, *images.shape[-2:])
        inside = bool(((planes >= 0) & (planes <= 1)).all())
        out = torch.stack([torch.from_numpy(np.array(self.fit(Image.fromarray(p.numpy())))) for p in planes])
        out = out.clamp(0, 1) if inside else out
        return out.reshape(*images.shape[:-2], *self.size).to(images.device, images.dtype)

    def transformed(self, image: Any) -> Tensor:
        """The tensor that the user's transform returns for an image."""
        assert self.transform is not None
        made = self.transform(image)
        if not isinstance(made, Tensor) or made.ndim != 3 or not made.is_floating_point():
            got = f"{made.dtype} {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
            raise InputError(f"transform must return one float tensor (C, H, W), got {got}")
        return made


def orientation(image: Any) -> int:
    """The EXIF orientation of a PIL image, 1 (upright) to 8; 1 if its metadata are damaged or missing.

    The image is decoded first, because Pillow rotates TIFF files then.
    """
    image.load()
    try:
        found = image.getexif().get(0x0112, 1)
    except Exception:  # damaged metadata raise many types; the pixels are intact, and shown as stored
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def turned(image: Any, orientation: int) -> Any:
    """A PIL image with an EXIF orientation applied."""
    from PIL import Image

    turn = Image.Transpose
    turns = (turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE, turn.ROTATE_270,
             turn.TRANSVERSE, turn.ROTATE_90)  # fmt: skip
    return image if orientation == 1 else image.transpose(turns[orientation - 2])


class Placement(NamedTuple):
    """The part of an image ``(left, top, right, bottom)``, in its own pixels, that is shown at ``height x width``."""

    left: float
    top: float
    right: float
    bottom: float
    height: int
    width: int


def placement(height: int, width: int, size: Size, *, resize: str = "crop", crop: float = 1.0) -> Placement:
    """The :class:`Placement` of an image of ``height x width`` when it is read at ``size``.

    >>> placement(300, 400, (224, 224))
    Placement(left=50.0, top=0.0, right=350.0, bottom=300.0, height=224, width=224)
    """
    one_of("resize", resize, RESIZES)
    if resize == "squash":
        left, top = width * (1 - crop) / 2, height * (1 - crop) / 2
        return Placement(left, top, width - left, height - top, *size)
    if resize == "pad":
        scale = min(size[0] / height, size[1] / width)
        return Placement(0, 0, width, height, max(1, round(height * scale)), max(1, round(width * scale)))
    scale = min(height / size[0], width / size[1]) * crop
    wide, high = size[1] * scale, size[0] * scale
    left, top = max((width - wide) / 2, 0.0), max((height - high) / 2, 0.0)
    return Placement(left, top, min(left + wide, width), min(top + high, height), *size)


def checked_size(size: Any) -> Size | None:
    """``size`` as (height, width), or None.

    >>> checked_size(224)
    (224, 224)
    """
    if size is None:
        return None
    try:
        sides = [operator.index(s) for s in (size if isinstance(size, Sequence) else (size, size))]
    except TypeError:
        sides = []
    if isinstance(size, (bool, str)) or len(sides) != 2:
        raise InputError(f"size must be one side or (height, width) in pixels, got {size!r}")
    if not all(1 <= side <= 10_000 for side in sides):
        raise InputError(f"size must be from 1 to 10,000 pixels, got {size!r}")
    return sides[0], sides[1]


def _checked_bands(bands: Any) -> tuple[int, ...] | None:
    if bands is None:
        return None
    try:
        chosen = tuple(operator.index(band) for band in bands)
    except TypeError:
        chosen = ()
    if not chosen or min(chosen) < 0 or isinstance(bands, (str, bytes)):
        raise InputError(f"bands must be indices of channels, such as (0, 1, 2), got {bands!r}")
    return chosen


def _within(bands: tuple[int, ...], count: int, what: str) -> tuple[int, ...]:
    if max(bands) >= count:
        raise InputError(f"bands={bands}, but the {what} has {count} channels, 0 to {count - 1}")
    return bands


def _checked_range(value_range: Any) -> tuple[float, float] | None:
    if value_range is None:
        return None
    try:
        low, high = (float(v) for v in value_range)
    except (TypeError, ValueError):
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"value_range must be (darkest, brightest) pixel value, got {value_range!r}")
    return low, high


def _range(pixels: NDArray[Any], sixteen: bool) -> tuple[float, float]:
    """The pixel values that become 0 and 1; see :class:`Reading`."""
    if pixels.dtype == np.uint8:
        return 0, 255
    if sixteen:
        return 0, 65535
    if not np.isfinite(pixels).all():
        raise InputError("the image contains NaN or infinite pixels; replace them first")
    low, high = (float(pixels.min()), float(pixels.max())) if pixels.size else (0.0, 0.0)
    whole = pixels.dtype.kind in "iu"
    if not whole and low >= -1e-3 and high <= 1 + 1e-3:
        return 0, 1
    if low < 0 or high > 2**31 - 1 or (not whole and high > 65535):
        raise InputError(
            f"the image has {'integer' if whole else 'float'} pixels from {low:g} to {high:g}, and it is unknown "
            "which of them are black and white; pass value_range=(darkest, brightest)"
        )
    top = 255 if high <= 255 else 65535 if high <= 65535 else 2**31 - 1
    if top == 255 or (not whole and not (pixels == np.round(pixels)).all()):
        warnings.warn(
            f"an image with {pixels.dtype} pixels from {low:g} to {high:g} is read with {top} as white; if that is "
            "wrong, pass value_range=(darkest, brightest)",
            InputWarning,
            stacklevel=2,
        )
    return 0, float(top)
