"""Value, residual, curvature and dual quantities of logistic losses for one chunk of logits.

A loss is independent of features, penalties and solvers. It maps logits ``Z`` (m, O) and labels ``y`` (m,) to sums over
the rows, which can be added over chunks and processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

#: Position of the dual bound's second chord between labels (0) and predictions (1).
TIGHT_TAU = 0.99


class LossTerms(NamedTuple):
    """Sums over the rows of one chunk, with row weights s and predicted probabilities p.

    Attributes:
        value: sum of s * loss, 0-d.
        residual: s * (p - onehot(y)), (m, O), the derivative of the sum by the logits.
        curvature: terms for the shape of steps, or None if not requested.
        dual: terms for the duality gap, or None if not requested.
    """

    value: Tensor
    residual: Tensor
    curvature: CurvatureTerms | None
    dual: DualTerms | None


class CurvatureTerms(NamedTuple):
    """Curvature by the logits: ``output`` (O,) sums of s p (1 - p), ``row`` (m,) s sum_k p_k (1 - p_k), and p."""

    output: Tensor
    row: Tensor
    probability: Tensor


class DualTerms(NamedTuple):
    """Sums for the dual bound, and extremes over the chunk.

    Attributes:
        negentropy: sum of s * sum_k p_k log p_k, 0-d, minus the dual objective at the residual.
        negentropy_tight: the same at ``(1 - TIGHT_TAU) onehot(y) + TIGHT_TAU p``.
        margin: minimum margin of the rows with positive weight, 0-d; positive if every row is classified correctly.
        floor: minimum log-sum-exp of the rows, 0-d.
    """

    negentropy: Tensor
    negentropy_tight: Tensor
    margin: Tensor
    floor: Tensor


class BiasMixture(NamedTuple):
    """A constant prediction ``u`` (O,) and its fraction for which the mean prediction equals the label mean."""

    share: float
    prediction: Tensor
    negentropy: float


class Loss(ABC):
    """A logistic loss with O outputs over K classes."""

    num_outputs: int
    num_classes: int

    @abstractmethod
    def terms(
        self, logits: Tensor, y: Tensor, weight: Tensor | None, *, curvature: bool = False, dual: bool = False
    ) -> LossTerms:
        """The sums of one chunk; ``logits`` (m, O), ``y`` (m,) in 0..K-1, ``weight`` (m,) or None for ones.

        Args:
            logits, y, weight: the chunk.
            curvature, dual: also compute these; most passes of a solver need neither.
        """

    @abstractmethod
    def null_bias(self, fractions: Tensor) -> Tensor:
        """The best bias (O,) of a model without features, given the class fractions (K,)."""

    @abstractmethod
    def label_moments(self, class_sums: Tensor) -> Tensor:
        """The mean of onehot(y) x^T (O, D), from that of every class (K, D)."""

    @abstractmethod
    def bias_mixture(self, residual_mean: Tensor, fractions: Tensor) -> BiasMixture:
        """The mixture of predictions with a constant for which the bias is exactly optimal (dual feasible).

        With predictions of mean ``ybar + r``, ``(1 - e) p + e u`` has mean ``ybar`` for ``u = ybar - r / rho`` and
        ``e = rho / (1 + rho)``. Here rho is the smallest for which u is a probability.
        """

    def null_value(self, fractions: Tensor) -> float:
        """The loss of the best model without features, i.e. the entropy of the class fractions, in nats."""
        return float(-torch.special.xlogy(fractions, fractions).sum())


class MultinomialLoss(Loss):
    """Softmax cross-entropy ``loss(z, y) = log sum_k exp(z_k) - z_y`` with one output per class.

    >>> import torch
    >>> loss = MultinomialLoss(2)
    >>> round(float(loss.terms(torch.zeros(3, 2), torch.tensor([0, 1, 1]), None).value / 3), 4)  # log 2
    0.6931
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.num_outputs = num_classes

    def terms(
        self, logits: Tensor, y: Tensor, weight: Tensor | None, *, curvature: bool = False, dual: bool = False
    ) -> LossTerms:
        acc = _wide(logits)
        own_column = y[:, None]
        lse = torch.logsumexp(logits, 1)
        own = logits.gather(1, own_column).squeeze(1)
        p = torch.exp(logits - lse[:, None])
        value = _dot(lse - own, weight, acc)
        second = self._curvature(p, weight, acc) if curvature else None
        bound = self._dual(logits, lse, own, p, own_column, weight, acc) if dual else None
        p.scatter_add_(1, own_column, torch.full_like(own, -1.0)[:, None])
        return LossTerms(value, p if weight is None else p * weight[:, None], second, bound)

    def _curvature(self, p: Tensor, weight: Tensor | None, acc: torch.dtype) -> CurvatureTerms:
        spread = p - p * p
        row = spread.sum(1)
        if weight is None:
            return CurvatureTerms(spread.sum(0, dtype=acc), row, p.clone())
        return CurvatureTerms((weight @ spread).to(acc), row * weight, p.clone())

    def _dual(
        self,
        logits: Tensor,
        lse: Tensor,
        own: Tensor,
        p: Tensor,
        own_column: Tensor,
        weight: Tensor | None,
        acc: torch.dtype,
    ) -> DualTerms:
        q = (p * TIGHT_TAU).scatter_add(1, own_column, torch.full_like(own, 1 - TIGHT_TAU)[:, None])
        # Positive iff the label's logit is the largest; p_y > 1/2 would be too strict for many classes.
        margins = own - logits.scatter(1, own_column, float("-inf")).amax(1)
        return DualTerms(
            _dot(torch.linalg.vecdot(p, logits) - lse, weight, acc),
            _dot(torch.special.xlogy(q, q).sum(1), weight, acc),
            _smallest(margins, weight),
            lse.amin(),
        )

    def null_bias(self, fractions: Tensor) -> Tensor:
        return fractions.log()

    def label_moments(self, class_sums: Tensor) -> Tensor:
        return class_sums

    def bias_mixture(self, residual_mean: Tensor, fractions: Tensor) -> BiasMixture:
        r = residual_mean - fractions * residual_mean.sum()  # corrects rounding, since residuals of a row sum to zero
        rho = float((r / fractions).amax())
        return _mixture(rho, r, fractions, lambda u: float(torch.special.xlogy(u, u).sum()))


