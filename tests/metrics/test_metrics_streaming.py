"""Streaming metrics: streamed equals whole under any batching, reset, forward, half precision, several processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torchmetrics import MetricCollection

from captum_concepts import metrics
from captum_concepts.errors import InputError, InputWarning


def score(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean((1, 2, 3)).clamp(max=1)


MAPS = {
    metrics.NormalizedRegionAccuracy: metrics.nra,
    metrics.HitRate: metrics.hit_rate,
    metrics.RegionAUC: metrics.region_auc,
    metrics.EnergyPointingGame: metrics.epg,
    metrics.PointingGame: metrics.pointing_game,
    metrics.IoU: metrics.iou,
    metrics.PixelAccuracy: metrics.pixel_accuracy,
    metrics.MeanIoU: metrics.mean_iou,
    metrics.AveragePrecision: metrics.average_precision,
    metrics.ConceptSpecificity: metrics.concept_specificity,
}
SCORES = {
    metrics.AverageDrop: metrics.average_drop,
    metrics.IncreaseInConfidence: metrics.increase_in_confidence,
    metrics.Insertion: metrics.insertion,
    metrics.Deletion: metrics.deletion,
}

WORDS = (metrics.Top1Present, metrics.ConceptAUROC, metrics.PresenceBrier, metrics.ConceptExistence)


def case(several: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    lead = (11, 3) if several else (11,)
    maps, masks = torch.randn(*lead, 5, 6, generator=g), torch.rand(*lead, 9, 9, generator=g) > 0.6
    return maps + 2 * torch.nn.functional.interpolate(masks.float().reshape(-1, 1, 9, 9), (5, 6)).reshape(
        maps.shape
    ), masks


@pytest.mark.parametrize("kind", MAPS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("several", [False, True])
def test_streamed_equals_whole(kind, several):
    maps, masks = case(several or kind is metrics.ConceptSpecificity)
    expected = MAPS[kind](maps, masks).double().mean().float()
    for size in (1, 4, 11):
        metric = kind()
        for part in zip(maps.split(size), masks.split(size), strict=True):
            metric.update(*part)
        torch.testing.assert_close(metric.compute(), expected)
        assert int(metric.counted) == maps[..., 0, 0].numel()
        assert int(metric.skipped) == 0
    metric.reset()
    batch = metric(maps[:5], masks[:5])  # forward: the value of this batch, and the state of all
    torch.testing.assert_close(batch, MAPS[kind](maps[:5], masks[:5]).double().mean().float())
    metric(maps[5:], masks[5:])
    torch.testing.assert_close(metric.compute(), expected)


@pytest.mark.parametrize("kind", SCORES, ids=lambda kind: kind.__name__)
def test_streamed_scores_equal_whole(kind):
    g = torch.Generator().manual_seed(1)
    images, maps = torch.randn(7, 3, 6, 6, generator=g), torch.randn(7, 6, 6, generator=g)
    expected = SCORES[kind](score, images, maps).double().mean().float()
    metric = kind(score)
    for part in zip(images.split(3), maps.split(3), strict=True):
        metric.update(*part)
    torch.testing.assert_close(metric.compute(), expected)


def test_options_are_attributes_and_reach_the_function():
    maps, masks = case()
    labels = masks.int()
    labels[:, 0] = 9
    metric = metrics.NormalizedRegionAccuracy(baseline="exact", ignore_index=9, mode="nearest", nan_policy="zero")
    assert (metric.baseline, metric.ignore_index, metric.mode, metric.nan_policy) == ("exact", 9, "nearest", "zero")
    metric.update(maps, labels)
    expected = metrics.nra(maps, labels, baseline="exact", ignore_index=9, mode="nearest")
    torch.testing.assert_close(metric.compute(), expected.mean())
    ignore = torch.rand(masks.shape, generator=torch.Generator().manual_seed(3)) > 0.5
    for kind, function in MAPS.items():
        if kind is not metrics.ConceptSpecificity:
            metric = kind()
            metric.update(maps, masks, ignore)
            torch.testing.assert_close(metric.compute(), function(maps, masks, ignore=ignore).mean())


def test_undefined_values_are_counted_and_treated_as_asked():
    maps, masks = case()
    maps[0, 0, 0], masks[1] = torch.nan, False
    good = metrics.nra(maps[2:], masks[2:]).mean()
    metric = metrics.NormalizedRegionAccuracy()
    metric.update(maps, masks)
    with pytest.warns(InputWarning, match="2 of 11"):
        torch.testing.assert_close(metric.compute(), good)
    assert (int(metric.counted), int(metric.skipped)) == (9, 2)
    metric = metrics.NormalizedRegionAccuracy(nan_policy="zero")
    metric.update(maps, masks)
    torch.testing.assert_close(metric.compute(), good * 9 / 11)
    assert (int(metric.counted), int(metric.skipped)) == (11, 2)
    metric = metrics.NormalizedRegionAccuracy(nan_policy="propagate")
    metric.update(maps, masks)
    assert metric.compute().isnan()
    with pytest.raises(InputError, match="2 of 11"):
        metrics.NormalizedRegionAccuracy(nan_policy="raise").update(maps, masks)
    with pytest.raises(InputError, match="nan_policy"):
        metrics.MeanIoU(nan_policy="ignore")
    for policy in ("omit", "zero"):
        miou = metrics.MeanIoU(nan_policy=policy)
        miou.update(maps, masks)
        with pytest.warns(InputWarning) if policy == "omit" else _nothing():
            value = miou.compute()
        with pytest.warns(InputWarning) if policy == "omit" else _nothing():
            torch.testing.assert_close(value, metrics.mean_iou(maps, masks, nan_policy=policy))


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def test_half_precision_and_collections():
    maps, masks = case()
    together = MetricCollection([metrics.NormalizedRegionAccuracy(), metrics.EnergyPointingGame(), metrics.MeanIoU()])
    together.update(maps.half(), masks)
    for name, function in (("NormalizedRegionAccuracy", metrics.nra), ("EnergyPointingGame", metrics.epg)):
        torch.testing.assert_close(together.compute()[name], function(maps.half().float(), masks).mean())
    metric = metrics.EnergyPointingGame().half()
    metric.update(maps.bfloat16(), masks)
    torch.testing.assert_close(metric.compute(), metrics.epg(maps.bfloat16().float(), masks).mean())


def test_a_model_as_score_function_is_not_swallowed():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 1), torch.nn.Flatten(0))
    metric = metrics.AverageDrop(model)
    assert metric.score_fn is model
    assert not list(metric.parameters())
    assert not list(metric.children())
    metric.double()
    assert model[1].weight.dtype == torch.float32


def test_two_processes_agree_with_one(tmp_path: Path):
    maps, masks = case(True)
    maps[4, 1, 0, 0] = torch.nan
    torch.save({"maps": maps, "masks": masks}, tmp_path / "case.pt")
    script = tmp_path / "worker.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys, warnings
            import torch, torch.distributed as dist
            from captum_concepts import metrics
            rank, folder = int(sys.argv[1]), sys.argv[2]
            dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
            warnings.simplefilter("ignore")
            case = torch.load(f"{folder}/case.pt")
            mine = slice(0, 4) if rank == 0 else slice(4, None)  # uneven on purpose
            out = []
            kinds = (metrics.NormalizedRegionAccuracy, metrics.ConceptSpecificity, metrics.MeanIoU, metrics.HitRate)
            for kind in kinds:
                metric = kind()
                for i in range(*mine.indices(len(case["maps"]))):
                    metric.update(case["maps"][i : i + 1], case["masks"][i : i + 1])
                out.append(float(metric.compute()))
                with metric.sync_context():
                    out += [int(metric.counted), int(metric.skipped)]
            torch.save(out, f"{folder}/rank{rank}.pt")
            dist.barrier()
            os._exit(0)  # gloo's threads sometimes abort: see several.ending_at_once
            """
        )
    )
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(metrics.__file__).parents[2])}
    workers = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path)], env=env, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors.decode()[-2000:]
    expected = []
    for kind in (metrics.NormalizedRegionAccuracy, metrics.ConceptSpecificity, metrics.MeanIoU, metrics.HitRate):
        metric = kind()
        metric.update(maps, masks)
        with pytest.warns(InputWarning):
            expected += [float(metric.compute()), int(metric.counted), int(metric.skipped)]
    for rank in range(2):
        assert torch.load(tmp_path / f"rank{rank}.pt") == pytest.approx(expected)


