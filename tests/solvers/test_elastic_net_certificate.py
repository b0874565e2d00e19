"""The gap bounds the distance to the optimum from above, and is the dual value of an explicit feasible point."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from solver_reference import best_dual_bound, loss_and_gradient, objective, problem, proximal_gradient

from captum_concepts.errors import InputError
from captum_concepts.solvers import ElasticNet, elastic_net_certificate, fit_elastic_net


def random_point(k, d, seed, scale):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(k, d)) * scale * (rng.random((k, d)) < 0.5)
    return torch.as_tensor(w), torch.as_tensor(rng.normal(size=k) * scale)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("scale", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_gap_at_any_point_is_true_and_not_below_the_best_explicit_dual_point(alpha, scale, weighted):
    x, y = problem(seed=20)
    s = np.random.default_rng(1).uniform(0.1, 2, len(y)) if weighted else None
    w, b = random_point(3, 8, 21, scale)
    got = elastic_net_certificate(torch.as_tensor(x), torch.as_tensor(y), w, b, 0.03, alpha=alpha, sample_weight=s)
    value = objective(x, y, w, b, 0.03, alpha, s)
    assert got.objective == pytest.approx(value, abs=1e-12)
    _, _, best = proximal_gradient(x, y, 3, 0.03, alpha, s=s)
    assert got.gap >= value - best - 1e-10
    explicit, infeasible = best_dual_bound(x, y, 3, w, b, 0.03, alpha, s)
    assert infeasible < 1e-12
    assert explicit <= best + 1e-10  # the reference's own bound is a bound
    assert got.gap >= value - max(explicit, 0) - 1e-5 * abs(value)  # chords can only lose (tau is on a grid there)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("tol", [1e-3, 1e-6, 1e-9])
def test_gap_of_a_fit_is_not_below_the_explicit_one_and_reaches_the_tolerance(alpha, tol):
    x, y = problem(n=200, seed=22)
    fit = fit_elastic_net(torch.as_tensor(x), torch.as_tensor(y), 0.01, alpha=alpha, tol=tol)
    explicit, infeasible = best_dual_bound(x, y, 3, fit.weight.numpy(), fit.bias.numpy(), 0.01, alpha)
    assert infeasible < 1e-12
    fractions = np.bincount(y) / len(y)
    grid_step = 0.06 * fit.gap + 1e-9  # the reference looks at 400 values of tau only
    assert fit.objective - explicit - grid_step <= fit.gap <= -tol * (fractions * np.log(fractions)).sum()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    lam=st.floats(1e-3, 1.0),
    alpha=st.floats(0, 1),
    scale=st.floats(0, 5),
    loss=st.sampled_from(["multinomial", "logistic"]),
)
def test_no_point_is_below_the_bound_of_another(seed, lam, alpha, scale, loss):
    k = 2 if loss == "logistic" else 4
    x, y = problem(60, 5, k, seed=seed)
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    rows = 1 if loss == "logistic" else k
    values, bounds = [], []
    for i in range(3):
        w, b = random_point(rows, 5, seed + i, scale * i)
        c = elastic_net_certificate(x, y, w, b, lam, alpha=alpha, loss=loss)
        values.append(c.objective)
        bounds.append(c.objective - c.gap)
    fit = fit_elastic_net(x, y, lam, alpha=alpha, loss=loss, tol=1e-6)
    values.append(fit.objective)
    bounds.append(fit.objective - fit.gap)
    assert max(bounds) <= min(values) + 1e-10
    assert min(bounds) >= 0


def test_violation_is_the_distance_to_the_subdifferential():
    x, y = problem(seed=23)
    w, b = random_point(3, 8, 24, 0.3)
    got = elastic_net_certificate(torch.as_tensor(x), torch.as_tensor(y), w, b, 0.05, alpha=0.6).violation
    _, gw, gb = loss_and_gradient(x, y, w.numpy(), b.numpy())
    worst = np.abs(gb).max()
    for k in range(3):
        for j in range(8):
            g, v = gw[k, j] + 0.05 * 0.4 * w[k, j].item(), w[k, j].item()
            worst = max(worst, abs(g + 0.03 * np.sign(v)) if v else max(abs(g) - 0.03, 0))
    assert got == pytest.approx(worst, rel=1e-12)


def test_the_certificate_of_a_result_is_the_one_it_carries():
    x, y = problem(seed=25)
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    fit = fit_elastic_net(x, y, 0.02, tol=1e-6)
    again = elastic_net_certificate(x, y, fit.weight, fit.bias, 0.02)
    assert again.objective == pytest.approx(fit.objective, abs=1e-13)
    assert again.gap == pytest.approx(fit.gap, abs=1e-12)
    assert again.violation == pytest.approx(fit.violation, abs=1e-13)


def test_wrong_shapes_and_values_are_refused():
    x, y = (torch.as_tensor(t) for t in problem(seed=26))
    with pytest.raises(InputError, match=r"shapes \(3, 8\) and \(3,\)"):
        elastic_net_certificate(x, y, torch.zeros(3, 7), torch.zeros(3), 0.1)
    with pytest.raises(InputError, match="finite"):
        elastic_net_certificate(x, y, torch.full((3, 8), float("nan")), torch.zeros(3), 0.1)


class TestPenalty:
    def test_prox_minimises_its_definition(self):
        penalty = ElasticNet(0.7, 0.6)
        v = torch.linspace(-3, 3, 13, dtype=torch.float64)
        grid = torch.linspace(-4, 4, 80_001, dtype=torch.float64)
        for x in v:
            cost = (grid - x) ** 2 / (2 * 0.5) + 0.7 * (0.2 * grid**2 + 0.6 * grid.abs())
            assert penalty.prox(x, 0.5).item() == pytest.approx(grid[cost.argmin()].item(), abs=2e-4)

    def test_conjugate_is_the_supremum(self):
        grid = torch.linspace(-50, 50, 200_001, dtype=torch.float64)
        for alpha in (0.0, 0.5):
            penalty = ElasticNet(0.7, alpha)
            for v in (-2.0, 0.1, 0.5, 3.0):
                value = v * grid - 0.7 * ((1 - alpha) / 2 * grid**2 + alpha * grid.abs())
                got = penalty.conjugate(torch.tensor([v], dtype=torch.float64))
                assert got == pytest.approx(value.max().item(), abs=1e-5)
        assert ElasticNet(0.7, 1.0).conjugate(torch.tensor([0.69])) == 0
        assert ElasticNet(0.7, 1.0).conjugate(torch.tensor([0.71])) == float("inf")

    @pytest.mark.parametrize(("lam", "alpha"), [(-1, 0.5), (1, 1.5), (1, -0.1), (float("nan"), 0.5), ("1", 0.5)])
    def test_values_out_of_range_are_refused(self, lam, alpha):
        said = "alpha must be a number in [0, 1]" if lam == 1 else "lam must be a number finite and at least 0"
        with pytest.raises(InputError, match=re.escape(said)):
            ElasticNet(lam, alpha)
