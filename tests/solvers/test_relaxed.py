"""``relaxed_fit`` against scikit-learn, plain L-BFGS of SciPy on the free weights, and the definition of its gap."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from solver_reference import loss_and_gradient, objective, problem

from captum_concepts.errors import ConvergenceWarning, InputError, InputWarning
from captum_concepts.solvers import fit_elastic_net, relaxed_fit


def slow_fit(x, y, support, lam, s=None, logistic=False):
    """The optimum over the free weights, in float64, from zero."""
    rows, columns = np.nonzero(support)

    def unpacked(free):
        w = np.zeros(support.shape)
        w[rows, columns] = free[: len(rows)]
        return w, free[len(rows) :]

    def value(free):
        w, b = unpacked(free)
        loss, gw, gb = loss_and_gradient(x, y, w, b, s, logistic)
        return loss + lam / 2 * (w**2).sum(), np.concatenate([(gw + lam * w)[rows, columns], gb])

    options = {"maxiter": 5000, "gtol": 1e-10}
    found = minimize(value, np.zeros(len(rows) + len(support)), jac=True, method="L-BFGS-B", tol=1e-14, options=options)
    return *unpacked(found.x), found.fun


@pytest.mark.parametrize("lam", [0.1, 0.003])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_optimum_on_the_support(lam, weighted):
    x, y = problem(seed=1)
    s = np.random.default_rng(0).uniform(0.2, 3, len(y)) if weighted else None
    support = np.random.default_rng(5).random((3, 8)) < 0.4
    w, _, best = slow_fit(x, y, support, lam, s)
    result = relaxed_fit(torch.as_tensor(x), y, torch.as_tensor(support), lam, sample_weight=s, tol=1e-8)
    assert result.converged
    assert (result.lam, result.alpha) == (lam, 0.0)
    assert torch.equal(result.weight != 0, torch.as_tensor(support))
    # The gap bounds the excess; the problem is lam-strongly convex in the weights.
    assert result.objective - best <= result.gap + 1e-10
    np.testing.assert_allclose(result.weight, w, atol=2 * (2 * result.gap / lam) ** 0.5 + 1e-5)
    assert result.objective == pytest.approx(objective(x, y, result.weight, result.bias, lam, 0.0, s), abs=1e-12)


def test_logistic():
    x, y = problem(k=2, seed=2)
    support = np.arange(8)[None] % 3 == 0
    w, b, best = slow_fit(x, y, support, 0.02, logistic=True)
    result = relaxed_fit(torch.as_tensor(x), y, support, 0.02, loss="logistic", tol=1e-8)
    assert result.objective == pytest.approx(best, abs=1e-7)
    np.testing.assert_allclose(result.weight, w, atol=2e-3)
    np.testing.assert_allclose(result.bias, b, atol=2e-3)


def test_everything_is_ridge_and_agrees_with_sklearn():
    x, y = problem(seed=4)
    sklearn = LogisticRegression(C=1 / (0.05 * len(y)), tol=1e-10, max_iter=10_000).fit(x, y)
    result = relaxed_fit(torch.as_tensor(x), y, np.ones((3, 8), bool), 0.05, tol=1e-8)
    np.testing.assert_allclose(result.weight, sklearn.coef_, atol=2e-3)
    ridge = fit_elastic_net(torch.as_tensor(x), y, 0.05, alpha=0.0, tol=1e-8)
    assert result.objective == pytest.approx(ridge.objective, abs=ridge.gap + result.gap)


def test_standardized_rows_in_chunks_and_single_precision():
    x, y = problem(seed=6)
    x = x * np.linspace(0.1, 30, 8) + 5
    whole = torch.as_tensor(x)
    sparse = fit_elastic_net(whole, y, 0.05, standardize=True)
    options = {"lam": 0.01, "standardize": True, "tol": 1e-7, "warm_start": sparse}
    one = relaxed_fit(whole, y, sparse.weight != 0, **options)
    by_hand = relaxed_fit((whole - whole.mean(0)) / whole.std(0, unbiased=False), y, sparse.weight != 0, 0.01, tol=1e-7)
    torch.testing.assert_close(one.weight, by_hand.weight, atol=1e-3, rtol=0)
    chunks = relaxed_fit([whole[:50], whole[50:]], y, sparse.weight != 0, **options)
    assert chunks.objective == pytest.approx(one.objective, abs=one.gap + chunks.gap)
    single = relaxed_fit(whole.float(), y, sparse.weight != 0, **{**options, "tol": 1e-4})
    assert single.converged
    assert single.weight.dtype == torch.float32
    assert one.objective < sparse.objective


def test_a_class_without_rows_and_a_class_without_weights():
    x, y = problem(seed=7)
    support = torch.zeros(4, 8, dtype=torch.bool)
    support[0, :2] = support[1, 5] = True
    with pytest.warns(InputWarning, match="1 of 4 classes have no rows"):
        result = relaxed_fit(torch.as_tensor(x), y, support, 0.01, num_classes=4, tol=1e-6)
    assert torch.equal(result.weight != 0, support)
    assert bool((result.decision_function(torch.as_tensor(x)).argmax(1) < 3).all())


def test_separable_rows_stay_finite():
    x = torch.tensor([[-1.0], [1.0]]).repeat(20, 1).double()
    result = relaxed_fit(x, torch.arange(40) % 2, torch.ones(2, 1, dtype=torch.bool), 1e-6)
    assert result.converged
    assert bool(result.weight.isfinite().all())


def test_what_is_refused():
    x, y = problem(seed=8)
    x, support = torch.as_tensor(x), torch.ones(3, 8, dtype=torch.bool)
    for lam in (0, -1.0, float("nan"), True, None):
        with pytest.raises(InputError, match="lam must be a positive number"):
            relaxed_fit(x, y, support, lam)
    with pytest.raises(InputError, match="support must be bool"):
        relaxed_fit(x, y, support.float(), 0.1)
    for wrong in (support[:2], support[:, :3], support[0]):
        with pytest.raises(InputError, match=r"support must have shape \(3, 8\); got "):
            relaxed_fit(x, y, wrong, 0.1)
    with pytest.raises(InputError, match="warm_start must be a result or a pair"):
        relaxed_fit(x, y, support, 0.1, warm_start=5)
    with pytest.warns(ConvergenceWarning, match="stopped after max_iter=2 steps"):
        assert not relaxed_fit(x, y, support, 1e-4, max_iter=2, tol=1e-9).converged
