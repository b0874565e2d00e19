"""From rows of a concept and of negatives to its vector, its held-out accuracy and what can be said about it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from captum_concepts.attr._acv_rows import GuidanceRows
from captum_concepts.attr._acv_statistics import balanced_accuracy
from captum_concepts.errors import InputError
from captum_concepts.solvers import fit_elastic_net

LABEL_CONCEPT, LABEL_NEGATIVE = 1, 0
Trainer = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # x, y, row weights -> weight (C,), bias


@dataclass(frozen=True)
class FittedConcept:
    """One concept's vector and how well it separates images it was not fitted on.

    Args:
        vector: ``(C,)`` unit length, towards the concept.
        slope, intercept: the probability of the concept at an activation a is sigmoid(slope * a.v + intercept).
        accuracy: held-out balanced accuracy of positions, chance 0.5.
        interval: its 95 % confidence interval.
        contrast: held-out (mean of a.v on the concept - on the negatives) / their standard deviation.
    """

    vector: Tensor
    slope: float
    intercept: float
    accuracy: float
    interval: tuple[float, float]
    contrast: float


@dataclass(frozen=True)
class Problem:
    """Both classes as one table, centred and divided by one number, so that ``lam`` means the same at any layer.

    One number, not one a channel: then the solution turns with the features, and channels that hardly vary are
    not blown up.
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
        return int(self.fold.max()) + 1

    def rows_in(self, fold: int) -> Tensor:
        """``(m,)`` mask of the rows whose image is held out in ``fold``."""
        return (self.fold == fold)[self.image]


