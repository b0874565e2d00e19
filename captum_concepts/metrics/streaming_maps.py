"""Streaming metrics of maps against masks, thin wrappers of the functions of this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_concepts.metrics.boxes import box_iou
from captum_concepts.metrics.energy import epg, pointing_game
from captum_concepts.metrics.region import check_threshold, concept_specificity, nra, region_auc
from captum_concepts.metrics.segmentation import (
    average_precision,
    iou,
    mean_of_ious,
    pixel_accuracy,
    segmentation_counts,
)
from captum_concepts.metrics.streaming import ExampleMetric

__all__ = [
    "AveragePrecision",
    "BoxIoU",
    "ConceptSpecificity",
    "EnergyPointingGame",
    "HitRate",
    "IoU",
    "MeanIoU",
    "NormalizedRegionAccuracy",
    "PixelAccuracy",
    "PointingGame",
    "RegionAUC",
]


class _MapMetric(ExampleMetric):
    """A metric with ``update(maps, masks, ignore=None)``; the corresponding function documents shapes and results."""

    def __init__(self, *, ignore_index: int | None = None, mode: str = "bilinear", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ignore_index = ignore_index
        self.mode = mode

    def _shared(self, ignore: Tensor | None) -> dict[str, Any]:
        return {"ignore": ignore, "ignore_index": self.ignore_index, "mode": self.mode}


class NormalizedRegionAccuracy(_MapMetric):
    """Mean :func:`captum_concepts.metrics.nra` over examples (and concepts).

    Args:
        baseline, signed, thresholds, ignore_index, mode: as in the function.
        nan_policy, kwargs: as in :class:`ExampleMetric`.

    Example:
        >>> import torch
        >>> metric = NormalizedRegionAccuracy(baseline="exact")
        >>> mask = torch.tensor([[[True, False]]])
        >>> metric.update(torch.tensor([[[2.0, 1.0]]]), mask)
        >>> metric.update(torch.tensor([[[1.0, 1.0]]]), mask)
        >>> metric.compute()
        tensor(0.5000)
    """

    def __init__(
        self, *, baseline: str = "published", signed: bool = False, thresholds: str = "all", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.baseline = baseline
        self.signed = signed
        self.thresholds = thresholds

    def per_example(self, maps: Tensor, masks: Tensor, ignore: Tensor | None = None) -> Tensor:
        options: dict[str, Any] = {"baseline": self.baseline, "signed": self.signed, "thresholds": self.thresholds}
        return nra(maps, masks, **options, **self._shared(ignore))


class HitRate(_MapMetric):
    """Fraction of samples whose NRA is above ``threshold`` (:func:`captum_concepts.metrics.hit_rate`)."""

    def __init__(self, *, threshold: float = 0.5, baseline: str = "published", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = check_threshold(threshold)
        self.baseline = baseline

    def per_example(self, maps: Tensor, masks: Tensor, ignore: Tensor | None = None) -> Tensor:
        scores = nra(maps, masks, baseline=self.baseline, **self._shared(ignore))
        return (scores > self.threshold).to(scores.dtype).masked_fill(scores.isnan(), torch.nan)


class RegionAUC(_MapMetric):
    """Mean :func:`captum_concepts.metrics.region_auc`."""

    def per_example(self, maps: Tensor, masks: Tensor, ignore: Tensor | None = None) -> Tensor:
        return region_auc(maps, masks, **self._shared(ignore))


class ConceptSpecificity(_MapMetric):
    """Mean :func:`captum_concepts.metrics.concept_specificity` over (image, concept) where it is defined."""

    def __init__(self, *, baseline: str = "published", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.baseline = baseline

    def per_example(self, maps: Tensor, masks: Tensor, ignore: Tensor | None = None) -> Tensor:
        return concept_specificity(maps, masks, baseline=self.baseline, **self._shared(ignore))


class EnergyPointingGame(_MapMetric):
    """Mean :func:`captum_concepts.metrics.epg`."""

    def __init__(self, *, normalize: str = "minmax", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.normalize = normalize

    def per_example(self, maps: Tensor, masks: Tensor, ignore: Tensor | None = None) -> Tensor:
        return epg(maps, masks, normalize=self.normalize, **self._shared(ignore))


class PointingGame(_MapMetric):
    """Mean :func:`captum_concepts.metrics.pointing_game`: hits / (hits + misses)."""

    def __init__(self, *, tolerance: float = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tolerance = tolerance

    def per_example(self, maps: Tensor, masks: Tensor, ignore: Tensor | None = None) -> Tensor:
        return pointing_game(maps, masks, tolerance=self.tolerance, **self._shared(ignore))


class _Binarised(_MapMetric):
    def __init__(self, *, threshold: float | str = "mean", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = threshold


class IoU(_Binarised):
    """Mean over examples of :func:`captum_concepts.metrics.iou` (foreground)."""

    def per_example(self, maps: Tensor, masks: Tensor, ignore: Tensor | None = None) -> Tensor:
        return iou(maps, masks, threshold=self.threshold, **self._shared(ignore))


class PixelAccuracy(_Binarised):
    """Mean over examples of :func:`captum_concepts.metrics.pixel_accuracy`."""

    def per_example(self, maps: Tensor, masks: Tensor, ignore: Tensor | None = None) -> Tensor:
        return pixel_accuracy(maps, masks, threshold=self.threshold, **self._shared(ignore))


class MeanIoU(_Binarised):
    """Mean over both classes of summed intersections over summed unions (:func:`captum_concepts.metrics.mean_iou`).

    Example:
        >>> import torch
        >>> metric = MeanIoU(threshold=0.5)
        >>> metric.update(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1, 1]]]))
        >>> metric.update(torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0, 0]]]))
        >>> metric.compute()  # foreground 1/2, background 2/3
        tensor(0.5833)
    """

    width = 4

    def per_example(self, maps: Tensor, masks: Tensor, ignore: Tensor | None = None) -> Tensor:
        return segmentation_counts(
            maps, masks, threshold=self.threshold, nan_policy=self.nan_policy, **self._shared(ignore)
        )

    def statistics(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """As in :class:`ExampleMetric`; under ``nan_policy="zero"``, ``skipped`` counts the maps that were replaced."""
        total, counted, skipped = super().statistics(*args, **kwargs)
        if self.nan_policy == "zero":
            skipped = self._with_nan(*args, **kwargs).sum(1)
        return total, counted, skipped

    def _with_nan(self, maps: Tensor, masks: Tensor, ignore: Tensor | None = None) -> Tensor:
        rows = segmentation_counts(maps, masks, threshold=self.threshold, **self._shared(ignore))
        return rows.isnan().any(-1).reshape(len(rows), -1)

    @staticmethod
    def reduce(total: Tensor, counted: Tensor) -> Tensor:  # noqa: ARG004
        return mean_of_ious(total)


class AveragePrecision(_MapMetric):
    """Mean over examples of :func:`captum_concepts.metrics.average_precision` (mAP)."""

    def __init__(self, *, classes: str = "both", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classes = classes

    def per_example(self, maps: Tensor, masks: Tensor, ignore: Tensor | None = None) -> Tensor:
        return average_precision(maps, masks, classes=self.classes, **self._shared(ignore))


class BoxIoU(_MapMetric):
    """Mean :func:`captum_concepts.metrics.box_iou` of the box around a map and that around the mask.

    Example:
        >>> import torch
        >>> heat, mask = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4).bool()
        >>> heat[0, :2], mask[0, :2, :2] = 1, True
        >>> metric = BoxIoU()
        >>> metric(heat, mask)
        tensor(0.5000)
        >>> right = torch.arange(4).expand(1, 4, 4) >= 2
        >>> metric(heat, mask, right)
        tensor(1.)
    """

    def __init__(self, *, threshold: float = 0.2, component: str = "largest", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = threshold
        self.component = component

    def per_example(self, maps: Tensor, masks: Tensor, ignore: Tensor | None = None) -> Tensor:
        options: dict[str, Any] = {"threshold": self.threshold, "component": self.component}
        return box_iou(maps, masks, **options, **self._shared(ignore))
