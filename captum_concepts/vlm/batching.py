"""How many images an encoder embeds fastest at a time: measured on its own device, once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from captum_concepts._memory import out_of_memory

_MOST = {"cpu": 64, "cuda": 512, "mps": 128}
#: A larger batch is preferred unless a smaller one is faster by this factor: its passes have less overhead elsewhere.
_CLEARLY = 1.1


def trial_batch_size(
    run: Callable[[int], Any],
    device: torch.device | str = "cpu",
    *,
    seconds: float = 3.0,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """The batch size, a power of 2, with the least time per image.

    On a CPU small batches are often twice as fast, because their activations stay in the cache; an accelerator wants
    large ones. Batches of 1, 2, 4, ... are run until one is clearly slower per image than an earlier one, does not fit
    into memory, or the time is up.

    Args:
        run: embeds so many images.
        device: where it runs; its queue is waited for.
        seconds: after which no larger batch is tried.
        clock: for tests.

    >>> trial_batch_size(lambda count: None, clock=iter([0, 0.9, 0.9, 1, 1, 1.2, 1.2, 2]).__next__)
    4
    """
    device = torch.device(device)
    run(1)  # the first pass allocates and compiles
    _wait(device)
    best, best_rate, size, begun = 1, float("inf"), 1, None
    while size <= _MOST.get(device.type, 64):
        start = clock()
        begun = start if begun is None else begun
        try:
            run(size)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            break
        _wait(device)
        end = clock()
        rate = (end - start) / size
        if rate > _CLEARLY * best_rate:
            break
        if rate <= best_rate * _CLEARLY:
            best, best_rate = size, min(rate, best_rate)
        if end - begun > seconds:
            break
        size *= 2
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
