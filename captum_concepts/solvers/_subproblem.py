"""The quadratic subproblem of one step, solved by accelerated proximal gradient with adaptive restart."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from captum_concepts.solvers._metric import SecantMetric
from captum_concepts.solvers.penalty import ElasticNet, soft_threshold

# With correlated columns, accelerated steps find the nonzeros quickly but their values slowly, so a linear system is
# solved for the values.
_POLISH_EVERY = 20
_POLISH_STEPS = 10


def minimise_model(
    metric: SecantMetric,
    gradient: Tensor,
    start: Tensor,
    penalty: ElasticNet,
    *,
    tol: float,
    max_iter: int,
) -> Tensor:
    """``argmin_V <gradient, V - start> + 1/2 |V - start|^2_metric + penalty(V)``, all (O, P), bias column last.

    Each coordinate is scaled by the metric's diagonal (its own Lipschitz bound per feature and class). The remaining
    common bound is found by checking the quadratic upper bound, without extra products. Momentum restarts whenever it
    points uphill (O'Donoghue and Candes, 2015).
    """
    diagonal = metric.diagonal
    scale = diagonal.clamp_min(1e-24 * float(diagonal.amax()) + 1e-60).rsqrt()
    l1, l2 = penalty.l1 * scale, penalty.l2 * scale.square()
    l1[:, -1] = 0
    l2[:, -1] = 0
    slope = gradient * scale
    origin = start / scale
    u, image_u = origin, torch.zeros_like(origin)
    v, image_v = u, image_u
    momentum, bound, first = 1.0, 1.0, -1.0
    for iteration in range(max_iter):
        if metric.blocks is not None and iteration % _POLISH_EVERY == _POLISH_EVERY - 1:
            for _ in range(_POLISH_STEPS):
                before = u
                u, image_u = _polish(metric, u, image_u, origin, slope, scale, l1, l2)
                if torch.equal(before == 0, u == 0):
                    break
            v, image_v, momentum = u, image_u, 1.0
        new = soft_threshold(v - (slope + image_v) / bound, l1 / bound) / (1 + l2 / bound)
        image = scale * metric.apply(scale * (new - origin))
        d = new - v
        du = new - u
        curved, length, uphill, step = torch.stack(
            [(d * (image - image_v)).sum(), (d * d).sum(), -(d * du).sum(), du.abs().amax()]
        ).tolist()
        if not math.isfinite(curved):
            break
        if curved > bound * length * (1 + 1e-4) and bound < 1e12:
            bound = max(1.3 * bound, 1.05 * curved / length)
            continue
        following = (1 + math.sqrt(1 + 4 * momentum * momentum)) / 2
        if uphill > 0:
            following, share = 1.0, 0.0
        else:
            share = (momentum - 1) / following
        v, image_v = new + share * du, image + share * (image - image_u)
        u, image_u, momentum = new, image, following
        first = step if first < 0 else first
        if step <= tol * first:
            break
    return u * scale


def _polish(
    metric: SecantMetric, u: Tensor, image: Tensor, origin: Tensor, slope: Tensor, scale: Tensor, l1: Tensor, l2: Tensor
) -> tuple[Tensor, Tensor]:
    """The exact solution on the nonzeros of ``u`` with their signs, or ``u`` if it does not lower the objective."""
    blocks = metric.blocks
    if blocks is None:
        return u, image
    sign = u.sign()
    sign[:, -1] = 0  # the bias is free
    face = u != 0
    face[:, -1] = True
    n_blocks = blocks.shape[0]
    keep = (face * scale).reshape(n_blocks, -1)
    shift = torch.where(face, l2 + 1e-10, torch.ones_like(u)).reshape(n_blocks, -1)
    system = keep[:, :, None] * blocks * keep[:, None, :] + torch.diag_embed(shift)
    factors, failed = torch.linalg.cholesky_ex(system)
    if bool((failed != 0).any()):
        return u, image
    right = -(slope + image + l2 * u + l1 * sign) * face
    step = torch.cholesky_solve(right.reshape(n_blocks, -1, 1), factors).view_as(u)

    def model(point: Tensor, its_image: Tensor) -> float:
        moved = point - origin
        smooth = (slope * moved).sum() + 0.5 * (moved * its_image).sum()
        return float(smooth + (l1 * point.abs()).sum() + 0.5 * (l2 * point.square()).sum())

    best = model(u, image)
    # Up to the first weight that reaches zero the subproblem is this quadratic, so that step always descends. It is
    # tried last, because longer steps that clip weights at zero usually descend more.
    ratio = torch.where(step * sign < 0, -u / step, torch.full_like(u, float("inf")))
    for share in (1.0, 0.5, 0.1, min(1.0, float(ratio.amin()))):
        point = u + share * step
        point = torch.where((point * sign < 0) | (ratio <= share), torch.zeros_like(point), point)
        its_image = scale * metric.apply(scale * (point - origin))
        if model(point, its_image) < best:
            return point, its_image
    return u, image