class LogisticLoss(Loss):
    """Binary logistic loss ``loss(z, y) = log(1 + exp(z)) - y z`` of one weight vector, y in {0, 1}.

    >>> import torch
    >>> loss = LogisticLoss()
    >>> round(float(loss.terms(torch.zeros(2, 1), torch.tensor([0, 1]), None).value / 2), 4)  # log 2
    0.6931
    """

    num_classes = 2
    num_outputs = 1

    def terms(
        self, logits: Tensor, y: Tensor, weight: Tensor | None, *, curvature: bool = False, dual: bool = False
    ) -> LossTerms:
        acc = _wide(logits)
        z = logits.squeeze(1)
        t = y.to(z.dtype)
        soft = F.softplus(z)
        p = torch.sigmoid(z)
        second = bound = None
        if curvature:
            curve = p * (1 - p) if weight is None else p * (1 - p) * weight
            second = CurvatureTerms(curve.sum(dtype=acc)[None], 2 * curve, p[:, None])
        if dual:
            q = p * TIGHT_TAU + t * (1 - TIGHT_TAU)
            bound = DualTerms(
                _dot(p * z - soft, weight, acc),
                _dot(torch.special.xlogy(q, q) + torch.special.xlogy(1 - q, 1 - q), weight, acc),
                _smallest((2 * t - 1) * z, weight),
                soft.amin(),
            )
        residual = p - t if weight is None else (p - t) * weight
        return LossTerms(_dot(soft - t * z, weight, acc), residual[:, None], second, bound)

    def null_bias(self, fractions: Tensor) -> Tensor:
        return (fractions[1:] / fractions[:1]).log()

    def label_moments(self, class_sums: Tensor) -> Tensor:
        return class_sums[1:]

    def bias_mixture(self, residual_mean: Tensor, fractions: Tensor) -> BiasMixture:
        positive = fractions[1:]
        rho = float(torch.maximum(residual_mean / positive, -residual_mean / (1 - positive)).amax())
        xlogy = torch.special.xlogy
        return _mixture(rho, residual_mean, positive, lambda u: float((xlogy(u, u) + xlogy(1 - u, 1 - u)).sum()))


def _mixture(rho: float, residual: Tensor, fractions: Tensor, negentropy: Callable[[Tensor], float]) -> BiasMixture:
    if rho <= 0:
        return BiasMixture(0.0, fractions, negentropy(fractions))
    u = (fractions - residual / rho).clamp(0, 1)
    return BiasMixture(rho / (1 + rho), u, negentropy(u))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _dot(values: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    return values.sum(dtype=dtype) if weight is None else (values.to(dtype) * weight.to(dtype)).sum()


def _smallest(margins: Tensor, weight: Tensor | None) -> Tensor:
    return (margins if weight is None else margins.masked_fill(weight == 0, float("inf"))).amin()
