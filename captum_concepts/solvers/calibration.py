"""Platt's logistic calibration of scores to the probability that a concept is present."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_concepts._checks import name_positions
from captum_concepts.errors import InputError, shortened


@dataclass(frozen=True)
class Calibration:
    """Probabilities :math:`\\sigma(a_t s + b_t)` of T concepts, increasing in their scores.

    Args:
        slopes, intercepts: ``(T,)``, NaN for concepts without calibration.
    """

    slopes: Tensor
    intercepts: Tensor

    def __call__(self, scores: Tensor) -> Tensor:
        """``(N, T)`` probabilities for ``(N, T)`` scores."""
        return torch.sigmoid(scores * self.slopes.to(scores) + self.intercepts.to(scores))


def fit_calibration(scores: Tensor, truth: Tensor, weight: Tensor | None = None) -> Calibration:
    r"""The maximum-likelihood increasing logistic function from scores to truth, per concept.

    The targets are Platt's, :math:`(n_+ + 1)/(n_+ + 2)` and :math:`1/(n_- + 2)`, so that few examples never lead to
    probabilities of 0 or 1. For uninformative scores the probability is the frequency of the concept.

    Args:
        scores: ``(N, T)``.
        truth: ``(N, T)`` bool.
        weight: ``(N,)`` or ``(N, T)`` of the examples; None weights all equally.

    Raises:
        InputError: wrong shapes, no example, NaN or infinite scores, truth other than 0 and 1, or a negative weight.

    Reference:
        Platt, J. *Probabilistic outputs for support vector machines.* Advances in Large Margin Classifiers, 1999.

    Example:
        >>> scores = torch.tensor([[-2.0], [-1.0], [0.5], [-0.5], [1.0], [2.0]])
        >>> calibrated = fit_calibration(scores, torch.tensor([[0], [0], [0], [1], [1], [1]]).bool())
        >>> [round(p, 2) for p in calibrated(torch.tensor([[-2.0], [0.0], [2.0]]))[:, 0].tolist()]
        [0.22, 0.5, 0.78]
    """
    check_calibration(scores, truth, weight)
    scores, truth = scores.detach().double().cpu(), truth.detach().cpu()
    weights = torch.ones_like(scores) if weight is None else weight.detach().double().cpu()
    weights = weights[:, None].expand_as(scores) if weights.ndim == 1 else weights
    rows = [_platt(s, y, w) for s, y, w in zip(scores.T, truth.bool().T, weights.T, strict=True)]
    slopes, intercepts = torch.tensor(rows, dtype=torch.float64).reshape(-1, 2).T
    return Calibration(slopes.float().contiguous(), intercepts.float().contiguous())


def check_calibration(scores: Tensor, truth: Tensor, weight: Tensor | None) -> None:
    """Raise for what :func:`fit_calibration` would calibrate wrongly.

    Raises:
        InputError: as there.
    """
    for name, value in (("scores", scores), ("truth", truth), ("weight", weight)):
        if not isinstance(value, Tensor) and not (name == "weight" and value is None):
            raise InputError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if scores.ndim != 2 or not len(scores) or scores.shape != truth.shape:
        raise InputError(
            f"scores {tuple(scores.shape)} and truth {tuple(truth.shape)} must both be (N, T), at least one row"
        )
    if not bool(scores.isfinite().all()):
        raise InputError("scores contain NaN or infinite values; leave these examples out")
    if not bool(((truth == 0) | (truth == 1)).all()):
        raise InputError(f"truth must be bools, or numbers 0 and 1, got {shortened(truth.unique().tolist())}")
    if weight is not None and tuple(weight.shape) not in ((len(scores),), tuple(scores.shape)):
        raise InputError(
            f"weight must be ({len(scores)},) or {tuple(scores.shape)} for scores {tuple(scores.shape)}, got "
            f"{tuple(weight.shape)}"
        )
    if weight is not None and not bool((weight.isfinite() & (weight >= 0)).all()):
        raise InputError("weight must be finite and non-negative")


def _platt(scores: Tensor, truth: Tensor, weight: Tensor) -> tuple[float, float]:
    """Slope and intercept of one concept, by Newton's method."""
    center, spread = float(scores.mean()), float(scores.std(unbiased=False)) if len(scores) else 0.0
    spread = spread if spread > 1e-12 * max(abs(center), 1e-30) else 1.0
    z = (scores - center) / spread
    up, down = float(weight[truth].sum()), float(weight[~truth].sum())
    target = torch.where(truth, (up + 1) / (up + 2), 1 / (down + 2)).double()
    design = torch.stack([z, torch.ones_like(z)], 1)
    theta = torch.tensor([0.0, 0.0], dtype=torch.float64)
    ridge = 1e-6 * (up + down + 1)

    def loss(at: Tensor) -> float:
        logits = design @ at
        values = torch.nn.functional.softplus(logits) - target * logits
        return float((weight * values).sum() + ridge / 2 * at.square().sum())

    for _ in range(100):
        p = torch.sigmoid(design @ theta)
        gradient = design.T @ (weight * (p - target)) + ridge * theta
        hessian = (design.T * (weight * p * (1 - p))) @ design + ridge * torch.eye(2, dtype=torch.float64)
        step = torch.linalg.solve(hessian, gradient)
        now, size = loss(theta), 1.0
        while loss(theta - size * step) > now and size > 1e-6:
            size /= 2
        theta = theta - size * step
        if float(step.abs().max()) < 1e-9:
            break
    if float(theta[0]) < 0:  # decreasing, so the scores are not informative
        rate = (up + 1) / (up + down + 2)
        return 0.0, float(torch.logit(torch.tensor(rate, dtype=torch.float64)))
    return float(theta[0]) / spread, float(theta[1]) - float(theta[0]) * center / spread


