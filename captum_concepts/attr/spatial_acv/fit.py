"""Concept vectors from sets of images, with their held-out accuracy and statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts._checks import integer, number
from captum_concepts._memory import Halving
from captum_concepts.attr.batches import placed
from captum_concepts.attr.guidance import Read, named_sets
from captum_concepts.attr.spatial_acv.classifier import Trainer, captum_trainer, logistic_trainer, reproducible
from captum_concepts.attr.spatial_acv.presence import PresenceCurve, evidence, presence_curve
from captum_concepts.attr.spatial_acv.problem import LABEL_CONCEPT, LABEL_NEGATIVE, Problem, make_problem, mean_by_image
from captum_concepts.attr.spatial_acv.rows import GuidanceRows, gather, merge
from captum_concepts.attr.spatial_acv.statistics import (
    balanced_accuracy,
    check_testable,
    encoding_p_value,
    holm,
    null_directions,
    refitted_error,
)
from captum_concepts.errors import InputError, listing
from captum_concepts.images import ImageSource, batches

ALPHA = 0.05
#: The penalty of the authors' notebook, scikit-learn's ``C=1`` on the sum of the losses of unscaled rows.
PUBLISHED = "published"


@dataclass(frozen=True)
class FitOptions:
    """The numeric options of ``SpatialACV.fit``."""

    n_random: int = 0
    seed: int = 0
    lam: float | str = 0.3
    folds: int = 3
    max_rows: int = 50_000
    attribute_to_layer_input: bool = False

    def __post_init__(self) -> None:
        integer("n_random", self.n_random, least=0)
        integer("seed", self.seed, least=0, most=2**63 - 1)
        integer("folds", self.folds, least=2)
        integer("max_rows", self.max_rows, least=16)
        if self.n_random == 1:
            raise InputError("n_random=1 cannot measure how random sets vary; pass 0, or at least 2 (20 recommended)")
        if self.lam != PUBLISHED:
            meaning = f"positive (separable rows have no finite solution without it), or {PUBLISHED!r}"
            number("lam", self.lam, lambda lam: lam > 0, meaning)

    def penalty(self, problem: Problem) -> float:
        """L2 penalty of the mean loss of ``problem``'s rows."""
        return 1 / (len(problem.x) * problem.scale**2) if isinstance(self.lam, str) else self.lam


