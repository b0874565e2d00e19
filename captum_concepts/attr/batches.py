"""Inputs in batches: cut examples, additional arguments and targets alike, and halve a batch that does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor

from captum_concepts._checks import take_rows
from captum_concepts._memory import Halving
from captum_concepts.activations import Inputs, check_images
from captum_concepts.errors import TargetError

Batch = tuple[Inputs, Any, Any]  # inputs, additional_forward_args, target
Result = TypeVar("Result")


def each_batch(
    run: Callable[[Inputs, Any, Any], Result], inputs: Inputs, extra: Any, target: Any, batch_size: int
) -> list[Result]:
    """``run(inputs, extra, target)`` of at most ``batch_size`` examples at a time.

    Args:
        run: the function.
        inputs: a tensor ``(N, ...)`` or a tuple of them.
        extra: additional arguments; tensors of N rows are cut, other values are passed as they are.
        target: in any form Captum accepts; one entry per example is cut.
        batch_size: the most examples per call. A batch for which the device has no memory is halved.

    Raises:
        InputError: bad inputs.
        TargetError: a list of targets that is not one per example.
    """
    halving = Halving("batch_size")
    return [
        result
        for part in _batches(inputs, extra, target, batch_size)
        for result in halving(lambda batch: run(*batch), part, _halves)
    ]


def _batches(inputs: Inputs, extra: Any, target: Any, batch_size: int) -> Iterator[Batch]:
    parts = check_images(inputs)
    n = parts[0].shape[0]
    listed = isinstance(target, list) or (isinstance(target, Tensor) and target.ndim > 0 and target.numel() > 1)
    if listed and len(target) != n:
        raise TargetError(f"target has {len(target)} entries for {n} examples; pass one each, or a single int")
    if n <= batch_size:
        yield inputs, extra, target
        return
    for start in range(0, n, batch_size):
        rows = slice(start, start + batch_size)
        cut = tuple(part[rows] for part in parts)
        yield (
            cut if isinstance(inputs, tuple) else cut[0],
            take_rows(extra, rows, n),
            target[rows] if listed else target,
        )


def _halves(batch: Batch) -> list[Batch]:
    """A batch as two of half as many examples; a single example remains one."""
    inputs, extra, target = batch
    return list(_batches(inputs, extra, target, -(-len(check_images(inputs)[0]) // 2)))
