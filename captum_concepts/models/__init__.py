"""Trainable parts: the translator of CE-FAM."""

from captum_concepts.models.concept_translator import ConceptTranslator
from captum_concepts.models.concept_translator_fit import FitResult, fit_translator

__all__ = ["ConceptTranslator", "FitResult", "fit_translator"]
