"""The fastest batch size of an encoder, measured on its device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from captum_concepts._memory import out_of_memory

_MOST = {"cpu": 64, "cuda": 512, "mps": 128}
#: A larger batch is preferred unless a smaller one is faster by this factor, because it has less overhead elsewhere.
_CLEARLY = 1.1
_REPEATS = 3


def trial_batch_size(
    run: Callable[[int], Any],
    device: torch.device | str = "cpu",
    *,
    seconds: float = 3.0,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """The batch size, a power of 2, with the least time per image.

    Batches of 1, 2, 4, ... are run until two in a row are clearly slower per image than an earlier one, one does not
    fit into memory, or the time is up. The shortest of a few runs counts, because other load can only slow a run down.
    On a CPU small batches are often twice as fast, because their activations stay in the cache; accelerators prefer
    large ones.

    Args:
        run: embeds the given number of images.
        device: where it runs; it is synchronized before each time is read.
        seconds: time after which no larger batch is tried.
        clock: for tests.

    >>> clock = iter([0, 0.9, 1, 1.9, 2, 2.9, 3, 3.2, 4, 4.2, 5, 5.2, 6, 7.9, 8, 9.9, 10, 11.9, 12, 16, 17, 21, 22, 26])
    >>> trial_batch_size(lambda count: None, clock=clock.__next__, seconds=100)
    2
    """
    device = torch.device(device)
    best, best_rate, size, slower = 1, float("inf"), 1, 0
    begun, spent = None, 0.0
    while size <= _MOST.get(device.type, 64) and slower < 2:
        try:
            run(size)  # the first pass of a size allocates and compiles
            _wait(device)
            shortest = float("inf")
            for _ in range(_REPEATS):
                start = clock()
                begun = start if begun is None else begun
                run(size)
                _wait(device)
                end = clock()
                shortest, spent = min(shortest, end - start), end - begun
                if spent > seconds:
                    break
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            break
        rate = shortest / size
        if rate > _CLEARLY * best_rate:
            slower += 1
        else:
            best, best_rate, slower = size, min(rate, best_rate), 0
        if spent > seconds:
            break
        size *= 2
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
