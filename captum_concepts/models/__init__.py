"""Trainable parts: the translator of CE-FAM, and the concept bottleneck model SALF-CBM."""

from captum_concepts.models.concept_translator import ConceptTranslator
from captum_concepts.models.concept_translator_fit import FitResult, fit_translator
from captum_concepts.models.salf_cbm import SALFCBM

__all__ = [
    "SALFCBM",
    "ConceptTranslator",
    "FitResult",
    "fit_translator",
]
