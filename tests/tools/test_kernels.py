"""What the suite says about itself: tolerances under other kernels (tools/kernels.py), and what was skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import kernels
import pytest
import torch
from comparisons import compares_numbers, within
from kernels import Run, changed, collect, table, without_headroom

ROOT = Path(__file__).resolve().parents[2]
SUITE = """
import numpy as np
import pytest
import torch


def near(one, other):
    torch.testing.assert_close(one, other, atol=1e-3, rtol=0)


def test_numbers():
    near(torch.ones(3), torch.ones(3) + 5e-4)
    near({"a": [torch.ones(1)]}, {"a": [torch.ones(1)]})
    assert 1.0 == pytest.approx(1.0 + 2e-6, abs=1e-5, rel=0)
    assert np.allclose(np.ones(2), np.ones(2) + 1e-9, atol=1e-8, rtol=0)


def test_words():
    assert "one" != "two"


@pytest.mark.parametrize("number", range(3))
def test_elsewhere(number):
    pytest.skip("no Chromium on the path")


def test_there():
    pytest.skip("needs a CUDA device")
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """Run pytest with this suite's conftest on another suite, laid out as if it were part of it."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "tests").mkdir()
    for name in ("conftest.py", "comparisons.py"):
        (folder / "tests" / name).write_text((ROOT / "tests" / name).read_text())
    (folder / "tests" / "test_some.py").write_text(SUITE)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = numeric\n")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    return folder, run


def test_a_run_says_what_it_compared_and_what_it_skipped(suite):
    folder, run = suite
    done = run("--comparisons", "seen")
    assert done.returncode == 0, done.stdout
    assert "4 skipped" in done.stdout
    assert "    3  no Chromium on the path\n    1  needs a CUDA device" in done.stdout
    seen = collect(folder / "seen")
    lines = SUITE.splitlines()
    by_line = {lines[int(site.rpartition(":")[2]) - 1].strip(): entry for site, entry in seen.items()}
    assert {text.split("(")[0] for text in by_line} == {"torch.testing.assert_close", "assert 1.0 == pytest.approx",
                                                        "assert np.allclose"}  # fmt: skip
    near = next(entry for text, entry in by_line.items() if text.startswith("torch"))
    assert near["used"] == pytest.approx(0.5, rel=1e-3)
    assert near["count"] == 2
    assert near["test"] == "tests/test_some.py::test_numbers"
    approximate = next(entry for text, entry in by_line.items() if "approx" in text)
    assert approximate["used"] == pytest.approx(0.2, rel=1e-3)


def test_the_marker_and_what_must_run(suite):
    _, run = suite
    done = run("-m", "numeric", "--collect-only")
    assert [line for line in done.stdout.splitlines() if "::" in line] == ["tests/test_some.py::test_numbers"]
    done = run("--must-run", "(?i)chromium")
    assert done.returncode == 1
    assert "(must run here)" in done.stdout
    assert run("--must-run", "another reason").returncode == 0


def test_within_is_a_bound():
    within(torch.ones(2), torch.ones(2) + 0.25, 0.25)
    with pytest.raises(AssertionError, match=r"2 times its bound"):
        within(torch.ones(2), torch.tensor([1.0, 1.5]), 0.25)
    assert compares_numbers(test_within_is_a_bound)
    assert not compares_numbers(test_settings_are_variables)


def entry(used: float, difference: float, kind: str = "tolerance") -> dict:
    return {"used": used, "difference": difference, "largest": difference, "kind": kind, "count": 1, "test": "t"}


def test_the_table_names_what_has_no_headroom():
    still = {"a/x.py:2": entry(0.9, 1e-3, "bound"), "b/x.py:2": entry(0.02, 1e-3)}
    plain = Run("plain", 0, 60.0, {"a/x.py:1": entry(0.01, 1e-7), **still})
    other = Run("2 threads", 1, 90.0, {"a/x.py:1": entry(0.3, 3e-6), **still})
    assert without_headroom([plain]) == {}
    half = Run("half precision", 0, 1.0, {"a/x.py:1": entry(0.6, 1e-3)})
    assert without_headroom([half, half]) == {}
    asked = Run("a difference that is asked for", 0, 1.0, {"a/x.py:1": entry(3e4, 1.0)})
    assert without_headroom([plain, asked]) == {}
    assert without_headroom([plain, other]) == {"a/x.py:1": (0.3, "2 threads", "t")}
    assert changed(other, plain) == pytest.approx(1 / 3)
    text = table([plain, other])
    assert "| 2 threads | failed (1) | 1.5 | 3 | 33% |" in text
    assert "| a | 1.0e-07 (1%) | 3.0e-06 (30%) |" in text
    assert "| b |  |  |" in text
    assert "| a/x.py:1 | 0.30 | 2 threads | t |" in text


def test_settings_are_variables():
    assert next(iter(kernels.SETTINGS)) == "plain"
    assert all(isinstance(value, str) for setting in kernels.SETTINGS.values() for value in setting.values())
