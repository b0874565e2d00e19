"""Images for an explainer, in batches: what the model gets, and what people see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_concepts.images import ImageSource, as_seen, batches, inputs_for, open_images


@dataclass(frozen=True)
class Shown:
    """One batch.

    Args:
        inputs: ``(n, C, H, W)`` for the model.
        pictures: n images ``(3, H, W)`` in [0, 1], as they are drawn.
        names: one per image; None where they have none of their own.
        labels: the true classes, by index or name, or None.
    """

    inputs: Tensor
    pictures: list[Tensor]
    names: list[str] | None
    labels: list[int] | list[str] | None


def model_of(explainer: Any) -> Any:
    """The network that an explainer explains: its size and normalization are those of the images."""
    for name in ("backbone", "forward_func"):
        if hasattr(explainer, name):
            return getattr(explainer, name)
    return explainer


def source_of(explainer: Any, images: Any, transform: Callable[[Tensor], Tensor] | None) -> ImageSource:
    """The images opened as the explainer's model wants them; with ``transform``, in [0, 1] and in their own size."""
    if hasattr(images, "convert"):
        images = [images]
    if transform is not None:
        return open_images(images)
    known, size = reader_of(explainer)
    return inputs_for(known, images, size=size)


def reader_of(explainer: Any) -> tuple[Any, Any]:
    """What files are read by: the explainer's own preprocessing and size where it has them, else its network's."""
    own = getattr(explainer, "preprocessing", None)
    return (own, None) if own is not None else (model_of(explainer), getattr(explainer, "input_size", None))


def shown_batches(
    explainer: Any, images: Any, batch_size: int, transform: Callable[[Tensor], Tensor] | None = None
) -> Iterator[Shown]:
    """The images in batches of one size.

    Args:
        explainer: a method.
        images: whatever :func:`~captum_concepts.images.inputs_for` takes. Files, PIL images and arrays are resized and
            normalized as the model wants them; float tensors are its inputs already.
        batch_size: images per batch at most.
        transform: makes the model's inputs from a batch in [0, 1] instead.
    """
    source = source_of(explainer, images, transform)
    network = model_of(explainer)
    like = next(network.parameters(), None) if isinstance(network, torch.nn.Module) else None
    named = source.files is not None if not source.streamed else False
    for batch in batches(source, batch_size):
        inputs = batch.images if transform is None else transform(batch.images)
        inputs = inputs if like is None else inputs.to(like.device)
        labels = batch.labels
        if labels is not None and source.class_names is not None:
            labels = [source.class_names[one] if isinstance(one, int) else one for one in labels]
        pictures = [as_seen(image, source.preprocessing) for image in batch.images]
        yield Shown(inputs, pictures, list(batch.names) if named else None, labels)
