"""The mutation check (tools/mutation.py): every module has tests that exist; what cannot be seen is not changed."""

from __future__ import annotations

from pathlib import Path

import mutation
import pytest
from mutation import ROOMS, ROOT


@pytest.mark.parametrize("room", ROOMS)
def test_every_module_has_tests_that_exist(room):
    modules = mutation.modules_of(room)
    assert modules
    for module in modules:
        files = mutation.tests_of(module)
        assert files[0] == f"captum_concepts/{module}.py"
        assert any(name.startswith(f"tests/{room}/") for name in files), module
        assert all((ROOT / name).is_file() for name in files), module


def test_every_room_is_there():
    folders = {path.parent.name for path in (ROOT / "captum_concepts").glob("*/__init__.py")}
    assert folders == {*ROOMS, "testing"}  # which is tests


def test_the_folders_say_which_tests_a_module_has():
    assert "tests/models/salf_cbm/fit/test_salf_fit.py" in mutation.tests_of("models/salf_cbm/fit/head")
    assert "tests/models/salf_cbm/test_salf_cbm.py" not in mutation.tests_of("models/salf_cbm/fit/head")
    assert "tests/attr/spatial_acv/test_spatial_acv.py" in mutation.tests_of("attr/spatial_acv/fit")
    assert "tests/attr/test_saved.py" in mutation.tests_of("attr/saved")


def test_annotations_are_left_alone():
    source = "def f(a: int | None = 1 + 2) -> int | None:\n    b: int | str = a | 3\n    return b\n"
    hidden = mutation.meaningless(source)
    lines = enumerate(source.splitlines(), 1)
    bars = [(number, at) for number, text in lines for at, letter in enumerate(text) if letter in "|+"]
    seen = [place for place in bars if not any(first <= place < last for first, last in hidden)]
    assert seen == [(1, 24), (2, 21)]


def test_the_tests_of_a_line_come_quickest_first_and_within_the_budget():
    path = Path("captum_concepts/solvers/penalty.py")
    lines = (ROOT / path).read_text().splitlines()
    at = next(n for n, line in enumerate(lines, 1) if "self.l1 * weight.abs().sum()" in line)
    covered = {"lines": {f"solvers/penalty.py:{at}": ["slow", "quick", "middle"]}}
    covered["seconds"] = {"quick": 1.0, "middle": 2.0, "slow": 50.0, "other": 0.1}
    assert mutation.tests_for("solvers/penalty", at, covered, 100.0) == ["quick", "middle", "slow"]
    assert mutation.tests_for("solvers/penalty", at, covered, 10.0) == ["quick", "middle"]


def test_the_tests_of_a_decorator_are_those_of_its_module():
    lines = (ROOT / "captum_concepts/vlm/region_prompt.py").read_text().splitlines()
    at = next(n for n, line in enumerate(lines, 1) if line.startswith("@dataclass"))
    name = "tests/vlm/test_region_prompt.py::test_it_is_a_value"
    assert mutation.tests_for("vlm/region_prompt", at, {"lines": {}, "seconds": {name: 1.0}}, 10.0) == [name]
