"""The smooth part of the problem as sums over all rows: of every chunk, and of every process.

Parameters are one tensor (O, D + 1), bias in the last column. Everything the solver decides on is computed here from
reduced sums, so several processes that hold disjoint rows take the same decisions and reach the same answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_concepts.errors import InputError
from captum_concepts.solvers._rows import Rows, accumulation_dtype
from captum_concepts.solvers.loss import LogisticLoss, Loss, LossTerms, MultinomialLoss


class Reducer:
    """The one place where processes talk: all-reduce of flat tensors over a process group (or nothing)."""

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
        """Element-wise sums over all processes, in one message."""
        flat = self._all_reduce(torch.cat([t.reshape(-1) for t in tensors]), "SUM")
        parts = flat.split([t.numel() for t in tensors])
        return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]

    def min(self, tensor: Tensor) -> Tensor:
        """Element-wise minimum over all processes."""
        return self._all_reduce(tensor, "MIN")


@dataclass(frozen=True)
class Evaluation:
    """Means over the rows at one point ``params``; see :class:`~captum_concepts.solvers.loss.LossTerms`."""

    params: Tensor
    value: float
    gradient: Tensor
    negentropy: float
    negentropy_tight: float | None
    curvature: Tensor
    margin: float
    floor: float
    moments: Tensor | None
    detail: str | None


@dataclass(frozen=True)
class RowStatistics:
    """What one first pass over the rows tells: class fractions (K,), mean of onehot(y) x^T (K, D), and so on."""

    n_rows: int
    total_weight: float
    fractions: Tensor
    class_sums: Tensor
    present: list[int]
    num_classes: int
    mean: Tensor | None = None
    std: Tensor | None = None


class Objective:
    """Mean loss over all rows of all processes, with gradient, curvature and second moments.

    Args:
        rows: the rows of this process.
        loss: ``"multinomial"`` or ``"logistic"``.
        num_classes: K, or None for the largest label + 1.
        standardize: work on ``(x - mean) / std``.
        reducer: sums over processes.

    Raises:
        InputError: on NaN or infinite rows, labels out of range, fewer than two classes with positive weight.
    """

    def __init__(
        self, rows: Rows, loss: str, num_classes: int | None, *, standardize: bool = False, reducer: Reducer | None = None
    ) -> None:
        self.rows = rows
        self.reducer = reducer or Reducer()
        self.acc = accumulation_dtype(rows.device)
        self.n_passes = 0
        self.stats = self._statistics(loss, num_classes, standardize)
        n_present = len(self.stats.present)
        self.loss: Loss = LogisticLoss() if loss == "logistic" else MultinomialLoss(n_present)
        self.moments = self.loss.label_moments(self.stats.class_sums)
        self.feature_mean = self.stats.class_sums.sum(0)

    def _statistics(self, loss: str, num_classes: int | None, standardize: bool) -> RowStatistics:
        if loss not in ("multinomial", "logistic"):
            raise InputError(f'loss must be "multinomial" or "logistic"; got {loss!r}')
        if num_classes is not None and (isinstance(num_classes, bool) or int(num_classes) != num_classes):
            raise InputError(f"num_classes must be an integer or None; got {num_classes!r}")
        if loss == "logistic" and num_classes not in (None, 2):
            raise InputError(f'loss="logistic" is for two classes; got num_classes={num_classes}')
        labels = self.rows.labels()
        ends = torch.stack([labels.min(), -labels.max()]).to(self.acc)
        low, high = (int(v) for v in self.reducer.min(ends) * torch.tensor([1, -1], device=ends.device))
        n_classes = int(num_classes) if num_classes is not None else 2 if loss == "logistic" else high + 1
        if low < 0 or high >= n_classes:
            raise InputError(
                f"labels must be in 0..{n_classes - 1} (num_classes={n_classes}); got labels from {low} to {high}"
            )
        n_features, device, acc = self.rows.n_features, self.rows.device, self.acc
        sums = torch.zeros(n_classes, n_features, dtype=acc, device=device)
        weights = torch.zeros(n_classes, dtype=acc, device=device)
        squares = torch.zeros(n_features, dtype=acc, device=device)
        n_rows = torch.zeros(1, dtype=acc, device=device)
        shift: Tensor | None = None
        self.n_passes += 1
        for x, y, s in self.rows:
            hot = torch.zeros(x.shape[0], n_classes, dtype=x.dtype, device=device)
            hot.scatter_(1, y[:, None], torch.ones_like(hot[:, :1]) if s is None else s[:, None])
            sums += hot.T @ x
            weights += hot.sum(0, dtype=acc)
            n_rows += x.shape[0]
            if standardize:
                if shift is None:
                    # Sums of squares about a nearby point: about zero they would cancel for features far from zero.
                    shift = self._shared_shift(x)
                centred = x.to(acc) - shift
                squares += (centred.square() if s is None else centred.square() * s.to(acc)[:, None]).sum(0)
        shift = torch.zeros_like(squares) if shift is None else shift
        sums, weights, squares, n_rows = self.reducer.sum(sums, weights, squares, n_rows)
        self._check_finite(sums)
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
            # A constant column has rounding noise for a standard deviation; dividing by that would make it a feature.
            constant = std <= 1e-6 * mean.abs().clamp_min(1e-30)
            std = torch.where(constant, torch.ones_like(std), std)
            class_sums = (class_sums - (weights / total)[:, None] * mean) / std
            class_sums[:, constant] = 0
            self.rows.standardize(mean, std)
        if len(present) < n_classes:
            lookup = torch.zeros(n_classes, dtype=torch.long, device=device)
            lookup[present] = torch.arange(len(present), device=device)
            self.rows.relabel(lookup)
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

    def _shared_shift(self, x: Tensor) -> Tensor:
        # Only processes that hold rows get here, and every one must use the same shift: zero is the safe choice
        # where several sum up; alone, the first row is the better one.
        alone = self.reducer.group is None or self.reducer.group is False
        return x[0].to(self.acc) if alone else torch.zeros_like(x[0], dtype=self.acc)

    def _check_finite(self, sums: Tensor) -> None:
        bad = torch.nonzero(~torch.isfinite(sums).all(0)).flatten().tolist()
        if bad:
            shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
            raise InputError(
                f"X contains NaN or infinite values in {len(bad)} of {sums.shape[1]} columns ({shown}); remove or "
                "replace those rows first"
            )

    def null_params(self) -> Tensor:
        """Zero weights and the best bias, (O, D + 1)."""
        params = torch.zeros(
            self.loss.num_outputs, self.rows.n_features + 1, dtype=self.acc, device=self.rows.device
        )
        params[:, -1] = self.loss.null_bias(self.stats.fractions)
        return params

    def null_value(self) -> float:
        """Mean loss of the best model without features."""
        return self.loss.null_value(self.stats.fractions)

    def null_gradient(self) -> Tensor:
        """Gradient by the weights (O, D) at :meth:`null_params`, in closed form."""
        fractions = self.stats.fractions if self.loss.num_outputs > 1 else self.stats.fractions[1:]
        return fractions[:, None] * self.feature_mean - self.moments

    def second_moments(self) -> Tensor:
        """Weighted means of x^2 and, last, 1: (D + 1,); one pass, for problems too wide for a D x D matrix."""
        out = torch.zeros(self.rows.n_features + 1, dtype=self.acc, device=self.rows.device)
        self.n_passes += 1
        for x, _, s in self.rows:
            out[:-1] += (x * x).sum(0) if s is None else s @ (x * x)
        (out,) = self.reducer.sum(out)
        out /= self.stats.total_weight
        out[-1] = 1
        return out

    def stride(self, detail: str) -> int:
        """Every how many rows one is taken for second moments: they only shape steps, so a sample of rows will do."""
        n_cols = self.rows.n_features + 1
        size = n_cols * self.loss.num_outputs if detail == "full" else n_cols
        return max(1, self.stats.n_rows // max(8 * size, 2048))

    def cost(self, detail: str | None) -> float:
        """Multiplications of one pass (None), or of the second moments of a given detail."""
        n, n_cols, n_out = self.stats.n_rows, self.rows.n_features + 1, self.loss.num_outputs
        if detail is None:
            return 2.0 * n * n_cols * n_out
        copies = {"shared": n_cols**2, "class": n_out * n_cols**2, "full": (n_out * n_cols) ** 2}
        return n / self.stride(detail) * copies[detail]

    def evaluate(self, params: Tensor, *, detail: str | None = None, tight: bool = False) -> Evaluation:
        """One pass over all rows at ``params`` (O, D + 1).

        Args:
            params: weights and, in the last column, bias.
            detail: also second moments of (x, 1), P = D + 1, from a regular sample of the rows: ``"shared"`` (P, P)
                weighted by each row's curvature and divided by its mean; ``"class"`` (O, P, P), the diagonal blocks of
                the Hessian; ``"full"`` (O P, O P), the Hessian.
            tight: also the second point of the dual bound.
        """
        acc, device = self.acc, self.rows.device
        n_out, n_cols = params.shape
        scalars = torch.zeros(4, dtype=acc, device=device)
        gradient = torch.zeros(n_out, n_cols, dtype=acc, device=device)
        curvature = torch.zeros(n_out, dtype=acc, device=device)
        ends = torch.full((2,), float("inf"), dtype=acc, device=device)
        moments = None
        if detail is not None:
            shape = {"shared": (n_cols, n_cols), "class": (n_out, n_cols, n_cols), "full": (n_out * n_cols,) * 2}[detail]
            moments = torch.zeros(shape, dtype=acc, device=device)
        stride = 1 if detail is None else self.stride(detail)
        weight = params[:, :-1].to(self.rows.dtype)
        bias = params[:, -1].to(self.rows.dtype)
        offset = 0
        self.n_passes += 1
        for x, y, s in self.rows:
            terms = self.loss.terms(
                torch.addmm(bias, x, weight.T), y, s, tight=tight, probability=detail in ("class", "full")
            )
            gradient[:, :-1] += terms.residual.T @ x
            gradient[:, -1] += terms.residual.sum(0, dtype=acc)
            curvature += terms.curvature
            scalars[0] += terms.value
            scalars[1] += terms.negentropy
            if terms.negentropy_tight is not None:
                scalars[2] += terms.negentropy_tight
            ends = torch.minimum(ends, torch.stack([terms.margin, terms.floor]))
            if moments is not None:
                sample = slice(-offset % stride, None, stride)
                part = torch.cat([x[sample], x.new_ones(x[sample].shape[0], 1)], 1)
                share = x.new_ones(part.shape[0]) if s is None else s[sample]
                scalars[3] += _add_moments(moments, part, share, terms, sample, detail)
            offset += x.shape[0]
        parts = [scalars, gradient, curvature] + ([moments] if moments is not None else [])
        reduced = self.reducer.sum(*parts)
        ends = self.reducer.min(ends)
        scalars, gradient, curvature = reduced[:3]
        total = self.stats.total_weight
        value, negentropy, tight_value, share_sum = scalars.tolist()
        return Evaluation(
            params=params,
            value=value / total,
            gradient=gradient / total,
            negentropy=negentropy / total,
            negentropy_tight=tight_value / total if tight else None,
            curvature=curvature / total,
            margin=float(ends[0]),
            floor=float(ends[1]),
            moments=reduced[3] / max(share_sum, 1e-300) if moments is not None else None,
            detail=detail,
        )


def _add_moments(
    moments: Tensor, x: Tensor, weight: Tensor, terms: LossTerms, sample: slice, detail: str | None
) -> Tensor:
    """Add the second moments of some rows (m, P) in place; returns the sum of their weights."""
    if detail == "shared":
        share = terms.row_curvature[sample].clamp_min(0)
        part = x * share.sqrt()[:, None]
        moments += part.T @ part
        return share.sum()
    if terms.probability is None:
        raise RuntimeError("second moments by class need the probabilities")
    p = terms.probability[sample]
    n_out, n_cols = p.shape[1], x.shape[1]
    roots = (weight[:, None] * p * (1 - p)).clamp_min(0).sqrt()
    for k in range(n_out):
        part = x * roots[:, k : k + 1]
        block = part.T @ part
        if detail == "class":
            moments[k] += block
        else:
            moments[k * n_cols : (k + 1) * n_cols, k * n_cols : (k + 1) * n_cols] += block
    if detail == "full" and n_out > 1:
        part = ((weight.sqrt()[:, None] * p)[:, :, None] * x[:, None, :]).flatten(1)
        cross = (part.T @ part).view(n_out, n_cols, n_out, n_cols)
        cross[range(n_out), :, range(n_out)] = 0  # the blocks on the diagonal are complete already
        moments -= cross.view(n_out * n_cols, -1)
    return weight.sum()
