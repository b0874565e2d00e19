"""CE-FAM: concepts of a classifier, from a translator to the embedding space of a vision-language model."""

from captum_concepts.attr.concept_fusion.concept_fusion_map import ConceptFusionMap

__all__ = ["ConceptFusionMap"]
