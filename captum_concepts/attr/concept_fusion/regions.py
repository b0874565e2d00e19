"""Concept maps from derivatives: the published map of one layer, and the fused map of all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST_POSITIONS = 1024  # of the fused grid, whose affinity has the square of that many entries
STEPS = 3
SHARE = 2  # power of the fraction of a concept's relevance that lies at a layer or after it
LOCAL = 1.0  # weight of the local reading, as one more layer
# Minimum fraction of a reading, evidence or feature that is normalized to full size; a smaller remainder may be the
# rounding error of a difference, which normalization would amplify to a map.
FAINT = 0.05
UNMOVED = 1e-2  # total relevance below which it does not determine the layer of a concept
CONTRAST = 0.5  # fraction of the other likely concepts that is subtracted
TEMPERATURE = 3.0  # of the softmax over likely concepts, so that about half a dozen count instead of one


def published_maps(betas: Sequence[Tensor], maps: Sequence[Tensor], choice: Tensor, grid: tuple[int, int]) -> Tensor:
    """``(N, J, h, w)`` maps ReLU(sum_k beta_k A_k) of the layer ``choice[n, j]``, resized to ``grid``."""
    out = maps[0].new_zeros((*choice.shape, *grid))
    for layer, (beta, activation) in enumerate(zip(betas, maps, strict=True)):
        here = choice == layer
        if here.any():
            region = torch.einsum("njc,nchw->njhw", beta.to(activation), activation).relu()
            out = torch.where(here[:, :, None, None], resize(region, grid), out)
    return out


def resize(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """``maps`` resized bilinearly with aligned pixel areas; the same tensor if the grid already matches."""
    if tuple(maps.shape[-2:]) == tuple(grid):
        return maps
    return F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)


def finest_grid(grids: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The grid with the most positions."""
    return max(grids, key=lambda grid: grid[0] * grid[1])


def fused_grid(grids: Sequence[tuple[int, int]], pixels: tuple[int, int] | None = None) -> tuple[int, int]:
    """The finest grid, divided by the smallest integer that leaves at most 1,024 positions.

    A smaller grid is multiplied by the largest integer that keeps it within 1,024 positions and within ``pixels``, so
    that the image's colors can locate boundaries inside a coarse cell.
    """
    height, width = coarser_grid(finest_grid(grids), _MOST_POSITIONS)
    most = pixels if pixels is not None else (height, width)
    factor = 1
    while (
        (height * (factor + 1)) * (width * (factor + 1)) <= _MOST_POSITIONS
        and height * (factor + 1) <= most[0]
        and width * (factor + 1) <= most[1]
    ):
        factor += 1
    return height * factor, width * factor


