"""How close the numbers that tests compare are to their tolerances.

Each comparison of numbers is one of two kinds:

- its tolerance has head-room: the kernels of another machine move the numbers by at most a tenth of it. These are
  ``torch.testing.assert_close``, ``allclose`` and ``pytest.approx``;
- its tolerance is a bound that is stated and derived where the number is made: :func:`within`.

``pytest --comparisons FOLDER`` writes what every comparison used of its tolerance to ``FOLDER``; ``make test-kernels``
collects that under the kernels a CPU has and fails where head-room is missing. Tests that compare numbers carry the
marker ``numeric``, which :func:`compares_numbers` finds by itself.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import pytest
import torch

TESTS = Path(__file__).resolve().parent
_COMPARE = {"assert_close", "allclose", "assert_allclose", "assert_array_equal", "approx", "within", "equal"}
_close = torch.testing.assert_close


def within(actual: torch.Tensor, expected: torch.Tensor, bound: float | torch.Tensor) -> None:
    """``|actual - expected| <= bound``, a bound that documentation states; it needs no head-room."""
    bound = torch.as_tensor(bound, dtype=torch.float64)
    difference = (actual.double() - expected.double()).abs()
    _record(difference, bound.expand_as(difference), "bound")
    worst = (difference / bound).max().item()
    assert worst <= 1, f"the difference is {worst:.3g} times its bound (largest {difference.max().item():.3g})"


# --- what was seen ---------------------------------------------------------------------------------------------------

_seen: dict[str, dict[str, Any]] = {}
_test = ""


def _record(difference: Any, tolerance: Any, kind: str) -> None:
    difference, tolerance = np.asarray(difference, dtype=float), np.asarray(tolerance, dtype=float)
    if not difference.size or not _test:
        return
    with np.errstate(all="ignore"):
        used = np.where(difference == 0, 0.0, difference / tolerance)
    if not np.isfinite(used).all():
        return  # exact comparisons, and infinities that differ: these pass or fail
    site = _site()
    if site is None:
        return
    worst = float(used.max())
    entry = _seen.setdefault(site, {"used": -1.0, "largest": 0.0, "count": 0, "kind": kind})
    entry["count"] += 1
    entry["largest"] = max(entry["largest"], float(difference.max()))
    if worst > entry["used"]:
        entry.update(used=worst, difference=float(difference.flat[int(used.argmax())]), test=_test)


def _site() -> str | None:
    """``folder/file.py:line`` of the test that compares; None for a comparison inside the package."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.name != "comparisons.py" and path.suffix == ".py":
            if TESTS in path.parents:
                return f"{path.relative_to(TESTS).as_posix()}:{frame.f_lineno}"
            if "captum_concepts" in path.parts and "tests" not in path.parts:
                return None
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _pairs(actual: Any, expected: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if isinstance(actual, Mapping) and isinstance(expected, Mapping):
        for key in actual.keys() & expected.keys():
            yield from _pairs(actual[key], expected[key])
    elif isinstance(actual, Sequence) and isinstance(expected, Sequence) and not isinstance(actual, str):
        for one, other in zip(actual, expected, strict=False):
            yield from _pairs(one, other)
    else:
        try:
            one, other = torch.as_tensor(actual).detach().cpu(), torch.as_tensor(expected).detach().cpu()
        except (TypeError, ValueError, RuntimeError):
            return
        if one.layout == torch.strided == other.layout and one.shape == other.shape:
            yield one, other


def _tolerated(actual: Any, expected: Any, rtol: float | None, atol: float | None) -> None:
    for one, other in _pairs(actual, expected):
        if not (one.dtype.is_floating_point or other.dtype.is_floating_point):
            continue
        if rtol is None or atol is None:
            relative, absolute = torch.testing._comparison.default_tolerances(one, other)
        else:
            relative, absolute = rtol, atol
        one, other = one.double(), other.double()
        same = (one == other) | (one.isnan() & other.isnan())
        difference = torch.where(same, torch.zeros_like(one), (one - other).abs())
        _record(difference, absolute + relative * other.abs(), "tolerance")


def _watch() -> None:
    """Record what the comparisons see before they judge."""

    @functools.wraps(_close)
    def assert_close(actual: Any, expected: Any, **options: Any) -> None:
        _tolerated(actual, expected, options.get("rtol"), options.get("atol"))
        _close(actual, expected, **options)

    torch.testing.assert_close = assert_close

    def watched(module: Any, name: str, default: tuple[float, float]) -> None:
        plain = getattr(module, name)

        @functools.wraps(plain)
        def compare(*values: Any, **options: Any) -> Any:
            given = dict(zip(("rtol", "atol"), values[2:], strict=False)) | options
            if not torch.compiler.is_compiling():
                rtol, atol = given.get("rtol", default[0]), given.get("atol", default[1])
                _tolerated(values[0], values[1], rtol, atol)
            return plain(*values, **options)

        setattr(module, name, compare)

    watched(torch, "allclose", (1e-5, 1e-8))
    watched(torch.Tensor, "allclose", (1e-5, 1e-8))
    watched(np, "allclose", (1e-5, 1e-8))
    watched(np.testing, "assert_allclose", (1e-7, 0.0))

    scalar = type(pytest.approx(1.0))
    plain = scalar.__eq__

    def equals(self: Any, actual: Any) -> bool:
        try:
            gap, tolerance = abs(float(actual) - float(self.expected)), float(self.tolerance)
        except (TypeError, ValueError):
            gap = tolerance = 0.0
        if math.isfinite(gap):
            _record(gap, tolerance, "tolerance")
        return plain(self, actual)

    scalar.__eq__ = equals  # type: ignore[method-assign]


class Recorder:
    """The plugin behind ``--comparisons``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _watch()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        global _test
        _test = item.nodeid
        try:
            return (yield)
        finally:
            _test = ""

    def pytest_sessionfinish(self) -> None:
        if _seen:  # one file for each process of pytest-xdist
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{os.getpid()}.json").write_text(json.dumps(_seen))


# --- which tests compare numbers -------------------------------------------------------------------------------------


def compares_numbers(test: Callable[..., Any]) -> bool:
    """Does the test, or a function or class of the tests that it uses, compare numbers?"""
    test = inspect.unwrap(test)
    inner = getattr(getattr(test, "hypothesis", None), "inner_test", None)
    return _compares(inspect.unwrap(inner) if inner else test, frozenset())


def _compares(used: Any, above: frozenset[int]) -> bool:
    if id(used) in above:
        return False
    above = above | {id(used)}
    if isinstance(used, type):
        return any(_compares(value, above) for value in vars(used).values() if inspect.isfunction(value))
    if not inspect.isfunction(used):
        return False
    names = _names(used.__code__)
    if names & _COMPARE:
        return True
    values = [used.__globals__.get(name) for name in names]
    return any(_ours(value) and _compares(value, above) for value in values)


def _names(code: CodeType) -> set[str]:
    inside = (_names(part) for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union(*inside)


def _ours(value: Any) -> bool:
    if not (inspect.isfunction(value) or isinstance(value, type)):
        return False
    file = getattr(sys.modules.get(value.__module__), "__file__", None)
    return file is not None and TESTS in Path(file).resolve().parents
