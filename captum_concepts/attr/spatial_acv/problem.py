"""Concept and negatives as one table of rows, with the fold of each image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_concepts.attr.spatial_acv.rows import GuidanceRows
from captum_concepts.errors import InputError

LABEL_CONCEPT, LABEL_NEGATIVE = 1, 0


@dataclass(frozen=True)
class Problem:
    """Both classes as one table, centered and divided by one number, so that ``lam`` means the same at any layer.

    A common number instead of one per channel makes the solution rotate with the features and does not amplify
    channels that hardly vary.
    """

    x: Tensor
    y: Tensor
    image: Tensor
    label: Tensor  # (I,) of the images
    fold: Tensor  # (I,)
    center: Tensor
    scale: float

    @property
    def folds(self) -> int:
        """The number of folds."""
        return int(self.fold.max()) + 1

    def rows_in(self, fold: int) -> Tensor:
        """``(m,)`` mask of the rows whose image is held out in ``fold``."""
        return (self.fold == fold)[self.image]


def make_problem(concept: GuidanceRows, negatives: GuidanceRows, name: str, folds: int, seed: int) -> Problem:
    """The rows of concept and negatives, with their images assigned to folds.

    Raises:
        InputError: there are fewer than two different images on a side, or the layer is constant.
    """
    for rows, what in ((concept, f"concept {name!r}"), (negatives, f"the negatives of {name!r}")):
        if len(rows.digests) < 2:
            raise InputError(
                f"{what}: {rows.images} image{'s' * (rows.images != 1)}, {len(rows.digests)} distinct; pass at least "
                "2 different images, so that accuracy can be measured on held-out images"
            )
    if concept.x.shape[1] != negatives.x.shape[1]:
        raise InputError(f"concept {name!r} has {concept.x.shape[1]} channels and its negatives {negatives.x.shape[1]}")
    x = torch.cat([concept.x, negatives.x])
    image = torch.cat([concept.image, negatives.image + len(concept.digests)])
    label = torch.cat([
        torch.full((len(concept.digests),), LABEL_CONCEPT), torch.full((len(negatives.digests),), LABEL_NEGATIVE)
    ])  # fmt: skip
    label = label.to(x.device)
    center = (concept.x.mean(0) + negatives.x.mean(0)) / 2
    x -= center
    scale = float(x.square().mean().sqrt())
    if scale <= 1e-12 * max(float(center.abs().max()), 1e-30):
        raise InputError(
            f"the layer returns the same activation at every position of {name!r} and of its negatives, so nothing "
            "can be separated; choose another layer"
        )
    x /= scale
    generator = torch.Generator().manual_seed(seed)
    count = min(folds, len(concept.digests), len(negatives.digests))
    parts = []
    for rows in (concept, negatives):
        fold = torch.empty(len(rows.digests), dtype=torch.long)
        fold[torch.randperm(len(fold), generator=generator)] = torch.arange(len(fold)) % count
        parts.append(fold)
    return Problem(x, label[image], image, label, torch.cat(parts).to(x.device), center, scale)


def mean_by_image(values: Tensor, image: Tensor, images: int) -> Tensor:
    """``(I,)`` or ``(I, R)`` mean of ``(m,)`` or ``(m, R)`` over the rows of each image; 0 for images without rows."""
    total = values.new_zeros(images, *values.shape[1:]).index_add_(0, image, values)
    count = torch.bincount(image, minlength=images).clamp_min(1).to(values)
    return total / count.view(-1, *[1] * (values.ndim - 1))