@dataclass(frozen=True)
class FittedVectors:
    """The fitted state, which is saved.

    Args:
        names: K concepts.
        vectors: ``(K, C)`` unit rows.
        slopes, intercepts: ``(K,)`` of the probability.
        accuracies, contrasts: ``(K,)``; intervals are ``(K, 2)``, p_values ``(K,)`` or None.
        rows: counts for each concept.
        of_input: fitted on the layer's input.
        presence_slopes, presence_intercepts: ``(K,)`` of :class:`PresenceCurve`; None in files of earlier versions.
        reliability: ``(K, 3)`` of :class:`PresenceCurve`.
        presence_source: description of the data that presence was calibrated on.
        null_vectors: ``(K, 2 R, C)`` of :func:`null_directions`; None without random sets.
    """

    names: tuple[str, ...]
    vectors: Tensor
    slopes: Tensor
    intercepts: Tensor
    accuracies: Tensor
    intervals: Tensor
    contrasts: Tensor
    p_values: Tensor | None
    rows: dict[str, dict[str, int]]
    of_input: bool = False
    presence_slopes: Tensor | None = None
    presence_intercepts: Tensor | None = None
    reliability: Tensor | None = None
    presence_source: str = ""
    null_vectors: Tensor | None = None

    @property
    def significant(self) -> Tensor | None:
        """``(K,)`` bool, p < 0.05; None without p-values."""
        return None if self.p_values is None else self.p_values < ALPHA

    def probability(self, projected: Tensor) -> Tensor:
        """``(N, K, h, w)`` probabilities of the classifier at each position, from projections."""
        slopes, intercepts = (t.to(projected).view(1, -1, 1, 1) for t in (self.slopes, self.intercepts))
        return torch.sigmoid(projected * slopes + intercepts)

    def evidence(self, projected: Tensor) -> Tensor:
        """``(N, K)`` mean logits of the strongest tenth of the positions, from projections ``(N, K, h, w)``."""
        slopes, intercepts = (t.to(projected).view(1, -1, 1) for t in (self.slopes, self.intercepts))
        return evidence(projected.flatten(2) * slopes + intercepts)

    def scores(self, projected: Tensor) -> Tensor:
        """``(N, K)`` probabilities that an image shows the concept, from projections ``(N, K, h, w)``."""
        found = self.evidence(projected)
        if self.presence_slopes is None or self.presence_intercepts is None:
            return torch.sigmoid(found)
        return torch.sigmoid(found * self.presence_slopes.to(found) + self.presence_intercepts.to(found))

    def trust(self) -> str:
        """One sentence on how well held-out images with and without a concept are separated."""
        measured = self.accuracies if self.reliability is None else self.reliability[:, 0]
        low = self.intervals[:, 0] if self.reliability is None else self.reliability[:, 1]
        what = "accuracy of positions" if self.reliability is None else "AUROC of images"
        parts = [f"{name} {float(value):.2f}" for name, value in zip(self.names, measured, strict=True)]
        shown = ", ".join(parts[:8]) + (f" and {len(parts) - 8} more" if len(parts) > 8 else "")
        line = f"{what} held out of the fit: {shown} (chance 0.50)"
        unknown = [name for name, value in zip(self.names, low, strict=True) if float(value) <= 0.5]
        if self.significant is not None:
            unknown = [name for name, yes in zip(self.names, self.significant.tolist(), strict=True) if not yes]
        if unknown:
            line += f"; not encoded at this layer: {listing(unknown)}"
        return f"{line}; presence from {self.presence_source}" if self.presence_source else line

    def summary(self) -> str:
        """A table of the concepts."""
        width = max(7, *map(len, self.names))
        lines = [f"{'concept':<{width}}  accuracy  95 % interval   p (Holm)  images  rows used of seen"]
        for k, name in enumerate(self.names):
            low, high = self.intervals[k].tolist()
            p = "-" if self.p_values is None else f"{float(self.p_values[k]):.2g}"
            count = self.rows[name]
            used, seen = (count["concept_rows"], count["concept_rows_seen"])
            line = f"{name:<{width}}  {float(self.accuracies[k]):8.3f}  {low:.3f} to {high:.3f}  {p:>8}"
            line += f"  {count['concept_images']:>6}  {used} of {seen}"
            if self.significant is not None and not bool(self.significant[k]):
                line += "  not encoded here"
            lines.append(line)
        return "\n".join(lines)


@dataclass(frozen=True)
class FittedConcept:
    """One concept's vector and its accuracy on held-out images.

    Args:
        vector: ``(C,)`` of unit length, towards the concept.
        slope, intercept: the probability of the concept at an activation a is sigmoid(slope * a.v + intercept).
        accuracy: held-out balanced accuracy of positions, chance 0.5.
        interval: its 95 % confidence interval.
        contrast: held-out (mean of a.v on the concept - on the negatives) / their standard deviation.
        presence: the probability that an image shows the concept.
    """

    vector: Tensor
    slope: float
    intercept: float
    accuracy: float
    interval: tuple[float, float]
    contrast: float
    presence: PresenceCurve


