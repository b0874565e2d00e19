"""Spatial Activation Concept Vectors: where a layer encodes a concept, and where it moves the prediction."""

from captum_concepts.attr.spatial_acv.spatial_acv import SpatialACV

__all__ = ["SpatialACV"]
