"""Files of this package, which are written atomically and read without trust.

A saved object is one safetensors file, with tensors unchanged and everything else as JSON in the header. Nothing is
unpickled. The header names the format, so foreign files are rejected. A schema declares what the JSON and the tensors
may be, and is checked before anything is allocated or iterated over::

    _INFO = table({"concepts": list_of(text()), "layer": text(), "top_k": nothing_or(integer(1, 10_000))})
    _ARRAYS = {"scores": Array("float", ("N", "T")), "target": Array("integer", ("N",), optional=True)}
    with open_artifact(path, FORMAT, "a saved explanation", info=_INFO, arrays=_ARRAYS) as (info, tensors):
        ...

A check is a function ``(value, where) -> value``; :func:`check_json` applies it to a value, :func:`read_json` to files.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from captum_concepts.errors import ArtifactError, CaptumConceptsError, InputError, did_you_mean, listing, shortened

#: A check of one JSON value, which returns the value to use or raises :class:`Unfit`.
Check = Callable[[Any, str], Any]
#: Renamed entries and tensors of an older format, as old name -> new name.
Keys = Mapping[str, str]

_INFO = "info"
_LARGEST_JSON = 64 << 20
_DEEPEST = 32
_LARGEST_SIDE = 2**40
#: Errors that invalid content raises in code written for valid content.
_BAD_CONTENT = (OSError, ValueError, LookupError, TypeError, RuntimeError, AttributeError, OverflowError)
_DTYPES = {
    "float": ("F64", "F32", "F16", "BF16"),
    "integer": ("I64", "I32", "I16", "I8", "U8"),
    "bool": ("BOOL",),
}


class Unfit(Exception):
    """A value that a check does not accept, with its location and what was expected."""

    def __init__(self, where: str, found: Any, wanted: str) -> None:
        named = f"{where!r} is" if where else "its content is"
        super().__init__(f"{named} {shortened(found)}; it must be {wanted}")


def integer(low: int = 0, high: int = 2**53) -> Check:
    """Check for an integer in [low, high], not a bool or float."""

    def check(value: Any, where: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise Unfit(where, value, f"a whole number from {low:,} to {high:,}")
        return value

    return check


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    """Check for a finite number in [low, high], returned as float."""

    def check(value: Any, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e308:
            raise Unfit(where, value, "a finite number")
        if not low <= value <= high:
            raise Unfit(where, value, f"a number from {low:g} to {high:g}")
        return float(value)

    return check


def text(*allowed: str, longest: int = 10_000, pattern: str | None = None) -> Check:
    """Check for a string that is one of ``allowed`` if any are given, and fully matches ``pattern``."""

    def check(value: Any, where: str) -> str:
        if allowed and value not in allowed:
            raise Unfit(where, value, f"one of {listing(allowed)}")
        if not isinstance(value, str) or len(value) > longest:
            raise Unfit(where, value, f"a string of at most {longest:,} characters")
        if pattern is not None and not re.fullmatch(pattern, value):
            raise Unfit(where, value, f"a string that matches {pattern}")
        return value

    return check


def flag(value: Any, where: str) -> bool:
    """Check for ``true`` or ``false``."""
    if not isinstance(value, bool):
        raise Unfit(where, value, "true or false")
    return value


def nothing_or(check: Check) -> Check:
    """Check for ``null``, or what ``check`` accepts."""
    return lambda value, where: None if value is None else check(value, where)


def either(*checks: Check) -> Check:
    """Check that the first accepting of several checks decides; errors are those of the last."""

    def check(value: Any, where: str) -> Any:
        for one in checks[:-1]:
            try:
                return one(value, where)
            except Unfit:
                continue
        return checks[-1](value, where)

    return check


def list_of(item: Check, *, length: int | None = None, least: int = 0, most: int = 1_000_000) -> Check:
    """Check for a list of exactly ``length``, or of ``least`` to ``most``, items that ``item`` accepts."""

    def check(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list):
            raise Unfit(where, value, "a list")
        if length is not None and len(value) != length:
            raise Unfit(f"len({where})", len(value), f"{length}")
        if not least <= len(value) <= most:
            raise Unfit(f"len({where})", len(value), f"from {least:,} to {most:,}")
        return [item(one, f"{where}[{i}]") for i, one in enumerate(value)]

    return check


def table(fields: Mapping[str, Check], optional: Mapping[str, Check] | None = None, *, more: bool = False) -> Check:
    """Check for an object with all of ``fields``, any of ``optional``, and no other keys; with ``more``, other keys are
    dropped."""
    known = {**fields, **(optional or {})}

    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise Unfit(where, value, f"an object with the keys {listing(known)}")
        unknown = [key for key in value if key not in known and not more]
        missing = [key for key in fields if key not in value]
        if missing:
            has = f" It has {listing(unknown)}, which is unknown." if unknown else ""
            raise Unfit(where, value, f"an object with the key {missing[0]!r}.{has}")
        if unknown:
            hint = did_you_mean(str(unknown[0]), known)
            raise Unfit(where, value, f"an object without the unrecognized key {shortened(unknown[0])}.{hint}")
        return {key: known[key](one, f"{where}.{key}" if where else key) for key, one in value.items() if key in known}

    return check


def mapping_of(value: Check, *, most: int = 1_000_000) -> Check:
    """Check for an object with any keys, whose values ``value`` accepts."""
    one_value = value

    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > most:
            raise Unfit(where, value, f"an object with at most {most:,} keys")
        return {key: one_value(one, f"{where}[{shortened(key)}]") for key, one in value.items()}

    return check


def anything(value: Any, where: str) -> Any:
    """Check for any JSON of at most 32 levels, for values that are displayed or compared but not computed with."""
    level, depth = [value], 0
    while level:
        if depth > _DEEPEST:
            raise Unfit(where, value, f"nested at most {_DEEPEST} levels deep")
        level = [
            one
            for part in level
            for one in (part.values() if isinstance(part, dict) else part if isinstance(part, list) else ())
        ]
        depth += 1
    return value


def check_json(value: Any, check: Check, what: str, error: type[CaptumConceptsError] = ArtifactError) -> Any:
    """``value``, as returned by ``check``.

    Args:
        value: JSON.
        check: its schema.
        what: name of the value in messages.
        error: class of the error.

    Raises:
        ArtifactError: (or ``error``) an entry does not match; the message names it, its value and what it must be.

    >>> check_json({"rows": [4, -1]}, table({"rows": list_of(integer(0, 9))}), "the manifest")
    Traceback (most recent call last):
    ...
    captum_concepts.errors.ArtifactError: the manifest is damaged or foreign: 'rows[1]' is -1; it must be a whole number
    from 0 to 9
    """
    fault = "is damaged or foreign" if error is ArtifactError else "cannot be used"
    try:
        return check(value, "")
    except Unfit as wrong:
        raise error(f"{what} {fault}: {wrong}") from None
    except RecursionError:
        raise error(f"{what} {fault}: it is nested too deeply") from None


def read_json(path: str | os.PathLike[str], check: Check, what: str) -> Any:
    """The content of a JSON file, as returned by ``check``.

    Args:
        path: the file.
        check: its schema.
        what: name of the content in messages, with its article.

    Raises:
        FileNotFoundError: there is no such file.
        ArtifactError: the file is unreadable, too large, not JSON in UTF-8, or does not match the schema.
    """
    path = Path(path)
    if not is_there(path):
        raise FileNotFoundError(f"there is no file {path}, which should be {what}")
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ArtifactError(f"{path} cannot be read as {what}: it is larger than {_LARGEST_JSON >> 20} MiB")
        found = parse_json(path.read_text(encoding="utf-8-sig"))
    except ArtifactError:
        raise
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read as {what}: {error}") from error
    return check_json(found, check, str(path))


@dataclass(frozen=True)
class Array:
    """Schema of a stored tensor, compared with the header before the tensor is read.

    Args:
        kind: "float", "integer", "bool", "any", or a dtype as named by safetensors, such as "F16".
        dims: one entry per dimension: a size, None for any size, or a letter for a size that is the same in all tensors
            of a file. A last entry ``...`` allows any further dimensions.
        optional: whether the tensor may be missing.
    """

    kind: str
    dims: tuple[Any, ...]
    optional: bool = False

    def fits(self, dtype: str, shape: list[int], sizes: dict[str, int]) -> bool:
        """Whether a tensor matches; new letters are added to ``sizes``."""
        dims = self.dims[:-1] if self.dims and self.dims[-1] is ... else self.dims
        if (self.kind != "any" and dtype not in _DTYPES.get(self.kind, (self.kind,))) or len(shape) < len(dims):
            return False
        if len(dims) == len(self.dims) != len(shape) or any(side > _LARGEST_SIDE for side in shape):
            return False
        wanted = [sizes.setdefault(dim, side) if isinstance(dim, str) else dim for dim, side in zip(dims, shape)]  # noqa: B905
        return all(dim is None or dim == side for dim, side in zip(wanted, shape))  # noqa: B905


def check_arrays(file: Any, arrays: Mapping[str, Array], sizes: Mapping[str, int] | None = None) -> None:
    """Compare the header of an open safetensors file with ``arrays``, without reading a tensor.

    Args:
        file: result of ``safetensors.safe_open``.
        arrays: the tensors by name.
        sizes: known sizes of letters.

    Raises:
        ValueError: a tensor is missing, unexpected, or has another dtype or shape.
    """
    names, known = set(file.keys()), dict(sizes or {})
    if unknown := sorted(names - set(arrays)):
        raise ValueError(f"it contains unexpected tensors {listing(unknown)}")
    for name, array in arrays.items():
        if name not in names:
            if array.optional:
                continue
            raise ValueError(f"tensor {name!r} is missing")
        entry = file.get_slice(name)
        dtype, shape = entry.get_dtype(), list(entry.get_shape())
        if not array.fits(dtype, shape, known):
            dims = ", ".join(
                "..." if d is ... else str(known.get(d, d)) if d is not None else "any" for d in array.dims
            )
            raise ValueError(f"tensor {name!r} is {dtype} {shortened(shape)}; it must be {array.kind} [{dims}]")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a new file that replaces ``path`` at the end of the block; after an error, the old file is unchanged.

    Nothing is written through links; a link at ``path`` is replaced, and its target is unchanged.

    Args:
        path: the file, in an existing folder.

    Raises:
        InputError: ``path`` exists but is not a file (a folder, a device), so it is not replaced; or it begins with ~.
        FileNotFoundError, PermissionError: there is no such folder, or the old file is write-protected.
    """
    path = Path(path)
    check_destination(path)
    try:
        there = path.lstat().st_mode
    except FileNotFoundError:
        there = stat.S_IFREG
    if not (stat.S_ISREG(there) or stat.S_ISLNK(there)):
        raise InputError(
            f"{path} is {'a folder' if stat.S_ISDIR(there) else 'not a regular file'}; pass the name of a file"
        )
    partial = path.with_name(f".{_short(path.name)}.{os.getpid()}.{threading.get_ident()}.partial")
    partial.unlink(missing_ok=True)
    try:
        with naming(path), partial.open("xb") as file:  # "x" creates it, so it is not a link
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_destination(path: Path) -> None:
    """Raise if there is no folder to write the file to, or an old file that may not be replaced."""
    check_expanded(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no folder to write the file to; create it", str(path))
    if path.is_file() and not path.is_symlink() and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "the file is write-protected", str(path))


