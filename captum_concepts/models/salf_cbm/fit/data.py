"""Indexed, labeled images of one size, checked before the long steps of a fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from captum_concepts._checks import integer
from captum_concepts.errors import InputError, shortened
from captum_concepts.images import ImageSource, batches, fingerprint, known_labels, open_images

Transform = Callable[[Tensor], Tensor]
#: Minimum images for a similarity over samples (for two it is always -1, 0 or 1).
FEWEST = 8


@dataclass(frozen=True)
class LabeledImages:
    """Indexed images and their labels, created by :func:`labeled_images`.

    Args:
        source: the images ``(C, H, W)``, in [0, 1] or as their data set returns them.
        labels: ``(N,)`` class indices, or ``(N, L)`` of 0 and 1 for independent classes.
        shape: of every image.
        class_names: the names of the classes, if the data contain them.
        shown: the RGB images that the encoder sees.
        num_workers: processes that load images.
    """

    source: ImageSource
    labels: Tensor
    shape: tuple[int, ...]
    class_names: list[str] | None
    shown: Any
    num_workers: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def multi_label(self) -> bool:
        """Whether the classes are independent."""
        return self.labels.ndim == 2

    def read(self, index: Sequence[int]) -> Iterator[Tensor]:
        """The images at ``index``, in that order.

        Raises:
            InputError: an image of another size.
        """
        if self.num_workers and len(index) > 1:
            chosen = self.source.select(index)
            images: Any = (batch.images[0] for batch in batches(chosen, 1, num_workers=self.num_workers))
        else:
            images = (self.source[i] for i in index)
        for i, image in zip(index, images, strict=True):
            yield self.checked(image, i)

    def checked(self, image: Tensor, number: int) -> Tensor:
        """``image``, after checking that it has the size of the others."""
        if tuple(image.shape) != self.shape:
            raise InputError(
                f"images must have one size: image 0 is {self.shape}, image {number} is {tuple(image.shape)}; resize "
                "them, for example with images.open_images(data, size=224)"
            )
        return image.detach()

    def digest(self, of_shown: str) -> str:
        """A digest of the images; ``of_shown`` is the known digest of the images that the encoder sees."""
        return of_shown if self.shown is self.source else fingerprint(self.source, num_workers=self.num_workers)


class _Shown(Dataset[Tensor]):
    def __init__(self, source: ImageSource, transform: Transform) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.source[index][None])[0]


def labeled_images(
    data: Any,
    num_classes: int,
    *,
    what: str = "images",
    labels: Any = None,
    class_names: Sequence[str] | None = None,
    multi_label: bool | None = None,
    encoder_transform: Transform | None = None,
    num_workers: int = 0,
    all_classes: bool = True,
    show_progress: bool = False,
) -> LabeledImages:
    """``data`` as indexed images with labels.

    Args:
        data: whatever :func:`~captum_concepts.images.open_images` reads with labels: a data set (or a loader, which is
            read through its data set) whose items begin with an image and its label, ``(images, labels)``, or a folder
            of class folders. Images have one size and are the same at each access.
        num_classes: L; labels are 0..L-1, or names among ``class_names``.
        what: name of the data in messages.
        labels: replace those of the data.
        class_names: in the order of the labels.
        multi_label: labels are ``(N, L)`` of 0 and 1, of classes that are not mutually exclusive. None: True if some
            image has no class or several.
        encoder_transform: from a batch of images to the RGB images that the encoder sees. None repeats a single channel
            and leaves three channels unchanged.
        num_workers: processes that load images.
        all_classes: refuse data without images of some class.
        show_progress: show a progress bar while labels are read.

    Raises:
        InputError: no images, no labels, a label out of range, or a class without images.
    """
    integer("num_classes", num_classes, 1 if multi_label else 2)
    if labels is None and isinstance(data, tuple) and len(data) == 2 and not _is_label(data[1]):
        data, labels = data
    opened = data if isinstance(data, ImageSource) else open_images(data, mode="any")
    source = data if isinstance(data, ImageSource) else open_images(data, mode="any", labels=False)
    if source.streamed:
        raise InputError(
            f"{what} must be a data set with a length, so that rows of a store can be indexed; got a stream"
        )
    if len(source) < FEWEST:
        raise InputError(
            f"{what} contains {len(source)} images; a similarity over samples needs at least {FEWEST}, and is "
            "unreliable below some hundreds"
        )
    first = source[0]
    given = _given_labels(data, opened, what, labels, len(source), show_progress)
    names = list(class_names) if class_names is not None else opened.class_names
    target = _checked(given, num_classes, what, all_classes, multi_label, names)
    shown: Any = source
    if encoder_transform is not None:
        _check_shown(encoder_transform(first[None]), tuple(first.shape))
        shown = _Shown(source, encoder_transform)
    elif first.shape[0] == 1:
        shown = _Shown(source, _gray_as_rgb)
    elif first.shape[0] != 3:
        raise InputError(
            f"{what} has images of {first.shape[0]} channels, but the encoder takes RGB; pass encoder_transform=, a "
            "function of a batch, for example lambda images: images[:, :3]"
        )
    return LabeledImages(source, target, tuple(first.shape), names, shown, num_workers)


def _is_label(value: Any) -> bool:
    """Whether ``(a, value)`` is one image with its label rather than all images with all labels."""
    return not hasattr(value, "__len__") or getattr(value, "ndim", 1) == 0 or isinstance(value, str)


def _given_labels(data: Any, opened: ImageSource, what: str, labels: Any, count: int, show: bool) -> Any:
    if labels is not None:
        if len(labels) != count:
            raise InputError(f"{what} has {count} images but {len(labels)} labels")
        return labels
    if isinstance(data, (ImageSource, DataLoader, str, Tensor)) or not hasattr(data, "__getitem__"):
        if (found := opened.labels) is None:
            raise InputError(f"item 0 of {what} has no label; pass (images, labels), or a data set of both")
        return found
    known = known_labels(data)
    if known is not None:
        return known
    items: Any = range(count)
    if show:
        from tqdm.auto import tqdm

        items = tqdm(items, desc="labels")
    return [_label(data[i], i, what) for i in items]


def _label(item: Any, index: int, what: str) -> Any:
    found: Any = None
    if isinstance(item, Mapping):
        found = next((item[key] for key in ("label", "labels", "target", "y") if key in item), None)
    elif isinstance(item, (tuple, list)) and len(item) > 1:
        found = item[1]
    elif not isinstance(item, (Tensor, tuple, list)):
        found = getattr(item, "label", None)
    if found is None or getattr(found, "ndim", 0) > 1:
        raise InputError(
            f"item {index} of {what} has no label: its items must be (image, label, ...) with a class index, or dicts "
            f"with 'image' and 'label'; found {type(item if found is None else found).__name__}"
        )
    return found


def _checked(
    labels: Any, num_classes: int, what: str, all_classes: bool, multi_label: bool | None, names: Sequence[str] | None
) -> Tensor:
    values = _as_tensor(labels, what, names)
    if values.ndim == 2 and values.shape[1] == 1 and num_classes != 1:
        values = values[:, 0]
    if values.ndim == 2:
        return _checked_matrix(values, num_classes, what, all_classes, multi_label)
    if multi_label:
        shape = tuple(values.shape)
        raise InputError(f"multi_label=True needs labels of shape (N, {num_classes}), but those of {what} are {shape}")
    if values.ndim != 1 or values.is_complex() or bool((values != values.round()).any()):
        raise InputError(f"labels of {what} must be one class index per image, got {shortened(labels)}")
    indices = values.long()
    bad = ((indices < 0) | (indices >= num_classes)).nonzero().flatten()
    if len(bad):
        raise InputError(
            f"image {int(bad[0])} of {what} has label {int(indices[bad[0]])}, outside 0..{num_classes - 1} "
            f"(num_classes={num_classes}); {len(bad)} such labels"
        )
    empty = (torch.bincount(indices, minlength=num_classes) == 0).nonzero().flatten().tolist()
    if empty and all_classes:
        raise InputError(
            f"{len(empty)} of {num_classes} classes have no image in {what}: {shortened(empty)}; the model cannot "
            "learn them. Add images of these classes, or renumber the labels and lower num_classes"
        )
    return indices


def _checked_matrix(values: Tensor, num_classes: int, what: str, all_classes: bool, multi_label: bool | None) -> Tensor:
    if values.shape[1] != num_classes or not bool(((values == 0) | (values == 1)).all()):
        raise InputError(
            f"labels of {what} of shape {tuple(values.shape)} must be one class index per image, or 0 and 1 of shape "
            f"(N, {num_classes})"
        )
    single = bool((values.sum(1) == 1).all())
    if multi_label is False and not single:
        raise InputError(f"some images of {what} have no label or several; pass multi_label=True")
    if single and not multi_label:
        return _checked(values.argmax(1), num_classes, what, all_classes, None, None)
    positives = values.sum(0)
    constant = ((positives == 0) | (positives == len(values))).nonzero().flatten().tolist()
    if constant and all_classes:
        raise InputError(
            f"{len(constant)} of {num_classes} classes are in no image of {what}, or in all: {shortened(constant)}; "
            "the model cannot learn them"
        )
    return values.float()


def _as_tensor(labels: Any, what: str, names: Sequence[str] | None) -> Tensor:
    if isinstance(labels, Tensor):
        return labels.detach().cpu().double()
    rows = list(labels)
    if rows and all(isinstance(row, str) for row in rows):
        if names is None or (unknown := sorted(set(rows) - set(names))):
            known = "there are no class_names" if names is None else f"not {shortened(unknown)}"
            raise InputError(f"labels of {what} are names, but {known}; pass class_names= in the order of the classes")
        return torch.tensor([list(names).index(row) for row in rows]).double()
    try:
        if any(isinstance(row, Tensor) for row in rows):
            return torch.stack([torch.as_tensor(row).detach().cpu().double() for row in rows])
        return torch.as_tensor(rows, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        wrong = next((i for i, row in enumerate(rows) if isinstance(row, str) or not hasattr(row, "__float__")), 0)
        raise InputError(
            f"item {wrong} of {what} must have a class index as its label, got {shortened(rows[wrong])}"
        ) from None


def _gray_as_rgb(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1)


def _check_shown(shown: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(shown, Tensor) or shown.ndim != 4 or len(shown) != 1 or shown.shape[1] != 3:
        found = tuple(shown.shape) if isinstance(shown, Tensor) else type(shown).__name__
        raise InputError(f"encoder_transform must map images {(1, *shape)} to RGB (1, 3, H, W), got {found}")
