"""Image files and folders as tensors, with every unreadable file named."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_concepts.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
#: Larger files are refused before they are decoded: a few kilobytes can claim gigabytes of pixels.
MOST_PIXELS = 100_000_000


def find_images(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The image files among ``paths``; folders are searched through, in sorted order.

    Raises:
        InputError: a path does not exist, or there is no image at all.

    >>> find_images("no/such/folder")
    Traceback (most recent call last):
    captum_concepts.errors.InputError: no file or folder at no/such/folder
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    found: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"no file or folder at {path}")
    if not found:
        raise InputError(f"no image ({', '.join(IMAGE_SUFFIXES)}) in {[str(p) for p in given]}")
    return found


@contextmanager
def opened_image(path: str | os.PathLike[str], kind: str = "an image") -> Iterator[Any]:
    """The open PIL file, for decoding inside the ``with``: one that claims too much is refused before that.

    Raises:
        InputError: the file is no image, is broken, or claims more than :data:`MOST_PIXELS` pixels.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is the stated one
            with Image.open(path) as file:
                if file.width * file.height > MOST_PIXELS:
                    raise InputError(f"{path} claims {file.width} x {file.height} pixels, more than {MOST_PIXELS:,}")
                yield file
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} claims more than {MOST_PIXELS:,} pixels") from error
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, IndexError, KeyError, OverflowError) as error:
        raise InputError(f"{path} cannot be read as {kind}: {error}") from error


def load_image(path: str | os.PathLike[str], size: int | tuple[int, int] | None = None, *, crop: bool = True) -> Tensor:
    """An image file as RGB in [0, 1], ``(3, H, W)``.

    Grey images get three equal channels, transparency lies on white, EXIF rotation is applied.

    Args:
        path: the file.
        size: ``(H, W)``, or one side for a square; None keeps the file's size.
        crop: resize the shorter side and cut the centre (as classifiers are trained); False distorts instead.

    Raises:
        InputError: the file is no image, is broken, or claims more than :data:`MOST_PIXELS` pixels.
    """
    from PIL import Image, ImageOps

    with opened_image(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            ground = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(ground, image)
        image = image.convert("RGB")
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        if crop:
            image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        else:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).contiguous().float() / 255


def class_folders(root: str | os.PathLike[str]) -> dict[str, list[Path]]:
    """Images by class of a folder that holds one folder a class, in sorted order.

    Raises:
        InputError: there are no class folders, or one holds no image.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"no folder at {root}")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise InputError(f"{root} holds no folders; put the images of each class into a folder named like the class")
    return {folder.name: find_images(folder) for folder in folders}
