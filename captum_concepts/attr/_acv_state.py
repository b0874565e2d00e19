"""What a fitted SpatialACV knows, and how it comes to know it from sets of guidance images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts._memory import Halving
from captum_concepts.attr._acv_fit import captum_trainer, fit_concept, logistic_trainer, make_problem, reproducible
from captum_concepts.attr._acv_rows import GuidanceRows, gather, merge
from captum_concepts.attr._acv_significance import encoding_p_value
from captum_concepts.attr._acv_statistics import holm
from captum_concepts.attr._guidance import GuidanceSet, Transform, guidance_sets, input_channels
from captum_concepts.errors import InputError

ALPHA = 0.05


@dataclass(frozen=True)
class FittedVectors:
    """The fitted state: everything that is saved.

    Args:
        names: K concepts.
        vectors: ``(K, C)`` unit rows.
        slopes, intercepts: ``(K,)`` of the probability.
        accuracies, contrasts: ``(K,)``; intervals ``(K, 2)``; p_values ``(K,)`` or None.
        rows: counts for each concept.
        of_input: fitted on the layer's input.
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

    @property
    def significant(self) -> Tensor | None:
        return None if self.p_values is None else self.p_values < ALPHA

    def summary(self) -> str:
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


def fit_vectors(
    maps_of: Callable[[Tensor], Tensor],
    concepts: Any,
    negatives: Any,
    *,
    model: nn.Module | None,
    batch_size: int,
    classifier: Any,
    n_random: int,
    seed: int,
    lam: float,
    folds: int,
    max_rows: int,
    transform: Transform | None,
    image_size: int,
    of_input: bool,
    show_progress: bool,
) -> FittedVectors:
    """Fit every concept against the negatives; the arguments are those of ``SpatialACV.fit``."""
    _check_options(n_random, seed, lam, folds, max_rows)
    sets = guidance_sets(concepts, "concepts")
    others = sets if negatives is None else guidance_sets(negatives, "negatives")
    if negatives is None and len(sets) < 2:
        raise InputError("one concept without negatives: give negatives=, or a second concept to tell it from")
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None) if model is not None else None

    def place(images: Tensor) -> Tensor:
        return images if parameter is None else images.to(parameter.device, parameter.dtype)

    halving = Halving("batch_size")

    def fitting(images: Tensor) -> Tensor:
        return torch.cat(halving(lambda part: maps_of(place(part)), images, lambda part: part.chunk(2)))

    def batches(some: list[GuidanceSet]) -> Iterator[tuple[str, Tensor]]:
        options: dict[str, Any] = {"transform": transform, "image_size": image_size, "channels": input_channels(model)}
        for one in some:
            count = 0
            for images in one.batches(batch_size, **options):
                count += len(images)
                bar.update(len(images))
                yield one.name, images
            if not count:
                raise InputError(f"{one.name!r} holds no image; give at least 2 guidance images")

    from tqdm import tqdm

    train = logistic_trainer(lam) if classifier is None else captum_trainer(classifier, seed)
    with tqdm(desc="guidance images", unit="img", disable=not show_progress) as bar, reproducible(seed):

        def rows_of_sets(some: list[GuidanceSet], budget: int) -> GuidanceRows:
            bar.set_postfix_str(some[0].name)
            return gather(batches(some), fitting, budget, seed)

        fitted, p_values, counts = [], [], {}
        for one, rows, bank in _pairs(sets, None if negatives is None else others, rows_of_sets, max_rows):
            against = _without(bank, one, rows, others)
            problem = make_problem(rows, against, one.name, folds, seed)
            counts[one.name] = _counts(rows, against)
            fitted.append(fit_concept(problem, train))
            if n_random:
                p_values.append(encoding_p_value(problem, n_random, seed))
    numbers = {
        "slopes": [f.slope for f in fitted],
        "intercepts": [f.intercept for f in fitted],
        "accuracies": [f.accuracy for f in fitted],
        "intervals": [f.interval for f in fitted],
        "contrasts": [f.contrast for f in fitted],
    }
    return FittedVectors(
        tuple(one.name for one in sets),
        torch.stack([f.vector for f in fitted]),
        p_values=torch.tensor(holm(p_values)) if n_random else None,
        rows=counts,
        of_input=bool(of_input),
        **{name: torch.tensor(values) for name, values in numbers.items()},
    )


def _pairs(
    sets: list[GuidanceSet],
    others: list[GuidanceSet] | None,
    rows_of_sets: Callable[[list[GuidanceSet], int], GuidanceRows],
    max_rows: int,
) -> Iterator[tuple[GuidanceSet, GuidanceRows, GuidanceRows]]:
    """Each concept with its rows and the rows its negatives come from, never more than ``max_rows`` at once."""
    if others is not None:
        bank = rows_of_sets(others, max_rows // 2)
        for one in sets:
            yield one, rows_of_sets([one], max_rows - max_rows // 2), bank
        return
    each = [rows_of_sets([one], max(max_rows // len(sets), 8)) for one in sets]
    for k, one in enumerate(sets):
        yield one, each[k], merge(each[:k] + each[k + 1 :])


def _without(bank: GuidanceRows, one: GuidanceSet, rows: GuidanceRows, others: list[GuidanceSet]) -> GuidanceRows:
    """The negatives of one concept: all but its own images."""
    own, itself = set(rows.digests), {o.name for o in others if o.source is one.source}
    left = bank.select(lambda digest, origin: digest not in own and origin not in itself)
    if not left.digests:
        raise InputError(
            f"concept {one.name!r} and its negatives hold identical images, so there is nothing to tell apart; give "
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


def _check_options(n_random: int, seed: int, lam: float, folds: int, max_rows: int) -> None:
    for name, value, least in (
        ("n_random", n_random, 0), ("seed", seed, 0), ("folds", folds, 2), ("max_rows", max_rows, 16)
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} must be an integer of at least {least}, got {value!r}")
    if n_random == 1:
        raise InputError("n_random=1 says nothing about how random sets vary; give 0, or 2 or more (20 recommended)")
    if not lam > 0:
        raise InputError(f"lam must be positive, got {lam!r}; separable rows have no finite solution without a penalty")
