"""The manifest and fingerprints of a store, which record what it was computed from.

The manifest is written before the first shard and lists the rows of all planned shards. A store is complete when all
its shards exist, and any process can compute a missing one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts._artifacts import (
    Check,
    anything,
    check_json,
    flag,
    integer,
    leftovers,
    list_of,
    mapping_of,
    parse_json,
    table,
    text,
    write_atomically,
)
from captum_concepts.errors import ArtifactError, shortened

FORMAT = "captum_concepts.shards/2"
MANIFEST = "manifest.json"
_ROWS = integer(1, 2**40)
_NOTES = mapping_of(anything, most=1000)
_EXTENSION = table({"first": _ROWS, "images": _ROWS})
_SCHEMAS: dict[str, Check] = {
    FORMAT: table(
        {"format": text(FORMAT), "fingerprint": _NOTES, "info": _NOTES, "rows": list_of(_ROWS), "growing": flag},
        {"checksums": mapping_of(text(pattern="[0-9a-f]{64}")), "planned": list_of(_ROWS)},
    ),
    "captum_concepts.shards/1": table(
        {
            "format": text("captum_concepts.shards/1"),
            "fingerprint": _NOTES,
            "complete": flag,
            "shards": list_of(
                table(
                    {
                        "file": text(pattern=r"shard-\d{5,}\.safetensors"),
                        "rows": _ROWS,
                        "bytes": integer(),
                        "sha256": text(pattern="[0-9a-f]{64}"),
                    }
                )
            ),
        },
        {"info": _NOTES},
    ),
}


@dataclass(frozen=True)
class Manifest:
    """The shards of a store and what they were computed from.

    Args:
        fingerprint: what the rows were computed from (anything JSON can represent).
        rows: of each shard.
        info: notes of the writer.
        growing: whether a writer that does not know the number of rows is still appending.
        checksums: SHA-256 of the shards that were written in format 1; newer shards contain their own.
        planned: rows of the shards of an extension in progress, which readers ignore until all of them exist.
    """

    fingerprint: dict[str, Any]
    rows: list[int] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    growing: bool = False
    checksums: dict[str, str] = field(default_factory=dict)
    planned: list[int] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Rows of all shards."""
        return sum(self.rows)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """``(first, last + 1)`` row of each shard."""
        ends = [0, *itertools.accumulate(self.rows)]
        return list(itertools.pairwise(ends))

    @property
    def identity(self) -> str:
        """A digest of the fingerprint, which each shard repeats."""
        return hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def extended(self) -> Manifest:
        """The manifest after the extension, with the planned shards."""
        rows = [*self.rows, *self.planned]
        images = {"images": sum(rows)} if "images" in self.info else {}
        return replace(self, rows=rows, planned=[], info={**self.info, **images})

    def write(self, path: Path) -> None:
        """Write the manifest of the folder ``path``, atomically."""
        found: dict[str, Any] = {"format": FORMAT, "fingerprint": self.fingerprint, "info": self.info}
        found |= {"rows": self.rows, "growing": self.growing}
        if self.checksums:
            found["checksums"] = self.checksums
        if self.planned:
            found["planned"] = self.planned
        for leftover, _ in leftovers(path, re.escape(MANIFEST)):
            leftover.unlink(missing_ok=True)
        write_atomically(path / MANIFEST, json.dumps(found, indent=1).encode())


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:05d}.safetensors"


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of the store at ``path``, in this format or an older one; None if there is none.

    Raises:
        ArtifactError: it is damaged, or not a manifest.
    """
    file = path / MANIFEST
    if not file.is_file():
        return None
    try:
        found = parse_json(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}; remove the folder to start again") from error
    kind = found.get("format") if isinstance(found, dict) else None
    if not isinstance(kind, str) or kind not in _SCHEMAS:
        raise ArtifactError(f"{file} is not the manifest of a store (format {shortened(kind)}, not {FORMAT!r})")
    found = check_json(found, _SCHEMAS[kind], str(file))
    if kind == FORMAT:
        return _published(Manifest(**{key: value for key, value in found.items() if key != "format"}), file)
    shards = found["shards"]
    if [shard["file"] for shard in shards] != [shard_name(i) for i in range(len(shards))]:
        raise ArtifactError(f"{file} is damaged: its shards are not numbered from 0")
    old = Manifest(
        found["fingerprint"],
        [shard["rows"] for shard in shards],
        found.get("info", {}),
        not found["complete"],
        {shard["file"]: shard["sha256"] for shard in shards},
    )
    return _published(old, file)


def _published(found: Manifest, file: Path) -> Manifest:
    """``found`` converted from earlier versions, which listed an extension's shards before they existed."""
    if "extension" not in found.info:
        return found
    started = check_json(found.info["extension"], _EXTENSION, str(file))["first"]
    ends = [end for _, end in found.spans]
    if started not in ends:
        raise ArtifactError(f"{file} is damaged: its shards and its extension do not match")
    info = {**{key: value for key, value in found.info.items() if key != "extension"}, "images": started}
    return replace(found, rows=found.rows[: ends.index(started) + 1], info=info, growing=False)


def fingerprint_tensor(tensor: Tensor) -> str:
    """A hexadecimal digest of dtype, shape and bits.

    >>> fingerprint_tensor(torch.zeros(2)) == fingerprint_tensor(torch.zeros(2)) != fingerprint_tensor(torch.zeros(3))
    True
    """
    digest = hashlib.sha256()
    _update(digest, tensor)
    return digest.hexdigest()[:32]


def fingerprint_module(module: nn.Module) -> str:
    """A digest of a module's class, parameter names, shapes, dtypes and values, not of training mode or device.

    >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> fingerprint_module(a) == fingerprint_module(b)
    False
    """
    digest = hashlib.sha256(type(module).__qualname__.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        if isinstance(tensor, Tensor):
            _update(digest, tensor)
    return digest.hexdigest()[:32]


def fingerprint_callable(function: Any) -> str:
    """:func:`fingerprint_module` of the module of ``function``, or its qualified name if there is none."""
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    for candidate in (owner, *_attributes(owner), *_attributes(function)):
        if isinstance(candidate, nn.Module):
            method = "" if candidate is function else f"{getattr(function, '__name__', type(function).__name__)}:"
            return method + fingerprint_module(candidate)
    return f"callable:{getattr(function, '__qualname__', type(function).__qualname__)}"


def check_fingerprint(expected: Mapping[str, Any], found: Mapping[str, Any], what: str) -> None:
    """Refuse ``found`` if an entry differs from ``expected``.

    Args:
        expected: what the artifact must have been computed from; entries that are None are not compared.
        found: what the artifact records.
        what: name of the artifact in the message.

    Raises:
        ArtifactError: names every entry that differs.

    >>> check_fingerprint({"layer": "a"}, {"layer": "b"}, "the cache")
    Traceback (most recent call last):
    ...
    captum_concepts.errors.ArtifactError: the cache does not match: layer is 'b', not 'a'
    """
    differences = [
        f"{key} is {shortened(found.get(key))}, not {shortened(value)}"
        for key, value in json.loads(json.dumps(expected)).items()
        if value is not None and found.get(key) != value
    ]
    if differences:
        raise ArtifactError(f"{what} does not match: " + "; ".join(differences))


def _attributes(value: Any) -> tuple[Any, ...]:
    return tuple(vars(value).values()) if hasattr(value, "__dict__") else ()


def _update(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
