"""Streaming metrics of whether the concepts that an explainer reports are in the image."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from captum_concepts._checks import integer
from captum_concepts.errors import InputError
from captum_concepts.metrics._prepare import at_least_single
from captum_concepts.metrics.bottlenecks import concept_existence
from captum_concepts.metrics.streaming import ExampleMetric

__all__ = ["ConceptAUROC", "ConceptExistence", "PresenceBrier", "Top1Present", "WordMetric"]


def checked(values: Tensor, truth: Tensor) -> Tensor:
    """``values`` in floating point, at least float32, as a mean of integers has no fractions.

    Raises:
        InputError: values are not ``(N, T)``, or truth is not bool of that shape (integers would be used as indices).
    """
    for name, given in (("values", values), ("truth", truth)):
        if not isinstance(given, Tensor):
            raise InputError(f"{name} must be a torch.Tensor (N, T), got {type(given).__name__}")
    if truth.dtype != torch.bool:
        raise InputError(f"truth must be bool (True: the image shows the concept), got {truth.dtype}; pass truth != 0")
    if values.ndim != 2 or values.shape != truth.shape:
        raise InputError(f"values and truth must both be (N, T), got {tuple(values.shape)} and {tuple(truth.shape)}")
    if values.is_complex():
        raise InputError(f"values must be real numbers, got {values.dtype}")
    return at_least_single(values)


class WordMetric(ExampleMetric):
    """A metric with ``update(values, truth)``, where truth is ``(N, T)`` bool, whether the image shows the concept."""

    #: Values ``(N, T)`` to pass: ``"scores"``, ``"presence"``, or ``"contributions"`` to the predicted class.
    values = "scores"

    @abstractmethod
    def per_example(self, values: Tensor, truth: Tensor) -> Tensor:
        """``(N,)``."""


class Top1Present(WordMetric):
    """Fraction of images whose highest-scoring concept is present; undefined if none of the T concepts is.

    Example:
        >>> metric = Top1Present()
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.2, 0.7]]), torch.tensor([[True, False], [True, False]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    def per_example(self, values: Tensor, truth: Tensor) -> Tensor:
        values = checked(values, truth)
        if not values.shape[1]:
            return values.new_full((len(values),), torch.nan)
        right = truth.gather(1, values.argmax(1, keepdim=True))[:, 0].float()
        return right.masked_fill(~truth.any(1) | values.isnan().any(1), torch.nan)


class ConceptAUROC(WordMetric):
    """Mean over images of the probability that a present concept scores above an absent one; ties count half.

    Scores that are independent of the image average 0.5. Undefined if all or none of the T concepts are present.

    Example:
        >>> metric = ConceptAUROC()
        >>> metric.update(torch.tensor([[0.9, 0.1, 0.9]]), torch.tensor([[True, False, False]]))
        >>> metric.compute()
        tensor(0.7500)
    """

    def per_example(self, values: Tensor, truth: Tensor) -> Tensor:
        values = checked(values, truth)
        wins = []
        for row, yes in zip(values.double(), truth, strict=True):
            inside, outside = row[yes], row[~yes]
            above = (inside[:, None] > outside).double() + 0.5 * (inside[:, None] == outside)
            wins.append(above.mean() if not row.isnan().any() else row.new_tensor(torch.nan))  # 0 / 0 is undefined
        return torch.stack(wins).to(values.dtype) if wins else values.new_zeros(0)


class PresenceBrier(WordMetric):
    """Mean squared difference between presence and truth over concepts and images, in [0, 1]; lower is better.

    A constant presence equal to the concepts' base rate q scores q (1 - q).

    Example:
        >>> metric = PresenceBrier()
        >>> metric.update(torch.tensor([[0.9, 0.1]]), torch.tensor([[True, False]]))
        >>> metric.compute()
        tensor(0.0100)
    """

    higher_is_better = False
    values = "presence"

    def per_example(self, values: Tensor, truth: Tensor) -> Tensor:
        values = checked(values, truth)
        if bool(((values < 0) | (values > 1)).any()):
            raise InputError(
                f"presence must be in [0, 1], got values from {values.min():g} to {values.max():g}; pass an "
                "explanation's presence, not its scores"
            )
        return (values - truth.to(values)).square().mean(1)


class ConceptExistence(WordMetric):
    """Mean :func:`concept_existence`, the fraction of the k largest contributors that are in the image.

    Args:
        k: number of concepts.

    Example:
        >>> metric = ConceptExistence(k=1)
        >>> metric.update(torch.tensor([[0.9, 0.1]]), torch.tensor([[True, False]]))
        >>> metric.compute()
        tensor(1.)
    """

    values = "contributions"

    def __init__(self, *, k: int = 5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = integer("k", k)

    def per_example(self, values: Tensor, truth: Tensor) -> Tensor:
        values = checked(values, truth)
        if not values.shape[1]:
            return values.new_full((len(values),), torch.nan)
        return concept_existence(values, truth, k=self.k)
