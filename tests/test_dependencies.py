"""Lower bounds are those that are tested, and every dependency says what it is for."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
#: Tools that do not run in the tests, and libraries that are only needed elsewhere.
NOT_IN_TESTS = {"ruff", "mypy"}
PEERS = {"grad-cam", "quantus", "scikit-learn", "scipy", "opencv-python", "glm-saga", "pandas"}


def bounds(section: str) -> dict[str, str]:
    block = re.search(rf"^{section} = \[\n(.*?)^\]", PYPROJECT, re.MULTILINE | re.DOTALL).group(1)
    return dict(re.findall(r'"([\w-]+)>=([\d.]+)"', block))


def test_the_oldest_versions_are_the_lower_bounds():
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "tests" / "oldest.txt").read_text(), re.MULTILINE))
    lower = {**bounds("dependencies"), **bounds("dev")}
    assert set(pins) == set(lower) - NOT_IN_TESTS

    def padded(version: str) -> list[int]:
        return [*map(int, version.split(".")), 0, 0][:3]

    assert {name: padded(lower[name]) for name in pins} == {name: padded(pin) for name, pin in pins.items()}


def test_every_dependency_is_justified_in_its_line():
    block = re.search(r"^dependencies = \[\n(.*?)^\]", PYPROJECT, re.MULTILINE | re.DOTALL).group(1)
    lines = block.strip().splitlines()
    assert lines
    assert all(re.search(r'",?\s+# \w.{5,}', line) for line in lines)


def test_peers_and_oracles_are_no_runtime_dependencies():
    assert not set(bounds("dependencies")) & PEERS
