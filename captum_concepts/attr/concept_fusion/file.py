"""A ConceptFusionMap as one safetensors file, with names and options as JSON in its header."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_concepts._artifacts import (
    anything,
    either,
    flag,
    integer,
    list_of,
    mapping_of,
    nothing_or,
    number,
    open_artifact,
    save_artifact,
    table,
    text,
)
from captum_concepts.activations import Layer, Layers
from captum_concepts.attr.concept_fusion.trust import Curve, HeldOut
from captum_concepts.errors import ArtifactError, InputError, LayerError
from captum_concepts.models.concept_translator import ConceptTranslator
from captum_concepts.store.manifest import check_fingerprint, fingerprint_module

if TYPE_CHECKING:
    from captum_concepts.attr.concept_fusion.concept_fusion_map import ConceptFusionMap

_FORMAT = "captum_concepts.ConceptFusionMap/2"
#: Format versions, each with the entries that were renamed since.
_FORMATS: dict[str, dict[str, str]] = {_FORMAT: {}, "captum_concepts.ConceptFusionMap/1": {"layer": "map_layer"}}
_OPTIONS_1 = {"probability": "link", "chunk_size": "batch_size"}
_TEXT = "text_embeddings"
_HELD = ("mean", "teacher_mean", "student", "teacher")
_PRESENCE = ("logits", "values")
_OPTIONS = mapping_of(either(nothing_or(flag), integer(-(2**31), 2**31), number(), text(longest=100)), most=100)
_INFO = table(
    {
        "concepts": nothing_or(list_of(text(), least=1)),
        "layers": list_of(text(), least=1, most=10_000),
        "options": _OPTIONS,
        "in_channels": list_of(integer(1, 2**24), least=1, most=10_000),
        "embedding_dim": integer(1, 2**24),
        "hidden": list_of(integer(1, 2**24), length=2),
        "history": anything,
        "model": nothing_or(text(longest=200)),
    },
    {
        "map_layer": either(text("auto", "fused"), integer(0, 10_000)),
        "of_encoder": list_of(text("link", "logit_scale", "logit_bias")),
        "independent": flag,
        "presence": nothing_or(table({"images": integer(), "source": text(longest=1000)})),
    },
)


@dataclass(frozen=True, eq=False)
class Saved:
    """The content of a file: the constructor's arguments after ``forward_func``, its options and the fit's results."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    history: dict[str, list[float]] | None
    held_out: HeldOut | None
    presence: Curve | None
    of_encoder: set[str]


def save(path: str | os.PathLike[str], explainer: ConceptFusionMap, options: Mapping[str, Any]) -> Path:
    """Write ``explainer`` atomically."""
    translator = explainer.translator
    if not isinstance(translator, ConceptTranslator):
        raise InputError(
            f"only a ConceptTranslator can be saved with the map, not {type(translator).__name__}; save its state "
            "separately"
        )
    layers = Layers.resolve(explainer.forward_func, list(explainer.layers))
    held_out, presence = explainer.held_out_, explainer.presence_
    info = {
        "concepts": None if explainer.concepts is None else list(explainer.concepts),
        "layers": list(layers.names),
        "options": dict(options),
        "in_channels": list(translator.in_channels),
        "embedding_dim": translator.embedding_dim,
        "hidden": list(translator.hidden),
        "history": explainer.history_,
        "model": None if layers.model is None else fingerprint_module(layers.model),
        "of_encoder": sorted(explainer._of_encoder),
        "independent": held_out is None or held_out.independent,
        "presence": None if presence is None else {"images": presence.images, "source": presence.source},
    }
    tensors: dict[str, Tensor] = {f"translator.{name}": v for name, v in translator.state_dict().items()}
    if explainer.text_embeddings is not None:
        tensors[_TEXT] = explainer.text_embeddings
    if held_out is not None:
        tensors |= {f"held_out.{name}": getattr(held_out, name) for name in _HELD}
    if presence is not None:
        tensors |= {f"presence.{name}": getattr(presence, name) for name in _PRESENCE}
    return save_artifact(path, _FORMAT, info, tensors)


