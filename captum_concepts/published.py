"""The papers' own settings, by method: what to pass where a number has to be comparable with a published one.

The defaults of this package differ from the papers where something measured better, was less fragile, or costs less;
``docs/published.md`` lists each difference. Use these dictionaries as keyword arguments:

>>> from captum_concepts import metrics, published
>>> sorted(published.NRA)
['baseline', 'signed', 'thresholds']
"""

from __future__ import annotations

from typing import Any

#: ``metrics.nra``: the line of the paper as lower bound, on the grid of the authors' code (CE-FAM, ICCV 2025).
NRA: dict[str, Any] = {"baseline": "published", "signed": False, "thresholds": "authors"}
#: ``metrics.insertion`` of images of 224 pixels (RISE, BMVC 2018): one row of pixels per step into the blurred image.
INSERTION: dict[str, Any] = {"n_steps": 224, "baseline": "blur"}
#: ``metrics.deletion`` of images of 224 pixels (RISE, BMVC 2018).
DELETION: dict[str, Any] = {"n_steps": 224, "baseline": "zero"}
#: ``FeatureActivationMap`` (FAM, 2023).
FEATURE_ACTIVATION_MAP: dict[str, Any] = {
    "similarity": "cosine",
    "normalize": "minmax",
    "weights": "contribution",
    "refine": False,
}
#: ``SpatialACV.fit`` (SACV, 2022): the penalty of the authors' notebook and, up to a million, all rows; with
#: ``SpatialACV(..., refine=False)``. The notebook fits a random 75 % of the rows.
SPATIAL_ACV_FIT: dict[str, Any] = {"lam": "published", "max_rows": 1_000_000}
#: ``metrics.average_drop`` and ``metrics.increase_in_confidence`` (Grad-CAM++, WACV 2018).
AVERAGE_DROP: dict[str, Any] = {"scores": "probability", "baseline": "zero", "normalize": True}
#: ``metrics.iou``, ``pixel_accuracy``, ``mean_iou``: the ImageNet-segmentation protocol (Chefer et al., CVPR 2021).
SEGMENTATION: dict[str, Any] = {"threshold": "mean"}
