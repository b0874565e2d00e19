"""Every degenerate input has one defined outcome: an error, a warning, or a stated answer; nothing is silent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from solver_reference import problem

from captum_concepts.errors import ConvergenceWarning, InputError, InputWarning
from captum_concepts.solvers import elastic_net_path, fit_elastic_net, lambda_max


@pytest.fixture
def rows():
    return tuple(torch.as_tensor(t) for t in problem(seed=30))


@pytest.mark.parametrize("loss", ["multinomial", "logistic"])
@pytest.mark.parametrize("alpha", [0.0, 0.99])
def test_separable_rows_without_penalty_warn_and_separate(loss, alpha):
    x = torch.tensor([[-1.0, 0.3], [-2.0, -0.5], [1.0, 0.1], [2.0, -0.2]])
    y = torch.tensor([0, 0, 1, 1])
    with pytest.warns(ConvergenceWarning, match="no optimum: the classes can be separated"):
        result = fit_elastic_net(x, y, 0.0, alpha=alpha, loss=loss)
    assert not result.converged
    assert torch.isfinite(result.weight).all()
    logits = result.decision_function(x)
    predicted = (logits[:, 0] > 0).long() if loss == "logistic" else logits.argmax(1)
    assert torch.equal(predicted, y)
    assert result.gap == result.objective


def test_separable_rows_with_a_penalty_are_solved():
    x = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]], dtype=torch.float64)
    result = fit_elastic_net(x, torch.tensor([0, 0, 1, 1]), 1e-3, tol=1e-8)
    assert result.converged


def test_inseparable_rows_without_penalty_reach_zero_gradient(rows):
    x, y = rows
    noisy = torch.where(torch.arange(len(y)) % 3 == 0, torch.arange(len(y)) % 2, y)
    result = fit_elastic_net(x, noisy, 0.0, tol=1e-8)
    assert result.converged
    assert result.violation < 1e-8
    assert result.gap == result.objective  # documented: without a penalty zero is the only bound


@pytest.mark.parametrize("standardize", [False, True])
def test_a_constant_column_gets_no_weight(rows, standardize):
    x, y = rows
    for value in (1.0, -37.3, 0.0, 1e6):
        x = torch.cat([x[:, :8], torch.full((len(x), 1), value, dtype=x.dtype)], 1)
        result = fit_elastic_net(x, y, 0.01, standardize=standardize, tol=1e-6)
        assert result.converged
        assert (result.weight[:, 8] == 0).all()
        ridge = fit_elastic_net(x, y, 0.01, alpha=0.0, standardize=standardize, tol=1e-6)
        # Under ridge the optimum is zero as well; a tiny weight of a huge column costs next to nothing.
        assert ridge.weight[:, 8].abs().max() < 1e-5


def test_repeated_columns_are_solved(rows):
    x, y = rows
    for alpha in (0.0, 0.99, 1.0):
        once = fit_elastic_net(x, y, 0.01, alpha=alpha, tol=1e-6)
        twice = fit_elastic_net(torch.cat([x, x], 1), y, 0.01, alpha=alpha, tol=1e-6)
        assert twice.converged
        assert twice.objective <= once.objective + 1e-7


def test_more_features_than_rows_is_solved():
    x, y = problem(n=20, d=60, k=3, seed=31)
    for alpha in (0.0, 0.99):
        assert fit_elastic_net(torch.as_tensor(x), torch.as_tensor(y), 0.01, alpha=alpha, tol=1e-6).converged


@pytest.mark.parametrize("call", [lambda_max, lambda x, y, **k: fit_elastic_net(x, y, 0.1, **k), elastic_net_path])
def test_one_class_only_is_refused(rows, call):
    x, _ = rows
    with pytest.raises(InputError, match="all rows are of class 2"):
        call(x, torch.full((len(x),), 2), num_classes=3)
    with pytest.raises(InputError, match="all rows are of class 0"):
        call(x, torch.zeros(len(x), dtype=torch.long))
    with pytest.raises(InputError, match="all rows are of class 1"):
        call(x, torch.ones(len(x), dtype=torch.long), loss="logistic")


def test_a_class_that_only_has_rows_of_weight_zero_counts_as_empty(rows):
    x, y = rows
    with pytest.warns(InputWarning, match=r"1 of 3 classes have no rows \(1\)"):
        result = fit_elastic_net(x, y, 0.05, sample_weight=(y != 1).double())
    assert (result.weight[1] == 0).all()


def test_an_empty_class_gets_no_weight_and_no_probability_and_leaves_the_others_alone(rows):
    x, y = rows
    spread = torch.tensor([0, 2, 3])[y]
    with pytest.warns(InputWarning, match=r"2 of 5 classes have no rows \(1, 4\)") as caught:
        result = fit_elastic_net(x, spread, 0.02, num_classes=5, tol=1e-8)
    assert caught[0].filename == __file__
    plain = fit_elastic_net(x, y, 0.02, tol=1e-8)
    assert result.weight.shape == (5, 8)
    assert (result.weight[[1, 4]] == 0).all()
    torch.testing.assert_close(result.weight[[0, 2, 3]], plain.weight)
    assert torch.softmax(result.decision_function(x), 1)[:, [1, 4]].max() < 1e-15
    assert torch.isfinite(result.bias).all()
    assert result.gap == pytest.approx(plain.gap)
    with pytest.warns(InputWarning):
        again = fit_elastic_net(x, spread, 0.02, num_classes=5, tol=1e-6, warm_start=result)
    assert again.n_iter == 0


@pytest.mark.parametrize(("classes", "shown"), [(13, r"4, 5, 6, 7, 8, 9, 10, 11, 12\)"), (15, r"11, 12, \.\.\.\)")])
def test_many_empty_classes_are_not_all_listed(rows, classes, shown):
    with pytest.warns(InputWarning, match=rf"{classes - 3} of {classes} classes have no rows \(3, .*{shown}"):
        fit_elastic_net(*rows, 0.1, num_classes=classes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_with_the_column(rows, bad):
    x, y = rows
    x = x.clone()
    x[17, 3] = bad
    with pytest.raises(InputError, match=r"NaN or infinite values in 1 of 8 columns \(3\)"):
        fit_elastic_net(x, y, 0.1)
    with pytest.raises(InputError, match="NaN or infinite"):
        fit_elastic_net(x, y, 0.1, standardize=True)


def test_labels_out_of_range_are_refused(rows):
    x, y = rows
    with pytest.raises(InputError, match=r"labels must be in 0..1 \(num_classes=2\); got labels from 0 to 2"):
        fit_elastic_net(x, y, 0.1, num_classes=2)
    with pytest.raises(InputError, match="got labels from -1 to 1"):
        fit_elastic_net(x, y - 1, 0.1)
    with pytest.raises(InputError, match=r"0..1"):
        fit_elastic_net(x, y, 0.1, loss="logistic")
    with pytest.raises(InputError, match="fractions"):
        fit_elastic_net(x, y + 0.5, 0.1)
    with pytest.raises(InputError, match="NaN"):
        fit_elastic_net(x, y / torch.zeros(()), 0.1)
    with pytest.raises(InputError, match="class index per row"):
        fit_elastic_net(x, torch.nn.functional.one_hot(y), 0.1)


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.float32, torch.bool])
def test_any_dtype_that_holds_class_indices_is_taken(rows, kind):
    x, y = rows
    y = (y > 0).to(kind)
    assert fit_elastic_net(x, y, 0.1, loss="logistic").converged


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"loss": "hinge"}, 'loss must be "multinomial" or "logistic"'),
        ({"loss": "logistic", "num_classes": 3}, "two classes"),
        ({"num_classes": 2.5}, "num_classes must be an integer"),
        ({"tol": 0.0}, "tol must be"),
        ({"tol": float("nan")}, "tol must be"),
        ({"max_iter": 0}, "max_iter must be"),
        ({"alpha": 1.1}, "alpha must be"),
        ({"chunk_size": 0}, "chunk_size must be"),
        ({"sample_weight": -torch.ones(120)}, "non-negative"),
        ({"sample_weight": torch.zeros(120)}, "zero for every row"),
        ({"sample_weight": torch.ones(119)}, "120 rows but sample_weight has 119"),
        ({"warm_start": "old"}, "warm_start must be"),
        ({"warm_start": (torch.zeros(3, 2), torch.zeros(3))}, "must have shapes"),
        ({"process_group": True}, "init_process_group"),
    ],
)
def test_bad_arguments_are_named(rows, keywords, message):
    x, y = rows
    with pytest.raises(InputError, match=message):
        fit_elastic_net(x, y, 0.1, **keywords)
    with pytest.raises(InputError, match="lam must be"):
        fit_elastic_net(x, y, -0.1)


def test_extreme_sample_weights_are_solved(rows):
    x, y = rows
    s = np.logspace(-8, 8, len(y))
    result = fit_elastic_net(x, y, 0.05, sample_weight=s, tol=1e-5)
    assert result.converged


def test_a_rare_class_is_fitted():
    x, y = problem(n=1000, d=5, k=2, seed=32)
    y = np.where(np.arange(1000) == 13, 2, y)
    result = fit_elastic_net(torch.as_tensor(x), torch.as_tensor(y), 1e-3, tol=1e-6)
    assert result.converged


@pytest.mark.parametrize("alpha", [0.0, 0.99])
def test_the_bias_does_not_drift_along_the_shift_of_all_classes(alpha):
    """Nearly collinear float32 columns: without a gauge the biases reached hundreds and ate the digits."""
    for seed in range(4):
        draw = torch.Generator().manual_seed(seed)
        base = torch.randn(96, 2, generator=draw)
        x = torch.cat([base, base @ torch.randn(2, 3, generator=draw) + 0.05 * torch.randn(96, 3, generator=draw)], 1)
        y = (base @ torch.randn(2, 3, generator=draw) + 0.3 * torch.randn(96, 3, generator=draw)).argmax(1)
        result = fit_elastic_net(x / x.std(0), y, 0.01, alpha=alpha, num_classes=3)
        assert result.converged
        assert result.n_iter < 30
        assert abs(float(torch.as_tensor(result.bias).mean())) < 1e-5


X = np.random.default_rng(0).normal(size=(12, 3))
Y = np.arange(12) % 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"X": X[::-1]}, "X is an array with negative strides"),
        ({"X": X[:, ::-1]}, "X is an array with negative strides"),
        ({"X": [X[:6], X[6:, ::-1]]}, "X is an array with negative strides"),
        ({"y": Y[::-1]}, "y is an array with negative strides"),
        ({"X": X.astype(">f4")}, "X is an array with another byte order"),
        ({"y": Y.astype(">i4")}, "y is an array with another byte order"),
        ({"X": X.astype(object)}, "X has dtype object, not numbers"),
        ({"X": X.astype(np.longdouble)}, "X has dtype .*, not numbers"),
        ({"y": np.array(list("abc") * 4)}, r"y has dtype <U1, not numbers.*np.unique\(y, return_inverse=True\)"),
        ({"y": list("abc") * 4}, r"y must be numbers in a tensor, array or list, got \['a', 'b'"),
        ({"y": {0: 1}}, "y must be numbers"),
        ({"X": "text"}, "a chunk of X must be numbers"),
        ({"sample_weight": "text"}, "sample_weight must be numbers"),
        ({"sample_weight": np.ones(12)[::-1]}, "sample_weight is an array with negative strides"),
        ({"sample_weight": np.ones(12) + 0j}, "sample_weight must be real"),
        ({"chunk_size": "a"}, "chunk_size must be a positive integer"),
        ({"chunk_size": 1.0}, "chunk_size must be a positive integer"),
        ({"chunk_size": float("inf")}, "chunk_size must be a positive integer"),
        ({"num_classes": "abc"}, "num_classes must be an integer"),
        ({"num_classes": 3.0}, "num_classes must be an integer"),
        ({"num_classes": float("nan")}, "num_classes must be an integer"),
        ({"warm_start": ("a", "b")}, "weight must be numbers"),
    ],
)
def test_what_torch_does_not_read_is_refused_in_words(changed, message):
    with pytest.raises(InputError, match=message):
        fit_elastic_net(**{"X": X, "y": Y, "lam": 0.1, **changed})


def test_masked_entries_are_no_numbers():
    """The values under the mask were used."""
    with pytest.raises(InputError, match="X has 1 masked entries; fill them in"):
        fit_elastic_net(np.ma.masked_array(X, mask=X[0, 0] == X), Y, 0.1)
    plain = fit_elastic_net(np.ma.masked_array(X), Y, 0.1)
    assert torch.equal(plain.weight, fit_elastic_net(X, Y, 0.1).weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lams": 0.1}, "lams must be a list of numbers"),
        ({"lams": ["a"]}, "lams must be a list of numbers"),
        ({"lams": (lam for lam in [0.1])}, "lams must be a list of numbers"),
        ({"nonzeros_per_class": "3"}, "nonzeros_per_class must be a number"),
        ({"lam_ratio": "a"}, "lam_ratio must be a number"),
        ({"n_lams": float("nan")}, "n_lams must be an integer of at least 2"),
        ({"n_lams": 3.0}, "n_lams must be an integer of at least 2"),
    ],
)
def test_options_of_a_path_are_numbers(options, message):
    with pytest.raises(InputError, match=message):
        elastic_net_path(X, Y, **options)


def test_logits_are_of_tensors():
    with pytest.raises(InputError, match=r"X must be a torch.Tensor \(N, D\), got ndarray"):
        fit_elastic_net(X, Y, 0.1).decision_function(X)
