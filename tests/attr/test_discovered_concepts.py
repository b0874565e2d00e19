"""Discovered concepts: a planted factorization is found, contributions are ablations, names fit or are refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_concepts import discover_concepts
from captum_concepts.attr.discovered_concepts import DiscoveredConcepts, factorize, nonnegative_weights
from captum_concepts.errors import ArtifactError, InputError, LayerError, LayoutError, TargetError
from captum_concepts.testing import ExplainerTestCase

MIXING = torch.tensor([[3.0, 1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 2.0, 1.0, 0.0], [0.0, 2.0, 0.0, 2.0, 0.0]])


class Mixer(nn.Module):
    """Five channels, mixed without negative weights from the three colors; ``signed`` shifts them below zero."""

    def __init__(self, signed: bool = False) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 5, 1)
        self.mix.weight.data = MIXING.T[:, :, None, None].clone()
        self.mix.bias.data.zero_()
        if signed:
            self.mix.weight.data[:, 1] *= -1
        self.head = nn.Linear(5, 4)
        self.head.weight.data = torch.arange(20.0).reshape(4, 5) / 10 - 1

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(x).mean((2, 3)))


def patches(n: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of one patch in each of one or two colors on black, and ``(N, 3, 8, 8)`` where each color is."""
    g = torch.Generator().manual_seed(seed)
    places = torch.zeros(n, 3, 8, 8)
    for i in range(n):
        for color in torch.randperm(3, generator=g)[: 1 + i % 2].tolist():
            y, x = torch.randint(0, 6, (2,), generator=g).tolist()
            places[i, :, y : y + 3, x : x + 3] = 0
            places[i, color, y : y + 3, x : x + 3] = 0.5 + torch.rand((), generator=g)
    return places.clone(), places


@pytest.mark.parametrize("signed", [False, True])
def test_planted_concepts_are_found(signed):
    images, places = patches()
    found = discover_concepts(Mixer(signed), "mix", images, n_concepts=3)
    assert found.explained > 0.999
    assert found.directions.shape == (3, 10 if signed else 5)
    maps = found.concept_maps(images)
    cosine = (
        F.normalize(maps.transpose(0, 1).flatten(1), dim=1) @ F.normalize(places.transpose(0, 1).flatten(1), dim=1).T
    )
    assert sorted(cosine.argmax(1).tolist()) == [0, 1, 2]
    assert cosine.amax(1).min() > 0.99


def test_the_factorization_lowers_the_error_to_that_of_a_slow_reference():
    g = torch.Generator().manual_seed(1)
    rows = torch.rand(200, 3, generator=g) @ torch.rand(3, 7, generator=g) + 0.05 * torch.rand(200, 7, generator=g)
    directions, explained = factorize(rows, 3, torch.Generator().manual_seed(0))
    weights, other = torch.rand(200, 3, generator=g).double(), torch.rand(3, 7, generator=g).double()
    for _ in range(3000):  # multiplicative updates, Lee and Seung 1999
        weights *= (rows.double() @ other.T) / (weights @ other @ other.T + 1e-12)
        other *= (weights.T @ rows.double()) / (weights.T @ weights @ other + 1e-12)
    reference = 1 - (rows - weights @ other).square().sum() / rows.square().sum()
    assert explained >= float(reference) - 1e-4
    assert torch.allclose(directions.norm(dim=1), torch.ones(3))
    best = nonnegative_weights(rows, directions)
    assert bool((best >= 0).all())
    gradient = (best @ directions - rows) @ directions.T  # the conditions of the optimum
    assert bool((gradient[best > 1e-4].abs() < 1e-3).all() and (gradient > -1e-3).all())


