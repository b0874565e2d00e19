"""A fitted SpatialACV as one file: safetensors, names and statistics as JSON in its header."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from captum_concepts._artifacts import open_artifact, save_artifact
from captum_concepts.activations import find_model, layer_name, resolve_layer
from captum_concepts.activations.capture import Layer
from captum_concepts.attr._acv_state import FittedVectors
from captum_concepts.errors import ArtifactError, LayerError
from captum_concepts.store.manifest import fingerprint_module

_FORMAT = "captum_concepts.SpatialACV/1"
_TENSORS = ("vectors", "slopes", "intercepts", "accuracies", "intervals", "contrasts", "p_values")


def save(
    path: str | os.PathLike[str],
    fitted: FittedVectors,
    forward_func: Callable[..., Any],
    layer: Layer,
    settings: dict[str, Any],
) -> Path:
    """Write everything of ``fitted`` and what it belongs to."""
    module = resolve_layer(forward_func, layer)
    info = {
        "names": fitted.names,
        "rows": fitted.rows,
        "of_input": fitted.of_input,
        "layer": layer_name(forward_func, module),
        "model": _fingerprint(forward_func, module),
        "settings": settings,
    }
    return save_artifact(path, _FORMAT, info, {n: v for n in _TENSORS if (v := getattr(fitted, n)) is not None})


def load(
    path: str | os.PathLike[str], forward_func: Callable[..., Any], layer: Layer | None
) -> tuple[FittedVectors, Layer, dict[str, Any]]:
    """The fitted state, the layer and the constructor's settings, after checking that they belong to the model."""
    with open_artifact(path, _FORMAT, "a saved SpatialACV", allowed=_TENSORS) as (info, tensors):
        fields: dict[str, Any] = {name: tensors.get(name) for name in _TENSORS}
        fitted = FittedVectors(tuple(info["names"]), rows=info["rows"], of_input=info["of_input"], **fields)
        k = len(fitted.names)
        wrong = [name for name in _TENSORS if (v := getattr(fitted, name)) is not None and len(v) != k]
        if wrong or any(name not in tensors for name in _TENSORS[:-1]):
            raise ArtifactError(f"{path} does not hold {k} concepts in all of its tensors")
        saved_layer, saved_model, settings = info["layer"], info["model"], info["settings"]
    chosen: Layer = saved_layer if layer is None else layer
    try:
        module = resolve_layer(forward_func, chosen)
    except LayerError as error:
        raise ArtifactError(f"{path} was fitted on layer {saved_layer!r}: {error}") from error
    name = layer_name(forward_func, module)
    if name != saved_layer:
        raise ArtifactError(f"{path} was fitted on layer {saved_layer!r}, not {name!r}; fit again for that layer")
    if _fingerprint(forward_func, module) != saved_model:
        raise ArtifactError(
            f"{path} was fitted on another model: class, parameters or dtype of this one differ; fit again on it"
        )
    return fitted, chosen, settings


def _fingerprint(forward_func: Callable[..., Any], module: nn.Module) -> str:
    model = find_model(forward_func)
    return fingerprint_module(module if model is None else model)
