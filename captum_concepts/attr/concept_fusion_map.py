"""Import path of :class:`ConceptFusionMap`, which is implemented in :mod:`captum_concepts.attr.concept_fusion`."""

from captum_concepts.attr.concept_fusion.concept_fusion_map import ConceptFusionMap as ConceptFusionMap