@contextmanager
def load(
    path: str | os.PathLike[str], forward_func: Callable[..., Any], layers: Sequence[Layer] | None
) -> Iterator[Saved]:
    """The content of a file, checked to belong to ``forward_func``; an error in the content is one of the file."""
    named = Layers.resolve(forward_func, [])  # before the file is read and blamed
    with open_artifact(path, _FORMATS, "a saved ConceptFusionMap", info=_INFO) as (info, tensors):
        if named.model is not None:
            model = fingerprint_module(named.model)
            try:
                check_fingerprint({"model": model}, {"model": info["model"] or model}, str(path))
            except ArtifactError as error:
                raise ArtifactError(
                    f"{error}: class, parameters or dtype differ; load the model and weights it was fitted to, or fit "
                    "again"
                ) from error
        chosen: list[Layer] = list(info["layers"] if layers is None else layers)
        try:
            own = Layers.resolve(forward_func, chosen).names
        except LayerError as error:
            raise ArtifactError(f"{path} was saved for layers that do not exist here: {error}") from error
        check_fingerprint({"layers": list(own)}, info, str(path))
        embeddings = tensors.pop(_TEXT, None)
        held_out = _group(tensors, "held_out.", _HELD)
        curve = _group(tensors, "presence.", _PRESENCE)
        translator = _translator(info, tensors, named.model)
        options = {_OPTIONS_1.get(name, name): value for name, value in info["options"].items()}
        if "map_layer" in info:
            options["map_layer"] = info["map_layer"]
        presence = info.get("presence")
        if (presence is None) != (curve is None):
            raise ValueError("its presence curve is incomplete")
        yield Saved(
            (chosen, translator, info["concepts"], embeddings),
            options,
            info["history"],
            None if held_out is None else _held_out(held_out, info),
            None if curve is None or presence is None else _curve(curve, presence),
            set(info.get("of_encoder", ())),
        )


def _translator(info: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module | None) -> ConceptTranslator:
    with torch.device("meta"):  # sizes come from the file, so nothing is allocated before the tensors match them
        translator = ConceptTranslator(info["in_channels"], info["embedding_dim"], hidden=info["hidden"])
    state = {name.removeprefix("translator."): tensor for name, tensor in tensors.items()}
    translator.load_state_dict(state, assign=True)
    parameter = next(model.parameters(), None) if model is not None else None
    return translator.to("cpu" if parameter is None else parameter.device).requires_grad_(False).eval()


def _group(tensors: dict[str, Tensor], prefix: str, names: Sequence[str]) -> dict[str, Tensor] | None:
    """The tensors of one object, removed from ``tensors``; None if all are missing."""
    found = {name: tensors.pop(prefix + name) for name in names if prefix + name in tensors}
    if found and len(found) < len(names):
        raise ValueError(f"it has {sorted(found)} of {prefix}* but not all of {list(names)}")
    return found or None


def _held_out(found: Mapping[str, Tensor], info: Mapping[str, Any]) -> HeldOut:
    width, count = info["embedding_dim"], len(found["student"])
    shapes = {
        "mean": (width,), "teacher_mean": (width,), "student": (count, width),
        "teacher": (count, found["teacher"].shape[1], width),
    }  # fmt: skip
    wrong = [n for n, shape in shapes.items() if tuple(found[n].shape) != shape or not found[n].isfinite().all()]
    if wrong or not count or not found["teacher"].shape[1]:
        raise ValueError(f"its held-out images are damaged: {wrong or 'none'}")
    return HeldOut(**found, independent=info.get("independent", True))


def _curve(found: Mapping[str, Tensor], info: Mapping[str, Any]) -> Curve:
    x, y = found["logits"], found["values"]
    good = x.ndim == 1 and len(x) and x.shape == y.shape and bool(x.isfinite().all())
    if not good or not bool(((y >= 0) & (y <= 1)).all()) or bool((x.diff() < 0).any()):
        raise ValueError("its presence curve is damaged")
    return Curve(x, y, info["images"], info["source"])
