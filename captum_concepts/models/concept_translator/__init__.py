"""The translator of CE-FAM, its training pairs and its training."""

from captum_concepts.models.concept_translator.data import TrainingPairs, collect_pairs
from captum_concepts.models.concept_translator.fit import FitResult, Training, fit_translator
from captum_concepts.models.concept_translator.network import ConceptTranslator

__all__ = ["ConceptTranslator", "FitResult", "Training", "TrainingPairs", "collect_pairs", "fit_translator"]
