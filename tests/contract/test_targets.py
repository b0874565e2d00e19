"""Every form of target that Captum accepts, and errors that say what is allowed."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from captum._utils.common import _select_targets
from columns import sacv
from inputs import IMAGES

from captum_concepts._captum import output_tensor, select_output, target_indices
from captum_concepts.errors import CaptumConceptsError, InputWarning, TargetError

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


Pair = namedtuple("Pair", ["features", "logits"])


class ModelOutput(OrderedDict):
    """As in transformers."""


@dataclass
class Detected:
    scores: torch.Tensor
    names: list[str]


@pytest.mark.parametrize(
    "returned",
    [
        (OUTPUT,),
        [OUTPUT],
        {"logits": OUTPUT, "hidden": torch.ones(2, 3)},
        {"loss": torch.tensor(1.0), "anything": OUTPUT},
        ModelOutput(loss=None, logits=OUTPUT, hidden_states=(torch.ones(2, 3),)),
        ModelOutput(last_hidden_state=torch.ones(2, 7, 12), pooler_output=OUTPUT),
        ModelOutput(image_embeds=OUTPUT, last_hidden_state=torch.ones(2, 7, 12)),
        {"out": OUTPUT, "aux": torch.ones(2, 12)},
        Pair(torch.ones(2, 3), OUTPUT),
        (torch.tensor(0.5), OUTPUT, torch.ones(2, 7, 12)),
        (torch.ones(2, dtype=torch.long), OUTPUT),
        Detected(OUTPUT, ["a", "b"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_outputs_are_read_without_a_wrapper(returned):
    assert output_tensor(returned) is OUTPUT
    assert torch.equal(select_output(returned, 3), OUTPUT[:, 3])


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ({"a": OUTPUT, "b": torch.ones(2, 3)}, r"a dict with the tensors a \(2, 12\), b \(2, 3\); wrap it in a module"),
        ({}, "a dict without a tensor"),
        ((), "a tuple without a tensor"),
        ([{"boxes": OUTPUT}], "a list without a tensor"),
        ("text", "a str without a tensor"),
        (None, "a NoneType without a tensor"),
    ],
)
def test_outputs_that_are_no_one_tensor(returned, said):
    with pytest.raises(TargetError, match=f"the model returns {said}"):
        select_output(returned, 1)


def test_complex_outputs_are_refused():
    with pytest.raises(TargetError, match=r"the model's output is complex \(torch.complex64\)"):
        select_output(OUTPUT * 1j, 1)


def test_a_list_of_maps_is_pointed_out():
    """As of timm's ``features_only``."""
    with pytest.warns(InputWarning, match="the first tensor is explained"):
        output_tensor([torch.ones(2, 3, 4, 4), torch.ones(2, 5, 2, 2)])


def test_a_second_table_of_scores_in_a_tuple_is_pointed_out():
    with pytest.warns(
        InputWarning, match=r"a tuple with the tensors 0 \(2, 12\), 1 \(2, 3\); the first tensor is explained"
    ):
        assert output_tensor((OUTPUT, torch.ones(2, 3))) is OUTPUT


@pytest.mark.parametrize(
    "target", [torch.ones(2, 12).long(), torch.ones(2, 12), [[0, 1], [1, 0]], np.ones((2, 12)), [torch.ones(12)] * 2]
)
def test_multi_hot_targets_are_named(target):
    for read in (lambda: select_output(OUTPUT, target), lambda: target_indices(target, 2, 12)):
        with pytest.raises(
            TargetError, match=r"target .* is two-dimensional; pass an int.*multi-hot.*explaining one output"
        ):
            read()


@pytest.mark.parametrize("target", ["dog", {0: 1}, {1}, 2**70, ["a"] * 4, 1.0, True, torch.ones(4, 2).long()], ids=str)
@pytest.mark.parametrize("method", ["attribute", "explain", "contributions", "evidence"])
def test_what_is_no_index_of_a_class_is_refused_by_methods_that_select_outputs(method, target):
    with pytest.raises(TargetError, match="target"):
        getattr(sacv(), method)(IMAGES, target=target)


def test_arrays_are_indices_for_methods_that_select_outputs():
    found = sacv().attribute(IMAGES, target=np.array([0, 1, 1, 0]))
    assert torch.equal(found, sacv().attribute(IMAGES, target=[0, 1, 1, 0]))
    assert torch.equal(sacv().attribute(IMAGES, target=np.int64(1)), sacv().attribute(IMAGES, target=1))


@pytest.mark.parametrize(
    "target",
    [2, -3, torch.tensor(7), [0, 1, 2, 0], torch.tensor([0, 1, 0, 5]), (0, 1), range(4), torch.zeros(4, 1).long()],
)
@pytest.mark.parametrize("method", ["attribute", "explain", "contributions", "evidence"])
def test_a_target_that_the_output_does_not_have_is_no_other_output(method, target):
    """Evidence took the index modulo the number of outputs."""
    with pytest.raises(TargetError, match="target"):
        getattr(sacv(), method)(IMAGES, target=target)


@pytest.mark.parametrize("target", [-1, (1,), [(1,), (0,), (1,), (0,)], np.int64(1), torch.tensor([1])], ids=str)
def test_evidence_is_for_the_output_that_attribute_explains(target):
    scores = sacv().forward_func(IMAGES)
    wanted = select_output(scores, target)
    found = sacv().evidence(IMAGES, target=target).target
    assert torch.equal(scores.gather(1, found[:, None])[:, 0], wanted)


@pytest.mark.parametrize("method", ["attribute", "explain", "contributions", "evidence"])
def test_an_array_of_targets_that_is_not_cut_into_batches_is_named(method):
    acv = copy.copy(sacv())
    acv.batch_size = 3
    with pytest.raises(TargetError, match=r"target is a NumPy array of shape \(4,\).*target.tolist\(\)"):
        getattr(acv, method)(IMAGES, target=np.array([0, 1, 1, 0]))
    getattr(acv, method)(IMAGES, target=[0, 1, 1, 0])
