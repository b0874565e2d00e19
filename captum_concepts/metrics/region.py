"""Normalized region accuracy over all thresholds, hit rate and concept specificity."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_concepts._checks import number, one_of
from captum_concepts.errors import InputError
from captum_concepts.metrics._areas import all_areas, authors_weights, expected_auc
from captum_concepts.metrics._prepare import Pairs, prepare, settle

__all__ = ["concept_specificity", "hit_rate", "nra", "region_auc"]

BASELINES = ("published", "exact")
THRESHOLDS = ("all", "authors")


def nra(
    maps: Tensor,
    masks: Tensor,
    *,
    baseline: str = "published",
    signed: bool = False,
    thresholds: str = "all",
    ignore: Tensor | None = None,
    ignore_index: int | None = None,
    mode: str = "bilinear",
) -> Tensor:
    r"""Normalized region accuracy (NRA), the area under the IoU curve between a random (0) and the ideal (1) order.

    .. math::
        \mathrm{NRA} = \frac{\max(\mathrm{AUC} - \mathrm{AUC}_{low},\, 0)}{\mathrm{AUC}_{high} - \mathrm{AUC}_{low}},
        \qquad \mathrm{AUC} = \frac1P \sum_{p=1}^{P} \mathrm{IoU}(p)

    where IoU(p) compares the p pixels of highest saliency with the mask of M of the P pixels, and
    :math:`\mathrm{AUC}_{high}` is the AUC of the ideal order, the mean of ``min(p, M) / max(p, M)``.

    The range is [0, 1] (at most 1 if ``signed``), and higher is better. Only the order of the pixels matters, so any
    strictly increasing function of the map has the same value.

    The result does not depend on how a sort breaks ties. Within a group of g equal pixels, m of them in the mask, that
    starts after a pixels with b in the mask, the intersection at p is its expectation under a random order of the
    group, ``E(p) = b + (p - a) * m / g``, and ``IoU(p) = E(p) / (p + M - E(p))``.

    Args:
        maps: ``(N, h, w)`` or ``(N, 1, h, w)``; ``(N, T, h, w)`` for masks ``(N, T, H, W)``. Resized to the masks
            by ``mode``, ``align_corners=False``. Any real dtype; half precision is computed in float32.
        masks: ``(N, H, W)``, or ``(N, T, H, W)`` for several (possibly overlapping) concepts per image; bool, integers
            (not 0 is the region) or floats (above 0.5 is the region).
        baseline: :math:`\mathrm{AUC}_{low}`. ``"published"``: the area under the line from 0 to M/P, ``M / 2P``, as in
            the paper (whose code also uses ``thresholds="authors"``), which is below the AUC of a random map.
            ``"exact"``: the mean of the expected IoU, ``E / (p + M - E)`` with ``E = p M / P``, so that a constant map
            scores exactly 0. Random maps still average above 0 (.04 to .08) unless ``signed``, because values below
            the baseline are clipped.
        signed: do not clip values below the baseline; random maps then average 0 under ``baseline="exact"``.
        thresholds: ``"all"``: every p from 1 to P. ``"authors"``: the grid of the authors' code, every pixel up to 1 %
            of the image and steps of 1 % beyond. They differ for masks below 1 % of the image, and negligibly above
            5 %.
        ignore: bool ``(N, H, W)`` or the shape of ``masks``; pixels left out as if the image did not have them.
        ignore_index: the label in integer ``masks`` of pixels to leave out.
        mode: ``"bilinear"``, ``"bicubic"``, ``"nearest"``, ``"nearest-exact"`` or ``"area"``.

    Returns:
        ``(N,)`` or ``(N, T)``, the shape of ``masks`` without its last two dimensions; float32, float64 for float64
        maps. NaN for a map with NaN and for an empty or a full mask. Infinite values keep their rank if the map is not
        resized.

    Raises:
        InputError: a wrong shape, dtype, device, ``baseline`` or ``mode``.

    Reference: CE-FAM: Concept-Based Explanation via Fusion of Activation Maps, ICCV 2025, arXiv:2509.23849.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[[1, 1, 0], [0, 0, 0]]])
        >>> nra(mask.float(), mask), nra(torch.ones(1, 2, 3), mask, baseline="exact")
        (tensor([1.]), tensor([0.]))
    """
    pairs = prepare(maps, masks, ignore=ignore, ignore_index=ignore_index, mode=mode)
    return _rows(pairs, baseline, signed=signed, thresholds=thresholds).reshape(pairs.shape)


def region_auc(
    maps: Tensor,
    masks: Tensor,
    *,
    ignore: Tensor | None = None,
    ignore_index: int | None = None,
    mode: str = "bilinear",
) -> Tensor:
    """Mean IoU over all area thresholds, the AUC of :func:`nra` before normalization; in (0, 1], higher is better.

    It is high for any map if the mask is large, for which NRA corrects. Arguments, ties and errors are as in
    :func:`nra`; NaN for a map with NaN and for an empty mask.

    Example:
        >>> import torch
        >>> region_auc(torch.tensor([[[2.0, 1.0]]]), torch.tensor([[[True, False]]]))  # IoU 1, then 1/2
        tensor([0.7500])
    """
    pairs = prepare(maps, masks, ignore=ignore, ignore_index=ignore_index, mode=mode)
    auc, region, _, broken = all_areas(pairs)
    auc = auc.masked_fill(broken | (region == 0), torch.nan)
    return auc.to(pairs.dtype).to(pairs.masks.device).reshape(pairs.shape)


def hit_rate(
    maps: Tensor,
    masks: Tensor,
    *,
    threshold: float = 0.5,
    baseline: str = "published",
    ignore: Tensor | None = None,
    ignore_index: int | None = None,
    mode: str = "bilinear",
    nan_policy: str = "omit",
) -> Tensor:
    """Fraction of samples whose :func:`nra` is above ``threshold``, one value for the whole data set.

    Args:
        maps, masks, baseline, ignore, ignore_index, mode: as in :func:`nra`. With ``(N, T, H, W)`` masks every
            (image, concept) is a sample.
        threshold: a hit is strictly above it; published: 0.5.
        nan_policy: how undefined samples are handled. ``"omit"``: left out, with their number in an ``InputWarning``;
            ``"zero"``: counted as misses; ``"propagate"``: the result is NaN; ``"raise"``: an ``InputError``.

    Returns:
        0-d tensor in [0, 1], higher is better; NaN if no sample is left.

    Raises:
        InputError: see :func:`nra`; ``threshold`` outside [0, 1]; undefined samples under ``nan_policy="raise"``.

    Example:
        >>> import torch
        >>> masks = torch.tensor([[[True, False]], [[True, False]]])
        >>> hit_rate(torch.tensor([[[2.0, 1.0]], [[1.0, 2.0]]]), masks)
        tensor(0.5000)
    """
    check_threshold(threshold)
    scores = nra(maps, masks, baseline=baseline, ignore=ignore, ignore_index=ignore_index, mode=mode)
    scores = settle(scores.flatten(), nan_policy, "NRA")
    return (scores > threshold).to(scores.dtype).masked_fill(scores.isnan(), torch.nan).mean()


def check_threshold(threshold: float) -> float:
    """``threshold`` of a hit as a float; raises an ``InputError`` outside the range of NRA."""
    return number("threshold", threshold, lambda t: 0 <= t <= 1, "in [0, 1], the range of NRA")


def concept_specificity(
    maps: Tensor,
    masks: Tensor,
    *,
    baseline: str = "published",
    ignore: Tensor | None = None,
    ignore_index: int | None = None,
    mode: str = "bilinear",
) -> Tensor:
    r"""NRA of a concept's own map minus the mean NRA of the maps of the image's other concepts.

    .. math:: \mathrm{spec}_t = \mathrm{NRA}(A_t, M_t) - \frac{1}{|O_t|} \sum_{s \in O_t} \mathrm{NRA}(A_s, M_t)

    where :math:`O_t` are the other concepts that are present, that is, have a non-empty mask in this image. The range
    is [-1, 1], and higher is better. Concept-agnostic maps (one map for all concepts, such as a center Gaussian or the
    activation energy), which NRA alone rewards, score 0, and random maps score 0 in expectation.

    Args:
        maps: ``(N, T, h, w)``.
        masks: ``(N, T, H, W)``.
        baseline, ignore, ignore_index, mode: as in :func:`nra`.

    Returns:
        ``(N, T)``. NaN where the concept is absent (empty mask) or fills the image, its map has NaN, or no other
        concept is present. Another concept's map with NaN is left out of the mean.

    Raises:
        InputError: see :func:`nra`; masks that are not ``(N, T, H, W)``.

    Example:
        >>> import torch
        >>> masks = torch.tensor([[[[1, 0, 0]], [[0, 0, 1]]]])
        >>> concept_specificity(masks.float(), masks), concept_specificity(torch.ones(1, 2, 1, 3), masks)
        (tensor([[0.9750, 0.9750]]), tensor([[0., 0.]]))
    """
    if isinstance(masks, Tensor) and masks.ndim != 4:
        raise InputError(f"specificity needs masks (N, T, H, W) of several concepts, got {tuple(masks.shape)}")
    pairs = prepare(maps, masks, ignore=ignore, ignore_index=ignore_index, mode=mode)
    n, t = pairs.shape
    at = torch.arange(n * t, device=masks.device).reshape(n, t)
    map_rows = at[:, None, :].expand(n, t, t).reshape(-1)  # entry (i, t, s): map s of image i on mask t
    mask_rows = at[:, :, None].expand(n, t, t).reshape(-1)
    scores = _rows(pairs, baseline, map_rows, mask_rows).reshape(n, t, t)
    regions = pairs.masks if pairs.ignore is None else pairs.masks & ~pairs.ignore
    present = regions.flatten(1).any(1).reshape(n, t)
    own = scores.diagonal(dim1=1, dim2=2)
    others = present[:, None, :] & ~torch.eye(t, dtype=torch.bool, device=masks.device) & ~scores.isnan()
    mean = scores.nan_to_num(0).mul(others).sum(-1) / others.sum(-1)  # 0 / 0 is the NaN of "no other concept"
    return own - mean


def _rows(
    pairs: Pairs,
    baseline: str,
    map_rows: Tensor | None = None,
    mask_rows: Tensor | None = None,
    *,
    signed: bool = False,
    thresholds: str = "all",
) -> Tensor:
    """NRA of each row, or of each pair of rows."""
    one_of("baseline", baseline, BASELINES)
    one_of("thresholds", thresholds, THRESHOLDS)
    auc, region, pixels, broken = all_areas(pairs, map_rows, mask_rows, thresholds=thresholds)
    undefined = broken | (region == 0) | (region == pixels)
    m, p = region.clamp(min=1).double(), pixels.clamp(min=1).double()
    if thresholds == "authors":
        high = torch.stack([_authors_high(*size) for size in zip(region.tolist(), pixels.tolist(), strict=True)] or [m])
        high = high.to(auc).reshape(auc.shape)
    else:
        high = ((m + 1) / 2 + m * (torch.digamma(p + 1) - torch.digamma(m + 1))) / p  # sums of 1/p: harmonic numbers
    if baseline == "published":
        low = m / (2 * p)
    else:
        sizes = zip(region.tolist(), pixels.tolist(), strict=True)
        low = torch.tensor([expected_auc(*size) for size in sizes], dtype=torch.float64, device=auc.device)
    gain = auc - low
    gain = gain.masked_fill(gain.abs() < 1e-12, 0)  # sums in two shapes may differ in the last bit
    gain = gain if signed else gain.clamp(min=0)
    scores = (gain / (high - low)).clamp(max=1).masked_fill(undefined, torch.nan)
    return scores.to(pairs.dtype).to(pairs.masks.device)


def _authors_high(region: int, pixels: int) -> Tensor:
    """AUC of the ideal order as in the authors' code, where p starts at 0 (but at 1 in the IoU)."""
    at, m = torch.arange(pixels, dtype=torch.float64), max(region, 1)
    return torch.where(at < m, at / m, m / at.clamp(min=1)) @ authors_weights(pixels)
