"""``fit_elastic_net`` reaches the optimum of the stated problem; oracles are slow references and scikit-learn."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.exceptions import ConvergenceWarning as SklearnConvergenceWarning
from sklearn.linear_model import LogisticRegression
from solver_reference import loss_and_gradient, objective, problem, proximal_gradient

from captum_concepts.errors import ConvergenceWarning
from captum_concepts.solvers import (
    LogisticLoss,
    MultinomialLoss,
    _quasi_newton as quasi_newton,
    fit_elastic_net,
    lambda_max,
)


def tensors(x, y):
    return torch.as_tensor(x), torch.as_tensor(y)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("lam", [0.003, 0.05])
@pytest.mark.parametrize("weighted", [False, True])
def test_multinomial_reaches_the_optimum_of_a_plain_proximal_gradient(alpha, lam, weighted):
    x, y = problem(seed=1)
    s = np.random.default_rng(0).uniform(0.2, 3, len(y)) if weighted else None
    w, b, best = proximal_gradient(x, y, 3, lam, alpha, s=s)
    result = fit_elastic_net(*tensors(x, y), lam, alpha=alpha, sample_weight=s, tol=1e-9)
    assert result.converged
    assert result.objective == pytest.approx(best, abs=1e-9)
    assert objective(x, y, result.weight, result.bias, lam, alpha, s) == pytest.approx(result.objective, abs=1e-12)
    np.testing.assert_allclose(result.weight, w, atol=2e-4)
    # the biases of a softmax are free up to a common shift
    np.testing.assert_allclose(result.bias - result.bias.mean(), b - b.mean(), atol=2e-4)
    if alpha >= 0.5:
        assert ((result.weight == 0).numpy() == (w == 0)).mean() > 0.95


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_logistic_reaches_the_optimum_of_a_plain_proximal_gradient(alpha, weighted):
    x, y = problem(k=2, seed=2)
    s = np.random.default_rng(0).uniform(0, 2, len(y)) if weighted else None
    w, b, best = proximal_gradient(x, y, 2, 0.02, alpha, s=s, logistic=True)
    result = fit_elastic_net(*tensors(x, y), 0.02, alpha=alpha, loss="logistic", sample_weight=s, tol=1e-9)
    assert result.weight.shape == (1, 8)
    assert result.objective == pytest.approx(best, abs=1e-9)
    np.testing.assert_allclose(result.weight, w, atol=2e-4)
    np.testing.assert_allclose(result.bias, b, atol=2e-4)


def test_the_logistic_vector_points_towards_class_one():
    x = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]])
    result = fit_elastic_net(x, torch.tensor([0, 0, 1, 1]), 0.1, alpha=0.0, loss="logistic")
    assert result.weight.item() > 0
    assert (result.decision_function(x)[:, 0] > 0).tolist() == [False, False, True, True]


def test_two_softmax_vectors_are_half_the_logistic_one_under_ridge():
    # z = w x with penalty lam/2 w^2 equals two vectors +-w/2 with penalty lam' = 2 lam.
    x, y = tensors(*problem(k=2, seed=3))
    one = fit_elastic_net(x, y, 0.05, alpha=0.0, loss="logistic", tol=1e-10)
    two = fit_elastic_net(x, y, 0.1, alpha=0.0, tol=1e-10)
    torch.testing.assert_close(two.weight[1] - two.weight[0], one.weight[0], atol=1e-5, rtol=0)
    assert two.objective == pytest.approx(one.objective, abs=1e-8)


def sklearn_fit(x, y, lam, alpha, s=None, *, solver="saga", tol=1e-4):
    total = len(y) if s is None else float(np.sum(s))
    kind = {"l1_ratio": alpha} if alpha not in (0, 1) else {"l1_ratio": float(alpha)}
    model = LogisticRegression(solver=solver, C=1 / (lam * total), tol=tol, max_iter=5000, random_state=0, **kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SklearnConvergenceWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        if solver == "saga":
            model.set_params(penalty="elasticnet")
        return model.fit(x, y, sample_weight=s)


@pytest.mark.parametrize("alpha", [0.5, 0.99, 1.0])
def test_objective_is_not_above_sklearn_saga_at_the_same_tolerance(alpha):
    x, y = problem(n=300, d=12, k=4, seed=4)
    theirs = sklearn_fit(x, y, 0.01, alpha)
    ours = fit_elastic_net(*tensors(x, y), 0.01, alpha=alpha, tol=1e-4)
    assert ours.objective <= objective(x, y, theirs.coef_, theirs.intercept_, 0.01, alpha) + 1e-12


@pytest.mark.parametrize("tol", [1e-4, 1e-6])
def test_objective_is_not_above_sklearn_lbfgs_at_the_same_tolerance(tol):
    x, y = problem(n=300, d=12, k=4, seed=5, condition=1e4)
    theirs = sklearn_fit(x, y, 0.001, 0.0, solver="lbfgs", tol=tol)
    ours = fit_elastic_net(*tensors(x, y), 0.001, alpha=0.0, tol=tol)
    # Both are within a hair of the optimum: compare against the larger of the two certificates' resolutions.
    assert ours.objective <= objective(x, y, theirs.coef_, theirs.intercept_, 0.001, 0.0) + 1e-10


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(30, 150),
    d=st.integers(1, 10),
    k=st.integers(3, 5),
    lam=st.floats(1e-3, 0.3),
    alpha=st.sampled_from([0.1, 0.5, 0.99, 1.0]),
    weighted=st.booleans(),
)
def test_random_problems_are_solved_to_the_certificate_and_below_sklearn(seed, n, d, k, lam, alpha, weighted):
    x, y = problem(n, d, k, seed=seed)
    s = np.random.default_rng(seed).uniform(0.1, 2, n) if weighted else None
    theirs = sklearn_fit(x, y, lam, alpha, s, tol=1e-4)
    ours = fit_elastic_net(*tensors(x, y), lam, alpha=alpha, sample_weight=s, tol=1e-4)
    their_value = objective(x, y, theirs.coef_, theirs.intercept_, lam, alpha, s)
    assert ours.converged
    assert ours.objective <= their_value + 1e-7
    assert ours.objective - ours.gap <= their_value + 1e-12  # the bound is below every point


@pytest.mark.parametrize("loss", ["multinomial", "logistic"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("standardize", [False, True])
def test_lambda_max_is_where_the_first_weight_appears(loss, weighted, standardize):
    x, y = tensors(*problem(k=2 if loss == "logistic" else 4, seed=6))
    s = torch.linspace(0.1, 2, len(y)) if weighted else None
    kind = {"loss": loss, "sample_weight": s, "standardize": standardize}
    top = lambda_max(x * 3 + 1, y, 0.9, **kind)
    at_top = fit_elastic_net(x * 3 + 1, y, top, alpha=0.9, **kind)
    assert at_top.converged
    assert (at_top.weight == 0).all()
    assert fit_elastic_net(x * 3 + 1, y, 1.5 * top, alpha=0.9, **kind).weight.abs().max() == 0
    below = fit_elastic_net(x * 3 + 1, y, 0.99 * top, alpha=0.9, tol=1e-6, **kind)
    assert (below.weight != 0).any()


def test_lambda_max_is_the_gradient_of_the_null_model():
    x, y = problem(seed=7)
    fractions = np.bincount(y) / len(y)
    _, gradient, _ = loss_and_gradient(x, y, np.zeros((3, 8)), np.log(fractions))
    assert lambda_max(*tensors(x, y), 0.5) == pytest.approx(np.abs(gradient).max() / 0.5, rel=1e-12)
    assert lambda_max(*tensors(x, y), 0.0) == float("inf")


def test_bias_of_the_null_model_gives_the_class_fractions():
    x, y = tensors(*problem(seed=8))
    result = fit_elastic_net(x, y, 100.0)
    torch.testing.assert_close(torch.softmax(result.bias, 0), torch.bincount(y).double() / len(y))
    assert result.gap < 1e-12


@pytest.mark.parametrize("loss", [MultinomialLoss(4), LogisticLoss()])
def test_loss_derivatives_match_finite_differences(loss):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, loss.num_outputs, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 0, 1])
    s = torch.tensor([1.0, 2.0, 0.5, 0.0, 1.0], dtype=torch.float64)
    terms = loss.terms(z, y, s, curvature=True)
    h = 1e-5
    curvature = torch.zeros(loss.num_outputs, dtype=torch.float64)
    for i in range(5):
        for k in range(loss.num_outputs):
            e = torch.zeros_like(z)
            e[i, k] = h
            up, down = loss.terms(z + e, y, s).value, loss.terms(z - e, y, s).value
            assert terms.residual[i, k].item() == pytest.approx(((up - down) / (2 * h)).item(), abs=1e-8)
            # A second difference loses eps / h^2: with a larger step 3e-8 for each of the five.
            up, down = (loss.terms(z + sign * 10 * e, y, s).value for sign in (1, -1))
            curvature[k] += (up - 2 * terms.value + down) / (10 * h) ** 2
    torch.testing.assert_close(terms.curvature.output, curvature, atol=1e-5, rtol=0)


def test_extreme_logits_do_not_overflow():
    z = torch.tensor([[1e4, -1e4, 0.0]])
    terms = MultinomialLoss(3).terms(z, torch.tensor([1]), None, curvature=True, dual=True)
    assert terms.value.item() == pytest.approx(2e4)
    assert all(torch.isfinite(t).all() for t in (terms.residual, *terms.curvature, *terms.dual))
    terms = LogisticLoss().terms(torch.tensor([[1e4], [-1e4]]), torch.tensor([0, 0]), None, dual=True)
    assert terms.value.item() == pytest.approx(1e4)
    assert torch.isfinite(terms.residual).all()


def test_a_weight_of_two_equals_the_row_twice_and_zero_equals_no_row():
    x, y = tensors(*problem(seed=9))
    s = torch.ones(len(y))
    s[5], s[7] = 2, 0
    twice = torch.cat([torch.arange(7), torch.tensor([5]), torch.arange(8, len(y))])
    a = fit_elastic_net(x, y, 0.02, sample_weight=s, tol=1e-9)
    b = fit_elastic_net(x[twice], y[twice], 0.02, tol=1e-9)
    torch.testing.assert_close(a.weight, b.weight, atol=1e-6, rtol=0)
    assert a.objective == pytest.approx(b.objective, abs=1e-10)


def test_warm_start_from_the_answer_needs_no_step_and_from_near_fewer():
    x, y = tensors(*problem(n=400, d=20, k=5, seed=10))
    cold = fit_elastic_net(x, y, 0.01, tol=1e-6)
    assert fit_elastic_net(x, y, 0.01, tol=1e-6, warm_start=cold).n_iter == 0
    near = fit_elastic_net(x, y, 0.0105, tol=1e-6)
    warm = fit_elastic_net(x, y, 0.01, tol=1e-6, warm_start=(near.weight, near.bias))
    assert warm.n_iter < cold.n_iter
    assert warm.objective == pytest.approx(cold.objective, abs=1e-6)


def test_float32_rows_reach_the_float64_objective():
    x, y = problem(n=2000, d=30, k=6, seed=11, dtype=np.float32)
    single = fit_elastic_net(*tensors(x, y), 0.003)
    double = fit_elastic_net(*tensors(x.astype(np.float64), y), 0.003, tol=1e-8)
    assert single.weight.dtype == torch.float32
    assert single.objective == pytest.approx(double.objective, abs=1e-6)
    assert objective(x, y, single.weight, single.bias, 0.003, 0.99) == pytest.approx(single.objective, abs=1e-6)


def test_float32_rows_reach_a_tolerance_below_float32_by_widening():
    x, y = tensors(*problem(n=500, d=10, k=3, seed=12, dtype=np.float32))
    assert fit_elastic_net(x, y, 0.003, tol=1e-9).converged


@pytest.mark.parametrize("alpha", [0.0, 0.99])
def test_without_the_second_moment_matrix_the_answer_is_the_same(monkeypatch, alpha):
    x, y = tensors(*problem(n=300, d=15, k=3, seed=13))
    full = fit_elastic_net(x, y, 0.005, alpha=alpha, tol=1e-8)
    monkeypatch.setattr(quasi_newton, "GRAM_LIMIT", 4)
    diagonal = fit_elastic_net(x, y, 0.005, alpha=alpha, tol=1e-8)
    assert diagonal.converged
    assert diagonal.objective == pytest.approx(full.objective, abs=1e-8)


@pytest.mark.parametrize("alpha", [0.0, 0.99])
def test_correlated_columns_take_far_fewer_passes_than_plain_fista(alpha):
    x, y = problem(n=800, d=40, k=4, seed=14, condition=1e4)
    ours = fit_elastic_net(*tensors(x, y), 0.0005, alpha=alpha, tol=1e-5)
    # 200 accelerated iterations (one pass each) of the plain method are still above the objective.
    _, _, plain = proximal_gradient(x, y, 4, 0.0005, alpha, n_iter=200)
    assert ours.converged
    assert ours.n_passes < 80
    assert ours.objective < plain


def test_many_classes_of_few_rows_are_solved():
    x, y = problem(n=600, d=30, k=60, seed=19, dtype=np.float32)
    result = fit_elastic_net(*tensors(x, y), 5e-4)
    assert result.converged
    assert result.n_passes < 120


def test_badly_scaled_columns_are_solved():
    x, y = problem(n=400, d=6, k=3, seed=15)
    x = x * np.array([1e-4, 1e-2, 1, 1e2, 1e4, 1]) + np.array([0, 0, 50, 0, 0, -3])
    result = fit_elastic_net(*tensors(x, y), 1e-4, alpha=0.5, tol=1e-6)
    assert result.converged
    assert result.gap <= 1e-6 * 1.1


def test_max_iter_warns_with_the_gap():
    x, y = tensors(*problem(n=300, d=20, k=4, seed=16))
    with pytest.warns(ConvergenceWarning, match="max_iter=2 steps: duality gap [0-9.e-]+") as caught:
        result = fit_elastic_net(x, y, 0.001, max_iter=2)
    assert not result.converged
    assert result.n_iter == 2
    assert f"{result.gap:.3g}" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_progress_bar_is_shown_only_when_asked(capsys):
    x, y = tensors(*problem(seed=17))
    fit_elastic_net(x, y, 0.05)
    assert capsys.readouterr().err == ""
    fit_elastic_net(x, y, 0.05, show_progress=True)
    assert "elastic net" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_cpu():
    x, y = tensors(*problem(n=500, d=20, k=4, seed=18, dtype=np.float32))
    cpu = fit_elastic_net(x, y, 0.005)
    gpu = fit_elastic_net(x.cuda(), y.cuda(), 0.005)
    assert gpu.weight.is_cuda
    assert gpu.objective == pytest.approx(cpu.objective, abs=1e-5)


def test_the_result_prints_its_certificate_and_no_weights():
    x, y = problem(n=30, d=4, k=3, seed=1)
    shown = repr(fit_elastic_net(torch.as_tensor(x), torch.as_tensor(y), 0.1))
    assert shown.startswith("ElasticNetResult(objective=")
    assert "gap=" in shown
    assert "tensor" not in shown
