"""Files of this package: written whole or not at all, read without trusting them.

A saved object is one safetensors file: tensors as they are, everything else as JSON in the header. Nothing is
unpickled; the header says the format, so a foreign file is refused by name.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from captum_concepts.errors import ArtifactError

_INFO = "info"
#: What wrong content raises in code that was written for right content.
_BAD_CONTENT = (OSError, ValueError, LookupError, TypeError, RuntimeError, AttributeError, OverflowError)


def write_atomically(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write the whole file or nothing: a reader never sees a part of it, and a full disk leaves the old file.

    Args:
        path: the file; its folder must exist.
        data: bytes, or text that is written as UTF-8.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(write_atomically(Path(folder) / "a.txt", "whole").read_text())
    whole
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` for text from outside: whatever is wrong with it is a ValueError.

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
    """Write ``tensors`` and the JSON-able ``info`` as one safetensors file of format ``kind``, atomically."""
    from safetensors.torch import save

    # Copies, because safetensors refuses tensors that share memory.
    whole = {name: v.detach().cpu().clone(memory_format=torch.contiguous_format) for name, v in tensors.items()}
    return write_atomically(path, save(whole, metadata={"format": kind, _INFO: json.dumps(info)}))


@contextmanager
def open_artifact(
    path: str | os.PathLike[str],
    kind: str | tuple[str, ...],
    what: str,
    *,
    device: str = "cpu",
    allowed: Collection[str] | None = None,
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Read what :func:`save_artifact` wrote: ``(info, tensors)``.

    The caller turns them into an object inside the ``with`` block: whatever is wrong with their content is
    reported as an :class:`~captum_concepts.errors.ArtifactError` that names the file.

    Args:
        path: the file.
        kind: its format, or the formats that the caller can read, the current one first.
        what: how messages call the saved object, with its article: ``"a saved SpatialACV"``.
        device: where the tensors go.
        allowed: names of tensors that it may hold; None for any.

    Raises:
        FileNotFoundError: there is no such file.
        ArtifactError: truncated, corrupt, foreign, or its content makes no such object.
    """
    from safetensors import SafetensorError, safe_open

    path, kinds = Path(path), (kind,) if isinstance(kind, str) else kind
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}, which should be {what}")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") not in kinds:
                given = metadata.get("format", "none")
                raise ArtifactError(f"{path} is not {what} (format {given!r}, not {kinds[0]!r})")
            info = parse_json(metadata[_INFO])
            if not isinstance(info, dict):
                raise ArtifactError(f"{path} is not {what}: its header holds no JSON object")
            names = list(file.keys())
            if allowed is not None and (unknown := sorted(set(names) - set(allowed))):
                raise ArtifactError(f"{path} is not {what}: it holds unexpected tensors {unknown}")
            tensors = {name: file.get_tensor(name) for name in names}
        yield info, tensors
    except ArtifactError:
        raise
    # Sizes that a hostile header claims end in RuntimeError.
    except (SafetensorError, *_BAD_CONTENT) as error:
        raise ArtifactError(f"{path} cannot be read as {what}: {type(error).__name__}: {error}") from error