def test_a_collection_does_not_take_two_metrics_for_one_because_both_begin_with_zero():
    mask = torch.tensor([[[True, False, False]]])
    hits, points = metrics.HitRate(), metrics.PointingGame()
    together = MetricCollection([hits, points])
    together.update(torch.tensor([[[0.0, 2.0, 1.0]]]), mask)  # 0 for both
    together.update(torch.tensor([[[2.0, 2.0, 1.0]]]), mask)  # an NRA of exactly 0.5 is no hit; a shared peak is half
    assert together.compute() == {"HitRate": torch.tensor(0.0), "PointingGame": torch.tensor(0.25)}


@pytest.mark.parametrize("kind", [*MAPS, metrics.BoxIoU], ids=lambda kind: kind.__name__)
def test_a_batch_of_no_examples_changes_nothing(kind):
    maps, masks = case(kind is metrics.ConceptSpecificity)
    metric = kind()
    metric.update(maps, masks)
    expected = metric.compute()
    metric.update(maps[:0], masks[:0])
    assert metric.compute() == expected


def test_box_iou_leaves_ignored_pixels_out():
    generator = torch.Generator().manual_seed(3)
    maps, masks = torch.rand(20, 9, 7, generator=generator), torch.rand(20, 9, 7, generator=generator) > 0.6
    ignore = torch.zeros_like(masks)
    ignore[:, :, 4:] = True
    expected = metrics.box_iou(maps[:, :, :4], masks[:, :, :4])  # what is left of the pictures
    assert torch.equal(metrics.box_iou(maps, masks, ignore=ignore), expected)
    metric = metrics.BoxIoU()
    metric.update(maps, masks, ignore)
    torch.testing.assert_close(metric.compute(), expected.mean())
    labels = masks.long().masked_fill(ignore, 255)
    marked = metrics.BoxIoU(ignore_index=255)
    marked.update(maps, labels)
    assert marked.compute() == metric.compute()
    with pytest.raises(InputError, match="negative labels"):
        metrics.box_iou(maps, labels.masked_fill(ignore, -1))
    with pytest.warns(InputWarning, match="255"):
        metrics.box_iou(maps, labels)


