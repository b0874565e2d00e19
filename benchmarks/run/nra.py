"""NRA: time against the published per-pixel loop and a plain vectorised version, and memory of 1,000 maps.

    python -m benchmarks.run.nra [--maps 32] [--repeats 5]

All versions run in one process, one after another in every repeat, on one thread; the time is the median over
repeats of the time a map. The values are compared as well. Memory is the growth of the process's peak while the
metric runs, in a fresh process for each number of maps, after inputs of that size are in place.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.record import environment, peak_mib, write
from benchmarks.report.renderers import nra_speed

SIZE = 224


def published_loop(saliency: Tensor, mask: Tensor) -> float:
    """One pixel after another, in order of saliency; ties as the sort leaves them."""
    order = torch.argsort(saliency.flatten(), descending=True).tolist()
    inside = mask.flatten().tolist()
    region, total = sum(inside), len(inside)
    auc = high = 0.0
    intersection = 0
    for p, pixel in enumerate(order, 1):
        intersection += inside[pixel]
        auc += intersection / (p + region - intersection)
        high += min(p, region) / max(p, region)
    auc, high, low = auc / total, high / total, region / (2 * total)
    return max(auc - low, 0) / (high - low)


def plain_vectorised(maps: Tensor, masks: Tensor) -> Tensor:
    """Sort with indices, gather, cumulative sum, a whole batch at once; ties as the sort leaves them."""
    masks = masks.flatten(1)
    order = torch.argsort(maps.flatten(1), dim=1, descending=True)
    inside = masks.gather(1, order).cumsum(1).double()
    p, region = torch.arange(1, masks.shape[1] + 1).double(), masks.sum(1, keepdim=True).double()
    auc = (inside / (p + region - inside)).mean(1)
    high = (torch.minimum(p, region) / torch.maximum(p, region)).mean(1)
    low = region[:, 0] / (2 * masks.shape[1])
    return (auc - low).clamp(min=0) / (high - low)


def inputs(kind: str, n: int) -> tuple[Tensor, Tensor]:
    """``smooth``: 7 x 7 upsampled; ``relu``: the same with about half the map 0; ``noise``: every pixel its own."""
    g = torch.Generator().manual_seed(0)
    masks = torch.zeros(n, SIZE, SIZE, dtype=torch.bool)
    for mask in masks:
        top, left, height, width = torch.randint(20, 104, (4,), generator=g).tolist()
        mask[top : top + height, left : left + width] = True
    if kind == "noise":
        return torch.rand(n, SIZE, SIZE, generator=g), masks
    small = torch.rand(n, 1, 7, 7, generator=g)
    small = (small - 0.6).relu() if kind == "relu" else small
    return torch.nn.functional.interpolate(small, (SIZE, SIZE), mode="bilinear", align_corners=False)[:, 0], masks


def time_one(function: Callable[[], object], n: int) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) / n * 1e3


def timings(n: int, repeats: int) -> list[dict[str, object]]:
    return [timings_of(*inputs(kind, n), kind, repeats) for kind in ("smooth", "relu", "noise")]


def timings_of(maps: Tensor, masks: Tensor, kind: str, repeats: int) -> dict[str, object]:
    from captum_concepts import metrics

    def loop() -> Tensor:
        return torch.tensor([published_loop(a, m) for a, m in zip(maps[:few], masks[:few], strict=True)])

    def plain() -> Tensor:  # one map a call, which is its faster way on a CPU
        return torch.cat([plain_vectorised(a[None], m[None]) for a, m in zip(maps, masks, strict=True)]).float()

    few = min(len(maps), 8)
    ours = metrics.nra(maps, masks)
    times: dict[str, list[float]] = {"published_loop": [], "plain_vectorised": [], "nra": [], "nra_exact": []}
    for _ in range(repeats):
        times["published_loop"].append(time_one(loop, few))
        times["plain_vectorised"].append(time_one(plain, len(maps)))
        times["nra"].append(time_one(lambda: metrics.nra(maps, masks), len(maps)))
        times["nra_exact"].append(time_one(lambda: metrics.nra(maps, masks, baseline="exact"), len(maps)))
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "maps": kind,
        "ms_per_map": median,
        "times_faster_than_loop": median["published_loop"] / median["nra"],
        "times_faster_than_plain": median["plain_vectorised"] / median["nra"],
        "largest_difference_from_loop": float((ours[:few] - loop()).abs().max()),
        "largest_difference_from_plain": float((ours - plain()).abs().max()),
    }


def memory_of(n: int) -> float:
    from captum_concepts import metrics

    maps = torch.rand(n, 7, 7)
    masks = torch.zeros(n, SIZE, SIZE, dtype=torch.bool)
    masks[:, 40:140, 60:160] = True
    metrics.nra(maps[:1], masks[:1])
    before = peak_mib()
    metrics.nra(maps, masks)
    return peak_mib() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        print(memory_of(options.memory_of))
        return
    growth = {}
    for n in (10, 100, 1000):
        command = [sys.executable, "-m", "benchmarks.run.nra", "--memory-of", str(n)]
        growth[str(n)] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    measured = timings(options.maps, options.repeats)
    record = {
        "environment": environment(),  # after the measurement, which imports what it measures
        "size": SIZE,
        "maps": options.maps,
        "repeats": options.repeats,
        "timings": measured,
        "peak_growth_mb": growth,
    }
    write("nra", record)
    print("\n".join(nra_speed(record)))


if __name__ == "__main__":
    main()
