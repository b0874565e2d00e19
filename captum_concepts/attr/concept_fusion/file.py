"""A ConceptFusionMap as one file: safetensors, with names and settings as JSON in its header."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from captum_concepts._artifacts import open_artifact, save_artifact
from captum_concepts.activations import find_model, layer_name
from captum_concepts.activations.capture import Layer
from captum_concepts.errors import ArtifactError, InputError, LayerError
from captum_concepts.models.concept_translator.network import ConceptTranslator
from captum_concepts.store.manifest import check_fingerprint, fingerprint_module

_FORMAT = "captum_concepts.ConceptFusionMap/1"
_TEXT = "text_embeddings"


def save(path: str | os.PathLike[str], explainer: Any) -> Path:
    """Write ``explainer`` atomically."""
    translator = explainer.translator
    if not isinstance(translator, ConceptTranslator):
        raise InputError(
            f"only a ConceptTranslator is saved with the map, not {type(translator).__name__}; save its state yourself"
        )
    layer = explainer._layer_index()
    info = {
        "concepts": None if explainer.concepts is None else list(explainer.concepts),
        "layers": [layer_name(explainer.forward_func, one) for one in explainer.layers],
        "layer": explainer.layer if layer is None else layer,
        "options": explainer._options(),
        "in_channels": list(translator.in_channels),
        "embedding_dim": translator.embedding_dim,
        "hidden": list(translator.hidden),
        "history": explainer.history_,
        "model": _model(explainer.forward_func),
    }
    tensors = {f"translator.{name}": v for name, v in translator.state_dict().items()}
    if explainer.text_embeddings is not None:
        tensors[_TEXT] = explainer.text_embeddings
    return save_artifact(path, _FORMAT, info, tensors)


def load(
    path: str | os.PathLike[str],
    kind: Callable[..., Any],
    forward_func: Callable[..., Any],
    layers: Sequence[Layer] | None,
) -> Any:
    """Read it, after checking that it belongs to ``forward_func``."""
    with open_artifact(path, _FORMAT, "a saved ConceptFusionMap") as (info, tensors):
        model = _model(forward_func)
        if model is not None:
            try:
                check_fingerprint({"model": model}, {"model": info["model"] or model}, str(path))
            except ArtifactError as error:
                raise ArtifactError(f"{error}; load the model and weights it was fitted to, or fit again") from error
        chosen: list[Layer] = list(info["layers"] if layers is None else layers)
        try:
            own = [layer_name(forward_func, layer) for layer in chosen]
        except LayerError as error:
            raise ArtifactError(f"{path} was saved for layers that do not exist here: {error}") from error
        check_fingerprint({"layers": own}, info, str(path))
        text = tensors.pop(_TEXT, None)
        with torch.device("meta"):  # sizes come from the file: nothing is allocated before the tensors fit them
            translator = ConceptTranslator(info["in_channels"], info["embedding_dim"], hidden=info["hidden"])
        state = {name.removeprefix("translator."): tensor for name, tensor in tensors.items()}
        translator.load_state_dict(state, assign=True)
        parameter = next(net.parameters(), None) if (net := find_model(forward_func)) is not None else None
        translator.to("cpu" if parameter is None else parameter.device).requires_grad_(False).eval()
        options = info["options"]
        made = kind(forward_func, chosen, translator, info["concepts"], text, layer=info["layer"], **options)
        made.history_ = info["history"]
    return made


def _model(forward_func: Callable[..., Any]) -> str | None:
    model = find_model(forward_func)
    return None if model is None else fingerprint_module(model)
