"""Rows of named tensors on disk, in shards that are written atomically, contain a checksum, and are memory-mapped.

:func:`fill_shards` computes every shard that is missing or damaged. This implements resuming after a kill, repairing,
extending, and distributing the work over processes (rank r takes the shards r, r + n, ...).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_concepts._artifacts import (
    Array,
    anything,
    check_arrays,
    check_expanded,
    check_json,
    integer,
    leftovers,
    mapping_of,
    open_safetensors,
    parse_json,
    table,
    text,
    write_atomically,
)
from captum_concepts.errors import ArtifactError, InputError, listing
from captum_concepts.store.lock import FolderLock
from captum_concepts.store.manifest import MANIFEST, Manifest, check_fingerprint, read_manifest, shard_name

#: First row and row after the last.
Span = tuple[int, int]
#: Receives the tensors and the notes of one shard.
Write = Callable[[Mapping[str, Tensor], Mapping[str, Any]], None]

_KEY = "captum_concepts.shard/2"
_ABOUT = table(
    {
        "store": text(),
        "number": integer(),
        "notes": mapping_of(anything, most=1000),
        "sha256": text(pattern="[0-9a-f]{64}"),
    }
)
_BLANK = "0" * 64
_SHARD = r"shard-\d{5,18}\.safetensors"
_OWN = rf"{re.escape(MANIFEST)}|{_SHARD}"
_LONGEST_HEADER = 10 << 20
_BAD = (OSError, ValueError, LookupError, TypeError, RuntimeError, OverflowError)


class Shard(NamedTuple):
    """An opened shard: its memory-mapped tensors and its notes."""

    tensors: dict[str, Tensor]
    notes: dict[str, Any]


def write_shard(
    path: Path, manifest: Manifest, number: int, tensors: Mapping[str, Tensor], notes: Mapping[str, Any] | None = None
) -> None:
    """Write shard ``number`` of a store as one safetensors file; equal tensors give equal bytes.

    The header contains the identity of the store and the SHA-256 of the file with that checksum blanked out.

    Raises:
        InputError: another number of rows than the manifest lists.
    """
    from safetensors.torch import save

    if {len(tensor) for tensor in tensors.values()} != {manifest.rows[number]}:
        counts = {name: len(tensor) for name, tensor in tensors.items()}
        raise InputError(f"shard {number} must have {manifest.rows[number]} rows of every tensor, got {counts}")
    about = {"store": manifest.identity, "number": number, "notes": dict(notes or {}), "sha256": _BLANK}
    # One metadata entry only, because safetensors does not fix the order of several.
    data = save(dict(tensors), metadata={_KEY: json.dumps(about)})
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[:end].replace(_BLANK.encode(), hashlib.sha256(data).hexdigest().encode(), 1)
    write_atomically(path / shard_name(number), header + data[end:])


def open_shard(path: Path, manifest: Manifest, number: int, arrays: Mapping[str, Array] | None = None) -> Shard:
    """Shard ``number``, memory-mapped; its header is checked, its values are not read.

    Args:
        path: the folder of the store.
        manifest: of the store.
        number: of the shard.
        arrays: the expected tensors, with "N" for the number of rows; None accepts any.

    Raises:
        ArtifactError: missing, damaged, or of another store.
    """
    from safetensors import SafetensorError, safe_open

    file, rows = path / shard_name(number), manifest.rows[number]
    if not file.is_file():
        raise ArtifactError(f"{file} is missing")
    try:
        with safe_open(file, framework="pt") as opened:
            about = (opened.metadata() or {}).get(_KEY)
            notes: dict[str, Any] = {}
            if about is not None:
                found = check_json(parse_json(about), _ABOUT, str(file))
                if (found["store"], found["number"]) != (manifest.identity, number):
                    raise ArtifactError(f"{file} is not shard {number} of this store")
                notes = found["notes"]
            elif file.name not in manifest.checksums:
                raise ArtifactError(f"{file} is not a shard of a store")
            names = list(opened.keys())
            whole = arrays or {name: Array("any", ("N", ...)) for name in names}
            check_arrays(opened, whole, {"N": rows})
            return Shard({name: opened.get_tensor(name) for name in names}, notes)
    except ArtifactError:
        raise
    except (SafetensorError, *_BAD) as error:
        raise ArtifactError(f"{file} is damaged: {error}") from error


def check_sum(path: Path, manifest: Manifest, number: int) -> None:
    """Read shard ``number`` and compare its checksum.

    Raises:
        ArtifactError: it differs, or there is none.
    """
    file = path / shard_name(number)
    try:
        with file.open("rb") as handle:
            size = handle.read(8)
            length = int.from_bytes(size, "little")
            header = handle.read(min(length, _LONGEST_HEADER))
            metadata = parse_json(header).get("__metadata__", {})
            if _KEY in metadata:
                expected = check_json(parse_json(metadata[_KEY]), _ABOUT, str(file))["sha256"]
                header = header.replace(expected.encode(), _BLANK.encode(), 1)
            else:
                expected = manifest.checksums.get(file.name)
            digest = hashlib.sha256(size + header)
            while block := handle.read(1 << 20):
                digest.update(block)
    except ArtifactError:
        raise
    except (AttributeError, *_BAD) as error:
        raise ArtifactError(f"{file} is damaged: its header cannot be read ({error})") from error
    if digest.hexdigest() != expected:
        raise ArtifactError(f"{file} is damaged: its checksum differs")


def damage(path: Path, manifest: Manifest, number: int, arrays: Mapping[str, Array] | None = None) -> str | None:
    """What is wrong with shard ``number``, which is read in full; None if it is intact."""
    try:
        open_shard(path, manifest, number, arrays)
        check_sum(path, manifest, number)
    except ArtifactError as error:
        return str(error).removeprefix(f"{path / shard_name(number)} is damaged: ")
    return None


def fill_shards(
    path: Path,
    manifest: Manifest,
    compute: Callable[[list[Span], Write], None],
    *,
    arrays: Mapping[str, Array] | None = None,
    check: Callable[[list[int]], None] | None = None,
    first: int = 0,
    rank: int = 0,
    size: int = 1,
    what: str = "the store at",
) -> list[int]:
    """Compute and write this process's missing or damaged shards.

    Args:
        path: the folder, which contains ``manifest`` already.
        manifest: lists the rows of all shards.
        compute: called with the spans of rows to compute and a function, to which it passes the tensors and notes of
            each span in turn. Spans passed before a failure are kept.
        arrays: the expected tensors; see :func:`open_shard`.
        check: called with the numbers of the intact shards before anything is computed; it may raise.
        first: only shards from this number on.
        rank, size: this process computes the shards ``first + rank, first + rank + size, ...``; the files do not depend
            on them.
        what: name of the folder in messages.

    Returns:
        The numbers of the computed shards.

    Raises:
        ArtifactError: another process is writing the same shards.
    """
    mine = range(first + rank, len(manifest.rows), size)
    wanted = [number for number in mine if damage(path, manifest, number, arrays) is not None]
    if check is not None:
        check(sorted(set(mine) - set(wanted)))
    if not wanted:  # nothing to write, so the folder may be read-only
        return []
    with FolderLock(path, what, name="lock" if size == 1 else f"lock-{rank:05d}-of-{size:05d}"):
        for leftover, name in leftovers(path, _SHARD):
            if _number(name) in mine:
                leftover.unlink(missing_ok=True)
        wanted = [number for number in wanted if damage(path, manifest, number, arrays) is not None]
        waiting = iter(wanted)

        def write(tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
            write_shard(path, manifest, next(waiting), tensors, notes)

        if wanted:
            compute([manifest.spans[number] for number in wanted], write)
        if size == 1:
            for stale in path.glob(".lock-*-of-*"):  # of killed processes; live ones keep the file open
                if re.fullmatch(r"\.lock-\d{5,}-of-\d{5,}", stale.name):
                    stale.unlink(missing_ok=True)
    return wanted


def missing_shards(path: Path, manifest: Manifest) -> list[int]:
    """The shards whose file is missing; contents are not checked."""
    return [number for number in range(len(manifest.rows)) if not (path / shard_name(number)).is_file()]


def check_unclaimed(path: Path) -> None:
    """Refuse a folder that contains shards but no manifest, since their origin is unknown.

    Raises:
        ArtifactError: names one of the shards.
    """
    if (found := next(iter(_shard_files(path)), None)) is not None:
        raise ArtifactError(
            f"{path} has no {MANIFEST}, but {found.name}: either the store lost its manifest, or the files belong to "
            "something else. Nothing was changed; use another folder, or move the files away"
        )


def clear_store(path: Path) -> None:
    """Remove only the files of a store, the manifest last, so that an interrupted removal still leaves a store.

    Raises:
        ArtifactError: the folder contains shards of something else, or no readable manifest; nothing is removed.
    """
    manifest = read_manifest(path)
    if manifest is None:
        check_unclaimed(path)
        return
    listed = [path / shard_name(number) for number in range(len(manifest.rows))]
    partial = [file for file, _ in leftovers(path, _OWN)]
    for file in [*listed, *unlisted_shards(path, manifest), *partial, path / MANIFEST]:
        file.unlink(missing_ok=True)


def unlisted_shards(path: Path, manifest: Manifest) -> list[Path]:
    """The shards that the manifest does not list, left by an unfinished append or extension.

    Raises:
        ArtifactError: such a file belongs to another store; the message names it.
    """
    found = []
    for file in _shard_files(path):
        if _number(file.name) < len(manifest.rows):
            continue
        if file.name not in manifest.checksums and _store_of(file) != manifest.identity:
            raise ArtifactError(
                f"{file} is not a shard of the store in its folder, so nothing was changed; move it away"
            )
        found.append(file)
    return found


def _shard_files(path: Path) -> list[Path]:
    return sorted(file for file in path.glob("shard-*.safetensors") if re.fullmatch(_SHARD, file.name))


def _number(name: str) -> int:
    return int(name.partition(".")[0].removeprefix("shard-"))


def _store_of(file: Path) -> str | None:
    """The identity of the store in the shard's header; None if the header has none."""
    try:
        with open_safetensors(file, "a shard") as opened:
            found = check_json(parse_json((opened.metadata() or {})[_KEY]), _ABOUT, str(file))
    except (ArtifactError, FileNotFoundError):
        return None
    return str(found["store"])


