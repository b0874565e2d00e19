"""Linear classifiers of rows, from the package or from Captum."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from captum_concepts.attr.spatial_acv.problem import LABEL_CONCEPT, LABEL_NEGATIVE
from captum_concepts.errors import InputError
from captum_concepts.solvers import fit_elastic_net

Trainer = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # x, y, row weights -> weight (C,), bias


def logistic_trainer(lam: float) -> Trainer:
    """L2 logistic regression with the package's solver, at a smaller tolerance for a weaker penalty."""
    tol = max(1e-5 * min(1.0, lam / 0.01), 1e-12)

    def train(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        basis = None
        if len(x) < x.shape[1] and x.device.type != "mps":
            # With a ridge and fewer rows than channels, the solution lies in the span of the rows, so the problem
            # has only as many unknowns as rows (x = R^T Q^T, w = Q u, |w| = |u|).
            basis, triangle = torch.linalg.qr(x.T)
            x = triangle.T.contiguous()
        result = fit_elastic_net(x, y, lam, alpha=0.0, loss="logistic", num_classes=2, sample_weight=weight, tol=tol)
        found, bias = torch.as_tensor(result.weight).to(x)[0], torch.as_tensor(result.bias).to(x).flatten()[0]
        return found if basis is None else basis @ found, bias

    return train


def captum_trainer(classifier: Any, seed: int) -> Trainer:
    """Any ``captum.concept`` ``Classifier``; it has no intercept, so one is fitted to its projections."""

    def train(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        # It does not support row weights, so both classes get equally many rows instead.
        generator = torch.Generator().manual_seed(seed)
        sides = [(y == label).nonzero().flatten() for label in (LABEL_NEGATIVE, LABEL_CONCEPT)]
        least = min(map(len, sides))
        rows = torch.cat([_shuffled(side, generator)[:least] for side in sides])
        rows = _shuffled(rows, generator)
        with reproducible(seed):
            classifier.train_and_eval(DataLoader(TensorDataset(x[rows], y[rows]), batch_size=1024))
        classes = [int(c) for c in classifier.classes()]
        w = torch.as_tensor(classifier.weights()).detach().to(x)
        if sorted(classes) != sorted((LABEL_CONCEPT, LABEL_NEGATIVE)) or w.ndim != 2 or w.shape[1] != x.shape[1]:
            raise InputError(
                f"the classifier has weights of shape {tuple(w.shape)} for classes {classes}; SpatialACV trains it on "
                f"the labels {LABEL_NEGATIVE} (negatives) and {LABEL_CONCEPT} (concept) and {x.shape[1]} features"
            )
        if len(w) == 2:
            direction = w[classes.index(LABEL_CONCEPT)] - w[classes.index(LABEL_NEGATIVE)]
        else:  # one row separates the first class from the second
            direction = w[0] if classes[-1] == LABEL_CONCEPT else -w[0]
        return calibrate(x, y, weight, direction)

    return train


def _shuffled(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator).to(rows.device)]


def calibrate(x: Tensor, y: Tensor, weight: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """``(a * direction, b)`` of a slightly penalized logistic regression on the projection alone, by Newton steps."""
    projection = (x @ direction).double() if x.device.type != "mps" else x @ direction
    spread = projection.std().clamp_min(1e-12)
    z, t, weight = projection / spread, (y == LABEL_CONCEPT).to(projection), weight.to(projection)
    design = torch.stack([z, torch.ones_like(z)], 1)
    theta = torch.zeros(2, dtype=z.dtype, device=z.device)
    theta[0] = torch.sign((z * (2 * t - 1) * weight).sum())  # start with the sign of the data
    ridge = torch.tensor([1e-3, 1e-9], dtype=z.dtype, device=z.device) * weight.sum()
    for _ in range(50):
        p = torch.sigmoid(design @ theta)
        gradient = design.T @ (weight * (p - t)) + ridge * theta
        hessian = (design.T * (weight * p * (1 - p) + 1e-6)) @ design + torch.diag(ridge)
        step = torch.linalg.solve(hessian, gradient)
        theta = theta - step.clamp(-2, 2)
        if float(step.abs().max()) < 1e-8:
            break
    # The direction is never reversed; if it points away from the concept, the accuracy must show it.
    slope = (theta[0].abs() / spread).clamp_min(1e-12)
    return direction * slope.to(direction), theta[1].to(direction)


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seed the global random states that third-party classifiers draw from, and restore them."""
    import numpy as np

    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators too
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
