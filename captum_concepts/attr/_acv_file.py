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
_SETTINGS = ("layout", "prefix_tokens", "batch_size")


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
        "settings": {name: settings[name] for name in _SETTINGS},
    }
    return save_artifact(path, _FORMAT, info, {n: v for n in _TENSORS if (v := getattr(fitted, n)) is not None})


def load(
    path: str | os.PathLike[str], kind: Callable[..., Any], forward_func: Callable[..., Any], layer: Layer | None
) -> Any:
    """The fitted explainer, after checking that the file belongs to ``forward_func`` and ``layer``."""
    with open_artifact(path, _FORMAT, "a saved SpatialACV", allowed=_TENSORS) as (info, tensors):
        fields: dict[str, Any] = {name: tensors.get(name) for name in _TENSORS}
        fitted = FittedVectors(tuple(info["names"]), rows=info["rows"], of_input=info["of_input"] is True, **fields)
        _check(fitted)
        if not (isinstance(info["layer"], str) and isinstance(info["model"], str)):
            raise ValueError("it does not say its layer and model")
        settings = _settings(info["settings"])
    chosen: Layer = info["layer"] if layer is None else layer
    _check_origin(Path(path), info, forward_func, chosen)
    loaded = kind(forward_func, chosen, **settings)
    loaded._fitted = fitted
    return loaded


def _check(fitted: FittedVectors) -> None:
    names, k = fitted.names, len(fitted.names)
    given = {name: value for name in _TENSORS if (value := getattr(fitted, name)) is not None}
    shapes = {name: tuple(value.shape) for name, value in given.items()}
    wanted: dict[str, tuple[int, ...]] = dict.fromkeys(_TENSORS, (k,))
    wanted |= {"vectors": (k, *shapes.get("vectors", ())[1:2]), "intervals": (k, 2)}
    if not k or shapes != {name: wanted[name] for name in _TENSORS if name in shapes or name != "p_values"}:
        raise ValueError(f"{k} concepts do not fit tensors of shapes {shapes}")
    if not all(isinstance(name, str) and isinstance(fitted.rows.get(name), dict) for name in names):
        raise ValueError("concepts need names and counts of their rows")
    if not all(value.is_floating_point() for value in given.values()):
        raise ValueError("its tensors are no floating-point numbers")


def _settings(found: dict[str, Any]) -> dict[str, Any]:
    settings = {name: found[name] for name in _SETTINGS}
    counts = [settings["batch_size"], *([] if settings["prefix_tokens"] is None else [settings["prefix_tokens"]])]
    if not isinstance(settings["layout"], str) or not all(type(count) is int for count in counts):
        raise ValueError(f"bad settings {settings}")
    return settings


def _check_origin(path: Path, info: dict[str, Any], forward_func: Callable[..., Any], chosen: Layer) -> None:
    saved_layer, saved_model = info["layer"], info["model"]
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


def _fingerprint(forward_func: Callable[..., Any], module: nn.Module) -> str:
    model = find_model(forward_func)
    return fingerprint_module(module if model is None else model)
