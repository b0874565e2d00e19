"""Trees of files: what must be there, what belongs together, and what is missing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from captum_concepts._artifacts import parse_json
from captum_concepts.datasets.images import IMAGE_SUFFIXES
from captum_concepts.errors import InputError


def require(path: Path, *, tree: str, where: str, folder: bool = False) -> Path:
    """``path`` if it is there, else an InputError with the tree that is expected and where to get it."""
    if path.is_dir() if folder else path.is_file():
        return path
    kind = "folder" if folder else "file"
    raise InputError(f"no {kind} at {path}. Expected tree:\n{tree}\nGet it from {where}")


def read_text(path: Path) -> str:
    """A UTF-8 text file; a broken one is named."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def read_json(path: Path, kind: type) -> Any:
    """A JSON file that holds a ``kind`` (dict or list)."""
    try:
        value = parse_json(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is no JSON: {error}") from error
    if not isinstance(value, kind):
        raise InputError(f"{path} must hold a JSON {kind.__name__}, got {type(value).__name__}")
    return value


def unlabelled_ids(choice: str) -> frozenset[int]:
    """The ids to ignore for ``unlabelled="ignore"`` or ``"background"``, where 0 means unlabelled."""
    if choice not in ("ignore", "background"):
        raise InputError(f"unlabelled={choice!r} must be 'ignore' or 'background'")
    return frozenset({0}) if choice == "ignore" else frozenset()


def files_by_stem(folder: Path) -> dict[str, Path]:
    """The image files of one folder by name without suffix, sorted.

    Raises:
        InputError: two files differ in their suffix only, or there is none.
    """
    files: dict[str, Path] = {}
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        path = Path(entry.path)
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
            if path.stem in files:
                raise InputError(f"{files[path.stem]} and {path} have the same name")
            files[path.stem] = path
    if not files:
        raise InputError(f"no image ({', '.join(IMAGE_SUFFIXES)}) in {folder}")
    return files


def paired(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Images and masks of the same name.

    Raises:
        InputError: an image without mask or a mask without image.
    """
    left, right = files_by_stem(images), files_by_stem(masks)
    for mine, other, kind in ((left, right, "mask"), (right, left, "image")):
        alone = [str(path) for stem, path in mine.items() if stem not in other]
        if alone:
            raise InputError(f"{len(alone)} files have no {kind} of the same name: {', '.join(alone[:3])}")
    return [(path, right[stem]) for stem, path in left.items()]
