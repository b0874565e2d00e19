"""``relaxed_fit`` refits the selected weights of a sparse classifier without the L1 penalty."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_concepts.errors import InputError
from captum_concepts.solvers._objective import Objective
from captum_concepts.solvers._quasi_newton import Outcome
from captum_concepts.solvers.certificate import certify, params_from
from captum_concepts.solvers.elastic_net import ElasticNetResult, open_problem, solve_problem, warm_params

#: Maximum steps between two looks at the duality gap.
_STEPS = 50


def relaxed_fit(
    X: Any,
    y: Any,
    support: Any,
    lam: float,
    *,
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
) -> ElasticNetResult:
    r"""Refit the selected weights of a sparse classifier with a ridge penalty (relaxed lasso, Meinshausen 2007).

    An L1 penalty selects weights and shrinks them at once. A few weights per class need a strong penalty, which leaves
    the selected weights much too small. Here the selection S stays and only the values are fitted,

    .. math:: \min_{W, b} \frac{1}{\sum_i s_i} \sum_i s_i \, \mathrm{CE}(W x_i + b, y_i) + \tfrac{\lambda}{2} \|W\|_F^2
        \quad \text{with } W_{kj} = 0 \text{ for } (k, j) \notin S.

    Args:
        X, y, num_classes, tol, loss, sample_weight, warm_start, standardize, chunk_size, device, process_group: as in
            :func:`~captum_concepts.solvers.fit_elastic_net`.
        support: (K, D), or (1, D) for ``loss="logistic"``; true where a weight may differ from zero, for example
            ``result.weight != 0``.
        lam: strength of the ridge, positive. It keeps the weights finite if the features separate the classes.
        max_iter: maximum number of L-BFGS steps.

    Returns:
        A result with ``alpha=0``; its objective, gap and violation are those of the problem above.

    Raises:
        InputError: ``lam`` is not positive, ``support`` has another shape or is not bool, or anything that
            ``fit_elastic_net`` refuses.

    Warns:
        ConvergenceWarning, InputWarning: as in ``fit_elastic_net``.

    >>> from captum_concepts.solvers import fit_elastic_net
    >>> X, y = torch.tensor([[0.0, 1.0], [1.0, 1.2], [2.0, 1.0], [3.0, 1.1]]), torch.tensor([0, 1, 0, 1])
    >>> sparse = fit_elastic_net(X, y, lam=0.1)
    >>> relaxed = relaxed_fit(X, y, sparse.weight != 0, lam=0.01)
    >>> sparse.nonzeros.tolist(), relaxed.nonzeros.tolist()
    ([1, 1], [1, 1])
    >>> bool(relaxed.weight.norm() > sparse.weight.norm())
    True
    """
    if isinstance(lam, bool) or not isinstance(lam, (int, float)) or not 0 < lam < math.inf:
        raise InputError(f"lam must be a positive number; got {lam!r}")
    support = torch.as_tensor(support)
    if support.dtype != torch.bool:
        raise InputError(f"support must be bool, for example result.weight != 0; got {support.dtype}")
    objective = open_problem(
        X, y, num_classes=num_classes, loss=loss, sample_weight=sample_weight, standardize=standardize,
        chunk_size=chunk_size, device=device, process_group=process_group,
    )  # fmt: skip
    wanted = (1 if loss == "logistic" else objective.stats.num_classes, objective.rows.n_features)
    if tuple(support.shape) != wanted:
        raise InputError(f"support must have shape {wanted}; got {tuple(support.shape)}")
    chosen = params_from(objective, support.double(), torch.ones(len(support))) != 0
    start = objective.null_params() if warm_start is None else warm_params(objective, warm_start)
    # These two offer what `solve_problem` uses of a solver and a penalty.
    solver: Any = _OnSupport(objective, chosen)
    penalty: Any = _Ridge(float(lam), chosen[:, :-1])
    return solve_problem(solver, penalty, start * chosen, loss=loss, tol=tol, max_iter=max_iter)


@dataclass(frozen=True)
class _Ridge:
    """``lam / 2 |W|_F^2`` for weights that are zero outside of ``support`` (O, D)."""

    lam: float
    support: Tensor
    alpha: float = 0.0
    l1: float = 0.0

    @property
    def l2(self) -> float:
        """The weight of half the sum of squares."""
        return self.lam

    def value(self, weight: Tensor) -> float:
        """The penalty of ``weight``."""
        return 0.5 * self.lam * float(weight.square().sum())

    def conjugate(self, values: Tensor) -> float:
        """``sup_W <values, W> - penalty(W)``; what lies outside of the support costs nothing."""
        return float(values[self.support].square().sum() / (2 * self.lam))

    def violation(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """The elementwise distance of ``-gradient`` to the subdifferential."""
        return (gradient + self.lam * weight).abs() * self.support


class _OnSupport:
    """L-BFGS over the weights and biases in ``chosen`` (O, D + 1).

    Args:
        objective: the mean loss.
        chosen: the free parameters.
    """

    def __init__(self, objective: Objective, chosen: Tensor) -> None:
        self.objective = objective
        self.chosen = chosen
        self.started = False
        if objective.rows.device.type != "mps":
            objective.rows.dtype = torch.float64  # the line search compares values that differ by little

    def solve(self, penalty: _Ridge, start: Tensor, *, tol: float, max_iter: int, **_: Any) -> Outcome:
        """Step from ``start`` until gap and violation are below ``tol``, relative to the model without features."""
        objective, chosen = self.objective, self.chosen
        gap_target = tol * objective.null_value()
        slope_target = tol * max(float(objective.null_gradient().abs().amax()), 1e-300)
        free = start[chosen].requires_grad_()
        optimizer = torch.optim.LBFGS(
            [free], tolerance_grad=slope_target, tolerance_change=0, line_search_fn="strong_wolfe"
        )
        settings = optimizer.param_groups[0]

        def params() -> Tensor:
            return start.index_put(chosen.nonzero(as_tuple=True), free.detach())

        def loss() -> Tensor:
            here = objective.evaluate(params())
            here.gradient[:, :-1] += penalty.lam * here.params[:, :-1]
            free.grad = here.gradient[chosen]
            return free.new_tensor(here.value + penalty.value(here.params[:, :-1]))

        best, taken = float("inf"), 0
        while True:
            settings["max_iter"] = min(_STEPS, max_iter - taken)
            optimizer.step(loss)
            taken = optimizer.state[free]["n_iter"]
            here = objective.evaluate(params(), dual=True)
            certificate = certify(objective, here, penalty)  # type: ignore[arg-type]
            if certificate.violation <= slope_target and certificate.gap <= gap_target:
                return Outcome(here, certificate, taken, True, "")
            if taken >= max_iter:
                return Outcome(here, certificate, taken, False, "max_iter")
            if certificate.violation >= best:
                return Outcome(here, certificate, taken, False, "stalled")
            best = certificate.violation
            settings["tolerance_grad"] = 0.1 * min(best, slope_target)  # a small gap may need a smaller gradient
