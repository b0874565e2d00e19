"""Checks whether concepts fit the images and whether the rules of a fitted model can be trusted."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_concepts.concepts import Vocabulary
from captum_concepts.errors import InputError, InputWarning
from captum_concepts.models.salf_cbm.fit.filters import PUBLISHED_CUTOFF
from captum_concepts.models.salf_cbm.fit.objective import Samples
from captum_concepts.models.salf_cbm.presence import auroc, reliabilities
from captum_concepts.store import RegionEmbeddingStore

#: Everyday nouns, most of which a data set does not show, as a baseline for the score of any text.
EVERYDAY = (
    "apple", "armchair", "backpack", "banana", "baseball", "basket", "bathtub", "bed", "bicycle", "blanket", "book",
    "boot", "bottle", "bowl", "bread", "broom", "bucket", "bus", "cake", "calendar", "camera", "candle", "car",
    "carpet", "carrot", "chair", "clock", "coat", "comb", "computer", "cow", "cup", "curtain", "desk", "dog",
    "door", "drum", "duck", "fork", "glove", "guitar", "hammer", "hat", "horse", "jacket", "kettle", "key", "knife",
    "ladder", "lamp", "lemon", "mirror", "mug", "necklace", "newspaper", "pencil", "pillow", "plate",
    "refrigerator", "ring", "scissors", "sheep", "shirt", "shoe", "sink", "sock", "sofa", "spoon", "suitcase",
    "table", "telephone", "toaster", "toothbrush", "towel", "train", "truck", "umbrella", "vase", "violin",
    "wallet",
)  # fmt: skip
#: A concept is in the images if its presence exceeds that of this fraction of the everyday words.
EVERYDAY_LEVEL = 0.75
#: Minimum number of words for comparing groups of words.
ENOUGH = 20
#: Minimum and maximum number of images in the first check, otherwise a twentieth of all.
_FEWEST, _MOST_FIRST = 40, 256
#: Number of images, number of positive rules per class, and AUROC from which a rule counts as supported.
_MOST, _RULES, _SUPPORTED = 2000, 3, 0.6
#: Mean validation similarity below which activations match the encoder poorly (LF-CBM's cutoff for one concept).
_LOOSE = 0.45


def first_images(count: int) -> list[int]:
    """Evenly spaced images for a first check of the concepts; empty if they would be most of the images."""
    few = min(_MOST_FIRST, max(_FEWEST, count // 20))
    return [i * count // few for i in range(few)] if 2 * few <= count else []


def everyday_texts(vocabulary: Vocabulary, encoder: Any) -> Tensor | None:
    """Unit embeddings of :data:`EVERYDAY` words in the concepts' templates; None if the encoder knows too few."""
    own = {concept.lower() for concept in vocabulary}
    words = Vocabulary([word for word in EVERYDAY if word not in own], templates=vocabulary.templates)
    for known in (lambda: words, lambda: words.known_to(encoder)):
        try:
            text = known().encode(encoder)
        except Exception:  # encoders may raise anything for an unknown word
            continue
        return text if len(text) >= ENOUGH else None
    return None


def check_everyday_words(known: Tensor | None) -> None:
    """Warn if :func:`everyday_texts` found too few words, so that the published cutoff is used."""
    if known is None:
        warnings.warn(
            "presence_cutoff='auto' compares your concepts with everyday words (apple, armchair, ...), but the "
            f"encoder knows fewer than {ENOUGH} that are not among your concepts, so {PUBLISHED_CUTOFF:g} is used, "
            "the value for CLIP ViT-B/16. Pass a number on your encoder's scale, or None to disable this filter",
            InputWarning,
            stacklevel=2,
        )