def fit_vectors(
    maps_of: Callable[[Tensor], Tensor],
    concepts: Any,
    negatives: Any,
    options: FitOptions,
    *,
    read: Read,
    model: nn.Module | None,
    batch_size: int,
    classifier: Any,
    show_progress: bool,
) -> FittedVectors:
    """The vectors and statistics of every concept against the negatives.

    Args:
        maps_of: converts images to activation maps ``(n, C, h, w)``.
        concepts, negatives: as in ``SpatialACV.fit``.
        options: the numeric options.
        read: opens a set of images.
        model: images are moved to its device and dtype.
        batch_size: maximum number of images per forward pass.
        classifier: a Captum ``Classifier`` or None.
        show_progress: show a bar over images, then one over concepts.
    """
    from tqdm import tqdm

    sets = named_sets(concepts, "concepts", read)
    others = None if negatives is None else named_sets(negatives, "negatives", read)
    if others is None and len(sets) < 2:
        raise InputError("a single concept needs negatives; pass negatives=, or a second concept to separate it from")
    halving = Halving("batch_size")

    def run(images: Tensor) -> Tensor:
        return torch.cat(halving(maps_of, placed(images, model), lambda part: part.chunk(2)))

    with (
        tqdm(desc="images", unit="img", disable=not show_progress) as images_seen,
        tqdm(desc="concepts", total=len(sets), disable=not show_progress) as concepts_fitted,
        reproducible(options.seed),
    ):

        def rows_of(some: dict[str, ImageSource], budget: int) -> GuidanceRows:
            return gather(_read(some, batch_size, images_seen.update), run, budget, options.seed)

        fitted, p_values, null, counts = [], [], [], {}
        for name, rows, bank in _pairs(sets, others, rows_of, options.max_rows):
            against = _without(bank, name, rows)
            problem = make_problem(rows, against, name, options.folds, options.seed)
            counts[name] = _counts(rows, against)
            lam = options.penalty(problem)
            own = logistic_trainer(lam) if classifier is None else captum_trainer(classifier, options.seed)
            fitted.append(fit_concept(problem, own, lam if classifier is None else None, options.seed))
            if options.n_random:
                check_testable(problem, name, options.n_random, len(sets))
                p_values.append(encoding_p_value(problem, options.n_random, options.seed))
                null.append(null_directions(problem, fitted[-1].vector, options.n_random, lam, options.seed))
            concepts_fitted.update()
    numbers = {
        "slopes": [f.slope for f in fitted],
        "intercepts": [f.intercept for f in fitted],
        "accuracies": [f.accuracy for f in fitted],
        "intervals": [f.interval for f in fitted],
        "contrasts": [f.contrast for f in fitted],
        "presence_slopes": [f.presence.slope for f in fitted],
        "presence_intercepts": [f.presence.intercept for f in fitted],
        "reliability": [f.presence.reliability for f in fitted],
    }
    return FittedVectors(
        tuple(sets),
        torch.stack([f.vector for f in fitted]),
        p_values=torch.tensor(holm(p_values), dtype=torch.float32) if options.n_random else None,
        rows=counts,
        of_input=bool(options.attribute_to_layer_input),
        presence_source="held-out examples",
        null_vectors=torch.stack(null) if null else None,
        **{name: torch.tensor(values, dtype=torch.float32) for name, values in numbers.items()},
    )


def _read(sets: dict[str, ImageSource], batch_size: int, count: Callable[[int], Any]) -> Iterator[tuple[str, Tensor]]:
    for name, source in sets.items():
        seen = 0
        for batch in batches(source, batch_size):
            seen += len(batch)
            count(len(batch))
            yield name, batch.images
        if not seen:
            raise InputError(f"{name!r} contains no images; pass at least 2")


