"""Statistics of an audit: effects within strata, permutation tests, Holm's correction and bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
#: A concept must be present and absent at least this often in a stratum to be tested there.
LEAST_RATE = 0.05
LEAST_COUNT = 5
#: Scores separate images if two groups explain at least as much variance as for a uniform distribution (normal: .64).
SEPARATED = 0.75
#: Minimum fraction of a concept's variance that the other concepts leave unexplained.
_LEFT_OVER = 0.1


@dataclass(frozen=True)
class Effect:
    """A mean difference with its percentile interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Suspect:
    """A concept that supports a class although it does not belong to it.

    Args:
        class_name, concept: the pair.
        raises: increase of the class's probability with the concept, among images of *other* classes.
        lowers: decrease of the class's probability without the concept, among images of the class itself.
        effect: the smaller of the two, with an interval over images.
        p: Holm-adjusted over all tested pairs.
        contribution: mean contribution of the concept to the class in images of other classes with the concept; None
            if ablation was not possible (no such images, or an explainer without contributions).
        confirmed: whether the interval of that contribution is above 0; None if it is None.
        images: indices of images of other classes with the concept, highest class probability first.
        counterexamples: indices of images of other classes with the concept, lowest class probability first.
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
        """The suspect in one sentence."""
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
    """Whether the concept is present and absent often enough in a stratum."""
    n, k = len(seen), int(seen.sum())
    return min(k, n - k) >= LEAST_COUNT and LEAST_RATE <= k / n <= 1 - LEAST_RATE


def stratified_difference(values: Array, seen: NDArray[np.bool_], strata: NDArray[np.int64]) -> float:
    """Mean of ``values`` with the concept minus the mean without it, weighted by the size of the strata.

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

    If the normal approximation with the exact variance of the permutations is above .05, it is returned. Otherwise,
    permutations are drawn until 50 are as large, and p is at least 1 / (permutations + 1). If Bernstein's bound (valid
    also without replacement; Hoeffding, 1963) is already below that minimum, none are drawn.
    """
    n_total, variance, observed = len(values), 0.0, 0.0
    replaced, largest = 0.0, 0.0  # variance of drawing with replacement, largest single term
    pieces: list[tuple[Array, int, float]] = []
    for stratum in np.unique(strata):
        here = np.flatnonzero(strata == stratum)
        x, k, n = values[here], int(seen[here].sum()), len(here)
        factor = n / n_total
        # mean(with) - mean(without) = (n / (n - k)) (mean(with) - mean(all))
        scale = factor * n / (n - k) / k
        observed += scale * (x[seen[here]].sum() - k * x.mean())
        variance += scale**2 * k * (n - k) / n * x.var(ddof=1)
        replaced += scale**2 * k * x.var()
        largest = max(largest, scale * float(x.max() - x.mean()))
        pieces.append((x - x.mean(), k, scale))
    if variance <= 0:
        return 1.0
    z = observed / math.sqrt(variance)
    rough = 0.5 * math.erfc(z / math.sqrt(2))
    if rough > 0.05:
        return rough
    if observed**2 / (2 * (replaced + largest * observed / 3)) > math.log(permutations + 1):
        return 1 / (permutations + 1)
    larger = done = 0
    chunk = max(1, min(500, 2_000_000 // n_total))
    while done < permutations and larger < 50:
        size = min(chunk, permutations - done)
        drawn = np.zeros(size)
        for x, k, scale in pieces:
            order = np.argpartition(rng.random((size, len(x))), k - 1, axis=1)[:, :k]
            drawn += scale * x[order].sum(1)
        larger += int((drawn >= observed - 1e-12).sum())
        done += size
    return (larger + 1) / (done + 1)


def partial_effect(
    values: Array, seen: NDArray[np.bool_], others: NDArray[np.bool_], strata: NDArray[np.int64]
) -> tuple[float, float] | None:
    """Effect of the concept on ``values`` given ``others`` ``(n, K)``, linear within strata, and its one-sided p.

    None if the others determine the concept.

    >>> other = np.tile([True, False], 20)
    >>> seen = np.repeat([True, False], 20)
    >>> effect, _ = partial_effect(0.1 * other + 0.3 * seen + 0.0, seen, other[:, None], np.zeros(40, dtype=int))
    >>> round(effect, 3)
    0.3
    """
    together = left = total = variance = 0.0
    for stratum in np.unique(strata):
        here = strata == stratum
        if not two_groups(seen[here]):
            continue
        known = np.column_stack([np.ones(here.sum()), others[here]])
        both = np.column_stack([seen[here].astype(float), values[here]])
        rest = both - known @ np.linalg.lstsq(known, both, rcond=None)[0]
        together += float((rest[:, 0] * rest[:, 1]).sum())
        left += float((rest[:, 0] ** 2).sum())
        total += here.sum() * both[:, 0].var()
        variance += float(((rest[:, 0] * rest[:, 1]) ** 2).sum())
    if left <= _LEFT_OVER * total:
        return None
    z = together / math.sqrt(variance) if variance > 1e-18 else math.inf if together > 0 else -math.inf
    return together / left, 0.5 * math.erfc(z / math.sqrt(2))


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
    return Effect(float(values.mean()), *bootstrap_interval(resampled_means(values, rng, n_bootstrap)), n)


def resampled_means(values: Array, rng: np.random.Generator, n_bootstrap: int) -> Array:
    """``(n_bootstrap,)`` means of values drawn with replacement."""
    n, chunk = len(values), max(1, 1_000_000 // len(values))
    sizes = [min(chunk, n_bootstrap - start) for start in range(0, n_bootstrap, chunk)]
    return np.concatenate([values[rng.integers(0, n, (size, n))].mean(1) for size in sizes])


def resampled_differences(
    values: Array, seen: NDArray[np.bool_], strata: NDArray[np.int64], rng: np.random.Generator, n_bootstrap: int
) -> Array:
    """Bootstrapped :func:`stratified_difference`, resampled within each stratum with and without the concept."""
    draws = np.zeros(n_bootstrap)
    for stratum in np.unique(strata):
        here = strata == stratum
        both = [resampled_means(values[here & side], rng, n_bootstrap) for side in (seen, ~seen)]
        draws += here.sum() / len(values) * (both[0] - both[1])
    return draws


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


def split_scores(scores: Array) -> tuple[NDArray[np.bool_], float]:
    """Which scores are above Otsu's threshold, and the fraction of the variance that the two groups explain.

    This replaces presence for explainers without calibration. If all values are equal, none is above.

    >>> above, separation = split_scores(np.array([0.1, 0.2, 0.9, 0.15]))
    >>> above.tolist(), round(separation, 2)
    ([False, False, True, False], 0.99)
    """
    ordered = np.sort(scores)
    if len(ordered) < 2 or ordered[0] == ordered[-1]:
        return np.zeros(len(scores), dtype=bool), 0.0
    n = np.arange(1, len(ordered))
    sums = np.cumsum(ordered)[:-1]
    left, right = sums / n, (ordered.sum() - sums) / (len(ordered) - n)
    between = n * (len(ordered) - n) / len(ordered) ** 2 * (right - left) ** 2
    between[ordered[1:] == ordered[:-1]] = -1.0
    at = int(between.argmax())
    return scores > (ordered[at] + ordered[at + 1]) / 2, float(between[at] / ordered.var())


def told_apart(scores: Array, presence: Array) -> tuple[Array, bool]:
    """``(N,)`` presence of a concept for an audit (NaN: unclear), and whether it is the calibrated one.

    A calibrated presence is used if it lies on both sides of .5. Otherwise (without calibration, or calibrated on
    different images), presence is inferred from scores that split into two groups.

    Args:
        scores: ``(N,)`` in any unit.
        presence: ``(N,)`` in [0, 1], NaN where unknown.
    """
    seen = presence >= 0.5
    if not np.isnan(presence).any() and min(seen.sum(), (~seen).sum()) >= LEAST_COUNT:
        clear = presence[seen].mean() - presence[~seen].mean() >= 0.5
        return (presence if clear else np.full(len(presence), math.nan)), True
    above, separation = split_scores(scores)
    return (above.astype(float) if separation >= SEPARATED else np.full(len(scores), math.nan)), False
