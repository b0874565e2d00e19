"""Maps evaluated as segmentations: IoU, pixel accuracy, mean IoU and average precision (ImageNet-segmentation)."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_concepts.errors import InputError
from captum_concepts.metrics._prepare import Chunk, check_maps, check_nan_policy, min_max, prepare, settle

__all__ = ["average_precision", "iou", "mean_iou", "pixel_accuracy"]


def iou(
    maps: Tensor,
    masks: Tensor,
    *,
    threshold: float | str = "mean",
    ignore: Tensor | None = None,
    ignore_index: int | None = None,
    mode: str = "bilinear",
) -> Tensor:
    r"""Intersection over union of the binarized map and the mask, foreground only.

    .. math:: \mathrm{IoU} = |B \cap M| \,/\, |B \cup M|, \qquad B = \{x : a(x) > \theta\}

    The range is [0, 1], and higher is better.

    Args:
        maps: ``(N, h, w)`` or ``(N, 1, h, w)``; ``(N, T, h, w)`` for masks ``(N, T, H, W)``. Resized to the masks
            by ``mode``, ``align_corners=False``, before it is binarized.
        masks: ``(N, H, W)`` or ``(N, T, H, W)``; bool, integers (not 0 is the region) or floats (above 0.5).
        threshold: ``"mean"``: the map's own mean (no pixel of a constant map is above it). A number: a threshold on
            the map without rescaling. ``"minmax:0.2"`` etc.: a threshold on the map scaled to [0, 1] by its own
            minimum and maximum, like CAM's 20 % of the maximum.
        ignore, ignore_index: pixels that are not counted (see :func:`captum_concepts.metrics.nra` for the form). As in
            the protocol, they still count toward the map's mean, minimum and maximum.
        mode: ``"bilinear"``, ``"bicubic"``, ``"nearest"``, ``"nearest-exact"`` or ``"area"``.

    Returns:
        ``(N,)`` or ``(N, T)``. An empty mask scores 0 if any pixel is above the threshold. NaN if mask and binarized
        map are both empty, and for a map with NaN, or with infinite values unless ``threshold`` is a number.

    Raises:
        InputError: a wrong shape, dtype, device or option.

    ``BinaryJaccardIndex`` of torchmetrics agrees for one image, but sums over a batch before dividing and scores 0 / 0
    as 0.

    Example:
        >>> import torch
        >>> iou(torch.tensor([[[0.0, 2.0, 4.0]]]), torch.tensor([[[False, True, True]]]))
        tensor([0.5000])
    """
    inter, union, _, _ = _counts(maps, masks, threshold, ignore, ignore_index, mode).unbind(-1)
    return inter / union


def pixel_accuracy(
    maps: Tensor,
    masks: Tensor,
    *,
    threshold: float | str = "mean",
    ignore: Tensor | None = None,
    ignore_index: int | None = None,
    mode: str = "bilinear",
) -> Tensor:
    """Fraction of an example's pixels whose binarized map agrees with the mask.

    The range is [0, 1], and higher is better. The ImageNet-segmentation table sums correct and labeled pixels over all
    images before dividing, which equals the mean over examples because there all have the same number of pixels.

    Args:
        maps, masks, threshold, ignore, ignore_index, mode: as in :func:`iou`.

    Returns:
        ``(N,)`` or ``(N, T)``. Empty and full masks are defined. NaN for a map with NaN (or infinite values, see
        :func:`iou`), or if all pixels are ignored.

    Raises:
        InputError: a wrong shape, dtype, device or option.

    Example:
        >>> import torch
        >>> pixel_accuracy(torch.tensor([[[0.0, 1.0, 4.0, 5.0]]]), torch.tensor([[[0, 1, 1, 1]]]))
        tensor([0.7500])
    """
    inter, union, back, _ = _counts(maps, masks, threshold, ignore, ignore_index, mode).unbind(-1)
    return (inter + back) / (union + back)


def mean_iou(
    maps: Tensor,
    masks: Tensor,
    *,
    threshold: float | str = "mean",
    ignore: Tensor | None = None,
    ignore_index: int | None = None,
    mode: str = "bilinear",
    nan_policy: str = "omit",
) -> Tensor:
    """mIoU of the ImageNet-segmentation protocol, one value for the whole data set.

    Intersections and unions are summed over all examples, for foreground and background, and the result is the mean of
    the two ratios, not the mean of :func:`iou`. The range is [0, 1], and higher is better.

    Args:
        maps, masks, threshold, ignore, ignore_index, mode: as in :func:`iou`; the protocol's threshold is ``"mean"``.
        nan_policy: how examples are handled whose map has NaN (or infinite values, see :func:`iou`). ``"omit"``: left
            out, with their number in an ``InputWarning``; ``"zero"``: an empty prediction, as in the public code of
            the protocol; ``"propagate"``: the result is NaN; ``"raise"``: an ``InputError``.

    Returns:
        0-d tensor; NaN if no example is left, or if one of the two unions is empty.

    Raises:
        InputError: a wrong shape, dtype, device or option; NaN under ``nan_policy="raise"``.

    Reference: Chefer et al., Transformer interpretability beyond attention visualization, CVPR 2021; Guillaumin et al.,
    ImageNet auto-annotation with segmentation propagation, IJCV 2014.

    Example:
        >>> import torch
        >>> mean_iou(torch.tensor([[[0.0, 2.0, 4.0, 0.0]]]), torch.tensor([[[0, 1, 0, 0]]]))  # (1/2 + 2/3) / 2
        tensor(0.5833)
    """
    counts = segmentation_counts(
        maps, masks, threshold=threshold, ignore=ignore, ignore_index=ignore_index, mode=mode, nan_policy=nan_policy
    )
    counts = counts.flatten(0, -2)
    if nan_policy == "omit":
        broken = counts.isnan().any(1)
        settle(counts[:, 0], nan_policy, "mean IoU")
        counts = counts[~broken]
    wide = torch.float32 if counts.device.type == "mps" else torch.float64  # float32 is exact only up to 2**24
    return mean_of_ious(counts.sum(0, dtype=wide)).to(counts.dtype)


def average_precision(
    maps: Tensor,
    masks: Tensor,
    *,
    classes: str = "both",
    ignore: Tensor | None = None,
    ignore_index: int | None = None,
    mode: str = "bilinear",
) -> Tensor:
    r"""Average precision of the pixels of one example; its mean over examples is the table's mAP.

    .. math:: \mathrm{AP} = \sum_k (R_k - R_{k-1}) P_k

    over the distinct values of the map in descending order, with precision :math:`P_k` and recall :math:`R_k` of the
    pixels at or above the k-th value (scikit-learn's ``average_precision_score``). The range is (0, 1], and higher is
    better.

    Args:
        maps, masks, ignore, ignore_index, mode: as in :func:`iou`.
        classes: ``"both"``: the ImageNet-segmentation protocol. The map a, scaled to [0, 1], scores the foreground and
            1 - a the background, and all pixels of both classes are ranked together (micro average); chance is
            0.5. ``"foreground"``: only the mask's pixels are positives; chance is the fraction that the mask covers.

    Returns:
        ``(N,)`` or ``(N, T)``. A constant map scores chance. NaN for a map with NaN (under ``"both"``, also with
        infinite values), for an empty mask under ``"foreground"``, and if all pixels are ignored. Under ``"both"``,
        empty and full masks are defined.

    Raises:
        InputError: a wrong shape, dtype, device or option.

    Reference: as :func:`mean_iou`.

    Example:
        >>> import torch
        >>> heat, mask = torch.tensor([[[0.0, 2.0, 4.0]]]), torch.tensor([[[False, True, False]]])
        >>> average_precision(heat, mask, classes="foreground")
        tensor([0.5000])
    """
    if classes not in ("both", "foreground"):
        raise InputError(f"classes must be 'both' or 'foreground', got {classes!r}")
    pairs = prepare(maps, masks, ignore=ignore, ignore_index=ignore_index, mode=mode)

    def precision(chunk: Chunk) -> Tensor:
        valid, positive = chunk.valid, chunk.masks
        if classes == "foreground":
            broken = chunk.broken
            values = chunk.values.masked_fill(broken[:, None], 0)
        else:
            broken = ~chunk.values.isfinite().all(1)
            values, constant = min_max(chunk.values.masked_fill(broken[:, None], 0))
            values = torch.cat([(1 - values).masked_fill(constant[:, None], 0), values], 1)
            positive = torch.cat([~positive & valid, positive], 1)
            valid = torch.cat([valid, valid], 1)
        found = _ranked_precision(values.masked_fill(~valid, -torch.inf), positive, valid)
        return found.masked_fill(broken | ~positive.any(1), torch.nan)

    return pairs.per_row(precision)


def _ranked_precision(values: Tensor, positive: Tensor, valid: Tensor) -> Tensor:
    values, order = torch.sort(values, dim=1, descending=True)
    hits = positive.gather(1, order).cumsum(1)
    count = valid.gather(1, order).cumsum(1).clamp(min=1)  # ignored pixels may tie with values of -inf
    last = torch.ones_like(positive)
    last[:, :-1] = values[:, 1:] != values[:, :-1]
    # hits at the end of the previous group: a running maximum, because hits never fall
    ends = torch.where(last, hits, 0).cummax(1).values
    gained = hits - torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], 1)
    wide = torch.float32 if values.device.type == "mps" else torch.float64
    return (gained * hits * last / count).to(wide).sum(1) / hits[:, -1].clamp(min=1)


def segmentation_counts(
    maps: Tensor,
    masks: Tensor,
    *,
    threshold: float | str = "mean",
    ignore: Tensor | None = None,
    ignore_index: int | None = None,
    mode: str = "bilinear",
    nan_policy: str = "omit",
) -> Tensor:
    """``(N, 4)`` or ``(N, T, 4)`` intersection and union of the foreground, then of the background, in pixels.

    :func:`mean_iou` sums these counts. Rows of maps with NaN (or infinite values, see :func:`iou`) are NaN unless
    ``nan_policy`` is ``"zero"``.

    Example:
        >>> import torch
        >>> segmentation_counts(torch.tensor([[[0.0, 2.0, 4.0, 0.0]]]), torch.tensor([[[0, 1, 0, 0]]]))
        tensor([[1., 2., 2., 3.]])
    """
    check_nan_policy(nan_policy)
    check_maps(maps)
    if nan_policy == "zero":
        broken = maps.isnan() if _parse(threshold)[0] is False else ~maps.isfinite()
        maps = maps.masked_fill(broken.flatten(-2).any(-1)[..., None, None], 0)
    counts = _counts(maps, masks, threshold, ignore, ignore_index, mode)
    if nan_policy == "raise":
        settle(counts[..., 0], nan_policy, "mean IoU")
    return counts


def mean_of_ious(counts: Tensor) -> Tensor:
    """Mean of foreground and background IoU from ``(..., 4)`` sums of :func:`segmentation_counts`."""
    return (counts[..., 0] / counts[..., 1] + counts[..., 2] / counts[..., 3]) / 2


def _counts(
    maps: Tensor,
    masks: Tensor,
    threshold: float | str,
    ignore: Tensor | None,
    ignore_index: int | None,
    mode: str,
) -> Tensor:
    """``(..., 4)`` intersection and union of the foreground, then of the background; NaN for a map with NaN."""
    scaled, level = _parse(threshold)
    pairs = prepare(maps, masks, ignore=ignore, ignore_index=ignore_index, mode=mode)

    def areas(chunk: Chunk) -> Tensor:
        valid = chunk.valid
        broken = ~chunk.values.isfinite().all(1) if scaled else chunk.broken
        drawn = _binarise(chunk.values.masked_fill(broken[:, None], 0), scaled, level) & valid
        inter, area, drawn_area = (x.sum(1) for x in (drawn & chunk.masks, chunk.masks, drawn))
        total = valid.sum(1)
        union = area + drawn_area - inter
        rows = torch.stack([inter, union, total - union, total - inter], 1).to(pairs.dtype)
        return rows.masked_fill(broken[:, None], torch.nan)

    return pairs.per_row(areas, 4)


def _parse(threshold: float | str) -> tuple[bool, float | None]:
    """Whether the map is scaled first, and the number it is compared with (None: its mean)."""
    if threshold == "mean":
        return True, None
    try:
        if isinstance(threshold, str):
            kind, number = threshold.split(":")
            if kind == "minmax" and 0 <= float(number) <= 1:
                return True, float(number)
        elif not isinstance(threshold, bool) and float(threshold) == float(threshold):
            return False, float(threshold)
    except (TypeError, ValueError):
        pass
    raise InputError(f"threshold must be 'mean', a number, or 'minmax:<fraction of the range>', got {threshold!r}")


def _binarise(values: Tensor, scaled: bool, level: float | None) -> Tensor:
    if scaled:  # scaled first as in the protocol, so that rounding cannot put a constant map above its mean
        values = min_max(values)[0]
    return values > (values.mean(1, keepdim=True) if level is None else level)
