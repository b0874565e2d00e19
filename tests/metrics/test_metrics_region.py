"""NRA, hit rate and specificity against the published per-pixel loop, and the properties they must have."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from captum_concepts import metrics, published
from captum_concepts.errors import InputError, InputWarning


def published_loop(saliency: np.ndarray, mask: np.ndarray, baseline: str = "published") -> float:
    """The definition, one pixel after another, with the tie rule of the docstring."""
    saliency, mask = saliency.ravel().astype(float), mask.ravel().astype(bool)
    total, region = saliency.size, int(mask.sum())
    order = np.argsort(-saliency, kind="stable")
    auc = high = low = 0.0
    for p in range(1, total + 1):
        value = saliency[order[p - 1]]
        before, tied = saliency > value, saliency == value
        expected = mask[before].sum() + (p - before.sum()) * mask[tied].mean()
        auc += expected / (p + region - expected)
        high += min(p, region) / max(p, region)
        chance = p * region / total
        low += chance / (p + region - chance)
    auc, high, low = auc / total, high / total, low / total
    if baseline == "published":
        low = region / (2 * total)
    return max(auc - low, 0) / (high - low)


def random_case(seed: int, n: int = 4, h: int = 12, w: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    maps, masks = torch.randn(n, h, w, generator=g), torch.rand(n, h, w, generator=g) > 0.7
    masks[:, 0, 0], masks[:, 0, 1] = True, False
    return maps, masks


@pytest.mark.parametrize("baseline", ["published", "exact"])
@pytest.mark.parametrize("levels", [None, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nra_is_the_published_loop(baseline, levels, dtype):
    maps, masks = random_case(0)
    if levels:  # many ties, zeros of both signs among them
        maps = (maps * levels).round() / levels
    maps = maps.to(dtype)
    expected = [published_loop(a.numpy(), m.numpy(), baseline) for a, m in zip(maps, masks, strict=True)]
    torch.testing.assert_close(
        metrics.nra(maps, masks, baseline=baseline), torch.tensor(expected, dtype=dtype), atol=1e-6, rtol=0
    )


def test_nra_of_a_resized_map_with_border_ties_is_the_published_loop():
    maps, masks = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(1)), random_case(2, 3, 20, 24)[1]
    resized = F.interpolate(maps[:, None], (20, 24), mode="bilinear", align_corners=False)[:, 0]
    expected = torch.tensor([published_loop(a.numpy(), m.numpy()) for a, m in zip(resized, masks, strict=True)])
    torch.testing.assert_close(metrics.nra(maps, masks), expected.float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(metrics.nra(maps[:, None], masks), expected.float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(metrics.nra(maps, masks[:, None]), expected.float()[:, None], atol=1e-6, rtol=0)
    nearest = F.interpolate(maps[:, None], (20, 24), mode="nearest")[:, 0]
    assert torch.equal(metrics.nra(maps, masks, mode="nearest"), metrics.nra(nearest, masks))


maps_and_masks = st.integers(2, 6).flatmap(
    lambda h: st.integers(2, 6).flatmap(
        lambda w: st.tuples(
            hnp.arrays(np.int64, (h, w), elements=st.integers(-4, 4)),
            hnp.arrays(bool, (h, w)).filter(lambda m: 0 < m.sum() < m.size),
        )
    )
)


def score(saliency: np.ndarray, mask: np.ndarray, baseline: str = "published") -> float:
    return float(metrics.nra(torch.tensor(saliency)[None].double(), torch.tensor(mask)[None], baseline=baseline))


@settings(max_examples=60, deadline=None)
@given(maps_and_masks, st.sampled_from(["published", "exact"]))
def test_nra_properties(case, baseline):
    saliency, mask = case
    value = score(saliency, mask, baseline)
    assert value == pytest.approx(published_loop(saliency, mask, baseline), abs=1e-9)
    assert 0 <= value <= 1
    # any strictly increasing function of the saliency
    assert score(saliency**3 + 2.0 * saliency - 7, mask, baseline) == value
    assert score(np.exp(saliency), mask, baseline) == value
    # pixels permuted together, and flips
    order = np.random.default_rng(0).permutation(saliency.size)
    shuffled = saliency.ravel()[order].reshape(saliency.shape), mask.ravel()[order].reshape(mask.shape)
    assert score(*shuffled, baseline) == pytest.approx(value, abs=1e-9)
    for axis in (0, 1):
        assert score(np.flip(saliency, axis).copy(), np.flip(mask, axis).copy(), baseline) == pytest.approx(value)
    # the ideal map, and the constant one
    assert score(mask.astype(float), mask, baseline) == pytest.approx(1, abs=1e-9)
    assert score(np.full(mask.shape, 3.0), mask, "exact") == 0


@settings(max_examples=60, deadline=None)
@given(maps_and_masks, st.data())
def test_nra_grows_when_a_mask_pixel_takes_a_better_value(case, data):
    saliency, mask = case
    inside = data.draw(st.sampled_from(np.flatnonzero(mask).tolist()))
    outside = data.draw(st.sampled_from(np.flatnonzero(~mask).tolist()))
    better = saliency.copy().ravel()
    if better[inside] < better[outside]:
        better[inside], better[outside] = better[outside], better[inside]
    assert score(better.reshape(mask.shape), mask) >= score(saliency, mask) - 1e-9


@settings(max_examples=40, deadline=None)
@given(maps_and_masks)
def test_ties_score_the_same_whatever_the_storage_order_and_near_the_mean_of_broken_ties(case):
    saliency, mask = case
    rng = np.random.default_rng(0)
    broken = [
        metrics.region_auc(torch.tensor(saliency + rng.random(mask.shape) * 0.5)[None], torch.tensor(mask)[None]).item()
        for _ in range(200)
    ]
    tied = metrics.region_auc(torch.tensor(saliency)[None], torch.tensor(mask)[None]).item()
    # IoU is convex in the intersection, so the IoU of the expectation lies at or below the mean IoU
    assert tied <= np.mean(broken) + 4 * np.std(broken) / math.sqrt(200) + 1e-9
    assert tied >= min(broken) - 1e-9 or len(np.unique(saliency)) == 1


def test_constant_map_scores_like_the_mean_random_map():
    mask = torch.zeros(1, 40, 40, dtype=torch.bool)
    mask[:, 5:25, 10:30] = True
    noise = torch.rand(300, 40, 40, generator=torch.Generator().manual_seed(0))
    random = metrics.region_auc(noise, mask.expand(300, -1, -1)).mean()
    constant = metrics.region_auc(torch.zeros(1, 40, 40), mask)
    assert random.item() == pytest.approx(constant.item(), abs=2e-3)
    assert metrics.nra(torch.full((1, 40, 40), 0.1), mask, baseline="exact").item() == 0
    assert metrics.nra(torch.zeros(1, 40, 40), mask).item() > 0.05  # what the published baseline gives away


def test_half_precision_signed_zero_infinities_and_integers():
    maps, masks = random_case(3)
    for dtype in (torch.float16, torch.bfloat16):
        low = maps.to(dtype)
        assert torch.equal(metrics.nra(low, masks), metrics.nra(low.float(), masks))
        assert metrics.nra(low, masks).dtype == torch.float32
    mask = torch.tensor([[[True, False]]])
    assert metrics.nra(torch.tensor([[[-0.0, 0.0]]]), mask, baseline="exact").item() == 0
    assert metrics.nra(torch.tensor([[[torch.inf, 1.0]]]), mask).item() == 1
    assert metrics.nra(torch.tensor([[[-torch.inf, 1.0]]]), mask).item() == 0
    levels = (maps * 10).round()
    assert torch.equal(metrics.nra(levels.long(), masks).float(), metrics.nra(levels, masks))
    near = torch.tensor([[[1.0 + 2**-50, 1.0]]], dtype=torch.float64)
    assert metrics.nra(near, mask).item() == 1  # equal in float32, but not in what was given


def test_masks_of_any_kind_and_several_concepts_an_image():
    maps, masks = random_case(4)
    value = metrics.nra(maps, masks)
    assert torch.equal(metrics.nra(maps, masks.int() * 7), value)
    assert torch.equal(metrics.nra(maps, masks.float()), value)
    both, regions = torch.stack([maps, -maps], 1), torch.stack([masks, ~masks], 1)
    out = metrics.nra(both, regions)
    assert out.shape == (4, 2)
    torch.testing.assert_close(out[:, 0], value)
    torch.testing.assert_close(out[:, 1], metrics.nra(-maps, ~masks))


def test_255_beside_other_labels_is_pointed_out():
    maps, masks = random_case(5)
    labels = masks.int()
    labels[:, 0] = 255
    for metric in (metrics.nra, metrics.epg, metrics.mean_iou):
        with pytest.warns(InputWarning, match="integer masks contain 255 next to other labels"):
            metric(maps, labels)
    # Foreground written as 255, and labels of which 255 is known to be none, leave no question.
    assert torch.equal(metrics.nra(maps, masks.int() * 255), metrics.nra(maps, masks))
    assert torch.equal(metrics.nra(maps, masks.int() * 254), metrics.nra(maps, masks))
    metrics.nra(maps, labels, ignore_index=255)


def test_ignored_pixels_do_not_exist():
    maps, masks = random_case(5)
    rows = torch.zeros_like(masks)
    rows[:, 8:] = True
    labels = masks.int().masked_fill(rows, 255)
    for baseline in ("published", "exact"):
        expected = metrics.nra(maps[:, :8], masks[:, :8], baseline=baseline)
        torch.testing.assert_close(metrics.nra(maps, masks, ignore=rows, baseline=baseline), expected)
        torch.testing.assert_close(metrics.nra(maps, labels, ignore_index=255, baseline=baseline), expected)
        constant = metrics.nra(torch.ones_like(maps), masks, ignore=rows, baseline="exact")
        assert torch.equal(constant, torch.zeros(4))
    unseen = maps.masked_fill(rows, torch.nan)  # NaN that nobody looks at
    torch.testing.assert_close(metrics.nra(unseen, masks, ignore=rows), metrics.nra(maps[:, :8], masks[:, :8]))
    assert metrics.nra(maps, masks, ignore=torch.ones_like(masks)).isnan().all()


def test_any_batching_gives_the_same(monkeypatch):
    from captum_concepts.metrics import _prepare

    maps, masks = random_case(6, n=7)
    maps = maps.round(decimals=1)
    together = metrics.nra(maps, masks, baseline="exact")
    monkeypatch.setattr(_prepare, "_CPU_PIXELS", 1)
    torch.testing.assert_close(metrics.nra(maps, masks, baseline="exact"), together)
    torch.testing.assert_close(
        torch.cat([metrics.nra(maps[:3], masks[:3]), metrics.nra(maps[3:], masks[3:])]), metrics.nra(maps, masks)
    )


def test_undefined_cases_are_nan_and_hit_rate_counts_them():
    maps, masks = random_case(7, n=5)
    maps[0, 3, 3] = torch.nan
    masks[1], masks[2] = False, True
    value = metrics.nra(maps, masks)
    assert value.isnan().tolist() == [True, True, True, False, False]
    maps[3] = masks[3].float()
    assert metrics.nra(maps[3:], masks[3:])[0] == 1
    maps[4] = -masks[4].float()
    with pytest.warns(InputWarning, match="3 of 5"):
        assert metrics.hit_rate(maps, masks).item() == 0.5
    assert metrics.hit_rate(maps, masks, nan_policy="zero").item() == pytest.approx(0.2)
    assert metrics.hit_rate(maps, masks, nan_policy="propagate").isnan()
    with pytest.raises(InputError, match="3 of 5"):
        metrics.hit_rate(maps, masks, nan_policy="raise")
    assert metrics.nra(maps[:0], masks[:0]).shape == (0,)


def test_hit_rate_threshold_is_strict():
    mask = torch.tensor([[[True, False]]])
    assert metrics.hit_rate(torch.tensor([[[2.0, 1.0]]]), mask, threshold=1.0).item() == 0
    assert metrics.hit_rate(torch.tensor([[[2.0, 1.0]]]), mask, threshold=0.99).item() == 1


def slow_specificity(maps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    n, t = masks.shape[:2]
    out = torch.full((n, t), torch.nan)
    for i in range(n):
        for k in range(t):
            other = [s for s in range(t) if s != k and masks[i, s].any()]
            if masks[i, k].any() and other:
                nra = [published_loop(maps[i, s].numpy(), masks[i, k].numpy()) for s in range(t)]
                out[i, k] = nra[k] - sum(nra[s] for s in other) / len(other)
    return out


def test_specificity_is_its_definition_and_absent_concepts_take_no_part():
    g = torch.Generator().manual_seed(0)
    maps, masks = torch.randn(3, 4, 6, 7, generator=g), torch.rand(3, 4, 6, 7, generator=g) > 0.6
    masks[1, 2], masks[2, 1:] = False, False
    out = metrics.concept_specificity(maps, masks)
    torch.testing.assert_close(out, slow_specificity(maps, masks), atol=1e-6, rtol=0, equal_nan=True)
    assert out.isnan().sum() == 1 + 4


def test_specificity_properties():
    g = torch.Generator().manual_seed(1)
    masks = torch.rand(60, 3, 8, 8, generator=g) > 0.7
    same = torch.randn(60, 1, 8, 8, generator=g).expand(-1, 3, -1, -1)
    alike = metrics.concept_specificity(same, masks)  # the same map for all concepts
    torch.testing.assert_close(alike, torch.zeros_like(alike), atol=1e-6, rtol=0)
    noise = metrics.concept_specificity(torch.randn(60, 3, 8, 8, generator=g), masks)
    assert abs(noise.mean().item()) < 4 * noise.std().item() / math.sqrt(noise.numel())
    maps = masks.float() + torch.randn(60, 3, 8, 8, generator=g)
    informed = metrics.concept_specificity(maps, masks)
    assert informed.mean() > 0.3
    torch.testing.assert_close(
        metrics.concept_specificity(maps.double().exp(), masks), metrics.concept_specificity(maps.double(), masks)
    )
    wrong = metrics.concept_specificity(maps.roll(1, dims=1), masks)  # another concept's map
    assert wrong.mean() < -0.1
    broken = maps.clone()
    broken[0, 0] = torch.nan
    out = metrics.concept_specificity(broken, masks)
    assert out[0, 0].isnan()
    assert not out[0, 1:].isnan().any()


@pytest.mark.parametrize(
    ("maps", "masks", "options", "message"),
    [
        ([[1.0]], torch.ones(1, 1, 1), {}, "torch.Tensor"),
        (torch.ones(2, 2), torch.ones(2, 2), {}, r"\(N, h, w\)"),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 4, 4), {}, "do not match masks"),
        (torch.ones(3, 4, 4), torch.ones(2, 4, 4), {}, "do not match masks"),
        (torch.ones(2, 4, 4), torch.ones(2, 3, 4, 4), {}, "do not match masks"),
        (torch.ones(2, 4, 4), -torch.ones(2, 4, 4).int(), {}, "ignore_index"),
        (torch.ones(2, 4, 4), torch.full((2, 4, 4), torch.nan), {}, "NaN"),
        (torch.ones(2, 4, 4), torch.ones(2, 4, 4), {"ignore_index": 1}, "integer masks"),
        (torch.ones(2, 4, 4), torch.ones(2, 4, 4), {"ignore": torch.ones(2, 4, 4)}, "bool"),
        (torch.ones(2, 4, 4), torch.ones(2, 4, 4), {"ignore": torch.ones(2, 3, 4).bool()}, "does not fit"),
        (torch.ones(2, 4, 4), torch.ones(2, 4, 4), {"mode": "linear"}, "bilinear"),
        (torch.ones(2, 4, 4), torch.ones(2, 4, 4), {"baseline": "random"}, "published"),
        (torch.ones(2, 0, 4), torch.ones(2, 4, 4), {}, "maps must be"),
        (torch.ones(2, 4, 4, dtype=torch.complex64), torch.ones(2, 4, 4), {}, "real"),
    ],
)
def test_wrong_input_says_what_is_allowed(maps, masks, options, message):
    with pytest.raises(InputError, match=message):
        metrics.nra(maps, masks, **options)


def test_specificity_needs_several_concepts_and_hit_rate_a_share():
    with pytest.raises(InputError, match=r"\(N, T, H, W\)"):
        metrics.concept_specificity(torch.ones(2, 4, 4), torch.ones(2, 4, 4))
    for threshold in (50, -0.1, torch.nan, "0.5", None):
        with pytest.raises(InputError, match=r"threshold must be in \[0, 1\]"):
            metrics.hit_rate(torch.ones(2, 4, 4), torch.ones(2, 4, 4), threshold=threshold)
        with pytest.raises(InputError, match=r"threshold must be in \[0, 1\]"):
            metrics.HitRate(threshold=threshold)


def test_a_constant_map_stays_constant_when_resized():
    mask = torch.zeros(1, 50, 50, dtype=torch.bool)
    mask[:, 3:20, 7:31] = True
    assert metrics.nra(torch.full((1, 7, 7), 0.1), mask, baseline="exact").item() == 0
    assert metrics.epg(torch.full((1, 7, 7), 0.1), mask).item() == pytest.approx(mask.float().mean().item())


def test_the_paths_of_other_devices_agree(monkeypatch):
    from captum_concepts.metrics import _areas

    g = torch.Generator().manual_seed(8)
    maps = (torch.randn(3, 40, 50, generator=g).clamp(min=0) * 8).round()  # one long group of ties, many short ones
    masks = torch.rand(3, 40, 50, generator=g) > 0.5
    expected = metrics.nra(maps, masks)
    monkeypatch.setattr(_areas, "_sort_rows", lambda keys: torch.sort(keys, dim=1).values)
    monkeypatch.setattr(_areas, "_LONG_GROUP", 10**9)
    torch.testing.assert_close(metrics.nra(maps, masks), expected)
    torch.testing.assert_close(expected[0].item(), published_loop(maps[0].numpy(), masks[0].numpy()), atol=1e-6, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu():
    maps, masks = random_case(9, n=6, h=64, w=48)
    for heat in (maps, maps.relu(), maps.half(), maps.double()):
        for metric in (metrics.nra, metrics.epg, metrics.pointing_game, metrics.iou, metrics.average_precision):
            found = metric(heat.cuda(), masks.cuda())
            assert found.is_cuda
            torch.testing.assert_close(found.cpu(), metric(heat, masks), atol=1e-5, rtol=1e-5)


def test_memory_is_bounded_by_pixels_not_by_maps():
    from captum_concepts.metrics import _prepare

    masks = torch.zeros(300, 100, 100, dtype=torch.bool)
    pairs = _prepare.prepare(torch.rand(300, 4, 4), masks)
    sizes = [chunk.values.numel() for chunk in pairs.chunks()]
    assert sum(sizes) == masks.numel()
    assert max(sizes) <= _prepare._CPU_PIXELS


def authors_nra(saliency: np.ndarray, mask: np.ndarray) -> float:
    """The authors' evaluation, rewritten: an IoU a pixel up to 1 % of the image, then one each per cent."""
    order = np.argsort(saliency.ravel(), kind="stable")[::-1]
    inside, size, region = mask.ravel()[order], mask.size, int(mask.sum())
    step, hits, auc, high = size // 100, 0, 0.0, 0.0
    for before, hit in enumerate(inside):
        hits += int(hit)
        if before < step or before % step == 0:
            unit = size if before < step else 100
            auc += hits / (before + 1 - hits + region) / unit
            high += (before / region if before < region else region / before) / unit
    low = region / size / 2
    return max(auc - low, 0) / (high - low)


