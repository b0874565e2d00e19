"""Every public attribution, built on any small image model: the conformance tests run on each. A fifth is one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn

from captum_concepts import ConceptFusionMap, ConceptTranslator, FeatureActivationMap, SpatialACV
from captum_concepts.activations import spatial_activations

OUTPUTS = 10


def fitted_vectors(model: nn.Module, layer: nn.Module, example: Tensor) -> SpatialACV:
    generator = torch.Generator().manual_seed(2)
    images = torch.rand((12, *example.shape[1:]), generator=generator).to(example)
    return SpatialACV(model, layer).fit({"bright": images[:6] + 1}, images[6:])


def fusion_map(model: nn.Module, layer: nn.Module, example: Tensor) -> ConceptFusionMap:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        channels = spatial_activations(model, example[:1], [layer]).maps[0].shape[1]
        translator = ConceptTranslator([channels], 16, hidden=(32, 32))
        words = [f"word {k}" for k in range(OUTPUTS)]
        return ConceptFusionMap(model, [layer], translator, words, torch.randn(OUTPUTS, 16))


@dataclass
class Method:
    """How to build a method on a model of 10 outputs.

    Args:
        build: from the model, a layer and an example of its input, explaining 10 targets.
        fitted: it is fitted to the layer's output, so it cannot read another tensor (the layer's input).
    """

    build: Callable[[nn.Module, nn.Module, Tensor], LayerAttribution]
    fitted: bool = False


METHODS = {
    "FeatureActivationMap": Method(lambda model, layer, _: FeatureActivationMap(model, layer, torch.eye(OUTPUTS))),
    "SpatialACV": Method(fitted_vectors, fitted=True),
    "ConceptFusionMap": Method(fusion_map, fitted=True),
}
