"""Checks of file trees: required files, pairs of files and missing ones."""

from __future__ import annotations

from pathlib import Path

from captum_concepts._artifacts import is_there
from captum_concepts.errors import InputError, shortened
from captum_concepts.images import find_images


def require(path: Path, *, tree: str, where: str, folder: bool = False) -> Path:
    """``path`` if it exists; raises an InputError with the expected tree and its source otherwise."""
    if path.is_dir() if folder else is_there(path):
        return path
    kind = "folder" if folder else "file"
    raise InputError(f"no {kind} at {path}. Expected tree:\n{tree}\nGet it from {where}")


def inside(folder: Path, name: str, index: str | Path) -> Path:
    """``folder / name``, where ``name`` comes from the file ``index``.

    Raises:
        InputError: the name leads out of the folder.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{index} names {shortened(str(name))}, which is not in {folder}, so it is not read")
    return folder / name


def unlabelled_ids(choice: str) -> frozenset[int]:
    """Ids to ignore for ``unlabelled="ignore"`` or ``"background"``, where 0 means unlabeled."""
    if choice not in ("ignore", "background"):
        raise InputError(f"unlabelled={choice!r} must be 'ignore' or 'background'")
    return frozenset({0}) if choice == "ignore" else frozenset()


def paired(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Pairs of image and mask with the same path under the two folders, apart from suffixes.

    Raises:
        InputError: an image without a mask, a mask without an image, or two files that differ only in their suffix.
    """
    left, right = _by_stem(images), _by_stem(masks)
    for mine, other, kind in ((left, right, "mask"), (right, left, "image")):
        alone = [str(path) for stem, path in mine.items() if stem not in other]
        if alone:
            raise InputError(f"{len(alone)} files have no {kind} of the same name: {', '.join(alone[:3])}")
    return [(path, right[stem]) for stem, path in left.items()]


def _by_stem(folder: Path) -> dict[Path, Path]:
    files: dict[Path, Path] = {}
    for path in find_images(folder):
        stem = path.relative_to(folder).with_suffix("")
        if stem in files:
            raise InputError(f"{files[stem]} and {path} have the same name")
        files[stem] = path
    return files
