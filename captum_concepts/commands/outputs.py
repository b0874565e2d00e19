"""Checks of a command's outputs before it starts, so that they are writable and never replace its inputs."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from captum_concepts.errors import InputError, printable

#: Options for folders of images to read, and for other files or folders to read.
_IMAGES = ("images", "references", "train", "val", "concepts", "negatives")
_READ = ("data", "explanations", "explainer", "against", "model", "encoder", "weights", "encoder_weights", "classes",
         "words", "config")  # fmt: skip


def check_outputs(
    read: Mapping[str, Any], outputs: Mapping[str, str | os.PathLike[str] | None], *, make_folders: bool = True
) -> None:
    """Check that outputs are writable and are not inputs, and create their folders.

    Args:
        read: the options of the command, among which inputs are known by name.
        outputs: the files to write, by option, such as "--save"; None if the option is not given.
        make_folders: whether to create their folders.

    Raises:
        InputError: a file is read by the same command, is a folder or device, or its folder is not writable.
    """
    empty = [name for name, path in outputs.items() if path is not None and not os.fspath(path)]
    if empty:
        raise InputError(f"{empty[0]} is empty; pass the name of a file")
    given = [(name, Path(path)) for name, path in outputs.items() if path is not None]
    for name, path in given:
        what = f"{name} {printable(path)}"
        if os.path.isdir(path):  # noqa: PTH112
            raise InputError(f"{what} is a folder; pass the name of a file")
        if os.path.exists(path) and not os.path.isfile(path):  # noqa: PTH110, PTH113
            raise InputError(f"{what} cannot be written: it is not a regular file")
        if (used := next(_conflicts(path, read), None)) is not None:
            raise InputError(f"{what} would overwrite a file that {used} reads; pass another name")
        if any(other != name and _same(path, one) for other, one in given):
            raise InputError(f"{what} is used twice; pass a different name for each output")
        try:
            if make_folders:
                path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(f"{path.name} is write-protected")
            folder = next(one for one in path.absolute().parents if one.exists())
            _try_to_write(folder)
        except OSError as error:
            raise InputError(f"{what} cannot be written: {error.strerror or error}") from error


def artifact(option: str, output: str | None) -> None:
    """Check the suffix of an artifact, which could otherwise be mistaken for an image.

    Raises:
        InputError: it does not end in ``.safetensors``.
    """
    if output is not None and Path(output).suffix.lower() != ".safetensors":
        raise InputError(f"{option} {printable(output)!r} must end in .safetensors")


def html(option: str, output: str) -> Path:
    """Path of an HTML page.

    Raises:
        InputError: it is a folder, or does not end in ``.html`` or ``.htm``.
    """
    if Path(output).is_dir():
        raise InputError(f"{output} is a folder; pass the name of an HTML file")
    if Path(output).suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{option} {printable(output)} is an HTML page; its name must end in .html")
    return Path(output)


def check_folder(output: str | os.PathLike[str], read: Mapping[str, Any], files: list[Path]) -> Path:
    """Path of an output folder that is writable or can be created; it is not created yet.

    Args:
        output: the folder.
        read: the options of the command.
        files: the images that the command reads.

    Raises:
        InputError: the folder is searched for images, contains one of them, or is not writable.
    """
    if not os.fspath(output):
        raise InputError("--output is empty; pass the name of a folder")
    out = Path(output)
    shown = printable(out)
    searched = [path for name in _IMAGES for path in _paths(name, read) if path.is_dir()]
    if any(_same(out, folder) for folder in searched) or any(_same(out, file.parent) for file in files):
        raise InputError(
            f"--output {shown} contains input images, and figures would be written among them; pass another folder, "
            f"such as {printable(out / 'explained')}"
        )
    try:
        if os.path.lexists(out) and not out.is_dir():
            raise FileExistsError(errno.EEXIST, "it is not a folder")
        _try_to_write(next(one for one in (out.absolute(), *out.absolute().parents) if one.exists()))
    except OSError as error:
        raise InputError(f"--output {shown} cannot be written: {error.strerror or error}") from error
    return out


def _try_to_write(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:  # unnamed, so nothing is left behind
        file.write(b"trial")
        file.flush()


def _conflicts(path: Path, read: Mapping[str, Any]) -> Iterator[str]:
    """Options that read an existing file."""
    if not os.path.lexists(path):
        return
    for name in (*_IMAGES, *_READ):
        for given in _paths(name, read):
            option = "the command" if name in ("images", "data") else f"--{name.replace('_', '-')}"
            if _same(path, given):
                yield option
            elif given.is_dir() and (real := path.resolve()).is_relative_to(given.resolve()):
                # A page or table of an earlier run may be replaced, but not files that are read from the folder.
                own = (".html", ".htm", ".md", *(() if name in _READ else (".safetensors", ".csv", ".json")))
                if real.suffix.lower() not in own:
                    yield option


def _paths(name: str, read: Mapping[str, Any]) -> list[Path]:
    """Existing paths in an option, one or several images, or the file of ``FILE.py:FUNCTION``."""
    value = read.get(name)
    texts = [os.fspath(one) for one in value] if name == "images" and value else [value]
    found = []
    for text in texts:
        names = (text, text.rpartition(":")[0]) if isinstance(text, str) and ".py:" in text else (text,)
        # Unlike Path.exists, os.path.exists is False for a text of any length.
        found += [Path(one) for one in names if isinstance(one, (str, os.PathLike)) and one and os.path.exists(one)]  # noqa: PTH110
    return found


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are the same file or folder, also through links."""
    try:
        return os.path.samefile(one, other)  # noqa: PTH121
    except (OSError, ValueError):
        return one.resolve() == other.resolve()
