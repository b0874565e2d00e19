"""Guidance images from whatever holds them: Captum concepts, tensors, data sets, loaders, folders; streamed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from captum.concept import Concept
from torch import Tensor, nn
from torch.utils.data import DataLoader

from captum_concepts.datasets.images import opened_image
from captum_concepts.errors import InputError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_IMAGE_KEYS = ("image", "images", "pixel_values", "img")
Transform = Callable[[Any], Tensor]


@dataclass(frozen=True)
class GuidanceSet:
    """A name and the images that go by it.

    Args:
        name: how the concept (or the set of negatives) is called.
        source: a tensor, a list, a data set, a loader, or the path of a folder.
    """

    name: str
    source: Any

    def batches(
        self, batch_size: int, *, transform: Transform | None = None, image_size: int = 224, channels: int | None = None
    ) -> Iterator[Tensor]:
        """Batches ``(b, C, H, W)``, b at most ``batch_size``; images of other sizes start a new batch.

        Args:
            batch_size: the most images in memory at once.
            transform: turns a PIL image into a tensor; None gives RGB in [0, 1], the shorter side resized to
                ``image_size`` and the middle square cut out.
            image_size: of the default transform, in pixels.
            channels: what the model takes; with 3, grayscale is repeated and an alpha channel dropped.

        Raises:
            InputError: no image, or something that is not an image.
        """
        transform = transform or (lambda image: default_transform(image, image_size, channels))
        pending: list[Tensor] = []
        for part in _parts(self.name, self.source, transform):
            images = _check(self.name, part, channels)
            if not len(images):
                continue
            for chunk in images.split(batch_size):
                if pending and (chunk.shape[1:] != pending[0].shape[1:] or sum(map(len, pending)) >= batch_size):
                    yield torch.cat(pending)
                    pending = []
                room = batch_size - sum(map(len, pending))
                pending.append(chunk[:room])
                if len(chunk) > room:
                    yield torch.cat(pending)
                    pending = [chunk[room:]]
        if pending:
            yield torch.cat(pending)


def guidance_sets(given: Any, what: str) -> list[GuidanceSet]:
    """``given`` as named sets.

    Args:
        given: a list of ``captum.concept.Concept``, or ``{name: images}``; for negatives also one set alone.
        what: ``"concepts"`` or ``"negatives"``, for messages.

    Raises:
        InputError: nothing there, a name twice, or a type that holds no images.
    """
    if isinstance(given, Mapping):
        sets = [GuidanceSet(str(name), source) for name, source in given.items()]
    elif isinstance(given, (list, tuple)) and given and all(isinstance(item, Concept) for item in given):
        sets = [GuidanceSet(item.name, item) for item in given]
    elif isinstance(given, (list, tuple)) and not given:
        sets = []
    elif isinstance(given, Concept):
        sets = [GuidanceSet(given.name, given)]
    elif what == "negatives":
        sets = [GuidanceSet("negatives", given)]
    else:
        raise InputError(
            f"{what} must be a dict of name -> images (tensor, dataset or folder) or a list of captum.concept.Concept, "
            f"got {_describe(given)}"
        )
    if not sets:
        raise InputError(f"{what} are empty; give at least one set of guidance images")
    names = [s.name for s in sets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"each of the {what} needs its own name; named more than once: {twice}")
    if not all(names):
        raise InputError(f"{what} must have non-empty names, got {names}")
    return [GuidanceSet(s.name, _resolve(s, what)) for s in sets]


def _resolve(one: GuidanceSet, what: str) -> Any:
    """The source of a set, checked as far as possible without reading it."""
    source = one.source
    if isinstance(source, Concept):
        if source.data_iter is None:
            raise InputError(f"the captum Concept {one.name!r} has no data_iter; give it a DataLoader of images")
        return source.data_iter
    if isinstance(source, (str, os.PathLike)):
        folder = Path(source)
        if not folder.is_dir():
            raise InputError(f"{one.name!r}: there is no folder {folder}")
        files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())
        if not files:
            raise InputError(f"{one.name!r}: the folder {folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        return files
    if isinstance(source, Iterator):
        raise InputError(f"{one.name!r} is an iterator, which can be read only once; give a list or a DataLoader")
    if not isinstance(source, Tensor) and not hasattr(source, "__iter__") and not hasattr(source, "__getitem__"):
        raise InputError(
            f"{one.name!r} of the {what} holds {_describe(source)}; give images (n, 3, H, W), a dataset or a folder"
        )
    return source


def _parts(name: str, source: Any, transform: Transform) -> Iterator[Tensor]:
    """Images or batches of them, one after another."""
    if isinstance(source, Tensor):
        yield source
        return
    batched = isinstance(source, DataLoader)
    for item in _items(source):
        image = item
        if isinstance(image, Mapping):
            image = next((image[key] for key in _IMAGE_KEYS if key in image), item)
        elif isinstance(image, (tuple, list)) and image:
            image = image[0]  # (image, label), as torchvision's data sets give
        if isinstance(image, (str, os.PathLike)):
            image = read_image(Path(image))
        if not isinstance(image, Tensor) and hasattr(image, "convert") and hasattr(image, "size"):
            image = transform(image)
        if not isinstance(image, Tensor):
            raise InputError(f"{name!r} gives {_describe(image)} as an image; give tensors, PIL images or image files")
        yield image if batched or image.ndim == 4 else image.unsqueeze(0)


def _items(source: Any) -> Iterable[Any]:
    """Iterate a data set that may only have ``__getitem__`` and ``__len__``."""
    if hasattr(source, "__len__") and hasattr(source, "__getitem__") and not isinstance(source, DataLoader):
        return (source[i] for i in range(len(source)))
    return source


def _check(name: str, images: Tensor, channels: int | None) -> Tensor:
    if images.ndim == 3:
        images = images.unsqueeze(0)
    if images.ndim != 4:
        raise InputError(f"{name!r} gives images of shape {tuple(images.shape)}; give (n, 3, H, W)")
    if not images.is_floating_point():
        raise InputError(
            f"{name!r} gives pixels of {images.dtype}; convert them to floating point the way the model was trained, "
            "for example images.float() / 255"
        )
    if channels == 3 and images.shape[1] in (1, 2):  # gray, or gray and alpha
        return images[:, :1].expand(-1, 3, -1, -1)
    if channels == 3 and images.shape[1] == 4:
        return images[:, :3]
    return images


def read_image(path: Path) -> Any:
    """A PIL image, upright and of 8 bits a channel.

    Raises:
        InputError: not an image, or one that claims too many pixels.
    """
    from PIL import ImageOps

    with opened_image(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I;16") or image.mode == "I":
            return image.convert("I").point(lambda value: value / 257).convert("L")  # 16 bits; convert() clips
        return image.convert("RGBA") if "transparency" in image.info else image.copy()


def default_transform(image: Any, size: int, channels: int | None = 3) -> Tensor:
    """``(3, size, size)`` in [0, 1] (1 channel for a model that takes one): shorter side to ``size``, middle square."""
    import numpy as np
    from PIL import Image

    image = image.convert("L" if channels == 1 else "RGB")
    width, height = image.size
    factor = size / min(width, height)
    wide, high = max(size, round(width * factor)), max(size, round(height * factor))
    image = image.resize((wide, high), Image.Resampling.BILINEAR)
    left, top = (wide - size) // 2, (high - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(pixels))


def input_channels(model: nn.Module | None) -> int | None:
    """How many channels the model's images have: those its first image convolution takes; None if unknown."""
    for module in model.modules() if model is not None else ():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return None


def digest(image: Tensor) -> str:
    """Tells one image from another, whatever set it is in."""
    pixels = image.detach().float().cpu().contiguous()
    code = hashlib.blake2b(str(tuple(pixels.shape)).encode(), digest_size=16)
    code.update(pixels.numpy().tobytes())
    return code.hexdigest()


def _describe(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
