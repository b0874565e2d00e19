"""Similarity of embeddings to references, and its gradient with the norms held constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_concepts.errors import InputError, NotFittedError

Similarity = str | Callable[[Tensor, Tensor], Tensor]
SIMILARITIES = ("cosine", "dot", "euclidean")


def check_references(references: Tensor | None, embedding: Tensor, similarity: Similarity) -> Tensor:
    """The ``(K, D)`` bank on the embedding's device and dtype.

    Raises:
        NotFittedError: there is none.
        InputError: wrong rank, width or dtype, NaN, or a zero row where the cosine is asked.
    """
    if references is None:
        raise NotFittedError(
            "there are no references to compare with; pass references=(K, D), for example "
            "FeatureActivationMap.prototypes(forward_func, images, labels)"
        )
    shape = tuple(references.shape) if isinstance(references, Tensor) else type(references).__name__
    if not isinstance(references, Tensor) or references.ndim != 2 or not references.is_floating_point():
        raise InputError(f"references must be a floating-point tensor (K, D), got {shape}")
    if not len(references):
        raise InputError("references hold no row; give at least one reference embedding")
    if references.shape[1] != embedding.shape[1]:
        raise InputError(
            f"references have width {references.shape[1]}, but forward_func gives embeddings of width "
            f"{embedding.shape[1]}; make them with the same model, up to the same layer"
        )
    bank = references.detach().to(embedding)
    if not bank.isfinite().all():
        raise InputError(f"references hold NaN or infinite values in rows {_rows(~bank.isfinite().all(1))}")
    if similarity == "cosine" and not bank.any(1).all():
        raise InputError(f"references rows {_rows(~bank.any(1))} are all zero, which has no direction to compare with")
    return bank


def _rows(mask: Tensor) -> list[int]:
    return torch.nonzero(mask).flatten().tolist()[:10]


def check_embedding(output: Any) -> Tensor:
    """The model's output as ``(N, D)`` embeddings; trailing dimensions of size 1 are dropped.

    Raises:
        InputError: it is no such tensor.
    """
    if isinstance(output, Tensor) and output.ndim > 2 and all(size == 1 for size in output.shape[2:]):
        output = output.flatten(1)
    if not isinstance(output, Tensor) or output.ndim != 2:
        what = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise InputError(
            f"forward_func must give one embedding an image, (N, D), but gives {what}; pass the part of the model that "
            "does (model.encode_image for CLIP, or a function that picks the embedding out)"
        )
    return output


def similarity_scores(embedding: Tensor, bank: Tensor, similarity: Similarity) -> Tensor:
    """``(N, K)`` similarity of each embedding to each reference, in fp32 at least."""
    if callable(similarity):
        columns = [_called(similarity, embedding, row.expand_as(embedding)) for row in bank]
        return torch.stack(columns, 1)
    if similarity == "euclidean":
        # The expanded form |f|^2 - 2 f.r + |r|^2 cancels badly for near pairs; their maps are the ones looked at.
        return -torch.stack([(embedding - row).square().sum(1) for row in bank], 1)
    if similarity == "cosine":
        embedding, bank = _unit(embedding), _unit(bank)
    return embedding @ bank.T


def similarity_gradient(embedding: Tensor, references: Tensor, similarity: Similarity) -> Tensor:
    """``(N, D)`` gradient of each pair's similarity with respect to the embedding, norms held constant.

    Cosine: r / (\\|f\\| \\|r\\|); dot: r; euclidean: -2 (f - r); a callable: autograd.
    """
    if similarity == "cosine":
        return _unit(references) / embedding.norm(dim=1, keepdim=True).clamp_min(torch.finfo(embedding.dtype).tiny)
    if similarity == "dot":
        return references
    if similarity == "euclidean":
        return -2 * (embedding - references)
    assert callable(similarity)
    point = embedding.detach().requires_grad_()
    values = _called(similarity, point, references)
    if not values.requires_grad:
        raise InputError("the similarity function must be differentiable in its first argument; it gives a constant")
    return torch.autograd.grad(values.sum(), point)[0]


def _called(similarity: Callable[[Tensor, Tensor], Tensor], embedding: Tensor, references: Tensor) -> Tensor:
    values = similarity(embedding, references)
    if not isinstance(values, Tensor) or values.shape != embedding.shape[:1]:
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(
            f"the similarity function must turn two ({len(embedding)}, {embedding.shape[1]}) tensors into one value a "
            f"pair, ({len(embedding)},), but gave {shape}"
        )
    return values


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def hold_norm(output: Tensor) -> Callable[[], None]:
    """Let gradients of a normalised ``output`` pass as if the norm it was divided by were a constant.

    A model that ends in ``F.normalize`` or ``x / x.norm()`` would otherwise lose the part of the gradient along its
    own embedding, and the contributions would sum to zero instead of the similarity. The division is found in the
    autograd graph and the gradient of its denominator dropped; where there is none, nothing changes.

    Returns:
        A function that takes the hold off again.
    """
    node = output.grad_fn
    while node is not None and len(node.next_functions) == 1:  # casts, views and squeezes after the division
        node = node.next_functions[0][0]
    norms = output.detach().float().norm(dim=1)
    if node is None or node.name() != "DivBackward0" or not torch.allclose(norms, torch.ones_like(norms), atol=1e-2):
        return lambda: None

    def drop(grad_inputs: tuple[Tensor, ...], _grad_outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        through_norm = grad_inputs[1]
        return (grad_inputs[0], torch.zeros_like(through_norm) if through_norm is not None else through_norm)

    return node.register_hook(drop).remove


def mean_pool_scale(maps: Tensor, embedding: Tensor, *, half: bool = False) -> Tensor | None:
    """``(N, 1)``: a with f = a z, where the embedding is the mean-pooled z, possibly normalised; else None."""
    if maps.shape[1] != embedding.shape[1]:
        return None
    # Half-precision pooling is off by its own rounding, 2^-8 of the largest value.
    tolerance = 4e-3 if half else 1e-5
    pooled = maps.mean((2, 3))
    tiny = torch.finfo(pooled.dtype).tiny
    scale = (embedding * pooled).sum(1, keepdim=True) / pooled.square().sum(1, keepdim=True).clamp_min(tiny)
    ones, inverse = torch.ones_like(scale), 1 / pooled.norm(dim=1, keepdim=True).clamp_min(tiny)
    is_scale = torch.isclose(scale, ones, rtol=1e-2).all() or torch.isclose(scale, inverse, rtol=1e-2).all()
    off = (embedding - scale * pooled).abs().amax() if is_scale else torch.inf
    return scale if off <= tolerance * embedding.abs().amax() else None


def normalized(contribution: Tensor, how: str) -> Tensor:
    """Each example's contributions, normalised; equal contributions get weight 1 by min-max."""
    if how == "none":
        return contribution
    if how == "l1":
        return contribution / contribution.abs().sum(1, keepdim=True).clamp_min(torch.finfo(contribution.dtype).tiny)
    low, high = contribution.amin(1, keepdim=True), contribution.amax(1, keepdim=True)
    return torch.where(high > low, (contribution - low) / (high - low), torch.ones_like(contribution))