def _pairs(
    sets: dict[str, ImageSource],
    others: dict[str, ImageSource] | None,
    rows_of: Callable[[dict[str, ImageSource], int], GuidanceRows],
    max_rows: int,
) -> Iterator[tuple[str, GuidanceRows, GuidanceRows]]:
    """Each concept with its rows and the rows its negatives come from, at most ``max_rows`` at once."""
    if others is not None:
        bank = rows_of(others, max_rows // 2)
        for name, source in sets.items():
            yield name, rows_of({name: source}, max_rows - max_rows // 2), bank
        return
    each = [rows_of({name: source}, max(max_rows // len(sets), 8)) for name, source in sets.items()]
    for k, name in enumerate(sets):
        yield name, each[k], merge(each[:k] + each[k + 1 :])


def _without(bank: GuidanceRows, name: str, rows: GuidanceRows) -> GuidanceRows:
    """The negatives of one concept, without its own images and without a set of its name."""
    own = set(rows.digests)
    left = bank.select(lambda digest, origin: digest not in own and origin != name)
    if not left.digests:
        raise InputError(
            f"concept {name!r} and its negatives contain identical images, so there is nothing to separate; pass "
            "negatives that do not show the concept"
        )
    return left


def _counts(rows: GuidanceRows, against: GuidanceRows) -> dict[str, int]:
    return {
        "concept_images": rows.images,
        "concept_rows": len(rows.x),
        "concept_rows_seen": rows.seen,
        "negative_images": against.images,
        "negative_rows": len(against.x),
        "negative_rows_seen": against.seen,
    }


def fit_concept(problem: Problem, train: Trainer, lam: float | None = None, seed: int = 0) -> FittedConcept:
    """The concept's vector from all rows, and its accuracy from cross-validation over images.

    Args:
        problem: the rows.
        train: the classifier.
        lam: L2 penalty of the package's logistic regression, whose interval comes from refits; None for others.
        seed: of the bootstrap.
    """
    right = torch.zeros(len(problem.label), dtype=torch.float64)
    contrasts, fits, scores = [], [], []
    for fold in range(problem.folds):
        held = problem.rows_in(fold)
        weight, bias = _train(problem, ~held, train)
        fits.append((weight, bias))
        score = problem.x[held] @ weight + bias
        scores.append((score, problem.image[held]))
        y = problem.y[held]
        per_image = mean_by_image(((score > 0) == (y == LABEL_CONCEPT)).float(), problem.image[held], len(right))
        right += per_image.cpu().double()
        contrasts.append(_contrast(score, y))
    # Ignore images without rows in the budget.
    present = (torch.bincount(problem.image, minlength=len(problem.label)) > 0).cpu()
    error = None
    if lam is not None and problem.x.device.type != "mps":
        error = refitted_error(problem, fits, lam, seed=seed)
    accuracy, interval = balanced_accuracy(
        right[present], problem.label.cpu()[present] == LABEL_CONCEPT, problem.folds, error
    )
    weight, bias = _train(problem, slice(None), train)
    length = float(weight.norm())
    if not math.isfinite(length) or length == 0:
        raise InputError(
            "the classifier does not define a direction, because its weights are zero or not finite; use a weaker "
            "penalty"
        )
    vector = weight / length
    slope = length / problem.scale
    intercept = float(bias) - slope * float(problem.center @ vector)
    presence = presence_curve(problem, scores, seed)
    return FittedConcept(vector, slope, intercept, accuracy, interval, sum(contrasts) / len(contrasts), presence)


def _train(problem: Problem, rows: Tensor | slice, train: Trainer) -> tuple[Tensor, Tensor]:
    x, y = problem.x[rows], problem.y[rows]
    positive = y == LABEL_CONCEPT
    # Both classes have equal weight for any number of images, so chance is 0.5 and the intercept is meaningful.
    half = len(y) / 2
    weight = torch.where(positive, half / positive.sum().clamp_min(1), half / (~positive).sum().clamp_min(1))
    return train(x, y, weight.to(x.dtype))


def _contrast(score: Tensor, y: Tensor) -> float:
    score, y = score.cpu().double(), y.cpu()
    a, b = score[y == LABEL_CONCEPT], score[y == LABEL_NEGATIVE]
    spread = ((a.var(unbiased=False) + b.var(unbiased=False)) / 2).sqrt()
    return float((a.mean() - b.mean()) / spread.clamp_min(1e-12)) if len(a) and len(b) else 0.0
