"""Initialization of the bottleneck by the closed-form least-squares fit of P by the features."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from captum_concepts.errors import InputError
from captum_concepts.models.salf_cbm.fit.objective import Samples, by_cell, cells_of
from captum_concepts.models.salf_cbm.fit.steps import all_reduce
from captum_concepts.store import world

#: Maximum images for the second moments, enough for 2,048 channels at 49 cells each.
MOST_IMAGES = 20_000
#: Candidate strengths of the ridge penalty, on features of unit variance.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class Moments(NamedTuple):
    """Second moments about the mean of each cell, averaged over images and cells: ``(D, D)`` of features, ``(D, E)``
    of features and embeddings; float64 on the CPU."""

    features: Tensor
    cross: Tensor

    @property
    def scale(self) -> Tensor:
        """``(D,)``: one over each channel's standard deviation, 0 for a constant channel."""
        deviation = self.features.diagonal().clamp_min(0).sqrt()
        typical = deviation.square().mean().sqrt()
        if not typical > 0:
            raise InputError("the backbone's features are the same for every image; choose another layer")
        return torch.where(deviation > 1e-5 * typical, 1 / deviation.clamp_min(1e-3 * typical), 0.0)


@torch.no_grad()
def gather_moments(samples: Samples, device: torch.device, *, seed: int = 0, batch_size: int = 256) -> Moments:
    """The moments from one pass over at most :data:`MOST_IMAGES` random images, divided among the processes."""
    rows = samples.rows
    if len(rows) > MOST_IMAGES:
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:MOST_IMAGES]
        rows = rows[chosen.sort().values]
    rank, size = world()
    total, wide = len(rows), torch.float32 if device.type == "mps" else torch.float64
    mine = rows[rank * total // size : (rank + 1) * total // size]
    count, d, e = samples.shape
    sums = [torch.zeros(shape, dtype=wide, device=device) for shape in ((count, d), (count, e), (d, d), (d, e))]
    for features, embeddings in samples.batches(mine.split(batch_size)):
        for where in cells_of(count, len(features) * max(d, e)):
            # In single precision, weak directions would be noise that the inverse amplifies.
            f, g = (by_cell(values, where, device).to(wide) for values in (features, embeddings))
            sums[0][where] += f.sum(1)
            sums[1][where] += g.sum(1)
            f, g = f.flatten(0, 1), g.flatten(0, 1)
            sums[2] += f.T @ f
            sums[3] += f.T @ g
    f_mean, e_mean, square, cross = (all_reduce(part).cpu().double() / total for part in sums)
    return Moments((square - f_mean.T @ f_mean) / count, (cross - f_mean.T @ e_mean) / count)


def least_squares(moments: Moments, text: Tensor, strengths: tuple[float, ...] = STRENGTHS) -> list[Tensor]:
    r"""Bottlenecks ``(M, D)`` that minimize :math:`\sum |W f - T e|^2 + \lambda |W|^2` on features of unit variance.

    With C and G the second moments of features, and of features and embeddings, the solution is
    :math:`W = T G^T (C + \lambda I)^{-1}`, which does not need P. One eigendecomposition serves all strengths.

    Args:
        moments: C and G.
        text: ``(M, E)``.
        strengths: the :math:`\lambda`.

    Returns:
        One float64 tensor per strength, in units of the features times :attr:`Moments.scale`.
    """
    scale = moments.scale
    values, vectors = torch.linalg.eigh(scale[:, None] * moments.features * scale)
    goal = (text.detach().cpu().double() @ (moments.cross * scale[:, None]).T) @ vectors
    return [(goal / (values.clamp_min(0) + strength)) @ vectors.T for strength in strengths]


def unit_variance(weight: Tensor, moments: Moments) -> Tensor:
    """Rows scaled so that each concept map has variance 1 over images (mean over the cells)."""
    covariance = moments.scale[:, None] * moments.features * moments.scale
    variance = ((weight @ covariance) * weight).sum(1, keepdim=True)
    return weight / variance.clamp_min(1e-24).sqrt()
