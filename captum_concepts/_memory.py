"""What happens when a device has no memory for a batch: it is halved, once, with a warning."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from captum_concepts.errors import InputWarning

Part = TypeVar("Part")
Result = TypeVar("Result")


class Halving:
    """Runs a function on one part of a batch after another.

    The first part for which the device has no memory is run as two halves, with a warning; so is every later one.
    Where even half a part does not fit, the device's own error comes out.

    Args:
        option: what the user makes smaller to avoid the failed attempt, for the warning.

    Example:
        >>> halving = Halving("batch_size")
        >>> rows = torch.arange(4)
        >>> halving(lambda part: part * 2, rows, lambda part: part.chunk(2))
        [tensor([0, 2, 4, 6])]
    """

    def __init__(self, option: str) -> None:
        self.option = option
        self.halved = False

    def __call__(
        self, run: Callable[[Part], Result], part: Part, split: Callable[[Part], Iterable[Part]]
    ) -> list[Result]:
        """``run(part)``, or ``run`` of both halves, as a list of one or two."""
        if not self.halved:
            try:
                return [run(part)]
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                halves = list(split(part))
                if len(halves) < 2:
                    raise
                said = str(error).split(". ")[0].split("\n")[0]
            # Outside the except block: while it lasts, the traceback holds on to every tensor of the failed attempt.
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            warnings.warn(
                f"the device ran out of memory ({said}); this and the following batches are computed in two halves. "
                f"Results are the same up to rounding; half the {self.option} avoids the failed attempt",
                InputWarning,
                stacklevel=2,
            )
            self.halved = True
        return [run(half) for half in split(part)]


def out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had no memory left: CUDA and MPS, and what their libraries raise instead."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
