"""Streaming metrics of scores on perturbed images, thin wrappers of the functions of this package."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from captum_concepts.metrics._scoring import ScoreFn
from captum_concepts.metrics.perturbation import average_drop, deletion, increase_in_confidence, insertion
from captum_concepts.metrics.streaming import ExampleMetric

__all__ = ["AverageDrop", "Deletion", "IncreaseInConfidence", "Insertion"]


class _ScoreMetric(ExampleMetric):
    """A metric with ``update(inputs, maps, target=None, additional_forward_args=None)``.

    ``score_fn`` is not part of the metric's state, so moving or saving the metric does not affect a model.
    """

    score_fn: ScoreFn

    def __init__(
        self,
        score_fn: ScoreFn,
        *,
        scores: str = "raw",
        baseline: str | Tensor = "zero",
        mode: str = "bilinear",
        batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.__dict__["score_fn"] = score_fn  # a plain assignment would register an nn.Module as a child
        self.scores = scores
        self.baseline = baseline
        self.mode = mode
        self.batch_size = batch_size

    def _shared(self, target: Any, additional_forward_args: Any) -> dict[str, Any]:
        return {
            "target": target,
            "additional_forward_args": additional_forward_args,
            "scores": self.scores,
            "baseline": self.baseline,
            "mode": self.mode,
            "batch_size": self.batch_size,
        }


class AverageDrop(_ScoreMetric):
    """Mean :func:`captum_concepts.metrics.average_drop`; lower is better.

    Example:
        >>> import torch
        >>> metric = AverageDrop(lambda x: x.sum((1, 2, 3)), scores="raw")
        >>> metric.update(torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[1.0, 0.0]]]))
        >>> metric.compute()
        tensor(0.7500)
    """

    higher_is_better = False

    def __init__(
        self, score_fn: ScoreFn, *, scores: str = "probability", normalize: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(score_fn, scores=scores, **kwargs)
        self.normalize = normalize

    def per_example(
        self, inputs: Tensor, maps: Tensor, target: Any = None, additional_forward_args: Any = None
    ) -> Tensor:
        shared = self._shared(target, additional_forward_args)
        return average_drop(self.score_fn, inputs, maps, normalize=self.normalize, **shared)


class IncreaseInConfidence(_ScoreMetric):
    """Mean :func:`captum_concepts.metrics.increase_in_confidence`; higher is better."""

    def __init__(self, score_fn: ScoreFn, *, normalize: bool = True, **kwargs: Any) -> None:
        super().__init__(score_fn, **kwargs)
        self.normalize = normalize

    def per_example(
        self, inputs: Tensor, maps: Tensor, target: Any = None, additional_forward_args: Any = None
    ) -> Tensor:
        shared = self._shared(target, additional_forward_args)
        return increase_in_confidence(self.score_fn, inputs, maps, normalize=self.normalize, **shared)


class Deletion(_ScoreMetric):
    """Mean :func:`captum_concepts.metrics.deletion`; lower is better."""

    higher_is_better = False

    def __init__(self, score_fn: ScoreFn, *, n_steps: int | None = None, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(score_fn, **kwargs)
        self.n_steps = n_steps
        self.seed = seed

    def per_example(
        self, inputs: Tensor, maps: Tensor, target: Any = None, additional_forward_args: Any = None
    ) -> Tensor:
        shared = self._shared(target, additional_forward_args)
        area = deletion(self.score_fn, inputs, maps, n_steps=self.n_steps, seed=self.seed, **shared)
        return area if isinstance(area, Tensor) else area[0]


class Insertion(_ScoreMetric):
    """Mean :func:`captum_concepts.metrics.insertion`, from the blurred image by default; higher is better."""

    def __init__(
        self,
        score_fn: ScoreFn,
        *,
        n_steps: int | None = None,
        seed: int = 0,
        baseline: str | Tensor = "blur",
        **kwargs: Any,
    ) -> None:
        super().__init__(score_fn, baseline=baseline, **kwargs)
        self.n_steps = n_steps
        self.seed = seed

    def per_example(
        self, inputs: Tensor, maps: Tensor, target: Any = None, additional_forward_args: Any = None
    ) -> Tensor:
        shared = self._shared(target, additional_forward_args)
        area = insertion(self.score_fn, inputs, maps, n_steps=self.n_steps, seed=self.seed, **shared)
        return area if isinstance(area, Tensor) else area[0]
