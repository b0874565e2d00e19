"""`CaptionedScenes`: reproducible, exact, balanced, and spurious only where asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from captum_concepts.datasets import CaptionedScenes, Scene
from captum_concepts.datasets._drawing import SHAPES, signed_distance
from captum_concepts.datasets._sampling import plan_scene
from captum_concepts.errors import InputError


def _polygon_contains(points: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Even-odd rule, the slow textbook way."""
    inside = np.zeros(x.shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0), strict=True):
        crosses = (y0 > y) != (y1 > y)
        with np.errstate(divide="ignore", invalid="ignore"):
            inside ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside


def _corners(name: str) -> np.ndarray:
    if name == "square":
        return 0.69 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    if name == "triangle":
        a = np.deg2rad([0, 120, 240])
        return 0.97 * np.stack([np.sin(a), -np.cos(a)], 1)
    if name == "star":
        a = np.arange(10) * np.pi / 5
        return np.where(np.arange(10) % 2 == 0, 0.98, 0.46)[:, None] * np.stack([np.sin(a), -np.cos(a)], 1)
    w, e = 0.30, 0.93
    return np.array([[-w, -e], [w, -e], [w, -w], [e, -w], [e, w], [w, w],
                     [w, e], [-w, e], [-w, w], [-e, w], [-e, -w], [-w, -w]])  # fmt: skip


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "circle"])
def test_shape_is_the_polygon_it_is_named_after(shape):
    y, x = np.meshgrid(np.linspace(-1.1, 1.1, 211), np.linspace(-1.1, 1.1, 213), indexing="ij")
    inside = signed_distance(SHAPES.index(shape), x.astype(np.float32), y.astype(np.float32)) < 0
    truth = _polygon_contains(_corners(shape), x, y)
    assert (inside != truth).mean() < 2e-3  # rounding on the edge itself
    assert 0.15 < inside.mean() < 0.6
    assert np.hypot(x, y)[inside].max() <= 1.0


def test_item_depends_on_seed_and_index_only():
    a, b = CaptionedScenes(50, seed=3, size=64), CaptionedScenes(9, seed=3, size=64)
    for i in (8, 0, 5):
        for left, right in zip(a[i], b[i], strict=True):
            assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
    other = CaptionedScenes(9, seed=4, size=64)
    assert not torch.equal(a[5].image, other[5].image)
    assert torch.equal(a[-1].image, a[49].image)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    a[7]
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()  # noqa: NPY002


@pytest.mark.parametrize("size", [64, 128, 224])
def test_every_field_agrees_with_every_other(size):
    data = CaptionedScenes(25, seed=1, size=size)
    for i, scene in enumerate(data):
        assert isinstance(scene, Scene)
        assert scene.image.shape == (3, size, size)
        assert scene.image.dtype == torch.float32
        assert scene.image.min() >= 0
        assert scene.image.max() <= 1
        used = scene.objects[:, 0] >= 0
        assert used[0]
        # Concept masks are unions of object masks, the ground is the rest, and objects are disjoint.
        assert scene.object_masks.sum(0).max() == 1
        expected = torch.zeros_like(scene.masks)
        for words, mask in zip(scene.objects[used], scene.object_masks[used], strict=True):
            expected[words] |= mask
        expected[scene.ground] = ~scene.object_masks.any(0)
        assert torch.equal(scene.masks, expected)
        assert torch.equal(scene.presence, scene.masks.flatten(1).any(1))
        assert not scene.object_masks[~used].any()
        # Boxes hold their object and lie inside the picture.
        for box, mask in zip(scene.boxes[used], scene.object_masks[used], strict=True):
            ys, xs = mask.nonzero().T
            assert xs.min() + 0.5 >= box[0]
            assert xs.max() + 0.5 <= box[2]
            assert ys.min() + 0.5 >= box[1]
            assert ys.max() + 0.5 <= box[3]
            assert box.min() >= 0
            assert box.max() <= size
        # The caption says what is there and nothing else.
        words = scene.caption.replace(" on ", " ").split()
        said = {w for w in words if w not in ("a", "an", "and")}
        assert said == {data.concepts[t] for t in scene.presence.nonzero().flatten()}
        # Exactly one object fulfils exactly one class: the first, and it is the label.
        fulfilled = [
            (k, c)
            for k, triple in enumerate(scene.objects.tolist())
            for c, need in enumerate(data.class_concepts)
            if set(need) <= set(triple)
        ]
        assert fulfilled == [(0, scene.label)]
        assert data.labels[i] == scene.label
        assert data.captions[i] == scene.caption
        assert torch.equal(data.presence[i], scene.presence)


