"""Average drop, increase in confidence, insertion and deletion against the published formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from captum_concepts import metrics, published
from captum_concepts.errors import InputError, TargetError
from captum_concepts.metrics._scoring import blur


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
            self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x)).softmax(-1)


@pytest.fixture
def case():
    g = torch.Generator().manual_seed(1)
    return Net().eval(), torch.randn(5, 3, 8, 8, generator=g), torch.randn(5, 8, 8, generator=g)


def test_average_drop_and_increase_are_the_published_formulas(case):
    net, images, maps = case
    target = [0, 1, 2, 1, 0]
    drops, rises = [], []
    for x, a, c in zip(images, maps, target, strict=True):
        a = (a - a.min()) / (a.max() - a.min())
        with torch.no_grad():
            full, shown = net(x[None])[0, c], net((x * a)[None])[0, c]
        drops.append(float((full - shown).clamp(min=0) / full))
        rises.append(float(full < shown))
    for size in (1, 2, 32):
        options = {"target": target, "batch_size": size, **published.AVERAGE_DROP}
        torch.testing.assert_close(metrics.average_drop(net, images, maps, **options), torch.tensor(drops))
        assert metrics.increase_in_confidence(net, images, maps[:, None], **options).tolist() == rises
    assert 0 < sum(rises) < 5  # the case tells the two apart


def test_outputs_and_targets_are_read_as_by_the_explainers(case):
    """A dictionary with logits, and Captum's list of tuples."""
    net, images, maps = case
    for function in (metrics.average_drop, metrics.increase_in_confidence, metrics.insertion, metrics.deletion):
        expected = function(net, images, maps, target=[0, 1, 2, 1, 0])
        found = function(lambda x: {"logits": net(x)}, images, maps, target=[(0,), (1,), (2,), (1,), (0,)])
        torch.testing.assert_close(found, expected)


def published_curve(net, image, saliency, start, finish, step, target):
    """RISE's evaluation loop: pixels by falling saliency, ``step`` at a time; area by trapezoids."""
    pixels = saliency.numel()
    order = np.flip(np.argsort(saliency.reshape(-1).numpy()))
    current, goal = start.clone().reshape(3, -1), finish.reshape(3, -1)
    scores = []
    for i in range(pixels // step + 1):
        with torch.no_grad():
            scores.append(float(net(current.reshape(image.shape)[None])[0, target]))
        coords = order[step * i : step * (i + 1)].copy()
        current[:, coords] = goal[:, coords]
    scores = np.array(scores)
    return scores, (scores.sum() - scores[0] / 2 - scores[-1] / 2) / (len(scores) - 1)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("steps", [None, 4])
def test_insertion_and_deletion_are_the_published_loop(case, batch_size, steps):
    net, images, maps = case
    step = 8 if steps is None else 16
    options = {"target": 1, "batch_size": batch_size, "n_steps": steps, "return_curve": True}
    area, curve = metrics.deletion(net, images, maps, **options)
    inserted, inserted_curve = metrics.insertion(net, images, maps, **options)
    for i in range(5):
        scores, expected = published_curve(net, images[i], maps[i], images[i], torch.zeros_like(images[i]), step, 1)
        np.testing.assert_allclose(curve[i], scores, rtol=1e-5)
        assert area[i].item() == pytest.approx(expected, rel=1e-5)
        smooth = blur(images[i : i + 1])[0]
        scores, expected = published_curve(net, images[i], maps[i], smooth, images[i], step, 1)
        np.testing.assert_allclose(inserted_curve[i], scores, rtol=1e-5)
        assert inserted[i].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["insertion", "deletion"])
def test_published_settings_at_the_published_size(name):
    """One row of 224 pixels per step."""
    g = torch.Generator().manual_seed(0)
    image, heat, weight = (
        torch.rand(3, 224, 224, generator=g),
        torch.randn(224, 224, generator=g),
        torch.randn(3, generator=g),
    )

    def net(x):
        return torch.stack([torch.zeros(len(x)), 9 * (x.mean((2, 3)) @ weight)], 1).softmax(1)

    function = getattr(metrics, name)
    found = function(net, image[None], heat[None], target=1, **getattr(published, name.upper()))
    start, goal = (image, torch.zeros_like(image)) if name == "deletion" else (blur(image[None])[0], image)
    _, expected = published_curve(net, image, heat, start, goal, 224, 1)
    assert found.item() == pytest.approx(expected, abs=1e-5)


