"""Batches of inputs, masks and targets from any data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from captum_concepts._checks import integer, one_target_each
from captum_concepts.errors import InputError
from captum_concepts.images import IMAGE_KEYS, Reading, to_tensor

_KEYS = ("inputs", "masks", "target", "ignore", "concepts", "score_target")
_TENSORS = ("inputs", "masks", "target", "ignore", "score_target")
_AS_THEY_ARE = Reading(mode="any")


@dataclass(frozen=True)
class Batch:
    """A batch with ``inputs`` (N, C, H, W) and ``masks`` (N, H, W) or (N, T, H, W); the rest may be None.

    ``concepts`` are names, T of them for masks (N, T, H, W), one per image for masks (N, H, W).
    """

    inputs: Tensor
    masks: Tensor | None
    target: Any
    ignore: Tensor | None
    concepts: list[str] | None = None
    score_target: Any = None

    def __len__(self) -> int:
        return len(self.inputs)

    def of(self, rows: list[int]) -> Batch:
        """The examples ``rows`` of a batch with one mask and one name per example."""

        def part(value: Any) -> Any:
            if not one_target_each(value) or len(value) != len(self):
                return value
            return [value[i] for i in rows] if isinstance(value, list) else value[rows]

        return replace(self, **{entry.name: part(getattr(self, entry.name)) for entry in fields(self)})


def batches(data: Iterable[Any], batch_size: int, device: torch.device | str | None) -> Iterator[Batch]:
    """Batches unchanged; single examples collated while their shapes agree, at most ``batch_size``."""
    batch_size = integer("batch_size", batch_size)
    waiting: list[dict[str, Any]] = []
    for item in _items(data):
        parts = _parts(item)
        if parts["inputs"].ndim == 4 and not len(parts["inputs"]):
            continue  # a loader of regions yields an empty batch if no image shows a concept
        if parts["inputs"].ndim == 4:
            if waiting:
                yield _collate(waiting, device)
                waiting = []
            yield _checked(parts, device)
            continue
        if waiting and _shapes(waiting[0]) != _shapes(parts):
            yield _collate(waiting, device)
            waiting = []
        waiting.append(parts)
        if len(waiting) == batch_size:
            yield _collate(waiting, device)
            waiting = []
    if waiting:
        yield _collate(waiting, device)


def _items(data: Any) -> Iterator[Any]:
    if isinstance(data, Tensor) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise InputError(f"data must yield (inputs, masks[, target]), got {type(data).__name__}")
    if isinstance(data, Mapping):
        raise InputError("data is a single dict; pass it in a list: [data]")
    by_number = hasattr(data, "__len__") and hasattr(type(data), "__getitem__")
    if by_number and not isinstance(data, (torch.utils.data.IterableDataset, torch.utils.data.DataLoader)):
        return (data[i] for i in range(len(data)))  # a Dataset need not raise IndexError at its end
    return iter(data)


def _parts(item: Any) -> dict[str, Any]:
    if isinstance(item, Mapping):
        image = next((key for key in ("inputs", *IMAGE_KEYS) if key in item), None)
        unknown = set(item) - {*_KEYS, image}
        if unknown or image is None:
            raise InputError(
                f"data items as dicts have the keys {', '.join(_KEYS)} ('image' or 'pixel_values' for 'inputs'), got "
                f"{sorted(map(str, item))[:12]}"
            )
        parts = {key: item.get(image if key == "inputs" else key) for key in _KEYS}
    elif isinstance(item, (tuple, list)) and len(item) in (2, 3):
        parts = dict.fromkeys(_KEYS)
        parts.update(zip(_KEYS, item))  # noqa: B905  (a target is optional)
    else:
        raise InputError(
            f"data must yield (inputs, masks), (inputs, masks, target) or dicts, got {type(item).__name__}"
        )
    parts["inputs"] = to_tensor(parts["inputs"], _AS_THEY_ARE, "inputs")
    for key in ("masks", "ignore"):
        value = parts[key]
        if value is not None and not isinstance(value, Tensor):
            try:
                parts[key] = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise InputError(f"{key} must be tensors, got {type(value).__name__}") from error
    return parts


def _shapes(parts: dict[str, Any]) -> list[Any]:
    """Properties that must agree for examples to share a batch (shapes, and the names of several masks)."""
    shapes = [getattr(parts[key], "shape", None) for key in ("inputs", "masks", "ignore")]
    several = parts["masks"] is not None and parts["masks"].ndim == 3
    targets = [parts[key] is None for key in ("target", "score_target")]
    return [*shapes, *targets, list(parts["concepts"] or ()) if several else parts["concepts"] is None]


def _collate(waiting: list[dict[str, Any]], device: torch.device | str | None) -> Batch:
    def stack(key: str) -> Any:
        values = [parts[key] for parts in waiting]
        if values[0] is None:
            return None
        if all(isinstance(value, str) for value in values):
            return values  # targets by name
        return torch.stack(values) if isinstance(values[0], Tensor) else torch.as_tensor(values)

    names = [parts["concepts"] for parts in waiting]
    several = waiting[0]["masks"] is not None and waiting[0]["masks"].ndim == 3
    try:
        return _checked(
            {**{key: stack(key) for key in _TENSORS}, "concepts": names[0] if several or None in names else names},
            device,
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"examples cannot be put into one batch: {error}") from error


def _checked(parts: dict[str, Any], device: torch.device | str | None) -> Batch:
    n = len(parts["inputs"])
    for key in ("masks", "ignore"):
        value = parts[key]
        if value is not None and (value.ndim not in (3, 4) or len(value) != n):
            raise InputError(f"{key} must be ({n}, H, W) or ({n}, T, H, W) for {n} inputs, got {tuple(value.shape)}")
    if parts["concepts"] is not None:
        parts = parts | {"concepts": _names(parts["concepts"], parts["masks"], n)}
    if device is not None:
        parts = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in parts.items()}
    return Batch(**parts)


def _names(given: Any, masks: Tensor | None, n: int) -> list[str]:
    """One name per mask (T) or per image (n)."""
    names = [given] * n if isinstance(given, str) else [name for one in given for name in _flat(one)]
    wanted = masks.shape[1] if masks is not None and masks.ndim == 4 else n
    if len(names) != wanted or not all(isinstance(name, str) for name in names):
        raise InputError(f"concepts must be {wanted} names, one for each mask or image, got {names[:5]!r}")
    return names


def _flat(name: Any) -> list[Any]:
    return list(name) if isinstance(name, (list, tuple)) else [name]
