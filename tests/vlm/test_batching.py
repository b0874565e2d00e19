"""The encoder's batch by trial: the least time per image wins, in bounded time, and a store remembers it."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from captum_concepts.store import RegionEmbeddingStore, build
from captum_concepts.vlm import DenseRegions, RegionPrompt, trial_batch_size


class Clock:
    """Runs that take a given time per batch."""

    def __init__(self, times: dict[int, float]) -> None:
        self.times, self.now, self.sizes = times, 0.0, []

    def run(self, size: int) -> None:
        self.sizes.append(size)
        self.now += self.times[size]

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("per_image", "expected", "tried"),
    [
        ([0.05, 0.025, 0.024, 0.056, 0.06], 4, 5),  # a CPU whose cache overflows at 8
        ([0.05, 0.06, 0.06], 1, 3),
        ([0.05, 0.06, 0.03, 0.04, 0.05], 4, 5),  # one size is no sign of the next
        ([0.04, 0.04, 0.04, 0.04, 0.04, 0.04, 0.04], 64, 7),  # no difference: the largest
        ([0.04, 0.03, 0.02, 0.01, 0.009, 0.008, 0.007], 64, 7),
        ([0.04, 0.041, 0.043, 0.0445, 0.046], 4, 5),  # slowly worse: never far from the best
    ],
)
def test_the_least_time_per_image(per_image, expected, tried):
    clock = Clock({2**i: rate * 2**i for i, rate in enumerate(per_image)})
    assert trial_batch_size(clock.run, clock=clock, seconds=100) == expected
    assert list(dict.fromkeys(clock.sizes)) == [2**i for i in range(tried)]


def test_the_first_run_of_a_size_and_single_slow_ones_do_not_count():
    """oneDNN compiles a convolution for each new shape; another process takes the machine for a moment."""
    seen: Counter[int] = Counter()
    clock = Clock({})

    def run(size):
        seen[size] += 1
        clock.now += 0.01 * size**0.5 + (1.0 if seen[size] == 1 else 0.5 if (seen[size] + size) % 2 else 0.0)

    assert trial_batch_size(run, clock=clock, seconds=100) == 64


def test_it_ends_when_the_time_is_up():
    clock = Clock({2**i: 2.0 * 2**i for i in range(8)})
    assert trial_batch_size(clock.run, clock=clock, seconds=3) == 1
    assert clock.sizes == [1, 1, 1]
    clock = Clock({2**i: 0.5 * 2**i for i in range(8)})
    assert trial_batch_size(clock.run, clock=clock, seconds=3) == 2
    assert clock.sizes == [1, 1, 1, 1, 2, 2]


def test_memory_ends_it():
    def run(size):
        if size > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert trial_batch_size(run, clock=iter([i * 0.0 for i in range(100)]).__next__) == 8
    with pytest.raises(RuntimeError, match="another"):
        trial_batch_size(lambda size: (_ for _ in ()).throw(RuntimeError("another")))


class Colors:
    logit_scale, logit_bias = 1.0, 0.0

    def __init__(self):
        self.sizes = []

    def encode_image(self, images):
        self.sizes.append(len(images))
        return images.mean((2, 3))

    def encode_regions(self, images, grid):
        self.sizes.append(-len(images))
        return torch.nn.functional.adaptive_avg_pool2d(images, grid).flatten(2).transpose(1, 2)

    def encode_text(self, texts):
        return torch.eye(3)[: len(texts)]


@pytest.mark.parametrize("regions", [RegionPrompt("crop", (2, 2), 3), DenseRegions((2, 2))], ids=lambda r: r.kind)
def test_a_store_uses_the_same_batch_ever_after(tmp_path, monkeypatch, regions):
    x, sign = torch.rand(9, 3, 8, 8), -1 if regions.kind == "dense" else 1

    def choose(run, device):
        run(5)
        return 3

    monkeypatch.setattr(build, "trial_batch_size", choose)
    encoder = Colors()
    RegionEmbeddingStore.build(tmp_path / "store", x, encoder, regions, shard_rows=4)
    assert encoder.sizes[:2] == [1, 5 * sign]  # the encoder is recognized, then tried
    assert {abs(size) for size in encoder.sizes[2:]} <= {1, 2, 3}
    assert json.loads((tmp_path / "store" / "manifest.json").read_text())["info"]["batch_size"] == 3
    max((tmp_path / "store").glob("shard-*")).unlink()
    monkeypatch.setattr(build, "trial_batch_size", lambda *_: pytest.fail("tried again"))
    RegionEmbeddingStore.build(tmp_path / "store", x, Colors(), regions)
    RegionEmbeddingStore.build(tmp_path / "given", x, Colors(), regions, batch_size=7)
    assert json.loads((tmp_path / "given" / "manifest.json").read_text())["info"]["batch_size"] == 7