class Fit(NamedTuple):
    """Fit of words to images: means of the best quarter of the words and of everyday words."""

    words: float
    everyday: float

    @classmethod
    def of(cls, presence: Tensor, everyday: Tensor) -> Fit:
        """The fit from the presence of each word."""
        best = (float(v.topk(max(1, len(v) // 4)).values.mean()) for v in (presence, everyday))
        return cls(*best)

    def __str__(self) -> str:
        return f"similarity of the best quarter of the words {self.words:.3g}, of everyday words {self.everyday:.3g}"


def check_words(vocabulary: Vocabulary, presence: Tensor, everyday: Tensor, images: int) -> str:
    """A log message on how the concepts fit the first images.

    Raises:
        InputError: the concepts fit the images no better than everyday words.
    """
    order = presence.argsort(descending=True).tolist()
    most, least = ([f"{vocabulary[i]} {float(presence[i]):.2g}" for i in part] for part in (order[:5], order[5:][-3:]))
    said = f"words, on {images} images: most present {', '.join(most)}"
    if least:
        said += f"; least {', '.join(least)}"
    if min(len(everyday), len(vocabulary)) < ENOUGH:
        return said
    fit = Fit.of(presence, everyday)
    if fit.words <= fit.everyday:
        raise InputError(
            f"the concepts do not match the images: on {images} of them the best quarter of the {len(vocabulary)} "
            f"concepts has a similarity of {fit.words:.3g}, that of everyday words (apple, armchair, ...) "
            f"{fit.everyday:.3g}. Use concepts that describe these images, or an encoder trained on such images; to "
            "continue anyway, pass a number or None as presence_cutoff"
        )
    return f"{said}; {fit}"


def judged(
    validation: Samples,
    regions: RegionEmbeddingStore,
    labels: Tensor,
    concepts: Sequence[str],
    classes: Sequence[str],
    weight: Tensor,
    head: Tensor,
    text: Tensor,
) -> dict[str, Any]:
    """The metadata entries on agreement with the encoder on held-out images and on support of the rules.

    A rule is supported if the encoder finds its concept more in images of its class than in others.

    Args:
        validation: held-out images.
        regions: of the training images.
        labels: of the training images.
        concepts, classes: names.
        weight: ``(M, D)`` of the bottleneck.
        head: ``(L, M)``.
        text: ``(M, E)`` unit vectors.

    Returns:
        ``reliability``, see :func:`reliabilities`, where the encoder sees a concept in the quarter of the images with
        its highest similarity; and ``support``, with ``rules``, ``supported``, and ``doubtful``
        ``[class, concept, AUROC]``.
    """
    weight, head, text = (value.detach().float().cpu() for value in (weight, head, text))
    rows = validation.rows[:: -(-len(validation.rows) // _MOST)]
    parts = [
        (features.float().mean(1).cpu() @ weight.T, embeddings.float().mean(1).cpu() @ text.T)
        for features, embeddings in validation.batches(rows.split(256))
    ]
    pooled, seen = (torch.cat(part) for part in zip(*parts, strict=True))
    verdicts = seen >= seen.topk(max(1, len(seen) // 4), dim=0).values[-1]
    some = torch.arange(0, len(labels), -(-len(labels) // max(_MOST, 20 * len(head))))
    seen = torch.cat([regions.embeddings(part).float().mean(1) @ text.T for part in some.split(256)])
    checked, doubtful = 0, []
    for target, row in enumerate(head):
        own = labels[some, target] > 0 if labels.ndim == 2 else labels[some] == target
        best = [m for m in row.topk(min(_RULES, len(row))).indices.tolist() if row[m] > 0]
        if not 0 < int(own.sum()) < len(own):
            continue
        for m in best:
            checked += 1
            found = auroc(seen[:, m].double(), own)
            if found < _SUPPORTED:
                doubtful.append([classes[target], concepts[m], round(found, 3)])
    doubtful.sort(key=lambda rule: rule[2])
    support = {"rules": checked, "supported": checked - len(doubtful), "doubtful": doubtful[:20]}
    return {"reliability": reliabilities(pooled, verdicts, concepts), "support": support}


def advice(metadata: Mapping[str, Any]) -> list[str]:
    """What to change if rules cannot be trusted; empty if nothing was found."""
    similarity = list(metadata["pooled_similarity"].values())
    mean, support = sum(similarity) / len(similarity), metadata["support"]
    found = []
    if metadata["unreached_cutoff"] is not None:
        found.append(
            "No concept's validation similarity reached interpretability_cutoff="
            f"{metadata['unreached_cutoff']:g} (best {max(similarity):.2f}), so all were kept: the bottleneck cannot "
            "follow the encoder here. Use more images, another layer, or another prompt."
        )
    elif mean < _LOOSE:
        found.append(
            f"Validation similarity averages {mean:.2f}: activations follow the encoder loosely. Use more images, "
            "another layer, or an interpretability_cutoff."
        )
    if doubtful := support["doubtful"]:
        first = ", ".join(f"{name}: {concept} ({value:.2f})" for name, concept, value in doubtful[:4])
        found.append(
            f"{support['rules'] - support['supported']} of the {support['rules']} strongest rules name a concept that "
            f"the encoder finds hardly more in images of the class than in others (AUROC): {first}. Add concepts that "
            "describe these classes, or remove these concepts."
        )
    return found
