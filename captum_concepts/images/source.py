"""Images from any source, as a sequence of tensors with names and labels, and as batches."""

from __future__ import annotations

import os
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from captum_concepts._checks import integer
from captum_concepts.errors import CaptumConceptsError, InputError, InputWarning, printable
from captum_concepts.images.files import find_images, image_bytes, names_of, read_image
from captum_concepts.images.labels import LABEL_KEYS, checked_labels, known_classes, known_labels, label_of
from captum_concepts.images.pixels import Reading
from captum_concepts.images.preprocessing import Preprocessing, input_channels, preprocessing_of

#: Each worker is a process with its own pipes; more of them end in "too many open files".
MOST_WORKERS = 256
IMAGE_KEYS = ("image", "images", "pixel_values", "img", "inputs", "jpg", "jpeg", "png", "webp")


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of float ``images`` ``(B, C, H, W)`` with ``labels`` (None without), ``names`` and ``indices``."""

    images: Tensor
    labels: list[int] | list[str] | None
    names: list[str]
    indices: list[int]

    def __len__(self) -> int:
        return len(self.images)


class _NoLength(InputError, TypeError):
    """The error of ``len`` of a stream, a TypeError because Python's length hints expect one."""


class _Item(NamedTuple):
    image: Any
    label: Any


