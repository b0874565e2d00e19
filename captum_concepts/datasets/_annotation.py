"""Label images beside photographs: reading them, turning and resizing both alike, and saying what is missing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from captum_concepts.datasets.images import load_image, opened_image
from captum_concepts.errors import InputError

Ids = NDArray[np.int32]
Size = tuple[int, int]
_ORIENTATION = 0x0112  # the EXIF tag


@dataclass(frozen=True)
class Layer:
    """One map of label ids: the pixels ``(h, w)`` of a file, or one id that holds for the whole picture.

    ``rescale``: the file may be smaller than the picture (Broden's are half its size); otherwise that is an error.
    """

    ids: Ids | int
    source: str
    rescale: bool = False


@dataclass(frozen=True)
class Annotation:
    """What a reader knows of one picture: a file or pixels ``(H, W, 3)`` uint8, and its layers of ids."""

    image: Path | NDArray[np.uint8]
    layers: list[Layer]
    name: str
    label: int | None = None  # class of the whole picture, for a classifier
    label_id: int | None = None  # the same class as a pixel id


def read_ids(path: str | os.PathLike[str], encoding: str = "index") -> Ids:
    """A label image as ids ``(h, w)``.

    Args:
        path: the file.
        encoding: ``"index"``: the value of the only channel (a palette's index, not its colour); ``"rg"``: R + 256 G;
            ``"rgb"``: R + 256 G + 65536 B.

    Raises:
        InputError: the file is missing, broken, or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no label image at {path}")
    with opened_image(path, "a label image") as file:
        mode, pixels = file.mode, np.array(file)
    if encoding == "index":
        if pixels.ndim != 2:
            raise InputError(f"{path} must hold one channel of label ids, got the mode {mode}")
        return pixels.astype(np.int32)
    if pixels.ndim != 3 or pixels.shape[2] < 3:
        raise InputError(f"{path} must be an RGB image whose channels encode label ids, got the mode {mode}")
    wide = pixels.astype(np.int32)
    ids = wide[..., 0] + 256 * wide[..., 1]
    return np.asarray(ids + 65536 * wide[..., 2] if encoding == "rgb" else ids, dtype=np.int32)


def load_pair(annotation: Annotation, size: Size | None, crop: bool) -> tuple[Tensor, list[Ids]]:
    """The picture ``(3, H, W)`` and its layers ``(H, W)``, turned, cropped and resized together.

    Raises:
        InputError: a file is missing or broken, or a layer does not have the size of its picture.
    """
    if isinstance(annotation.image, Path):
        if not annotation.image.is_file():
            raise InputError(f"no image at {annotation.image}, which is named by the index")
        image = load_image(annotation.image, size, resize="crop" if crop else "squash")
        stored, orientation = _header(annotation.image)
    else:
        image, stored, orientation = _image_of(annotation.image, size, crop), annotation.image.shape[1::-1], 1
    out = [_fit(layer, annotation, stored, orientation, size, crop, image.shape[-2:]) for layer in annotation.layers]
    return image, out


def _header(path: Path) -> tuple[Size, int]:
    """Width and height as stored, and the EXIF orientation; load_image has read the file already."""
    with opened_image(path) as file:
        return file.size, int(file.getexif().get(_ORIENTATION, 1))


def _image_of(pixels: NDArray[np.uint8], size: Size | None, crop: bool) -> Tensor:
    from PIL import Image

    image = Image.fromarray(pixels)
    if size is not None:
        image = _resize(image, size, crop, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255


def _resize(image: Any, size: Size, crop: bool, resample: Any) -> Any:
    from PIL import ImageOps  # the same calls as load_image, so that picture and labels stay aligned

    height, width = size
    return ImageOps.fit(image, (width, height), resample) if crop else image.resize((width, height), resample)


def _fit(
    layer: Layer, annotation: Annotation, stored: Size, orientation: int, size: Size | None, crop: bool, shape: Any
) -> Ids:
    from PIL import Image

    if isinstance(layer.ids, int):
        return np.full(tuple(shape), layer.ids, dtype=np.int32)
    nearest = Image.Resampling.NEAREST
    labels = Image.fromarray(layer.ids)
    upright = stored[::-1] if orientation >= 5 else stored
    if labels.size != stored and labels.size == upright:
        orientation = 1  # drawn on the turned picture
    elif labels.size != stored:
        if not layer.rescale:
            raise InputError(
                f"{layer.source} has {labels.width} x {labels.height} pixels, but its image {annotation.name} has "
                f"{stored[0]} x {stored[1]}: they do not belong together, or one was resized without the other"
            )
        labels = labels.resize(stored, nearest)
    turn = Image.Transpose
    turns = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
             6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90}  # fmt: skip
    if orientation in turns:
        labels = labels.transpose(turns[orientation])
    if size is not None:
        labels = _resize(labels, size, crop, nearest)
    return np.array(labels, dtype=np.int32)
