"""Every method of the package keeps the contract that `captum_concepts.testing` ships for methods from elsewhere."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from captum_concepts import SALFCBM, ConceptFusionMap, ConceptTranslator, FeatureActivationMap, SpatialACV
from captum_concepts.testing import ExplainerTestCase

NAMES = ["a", "b", "c", "d"]


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.5),
            nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
        )  # fmt: skip


def pictures(n: int = 4, seed: int = 3) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


class OnTheNetwork(ExplainerTestCase):
    def make_model(self) -> nn.Module:
        return network()

    def make_images(self) -> Tensor:
        return pictures()


class TestFeatureActivationMap(OnTheNetwork):
    def make_explainer(self, model: nn.Module) -> FeatureActivationMap:
        bank = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
        return FeatureActivationMap(model, "5", bank, reference_names=NAMES)


class TestSpatialACV(OnTheNetwork):
    def make_explainer(self, model: nn.Module) -> SpatialACV:
        sets = {name: pictures(6, seed=10 + k) * (k + 1) / 4 for k, name in enumerate(NAMES)}
        return SpatialACV(model, "2").fit(sets)


class TestConceptFusionMap(OnTheNetwork):
    map_layer = "auto"

    def make_explainer(self, model: nn.Module) -> ConceptFusionMap:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            translator = ConceptTranslator([8, 6], 16, hidden=(32, 32)).eval()
            text = torch.randn(4, 16)
        return ConceptFusionMap(model, ["2", "5"], translator, NAMES, text, map_layer=self.map_layer, logit_scale=10.0)


class TestFusedConceptFusionMap(TestConceptFusionMap):
    map_layer = "fused"


class TestSALFCBM(ExplainerTestCase):
    rank_by = "contributions"

    def make_model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = SALFCBM(network(), "5", NAMES, num_classes=5, grid=(4, 4))
            nn.init.normal_(model.head.weight)
            nn.init.normal_(model.bottleneck.weight)
        return model

    def make_images(self) -> Tensor:
        return pictures()

    def make_explainer(self, model: nn.Module) -> SALFCBM:
        return model  # it explains itself


class Broken:
    """A method of this package, of which one result is changed."""

    def __init__(self, inner: FeatureActivationMap, name: str, change) -> None:
        self.inner, self.name, self.change = inner, name, change
        self.concepts = inner.concepts

    def __getattr__(self, key: str):
        found = getattr(self.inner, key)
        if key != self.name:
            return found
        return lambda inputs, *args, **options: self.change(inputs, found(inputs, *args, **options), options)

    scores = property(lambda self: self.__getattr__("scores"))
    concept_maps = property(lambda self: self.__getattr__("concept_maps"))
    explain = property(lambda self: self.__getattr__("explain"))


def doubled(inputs, explanation, options):
    return explanation if options.get("concepts") else dataclasses.replace(explanation, maps=2 * explanation.maps)


@pytest.mark.parametrize(
    ("name", "change", "test"),
    [
        ("scores", lambda x, y, _: y - y.mean(0), "test_an_image_says_the_same_in_a_batch_as_alone"),
        ("concept_maps", lambda x, y, _: y / y.abs().max(), "test_an_image_says_the_same_in_a_batch_as_alone"),
        ("explain", doubled, "test_each_image_shows_its_own_strongest"),
    ],
)
def test_a_broken_method_fails(name, change, test):
    class Case(TestFeatureActivationMap):
        def make_explainer(self, model: nn.Module):
            return Broken(super().make_explainer(model), name, change)

    failed = []
    for own, run in Case().cases():
        try:
            run()
        except AssertionError:
            failed.append(own)
    assert test in failed