def shard_sizes(rows: int, shard_rows: int) -> list[int]:
    """Rows of each shard if ``rows`` rows are split into shards of ``shard_rows``.

    >>> shard_sizes(10, 4)
    [4, 4, 2]
    """
    return [min(shard_rows, rows - start) for start in range(0, rows, shard_rows)]


def default_shard_rows(rows: int) -> int:
    """Rows per shard for about 200 shards, so that a kill costs little and the list stays short.

    >>> default_shard_rows(500), default_shard_rows(50_000), default_shard_rows(1_281_167)
    (32, 250, 1024)
    """
    return min(max(rows // 200, 32), 1024)


class ShardWriter:
    """Append rows to a sharded store whose number of rows is not known in advance.

    A shard is one safetensors file, written to a temporary name and renamed before the manifest is replaced. The folder
    is therefore readable after a kill at any moment, and :attr:`rows` reports where to resume.

    Args:
        path: the folder.
        fingerprint: model, layers, encoder and data that the rows were computed from (anything JSON can represent).
        shard_rows: rows per file.
        resume: continue after the intact rows; False removes them.

    Raises:
        ArtifactError: the folder contains rows that do not match, or its manifest is damaged.

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
        check_expanded(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        if not resume:
            clear_store(self.path)
        self.shard_rows = shard_rows
        self._pending: list[dict[str, Tensor]] = []
        self._waiting = 0
        self._kinds: dict[str, tuple[torch.dtype, torch.Size]] | None = None
        found = read_manifest(self.path)
        if found is None:
            check_unclaimed(self.path)
            found = Manifest(json.loads(json.dumps(dict(fingerprint))), growing=True)
        check_fingerprint(fingerprint, found.fingerprint, f"the store at {self.path}")
        stale = unlisted_shards(self.path, found)
        sound = next((n for n in range(len(found.rows)) if damage(self.path, found, n) is not None), len(found.rows))
        if sound < len(found.rows):
            stale += [self.path / shard_name(number) for number in range(sound, len(found.rows))]
            found = dataclasses.replace(found, rows=found.rows[:sound], growing=True)
        for file in [*stale, *(file for file, _ in leftovers(self.path, _OWN))]:
            file.unlink(missing_ok=True)
        self._manifest = found
        self._manifest.write(self.path)

    @property
    def rows(self) -> int:
        """Rows safely on disk."""
        return self._manifest.total

    @property
    def info(self) -> dict[str, Any]:
        """Notes of the writer, stored with the rows."""
        return self._manifest.info

    @property
    def complete(self) -> bool:
        """Whether :meth:`finish` was called, in this or an earlier run."""
        return not self._manifest.growing

    def append(self, tensors: Mapping[str, Tensor]) -> None:
        """Add rows; all tensors have the same number of rows, and names and row shapes match those of earlier calls."""
        counts = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(counts.values())) != 1:
            raise InputError(f"every tensor must have the same number of rows, got {counts}")
        kinds = _kinds(tensors)
        if self._kinds is None:
            self._kinds = kinds if not self.rows else _kinds(open_shard(self.path, self._manifest, 0).tensors)
        if kinds != self._kinds:
            raise InputError(f"rows must be {self._kinds}, as in earlier calls; got {kinds}")
        self._pending.append({name: tensor.detach().cpu() for name, tensor in tensors.items()})
        self._waiting += next(iter(counts.values()))
        while self._waiting >= self.shard_rows:
            self._write(self.shard_rows)

    def finish(self) -> None:
        """Write the remaining rows and mark the store complete."""
        if self._waiting:
            self._write(self._waiting)
        self._publish(self._manifest.rows, growing=False)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.finish()

    def _write(self, count: int) -> None:
        joined = {name: torch.cat([part[name] for part in self._pending]) for name in self._pending[0]}
        longer = dataclasses.replace(self._manifest, rows=[*self._manifest.rows, count])
        shard = {name: tensor[:count].contiguous() for name, tensor in joined.items()}
        write_shard(self.path, longer, len(self._manifest.rows), shard)
        self._publish(longer.rows, growing=True)
        self._waiting -= count
        self._pending = [{name: tensor[count:] for name, tensor in joined.items()}] if self._waiting else []

    def _publish(self, rows: list[int], *, growing: bool) -> None:
        self._manifest = dataclasses.replace(self._manifest, rows=rows, growing=growing)
        self._manifest.write(self.path)


class ShardReader:
    """Read rows of a sharded store through memory maps, loading only the requested rows.

    Args:
        path: the folder.
        fingerprint: what the rows must have been computed from; None accepts any.
        verify: compare every file's checksum, which reads all files; headers and sizes are always compared.
        verify_on_read: compare a file's checksum when its rows are first read.
        arrays: the expected tensors; see :func:`open_shard`.

    Raises:
        FileNotFoundError: there is no store.
        ArtifactError: unfinished, damaged, or does not match.
    """

    def __init__(
        self,
        path: str | Path,
        fingerprint: Mapping[str, Any] | None = None,
        *,
        verify: bool = False,
        verify_on_read: bool = False,
        arrays: Mapping[str, Array] | None = None,
    ) -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path)
        if manifest is None:
            raise FileNotFoundError(f"no store at {self.path}")
        if fingerprint is not None:
            check_fingerprint(fingerprint, manifest.fingerprint, f"the store at {self.path}")
        missing = missing_shards(self.path, manifest)
        if missing or manifest.growing:
            rows = manifest.total - sum(manifest.rows[number] for number in missing)
            files = f", missing: {listing([shard_name(number) for number in missing], 3)}" if missing else ""
            raise ArtifactError(
                f"the store at {self.path} is unfinished: it contains {rows} rows{files}. Repeat the call that writes "
                "it to compute the missing ones"
            )
        self._manifest = manifest
        self._shards = [open_shard(self.path, manifest, number, arrays) for number in range(len(manifest.rows))]
        for number, shard in enumerate(self._shards):
            if _kinds(shard.tensors) != _kinds(self._shards[0].tensors):
                file = self.path / shard_name(number)
                raise ArtifactError(f"{file} is damaged: its tensors are not those of the other shards")
            if verify:
                check_sum(self.path, manifest, number)
        self._unchecked = set(range(len(self._shards))) if verify_on_read and not verify else set()
        self._ends = torch.tensor([end for _, end in manifest.spans], dtype=torch.long)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the rows were computed from."""
        return self._manifest.fingerprint

    @property
    def info(self) -> dict[str, Any]:
        """Notes of the writer."""
        return self._manifest.info

    @property
    def notes(self) -> list[dict[str, Any]]:
        """The notes of each shard."""
        return [shard.notes for shard in self._shards]

    @property
    def shard_rows(self) -> list[int]:
        """Rows of each shard."""
        return self._manifest.rows

    def __len__(self) -> int:
        return self._manifest.total

    @property
    def names(self) -> list[str]:
        """The names of the stored tensors."""
        return sorted(self._shards[0].tensors) if self._shards else []

    def row_shape(self, name: str) -> tuple[int, ...]:
        """The shape of one row of tensor ``name``, without reading any."""
        return tuple(self._first(name).shape[1:])

    def rows(self, name: str, index: Sequence[int] | Tensor | Any) -> Tensor:
        """The rows of tensor ``name`` at ``index`` (integers in [0, len)), in that order."""
        source = self._first(name)
        wanted = torch.as_tensor(index, dtype=torch.long).contiguous()
        if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < len(self):
            raise InputError(
                f"rows {int(wanted.min())} to {int(wanted.max())} were requested from a store of {len(self)}"
            )
        out = source.new_empty(len(wanted), *source.shape[1:])
        which = torch.bucketize(wanted, self._ends, right=True)
        for number in which.unique().tolist():
            if number in self._unchecked:
                check_sum(self.path, self._manifest, number)
                self._unchecked.discard(number)
            place = which == number
            first = int(self._ends[number]) - self._manifest.rows[number]
            out[place] = self._shards[number].tensors[name][wanted[place] - first]
        return out

    def _first(self, name: str) -> Tensor:
        if name not in self.names:
            raise InputError(f"the store at {self.path} contains {self.names}, not {name!r}")
        return self._shards[0].tensors[name]


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Dtype and row shape of each tensor."""
    return {name: (tensor.dtype, tensor.shape[1:]) for name, tensor in tensors.items()}