def check_expanded(path: str | os.PathLike[str]) -> None:
    """Raise for ``~/...``, which would become a folder of that name.

    >>> check_expanded("folder/model.safetensors")
    """
    first, *more = Path(path).parts or ("",)
    if first == "~" or (more and first.startswith("~")):
        raise InputError(f"{path} begins with {first}, which is not expanded; pass Path({str(path)!r}).expanduser()")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file's name to errors without one, such as that of a full disk, and to those that name a partial file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or not (error.filename is None or str(error.filename).endswith(".partial")):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def leftovers(folder: Path, names: str) -> list[tuple[Path, str]]:
    """Partial files of :func:`replacing` that killed processes left in ``folder``, with the names of the files they
    were to replace, which match the pattern ``names``."""
    form = re.compile(rf"\.({names})\.\d+\.\d+\.partial")
    found = [(file, form.fullmatch(file.name)) for file in folder.glob(".*.partial")]
    return [(file, match[1]) for file, match in found if match is not None]


def _short(name: str) -> str:
    """A name short enough for additions within the limit of 255 bytes."""
    return name if len(os.fsencode(name)) <= 180 else name[:45]


def own_folder(path: Path) -> Path:
    """``path``, a folder that this package creates inside a given one, if it is not a link.

    Raises:
        ArtifactError: it is a link, which could point anywhere.
    """
    if path.is_symlink():
        raise ArtifactError(
            f"{path} is a symbolic link, and files are not written through links; replace it with a folder"
        )
    return path


