"""Every kind of input at every public entry point: the right value, or a refusal in words. See ``inputs.py``."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from columns import COLUMNS, FAMILIES, NOT_COLUMNS, Column, cefam, entry_points, fam, page, sacv, salf
from hypothesis import given, settings, strategies as st
from inputs import Outcome, inference
from torch import Tensor

from captum_concepts.errors import CaptumConceptsError
from captum_concepts.images import open_images

CELLS = [
    pytest.param(column, row, id=f"{column.name}-{row}")
    for column in COLUMNS
    for row in FAMILIES[column.family].rows
    if row not in column.without
]


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for files, shared by all cells."""
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    """What each column makes of the family's first row, once."""
    return {}


def same(a: Any, b: Any) -> bool:
    """Whether two results agree: tensors up to the rounding of 8 bits."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=1e-5, equal_nan=True)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b) or (isinstance(a, float) and a == pytest.approx(b, abs=1e-5))


def run(column: Column, row: str, space: Path, outcome: Outcome) -> Any:
    """The column's result; warnings that the outcome does not name are errors."""
    value = FAMILIES[column.family].rows[row].make(space)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = column.call(value, space)
    ours = [str(w.message) for w in said if "captum_concepts" in type(w.message).__module__]
    assert bool(ours) == bool(outcome.warns), ours
    assert all(re.search(outcome.warns, message) for message in ours)
    return result


@pytest.mark.parametrize(("column", "row"), CELLS)
def test_cell(column: Column, row: str, space: Path, references: dict[str, Any]):
    family = FAMILIES[column.family]
    outcome = column.outcomes.get(row) or family.rows[row].outcomes[column.family]
    if outcome.kind == "refused":
        with pytest.raises((CaptumConceptsError, FileNotFoundError)) as error:
            run(column, row, space, Outcome("runs"))
        message = str(error.value)
        assert re.search(outcome.word, message), message
        assert len(message) <= 600
        return
    result = run(column, row, space, outcome)
    if outcome.kind == "same":
        key = column.name, column.family
        if key not in references:
            references[key] = run(column, next(iter(family.rows)), space, Outcome("runs"))
        assert same(result, references[key])


def test_every_public_entry_point_has_its_column():
    """A new function that takes images, labels, words, files or a model needs a column, or a reason in NOT_COLUMNS."""
    points = entry_points()
    known = {column.name for column in COLUMNS}
    assert known <= set(points), "columns of what is no entry point (any more)"
    missing = [name for name in points if name not in known and not any(fnmatch(name, one) for one in NOT_COLUMNS)]
    assert not missing
    unused = [one for one in NOT_COLUMNS if not any(fnmatch(name, one) for name in points)]
    assert not unused, "patterns of what is no entry point (any more)"


def test_the_page_is_printed_from_here():
    written = Path(__file__).resolve().parents[2] / "docs" / "inputs.md"
    assert written.read_text(encoding="utf-8") == page(), "run python tests/contract/columns.py"


MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "rows reversed": lambda x: x.flip(2).contiguous().flip(2),
    "every second column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "part of a larger one": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 4))[..., 3:-4, 1:-2],
    "recorded": lambda x: x.clone().requires_grad_(),
    "inference mode": inference,
}
METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "FeatureActivationMap": lambda x: fam().explain(x).maps,
    "SpatialACV": lambda x: sacv().explain(x, target=1).maps,
    "ConceptFusionMap": lambda x: cefam().explain(x).maps,
    "SALFCBM": lambda x: salf().explain(x).maps,
    "reader": lambda x: torch.stack(list(open_images(x))),
}
DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
]


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(METHODS)), st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.integers(1, 40),
    st.sampled_from(DTYPES), st.sampled_from(sorted(MEMORY)),
)  # fmt: skip
def test_sizes_dtypes_and_memory(name, count, channels, height, width, dtype, memory):
    """However a batch lies in memory, it says the same; what cannot be read is refused in words."""
    images = torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(height * 50 + width))
    images = images if dtype.is_floating_point or dtype.is_complex else images * 200
    images = images.to(dtype)
    if memory == "recorded" and not dtype.is_floating_point:
        memory = "contiguous"
    said = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = METHODS[name](MEMORY[memory](images))
        except CaptumConceptsError as error:
            said = str(error)
        else:
            torch.testing.assert_close(found, METHODS[name](images.clone()), rtol=1e-4, atol=1e-5)
    if said:
        assert len(said) <= 600
        too_small = min(height, width) < 8 and name != "reader"
        assert too_small or channels != 3 or dtype != torch.float32, said
        return
    assert channels == 3 or (channels == 1 and name == "reader")
    assert dtype == torch.float32 or (name == "reader" and dtype in (torch.float64, torch.bfloat16, torch.uint8))
