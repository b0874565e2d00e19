"""Energy pointing game and pointing game: the energy and the peak of a map against a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_concepts._checks import number
from captum_concepts.errors import InputError
from captum_concepts.metrics._prepare import Chunk, min_max, prepare

__all__ = ["epg", "pointing_game"]

NORMALIZE = ("minmax", "relu", "none")


def epg(
    maps: Tensor,
    masks: Tensor,
    *,
    normalize: str = "minmax",
    ignore: Tensor | None = None,
    ignore_index: int | None = None,
    mode: str = "bilinear",
) -> Tensor:
    r"""Energy pointing game (EPG), the fraction of a map's energy that lies inside the mask.

    .. math:: \mathrm{EPG} = \sum_{x \in M} a(x) \Big/ \sum_x a(x)

    where a is the map, resized to the mask and then scaled to [0, 1] by its own minimum and maximum. The range is
    [0, 1], and higher is better. A random map is expected to score the fraction of the image that the mask covers.

    Args:
        maps: ``(N, h, w)`` or ``(N, 1, h, w)``; ``(N, T, h, w)`` for masks ``(N, T, H, W)``. Resized to the masks
            by ``mode``, ``align_corners=False``.
        masks: ``(N, H, W)`` or ``(N, T, H, W)``; bool, integers (not 0 is the region) or floats (above 0.5).
        normalize: ``"minmax"``; ``"relu"``: negative values become 0, without scaling; ``"none"``: the map unchanged,
            which must not be negative (Relevance Mass Accuracy in Quantus).
        ignore, ignore_index: pixels to leave out, also from minimum and maximum; see
            :func:`captum_concepts.metrics.nra`.
        mode: ``"bilinear"``, ``"bicubic"``, ``"nearest"``, ``"nearest-exact"`` or ``"area"``.

    Returns:
        ``(N,)`` or ``(N, T)``, float32 (float64 for float64 maps). A map without energy (constant under ``"minmax"``,
        otherwise all 0) scores the fraction of the image that the mask covers; a full mask scores 1. NaN for a map
        with NaN or infinite values and for an empty mask.

    Raises:
        InputError: a wrong shape, dtype, device or option; negative values under ``normalize="none"``.

    Reference: Score-CAM, CVPR workshops 2020, arXiv:1910.01279, section 4.3.

    Example:
        >>> import torch
        >>> epg(torch.tensor([[[0.0, 1.0, 3.0]]]), torch.tensor([[[False, False, True]]]))
        tensor([0.7500])
    """
    if normalize not in NORMALIZE:
        raise InputError(f"normalize must be one of {NORMALIZE}, got {normalize!r}")
    pairs = prepare(maps, masks, ignore=ignore, ignore_index=ignore_index, mode=mode)

    def share(chunk: Chunk) -> Tensor:
        valid = chunk.valid
        broken = chunk.broken | (chunk.values.isinf() & valid).any(1)
        values = chunk.values.masked_fill(broken[:, None] | ~valid, 0)
        if normalize == "minmax":
            values = min_max(values, valid)[0] if chunk.ignore is not None else min_max(values)[0]
        elif normalize == "relu":
            values = values.clamp(min=0)
        elif bool((values < 0).any()):
            raise InputError(
                "maps have negative values, whose energy is not a fraction of the total; use normalize='minmax' or "
                "'relu'"
            )
        values = values * valid if chunk.ignore is not None else values
        total = values.sum(1)
        values = torch.where((total > 0)[:, None], values, valid.to(values.dtype))
        inside = (values * chunk.masks).sum(1) / values.sum(1)
        return inside.masked_fill(broken | ~chunk.masks.any(1), torch.nan)

    return pairs.per_row(share)


def pointing_game(
    maps: Tensor,
    masks: Tensor,
    *,
    tolerance: float = 0,
    ignore: Tensor | None = None,
    ignore_index: int | None = None,
    mode: str = "bilinear",
) -> Tensor:
    """Whether the map's highest pixel hits the mask; the mean over samples is the pointing game's accuracy.

    A hit is a maximum within ``tolerance`` of a pixel of the mask. If several pixels tie for the maximum, the value is
    the fraction of them that hit, so a constant map scores the fraction of the image that the (widened) mask covers.
    Values lie in [0, 1], and higher is better. Quantus counts one hit among tied maxima as a full hit and has no
    tolerance.

    Args:
        maps, masks, mode: as in :func:`epg`.
        tolerance: Euclidean distance in pixels of the mask; the paper uses 15, on photographs of a few hundred pixels.
        ignore, ignore_index: pixels that can neither be the maximum nor belong to the mask.

    Returns:
        ``(N,)`` or ``(N, T)``. NaN for a map with NaN and for an empty mask.

    Raises:
        InputError: a wrong shape, dtype, device or option; a negative ``tolerance``.

    Reference: Zhang et al., Top-down neural attention by excitation backprop, ECCV 2016, arXiv:1608.00507.

    Example:
        >>> import torch
        >>> heat, mask = torch.tensor([[[0.0, 0.0, 9.0]]]), torch.tensor([[[True, False, False]]])
        >>> pointing_game(heat, mask), pointing_game(heat, mask, tolerance=2)
        (tensor([0.]), tensor([1.]))
    """
    number("tolerance", tolerance, lambda t: t >= 0, "a distance in pixels, at least 0")
    pairs = prepare(maps, masks, ignore=ignore, ignore_index=ignore_index, mode=mode)
    size = pairs.masks.shape[1:]

    def hits(chunk: Chunk) -> Tensor:
        values = chunk.values.masked_fill(chunk.broken[:, None] | ~chunk.valid, -torch.inf)
        peaks = (values == values.amax(1, keepdim=True)) & chunk.valid
        wide = _widen(chunk.masks.reshape(-1, *size), tolerance).flatten(1) if tolerance else chunk.masks
        share = (peaks & wide).sum(1).to(pairs.dtype) / peaks.sum(1)
        return share.masked_fill(chunk.broken | ~chunk.masks.any(1), torch.nan)

    return pairs.per_row(hits)


def _widen(masks: Tensor, radius: float) -> Tensor:
    """Pixels within ``radius`` of masks ``(B, H, W)``, from the distances along rows and a bounded number of shifts."""
    height, width = masks.shape[1:]
    at = torch.arange(width, device=masks.device).expand(masks.shape)
    far = height + width + 1
    left = torch.where(masks, at, -far).cummax(2).values
    right = torch.where(masks, at, 2 * far).flip(2).cummin(2).values.flip(2)
    along = torch.minimum(at - left, right - at)
    near = torch.zeros_like(masks)
    for dy in range(-min(int(radius), height - 1), min(int(radius), height - 1) + 1):
        hit = along**2 + dy**2 <= radius**2
        near[:, max(0, -dy) : height - max(0, dy)] |= hit[:, max(0, dy) : height - max(0, -dy)]
    return near
