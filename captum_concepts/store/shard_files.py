"""The files of a sharded store, read without trusting them: the manifest and the memory maps."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from captum_concepts._artifacts import parse_json
from captum_concepts.errors import ArtifactError

FORMAT = "captum_concepts.shards/1"
MANIFEST = "manifest.json"
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "U8": np.uint8}
#: A shard lies in the store's own folder: a manifest cannot point elsewhere.
_SHARD_NAME = re.compile(r"[\w-]+\.safetensors")


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of the store at ``path``; None where there is none.

    Raises:
        ArtifactError: it is damaged, or not a manifest of this format.
    """
    file = path / MANIFEST
    if not file.is_file():
        return None
    try:
        manifest = parse_json(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}; remove the folder to start again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"{file} is not the manifest of a store of format {FORMAT!r}")
    kinds = {"fingerprint": dict, "shards": list, "complete": bool, "info": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(manifest.get(name, kind()), kind)]
    missing = [name for name in ("fingerprint", "shards", "complete") if name not in manifest]
    if wrong or missing or not all(map(_is_shard, manifest["shards"])):
        raise ArtifactError(f"{file} is damaged; remove the folder to start again")
    return manifest


def check_files(path: Path, manifest: Mapping[str, Any], *, verify: bool = False) -> None:
    """Every shard is there with its size, and with ``verify`` its checksum.

    Raises:
        ArtifactError: names the first that is not.
    """
    for shard in manifest["shards"]:
        file = path / shard["file"]
        size = file.stat().st_size if file.is_file() else None
        if size != shard["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {shard['bytes']}"
            raise ArtifactError(f"{file} {found}; remove the folder to start again")
        if verify and hashlib.sha256(file.read_bytes()).hexdigest() != shard["sha256"]:
            raise ArtifactError(f"{file} is damaged: its checksum differs; remove the folder to start again")


def map_file(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Memory maps of a safetensors file: an 8-byte length, a JSON header, then raw values.

    Raises:
        ArtifactError: the header is damaged, or claims values that the file does not hold.
    """
    maps: dict[str, np.ndarray[Any, Any]] = {}
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > size:
                raise ArtifactError(f"{file} is damaged: its header claims {length} bytes of {size}")
            header = parse_json(handle.read(length))
        for name, info in header.items():
            if name == "__metadata__":
                continue
            if info["dtype"] not in _DTYPES:
                raise ArtifactError(f"{file} holds {name!r} as {info['dtype']}, which cannot be memory-mapped")
            dtype, shape = np.dtype(_DTYPES[info["dtype"]]), tuple(map(_size, info["shape"]))
            start, end = map(_size, info["data_offsets"])
            count = 1
            for side in shape:  # Python's integers do not wrap
                count *= side
            if end - start != count * dtype.itemsize or 8 + length + end > size:
                raise ArtifactError(f"{file} is damaged: {name!r} does not fit its place in the file")
            offset = 8 + length + start
            maps[name] = np.memmap(file, dtype, "r", offset, shape) if count else np.empty(shape, dtype)
    except ArtifactError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        raise ArtifactError(f"{file} is damaged: its header cannot be read ({error})") from error
    return maps


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value


def _is_shard(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    counts = [entry.get("rows"), entry.get("bytes")]
    named = isinstance(entry.get("file"), str) and _SHARD_NAME.fullmatch(entry["file"])
    whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**62 for n in counts)
    return bool(named) and whole and isinstance(entry.get("sha256"), str)
