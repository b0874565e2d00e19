"""Base class of the streaming metrics, sums over examples that do not depend on batching or number of processes."""

from __future__ import annotations

import itertools
import warnings
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from captum_concepts.errors import InputError, InputWarning
from captum_concepts.metrics._prepare import check_nan_policy

__all__ = ["ExampleMetric"]

_INSTANCES = itertools.count(1)


class ExampleMetric(Metric):
    """A ``torchmetrics.Metric`` of a data set that is computed from sums over its examples.

    A subclass implements :meth:`per_example`, the functional metric. If the result is not the mean, it also defines
    ``width``, how many numbers an example contributes, and :meth:`reduce`. States are float64 sums and two counts, so
    ``reset``, ``forward``, ``MetricCollection`` and ``dist_sync`` across processes work as in torchmetrics. Values are
    moved to the metric's device; a metric on the CPU takes tensors of any device (MPS has no float64).

    Args:
        nan_policy: how undefined (NaN) values are handled. ``"omit"``: left out, and ``compute`` warns with their
            number; ``"zero"``: counted as 0; ``"propagate"``: the result is NaN; ``"raise"``: an ``InputError``.
        kwargs: arguments of ``torchmetrics.Metric``, such as ``dist_sync_on_step``.

    Attributes:
        counted: number of values in the result.
        skipped: number of undefined values under any policy.
    """

    is_differentiable = False
    higher_is_better: bool | None = True
    full_state_update = False
    width = 1
    total: Tensor
    counted: Tensor
    skipped: Tensor

    def __init__(self, *, nan_policy: str = "omit", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_nan_policy(nan_policy)
        self.nan_policy = nan_policy
        self.add_state("total", torch.zeros(self.width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counted", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("skipped", torch.tensor(0), dist_reduce_fx="sum")
        # A MetricCollection merges metrics whose states are equal after the first batch. This state keeps different
        # metrics apart that happen to start with the same sums.
        self.add_state("instance", torch.tensor(next(_INSTANCES)), dist_reduce_fx="max")

    @abstractmethod
    def per_example(self, *args: Any, **kwargs: Any) -> Tensor:
        """``(N,)`` or ``(N, T)`` values, with a last dimension of size ``width`` if it is above 1."""

    @staticmethod
    def reduce(total: Tensor, counted: Tensor) -> Tensor:
        """The result (by default the mean) from sums ``(..., width)`` over ``counted`` (...) values."""
        return total[..., 0] / counted

    def statistics(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Sums ``(N, width)`` and numbers of counted ``(N,)`` and undefined ``(N,)`` values per example of a batch."""
        values = self.per_example(*args, **kwargs)
        if self.width == 1:
            values = values[..., None]
        each = values.shape[1:-1].numel()  # reshape cannot infer -1 for a batch of 0
        rows = values.detach().to(torch.float64).reshape(len(values), each, self.width)
        undefined = rows.isnan().any(-1)
        if self.nan_policy == "raise" and bool(undefined.any()):
            raise InputError(
                f"{int(undefined.sum())} of {undefined.numel()} values of {self._get_name()} are undefined"
            )
        if self.nan_policy in ("omit", "zero"):
            rows = rows.masked_fill(undefined[..., None], 0)
        used = ~undefined if self.nan_policy == "omit" else torch.ones_like(undefined)
        return rows.sum(1), used.sum(1), undefined.sum(1)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Add a batch, with the arguments of :meth:`per_example`."""
        total, counted, skipped = self.statistics(*args, **kwargs)
        self.total = self.total + total.sum(0).to(self.total)
        self.counted = self.counted + counted.sum().to(self.counted)
        self.skipped = self.skipped + skipped.sum().to(self.skipped)

    def compute(self) -> Tensor:
        """The metric over all examples since ``reset``, 0-d float32; NaN if nothing was counted."""
        skipped = int(self.skipped)
        if skipped and self.nan_policy == "omit":
            n = skipped + int(self.counted)
            message = (
                f"{skipped} of {n} values of {self._get_name()} are undefined (NaN map, empty or full mask): left out"
            )
            warnings.warn(message, InputWarning, stacklevel=2)
        return self.reduce(self.total, self.counted).float()
