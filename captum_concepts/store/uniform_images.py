"""`UniformImages`: indexed RGB images of one size, and digests of their pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from captum_concepts import images
from captum_concepts.errors import ArtifactError, InputError


class UniformImages:
    """``data`` as indexed RGB float images ``(3, H, W)`` of one size.

    Args:
        data: whatever :func:`captum_concepts.images.open_images` accepts, except a stream, which cannot be indexed.
        num_workers: processes that load images.

    Attributes:
        source: the :class:`~captum_concepts.images.ImageSource`.
        shape: ``(3, H, W)``.

    Raises:
        InputError: no images, a stream, or images that are not RGB.
    """

    def __init__(self, data: Any, num_workers: int = 0) -> None:
        self.source = data if isinstance(data, images.ImageSource) else images.open_images(data, labels=False)
        self.num_workers = num_workers or self.source.num_workers
        if self.source.streamed:
            raise InputError(
                "the data is a stream, which cannot be indexed; pass a tensor, a list, a folder or a data set with a "
                "length"
            )
        if not len(self.source):
            raise InputError("data contains no image")
        self.shape = tuple(self._checked(self.source[0], 0, None).shape)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        return self._checked(self.source[index], index, self.shape)

    def read(self, indices: Sequence[int]) -> Iterator[Tensor]:
        """The images at ``indices``, in that order, loaded by ``num_workers`` processes."""
        if not self.num_workers:
            for index in indices:
                yield self[index]
            return
        chosen = self.source.select(indices)
        for batch in images.batches(chosen, 1, num_workers=self.num_workers):
            index = indices[batch.indices[0]]
            yield self._checked(batch.images[0], index, self.shape)

    def _checked(self, image: Tensor, index: int, shape: tuple[int, ...] | None) -> Tensor:
        found = tuple(image.shape)
        if shape is None and (len(found) != 3 or found[0] != 3):
            raise InputError(f"image {index} is {found}; images must be RGB (3, H, W)")
        if shape is not None and found != shape:
            raise InputError(
                f"images must have one size: image 0 is {shape}, image {index} is {found}; resize them, for example "
                "with images.open_images(data, size=224)"
            )
        return image.detach()


def digest(image: Tensor) -> int:
    """A 64-bit hash of the pixels, as a signed integer."""
    return int.from_bytes(images.digest(image, 8), "little", signed=True)


def check_digests(source: UniformImages, stored: Sequence[int], indices: Sequence[int], what: str) -> None:
    """Refuse data whose images differ from those that were embedded.

    Args:
        source: the data.
        stored: digests of rows on disk.
        indices: for each digest, the index of its image in ``source``.
        what: name of the store in the message.

    Raises:
        ArtifactError: names the first image that differs.
    """
    for index, expected, image in zip(indices, stored, source.read(indices), strict=True):
        if digest(image) != expected:
            raise ArtifactError(
                f"{what} was computed from other data: image {index} has different pixels from the one that was "
                "embedded (another data set, order or resizing, or a data set that returns random crops)"
            )
