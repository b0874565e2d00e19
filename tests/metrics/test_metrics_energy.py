"""Energy pointing game and pointing game against their formulas, one pixel after another."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from captum_concepts import metrics
from captum_concepts.errors import InputError


def random_case(seed: int, n: int = 5, h: int = 11, w: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    maps, masks = torch.randn(n, h, w, generator=g), torch.rand(n, h, w, generator=g) > 0.7
    masks[:, 0, 0] = True
    return maps, masks


def test_epg_is_the_formula_after_resizing():
    maps, masks = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0)), random_case(0)[1]
    expected = []
    for a, m in zip(maps, masks, strict=True):
        a = F.interpolate(a[None, None], m.shape, mode="bilinear", align_corners=False)[0, 0].double()
        a = (a - a.min()) / (a.max() - a.min())
        expected.append(float((a * m).sum() / a.sum()))
    torch.testing.assert_close(metrics.epg(maps, masks), torch.tensor(expected))


def test_epg_without_scaling_is_relevance_mass_accuracy():
    maps, masks = random_case(1)
    for normalize, heat in (("none", maps.abs()), ("relu", maps.clamp(min=0))):
        mass = (heat * masks).sum((1, 2)) / heat.sum((1, 2))  # as quantus: sum inside / sum, map as it is
        torch.testing.assert_close(
            metrics.epg(maps.abs() if normalize == "none" else maps, masks, normalize=normalize), mass
        )
    scaled = metrics.epg(maps.abs() + 1, masks)
    torch.testing.assert_close(scaled, metrics.epg(maps.abs(), masks))  # an offset does not matter to this one
    assert (metrics.epg(maps.abs() + 1, masks, normalize="none") - scaled).abs().max() > 0.01  # but to quantus'


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.float64, (4, 5), elements=st.floats(-5, 5, width=32)), hnp.arrays(bool, (4, 5)), st.floats(0.1, 9))
def test_epg_properties(saliency, mask, scale):
    mask[0, 0] = True
    heat, region = torch.tensor(saliency)[None], torch.tensor(mask)[None]
    value = metrics.epg(heat, region).item()
    assert 0 <= value <= 1 + 1e-12
    if saliency.max() - saliency.min() > 1e-3:
        assert metrics.epg(heat * scale + 2, region).item() == pytest.approx(value, abs=1e-6)
        rest = metrics.epg(heat, ~region).item()
        assert math.isnan(rest) if mask.all() else rest == pytest.approx(1 - value, abs=1e-9)
    assert metrics.epg(heat.flip(-1), region.flip(-1)).item() == pytest.approx(value, abs=1e-9)
    assert metrics.epg(heat, torch.ones_like(region)).item() == pytest.approx(1)
    assert metrics.epg(torch.full_like(heat, 0.1), region).item() == pytest.approx(mask.mean())


def test_epg_edge_cases():
    maps, masks = random_case(2)
    maps[0, 1, 1], maps[1, 1, 1] = torch.nan, torch.inf
    masks[2] = False
    assert metrics.epg(maps, masks).isnan().tolist() == [True, True, True, False, False]
    zero = torch.zeros(1, 2, 2)
    quarter = torch.tensor([[[1, 0], [0, 0]]])
    for normalize in ("minmax", "relu", "none"):
        assert metrics.epg(zero, quarter, normalize=normalize).item() == 0.25
    with pytest.raises(InputError, match="negative"):
        metrics.epg(-torch.ones(1, 2, 2), quarter, normalize="none")
    with pytest.raises(InputError, match="minmax"):
        metrics.epg(zero, quarter, normalize="max")
    half = torch.rand(3, 200, 200, generator=torch.Generator().manual_seed(3)).half() * 100
    mask = torch.rand(3, 200, 200, generator=torch.Generator().manual_seed(4)) > 0.5
    torch.testing.assert_close(metrics.epg(half, mask), metrics.epg(half.double(), mask).float())  # no fp16 overflow


def test_ignored_pixels_neither_hold_energy_nor_scale_the_map():
    maps, masks = random_case(3)
    ignore = torch.zeros_like(masks)
    ignore[:, 6:] = True
    wild = maps.clone()
    wild[:, 8] = 1e6
    torch.testing.assert_close(metrics.epg(wild, masks, ignore=ignore), metrics.epg(maps[:, :6], masks[:, :6]))
    torch.testing.assert_close(
        metrics.pointing_game(wild, masks, ignore=ignore), metrics.pointing_game(maps[:, :6], masks[:, :6])
    )


@pytest.mark.parametrize("tolerance", [0, 1, 1.5, 3, 100])
def test_pointing_game_measures_the_distance_of_every_tied_peak(tolerance):
    maps, masks = random_case(4, n=12)
    maps = maps.round()  # several maxima
    expected = []
    for a, m in zip(maps, masks, strict=True):
        peaks, region = (a == a.max()).nonzero().tolist(), m.nonzero().tolist()
        hits = [any(math.dist(p, q) <= tolerance for q in region) for p in peaks]
        expected.append(sum(hits) / len(hits))
    torch.testing.assert_close(metrics.pointing_game(maps, masks, tolerance=tolerance), torch.tensor(expected))


def test_pointing_game_where_quantus_differs_and_edge_cases():
    heat, mask = torch.tensor([[[5.0, 5.0, 0.0]]]), torch.tensor([[[True, False, False]]])
    assert metrics.pointing_game(heat, mask).item() == 0.5  # quantus: any hit among the tied maxima counts, 1.0
    assert metrics.pointing_game(torch.zeros(1, 1, 3), mask).item() == pytest.approx(1 / 3)
    assert metrics.pointing_game(heat, torch.zeros(1, 1, 3)).isnan()
    assert metrics.pointing_game(heat * torch.nan, mask).isnan()
    assert metrics.pointing_game(-torch.inf * torch.ones(1, 1, 3), mask).item() == pytest.approx(1 / 3)
    for tolerance in (-1, torch.inf, torch.nan, "15", None):
        with pytest.raises(InputError, match="tolerance"):
            metrics.pointing_game(heat, mask, tolerance=tolerance)
    both = metrics.pointing_game(torch.stack([heat, heat], 1), torch.stack([mask, ~mask], 1))
    assert both.tolist() == [[0.5, 0.5]]
