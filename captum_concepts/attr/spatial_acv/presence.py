"""The probability that an image shows a concept, calibrated on images held out of the fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_concepts.attr.spatial_acv.problem import LABEL_CONCEPT, Problem
from captum_concepts.solvers import fit_calibration

#: Fraction of an image's positions whose mean is its evidence: more than a single bright position, less than the image.
STRONGEST = 0.1
#: The smallest fraction of a mosaic that shows the concept.
SMALLEST = 1 / 16
_POSITIONS = 64  # of a mosaic
_MOSAICS = 600


@dataclass(frozen=True)
class PresenceCurve:
    """The probability :math:`\\sigma(a t + b)` that an image shows the concept, from its evidence t.

    Args:
        slope, intercept: a and b.
        reliability: AUROC of the evidence on held-out mosaics with and without the concept, and its 95 % interval.
    """

    slope: float
    intercept: float
    reliability: tuple[float, float, float]


def evidence(logits: Tensor) -> Tensor:
    """``(...)`` mean of the strongest tenth of the positions, from logits ``(..., P)``.

    >>> evidence(torch.tensor([[0.0] * 18 + [4.0, 2.0]]))
    tensor([3.])
    """
    return logits.topk(max(1, round(STRONGEST * logits.shape[-1])), dim=-1).values.mean(-1)


def presence_curve(problem: Problem, scores: Sequence[tuple[Tensor, Tensor]], seed: int) -> PresenceCurve:
    """The :class:`PresenceCurve` calibrated on mosaics of held-out positions.

    Concept examples show the concept everywhere, images to be explained only at some positions. So half of the mosaics
    consist of positions of a negative image, and in the other half a random fraction of them, from 1/16 to all, is
    replaced by positions of a concept example. Both are held out of the classifier that scores them.

    Args:
        problem: the rows and their folds.
        scores: logits ``(m,)`` of the held-out rows, and the image of each, per fold.
        seed: of the mosaics.
    """
    generator = torch.Generator().manual_seed(seed)
    concept = (problem.label == LABEL_CONCEPT).cpu()
    values, shown = [], []
    share = _MOSAICS // len(scores)
    for logits, image in scores:
        logits, order = logits.float().cpu(), image.cpu().argsort(stable=True)
        logits = logits[order]
        numbers, counts = image.cpu().unique(return_counts=True)
        starts = counts.cumsum(0) - counts
        sides = [(concept[numbers] == side).nonzero().flatten() for side in (False, True)]
        if not all(map(len, sides)):
            continue  # no rows of a side within the row budget
        negative, positive = (
            logits[_drawn(side, starts, counts, share, generator)] for side in sides
        )  # (share, positions) each
        filled = (SMALLEST ** torch.rand(share, 1, generator=generator) * _POSITIONS).ceil()
        replaced = torch.arange(_POSITIONS) < filled
        with_concept = torch.arange(share)[:, None] % 2 == 1
        values.append(evidence(torch.where(replaced & with_concept, positive, negative)))
        shown.append(with_concept[:, 0])
    found, truth = torch.cat(values), torch.cat(shown)
    curve = fit_calibration(found[:, None], truth[:, None])
    positives = int(concept.sum())
    reliability = _auroc(found, truth, positives, len(concept) - positives)
    return PresenceCurve(float(curve.slopes[0]), float(curve.intercepts[0]), reliability)


def _drawn(side: Tensor, starts: Tensor, counts: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """``(n, positions)`` row indices of random positions of n random images of ``side``."""
    image = side[torch.randint(len(side), (n,), generator=generator)][:, None]
    place = torch.rand(n, _POSITIONS, generator=generator) * counts[image]
    return starts[image] + place.long().clamp(max=counts[image] - 1)


def _auroc(values: Tensor, truth: Tensor, positives: int, negatives: int) -> tuple[float, float, float]:
    """AUROC and its 95 % interval (Hanley and McNeil, 1982) for the given numbers of images."""
    up, down = values[truth], values[~truth]
    auc = float(((up[:, None] > down).double() + 0.5 * (up[:, None] == down).double()).mean())
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    spread = auc * (1 - auc) + (positives - 1) * (q1 - auc**2) + (negatives - 1) * (q2 - auc**2)
    half = 1.96 * math.sqrt(max(spread, 0.0) / (positives * negatives))
    return auc, max(auc - half, 0.0), min(auc + half, 1.0)
