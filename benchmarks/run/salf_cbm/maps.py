"""Maps against exact masks, in one table: per image, so that intervals come from resampling images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_concepts.metrics import average_precision, concept_specificity, nra, pixel_accuracy, segmentation_counts

#: Columns of a table of maps.
COLUMNS = ("nra", "nra_exact", "specificity", "pixel_accuracy", "mean_iou", "mean_iou_half", "average_precision")
DRAWS = 1000


def score_maps(maps: Tensor, masks: Tensor, presence: Tensor) -> dict[str, list[Tensor]]:
    """Scores of the maps of what is present, image by image.

    Args:
        maps: ``(N, T, h, w)``.
        masks: ``(N, T, H, W)``.
        presence: ``(N, T)`` bool; only these are scored, and only these are each other's rivals in ``specificity``.

    Returns:
        For each key of :data:`COLUMNS` one tensor an image, of its present concepts; for mIoU (binarised at the map's
        mean, the protocol, or at the middle of its range) the sums ``(k, 4)`` of
        :func:`~captum_concepts.metrics.segmentation_counts`.
    """
    found: dict[str, list[Tensor]] = {key: [] for key in COLUMNS}
    for own, truth, here in zip(maps, masks, presence, strict=True):
        if not here.any():
            continue
        a, m = own[here][None], truth[here][None]
        found["nra"].append(nra(a, m)[0])
        found["nra_exact"].append(nra(a, m, baseline="exact")[0])
        found["specificity"].append(concept_specificity(a, m)[0])
        found["pixel_accuracy"].append(pixel_accuracy(a, m)[0])
        found["mean_iou"].append(segmentation_counts(a, m)[0])
        found["mean_iou_half"].append(segmentation_counts(a, m, threshold="minmax:0.5")[0])
        found["average_precision"].append(average_precision(a, m)[0])
    return found


def bootstrap(values: Sequence[Tensor], seed: int = 0) -> list[float]:
    """Mean over all values, and its 95 % interval from drawing images with replacement; None where nothing is left."""
    sums = np.array([[float(v.nansum()), float((~v.isnan()).sum())] for v in values])
    return _interval(sums, lambda total: total[..., 0] / total[..., 1], seed)


def bootstrap_mean_iou(counts: Sequence[Tensor], seed: int = 0) -> list[float]:
    """mIoU of summed intersections and unions, and its interval."""
    sums = np.array([row.nan_to_num(0).sum(0).double().tolist() for row in counts])
    return _interval(sums, lambda t: (t[..., 0] / t[..., 1] + t[..., 2] / t[..., 3]) / 2, seed)


def _interval(sums: Any, value: Any, seed: int) -> list[float]:
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(sums), (DRAWS, len(sums)))
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = np.nanquantile(value(sums[draws].sum(1)), [0.025, 0.975])
        return [float(value(sums.sum(0))), float(low), float(high)]


def summary(scores: dict[str, list[Tensor]], leave_out: Sequence[str] = ()) -> dict[str, list[float]]:
    """Mean and interval of every column."""
    return {
        key: bootstrap_mean_iou(values) if key.startswith("mean_iou") else bootstrap(values)
        for key, values in scores.items()
        if key not in leave_out
    }


def accuracy_interval(hits: Sequence[bool], seed: int = 0) -> list[float]:
    """Share of hits, and its 95 % interval."""
    return bootstrap([torch.tensor([float(hit)]) for hit in hits], seed)
