"""Fixtures and hooks shared by all tests."""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from comparisons import Recorder, compares_numbers
from hypothesis import HealthCheck, settings

# A gate repeats itself: the same examples each time, however busy the machine. Elsewhere new ones are tried.
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
if os.environ.get("CI"):
    settings.load_profile("ci")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and real pretrained weights beside the checkout; skips where it is absent."""
    if not (SHARED_DATA / "README.md").is_file():
        pytest.skip(f"real data and models are not at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def real_classifier() -> torch.nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, which the ``dev`` extra installs: every clone has it."""
    from captum_concepts.demo.photos import load_classifier

    return load_classifier()


@pytest.fixture(scope="session")
def photographs() -> dict[str, torch.Tensor]:
    """Three real photographs ``(3, 224, 224)`` that ship with dependencies: a palace, a flower and a person."""
    import matplotlib
    import sklearn.datasets

    from captum_concepts.demo.photos import PREPROCESSING
    from captum_concepts.images import open_images

    samples = Path(sklearn.datasets.__file__).parent / "images"
    person = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    files = {"palace": samples / "china.jpg", "flower": samples / "flower.jpg", "person": person}
    return dict(zip(files, open_images(list(files.values()), preprocessing=PREPROCESSING), strict=True))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--comparisons", metavar="FOLDER", help="write what comparisons used of their tolerances there")
    parser.addoption(
        "--must-run", metavar="PATTERN", action="append", default=[],
        help="fail where a test was skipped for a reason in which this regular expression is found",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # as shells start what runs in the background: Ctrl-C is tested
        signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = config.getoption("--comparisons")
    if folder:
        config.pluginmanager.register(Recorder(Path(folder).resolve()))


#: Files that take longest, slowest first: started last, one of them would keep a single worker busy in the end.
_LONGEST = (
    "test_demo.py", "test_tutorials.py", "test_paper_tables.py", "test_files.py", "test_architectures.py",
    "test_documentation.py", "test_explorer.py", "test_visualization.py", "test_processes.py", "test_inputs.py",
    "test_model_conditions.py", "test_region_embedding_store.py", "test_spatial_acv_fit.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _LONGEST.index(item.path.name) if item.path.name in _LONGEST else len(_LONGEST))
    for item in items:
        if isinstance(item, pytest.Function) and compares_numbers(item.function):
            item.add_marker("numeric")


def _skipped(reporter: pytest.TerminalReporter) -> Counter[str]:
    """Reasons and how many tests each of them skipped."""
    reasons = []
    for report in reporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons.append(reason.removeprefix("Skipped: "))
    return Counter(reasons)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """``--must-run``: a skipped test is a failure if it had to run here."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or session.exitstatus != pytest.ExitCode.OK:
        return
    for reason in _skipped(reporter):
        if any(re.search(pattern, reason) for pattern in session.config.getoption("--must-run")):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What was skipped and why, in groups, however quiet the rest is."""
    groups = _skipped(terminalreporter)
    if not groups:
        return
    terminalreporter.section(f"{groups.total()} skipped")
    for reason, count in groups.most_common():
        needed = any(re.search(pattern, reason) for pattern in config.getoption("--must-run"))
        terminalreporter.line(f"{count:5}  {reason}{'  (must run here)' if needed else ''}", red=needed)
