"""From a model and a layer to activation maps (N, C, h, w), whatever the architecture."""

from captum_concepts.activations.capture import (
    Captured,
    capture,
    check_images,
    evaluation_mode,
    find_model,
    gradients_enabled,
    layer_name,
    resolve_layer,
)
from captum_concepts.activations.layout import Layout, infer_layout
from captum_concepts.activations.spatial import SpatialActivations, spatial_activations

__all__ = [
    "Captured",
    "Layout",
    "SpatialActivations",
    "capture",
    "check_images",
    "evaluation_mode",
    "find_model",
    "gradients_enabled",
    "infer_layout",
    "layer_name",
    "resolve_layer",
    "spatial_activations",
]
