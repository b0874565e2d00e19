"""Loading, generating, cleaning and filtering of concept lists, with a reason for each dropped concept."""

from captum_concepts.concepts._report import Drop, VocabularyReport
from captum_concepts.concepts.filters import (
    drop_absent,
    drop_class_names,
    drop_duplicates,
    drop_similar,
    drop_similar_to_classes,
    drop_too_long,
)
from captum_concepts.concepts.generator import PROMPTS, ConceptGenerator, generate_concepts, parse_list
from captum_concepts.concepts.similarity import TextSimilarity, embed_texts
from captum_concepts.concepts.vocabulary import CLASS_TEMPLATE, Vocabulary

__all__ = [
    "CLASS_TEMPLATE",
    "PROMPTS",
    "ConceptGenerator",
    "Drop",
    "TextSimilarity",
    "Vocabulary",
    "VocabularyReport",
    "drop_absent",
    "drop_class_names",
    "drop_duplicates",
    "drop_similar",
    "drop_similar_to_classes",
    "drop_too_long",
    "embed_texts",
    "generate_concepts",
    "parse_list",
]
