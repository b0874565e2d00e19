"""Every form of target that Captum accepts, and errors that say what is allowed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum._utils.common import _select_targets

from captum_concepts._captum import select_output, target_indices
from captum_concepts.errors import CaptumConceptsError, TargetError

NAMES = ["sky", "sea", "sand"]


@pytest.mark.parametrize(
    "target",
    [1, -2, np.int64(1), torch.tensor(1), torch.tensor([1]), (1,), [1, 1], [(1,), (1,)], torch.tensor([1, 1]), "sea"]
    + [
        ["sea", 1],
        [torch.tensor(1), torch.tensor(1)],
        np.array(1),
        np.array([1, 1]),
        torch.tensor([1], dtype=torch.uint8),
    ],
    ids=str,
)
def test_every_form_of_index_one(target):
    assert target_indices(target, 2, 3, NAMES).tolist() == [1, 1]


@pytest.mark.parametrize(
    "target",
    [3, -4, [0], [0, 1, 2], [], torch.tensor([[0, 1]]), 1.0, torch.tensor(1.0), (0, 1), "see", ["sea", "lake"], True]
    + [None, [None, 1], {"a": 1}, np.array([0.0, 1.0]), [torch.tensor(1.0), 0], [torch.tensor([0, 1]), 1]]
    + [torch.tensor([True, False]), [[0], [1]]],
    ids=str,
)
def test_bad_indices(target):
    with pytest.raises(TargetError) as caught:
        target_indices(target, 2, 3, NAMES)
    assert isinstance(caught.value, AssertionError)
    assert isinstance(caught.value, CaptumConceptsError)
    assert "target" in str(caught.value)


def test_near_names_are_offered():
    with pytest.raises(TargetError, match="Did you mean 'sea'"):
        target_indices("see", 1, 3, NAMES)


OUTPUT = torch.arange(24.0).reshape(2, 12)


@pytest.mark.parametrize("target", [3, torch.tensor(3), torch.tensor([3, 5]), [3, 5], (3,), [(3,), (5,)]], ids=str)
def test_select_output_is_captums(target):
    assert torch.equal(select_output(OUTPUT, target), _select_targets(OUTPUT, target))


def test_select_output_of_more_dimensions():
    output = OUTPUT.reshape(2, 3, 4)
    assert select_output(output, (1, 2)).tolist() == [6.0, 18.0]
    assert select_output(output, [(0, 1), (2, 3)]).tolist() == [1.0, 23.0]
    assert select_output(OUTPUT[:, 0], None).tolist() == [0.0, 12.0]


@pytest.mark.parametrize("target", [12, [0], [0, 12], torch.tensor([0, 1, 2]), (0, 1), None, "x", 0.5], ids=str)
def test_bad_targets_of_outputs(target):
    with pytest.raises(TargetError, match=r"\(2, 12\)"):
        select_output(OUTPUT, target)


def test_an_output_that_is_no_tensor():
    with pytest.raises(TargetError, match="the model returns tuple; wrap it"):
        select_output((OUTPUT,), 1)
