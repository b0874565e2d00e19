"""Text similarities and text embeddings, with errors that name the texts without an embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_concepts._checks import same_rows
from captum_concepts.errors import InputError, shortened

#: Maps two lists of texts to the matrix of their similarities.
Similarity = Callable[[Sequence[str], Sequence[str]], Tensor]


class TextSimilarity:
    """The weighted mean of the cosines of one or several text encoders.

    LF-CBM weights CLIP ViT-B/16 three times and the sentence encoder all-mpnet-base-v2 once ("since mpnet has higher
    variance"); its cutoffs 0.85 and 0.9 are for that mixture. CLIP alone assigns high similarities to unrelated words,
    so use higher cutoffs, or add a sentence encoder.

    Args:
        encoders: an object with ``encode_text(list[str]) -> (T, D)``, such a function, or a list of them.
        weights: one per encoder; None weights all equally. They are divided by their sum.

    Example:
        >>> letters = lambda texts: torch.tensor([[float(t.count(c)) for c in "abc"] for t in texts])
        >>> TextSimilarity(letters)(["ab"], ["ba", "c"]).round(decimals=3)
        tensor([[1., 0.]])
    """

    def __init__(self, encoders: Any, weights: Sequence[float] | None = None) -> None:
        self.encoders = list(encoders) if isinstance(encoders, (list, tuple)) else [encoders]
        given = [1.0] * len(self.encoders) if weights is None else [float(w) for w in weights]
        if not self.encoders or len(given) != len(self.encoders) or min(given) < 0 or sum(given) <= 0:
            raise InputError(
                f"{len(self.encoders)} encoders need the same number of non-negative weights; got {weights}"
            )
        self.weights = [w / sum(given) for w in given]

    def __call__(self, first: Sequence[str], second: Sequence[str]) -> Tensor:
        """``(len(first), len(second))`` in [-1, 1], float32 on the CPU."""
        total = torch.zeros(len(first), len(second))
        if not len(first) or not len(second):
            return total
        for encoder, weight in zip(self.encoders, self.weights, strict=True):
            a, b = (embed_texts(encoder, texts, distinct=False) for texts in (first, second))
            total += weight * (a @ b.T)
        return total


def embed_texts(encoder: Any, texts: Sequence[str], *, distinct: bool = True) -> Tensor:
    """Unit embeddings ``(T, D)``, float32 on the CPU.

    Args:
        encoder: an object with ``encode_text``, or a function of a list of texts.
        texts: at least one.
        distinct: refuse different texts with the same embedding, because no explanation could separate them; texts
            that differ only in case and spaces are allowed.

    Raises:
        InputError: no texts or not a list of strings; no ``encode_text``; wrong shape; NaN; or texts that the encoder
            has no embedding for or cannot separate.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"texts must be a list of strings, got {shortened(texts)}")
    if not len(texts):
        raise InputError("texts is empty; pass at least one")
    function = encoder.encode_text if hasattr(encoder, "encode_text") else encoder
    if not callable(function) or (function is encoder and hasattr(encoder, "get_text_features")):
        raise InputError(
            f"{type(encoder).__name__} has no encode_text; see vlm.ImageTextEncoder, or vlm.from_transformers for "
            "models of the transformers library"
        )
    try:
        found = function(list(texts))
    except (KeyError, LookupError, ValueError) as error:
        missing = without_embedding(encoder, texts)
        if not missing:
            raise
        raise InputError(
            f"the encoder has no embedding for {missing[:10]}{' ...' if len(missing) > 10 else ''} ({error}); remove "
            "them, or use Vocabulary.known_to(encoder)"
        ) from error
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(texts):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"encode_text must return ({len(texts)}, D) for {len(texts)} texts, got {shape}")
    found = found.detach().float().cpu()
    if not found.isfinite().all():
        bad = texts[int((~found.isfinite().all(1)).nonzero()[0])]
        raise InputError(f"the text embedding of {bad!r} contains NaN or infinite values")
    if distinct:
        _check_distinct(texts, found)
    return F.normalize(found, dim=1)


def _check_distinct(texts: Sequence[str], embeddings: Tensor) -> None:
    for other, text in same_rows(texts, embeddings):
        if " ".join(other.casefold().split()) != " ".join(text.casefold().split()):
            raise InputError(
                f"the encoder returns the same embedding for {shortened(other)} and {shortened(text)}, so it cannot "
                "separate them; shorten them, or remove one"
            )


def without_embedding(encoder: Any, texts: Sequence[str]) -> list[str]:
    """The texts that an encoder with a fixed vocabulary refuses (one call per text)."""
    function = encoder.encode_text if hasattr(encoder, "encode_text") else encoder
    missing = []
    for text in texts:
        try:
            function([text])
        except (KeyError, LookupError, ValueError):
            missing.append(text)
    return missing
