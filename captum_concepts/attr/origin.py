"""Which model and layer a saved method belongs to."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from captum_concepts.activations import Layers
from captum_concepts.errors import ArtifactError, LayerError
from captum_concepts.store.manifest import fingerprint_module

Method = TypeVar("Method", bound=Any)


def origin(layers: Layers) -> dict[str, str]:
    """The name of the layer and a digest of the model's class, parameters and dtypes."""
    return {"layer": layers.names[0], "model": fingerprint_module(layers.model or layers.modules[0])}


def check_origin(path: str | os.PathLike[str], make: Callable[[], Method], info: Mapping[str, Any]) -> Method:
    """The object that ``make`` constructs, if its layer and model are those that a file was saved for.

    Raises:
        ArtifactError: the layer or the model differs; the message reports which.
    """
    try:
        made = make()
        layers = Layers.resolve(made.forward_func, made.layer)
    except LayerError as error:
        raise ArtifactError(f"{path} was fitted on layer {info['layer']!r}: {error}") from error
    found = origin(layers)
    if found["layer"] != info["layer"]:
        raise ArtifactError(
            f"{path} was fitted on layer {info['layer']!r}, not {found['layer']!r}; fit again for that layer"
        )
    if found["model"] != info["model"]:
        raise ArtifactError(
            f"{path} was fitted on another model: class, parameters or dtype of this one differ; fit again on it"
        )
    return made
