"""Image files and folders: which files are images, and one image as a tensor."""

from __future__ import annotations

import glob
import os
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from captum_concepts.errors import InputError, shortened
from captum_concepts.images.pixels import Reading

#: Files with these endings are images when a folder is searched; a file that is named itself may have any ending.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
#: Larger files are refused before they are decoded, because a few kilobytes can claim gigabytes of pixels.
MOST_PIXELS = 100_000_000

#: What Pillow's decoders raise on a file that is broken, besides its own errors.
_BROKEN = (
    OSError, ValueError, SyntaxError, EOFError, TypeError, IndexError, KeyError, OverflowError, AttributeError,
    ZeroDivisionError, MemoryError, struct.error, NotImplementedError, AssertionError,
)  # fmt: skip


def find_images(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The image files among ``paths``: folders are searched recursively, patterns (``"a/**/*.png"``) are expanded.

    What systems leave behind is passed over in folders: hidden files and folders (``._a.jpg``,
    ``.ipynb_checkpoints``), ``__MACOSX``, files with other endings than :data:`IMAGE_SUFFIXES`. Sorted by path.

    Raises:
        InputError: a path does not exist, or there is no image at all.

    >>> find_images("no/such/folder")
    Traceback (most recent call last):
    captum_concepts.errors.InputError: no file or folder at no/such/folder
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    files: list[Path] = []
    for one in given:
        path = Path(one)
        if not str(one):
            raise InputError("the path of the images is empty; pass '.' for the folder you are in")
        try:
            is_folder, is_file = path.is_dir(), path.is_file()
        except OSError as error:  # a name that is too long, for example
            raise InputError(f"{shortened(str(one))} is no path: {error.strerror}") from error
        if is_folder:
            files += _walk(path)
        elif is_file:
            files.append(path)
        elif any(c in str(one) for c in "*?["):
            for match in sorted(map(Path, glob.glob(str(one), recursive=True))):  # noqa: PTH207
                if match.is_dir() and "**" not in str(one):
                    files += _walk(match)
                elif _is_image(match) and "__MACOSX" not in match.parts:
                    files.append(match)
        elif "://" in str(one):
            raise InputError(f"{one} is a web address; download the image and pass its path")
        else:
            raise InputError(f"no file or folder at {path}")
    if not files:
        shown = ", ".join(map(str, given[:5])) or "an empty list"
        raise InputError(f"no image in {shown}; image files end in {', '.join(IMAGE_SUFFIXES)}")
    return files


def class_folders(root: str | os.PathLike[str]) -> dict[str, list[Path]]:
    """Images by class, for a folder that contains one folder per class; classes in sorted order.

    Raises:
        InputError: there are no class folders, or one contains no image.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"no folder at {root}")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not _is_junk(path.name))
    if not folders:
        raise InputError(f"{root} contains no folders; put the images of each class into a folder named like the class")
    return {folder.name: find_images(folder) for folder in folders}


def names_of(files: Iterable[Path], root: Path | None = None) -> list[str]:
    """Names that tell the files apart: relative to ``root``, or the file name with as many folders as needed.

    >>> names_of([Path("x/cat/1.jpg"), Path("x/dog/1.jpg")])
    ['cat/1.jpg', 'dog/1.jpg']
    """
    files = list(files)
    if root is not None:
        return [file.relative_to(root).as_posix() for file in files]
    distinct = len({file.parts for file in files})
    longest = max((len(file.parts) for file in files), default=1)
    for depth in range(1, longest + 1):
        short = ["/".join(file.parts[-depth:]) for file in files]
        if len(set(short)) == distinct:
            return short
    return [file.as_posix() for file in files]


def _walk(root: Path) -> list[Path]:
    """The images under ``root``; links to folders are followed, in circles only once."""
    files: list[Path] = []
    seen: set[str] = set()
    for folder, inner, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        inner[:] = sorted(name for name in inner if not _is_junk(name))
        files += [path for name in names if _is_image(path := Path(folder) / name)]
    return sorted(files)


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not _is_junk(path.name) and path.is_file()


@contextmanager
def opened_image(file: Any, kind: str = "an image", name: str | None = None) -> Iterator[Any]:
    """The open PIL image of a path, a binary file or a PIL image; decode it inside the ``with``.

    Raises:
        InputError: not an image, broken, or more than :data:`MOST_PIXELS` pixels (refused before decoding).
    """
    from PIL import Image

    name = str(file if isinstance(file, (str, os.PathLike)) else "the image") if name is None else name
    try:
        with warnings.catch_warnings():
            # The limit here is the stated one, and the rest of Pillow's remarks concern metadata.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
            if isinstance(file, Image.Image):
                yield _within_limit(file, name)
            else:
                with Image.open(file) as image:
                    yield _within_limit(image, name)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} claims more than {MOST_PIXELS:,} pixels") from error
    except _BROKEN as error:
        reason = f"{type(error).__name__} {error}"[:200]
        raise InputError(f"{name} cannot be read as {kind}: {reason}") from error


def _within_limit(image: Any, name: str) -> Any:
    if image.width * image.height > MOST_PIXELS:
        raise InputError(f"{name} claims {image.width} x {image.height} pixels, more than {MOST_PIXELS:,}")
    return image


def read_image(file: Any, reading: Reading, name: str | None = None) -> Tensor:
    """A path, binary file or PIL image as a tensor ``(C, H, W)``; see :class:`~captum_concepts.images.Reading`.

    Raises:
        InputError: see :func:`load_image`.
    """
    with opened_image(file, name=name) as image:
        upright = reading.upright(image)
        try:
            if reading.transform is None:
                return reading.normalized(reading.tensor_of(upright))
            upright = reading.eight_bits(upright)
        except InputError as error:
            raise InputError(f"{name or file}: {error}") from error
    # Outside the with block, because an error of the user's own transform is not a broken file.
    return reading.transformed(upright)


def load_image(path: str | os.PathLike[str], size: int | tuple[int, int] | None = None, **options: Any) -> Tensor:
    """An image file as float32 in [0, 1], ``(3, H, W)``.

    Args:
        path: the file. Of an animation, the first frame is read.
        size: ``(H, W)``, or one side for a square; None keeps the file's own size.
        options: further fields of :class:`~captum_concepts.images.Reading`, such as ``resize="squash"``,
            ``mode="L"``, ``bands=(0, 1, 2)`` or ``value_range=(0, 4095)``.

    Raises:
        InputError: not an image, broken, more than :data:`MOST_PIXELS` pixels, or a value range that must be given.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from PIL import Image
        >>> path = Path(tempfile.mkdtemp()) / "ramp.png"
        >>> ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
        >>> Image.fromarray(ramp).save(path)  # 16 bits per pixel, as X-rays have
        >>> image = load_image(path)
        >>> image.shape, round(float(image.mean()), 3)
        (torch.Size([3, 16, 16]), 0.5)
    """
    return read_image(path, Reading(size=size, **options))


def image_bytes(item: Mapping[str, Any]) -> Any:
    """The file of an undecoded image, ``{"bytes": ..., "path": ...}`` as Hugging Face data sets store it."""
    import io

    return io.BytesIO(item["bytes"]) if item.get("bytes") is not None else item["path"]
