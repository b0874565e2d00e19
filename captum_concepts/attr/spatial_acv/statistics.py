"""Statistics of held-out accuracies: interval, permutation test, Student's t, Holm's correction."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from captum_concepts.attr.spatial_acv.problem import LABEL_CONCEPT, Problem
from captum_concepts.errors import InputWarning

_SHRINKAGE = 0.1
_CHUNK_ELEMENTS = 1 << 24
_HESSIAN_ROWS = 8192


def balanced_accuracy(
    right: Tensor, is_concept: Tensor, folds: int, error: float | None = None
) -> tuple[float, tuple[float, float]]:
    r"""Mean of both classes' accuracies and its 95 % interval, from held-out accuracies ``(I,)`` of images.

    Images of one fold are judged by one classifier, and the classifiers of two folds share training images, so the
    accuracies are not independent. Without an ``error`` (see :func:`refitted_error`), Welch's variance of independent
    images is multiplied by :math:`1 + K \cdot \frac{1}{K - 1}` for K folds, where 1/(K - 1) is the ratio of test to
    training images (Nadeau and Bengio, *Inference for the generalization error*, Machine Learning 52, 2003).
    """
    sides = [right[is_concept], right[~is_concept]]
    accuracy = sum(float(side.mean()) for side in sides) / 2
    parts = [float(side.var()) / len(side) / 4 if len(side) > 1 else 0.0 for side in sides]
    if error is None:
        error = math.sqrt(sum(parts) * (1 + folds / (folds - 1)))
    if error == 0:
        return accuracy, (accuracy, accuracy)
    squares = sum(p**2 / (len(s) - 1) for p, s in zip(parts, sides, strict=True) if len(s) > 1)
    freedom = sum(parts) ** 2 / squares if squares > 0 else min(map(len, sides)) - 1
    reach = t_quantile(0.975, freedom) * error
    return accuracy, (max(accuracy - reach, 0.0), min(accuracy + reach, 1.0))


def refitted_error(
    problem: Problem, fits: Sequence[tuple[Tensor, Tensor]], lam: float, *, draws: int = 200, seed: int = 0
) -> float:
    r"""Standard error of the held-out accuracy, by a bootstrap over images that refits the classifiers.

    In each draw, images are drawn with replacement within their class. An image counts as often as it was drawn, both
    in the accuracy and in the training of the folds that do not hold it out. A refit is one Newton step from the
    fold's own solution, so that all draws share one factorization:

    .. math:: \Delta w = -H^{-1} \sum_j (m_j - 1) \, g_j

    with the gradient :math:`g_j` of image j's rows, and :math:`m_j` its count in the draw, scaled to equal class sums.
    A resampled error counts the interaction of test and training images twice (Efron and Stein, 1981), so the usual
    factor :math:`\sqrt{n / (n - 1)}` is left out.

    Args:
        problem: the rows.
        fits: the weight and bias of each fold.
        lam: the L2 penalty they were fitted with.
    """
    images, label = len(problem.label), (problem.label == LABEL_CONCEPT).cpu()
    generator = torch.Generator().manual_seed(seed)
    times = torch.zeros(images, draws, dtype=torch.float64)
    sides = [side.nonzero().flatten() for side in (label, ~label)]
    for side in sides:
        drawn = torch.randint(len(side), (len(side), draws), generator=generator)
        times[side] = torch.zeros(len(side), draws, dtype=torch.float64).scatter_add_(
            0, drawn, torch.ones_like(drawn, dtype=torch.float64)
        )
    times = times.to(problem.x)
    rows = torch.bincount(problem.image, minlength=images).to(problem.x)
    right = problem.x.new_zeros(images, draws)
    for fold, (weight, bias) in enumerate(fits):
        seen = problem.fold != fold
        step = _newton_steps(problem, ~problem.rows_in(fold), weight, bias, lam, _balanced(times, rows, seen, label))
        held = problem.rows_in(fold).nonzero().flatten()
        truth = (problem.y[held] == LABEL_CONCEPT)[:, None]
        for part, own in zip(*(t.split(max(1, _CHUNK_ELEMENTS // draws)) for t in (held, truth)), strict=True):
            score = problem.x[part] @ (weight[:, None] + step[:-1]) + bias + step[-1]
            right.index_add_(0, problem.image[part], ((score > 0) == own).to(right))
    share = right / rows.clamp_min(1)[:, None]
    counted = times * (rows > 0)[:, None]
    accuracy = sum((counted[s] * share[s]).sum(0) / counted[s].sum(0).clamp_min(1e-9) for s in sides) / 2
    return float(torch.as_tensor(accuracy).std())


def _balanced(times: Tensor, rows: Tensor, seen: Tensor, label: Tensor) -> Tensor:
    """``(I, B)`` draws minus 1, scaled so that a class has the same weight in each draw; 0 for held-out images."""
    scaled = times.clone()
    for side in (label, ~label):
        own = (side.to(seen.device) & seen).nonzero().flatten()
        total = (times[own] * rows[own, None]).sum(0).clamp_min(1e-9)
        scaled[own] = times[own] * rows[own].sum() / total
    return (scaled - 1) * seen[:, None]


def _newton_steps(problem: Problem, rows: Tensor, weight: Tensor, bias: Tensor, lam: float, change: Tensor) -> Tensor:
    """``(C + 1, B)`` changes of weight and bias when images have weight ``1 + change``."""
    x, y = problem.x[rows], problem.y[rows] == LABEL_CONCEPT
    p = torch.sigmoid(x @ weight + bias)
    mass = torch.where(y, 0.5 / y.sum(), 0.5 / (~y).sum()).to(x)
    residual = mass * (p - y.to(x))
    by_image = x.new_zeros(len(problem.label), x.shape[1] + 1)
    by_image[:, :-1].index_add_(0, problem.image[rows], x * residual[:, None])
    by_image[:, -1].index_add_(0, problem.image[rows], residual)
    curvature = mass * p * (1 - p)
    if len(x) > _HESSIAN_ROWS:  # a sample is sufficient for a standard error
        keep = torch.linspace(0, len(x) - 1, _HESSIAN_ROWS, device=x.device).long()
        x, curvature = x[keep], curvature[keep] * (curvature.sum() / curvature[keep].sum().clamp_min(1e-30))
    ones = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    hessian = (ones * curvature[:, None]).T @ ones
    hessian.diagonal().add_(lam)
    hessian[-1, -1] += 1e-6 - lam
    return -torch.linalg.solve(hessian, by_image.T @ change)


def t_quantile(p: float, freedom: float) -> float:
    """The quantile of Student's t for p of at least 0.5, by bisection.

    >>> round(t_quantile(0.975, 9), 4)
    2.2622
    """
    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) > 1 - p else (low, middle)
    return low


def t_tail(t: float, freedom: float) -> float:
    """P(T > t) of Student's t.

    >>> round(t_tail(2.2621571628, 9), 6), t_tail(0.0, 5)
    (0.025, 0.5)
    """
    tail = _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t)) / 2
    return tail if t >= 0 else 1 - tail


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularized incomplete beta function, by Lentz's continued fraction."""
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
    """Holm's step-down adjusted p-values, comparable with the level for any number of tests.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def encoding_p_value(problem: Problem, n_random: int, seed: int) -> float:
    r"""One-sided p-value of "images of the concept and of the negatives cannot be separated at this layer".

    The statistic is the balanced accuracy of a linear discriminant, held out by image. Its null distribution comes
    from ``n_random`` random sets: the labels are permuted among the images of each fold (which keeps all positions of
    an image together and the class sizes), and everything is fitted again. With mean m and standard deviation s of
    the R null values, the observed a is compared by

    .. math:: t = (a - m) / (s \sqrt{1 + 1/R}),

    with the predictive t distribution of R - 1 degrees of freedom, as if a were one more draw. No p-value is smaller
    than 1 / (number of distinct ways to permute the labels).

    All refits of a discriminant share one factorization, so a hundred random sets cost about one more fit.
    """
    labels = _random_labels(problem, n_random, seed)
    accuracy = _held_out_accuracy(problem, labels)
    observed, null = float(accuracy[0]), accuracy[1:]
    mean, spread = float(null.mean()), float(null.std())
    if spread > 1e-9:
        p = t_tail((observed - mean) / (spread * math.sqrt(1 + 1 / n_random)), n_random - 1)
    else:
        p = 1 / (n_random + 1) if observed > mean + 1e-9 else 1.0
    return max(p, 1 / _relabelings(problem))


def check_testable(problem: Problem, name: str, n_random: int, concepts: int) -> None:
    """Warn if :func:`encoding_p_value` can hardly reject, so that "not encoded here" says nothing about the layer.

    Warns:
        InputWarning: the images are too few for an adjusted p-value below 0.05, or the random sets fewer than 5.
    """
    few = concepts / _relabelings(problem) >= 0.05
    if few or 0 < n_random < 5:
        what = f"{len(problem.label)} images" if few else f"n_random={n_random} random sets"
        warnings.warn(
            f"whether {name!r} is encoded cannot be tested with {what}, so a p-value of 0.05 or more ('not encoded "
            f"here') means nothing; pass {'more images' if few else 'n_random=20'}, or n_random=0 for no test",
            InputWarning,
            stacklevel=2,
        )


def null_directions(problem: Problem, vector: Tensor, n_random: int, lam: float, seed: int) -> Tensor:
    r"""``(2 R, C)`` unit vectors that separate other sets of the same images, with the same regularization.

    The first R separate permuted labels of the images of concept and negatives, the others random halves of the
    negatives. Each is one Newton step of the penalized logistic regression from zero, :math:`(\tfrac{1}{4} \Sigma +
    \lambda I)^{-1} (\mu_1 - \mu_0)`, so that all share one factorization; with the true labels, this direction is
    close to that of the fitted vector. Their component along ``vector``, the concept's own, is removed.
    """
    x, image, images = problem.x, problem.image, len(problem.label)
    generator = torch.Generator().manual_seed(seed)
    concept = (problem.label == LABEL_CONCEPT).cpu()
    sums = x.new_zeros(images, x.shape[1]).index_add_(0, image, x)
    counts = torch.bincount(image, minlength=images).to(x)
    up, down = torch.zeros(images, 2 * n_random), torch.zeros(images, 2 * n_random)
    negatives = (~concept).nonzero().flatten()
    for r in range(n_random):
        order = torch.randperm(images, generator=generator)
        up[order[: int(concept.sum())], r] = 1
        down[order[int(concept.sum()) :], r] = 1
        order = negatives[torch.randperm(len(negatives), generator=generator)]
        half = (len(order) + 1) // 2
        up[order[:half], n_random + r] = 1
        down[order[half:], n_random + r] = 1
    up, down = up.to(x), down.to(x)
    difference = (up.T @ sums) / (up.T @ counts).clamp_min(1)[:, None]
    difference -= (down.T @ sums) / (down.T @ counts).clamp_min(1)[:, None]
    curvature = x.T @ x / (4 * len(x))
    curvature.diagonal().add_(lam)
    vectors = torch.cholesky_solve(difference.T, torch.linalg.cholesky(curvature)).T
    vectors = vectors - torch.outer(vectors @ vector, vector)
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-30)


def _random_labels(problem: Problem, n_random: int, seed: int) -> Tensor:
    """``(I, 1 + R)`` bool: the true labels, then R random permutations within each fold."""
    generator = torch.Generator().manual_seed(seed)
    label, fold = (problem.label == LABEL_CONCEPT).cpu(), problem.fold.cpu()
    labels = label[:, None].repeat(1, 1 + n_random)
    for k in range(problem.folds):
        members = (fold == k).nonzero().flatten()
        for r in range(n_random):
            labels[members, 1 + r] = label[members[torch.randperm(len(members), generator=generator)]]
    return labels.to(problem.x.device)


def _relabelings(problem: Problem) -> float:
    ways = 1
    for k in range(problem.folds):
        own = problem.label[problem.fold == k]
        ways *= math.comb(len(own), int((own == LABEL_CONCEPT).sum()))
    return float(min(ways, 10**300))


def _held_out_accuracy(problem: Problem, labels: Tensor) -> Tensor:
    """``(R,)`` balanced accuracy over all images, each classified by the discriminant of the fold that held it out."""
    x, image, images = problem.x, problem.image, len(problem.label)
    sums = x.new_zeros(images, x.shape[1]).index_add_(0, image, x)
    counts = torch.bincount(image, minlength=images).to(x)
    moment = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    of_fold = []
    for fold in range(problem.folds):
        own = x[problem.rows_in(fold)]
        of_fold.append(own.T @ own)
        moment += of_fold[-1]
    right = torch.zeros(images, labels.shape[1], dtype=x.dtype, device=x.device)
    truth = labels.to(x)
    for fold in range(problem.folds):
        seen = problem.fold != fold
        n = counts[seen].sum()
        mean = sums[seen].sum(0) / n
        covariance = (moment - of_fold[fold]) / n - torch.outer(mean, mean)
        level = covariance.diagonal().mean()
        covariance = covariance * (1 - _SHRINKAGE)
        covariance.diagonal().add_(_SHRINKAGE * level + 1e-8)
        up, down = truth[seen], 1 - truth[seen]
        mean_up = up.T @ sums[seen] / (up.T @ counts[seen]).clamp_min(1)[:, None]
        mean_down = down.T @ sums[seen] / (down.T @ counts[seen]).clamp_min(1)[:, None]
        weight = torch.cholesky_solve((mean_up - mean_down).T, torch.linalg.cholesky(covariance))  # (C, R)
        threshold = (weight * ((mean_up + mean_down) / 2).T).sum(0)
        held = problem.rows_in(fold).nonzero().flatten()
        step = max(1, _CHUNK_ELEMENTS // labels.shape[1])
        for rows in held.split(step):
            correct = (x[rows] @ weight > threshold) == labels[image[rows]]
            right.index_add_(0, image[rows], correct.to(x))
    present = counts > 0
    share = right[present] / counts[present][:, None]
    up = truth[present]
    return ((share * up).sum(0) / up.sum(0) + (share * (1 - up)).sum(0) / (1 - up).sum(0)) / 2
