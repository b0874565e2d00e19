"""Filters that keep the concepts that the data show and those that the bottleneck can predict."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_concepts._checks import integer
from captum_concepts.concepts import Drop, Vocabulary
from captum_concepts.errors import InputError
from captum_concepts.models.salf_cbm.fit.objective import ahead
from captum_concepts.models.salf_cbm.fit.steps import share_of
from captum_concepts.store import RegionEmbeddingStore, world
from captum_concepts.vlm import RegionPrompt

#: Leaves an image unchanged; the window of the only cell covers all of it.
WHOLE = RegionPrompt("crop", 1, 112, reference_size=224)
#: Number of images whose mean similarity the published filters compare with their cutoff.
TOP_IMAGES = 5
#: Minimum presence of a concept for CLIP ViT-B/16.
PUBLISHED_CUTOFF = 0.25


def concept_presence(
    store: RegionEmbeddingStore, text: Tensor, *, k: int = TOP_IMAGES, batch_size: int = 256
) -> Tensor:
    """The presence of each concept in the data, the mean of the k largest similarities over the images.

    The published cutoffs apply to images without visual prompts, so ``store`` must be built with the prompt
    :data:`WHOLE`. The images are divided among the processes of ``torch.distributed``.

    Returns:
        ``(M,)`` float32.

    Raises:
        InputError: the store has several cells per image, or k is below 1.
    """
    integer("k", k)
    if len(store.prompt) != 1:
        raise InputError(
            f"presence is determined on unmodified images, but the store contains {len(store.prompt)} prompted cells "
            "of each; build one with the prompt WHOLE"
        )
    share = share_of(len(store))
    similarity = store.similarity(text)
    best = torch.empty(0, len(text), device=text.device, dtype=torch.float32)
    parts = [slice(s, min(s + batch_size, share.stop)) for s in range(share.start, share.stop, batch_size)]
    for p in ahead(similarity.__getitem__, parts, depth=1):
        joined = torch.cat([best, p.flatten(1)])
        best = joined.topk(min(k, len(joined)), dim=0).values
    if world()[1] > 1:
        found: list[Tensor] = [best] * world()[1]
        torch.distributed.all_gather_object(found, best.cpu())
        joined = torch.cat(found).to(text.device)
        best = joined.topk(min(k, len(joined)), dim=0).values
    return best.mean(0)


def present_concepts(vocabulary: Vocabulary, presence: Tensor, cutoff: float | None) -> Vocabulary:
    """The concepts whose presence is above ``cutoff``; None keeps all.

    Raises:
        InputError: none is; the message reports the highest presence, because the scale depends on the encoder.
    """
    if cutoff is None:
        return vocabulary
    best = float(presence.max())
    if best <= cutoff:
        raise InputError(
            f"no concept is left: the most present one, {vocabulary[int(presence.argmax())]!r}, has a mean "
            f"top-{TOP_IMAGES} similarity of {best:.3g}, not above presence_cutoff={cutoff:g}. The published 0.25 is "
            "for CLIP ViT-B/16; pass another cutoff, None to disable this filter, or other concepts"
        )
    return vocabulary.present_in(presence.cpu(), k=TOP_IMAGES, cutoff=cutoff)


def interpretable_concepts(
    vocabulary: Vocabulary, similarity: Tensor, cutoff: float | None, *, upper: Tensor | None = None
) -> Vocabulary:
    """The concepts whose validation similarity is at least ``cutoff`` (LF-CBM drops those below 0.45); None keeps all.

    LF-CBM's cutoff applies to the similarity of activations of whole images, not of maps cell by cell, which are much
    harder to predict.

    Args:
        vocabulary: of M concepts.
        similarity: ``(M,)``.
        cutoff: the minimum similarity.
        upper: ``(M,)`` upper ends of the similarities' intervals; a concept is dropped only if its upper end is below
            the cutoff. None compares the similarities themselves, as published.

    Raises:
        InputError: none is; the message reports the highest similarity.
    """
    values = similarity.tolist()
    ends = values if upper is None else upper.tolist()
    for given, what in ((values, "similarities"), (ends, "upper ends")):
        if len(given) != len(vocabulary):
            raise InputError(f"{len(given)} {what} for {len(vocabulary)} concepts")
    if cutoff is None:
        return vocabulary
    best = max(values)
    if max(ends) < cutoff:
        raise InputError(
            f"no concept is left: the best one, {vocabulary[values.index(best)]!r}, has a validation similarity of "
            f"{best:.3g}, below interpretability_cutoff={cutoff:g}; pass a lower cutoff, None to disable this filter, "
            "a more informative layer, or more images"
        )
    drops = [
        Drop(concept, "low validation similarity", value, cutoff)
        for concept, value, end in zip(vocabulary, values, ends, strict=True)
        if end < cutoff
    ]
    return vocabulary.without(drops) if drops else vocabulary


def columns_of(kept: Vocabulary, before: Vocabulary) -> Sequence[int]:
    """The indices of the kept concepts in the vocabulary ``before``."""
    number = {concept: i for i, concept in enumerate(before)}
    return [number[concept] for concept in kept]
