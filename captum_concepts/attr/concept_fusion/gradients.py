"""Derivatives of many concept logits at many layers, from one forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts._memory import out_of_memory
from captum_concepts._undo import warnings_filtered
from captum_concepts.activations import Inputs, Layers, SpatialActivations, full_precision
from captum_concepts.activations.layers import gradient_errors
from captum_concepts.errors import InputWarning

# Gradient entries at once: more than 16 passes of a ResNet-50, since smaller batches are slower (on one thread,
# PyTorch's 1 x 1 convolutions then take the slow path).
_ENTRIES = 2**25

Derivatives = Callable[[Tensor], tuple[list[Tensor], list[Tensor]]]
"""``(N, J, D)`` cotangents to, for each layer,

- beta ``(N, J, C_l)``: the spatial mean of dS / dA_k, and
- evidence ``(N, J, h, w)``: sum_k A_k dS / dA_k at each position (or nothing).
"""


@dataclass(frozen=True)
class ConceptPass:
    """One forward pass of the classifier and the translator.

    Args:
        seen: layers and output of the classifier.
        maps: each layer as ``(N, C, h, w)``, detached, at least fp32.
        pooled: their means over the positions, ``(N, C)``.
        embedding: ``(N, D)`` output of the translator, differentiable at ``sources``.
        sources: the layers' raw tensors (total gradient) or the pooled vectors (branch gradient).
        branch: whether ``sources`` are the pooled vectors.
    """

    seen: SpatialActivations
    maps: tuple[Tensor, ...]
    pooled: tuple[Tensor, ...]
    embedding: Tensor
    sources: tuple[Tensor, ...]
    branch: bool

    def derivatives(self, count: int, *, chunk: int, evidence: bool = False, only: int | None = None) -> Derivatives:
        """A function from cotangents to the derivatives at every layer.

        Both results are linear in the cotangent. For more than D cotangents, the derivatives of a basis are computed
        once and combined, so D backward passes are enough for any number of concepts.

        Args:
            count: total number of cotangents per example.
            chunk: number of cotangents per backward pass.
            evidence: also return the signed evidence.
            only: the single layer to differentiate at; the other betas are zero, and no layer before it is entered.
        """

        def direct(cotangents: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            return self._derive(cotangents, chunk, evidence, only)

        n, width = self.embedding.shape
        if count <= width:
            return direct
        basis_betas, basis_evidence = direct(torch.eye(width).to(self.embedding).expand(n, width, width))

        def combined(cotangents: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            betas = [cotangents.to(beta) @ beta for beta in basis_betas]
            return betas, [torch.einsum("njd,ndhw->njhw", cotangents.to(e), e) for e in basis_evidence]

        return combined

    def _derive(
        self, cotangents: Tensor, chunk: int, evidence: bool, only: int | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        layers = range(len(self.maps)) if only is None else [only]
        betas: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        signed: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        sources = [self.sources[layer] for layer in layers]
        for part in cotangents.split(chunk, 1):
            with gradient_errors(self.seen.names):
                gradients = vector_products(self.embedding, sources, part.transpose(0, 1))
            for layer, gradient in zip(layers, gradients, strict=True):
                maps = self.maps[layer]
                if self.branch:
                    betas[layer].append(gradient.transpose(0, 1).to(maps) / maps[0, 0].numel())
                    continue
                spatial = [full_precision(self.seen.layouts[layer].maps(one)) for one in gradient]
                betas[layer].append(torch.stack([one.mean((2, 3)) for one in spatial], 1))
                if evidence:
                    signed[layer].append(torch.stack([(one * maps).sum(1) for one in spatial], 1))
        n, j = cotangents.shape[:2]
        first = [
            torch.cat(betas[layer], 1) if layer in betas else maps.new_zeros(1).expand(n, j, maps.shape[1])
            for layer, maps in enumerate(self.maps)
        ]
        if evidence and self.branch:
            return first, [
                torch.einsum("njc,nchw->njhw", beta, maps) for beta, maps in zip(first, self.maps, strict=True)
            ]
        return first, [torch.cat(parts, 1) for parts in signed.values() if parts]


def concept_pass(
    layers: Layers,
    translator: nn.Module,
    inputs: Inputs,
    *,
    branch: bool,
    additional_forward_args: Any = None,
    attribute_to_layer_input: bool = False,
) -> ConceptPass:
    """Run classifier and translator once, recording for a backward pass (requires gradients to be enabled)."""
    seen = layers.run(
        inputs,
        additional_forward_args=additional_forward_args,
        gradient=not branch,
        attribute_to_layer_input=attribute_to_layer_input,
        logits=True,
    )
    live = tuple(full_precision(maps).mean((2, 3)) for maps in seen.maps)
    if branch:
        live = tuple(z.detach().requires_grad_() for z in live)
    embedding = translator(list(live))
    return ConceptPass(
        seen,
        tuple(full_precision(maps.detach()) for maps in seen.maps),
        tuple(z.detach() for z in live),
        embedding,
        live if branch else seen.raw,
        branch,
    )


def vector_products(output: Tensor, sources: Sequence[Tensor], cotangents: Tensor) -> tuple[Tensor, ...]:
    """``(c, *source.shape)`` products ``cotangents[i] @ d output / d source`` of every i, for each source.

    Backward passes are batched with ``torch.func.vmap`` if every operation has a batching rule (the older
    ``is_grads_batched`` falls back to an internal loop, and copies), and run one after another otherwise.
    """
    cotangents = cotangents.to(output)

    def one(cotangent: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(output, sources, cotangent, retain_graph=True, allow_unused=True)
        return tuple(
            torch.zeros_like(source) if gradient is None else gradient
            for source, gradient in zip(sources, found, strict=True)
        )

    if len(cotangents) > 1:
        together = max(1, _ENTRIES // sum(source.numel() for source in sources))
        try:
            # A missing batching rule raises a warning and then runs slower than the plain loop.
            with warnings_filtered("error", UserWarning, "There is a performance drop"):
                return torch.func.vmap(one, chunk_size=min(together, len(cotangents)))(cotangents)
        except (RuntimeError, NotImplementedError, ValueError, Warning) as error:
            said = out_of_memory(error)
        if said:
            warnings.warn(
                f"the device ran out of memory for {len(cotangents)} backward passes at once, so they run one after "
                "another. Results are the same up to rounding; a smaller batch_size avoids the failed attempt",
                InputWarning,
                stacklevel=2,
            )
    return tuple(torch.stack(parts) for parts in zip(*map(one, cotangents), strict=True))
