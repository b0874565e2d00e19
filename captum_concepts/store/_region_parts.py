"""One store built by several processes: whose rows are whose, and the parts joined."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from captum_concepts._artifacts import write_atomically
from captum_concepts.errors import ArtifactError
from captum_concepts.store.lock import FolderLock
from captum_concepts.store.shard_files import MANIFEST, check_files, read_manifest


def join_parts(path: Path, fingerprint: dict[str, Any], num_replicas: int) -> bool:
    """Make one store of the parts once all are complete; True if it is whole. Safe to repeat after a kill."""
    names = [part_name(rank, num_replicas) for rank in range(num_replicas)]
    with _lock_patiently(path):
        whole = read_manifest(path)
        if whole is None:
            parts = [read_manifest(path / name) for name in names]
            if any(part is None or not part["complete"] for part in parts):
                return False
            shards: list[dict[str, Any]] = []
            for name, part in zip(names, parts, strict=True):
                for shard in part["shards"] if part else []:
                    file = f"shard-{len(shards):05d}.safetensors"
                    if (path / name / shard["file"]).exists():  # else a join that was killed has moved it
                        (path / name / shard["file"]).replace(path / file)
                    shards.append({**shard, "file": file})
            infos = [part["info"] for part in parts if part]
            bounds = [info["error_bound"] for info in infos if "error_bound" in info]
            whole = {"format": parts[0]["format"] if parts[0] else "", "fingerprint": fingerprint, "shards": shards}
            whole |= {"complete": True, "info": {**infos[0], "error_bound": max(bounds, default=0.0)}}
            check_files(path, whole)
            write_atomically(path / MANIFEST, json.dumps(whole, indent=1).encode())
        for name in names:
            shutil.rmtree(path / name, ignore_errors=True)
    return True


def default_shard_rows(images: int) -> int:
    """About 200 shards, so that a kill costs little and the list of shards stays short; 32 to 1,024 images each."""
    return min(max(images // 200, 32), 1024)


def share(count: int, shard_rows: int, rank: int, num_replicas: int) -> tuple[int, int]:
    """The rows [first, last) of one process: whole shards, so that the shards are those of a single process."""
    shards = -(-count // shard_rows)
    first, last = (min(shards * r // num_replicas * shard_rows, count) for r in (rank, rank + 1))
    return first, last


def part_name(rank: int, num_replicas: int) -> str:
    """The folder of one process' share."""
    return f"part-{rank:05d}-of-{num_replicas:05d}"


def check_parts(path: Path, num_replicas: int, whole: Mapping[str, Any] | None, *, remove: bool) -> None:
    """Refuse a folder in which another number of processes has begun, or empty it."""
    parts = sorted(p for p in path.glob("part-*-of-*") if p.is_dir())
    for part in parts:
        if remove:
            shutil.rmtree(part)
        elif not part.name.endswith(f"-of-{num_replicas:05d}") or num_replicas == 1:
            processes = int(part.name.rsplit("-", 1)[1])
            raise ArtifactError(
                f"the store at {path} was begun by {processes} processes; go on with as many, or remove the folder"
            )
    if whole is not None and num_replicas > 1:
        raise ArtifactError(f"the store at {path} was begun by one process; go on with one, or remove the folder")


@contextmanager
def _lock_patiently(path: Path, seconds: float = 600.0) -> Iterator[None]:
    """Another process that joins takes a moment; one that hangs is reported."""
    end = time.monotonic() + seconds
    lock = FolderLock(path, "the store at")
    while True:
        try:
            lock.__enter__()
            break
        except ArtifactError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)
    try:
        yield
    finally:
        lock.__exit__(None, None, None)
