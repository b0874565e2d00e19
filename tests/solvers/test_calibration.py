"""Labels are read as what they say, and scores that cannot be calibrated are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from captum_concepts.errors import InputError
from captum_concepts.solvers import fit_calibration, truth_table

NAMES = ["a", "b"]
SCORES = torch.tensor([[-2.0], [-1.0], [0.5], [-0.5], [1.0], [2.0]])
TRUTH = torch.tensor([[0], [0], [0], [1], [1], [1]]).bool()


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"a": [1, 0, 1], "b": np.array([False, True, False])}, [[1, 0], [0, 1], [1, 0]]),
        ({"a": torch.tensor([1.0, 0.0, 1.0]), "b": [0, 0, 0], "c": ["x"]}, [[1, 0], [0, 0], [1, 0]]),
        ([[0, 1], [1], None], [[1, 1], [0, 1], [0, 0]]),
        ([[True, False], [True, True], [False, True]], [[1, 0], [1, 1], [0, 1]]),
        (torch.tensor([[1, 0], [0, 1], [0, 0]]), [[1, 0], [0, 1], [0, 0]]),
        ((name for name in ["a", "b", "a"]), [[1, 0], [0, 1], [1, 0]]),
    ],
)
def test_labels_are_read(labels, expected):
    assert truth_table(labels, NAMES, 3).int().tolist() == expected


@pytest.mark.parametrize("column", [[1, -1, 1], [1.0, 0.5, 0.0], [1, float("nan"), 0], [2, 0, 0], [1, 0], ["x"] * 3, 1])
def test_a_column_of_other_values_than_bools_is_refused(column):
    """They all became True."""
    with pytest.raises(InputError, match=r"labels\['a'\] must be 3 bools"):
        truth_table({"a": column, "b": [0, 1, 0]}, NAMES, 3)


@pytest.mark.parametrize("names", [NAMES, [*NAMES, "c"]])
def test_lists_of_zeros_and_ones_may_be_a_table_or_indices(names):
    """With two concepts, each of these images was read as showing both."""
    table = torch.eye(3)[:, : len(names)].int()[:2]
    with pytest.raises(InputError, match="table of 0 and 1 as well as lists of indices"):
        truth_table(table.tolist(), names, 2)
    assert truth_table(table, names, 2).int().tolist() == table.tolist()


@pytest.mark.parametrize("labels", [None, 5, "ab"])
def test_what_is_no_list_of_labels_is_refused(labels):
    with pytest.raises(InputError, match="labels must be a list with one concept"):
        truth_table(labels, NAMES, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scores": SCORES.numpy()}, "scores must be a torch.Tensor, got ndarray"),
        ({"truth": TRUTH.numpy()}, "truth must be a torch.Tensor, got ndarray"),
        ({"scores": SCORES[:0], "truth": TRUTH[:0]}, "at least one row"),
        ({"scores": SCORES[:, 0], "truth": TRUTH[:, 0]}, r"must both be \(N, T\)"),
        ({"scores": SCORES.log()}, "scores contain NaN"),
        ({"truth": TRUTH * 2 - 1}, r"truth must be bools, or numbers 0 and 1, got \[-1, 1\]"),
        ({"weight": torch.ones(3)}, r"weight must be \(6,\) or \(6, 1\)"),
        ({"weight": -torch.ones(6)}, "weight must be finite and non-negative"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        fit_calibration(**{"scores": SCORES, "truth": TRUTH, **given})


def test_numbers_are_bools_of_truth():
    expected, found = fit_calibration(SCORES, TRUTH), fit_calibration(SCORES, TRUTH.float(), torch.ones(6, 1))
    assert torch.equal(found.slopes, expected.slopes)
    assert torch.equal(found.intercepts, expected.intercepts)
