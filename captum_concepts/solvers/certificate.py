"""Distance from the optimum, as a duality gap and the distance to the subdifferential.

The Fenchel dual of ``mean_i s_i loss(W x_i + b, y_i) + penalty(W)`` maximizes, over predictions q_i (probability
vectors) whose weighted mean equals the class fractions (the condition from the unpenalized bias),

    D(q) = - mean_i s_i sum_k q_ik log q_ik  -  penalty*( - mean_i s_i (q_i - onehot(y_i)) x_i^T ).

Any such q bounds the optimum from below. Here q = (1 - tau) onehot(y) + tau ((1 - e) p + e u), with the model's own
predictions p, a constant (e, u) that corrects the class fractions, and tau in [0, 1] chosen to maximize the bound. The
negentropy is convex in tau, so chords bound it from above and the bound remains valid without another pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_concepts.errors import InputError
from captum_concepts.solvers._objective import Evaluation, Objective
from captum_concepts.solvers._rows import as_rows, check_numbers
from captum_concepts.solvers._statistics import Reducer
from captum_concepts.solvers.loss import TIGHT_TAU
from captum_concepts.solvers.penalty import ElasticNet


class Certificate(NamedTuple):
    """The duality gap and optimality violation of a solution.

    Attributes:
        objective: mean cross-entropy plus penalty, in nats.
        gap: objective minus a lower bound of the optimum; the true excess is never larger (up to rounding).
        violation: maximum distance of the negative gradient to the penalty's subdifferential over all weights and
            biases, in units of the gradient; 0 exactly at an optimum.
    """

    objective: float
    gap: float
    violation: float


def violation(evaluation: Evaluation, penalty: ElasticNet) -> float:
    """The maximum optimality violation over weights and biases."""
    weights = penalty.violation(evaluation.params[:, :-1], evaluation.gradient[:, :-1])
    return max(float(weights.amax()), float(evaluation.gradient[:, -1].abs().amax()))


def certify(objective: Objective, evaluation: Evaluation, penalty: ElasticNet) -> Certificate:
    """The objective, gap and violation of one evaluated point, without another pass over the rows.

    Without a penalty (``lam=0``) the lower bound is 0.
    """
    value = evaluation.value + penalty.value(evaluation.params[:, :-1])
    dual = 0.0  # the loss and the penalty are never negative
    terms = evaluation.bound
    if terms is None:
        raise RuntimeError("a certificate needs an evaluation with dual=True")
    mix = objective.loss.bias_mixture(evaluation.gradient[:, -1], objective.stats.fractions)
    e = mix.share
    constant = mix.prediction[:, None] * objective.feature_mean - objective.moments
    direction = (1 - e) * evaluation.gradient[:, :-1] + e * constant

    def bound(tau: float) -> float:
        if tau <= TIGHT_TAU:
            own = terms.negentropy_tight * tau / TIGHT_TAU
        else:
            share = (tau - TIGHT_TAU) / (1 - TIGHT_TAU)
            own = (1 - share) * terms.negentropy_tight + share * terms.negentropy
        return -(1 - e) * own - e * tau * mix.negentropy - penalty.conjugate(tau * direction)

    if penalty.lam > 0:
        dual = max(dual, _maximise(bound, penalty, direction))
    return Certificate(value, value - dual, violation(evaluation, penalty))


def _maximise(bound: Any, penalty: ElasticNet, direction: Tensor) -> float:
    """The maximum of a concave function of tau on its domain within [0, 1]."""
    largest = float(direction.abs().amax())
    high = 1.0
    if penalty.l2 == 0 and largest > penalty.l1:
        high = penalty.l1 / largest * (1 - 1e-12)
    best = max(bound(high), bound(min(high, TIGHT_TAU)))
    if penalty.l2 == 0:
        return best  # piecewise linear, so the maximum is at an end or at the knee
    low, ratio = 0.0, 0.6180339887498949
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = bound(a), bound(b)
    for _ in range(60):
        best = max(best, at_a, at_b)
        if high - low < 1e-9:
            break
        if at_a > at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = bound(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = bound(b)
    return best


def elastic_net_certificate(
    X: Any,
    y: Any,
    weight: Tensor,
    bias: Tensor,
    lam: float,
    *,
    alpha: float = 0.99,
    num_classes: int | None = None,
    loss: str = "multinomial",
    sample_weight: Any = None,
    standardize: bool = False,
    device: torch.device | str | None = None,
    chunk_size: int | None = None,
    process_group: Any = None,
) -> Certificate:
    """The duality gap of any weights, from this package or elsewhere, for the elastic-net problem.

    Args:
        X, y, lam, alpha, num_classes, loss, sample_weight, standardize, device, chunk_size, process_group: as in
            :func:`~captum_concepts.solvers.fit_elastic_net`.
        weight: (K, D), or (1, D) for ``loss="logistic"``.
        bias: (K,) or (1,).

    Returns:
        A :class:`Certificate` ``(objective, gap, violation)``. Classes without rows are ignored.

    Raises:
        InputError: wrong shapes, or anything that ``fit_elastic_net`` refuses.

    >>> X, y = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([0, 1, 0, 1])
    >>> elastic_net_certificate(X, y, torch.zeros(2, 1), torch.zeros(2), lam=9.0).gap < 1e-6  # zero is the optimum
    True
    """
    penalty = ElasticNet(lam, alpha)
    rows = as_rows(X, y, sample_weight=sample_weight, device=device, chunk_size=chunk_size)
    objective = Objective(rows, loss, num_classes, standardize=standardize, reducer=Reducer(process_group))
    params = params_from(objective, weight, bias)
    return certify(objective, objective.evaluate(params, dual=True), penalty)


def params_from(objective: Objective, weight: Any, bias: Any) -> Tensor:
    """The parameters (O, D + 1) of the classes that have rows, from weight and bias of all K classes."""
    check_numbers("weight", weight)
    check_numbers("bias", bias)
    weight, bias = torch.as_tensor(weight).detach(), torch.as_tensor(bias).detach()
    logistic = objective.loss.num_outputs == 1
    n_out = 1 if logistic else objective.stats.num_classes
    want = (n_out, objective.rows.n_features)
    if tuple(weight.shape) != want or tuple(bias.shape) != want[:1]:
        raise InputError(
            f"weight and bias must have shapes {want} and {want[:1]}; got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if not bool(torch.isfinite(weight).all()) or not bool(torch.isfinite(bias).all()):
        raise InputError("weight and bias must be finite")
    params = torch.cat([weight, bias[:, None].to(weight.dtype)], 1).to(objective.rows.device, objective.acc)
    return params if logistic else params[objective.stats.present]
