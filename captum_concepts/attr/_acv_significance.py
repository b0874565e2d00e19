"""Is a concept encoded at a layer at all? A permutation test of whole images, for one concept."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from captum_concepts.attr._acv_fit import LABEL_CONCEPT, Problem
from captum_concepts.attr._acv_statistics import t_tail

_SHRINKAGE = 0.1
_CHUNK_ELEMENTS = 1 << 24


def encoding_p_value(problem: Problem, n_random: int, seed: int) -> float:
    r"""One-sided p-value of "images of the concept and of the negatives cannot be told apart at this layer".

    The statistic is the held-out-by-image balanced accuracy of a linear discriminant. Its null distribution comes
    from ``n_random`` random sets: the labels are dealt anew among the images of each fold (all positions of an image
    keep together, the class sizes stay), and everything is fitted again. With mean m and standard deviation s of the
    R null values, the observed a is compared by

    .. math:: t = (a - m) / (s \sqrt{1 + 1/R}),

    the predictive t distribution with R - 1 degrees of freedom: were the concept just another random set, a
    would be one more draw. No p-value is smaller than 1 / (number of distinct ways to deal the labels).

    A discriminant, because all its refits share one factorisation: a hundred random sets cost about one more fit.
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


def _random_labels(problem: Problem, n_random: int, seed: int) -> Tensor:
    """``(I, 1 + R)`` bool: the true labels, then R random deals within each fold."""
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
    """``(R,)`` balanced accuracy over all images, each judged by the fold's discriminant that did not see it."""
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
