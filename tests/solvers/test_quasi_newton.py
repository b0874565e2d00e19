"""The steps of the elastic-net solver: when it measures curvature, and what it does where a step does not help."""

from __future__ import annotations

import pytest
import torch
from solver_reference import problem

from captum_concepts.solvers import _quasi_newton
from captum_concepts.solvers._metric import BlockMetric, DiagonalMetric, KroneckerMetric
from captum_concepts.solvers._objective import Objective
from captum_concepts.solvers._quasi_newton import ProximalQuasiNewton
from captum_concepts.solvers._rows import as_rows
from captum_concepts.solvers.loss import LogisticLoss, MultinomialLoss
from captum_concepts.solvers.penalty import ElasticNet

PENALTY = ElasticNet(1e-3, 0.5)


@pytest.fixture
def limits(monkeypatch):
    """Sets the sizes up to which each kind of second moments is used."""

    def change(**values):
        for name, value in values.items():
            monkeypatch.setattr(_quasi_newton, name, value)

    return change


def solver(loss="multinomial", k=3, d=20):
    x, y = problem(n=200, d=d, k=k, seed=3)
    rows = as_rows(torch.as_tensor(x), torch.as_tensor(y), num_outputs_hint=k)
    return ProximalQuasiNewton(Objective(rows, loss, None if loss == "logistic" else k, standardize=False))


def solve(made, **options):
    return made.solve(PENALTY, made.objective.null_params(), **{"tol": 1e-8, "max_iter": 500, **options})


@pytest.mark.parametrize(("loss", "k"), [("multinomial", 3), ("logistic", 2)])
@pytest.mark.parametrize("kind", [BlockMetric, KroneckerMetric, DiagonalMetric])
def test_every_metric_leads_to_the_same_optimum(limits, loss, k, kind):
    expected = solve(solver(loss, k))
    assert expected.converged
    if kind is KroneckerMetric:
        limits(HESSIAN_LIMIT=0, CLASS_LIMIT=0)
    if kind is DiagonalMetric:
        limits(GRAM_LIMIT=5)
    made = solver(loss, k)
    found = solve(made)
    assert type(made._metric) is kind
    assert found.converged
    torch.testing.assert_close(found.evaluation.params, expected.evaluation.params, atol=1e-4, rtol=1e-3)


def test_shared_second_moments_are_measured_at_the_start_and_at_steps_2_4_8(limits, monkeypatch):
    limits(HESSIAN_LIMIT=0, CLASS_LIMIT=0)
    made, seen = solver(), []
    plain = made._affordable

    def spied(n_steps, *, due):
        seen.append((n_steps, plain(n_steps, due=due)))
        return seen[-1][1]

    monkeypatch.setattr(made, "_affordable", spied)
    solve(made, tol=1e-14, max_iter=20)
    assert seen[0] == (0, "shared")
    assert [n + 1 for n, detail in seen[1:] if detail == "shared"] == [2, 4, 8, 16]
    assert {detail for _, detail in seen} == {"shared", None}


def test_a_step_uphill_is_not_taken(monkeypatch):
    made = solver()
    here = made._evaluate(made.objective.null_params())
    monkeypatch.setattr(made, "_target", lambda here, penalty: here.params + here.gradient)
    there, moved = made._advance(here, PENALTY, detail=None, dual=False)
    assert not moved
    assert there is here


def test_where_no_step_helps_the_solver_stops_and_says_so(monkeypatch):
    made, tried = solver(), []
    monkeypatch.setattr(made, "_advance", lambda here, *_, **__: (tried.append(1), (here, False))[1])
    outcome = solve(made)
    assert (outcome.converged, outcome.reason) == (False, "stalled")
    assert len(tried) == 3


@pytest.mark.parametrize("weighted", [False, True])
def test_second_moments_are_weighted_means_of_squares(weighted):
    x, y = problem(n=50, d=4, k=3, seed=1)
    weight = torch.rand(50, generator=torch.Generator().manual_seed(0)).double() if weighted else None
    rows = as_rows(torch.as_tensor(x), torch.as_tensor(y), sample_weight=weight, num_outputs_hint=3, chunk_size=20)
    found = Objective(rows, "multinomial", 3).second_moments()
    share = torch.full((50,), 1 / 50, dtype=torch.float64) if weight is None else weight / weight.sum()
    torch.testing.assert_close(found, torch.cat([share @ torch.as_tensor(x) ** 2, torch.ones(1)]).double())


def test_an_evaluation_holds_what_was_asked_for_and_no_more():
    made = solver().objective
    here = made.evaluate(made.null_params())
    assert here.bound is None
    assert here.moments is None
    assert made.evaluate(made.null_params(), dual=True).bound is not None
    assert made.evaluate(made.null_params(), detail="shared").moments is not None
    for loss in (LogisticLoss(), MultinomialLoss(3)):
        terms = loss.terms(torch.zeros(4, loss.num_outputs), torch.zeros(4, dtype=torch.long), None)
        assert terms.curvature is None
        assert terms.dual is None
