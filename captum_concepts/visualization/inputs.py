"""Batches of images for an explainer, as model inputs and as displayed images."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_concepts._checks import integer, name_positions, one_target_each
from captum_concepts.errors import InputError, InputWarning
from captum_concepts.explanation import ConceptExplainer
from captum_concepts.images import ImageSource, as_seen, batches, inputs_for, open_images
from captum_concepts.images.source import of_files


@dataclass(frozen=True)
class Shown:
    """One batch of images, as model inputs and for display.

    Args:
        inputs: ``(n, C, H, W)`` for the model.
        pictures: n images ``(3, H, W)`` in [0, 1] for display.
        names: one per image, or None if they have no names of their own.
        labels: the true classes, by index or name, or None.
    """

    inputs: Tensor
    pictures: list[Tensor]
    names: list[str] | None
    labels: list[int] | list[str] | None


@dataclass(frozen=True)
class TrueClass:
    """The true class of an image.

    Args:
        name: name of the class.
        outputs: indices of the model's outputs with this name, possibly none or several.
    """

    name: str
    outputs: tuple[int, ...]

    @classmethod
    def of(cls, label: Any, class_names: Sequence[str] | Mapping[int, str] | None) -> TrueClass:
        """The class of an index or a name.

        Args:
            label: an index of the model's outputs, or a name.
            class_names: names of the model's outputs, or of some by index; None: "class 0", "class 1", ...

        Raises:
            InputError: ``label`` is neither a name nor an index of the model's outputs.
        """
        some = class_names is None or isinstance(class_names, Mapping)
        named = dict(class_names or {}) if isinstance(class_names, Mapping) else dict(enumerate(class_names or ()))
        if isinstance(label, str):
            number = re.fullmatch(r"class (\d+)", label) if class_names is None else None
            return cls(label, (int(number[1]),) if number else tuple(i for i, name in named.items() if name == label))
        index = integer("a label, if it is not a name,", label, 0, None if some else len(named) - 1)
        return cls(named.get(index, f"class {index}"), (index,))

    def verdict(self, output: int | None) -> str:
        """``"right"`` or ``"wrong"``; empty if either is unknown."""
        if output is None or not self.outputs:
            return ""
        return "right" if output in self.outputs else "wrong"


def warn_of_unknown_class(true: TrueClass) -> None:
    """Warn that no prediction can be checked against a label that no output is named by."""
    warnings.warn(
        f"no output of the model is called {true.name!r}, so it is unknown which outputs are right; pass class_names= "
        "with the names of the model's outputs, spelled like the labels, or pass labels= as indices",
        InputWarning,
        stacklevel=3,
    )


def each_of(what: str, values: Any) -> list[Any]:
    """Names or labels as a list.

    Raises:
        InputError: ``values`` is a string or not iterable.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(f"{what} must be a list with one entry per image, got {values!r}")
    return list(values)


def targets_of(target: Any, rows: slice) -> Any:
    """The targets of the images ``rows``, if each image has its own; else ``target``."""
    return target[rows] if one_target_each(target) else target


def check_targets(target: Any, count: int) -> None:
    """Check that there is one target per image, or one for all.

    Raises:
        InputError: there are more or fewer targets than images.
    """
    if one_target_each(target) and len(target) != count:
        raise InputError(f"{len(target)} targets for {count} images; pass one for each, or one for all")


def model_of(explainer: Any) -> Any:
    """The network that an explainer explains, which defines the size and normalization of the images."""
    for name in ("backbone", "forward_func"):
        if hasattr(explainer, name):
            return getattr(explainer, name)
    return explainer


def source_of(explainer: Any, images: Any, transform: Callable[[Tensor], Tensor] | None) -> ImageSource:
    """The images preprocessed for the explainer's model; with ``transform``, in [0, 1] at their own size."""
    if hasattr(images, "convert"):
        images = [images]
    if transform is not None:
        return open_images(images)
    known, size = reader_of(explainer)
    return inputs_for(known, images, size=size)


def reader_of(explainer: Any) -> tuple[Any, Any]:
    """Preprocessing (or network) and size for reading files, the explainer's own if it has them, else its network's."""
    own = getattr(explainer, "preprocessing", None)
    return (own, None) if own is not None else (model_of(explainer), getattr(explainer, "input_size", None))


def shown_batches(
    explainer: Any, images: Any, batch_size: int, transform: Callable[[Tensor], Tensor] | None = None
) -> Iterator[Shown]:
    """Iterate over the images in batches of one size.

    Args:
        explainer: a method.
        images: anything that :func:`~captum_concepts.images.inputs_for` accepts. Files, PIL images and arrays are
            resized and normalized for the model; float tensors are used as its inputs.
        batch_size: maximum number of images per batch.
        transform: computes the model's inputs from a batch in [0, 1], instead of its own preprocessing.
    """
    source = source_of(explainer, images, transform)
    network = model_of(explainer)
    like = next(network.parameters(), None) if isinstance(network, torch.nn.Module) else None
    named = of_files(source)
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
    """An image with a high score: index, score, ``(3, H, W)`` for display, and ``(1, C, H, W)`` model input."""

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
    """The k images with the highest score of each concept, for any method or for a layer's own channels.

    Args:
        explainer: any of the methods, or :class:`~captum_concepts.attr.layer_channels.LayerChannels`.
        images: anything that :func:`~captum_concepts.images.inputs_for` accepts, read once in batches. Memory does not
            grow with their number.
        concepts: names or indices; None: all.
        k: images per concept.
        transform: computes the model's inputs from a batch of images in [0, 1].
        batch_size: images per forward pass.

    Returns:
        ``{concept: [Strong(index, score, picture, inputs), ...]}``, strongest first; among equal scores, the earlier
        image first. Images whose score is NaN are left out.

    Raises:
        InputError: no images, or an unknown concept.
    """
    if not isinstance(explainer, ConceptExplainer):
        raise InputError(f"strongest_images requires an explainer, got {type(explainer).__name__}")
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
        raise InputError("there is no image; pass at least one")
    return {names[column]: own for column, own in zip(columns, best, strict=True)}
