"""The filters of LF-CBM (Oikarinen et al., 2023), also used by SALF-CBM; each returns kept and dropped concepts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_concepts._checks import integer, number
from captum_concepts.concepts._report import Drop
from captum_concepts.concepts._words import ARTICLES, key, tidy
from captum_concepts.concepts.similarity import Similarity
from captum_concepts.errors import InputError

Filtered = tuple[list[str], list[Drop]]


def drop_duplicates(concepts: Sequence[str], *, near: bool = True) -> Filtered:
    """Keep the first of concepts that are equal up to case and spaces; drop empty ones.

    With ``near``, concepts that differ only in article, plural, hyphen or spacing also count as equal.

    >>> drop_duplicates(["a bird feeder", "Birdfeeders", "wings"])[0]
    ['a bird feeder', 'wings']
    """
    kept: list[str] = []
    drops: list[Drop] = []
    seen: dict[str, str] = {}
    for concept in concepts:
        same = key(concept) if near else tidy(concept).casefold()
        if not same:
            drops.append(Drop(concept, "empty"))
        elif same in seen:
            drops.append(Drop(concept, "duplicate", other=seen[same]))
        else:
            seen[same] = concept
            kept.append(concept)
    return kept, drops


def drop_too_long(concepts: Sequence[str], max_length: int = 30) -> Filtered:
    """Keep concepts of at most ``max_length`` characters (LF-CBM: 30)."""
    number("max_length", max_length, lambda n: n >= 1, "at least 1")
    kept = [c for c in concepts if len(c) <= max_length]
    return kept, [Drop(c, "too long", len(c), max_length) for c in concepts if len(c) > max_length]


def drop_class_names(concepts: Sequence[str], classes: Sequence[str]) -> Filtered:
    """Drop class names, in any case and also after "a", "an" or "the", because they make explanations circular."""
    names = {prefix + name.casefold(): name for name in classes for prefix in ("", *ARTICLES)}
    kept = [c for c in concepts if c.casefold() not in names]
    return kept, [Drop(c, "class name", other=names[c.casefold()]) for c in concepts if c.casefold() in names]


def drop_similar_to_classes(
    concepts: Sequence[str], classes: Sequence[str], similarity: Similarity, cutoff: float = 0.85
) -> Filtered:
    """Drop concepts whose similarity to some class is at least ``cutoff`` (LF-CBM: 0.85).

    Unlike the published code, which by mistake never compares class i with concept i, this compares every pair.
    """
    if not len(concepts) or not len(classes):
        return list(concepts), []
    best = _matrix(similarity(classes, concepts), len(classes), len(concepts)).max(0)
    kept, drops = [], []
    for concept, value, which in zip(concepts, best.values.tolist(), best.indices.tolist(), strict=True):
        if value >= cutoff:
            drops.append(Drop(concept, "similar to a class", value, cutoff, classes[which]))
        else:
            kept.append(concept)
    return kept, drops


def drop_similar(concepts: Sequence[str], similarity: Similarity, cutoff: float = 0.9) -> Filtered:
    """Of two concepts with similarity of at least ``cutoff`` (LF-CBM: 0.9), drop the less general one.

    Pairs are processed in order (i, then j > i), ignoring dropped concepts. The concept with the smaller sum of
    similarities to all concepts is dropped (the later one in a tie), so more general concepts are kept.
    """
    if len(concepts) < 2:
        return list(concepts), []
    matrix = _matrix(similarity(concepts, concepts), len(concepts), len(concepts))
    total = matrix.double().sum(1).tolist()
    gone: set[int] = set()
    drops = []
    for i, j in torch.triu(matrix >= cutoff, diagonal=1).nonzero().tolist():
        if i in gone or j in gone:
            continue
        loser, other = (i, j) if total[i] < total[j] else (j, i)
        gone.add(loser)
        drops.append(Drop(concepts[loser], "similar to a concept", float(matrix[i, j]), cutoff, concepts[other]))
    return [c for i, c in enumerate(concepts) if i not in gone], drops


def drop_absent(concepts: Sequence[str], activations: Tensor, *, k: int = 5, cutoff: float = 0.25) -> Filtered:
    """Drop concepts that the data do not show, whose k largest activations have a mean of at most ``cutoff``.

    Args:
        concepts: M texts.
        activations: ``(N, M)`` cosines of images and concepts, or their means ``(M,)``. LF-CBM uses k=5 and a cutoff of
            0.25 (0.28 for ImageNet) for CLIP ViT-B/16; other encoders have other scales.
        k: see above; all images if there are fewer.
        cutoff: see above.
    """
    if not isinstance(activations, Tensor):
        raise InputError(f"activations must be a tensor, got {type(activations).__name__}")
    integer("k", k)
    number("cutoff", cutoff, lambda _: True, "a finite number")
    if activations.ndim not in (1, 2) or activations.shape[-1] != len(concepts) or 0 in activations.shape[:-1]:
        raise InputError(
            f"activations must be (N, {len(concepts)}) or ({len(concepts)},), got {tuple(activations.shape)}"
        )
    values = activations.float()
    if not values.isfinite().all():
        raise InputError("activations contain NaN or infinite values")
    if values.ndim == 2:
        values = values.topk(min(k, len(values)), dim=0).values.mean(0)
    pairs = list(zip(concepts, values.tolist(), strict=True))
    drops = [Drop(c, "absent from the data", v, cutoff) for c, v in pairs if v <= cutoff]
    return [c for c, v in pairs if v > cutoff], drops


def _matrix(found: Tensor, rows: int, columns: int) -> Tensor:
    if not isinstance(found, Tensor) or found.shape != (rows, columns):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"similarity must return a ({rows}, {columns}) tensor, got {shape}")
    if not found.isfinite().all():
        raise InputError("similarity returns NaN or infinite values")
    return found