def coarser_grid(grid: tuple[int, int], most: int) -> tuple[int, int]:
    """``grid`` divided by the smallest integer that leaves at most ``most`` positions."""
    height, width = grid
    factor = 1
    while -(-height // factor) * -(-width // factor) > most:
        factor += 1
    return -(-height // factor), -(-width // factor)


def fused_maps(
    evidence: Sequence[Tensor],
    affinity: Tensor,
    grid: tuple[int, int],
    local: Tensor | None = None,
    relevance: Tensor | None = None,
) -> Tensor:
    r"""``(N, J, h, w)`` sums of the layers' positive evidence, each of mean square 1 and spread along the affinity.

    A layer's positive evidence below ``FAINT`` of its signed evidence (root mean squares) has less than mean square 1.

    Layers have equal energy instead of equal maxima, because a single bright cell, as first layers have at edges and
    late ones at borders, would suppress the rest of its layer. The affinity's rows sum to 1, so spread evidence is a
    weighted mean, and a concept without positive evidence has a map of zeros.

    With :math:`g_l` the spread evidence, the result is :math:`\sum_l a_l \, \rho_l^2 \, g_l + g_{local}`, where

    - :math:`\rho_l = \sum_{m \ge l} r_m / \sum_m r_m` is the fraction of the concept's relevance at layer l or after
      it, and thus the fraction that the derivative at layer l captures;
    - :math:`a_l = \max(0, \operatorname{corr}(g_l, \sum_m \rho_m^2 g_m + g_{local}))` is the layer's agreement with
      all of them.

    Args:
        evidence: ``(N, J, h_l, w_l)`` each, signed, in execution order of the layers.
        affinity: ``(N, P, P)`` of :func:`feature_affinity` on ``grid``.
        local: ``(N, J, h, w)`` evidence of each position alone, in [0, 1]; it counts as one more layer.
        relevance: ``(N, J, L)`` r, of which the positive part is used; None or all zeros: :math:`\rho = 1`.
    """

    def spread(maps: Tensor) -> Tensor:
        flat = maps.flatten(2)
        for _ in range(STEPS):
            flat = flat @ affinity.transpose(1, 2).to(flat)
        return flat.unflatten(2, grid)

    layers = torch.stack([spread(_equal_energy(resize(e.relu(), grid), _faint_energy(e))) for e in evidence], -1)
    weights = layers.new_ones((*layers.shape[:2], len(evidence)))
    if relevance is not None:
        positive = relevance.to(layers).clamp(min=0)
        behind = positive.flip(-1).cumsum(-1).flip(-1)
        weights = ((behind + UNMOVED) / (behind[..., :1] + UNMOVED)) ** SHARE
    alone = torch.zeros_like(layers[..., 0])
    if local is not None:
        alone = LOCAL * spread(_equal_energy(resize(local.to(layers), grid), FAINT))
    everything = torch.einsum("njhwl,njl->njhw", layers, weights) + alone
    agreement = _correlation(layers, everything.unsqueeze(-1)).clamp(min=0)
    # Uniform evidence does not locate the concept, but is kept.
    agreement = torch.where(agreement.any(-1, keepdim=True), agreement, torch.ones_like(agreement))
    return torch.einsum("njhwl,njl->njhw", layers, weights * agreement) + alone


def of_strongest(maps: Tensor) -> Tensor:
    """Maps as fractions of their strongest position, in [0, 1], so that wide and narrow ones are comparable.

    Maps with a maximum below ``FAINT`` stay faint.
    """
    return maps / maps.amax((2, 3), keepdim=True).clamp(min=FAINT)


def _correlation(maps: Tensor, other: Tensor) -> Tensor:
    """``(N, J, L)`` correlations over the positions of ``(N, J, h, w, L)``; 0 for maps constant up to rounding."""
    one, two = (m - m.mean((2, 3), keepdim=True) for m in (maps, other))
    lengths = [m.square().sum((2, 3)).sqrt() for m in (one, two)]
    varies = [size > 1e-4 * m.square().sum((2, 3)).sqrt() for size, m in zip(lengths, (maps, other), strict=True)]
    product = (one * two).sum((2, 3)) / (lengths[0] * lengths[1]).clamp(min=1e-12)
    return torch.where(varies[0] & varies[1], product, torch.zeros_like(product))


def _faint_energy(evidence: Tensor) -> Tensor:
    """``(N, J, 1, 1)`` root mean squares of signed evidence, times ``FAINT``."""
    peak = evidence.abs().amax((2, 3), keepdim=True).clamp(min=1e-30)
    return (FAINT * peak * (evidence / peak).square().mean((2, 3), keepdim=True).sqrt()).clamp(min=1e-12)


def _equal_energy(maps: Tensor, least: Tensor | float) -> Tensor:
    # Divide by the maximum first, because squares of tiny gradients underflow.
    peak = maps.amax((2, 3), keepdim=True)
    shape = maps / peak.clamp(min=1e-30)
    energy = shape.square().mean((2, 3), keepdim=True).sqrt()
    return shape / torch.maximum(energy, least / peak.clamp(min=1e-30))


def feature_affinity(maps: Sequence[Tensor], grid: tuple[int, int], image: Tensor | None = None) -> Tensor:
    r"""``(N, P, P)`` similarities of positions in the network's features, with unit row sums.

    .. math:: W_{pq} \propto \max(\cos_{pq}, 0)^2 \exp(-|c_p - c_q|^2 / 2 \sigma^2), \quad \cos_{pp} = 1

    cos is the mean over the layers of the cosine of unit features after the image's mean is subtracted, and c is the
    mean color, with :math:`\sigma^2` its variance over the image. Features below ``FAINT`` of the mean length, before
    or after the mean is subtracted, stay shorter than 1 and are similar only to themselves.

    Args:
        maps: ``(N, C_l, h_l, w_l)`` activations in execution order. With more than two layers, the first, which
            responds to edges instead of objects, and the last, which is coarse, are left out.
        image: ``(N, c, H, W)``; None ignores color.
    """
    middle = maps[1:-1] if len(maps) > 2 else maps
    total = torch.zeros(())
    for activation in middle:
        features = resize(activation, grid).flatten(2)
        length = features.norm(dim=1, keepdim=True)
        unit = features / torch.maximum(length, FAINT * length.mean(2, keepdim=True)).clamp(min=1e-12)
        unit = unit - unit.mean(2, keepdim=True)
        unit = unit / unit.norm(dim=1, keepdim=True).clamp(min=FAINT)
        total = total.to(unit) + unit.transpose(1, 2) @ unit
    weights = (total / len(middle)).clamp(min=0).square()
    weights.diagonal(dim1=1, dim2=2).fill_(1)
    if image is not None:
        # Subtract the mean twice, before averages over cells are rounded and before squares are subtracted.
        pixels = image.detach().to(weights)
        colour = F.adaptive_avg_pool2d(pixels - pixels.mean((2, 3), keepdim=True), grid).flatten(2).transpose(1, 2)
        colour = colour - colour.mean(1, keepdim=True)
        variance = colour.square().sum(2).mean(1).clamp(min=1e-12)
        weights = weights * torch.exp(-torch.cdist(colour, colour).square() / (2 * variance[:, None, None]))
    return weights / weights.sum(2, keepdim=True).clamp(min=1e-12)
