"""Heat maps over images, as tensors without figures or global state."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_concepts._checks import number, one_of
from captum_concepts.errors import InputError, InputWarning
from captum_concepts.images import ImageSource, to_tensor
from captum_concepts.visualization.scale import ColorScale

MODES = ("bicubic", "bilinear", "nearest")
#: Opacity of strong values.
ALPHA = 0.92
_LUMA = (0.299, 0.587, 0.114)
_STRUCTURE = 0.35


def as_image(image: Any) -> Tensor:
    """An image as RGB float ``(3, H, W)`` in [0, 1] on the CPU.

    Args:
        image: a tensor or array ``(3, H, W)``, ``(1, H, W)`` or ``(H, W)`` (also ``(1, 3, H, W)``; arrays also
            ``(H, W, 3)``, and ``(H, W, 4)`` with alpha), of floats in [0, 1] or integers in 0 to 255; a PIL image of
            any mode; or the path of an image. Transparency is composited on white.

    Raises:
        InputError: another shape or dtype, an empty image, or integers outside 0 to 255.

    Warns:
        InputWarning: values outside [0, 1] (an image normalized for a network; clipped) or NaN (drawn black).
    """
    if hasattr(image, "convert") or isinstance(image, (str, os.PathLike)):
        return to_tensor(image)
    alpha_last = False
    if not isinstance(image, Tensor):
        import numpy as np

        try:  # torch warns about read-only arrays, such as those of PIL images, so copy
            image = torch.from_numpy(np.array(image))
        except (TypeError, ValueError) as error:
            message = f"an image must be a tensor, an array or a PIL image, got {type(image).__name__}"
            raise InputError(message) from error
        if image.ndim == 3 and image.shape[-1] in (1, 3, 4) and image.shape[0] not in (1, 3):
            image, alpha_last = image.permute(2, 0, 1), image.shape[-1] == 4
    given = tuple(image.shape)
    if image.ndim == 4 and image.shape[0] == 1:
        image = image[0]
    if image.ndim == 2:
        image = image[None]
    if image.ndim != 3 or image.shape[0] not in ((4,) if alpha_last else (1, 3)) or image.numel() == 0:
        bands = f"; choose three of its {image.shape[0]} channels" if image.ndim == 3 and image.shape[0] > 3 else ""
        hint = bands or "; pass one image at a time"
        raise InputError(f"an image must be (3, H, W), (1, H, W) or (H, W), got {given}{hint}")
    image = _unit_range(image.detach().cpu())
    if alpha_last:
        image = image[:3] * image[3:] + (1 - image[3:])
    return image.expand(3, -1, -1)


def each_image(images: Any) -> Iterator[Any]:
    """Iterate over the images of an explanation as they were explained, before :func:`as_image`.

    Raises:
        InputError: files, a data set or a loader, as their images may differ in size and crop from those explained.
    """
    if isinstance(images, ImageSource):
        undo = images.preprocessing.undo if images.preprocessing is not None else lambda image: image
        yield from (undo(image) for image in images)
    elif hasattr(images, "convert") or getattr(images, "ndim", 0) in (2, 3):
        yield images
    elif isinstance(images, (Tensor, list, tuple, Iterator)) or hasattr(images, "__array__"):
        for image in images:
            if isinstance(image, (str, os.PathLike, tuple, list, Mapping)):
                raise _unclear(f"{type(images).__name__} of {type(image).__name__}")
            yield from image if getattr(image, "ndim", 0) == 4 else [image]
    else:
        raise _unclear(type(images).__name__)


def _unclear(given: str) -> InputError:
    return InputError(
        f"images of an explanation must be a tensor (N, 3, H, W) or a list of images, got a {given}; to read files or "
        "data as the model wants them, pass images.inputs_for(model, source), or the explainer in place of its "
        "explanation"
    )


def as_images(images: Any, n: int) -> list[Tensor]:
    """``n`` images of :func:`as_image`, from a batch, a list, or a single image if n is 1.

    Raises:
        InputError: another number of images, or as in :func:`each_image`.
    """
    single = getattr(images, "ndim", 0) in (2, 3) and n != 1
    found = [as_image(image) for image in (images if single else each_image(images))]
    if len(found) != n:
        raise InputError(f"{len(found)} images for an explanation of {n}; pass one for each, in the same order")
    return found


def _unit_range(image: Tensor) -> Tensor:
    if image.is_complex():
        raise InputError(f"an image must be floating in [0, 1] or integers in 0 to 255, got {image.dtype}")
    if image.dtype == torch.bool:
        return image.float()
    if not image.is_floating_point():
        image = image.long()  # torch compares no unsigned integers of more than 8 bits
        if image.min() < 0 or image.max() > 255:
            raise InputError(f"an image of integers must lie in 0 to 255, got {int(image.min())} to {int(image.max())}")
        return image.float() / 255
    image = image.float()
    if not image.isfinite().all():
        warnings.warn("the image contains NaN or infinite values; they are drawn black", InputWarning, stacklevel=4)
        image = image.nan_to_num(0.0, 0.0, 0.0)
    low, high = float(image.min()), float(image.max())
    if low < -0.1 or high > 1.1:  # bicubic resizing overshoots slightly
        message = f"image values range from {low:.3g} to {high:.3g} and are clipped to [0, 1]"
        hint = "pass the image before the network's normalization, divided by 255 if it is 0 to 255"
        warnings.warn(f"{message}; {hint}", InputWarning, stacklevel=4)
    return image.clamp(0, 1)


def upsample(heatmap: Tensor, size: tuple[int, int], *, mode: str = "bicubic") -> Tensor:
    """A map ``(h, w)`` resized to ``size``, with aligned cell centers (``align_corners=False``).

    Args:
        heatmap: finite values.
        size: ``(H, W)``; the result is antialiased if this is smaller than the map.
        mode: ``"bicubic"`` (clipped to the range of the map), ``"bilinear"``, or ``"nearest"``, which shows the
            layer's positions.
    """
    one_of("mode", mode, MODES)
    values = heatmap[None, None].float()
    if mode == "nearest":
        return F.interpolate(values, size, mode="nearest-exact")[0, 0]
    # With antialias the cubic has a = -0.5 (Catmull-Rom), which overshoots less than -0.75 even when enlarging.
    result = F.interpolate(values, size, mode=mode, align_corners=False, antialias=True)[0, 0]
    return result.clamp(float(heatmap.min()), float(heatmap.max()))


def overlay(
    image: Any,
    heatmap: Any,
    *,
    alpha: float = ALPHA,
    saturation: float = 0.3,
    cmap: Any = None,
    signed: bool | str = "auto",
    vmin: float | None = None,
    vmax: float | None = None,
    mode: str = "bicubic",
) -> Tensor:
    """``(3, H, W)`` heat map over an image, more opaque where the map is stronger.

    A pixel is ``(1 - o) * background + o * color(map)``. The opacity o is 0 where the map is zero and grows to
    ``alpha`` at half of the scale (:meth:`ColorScale.opacity`), so strong values have the color of the color bar on
    dark and bright pixels alike. The image's fine structure stays visible there as lightness.

    Args:
        image: ``(3, H, W)`` in [0, 1] or uint8, an array ``(H, W, 3)``, or a PIL image (:func:`as_image`).
        heatmap: ``(h, w)`` tensor or array, resized to the image.
        alpha: opacity of the upper half of the scale, in [0, 1].
        saturation: saturation of the image under the map, in [0, 1]; reduced because its colors could be mistaken for
            values.
        cmap: a matplotlib color map; None: a perceptually uniform one, or for signed maps a diverging one centered at
            zero.
        signed: True, False, or ``"auto"`` (:meth:`ColorScale.of`).
        vmin, vmax: values at the ends of the color map; None: the map's own.
        mode: ``"bicubic"``, ``"bilinear"`` or ``"nearest"`` (:func:`upsample`).

    Returns:
        ``(3, H, W)`` float in [0, 1] on the CPU, never NaN; the image shows where the map is not finite.

    Raises:
        InputError: an invalid shape, dtype or option.

    Warns:
        InputWarning: NaN or infinite map values; image values outside [0, 1].

    Example:
        >>> overlay(torch.zeros(3, 8, 8), torch.rand(2, 2)).shape
        torch.Size([3, 8, 8])
    """
    heatmap = as_heatmap(heatmap)
    if not heatmap.isfinite().all():
        warnings.warn("the map contains NaN or infinite values; they are left uncolored", InputWarning, stacklevel=2)
    scale = ColorScale.of(heatmap, signed, vmin, vmax, cmap)
    return blend(as_image(image), heatmap, scale, alpha=alpha, saturation=saturation, mode=mode)


def blend(
    picture: Tensor,
    heatmap: Tensor,
    scale: ColorScale,
    *,
    alpha: float = ALPHA,
    saturation: float = 0.3,
    mode: str = "bicubic",
) -> Tensor:
    """The result of :func:`overlay` for an image of :func:`as_image` and a scale that several maps may share."""
    for name, value in (("alpha", alpha), ("saturation", saturation)):
        number(name, value, lambda v: 0 <= v <= 1, "in [0, 1]")
    size = (picture.shape[1], picture.shape[2])
    finite = heatmap.isfinite()
    values = upsample(filled(heatmap), size, mode=mode)
    opacity = scale.opacity(values, alpha)
    luminance = gray(picture)
    colored = (scale.colors(values) + _STRUCTURE * fine_structure(luminance)).clamp(0, 1)
    result = torch.lerp(torch.lerp(luminance, picture, saturation), colored, opacity)
    if finite.all():
        return result
    return torch.where(upsample(finite.float(), size, mode="nearest") > 0.5, result, picture)


def fine_structure(luminance: Tensor) -> Tensor:
    """A gray image minus its local mean, which is 0 wherever the image is flat."""
    _, height, width = luminance.shape
    cells = 24 / max(height, width)
    coarse = (max(round(height * cells), 1), max(round(width * cells), 1))
    local = F.interpolate(luminance[None, :1], coarse, mode="area")
    return luminance - F.interpolate(local, (height, width), mode="bilinear", align_corners=False)[0]


def gray(picture: Tensor) -> Tensor:
    """Luminance of an RGB image, as RGB."""
    return (picture * picture.new_tensor(_LUMA).view(3, 1, 1)).sum(0, keepdim=True).expand(3, -1, -1)


def as_heatmap(heatmap: Any) -> Tensor:
    """A map as float32 ``(h, w)`` on the CPU."""
    heatmap = torch.as_tensor(heatmap).detach().cpu()
    if heatmap.ndim != 2 or heatmap.numel() == 0:
        raise InputError(f"heatmap must be (h, w), got {tuple(heatmap.shape)}; show one map at a time")
    if heatmap.is_complex():
        raise InputError(f"heatmap must be real, got {heatmap.dtype}")
    return heatmap.float()


def filled(heatmap: Tensor) -> Tensor:
    """The map with values that are not finite replaced, ring by ring, by the mean of their finite neighbors, so that
    interpolation near them is not pulled toward an arbitrary number."""
    known = heatmap.isfinite()
    if known.all() or not known.any():
        return heatmap if known.any() else torch.zeros_like(heatmap)
    values, weight = heatmap.where(known, 0.0)[None, None], known.float()[None, None]
    while not weight.all():
        total, count = (F.avg_pool2d(x, 3, 1, 1, divisor_override=1) for x in (values, weight))
        values = torch.where(weight > 0, values, total / count.clamp_min(1))
        weight = (count > 0).float()
    return values[0, 0]
