"""Halving of batches that do not fit the device's memory."""

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
    """Runs a function on the parts of a batch, in halves once the device runs out of memory.

    The first part that does not fit and all later ones are run as two halves, with one warning. If half a part does
    not fit either, the device's error is raised.

    Args:
        option: the option that the warning suggests to reduce.

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
        """A list of ``run(part)``, or of ``run`` on both halves."""
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
            # Outside the except block, where the traceback would keep every tensor of the failed attempt alive.
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            warnings.warn(
                f"the device ran out of memory ({said}); this and the following batches are computed in two halves. "
                f"Results are the same up to rounding; halve {self.option} to avoid the failed attempt",
                InputWarning,
                stacklevel=2,
            )
            self.halved = True
        return [run(half) for half in split(part)]


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host ran out of memory, as reported by torch or by a device's libraries."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
