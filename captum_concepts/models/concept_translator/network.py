"""CE-FAM's translator from a classifier's pooled activations to a vision-language model's embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_concepts._checks import integer
from captum_concepts.errors import InputError, shortened


def checked_hidden(hidden: Any) -> tuple[int, int]:
    """``hidden`` as two widths.

    Raises:
        InputError: not two positive integers.
    """
    if not isinstance(hidden, Sequence) or isinstance(hidden, str) or len(hidden) != 2:
        raise InputError(f"hidden must be two positive widths, such as (1024, 512), got {shortened(hidden)}")
    return integer("hidden[0]", hidden[0]), integer("hidden[1]", hidden[1])


class ConceptTranslator(nn.Module):
    r"""A multi-layer perceptron :math:`h` from pooled activations to an image embedding.

    .. math:: h(z) = W_3 \tanh(W_2 \tanh(W_1 z + b_1) + b_2) + b_3, \qquad
        z = [z^1; \dots; z^L], \quad z^l_k = \operatorname{mean}_{ij} A^l_k(i, j)

    Args:
        in_channels: the channels C_l of each layer, in the order that they are passed to ``forward``.
        embedding_dim: D, the width of the vision-language model's embedding.
        hidden: widths of the two hidden layers; None takes (2048, 1024) if the widest layer has more than 1024
            channels and (1024, 1024) otherwise.

    Raises:
        InputError: no layer, or a width below 1.

    Reference:
        *CE-FAM: Concept-Based Explanation via Fusion of Activation Maps.* ICCV 2025, arXiv:2509.23849.

    Example:
        >>> translator = ConceptTranslator([16, 32], 8, hidden=(24, 12))
        >>> translator([torch.rand(5, 16), torch.rand(5, 32)]).shape
        torch.Size([5, 8])
    """

    def __init__(self, in_channels: Sequence[int], embedding_dim: int, *, hidden: Sequence[int] | None = None) -> None:
        super().__init__()
        if isinstance(in_channels, int):
            raise InputError(f"in_channels must be a sequence with one entry per layer; got the int {in_channels}")
        channels = tuple(int(c) for c in in_channels)
        if not channels or min(channels) < 1 or embedding_dim < 1:
            raise InputError(
                "in_channels needs at least one layer and every width must be positive, got "
                f"in_channels={list(channels)}, embedding_dim={embedding_dim}"
            )
        if hidden is None:
            hidden = (2048, 1024) if max(channels) > 1024 else (1024, 1024)
        widths = checked_hidden(hidden)
        self.in_channels = channels
        self.embedding_dim = int(embedding_dim)
        self.hidden = widths
        self.network = nn.Sequential(
            nn.Linear(sum(channels), widths[0]),
            nn.Tanh(),
            nn.Linear(widths[0], widths[1]),
            nn.Tanh(),
            nn.Linear(widths[1], self.embedding_dim),
        )

    def forward(self, pooled: Sequence[Tensor] | Tensor) -> Tensor:
        """``(N, D)`` embeddings.

        Args:
            pooled: one ``(N, C_l)`` tensor per layer, or their concatenation ``(N, sum C_l)``.

        Raises:
            InputError: the number of layers or a width differs from ``in_channels``.
        """
        if isinstance(pooled, Tensor) or len(self.in_channels) == 1:
            return self.network(self.concatenate(pooled))
        # One product per layer, so that autograd skips layers that need no gradient.
        parts = self._checked(pooled)
        weights = self.first.weight.split(self.in_channels, 1)
        hidden = self.first.bias + sum(F.linear(z, weight) for z, weight in zip(parts, weights, strict=True))
        return self.after_first(hidden)

    def concatenate(self, pooled: Sequence[Tensor] | Tensor) -> Tensor:
        """``(N, sum C_l)`` in the translator's dtype, checked against ``in_channels``."""
        return torch.cat(self._checked(pooled), -1)

    def _checked(self, pooled: Sequence[Tensor] | Tensor) -> list[Tensor]:
        parts = [pooled] if isinstance(pooled, Tensor) else list(pooled)
        widths = tuple(part.shape[-1] for part in parts)
        if widths != ((sum(self.in_channels),) if isinstance(pooled, Tensor) else self.in_channels):
            raise InputError(
                f"the translator was fitted to layers of {list(self.in_channels)} channels, got widths {list(widths)}; "
                "pass the layers it was fitted on, in the same order"
            )
        return [part.to(self.first.weight) for part in parts]

    @property
    def first(self) -> nn.Linear:
        """The first Linear, the only layer that takes pooled activations."""
        layer: nn.Linear = self.network[0]  # type: ignore[assignment]
        return layer

    def after_first(self, hidden: Tensor) -> Tensor:
        """The rest of the network, from the first Linear's output ``(..., H)``."""
        return self.network[1:](hidden)

    @torch.no_grad()
    def fold_standardization(self, mean: Tensor, std: Tensor) -> None:
        """Convert a network that expects ``(z - mean) / std`` to the same function of the raw ``z``, in place."""
        weight = self.first.weight.double() / std.double()
        self.first.bias.sub_((weight @ mean.double()).to(self.first.bias))
        self.first.weight.copy_(weight)

    def extra_repr(self) -> str:
        return f"in_channels={list(self.in_channels)}, embedding_dim={self.embedding_dim}, hidden={self.hidden}"
