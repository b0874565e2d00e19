"""Labelled images for a fit: numbered, of one size, with labels that are known and checked before the long steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import DatasetFolder

from captum_concepts.datasets import CaptionedScenes
from captum_concepts.errors import InputError
from captum_concepts.store import UniformImages

Data = Dataset[Any] | DataLoader[Any] | tuple[Tensor, Any] | Sequence[Any]
#: Fewer cannot carry a similarity over samples: two always give -1, 0 or 1.
FEWEST = 8


class LabelledImages:
    """``data`` as images by number and one label each.

    Args:
        data: a data set (or loader, which is read through its data set) whose items begin with an image ``(3, H, W)``
            and its label (or are dicts with "image" and "label"), such as ``torchvision.datasets.ImageFolder`` with a
            transform, or ``(images, labels)``. RGB in [0, 1] or uint8, of one size, the same each time.
        num_classes: K; labels are 0..K-1.
        what: how messages call it.
        num_workers: processes that read images ahead.
        labels: None finds them.
        all_classes: refuse data that lack images of a class.

    Raises:
        InputError: no images, no labels, a label out of range, a class without images.
    """

    def __init__(
        self,
        data: Data,
        num_classes: int,
        *,
        what: str = "train_data",
        num_workers: int = 0,
        labels: Any = None,
        all_classes: bool = True,
        show_progress: bool = False,
    ) -> None:
        if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor) and data[0].ndim == 4:
            images, given = data
            labels = given if labels is None else labels
            if len(labels) != len(images):
                raise InputError(f"{what} has {len(images)} images but {len(labels)} labels")
            data = TensorDataset(images)
        dataset: Any = data.dataset if isinstance(data, DataLoader) else data
        self.pictures = UniformImages(dataset, num_workers)
        if labels is None:
            labels = known_labels(dataset)
        if labels is None:
            labels = _read_labels(dataset, what, show_progress)
        self.labels = _checked(labels, num_classes, what, all_classes)
        if len(self) < FEWEST:
            raise InputError(
                f"{what} holds {len(self)} images; a similarity over samples needs at least {FEWEST}, and means little "
                "below some hundreds"
            )

    def __len__(self) -> int:
        return len(self.pictures)


def known_labels(dataset: Any) -> Tensor | None:
    """All labels of a data set whose ``__getitem__`` is known to return them unchanged, without reading an image; else
    None: a list such as ``targets`` may say something else than the items do."""
    get = getattr(type(dataset), "__getitem__", None)
    if get is Subset.__getitem__:
        inner = known_labels(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(list(dataset.indices), dtype=torch.long)]
    if get is ConcatDataset.__getitem__:
        parts = [known_labels(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    if get is TensorDataset.__getitem__:
        return dataset.tensors[1] if len(dataset.tensors) > 1 and dataset.tensors[1].ndim == 1 else None
    if get is CaptionedScenes.__getitem__:
        return dataset.labels
    if get is DatasetFolder.__getitem__ and dataset.target_transform is None:
        return torch.tensor([label for _, label in dataset.samples])
    return None


def label_of(item: Any, index: int, what: str) -> int:
    """The label in a data set's item."""
    found: Any = None
    if isinstance(item, dict):
        found = next((item[key] for key in ("label", "labels", "target", "y") if key in item), None)
    elif isinstance(item, (tuple, list)) and len(item) > 1:
        found = item[1]
    try:
        return _integer(found)
    except (TypeError, ValueError):
        raise InputError(
            f"item {index} of {what} has no label: its items must be (image, label, ...) with a class index, or dicts "
            f"with 'image' and 'label'; found {type(found).__name__ if found is not None else type(item).__name__}"
        ) from None


def _integer(value: Any) -> int:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    number = int(value)
    if isinstance(value, (str, bytes)) or number != value:
        raise ValueError
    return number


def _read_labels(dataset: Any, what: str, show: bool) -> list[int]:
    places: Any = range(len(dataset))
    if show:
        from tqdm.auto import tqdm

        places = tqdm(places, desc="labels")
    return [label_of(dataset[i], i, what) for i in places]


def _checked(labels: Any, num_classes: int, what: str, all_classes: bool) -> Tensor:
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
        raise InputError(f"num_classes must be a whole number of at least 2, got {num_classes!r}")
    found = torch.as_tensor(labels).detach().cpu()
    if found.ndim != 1 or found.is_complex() or (found.is_floating_point() and bool((found != found.round()).any())):
        raise InputError(f"labels of {what} must be one class index an image, got {tuple(found.shape)} {found.dtype}")
    found = found.long()
    bad = ((found < 0) | (found >= num_classes)).nonzero().flatten()
    if len(bad):
        raise InputError(
            f"image {int(bad[0])} of {what} has label {int(found[bad[0]])}, outside 0..{num_classes - 1} "
            f"(num_classes={num_classes}); {len(bad)} such labels"
        )
    empty = (torch.bincount(found, minlength=num_classes) == 0).nonzero().flatten().tolist()
    if empty and all_classes:
        shown = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
        raise InputError(
            f"{len(empty)} of {num_classes} classes have no image in {what}: {shown}; the model could never learn "
            "them. Give images of them, or renumber the labels and lower num_classes"
        )
    return found
