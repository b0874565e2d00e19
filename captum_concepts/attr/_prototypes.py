"""Mean embeddings of classes, streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from captum_concepts._memory import Halving
from captum_concepts.activations import evaluation_mode, find_model
from captum_concepts.activations.spatial import full_precision
from captum_concepts.attr._similarity import check_embedding
from captum_concepts.errors import InputError


@torch.no_grad()
def class_means(
    forward_func: Callable[..., Any],
    data: Tensor | Dataset[Any] | DataLoader[Any],
    labels: Tensor | Sequence[Any] | None,
    batch_size: int,
) -> Tensor:
    """``(K, D)`` mean embedding of each class in sorted order; see ``FeatureActivationMap.prototypes``."""
    model = find_model(forward_func)
    parameter = next(model.parameters(), None) if model is not None else None
    sums: dict[Any, Tensor] = {}
    counts: dict[Any, int] = {}
    halving = Halving("batch_size")

    def embed(part: Tensor) -> Tensor:
        return full_precision(check_embedding(forward_func(part)))

    with evaluation_mode(model):
        for images, names in _batches(data, labels, batch_size):
            placed = images if parameter is None else images.to(parameter.device)
            embeddings = torch.cat(halving(embed, placed, lambda part: part.chunk(2)))
            for name, row in zip(names, embeddings, strict=True):
                sums[name] = sums[name] + row if name in sums else row.clone()
                counts[name] = counts.get(name, 0) + 1
    if not sums:
        raise InputError("the data holds no image, so there is no class to make a prototype of")
    try:
        ordered = sorted(sums)
    except TypeError as error:
        raise InputError(f"labels must all be of one type that can be sorted, got {list(sums)[:5]}") from error
    return torch.stack([sums[name] / counts[name] for name in ordered])


def _batches(data: Any, labels: Any, batch_size: int) -> Iterable[tuple[Tensor, list[Any]]]:
    """Batches of images with their labels, whatever holds them."""
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    given = labels.tolist() if isinstance(labels, Tensor) else None if labels is None else list(labels)
    if given is not None and not isinstance(data, DataLoader) and len(given) != len(data):
        raise InputError(f"{len(given)} labels for {len(data)} images; give one label each")
    loader: Any = data
    if isinstance(data, Tensor):
        loader = data.split(batch_size) if len(data) else ()
    elif not isinstance(data, DataLoader):
        loader = DataLoader(data, batch_size=batch_size)
    done = 0
    for batch in loader:
        images, own = (batch[0], batch[1]) if isinstance(batch, (tuple, list)) else (batch, None)
        names = own if given is None else given[done : done + len(images)]
        done += len(images)
        if names is None:
            raise InputError("labels are missing: give labels=, or a dataset or loader of (image, label)")
        names = names.tolist() if isinstance(names, Tensor) else list(names)
        if len(names) != len(images):
            raise InputError(f"{len(given or names)} labels are fewer than the images; give one label each")
        yield images, names
