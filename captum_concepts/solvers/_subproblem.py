"""The quadratic subproblem of one step, which needs no rows: accelerated proximal gradient with adaptive restart."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from captum_concepts.solvers._metric import SecantMetric
from captum_concepts.solvers.penalty import ElasticNet, soft_threshold


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

    Every coordinate is scaled by the metric's diagonal (a Lipschitz bound of its own for each feature and class); the
    common bound that is left is found by checking the quadratic upper bound, at no extra product. Momentum restarts
    whenever it points uphill (O'Donoghue and Candes, 2015).
    """
    diagonal = metric.diagonal
    scale = diagonal.clamp_min(1e-14 * diagonal.amax()).rsqrt()
    l1, l2 = penalty.l1 * scale, penalty.l2 * scale.square()
    l1[:, -1] = 0
    l2[:, -1] = 0
    slope = gradient * scale
    origin = start / scale
    u, image_u = origin, torch.zeros_like(origin)
    v, image_v = u, image_u
    momentum, bound, first = 1.0, 1.0, -1.0
    for _ in range(max_iter):
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
