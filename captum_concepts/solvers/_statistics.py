"""Checks and statistics from one first pass over the rows, summed over all processes."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from captum_concepts.errors import InputError
from captum_concepts.solvers._rows import Rows, accumulation_dtype


class Reducer:
    """All-reduce of flat tensors over a process group, if any; the only communication between processes."""

    def __init__(self, group: Any = None) -> None:
        self.group = group
        if group is not None and group is not False:
            import torch.distributed as dist

            if not (dist.is_available() and dist.is_initialized()):
                raise InputError("process_group needs torch.distributed.init_process_group to have been called")

    def _all_reduce(self, tensor: Tensor, op_name: str) -> Tensor:
        if self.group is None or self.group is False:
            return tensor
        import torch.distributed as dist

        group = dist.group.WORLD if self.group is True else self.group
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, op_name), group=group)
        return tensor

    def sum(self, *tensors: Tensor) -> list[Tensor]:
        """Elementwise sums over all processes, in one message."""
        flat = self._all_reduce(torch.cat([t.reshape(-1) for t in tensors]), "SUM")
        parts = flat.split([t.numel() for t in tensors])
        return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]

    def min(self, tensor: Tensor) -> Tensor:
        """The elementwise minimum over all processes."""
        return self._all_reduce(tensor, "MIN")


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of the rows, such as class fractions (K,) and the mean of onehot(y) x^T (K, D)."""

    n_rows: int
    total_weight: float
    fractions: Tensor
    class_sums: Tensor
    present: list[int]
    num_classes: int
    mean: Tensor | None = None
    std: Tensor | None = None


def gather_statistics(
    rows: Rows, reducer: Reducer, loss: str, num_classes: int | None, *, standardize: bool
) -> RowStatistics:
    """The statistics of the rows, checked and summed per class in one pass.

    Afterwards ``rows`` yields labels 0.. of the classes that have rows, and standardized features if requested.

    Raises:
        InputError: NaN or infinite rows, labels out of range, or fewer than two classes with positive weight.
    """
    if loss not in ("multinomial", "logistic"):
        raise InputError(f'loss must be "multinomial" or "logistic"; got {loss!r}')
    check_num_classes(num_classes)
    if loss == "logistic" and num_classes not in (None, 2):
        raise InputError(f'loss="logistic" is for two classes; got num_classes={num_classes}')
    acc = accumulation_dtype(rows.device)
    labels = rows.labels()
    ends = torch.stack([labels.min(), -labels.max()]).to(acc)
    low, high = (int(v) for v in reducer.min(ends) * torch.tensor([1, -1], device=ends.device))
    n_classes = int(num_classes) if num_classes is not None else 2 if loss == "logistic" else high + 1
    if low < 0 or high >= n_classes:
        raise InputError(
            f"labels must be in 0..{n_classes - 1} (num_classes={n_classes}); got labels from {low} to {high}"
        )
    n_features, device = rows.n_features, rows.device
    sums = torch.zeros(n_classes, n_features, dtype=acc, device=device)
    weights = torch.zeros(n_classes, dtype=acc, device=device)
    squares = torch.zeros(n_features, dtype=acc, device=device)
    n_rows = torch.zeros(1, dtype=acc, device=device)
    shift: Tensor | None = None
    for x, y, s in rows:
        hot = torch.zeros(x.shape[0], n_classes, dtype=x.dtype, device=device)
        hot.scatter_(1, y[:, None], torch.ones_like(hot[:, :1]) if s is None else s[:, None])
        sums += hot.T @ x
        weights += hot.sum(0, dtype=acc)
        n_rows += x.shape[0]
        if standardize:
            if shift is None:
                # Squares about a nearby point, because features far from zero would otherwise cause cancellation.
                shift = _shared_shift(x, reducer, acc)
            centred = x.to(acc) - shift
            squares += (centred.square() if s is None else centred.square() * s.to(acc)[:, None]).sum(0)
    shift = torch.zeros_like(squares) if shift is None else shift
    sums, weights, squares, n_rows = reducer.sum(sums, weights, squares, n_rows)
    _check_finite(sums)
    total = float(weights.sum())
    present = torch.nonzero(weights > 0).flatten().tolist()
    if len(present) < 2:
        what = "no row has a positive weight" if not present else f"all rows are of class {present[0]}"
        raise InputError(f"at least two classes with rows are needed to fit a classifier; {what}")
    mean = std = None
    class_sums = sums / total
    if standardize:
        mean = class_sums.sum(0)
        variance = (squares / total - (mean - shift).square()).clamp_min(0)
        std = variance.sqrt()
        # The standard deviation of a constant column is rounding noise, so do not divide by it.
        constant = std <= 1e-6 * mean.abs().clamp_min(1e-30)
        std = torch.where(constant, torch.ones_like(std), std)
        class_sums = (class_sums - (weights / total)[:, None] * mean) / std
        class_sums[:, constant] = 0
        rows.standardize(mean, std)
    if len(present) < n_classes:
        lookup = torch.zeros(n_classes, dtype=torch.long, device=device)
        lookup[present] = torch.arange(len(present), device=device)
        rows.relabel(lookup)
    return RowStatistics(
        n_rows=int(n_rows),
        total_weight=total,
        fractions=weights[present] / total,
        class_sums=class_sums[present],
        present=present,
        num_classes=n_classes,
        mean=mean,
        std=std,
    )


def check_num_classes(num_classes: int | None) -> None:
    """Raise if ``num_classes`` is neither None nor an integer."""
    if num_classes is not None and (isinstance(num_classes, bool) or not isinstance(num_classes, Integral)):
        raise InputError(f"num_classes must be an integer or None; got {num_classes!r}")


def _shared_shift(x: Tensor, reducer: Reducer, acc: torch.dtype) -> Tensor:
    # Processes must use the same shift and may have no rows, so several use zero; a single one uses its first row.
    alone = reducer.group is None or reducer.group is False
    return x[0].to(acc) if alone else torch.zeros_like(x[0], dtype=acc)


def _check_finite(sums: Tensor) -> None:
    bad = torch.nonzero(~torch.isfinite(sums).all(0)).flatten().tolist()
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise InputError(
            f"X contains NaN or infinite values in {len(bad)} of {sums.shape[1]} columns ({shown}); remove or "
            "replace those rows first"
        )
