"""The fit of ConceptFusionMap: words into vectors, images into pairs, pairs into a translator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_concepts.activations.capture import Layer
from captum_concepts.errors import CaptumConceptsError, InputError
from captum_concepts.models.concept_translator.network import ConceptTranslator
from captum_concepts.models.concept_translator.data import collect_pairs, device_of
from captum_concepts.models.concept_translator.fit import fit_translator


@torch.no_grad()
def encode_words(encoder: Any, words: list[str]) -> Tensor:
    """``(T, D)`` of ``encoder.encode_text``; a failure names the words that cause it.

    Raises:
        InputError: words the encoder does not know, or embeddings of the wrong shape.
    """
    try:
        text = encoder.encode_text(words)
    except (KeyError, ValueError, IndexError, CaptumConceptsError) as error:
        unknown = [word for word in words if not _knows(encoder, word)]
        if not unknown:
            raise
        raise InputError(
            f"the encoder does not know {unknown[:10]}{' and more' if len(unknown) > 10 else ''}: {error}"
        ) from error
    if not isinstance(text, Tensor) or text.ndim != 2 or len(text) != len(words):
        found = tuple(text.shape) if isinstance(text, Tensor) else type(text).__name__
        raise InputError(f"encoder.encode_text must give ({len(words)}, D) for {len(words)} words, got {found}")
    return text.detach().float()


def _knows(encoder: Any, word: str) -> bool:
    try:
        encoder.encode_text([word])
    except (KeyError, ValueError, IndexError, CaptumConceptsError):
        return False
    return True


def train_translator(
    forward_func: Callable[..., Any],
    layers: Sequence[Layer],
    encoder: Any,
    data: Any,
    text: Tensor | None,
    *,
    logit_scale: float,
    similarity_weight: float,
    hidden: Sequence[int] | None,
    training: dict[str, Any],
    **collecting: Any,
) -> tuple[ConceptTranslator, dict[str, list[float]]]:
    """A fitted translator on the classifier's device, and its history."""
    # Iterating a DataLoader draws a seed, and creating layers draws weights: the caller's random state stays as it was.
    with torch.random.fork_rng(devices=[]):
        pairs = collect_pairs(forward_func, layers, encoder, data, **collecting)
        width = pairs.embedding_dim
        translator = ConceptTranslator(pairs.in_channels, width, hidden=hidden)
    if text is not None and text.shape[1] != width:
        raise InputError(f"the encoder gives images of width {width} and texts of width {text.shape[1]}")
    translator.to(device_of(forward_func) or torch.device("cpu"))
    with torch.inference_mode(False), torch.enable_grad():
        result = fit_translator(
            translator,
            pairs,
            text=text,
            logit_scale=logit_scale,
            similarity_weight=similarity_weight,
            **training,
        )
    return translator.requires_grad_(False), result.history
