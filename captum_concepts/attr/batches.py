"""Batches of a method's inputs, from tensors as Captum takes them or from any source of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from captum_concepts._checks import take_rows
from captum_concepts._memory import Halving
from captum_concepts.activations import Inputs, check_images
from captum_concepts.activations.capture import batch_size as rows_of
from captum_concepts.errors import InputError, TargetError, listing
from captum_concepts.images import ImageSource, batches, inputs_for, open_images

Batch = tuple[Inputs, Any, Any]  # inputs, additional_forward_args, target
Result = TypeVar("Result")


def opened(
    source: Any, model: nn.Module | None, *, labels: Any = False, transform: Any = None, image_size: Any = None
) -> ImageSource:
    """Images from any source, preprocessed for ``model``; see :func:`captum_concepts.images.inputs_for`."""
    if isinstance(source, ImageSource):
        return source if labels in (None, False) else open_images(source, labels=labels)
    if model is None and isinstance(source, Tensor) and source.is_floating_point():
        return open_images(source, mode="any", labels=labels)  # the number of channels is unknown
    return inputs_for(model, source, size=image_size, transform=transform, labels=labels)


def as_inputs(inputs: Any, model: nn.Module | None) -> Inputs | ImageSource:
    """Tensors unchanged, anything else as images preprocessed for ``model``."""
    if isinstance(inputs, ImageSource):
        return inputs
    parts = inputs if isinstance(inputs, tuple) else (inputs,)
    if all(isinstance(part, Tensor) for part in parts):
        first = check_images(inputs)[0]
        if first.ndim == 3 and first.shape[0] in (1, 3):
            raise InputError(f"an image of shape {tuple(first.shape)} has no batch dimension; pass image[None]")
        tensors: Inputs = inputs
        return tensors
    return opened(inputs, model)


def count(inputs: Inputs | ImageSource) -> int:
    """The number of examples."""
    return len(inputs) if isinstance(inputs, ImageSource) else rows_of(inputs)


def first_example(inputs: Inputs | ImageSource, model: nn.Module | None) -> Inputs:
    """The first example, as a batch of one."""
    return next(_cut(inputs, 1, model))


def image_names(inputs: Inputs | ImageSource) -> list[str] | None:
    """The names of images from a source; None for tensors."""
    return inputs.names if isinstance(inputs, ImageSource) else None


def placed(images: Tensor, model: nn.Module | None) -> Tensor:
    """``images`` moved to the device and dtype of the model."""
    parameters = model.parameters() if model is not None else ()
    parameter = next((p for p in parameters if p.is_floating_point()), None)
    return images if parameter is None else images.to(parameter.device, parameter.dtype)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The results of all batches in one tensor.

    Raises:
        InputError: the maps differ in size, because the images do.
    """
    sizes = dict.fromkeys(tuple(part.shape[1:]) for part in parts)
    if len(sizes) > 1:
        found = listing([" x ".join(map(str, size[-2:])) for size in sizes])
        raise InputError(
            f"images of different sizes have maps of different sizes ({found}), which do not fit in one tensor; "
            "explain them one by one, or read them at one size with images.open_images(source, size=...)"
        )
    return torch.cat(list(parts))


def each_batch(
    run: Callable[[Inputs, Any, Any], Result],
    inputs: Inputs | ImageSource,
    extra: Any,
    target: Any,
    batch_size: int,
    model: nn.Module | None,
) -> list[Result]:
    """The results of ``run(inputs, extra, target)`` for at most ``batch_size`` examples at a time.

    Args:
        run: the function.
        inputs: from :func:`as_inputs`.
        extra: additional arguments; tensors of N rows are sliced, other values are passed unchanged.
        target: in any form Captum accepts; one entry per example is sliced.
        batch_size: maximum number of examples per call. A batch that does not fit into device memory is halved.
        model: images from a source are moved to its device and dtype.

    Raises:
        InputError: the inputs are invalid.
        TargetError: a list of targets does not have one entry per example.
    """
    halving = Halving("batch_size")
    return [
        result
        for part in _batches(inputs, extra, target, batch_size, model)
        for result in halving(lambda batch: run(*batch), part, _halves)
    ]


def _batches(
    inputs: Inputs | ImageSource, extra: Any, target: Any, batch_size: int, model: nn.Module | None = None
) -> Iterator[Batch]:
    n = count(inputs)
    listed = isinstance(target, list) or (isinstance(target, Tensor) and target.ndim > 0 and target.numel() > 1)
    if listed and len(target) != n:
        raise TargetError(f"target has {len(target)} entries for {n} examples; pass one per example, or a single int")
    if isinstance(target, np.ndarray) and target.ndim and n > batch_size:
        raise TargetError(
            f"target is a NumPy array of shape {target.shape}, which is not cut into batches of {batch_size} images; "
            "pass a list, as in target.tolist(), or torch.from_numpy(target)"
        )
    if not isinstance(inputs, ImageSource) and n <= batch_size:
        yield inputs, extra, target
        return
    for rows, part in in_parts(inputs, batch_size, model):
        yield part, take_rows(extra, rows, n), target[rows] if listed else target


def in_parts(inputs: Inputs | ImageSource, batch_size: int, model: nn.Module | None) -> Iterator[tuple[slice, Inputs]]:
    """At most ``batch_size`` examples at a time, with their rows in ``inputs``."""
    start = 0
    for part in _cut(inputs, batch_size, model):
        rows = slice(start, start + count(part))
        yield rows, part
        start = rows.stop


def _cut(inputs: Inputs | ImageSource, batch_size: int, model: nn.Module | None) -> Iterator[Inputs]:
    if isinstance(inputs, ImageSource):
        for batch in batches(inputs, batch_size):
            yield placed(batch.images, model)
    elif isinstance(inputs, tuple):
        n = count(inputs)  # tensors without N rows apply to all images
        for start in range(0, n, batch_size):
            yield take_rows(inputs, slice(start, start + batch_size), n)
    else:
        yield from inputs.split(batch_size)


def _halves(batch: Batch) -> list[Batch]:
    """A batch split into two halves; a single example remains one batch."""
    inputs, extra, target = batch
    return list(_batches(inputs, extra, target, -(-count(inputs) // 2)))
