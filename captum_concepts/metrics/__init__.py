"""How well maps find regions and how much they move scores: pure functions and streaming metrics.

Functions return one value for each example, except ``hit_rate`` and ``mean_iou``, which are quantities of a data
set. Every function has a streaming class; ``evaluate`` runs explainers over a data set into a table.
"""

from __future__ import annotations

from captum_concepts.metrics._prepare import resize_maps
from captum_concepts.metrics.baselines import CenterGaussian, RandomMaps, activation_energy, center_gaussian
from captum_concepts.metrics.energy import epg, pointing_game
from captum_concepts.metrics.evaluate import METRICS, evaluate
from captum_concepts.metrics.perturbation import average_drop, deletion, increase_in_confidence, insertion
from captum_concepts.metrics.region import hit_rate, nra, region_auc, specificity
from captum_concepts.metrics.sanity import (
    SanityResult,
    label_randomization,
    parameter_randomization,
    rank_correlation,
)
from captum_concepts.metrics.segmentation import (
    average_precision,
    iou,
    mean_iou,
    pixel_accuracy,
    segmentation_counts,
)
from captum_concepts.metrics.streaming import ExampleMetric
from captum_concepts.metrics.streaming_maps import (
    AveragePrecision,
    EnergyPointingGame,
    HitRate,
    IoU,
    MeanIoU,
    NormalizedRegionAccuracy,
    PixelAccuracy,
    PointingGame,
    RegionAUC,
    Specificity,
)
from captum_concepts.metrics.streaming_scores import AverageDrop, Deletion, IncreaseInConfidence, Insertion
from captum_concepts.metrics.table import EvaluationTable

__all__ = [
    "METRICS",
    "AverageDrop",
    "AveragePrecision",
    "CenterGaussian",
    "Deletion",
    "EnergyPointingGame",
    "EvaluationTable",
    "ExampleMetric",
    "HitRate",
    "IncreaseInConfidence",
    "Insertion",
    "IoU",
    "MeanIoU",
    "NormalizedRegionAccuracy",
    "PixelAccuracy",
    "PointingGame",
    "RandomMaps",
    "RegionAUC",
    "SanityResult",
    "Specificity",
    "activation_energy",
    "average_drop",
    "average_precision",
    "center_gaussian",
    "deletion",
    "epg",
    "evaluate",
    "hit_rate",
    "increase_in_confidence",
    "insertion",
    "iou",
    "label_randomization",
    "mean_iou",
    "nra",
    "parameter_randomization",
    "pixel_accuracy",
    "pointing_game",
    "rank_correlation",
    "region_auc",
    "resize_maps",
    "segmentation_counts",
    "specificity",
]
