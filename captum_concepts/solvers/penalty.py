"""The elastic-net penalty, with its proximal operator, convex conjugate and distance to its subdifferential."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_concepts.errors import InputError


def soft_threshold(values: Tensor, threshold: Tensor | float) -> Tensor:
    """``values``, each moved toward zero by at most ``threshold``.

    >>> soft_threshold(torch.tensor([-3.0, 0.5, 2.0]), 1.0).tolist()
    [-2.0, 0.0, 1.0]
    """
    return values - values.clamp(-threshold, threshold)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ElasticNet:
    """``lam * ((1 - alpha) / 2 |W|_F^2 + alpha |W|_1)``; alpha=1 is the lasso, alpha=0 ridge.

    Args:
        lam: strength, at least 0.
        alpha: fraction of the L1 term, in [0, 1].

    Raises:
        InputError: ``lam`` or ``alpha`` is outside its range.

    >>> ElasticNet(0.5, 1.0).value(torch.tensor([[1.0, -2.0]]))
    1.5
    """

    lam: float
    alpha: float

    def __post_init__(self) -> None:
        for name, value, high in (("lam", self.lam, math.inf), ("alpha", self.alpha, 1.0)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= high:
                bounds = "in [0, 1]" if high == 1.0 else "finite and at least 0"
                raise InputError(f"{name} must be a number {bounds}; got {value!r}")
        if not math.isfinite(self.lam):
            raise InputError(f"lam must be a number finite and at least 0; got {self.lam!r}")

    @property
    def l1(self) -> float:
        """The weight of the sum of absolute values."""
        return self.lam * self.alpha

    @property
    def l2(self) -> float:
        """The weight of half the sum of squares."""
        return self.lam * (1 - self.alpha)

    def value(self, weight: Tensor) -> float:
        """The penalty of ``weight``."""
        return float(self.l1 * weight.abs().sum() + 0.5 * self.l2 * weight.square().sum())

    def prox(self, values: Tensor, step: float) -> Tensor:
        """``argmin_W |W - values|^2 / (2 step) + penalty(W)``, elementwise."""
        return soft_threshold(values, step * self.l1) / (1 + step * self.l2)

    def conjugate(self, values: Tensor) -> float:
        """``sup_W <values, W> - penalty(W)``; infinite if there is no finite supremum."""
        excess = (values.abs() - self.l1).clamp_min(0)
        if self.l2 > 0:
            return float(excess.square().sum() / (2 * self.l2))
        return 0.0 if float(excess.amax()) == 0 else math.inf

    def violation(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """The elementwise distance of ``-gradient`` to the subdifferential at ``weight``; zero at an optimum."""
        smooth = gradient + self.l2 * weight
        at_zero = (smooth.abs() - self.l1).clamp_min(0)
        return torch.where(weight == 0, at_zero, (smooth + self.l1 * weight.sign()).abs())
