"""The statistics of an audit: effects within strata, permutation tests, Holm's correction, bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
#: A stratum says something about a concept only if the concept really varies in it.
LEAST_RATE = 0.05
LEAST_COUNT = 5


@dataclass(frozen=True)
class Effect:
    """A mean difference with its percentile interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Suspect:
    """A concept that decides for a class although it does not belong to it.

    Args:
        class_name, concept: the pair.
        raises: mean change of the class's probability by the concept among images of *other* classes.
        lowers: mean change by the concept's absence among images of the class itself (positive: absence lowers it).
        effect: the smaller of the two, with an interval over images.
        p: Holm-adjusted over all pairs that could be tested.
        contribution: mean contribution of the concept to the class where the concept is present and the class wrong;
            None if it was not confirmed by ablation (no such images, or an explainer without contributions).
        confirmed: whether that contribution is positive beyond its interval.
        images: indices of the images that show it best: of other classes, with the concept, most probable first.
        counterexamples: images of other classes with the concept, least probable first.
    """

    class_name: str
    concept: str
    raises: float
    lowers: float
    effect: Effect
    p: float
    contribution: Effect | None
    confirmed: bool | None
    images: tuple[int, ...]
    counterexamples: tuple[int, ...]

    def sentence(self) -> str:
        """What a person should read."""
        text = (
            f"{self.concept!r} raises {self.class_name!r} by {self.raises:.2f} in images of other classes, and its "
            f"absence lowers it by {self.lowers:.2f} in its own (p = {self.p:.2g})"
        )
        if self.confirmed is None:
            return text
        return text + ("; ablation confirms it" if self.confirmed else "; ablation does not confirm it")


def holm(p: Sequence[float]) -> list[float]:
    """Holm-adjusted p-values in the given order.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, running = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = running
    return adjusted


def two_groups(seen: NDArray[np.bool_]) -> bool:
    """Whether a stratum has the concept often enough and lacks it often enough."""
    n, k = len(seen), int(seen.sum())
    return min(k, n - k) >= LEAST_COUNT and LEAST_RATE <= k / n <= 1 - LEAST_RATE


def stratified_difference(values: Array, seen: NDArray[np.bool_], strata: NDArray[np.int64]) -> float:
    """Mean of ``values`` with the concept minus without it, weighted by the size of the strata.

    >>> stratified_difference(np.array([1.0, 0, 3, 1]), np.array([True, False] * 2), np.array([0, 0, 1, 1]))
    1.5
    """
    total = weight = 0.0
    for stratum in np.unique(strata):
        here = strata == stratum
        total += here.sum() * (values[here & seen].mean() - values[here & ~seen].mean())
        weight += here.sum()
    return float(total / weight)


def permutation_p(
    values: Array, seen: NDArray[np.bool_], strata: NDArray[np.int64], rng: np.random.Generator, permutations: int
) -> float:
    """One-sided p of :func:`stratified_difference` being positive, permuting the concept within strata.

    The normal approximation with the exact variance of the permutations decides clear cases; where it lies below .05,
    the permutations are drawn, and p is at least 1 / (permutations + 1).
    """
    n_total, variance, observed = len(values), 0.0, 0.0
    pieces = []
    for stratum in np.unique(strata):
        here = np.flatnonzero(strata == stratum)
        x, k, n = values[here], int(seen[here].sum()), len(here)
        factor = n / n_total
        # mean(with) - mean(without) = (n / (n - k)) (mean(with) - mean(all))
        scale = factor * n / (n - k) / k
        observed += scale * (x[seen[here]].sum() - k * x.mean())
        variance += scale**2 * k * (n - k) / n * x.var(ddof=1)
        pieces.append((x - x.mean(), k, scale))
    if variance <= 0:
        return 1.0
    z = observed / math.sqrt(variance)
    rough = 0.5 * math.erfc(z / math.sqrt(2))
    if rough > 0.05:
        return rough
    larger = 0
    for start in range(0, permutations, 500):
        size = min(500, permutations - start)
        drawn = np.zeros(size)
        for x, k, scale in pieces:
            order = np.argpartition(rng.random((size, len(x))), k - 1, axis=1)[:, :k]
            drawn += scale * x[order].sum(1)
        larger += int((drawn >= observed - 1e-12).sum())
    return (larger + 1) / (permutations + 1)


def bootstrap_interval(draws: Array, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the finite draws; NaN if there are none."""
    finite = draws[np.isfinite(draws)]
    if not len(finite):
        return math.nan, math.nan
    tail = (1 - confidence) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    return float(low), float(high)


def mean_effect(values: Array, rng: np.random.Generator, n_bootstrap: int) -> Effect:
    """Mean with an interval over resampled values; NaN bounds for fewer than 5."""
    n = len(values)
    if n == 0:
        return Effect(math.nan, math.nan, math.nan, 0)
    if n < LEAST_COUNT or not n_bootstrap:
        return Effect(float(values.mean()), math.nan, math.nan, n)
    draws = np.array([values[rng.integers(0, n, n)].mean() for _ in range(n_bootstrap)])
    return Effect(float(values.mean()), *bootstrap_interval(draws), n)


def binomial_p(successes: int, trials: int, rate: float) -> float:
    """P(X >= successes) for a binomial variable.

    >>> round(binomial_p(3, 3, 0.5), 3)
    0.125
    """
    if rate <= 0:
        return 1.0 if successes == 0 else 0.0
    if rate >= 1:
        return 1.0
    log = [
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        + k * math.log(rate) + (trials - k) * math.log1p(-rate)
        for k in range(successes, trials + 1)
    ]  # fmt: skip
    return min(1.0, sum(math.exp(value) for value in log))


def split_scores(scores: Array) -> Array:
    """0 or 1: the side of the threshold that separates the values best into two groups (Otsu).

    For explainers that do not know how sure they are. Values that are all equal are 0.

    >>> split_scores(np.array([0.1, 0.2, 0.9, 0.15])).tolist()
    [0.0, 0.0, 1.0, 0.0]
    """
    ordered = np.sort(scores)
    if len(ordered) < 2 or ordered[0] == ordered[-1]:
        return np.zeros(len(scores))
    n = np.arange(1, len(ordered))
    sums = np.cumsum(ordered)[:-1]
    left, right = sums / n, (ordered.sum() - sums) / (len(ordered) - n)
    between = n * (len(ordered) - n) * (right - left) ** 2
    between[ordered[1:] == ordered[:-1]] = -1.0
    at = int(between.argmax())
    return (scores > (ordered[at] + ordered[at + 1]) / 2).astype(float)