def make_problem(concept: GuidanceRows, negatives: GuidanceRows, name: str, folds: int, seed: int) -> Problem:
    """Join concept and negatives and deal their images to folds.

    Raises:
        InputError: fewer than two different images on a side, or a layer that is the same everywhere.
    """
    for rows, what in ((concept, f"concept {name!r}"), (negatives, f"the negatives of {name!r}")):
        if len(rows.digests) < 2:
            raise InputError(
                f"{what}: {rows.images} guidance image{'s' * (rows.images != 1)}, {len(rows.digests)} different; give "
                "at least 2 different images, so that accuracy can be measured on images held out of the fit"
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
            f"the layer gives the same activation at every position of {name!r} and of its negatives, so it can tell "
            "nothing apart; choose another layer"
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


def fit_concept(problem: Problem, train: Trainer) -> FittedConcept:
    """The concept's vector from all rows, its accuracy from fits that left images out."""
    right = torch.zeros(len(problem.label), dtype=torch.float64)
    contrasts = []
    for fold in range(problem.folds):
        held = problem.rows_in(fold)
        weight, bias = _train(problem, ~held, train)
        score = problem.x[held] @ weight + bias
        y = problem.y[held]
        per_image = _mean_by_image(((score > 0) == (y == LABEL_CONCEPT)).float(), problem.image[held], len(right))
        right += per_image.cpu().double()
        contrasts.append(_contrast(score, y))
    # An image of which the row budget left nothing says nothing.
    present = (torch.bincount(problem.image, minlength=len(problem.label)) > 0).cpu()
    accuracy, interval = balanced_accuracy(right[present], problem.label.cpu()[present] == LABEL_CONCEPT)
    weight, bias = _train(problem, slice(None), train)
    length = float(weight.norm())
    if not math.isfinite(length) or length == 0:
        raise InputError("the classifier gives no direction: its weights are zero or not finite; use a weaker penalty")
    vector = weight / length
    slope = length / problem.scale
    intercept = float(bias) - slope * float(problem.center @ vector)
    return FittedConcept(vector, slope, intercept, accuracy, interval, sum(contrasts) / len(contrasts))


def _train(problem: Problem, rows: Tensor | slice, train: Trainer) -> tuple[Tensor, Tensor]:
    x, y = problem.x[rows], problem.y[rows]
    positive = y == LABEL_CONCEPT
    # Both classes weigh the same however many images each has; so chance is 0.5 and the intercept means something.
    share = len(y) / 2
    weight = torch.where(positive, share / positive.sum().clamp_min(1), share / (~positive).sum().clamp_min(1))
    return train(x, y, weight.to(x.dtype))


def logistic_trainer(lam: float) -> Trainer:
    """L2 logistic regression with the package's solver."""

    def train(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        basis = None
        if len(x) < x.shape[1] and x.device.type != "mps":
            # Fewer rows than channels: with a ridge the solution lies in the span of the rows, so the same problem
            # has as many unknowns as rows (x = R^T Q^T, w = Q u, |w| = |u|).
            basis, triangle = torch.linalg.qr(x.T)
            x = triangle.T.contiguous()
        result = fit_elastic_net(x, y, lam, alpha=0.0, loss="logistic", num_classes=2, sample_weight=weight, tol=1e-5)
        found, bias = torch.as_tensor(result.weight).to(x)[0], torch.as_tensor(result.bias).to(x).flatten()[0]
        return found if basis is None else basis @ found, bias

    return train


def captum_trainer(classifier: Any, seed: int) -> Trainer:
    """Any ``captum.concept`` ``Classifier``; it has no intercept, so one is fitted to its projections."""

    def train(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        # It knows no row weights: both classes get equally many rows instead.
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
                f"the classifier gives weights {tuple(w.shape)} for classes {classes}; SpatialACV trains it on the "
                f"labels {LABEL_NEGATIVE} (negatives) and {LABEL_CONCEPT} (concept) and {x.shape[1]} features"
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
    """``(a * direction, b)``: logistic regression on the projection alone, slightly penalised, by Newton steps."""
    projection = (x @ direction).double() if x.device.type != "mps" else x @ direction
    spread = projection.std().clamp_min(1e-12)
    z, t, weight = projection / spread, (y == LABEL_CONCEPT).to(projection), weight.to(projection)
    design = torch.stack([z, torch.ones_like(z)], 1)
    theta = torch.zeros(2, dtype=z.dtype, device=z.device)
    theta[0] = torch.sign((z * (2 * t - 1) * weight).sum())  # from the right side: the sign of the data
    ridge = torch.tensor([1e-3, 1e-9], dtype=z.dtype, device=z.device) * weight.sum()
    for _ in range(50):
        p = torch.sigmoid(design @ theta)
        gradient = design.T @ (weight * (p - t)) + ridge * theta
        hessian = (design.T * (weight * p * (1 - p) + 1e-6)) @ design + torch.diag(ridge)
        step = torch.linalg.solve(hessian, gradient)
        theta = theta - step.clamp(-2, 2)
        if float(step.abs().max()) < 1e-8:
            break
    # A direction is never turned round here: that it points away from the concept must show in the accuracy.
    slope = (theta[0].abs() / spread).clamp_min(1e-12)
    return direction * slope.to(direction), theta[1].to(direction)


def _contrast(score: Tensor, y: Tensor) -> float:
    score, y = score.cpu().double(), y.cpu()
    a, b = score[y == LABEL_CONCEPT], score[y == LABEL_NEGATIVE]
    spread = ((a.var(unbiased=False) + b.var(unbiased=False)) / 2).sqrt()
    return float((a.mean() - b.mean()) / spread.clamp_min(1e-12)) if len(a) and len(b) else 0.0


def _mean_by_image(values: Tensor, image: Tensor, images: int) -> Tensor:
    """``(I,)`` or ``(I, R)``: mean of ``(m,)`` or ``(m, R)`` over the rows of each image; 0 for images without rows."""
    total = values.new_zeros(images, *values.shape[1:]).index_add_(0, image, values)
    count = torch.bincount(image, minlength=images).clamp_min(1).to(values)
    return total / count.view(-1, *[1] * (values.ndim - 1))


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seed the global random states that third-party classifiers draw from, and put them back."""
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
