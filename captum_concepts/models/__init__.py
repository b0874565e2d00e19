"""Trainable models: the translator of CE-FAM and the concept bottleneck model SALF-CBM.

Names are imported when first used, so the translator does not load the bottleneck model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from captum_concepts import _lazy

if TYPE_CHECKING:
    from captum_concepts.models.concept_translator import ConceptTranslator, FitResult, Training, fit_translator
    from captum_concepts.models.salf_cbm import SALFCBM
    from captum_concepts.models.salf_cbm.fit import BottleneckSettings, fit_salf_cbm, plan_salf_cbm

__all__ = [
    "SALFCBM",
    "BottleneckSettings",
    "ConceptTranslator",
    "FitResult",
    "Training",
    "fit_salf_cbm",
    "fit_translator",
    "plan_salf_cbm",
]

__getattr__ = _lazy.getter(
    __name__,
    {
        "BottleneckSettings": "salf_cbm.fit",
        "ConceptTranslator": "concept_translator",
        "FitResult": "concept_translator",
        "SALFCBM": "salf_cbm",
        "Training": "concept_translator",
        "fit_salf_cbm": "salf_cbm.fit",
        "fit_translator": "concept_translator",
        "plan_salf_cbm": "salf_cbm.fit",
    },
)
