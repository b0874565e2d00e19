"""Image files and folders, and the reader of one image as a tensor."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from captum_concepts._undo import warnings_filtered
from captum_concepts.errors import CaptumConceptsError, InputError, InputWarning, printable, shortened
from captum_concepts.images.pixels import Reading, orientation, placement, turned

#: File suffixes of images when a folder is searched; a file that is passed itself may have any suffix.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
#: The formats that are read, in Pillow's terms, recognized by content instead of file name. Others are rejected before
#: any of their code runs, because some start programs (EPS starts Ghostscript) or belong to plug-ins.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
#: Larger images are rejected before decoding, because a few kilobytes can claim gigabytes of pixels.
MOST_PIXELS = 100_000_000
#: Large images with more pixels per byte of the file are rejected too, because only empty images compress as far.
MOST_PIXELS_PER_BYTE, SMALL_PIXELS = 50_000, 10_000_000
#: `explain` writes this file into its output folder, which is not searched for images.
EXPLAINED = "explanations.json"

_PREVIEW = 254  # the tag NewSubfileType of TIFF


def find_images(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The image files among ``paths``; folders are searched recursively, patterns (``"a/**/*.png"``) are expanded.

    Files of a folder or pattern are sorted by path. Hidden files and folders (``._a.jpg``, ``.ipynb_checkpoints``),
    ``__MACOSX``, and files with other suffixes than :data:`IMAGE_SUFFIXES` are skipped.

    Raises:
        InputError: a path does not exist, or there is no image.

    Warns:
        InputWarning: a folder inside was skipped, because it cannot be opened or contains the figures of `explain`.

    >>> find_images("no/such/folder")
    Traceback (most recent call last):
    captum_concepts.errors.InputError: there is no file or folder at no/such/folder
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    files: list[Path] = []
    for one in given:
        path = Path(one)
        if not str(one):
            raise InputError("the path of the images is empty; pass '.' for the current folder")
        try:
            is_folder, is_file = path.is_dir(), path.is_file()
        except OSError as error:  # a name that is too long, for example
            raise InputError(f"{printable(shortened(str(one)))} is not a path: {error.strerror}") from error
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
            raise InputError(f"{printable(one)} is a web address; download the image and pass its path")
        else:
            raise InputError(f"there is no file or folder at {printable(path)}")
    if not files:
        shown = ", ".join(map(printable, given[:5])) or "an empty list"
        raise InputError(f"there is no image in {shown}; image files end in {', '.join(IMAGE_SUFFIXES)}")
    return files


def class_folders(root: str | os.PathLike[str]) -> dict[str, list[Path]]:
    """Images by class, in sorted order, of a folder that contains one folder per class.

    Raises:
        InputError: there are no class folders, or one contains no image.
    """
    root = Path(root)
    if not os.path.isdir(root):  # noqa: PTH112 - unlike Path.is_dir, False for a name that is too long
        raise InputError(f"there is no folder at {printable(root)}")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not _is_junk(path.name))
    if not folders:
        raise InputError(
            f"{root} contains no folders; put the images of each class into a folder named after the class"
        )
    return {folder.name: find_images(folder) for folder in folders}


def names_of(files: Iterable[Path], root: Path | None = None) -> list[str]:
    """Unique names of the files, relative to ``root``, or the file name with as many folders as needed.

    Control characters and bytes that are not UTF-8 are escaped.

    >>> names_of([Path("x/cat/1.jpg"), Path("x/dog/1.jpg")])
    ['cat/1.jpg', 'dog/1.jpg']
    """
    files = list(files)
    if root is not None:
        return [printable(file.relative_to(root).as_posix()) for file in files]
    distinct = len({file.parts for file in files})
    longest = max((len(file.parts) for file in files), default=1)
    for depth in range(1, longest + 1):
        short = ["/".join(file.parts[-depth:]) for file in files]
        if len(set(short)) == distinct:
            return list(map(printable, short))
    return [printable(file.as_posix()) for file in files]


def _walk(root: Path) -> list[Path]:
    """The images under ``root``; links to folders are followed, cyclic ones only once."""
    files: list[Path] = []
    seen: set[str] = set()
    passed: list[str] = []
    for folder, inner, names in os.walk(root, followlinks=True, onerror=lambda error: passed.append(str(error))):
        real = os.path.realpath(folder)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        if EXPLAINED in names and Path(folder) != root:
            passed.append(f"{folder} holds pictures that 'explain' drew")
            inner.clear()
            continue
        inner[:] = sorted(name for name in inner if not _is_junk(name))
        files += [path for name in names if _is_image(path := Path(folder) / name)]
    if passed:
        shown = "; ".join(map(printable, passed[:5])) + (f" and {len(passed) - 5} more" if len(passed) > 5 else "")
        warnings.warn(f"folders in {printable(root)} are skipped: {shown}", InputWarning, stacklevel=3)
    return sorted(files)


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not _is_junk(path.name) and path.is_file()


@contextmanager
def opened_image(file: Any, kind: str = "an image", name: str | None = None) -> Iterator[Any]:
    """The open PIL image of a path, a binary file or a PIL image, to be decoded inside the ``with``.

    Raises:
        InputError: the file is not an image of :data:`IMAGE_FORMATS`, is broken, or claims more than
            :data:`MOST_PIXELS` pixels or too many for its length (checked before decoding).

    Warns:
        InputWarning: the file has several frames or pages; the first is read.
    """
    from PIL import Image

    name = printable(file if isinstance(file, (str, os.PathLike)) else "the image") if name is None else name
    try:
        with (
            # MOST_PIXELS replaces Pillow's limit, and its other warnings are about metadata.
            warnings_filtered("ignore", Image.DecompressionBombWarning),
            warnings_filtered("ignore", UserWarning, module=r"PIL\."),
        ):
            if isinstance(file, Image.Image):
                _check_format(file, name)
                yield _within_limit(file, name)
            else:
                with _open(file, kind, name) as image:
                    _check_first_page(image, kind, name)
                    yield _within_limit(image, name)
    except (CaptumConceptsError, Warning, NameError, ImportError):  # the last two are errors in code, not in a file
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} claims more than {MOST_PIXELS:,} pixels") from error
    except Exception as error:  # decoders raise many types for broken files, from struct.error to RuntimeError
        reason = f"{type(error).__name__} {error}"[:200]
        raise InputError(f"{name} cannot be read as {kind}: {reason}") from error


def _open(file: Any, kind: str, name: str) -> Any:
    """The undecoded PIL image of a file of one of :data:`IMAGE_FORMATS`."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(file, (str, os.PathLike)) and os.path.exists(file) and not os.path.isfile(file):  # noqa: PTH110, PTH113
        raise InputError(f"{name} cannot be read as {kind}: it is not a regular file")
    Image.init()
    try:
        return Image.open(file, formats=[known for known in IMAGE_FORMATS if known in Image.OPEN])
    except UnidentifiedImageError as error:
        raise InputError(
            f"{name} cannot be read as {kind}: its content is {_content(file)}; files of the formats "
            f"{', '.join(IMAGE_FORMATS)} are read, whatever their names end in"
        ) from error