def test_masks_are_exact_on_the_pixels():
    # Changing the ground must change pixels outside the objects and none well inside them.
    data = CaptionedScenes(20, seed=5, size=96)
    for i in range(20):
        one, two = data.draw(i, ground="snow"), data.draw(i, ground="wood")
        assert torch.equal(one.object_masks, two.object_masks)
        changed = (one.image - two.image).abs().amax(0) > 0.05
        inside = one.object_masks.any(0).float()[None, None]
        core = -torch.nn.functional.max_pool2d(-inside, 3, 1, 1)[0, 0] > 0
        away = torch.nn.functional.max_pool2d(inside, 3, 1, 1)[0, 0] == 0
        assert not changed[core].any()
        assert changed[away].float().mean() > 0.99
        # Between core and surroundings the mask is where the object covers most of the pixel.
        assert changed[~core & ~away].any()


def test_colour_words_are_the_colour_of_their_pixels():
    data = CaptionedScenes(60, seed=6, size=64)
    seen: dict[str, list[torch.Tensor]] = {}
    for scene in data:
        for t in scene.presence.nonzero().flatten().tolist():
            if data.concepts[t] in data.concept_groups["colour"]:
                pixels = scene.image[:, scene.masks[t]]
                seen.setdefault(data.concepts[t], []).append(pixels.mean(1) / pixels.mean())
    means = {name: torch.stack(rows).mean(0) for name, rows in seen.items()}
    assert set(means) == set(data.concept_groups["colour"])
    assert means["red"].argmax() == 0
    assert means["green"].argmax() == 1
    assert means["blue"].argmax() == 2
    assert means["yellow"][:2].min() > 3 * means["yellow"][2]
    assert means["red"][1] < 0.4 * means["orange"][1] < 0.8 * means["yellow"][1]


def test_same_scene_at_every_size():
    small, large = CaptionedScenes(12, seed=2, size=64), CaptionedScenes(12, seed=2, size=256)
    assert small.captions == large.captions
    for i in range(12):
        a, b = small[i], large[i]
        pooled = torch.nn.functional.avg_pool2d(b.image, 4)
        assert (a.image - pooled).abs().mean() < 0.04
        area = b.masks.float().flatten(1).mean(1)
        assert torch.allclose(a.masks.float().flatten(1).mean(1), area, atol=0.01)


def test_labels_are_balanced_and_grounds_independent_without_spurious():
    data = CaptionedScenes(3000, seed=7, size=16)
    labels = data.labels
    grounds = data.presence[:, [data.concepts.index(g) for g in data.concept_groups["ground"]]].float()
    table = torch.stack([grounds[labels == c].sum(0) for c in range(6)])
    expected = table.sum(1, keepdim=True) * table.sum(0) / table.sum()
    chi2 = ((table - expected) ** 2 / expected).sum()
    assert chi2 < 52.6  # 25 degrees of freedom, p = .001
    assert table.sum(1).min() > 400
    assert data.presence.float().mean(0).min() > 0.05  # every concept occurs


