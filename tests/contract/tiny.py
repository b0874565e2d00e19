"""A network, an encoder and images as small as they come, and one of every object that is saved: for tests of files."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts import (
    SALFCBM,
    ConceptExplanation,
    ConceptFusionMap,
    ConceptTranslator,
    FeatureActivationMap,
    SpatialACV,
    audit_dataset,
    discover_concepts,
    fit_salf_cbm,
)
from captum_concepts.attr.discovered_concepts import DiscoveredConcepts
from captum_concepts.audit import ConceptAudit
from captum_concepts.metrics import EvaluationTable
from captum_concepts.vlm import DenseRegions


def network() -> nn.Module:
    """Three classes of images of any size."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()


class Colors:
    """An encoder; with dense regions."""

    logit_scale, logit_bias = 10.0, 0.0

    def encode_image(self, images: Tensor) -> Tensor:
        """``(N, 3)``."""
        return images.mean((2, 3)) + 0.1

    def encode_regions(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """``(N, cells, 3)``."""
        return nn.functional.adaptive_avg_pool2d(images, grid).flatten(2).transpose(1, 2) + 0.1

    def encode_text(self, texts: list[str]) -> Tensor:
        """``(T, 3)``."""
        return torch.eye(3)[: len(texts)]


NET = network()
POOLED = nn.Sequential(*list(NET)[:4])
PICTURES = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SHADES = torch.cat([PICTURES[:6] + 1, PICTURES[6:] * 0.1])  # of which the concept "bright" is in some
MORE = torch.cat([PICTURES, PICTURES.flip(0) * 0.9])
DENSE = DenseRegions((2, 2))


@cache
def spatial_acv() -> SpatialACV:
    """Two fitted concepts."""
    return SpatialACV(NET, "0").fit({"bright": PICTURES[:6] + 1, "dark": PICTURES[:6] * 0.1}, PICTURES[6:])


def explanation(n: int = 2) -> ConceptExplanation:
    """Of ``n`` images."""
    return ConceptExplanation(
        ["a", "b"], scores=torch.rand(n, 2), maps=torch.rand(n, 2, 3, 3), contributions=torch.rand(n, 2), layer="x"
    )


def fusion_map() -> ConceptFusionMap:
    """Two words through a random translator."""
    torch.manual_seed(0)
    translator = ConceptTranslator([4], 6, hidden=(5, 5))
    return ConceptFusionMap(NET, ["0"], translator, ["a", "b"], torch.randn(2, 6))


def activation_map() -> FeatureActivationMap:
    """Four references."""
    return FeatureActivationMap(POOLED, "0", torch.eye(4), reference_names=list("abcd"))


def discovered() -> DiscoveredConcepts:
    """Two parts of the activations."""
    return discover_concepts(POOLED, "1", PICTURES, n_concepts=2)


def audit(**options: Any) -> ConceptAudit:
    """Of two concepts and three classes."""
    return audit_dataset(spatial_acv(), SHADES, labels=[0, 1, 2] * 4, n_bootstrap=20, **options)


def bottleneck() -> SALFCBM:
    """Two concepts, not fitted."""
    return SALFCBM(NET, "0", ["a", "b"], 3, grid=(2, 2))


def fitted(folder: Path, words: tuple[str, ...] = ("red", "blue"), **options: Any) -> SALFCBM:
    """A whole fit in a folder, or what is missing of it."""
    return fit_salf_cbm(
        network(), "0", (MORE, torch.tensor([0, 1, 2] * 8)), Colors(), list(words), 3, store_path=folder, grid=2,
        prompt=DENSE, bottleneck={"max_epochs": 2}, presence_cutoff=None, interpretability_cutoff=None,
        validation_fraction=0.3, **{"lam": 0.01, **options},
    )  # fmt: skip


def table() -> EvaluationTable:
    """Two explainers and one metric."""
    row = {"explainer": "a", "metric": "nra", "value": 0.5, "ci_low": None, "ci_high": 0.6, "examples": 3}
    row |= {"counted": 3, "skipped": 0, "higher_is_better": True}
    return EvaluationTable([row, {**row, "explainer": "b"}], 0.95, unmatched=["x"])