def truth_table(labels: Any, concepts: Sequence[str], count: int) -> Tensor:
    """``(count, T)`` bool, which concepts each image shows.

    Args:
        labels: one entry per image, a concept (name or index), a list of concepts, or None for no concept; or a bool
            table ``(count, T)``; or ``{concept: one bool per image}`` for all concepts.
        concepts: the T names.
        count: the number of images.

    Raises:
        InputError: wrong number of images, unknown concept, a table of the wrong shape or with other values than 0 and
            1, or lists of 0 and 1 that may be indices as well as a table.

    >>> truth_table(["a", ["a", "b"], None], ["a", "b"], 3).int().tolist()
    [[1, 0], [1, 1], [0, 0]]
    """
    check_labels(labels, concepts, count)
    if isinstance(labels, Mapping):
        missing = [name for name in concepts if name not in labels]
        if missing:
            raise InputError(f"labels have no entry for {missing[:5]}; pass one list of bools per concept")
        labels = torch.stack([torch.as_tensor(labels[name]).bool() for name in concepts], 1)
    if hasattr(labels, "shape") and len(labels.shape) == 2:
        table = torch.as_tensor(labels)
        if table.shape != (count, len(concepts)) or not bool(((table == 0) | (table == 1)).all()):
            raise InputError(f"labels {tuple(table.shape)} must be bools ({count}, {len(concepts)})")
        return table.bool().cpu()
    rows = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    if len(rows) != count:
        raise InputError(f"{len(rows)} labels for {count} images; pass one per image")
    table = torch.zeros(count, len(concepts), dtype=torch.bool)
    for number, row in enumerate(rows):
        if row is not None and not (isinstance(row, (list, tuple)) and not row):
            table[number, name_positions(row, concepts)] = True
    return table


def check_labels(labels: Any, concepts: Sequence[str], count: int) -> None:
    """Raise for labels that :func:`truth_table` would misread.

    Raises:
        InputError: as there.
    """
    if isinstance(labels, str) or not (isinstance(labels, Iterable) or hasattr(labels, "tolist")):
        raise InputError(
            "labels must be a list with one concept, list of concepts or None per image, a bool table, or {concept: "
            f"bools}}; got {shortened(labels)}"
        )
    if isinstance(labels, Mapping):
        for name in concepts:
            if name in labels:
                check_column(name, labels[name], count)
    rows = labels if isinstance(labels, (list, tuple)) else []
    digits = [
        isinstance(row, (list, tuple))
        and len(row) == len(concepts)
        and all(isinstance(value, int) and not isinstance(value, bool) and value in (0, 1) for value in row)
        for row in rows
    ]
    if len(concepts) > 1 and rows and all(digits):
        raise InputError(
            f"labels {shortened(labels)} may be a table of 0 and 1 as well as lists of indices; pass a table as a bool "
            "tensor, as in torch.tensor(labels).bool(), or lists of names"
        )


def check_column(name: str, values: Any, count: int) -> None:
    """Raise unless ``values`` are ``count`` bools, or numbers 0 and 1."""
    try:
        column = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"labels[{name!r}] must be {count} bools, got {shortened(values)}") from error
    if column.shape != (count,) or not bool(((column == 0) | (column == 1)).all()):
        raise InputError(f"labels[{name!r}] must be {count} bools, one per image, got {shortened(values)}")
