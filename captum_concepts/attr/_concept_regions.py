"""From derivatives to regions: the published map of one layer, and the fused map of all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST_POSITIONS = 1024  # of the fused grid: its affinity has the square of that many entries
STEPS = 3
LOCAL = 1.0  # weight of the local reading: one more layer
FAINT = 0.05  # root mean square of a local reading below which it counts less: it is nearly the same everywhere
CONTRAST = 0.5  # share of the other likely concepts that is subtracted
TEMPERATURE = 3.0  # of the softmax that says which are likely: half a dozen instead of one


def published_maps(betas: Sequence[Tensor], maps: Sequence[Tensor], choice: Tensor, grid: tuple[int, int]) -> Tensor:
    """``(N, J, h, w)``: ReLU(sum_k beta_k A_k) of the layer ``choice[n, j]``, resized to ``grid``."""
    out = maps[0].new_zeros((*choice.shape, *grid))
    for layer, (beta, activation) in enumerate(zip(betas, maps, strict=True)):
        here = choice == layer
        if here.any():
            region = torch.einsum("njc,nchw->njhw", beta.to(activation), activation).relu()
            out = torch.where(here[:, :, None, None], resize(region, grid), out)
    return out


def resize(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bilinear, pixel areas aligned; the same tensor where the grid is right already."""
    if tuple(maps.shape[-2:]) == tuple(grid):
        return maps
    return F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)


def finest_grid(grids: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The grid with the most positions."""
    return max(grids, key=lambda grid: grid[0] * grid[1])


def fused_grid(grids: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The finest grid, divided by the smallest whole number that leaves at most 1,024 positions."""
    return coarser_grid(finest_grid(grids), _MOST_POSITIONS)


def coarser_grid(grid: tuple[int, int], most: int) -> tuple[int, int]:
    """``grid`` divided by the smallest whole number that leaves at most ``most`` positions."""
    height, width = grid
    factor = 1
    while -(-height // factor) * -(-width // factor) > most:
        factor += 1
    return -(-height // factor), -(-width // factor)


def fused_maps(
    evidence: Sequence[Tensor], affinity: Tensor, grid: tuple[int, int], local: Tensor | None = None
) -> Tensor:
    """``(N, J, h, w)``: positive evidence of all layers, each of mean square 1, spread along the affinity.

    Equal energy, not equal maxima: one bright cell, as first layers have at edges and late ones at borders, would make
    the rest of its layer count for little. The affinity's rows sum to 1, so every value of the result is a weighted
    mean of evidence: spreading moves evidence within what the network sees as alike, and a concept without positive
    evidence keeps a map of zeros.

    Args:
        evidence: ``(N, J, h_l, w_l)`` each, signed.
        affinity: ``(N, P, P)`` of :func:`feature_affinity` on ``grid``.
        local: ``(N, J, h, w)`` what each position says alone, in [0, 1]; it counts as one more layer.
    """
    total = torch.zeros(())
    for layer in evidence:
        positive = resize(layer.relu(), grid)
        total = total.to(positive) + _equal_energy(positive, 1e-12)
    if local is not None:
        total = total + LOCAL * _equal_energy(resize(local.to(total), grid), FAINT)
    spread = total.flatten(2)
    for _ in range(STEPS):
        spread = spread @ affinity.transpose(1, 2).to(spread)
    return spread.unflatten(2, grid)


def _equal_energy(maps: Tensor, least: float) -> Tensor:
    # Divided by the maximum first: squares of tiny gradients underflow.
    peak = maps.amax((2, 3), keepdim=True)
    shape = maps / peak.clamp(min=1e-30)
    energy = shape.square().mean((2, 3), keepdim=True).sqrt()
    return shape / torch.maximum(energy, least / peak.clamp(min=1e-30))


def feature_affinity(maps: Sequence[Tensor], grid: tuple[int, int], image: Tensor | None = None) -> Tensor:
    r"""``(N, P, P)`` with unit row sums: how alike the network itself finds two positions.

    .. math:: W_{pq} \propto \max(\cos_{pq}, 0)^2 \exp(-|c_p - c_q|^2 / 2 \sigma^2)

    cos is the mean over the layers of the cosine of unit features, the image's mean removed; c the mean colour, with
    :math:`\sigma^2` its variance over the image.

    Args:
        maps: ``(N, C_l, h_l, w_l)`` activations; the first and the last layer are left out where there are more than
            two: one sees edges rather than things, the other is coarse.
        image: ``(N, c, H, W)``; None leaves colour out.
    """
    middle = maps[1:-1] if len(maps) > 2 else maps
    total = torch.zeros(())
    for activation in middle:
        unit = F.normalize(resize(activation, grid).flatten(2), dim=1)
        unit = F.normalize(unit - unit.mean(2, keepdim=True), dim=1)
        total = total.to(unit) + unit.transpose(1, 2) @ unit
    weights = (total / len(middle)).clamp(min=0).square()
    if image is not None:
        colour = F.adaptive_avg_pool2d(image.detach().to(weights), grid).flatten(2).transpose(1, 2)
        variance = (colour - colour.mean(1, keepdim=True)).square().sum(2).mean(1).clamp(min=1e-12)
        weights = weights * torch.exp(-torch.cdist(colour, colour).square() / (2 * variance[:, None, None]))
    return weights / weights.sum(2, keepdim=True).clamp(min=1e-12)