def test_uneven_steps_weigh_by_the_pixels_changed():
    image = torch.arange(1.0, 6).reshape(1, 1, 1, 5)
    area, curve = metrics.deletion(
        lambda x: x.sum((1, 2, 3)), image, image[:, 0], n_steps=2, return_curve=True
    )  # round(2.5) = 2 pixels, then 3
    assert curve.tolist() == [[15, 6, 0]]
    assert area.item() == pytest.approx(0.4 * (15 + 6) / 2 + 0.6 * 6 / 2)


def published_kernel() -> np.ndarray:
    """RISE's code: a point in an 11 x 11 window, smoothed by scipy's Gaussian filter of sigma 5."""
    from scipy.ndimage import gaussian_filter

    point = np.zeros((11, 11))
    point[5, 5] = 1
    return gaussian_filter(point, 5)


def test_blur_is_the_published_kernel_and_the_gaussian_its_own():
    from scipy.ndimage import convolve1d
    from scipy.signal import convolve2d

    image = torch.rand(1, 2, 20, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernel = published_kernel()
    assert kernel[5, 5] == pytest.approx(0.0088, abs=5e-5)
    expected = np.stack([convolve2d(channel, kernel, mode="same") for channel in image[0].numpy()])[None]
    np.testing.assert_allclose(blur(image), expected, atol=1e-12)
    kernel = np.exp(-(np.arange(-5, 6) ** 2) / 50)
    expected = image.numpy()
    for axis in (2, 3):
        expected = convolve1d(expected, kernel / kernel.sum(), axis=axis, mode="mirror")
    np.testing.assert_allclose(blur(image, "gaussian"), expected, atol=1e-12)
    small = torch.rand(1, 1, 2, 3, generator=torch.Generator().manual_seed(1))
    assert blur(small).shape == small.shape
    hidden = torch.zeros(1, 4, 4)
    seen: list[torch.Tensor] = []

    def score(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x.flatten(1).sum(1)

    picture = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    raw = {"scores": "raw"}
    for baseline, expected in (
        ("zero", torch.zeros_like(picture)),
        ("mean", picture.mean((2, 3), keepdim=True).expand_as(picture)),
        ("blur", blur(picture)),
        ("gaussian", blur(picture, "gaussian")),
        (
            torch.tensor([1.0, 2.0, 3.0])[:, None, None],
            torch.tensor([1.0, 2.0, 3.0])[None, :, None, None].expand_as(picture),
        ),
    ):
        metrics.average_drop(score, picture, hidden, baseline=baseline, **raw)  # a constant map shows nothing
        torch.testing.assert_close(seen[-1], expected)
    metrics.average_drop(score, picture, torch.full((1, 4, 4), 0.25), normalize=False, **raw)
    torch.testing.assert_close(seen[-1], picture * 0.25)
    metrics.average_drop(score, picture, torch.full((1, 4, 4), 0.25), normalize=False, baseline="mean", **raw)
    torch.testing.assert_close(seen[-1], picture * 0.25 + picture.mean((2, 3), keepdim=True) * 0.75)


def test_the_scale_of_the_scores_is_explicit():
    images, maps = torch.ones(2, 1, 2, 2), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]] * 2)

    def similarity(x: torch.Tensor) -> torch.Tensor:
        return x.mean((1, 2, 3)) - 0.5

    full, shown = (1 + 0.5) / 2, (1 - 0.25) / 2
    torch.testing.assert_close(
        metrics.average_drop(similarity, images, maps, scores="similarity"), torch.full((2,), (full - shown) / full)
    )
    with pytest.raises(InputError, match="probability"):  # logits, by default: a ratio needs a scale with a zero
        metrics.average_drop(lambda x: 9 * similarity(x), images, maps)
    with pytest.raises(InputError, match="similarity"):
        metrics.average_drop(lambda x: 9 * similarity(x), images, maps, scores="similarity")
    assert (
        metrics.average_drop(lambda x: similarity(x) - 1, images, maps, scores="raw").isnan().all()
    )  # a share of a negative score


