"""Concept-based attribution: what concepts a vision model detected, where, and how much they changed the prediction.

Names are imported on first use, so ``import captum_concepts`` itself loads neither captum, open_clip nor matplotlib.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from captum_concepts import _lazy

__version__ = "0.1.0"

_NAMES = {
    "ConceptExplanation": "explanation",
    "ConceptFusionMap": "attr.concept_fusion_map",
    "ConceptTranslator": "models.concept_translator",
    "FeatureActivationMap": "attr.feature_activation_map",
    "SALFCBM": "models.salf_cbm",
    "SpatialACV": "attr.spatial_acv",
    "audit_dataset": "audit.concept_audit",
    "compare_audits": "audit.comparison",
    "discover_concepts": "attr.discovered_concepts",
    "explore": "visualization.explorer",
    "fit_salf_cbm": "models.salf_cbm.fit",
    "load": "attr.saved",
}
_ROOMS = (
    *("audit", "concepts", "datasets", "demo", "errors", "images", "metrics", "published", "solvers", "store"),
    *("targets", "testing", "visualization", "vlm"),
)

__all__ = ["__version__", *_NAMES, *_ROOMS]

if TYPE_CHECKING:
    from captum_concepts.attr.concept_fusion_map import ConceptFusionMap as ConceptFusionMap
    from captum_concepts.attr.discovered_concepts import discover_concepts as discover_concepts
    from captum_concepts.attr.feature_activation_map import FeatureActivationMap as FeatureActivationMap
    from captum_concepts.attr.saved import load as load
    from captum_concepts.attr.spatial_acv import SpatialACV as SpatialACV
    from captum_concepts.audit.comparison import compare_audits as compare_audits
    from captum_concepts.audit.concept_audit import audit_dataset as audit_dataset
    from captum_concepts.explanation import ConceptExplanation as ConceptExplanation
    from captum_concepts.models.concept_translator import ConceptTranslator as ConceptTranslator
    from captum_concepts.models.salf_cbm import SALFCBM as SALFCBM
    from captum_concepts.models.salf_cbm.fit import fit_salf_cbm as fit_salf_cbm
    from captum_concepts.visualization.explorer import explore as explore


__getattr__ = _lazy.getter(__name__, {**_NAMES, **dict(zip(_ROOMS, _ROOMS, strict=True))})


def __dir__() -> list[str]:
    return sorted(__all__)
