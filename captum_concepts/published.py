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
#: ``metrics.average_drop`` and ``metrics.increase_in_confidence`` (Grad-CAM++, WACV 2018).
AVERAGE_DROP: dict[str, Any] = {"scores": "probability", "baseline": "zero", "normalize": True}
#: ``metrics.iou``, ``pixel_accuracy``, ``mean_iou``: the ImageNet-segmentation protocol (Chefer et al., CVPR 2021).
SEGMENTATION: dict[str, Any] = {"threshold": "mean"}
#: ``ConceptFusionMap`` (CE-FAM, ICCV 2025): the paper's map, scores, relevance and contributions.
CONCEPT_FUSION_MAP: dict[str, Any] = {
    "map_layer": "auto",
    "gradient": "total",
    "n_channels": 20,
    "channel_share": 1.0,
    "fill": "layer_mean",
    "calibrated": False,
}
#: ``ConceptFusionMap.fit``: the paper's optimizer and loss. Images are not augmented anew in every epoch as in the
#: authors' code: ``crops`` are drawn once for each image.
CONCEPT_FUSION_FIT: dict[str, Any] = {
    "training": {"optimizer": "sgd", "epochs": 150, "batch_size": 128, "patience": 4},
    "similarity_weight": 1e-3,
}
