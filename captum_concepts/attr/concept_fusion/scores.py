"""What a classifier sees, and in which layer: scores and relevances of ConceptFusionMap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_concepts.activations import check_images, gradients_enabled
from captum_concepts.activations.capture import Inputs
from captum_concepts.attr.concept_fusion.lifecycle import ConceptLifecycle


class ConceptScores(ConceptLifecycle):
    """The part of ConceptFusionMap that draws no maps."""

    def logits(self, inputs: Inputs, additional_forward_args: Any = None) -> Tensor:
        """``(N, T)`` logits S of the concepts, before softmax or sigmoid."""
        self._names()
        with torch.no_grad():
            parts = [
                self._space(seen.embedding).logits(seen.embedding)
                for *_, seen in self._passes(inputs, additional_forward_args, gradient=False)
            ]
        return torch.cat(parts)

    def scores(self, inputs: Inputs, additional_forward_args: Any = None) -> Tensor:
        """``(N, T)`` *what*: probabilities in [0, 1], summing to 1 under a softmax."""
        return self._probability(self.logits(inputs, additional_forward_args))

    def relevance(self, inputs: Inputs, target: Any = None, additional_forward_args: Any = None) -> Tensor:
        """``(N, T, L)`` how much each layer carries each concept (``(N, 1, L)`` for one target an example).

        The mean over i = 1..K of the relative drop (S_0 - S_i) / S_0 of the concept's probability, where the i channels
        of largest beta_k z_k are replaced, in the translator's input, by the mean of the layer's pooled vector.
        """
        batch = len(check_images(inputs)[0])
        index = self._concept_index(target, batch)
        parts = []
        with gradients_enabled():
            for start, _, _, seen in self._passes(inputs, additional_forward_args):
                rows = [
                    self._relevance(seen, betas, part)
                    for part, betas, _ in self._chunks(seen, index[start : start + len(seen.embedding)])
                ]
                parts.append(torch.cat(rows, 1))
        return torch.cat(parts).detach()
