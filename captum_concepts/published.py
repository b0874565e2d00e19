"""Settings of the papers by method, for results that must be comparable with published ones.

The defaults of this package differ from the papers where an alternative performed better, was more robust, or cost
less; ``docs/published.md`` lists each difference. Use these dictionaries as keyword arguments:

>>> from captum_concepts import metrics, published
>>> sorted(published.NRA)
['baseline', 'signed', 'thresholds']
"""

from __future__ import annotations

from typing import Any

#: ``vlm.RegionPrompt`` (SALF-CBM, CVPR 2025, section 3.2 and Algorithm 1), for images of 224 pixels. Centers are those
#: of the text, 0, 37, ..., 222; the loop bounds printed in Algorithm 1 would yield a 5 x 5 grid.
REGION_PROMPT: dict[str, Any] = {
    "kind": "circle",
    "grid": (7, 7),
    "radius": 32.0,
    "placement": "paper",
    "color": "red",
    "width": 2.0,
}
#: ``fit_salf_cbm``, with ``prompt=RegionPrompt(**REGION_PROMPT)`` and a row of ``SALF_CBM_DATA``. The paper does not
#: state the optimizer and the number of epochs of the bottleneck, for which this package's defaults apply.
FIT_SALF_CBM: dict[str, Any] = {
    "head": "sparse",
    "alpha": 0.99,
    "interpretability_cutoff": 0.45,
    "bottleneck": {"init": "random"},
}
#: ``fit_salf_cbm`` by data set: the regularization of the sparse head and the minimum presence of a concept, from the
#: public commands of LF-CBM, whose settings SALF-CBM adopts.
SALF_CBM_DATA: dict[str, dict[str, Any]] = {
    "CUB-200": {"lam": 0.0002, "presence_cutoff": 0.26},
    "Places365": {"lam": 0.0003, "presence_cutoff": 0.28},
    "ImageNet": {"lam": 0.0001, "presence_cutoff": 0.28},
}
#: ``SALFCBM.explain_region``: the plain sum of the maps over the region's pixels.
EXPLAIN_REGION: dict[str, Any] = {"units": "map", "reduction": "sum"}
#: ``SALFCBM.intervene``: beta is added to the map without scaling (1 in the paper's case study).
INTERVENE: dict[str, Any] = {"units": "map"}
#: ``SALFCBM.zero_shot_segmentation``: binarized at the heatmap's own mean.
ZERO_SHOT_SEGMENTATION: dict[str, Any] = {"threshold": "mean"}
#: ``metrics.nra``: the paper's line as the lower bound, on the grid of the authors' code (CE-FAM, ICCV 2025).
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
#: ``SpatialACV.fit`` (SACV, 2022): the penalty of the authors' notebook, and all rows up to a million; use it with
#: ``SpatialACV(..., refine=False)``. The notebook fits a random 75 % of the rows.
SPATIAL_ACV_FIT: dict[str, Any] = {"lam": "published", "max_rows": 1_000_000}
#: ``metrics.average_drop`` and ``metrics.increase_in_confidence`` (Grad-CAM++, WACV 2018).
AVERAGE_DROP: dict[str, Any] = {"scores": "probability", "baseline": "zero", "normalize": True}
#: ``metrics.iou``, ``pixel_accuracy``, ``mean_iou``: the ImageNet-segmentation protocol (Chefer et al., CVPR 2021).
SEGMENTATION: dict[str, Any] = {"threshold": "mean"}
#: ``ConceptFusionMap`` (CE-FAM, ICCV 2025): the paper's maps, scores, relevance and contributions.
CONCEPT_FUSION_MAP: dict[str, Any] = {
    "map_layer": "auto",
    "gradient": "total",
    "n_channels": 20,
    "channel_share": 1.0,
    "fill": "layer_mean",
    "calibrated": False,
}
#: ``ConceptFusionMap.fit``: the paper's optimizer and loss. Unlike in the authors' code, images are not augmented in
#: every epoch; ``crops`` are drawn once per image.
CONCEPT_FUSION_FIT: dict[str, Any] = {
    "training": {"optimizer": "sgd", "epochs": 150, "batch_size": 128, "patience": 4},
    "similarity_weight": 1e-3,
}
