"""The fit of a ConceptFusionMap: pairs from images, a translator from pairs, and statistics from held-out images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_concepts.activations import Layers
from captum_concepts.attr.concept_fusion.trust import HeldOut
from captum_concepts.attr.concept_fusion.words import LINKS
from captum_concepts.errors import InputError
from captum_concepts.models.concept_translator import (
    ConceptTranslator,
    Training,
    TrainingPairs,
    collect_pairs,
    fit_translator,
)

_HELD_OUT = 512  # maximum number of images kept in the file
_ROWS = 1024


@dataclass(frozen=True)
class Fitted:
    """The result of a fit."""

    translator: ConceptTranslator
    history: dict[str, list[float]]
    held_out: HeldOut


def link_of(encoder: Any) -> str:
    """The encoder's ``link`` or ``probability``, else ``"sigmoid"`` if ``logit_bias`` is not 0, else ``"softmax"``."""
    for name in ("link", "probability"):
        said = getattr(encoder, name, None)
        if isinstance(said, str):
            if said not in LINKS:
                raise InputError(f"encoder.{name} is {said!r}; it must be one of {LINKS}; otherwise pass link=")
            return said
    return "sigmoid" if float(getattr(encoder, "logit_bias", 0.0) or 0.0) else "softmax"


def train(
    layers: Layers,
    encoder: Any,
    images: Any,
    text: Tensor | None,
    *,
    training: Training,
    seed: int,
    logit_scale: float,
    similarity_weight: float,
    hidden: Any,
    show_progress: bool,
    **collecting: Any,
) -> Fitted:
    """A fitted translator on the classifier's device."""
    # Iterating a DataLoader draws a seed, and creating layers draws weights; the caller's random state is unchanged.
    with torch.random.fork_rng(devices=[]):
        pairs = collect_pairs(layers, encoder, images, seed=seed, show_progress=show_progress, **collecting)
        width = pairs.embedding_dim
        if hidden is None and pairs.images > 1024 and training.from_examples:
            hidden = (2048, 1024)  # each unit of the first layer comes from one example
        translator = ConceptTranslator(pairs.in_channels, width, hidden=hidden)
    if text is not None and text.shape[1] != width:
        raise InputError(
            f"the encoder returns image embeddings of width {width} but text embeddings of width {text.shape[1]}; "
            "they must match"
        )
    parameter = next(layers.model.parameters(), None) if layers.model is not None else None
    translator.to("cpu" if parameter is None else parameter.device)
    with torch.inference_mode(False), torch.enable_grad():
        result = fit_translator(
            translator,
            pairs,
            text=text,
            logit_scale=logit_scale,
            similarity_weight=similarity_weight,
            seed=seed,
            show_progress=show_progress,
            **vars(training),
        )
    translator.requires_grad_(False)
    return Fitted(translator, result.history, _held_out(translator, pairs, result.held_out))


@torch.no_grad()
def _held_out(translator: ConceptTranslator, pairs: TrainingPairs, held_out: Tensor) -> HeldOut:
    """The embeddings that concepts are calibrated on, including those added later."""
    device = translator.first.weight.device

    def unit(rows: Tensor) -> tuple[Tensor, Tensor]:
        z, e = pairs.rows(rows)
        return F.normalize(translator(z.to(device)).float().cpu(), dim=1), F.normalize(e, dim=1)

    taught = torch.ones(pairs.images, dtype=torch.bool)
    if len(held_out) < pairs.images:
        taught[held_out] = False
    whole = pairs.rows_of(taught.nonzero().flatten(), crops=False)
    sums = [torch.stack([side.double().sum(0) for side in unit(rows)]) for rows in whole.split(_ROWS)]
    mean, teacher_mean = torch.stack(sums).sum(0).float() / len(whole)
    kept = held_out[:_HELD_OUT]
    parts = [unit(rows) for rows in pairs.rows_of(kept).split(_ROWS)]
    student, teacher = (torch.cat(side).unflatten(0, (len(kept), pairs.views)) for side in zip(*parts, strict=True))
    return HeldOut(mean, teacher_mean, student[:, 0].half(), teacher.half(), independent=len(held_out) < pairs.images)
