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

_FORMAT = "captum_concepts.shards/1"
_MANIFEST = "manifest.json"
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "U8": np.uint8}


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
        manifest = _read_manifest(self.path) if resume else None
        if manifest is not None:
            check_fingerprint(fingerprint, manifest["fingerprint"], f"the store at {self.path}")
            _check_files(self.path, manifest)
        else:
            manifest = {"format": _FORMAT, "fingerprint": dict(fingerprint), "shards": [], "complete": False}
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
        write_atomically(self.path / _MANIFEST, json.dumps(self._manifest, indent=1).encode())


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
        manifest = _read_manifest(self.path)
        if manifest is None:
            raise FileNotFoundError(f"no store at {self.path}")
        if fingerprint is not None:
            check_fingerprint(fingerprint, manifest["fingerprint"], f"the store at {self.path}")
        if not manifest["complete"]:
            rows = sum(shard["rows"] for shard in manifest["shards"])
            raise ArtifactError(f"the store at {self.path} is unfinished ({rows} rows so far); resume writing it")
        _check_files(self.path, manifest, verify=verify)
        self.fingerprint: dict[str, Any] = manifest["fingerprint"]
        self.info: dict[str, Any] = manifest.get("info", {})
        self._shards = [_map_file(self.path / shard["file"]) for shard in manifest["shards"]]
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
                _check_files(self.path, {"shards": [self._unchecked[shard]]}, verify=True)
                del self._unchecked[shard]
            place = which == shard
            out[place] = self._shards[shard][name][wanted[place] - self._starts[shard]]
        return torch.from_numpy(out)


def _read_manifest(path: Path) -> dict[str, Any] | None:
    file = path / _MANIFEST
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}; remove the folder to start again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise ArtifactError(f"{file} is not the manifest of a store of format {_FORMAT!r}")
    return manifest


def _check_files(path: Path, manifest: Mapping[str, Any], *, verify: bool = False) -> None:
    for shard in manifest["shards"]:
        file = path / shard["file"]
        size = file.stat().st_size if file.is_file() else None
        if size != shard["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {shard['bytes']}"
            raise ArtifactError(f"{file} {found}; remove the folder to start again")
        if verify and hashlib.sha256(file.read_bytes()).hexdigest() != shard["sha256"]:
            raise ArtifactError(f"{file} is damaged: its checksum differs; remove the folder to start again")


def _map_file(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Memory maps of a safetensors file: an 8-byte length, a JSON header, then raw values."""
    maps: dict[str, np.ndarray[Any, Any]] = {}
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length))
        for name, info in header.items():
            if name == "__metadata__":
                continue
            if info["dtype"] not in _DTYPES:
                raise ArtifactError(f"{file} holds {name!r} as {info['dtype']}, which cannot be memory-mapped")
            maps[name] = np.memmap(
                file, _DTYPES[info["dtype"]], "r", 8 + length + info["data_offsets"][0], tuple(info["shape"])
            )
    except ArtifactError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise ArtifactError(f"{file} is damaged: its header cannot be read ({error})") from error
    return maps
