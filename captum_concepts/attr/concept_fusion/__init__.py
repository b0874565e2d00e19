"""CE-FAM: concepts of a classifier through a translator to a vision-language model."""

from captum_concepts.attr.concept_fusion.concept_fusion_map import ConceptFusionMap

__all__ = ["ConceptFusionMap"]