@pytest.mark.parametrize("kind", WORDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("values", "truth", "said"),
    [
        (torch.rand(2, 4), torch.ones(2, 4).long(), "truth must be bool .* got torch.int64"),
        (torch.rand(2, 4), torch.ones(2, 4).byte(), "got torch.uint8"),
        (torch.rand(2, 4), torch.ones(2, 4), "got torch.float32"),
        (torch.rand(2, 4), torch.ones(4).bool(), r"\(2, 4\) and \(4,\)"),
        (torch.rand(2, 4), torch.ones(2, 3).bool(), r"\(2, 4\) and \(2, 3\)"),
        (torch.rand(4), torch.ones(4).bool(), r"must both be \(N, T\)"),
        (torch.rand(2, 4).numpy(), torch.ones(2, 4).bool(), "values must be a torch.Tensor"),
    ],
)
def test_truth_of_words_is_bool(kind, values, truth, said):
    with pytest.raises(InputError, match=said):
        kind().update(values, truth)


@pytest.mark.parametrize("kind", WORDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16])
def test_values_of_words_in_any_dtype_are_computed_in_floating_point(kind, dtype):
    values, truth = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1]]).to(dtype), torch.eye(4)[:2].bool()
    found, expected = kind(), kind()
    found.update(values, truth)
    expected.update(values.double(), truth)
    torch.testing.assert_close(found.compute(), expected.compute(), atol=1e-7, rtol=0)


def test_values_of_words_are_real_numbers():
    with pytest.raises(InputError, match="values must be real numbers"):
        metrics.ConceptAUROC().update(torch.ones(1, 2) * 1j, torch.eye(2)[:1].bool())


def test_unsigned_masks_are_refused_in_words():
    with pytest.raises(InputError, match=r"pass masks\.long\(\)"):
        metrics.iou(torch.rand(1, 4, 4), torch.ones(1, 4, 4).to(torch.uint16))


@pytest.mark.parametrize("size", [8, (8,), (8, 0), (8.0, 8), "88", None])
def test_a_size_is_two_integers(size):
    maps = torch.rand(2, 4, 4)
    for call in (
        lambda: metrics.resize_maps(maps, size),
        lambda: metrics.box_from_map(maps, size),
        lambda: metrics.center_gaussian(1, size),
        lambda: metrics.concept_location(maps[:, None], torch.zeros(2, 1, 2), size),
    ):
        with pytest.raises(InputError, match=r"size must be \(H, W\)"):
            call()


def test_arrays_are_named_where_tensors_are_needed():
    maps = torch.rand(2, 4, 4)
    for call in (
        lambda: metrics.mean_iou(maps.numpy(), maps > 0.5, nan_policy="zero"),
        lambda: metrics.activation_energy(maps[:, None].numpy()),
        lambda: metrics.resize_maps(maps.numpy(), (2, 2)),
    ):
        with pytest.raises(InputError, match=r"must be a torch\.Tensor"):
            call()


@pytest.mark.parametrize("values", [[[1.5, 0.2]], [[-0.1, 0.2]]])
def test_presence_is_a_probability(values):
    with pytest.raises(InputError, match=r"presence must be in \[0, 1\]"):
        metrics.PresenceBrier().update(torch.tensor(values), torch.eye(2)[:1].bool())
    unknown = metrics.PresenceBrier().per_example(torch.tensor([[torch.nan, 0.2]]), torch.eye(2)[:1].bool())
    assert unknown.isnan().all()
