"""The concepts of a ConceptFusionMap as one object: names, directions in the embedding space, and the link."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_concepts._checks import unique_names, warn_of_same_embeddings
from captum_concepts.concepts import Vocabulary
from captum_concepts.errors import InputError

LINKS = ("softmax", "sigmoid")


@dataclass(frozen=True)
class TextBank:
    r"""T concepts, with a logit and a probability of each for an embedding h.

    .. math:: S^t = \text{scale} \, \frac{h}{|h|} \cdot d_t + b_t

    Args:
        names: the T concepts.
        direction: ``(T, D)`` unit text embeddings, or directions computed from them.
        offset: ``(T,)``.
        scale: scale of the cosine.
        link: ``"softmax"`` (concepts compete, CLIP) or ``"sigmoid"`` (independent concepts, SigLIP).
        temperature: divides logits before the link.
    """

    names: tuple[str, ...]
    direction: Tensor
    offset: Tensor
    scale: float
    link: str
    temperature: float = 1.0

    def to(self, like: Tensor) -> TextBank:
        """In the dtype and on the device of ``like``."""
        return replace(self, direction=self.direction.to(like), offset=self.offset.to(like))

    def logits(self, h: Tensor) -> Tensor:
        """``(..., T)`` logits of embeddings ``(..., D)``."""
        return self.scale * (F.normalize(h, dim=-1) @ self.direction.T) + self.offset

    def probability(self, logits: Tensor) -> Tensor:
        """``(..., T)`` probabilities in [0, 1]."""
        logits = logits / self.temperature
        return logits.softmax(-1) if self.link == "softmax" else logits.sigmoid()

    def log_probability(self, h: Tensor, index: Tensor) -> Tensor:
        """Log probability of concept ``index`` (same leading shape as h, one concept each).

        It is in double precision, because relevances are differences of it, and fused maps divide by their sum.
        """
        if h.device.type != "mps":  # no double precision on MPS
            h = h.double()
        self = self.to(h)
        if self.link == "softmax":
            return log_softmax_at(self.logits(h) / self.temperature, index)
        cosine = (F.normalize(h, dim=-1) * self.direction[index]).sum(-1)
        return F.logsigmoid((self.scale * cosine + self.offset[index]) / self.temperature)

    def slopes(self, h: Tensor, index: Tensor, contrast: float = 0.0, temperature: float = 1.0) -> Tensor:
        r"""``(N, J, D)`` derivatives of the logit of concept ``index[n, j]`` at the embedding ``h[n]``.

        With ``contrast`` c and ``temperature`` u it is the derivative of
        :math:`S^t - c \, u \log \sum_{s \ne t} \exp(S^s / u)`.
        """
        length = h.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        unit = h / length
        direction = self.direction[index]
        if contrast and len(self.names) > 1:
            others = (self.logits(h) / temperature).unsqueeze(1).expand(-1, index.shape[1], -1)
            others = others.scatter(-1, index.unsqueeze(-1), -torch.inf).softmax(-1)
            direction = direction - contrast * others @ self.direction
        along = (direction * unit.unsqueeze(1)).sum(-1, keepdim=True)
        return self.scale * (direction - along * unit.unsqueeze(1)) / length.unsqueeze(1)


def log_softmax_at(logits: Tensor, index: Tensor) -> Tensor:
    """``logits.log_softmax(-1)`` at ``index``, accurate also near 0 (a probability near 1)."""
    own = index.unsqueeze(-1)
    others = logits.scatter(-1, own, -torch.inf).logsumexp(-1)
    return F.logsigmoid(logits.gather(-1, own).squeeze(-1) - others)


def encode(concepts: Sequence[str] | Vocabulary, encoder: Any) -> tuple[list[str], Tensor]:
    """The names and their unit text embeddings ``(T, D)``; a Vocabulary is encoded in its templates.

    Raises:
        InputError: there is no name, a duplicate, or one that the encoder does not know (the message names it).
    """
    names = unique_names(concepts, "concept")
    if not names:
        raise InputError("concepts is empty; pass at least one name")
    vocabulary = concepts if isinstance(concepts, Vocabulary) else Vocabulary(names)
    return names, vocabulary.encode(encoder)


def check_words(concepts: Any, text: Any, width: int | None) -> None:
    """Check that names and text embeddings match each other and the translator's output.

    Raises:
        InputError: they do not; the message reports which, and what to pass.
    """
    if concepts is None:
        if text is not None:
            raise InputError("text_embeddings were passed without concepts; pass the names of their rows")
        return
    names = unique_names(concepts, "concept")
    if not names:
        raise InputError("concepts is empty; pass at least one name, or None and add them by with_concepts")
    if not isinstance(text, Tensor) or text.ndim != 2 or not text.is_floating_point() or len(text) != len(names):
        what = f"a {text.dtype} tensor {tuple(text.shape)}" if isinstance(text, Tensor) else type(text).__name__
        raise InputError(f"text_embeddings must be floating point ({len(names)}, D) for {len(names)} names, got {what}")
    if width is not None and text.shape[1] != width:
        raise InputError(
            f"text_embeddings have width {text.shape[1]}, but the translator returns {width}; pass embeddings of the "
            "vision-language model it was fitted to"
        )
    if not text.isfinite().all() or not text.any(1).all():
        raise InputError("text_embeddings contain a row that is zero, NaN or infinite; every row needs a direction")
    warn_of_same_embeddings(names, text)
