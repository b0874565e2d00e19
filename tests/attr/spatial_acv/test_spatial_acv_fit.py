"""SpatialACV's parts: guidance images from anywhere, rows under a budget, held-out accuracy, significance."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from captum_concepts import SpatialACV, published
from captum_concepts.attr.spatial_acv.classifier import calibrate, logistic_trainer, reproducible
from captum_concepts.attr.spatial_acv.fit import fit_concept
from captum_concepts.attr.spatial_acv.problem import make_problem
from captum_concepts.attr.spatial_acv.rows import GuidanceRows, gather, merge, rows_of
from captum_concepts.attr.spatial_acv.statistics import (
    balanced_accuracy,
    encoding_p_value,
    holm,
    refitted_error,
    t_tail,
)
from captum_concepts.errors import InputError


def clustered(seed, images, tag, *, shift=0.0, positions=12, channels=8):
    """Rows of images that differ more between than within images, as real ones do."""
    draw = torch.Generator().manual_seed(seed)
    own = torch.randn(images, 1, channels, generator=draw)
    x = own + 0.5 * torch.randn(images, positions, channels, generator=draw)
    x[..., 0] += shift
    names = tuple(f"{tag}{i}" for i in range(images))
    image = torch.arange(images).repeat_interleave(positions)
    return GuidanceRows(x.flatten(0, 1), image, names, (tag,) * images, (1,) * images, (positions,) * images)


# ------------------------------------------------------------------------------------------------ rows


def test_rows_are_positions_not_reshaped_channels():
    maps = torch.rand(2, 5, 3, 4)
    rows = rows_of(maps)
    for n in range(2):
        for i in range(3):
            for j in range(4):
                assert torch.equal(rows[n, i * 4 + j], maps[n, :, i, j])


def test_budget_keeps_a_seeded_uniform_sample_whatever_the_batches():
    images = torch.rand(30, 4, 6, 6)

    def run(batch, budget, seed=0):
        return gather((("a", b) for b in images.split(batch)), lambda x: x, budget, seed)

    everything = run(7, 10_000)
    assert everything.x.shape == (30 * 36, 4)
    assert torch.equal(everything.x.view(30, 36, 4), rows_of(images))
    assert everything.image.tolist() == [i for i in range(30) for _ in range(36)]
    small = run(7, 200)
    assert (small.x.shape, small.seen, small.images) == ((200, 4), 1080, 30)
    for other in (run(1, 200), run(30, 200)):
        assert torch.equal(small.x, other.x)
        assert torch.equal(small.image, other.image)
    assert not torch.equal(small.x, run(7, 200, seed=1).x)
    # every image is sampled about alike: 200 / 30 rows each
    counts = torch.bincount(run(7, 540).image, minlength=30)
    assert counts.min() > 5
    assert counts.max() < 31


def test_gathering_never_holds_more_than_twice_the_budget_and_a_batch(monkeypatch):
    from captum_concepts.attr.spatial_acv import rows as module

    held = []
    original = module._smallest
    monkeypatch.setattr(module, "_smallest", lambda b, n: held.append(sum(len(p[0]) for p in b)) or original(b, n))
    images = torch.rand(200, 2, 8, 8)
    rows = gather((("a", b) for b in images.split(4)), lambda x: x, 100, 0)
    assert len(rows.x) == 100
    assert max(held) <= 2 * 100 + 4 * 64


def test_equal_images_are_one_image_in_a_set_and_across_sets():
    images = torch.rand(3, 2, 4, 4)
    rows = gather([("a", images), ("b", images[:1])], lambda x: x, 10_000, 0)
    assert len(rows.digests) == 3
    assert (rows.counts, rows.positions) == ((2, 1, 1), (32, 16, 16))
    assert rows.image[-1] == 0
    left = rows.select(lambda digest, origin: digest != rows.digests[0])
    assert (left.images, left.seen, left.image.unique().tolist()) == (2, 32, [0, 1])
    both = merge([rows, gather([("c", images[1:])], lambda x: x, 10_000, 0)])
    assert both.counts == (2, 2, 2)
    assert both.image[-1] == 2


def test_activations_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match="image 0 of 'a' contains NaN or infinite"):
        gather([("a", torch.full((1, 2, 3, 3), torch.nan))], lambda x: x, 10, 0)


# ------------------------------------------------------------------------------------------------ accuracy


def test_folds_hold_out_whole_images_of_both_classes():
    problem = make_problem(clustered(0, 7, "a"), clustered(1, 9, "b"), "a", 3, seed=0)
    assert problem.folds == 3
    for fold in range(3):
        held = problem.rows_in(fold)
        assert not set(problem.image[held].tolist()) & set(problem.image[~held].tolist())
        assert set(problem.y[held].tolist()) == {0, 1}


def test_accuracy_by_image_does_not_reward_recognising_the_image():
    """Rows of one image lie together, so a split by position would tell pure noise apart; a split by image cannot."""
    by_image, by_position = [], []
    for seed in range(6):
        a = clustered(seed, 6, "a", positions=40, channels=32)
        b = clustered(seed + 100, 6, "b", positions=40, channels=32)
        train = logistic_trainer(0.01)
        by_image.append(fit_concept(make_problem(a, b, "a", 3, 0), train).accuracy)
        each = [  # every position its own image: the mistake
            GuidanceRows(
                r.x, torch.arange(240), tuple(f"{t}{i}" for i in range(240)), (t,) * 240, (1,) * 240, (1,) * 240
            )
            for r, t in ((a, "a"), (b, "b"))
        ]
        by_position.append(fit_concept(make_problem(*each, "a", 3, 0), train).accuracy)
    assert np.mean(by_position) > 0.9
    assert abs(np.mean(by_image) - 0.5) < 0.12


def test_the_corrected_interval_against_scipy():
    """Welch's variance times Nadeau and Bengio's correction for K folds: 1 + K / (K - 1)."""
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    a, b = draw.uniform(0.5, 0.9, 9), draw.uniform(0.2, 0.9, 30)
    label = torch.tensor([1] * 9 + [0] * 30)
    accuracy, (low, high) = balanced_accuracy(torch.tensor(np.concatenate([a, b])), label == 1, folds=3)
    assert accuracy == pytest.approx((a.mean() + b.mean()) / 2)
    parts = np.array([a.var(ddof=1) / 9, b.var(ddof=1) / 30]) / 4
    freedom = parts.sum() ** 2 / (parts**2 / np.array([8, 29])).sum()
    reach = stats.t.ppf(0.975, freedom) * np.sqrt(parts.sum() * (1 + 3 / 2))
    assert (low, high) == pytest.approx((accuracy - reach, min(accuracy + reach, 1)), abs=1e-6)
    _, (low, high) = balanced_accuracy(torch.tensor(np.concatenate([a, b])), label == 1, folds=3, error=0.05)
    assert high - low == pytest.approx(2 * 0.05 * stats.t.ppf(0.975, freedom), abs=1e-6)
    for freedom in (1, 2.5, 9, 200):
        for t in (-3.0, -0.2, 0.0, 0.7, 2.0, 40.0):
            assert t_tail(t, freedom) == pytest.approx(stats.t.sf(t, freedom), rel=1e-9)


def held_out(problem, times, lam):
    """Held-out balanced accuracy where image i counts ``times[i]`` times, each fold fitted to the end."""
    right = torch.zeros(len(problem.label), dtype=torch.float64)
    for fold in range(problem.folds):
        rows = ~problem.rows_in(fold)
        x, y, weight = problem.x[rows], problem.y[rows], times[problem.image[rows]].clone()
        for label in (0, 1):
            weight[y == label] *= len(y) / 2 / weight[y == label].sum()
        w, b = logistic_trainer(lam)(x, y, weight)
        for i in (problem.fold == fold).nonzero().flatten():
            own = problem.image == i
            right[i] = (((problem.x[own] @ w + b) > 0) == (problem.y[own] == 1)).double().mean()
    sides = [problem.label == label for label in (0, 1)]
    return float(sum((times[s] * right[s]).sum() / times[s].sum() for s in sides) / 2)


def test_the_refitted_error_is_that_of_a_bootstrap_with_whole_refits():
    for seed in range(3):
        problem = make_problem(clustered(seed, 15, "a", shift=1.5), clustered(seed + 9, 15, "b"), "a", 3, 0)
        train = logistic_trainer(0.3)
        balance = torch.ones(len(problem.x))
        fits = [train(problem.x[r], problem.y[r], balance[r]) for r in (~problem.rows_in(f) for f in range(3))]
        draw, found = np.random.default_rng(seed), []
        for _ in range(60):
            times = torch.zeros(30)
            for side in (range(15), range(15, 30)):
                times += torch.bincount(torch.tensor(draw.choice(list(side), 15)), minlength=30)
            found.append(held_out(problem, times, 0.3))
        whole = np.std(found, ddof=1)
        assert refitted_error(problem, fits, 0.3) == pytest.approx(whole, rel=0.35)


@pytest.mark.parametrize("images", [10, 30, 60])
def test_the_interval_covers_the_accuracy_on_new_images(images):
    """Truth: the accuracy on new images of vectors fitted as in the folds, which the estimate's mean is."""
    found = []
    for seed in range(300):
        options = {"positions": 6, "shift": 2.5}
        concept, other = clustered(2 * seed, images, "a", **options), clustered(2 * seed + 1, images, "b", positions=6)
        one = fit_concept(make_problem(concept, other, "a", 3, seed), logistic_trainer(0.3), 0.3, seed)
        found.append((one.accuracy, *one.interval))
    accuracy, low, high = np.array(found).T
    assert 0.93 <= ((low <= accuracy.mean()) & (accuracy.mean() <= high)).mean() <= 0.97


