"""Curvature models of the loss, which define the metric of the solver's steps.

The Hessian of the mean loss is modeled as a structured part plus a correction from the last steps:

- structured: ``diag(c) (x) G``, with c_k the mean of p_k (1 - p_k) and G the second moments of (x, 1) weighted by the
  curvature of each row. The D x D matrix models the correlations between features, which make plain proximal gradient
  slow. If D x D is too large, its diagonal is used. If they cost little compared with the passes so far, the per-class
  blocks of the Hessian or the whole Hessian are used.
- correction: the last few (step, change of gradient) pairs in the compact form of BFGS (Byrd, Nocedal and Schnabel,
  1994), which model the coupling between classes and the rows' different weights.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]

#: Maximum classes for one Cholesky factor per class. All classes share eigenvectors, but an eigendecomposition costs
#: about as much as twenty-five factorizations.
_FACTORED = 16
#: Maximum entries of the stored factors.
_FACTORED_SIZE = 2**26
#: Keeps eigenvalues at rounding level (constant or repeated columns) from causing huge steps.
_FLOOR = 1e-7


class Metric(Protocol):
    """A symmetric positive definite operator on (O, P) tensors."""

    diagonal: Tensor

    def apply(self, v: Tensor) -> Tensor:
        """The operator times ``v`` (O, P)."""

    def restrict(self, columns: Tensor) -> Metric:
        """The operator on a subset of the columns."""

    def scaled(self, factor: float) -> Metric:
        """The operator times a number."""

    def solve(self, v: Tensor, ridge: float) -> Tensor:
        """(operator + ridge on all columns but the last)^-1 times ``v``."""


class DiagonalMetric:
    """``diag(c) (x) diag(G)``."""

    def __init__(self, diagonal: Tensor) -> None:
        self.diagonal = diagonal

    def apply(self, v: Tensor) -> Tensor:
        return self.diagonal * v

    def restrict(self, columns: Tensor) -> DiagonalMetric:
        return DiagonalMetric(self.diagonal[:, columns])

    def scaled(self, factor: float) -> DiagonalMetric:
        return DiagonalMetric(self.diagonal * factor)

    def solve(self, v: Tensor, ridge: float) -> Tensor:
        shift = torch.full_like(self.diagonal[:1], ridge)
        shift[:, -1] = 0
        return v / (self.diagonal + shift)


class KroneckerMetric:
    """``diag(c) (x) G``, ``c`` (O,) and ``G`` (P, P), bias in the last column."""

    def __init__(self, scale: Tensor, gram: Tensor) -> None:
        self.scale = scale[:, None]
        self.gram = gram
        self.diagonal = self.scale * torch.diagonal(gram)[None]
        self._spectrum: tuple[Tensor, Tensor] | None = None
        self._factors: tuple[float, Tensor | None] | None = None

    def apply(self, v: Tensor) -> Tensor:
        return self.scale * (v @ self.gram)

    def restrict(self, columns: Tensor) -> KroneckerMetric:
        return KroneckerMetric(self.scale[:, 0], self.gram[columns][:, columns])

    def scaled(self, factor: float) -> KroneckerMetric:
        return KroneckerMetric(self.scale[:, 0] * factor, self.gram)

    def solve(self, v: Tensor, ridge: float) -> Tensor:
        # The bias is not penalized, so it is eliminated first (Schur complement).
        corner, edge = self.gram[-1, -1], self.gram[:-1, -1]
        reduced = v[:, :-1] - v[:, -1:] * edge / corner
        weights = self._solve_centred(reduced, ridge)
        bias = (v[:, -1:] / self.scale - (weights @ edge)[:, None]) / corner
        return torch.cat([weights, bias], 1)

    def _solve_centred(self, v: Tensor, ridge: float) -> Tensor:
        n_out, n_cols = v.shape
        if self._spectrum is None and n_out <= _FACTORED and n_out * n_cols**2 <= _FACTORED_SIZE:
            if self._factors is None or self._factors[0] != ridge:
                centred = self._centred()
                floor = _FLOOR * torch.linalg.matrix_norm(centred).clamp_min(1e-30)
                stiff = self.scale[:, :, None] * centred
                stiff.diagonal(dim1=1, dim2=2).add_(self.scale * floor + ridge)
                factors, failed = torch.linalg.cholesky_ex(stiff)
                self._factors = (ridge, None if bool((failed != 0).any()) else factors)
            if (known := self._factors[1]) is not None:
                return torch.cholesky_solve(v[:, :, None], known)[:, :, 0]
        if self._spectrum is None:
            values, vectors = torch.linalg.eigh(self._centred())
            self._spectrum = values.clamp_min(0), vectors
        values, vectors = self._spectrum
        floor = _FLOOR * values[-1].clamp_min(1e-30)
        return ((v @ vectors) / (self.scale * (values + floor) + ridge)) @ vectors.T

    def _centred(self) -> Tensor:
        corner, edge = self.gram[-1, -1], self.gram[:-1, -1]
        return self.gram[:-1, :-1] - torch.outer(edge, edge) / corner


class BlockMetric:
    """Diagonal blocks (B, Q, Q), either B = O blocks of one class each or B = 1, the whole Hessian."""

    def __init__(self, blocks: Tensor, shape: tuple[int, int]) -> None:
        self.blocks = blocks
        self.shape = shape
        self.diagonal = torch.diagonal(blocks, dim1=1, dim2=2).reshape(shape)

    def apply(self, v: Tensor) -> Tensor:
        flat = v.reshape(self.blocks.shape[0], -1, 1)
        return torch.bmm(self.blocks, flat).view_as(v)

    def restrict(self, columns: Tensor) -> BlockMetric:
        n_out, n_cols = self.shape
        chosen = columns
        if self.blocks.shape[0] == 1:
            chosen = (torch.arange(n_out, device=columns.device)[:, None] * n_cols + columns).flatten()
        return BlockMetric(self.blocks[:, chosen][:, :, chosen], (n_out, columns.numel()))

    def scaled(self, factor: float) -> BlockMetric:
        return BlockMetric(self.blocks * factor, self.shape)

    def solve(self, v: Tensor, ridge: float) -> Tensor:
        # A small multiple of the diagonal bounds directions without curvature (repeated columns, shifts of all biases).
        shift = torch.full_like(v, ridge)
        shift[:, -1] = 0
        shift = shift + 1e-9 * self.diagonal + 1e-20 * self.diagonal.amax()
        n_blocks = self.blocks.shape[0]
        factors, failed = torch.linalg.cholesky_ex(self.blocks + torch.diag_embed(shift.reshape(n_blocks, -1)))
        if bool((failed != 0).any()):
            return v / (self.diagonal + shift)
        return torch.cholesky_solve(v.reshape(n_blocks, -1, 1), factors).view_as(v)


class SecantMetric:
    """``metric`` corrected by secant pairs, as a direct operator (compact BFGS).

    ``blocks`` (B, Q, Q) is the operator itself if its entries are known, else None.
    """

    def __init__(self, metric: Metric, pairs: list[Pair]) -> None:
        self.metric = metric
        self.diagonal = metric.diagonal
        self._rows: Tensor | None = None
        self.blocks = metric.blocks if isinstance(metric, BlockMetric) else None
        pairs = [(s, y) for s, y in pairs if float((s * y).sum()) > 1e-12 * float(s.norm() * y.norm())]
        if not pairs:
            return
        steps = torch.stack([s for s, _ in pairs])
        changes = torch.stack([y for _, y in pairs]).flatten(1)
        moved = torch.stack([metric.apply(s) for s in steps]).flatten(1)
        steps = steps.flatten(1)
        cross = steps @ changes.T
        lower = torch.tril(cross, -1)
        middle = torch.cat(
            [torch.cat([steps @ moved.T, lower], 1), torch.cat([lower.T, -torch.diag(cross.diagonal())], 1)]
        )
        size = middle.diagonal().abs().rsqrt()
        inverse = size[:, None] * torch.linalg.pinv(size[:, None] * middle * size) * size
        rows = torch.cat([moved, changes])
        solved = inverse @ rows
        diagonal = self.diagonal - (rows * solved).sum(0).view_as(self.diagonal)
        if not bool(torch.isfinite(solved).all()):
            return
        self._rows, self._solved, self.blocks = rows, solved, None
        self.diagonal = torch.maximum(diagonal, 1e-3 * self.diagonal)

    def apply(self, v: Tensor) -> Tensor:
        """The operator times ``v`` (O, P)."""
        out = self.metric.apply(v)
        if self._rows is not None:
            out = out - ((self._rows @ v.flatten()) @ self._solved).view_as(v)
        return out


def inverse_secant(metric: Metric, pairs: list[Pair], ridge: float, v: Tensor) -> Tensor:
    """(secant-corrected metric)^-1 ``v`` by the two-loop recursion; the pairs must include the ridge."""
    pairs = [(s, y) for s, y in pairs if float((s * y).sum()) > 1e-12 * float(s.norm() * y.norm())]
    v = v.clone()
    shares = []
    for s, y in reversed(pairs):
        a = (s * v).sum() / (s * y).sum()
        v = v - a * y
        shares.append(a)
    v = metric.solve(v, ridge)
    for (s, y), a in zip(pairs, reversed(shares), strict=True):
        v = v + (a - (y * v).sum() / (s * y).sum()) * s
    return v
