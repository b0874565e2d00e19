"""Discovered concepts: planted directions are found, contributions are ablations, names fit or are refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_concepts import discover_concepts
from captum_concepts.attr.discovered_concepts import DiscoveredConcepts, descend, factorize
from captum_concepts.errors import ArtifactError, InputError, InputWarning, LayerError, LayoutError, TargetError
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
    assert found.directions.shape == (3, 5)
    maps = found.concept_maps(images).transpose(0, 1).flatten(1)
    assert 0 <= maps.min() < maps.max() <= 1 + 1e-6
    there = (places > 0).transpose(0, 1).flatten(1)
    told = torch.stack([torch.stack([m[t].quantile(0.1) - m[~t].quantile(0.9) for t in there]) for m in maps])
    assert sorted(told.argmax(1).tolist()) == [0, 1, 2]
    assert told.amax(1).min() > 0.3


def test_the_dictionary_is_no_worse_than_the_planted_one():
    """Sparse sums of five signed directions: all are among seven, whatever the strength of each."""
    g = torch.Generator().manual_seed(1)
    planted = torch.linalg.qr(torch.randn(12, 5, generator=g))[0].T
    weights = torch.rand(3000, 5, generator=g) * (torch.rand(3000, 5, generator=g) < 0.15)
    strength = torch.tensor([4.0, 2.0, 2.0, 1.0, 1.0])
    rows = 3 + (weights * strength) @ planted + 0.005 * torch.randn(3000, 12, generator=g)
    directions, explained = factorize(rows - rows.mean(0), 7, torch.Generator().manual_seed(0))
    assert explained > 0.99
    assert torch.allclose(directions.norm(dim=1), torch.ones(7))
    cosine = directions @ planted.T
    assert cosine.amax(0).min() > 0.95


def test_descent_reaches_the_conditions_of_the_optimum():
    g = torch.Generator().manual_seed(1)
    rows, directions = torch.rand(50, 7, generator=g), F.normalize(torch.rand(3, 7, generator=g), dim=1)
    gram, cross = directions @ directions.T, rows @ directions.T - 0.1
    weights = descend(torch.zeros(50, 3), gram, cross, 200)
    gradient = weights @ gram - cross
    assert bool((weights >= 0).all())
    assert bool((gradient[weights > 1e-4].abs() < 1e-3).all() and (gradient > -1e-3).all())


def test_contributions_are_what_removing_a_concept_takes():
    images, _ = patches()
    net = Mixer()
    found = discover_concepts(net, "mix", images, n_concepts=3)
    before = net(images).detach()
    moved = found.contributions(images, target=2)
    for k in range(3):
        with torch.no_grad():
            seen, units = net.mix(images), found.channel_scales[:, None, None]
            direction = F.normalize(found.directions[k][:, None, None] / units, dim=0)
            rows = (seen - found.center[:, None, None]) / units
            along = (rows * direction).sum(1, keepdim=True).clamp(min=0)
            cosine = along / rows.norm(dim=1, keepdim=True)
            torch.testing.assert_close(found.concept_maps(images)[:, k, None], cosine)
            removed = seen - along * direction * units
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
    red = places[:, 0] > 0
    assert maps[:, 0][red].quantile(0.1) > maps[:, 0][~red].quantile(0.9) + 0.3
    assert bool((found.name_scores > 0.2).all())

    class Blind(Eye):
        def encode_image(self, images: Tensor) -> Tensor:
            return torch.rand(len(images), 3, generator=torch.Generator().manual_seed(0))

    blind = discover_concepts(Mixer(), "mix", images, n_concepts=3, encoder=Blind(), words=Eye.words)
    assert sum(name.startswith("unnamed") for name in blind.concepts) >= 1
    assert "named" in repr(found)


class Codes(nn.Module):
    """Six channels, one for each tenth of red that a pixel may have: two of faint grounds, four of bright spots."""

    def forward(self, x: Tensor) -> Tensor:
        code = (10 * x[:, 0]).round()
        levels = (0.05, 0.05, 5.0, 5.0, 5.0, 5.0)
        return torch.stack([(code == k) * level for k, level in enumerate(levels)], 1) + 0.002 * x[:, 1:2]


def test_what_is_weak_counts_as_much_as_what_is_strong():
    """Four concepts: both grounds are among them, although the spots have nearly all the energy."""
    g = torch.Generator().manual_seed(0)
    images, ground = torch.rand(40, 3, 8, 8, generator=g), torch.arange(40) % 2
    images[:, 0] = ground[:, None, None] / 10
    for i in range(40):
        y, x, spot = (int(torch.randint(0, n, (), generator=g)) for n in (6, 6, 4))
        images[i, 0, y : y + 2, x : x + 2] = (2 + spot) / 10
    net = nn.Sequential(Codes(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    scores = discover_concepts(net, "0", images, n_concepts=4).scores(images)
    for k in range(2):
        assert bool((scores[ground == k].amin(0) > scores[ground != k].amax(0)).any())


def test_scores_are_one_on_average_however_many_positions_were_sampled():
    images, _ = patches(60)
    for rows in (40_000, 300):
        scores = discover_concepts(Mixer(), "mix", images, n_concepts=3, max_rows=rows).scores(images)
        torch.testing.assert_close(scores.mean(0), torch.ones(3))
    found = discover_concepts(Mixer(), "mix", images, n_concepts=3)
    share = found.concept_maps(images).square().mean((2, 3))
    torch.testing.assert_close(found.scores(images), share / share.mean(0))


def test_a_layer_that_never_changes_has_no_concepts():
    images = torch.ones(4, 3, 8, 8)
    found = discover_concepts(Mixer(), "mix", images, n_concepts=2)
    assert not found.concept_maps(images).any()
    assert bool(found.scores(images).isfinite().all())


def test_the_encoder_runs_in_evaluation_mode():
    class Dropping(nn.Module, Eye):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.9)

        def encode_image(self, images: Tensor) -> Tensor:
            return self.drop(Eye.encode_image(self, images))

    images, _ = patches(60)
    made = [discover_concepts(Mixer(), "mix", images, n_concepts=3, encoder=Eye(), words=Eye.words)]
    dropping = Dropping().train()
    with pytest.warns(InputWarning, match="text embeddings are random"):
        made.append(discover_concepts(Mixer(), "mix", images, n_concepts=3, encoder=dropping, words=Eye.words))
    assert made[0].concepts == made[1].concepts
    assert torch.equal(made[0].name_scores, made[1].name_scores)


def test_saved_for_another_model(tmp_path):
    images, _ = patches()
    path = discover_concepts(Mixer(), "mix", images, n_concepts=2).save(tmp_path / "found.safetensors")
    with pytest.raises(ArtifactError, match="does not exist here"):
        DiscoveredConcepts.load(path, nn.Sequential(nn.Conv2d(3, 2, 1)))
    wider = Mixer()
    wider.mix, wider.head = nn.Conv2d(3, 6, 1), nn.Linear(6, 4)
    with pytest.raises(LayerError, match="6 channels"):
        DiscoveredConcepts(wider, "mix", torch.eye(8)[:2], ["a", "b"]).concept_maps(torch.rand(1, 3, 8, 8))
    for other in (wider, Mixer().double()):
        with pytest.raises(ArtifactError, match="saved for another model"):
            DiscoveredConcepts.load(path, other)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"n_concepts": 0}, InputError, "n_concepts must be"),
        ({"encoder": Eye()}, InputError, "both encoder= and words="),
        ({"words": ["red"]}, InputError, "both encoder= and words="),
        ({"sparsity": 1}, InputError, "sparsity must be"),
        ({"seed": "a"}, InputError, "seed must be an integer"),
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
