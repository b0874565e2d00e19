"""SpatialACV's parts: guidance images from anywhere, rows under a budget, held-out accuracy, significance."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from captum.concept import Concept
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_concepts.attr import _acv_fit
from captum_concepts.attr._acv_fit import calibrate, fit_concept, logistic_trainer, make_problem
from captum_concepts.attr._acv_rows import GuidanceRows, gather, merge, rows_of
from captum_concepts.attr._acv_significance import encoding_p_value
from captum_concepts.attr._acv_statistics import balanced_accuracy, holm, t_tail
from captum_concepts.attr._guidance import GuidanceSet, guidance_sets, read_image
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


# ------------------------------------------------------------------------------------------------ guidance images


def test_every_source_gives_the_same_images(tmp_path):
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    images = pixels.float() / 255
    pil = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    for i, one in enumerate(pil):
        one.save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    labelled = TensorDataset(images, torch.arange(5))
    sources = {
        "tensor": images,
        "list": list(images),
        "pil": pil,
        "folder": tmp_path,
        "folder as text": str(tmp_path),
        "files": sorted(tmp_path.glob("*.png")),
        "labelled": labelled,
        "loader": DataLoader(labelled, batch_size=4),
        "dicts": [{"image": image, "label": 0} for image in images],
    }
    for one in guidance_sets(sources, "concepts"):
        read = torch.cat(list(one.batches(2, image_size=8)))
        assert torch.equal(read, images), one.name
        assert [len(b) for b in one.batches(2, image_size=8)] == [2, 2, 1]
    (concept,) = guidance_sets([Concept(7, "stripes", DataLoader(images, batch_size=3))], "concepts")
    assert concept.name == "stripes"
    assert torch.equal(torch.cat(list(concept.batches(2))), images)


def test_images_of_several_sizes_are_batched_apart():
    images = [torch.rand(3, 8, 8), torch.rand(3, 8, 8), torch.rand(3, 6, 9), torch.rand(3, 8, 8)]
    shapes = [tuple(b.shape) for b in GuidanceSet("a", images).batches(8)]
    assert shapes == [(2, 3, 8, 8), (1, 3, 6, 9), (1, 3, 8, 8)]


def test_gray_and_alpha_become_rgb_where_the_model_takes_rgb(tmp_path):
    gray, alpha = torch.rand(2, 1, 8, 8), torch.rand(2, 4, 8, 8)
    (read,) = GuidanceSet("gray", gray).batches(4, channels=3)
    assert torch.equal(read, gray.expand(-1, 3, -1, -1))
    (read,) = GuidanceSet("rgba", alpha).batches(4, channels=3)
    assert torch.equal(read, alpha[:, :3])
    (read,) = GuidanceSet("kept", alpha).batches(4, channels=4)
    assert torch.equal(read, alpha)
    rgba = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    Image.fromarray(rgba[..., 0]).save(tmp_path / "b.png")
    Image.fromarray(rgba[..., :3]).convert("P").save(tmp_path / "c.png", transparency=b"\x00" * 16)
    Image.fromarray(rgba[..., 0].astype(np.uint16) * 257).save(tmp_path / "d.png")
    (one,) = guidance_sets({"files": tmp_path}, "concepts")
    (read,) = one.batches(4, image_size=8, channels=3)
    assert read.shape == (4, 3, 8, 8)
    assert torch.equal(read[0], torch.from_numpy(rgba[..., :3].copy()).permute(2, 0, 1) / 255)
    expected = torch.from_numpy(rgba[..., 0].copy()).expand(3, 8, 8) / 255
    assert torch.equal(read[1], expected)
    assert torch.allclose(read[3], expected, atol=1.01 / 255)


def test_default_transform_resizes_the_shorter_side_and_takes_the_middle(tmp_path):
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    (one,) = guidance_sets({"a": tmp_path}, "concepts")
    (read,) = one.batches(1, image_size=10)
    assert read.shape == (1, 3, 10, 10)
    assert bool((read == 1).all())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "empty"),
        ([], "empty"),
        (torch.rand(2, 3, 4, 4), "must be a dict"),
        ({"a": 3}, "holds int"),
        ({"a": "/no/such/folder"}, "no folder"),
        ({"a": iter([])}, "only once"),
        ([Concept(0, "a", None)], "no data_iter"),
        ([Concept(0, "a", []), Concept(1, "a", [])], "more than once: \\['a'\\]"),
    ],
)
def test_sets_that_cannot_be_read_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        guidance_sets(given, "concepts")


def test_empty_folder_broken_file_and_wrong_pixels_are_refused(tmp_path):
    with pytest.raises(InputError, match="holds no image"):
        guidance_sets({"a": tmp_path}, "concepts")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    with pytest.raises(InputError, match="cannot be read as an image"):
        read_image(tmp_path / "broken.png")
    with pytest.raises(InputError, match="floating point"):
        list(GuidanceSet("a", torch.zeros(2, 3, 4, 4, dtype=torch.uint8)).batches(2))
    with pytest.raises(InputError, match="shape"):
        list(GuidanceSet("a", torch.zeros(2, 4)).batches(2))


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
    from captum_concepts.attr import _acv_rows

    held = []
    original = _acv_rows._smallest
    monkeypatch.setattr(_acv_rows, "_smallest", lambda b, n: held.append(sum(len(p[0]) for p in b)) or original(b, n))
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
    with pytest.raises(InputError, match="NaN or infinite activations for images of 'a'"):
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


def test_balanced_accuracy_and_its_interval_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    a, b = draw.uniform(0.5, 1, 9), draw.uniform(0.2, 1, 30)
    label = torch.tensor([1] * 9 + [0] * 30)
    accuracy, (low, high) = balanced_accuracy(torch.tensor(np.concatenate([a, b])), label == 1)
    assert accuracy == pytest.approx((a.mean() + b.mean()) / 2)
    parts = np.array([a.var(ddof=1) / 9, b.var(ddof=1) / 30]) / 4
    freedom = parts.sum() ** 2 / (parts**2 / np.array([8, 29])).sum()
    reach = stats.t.ppf(0.975, freedom) * np.sqrt(parts.sum())
    assert (low, high) == pytest.approx((accuracy - reach, min(accuracy + reach, 1)), abs=1e-6)
    for freedom in (1, 2.5, 9, 200):
        for t in (-3.0, -0.2, 0.0, 0.7, 2.0, 40.0):
            assert t_tail(t, freedom) == pytest.approx(stats.t.sf(t, freedom), rel=1e-9)


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


def test_calibration_of_a_given_direction():
    draw = torch.Generator().manual_seed(0)
    projection = torch.randn(4000, generator=draw)
    y = (torch.rand(4000, generator=draw) < torch.sigmoid(2 * projection - 1)).long()
    w, b = calibrate(projection[:, None], y, torch.ones(4000), torch.tensor([5.0]))
    assert float(w[0]) == pytest.approx(2, abs=0.2)
    assert float(b) == pytest.approx(-1, abs=0.15)


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
    from captum_concepts.attr._acv_significance import _held_out_accuracy, _random_labels

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
    with _acv_fit.reproducible(3):
        first = random.random(), np.random.random(), float(torch.rand(()))  # noqa: NPY002
    assert states() == before
    with _acv_fit.reproducible(3):
        assert first == (random.random(), np.random.random(), float(torch.rand(())))  # noqa: NPY002


def test_input_channels_are_read_off_the_first_convolution():
    from captum_concepts.attr._guidance import input_channels

    assert input_channels(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 3))) == 1
    assert input_channels(nn.Linear(2, 2)) is None
    assert input_channels(None) is None


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