def is_there(path: Path) -> bool:
    """Whether the file exists; False for invalid names."""
    try:
        return path.is_file()
    except OSError:
        return False


def write_atomically(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write the file atomically, so that readers never see a part of it and a full disk leaves the old file.

    Args:
        path: see :func:`replacing`.
        data: bytes, or text that is written as UTF-8 (with escapes for what UTF-8 cannot encode, as in file names).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(write_atomically(Path(folder) / "a.txt", "whole").read_text())
    whole
    """
    with replacing(path) as file:
        file.write(data.encode(errors="backslashreplace") if isinstance(data, str) else data)
    return Path(path)


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` for untrusted text, which raises a ValueError for any fault.

    >>> parse_json("[" * 100_000)
    Traceback (most recent call last):
    ...
    ValueError: it is nested too deeply
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def save_artifact(path: str | os.PathLike[str], kind: str, info: Mapping[str, Any], tensors: Mapping[str, Any]) -> Path:
    """Write ``tensors`` and ``info`` (JSON) atomically as one safetensors file of format ``kind``; return the path."""
    from safetensors.torch import save

    # safetensors rejects tensors that share memory, so copy.
    whole = {name: v.detach().cpu().clone(memory_format=torch.contiguous_format) for name, v in tensors.items()}
    return write_atomically(path, _ordered(save(whole, metadata={"format": kind, _INFO: json.dumps(info)})))


def _ordered(data: bytes) -> bytes:
    """``data`` with its metadata, which safetensors writes in random order, sorted so that files are deterministic."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = dict(sorted(header.pop("__metadata__").items()))
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[start:]


@contextmanager
def open_artifact(
    path: str | os.PathLike[str],
    kind: str | Mapping[str, Keys],
    what: str,
    *,
    info: Check = anything,
    arrays: Mapping[str, Array] | None = None,
    sizes: Callable[[dict[str, Any]], Mapping[str, int]] | None = None,
    device: str = "cpu",
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Open a file of :func:`save_artifact` as ``(info, tensors)``.

    Build the object inside the ``with`` block, so that any further error in the content is reported as an
    :class:`~captum_concepts.errors.ArtifactError` that names the file.

    Args:
        path: the file.
        kind: its format, or all readable formats, each with a table of renamed keys (entries of ``info`` and tensors;
            empty for the current format).
        what: name of the saved object in messages, with its article, such as ``"a saved SpatialACV"``.
        info: schema of the JSON part, after renaming.
        arrays: schemas of the tensors, after renaming; None for any.
        sizes: sizes of letters of ``arrays`` from the JSON part, as in ``lambda info: {"T": len(info["concepts"])}``.
        device: device of the tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ArtifactError: the file is truncated, corrupt, foreign, or its content is invalid.
    """
    path = Path(path)
    kinds = {kind: {}} if isinstance(kind, str) else kind
    with open_safetensors(path, what, device) as file:
        metadata = file.metadata() or {}
        found_kind = metadata.get("format", "none")
        if found_kind not in kinds:
            raise ArtifactError(
                f"{path} is not {what} (format {shortened(found_kind)}, not {' or '.join(map(repr, kinds))})"
            )
        keys = kinds[found_kind]
        found = parse_json(metadata[_INFO])
        if not isinstance(found, dict):
            raise ArtifactError(f"{path} is not {what}: its header does not contain a JSON object")
        found = check_json({keys.get(name, name): one for name, one in found.items()}, info, str(path))
        names = {keys.get(name, name): name for name in file.keys()}  # noqa: SIM118
        if arrays is not None:
            check_arrays(_Renamed(file, names), arrays, sizes(found) if sizes is not None else None)
        yield found, {name: file.get_tensor(stored) for name, stored in names.items()}


@contextmanager
def open_safetensors(path: Path, what: str, device: str = "cpu") -> Iterator[Any]:
    """``safetensors.safe_open`` whose errors, and those of invalid content in the block, name the file.

    Raises:
        FileNotFoundError: there is no such file.
        ArtifactError: the file is damaged, or its content is invalid in the block.
    """
    from safetensors import SafetensorError, safe_open

    if not is_there(path):
        raise FileNotFoundError(f"there is no file {path}, which should be {what}")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except ArtifactError:
        raise
    # Sizes in a malicious header cause a RuntimeError.
    except (SafetensorError, *_BAD_CONTENT) as error:
        raise ArtifactError(f"{path} cannot be read as {what}: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class _Renamed:
    """An open file with renamed tensors."""

    file: Any
    names: Mapping[str, str]

    def keys(self) -> Collection[str]:
        return self.names.keys()

    def get_slice(self, name: str) -> Any:
        return self.file.get_slice(self.names[name])
