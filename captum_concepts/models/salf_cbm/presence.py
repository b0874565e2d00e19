"""Reliability of concepts: presence, agreement on held-out images, and a one-sentence summary."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_concepts._checks import name_positions
from captum_concepts.errors import InputError, listing

#: Strength of the prior that pulls each concept's slope to the common slope, in images.
_PRIOR = 4.0
_STEPS = 50
#: Fraction of the strongest rules that the vision-language model must support for high trust.
_MOST_RULES = 0.75


@dataclass(frozen=True)
class Reliability:
    """Agreement of a concept's activation with a judge (the vision-language model, or labels) on held-out images.

    Args:
        agreement: AUROC, the probability that an image in which the judge sees the concept has a higher activation than
            one in which it does not; 0.5 is chance, NaN if the judge sees it in all images or in none.
        low, high: 95 % interval of the agreement (Hanley and McNeil).
        positives: number of images in which the judge sees the concept.
        images: number of images.
    """

    agreement: float
    low: float
    high: float
    positives: int
    images: int

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Reliability:
        """The :class:`Reliability` from one entry of :func:`reliabilities`."""
        known: dict[str, Any] = {name: math.nan if value is None else value for name, value in values.items()}
        return cls(**known)


def fit_presence(activations: Tensor, verdicts: Tensor) -> tuple[Tensor, Tensor]:
    r"""Slopes and offsets ``(M,)`` of ``sigmoid(slope * c* + offset)``, a logistic calibration of each concept.

    A common slope is fitted first and serves as a prior for each concept's own, which few held-out images determine
    poorly. Each concept has its own offset, with half an image added to each class.

    Args:
        activations: ``(n, M)`` c*.
        verdicts: ``(n, M)`` bool.

    >>> c = torch.linspace(-2, 2, 41)[:, None]
    >>> slope, offset = fit_presence(c, c > 1)
    >>> torch.sigmoid(slope * torch.tensor([-2.0, 2.0]) + offset).round().tolist()
    [0.0, 1.0]
    """
    x, y = activations.double(), verdicts.double()
    center, scale = x.mean(0), x.std(0, correction=0).clamp_min(1e-12)
    x = (x - center) / scale
    # Two pseudo-images of weight 1/2 at the mean, one of each class, keep the offset finite.
    x = torch.cat([x, x.new_zeros(2, x.shape[1])])
    y = torch.cat([y, y.new_zeros(1, x.shape[1]), y.new_ones(1, x.shape[1])])
    weight = torch.ones_like(x)
    weight[-2:] = 0.5
    slope, offset = x.new_zeros(x.shape[1]), _logit((weight * y).sum(0) / weight.sum(0))
    common = x.new_zeros(())
    for prior in (0.0, _PRIOR):
        for _ in range(_STEPS):
            p = torch.sigmoid(slope * x + offset)
            g, h = weight * (p - y), (weight * p * (1 - p)).clamp_min(1e-9)
            gs, go = (g * x).sum(0), g.sum(0)
            ss, so, oo = (h * x * x).sum(0), (h * x).sum(0), h.sum(0)
            if not prior:  # common slope: eliminate the offsets, then sum over concepts
                step = (gs - so * go / oo).sum() / (ss - so * so / oo).sum().clamp_min(1e-9)
                step = step.clamp(-1, 1).expand_as(slope)
            else:
                gs, ss = gs + prior * (slope - common), ss + prior
                step = ((gs - so * go / oo) / (ss - so * so / oo).clamp_min(1e-9)).clamp(-1, 1)
            slope, offset = slope - step, offset - ((go - so * step) / oo).clamp(-1, 1)
            if float(step.abs().max()) < 1e-9:
                break
        common = slope.mean()
    slope = slope.clamp_min(0)  # a lower activation is never evidence for a concept
    return (slope / scale).float(), (offset - slope * center / scale).float()


def reliabilities(activations: Tensor, verdicts: Tensor, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """:class:`Reliability` of each concept, as JSON-serializable dictionaries.

    >>> reliabilities(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[False], [False], [True]]), ["a"])["a"]
    {'agreement': 1.0, 'low': 1.0, 'high': 1.0, 'positives': 1, 'images': 3}
    """
    n, positives = len(verdicts), verdicts.sum(0)
    measured: dict[str, dict[str, Any]] = {}
    for j, name in enumerate(names):
        k = int(positives[j])
        if k in (0, n):
            measured[name] = {"agreement": None, "low": None, "high": None, "positives": k, "images": n}
            continue
        auc = auroc(activations[:, j].double(), verdicts[:, j])
        q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
        spread = math.sqrt(max(0.0, auc * (1 - auc) + (k - 1) * (q1 - auc**2) + (n - k - 1) * (q2 - auc**2)))
        half = 1.96 * spread / math.sqrt(k * (n - k))
        low, high = max(0.0, auc - half), min(1.0, auc + half)
        measured[name] = {"agreement": auc, "low": low, "high": high, "positives": k, "images": n}
    return measured


def auroc(values: Tensor, positive: Tensor) -> float:
    """The area under the ROC curve, with ties counted half."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks = (last - (counts.double() - 1) / 2)[inverse]
    k, n = int(positive.sum()), len(values)
    return float((ranks[positive].sum() - k * (k + 1) / 2) / (k * (n - k)))


