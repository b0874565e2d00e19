"""Rows of named tensors on disk: written shard by shard, atomically, resumable after a kill, read through mmap."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_concepts._artifacts import write_atomically
from captum_concepts.errors import ArtifactError, InputError
from captum_concepts.store.manifest import check_fingerprint
from captum_concepts.store.shard_files import FORMAT, MANIFEST, check_files, map_file, read_manifest


class ShardWriter:
    """Append rows to a sharded store.

    A shard is one safetensors file, written to a temporary name and renamed; then the manifest is replaced. So the
    folder is readable after a kill at any moment, and :attr:`rows` says where to go on.

    Args:
        path: the folder.
        fingerprint: what the rows are made from: model, layers, encoder, data (anything JSON can hold).
        shard_rows: rows in one file.
        resume: go on behind the rows that are already there; False removes them.

    Raises:
        ArtifactError: the folder holds rows that were made from something else, or is damaged.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with ShardWriter(folder, {"model": "a"}, shard_rows=2) as writer:
        ...     writer.append({"z": torch.arange(5.0)[:, None]})
        >>> store = ShardReader(folder)
        >>> len(store), store.rows("z", [4, 0]).flatten()
        (5, tensor([4., 0.]))
    """

    def __init__(
        self, path: str | Path, fingerprint: Mapping[str, Any], *, shard_rows: int = 4096, resume: bool = True
    ) -> None:
        if shard_rows < 1:
            raise InputError(f"shard_rows must be at least 1, got {shard_rows}")
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.shard_rows = shard_rows
        self._pending: list[dict[str, Tensor]] = []
        self._waiting = 0
        manifest = read_manifest(self.path) if resume else None
        if manifest is not None:
            check_fingerprint(fingerprint, manifest["fingerprint"], f"the store at {self.path}")
            check_files(self.path, manifest)
        else:
            manifest = {"format": FORMAT, "fingerprint": dict(fingerprint), "shards": [], "complete": False}
        for leftover in [*self.path.glob(".*.partial"), *self.path.glob("shard-*.safetensors")]:
            if leftover.name not in {shard["file"] for shard in manifest["shards"]}:
                leftover.unlink()
        self._manifest = manifest
        self._publish()

    @property
    def rows(self) -> int:
        """Rows safely on disk."""
        return sum(shard["rows"] for shard in self._manifest["shards"])

    @property
    def info(self) -> dict[str, Any]:
        """Free notes of the writer, stored with the rows."""
        notes: dict[str, Any] = self._manifest.setdefault("info", {})
        return notes

    @property
    def complete(self) -> bool:
        """Whether :meth:`finish` was reached, now or in an earlier run."""
        return bool(self._manifest["complete"])

    def append(self, tensors: Mapping[str, Tensor]) -> None:
        """Add rows: tensors with equally many rows each, of the same names and row shapes every time."""
        counts = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(counts.values())) != 1:
            raise InputError(f"every tensor must have the same number of rows, got {counts}")
        self._pending.append({name: tensor.detach().cpu() for name, tensor in tensors.items()})
        self._waiting += next(iter(counts.values()))
        while self._waiting >= self.shard_rows:
            self._write(self.shard_rows)

    def finish(self) -> None:
        """Write what is left and mark the store complete."""
        if self._waiting:
            self._write(self._waiting)
        self._manifest["complete"] = True
        self._publish()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.finish()

    def _write(self, count: int) -> None:
        from safetensors.torch import save

        joined = {name: torch.cat([part[name] for part in self._pending]) for name in self._pending[0]}
        data = save({name: tensor[:count].contiguous() for name, tensor in joined.items()})
        file = f"shard-{len(self._manifest['shards']):05d}.safetensors"
        write_atomically(self.path / file, data)
        digest = hashlib.sha256(data).hexdigest()
        self._manifest["shards"].append({"file": file, "rows": count, "bytes": len(data), "sha256": digest})
        self._manifest["complete"] = False
        self._publish()
        self._waiting -= count
        self._pending = [{name: tensor[count:] for name, tensor in joined.items()}] if self._waiting else []

    def _publish(self) -> None:
        write_atomically(self.path / MANIFEST, json.dumps(self._manifest, indent=1).encode())


class ShardReader:
    """Read rows of a sharded store through memory maps: only the touched rows enter memory.

    Args:
        path: the folder.
        fingerprint: what the rows must have been made from; None takes any.
        verify: compare every file's checksum, which reads all of them; sizes are always compared.
        verify_on_read: compare a file's checksum when rows of it are read for the first time.

    Raises:
        FileNotFoundError: there is no store.
        ArtifactError: unfinished, damaged, or made from something else.
    """

    def __init__(
        self,
        path: str | Path,
        fingerprint: Mapping[str, Any] | None = None,
        *,
        verify: bool = False,
        verify_on_read: bool = False,
    ) -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path)
        if manifest is None:
            raise FileNotFoundError(f"no store at {self.path}")
        if fingerprint is not None:
            check_fingerprint(fingerprint, manifest["fingerprint"], f"the store at {self.path}")
        if not manifest["complete"]:
            rows = sum(shard["rows"] for shard in manifest["shards"])
            raise ArtifactError(f"the store at {self.path} is unfinished ({rows} rows so far); resume writing it")
        check_files(self.path, manifest, verify=verify)
        self.fingerprint: dict[str, Any] = manifest["fingerprint"]
        self.info: dict[str, Any] = manifest.get("info", {})
        self._shards = [map_file(self.path / shard["file"]) for shard in manifest["shards"]]
        _check_shapes(self.path, manifest["shards"], self._shards)
        self._starts = np.cumsum([0, *(shard["rows"] for shard in manifest["shards"])])
        self._unchecked = dict(enumerate(manifest["shards"])) if verify_on_read and not verify else {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def names(self) -> list[str]:
        """The stored tensors."""
        return sorted(self._shards[0]) if self._shards else []

    def row_shape(self, name: str) -> tuple[int, ...]:
        """The shape of one row of tensor ``name``; reads no row."""
        if name not in self.names:
            raise InputError(f"the store at {self.path} holds {self.names}, not {name!r}")
        return self._shards[0][name].shape[1:]

    def rows(self, name: str, index: Any) -> Tensor:
        """The rows of tensor ``name`` at ``index`` (integers in [0, len)), in that order."""
        if name not in self.names:
            raise InputError(f"the store at {self.path} holds {self.names}, not {name!r}")
        wanted = np.asarray(index, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise InputError(f"rows {wanted.min()} to {wanted.max()} are asked of a store of {len(self)}")
        source = self._shards[0][name]
        out = np.empty((len(wanted), *source.shape[1:]), source.dtype)
        which = np.searchsorted(self._starts, wanted, side="right") - 1
        for shard in np.unique(which):
            if shard in self._unchecked:
                check_files(self.path, {"shards": [self._unchecked[shard]]}, verify=True)
                del self._unchecked[shard]
            place = which == shard
            out[place] = self._shards[shard][name][wanted[place] - self._starts[shard]]
        return torch.from_numpy(out)


def _check_shapes(path: Path, shards: list[dict[str, Any]], maps: list[dict[str, np.ndarray[Any, Any]]]) -> None:
    """Every shard holds the rows that the manifest says, of the tensors of the first one."""
    kinds = [{name: (m.dtype, m.shape[1:]) for name, m in one.items()} for one in maps]
    for shard, one, kind in zip(shards, maps, kinds, strict=True):
        if kind != kinds[0] or any(m.ndim == 0 or len(m) != shard["rows"] for m in one.values()):
            raise ArtifactError(f"{path / shard['file']} does not hold {shard['rows']} rows of {sorted(kinds[0])}")
