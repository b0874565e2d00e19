"""Images for an explainer, in batches: what the model gets, and what people see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_concepts._checks import integer, name_positions
from captum_concepts.errors import InputError
from captum_concepts.explanation import ConceptExplainer
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


@dataclass(frozen=True)
class Strong:
    """One of the images with the highest score of a concept: number, score, picture ``(3, H, W)`` as drawn, and
    ``(1, C, H, W)`` as the model takes it."""

    index: int
    score: float
    picture: Tensor
    inputs: Tensor


def strongest_images(
    explainer: ConceptExplainer,
    images: Any,
    concepts: Any = None,
    k: int = 5,
    *,
    transform: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 32,
) -> dict[str, list[Strong]]:
    """The k images with the highest score of each concept, of any method or of a layer's own channels.

    Args:
        explainer: any of the methods, or :class:`~captum_concepts.attr.layer_channels.LayerChannels`.
        images: whatever :func:`~captum_concepts.images.inputs_for` takes; read once, in batches. Memory does not grow
            with their number.
        concepts: names or indices; None: all.
        k: images per concept.
        transform: makes the model's inputs from a batch of images in [0, 1].
        batch_size: images per forward pass.

    Returns:
        ``{concept: [Strong(index, score, picture, inputs), ...]}``, strongest first; the earlier image first among
        equals. Images whose score is NaN are left out.

    Raises:
        InputError: no image, or an unknown concept.
    """
    if not isinstance(explainer, ConceptExplainer):
        raise InputError(f"strongest_images needs an explainer, got {type(explainer).__name__}")
    integer("k", k)
    names = list(explainer.concepts)
    columns = name_positions(concepts, names)
    best: list[list[Strong]] = [[] for _ in columns]
    seen = 0
    for batch in shown_batches(explainer, images, integer("batch_size", batch_size), transform):
        with torch.no_grad():
            scores = explainer.scores(batch.inputs).detach().float().cpu()[:, columns]
        for row, column in enumerate(scores.T):
            known = column.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            for i in known.argsort(descending=True, stable=True)[:k].tolist():
                if known[i] > -torch.inf:
                    best[row].append(Strong(seen + i, float(known[i]), batch.pictures[i], batch.inputs[i : i + 1]))
            best[row] = sorted(best[row], key=lambda one: (-one.score, one.index))[:k]
        seen += len(batch.pictures)
    if not seen:
        raise InputError("there is no image")
    return {names[column]: own for column, own in zip(columns, best, strict=True)}
