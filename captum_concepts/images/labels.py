"""Class labels in common forms as integers or names; ambiguous ones raise."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from captum_concepts.errors import InputError

Label = int | str
LABEL_KEYS = ("label", "labels", "target", "targets", "y", "cls", "class")


def label_of(value: Any, what: str = "the label") -> Label:
    """The integer or name of one label, which may be a 0-d or one-element tensor, or a one-hot vector (its index).

    Raises:
        InputError: the label is NaN, a fraction, a vector that is not one-hot, or something else.

    >>> label_of(torch.tensor(3)), label_of([0, 0, 1]), label_of("cat")
    (3, 2, 'cat')
    """
    if isinstance(value, str):
        if not value.strip():
            raise InputError(f"{what} is an empty name; a label is an integer or a name")
        return value
    if isinstance(value, bool | np.bool_):
        return int(value)
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, numbers.Real | Tensor) for v in value):
        value = np.asarray([float(v) for v in value])
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        if value.size == 1:
            value = value.reshape(()).item()
        elif value.ndim == 1 and value.size:
            hot = np.flatnonzero(value)
            if len(hot) != 1 or value[hot[0]] != 1:
                kind = "multi-hot" if set(np.unique(value)) <= {0, 1} else "not one-hot"
                raise InputError(
                    f"{what} is a vector of {value.size} values that is {kind}; pass one class index or name per "
                    "image, or labels=False to read images without labels"
                )
            return int(hot[0])
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        return label_of(value, what)
    if isinstance(value, numbers.Real):
        number = float(value)
        if not math.isfinite(number) or number != int(number):
            raise InputError(f"{what} is {number:g}; a label is an integer or a name")
        return int(number)
    got = f"{type(value).__name__} {tuple(value.shape)}" if hasattr(value, "shape") else type(value).__name__
    raise InputError(f"{what} must be a class index or name, got {got}")


def checked_labels(labels: Any, count: int | None = None) -> list[int] | list[str]:
    """One label per image, as a list of integers or a list of names.

    Args:
        labels: a list of numbers, names, 0-d tensors or one-hot vectors, or a tensor or array ``(N,)``, ``(N, 1)`` or
            one-hot ``(N, K)``.
        count: required number of labels.

    Raises:
        InputError: the number differs, labels are NaN or multi-hot, or names and numbers are mixed.

    >>> checked_labels([torch.tensor(0), torch.tensor(4)])
    [0, 4]
    """
    if (
        isinstance(labels, (str, bytes, Mapping, Set))
        or not hasattr(labels, "__len__")
        or not hasattr(labels, "__iter__")
    ):
        raise InputError(f"labels must be a list or tensor with one label per image, got {type(labels).__name__}")
    if hasattr(labels, "ndim") and labels.ndim == 0:
        raise InputError("labels must be a list or tensor with one label per image, got a single number")
    if count is not None and len(labels) != count:
        raise InputError(f"{len(labels)} labels for {count} images; pass one per image")
    values = labels.tolist() if isinstance(labels, (Tensor, np.ndarray)) and labels.ndim == 1 else list(labels)
    sizes = {len(value) for value in values if isinstance(value, (list, tuple, Tensor, np.ndarray)) and np.ndim(value)}
    if len(sizes) > 1:
        raise InputError(f"labels have rows of {min(sizes)} to {max(sizes)} values; pass one label per image")
    found = [label_of(value, f"label {i}") for i, value in enumerate(values)]
    if len({type(value) for value in found}) > 1:
        example = next(value for value in found if type(value) is not type(found[0]))
        raise InputError(f"labels mix names and numbers: {found[0]!r} and {example!r}; pass one kind")
    return found  # type: ignore[return-value]


def class_name(label: Label, names: Sequence[str]) -> str:
    """The class name of an integer label; a name is returned unchanged.

    Raises:
        InputError: there is no class with that index.

    >>> class_name(1, ["cat", "dog"])
    'dog'
    """
    if isinstance(label, str):
        return label
    if not 0 <= label < len(names):
        raise InputError(f"label {label} is out of range: there are {len(names)} classes, 0 to {len(names) - 1}")
    return names[label]


def known_labels(dataset: Any) -> Sequence[Any] | None:
    """The labels that a data set is known to yield, without reading its images; None if the items must be read.

    Lists such as ``.targets`` are used only for classes whose ``__getitem__`` is known to return them, because a data
    set that relabels in its own ``__getitem__`` may still have the old list.
    """
    get = getattr(type(dataset), "__getitem__", None)
    home = getattr(get, "__module__", "").split(".")[0]
    if get is Subset.__getitem__:
        inner = known_labels(dataset.dataset)
        return None if inner is None else [inner[i] for i in dataset.indices]
    if get is ConcatDataset.__getitem__:
        parts = [known_labels(part) for part in dataset.datasets]
        return (
            None if any(p is None for p in parts) else [label for part in parts if part is not None for label in part]
        )
    if get is TensorDataset.__getitem__:
        return list(dataset.tensors[1]) if len(dataset.tensors) > 1 and dataset.tensors[1].ndim < 3 else None
    if home == "torchvision":
        targets, transforms = getattr(dataset, "targets", None), getattr(dataset, "transforms", None)
        relabels = (getattr(one, "target_transform", None) is not None for one in (dataset, transforms))
        if not any(relabels) and targets is not None and len(targets) == len(dataset):
            return targets
    if home == "captum_concepts" and isinstance(getattr(dataset, "labels", None), Tensor):
        return list(dataset.labels)
    if type(dataset).__module__.split(".")[0] == "datasets" and getattr(dataset, "format", {}).get("type") != "custom":
        key = next((key for key in LABEL_KEYS if key in getattr(dataset, "column_names", ())), None)
        return None if key is None else list(dataset[key])
    return None


def known_classes(dataset: Any) -> list[str] | None:
    """The class names of a data set, from ``classes`` or the features of Hugging Face, or None."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if isinstance(dataset, ConcatDataset):
        parts = [known_classes(part) for part in dataset.datasets]
        return parts[0] if parts and all(part == parts[0] for part in parts) else None
    names = getattr(dataset, "classes", None)
    features = getattr(dataset, "features", None)
    if names is None and isinstance(features, Mapping):
        names = next((getattr(features[key], "names", None) for key in LABEL_KEYS if key in features), None)
    if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
        return list(names)
    return None
