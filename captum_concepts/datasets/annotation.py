"""Photographs and label images, read, rotated and resized together and checked against each other."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from captum_concepts._artifacts import is_there
from captum_concepts.errors import InputError, InputWarning
from captum_concepts.images import Reading, opened_image
from captum_concepts.images.pixels import orientation, turned

Ids = NDArray[np.int32]
#: The id of padding pixels, which are ignored.
OUTSIDE = -1


@dataclass(frozen=True)
class Layer:
    """One map of label ids, either the pixels ``(h, w)`` of a file or one id for the whole image.

    With ``rescale``, the file may have another size than the image (Broden's are half as large), which is otherwise an
    error.
    """

    ids: Ids | int
    source: str
    rescale: bool = False


@dataclass(frozen=True)
class Annotation:
    """A file or pixels ``(H, W, 3)`` uint8 of one image, and its layers of ids."""

    image: Path | NDArray[np.uint8]
    layers: list[Layer]
    name: str
    label: int | None = None  # class of the whole image, for a classifier
    label_id: int | None = None  # the same class as a pixel id


def read_ids(path: str | os.PathLike[str], encoding: str = "index") -> Ids:
    """Ids ``(h, w)`` of a label image.

    Args:
        path: the file.
        encoding: ``"index"``: the value of the only channel (a palette's index, not its color); ``"rg"``: R + 256 G;
            ``"rgb"``: R + 256 G + 65536 B.

    Raises:
        InputError: the file is missing, broken, or of another format.
    """
    path = Path(path)
    if not is_there(path):
        raise InputError(f"no label image at {path}")
    with opened_image(path, "a label image") as file:
        if file.format == "JPEG":
            raise InputError(
                f"{path} is a JPEG, which changes pixel values; label ids need PNG or another lossless format"
            )
        mode, pixels = file.mode, np.array(file)
    if encoding == "index":
        if pixels.ndim != 2:
            raise InputError(f"{path} must have one channel of label ids, got the mode {mode}")
        return pixels.astype(np.int32)
    if pixels.ndim != 3 or pixels.shape[2] < 3:
        raise InputError(f"{path} must be an RGB image whose channels encode label ids, got the mode {mode}")
    wide = pixels.astype(np.int32)
    ids = wide[..., 0] + 256 * wide[..., 1]
    return np.asarray(ids + 65536 * wide[..., 2] if encoding == "rgb" else ids, dtype=np.int32)


def load_pair(annotation: Annotation, reading: Reading) -> tuple[Tensor, list[Ids]]:
    """The image ``(3, H, W)`` and its layers ``(H, W)``, rotated, cropped and resized together.

    Raises:
        InputError: a file is missing or broken, or a layer does not have the size of its image.
    """
    from PIL import Image

    path = annotation.image
    if isinstance(path, Path) and not is_there(path):
        raise InputError(f"no image at {path}, which is named by the index")
    with opened_image(path if isinstance(path, Path) else Image.fromarray(path), name=annotation.name) as file:
        turn, stored = orientation(file), file.size
        image = reading.tensor_of(reading.upright(file))
    return image, [_fit(layer, annotation, stored, turn, reading, image) for layer in annotation.layers]


def check_turn(size: Any, stored: Any, turn: int, mask: str, photo: str) -> None:
    """Warn if the size of a mask leaves open whether it was drawn on the pixels as stored or as displayed."""
    if turn != 1 and size == stored and (turn < 5 or stored[0] == stored[1]):
        warnings.warn(
            f"{photo} is displayed rotated (EXIF orientation {turn}), and {mask} is assumed to match the pixels as "
            "stored; if it was drawn on the image as displayed, save the photograph without that orientation",
            InputWarning,
            stacklevel=2,
        )


def _fit(layer: Layer, annotation: Annotation, stored: Any, turn: int, reading: Reading, image: Tensor) -> Ids:
    """Ids of a layer in the geometry of its image."""
    from PIL import Image

    if isinstance(layer.ids, int):
        return np.full(tuple(image.shape[-2:]), layer.ids, dtype=np.int32)
    labels = Image.fromarray(layer.ids)
    upright = stored[::-1] if turn >= 5 else stored
    check_turn(labels.size, stored, turn, layer.source, annotation.name)
    if labels.size != stored and labels.size == upright:
        turn = 1  # drawn on the rotated image
    elif labels.size != stored:
        if not layer.rescale:
            raise InputError(
                f"{layer.source} has {labels.width} x {labels.height} pixels, but its image {annotation.name} has "
                f"{stored[0]} x {stored[1]}: they do not belong together, or one was resized without the other"
            )
        labels = labels.resize(stored, Image.Resampling.NEAREST)
    labels = turned(labels, turn)
    return np.array(reading.fit(labels, "nearest", fill=OUTSIDE), dtype=np.int32)
