"""`compare_audits` compares two audits of the same images, such as of two checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from captum_concepts._checks import integer
from captum_concepts.audit.concept_audit import ConceptAudit
from captum_concepts.audit.statistics import Suspect, bootstrap_interval, holm, resampled_means
from captum_concepts.errors import InputError
from captum_concepts.explanation import SEEN


@dataclass(frozen=True, eq=False)
class AuditComparison:
    """Changes between two audits of the same images.

    Args:
        accuracy: before and after; None without labels.
        accuracy_change: ``(value, low, high)``, after minus before with a paired interval, or None.
        changes: one dictionary per true class (without labels: the class predicted before) and concept: ``class``,
            ``concept``, ``before``, ``after``, ``change`` of the mean contribution over images with a contribution in
            both audits, ``low``, ``high``, ``p`` (Holm-adjusted, from a paired sign-flip test), ``n``, and ``agree``,
            the fraction of these images with the same prediction in both. A contribution is to the class that the audit
            predicts, so where ``agree`` is low, the change includes that of the prediction. They are sorted by ``p``,
            then by the size of the change.
        presence: one dictionary per concept: ``concept``, ``before``, ``after`` rate; NaN where presence is unclear.
        gained, lost: suspects of only the second audit, and of only the first.
        kept: suspects of both audits, as in the second.
    """

    accuracy: tuple[float, float] | None
    accuracy_change: tuple[float, float, float] | None
    changes: list[dict[str, Any]]
    presence: list[dict[str, Any]]
    gained: list[Suspect]
    lost: list[Suspect]
    kept: list[Suspect]

    def __repr__(self) -> str:
        lines = ["AuditComparison"]
        if self.accuracy is not None and self.accuracy_change is not None:
            value, low, high = self.accuracy_change
            before, after = self.accuracy
            lines[0] += f"(accuracy {before:.3f} -> {after:.3f}, change {value:+.3f} [{low:+.3f}, {high:+.3f}])"
        for what, suspects in (("gained", self.gained), ("lost", self.lost), ("kept", self.kept)):
            pairs = ", ".join(f"{s.concept} -> {s.class_name}" for s in suspects[:8])
            lines.append(f"  suspects {what}: {len(suspects)}" + (f" ({pairs})" if pairs else ""))
        return "\n".join(lines)


def compare_audits(
    before: ConceptAudit, after: ConceptAudit, *, n_bootstrap: int = 1000, seed: int = 0
) -> AuditComparison:
    """Paired comparison of two audits of the same images, concepts and classes.

    Args:
        before, after: the audits. Images are matched by their pixels; their order may differ.
        n_bootstrap: number of resamples of the intervals.
        seed: random seed of resamples and permutations.

    Raises:
        InputError: the audits differ in images, concepts or classes.
    """
    integer("n_bootstrap", n_bootstrap, 0)
    integer("seed", seed, 0)
    for what, audit in (("before", before), ("after", after)):
        if not isinstance(audit, ConceptAudit):
            raise InputError(f"{what} must be a ConceptAudit, got {type(audit).__name__}")
    for what in ("concepts", "class_names"):
        a, b = getattr(before, what), getattr(after, what)
        if a != b:
            differ = sorted(set(a) ^ set(b))[:5]
            raise InputError(
                f"the audits have different {what} ({differ or 'another order'}); audit both with the same"
            )
    first, second = _matched(before, after)
    rng = np.random.default_rng(seed)
    accuracy = change = None
    if before.labels is not None and after.labels is not None:
        right = [
            (audit.predicted.numpy()[index] == labels.numpy()[index]).astype(float)
            for audit, labels, index in ((before, before.labels, first), (after, after.labels, second))
        ]
        accuracy = float(right[0].mean()), float(right[1].mean())
        change = _paired(right[1] - right[0], rng, n_bootstrap)
    a, b = (x.rows.contributions.double().numpy()[i] for x, i in ((before, first), (after, second)))
    predicted = [audit.predicted.numpy()[index] for audit, index in ((before, first), (after, second))]
    classes = predicted[0] if before.labels is None else before.labels.numpy()[first]
    changes: list[dict[str, Any]] = []
    for c, name in enumerate(before.class_names):
        of_class = classes == c
        for t, concept in enumerate(before.concepts):
            x, y = a[of_class, t], b[of_class, t]
            known = np.isfinite(x) & np.isfinite(y)
            if known.sum() < 5:
                continue
            difference = y[known] - x[known]
            value, low, high = _paired(difference, rng, n_bootstrap)
            changes.append(
                {
                    "class": name, "concept": concept,
                    "before": float(x[known].mean()), "after": float(y[known].mean()),
                    "change": value, "low": low, "high": high, "p": _sign_p(difference, rng), "n": int(known.sum()),
                    "agree": float((predicted[0] == predicted[1])[of_class][known].mean()),
                }
            )  # fmt: skip
    for row, p in zip(changes, holm([row["p"] for row in changes]), strict=True):
        row["p"] = p
    rates = [
        np.where(np.isnan(seen).any(0), np.nan, (seen >= SEEN).mean(0))
        for seen in (x.rows.presence.numpy()[i] for x, i in ((before, first), (after, second)))
    ]
    presence = [
        {"concept": concept, "before": float(rates[0][t]), "after": float(rates[1][t])}
        for t, concept in enumerate(before.concepts)
    ]
    old = {(s.class_name, s.concept): s for s in before.suspected or ()}
    new = {(s.class_name, s.concept): s for s in after.suspected or ()}
    return AuditComparison(
        accuracy,
        change,
        sorted(changes, key=lambda row: (row["p"], -abs(row["change"]))),
        presence,
        [s for pair, s in new.items() if pair not in old],
        [s for pair, s in old.items() if pair not in new],
        [s for pair, s in new.items() if pair in old],
    )


def _matched(before: ConceptAudit, after: ConceptAudit) -> tuple[Any, Any]:
    """Indices of the same images in both audits."""
    codes = [[bytes(row) for row in audit.rows.digests.numpy()] for audit in (before, after)]
    places = [{}, {}]  # type: list[dict[tuple[bytes, int], int]]
    for known, listed in zip(places, codes, strict=True):
        count: dict[bytes, int] = {}
        for i, code in enumerate(listed):
            count[code] = count.get(code, -1) + 1  # duplicates are matched in order
            known[code, count[code]] = i
    missing = len(set(places[0]) ^ set(places[1]))
    if missing:
        raise InputError(
            f"the audits are of different images: {missing} are in one of them only. Audit the same data with the same "
            "preprocessing"
        )
    order = list(places[0])
    return np.array([places[0][key] for key in order]), np.array([places[1][key] for key in order])


def _paired(difference: Any, rng: np.random.Generator, n_bootstrap: int) -> tuple[float, float, float]:
    n = len(difference)
    if not n_bootstrap or n < 5:
        return float(difference.mean()), math.nan, math.nan
    return float(difference.mean()), *bootstrap_interval(resampled_means(difference, rng, n_bootstrap))


def _sign_p(difference: Any, rng: np.random.Generator, flips: int = 10_000) -> float:
    """Two-sided p of a zero mean, from random sign flips."""
    observed = abs(difference.mean())
    larger = 0
    for _ in range(0, flips, 1000):
        signs = rng.integers(0, 2, (1000, len(difference))) * 2 - 1
        larger += int((abs((signs * difference).mean(1)) >= observed - 1e-15).sum())
    return (larger + 1) / (flips + 1)
