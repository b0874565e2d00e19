"""The fused regions of ConceptFusionMap: contrast, affinity, and that spreading invents nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comparisons import within
from torch import nn

from captum_concepts.attr.concept_fusion.gradients import vector_products
from captum_concepts.attr.concept_fusion.regions import (
    FAINT,
    UNMOVED,
    feature_affinity,
    fused_grid,
    fused_maps,
    of_strongest,
)
from captum_concepts.attr.concept_fusion.words import TextBank
from captum_concepts.attr.concept_fusion_map import ConceptFusionMap


def bank(text: torch.Tensor, scale: float, bias: float) -> TextBank:
    names = tuple(f"word {i}" for i in range(len(text)))
    return TextBank(names, text, torch.full((len(text),), bias), scale, "softmax")


@pytest.mark.parametrize(("contrast", "temperature"), [(0.0, 1.0), (0.5, 3.0), (1.0, 1.0)])
def test_slopes_are_the_derivatives_of_the_stated_value(contrast, temperature):
    torch.manual_seed(0)
    space = bank(F.normalize(torch.randn(6, 9), dim=1), 7.0, -1.0)
    h = torch.randn(3, 9, requires_grad=True)
    index = torch.tensor([[0, 3], [1, 1], [5, 2]])
    slopes = space.slopes(h.detach(), index, contrast, temperature)
    logits = space.logits(h)
    for n in range(3):
        for j in range(2):
            t = int(index[n, j])
            others = torch.cat([logits[n, :t], logits[n, t + 1 :]])
            value = logits[n, t] - contrast * temperature * torch.logsumexp(others / temperature, 0)
            expected = torch.autograd.grad(value, h, retain_graph=True)[0][n]
            torch.testing.assert_close(slopes[n, j], expected, atol=1e-5, rtol=1e-4)


def loops(evidence, maps, image, grid, local=None, relevance=None):
    """The fused map of one example and concept, position by position; layers in the order in which they run."""
    h, w = grid
    features = []
    for layer in maps[1:-1] if len(maps) > 2 else maps:
        unit = F.normalize(F.interpolate(layer[None], grid, mode="bilinear")[0].flatten(1), dim=0)
        features.append(F.normalize(unit - unit.mean(1, keepdim=True), dim=0))
    colour = F.adaptive_avg_pool2d(image, grid).flatten(1)
    variance = ((colour - colour.mean(1, keepdim=True)) ** 2).sum(0).mean()
    walk = torch.zeros(h * w, h * w)
    for p in range(h * w):
        for q in range(h * w):
            like = torch.stack([f[:, p] @ f[:, q] for f in features]).mean().clamp(min=0) ** 2
            near = torch.exp(-((colour[:, p] - colour[:, q]) ** 2).sum() / (2 * variance))
            walk[p, q] = like * near
        walk[p] /= walk[p].sum()

    def reading(one):
        values = F.interpolate(one.clamp(min=0)[None, None], grid, mode="bilinear")[0, 0].flatten()
        return walk @ (walk @ (walk @ (values / (values**2).mean().sqrt())))

    alone = reading(local) if local is not None else torch.zeros(h * w)
    layers = [reading(layer) for layer in evidence]
    shares = [1.0] * len(layers)
    if relevance is not None and (relevance > 0).any():
        positive = [max(float(r), 0.0) for r in relevance]
        shares = [(sum(positive[n:]) + UNMOVED) / (sum(positive) + UNMOVED) for n in range(len(layers))]
    everything = alone + sum(share**2 * layer for share, layer in zip(shares, layers, strict=True))
    total = alone
    for share, layer in zip(shares, layers, strict=True):
        agreement = max(0.0, float(np.corrcoef(layer, everything)[0, 1]))
        total = total + agreement * share**2 * layer
    return total.reshape(grid)


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("with_relevance", [False, True])
def test_fused_equals_plain_loops(layers, with_relevance):
    torch.manual_seed(0)
    grid = (4, 5)
    maps = [torch.randn(2, 6, 4 + i, 5 + i) for i in range(layers)]
    evidence = [torch.randn(2, 3, 4 + i, 5 + i) for i in range(layers)]
    image = torch.rand(2, 3, 16, 20)
    local, relevance = (torch.rand(2, 3, 2, 3), torch.randn(2, 3, layers)) if with_relevance else (None, None)
    fast = fused_maps(evidence, feature_affinity(maps, grid, image), grid, local, relevance)
    for n in range(2):
        for j in range(3):
            more = (local[n, j], relevance[n, j]) if with_relevance else ()
            slow = loops([e[n, j] for e in evidence], [m[n] for m in maps], image[n], grid, *more)
            torch.testing.assert_close(fast[n, j], slow, atol=1e-5, rtol=1e-4)


def test_a_layer_behind_the_concept_is_not_asked():
    evidence = [torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4)]
    still = torch.eye(16)[None]
    only_first = fused_maps(evidence, still, (4, 4), None, torch.tensor([[[0.7, -0.1]]]))
    expected = evidence[0] / evidence[0].square().mean().sqrt()
    torch.testing.assert_close(only_first, expected, atol=10 * (UNMOVED / 0.7) ** 2, rtol=0)
    # All of the relevance lies at the second layer: the derivative at the first one holds all of it too.
    both = fused_maps(evidence, still, (4, 4), None, torch.tensor([[[0.0, 0.7]]]))
    torch.testing.assert_close(both, fused_maps(evidence, still, (4, 4)))
    nowhere = fused_maps(evidence, still, (4, 4), None, torch.zeros(1, 1, 2))
    torch.testing.assert_close(nowhere, fused_maps(evidence, still, (4, 4)))


def test_a_layer_that_contradicts_the_others_is_not_asked():
    left, right = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    left[..., :2], right[..., 2:] = 1.0, 1.0
    still = torch.eye(16)[None]
    torch.testing.assert_close(fused_maps([left, left, right], still, (4, 4)), fused_maps([left, left], still, (4, 4)))


def test_evidence_that_is_the_same_everywhere_stays():
    still = torch.eye(16)[None]
    torch.testing.assert_close(fused_maps([torch.full((1, 1, 1, 1), 0.3)], still, (4, 4)), torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize("gradient", ["total", "branch"])
def test_the_order_of_the_layers_does_not_matter(gradient):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 1, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip

    class Reads(nn.Module):
        def __init__(self, places):
            super().__init__()
            self.places = places
            self.weight = torch.randn(18, 5, generator=torch.Generator().manual_seed(1)) * 3

        def forward(self, pooled):
            return torch.cat([pooled[place] for place in self.places], -1) @ self.weight

    def maps(layers, places):
        cefam = ConceptFusionMap(net, layers, Reads(places), list("abc"), torch.eye(5)[:3], map_layer="fused",
                                 gradient=gradient, logit_scale=20.0)  # fmt: skip
        return cefam.attribute(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)))

    torch.testing.assert_close(maps(["5", "1", "3"], [1, 2, 0]), maps(["1", "3", "5"], [0, 1, 2]))


def test_spreading_invents_no_evidence():
    torch.manual_seed(0)
    maps = [torch.randn(1, 6, 7, 7)]
    affinity = feature_affinity(maps, (7, 7), torch.rand(1, 3, 28, 28))
    torch.testing.assert_close(affinity.sum(2), torch.ones(1, 49))
    assert (affinity >= 0).all()
    nothing = fused_maps([-torch.rand(1, 2, 7, 7)], affinity, (7, 7))
    assert torch.equal(nothing, torch.zeros(1, 2, 7, 7))
    evidence = torch.randn(1, 2, 7, 7)
    some = fused_maps([evidence], affinity, (7, 7))
    before = fused_maps([evidence], torch.eye(49)[None], (7, 7))
    torch.testing.assert_close(before.square().mean((2, 3)), torch.ones(1, 2))
    assert some.min() >= 0
    assert (some.amax((2, 3)) <= before.amax((2, 3))).all()  # means of these


def test_spreading_stays_within_what_the_network_sees_as_alike():
    # Two halves with opposite features: evidence in the left one never reaches the right one.
    maps = torch.zeros(1, 2, 6, 6)
    maps[:, 0, :, :3], maps[:, 1, :, 3:] = 1.0, 1.0
    evidence = torch.zeros(1, 1, 6, 6)
    evidence[..., 2, 1] = 1.0
    out = fused_maps([evidence], feature_affinity([maps], (6, 6)), (6, 6))[0, 0]
    assert (out[:, 3:] == 0).all()
    torch.testing.assert_close(out[:, :3], torch.full((6, 3), 6 / 18))  # its mean square is 1: a peak of 6


@pytest.mark.parametrize(
    ("grids", "pixels", "expected"),
    [
        ([(56, 56), (7, 7)], None, (28, 28)),
        ([(56, 56), (7, 7)], (224, 224), (28, 28)),
        ([(14, 14)], None, (14, 14)),
        ([(14, 14)], (224, 224), (28, 28)),
        ([(7, 7)], (224, 224), (28, 28)),
        ([(8, 8)], (64, 64), (32, 32)),
        ([(8, 8)], (16, 20), (16, 16)),
        ([(14, 14)], (16, 16), (14, 14)),
        ([(100, 20)], (200, 200), (50, 10)),
        ([(4, 16)], (400, 64), (16, 64)),
        ([(112, 112)], None, (28, 28)),
    ],
)
def test_grid_is_bounded(grids, pixels, expected):
    assert fused_grid(grids, pixels) == expected


def test_a_constant_image_and_dead_features_give_finite_maps():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2))

    class Copy(nn.Module):
        def forward(self, pooled):
            return pooled[0]

    cefam = ConceptFusionMap(net, ["1"], Copy(), ["a", "b"], torch.eye(5)[:2], map_layer="fused")
    assert cefam.attribute(torch.full((1, 3, 12, 12), 0.5)).isfinite().all()
    net[0].weight.data.zero_()
    net[0].bias.data.fill_(-1.0)
    assert torch.equal(cefam.attribute(torch.rand(1, 3, 12, 12)), torch.zeros(1, 2, 12, 12))


def test_what_rounding_leaves_of_a_difference_does_not_become_a_map():
    """Evidence, features, colors and relevances that would vanish without rounding, moved by the size of rounding.

    Divided by their own size, all of them would become maps of size 1. Divided by at least FAINT or UNMOVED, noise of
    four deviations moves a map by 4 * 3e-7 * 2 / UNMOVED = 2.4e-4 of each layer, whose peak is below 4.
    """
    torch.manual_seed(0)
    grid = (6, 6)
    maps, evidence = torch.randn(1, 8, *grid), torch.randn(1, 2, *grid)
    image = torch.rand(1, 3, 24, 24)

    def noise(like, size=3e-7):
        return size * torch.randn_like(like)

    def near(one, other):
        within(one, other, 1e-3)

    flat = torch.ones_like(evidence)
    spread = feature_affinity([maps], grid, image)
    near(fused_maps([evidence, noise(flat) - flat], spread, grid), fused_maps([evidence, -flat], spread, grid))
    still = torch.eye(36)[None]
    near(feature_affinity([torch.ones_like(maps) + noise(maps)], grid), still)  # one feature everywhere
    dark = maps.clone()
    dark[..., :3, :] = 0.0
    near(feature_affinity([dark + noise(dark)], grid), feature_affinity([dark], grid))
    pale = 0.5 + 1e-3 * image  # less than one gray level
    near(feature_affinity([maps], grid, pale), feature_affinity([maps.double()], grid, pale.double()).float())
    relevance = torch.zeros(1, 2, 2)
    both = fused_maps([evidence, -evidence], spread, grid, None, relevance + noise(relevance))
    near(both, fused_maps([evidence, -evidence], spread, grid, None, relevance))


def test_a_probability_of_nearly_one_has_an_exact_logarithm():
    torch.manual_seed(0)
    space = bank(torch.eye(6), 100.0, 0.0)
    h = torch.eye(6)[:1] + 0.5 * torch.rand(4, 6)
    index = torch.zeros(4, dtype=torch.long)
    exact = (100 * F.normalize(h.double(), dim=1)).softmax(1)[:, 1:].sum(1)
    assert exact.max() < 1e-8  # fp32 holds nothing between 1 - 6e-8 and 1
    torch.testing.assert_close(space.log_probability(h, index).double(), (-exact).log1p(), atol=0, rtol=1e-6)


def test_batched_products_fall_back_to_single_ones():
    class Square(torch.autograd.Function):  # without a batching rule
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            if not isinstance(float(g.sum()), float):
                raise AssertionError
            return 2 * x * g

    x = torch.randn(2, 4, requires_grad=True)
    out = vector_products(Square.apply(x), [x], torch.eye(4)[:3, None].expand(3, 2, 4))[0]
    for i in range(3):
        torch.testing.assert_close(out[i], torch.eye(4)[i] * 2 * x.detach())


def test_maps_are_shares_of_their_strongest_position():
    """Wide and narrow regions of equal energy become comparable; what is faint stays faint, nothing stays nothing."""
    narrow, wide = torch.zeros(4, 4), torch.rand(4, 4) + 0.5
    narrow[1, 2] = 7.0
    shares = of_strongest(torch.stack([narrow, wide, FAINT / 5 * wide / wide.max(), torch.zeros(4, 4)])[None])[0]
    torch.testing.assert_close(shares.amax((1, 2)), torch.tensor([1.0, 1.0, 0.2, 0.0]))
    torch.testing.assert_close(shares[1], wide / wide.max())
