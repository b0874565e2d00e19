"""Trainable parts: the translator of CE-FAM, and the concept bottleneck model SALF-CBM."""

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
