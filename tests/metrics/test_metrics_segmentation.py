"""IoU, pixel accuracy, mIoU and mAP against the published protocol, torchmetrics and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torchmetrics.functional.classification import binary_accuracy, binary_jaccard_index

from captum_concepts import metrics, published
from captum_concepts.errors import InputError, InputWarning


def random_case(seed: int, n: int = 6, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    maps = torch.randn(n, 7, 7, generator=g)
    masks = F.interpolate(torch.rand(n, 1, 4, 4, generator=g), (size, size), mode="bilinear")[:, 0] > 0.5
    return maps, masks


def published_protocol(maps: torch.Tensor, labels: torch.Tensor) -> tuple[float, float, float]:
    """The ImageNet-segmentation evaluation of Chefer et al., one image after another, label -1 unlabelled."""
    correct = labelled = 0
    inter, union, precisions = np.zeros(2), np.zeros(2), []
    for heat, label in zip(maps, labels, strict=True):
        res = F.interpolate(heat[None, None], label.shape, mode="bilinear", align_corners=False)
        res = (res - res.min()) / (res.max() - res.min())
        mean = res.mean()
        one, zero = res.gt(mean).float(), res.le(mean).float()
        one_ap, zero_ap = res.clone(), 1 - res
        for x in (one, zero, one_ap, zero_ap):
            x[x != x] = 0
        predicted = torch.cat([zero, one], 1)[0].max(0).indices.numpy() + 1
        target = label.numpy() + 1
        correct += ((predicted == target) & (target > 0)).sum()
        labelled += (target > 0).sum()
        predicted = predicted * (target > 0)
        for c in (1, 2):
            inter[c - 1] += ((predicted == c) & (target == c)).sum()
            union[c - 1] += ((predicted == c) | (target == c)).sum()
        both = torch.cat([zero_ap, one_ap], 1)[0].reshape(2, -1)
        known = (label != -1).reshape(-1)
        truth = torch.stack([label == 0, label == 1]).reshape(2, -1)
        precisions.append(average_precision_score(truth[:, known].reshape(-1), both[:, known].reshape(-1)))
    return float(correct / labelled), float((inter / union).mean()), float(np.mean(precisions))


@pytest.mark.parametrize("kind", ["smooth", "relu", "constant", "unlabelled"])
def test_the_imagenet_segmentation_protocol_is_reproduced(kind):
    maps, masks = random_case(0)
    labels = masks.long()
    options = {}
    if kind == "relu":
        maps = (maps - 0.5).relu()
    if kind == "constant":  # the published code turns 0 / 0 into "nothing drawn"
        maps[2] = 0  # exactly: at 0.1 the published code would score the rounding of its interpolation
    if kind == "unlabelled":
        labels[:, ::5] = -1
        options = {"ignore_index": -1}
    accuracy, miou, precision = published_protocol(maps, labels)
    binary = {**options, **published.SEGMENTATION}
    assert metrics.pixel_accuracy(maps, labels, **binary).mean().item() == pytest.approx(accuracy, abs=1e-6)
    assert metrics.mean_iou(maps, labels, **binary).item() == pytest.approx(miou, abs=1e-6)
    assert metrics.average_precision(maps, labels, **options).mean().item() == pytest.approx(precision, abs=1e-6)


def test_average_precision_is_scikit_learns():
    maps, masks = random_case(1)
    full = F.interpolate(maps[:, None], masks.shape[1:], mode="bilinear", align_corners=False)[:, 0]
    for heat in (full, full.round()):  # with ties as well
        expected = [average_precision_score(m.flatten(), a.flatten()) for a, m in zip(heat, masks, strict=True)]
        found = metrics.average_precision(heat, masks, classes="foreground")
        torch.testing.assert_close(found, torch.tensor(expected).float(), atol=1e-6, rtol=0)
    ignore = torch.rand(masks.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    expected = [average_precision_score(m[~i], a[~i]) for a, m, i in zip(full, masks, ignore, strict=True)]
    found = metrics.average_precision(full, masks, classes="foreground", ignore=ignore)
    torch.testing.assert_close(found, torch.tensor(expected).float(), atol=1e-6, rtol=0)


def test_iou_and_accuracy_are_torchmetrics_at_a_given_threshold():
    maps, masks = torch.rand(6, 32, 32, generator=torch.Generator().manual_seed(2)), random_case(2)[1]
    iou, accuracy = metrics.iou(maps, masks, threshold=0.3), metrics.pixel_accuracy(maps, masks, threshold=0.3)
    for i in range(6):
        assert iou[i].item() == pytest.approx(binary_jaccard_index(maps[i], masks[i].int(), threshold=0.3).item())
        assert accuracy[i].item() == pytest.approx(binary_accuracy(maps[i], masks[i].int(), threshold=0.3).item())
    pooled = binary_jaccard_index(maps, masks.int(), threshold=0.3)  # torchmetrics adds over the batch first
    counts = metrics.segmentation_counts(maps, masks, threshold=0.3).sum(0)
    assert pooled.item() == pytest.approx((counts[0] / counts[1]).item())
    assert pooled.item() != pytest.approx(iou.mean().item(), abs=1e-5)


def test_thresholds():
    heat, mask = torch.tensor([[[2.0, 4.0, 5.0, 10.0]]]), torch.tensor([[[0, 0, 1, 1]]])
    assert metrics.iou(heat, mask).item() == 0.5  # the mean is 5.25: only 10 is above it
    assert metrics.iou(heat, mask, threshold=4).item() == 1  # strictly above, in the map's own units
    assert metrics.iou(heat, mask, threshold="minmax:0.25").item() == 1  # 0, 1/4, 3/8, 1
    assert metrics.iou(heat, mask, threshold="minmax:0.5").item() == 0.5
    for wrong in ("median", "minmax:2", torch.nan, None, True, "minmax"):
        with pytest.raises(InputError, match="threshold"):
            metrics.iou(heat, mask, threshold=wrong)


def test_empty_full_constant_and_nan():
    maps, masks = random_case(3, n=5)
    masks[0], masks[1] = False, True
    maps[2], maps[3, 0, 0] = 0.1, torch.nan
    iou, accuracy = metrics.iou(maps, masks), metrics.pixel_accuracy(maps, masks)
    precision = metrics.average_precision(maps, masks)
    assert iou[0] == 0
    assert iou[2] == 0  # nothing of a constant map is above its mean
    assert accuracy[2].item() == pytest.approx((~masks[2]).float().mean().item())
    assert precision[2].item() == pytest.approx(0.5)
    for values in (iou, accuracy, precision):
        assert values.isnan().tolist() == [False, False, False, True, False]
    assert metrics.iou(maps[2:3], torch.zeros_like(masks[2:3])).isnan()  # nothing drawn, nothing there
    foreground = metrics.average_precision(maps, masks, classes="foreground")
    assert foreground.isnan().tolist() == [True, False, False, True, False]
    assert foreground[2].item() == pytest.approx(masks[2].float().mean().item())
    good = [0, 1, 2, 4]
    with pytest.warns(InputWarning, match="1 of 5"):
        omitted = metrics.mean_iou(maps, masks)
    assert omitted.item() == pytest.approx(metrics.mean_iou(maps[good], masks[good]).item())
    assert metrics.mean_iou(maps, masks, nan_policy="propagate").isnan()
    blank = maps.clone()
    blank[3] = 0
    assert metrics.mean_iou(maps, masks, nan_policy="zero").item() == metrics.mean_iou(blank, masks).item()
    with pytest.raises(InputError, match="undefined"):
        metrics.mean_iou(maps, masks, nan_policy="raise")
    with pytest.raises(InputError, match="nan_policy"):
        metrics.mean_iou(maps, masks, nan_policy="drop")
    with pytest.raises(InputError, match="classes"):
        metrics.average_precision(maps, masks, classes="all")


def test_several_concepts_an_image_and_half_precision():
    maps, masks = random_case(4)
    both, regions = torch.stack([maps, -maps], 1), torch.stack([masks, ~masks], 1)
    for metric in (metrics.iou, metrics.pixel_accuracy, metrics.average_precision):
        out = metric(both, regions)
        assert out.shape == (6, 2)
        torch.testing.assert_close(out[:, 0], metric(maps, masks))
        low = maps.half()
        assert torch.equal(metric(low, masks), metric(low.float(), masks))
    torch.testing.assert_close(
        metrics.mean_iou(both, regions), metrics.mean_iou(both.flatten(0, 1), regions.flatten(0, 1))
    )


def test_a_worse_map_scores_worse():
    _, masks = random_case(5, n=20)
    good = masks.float() + 0.3 * torch.randn(masks.shape, generator=torch.Generator().manual_seed(5))
    bad = good.roll(1, dims=0)
    for metric in (metrics.iou, metrics.pixel_accuracy, metrics.average_precision, metrics.nra, metrics.epg):
        assert metric(good, masks).mean() > metric(bad, masks).mean() + 0.05
    assert metrics.mean_iou(good, masks) > metrics.mean_iou(bad, masks) + 0.05
