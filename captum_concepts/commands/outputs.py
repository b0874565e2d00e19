"""What a command writes, checked before it works: never a file that it reads, and a place that can be written."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from captum_concepts.errors import InputError, printable

#: Options that name folders of images, and those that name files or folders of any kind, to be read.
_IMAGES = ("images", "references", "train", "val", "concepts", "negatives")
_READ = ("data", "explanations", "explainer", "against", "model", "encoder", "weights", "encoder_weights", "classes",
         "words", "config")  # fmt: skip


def check_outputs(
    read: Mapping[str, Any], outputs: Mapping[str, str | os.PathLike[str] | None], *, make_folders: bool = True
) -> None:
    """Refuse outputs that are inputs, or cannot be written; make their folders.

    Args:
        read: the options of the command; those that name what is read are known by name.
        outputs: the files it will write, by the option that names them, such as "--save"; None: it is not given.
        make_folders: False: somebody else makes them.

    Raises:
        InputError: a file is read by the same command, is a folder or device, or its folder cannot be written.
    """
    empty = [name for name, path in outputs.items() if path is not None and not os.fspath(path)]
    if empty:
        raise InputError(f"{empty[0]} is empty; give the name of a file")
    given = [(name, Path(path)) for name, path in outputs.items() if path is not None]
    for name, path in given:
        what = f"{name} {printable(path)}"
        if os.path.isdir(path):  # noqa: PTH112
            raise InputError(f"{what} is a folder; give the name of a file")
        if os.path.exists(path) and not os.path.isfile(path):  # noqa: PTH110, PTH113
            raise InputError(f"{what} cannot be written: it is not a regular file")
        if (used := next(_conflicts(path, read), None)) is not None:
            raise InputError(f"{what} would replace a file that {used} reads; give another name")
        if any(other != name and _same(path, one) for other, one in given):
            raise InputError(f"{what} is named twice; give each output its own name")
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
    """Refuse a name that says that the file is something else: a folder of images would have one that is none.

    Raises:
        InputError: it does not end in ``.safetensors``.
    """
    if output is not None and Path(output).suffix.lower() != ".safetensors":
        raise InputError(f"{option} {printable(output)!r} must end in .safetensors")


def html(option: str, output: str) -> Path:
    """The file of a page.

    Raises:
        InputError: its name is that of another kind of file.
    """
    if Path(output).is_dir():
        raise InputError(f"{output} is a folder; give the name of an HTML file")
    if Path(output).suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{option} {printable(output)} is an HTML page; its name must end in .html")
    return Path(output)


def check_folder(output: str | os.PathLike[str], read: Mapping[str, Any], files: list[Path]) -> Path:
    """A folder for many files, which can be written or made; it is not made yet.

    Args:
        output: the folder.
        read: the options of the command.
        files: the images that it reads.

    Raises:
        InputError: the folder is searched for images, contains one of them, or cannot be written.
    """
    if not os.fspath(output):
        raise InputError("--output is empty; give the name of a folder")
    out = Path(output)
    shown = printable(out)
    searched = [path for name in _IMAGES for path in _paths(name, read) if path.is_dir()]
    if any(_same(out, folder) for folder in searched) or any(_same(out, file.parent) for file in files):
        raise InputError(
            f"--output {shown} contains images that are read, and pictures would be written among them; give another "
            f"folder, such as {printable(out / 'explained')}"
        )
    try:
        if os.path.lexists(out) and not out.is_dir():
            raise FileExistsError(errno.EEXIST, "it is not a folder")
        _try_to_write(next(one for one in (out.absolute(), *out.absolute().parents) if one.exists()))
    except OSError as error:
        raise InputError(f"--output {shown} cannot be written: {error.strerror or error}") from error
    return out


def _try_to_write(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:  # has no name, so nothing is left of it
        file.write(b"trial")
        file.flush()


def _conflicts(path: Path, read: Mapping[str, Any]) -> Iterator[str]:
    """The options by which an existing file is read."""
    if not os.path.lexists(path):
        return
    for name in (*_IMAGES, *_READ):
        for given in _paths(name, read):
            option = "the command" if name in ("images", "data") else f"--{name.replace('_', '-')}"
            if _same(path, given):
                yield option
            elif given.is_dir() and (real := path.resolve()).is_relative_to(given.resolve()):
                # A page or table that an earlier run left there may be replaced; what a folder is read for may not.
                own = (".html", ".htm", ".md", *(() if name in _READ else (".safetensors", ".csv", ".json")))
                if real.suffix.lower() not in own:
                    yield option


def _paths(name: str, read: Mapping[str, Any]) -> list[Path]:
    """The existing paths that an option names, one or several images; of ``FILE.py:FUNCTION`` the file."""
    value = read.get(name)
    texts = [os.fspath(one) for one in value] if name == "images" and value else [value]
    found = []
    for text in texts:
        names = (text, text.rpartition(":")[0]) if isinstance(text, str) and ".py:" in text else (text,)
        # os.path.exists is False for any text, however long; Path.exists is not.
        found += [Path(one) for one in names if isinstance(one, (str, os.PathLike)) and one and os.path.exists(one)]  # noqa: PTH110
    return found


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are one file or folder, by whatever link."""
    try:
        return os.path.samefile(one, other)  # noqa: PTH121
    except (OSError, ValueError):
        return one.resolve() == other.resolve()
