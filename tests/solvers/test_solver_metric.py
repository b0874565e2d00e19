"""The curvature models satisfy their defining equations."""

from __future__ import annotations

import pytest
import torch
from solver_reference import problem

from captum_concepts.solvers._metric import BlockMetric, DiagonalMetric, KroneckerMetric, SecantMetric, inverse_secant
from captum_concepts.solvers._objective import Objective
from captum_concepts.solvers._rows import as_rows
from captum_concepts.solvers._subproblem import minimise_model
from captum_concepts.solvers.penalty import ElasticNet

N_OUT, N_COLS = 3, 5


def positive(n, seed):
    a = torch.randn(n, 2 * n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / n


def metrics():
    return {
        "kronecker": KroneckerMetric(torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), positive(N_COLS, 0)),
        "diagonal": DiagonalMetric(
            torch.rand(N_OUT, N_COLS, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
        ),
        "blocks": BlockMetric(torch.stack([positive(N_COLS, s) for s in (2, 3, 4)]), (N_OUT, N_COLS)),
        "whole": BlockMetric(positive(N_OUT * N_COLS, 5)[None], (N_OUT, N_COLS)),
    }


def dense(apply):
    eye = torch.eye(N_OUT * N_COLS, dtype=torch.float64)
    return torch.stack([apply(row.view(N_OUT, N_COLS)).flatten() for row in eye])


def pairs(n, hessian):
    g = torch.Generator().manual_seed(9)
    steps = [torch.randn(N_OUT, N_COLS, generator=g, dtype=torch.float64) for _ in range(n)]
    return [(s, (hessian @ s.flatten()).view(N_OUT, N_COLS)) for s in steps]


@pytest.mark.parametrize("name", ["kronecker", "diagonal", "blocks", "whole"])
def test_metric_is_symmetric_positive_and_its_parts_agree(name):
    metric = metrics()[name]
    matrix = dense(metric.apply)
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix)[0] > 0
    torch.testing.assert_close(matrix.diagonal().view(N_OUT, N_COLS), metric.diagonal)
    columns = torch.tensor([0, 2, 4])
    v = torch.zeros(N_OUT, N_COLS, dtype=torch.float64)
    v[:, columns] = torch.randn(N_OUT, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(metric.restrict(columns).apply(v[:, columns]), metric.apply(v)[:, columns])
    torch.testing.assert_close(metric.scaled(2.5).apply(v), 2.5 * metric.apply(v))
    torch.testing.assert_close(metric.scaled(2.5).diagonal, 2.5 * metric.diagonal)
    for ridge in (0.0, 0.3):
        shift = torch.full((N_OUT, N_COLS), ridge, dtype=torch.float64)
        shift[:, -1] = 0
        solved = metric.solve(v, ridge)
        torch.testing.assert_close(metric.apply(solved) + shift * solved, v, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["kronecker", "diagonal", "blocks", "whole"])
def test_secant_metric_is_bfgs(name):
    metric = metrics()[name]
    history = pairs(4, positive(N_OUT * N_COLS, 7))
    corrected = SecantMetric(metric, history)
    matrix = dense(metric.apply)
    for s, y in history:  # the textbook rank-two updates, one after the other
        s, y = s.flatten(), y.flatten()
        moved = matrix @ s
        matrix = matrix - torch.outer(moved, moved) / (s @ moved) + torch.outer(y, y) / (y @ s)
    torch.testing.assert_close(dense(corrected.apply), matrix, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(corrected.apply(history[-1][0]), history[-1][1])
    v = torch.randn(N_OUT, N_COLS, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    back = inverse_secant(metric, history, 0.0, v)
    torch.testing.assert_close(corrected.apply(back), v, atol=1e-5, rtol=1e-5)


def test_pairs_of_no_curvature_are_left_out():
    metric = metrics()["diagonal"]
    flat = (torch.ones(N_OUT, N_COLS, dtype=torch.float64), torch.zeros(N_OUT, N_COLS, dtype=torch.float64))
    torch.testing.assert_close(dense(SecantMetric(metric, [flat]).apply), dense(metric.apply))
    v = torch.ones(N_OUT, N_COLS, dtype=torch.float64)
    torch.testing.assert_close(inverse_secant(metric, [flat], 0.0, v), metric.solve(v, 0.0))


@pytest.mark.parametrize("name", ["kronecker", "diagonal", "blocks", "whole"])
@pytest.mark.parametrize("with_pairs", [False, True])
def test_subproblem_is_solved_to_its_optimality_condition(name, with_pairs):
    metric = SecantMetric(metrics()[name], pairs(3, positive(N_OUT * N_COLS, 7)) if with_pairs else [])
    g = torch.Generator().manual_seed(10)
    gradient, start = (torch.randn(N_OUT, N_COLS, generator=g, dtype=torch.float64) for _ in range(2))
    penalty = ElasticNet(0.5, 0.8)
    v = minimise_model(metric, gradient, start, penalty, tol=1e-12, max_iter=20_000)
    slope = gradient + metric.apply(v - start)
    assert penalty.violation(v[:, :-1], slope[:, :-1]).max() < 1e-7
    assert slope[:, -1].abs().max() < 1e-7
    assert (v[:, :-1] == 0).any()
    assert (v[:, :-1] != 0).any()


@pytest.mark.parametrize("loss", ["multinomial", "logistic"])
@pytest.mark.parametrize("weighted", [False, True])
def test_hessian_matches_differences_of_the_gradient(loss, weighted):
    x, y = problem(n=60, d=4, k=2 if loss == "logistic" else 3, seed=60)
    s = torch.linspace(0.1, 2, 60) if weighted else None
    objective = Objective(as_rows(x, y, sample_weight=s, chunk_size=11), loss, None)
    params = torch.randn(objective.loss.num_outputs, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    full = objective.evaluate(params, detail="full").moments
    blocks = objective.evaluate(params, detail="class").moments
    columns = []
    for i in range(params.numel()):
        e = torch.zeros(params.numel(), dtype=torch.float64)
        e[i] = 1e-5
        up = objective.evaluate(params + e.view_as(params)).gradient
        down = objective.evaluate(params - e.view_as(params)).gradient
        columns.append(((up - down) / 2e-5).flatten())
    hessian = torch.stack(columns)
    torch.testing.assert_close(full, hessian, atol=1e-8, rtol=1e-6)
    for k, block in enumerate(blocks):
        torch.testing.assert_close(block, hessian[5 * k : 5 * k + 5, 5 * k : 5 * k + 5], atol=1e-8, rtol=1e-6)
    shared = objective.evaluate(params, detail="shared")
    trace = sum(blocks) / shared.curvature.sum()
    torch.testing.assert_close(shared.moments, trace, atol=1e-8, rtol=1e-6)


def test_second_moments_of_wide_problems():
    x, y = problem(n=60, d=4, k=3, seed=61)
    objective = Objective(as_rows(x, y, chunk_size=7), "multinomial", None)
    expected = torch.cat([torch.as_tensor(x).square().mean(0), torch.ones(1)])
    torch.testing.assert_close(objective.second_moments(), expected)


def test_details_are_taken_only_where_they_are_affordable():
    x, y = problem(n=3000, d=4, k=3, seed=62)
    objective = Objective(as_rows(x, y), "multinomial", None)
    assert objective.cost(None) == 2 * 3000 * 5 * 3
    assert objective.stride("shared") == 1
    assert objective.cost("full") == 3000 * 15**2


def test_factors_and_eigenvectors_solve_the_same(monkeypatch):
    """Few classes are factored, many share an eigendecomposition: both are the inverse of the operator."""
    from captum_concepts.solvers import _metric

    generator = torch.Generator().manual_seed(3)
    root = torch.randn(30, 9, generator=generator, dtype=torch.float64)
    scale = torch.rand(3, generator=generator, dtype=torch.float64) + 0.1
    v = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    factored = KroneckerMetric(scale, root.T @ root).solve(v, 0.7)
    monkeypatch.setattr(_metric, "_FACTORED", 0)
    shared = KroneckerMetric(scale, root.T @ root).solve(v, 0.7)
    torch.testing.assert_close(factored, shared, rtol=1e-5, atol=1e-7)
    penalised = 0.7 * torch.cat([factored[:, :-1], torch.zeros(3, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(scale[:, None] * (factored @ (root.T @ root)) + penalised, v, rtol=1e-4, atol=1e-5)
