"""How well maps find regions and how much they move scores: pure functions and streaming metrics.

Functions return one value for each example, except ``hit_rate`` and ``mean_iou``, which are quantities of a data
set. Every function has a streaming class; ``evaluate`` runs explainers over a data set into a table.

Names are imported when first used: the functions alone do not load torchmetrics.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_MODULES = {
    "_prepare": ("resize_maps",),
    "baselines": ("CenterGaussian", "RandomMaps", "activation_energy", "center_gaussian"),
    "energy": ("epg", "pointing_game"),
    "evaluation": ("METRICS", "evaluate"),
    "perturbation": ("average_drop", "deletion", "increase_in_confidence", "insertion"),
    "region": ("hit_rate", "nra", "region_auc", "specificity"),
    "sanity": ("SanityResult", "label_randomization", "parameter_randomization", "rank_correlation"),
    "segmentation": ("average_precision", "iou", "mean_iou", "pixel_accuracy", "segmentation_counts"),
    "streaming": ("ExampleMetric",),
    "streaming_maps": (
        "AveragePrecision",
        "EnergyPointingGame",
        "HitRate",
        "IoU",
        "MeanIoU",
        "NormalizedRegionAccuracy",
        "PixelAccuracy",
        "PointingGame",
        "RegionAUC",
        "Specificity",
    ),
    "streaming_scores": ("AverageDrop", "Deletion", "IncreaseInConfidence", "Insertion"),
    "table": ("EvaluationTable",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [*_HOME]

if TYPE_CHECKING:
    from captum_concepts.metrics._prepare import resize_maps as resize_maps
    from captum_concepts.metrics.baselines import (
        CenterGaussian as CenterGaussian,
    )
    from captum_concepts.metrics.baselines import (
        RandomMaps as RandomMaps,
    )
    from captum_concepts.metrics.baselines import (
        activation_energy as activation_energy,
    )
    from captum_concepts.metrics.baselines import (
        center_gaussian as center_gaussian,
    )
    from captum_concepts.metrics.energy import epg as epg
    from captum_concepts.metrics.energy import pointing_game as pointing_game
    from captum_concepts.metrics.evaluation import METRICS as METRICS
    from captum_concepts.metrics.evaluation import evaluate as evaluate
    from captum_concepts.metrics.perturbation import (
        average_drop as average_drop,
    )
    from captum_concepts.metrics.perturbation import (
        deletion as deletion,
    )
    from captum_concepts.metrics.perturbation import (
        increase_in_confidence as increase_in_confidence,
    )
    from captum_concepts.metrics.perturbation import (
        insertion as insertion,
    )
    from captum_concepts.metrics.region import (
        hit_rate as hit_rate,
    )
    from captum_concepts.metrics.region import (
        nra as nra,
    )
    from captum_concepts.metrics.region import (
        region_auc as region_auc,
    )
    from captum_concepts.metrics.region import (
        specificity as specificity,
    )
    from captum_concepts.metrics.sanity import (
        SanityResult as SanityResult,
    )
    from captum_concepts.metrics.sanity import (
        label_randomization as label_randomization,
    )
    from captum_concepts.metrics.sanity import (
        parameter_randomization as parameter_randomization,
    )
    from captum_concepts.metrics.sanity import (
        rank_correlation as rank_correlation,
    )
    from captum_concepts.metrics.segmentation import (
        average_precision as average_precision,
    )
    from captum_concepts.metrics.segmentation import (
        iou as iou,
    )
    from captum_concepts.metrics.segmentation import (
        mean_iou as mean_iou,
    )
    from captum_concepts.metrics.segmentation import (
        pixel_accuracy as pixel_accuracy,
    )
    from captum_concepts.metrics.segmentation import (
        segmentation_counts as segmentation_counts,
    )
    from captum_concepts.metrics.streaming import ExampleMetric as ExampleMetric
    from captum_concepts.metrics.streaming_maps import (
        AveragePrecision as AveragePrecision,
    )
    from captum_concepts.metrics.streaming_maps import (
        EnergyPointingGame as EnergyPointingGame,
    )
    from captum_concepts.metrics.streaming_maps import (
        HitRate as HitRate,
    )
    from captum_concepts.metrics.streaming_maps import (
        IoU as IoU,
    )
    from captum_concepts.metrics.streaming_maps import (
        MeanIoU as MeanIoU,
    )
    from captum_concepts.metrics.streaming_maps import (
        NormalizedRegionAccuracy as NormalizedRegionAccuracy,
    )
    from captum_concepts.metrics.streaming_maps import (
        PixelAccuracy as PixelAccuracy,
    )
    from captum_concepts.metrics.streaming_maps import (
        PointingGame as PointingGame,
    )
    from captum_concepts.metrics.streaming_maps import (
        RegionAUC as RegionAUC,
    )
    from captum_concepts.metrics.streaming_maps import (
        Specificity as Specificity,
    )
    from captum_concepts.metrics.streaming_scores import (
        AverageDrop as AverageDrop,
    )
    from captum_concepts.metrics.streaming_scores import (
        Deletion as Deletion,
    )
    from captum_concepts.metrics.streaming_scores import (
        IncreaseInConfidence as IncreaseInConfidence,
    )
    from captum_concepts.metrics.streaming_scores import (
        Insertion as Insertion,
    )
    from captum_concepts.metrics.table import EvaluationTable as EvaluationTable


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