def trust_line(reliability: Mapping[str, Reliability], metadata: Mapping[str, Any]) -> str:
    """One sentence that grades the trust in concepts and rules.

    >>> trust_line({}, {})
    'unknown: agreement with a vision-language model or with labels was not measured; see calibrate()'
    """
    known = {name: one for name, one in reliability.items() if not math.isnan(one.agreement)}
    if not known:
        return "unknown: agreement with a vision-language model or with labels was not measured; see calibrate()"
    judges = {name: _judge(name, metadata) for name in known}
    judge = Counter(judges.values()).most_common(1)[0][0]  # one per sentence
    others = [name for name in known if judges[name] != judge]
    known = {name: one for name, one in known.items() if judges[name] == judge}
    values = sorted(one.agreement for one in known.values())
    middle = values[len(values) // 2] if len(values) % 2 else sum(values[len(values) // 2 - 1 :][:2]) / 2
    images = next(iter(known.values())).images
    verb = "do" if "labels" in judge else "does"
    chance = sorted((name for name, one in known.items() if one.low <= 0.5), key=lambda name: known[name].agreement)
    rules, supported = _support(metadata)
    weak = middle < 0.7 or len(chance) > len(known) / 2 or 2 * supported < rules
    grade = "low" if weak else "medium" if middle < 0.85 or supported < _MOST_RULES * rules else "high"
    line = f"{grade}: on {images} held-out images the concepts rank images as {judge} {verb} with a median AUROC of "
    line += f"{middle:.2f} (chance 0.50)"
    if others:
        line += f", without {listing(others, 3)} (judged by {judges[others[0]]})"
    if rules:
        line += f"; the vision-language model supports {supported} of the {rules} strongest rules"
    if chance:
        line += f"; no better than chance: {len(chance)} of {len(known)} ({listing(chance, 3)})"
    return line


def _judge(name: str, metadata: Mapping[str, Any]) -> str:
    """What a concept was compared with."""
    calibrated = metadata.get("calibrated")
    if isinstance(calibrated, list) and name in calibrated:
        return "your labels"
    return str(metadata.get("reliability_source", "the vision-language model"))  # of models before "calibrated"


def _support(metadata: Mapping[str, Any]) -> tuple[int, int]:
    """The numbers of strongest rules and of those that the encoder supports; 0 if unknown."""
    found = metadata.get("support")
    values = [found.get(key) for key in ("rules", "supported")] if isinstance(found, Mapping) else [0, 0]
    rules, supported = (value if isinstance(value, int) else 0 for value in values)
    return rules, supported


def verdicts_of(labels: Any, concepts: Sequence[str], n: int) -> tuple[list[int], Tensor]:
    """Concept columns and ``(n, T)`` bool labels from any form that ``SALFCBM.calibrate`` takes.

    Raises:
        InputError: wrong number of images, unknown concept, or values that are not 0 or 1.
    """
    if isinstance(labels, Mapping):
        columns = name_positions(list(labels), concepts)
        parts = [_flags(value, (n,), f"labels[{name!r}]") for name, value in labels.items()]
        return columns, torch.stack(parts, 1)
    columns = list(range(len(concepts)))
    if isinstance(labels, (list, tuple)) and all(
        isinstance(row, (list, tuple, set, frozenset)) and all(isinstance(name, str) for name in row) for row in labels
    ):
        if len(labels) != n:
            raise InputError(f"{len(labels)} labels were passed for {n} images; pass one per image")
        found = torch.zeros(n, len(concepts), dtype=torch.bool)
        for i, row in enumerate(labels):
            if row:
                found[i, name_positions(sorted(row), concepts)] = True
        return columns, found
    return columns, _flags(labels, (n, len(concepts)), "labels")


def _flags(values: Any, shape: tuple[int, ...], name: str) -> Tensor:
    try:
        given = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be {shape} of 0 and 1, or the names of each image's concepts") from error
    if tuple(given.shape) != shape or not bool(((given == 0) | (given == 1)).all()):
        raise InputError(
            f"{name} must be {shape} of 0 and 1 (or bool), got {tuple(given.shape)} {given.dtype}; or pass the names "
            "of each image's concepts"
        )
    return given.bool()


def _logit(p: Tensor) -> Tensor:
    return torch.log(p) - torch.log1p(-p)