@pytest.mark.parametrize("spurious", [0.4, 0.95, 1.0])
def test_spurious_plants_the_ground_of_the_class_and_nothing_else(spurious):
    plain, planted = CaptionedScenes(2000, seed=8, size=32), CaptionedScenes(2000, seed=8, size=32, spurious=spurious)
    assert torch.equal(plain.labels, planted.labels)
    ground = planted.presence[torch.arange(2000), torch.tensor(planted.planted_grounds)[planted.labels]]
    expected = spurious + (1 - spurious) / 6
    assert abs(ground.float().mean() - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5 + 1e-6
    for i in range(20):
        a, b = plain[i], planted[i]
        assert torch.equal(a.object_masks, b.object_masks)
        assert torch.equal(a.objects, b.objects)


def test_dataloader_batches_scenes():
    data = CaptionedScenes(10, seed=9, size=32)
    batches = list(DataLoader(data, batch_size=4))
    assert [len(b.caption) for b in batches] == [4, 4, 2]
    assert isinstance(batches[0], Scene)
    assert torch.equal(torch.cat([b.image for b in batches]), data.stack().image)
    assert torch.equal(torch.cat([b.label for b in batches]), data.labels)
    assert batches[0].boxes.shape == (4, 3, 4)
    shuffled = DataLoader(data, batch_size=10, shuffle=True, generator=torch.Generator().manual_seed(0))
    assert sorted(next(iter(shuffled)).caption) == sorted(data.captions)


def test_an_index_outside_ends_iteration():
    data = CaptionedScenes(3, seed=0, size=32)
    assert len(list(data)) == len(data) == 3
    for bad in (3, -4):
        with pytest.raises(IndexError, match="of 3"):
            data[bad]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": -1}, "n=-1"), ({"n": 2.5}, "n=2.5"), ({"seed": -1}, "seed"), ({"seed": None}, "seed"),
        ({"size": 8}, "at least 16"), ({"spurious": 1.2}, "probability"), ({"spurious": float("nan")}, "probability"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, message):
    with pytest.raises(InputError, match=message):
        CaptionedScenes(**{"n": 4, "seed": 0, "size": 32, **change})


def test_unknown_ground_offers_the_known():
    with pytest.raises(InputError, match="Did you mean 'sand'"):
        CaptionedScenes(4, seed=0, size=32).draw(0, ground="sands")
    with pytest.raises(InputError, match="empty"):
        CaptionedScenes(0, seed=0, size=32).stack()


#: Every fourth pixel of the diagonal of scene 1 of seed 0, mean of the colors.
DIAGONALS = {
    "grass": [
        0.469,
        0.491,
        0.324,
        0.297,
        0.247,
        0.370,
        0.349,
        0.409,
        0.263,
        0.255,
        0.274,
        0.398,
        0.359,
        0.242,
        0.290,
        0.249,
    ],
    "sand": [
        0.650,
        0.697,
        0.540,
        0.631,
        0.588,
        0.587,
        0.514,
        0.605,
        0.542,
        0.566,
        0.666,
        0.651,
        0.608,
        0.564,
        0.525,
        0.579,
    ],
    "water": [
        0.368,
        0.419,
        0.556,
        0.556,
        0.352,
        0.552,
        0.427,
        0.440,
        0.334,
        0.433,
        0.410,
        0.548,
        0.336,
        0.547,
        0.429,
        0.522,
    ],
    "brick": [
        0.587,
        0.493,
        0.571,
        0.473,
        0.573,
        0.478,
        0.608,
        0.481,
        0.555,
        0.451,
        0.624,
        0.485,
        0.570,
        0.466,
        0.599,
        0.491,
    ],
    "snow": [
        0.958,
        0.896,
        0.864,
        0.938,
        0.903,
        0.863,
        0.828,
        0.827,
        0.866,
        0.814,
        0.837,
        0.849,
        0.820,
        0.812,
        0.832,
        0.864,
    ],
    "wood": [
        0.456,
        0.444,
        0.314,
        0.382,
        0.316,
        0.263,
        0.397,
        0.421,
        0.241,
        0.302,
        0.369,
        0.410,
        0.423,
        0.363,
        0.265,
        0.316,
    ],
}


@pytest.mark.parametrize("ground", DIAGONALS)
def test_scenes_are_still_those_that_the_bundled_models_were_trained_on(ground):
    """Sums and sines of a stated random stream: another processor moves them by rounding."""
    image = CaptionedScenes(6, seed=0, size=64).draw(1, ground=ground).image
    assert image.mean(0).diagonal()[::4].tolist() == pytest.approx(DIAGONALS[ground], abs=2e-3)


def test_objects_lie_all_over_the_picture():
    """A circle of radius r may lie anywhere that leaves .01 to each side."""
    plans = [plan_scene(5, i, 0.0) for i in range(400)]
    ends = np.array([(o.x - o.radius, o.x + o.radius) for plan in plans for o in plan.objects])
    assert ends.min() == pytest.approx(0.01, abs=0.01)
    assert ends.max() == pytest.approx(0.99, abs=0.01)
