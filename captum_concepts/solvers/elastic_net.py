"""Full-batch sparse and dense logistic classifiers, with ``fit_elastic_net`` and ``lambda_max``."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from captum_concepts.errors import ConvergenceWarning, InputError, InputWarning
from captum_concepts.solvers._objective import Objective
from captum_concepts.solvers._quasi_newton import Outcome, ProximalQuasiNewton
from captum_concepts.solvers._rows import as_rows
from captum_concepts.solvers._statistics import Reducer, check_num_classes
from captum_concepts.solvers.certificate import params_from
from captum_concepts.solvers.penalty import ElasticNet

# A class without rows has its optimum at a bias of minus infinity. A finite bias this far (in nats) below every row's
# log-sum-exp keeps its probability under 1e-17 on the rows.
_EMPTY_CLASS_DEPTH = 40.0


@dataclass(frozen=True, eq=False)
class ElasticNetResult:
    """A fitted linear classifier with its duality gap.

    Attributes:
        weight: (K, D), or (1, D) for ``loss="logistic"``; for standardized features if ``standardize=True``.
        bias: (K,) or (1,).
        objective: mean cross-entropy plus penalty, in nats.
        gap: duality gap, the objective minus a lower bound of the optimum. For ``lam=0`` the bound is 0, so the gap
            equals the objective and convergence depends on ``violation`` alone.
        violation: maximum distance of the negative gradient to the penalty's subdifferential.
        n_iter: steps taken.
        n_passes: passes over the rows, including the first one for checks and statistics.
        converged: whether gap and violation reached ``tol``.
        lam, alpha, loss: the problem.
        feature_mean, feature_std: (D,) mean and standard deviation if ``standardize=True``, else None.
    """

    weight: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)
    objective: float
    gap: float
    violation: float
    n_iter: int
    n_passes: int
    converged: bool
    lam: float
    alpha: float
    loss: str = "multinomial"
    feature_mean: Tensor | None = field(default=None, repr=False)
    feature_std: Tensor | None = field(default=None, repr=False)

    @property
    def nonzeros(self) -> Tensor:
        """The number of nonzero weights per class, (K,)."""
        return (self.weight != 0).sum(1)

    def raw(self) -> tuple[Tensor, Tensor]:
        """Weight and bias for the unstandardized features."""
        if self.feature_mean is None or self.feature_std is None:
            return self.weight, self.bias
        weight = self.weight / self.feature_std.to(self.weight)
        return weight, self.bias - weight @ self.feature_mean.to(weight)

    def decision_function(self, X: Tensor) -> Tensor:
        """Logits (N, K) or (N, 1) of unstandardized features (N, D)."""
        if not isinstance(X, Tensor):
            raise InputError(f"X must be a torch.Tensor (N, D), got {type(X).__name__}; pass torch.as_tensor(X)")
        weight, bias = self.raw()
        return X.to(weight) @ weight.T + bias


def fit_elastic_net(
    X: Any,
    y: Any,
    lam: float,
    *,
    alpha: float = 0.99,
    num_classes: int | None = None,
    tol: float = 1e-4,
    loss: str = "multinomial",
    sample_weight: Any = None,
    warm_start: ElasticNetResult | tuple[Tensor, Tensor] | None = None,
    standardize: bool = False,
    max_iter: int = 1000,
    chunk_size: int | None = None,
    device: torch.device | str | None = None,
    process_group: Any = None,
    show_progress: bool = False,
) -> ElasticNetResult:
    r"""Logistic regression with an elastic-net penalty, solved to a duality gap.

    The minimum is over W and the unpenalized bias b,

    .. math:: \frac{1}{\sum_i s_i} \sum_i s_i \, \mathrm{CE}(W x_i + b, y_i)
              + \lambda \left( \tfrac{1 - \alpha}{2} \|W\|_F^2 + \alpha \|W\|_1 \right).

    Each proximal quasi-Newton step costs one pass over the rows. The curvature is modeled by the features' second
    moments, scaled per class, and corrected by the last steps (see ``_metric.py``). For the pure L2 problem
    (``alpha=0``) the steps have a closed form, preconditioned L-BFGS.

    Args:
        X: (N, D) tensor, numpy array or memory map, or a re-iterable of (m, D) chunks; with ``y=None`` a re-iterable of
            ``(x, y)`` pairs. Computation is in float64 for float64, otherwise in float32 with sums, parameters and
            steps in float64.
        y: (N,) class indices 0..K-1.
        lam: strength of the penalty, at least 0.
        alpha: fraction of the L1 term; 1 is the lasso, 0 ridge.
        num_classes: K; None takes the largest label + 1.
        tol: stop when ``gap <= tol * (entropy of the class fractions)``, the loss of the best model without features,
            and ``violation <= tol * max |gradient|`` of that model.
        loss: ``"multinomial"``, K weight vectors; or ``"logistic"``, one vector for y in {0, 1}, pointing toward 1.
        sample_weight: (N,) non-negative; a weight of 2 is equivalent to repeating the row.
        warm_start: a result of the same shape, or ``(weight, bias)``.
        standardize: penalize weights of ``(x - mean) / std``; X is not copied. A constant column gets weight 0.
        max_iter: maximum number of steps.
        chunk_size: rows per chunk; memory grows with it, but the result does not depend on it (up to rounding).
        device: device of the computation; None takes that of X.
        process_group: a ``torch.distributed`` group, or True for the default one. Each process passes its own rows, and
            all return the same result.
        show_progress: show a progress bar of the steps.

    Returns:
        An :class:`ElasticNetResult`.

    Raises:
        InputError: NaN or infinite rows, labels out of range, fewer than two classes with rows, or wrong shapes.

    Warns:
        ConvergenceWarning: ``tol`` was not reached (the message reports the gap); or there is no penalty and the
            classes are separable, so no optimum exists (the returned weights separate them).
        InputWarning: a class below ``num_classes`` has no rows. It gets zero weights and a bias so low that its
            probability vanishes on the rows, the limit of the optimum.

    >>> X = torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [3.0, 1.0]])
    >>> result = fit_elastic_net(X, torch.tensor([0, 0, 1, 1]), lam=0.1)
    >>> result.converged, result.nonzeros.tolist()  # the constant column is never used
    (True, [1, 1])
    """
    objective = open_problem(
        X, y, num_classes=num_classes, loss=loss, sample_weight=sample_weight, standardize=standardize,
        chunk_size=chunk_size, device=device, process_group=process_group,
    )  # fmt: skip
    penalty = ElasticNet(lam, alpha)
    start = objective.null_params() if warm_start is None else warm_params(objective, warm_start)
    return solve_problem(
        ProximalQuasiNewton(objective),
        penalty,
        start,
        loss=loss,
        tol=tol,
        max_iter=max_iter,
        show_progress=show_progress,
    )


def lambda_max(
    X: Any,
    y: Any,
    alpha: float = 0.99,
    *,
    num_classes: int | None = None,
    loss: str = "multinomial",
    sample_weight: Any = None,
    standardize: bool = False,
    chunk_size: int | None = None,
    device: torch.device | str | None = None,
    process_group: Any = None,
) -> float:
    """The smallest ``lam`` at which all weights are zero: ``max |gradient of the mean loss at W = 0| / alpha``.

    With W = 0 and the best bias, predictions are the class fractions, so the gradient has a closed form and needs one
    pass. The result is infinite for ``alpha=0``, because ridge weights are never exactly zero.

    Args:
        X, y, num_classes, loss, sample_weight, standardize, chunk_size, device, process_group: as in
            :func:`fit_elastic_net`.
        alpha: fraction of the L1 term, in [0, 1].

    Raises:
        InputError: as in :func:`fit_elastic_net`.

    >>> X, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
    >>> lambda_max(X, y, alpha=1.0)  # both gradients are +-1/2
    0.5
    """
    penalty = ElasticNet(0.0, alpha)
    objective = open_problem(
        X, y, num_classes=num_classes, loss=loss, sample_weight=sample_weight, standardize=standardize,
        chunk_size=chunk_size, device=device, process_group=process_group,
    )  # fmt: skip
    return largest_lambda(objective, penalty.alpha)


def largest_lambda(objective: Objective, alpha: float) -> float:
    """:func:`lambda_max` of an opened problem."""
    return float(objective.null_gradient().abs().amax()) / alpha if alpha > 0 else math.inf


def open_problem(
    X: Any,
    y: Any,
    *,
    num_classes: int | None,
    loss: str,
    sample_weight: Any,
    standardize: bool,
    chunk_size: int | None,
    device: torch.device | str | None,
    process_group: Any,
) -> Objective:
    """The objective of checked rows, with their statistics; warns about classes without rows."""
    check_num_classes(num_classes)
    rows = as_rows(
        X, y, sample_weight=sample_weight, device=device, chunk_size=chunk_size, num_outputs_hint=num_classes or 1
    )
    objective = Objective(rows, loss, num_classes, standardize=standardize, reducer=Reducer(process_group))
    empty = sorted(set(range(objective.stats.num_classes)) - set(objective.stats.present))
    if empty:
        shown = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
        warnings.warn(
            f"{len(empty)} of {objective.stats.num_classes} classes have no rows ({shown}): their weights are zero "
            "and their bias makes their probability vanish",
            InputWarning,
            stacklevel=3,
        )
    return objective


def solve_problem(
    solver: ProximalQuasiNewton,
    penalty: ElasticNet,
    start: Tensor,
    *,
    loss: str,
    tol: float,
    max_iter: int,
    show_progress: bool = False,
    stacklevel: int = 3,
) -> ElasticNetResult:
    """The result for one penalty, solved from ``start``; warns if it did not converge."""
    if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not 0 < tol < math.inf:
        raise InputError(f"tol must be a positive number; got {tol!r}")
    if isinstance(max_iter, bool) or not isinstance(max_iter, int) or max_iter < 1:
        raise InputError(f"max_iter must be a positive integer; got {max_iter!r}")
    passes = solver.objective.n_passes if solver.started else 0
    outcome = solver.solve(penalty, start, tol=tol, max_iter=max_iter, show_progress=show_progress)
    if not outcome.converged:
        warnings.warn(_why(outcome, tol, solver.objective.null_value()), ConvergenceWarning, stacklevel=stacklevel)
    objective, here = solver.objective, outcome.evaluation
    dtype = objective.rows.result_dtype
    params = here.params
    if len(objective.stats.present) < objective.stats.num_classes:
        full = params.new_zeros(objective.stats.num_classes, params.shape[1])
        full[:, -1] = (here.bound.floor if here.bound is not None else 0.0) - _EMPTY_CLASS_DEPTH
        full[objective.stats.present] = params
        params = full
    certificate = outcome.certificate
    return ElasticNetResult(
        weight=params[:, :-1].to(dtype).contiguous(),
        bias=params[:, -1].to(dtype).contiguous(),
        objective=certificate.objective,
        gap=certificate.gap,
        violation=certificate.violation,
        n_iter=outcome.n_iter,
        n_passes=objective.n_passes - passes,
        converged=outcome.converged,
        lam=penalty.lam,
        alpha=penalty.alpha,
        loss=loss,
        feature_mean=objective.stats.mean,
        feature_std=objective.stats.std,
    )


def _why(outcome: Outcome, tol: float, null_value: float) -> str:
    gap, slope, n = outcome.certificate.gap, outcome.certificate.violation, outcome.n_iter
    if outcome.reason == "separable":
        return (
            "without a penalty (lam=0) these rows have no optimum: the classes can be separated, so the loss falls to "
            f"0 as the weights grow. Returned weights classify every row correctly, loss {gap:.3g}; use lam > 0"
        )
    reached = f"duality gap {gap:.3g} (asked: {tol * null_value:.3g}), optimality violation {slope:.3g}"
    if outcome.reason == "max_iter":
        return f"stopped after max_iter={n} steps: {reached}; raise max_iter or tol"
    return f"stopped after {n} steps at the limit of the arithmetic: {reached}; raise tol or pass float64 rows"


def warm_params(objective: Objective, start: ElasticNetResult | tuple[Tensor, Tensor]) -> Tensor:
    """The parameters ``(O, D + 1)`` of a result, or of a weight and a bias, to start from."""
    if isinstance(start, ElasticNetResult):
        return params_from(objective, start.weight, start.bias)
    if not isinstance(start, (tuple, list)) or len(start) != 2:
        raise InputError(f"warm_start must be a result or a pair (weight, bias); got {type(start).__name__}")
    return params_from(objective, start[0], start[1])