def _check_first_page(image: Any, kind: str, name: str) -> None:
    """Raise if the first page of a file is a preview, and warn of several pages."""
    if image.format == "TIFF" and int(image.tag_v2.get(_PREVIEW, 0)) & 1:
        raise InputError(
            f"{name} cannot be read as {kind}: its first page is a preview, as in raw files of cameras; develop it and "
            "save the result as TIFF, PNG or JPEG"
        )
    # The other frames of an MPO are the depth or the gains of one photograph.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        warnings.warn(f"{name} has several frames or pages; the first is read", InputWarning, stacklevel=3)


def _content(file: Any) -> str:
    """A description of a file's content by its first bytes, without running the code that reads such files."""
    from PIL import Image

    if hasattr(file, "seek"):
        file.seek(0)
        start = file.read(16)
    else:
        with Path(file).open("rb") as opened:
            start = opened.read(16)
    # Pillow's own test before it opens a file; it returns a string if support for the format is missing.
    found = [known for known, (_, fits) in Image.OPEN.items() if fits is not None and len(start) == 16 and fits(start)]
    damaged = [known for known in found if known in IMAGE_FORMATS]
    if damaged:
        return f"damaged {damaged[0]}"
    return found[0] if found else "empty" if not start else "of no known format"


def _check_format(image: Any, name: str) -> None:
    """Raise if an undecoded PIL image, opened elsewhere, has a format that is not read."""
    if getattr(image, "fp", None) is not None and image.format not in (*IMAGE_FORMATS, "MPO"):
        raise InputError(
            f"{name} is an open {image.format} file that is not decoded yet, and only {', '.join(IMAGE_FORMATS)} are "
            "read; if you trust it, pass image.copy()"
        )


def _within_limit(image: Any, name: str) -> Any:
    pixels = image.width * image.height
    if pixels > MOST_PIXELS:
        raise InputError(f"{name} claims {image.width} x {image.height} pixels, more than {MOST_PIXELS:,}")
    # In an undecoded TIFF (a decoded one has no parts), Pillow leaves areas without strips or tiles black.
    if (
        image.format == "TIFF"
        and image.tile
        and any(max(part[1][i] for part in image.tile) < image.tag_v2[254 + i] for i in (2, 3))
    ):
        raise OSError("its strips or tiles end before its last row or column")
    file = getattr(image, "fp", None)
    if pixels > SMALL_PIXELS and file is not None:
        here = file.tell()
        length = file.seek(0, os.SEEK_END)
        file.seek(here)
        if pixels > length * MOST_PIXELS_PER_BYTE:
            raise InputError(f"{name} claims {image.width} x {image.height} pixels in a file of {length:,} bytes")
    return image


