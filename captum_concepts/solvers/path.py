"""A path of solutions from all-zero to dense, and its point with a target number of nonzeros."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch

from captum_concepts.errors import InputError, InputWarning, shortened
from captum_concepts.solvers._quasi_newton import ProximalQuasiNewton
from captum_concepts.solvers.elastic_net import ElasticNetResult, largest_lambda, open_problem, solve_problem
from captum_concepts.solvers.penalty import ElasticNet

#: Relative tolerance for ``nonzeros_per_class``.
SPARSITY_TOLERANCE = 0.1
_MAX_BISECTIONS = 25


class ElasticNetPath(list[ElasticNetResult]):
    """A list of :class:`ElasticNetResult` with a selected one.

    Attributes:
        selected: the result nearest to ``nonzeros_per_class``, or None if that was not passed.
        target_met: whether ``selected`` is within 10 % of it.
    """

    def __init__(self, results: Iterable[ElasticNetResult], target: float | None = None) -> None:
        super().__init__(results)
        self.selected: ElasticNetResult | None = None
        self.target_met = False
        if target is not None:
            self.selected = min(self, key=lambda r: abs(mean_nonzeros(r) - target))
            self.target_met = abs(mean_nonzeros(self.selected) - target) <= SPARSITY_TOLERANCE * target


def mean_nonzeros(result: ElasticNetResult) -> float:
    """The mean number of nonzero weights over all K classes."""
    return float(result.nonzeros.double().mean())


def elastic_net_path(
    X: Any,
    y: Any,
    *,
    lams: Sequence[float] | None = None,
    nonzeros_per_class: float | None = None,
    n_lams: int = 30,
    lam_ratio: float | None = None,
    alpha: float = 0.99,
    num_classes: int | None = None,
    tol: float = 1e-4,
    loss: str = "multinomial",
    sample_weight: Any = None,
    standardize: bool = False,
    max_iter: int = 1000,
    chunk_size: int | None = None,
    device: torch.device | str | None = None,
    process_group: Any = None,
    show_progress: bool = False,
) -> ElasticNetPath:
    """The solutions for a sequence of ``lam``, each warm-started from the previous one and its curvature model.

    Args:
        X, y, alpha, num_classes, tol, loss, sample_weight, standardize, max_iter, chunk_size, device, process_group: as
            in :func:`~captum_concepts.solvers.fit_elastic_net`.
        lams: the strengths, solved from the largest down and returned in the given order. None takes ``n_lams`` values
            in geometric steps from :func:`~captum_concepts.solvers.lambda_max` to ``lam_ratio`` times that (None:
            1e-3, or 1e-6 with ``nonzeros_per_class``, which ends the path).
        nonzeros_per_class: stop once the mean number of nonzero weights per class exceeds this, then bisect between
            the two neighbors until it is met within 10 %; ``.selected`` is the nearest point. More than
            ``D (K - 1) / K`` cannot be reached with K softmax vectors, because nearly every feature has weight zero for
            some class (a shift of all classes changes only the penalty).
        n_lams, lam_ratio: shape of the default path.
        show_progress: show a progress bar of the points.

    Returns:
        A list of results, strongest penalty first (or in the order of ``lams``), with ``.selected`` and
        ``.target_met``.

    Raises:
        InputError: empty or invalid ``lams``, ``nonzeros_per_class`` outside (0, D], ``alpha=0`` without ``lams`` (no
            lambda_max), or anything that ``fit_elastic_net`` refuses.

    Warns:
        InputWarning: no point of the path is within 10 % of ``nonzeros_per_class``; the message names the nearest.
        ConvergenceWarning: as in ``fit_elastic_net``, for each point.

    >>> X = torch.eye(4).repeat(5, 1)
    >>> path = elastic_net_path(X, torch.arange(20) % 4, nonzeros_per_class=1)
    >>> path.target_met, path.selected.nonzeros.tolist()
    (True, [1, 1, 1, 1])
    """
    if lam_ratio is None:
        lam_ratio = 1e-3 if nonzeros_per_class is None else 1e-6
    check_path_numbers(lams, nonzeros_per_class, n_lams, lam_ratio)
    _check_path(lams, nonzeros_per_class, n_lams, lam_ratio)
    objective = open_problem(
        X, y, num_classes=num_classes, loss=loss, sample_weight=sample_weight, standardize=standardize,
        chunk_size=chunk_size, device=device, process_group=process_group,
    )  # fmt: skip
    if nonzeros_per_class is not None and nonzeros_per_class > objective.rows.n_features:
        raise InputError(
            f"nonzeros_per_class must be at most the number of features {objective.rows.n_features}; "
            f"got {nonzeros_per_class}"
        )
    if lams is None:
        top = largest_lambda(objective, alpha)
        if not math.isfinite(top):
            raise InputError("alpha=0 has no lambda_max to start a path from; pass lams")
        order = [top * lam_ratio ** (i / max(n_lams - 1, 1)) for i in range(n_lams)]
    else:
        order = sorted({float(lam) for lam in lams}, reverse=True)
    solver = ProximalQuasiNewton(objective)
    done: dict[float, ElasticNetResult] = {}
    params = objective.null_params()

    def at(lam: float) -> ElasticNetResult:
        nonlocal params
        result = solve_problem(
            solver, ElasticNet(lam, alpha), params, loss=loss, tol=tol, max_iter=max_iter, stacklevel=4
        )
        params = solver.last_params
        done[lam] = result
        return result

    for lam in _progress(order, show_progress):
        result = at(lam)
        if nonzeros_per_class is not None and mean_nonzeros(result) >= nonzeros_per_class:
            break
    if nonzeros_per_class is not None:
        _bisect(done, at, nonzeros_per_class)
    if lams is not None and nonzeros_per_class is None:
        return ElasticNetPath([done[float(lam)] for lam in lams])
    path = ElasticNetPath((done[lam] for lam in sorted(done, reverse=True)), nonzeros_per_class)
    if nonzeros_per_class is not None and not path.target_met and path.selected is not None:
        warnings.warn(
            f"no point of the path is within 10 % of nonzeros_per_class={nonzeros_per_class:g}; the nearest has "
            f"{mean_nonzeros(path.selected):.4g} at lam={path.selected.lam:.4g}"
            + ("; lower lam_ratio to extend the path" if mean_nonzeros(path[-1]) < nonzeros_per_class else ""),
            InputWarning,
            stacklevel=2,
        )
    return path


def _bisect(done: dict[float, ElasticNetResult], at: Any, target: float) -> None:
    """Bisect the interval that contains the target in log lam until a point is near enough."""
    for _ in range(_MAX_BISECTIONS):
        if any(abs(mean_nonzeros(r) - target) <= SPARSITY_TOLERANCE * target for r in done.values()):
            return
        order = [done[lam] for lam in sorted(done, reverse=True) if lam > 0]
        bracket = next(
            ((a, b) for a, b in itertools.pairwise(order) if mean_nonzeros(a) < target < mean_nonzeros(b)),
            None,
        )
        if bracket is None or bracket[0].lam < bracket[1].lam * (1 + 1e-9):
            return
        at(math.sqrt(bracket[0].lam * bracket[1].lam))


def check_path_numbers(lams: Any, target: Any, n_lams: Any, lam_ratio: Any) -> None:
    """Raise if an option of the path is not a number, or ``lams`` not a list of numbers."""
    if lams is not None:
        try:
            [float(lams[i]) for i in range(len(lams))]
        except (TypeError, ValueError, KeyError) as error:
            raise InputError(f"lams must be a list of numbers or None; got {shortened(lams)}") from error
    for name, value in (("nonzeros_per_class", target), ("lam_ratio", lam_ratio)):
        if value is not None and not isinstance(value, Real):
            raise InputError(f"{name} must be a number or None; got {shortened(value)}")
    if not isinstance(n_lams, Integral):
        raise InputError(f"n_lams must be an integer of at least 2; got {shortened(n_lams)}")


def _check_path(lams: Sequence[float] | None, target: float | None, n_lams: int, lam_ratio: float) -> None:
    if lams is not None:
        if len(lams) == 0:
            raise InputError("lams is empty; pass at least one strength, or None for the default path")
        for lam in lams:
            ElasticNet(float(lam), 0.0)
    if target is not None and (isinstance(target, bool) or not target > 0):
        raise InputError(f"nonzeros_per_class must be positive or None; got {target!r}")
    if isinstance(n_lams, bool) or int(n_lams) != n_lams or n_lams < 2:
        raise InputError(f"n_lams must be an integer of at least 2; got {n_lams!r}")
    if not 0 < lam_ratio < 1:
        raise InputError(f"lam_ratio must lie between 0 and 1; got {lam_ratio!r}")


def _progress(values: list[float], show: bool) -> Iterable[float]:
    if not show:
        return values
    from tqdm import tqdm

    return tqdm(values, desc="elastic-net path")
