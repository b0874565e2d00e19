"""The images behind a store of region embeddings: read in order, checked, and recognised again by their pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from captum_concepts.errors import ArtifactError, InputError

Images = Tensor | Dataset[Any] | DataLoader[Any] | Sequence[Any]


class Pictures:
    """``data`` as numbered RGB images of one size.

    Items may be images ``(3, H, W)``, or tuples, lists or dicts that begin with one (or hold it under "image",
    "images" or "pixel_values"); float in [0, 1], or uint8, which is divided by 255. A ``DataLoader`` is read through
    its data set, in order, because the rows of a store must keep theirs.
    """

    def __init__(self, data: Images, num_workers: int = 0) -> None:
        if isinstance(data, DataLoader):
            data = data.dataset
        if isinstance(data, (str, bytes)) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise InputError(
                f"data must be images (N, 3, H, W) or a data set with a length and items by number, got "
                f"{type(data).__name__}; for image files use torchvision.datasets.ImageFolder with a transform"
            )
        if isinstance(data, Tensor) and (data.ndim != 4 or data.shape[1] != 3):
            raise InputError(f"images must be RGB (N, 3, H, W), got {tuple(data.shape)}")
        self.data: Any = data
        self.num_workers = num_workers
        if not len(self):
            raise InputError("data holds no image")
        self.shape = tuple(image_of(self.data[0], 0).shape)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        return self._checked(self.data[index], index)

    def read(self, indices: Sequence[int]) -> Iterator[Tensor]:
        """The images at ``indices``, in that order, fetched ahead by ``num_workers`` processes."""
        if not self.num_workers:
            for index in indices:
                yield self[index]
            return
        loader: Any = DataLoader(
            self.data,
            batch_size=None,
            sampler=indices,
            num_workers=self.num_workers,
            generator=torch.Generator(),  # or the loader would draw from the global one
        )
        for index, item in zip(indices, loader, strict=True):
            yield self._checked(item, index)

    def _checked(self, item: Any, index: int) -> Tensor:
        image = image_of(item, index)
        if tuple(image.shape) != self.shape:
            raise InputError(
                f"images must have one size: image 0 is {self.shape}, image {index} is {tuple(image.shape)}; "
                "resize or crop them in the data set"
            )
        return image


def image_of(item: Any, index: int) -> Tensor:
    """The image of a data set's item as float ``(3, H, W)``."""
    if isinstance(item, dict):
        item = next((item[key] for key in ("image", "images", "pixel_values") if key in item), None)
    if isinstance(item, (tuple, list)) and len(item):
        item = item[0]
    if not isinstance(item, Tensor) or item.ndim != 3 or item.shape[0] != 3:
        found = tuple(item.shape) if isinstance(item, Tensor) else type(item).__name__
        raise InputError(f"item {index} of the data begins with {found}, not with an RGB image tensor (3, H, W)")
    if item.dtype == torch.uint8:
        return item.float() / 255
    if not item.is_floating_point():
        raise InputError(f"image {index} has dtype {item.dtype}; give RGB in [0, 1] or uint8")
    return item.detach()


def digest(image: Tensor) -> int:
    """64 bits of the pixels, as a signed integer."""
    pixels = image.detach().float().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return int.from_bytes(hashlib.blake2b(pixels.data, digest_size=8).digest(), "little", signed=True)


def check_pictures(pictures: Pictures, stored: Sequence[int], images: Sequence[int], what: str) -> None:
    """Refuse data whose images are not those that were embedded.

    Args:
        pictures: the data.
        stored: digests of rows on disk.
        images: the image of ``pictures`` that each of them was computed from.
        what: how the message calls the store.

    Raises:
        ArtifactError: names the first image that differs.
    """
    for index, expected, image in zip(images, stored, pictures.read(images), strict=True):
        if digest(image) != expected:
            raise ArtifactError(
                f"{what} was made from other data: image {index} of the data has other pixels than the one that was "
                "embedded (another data set, order or resizing, or a data set that returns random crops)"
            )
