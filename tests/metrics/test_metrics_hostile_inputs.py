"""Maps, masks and scores as bad days make them: infinite, enormous, of one pixel, of no concept, half precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from captum_concepts import metrics
from captum_concepts.errors import InputError, InputWarning, TargetError

INF, NAN = float("inf"), float("nan")
ORDER = ("nra", "region_auc", "pointing_game")  # look at the order of the pixels alone
SCALED = ("epg", "iou", "pixel_accuracy", "average_precision")  # need a finite range
STREAMS = [
    "NormalizedRegionAccuracy", "EnergyPointingGame", "MeanIoU", "HitRate", "ConceptSpecificity", "AveragePrecision",
    "PointingGame", "IoU", "PixelAccuracy", "RegionAUC",
]  # fmt: skip


@pytest.fixture
def mask() -> torch.Tensor:
    drawn = torch.zeros(2, 6, 6, dtype=torch.bool)
    drawn[0, 1:4, 2:5], drawn[1, 3:, :2] = True, True
    return drawn


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class TestInfinite:
    @pytest.mark.parametrize("value", [INF, -INF])
    @pytest.mark.parametrize("name", SCALED)
    def test_a_range_without_end_is_undefined(self, mask, value: float, name: str):
        maps = noise(2, 6, 6)
        maps[0, 2, 2] = value
        found = getattr(metrics, name)(maps, mask)
        assert found.isnan().tolist() == [True, False]
        assert found[1] == getattr(metrics, name)(maps[1:], mask[1:])[0]

    @pytest.mark.parametrize("value", [INF, -INF])
    @pytest.mark.parametrize("name", ORDER)
    def test_the_order_has_a_place_for_it(self, mask, value: float, name: str):
        maps = noise(2, 6, 6)
        maps[0, 2, 2] = value
        finite = maps.clone()
        finite[0, 2, 2] = 9.0 if value > 0 else -9.0
        function = getattr(metrics, name)
        assert torch.equal(function(maps, mask), function(finite, mask))

    def test_a_number_as_threshold_needs_no_range(self, mask):
        maps = torch.where(mask, INF, -INF)
        assert metrics.iou(maps, mask, threshold=0.5).tolist() == [1, 1]
        assert metrics.mean_iou(maps, mask, threshold=0.5) == 1
        assert metrics.iou(maps, mask, threshold="minmax:0.5").isnan().all()

    def test_mean_iou_leaves_them_out_or_draws_nothing(self, mask):
        maps = noise(2, 6, 6)
        maps[0, 0, 0] = INF
        with pytest.warns(InputWarning, match="1 of 2"):
            assert metrics.mean_iou(maps, mask) == metrics.mean_iou(maps[1:], mask[1:])
        nothing = maps.clone()
        nothing[0] = 0
        assert metrics.mean_iou(maps, mask, nan_policy="zero") == metrics.mean_iou(nothing, mask)

    def test_half_precision_that_has_overflowed(self, mask):
        maps = (noise(2, 6, 6) * 200_000).half()  # above 65504
        assert maps.isinf().any()
        assert metrics.epg(maps, mask).isnan().any()
        assert not metrics.nra(maps, mask).isnan().any()

    @pytest.mark.parametrize("name", ["average_drop", "increase_in_confidence"])
    def test_images_are_not_multiplied_by_it(self, name: str):
        maps = noise(2, 6, 6)
        maps[0, 0, 0] = -INF
        corner = lambda x: x[:, 0, 5, 5]  # a score that does not look at the infinite pixel  # noqa: E731
        found = getattr(metrics, name)(corner, noise(2, 3, 6, 6, seed=1), maps)
        assert found.isnan().tolist() == [True, False]


class TestEnormous:
    @pytest.mark.parametrize("name", [*ORDER, *SCALED])
    @pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 3.3e38), (torch.float64, 1.7e308)])
    def test_ends_too_far_apart_to_subtract(self, mask, name: str, dtype: torch.dtype, size: float):
        unit = noise(2, 6, 6).to(dtype) * 2 - 1
        function = getattr(metrics, name)
        maps = unit * size
        assert (maps.amax() - maps.amin()).isinf()
        torch.testing.assert_close(function(maps, mask), function(unit, mask))

    def test_insertion_and_average_drop(self):
        images, unit = noise(2, 3, 6, 6, seed=1), noise(2, 6, 6) * 2 - 1
        score = lambda x: x.mean((1, 2, 3))  # noqa: E731
        for name in ("average_drop", "increase_in_confidence", "insertion", "deletion"):
            function = getattr(metrics, name)
            torch.testing.assert_close(function(score, images, unit * 3.3e38), function(score, images, unit))


class TestIgnored:
    @settings(max_examples=60)
    @given(st.integers(0, 10_000), st.sampled_from(["nra", "region_auc", "epg", "pointing_game", "foreground"]))
    def test_pixels_that_are_ignored_are_as_if_cut_off(self, seed: int, name: str):
        """Two rows are ignored or not there; with ties, and values of minus infinity for the orders."""
        g = torch.Generator().manual_seed(seed)
        maps = torch.randint(-2, 3, (1, 6, 5), generator=g).float()
        if name != "epg":
            maps[maps == -2] = -INF
        masks = torch.rand(1, 6, 5, generator=g) < 0.4
        ignore = torch.zeros(1, 6, 5, dtype=torch.bool)
        ignore[:, 4:] = True
        dirty = maps.clone()
        dirty[:, 4:] = float(torch.tensor([NAN, INF, -INF, 1.0])[seed % 4])

        def measure(*args, **kwargs):
            if name == "foreground":
                return metrics.average_precision(*args, classes="foreground", **kwargs)
            return getattr(metrics, name)(*args, **kwargs)

        found, expected = measure(dirty, masks, ignore=ignore), measure(maps[:, :4], masks[:, :4])
        torch.testing.assert_close(found, expected, equal_nan=True)

    def test_everything(self, mask):
        ignore = torch.ones_like(mask)
        for name in (*ORDER, *SCALED):
            assert getattr(metrics, name)(noise(2, 6, 6), mask, ignore=ignore).isnan().all()


class TestNothing:
    """No example, no concept: nothing comes back, and nothing breaks."""

    @pytest.mark.parametrize("name", [*ORDER, *SCALED])
    @pytest.mark.parametrize(("maps", "masks"), [((0, 3, 3), (0, 6, 6)), ((2, 0, 3, 3), (2, 0, 6, 6))])
    def test_functions(self, name: str, maps, masks):
        found = getattr(metrics, name)(torch.zeros(maps), torch.zeros(masks, dtype=torch.bool))
        assert found.shape == masks[:-2]

    def test_specificity(self):
        masks = torch.zeros(2, 0, 6, 6, dtype=torch.bool)
        assert metrics.concept_specificity(torch.zeros(2, 0, 3, 3), masks).shape == (2, 0)

    @pytest.mark.parametrize("name", STREAMS)
    def test_a_stream_with_an_image_without_concepts(self, name: str):
        metric, alone = getattr(metrics, name)(), getattr(metrics, name)()
        metric.update(torch.zeros(2, 0, 3, 3), torch.zeros(2, 0, 6, 6, dtype=torch.bool))
        assert metric.compute().isnan()
        batch = noise(2, 3, 3, 3), noise(2, 3, 6, 6, seed=1) > 0.5
        for one in (metric, alone):
            one.update(*batch)
        assert metric.compute() == alone.compute()

    def test_evaluate(self):
        masks = noise(3, 2, 6, 6) > 0.5
        data = [
            (noise(3, 6, 6, seed=1), masks[0]),
            (noise(3, 6, 6, seed=2), masks[1, :0]),
            (noise(3, 6, 6, seed=3), masks[2]),
        ]
        counts = iter([2, 0, 2])
        table = metrics.evaluate({"colours": lambda x: x[:, : next(counts)]}, data, ["nra"], n_bootstrap=10)
        row = table.row("colours", "nra")
        assert (row["examples"], row["counted"], row["skipped"]) == (3, 4, 0)

    @pytest.mark.parametrize("shape", [(2, 0, 6), (2, 6, 0)])
    def test_maps_without_pixels_are_refused(self, mask, shape):
        with pytest.raises(InputError, match=r"maps must be \(N, h, w\)"):
            metrics.nra(torch.zeros(shape), mask)
        with pytest.raises(InputError, match=r"masks must be \(N, H, W\)"):
            metrics.nra(torch.zeros(2, 3, 3), torch.zeros(shape, dtype=torch.bool))

    def test_no_scores(self):
        with pytest.raises(TargetError, match="out of range for 0 scores"):
            metrics.average_drop(lambda x: x.new_zeros(len(x), 0), noise(2, 3, 6, 6), noise(2, 6, 6), target=0)


class TestOnePixel:
    @pytest.mark.parametrize("name", [*ORDER, *SCALED])
    def test_a_map_of_one_pixel_is_a_constant_map(self, mask, name: str):
        function = getattr(metrics, name)
        assert torch.equal(function(noise(2, 1, 1), mask), function(torch.full((2, 6, 6), 3.0), mask))

    def test_a_mask_of_one_pixel(self):
        yes, no, heat = torch.ones(1, 1, 1).bool(), torch.zeros(1, 1, 1).bool(), torch.rand(1, 4, 4)
        assert metrics.epg(heat, yes) == metrics.pointing_game(heat, yes) == 1
        assert metrics.nra(heat, yes).isnan()
        assert metrics.nra(heat, no).isnan()
        assert metrics.pixel_accuracy(heat, no) == 1  # nothing of a constant map is above its mean

    def test_an_image_of_one_pixel(self):
        images = noise(2, 3, 1, 1)
        score = lambda x: x.mean((1, 2, 3))  # noqa: E731
        assert metrics.average_drop(score, images, noise(2, 4, 4)).tolist() == [1, 1]  # a constant map shows nothing
        torch.testing.assert_close(metrics.deletion(score, images, noise(2, 4, 4)), score(images) / 2)


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("name", [*ORDER, *SCALED])
    def test_half_is_computed_in_single(self, mask, name: str, dtype: torch.dtype):
        maps = noise(2, 3, 3).to(dtype)
        function = getattr(metrics, name)
        found = function(maps, mask)
        assert found.dtype == torch.float32
        assert torch.equal(found, function(maps.float(), mask))

    def test_many_pixels_in_half(self):
        """Sums of 512 x 512 ones are beyond fp16 (65504) and beyond its whole numbers (2048)."""
        maps = torch.ones(1, 512, 512).half()
        maps[:, 0, 0] = 0
        masks = torch.ones(1, 512, 512).bool()
        masks[:, :256] = False
        assert float(metrics.epg(maps, masks)) == pytest.approx(0.5 * 512**2 / (512**2 - 1), rel=1e-6)

    def test_layouts_and_gradients(self, mask):
        maps = noise(6, 2, 6).permute(1, 0, 2)
        assert not maps.is_contiguous()
        for name in (*ORDER, *SCALED):
            function = getattr(metrics, name)
            expected = function(maps.contiguous(), mask)
            assert torch.equal(function(maps, mask), expected)
            found = function(maps.clone().requires_grad_(), mask.transpose(1, 2).contiguous().transpose(1, 2))
            assert torch.equal(found, expected)
            assert not found.requires_grad


def test_what_zero_replaces_is_reported(mask):
    """Also by mean IoU, whose counts are whole again."""
    maps = noise(2, 6, 6)
    maps[0, 0, 0] = NAN
    table = metrics.evaluate(
        {"one": lambda x: x[:, 0]},
        [(maps[:, None], mask)],
        ["nra", "mean_iou", "iou"],
        nan_policy="zero",
        n_bootstrap=0,
    )
    assert [row["skipped"] for row in table.rows] == [1, 1, 1]
    assert "one/mean_iou 1" in table.to_markdown()
