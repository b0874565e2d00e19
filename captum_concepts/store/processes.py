"""Helpers for several processes that work on one store and succeed or fail together."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from captum_concepts._artifacts import Array, check_expanded
from captum_concepts.errors import CaptumConceptsError
from captum_concepts.store.manifest import Manifest, check_fingerprint, read_manifest
from captum_concepts.store.shards import Span, Write, check_unclaimed, fill_shards, shard_sizes


def world() -> tuple[int, int]:
    """``(rank, number of processes)``; ``(0, 1)`` outside ``torch.distributed``."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def all_or_none(work: Callable[[], Any]) -> None:
    """Run ``work`` in every process and wait for the others; if one fails, all raise.

    Otherwise the others would wait for the failed one until the process group's timeout.

    Raises:
        CaptumConceptsError: another process failed, or ended without a report.
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
        with lost_peers_named():
            torch.distributed.all_gather_object(
                outcomes, None if failure is None else f"{type(failure).__name__}: {failure}"
            )
    except CaptumConceptsError as error:
        raise failure or error from error.__cause__
    if failure is not None:
        raise failure
    failed = [f"process {r}: {outcome}" for r, outcome in enumerate(outcomes) if outcome is not None]
    if failed:
        raise CaptumConceptsError(f"process {rank} has finished its part, but " + "; ".join(failed))


@contextmanager
def lost_peers_named() -> Iterator[None]:
    """Translate the backend's error about a lost process (killed, out of memory) into a readable one.

    Raises:
        CaptumConceptsError: another process ended while this one waited for it.
    """
    try:
        yield
    except RuntimeError as error:
        rank, size = world()
        # gloo raises plain RuntimeErrors that begin with a line of its source.
        if size == 1 or not (isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)):
            raise
        raise CaptumConceptsError(
            f"process {rank} waited for another of the {size} processes, which ended without an error message; start "
            f"all of them again, or one alone: completed work is kept ({str(error)[:200]})"
        ) from error


def fill_together(
    path: Path,
    made_from: Mapping[str, Any],
    count: int,
    compute: Callable[[list[Span], Write], None],
    *,
    shard_rows: int,
    arrays: Mapping[str, Array] | None = None,
    what: str,
    alone: bool = False,
) -> None:
    """Fill a store of ``count`` rows; each of n processes computes every n-th shard that is missing or damaged.

    The files depend neither on the number of processes nor on where an earlier run was interrupted.

    Args:
        path: the folder; created if missing.
        made_from: what the rows are computed from.
        count: rows.
        compute, arrays, what: see :func:`~captum_concepts.store.fill_shards`.
        shard_rows: rows per file, if the store is new.
        alone: each process writes the whole store in its own folder.

    Raises:
        ArtifactError: the folder contains a store that does not match, or is being written.
    """
    rank, size = (0, 1) if alone else world()
    wanted = Manifest(json.loads(json.dumps(dict(made_from))), shard_sizes(count, shard_rows))

    def plan() -> None:
        known = read_manifest(path)
        if known is not None:
            check_fingerprint(made_from, known.fingerprint, f"{what} {path}")
        if rank == 0 and (known is None or known.total != count or known.growing):
            check_expanded(path)
            path.mkdir(parents=True, exist_ok=True)
            if known is None:
                check_unclaimed(path)
            dataclasses.replace(wanted, info={} if known is None else known.info).write(path)

    all_or_none(plan)
    all_or_none(
        lambda: fill_shards(
            path, read_manifest(path) or wanted, compute, arrays=arrays, rank=rank, size=size, what=what
        )
    )
