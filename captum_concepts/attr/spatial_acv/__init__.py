"""Spatial Activation Concept Vectors, maps of where a layer encodes a concept and where it affects the prediction."""

from captum_concepts.attr.spatial_acv.spatial_acv import SpatialACV

__all__ = ["SpatialACV"]
