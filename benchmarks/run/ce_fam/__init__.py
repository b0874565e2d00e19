"""ConceptFusionMap."""