class ImageSource(Dataset[Tensor]):
    """A lazily read sequence of images in a fixed order, created by :func:`open_images`.

    It contains ``len(source)`` images, and ``source[i]`` is a float tensor ``(C, H, W)``. Iterating reads one after
    another, and :func:`batches` reads several at a time. A stream (an ``IterableDataset`` or a generator) has no length
    and no indices, but can be iterated.

    Attributes:
        reading: the options by which images are read.
        class_names: class names of integer labels, or None.
        streamed: True for a stream.
    """

    def __init__(
        self,
        data: Any,
        reading: Reading,
        *,
        index: Sequence[Any] | None = None,
        names: Sequence[str] | None = None,
        labels: Any = None,
        class_names: list[str] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        skip_broken: bool = False,
        num_workers: int = 0,
    ) -> None:
        self.reading, self.class_names, self.skip_broken = reading, class_names, skip_broken
        self.streamed = index is None
        self.num_workers = num_workers
        self._data, self._collate = data, collate
        self._index = index  # keys of the data set
        self._names = names
        self._given = None if labels is False else labels  # of the items in the order of index
        self._with_labels = labels is not False
        self._seen: dict[int, Any] = {}  # labels found in items
        self._broken: dict[int, str] = {}  # position among all items -> reason
        self._kept: list[int] | None = None  # positions of the readable ones, once all were read

    # ------------------------------------------------------------------------------------------------------ sequence

    def __len__(self) -> int:
        if self._index is None:
            raise _NoLength(
                "these images come from a stream, which has no length; iterate over it, or pass an indexable data "
                "set, such as a list"
            )
        return len(self._positions())

    def __getitem__(self, index: int) -> Tensor:
        positions = range(len(self)) if self._kept is None else self._kept
        try:
            position = positions[index]
        except IndexError:
            raise IndexError(f"image {index} of {len(positions)}") from None
        return self._read(position)[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (image for _, image, _ in self._rows(self.num_workers))

    def __repr__(self) -> str:
        count = "a stream of images" if self._index is None else f"{len(self._index) - len(self._broken)} images"
        classes = "" if self.class_names is None else f", {len(self.class_names)} classes"
        size = "own sizes" if self.reading.size is None else "{} x {}".format(*self.reading.size)
        return f"ImageSource({count}{classes}, {'transformed' if self.reading.transform else size})"

    @property
    def labels(self) -> list[int] | list[str] | None:
        """One label per image, or None if there are none.

        Labels come from ``labels=``, from class folders, or from the items. All items are read once for their labels,
        unless the data set is known to yield the labels that it lists.
        """
        if not self._with_labels or (self._index is None and self._given is None):
            return None
        if self._given is None:
            known = None if self._index is None or self._collate is not None else known_labels(self._data)
            if known is not None and self._index is not None:
                known = [known[key] for key in self._index]
            elif len(self._seen) + len(self._broken) < len(self._index or ()):
                for _ in self._rows(self.num_workers):  # _read notes the labels
                    pass
            given = known if known is not None else [self._seen.get(i) for i in range(len(self._index or ()))]
            values = [value for i, value in enumerate(given) if i not in self._broken]
            if any(value is None for value in values):
                self._with_labels = False
                return None
            checked_labels(values)
            self._given = list(given)
        return checked_labels([self._given[i] for i in self._positions()]) if self._index is not None else self._given

    @property
    def names(self) -> list[str]:
        """One name per image, the end of its path that makes it unique, else "image 0" and so on."""
        if self._index is None:
            raise InputError(
                "these images come from a stream, so their names are known only per batch; iterate over it"
            )
        return [self._name(i) for i in self._positions()]

    @property
    def files(self) -> list[Path] | None:
        """The file of each image, or None if they do not come from files."""
        if self._index is None or not isinstance(self._data, _Files):
            return None
        return [self._data[self._index[i]] for i in self._positions()]

    @property
    def preprocessing(self) -> Preprocessing | None:
        """The preprocessing that normalized the images, or None."""
        return self.reading.normalize if isinstance(self.reading.normalize, Preprocessing) else None

    @property
    def skipped(self) -> list[dict[str, str]]:
        """The images that ``skip_broken`` left out so far, as ``{"image": path or name, "reason": ...}``."""
        files = self._data if isinstance(self._data, _Files) and self._index is not None else None
        return [
            {"image": self._name(i) if files is None or self._index is None else printable(files[self._index[i]]),
             "reason": self._broken[i]}
            for i in sorted(self._broken)
        ]  # fmt: skip

    def select(self, positions: Iterable[int]) -> ImageSource:
        """The images at these positions, in this order, with their labels and names."""
        chosen = [self._positions()[i] for i in positions] if self._index is not None else []
        if self._index is None:
            raise _NoLength("a stream cannot be indexed; pass an indexable data set")
        labels = self.labels if self._given is not None else None
        return ImageSource(
            self._data,
            self.reading,
            index=[self._index[i] for i in chosen],
            names=[self._name(i) for i in chosen],
            labels=False if not self._with_labels else labels and [self._given[i] for i in chosen],  # type: ignore[index]
            class_names=self.class_names,
            collate=self._collate,
            skip_broken=self.skip_broken,
            num_workers=self.num_workers,
        )

    def _labelled(self, labels: Any) -> ImageSource:
        """The same images with other labels, or without labels (False)."""
        made = copy(self)
        made._with_labels, made._seen = labels is not False, {}
        if labels is False:
            made._given = None
        elif self._index is None:
            made._given = checked_labels(labels)
        else:  # one per readable image
            made._index = [self._index[i] for i in self._positions()]
            made._names = self.names
            made._given, made._broken, made._kept = checked_labels(labels, len(made._index)), {}, None
        return made

    # ------------------------------------------------------------------------------------------------------- reading

    def _name(self, position: int) -> str:
        return self._names[position] if self._names is not None else f"image {position}"

    def _positions(self) -> Sequence[int]:
        """Positions of the readable images."""
        assert self._index is not None
        if not self.skip_broken:
            return range(len(self._index))
        if self._kept is None:
            for _ in self._rows(self.num_workers):
                pass
        assert self._kept is not None
        return self._kept

    def _read(self, position: int) -> tuple[Tensor, Any]:
        """The image at a position among all items, and the label of its item."""
        assert self._index is not None
        item = self._data[self._index[position]]
        if self._collate is not None:
            item = self._collate([item])
        name = self._name(position)
        image, label = split_item(item, name)
        many = isinstance(image, (list, tuple)) and len(image) == 1  # from a collate_fn that keeps lists
        tensor = to_tensor(image[0] if many else image, self.reading, name)
        if many or tensor.ndim == 4:
            if tensor.ndim == 4 and len(tensor) != 1:
                raise InputError(f"{name} is a batch {tuple(tensor.shape)}; each item must be one image (C, H, W)")
            tensor = tensor[0] if tensor.ndim == 4 else tensor
            label = label[0] if label is not None and not isinstance(label, str) and _count(label) == 1 else label
        if self._with_labels and self._given is None:
            self._seen[position] = label
        return tensor, label

    def _rows(self, num_workers: int) -> Iterator[tuple[int, Tensor, Any]]:
        """``(position, image, label)`` of every readable image, in order."""
        if self._index is None:
            yield from self._stream()
            return
        todo = range(len(self._index)) if self._kept is None else self._kept
        read: Iterable[Any] = map(_Reader(self), todo)
        if num_workers and len(todo) > 1:
            read = DataLoader(
                _Reader(self), batch_size=None, sampler=todo, num_workers=num_workers, generator=torch.Generator()
            )
        for position, (image, label) in zip(todo, read, strict=True):
            if image is None:
                self._broken[position] = label
                continue
            if self._with_labels and self._given is None:
                self._seen[position] = label
            yield position, image, label
        if self.skip_broken and self._kept is None:
            self._kept = [i for i in todo if i not in self._broken]
            if not self._kept and todo:
                raise InputError(f"none of the {len(todo)} images can be read; the first: {self._broken[0]}"[:600])

    def _stream(self) -> Iterator[tuple[int, Tensor, Any]]:
        position = 0
        for item in self._data:
            image, label = split_item(item, f"item {position} of the stream")
            many = isinstance(image, (list, tuple))
            parts = image if many else [image]
            for number, part in enumerate(parts):
                try:
                    tensor = to_tensor(part, self.reading, f"image {position}")
                except CaptumConceptsError as error:
                    if not self.skip_broken or isinstance(part, Tensor):
                        raise
                    self._broken[position] = str(error)
                    position += 1
                    continue
                rows = [tensor] if tensor.ndim == 3 else list(tensor)
                own = label[number : number + 1] if many and label is not None else label
                for row, one in zip(rows, _labels_of(own, len(rows), tensor.ndim == 4 or many), strict=True):
                    yield position, row, one
                    position += 1
        if not position:
            raise InputError("there is no image in the stream")

    def _label(self, position: int, found: Any) -> Any:
        if not self._with_labels:
            return None
        if self._given is None:
            return found
        if self._index is None and position >= len(self._given):
            raise InputError(f"the stream has more images than the {len(self._given)} labels; pass one per image")
        return self._given[position]


class _Files(list[Path]):
    """Paths of image files."""


class _Reader(Dataset[Any]):
    """A reader of single images by position, for worker processes too; a broken one becomes ``(None, reason)``."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __call__(self, position: int) -> tuple[Any, Any]:
        try:
            return self.source._read(position)
        except CaptumConceptsError as error:
            if not self.source.skip_broken:
                raise
            return None, str(error)

    __getitem__ = __call__


def open_images(
    source: Any,
    *,
    size: Any = None,
    mode: str = "RGB",
    transform: Callable[[Any], Any] | None = None,
    labels: Any = None,
    skip_broken: bool = False,
    resize: str | None = None,
    bands: Sequence[int] | None = None,
    preprocessing: Preprocessing | None = None,
    **options: Any,
) -> ImageSource:
    """Images from any source, as one sequence of float tensors ``(C, H, W)`` in [0, 1].

    Args:
        source: a tensor or array ``(N, C, H, W)``; a list of tensors, PIL images, arrays or paths; one path, a folder
            or a pattern such as ``"photos/*.jpg"``; a ``Dataset``, ``IterableDataset`` or ``DataLoader``, also of
            Hugging Face; one PIL image; ``(images, labels)``; a dict that contains a batch. Items may be images, tuples
            of an image and its label, or dicts with ``image``, ``images``, ``pixel_values``, ``img`` or ``inputs`` and
            optionally ``label``. An ``ImageSource`` is returned unchanged, or with other labels.
        size, mode, transform, resize, bands: see :class:`~captum_concepts.images.Reading`; tensors in another range
            than [0, 1] (normalized ones) are unchanged.
        labels: one per image, in the order of ``source``; None uses those of class folders or items; False ignores
            them.
        skip_broken: leave out images that cannot be read, and list them in ``.skipped``; otherwise the first raises.
        preprocessing: a model's :class:`~captum_concepts.images.Preprocessing`, whose size, interpolation, resize and
            crop are used. Images are not normalized; call it with a batch for that.
        options: further fields of ``Reading``: ``interpolation``, ``crop``, ``background``, ``value_range``,
            ``normalize``.

    A ``DataLoader`` is read through its data set and ``collate_fn``, one item at a time and in the data set's order,
    so shuffling, ``drop_last`` and workers have no effect, but a custom sampler determines the images and their order.
    Random augmentation in the data set stays random.

    Raises:
        InputError: there are no images, or labels do not match the images or the order in which a loader draws them.

    Example:
        >>> import torch
        >>> source = open_images([torch.zeros(3, 20, 30), torch.ones(3, 40, 20)], size=8, labels=["dark", "light"])
        >>> len(source), source[1].shape, source.labels
        (2, torch.Size([3, 8, 8]), ['dark', 'light'])
        >>> for batch in batches(source, 32):
        ...     print(batch.images.shape, batch.names)
        torch.Size([2, 3, 8, 8]) ['image 0', 'image 1']
    """
    if preprocessing is not None and transform is None:
        options = {**preprocessing.geometry, **options}
    given = {"size": size, "resize": resize, "bands": bands, "transform": transform}
    reading = Reading(mode=mode, **{**options, **{name: value for name, value in given.items() if value is not None}})
    if isinstance(source, ImageSource):
        if skip_broken > source.skip_broken or reading not in (Reading(), source.reading):
            raise InputError("these images are already open; pass their source with the new options")
        return source if labels is None else source._labelled(labels)
    if isinstance(source, tuple) and len(source) == 2 and _is_stack(source[0], paths=True) and not _is_stack(source[1]):
        if labels is not None and labels is not False:
            raise InputError("labels were passed twice: in the source (images, labels) and as labels=; pass them once")
        source, labels = source[0], source[1] if labels is None else labels
    if isinstance(source, Mapping) and not hasattr(source, "column_names"):
        source, found = split_item(source, "the source")
        labels = found if labels is None else labels
    made = _opened(source, reading, labels, skip_broken)
    if made._index is not None and not len(made._index):
        raise InputError(f"there is no image in {_described(source)}")
    if made.streamed:
        if labels is not None and labels is not False:
            made._given = checked_labels(labels)
    elif labels is not None and labels is not False:
        assert made._index is not None
        made._given = checked_labels(labels, len(made._index))
    return made


def inputs_for(
    model: Any,
    source: Any,
    *,
    size: Any = None,
    transform: Callable[[Any], Any] | None = None,
    **options: Any,
) -> ImageSource:
    """Images from any source, preprocessed for ``model``.

    Files, PIL images, arrays and integer tensors are read at the model's input size and normalized if the model's
    library specifies how (:func:`preprocessing_of`), else read in [0, 1] at ``size``. Float tensors are assumed to be
    preprocessed and stay unchanged. ``.preprocessing`` of the result reports what was done.

    Args:
        model: a module, a :class:`Preprocessing`, or anything that ``preprocessing_of`` accepts.
        source: see :func:`open_images`. An ``ImageSource`` is returned unchanged.
        size: ``(H, W)``, or one side, instead of the model's; 224 if both are unknown.
        transform: preprocesses files, PIL images and integer tensors instead.
        options: further options of :func:`open_images`, such as ``labels`` or ``skip_broken``.

    Raises:
        InputError: see :func:`open_images`.

    Warns:
        InputWarning: images are read, but neither the model nor ``size`` or ``transform`` specifies how.

    Example:
        >>> import torch
        >>> from PIL import Image
        >>> from torchvision.models import resnet18
        >>> source = inputs_for(resnet18(), [Image.new("RGB", (640, 480))])
        >>> source[0].shape, round(float(source[0].max()), 2)
        (torch.Size([3, 224, 224]), -1.8)
        >>> print(source.preprocessing)  # doctest: +ELLIPSIS
        224 x 224, bilinear, crop 0.875, mean (0.485, ...) from torchvision ResNet18_Weights.IMAGENET1K_V1
    """
    if isinstance(source, ImageSource):
        return open_images(source, **options)
    known = preprocessing_of(model)
    if known is None and size is None and transform is None and _is_read(source):
        warnings.warn(
            f"the preprocessing of {type(model).__name__} is unknown, so images are read at 224 x 224 pixels in [0, "
            "1]; to change this, pass images.inputs_for(model, images, size=...) or "
            "images.inputs_for(images.Preprocessing(...), images) instead",
            InputWarning,
            stacklevel=2,
        )
    known = known or Preprocessing(None)
    mode = {1: "L", 3: "RGB", None: "RGB"}.get(input_channels(model), "any")
    if transform is not None:
        return open_images(source, mode=mode, transform=transform, normalize=Preprocessing(None), **options)
    size = size or known.size or 224
    return open_images(source, mode=mode, size=size, preprocessing=known, normalize=known, **options)


def _is_read(source: Any) -> bool:
    """Whether images have to be read, from paths, PIL images, integer pixels, or a list of these."""
    if isinstance(source, (list, tuple)):
        return any(_is_read(one) for one in source[:1])
    if isinstance(source, Tensor):
        return not source.is_floating_point()
    return isinstance(source, (str, os.PathLike, np.ndarray)) or _is_pil(source)


def _opened(source: Any, reading: Reading, labels: Any, skip_broken: bool) -> ImageSource:
    own: dict[str, Any] = {"labels": False if labels is False else None, "skip_broken": skip_broken}
    if isinstance(source, (str, os.PathLike)):
        return _open_path(source, reading, own)
    if isinstance(source, DataLoader):
        return _open_loader(source, reading, labels, own)
    if isinstance(source, np.ndarray) and source.dtype.kind in "OUS":  # of paths or images, as in tables
        source = source.tolist()
    if isinstance(source, (Tensor, np.ndarray)):
        if source.ndim == 3:
            raise InputError(f"an image of shape {tuple(source.shape)} has no batch dimension; pass image[None]")
        if source.ndim != 4:
            raise InputError(f"images must be (N, C, H, W), got shape {tuple(source.shape)}")
        if isinstance(source, Tensor):
            reading.check_pixels(source)
        if isinstance(source, Tensor) and reading.transform is None:
            reading.from_tensor(source[:1])  # raises early for wrong channels and dtypes
        return ImageSource(source, reading, index=range(len(source)), **own)
    if _is_pil(source) or callable(getattr(source, "read", None)):
        return ImageSource([source], reading, index=range(1), **own)
    if isinstance(source, (list, tuple)):
        if all(isinstance(one, (str, os.PathLike)) for one in source):
            files = find_images(source)
            return ImageSource(_Files(files), reading, index=range(len(files)), names=names_of(files), **own)
        if any(isinstance(one, Tensor) and one.ndim == 4 for one in source):
            source = [row for one in source for row in (one if isinstance(one, Tensor) and one.ndim == 4 else [one])]
        return ImageSource(source, reading, index=range(len(source)), **own)
    classes = known_classes(source)
    if isinstance(source, IterableDataset) or not _has_numbers(source):
        if not hasattr(source, "__iter__"):
            raise InputError(
                f"images must be a tensor (N, C, H, W), a list, a path, a Dataset or a DataLoader, got "
                f"{_described(source)}"
            )
        return ImageSource(
            _Once(source) if isinstance(source, Iterator) else source, reading, class_names=classes, **own
        )
    return ImageSource(source, reading, index=range(len(source)), class_names=classes, **own)


def _open_path(source: str | os.PathLike[str], reading: Reading, own: dict[str, Any]) -> ImageSource:
    root, files = Path(source), find_images(source)
    names = names_of(files, root if root.is_dir() else None)
    classes = None
    if root.is_dir() and own["labels"] is not False and all("/" in name for name in names):
        classes = sorted({name.split("/")[0] for name in names})
        own["labels"] = [classes.index(name.split("/")[0]) for name in names]
    return ImageSource(_Files(files), reading, index=range(len(files)), names=names, class_names=classes, **own)


def _open_loader(loader: DataLoader[Any], reading: Reading, labels: Any, own: dict[str, Any]) -> ImageSource:
    """A loader's images through its data set, or as a stream of batches if that is impossible."""
    data: Any = loader.dataset
    classes = known_classes(data)
    automatic = loader.batch_sampler is not None
    sampler: Any = loader.batch_sampler if _own_batches(loader) else loader.sampler
    if isinstance(data, IterableDataset) or not automatic or not _has_numbers(data) or not hasattr(sampler, "__len__"):
        return ImageSource(loader, reading, class_names=classes, **own)
    whole = isinstance(sampler, RandomSampler) and not sampler.replacement and len(sampler) == len(data)
    if labels is not None and labels is not False and not isinstance(sampler, SequentialSampler):
        raise InputError(
            f"labels= cannot be matched to a DataLoader that draws its images with a {type(sampler).__name__} (as "
            "shuffle=True does); pass the data set itself, or one that yields (image, label)"
        )
    if isinstance(sampler, SequentialSampler) or whole:
        index: Sequence[Any] = range(len(data))
    else:
        with torch.random.fork_rng(devices=[]):
            drawn = list(islice(sampler, len(sampler)))
        index = [key for batch in drawn for key in batch] if sampler is loader.batch_sampler else drawn
    default = loader.collate_fn is torch.utils.data.default_collate
    collate = None if default else loader.collate_fn
    return ImageSource(
        data, reading, index=index, class_names=classes, collate=collate, num_workers=loader.num_workers, **own
    )


def _own_batches(loader: DataLoader[Any]) -> bool:
    batches_by: Any = loader.batch_sampler
    return not (type(batches_by) is BatchSampler and batches_by.sampler is loader.sampler)


class _Once:
    """An iterator that raises when it is read a second time."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self.iterator: Iterator[Any] | None = iterator

    def __iter__(self) -> Iterator[Any]:
        if self.iterator is None:
            raise InputError(
                "the images come from an iterator, which can be read only once; pass a list or a DataLoader"
            )
        iterator, self.iterator = self.iterator, None
        return iterator


def batches(
    source: Any,
    batch_size: int,
    *,
    device: torch.device | str | None = None,
    num_workers: int | None = None,
    **options: Any,
) -> Iterator[Batch]:
    """Batches of at most ``batch_size`` images, in order, independent of batches in the source.

    Args:
        source: an :class:`ImageSource`, or anything that :func:`open_images` accepts with ``options``.
        batch_size: maximum number of images in memory at once; images of another size start a new batch.
        device: device to move the images to.
        num_workers: number of processes that read ahead; None uses those of a ``DataLoader``, else none.

    Raises:
        InputError: see :func:`open_images`; while reading, an image or a label is invalid.
    """
    batch_size = integer("batch_size", batch_size)
    opened = open_images(source, **options)
    workers = opened.num_workers if num_workers is None else integer("num_workers", num_workers, 0, MOST_WORKERS)
    return _batched(opened, batch_size, device, workers)


def of_files(source: ImageSource) -> bool:
    """Whether the images come from files, unlike ``source.files`` without reading them all for ``skip_broken``."""
    return not source.streamed and isinstance(source._data, _Files)


def _batched(source: ImageSource, batch_size: int, device: Any, workers: int) -> Iterator[Batch]:
    data = source._data
    if isinstance(data, Tensor) and source._index == range(len(data)) and source.reading.transform is None:
        for start in range(0, len(data), batch_size):
            part = to_tensor(data[start : start + batch_size], source.reading, f"the images from {start} on")
            yield _batch(source, [(start + i, image, None) for i, image in enumerate(part)], device, part)
        return
    waiting: list[tuple[int, Tensor, Any]] = []
    for row in source._rows(workers):
        if waiting and (len(waiting) == batch_size or waiting[0][1].shape != row[1].shape):
            yield _batch(source, waiting, device)
            waiting = []
        waiting.append(row)
    if waiting:
        yield _batch(source, waiting, device)


def _batch(
    source: ImageSource, rows: list[tuple[int, Tensor, Any]], device: Any, images: Tensor | None = None
) -> Batch:
    indices = [position for position, _, _ in rows]
    names = [source._name(position) for position in indices]
    found = [source._label(position, label) for position, _, label in rows]
    labels = None
    if all(label is not None for label in found):
        labels = [label_of(label, f"the label of {name}") for label, name in zip(found, names, strict=True)]
    if images is None:
        images = torch.stack([image for _, image, _ in rows])
    if source._broken:  # indices among the readable ones
        lost = sorted(source._broken)
        indices = [position - bisect_left(lost, position) for position in indices]
    return Batch(images if device is None else images.to(device), labels, names, indices)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- items


def to_tensor(image: Any, reading: Reading | None = None, name: str | None = None) -> Tensor:
    """One image of any kind as a float tensor ``(C, H, W)``; a tensor ``(N, C, H, W)`` keeps its N.

    Args:
        image: a tensor, array, PIL image, path, open file, or undecoded image of Hugging Face.
        reading: how it is read.
        name: its name in messages; None uses its path.

    Raises:
        InputError: the type is not supported, the file is broken, or the channels do not match.
    """
    reading = reading or Reading()
    if isinstance(image, Mapping):
        image = image_bytes(image)
    if isinstance(image, (str, os.PathLike)):
        return read_image(image, reading, name)
    name = name or "the image"
    if isinstance(image, np.ndarray):
        image = _from_array(image, name)
    if not isinstance(image, Tensor):
        if callable(getattr(image, "read", None)) or _is_pil(image):
            return read_image(image, reading, name)
        raise InputError(f"{name} is {_described(image)}; pass tensors (C, H, W), PIL images, arrays or files")
    if image.ndim not in (3, 4):
        raise InputError(f"{name} has shape {tuple(image.shape)}; an image is (C, H, W)")
    try:
        return reading.from_tensor(image)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def split_item(item: Any, name: str) -> _Item:
    """Image and label (None without) of an item of a data set."""
    if isinstance(item, Mapping):
        if {"bytes", "path"} <= set(item):
            return _Item(item, None)
        key = next((key for key in IMAGE_KEYS if key in item), None)
        if key is None:
            raise InputError(
                f"{name} is a dict with the keys {[str(k) for k in item][:10]}; its image must be under one of "
                f"{', '.join(IMAGE_KEYS[:5])}"
            )
        if "masks" in item:  # in an example with masks, "target" belongs to them
            return _Item(item[key], getattr(item, "label", None))
        label = next((item[key] for key in LABEL_KEYS if key in item), None)
        return _Item(item[key], _label_like(label))
    if isinstance(item, (tuple, list)):
        if not item:
            raise InputError(f"{name} is empty; an item must be an image, or begin with one")
        if len(item) > 1 and all(_is_image_like(part) for part in item):
            return _Item(list(item), None)
        return _Item(item[0], _label_like(item[1]) if len(item) > 1 else None)
    if not isinstance(item, Tensor) and not _is_pil(item) and hasattr(item, "image"):
        return _Item(item.image, _label_like(getattr(item, "label", None)))
    return _Item(item, None)


def _label_like(label: Any) -> Any:
    """The label, or None for another annotation (boxes, masks, captions of a detection data set)."""
    if isinstance(label, Mapping) or (isinstance(label, (list, tuple)) and label and isinstance(label[0], Mapping)):
        return None
    return None if getattr(label, "ndim", 0) > 2 else label


def _is_image_like(part: Any) -> bool:
    return _is_pil(part) or (isinstance(part, (Tensor, np.ndarray)) and part.ndim == 3)


def _labels_of(label: Any, count: int, batched: bool) -> list[Any]:
    if label is None:
        return [None] * count
    if not batched:
        return [label]
    if _count(label) != count:
        raise InputError(f"a batch of {count} images has {_count(label)} labels")
    return list(label)


def _count(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") and bool(getattr(value, "ndim", True)) else 1


def _has_numbers(source: Any) -> bool:
    return hasattr(source, "__len__") and hasattr(source, "__getitem__") and not isinstance(source, Mapping | set)


def _is_stack(value: Any, paths: bool = False) -> bool:
    """Whether this contains several images, as a 4-d tensor or array, or a list of images (or of ``paths``)."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim == 4
    first = value[0] if isinstance(value, (list, tuple)) and value else None
    return _is_image_like(first) or (paths and isinstance(first, (str, os.PathLike)))


def _is_pil(value: Any) -> bool:
    return hasattr(value, "convert") and hasattr(value, "getbands")


def _from_array(pixels: np.ndarray[Any, Any], name: str) -> Tensor:
    """An array, which usually has channels last, as a tensor with channels first."""
    if pixels.ndim == 2:
        pixels = pixels[None]
    if pixels.dtype.kind == "f" or not pixels.dtype.isnative:  # arrays have 64 bits by default
        pixels = pixels.astype(np.float32 if pixels.dtype.kind == "f" else pixels.dtype.newbyteorder("="))
    first, last = pixels.shape[-3], pixels.shape[-1]
    if last in (1, 3, 4) and first not in (1, 3, 4):
        pixels = np.moveaxis(pixels, -1, -3)
    elif last in (1, 3, 4) and first in (1, 3, 4):
        raise InputError(
            f"{name} is an array {pixels.shape}, whose channels may be first or last; pass a tensor (N, C, H, W)"
        )
    return torch.from_numpy(np.ascontiguousarray(pixels))


def _described(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def as_seen(image: Tensor, preprocessing: Preprocessing | None = None) -> Tensor:
    """``(3, H, W)`` in [0, 1] from a model's input, for display.

    Args:
        image: ``(C, H, W)``. One channel is gray, of more than three the first three are shown, and values of an
            unknown range are stretched to [0, 1].
        preprocessing: the normalization of the image, which is undone.
    """
    image = image.detach().float().cpu()
    if preprocessing is not None and not _in_range(image):
        image = preprocessing.undo(image)
    if image.shape[0] not in (1, 3):
        image = image[: 3 if image.shape[0] > 3 else 1]
    if not _in_range(image) and bool(image.isfinite().all()):
        image = (image - image.min()) / (image.max() - image.min()).clamp_min(1e-12)
    return image.clamp(0, 1).expand(3, -1, -1)


def _in_range(image: Tensor) -> bool:
    return float(image.min()) > -0.1 and float(image.max()) < 1.1


def thumbnails(inputs: Any, most: int = 8, side: int = 160) -> list[Tensor]:
    """Thumbnails ``(3, h, w)`` in uint8 of the first ``most`` images, for tensors ``(N, C, H, W)`` and files.

    Other sources have none, because an item may change when it is read again.
    """
    first = inputs[0] if isinstance(inputs, tuple) and inputs else inputs
    preprocessing = None
    if isinstance(first, ImageSource):
        if first.streamed or first.files is None:
            return []
        preprocessing = first.preprocessing
        shown = [first[i] for i in range(min(len(first), most))]
    elif isinstance(first, Tensor) and first.ndim == 4 and not first.is_complex() and first.numel():
        shown = list(first[:most])
    else:
        return []
    return [_thumbnail(as_seen(image, preprocessing), side) for image in shown]


def _thumbnail(image: Tensor, side: int) -> Tensor:
    factor = min(1.0, side / max(image.shape[1:]))
    size = [max(round(length * factor), 1) for length in image.shape[1:]]
    if factor < 1:
        image = torch.nn.functional.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    return (image.nan_to_num(nan=0.0).clamp(0, 1) * 255).round().byte()