def read_image(file: Any, reading: Reading, name: str | None = None) -> Tensor:
    """A path, binary file or PIL image as a tensor ``(C, H, W)``; see :class:`~captum_concepts.images.Reading`.

    Raises:
        InputError: see :func:`load_image`.
    """
    with opened_image(file, name=name) as image:
        upright = reading.upright(image)
        try:
            made = reading.tensor_of(upright) if reading.transform is None else reading.eight_bits(upright)
        except InputError as error:
            raise InputError(f"{printable(file) if name is None else name}: {error}") from error
    # Outside the with block, because an error of the user's transform does not mean a broken file.
    return reading.normalized(made) if reading.transform is None else reading.transformed(made)


def load_image(path: str | os.PathLike[str], size: int | tuple[int, int] | None = None, **options: Any) -> Tensor:
    """An image file as float32 in [0, 1], ``(3, H, W)``.

    Args:
        path: the file, of one of :data:`~captum_concepts.images.IMAGE_FORMATS` (recognized by its content). The first
            of several frames or pages is read, with a warning.
        size: ``(H, W)``, or one side for a square; None keeps the file's own size.
        options: further fields of :class:`~captum_concepts.images.Reading`, such as ``resize="squash"``,
            ``mode="L"``, ``bands=(0, 1, 2)`` or ``value_range=(0, 4095)``.

    Raises:
        InputError: the file is not an image, broken or larger than :data:`MOST_PIXELS`, or ``value_range`` is required.

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


class Photograph(NamedTuple):
    """A whole photograph for display, and the part of it that a model saw.

    Args:
        picture: ``(C, h, w)`` in [0, 1], upright, and padded like the model's input if that is padded.
        seen: ``(x0, y0, x1, y1)`` of the part that the model saw, in pixels of the upright photograph.
        crop: the same in pixels of ``picture``, for ``panel(crop=)``; None if the model saw all of it.
    """

    picture: Tensor
    seen: tuple[float, float, float, float]
    crop: tuple[float, float, float, float] | None


def load_photograph(path: str | os.PathLike[str], reading: Reading, longest: int = 512) -> Photograph:
    """The whole photograph, and the part of it that a model saw through ``reading``.

    Args:
        path: the file.
        reading: how the model's input was read, ``open_images(...).reading``.
        longest: maximum length of its longer side in pixels; smaller photographs keep their size.

    Raises:
        InputError: see :func:`load_image`; or ``reading`` has a transform, whose crop is unknown.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> path = Path(tempfile.mkdtemp()) / "wide.jpg"
        >>> Image.new("RGB", (1200, 800)).save(path)
        >>> photograph = load_photograph(path, Reading(224), longest=600)
        >>> photograph.picture.shape, photograph.seen, photograph.crop
        (torch.Size([3, 400, 600]), (200.0, 0.0, 1000.0, 800.0), (100.0, 0.0, 500.0, 400.0))
    """
    if reading.transform is not None:
        raise InputError("the part of the photograph that a transform shows is unknown; pass size= and resize= instead")
    with opened_image(path) as image:
        width, height = image.size
        scale = min(longest / max(width, height), 1.0)
        drafted = image.draft(None, (round(width * scale), round(height * scale)))  # JPEG: decodes fewer pixels
        turn = orientation(image)
        if drafted is None:
            width, height = image.size  # Pillow has turned TIFF files
        if turn >= 5:
            width, height = height, width
        size = (max(round(height * scale), 1), max(round(width * scale), 1))
        image.info.setdefault("stored_as", image.format)
        shown = replace(reading, size=size, resize="squash", crop=1.0, normalize=None)
        place = placement(height, width, reading.size or size, resize=reading.resize, crop=reading.crop)
        if reading.size is not None and reading.resize == "pad":
            # Large enough for the photograph at this scale, with the aspect ratio of the input.
            factor = max(size[0] / place.height, size[1] / place.width)
            padded = tuple(max(round(side * factor), 1) for side in reading.size)
            shown = replace(reading, size=padded, normalize=None)
        picture = shown.tensor_of(turned(image, turn))
    whole = (0.0, 0.0, float(width), float(height))
    seen = whole if reading.size is None else (place.left, place.top, place.right, place.bottom)
    if all(abs(a - b) < 0.5 for a, b in zip(seen, whole, strict=True)):
        return Photograph(picture, whole, None)
    dx, dy = size[1] / width, size[0] / height
    return Photograph(picture, seen, (seen[0] * dx, seen[1] * dy, seen[2] * dx, seen[3] * dy))


def image_bytes(item: Mapping[str, Any]) -> Any:
    """The file of an undecoded image, ``{"bytes": ..., "path": ...}`` as Hugging Face data sets store it."""
    import io

    return io.BytesIO(item["bytes"]) if item.get("bytes") is not None else item["path"]
