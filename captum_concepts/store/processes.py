"""Several processes that work on one store: who we are, and that all of them succeed or all fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from captum_concepts.errors import CaptumConceptsError


def world() -> tuple[int, int]:
    """``(rank, number of processes)``; ``(0, 1)`` outside ``torch.distributed``."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def all_or_none(work: Callable[[], Any]) -> None:
    """Run ``work`` in every process and wait for the others; where one fails, all raise.

    Otherwise the others would wait for the failed one until the process group's timeout.

    Raises:
        CaptumConceptsError: another process failed, or ended without a word.
    """
    rank, size = world()
    if size == 1:
        work()
        return
    failure: Exception | None = None
    try:
        work()
    except Exception as error:
        failure = error
    outcomes: list[str | None] = [None] * size
    try:
        torch.distributed.all_gather_object(
            outcomes, None if failure is None else f"{type(failure).__name__}: {failure}"
        )
    except RuntimeError as error:  # what the backends raise for a peer that is gone
        raise failure or CaptumConceptsError(
            f"process {rank} has done its part, but another of the {size} processes ended without a word ({error}); "
            "start all of them again: what is written is kept"
        ) from error
    if failure is not None:
        raise failure
    failed = [f"process {r}: {outcome}" for r, outcome in enumerate(outcomes) if outcome is not None]
    if failed:
        raise CaptumConceptsError(f"process {rank} has done its part, but " + "; ".join(failed))
