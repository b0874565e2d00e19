"""Activation maps (N, C, h, w) of the layers of any architecture."""

from captum_concepts._captum import output_tensor
from captum_concepts._undo import evaluation_mode, hooked
from captum_concepts.activations.attention import attention_maps
from captum_concepts.activations.capture import (
    Captured,
    Inputs,
    check_images,
    eager_mode,
    final_activation,
    forward_arguments,
    gradients_enabled,
    input_errors,
    read_layer,
)
from captum_concepts.activations.layers import (
    Layer,
    Layers,
    SpatialActivations,
    capture,
    find_model,
    full_precision,
    layer_name,
    resolve_layer,
    spatial_activations,
    unwrap,
)
from captum_concepts.activations.layout import LAYOUTS, Layout, infer_layout
from captum_concepts.activations.survey import (
    SurveyedLayer,
    followed_by_linear,
    suggest_layer,
    suggest_stages,
    survey_layers,
)

__all__ = [
    "LAYOUTS",
    "Captured",
    "Inputs",
    "Layer",
    "Layers",
    "Layout",
    "SpatialActivations",
    "SurveyedLayer",
    "attention_maps",
    "capture",
    "check_images",
    "eager_mode",
    "evaluation_mode",
    "final_activation",
    "find_model",
    "followed_by_linear",
    "forward_arguments",
    "full_precision",
    "gradients_enabled",
    "hooked",
    "infer_layout",
    "input_errors",
    "layer_name",
    "output_tensor",
    "read_layer",
    "resolve_layer",
    "spatial_activations",
    "suggest_layer",
    "suggest_stages",
    "survey_layers",
    "unwrap",
]