def test_contributions_are_what_removing_a_concept_takes():
    images, _ = patches()
    net = Mixer()
    found = discover_concepts(net, "mix", images, n_concepts=3)
    before = net(images).detach()
    maps, moved = found.concept_maps(images), found.contributions(images, target=2)
    for k in range(3):
        with torch.no_grad():
            removed = net.mix(images) - maps[:, k, None] * found.directions[k][None, :, None, None]
            after = net.head(removed.mean((2, 3)))
        torch.testing.assert_close(moved[:, k], (before - after)[:, 2], atol=1e-5, rtol=1e-4)
    per_position = found.attribute(images, target=2)
    torch.testing.assert_close(per_position.sum((2, 3)), moved)


class Eye:
    """An encoder whose image embedding is the mean color, and whose words are colors."""

    logit_scale, logit_bias = 10.0, 0.0
    words = ("red", "green", "blue", "gray", "yellow")

    def encode_image(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) + 1e-6

    def encode_text(self, texts: list[str]) -> Tensor:
        known = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "gray": (1, 1, 1), "yellow": (1, 1, 0)}
        return torch.tensor([known[text] for text in texts], dtype=torch.float32)


def test_names_fit_or_are_refused():
    images, places = patches(60)
    found = discover_concepts(Mixer(), "mix", images, n_concepts=3, encoder=Eye(), words=Eye.words)
    assert sorted(found.concepts) == ["blue", "green", "red"]
    maps = found.concept_maps(images, ["red"])
    assert torch.corrcoef(torch.stack([maps.flatten(), places[:, 0].flatten()]))[0, 1] > 0.99
    assert bool((found.name_scores > 0.2).all())

    class Blind(Eye):
        def encode_image(self, images: Tensor) -> Tensor:
            return torch.rand(len(images), 3, generator=torch.Generator().manual_seed(0))

    blind = discover_concepts(Mixer(), "mix", images, n_concepts=3, encoder=Blind(), words=Eye.words)
    assert sum(name.startswith("unnamed") for name in blind.concepts) >= 1
    assert "named" in repr(found)


def test_saved_for_another_model(tmp_path):
    images, _ = patches()
    path = discover_concepts(Mixer(), "mix", images, n_concepts=2).save(tmp_path / "found.safetensors")
    with pytest.raises(ArtifactError, match="does not exist here"):
        DiscoveredConcepts.load(path, nn.Sequential(nn.Conv2d(3, 2, 1)))
    wider = Mixer()
    wider.mix, wider.head = nn.Conv2d(3, 6, 1), nn.Linear(6, 4)
    with pytest.raises(LayerError, match="6 channels now"):
        DiscoveredConcepts.load(path, wider).concept_maps(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"n_concepts": 0}, InputError, "n_concepts must be"),
        ({"encoder": Eye()}, InputError, "both encoder= and words="),
        ({"words": ["red"]}, InputError, "both encoder= and words="),
        ({"sparsity": 1}, InputError, "sparsity must be"),
        ({"layer": "nix"}, LayerError, "nix"),
        ({"layer": "head"}, LayoutError, "head"),
        ({"n_concepts": 10_000}, InputError, "positions for 10000 concepts"),
    ],
)
def test_wrong_arguments(changes, error, message):
    images, _ = patches(6)
    arguments = {"forward_func": Mixer(), "layer": "mix", "images": images, "n_concepts": 2, **changes}
    with pytest.raises(error, match=message):
        discover_concepts(**arguments)


def test_wrong_targets():
    images, _ = patches(6)
    found = discover_concepts(Mixer(), "mix", images, n_concepts=2)
    with pytest.raises(TargetError):
        found.attribute(images, target=9)
    with pytest.raises(InputError, match="attribute_to_layer_input"):
        found.attribute(images, target=0, attribute_to_layer_input=True)


class TestContract(ExplainerTestCase):
    def make_model(self) -> nn.Module:
        return Mixer()

    def make_images(self) -> Tensor:
        return patches(4, seed=1)[0]

    def make_explainer(self, model: nn.Module) -> DiscoveredConcepts:
        return discover_concepts(model, "mix", patches()[0], n_concepts=3)
