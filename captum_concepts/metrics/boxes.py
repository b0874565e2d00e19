"""Boxes from maps, as used in weakly supervised localization."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from captum_concepts._checks import number, one_of
from captum_concepts.errors import InputError
from captum_concepts.metrics._prepare import MODES, check_maps, min_max, prepare, resize_maps

__all__ = ["box_from_map", "box_iou"]

#: Boxes compared at once, because torchvision compares all pairs.
_AT_ONCE = 32


def box_from_map(
    maps: Tensor,
    size: tuple[int, int],
    *,
    threshold: float = 0.2,
    component: str = "largest",
    mode: str = "bilinear",
) -> Tensor:
    """``(N, 4)`` tightest boxes around the pixels above a threshold.

    The map is resized to the image and scaled to [0, 1]. The box encloses the largest connected component (8 neighbors)
    of the pixels above ``threshold``.

    Args:
        maps: ``(N, h, w)`` or ``(N, 1, h, w)``.
        size: ``(H, W)`` of the images in pixels.
        threshold: fraction of the map's range, in [0, 1); CAM uses 0.2 (Zhou et al., CVPR 2016).
        component: ``"largest"`` (among equally large ones, the first in reading order), or ``"all"`` for one box around
            all pixels above ``threshold``.
        mode: how maps are resized, ``align_corners=False``.

    Returns:
        ``(N, 4)`` float32 ``x0, y0, x1, y1`` in pixels with exclusive ends, the format of ``torchvision.ops``. NaN
        for a constant map and for a map with NaN or infinite values.

    Raises:
        InputError: a wrong shape or option.

    Example:
        >>> heat = torch.zeros(1, 4, 4)
        >>> heat[0, 1:3, 2:] = 1
        >>> box_from_map(heat, (4, 4))
        tensor([[2., 1., 4., 3.]])
    """
    number("threshold", threshold, lambda t: 0 <= t < 1, "in [0, 1)")
    one_of("component", component, ("largest", "all"))
    one_of("mode", mode, MODES)
    maps = check_maps(maps)
    if maps.ndim == 4 and maps.shape[1] == 1:
        maps = maps[:, 0]
    if maps.ndim != 3:
        raise InputError(f"maps must be (N, h, w) or (N, 1, h, w), got {tuple(maps.shape)}")
    heat = resize_maps(maps, size, mode=mode)
    broken = ~heat.isfinite().flatten(1).all(1)
    scaled = min_max(heat.masked_fill(broken[:, None, None], 0).flatten(1))[0].reshape(heat.shape)
    kept = scaled > threshold
    if component == "largest":
        kept = _largest_component(kept)
    return _bounds(kept).masked_fill(broken[:, None], torch.nan)


def box_iou(
    maps: Tensor,
    masks: Tensor,
    *,
    threshold: float = 0.2,
    component: str = "largest",
    ignore: Tensor | None = None,
    ignore_index: int | None = None,
    mode: str = "bilinear",
) -> Tensor:
    """Intersection over union of :func:`box_from_map` and the box around the mask.

    The range is [0, 1], and higher is better. Published tables count a value above 0.5 as localized.

    Args:
        maps: ``(N, h, w)`` or ``(N, 1, h, w)``; ``(N, T, h, w)`` for masks ``(N, T, H, W)``.
        masks: ``(N, H, W)`` or ``(N, T, H, W)``: filled boxes, or any regions, whose tightest boxes are used.
        threshold, component: as in :func:`box_from_map`.
        ignore, ignore_index, mode: as in :func:`~captum_concepts.metrics.nra`. Ignored pixels belong to neither box,
            and the map is set to its minimum there.

    Returns:
        The shape of ``masks`` without its last two dimensions. 0 for a map without a box; NaN for an empty mask and for
        a map with NaN or infinite values.

    Raises:
        InputError: shapes that do not match, negative labels, or NaN in the masks.

    Example:
        >>> heat, mask = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4).bool()
        >>> heat[0, :2, :2], mask[0, :2, :] = 1, True
        >>> box_iou(heat, mask)
        tensor([0.5000])
    """
    pairs = prepare(maps, masks, ignore=ignore, ignore_index=ignore_index, mode=mode)
    heat, regions = pairs.maps, pairs.masks
    size = (regions.shape[-2], regions.shape[-1])
    if pairs.ignore is not None:
        heat = resize_maps(heat, size, mode=mode)
        least = heat.masked_fill(pairs.ignore, torch.inf).flatten(1).amin(1)
        heat = torch.where(pairs.ignore, least[:, None, None], heat)
        regions = regions & ~pairs.ignore
    found = box_from_map(heat, size, threshold=threshold, component=component, mode=mode)
    true = _bounds(regions)
    parts = zip(found.nan_to_num(0).to(true).split(_AT_ONCE), true.nan_to_num(0).split(_AT_ONCE), strict=True)
    overlap = torch.cat([torchvision.ops.box_iou(part, true_part).diagonal() for part, true_part in parts])
    undefined = true.isnan().any(1) | ~heat.isfinite().flatten(1).all(1)
    return overlap.nan_to_num(0).masked_fill(undefined, torch.nan).reshape(pairs.shape)


def _bounds(regions: Tensor) -> Tensor:
    """``(N, 4)`` tightest boxes of ``(N, H, W)`` bool; NaN for an empty mask."""
    ends = []
    for dim in (1, 2):  # columns, then rows
        line = regions.any(dim)
        at = torch.arange(line.shape[1], device=line.device)
        first = at.masked_fill(~line, line.shape[1]).amin(1)
        ends.append((first, at.masked_fill(~line, -1).amax(1) + 1))
    (x0, x1), (y0, y1) = ends
    return torch.stack([x0, y0, x1, y1], 1).float().masked_fill(~regions.flatten(1).any(1)[:, None], torch.nan)


def _largest_component(kept: Tensor) -> Tensor:
    """The largest connected component of each ``(H, W)`` of ``(N, H, W)`` bool."""
    n, height, width = kept.shape
    if not n:
        return kept
    # Every pixel starts with its own negative number; the largest one (of the first pixel) floods its component.
    own = -torch.arange(1, height * width + 1, device=kept.device, dtype=torch.float64).reshape(1, height, width)
    outside = -float(height * width + 1)
    label = torch.where(kept, own, outside)
    while True:
        grown = torch.where(kept, F.max_pool2d(label[:, None], 3, 1, 1)[:, 0], outside)
        if torch.equal(grown, label):
            break
        label = grown
    numbers = (-label).long().flatten(1) - 1
    counts = torch.zeros(n, height * width + 1, dtype=torch.long, device=kept.device)
    counts.scatter_add_(1, numbers, kept.flatten(1).long())
    best = counts[:, :-1].argmax(1)
    return (numbers == best[:, None]).reshape(kept.shape) & kept
