"""Balanced accuracy with its interval, Student's t, and Holm's correction: no SciPy at run time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def balanced_accuracy(right: Tensor, is_concept: Tensor) -> tuple[float, tuple[float, float]]:
    """Mean of both classes' accuracies and its 95 % interval (Welch's t over images), from accuracies ``(I,)``."""
    sides = [right[is_concept], right[~is_concept]]
    means = [float(side.mean()) for side in sides]
    accuracy = sum(means) / 2
    parts = [float(side.var()) / len(side) / 4 if len(side) > 1 else 0.0 for side in sides]
    error = math.sqrt(sum(parts))
    if error == 0:
        return accuracy, (accuracy, accuracy)
    freedom = sum(parts) ** 2 / sum(p**2 / (len(s) - 1) for p, s in zip(parts, sides, strict=True) if len(s) > 1)
    low, high = 0.0, 1e3
    for _ in range(60):  # the quantile of t by bisection
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) > 0.025 else (low, middle)
    return accuracy, (max(accuracy - low * error, 0.0), min(accuracy + low * error, 1.0))


def t_tail(t: float, freedom: float) -> float:
    """P(T > t) of Student's t.

    >>> round(t_tail(2.2621571628, 9), 6), t_tail(0.0, 5)
    (0.025, 0.5)
    """
    tail = _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t)) / 2
    return tail if t >= 0 else 1 - tail


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function, by Lentz's continued fraction."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    ) / a  # fmt: skip
    tiny = 1e-300
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or tiny)
    value = d
    for m in range(1, 1000):
        for factor in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + factor * d or tiny)
            c = 1 + factor / c or tiny
            value *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return front * value


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: compare with the level itself, whatever the number of tests.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
