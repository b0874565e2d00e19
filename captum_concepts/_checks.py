"""Shared checks of arguments: numbers, options, names, and the rows or columns that a key selects."""

from __future__ import annotations

import math
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from captum_concepts.errors import InputError, InputWarning, did_you_mean


def integer(name: str, value: Any, least: int | None = 1, most: int | None = None) -> int:
    """``value`` as an int from ``least`` to ``most``.

    Raises:
        InputError: it is not an integer, or out of range.

    >>> integer("batch_size", 32)
    32
    """
    bounds = [f"at least {least}"] if least is not None else []
    bounds += [f"at most {most}"] if most is not None else []
    allowed = f"an integer{' of ' if bounds else ''}{' and '.join(bounds)}"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InputError(f"{name} must be {allowed}, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError as error:
        raise InputError(f"{name} must be {allowed}, got {value!r}") from error
    if (least is not None and number < least) or (most is not None and number > most):
        raise InputError(f"{name} must be {allowed}, got {number}")
    return number


def number(name: str, value: Any, check: Callable[[float], bool], allowed: str) -> float:
    """``value`` as a finite float for which ``check`` is true; ``allowed`` describes these numbers in messages.

    Raises:
        InputError: it is not such a number.

    >>> number("alpha", 1, lambda a: 0 < a <= 1, "in (0, 1]")
    1.0
    """
    try:
        good = not isinstance(value, (bool, str)) and math.isfinite(value) and check(float(value))
    except (TypeError, ValueError, OverflowError):
        good = False
    if not good:
        raise InputError(f"{name} must be {allowed}, got {value!r}")
    return float(value)


def one_of(name: str, value: Any, allowed: Sequence[Any], more: str = "") -> Any:
    """``value`` if it is one of ``allowed``; ``more`` describes in messages what else is accepted.

    Raises:
        InputError: it is not.

    >>> one_of("fill", "zero", ("zero", "mean"))
    'zero'
    """
    if not any(value is option or (type(value) is type(option) and value == option) for option in allowed):
        hint = did_you_mean(value, [a for a in allowed if isinstance(a, str)]) if isinstance(value, str) else ""
        choices = ", ".join(map(repr, allowed))
        raise InputError(f"{name} must be one of {choices}{more and f', {more}'}; got {value!r}.{hint}")
    return value


def with_weights(what: str, model: Any) -> None:
    """Raise if all weights of a model are on the meta device; if only some are, hooks may load their values.

    Raises:
        InputError: all weights are on the meta device.

    >>> with_weights("the backbone", nn.Linear(2, 2))
    """
    weights = list(model.parameters()) if isinstance(model, nn.Module) else []
    if weights and all(weight.is_meta for weight in weights):
        raise InputError(
            f"{what} is on the meta device, so its weights have no values; load them first, for example with "
            "load_state_dict(weights, assign=True)"
        )


def unique_names(names: Any, what: str, count: int | None = None) -> list[str]:
    """``names`` as a list of unique, non-empty, stripped strings, ``count`` of them if that is given.

    Raises:
        InputError: a single string, values that are not strings, an empty or repeated name, or another number of names.

    >>> unique_names(("sky", "sea\\n"), "concept")
    ['sky', 'sea']
    """
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        raise InputError(f"{what} names must be a list of names, got {names!r}")
    listed_names = list(names)
    bad = [name for name in listed_names if not isinstance(name, str) or not name.strip()]
    if bad:
        raise InputError(f"{what} names must be non-empty strings, got {bad[:5]!r}")
    listed_names = [name.strip() for name in listed_names]  # lines of a file have line breaks
    repeated = sorted(name for name, times in Counter(listed_names).items() if times > 1)
    if repeated:
        more = f" and {len(repeated) - 10} others" if len(repeated) > 10 else ""
        raise InputError(
            f"{what} names must be unique; named more than once: {repeated[:10]}{more}. Remove the duplicates, or "
            f"rename them, as in {repeated[0] + ' 2'!r}"
        )
    if count is not None and len(listed_names) != count:
        raise InputError(f"{len(listed_names)} {what} names for {count}; pass one name for each")
    return listed_names


def warn_of_same_embeddings(names: Sequence[str], text: Tensor) -> None:
    """Warn of names with the same embedding ("red" and "Red"), which share one probability.

    >>> import torch
    >>> warn_of_same_embeddings(["sky", "sea"], torch.eye(2))
    """
    for other, name in same_rows(names, text):
        warnings.warn(
            f"{other!r} and {name!r} have the same text embedding, so they have the same scores and maps; remove one "
            "of them",
            InputWarning,
            stacklevel=3,
        )


def same_rows(names: Sequence[str], rows: Tensor) -> Iterator[tuple[str, str]]:
    """Pairs of names with identical rows, each with the first name of that row.

    >>> import torch
    >>> list(same_rows(["sky", "sea", "Sky"], torch.eye(2)[[0, 1, 0]]))
    [('sky', 'Sky')]
    """
    first: dict[bytes, str] = {}
    for name, row in zip(names, rows.detach().float().cpu().numpy(), strict=True):
        other = first.setdefault(row.tobytes(), name)
        if other != name:
            yield other, name


def one_target_each(target: Any) -> bool:
    """Whether ``target`` has one entry per example; a number, name, tuple or tensor of one entry applies to all.

    >>> one_target_each([2, 0]), one_target_each(2), one_target_each((2,))
    (True, False, False)
    """
    if isinstance(target, np.ndarray):
        return target.ndim > 0
    return isinstance(target, list) or (isinstance(target, Tensor) and target.ndim > 0 and target.numel() > 1)


def warn_of_numbers(labels: Sequence[Any]) -> None:
    """Warn of labels that are numbers but not 0 to K-1, as a number is an index when used as a target.

    >>> warn_of_numbers([0, 1, 2])
    """
    numbers = all(hasattr(label, "__index__") for label in labels)
    if numbers and [int(label) for label in labels] != [*range(len(labels))]:
        warnings.warn(
            f"the labels are numbers, but not 0 to {len(labels) - 1}: {', '.join(map(str, labels[:6]))}. An integer "
            f"target counts the references from 0, so target=0 is label {labels[0]}; pass names, as in "
            f"target={str(labels[0])!r}, or count the labels from 0",
            InputWarning,
            stacklevel=3,
        )


def warn_of_batch_statistics(modules: Mapping[str, nn.Module]) -> None:
    """Warn of a batch norm without running statistics, because each image's result then depends on the batch.

    >>> warn_of_batch_statistics({"bn": nn.BatchNorm2d(4)})
    """
    for name, module in modules.items():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            warnings.warn(
                f"{name!r} is a batch norm without running statistics (track_running_stats=False): the model's output "
                "for an image, and every result here, depends on the other images of its batch and on batch_size",
                InputWarning,
                stacklevel=3,
            )
            return


def name_positions(key: Any, names: Sequence[str], what: str = "concept") -> list[int]:
    """Indices in ``names`` that names, indices, a slice or a mask select; None selects all.

    Raises:
        InputError: an unknown name (close matches are suggested), an invalid index, an empty or a repeated selection.

    >>> name_positions(["sea", 0], ["sky", "sea"])
    [1, 0]
    """
    if key is None:
        return list(range(len(names)))
    keys = listed([key] if isinstance(key, str) else key)
    if isinstance(keys, list) and any(isinstance(k, str) for k in keys):
        chosen = []
        for one in keys:
            if isinstance(one, str) and one not in names:
                known = f" Known: {list(names)[:10]}." if len(names) <= 10 else ""
                raise InputError(
                    f"{one!r} is not among the {len(names)} {_plural(what)}.{did_you_mean(one, names) or known}"
                )
            chosen.append(names.index(one) if isinstance(one, str) else positions(one, len(names), what)[0])
    else:
        chosen = positions(keys, len(names), what)
    if not chosen:
        raise InputError(f"no {what} is selected; pass at least one, or None for all")
    if len(set(chosen)) != len(chosen):
        repeated = sorted({names[i] for i in chosen if chosen.count(i) > 1})
        raise InputError(f"{_plural(what)} were selected more than once: {repeated[:10]}; select each once")
    return chosen


def listed(key: Any) -> Any:
    """Arrays, tensors, tuples and ranges as lists; other values are unchanged."""
    return key.tolist() if hasattr(key, "tolist") else list(key) if isinstance(key, (tuple, range)) else key


def positions(key: Any, n: int, what: str) -> list[int]:
    """Indices below ``n`` that an index, a slice, a list of indices or a mask selects."""
    key = listed(key)
    if key is ...:
        key = slice(None)
    if isinstance(key, slice):
        try:
            return list(range(n))[key]
        except (TypeError, ValueError) as error:
            raise InputError(f"{what} index {key!r} does not fit {n} {_plural(what)}: {error}") from error
    keys = key if isinstance(key, list) else [key]
    if isinstance(key, list) and keys and all(isinstance(k, bool) for k in keys):
        if len(keys) != n:
            raise InputError(f"the mask has {len(keys)} entries for {n} {_plural(what)}")
        return [i for i, chosen in enumerate(keys) if chosen]
    if not all(hasattr(k, "__index__") and not isinstance(k, bool) for k in keys):
        raise InputError(f"{_plural(what)} are selected by an integer, slice, list of integers or mask, got {key!r}")
    indices = [operator.index(k) for k in keys]
    if not all(-n <= i < n for i in indices):
        raise InputError(f"{what} index {key!r} is out of range for {n} {_plural(what)}")
    return [i % n for i in indices]


def take_rows(value: Any, rows: slice, batch: int) -> Any:
    """``value`` with only ``rows`` of every tensor with ``batch`` rows, also in nested tuples, lists and dictionaries.

    >>> import torch
    >>> take_rows((torch.arange(4), {"mean": torch.zeros(2)}), slice(1, 3), 4)
    (tensor([1, 2]), {'mean': tensor([0., 0.])})
    """
    return _of_examples(value, batch, lambda all_rows: all_rows[rows])


def repeat_rows(value: Any, count: int, batch: int) -> Any:
    """``value`` with ``count`` copies of each row of the tensors that :func:`take_rows` indexes.

    >>> import torch
    >>> repeat_rows((torch.arange(2), {"mean": torch.zeros(3)}), 2, 2)
    (tensor([0, 0, 1, 1]), {'mean': tensor([0., 0., 0.])})
    """
    return _of_examples(value, batch, lambda rows: rows.repeat_interleave(count, 0))


def _of_examples(value: Any, batch: int, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with each tensor of ``batch`` rows changed."""
    if isinstance(value, tuple):
        return tuple(_of_examples(item, batch, change) for item in value)
    if isinstance(value, list):
        return [_of_examples(item, batch, change) for item in value]
    if isinstance(value, dict):
        return {key: _of_examples(item, batch, change) for key, item in value.items()}
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch:
        return change(value)
    return value


def finite_images(values: Tensor, images: Sequence[Any], what: str) -> None:
    """Raise for NaN and infinite values, which would corrupt everything fitted to them.

    Args:
        values: the same number of rows for every image.
        images: index or name of each image.
        what: name of the values in the message.

    Raises:
        InputError: a value is not finite; the message names the first such image.

    >>> import torch
    >>> finite_images(torch.tensor([[1.0], [torch.nan]]), ["a.jpg", "b.jpg"], "the embedding")
    Traceback (most recent call last):
    ...
    captum_concepts.errors.InputError: the embedding of b.jpg contains NaN or infinite values; remove the image, or
    look for such values in its pixels or in the model
    """
    finite = values.detach().isfinite().reshape(len(values), -1).all(1)
    if not bool(finite.all()):
        name = images[int((~finite).nonzero()[0]) * len(images) // len(values)]
        named = name if isinstance(name, str) else f"image {name}"
        raise InputError(
            f"{what} of {named} contains NaN or infinite values; remove the image, or look for such values in its "
            "pixels or in the model"
        )


def _plural(what: str) -> str:
    return f"{what}es" if what.endswith("s") else f"{what}s"
