"""Heat maps over images, as tensors: no figure, no global state."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_concepts.errors import InputError, InputWarning

#: Perceptually uniform, dark to bright; and a diverging one whose middle is white.
SEQUENTIAL, DIVERGING = "inferno", "RdBu_r"


def as_image(image: Any) -> Tensor:
    """An image as RGB float ``(3, H, W)`` in [0, 1], from a tensor (float in [0, 1] or uint8), array or PIL image.

    Raises:
        InputError: another shape or dtype.
    """
    if not isinstance(image, Tensor):
        import numpy as np

        # A copy: arrays of PIL images are read-only, which torch warns about.
        image = torch.from_numpy(np.array(image.convert("RGB") if hasattr(image, "convert") else image))
        if image.ndim == 3 and image.shape[-1] in (1, 3) and image.shape[0] not in (1, 3):
            image = image.permute(2, 0, 1)
    if image.ndim == 4 and image.shape[0] == 1:
        image = image[0]
    if image.ndim == 2:
        image = image[None]
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise InputError(f"an image must be (3, H, W) or (1, H, W), got {tuple(image.shape)}")
    image = image.detach().cpu()
    image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    return image.expand(3, -1, -1).clamp(0, 1)


def value_range(
    heatmap: Tensor, signed: bool | str = "auto", vmin: Any = None, vmax: Any = None
) -> tuple[float, float]:
    """The values at the two ends of the colour map: symmetric around zero for signed maps.

    A map is signed by ``"auto"`` where its negative values matter: more than 5 % of its largest magnitude.
    """
    finite = heatmap[heatmap.isfinite()].float()
    if not finite.numel():
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    top = max(abs(low), abs(high))
    is_signed = low < -0.05 * top if signed == "auto" else bool(signed)
    if is_signed:
        bound = max(abs(v) for v in (vmin, vmax) if v is not None) if (vmin, vmax) != (None, None) else top
        return -(bound or 1.0), bound or 1.0
    low = min(low, 0.0) if vmin is None else float(vmin)
    high = high if vmax is None else float(vmax)
    return (low, high) if high > low else (low, low + 1.0)


def upsample(heatmap: Tensor, size: tuple[int, int]) -> Tensor:
    """A map ``(h, w)`` at ``size``, bilinear with cell centres kept (``align_corners=False``)."""
    return F.interpolate(heatmap[None, None].float(), size, mode="bilinear", align_corners=False)[0, 0]


def overlay(
    image: Any,
    heatmap: Tensor,
    *,
    alpha: float = 0.55,
    saturation: float = 0.3,
    cmap: str | None = None,
    signed: bool | str = "auto",
    vmin: float | None = None,
    vmax: float | None = None,
) -> Tensor:
    """A heat map over an image.

    Args:
        image: ``(3, H, W)`` in [0, 1] or uint8, an array ``(H, W, 3)``, or a PIL image.
        heatmap: ``(h, w)``, enlarged bilinearly to the image.
        alpha: share of the colour in the result, in [0, 1].
        saturation: how much of the image's own colour stays under the map, in [0, 1]; its colours would otherwise be
            read as values.
        cmap: a matplotlib colour map; None takes a perceptually uniform one, or for signed maps a diverging one whose
            middle is zero.
        signed: True, False, or ``"auto"``.
        vmin, vmax: values at the ends of the colour map; None takes the map's own.

    Returns:
        ``(3, H, W)`` in [0, 1], never NaN: cells that are not finite keep the image, with a warning.

    Example:
        >>> overlay(torch.zeros(3, 8, 8), torch.rand(2, 2)).shape
        torch.Size([3, 8, 8])
    """
    from matplotlib import colormaps

    picture = as_image(image)
    heatmap = heatmap.detach().cpu().float()
    if heatmap.ndim != 2:
        raise InputError(f"heatmap must be (h, w), got {tuple(heatmap.shape)}; show one map at a time")
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must be in [0, 1], got {alpha}")
    if not 0 <= saturation <= 1:
        raise InputError(f"saturation must be in [0, 1], got {saturation}")
    known = upsample(heatmap.isfinite().float(), (picture.shape[1], picture.shape[2])) > 0.999
    if not known.all():
        warnings.warn("the map holds NaN or infinite values; they are left uncoloured", InputWarning, stacklevel=2)
    low, high = value_range(heatmap, signed, vmin, vmax)
    values = upsample(heatmap.nan_to_num(0.0, 0.0, 0.0), (picture.shape[1], picture.shape[2]))
    name = cmap or (DIVERGING if low < 0 and low == -high else SEQUENTIAL)
    colours = colormaps[name](((values - low) / (high - low)).clamp(0, 1).numpy())[..., :3]
    coloured = torch.from_numpy(colours).permute(2, 0, 1).float()
    grey = (picture * picture.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)
    ground = saturation * picture + (1 - saturation) * grey
    return torch.where(known, (1 - alpha) * ground + alpha * coloured, picture)
