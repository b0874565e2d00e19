"""From one forward pass to the derivative of many concept logits at many layers."""

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

# Gradients at once: more than sixteen passes of a ResNet-50, since a batch of sixteen is a fifth faster than one of
# five (below it PyTorch's 1 x 1 convolutions take the slow path on one thread).
_ENTRIES = 2**25

Derivatives = Callable[[Tensor], tuple[list[Tensor], list[Tensor]]]
"""``(N, J, D)`` cotangents to, for each layer,

- beta ``(N, J, C_l)``: the spatial mean of dS / dA_k, and
- evidence ``(N, J, h, w)``: sum_k A_k dS / dA_k at each position (or nothing).
"""


@dataclass(frozen=True)
class ConceptPass:
    """One forward of the classifier and the translator.

    Args:
        seen: layers and output of the classifier.
        maps: each layer as ``(N, C, h, w)``, detached, at least fp32.
        pooled: their means over the positions, ``(N, C)``.
        embedding: ``(N, D)`` the translator's output, differentiable at ``sources``.
        sources: the layers' raw tensors (total gradient) or the pooled vectors (branch gradient).
        branch: which of the two.
    """

    seen: SpatialActivations
    maps: tuple[Tensor, ...]
    pooled: tuple[Tensor, ...]
    embedding: Tensor
    sources: tuple[Tensor, ...]
    branch: bool

    def derivatives(self, count: int, *, chunk: int, evidence: bool = False, only: int | None = None) -> Derivatives:
        """A function from cotangents to the derivatives at every layer.

        Both results are linear in the cotangent: where more than D are asked, those of a basis are computed once and
        combined, so that D backward passes are enough for any number of concepts.

        Args:
            count: how many cotangents an example will be asked in all.
            chunk: how many to push through the network at once.
            evidence: also give the signed evidence.
            only: the one layer to differentiate at; the other betas are zero, and nothing in front of it is entered.
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
    """Run classifier and translator once, recording for a backward pass (call it with gradients enabled)."""
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
    """``cotangents[i] @ d output / d source`` for every i at once: ``(c, *source.shape)`` for each source.

    A few backward passes at once where every operation has a batching rule (``torch.func.vmap``; the older
    ``is_grads_batched`` falls back to a loop inside, and copies), otherwise one after another.
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
            # A missing batching rule is announced by a warning and then runs slower than the plain loop.
            with warnings_filtered("error", UserWarning, "There is a performance drop"):
                return torch.func.vmap(one, chunk_size=min(together, len(cotangents)))(cotangents)
        except (RuntimeError, NotImplementedError, ValueError, Warning) as error:
            said = out_of_memory(error)
        if said:
            warnings.warn(
                f"the device ran out of memory for {len(cotangents)} backward passes at once; they run one after "
                "another. Results are the same up to rounding; a smaller batch_size avoids the failed attempt",
                InputWarning,
                stacklevel=2,
            )
    return tuple(torch.stack(parts) for parts in zip(*map(one, cotangents), strict=True))
