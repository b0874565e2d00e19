"""Metrics of concept maps, scores and contributions, as pure functions and as streaming ``torchmetrics`` classes.

Functions return one value per example, except ``hit_rate`` and ``mean_iou``, which return one value for the whole data
set. ``evaluate`` runs explainers over a data set and returns a table.

Names are imported on first use, so the functions alone do not load torchmetrics.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_MODULES = {
    "_prepare": ("resize_maps",),
    "baselines": ("CenterGaussian", "RandomMaps", "activation_energy", "center_gaussian"),
    "bottlenecks": (
        "concept_existence",
        "concept_location",
        "concept_task_leakage",
        "interconcept_leakage",
        "surf",
    ),
    "boxes": ("box_from_map", "box_iou"),
    "energy": ("epg", "pointing_game"),
    "evaluation": ("METRICS", "evaluate"),
    "perturbation": ("average_drop", "deletion", "increase_in_confidence", "insertion"),
    "region": ("hit_rate", "nra", "region_auc", "concept_specificity"),
    "sanity": ("SanityResult", "label_randomization", "parameter_randomization", "rank_correlation"),
    "segmentation": ("average_precision", "iou", "mean_iou", "pixel_accuracy", "segmentation_counts"),
    "streaming": ("ExampleMetric",),
    "streaming_maps": (
        "AveragePrecision",
        "BoxIoU",
        "EnergyPointingGame",
        "HitRate",
        "IoU",
        "MeanIoU",
        "NormalizedRegionAccuracy",
        "PixelAccuracy",
        "PointingGame",
        "RegionAUC",
        "ConceptSpecificity",
    ),
    "streaming_scores": ("AverageDrop", "Deletion", "IncreaseInConfidence", "Insertion"),
    "streaming_words": ("ConceptAUROC", "ConceptExistence", "PresenceBrier", "Top1Present"),
    "table": ("EvaluationTable",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [*_HOME]

if TYPE_CHECKING:
    from captum_concepts.metrics._prepare import resize_maps as resize_maps
    from captum_concepts.metrics.baselines import (
        CenterGaussian as CenterGaussian,
        RandomMaps as RandomMaps,
        activation_energy as activation_energy,
        center_gaussian as center_gaussian,
    )
    from captum_concepts.metrics.bottlenecks import (
        concept_existence as concept_existence,
        concept_location as concept_location,
        concept_task_leakage as concept_task_leakage,
        interconcept_leakage as interconcept_leakage,
        surf as surf,
    )
    from captum_concepts.metrics.boxes import box_from_map as box_from_map, box_iou as box_iou
    from captum_concepts.metrics.energy import epg as epg, pointing_game as pointing_game
    from captum_concepts.metrics.evaluation import METRICS as METRICS, evaluate as evaluate
    from captum_concepts.metrics.perturbation import (
        average_drop as average_drop,
        deletion as deletion,
        increase_in_confidence as increase_in_confidence,
        insertion as insertion,
    )
    from captum_concepts.metrics.region import (
        concept_specificity as concept_specificity,
        hit_rate as hit_rate,
        nra as nra,
        region_auc as region_auc,
    )
    from captum_concepts.metrics.sanity import (
        SanityResult as SanityResult,
        label_randomization as label_randomization,
        parameter_randomization as parameter_randomization,
        rank_correlation as rank_correlation,
    )
    from captum_concepts.metrics.segmentation import (
        average_precision as average_precision,
        iou as iou,
        mean_iou as mean_iou,
        pixel_accuracy as pixel_accuracy,
        segmentation_counts as segmentation_counts,
    )
    from captum_concepts.metrics.streaming import ExampleMetric as ExampleMetric
    from captum_concepts.metrics.streaming_maps import (
        AveragePrecision as AveragePrecision,
        BoxIoU as BoxIoU,
        ConceptSpecificity as ConceptSpecificity,
        EnergyPointingGame as EnergyPointingGame,
        HitRate as HitRate,
        IoU as IoU,
        MeanIoU as MeanIoU,
        NormalizedRegionAccuracy as NormalizedRegionAccuracy,
        PixelAccuracy as PixelAccuracy,
        PointingGame as PointingGame,
        RegionAUC as RegionAUC,
    )
    from captum_concepts.metrics.streaming_scores import (
        AverageDrop as AverageDrop,
        Deletion as Deletion,
        IncreaseInConfidence as IncreaseInConfidence,
        Insertion as Insertion,
    )
    from captum_concepts.metrics.streaming_words import (
        ConceptAUROC as ConceptAUROC,
        ConceptExistence as ConceptExistence,
        PresenceBrier as PresenceBrier,
        Top1Present as Top1Present,
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
