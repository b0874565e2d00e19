"""The smooth part of the problem, as sums over the rows of all chunks and processes.

Parameters are one tensor (O, D + 1) with the bias in the last column. All decisions of the solver depend on reduced
sums from here, so processes with disjoint rows make the same decisions and reach the same result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_concepts.solvers._rows import Rows, accumulation_dtype
from captum_concepts.solvers._statistics import Reducer, gather_statistics
from captum_concepts.solvers.loss import CurvatureTerms, LogisticLoss, Loss, MultinomialLoss


@dataclass(frozen=True)
class Bound:
    """Means and extremes for the duality gap; see :class:`~captum_concepts.solvers.loss.DualTerms`."""

    negentropy: float
    negentropy_tight: float
    margin: float
    floor: float


@dataclass(frozen=True)
class Evaluation:
    """Value and gradient at ``params`` (O, D + 1), as means over the rows, and moments and bound if requested."""

    params: Tensor
    value: float
    gradient: Tensor
    bound: Bound | None
    curvature: Tensor
    moments: Tensor | None
    detail: str | None


class Objective:
    """Mean loss over all rows of all processes, with gradient, curvature and second moments.

    Args:
        rows: the rows of this process.
        loss: ``"multinomial"`` or ``"logistic"``.
        num_classes: K, or None for the largest label + 1.
        standardize: work on ``(x - mean) / std``.
        reducer: sums over processes.

    Raises:
        InputError: NaN or infinite rows, labels out of range, or fewer than two classes with positive weight.
    """

    def __init__(
        self,
        rows: Rows,
        loss: str,
        num_classes: int | None,
        *,
        standardize: bool = False,
        reducer: Reducer | None = None,
    ) -> None:
        self.rows = rows
        self.reducer = reducer or Reducer()
        self.acc = accumulation_dtype(rows.device)
        self.n_passes = 1  # the statistics
        self.stats = gather_statistics(rows, self.reducer, loss, num_classes, standardize=standardize)
        n_present = len(self.stats.present)
        self.loss: Loss = LogisticLoss() if loss == "logistic" else MultinomialLoss(n_present)
        self.moments = self.loss.label_moments(self.stats.class_sums)
        self.feature_mean = self.stats.class_sums.sum(0)

    def null_params(self) -> Tensor:
        """Zero weights and the best bias, (O, D + 1)."""
        params = torch.zeros(self.loss.num_outputs, self.rows.n_features + 1, dtype=self.acc, device=self.rows.device)
        params[:, -1] = self.loss.null_bias(self.stats.fractions)
        return params

    def null_value(self) -> float:
        """The mean loss of the best model without features."""
        return self.loss.null_value(self.stats.fractions)

    def null_gradient(self) -> Tensor:
        """The gradient by the weights (O, D) at :meth:`null_params`, in closed form."""
        fractions = self.stats.fractions if self.loss.num_outputs > 1 else self.stats.fractions[1:]
        return fractions[:, None] * self.feature_mean - self.moments

    def second_moments(self) -> Tensor:
        """(D + 1,) weighted means of x^2, and 1 at the end, in one pass; for problems too wide for a D x D matrix."""
        out = torch.zeros(self.rows.n_features + 1, dtype=self.acc, device=self.rows.device)
        self.n_passes += 1
        for x, _, s in self.rows:
            out[:-1] += (x * x).sum(0) if s is None else s @ (x * x)
        (out,) = self.reducer.sum(out)
        out /= self.stats.total_weight
        out[-1] = 1
        return out

    def stride(self, detail: str) -> int:
        """The stride of the sample of rows for second moments, which only shape the steps."""
        n_cols = self.rows.n_features + 1
        size = n_cols * self.loss.num_outputs if detail == "full" else n_cols
        return max(1, self.stats.n_rows // max(8 * size, 2048))

    def cost(self, detail: str | None) -> float:
        """The multiplications of one pass (None), or of the second moments of a given detail."""
        n, n_cols, n_out = self.stats.n_rows, self.rows.n_features + 1, self.loss.num_outputs
        if detail is None:
            return 2.0 * n * n_cols * n_out
        copies = {"shared": n_cols**2, "class": n_out * n_cols**2, "full": (n_out * n_cols) ** 2}
        return n / self.stride(detail) * copies[detail]

    def evaluate(self, params: Tensor, *, detail: str | None = None, dual: bool = False) -> Evaluation:
        """The evaluation at ``params`` (O, D + 1), in one pass over all rows.

        Args:
            params: weights and, in the last column, bias.
            detail: also compute second moments of (x, 1), P = D + 1, from a regular sample of the rows: ``"shared"``
                (P, P) weighted by each row's curvature and divided by its mean; ``"class"`` (O, P, P), the diagonal
                blocks of the Hessian; ``"full"`` (O P, O P), the Hessian.
            dual: also compute the terms of the duality gap.
        """
        acc, device = self.acc, self.rows.device
        n_out, n_cols = params.shape
        scalars = torch.zeros(4, dtype=acc, device=device)
        gradient = torch.zeros(n_out, n_cols, dtype=acc, device=device)
        curvature = torch.zeros(n_out, dtype=acc, device=device)
        ends = torch.full((2,), float("inf"), dtype=acc, device=device)
        moments = None
        if detail is not None:
            shape = {"shared": (n_cols, n_cols), "class": (n_out, n_cols, n_cols), "full": (n_out * n_cols,) * 2}[
                detail
            ]
            moments = torch.zeros(shape, dtype=acc, device=device)
        stride = 1 if detail is None else self.stride(detail)
        weight = params[:, :-1].to(self.rows.dtype)
        bias = params[:, -1].to(self.rows.dtype)
        offset = 0
        self.n_passes += 1
        for x, y, s in self.rows:
            terms = self.loss.terms(torch.addmm(bias, x, weight.T), y, s, curvature=detail is not None, dual=dual)
            gradient[:, :-1] += terms.residual.T @ x
            gradient[:, -1] += terms.residual.sum(0, dtype=acc)
            scalars[0] += terms.value
            if terms.dual is not None:
                scalars[1] += terms.dual.negentropy
                scalars[2] += terms.dual.negentropy_tight
                ends = torch.minimum(ends, torch.stack([terms.dual.margin, terms.dual.floor]))
            if moments is not None and terms.curvature is not None:
                curvature += terms.curvature.output
                sample = slice(-offset % stride, None, stride)
                part = torch.cat([x[sample], x.new_ones(x[sample].shape[0], 1)], 1)
                share = x.new_ones(part.shape[0]) if s is None else s[sample]
                scalars[3] += _add_moments(moments, part, share, terms.curvature, sample, detail)
            offset += x.shape[0]
        parts = [scalars, gradient, curvature] + ([moments] if moments is not None else [])
        reduced = self.reducer.sum(*parts)
        ends = self.reducer.min(ends) if dual else ends
        scalars, gradient, curvature = reduced[:3]
        total = self.stats.total_weight
        value, negentropy, tight, share_sum = scalars.tolist()
        bound = Bound(negentropy / total, tight / total, float(ends[0]), float(ends[1])) if dual else None
        return Evaluation(
            params=params,
            value=value / total,
            gradient=gradient / total,
            bound=bound,
            curvature=curvature / total,
            moments=reduced[3] / max(share_sum, 1e-300) if moments is not None else None,
            detail=detail,
        )


def _add_moments(
    moments: Tensor, x: Tensor, weight: Tensor, terms: CurvatureTerms, sample: slice, detail: str | None
) -> Tensor:
    """Add the second moments of some rows (m, P) in place and return the sum of their weights."""
    if detail == "shared":
        share = terms.row[sample].clamp_min(0)
        part = x * share.sqrt()[:, None]
        moments += part.T @ part
        return share.sum()
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
        cross[range(n_out), :, range(n_out)] = 0  # the diagonal blocks are already complete
        moments -= cross.view(n_out * n_cols, -1)
    return weight.sum()
