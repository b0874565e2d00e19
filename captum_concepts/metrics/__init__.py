"""How well maps find regions and how much they move scores: pure functions and streaming metrics."""

from __future__ import annotations

from captum_concepts.metrics.energy import epg, pointing_game
from captum_concepts.metrics.perturbation import average_drop, deletion, increase_in_confidence, insertion
from captum_concepts.metrics.region import hit_rate, nra, region_auc, specificity
from captum_concepts.metrics.segmentation import average_precision, iou, mean_iou, pixel_accuracy

__all__ = [
    "average_drop",
    "average_precision",
    "deletion",
    "epg",
    "hit_rate",
    "increase_in_confidence",
    "insertion",
    "iou",
    "mean_iou",
    "nra",
    "pixel_accuracy",
    "pointing_game",
    "region_auc",
    "specificity",
]