def test_by_default_as_many_steps_as_the_map_has_positions():
    images = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    maps = torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(1))
    for function in (metrics.insertion, metrics.deletion):
        area, curve = function(lambda x: x.mean((1, 2, 3)), images, maps, return_curve=True)
        assert curve.shape == (2, 7)
        named = function(lambda x: x.mean((1, 2, 3)), images, maps, n_steps=6)
        assert torch.equal(area, named)
        wide = function(lambda x: x.mean((1, 2, 3)), images, torch.rand(2, 12, 12), return_curve=True)[1]
        assert wide.shape == (2, 13)  # at most one row of pixels per step, as published


def test_ties_constant_and_nan_maps(case):
    net, images, maps = case
    constant = torch.zeros_like(maps)
    whole = metrics.deletion(net, images, constant, target=0)
    parts = torch.cat([metrics.deletion(net, images[i : i + 1], constant[i : i + 1], target=0) for i in range(5)])
    torch.testing.assert_close(whole, parts)
    other = metrics.deletion(net, images, constant, target=0, seed=1)
    assert not torch.equal(whole, other)
    total = images[:1].abs() + 1  # with a sum, the expected curve of a random order is a straight line
    area = metrics.deletion(lambda x: x.sum((1, 2, 3)), total, constant[:1])
    assert area.item() == pytest.approx(total.sum().item() / 2, rel=0.1)
    maps[1, 0, 0] = torch.nan
    for metric in (metrics.average_drop, metrics.increase_in_confidence, metrics.deletion, metrics.insertion):
        assert metric(net, images, maps, target=0).isnan().tolist() == [False, True, False, False, False]


def test_a_better_map_deletes_faster_and_a_target_or_argument_belongs_to_its_example(case):
    images = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    score = lambda x: x.sum((1, 2, 3))  # noqa: E731
    good, bad = images[:, 0], -images[:, 0]
    assert (metrics.deletion(score, images, good) < metrics.deletion(score, images, bad)).all()
    assert (metrics.insertion(score, images, good) > metrics.insertion(score, images, bad)).all()
    weights = torch.arange(1.0, 5)
    one = metrics.deletion(
        lambda x, w, k: w * k * score(x), images, good, additional_forward_args=(weights, 2), batch_size=3
    )
    torch.testing.assert_close(one, 2 * weights * metrics.deletion(score, images, good))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score_fn": 3}, "callable"),
        ({"inputs": torch.ones(3, 8, 8)}, r"\(N, C, H, W\)"),
        ({"maps": torch.ones(4, 8, 8)}, r"\(5, h, w\)"),
        ({"maps": torch.ones(5, 3, 8, 8)}, r"\(5, h, w\)"),
        ({"scores": "logit"}, "scores"),
        ({"baseline": "noise"}, "baseline"),
        ({"baseline": torch.ones(4, 3, 8, 8)}, "does not fit inputs"),
        ({"batch_size": 0}, "batch_size"),
        ({"mode": "cubic"}, "mode"),
        ({"target": None}, "pass target="),
        ({"normalize": False}, "normalize=True"),
        ({"score_fn": lambda x: 1.0}, "must return a tensor"),
    ],
)
def test_wrong_input_says_what_is_allowed(case, change, message):
    net, images, maps = case
    with pytest.raises(InputError, match=message):
        metrics.average_drop(**{"score_fn": net, "inputs": images, "maps": maps, "target": 0} | change)


def test_wrong_targets_and_steps(case):
    net, images, maps = case
    for target in (3, [0, 1], 0.5, "cat", [0, 1, 2, 3, 0]):
        with pytest.raises(TargetError, match="target"):
            metrics.deletion(net, images, maps, target=target)
    for steps in (0, 65, 2.5):
        with pytest.raises(InputError, match="n_steps"):
            metrics.deletion(net, images, maps, target=0, n_steps=steps)
    with pytest.raises(InputError, match="seed must be an integer"):
        metrics.insertion(net, images, maps, target=0, seed="a")


def test_no_call_is_larger_than_the_batch_size(case):
    net, images, maps = case
    sizes: list[int] = []

    def score(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        assert not torch.is_grad_enabled()
        return net(x)[:, 0]

    for metric in (metrics.average_drop, metrics.increase_in_confidence, metrics.deletion, metrics.insertion):
        metric(score, images, maps, batch_size=3)
    assert max(sizes) == 3
