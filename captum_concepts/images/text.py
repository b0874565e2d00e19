"""Readers of text, JSON and word-list files in common encodings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from captum_concepts._artifacts import parse_json
from captum_concepts.errors import InputError

_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


def read_text(path: str | os.PathLike[str]) -> str:
    r"""The text of a file in UTF-8, UTF-16 or otherwise cp1252, with ``\n`` line ends and no byte order mark.

    Raises:
        InputError: the file does not exist, cannot be read, or is not text.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "words.txt"
    >>> _ = path.write_bytes("café\r\nstripes\r\n".encode("utf-16"))
    >>> read_text(path)
    'café\nstripes\n'
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    encodings = [name for mark, name in _MARKS if data.startswith(mark)] or _encodings(data)
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text.replace("\r\n", "\n").replace("\r", "\n")
    raise InputError(f"{path} is not a text file: it is neither UTF-8 nor UTF-16 nor cp1252; save it as UTF-8")


def _encodings(data: bytes) -> list[str]:
    """Encodings to try without a byte order mark. In UTF-16, every second byte of most text is zero."""
    even, odd = data[0:2000:2].count(0), data[1:2000:2].count(0)
    half = min(len(data), 2000) // 4
    wide = "utf-16-le" if odd > max(half, even) else "utf-16-be" if even > max(half, odd) else None
    return [wide] if wide else ["utf-8", "cp1252"]


def read_json(path: str | os.PathLike[str], *kinds: type) -> Any:
    """The content of a JSON file.

    Args:
        path: the file.
        kinds: allowed types of its top level (``dict``, ``list``); without any, all are allowed.

    Raises:
        InputError: the file cannot be read, is not valid JSON, or has another top level.
    """
    try:
        value = parse_json(read_text(path))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if kinds and not isinstance(value, kinds):
        allowed = " or ".join({"dict": "object", "list": "list"}.get(kind.__name__, kind.__name__) for kind in kinds)
        raise InputError(f"{path} must contain a JSON {allowed}, got {type(value).__name__}")
    return value


def read_words(path: str | os.PathLike[str]) -> list[str]:
    """The names in a file, such as concepts, or classes in the order of a model's outputs.

    A text file has one name per line; empty lines, and those that begin with ``#``, are skipped. A JSON file is a list
    of names, or an object that maps class indices to names or the reverse (``{"0": "tench"}``, ``{"tench": 0}``).
    A name may also be a list that ends in it, as in ImageNet's ``{"0": ["n01440764", "tench"]}``.

    Raises:
        InputError: the file cannot be read, contains no names, or its indices are not 0, 1, 2, ...

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "classes.json"
    >>> _ = path.write_text('{"1": ["n02", "goldfish"], "0": ["n01", "tench"]}')
    >>> read_words(path)
    ['tench', 'goldfish']
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        value = read_json(path, list, dict)
        words = [_word(item, path) for item in (_in_order(value, path) if isinstance(value, dict) else value)]
    else:
        words = names_in(read_text(path))
    if not words:
        raise InputError(f"{path} contains no names")
    return words


def names_in(text: str) -> list[str]:
    """The names in ``text``, one per line, without comments and empty lines.

    >>> names_in("# sky\\nsky\\n\\n sea ")
    ['sky', 'sea']
    """
    lines = (line.strip() for line in text.split("\n"))
    return [line for line in lines if line and not line.startswith("#")]


def _word(item: Any, path: Path) -> str:
    while isinstance(item, list) and item:
        item = item[-1]
    if not isinstance(item, str) or not item.strip():
        raise InputError(f"{path} must contain names, got {str(item)[:60]!r}")
    return item.strip()


def _in_order(names: dict[str, Any], path: Path) -> list[Any]:
    """The names, by index, of an object that maps indices to names or names to indices."""
    if all(type(value) is int for value in names.values()):
        pairs = {index: name for name, index in names.items()}
    else:
        pairs = {int(key): value for key, value in names.items() if key.isascii() and key.isdigit()}
    if len(pairs) != len(names) or sorted(pairs) != list(range(len(pairs))):
        raise InputError(f"{path} must map the indices 0, 1, 2, ... to names, or names to these indices")
    return [pairs[index] for index in range(len(pairs))]
