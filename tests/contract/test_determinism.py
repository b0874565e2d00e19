"""The same seed gives the same bits, for everything that is fitted or drawn, whatever the global random state is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import salf_tiny
import torch
from test_concept_fusion_fit import classifier, fit as fit_fusion_map
from torch import Tensor, nn

from captum_concepts import FeatureActivationMap, SpatialACV
from captum_concepts.attr.layer_sweep import layer_sweep
from captum_concepts.metrics import RandomMaps, deletion, evaluate, label_randomization, parameter_randomization
from captum_concepts.solvers import elastic_net_path, fit_elastic_net


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


def images(n: int = 24, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def concept_vectors(seed: int) -> Any:
    x = images()
    made = SpatialACV(network(), "0").fit({"a": x[:8] + 0.2, "b": x[8:16]}, x[16:], n_random=20, max_rows=60, seed=seed)
    return made.vectors, made.accuracies_, made.p_values_, made.confidence_intervals_, made.attribute(x, target=1)


def fusion_map(seed: int) -> Any:
    with torch.random.fork_rng():
        model = classifier()  # seeds the global state
    return fit_fusion_map(model=model, training={"epochs": 2, "batch_size": 16}, seed=seed)


def sweep(seed: int) -> Any:
    x = images()
    found = layer_sweep(network(), ["0", "1"], {"a": x[:8] + 0.2}, x[16:], n_random=20, max_rows=60, seed=seed)
    return found.accuracies, found.contrasts, found.p_values


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 12, generator=generator)
    return x, (x[:, :3] + torch.randn(200, 3, generator=generator)).argmax(1)


def table(seed: int) -> Any:
    maps, masks = torch.rand(24, 4, 4, generator=torch.Generator().manual_seed(5)), images()[:, 0] > 0.5
    data = [(image[None], mask[None]) for image, mask in zip(images(), masks, strict=True)]
    explainers = {"fixed": lambda x: maps[: len(x)], "random": RandomMaps((4, 4), seed=seed)}
    return evaluate(explainers, data, metrics=["nra", "epg"], n_bootstrap=50, seed=seed).rows


def randomized(seed: int) -> Any:
    fam = FeatureActivationMap(network(), "1", torch.eye(4))
    return parameter_randomization(fam, fam.forward_func, images(4), target=1, seed=seed).similarity


def relabelled(seed: int) -> Any:
    learnt = []

    def learn(model: nn.Module, labels: Tensor) -> None:
        learnt.append(labels)
        with torch.no_grad():
            model[4].weight += torch.nn.functional.one_hot(labels[:6], 4).T

    def explain(model: nn.Module) -> FeatureActivationMap:
        return FeatureActivationMap(model, "1", torch.eye(4))

    found = label_randomization(explain, network(), learn, torch.arange(24) % 4, images(4), target=1, seed=seed)
    return found.similarity, found.interval, learnt


#: What is fitted or drawn, and whether another seed gives another result. A new one is a line.
FITS: dict[str, tuple[Callable[[int], Any], bool]] = {
    "SpatialACV.fit": (concept_vectors, True),
    "layer_sweep": (sweep, True),
    "ConceptFusionMap.fit": (fusion_map, True),
    "fit_elastic_net": (lambda _: fit_elastic_net(*rows(), 0.01), False),
    "elastic_net_path": (lambda _: list(elastic_net_path(*rows(), n_lams=5)), False),
    "evaluate": (table, True),
    "deletion": (lambda s: deletion(network(), images(4), torch.zeros(4, 8, 8), target=0, seed=s), True),
    "parameter_randomization": (randomized, True),
    "label_randomization": (relabelled, True),
    "prototypes": (lambda _: FeatureActivationMap(network(), "0").fit(images(), [0, 1, 2] * 8).references, False),
}


def numbers(value: Any) -> Iterator[Any]:
    """Every tensor and number inside, in order."""
    if isinstance(value, Tensor):
        yield value.detach().double().flatten()
    elif isinstance(value, (int, float)):
        yield torch.tensor([float(value)], dtype=torch.float64)
    elif isinstance(value, dict):
        for item in value.values():
            yield from numbers(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, nn.Module) or hasattr(value, "translator"):
        yield from numbers(dict(getattr(value, "translator", value).state_dict()))
    elif dataclasses.is_dataclass(value):
        yield from numbers([getattr(value, field.name) for field in dataclasses.fields(value)])


@pytest.mark.parametrize("name", FITS)
def test_the_same_seed_gives_the_same_bits(name):
    fit, seeded = FITS[name]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = torch.cat(list(numbers(fit(0))))
    assert torch.equal(torch.get_rng_state(), before), "the global random state was drawn from"
    torch.manual_seed(2)
    second = torch.cat(list(numbers(fit(0))))
    assert len(first) > 1
    assert torch.equal(first.nan_to_num(-7), second.nan_to_num(-7))
    if seeded:
        assert not torch.equal(first, torch.cat(list(numbers(fit(1)))))


def test_salf_cbm(tmp_path):
    """Its fit has files: one folder each. Another seed is tested in test_salf_fit.py."""
    torch.manual_seed(1)
    first = salf_tiny.state(salf_tiny.fit(tmp_path / "a"))
    torch.manual_seed(2)
    second = salf_tiny.state(salf_tiny.fit(tmp_path / "b"))
    assert all(torch.equal(first[key], second[key]) for key in first)
