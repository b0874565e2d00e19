"""Whether the words fit the images, and whether the rules of a fitted model can be believed."""

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

#: What any text scores with these images: nouns of everyday life, most of which a data set does not show.
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
#: A concept is in the images if it is more present than this fraction of the everyday words.
EVERYDAY_LEVEL = 0.75
#: From so many words on, groups of words are compared: fewer say little about a group.
ENOUGH = 20
#: Images that are looked at first: a twentieth, but at least and at most so many.
_FEWEST, _MOST_FIRST = 40, 256
#: Images, and positive rules of each class, that a model is judged by; a rule is supported from this AUROC on.
_MOST, _RULES, _SUPPORTED = 2000, 3, 0.6
#: Mean validation similarity below which activations follow the encoder loosely: LF-CBM's cutoff for a single concept.
_LOOSE = 0.45


def first_images(count: int) -> list[int]:
    """Evenly spaced images that the words are compared with before all others; empty if that would be most of them."""
    few = min(_MOST_FIRST, max(_FEWEST, count // 20))
    return [i * count // few for i in range(few)] if 2 * few <= count else []


def everyday_texts(vocabulary: Vocabulary, encoder: Any) -> Tensor | None:
    """Unit embeddings of :data:`EVERYDAY` words, asked as the concepts are; None if the encoder knows too few."""
    own = {concept.lower() for concept in vocabulary}
    words = Vocabulary([word for word in EVERYDAY if word not in own], templates=vocabulary.templates)
    for known in (lambda: words, lambda: words.known_to(encoder)):
        try:
            text = known().encode(encoder)
        except Exception:  # whatever an encoder raises for a word that it does not know
            continue
        return text if len(text) >= ENOUGH else None
    return None


def check_everyday_words(known: Tensor | None) -> None:
    """Warn where :func:`everyday_texts` found too few words, so that the published cutoff decides."""
    if known is None:
        warnings.warn(
            f"presence_cutoff='auto' compares your concepts with everyday words (apple, armchair, ...), but fewer than "
            f"{ENOUGH} of them are known to the encoder and not among your concepts; {PUBLISHED_CUTOFF:g} is used, "
            "which belongs to CLIP ViT-B/16. Give a number on your encoder's scale, or None for no such filter",
            InputWarning,
            stacklevel=2,
        )


class Fit(NamedTuple):
    """How the words fit the images: means of the best quarter of the words, and of everyday words."""

    words: float
    everyday: float

    @classmethod
    def of(cls, presence: Tensor, everyday: Tensor) -> Fit:
        """From the presence of each word."""
        best = (float(v.topk(max(1, len(v) // 4)).values.mean()) for v in (presence, everyday))
        return cls(*best)

    def __str__(self) -> str:
        return f"similarity of the best quarter of the words {self.words:.3g}, of everyday words {self.everyday:.3g}"


def check_words(vocabulary: Vocabulary, presence: Tensor, everyday: Tensor, images: int) -> str:
    """What the first images say about the words, for the log.

    Raises:
        InputError: the words fit the images no better than everyday words do.
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
            f"the words do not fit the images: on {images} of them the best quarter of the {len(vocabulary)} concepts "
            f"has a similarity of {fit.words:.3g}, that of everyday words (apple, armchair, ...) {fit.everyday:.3g}. "
            "Use concepts that describe these images, or an encoder that knows such images; a number or None as "
            "presence_cutoff goes on all the same"
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
    """Entries of a model's metadata: agreement with the encoder on held-out images, and support of the rules.

    A rule is supported if the encoder finds its concept more in the images of its class than in the others.

    Args:
        validation: held-out images.
        regions: of the training images.
        labels: of the training images.
        concepts, classes: names.
        weight: ``(M, D)`` of the bottleneck.
        head: ``(L, M)``.
        text: ``(M, E)`` unit.

    Returns:
        ``reliability``, see :func:`reliabilities`, where a verdict of the encoder is that an image is among the quarter
        in which it sees most of the concept; ``support``: ``rules``, ``supported``, and ``doubtful``
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
    """What to change where rules cannot be believed; empty where nothing was found."""
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
