"""The solver, which takes proximal quasi-Newton steps of one pass over the rows each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_concepts.solvers._metric import (
    BlockMetric,
    DiagonalMetric,
    KroneckerMetric,
    Metric,
    Pair,
    SecantMetric,
    inverse_secant,
)
from captum_concepts.solvers._objective import Evaluation, Objective
from captum_concepts.solvers._subproblem import minimise_model
from captum_concepts.solvers.certificate import Certificate, certify, violation
from captum_concepts.solvers.penalty import ElasticNet

#: Maximum features for the D x D second-moment matrix; above it only the diagonal is used.
GRAM_LIMIT = 4096
#: Maximum weights and biases for the whole Hessian.
HESSIAN_LIMIT = 1024
#: Maximum entries of the per-class blocks of the Hessian.
CLASS_LIMIT = 2**19
#: Fixed cost of a step in multiplications (a few milliseconds of overhead).
_STEP_OVERHEAD = 2e7


# Maximum stiffer metrics and maximum trials per step; trials after the stiffer metrics shorten the step.
_RESOLVES = 6
_TRIALS = 16


@dataclass(frozen=True)
class Outcome:
    """The point where the solver stopped, the reason, and its duality gap."""

    evaluation: Evaluation
    certificate: Certificate
    n_iter: int
    converged: bool
    reason: str


class ProximalQuasiNewton:
    """A solver for ``objective + penalty`` that keeps its curvature model from one penalty to the next.

    Args:
        objective: the smooth part.
        memory: number of secant pairs.
    """

    def __init__(self, objective: Objective, *, memory: int = 10) -> None:
        self.objective = objective
        self.memory = memory
        self._pairs: list[Pair] = []
        self._metric: Metric | None = None
        self._spent = 0.0
        self._stiffness = 1.0
        self._outcome: Outcome | None = None

    @property
    def started(self) -> bool:
        """Whether a problem was solved before."""
        return self._outcome is not None

    @property
    def last_params(self) -> Tensor:
        """The parameters (O, D + 1) of the last solution, which start the next."""
        return self.objective.null_params() if self._outcome is None else self._outcome.evaluation.params

    def solve(
        self, penalty: ElasticNet, start: Tensor, *, tol: float, max_iter: int, show_progress: bool = False
    ) -> Outcome:
        """The outcome of :meth:`_solve`, with an optional progress bar."""
        bar = None
        if show_progress:
            from tqdm import tqdm

            bar = tqdm(total=max_iter, desc="elastic net")
        try:
            self._outcome = self._solve(penalty, start, tol=tol, max_iter=max_iter, bar=bar)
        finally:
            if bar is not None:
                bar.close()
        return self._outcome

    def _solve(self, penalty: ElasticNet, start: Tensor, *, tol: float, max_iter: int, bar: Any) -> Outcome:
        """Step from ``start`` until gap and violation are below ``tol`` (relative to the model without features)."""
        objective = self.objective
        gap_target = tol * objective.null_value()
        slope_target = tol * max(float(objective.null_gradient().abs().amax()), 1e-300)
        fresh = self._metric is None
        self._spent = 0.0
        here = self._evaluate(start, detail=self._affordable(0, due=True) if fresh else None, dual=penalty.lam == 0)
        refresh = 1 if fresh else 4
        stalled = 0
        for iteration in range(max_iter + 1):
            slope = violation(here, penalty)
            if bar is not None:
                bar.update(int(iteration > 0))
                bar.set_postfix(violation=f"{slope:.2g}", target=f"{slope_target:.2g}")
            if slope <= slope_target or iteration == max_iter:
                if here.bound is None:
                    here = self._evaluate(here.params, dual=True)
                certificate = certify(objective, here, penalty)
                if slope <= slope_target and (penalty.lam == 0 or certificate.gap <= gap_target):
                    return Outcome(here, certificate, iteration, True, "")
            if penalty.lam == 0 and here.bound is not None and here.bound.margin > 0:
                return self._stop(here, penalty, iteration, "separable")
            if iteration == max_iter:
                return self._stop(here, penalty, iteration, "max_iter")
            due = iteration + 1 >= 2 * refresh
            if due:
                refresh *= 2
            detail = self._affordable(iteration, due=due)
            dual = penalty.lam == 0 or slope <= 20 * slope_target
            there, moved = self._advance(here, penalty, detail=detail, dual=dual)
            if moved:
                self._learn(here, there)
                stalled = 0
            else:
                # No measurable decrease: drop the secant pairs, then switch to float64, then stop.
                stalled += 1
                self._pairs = []
                if stalled == 2 and self._widen():
                    stalled = 0
                    there = self._evaluate(here.params, detail=self._affordable(iteration, due=True), dual=True)
                elif stalled > 2:
                    return self._stop(here, penalty, iteration, "stalled")
            here = there
        raise RuntimeError("the loop above always returns")  # pragma: no cover

    def _affordable(self, n_steps: int, *, due: bool) -> str | None:
        """The most detailed second moments whose total cost stays below that of the steps.

        The shared ones are cheap and are computed when ``due``, i.e. at the start and then at steps 2, 4, 8, ...
        """
        objective = self.objective
        n_cols, n_out = objective.rows.n_features + 1, objective.loss.num_outputs
        if n_cols > GRAM_LIMIT + 1:
            return None
        budget = (n_steps + 1) * max(_STEP_OVERHEAD, objective.cost(None)) - self._spent
        if n_cols * n_out <= HESSIAN_LIMIT:
            if objective.cost("full") <= budget:
                return "full"
        elif n_out * n_cols**2 <= CLASS_LIMIT and objective.cost("class") <= budget:
            return "class"
        return "shared" if due and (self._metric is None or isinstance(self._metric, KroneckerMetric)) else None

    def _evaluate(self, params: Tensor, *, detail: str | None = None, dual: bool = False) -> Evaluation:
        here = self.objective.evaluate(params, detail=detail, dual=dual)
        if here.moments is not None:
            scale = here.curvature.clamp_min(1e-6 * float(here.curvature.amax()) + 1e-30)
            self._spent += self.objective.cost(detail)
            if detail == "shared":
                self._metric = KroneckerMetric(scale, here.moments)
            else:
                blocks = here.moments if here.moments.ndim == 3 else here.moments[None]
                self._metric = BlockMetric(blocks, (params.shape[0], params.shape[1]))
        elif self._metric is None:
            fractions = self.objective.stats.fractions
            spread = (fractions * (1 - fractions))[: params.shape[0]]
            self._metric = DiagonalMetric(spread[:, None] * self.objective.second_moments())
        return here

    def _target(self, here: Evaluation, penalty: ElasticNet) -> Tensor:
        """The minimizer of the model, with mean-zero biases."""
        target = self._least(here, penalty)
        if target.shape[0] > 1:
            target = target.clone()
            # A shift of all biases has no effect; without this it could grow and cost precision.
            target[:, -1] -= target[:, -1].mean()
        return target

    def _least(self, here: Evaluation, penalty: ElasticNet) -> Tensor:
        metric = self._metric
        if metric is None:
            raise RuntimeError("a point must be evaluated before a step is asked for")
        if self._stiffness != 1.0:
            metric = metric.scaled(self._stiffness)
        if penalty.l1 == 0:
            slope = here.gradient.clone()
            slope[:, :-1] += penalty.l2 * here.params[:, :-1]
            ridge = torch.full_like(slope[:1], penalty.l2)
            ridge[:, -1] = 0
            pairs = [(s, y + ridge * s) for s, y in self._pairs]
            return here.params - inverse_secant(metric, pairs, penalty.l2, slope)
        columns = self._working_columns(here, penalty)
        # Accurate solutions pay off only with blocks of the Hessian; other models are too rough.
        accuracy = 1e-3 if isinstance(metric, BlockMetric) else 0.1
        if columns is None:
            model = SecantMetric(metric, self._pairs)
            return minimise_model(model, here.gradient, here.params, penalty, tol=accuracy, max_iter=400)
        pairs = [(s[:, columns], y[:, columns]) for s, y in self._pairs]
        model = SecantMetric(metric.restrict(columns), pairs)
        part = minimise_model(
            model, here.gradient[:, columns], here.params[:, columns], penalty, tol=accuracy, max_iter=400
        )
        target = here.params.clone()
        target[:, columns] = part
        return target

    def _working_columns(self, here: Evaluation, penalty: ElasticNet) -> Tensor | None:
        """The features that are used, were recently used or have a large gradient in some class; None if nearly all.

        Other features have weight zero and satisfy their optimality condition here. The next full gradient checks them
        again, so this only saves work in the subproblem.
        """
        weights, gradient = here.params[:, :-1], here.gradient[:, :-1]
        used = (weights != 0).any(0) | (gradient.abs() > penalty.l1).any(0)
        for s, _ in self._pairs:
            used |= (s[:, :-1] != 0).any(0)
        if float(used.sum()) > 0.7 * used.numel():
            return None
        return torch.cat([used, used.new_ones(1)]).nonzero().flatten()

    def _advance(
        self, here: Evaluation, penalty: ElasticNet, *, detail: str | None, dual: bool
    ) -> tuple[Evaluation, bool]:
        """The next point and whether it is better, after one or more trials (usually one).

        A trial that goes too far still reveals the curvature along the way. It updates the model, and the subproblem is
        solved again with a stiffer metric, which keeps weights exactly zero, unlike a shorter step.
        """
        start = here.params
        before = penalty.value(start[:, :-1])
        value = here.value + before
        slack = (1e-7 if self.objective.rows.dtype == torch.float32 else 4e-16) * abs(value)
        target, share = self._target(here, penalty), 1.0
        for trial in range(_TRIALS):
            point = target if share == 1.0 else start + share * (target - start)
            slope = float((here.gradient * (point - start)).sum())
            expected = slope + penalty.value(point[:, :-1]) - before
            if not math.isfinite(expected) or expected > slack:
                break
            there = self._evaluate(point, detail=detail if trial == 0 else None, dual=dual)
            after = there.value + penalty.value(point[:, :-1])
            if expected < -slack and after <= value + 1e-4 * expected:
                self._stiffness = max(1.0, 0.8 * self._stiffness) if trial == 0 else self._stiffness
                return there, True
            if after <= value + slack:
                # Values agree to rounding, so compare gradients, which remain accurate for longer.
                better = violation(there, penalty) < violation(here, penalty)
                return (there, True) if better else (here, False)
            if penalty.l1 > 0 and trial < _RESOLVES and math.isfinite(after):
                self._learn(here, there)
                self._stiffness *= 2
                target = self._target(here, penalty)
            else:
                share *= 0.3
        return here, False

    def _learn(self, here: Evaluation, there: Evaluation) -> None:
        if there.detail == "full" and self.objective.stride("full") == 1:
            self._pairs = []  # the Hessian is exact here, older differences are not
            return
        step, change = there.params - here.params, there.gradient - here.gradient
        if float((step * change).sum()) > 1e-10 * float(step.norm() * change.norm()):
            self._pairs = [*self._pairs, (step, change)][-self.memory :]

    def _widen(self) -> bool:
        rows = self.objective.rows
        if rows.dtype == torch.float64 or rows.device.type == "mps":
            return False
        rows.dtype = torch.float64
        return True

    def _stop(self, here: Evaluation, penalty: ElasticNet, iteration: int, reason: str) -> Outcome:
        if here.bound is None:
            here = self._evaluate(here.params, dual=True)
        return Outcome(here, certify(self.objective, here, penalty), iteration, False, reason)
