"""One image with its concept masks, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_concepts.errors import InputError

_KEYS = ("inputs", "masks", "concepts", "ignore", "target")


class _EvaluationItem(Mapping[str, Any]):
    """A mapping with the keys that :func:`captum_concepts.metrics.evaluate` reads.

    The key ``"target"`` exists only for classes, as indices of concepts would be read as the model's outputs.
    """

    target: Any

    @property
    def labels_are_classes(self) -> bool:
        """Whether ``target`` contains classes of images, not concepts of masks."""
        raise NotImplementedError

    def _keys(self) -> tuple[str, ...]:
        return _KEYS if self.labels_are_classes else _KEYS[:-1]

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys():
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys())

    def __len__(self) -> int:
        return len(self._keys())

    def __repr__(self) -> str:
        shapes = (f"{k}={tuple(v.shape) if isinstance(v, Tensor) else v!r}" for k, v in vars(self).items())
        return f"{type(self).__name__}({', '.join(shapes)})"


@dataclass(frozen=True, eq=False, repr=False)
class SegmentedImage(_EvaluationItem):
    """One image and its concept masks; also a mapping that ``metrics.evaluate`` accepts.

    Attributes:
        image: ``(3, H, W)`` float32 RGB in [0, 1], not normalized; the mapping's ``"inputs"``.
        masks: bool. ``(k, H, W)`` for ``regions="present"``, ``(T, H, W)`` for ``"all"``, ``(H, W)`` for ``"label"``.
        concepts: the name of each mask.
        ignore: ``(H, W)`` bool, pixels with void or unknown label, which every metric should leave out.
        target: ``"present"``: ``(k,)`` indices of the masks' concepts in the data set's ``concepts``; ``"label"``: the
            image's class; ``"all"``: None.
        label: the image's class if the data set has one, else None.
        name: the file, or its name in the archive.
    """

    image: Tensor
    masks: Tensor
    concepts: tuple[str, ...]
    ignore: Tensor
    target: Tensor | int | None
    label: int | None
    name: str

    @property
    def labels_are_classes(self) -> bool:
        """Whether ``target`` is the image's class (``regions="label"``)."""
        return isinstance(self.target, int)

    @property
    def inputs(self) -> Tensor:
        """The image under the name that ``evaluate`` uses."""
        return self.image


@dataclass(frozen=True, eq=False, repr=False)
class SegmentedBatch(_EvaluationItem):
    """A batch of :class:`SegmentedImage`; also a mapping that ``metrics.evaluate`` accepts.

    For ``regions="present"``, images have different numbers R_i of masks. All R = sum R_i masks are concatenated,
    ``image_index`` contains their images, and ``inputs`` repeats each image for each of its masks.

    Attributes:
        images: ``(N, 3, H, W)``.
        masks: ``(R, H, W)`` for "present", else the stacked masks of the items.
        concepts: the concept of each of the R masks; for "all" the T concepts once, for "label" one per image.
        ignore: ``(R, H, W)`` for "present", else ``(N, H, W)``.
        target: ``(R,)`` concept indices, ``(N,)`` classes, or None.
        image_index: ``(R,)`` for "present", else None.
        labels: ``(N,)`` classes, or None if an image has none.
        names: the N files.
    """

    images: Tensor
    masks: Tensor
    concepts: tuple[str, ...]
    ignore: Tensor
    target: Tensor | None
    image_index: Tensor | None
    labels: Tensor | None
    names: tuple[str, ...]

    @property
    def labels_are_classes(self) -> bool:
        """Whether ``target`` contains classes (``regions="label"``)."""
        return self.target is not None and self.image_index is None

    @property
    def inputs(self) -> Tensor:
        """``(R, 3, H, W)`` image of each mask, or ``(N, 3, H, W)``."""
        return self.images if self.image_index is None else self.images[self.image_index]


def collate_segmented(items: Sequence[SegmentedImage]) -> SegmentedBatch:
    """One batch of several items, the ``collate_fn`` of a ``DataLoader`` for any number of concepts per image.

    A batch without any concept has R = 0 masks; ``data.pairs()`` never yields one.

    Raises:
        InputError: images of different sizes (pass ``size=`` to the data set), or no items.
    """
    sizes = sorted({tuple(item.image.shape[-2:]) for item in items})
    if len(sizes) != 1:
        raise InputError(
            f"a batch needs images of one size, got {sizes or 'no images'}; construct the data set with size="
        )
    first = items[0]
    labels = [item.label for item in items]
    ignore = torch.stack([item.ignore for item in items])
    masks = [item.masks for item in items]
    target: Tensor | None = None
    index: Tensor | None = None
    if isinstance(first.target, Tensor):  # regions="present"
        index = torch.repeat_interleave(torch.tensor([len(m) for m in masks]))
        target, ignore = torch.cat([torch.as_tensor(item.target) for item in items]), ignore[index]
    elif first.target is not None:
        target = torch.as_tensor([item.target for item in items])
    several = index is not None or first.masks.ndim == 2
    return SegmentedBatch(
        images=torch.stack([item.image for item in items]),
        masks=torch.cat(masks) if index is not None else torch.stack(masks),
        concepts=tuple(name for item in items for name in item.concepts) if several else first.concepts,
        ignore=ignore,
        target=target,
        image_index=index,
        labels=None if None in labels else torch.tensor(labels),
        names=tuple(item.name for item in items),
    )
