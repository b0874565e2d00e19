"""Moved to :mod:`captum_concepts.activations`."""

from captum_concepts.activations.layers import (
    SpatialActivations,
    any_reading,
    full_precision,
    spatial_activations,
)

__all__ = ["SpatialActivations", "any_reading", "full_precision", "spatial_activations"]