def test_the_vector_solves_the_penalised_problem():
    """Gradient of the balanced L2 logistic objective, by hand, is zero at the fitted vector."""
    a, b = clustered(0, 5, "a", shift=5.0), clustered(1, 11, "b")
    x = torch.cat([a.x, b.x]).double()
    y = torch.cat([torch.ones(len(a.x)), torch.zeros(len(b.x))]).double()
    problem = make_problem(a, b, "a", 3, 0)
    fitted = fit_concept(problem, logistic_trainer(0.3))
    # back to the scaled features the penalty is stated for
    w = fitted.vector.double() * fitted.slope * problem.scale
    z = (x - problem.center.double()) / problem.scale
    bias = fitted.intercept + fitted.slope * float(problem.center.double() @ fitted.vector.double())
    share = torch.where(y == 1, 0.5 / len(a.x), 0.5 / len(b.x))
    residual = share * (torch.sigmoid(z @ w + bias) - y)
    assert float((z.T @ residual + 0.3 * w).norm()) < 2e-3 * float(w.norm())
    assert abs(float(residual.sum())) < 1e-3
    assert float(fitted.vector.norm()) == pytest.approx(1, abs=1e-6)
    assert fitted.vector[0] > 0.8


def test_published_settings_give_the_vector_of_the_notebook():
    """scikit-learn's logistic regression with C=1 on the rows as they are, which the notebook calls."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    draw = torch.Generator().manual_seed(0)
    concept, negatives = (torch.rand(12, 3, 4, 6, generator=draw, dtype=torch.float64) for _ in range(2))
    concept[:, 1] += 0.1
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 5, 1), nn.Tanh())).double()
    acv = SpatialACV(net, "0").fit({"a": concept}, negatives, **published.SPATIAL_ACV_FIT)
    seen = [net(images).detach() for images in (concept, negatives)]
    rows = [maps.flatten(2).transpose(1, 2).reshape(-1, 5).numpy() for maps in seen]
    x, y = np.vstack(rows), np.hstack([np.ones(len(rows[0])), np.zeros(len(rows[1]))])
    expected = linear_model.LogisticRegression(max_iter=10_000, tol=1e-12).fit(x, y).coef_[0]
    assert acv.vectors[0].numpy() == pytest.approx(expected / np.linalg.norm(expected), abs=1e-5)
    theirs = torch.einsum("nchw,c->nhw", seen[1], torch.tensor(expected / np.linalg.norm(expected)))
    assert acv.concept_maps(negatives)[:, 0].numpy() == pytest.approx(theirs.numpy(), rel=1e-5, abs=1e-5)
    strong = SpatialACV(net, "0").fit({"a": concept}, negatives)
    assert float((strong.vectors - acv.vectors).abs().max()) > 1e-3


def test_calibration_of_a_given_direction():
    linear_model = pytest.importorskip("sklearn.linear_model")
    draw = torch.Generator().manual_seed(0)
    projection = torch.randn(4000, generator=draw)
    y = (torch.rand(4000, generator=draw) < torch.sigmoid(2 * projection - 1)).long()
    w, b = calibrate(projection[:, None], y, torch.ones(4000), torch.tensor([5.0]))
    spread = float((5 * projection).std())
    z = (5 * projection / spread)[:, None].numpy()
    expected = linear_model.LogisticRegression(C=1 / (1e-3 * 4000), tol=1e-10).fit(z, y.numpy())  # a slight penalty
    assert float(w[0]) == pytest.approx(5 * expected.coef_[0, 0] / spread, abs=1e-3)
    assert float(b) == pytest.approx(expected.intercept_[0], abs=1e-3)
    assert (float(w[0]), float(b)) == pytest.approx((2, -1), abs=0.07)  # what they were drawn from


def test_constant_activations_are_refused():
    same = torch.ones(24, 4)
    a, b = (
        GuidanceRows(same, torch.arange(2).repeat_interleave(12), (f"{t}0", f"{t}1"), (t, t), (1, 1), (12, 12))
        for t in "ab"
    )
    with pytest.raises(InputError, match="same activation at every position"):
        make_problem(a, b, "a", 3, 0)


# ------------------------------------------------------------------------------------------------ significance


def reference_statistic(problem, labels):
    """Held-out balanced accuracy of a shrunken linear discriminant, one fold and one labelling at a time."""
    right = np.zeros(len(labels))
    x, image = problem.x.double().numpy(), problem.image.numpy()
    for fold in range(problem.folds):
        out = (problem.fold == fold).numpy()[image]
        seen, own = x[~out], labels[image[~out]]
        centred = seen - seen.mean(0)
        covariance = centred.T @ centred / len(seen)
        level = np.trace(covariance) / len(covariance)
        covariance = 0.9 * covariance + (0.1 * level + 1e-8) * np.eye(len(covariance))
        up, down = seen[own].mean(0), seen[~own].mean(0)
        weight = np.linalg.solve(covariance, up - down)
        says = x[out] @ weight > weight @ (up + down) / 2
        for i in np.unique(image[out]):
            right[i] = (says[image[out] == i] == labels[i]).mean()
    return (right[labels].mean() + right[~labels].mean()) / 2


def test_the_statistic_equals_a_plain_loop():
    from captum_concepts.attr.spatial_acv.statistics import _held_out_accuracy, _random_labels

    problem = make_problem(clustered(0, 6, "a", shift=0.7), clustered(1, 9, "b"), "a", 3, 0)
    labels = _random_labels(problem, 4, seed=3)
    assert torch.equal(labels[:, 0], problem.label == 1)
    for fold in range(3):  # dealt within a fold: the class sizes stay
        assert len(labels[problem.fold == fold].sum(0).unique()) == 1
    fast = _held_out_accuracy(problem, labels)
    for r in range(5):
        assert float(fast[r]) == pytest.approx(reference_statistic(problem, labels[:, r].numpy()), abs=1e-5)


def test_p_values_of_pure_noise_are_uniform_and_of_a_concept_small():
    noise, concept = [], []
    for seed in range(60):
        a, b = clustered(2 * seed, 10, "a"), clustered(2 * seed + 1, 14, "b")
        noise.append(encoding_p_value(make_problem(a, b, "a", 3, seed), 20, seed))
    for seed in range(5):
        a, b = clustered(2 * seed, 10, "a", shift=4.0), clustered(2 * seed + 1, 14, "b")
        concept.append(encoding_p_value(make_problem(a, b, "a", 3, seed), 20, seed))
    assert np.mean(np.array(noise) < 0.05) < 0.13
    assert 0.35 < np.mean(noise) < 0.65
    assert max(concept) < 0.01


def test_few_images_never_give_a_tiny_p_value():
    a, b = clustered(0, 3, "a", shift=30.0), clustered(1, 3, "b")
    assert encoding_p_value(make_problem(a, b, "a", 3, 0), 50, 0) >= 1 / 8


def test_holm_against_the_definition():
    p = [0.02, 0.5, 0.001, 0.04]
    assert holm(p) == pytest.approx([0.06, 0.5, 0.004, 0.08])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


def test_random_states_are_left_as_they_were():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    before = states()
    with reproducible(3):
        first = random.random(), np.random.random(), float(torch.rand(()))  # noqa: NPY002
    assert states() == before
    with reproducible(3):
        assert first == (random.random(), np.random.random(), float(torch.rand(())))  # noqa: NPY002


def test_fewer_rows_than_channels_give_the_solution_of_the_whole_problem():
    """The row-space shortcut against the solver on all channels, and against the optimality condition."""
    from captum_concepts.solvers import fit_elastic_net

    draw = torch.Generator().manual_seed(0)
    x = torch.randn(20, 60, generator=draw, dtype=torch.float64)
    y = (x[:, 0] + 0.1 * x[:, 1] > 0).long()
    weight = torch.rand(20, generator=draw, dtype=torch.float64) + 0.5
    w, b = logistic_trainer(0.3)(x, y, weight)
    whole = fit_elastic_net(x, y, 0.3, alpha=0.0, loss="logistic", num_classes=2, sample_weight=weight, tol=1e-9)
    torch.testing.assert_close(w, torch.as_tensor(whole.weight)[0].to(w), rtol=1e-3, atol=1e-4)
    residual = weight / weight.sum() * (torch.sigmoid(x @ w + b) - y.double())
    assert float((residual @ x + 0.3 * w).abs().max()) < 1e-4
    assert float(residual.sum().abs()) < 1e-4