@pytest.mark.parametrize("side", [2, 8, 25])
def test_the_authors_thresholds(side):
    rng = np.random.default_rng(side)
    mask = np.zeros((30, 40), dtype=bool)
    mask[3 : 3 + side, 5 : 5 + side] = True
    saliency = rng.random(mask.shape) + 0.5 * mask
    maps, masks = torch.tensor(saliency)[None], torch.tensor(mask)[None]
    found = metrics.nra(maps, masks, **published.NRA)
    assert found.item() == pytest.approx(authors_nra(saliency, mask), abs=1e-9)
    assert torch.equal(found, metrics.NormalizedRegionAccuracy(thresholds="authors").per_example(maps, masks))
    left_out = torch.zeros_like(masks)
    left_out[:, 28:] = True
    cut = metrics.nra(maps, masks, thresholds="authors", ignore=left_out)
    assert cut.item() == pytest.approx(authors_nra(saliency[:28], mask[:28]), abs=1e-9)
    with pytest.raises(InputError, match="thresholds must be one of"):
        metrics.nra(maps, masks, thresholds="coarse")


def test_random_maps_average_zero_only_if_negative_values_count():
    masks = torch.zeros(300, 20, 20, dtype=torch.bool)
    masks[:, 4:11, 6:13] = True
    noise = torch.rand(300, 20, 20, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    cut = metrics.nra(noise, masks, baseline="exact")
    signed = metrics.nra(noise, masks, baseline="exact", signed=True)
    assert torch.equal(cut, signed.clamp(min=0))
    error = signed.std() / math.sqrt(len(signed))
    assert abs(signed.mean()) < 4 * error
    assert cut.mean() > 4 * error
