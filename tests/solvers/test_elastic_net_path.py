"""The path runs from all-zero weights down, every point at its optimum, and finds a wanted sparsity."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from solver_reference import problem

from captum_concepts.errors import ConvergenceWarning, InputError, InputWarning
from captum_concepts.solvers import elastic_net_path, fit_elastic_net, lambda_max


@pytest.fixture(scope="module")
def rows():
    return tuple(torch.as_tensor(t) for t in problem(n=500, d=40, k=5, seed=40))


def density(result):
    return result.nonzeros.double().mean().item()


def test_default_path_goes_geometrically_from_lambda_max(rows):
    path = elastic_net_path(*rows, n_lams=8, lam_ratio=1e-2)
    lams = [r.lam for r in path]
    assert lams[0] == pytest.approx(lambda_max(*rows))
    assert lams[-1] == pytest.approx(1e-2 * lams[0])
    assert all(a / b == pytest.approx(lams[0] / lams[1]) for a, b in itertools.pairwise(lams))
    assert density(path[0]) == 0
    assert density(path[-1]) > 5
    assert path.selected is None
    objectives = [r.objective for r in path]
    assert objectives == sorted(objectives, reverse=True)  # the optimum falls with lam


def test_every_point_is_the_optimum_of_its_own(rows):
    path = elastic_net_path(*rows, n_lams=6, lam_ratio=1e-2, tol=1e-7)
    for point in path:
        alone = fit_elastic_net(*rows, point.lam, tol=1e-7)
        assert point.converged
        assert point.objective == pytest.approx(alone.objective, abs=1e-6)
        torch.testing.assert_close(point.weight, alone.weight, atol=1e-3, rtol=0)


def test_warm_starts_save_passes(rows):
    path = elastic_net_path(*rows, n_lams=10, lam_ratio=1e-2)
    alone = sum(fit_elastic_net(*rows, p.lam).n_passes for p in path)
    assert sum(p.n_passes for p in path) < alone


def test_given_strengths_come_back_in_their_order(rows):
    lams = [0.01, 0.1, 0.003, 0.1]
    path = elastic_net_path(*rows, lams=lams)
    assert [r.lam for r in path] == lams
    assert path[1] is path[3]


@pytest.mark.parametrize("target", [1, 3.5, 10, 25, 31])
@pytest.mark.parametrize("n_lams", [3, 30])
def test_sparsity_is_met_within_ten_percent_without_a_warning(rows, target, n_lams):
    path = elastic_net_path(*rows, nonzeros_per_class=target, n_lams=n_lams)
    assert path.target_met
    assert path.selected in list(path)
    assert abs(density(path.selected) - target) <= 0.1 * target
    assert path.selected.converged
    assert [r.lam for r in path] == sorted((r.lam for r in path), reverse=True)


def test_sparsity_is_met_for_one_logistic_vector(rows):
    x, y = rows
    path = elastic_net_path(x, (y > 1).long(), loss="logistic", nonzeros_per_class=10)
    assert path.target_met
    assert path.selected.weight.shape == (1, 40)


def test_out_of_reach_sparsity_gives_the_nearest_point_and_says_so(rows):
    with pytest.warns(InputWarning, match=r"nearest has .* lower lam_ratio") as caught:
        path = elastic_net_path(*rows, nonzeros_per_class=40, n_lams=4, lam_ratio=0.3)
    assert caught[0].filename == __file__
    assert not path.target_met
    assert path.selected is path[-1]


def test_a_jump_over_the_target_gives_the_nearest_point_and_says_so():
    # Four features of identical value: all of them enter at once, so one or two a class cannot be had.
    x = torch.eye(4, dtype=torch.float64).repeat(10, 1)
    y = torch.arange(40) % 4
    with pytest.warns(InputWarning, match=r"nearest has 1 at lam=[\d.e-]+$"):
        path = elastic_net_path(x, y, nonzeros_per_class=0.6)
    assert path.selected.nonzeros.tolist() == [1, 1, 1, 1]


def test_strengths_of_the_user_are_searched_too(rows):
    path = elastic_net_path(*rows, lams=[0.2, 1e-3, 0.0], nonzeros_per_class=10)
    assert path.target_met


def test_unconverged_points_warn_at_the_caller(rows):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        elastic_net_path(*rows, lams=[1e-4], max_iter=1)
    assert [w.category for w in caught] == [ConvergenceWarning]
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"lams": []}, "lams is empty"),
        ({"lams": [0.1, -1.0]}, "lam must be"),
        ({"nonzeros_per_class": 0}, "must be positive"),
        ({"nonzeros_per_class": 41}, "at most the number of features 40"),
        ({"n_lams": 1}, "n_lams"),
        ({"lam_ratio": 2.0}, "lam_ratio"),
        ({"lam_ratio": 1.0}, "lam_ratio"),
        ({"lam_ratio": 0.0}, "lam_ratio"),
        ({"alpha": 0.0}, "no lambda_max"),
    ],
)
def test_bad_arguments_are_named(rows, keywords, message):
    with pytest.raises(InputError, match=message):
        elastic_net_path(*rows, **keywords)


def test_progress_bar_is_shown_only_when_asked(rows, capsys):
    elastic_net_path(*rows, lams=[0.1])
    assert capsys.readouterr().err == ""
    elastic_net_path(*rows, lams=[0.1], show_progress=True)
    assert "elastic-net path" in capsys.readouterr().err
