"""The only file that touches Captum's private names, so that a change there is mended here.

It also turns what Captum accepts as ``target`` into tensors, with errors that say what is allowed.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from captum._utils.common import _select_targets
from captum.attr import LayerAttribution
from captum.log import log_usage
from torch import Tensor

from captum_concepts.errors import TargetError, did_you_mean

__all__ = ["LayerAttribution", "log_usage", "select_output", "target_indices"]

_ALLOWED = "an int, a 0-d or 1-d integer tensor, a list of ints or of 1-tuples, or a tuple of one int"


def select_output(output: Tensor, target: Any) -> Tensor:
    """``output`` of each example at ``target``, as Captum selects it.

    Args:
        output: ``(N, ...)`` the model's output.
        target: int, tuple, 0-d or 1-d tensor, list of ints or of tuples; None where ``output`` is ``(N,)``.

    Returns:
        ``(N,)`` one value per example.

    Raises:
        TargetError: it does not fit ``output``.

    >>> select_output(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [1, 0])
    tensor([2., 3.])
    """
    if not isinstance(output, Tensor):
        raise TargetError(
            f"the model returns {type(output).__name__}; wrap it in a forward_func that returns the tensor that target "
            "selects from"
        )
    shape = tuple(output.shape)
    try:
        selected = _select_targets(output, target)
    except (AssertionError, IndexError, TypeError, RuntimeError, ValueError) as error:
        raise TargetError(f"target {target!r} does not fit the model's output of shape {shape}: {error}") from error
    if selected.ndim != 1:
        raise TargetError(
            f"target {target!r} selects values of shape {tuple(selected.shape)} from the output of shape {shape}; "
            "give a target that selects one value per example"
        )
    return selected


def target_indices(target: Any, n: int, size: int, names: Sequence[str] = (), *, what: str = "concept") -> Tensor:
    """One index below ``size`` for each of ``n`` examples, from any form of target Captum accepts.

    Names are accepted wherever an index is, if ``names`` are given.

    Raises:
        TargetError: wrong type, length or range.

    >>> target_indices((1,), 3, 2)
    tensor([1, 1, 1])
    >>> target_indices(["sea", 0], 2, 2, ["sky", "sea"])
    tensor([1, 0])
    """
    named = " or a name" if names else ""

    def one(value: Any) -> int:
        if isinstance(value, tuple) and len(value) == 1:
            value = value[0]
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
            value = value.item()
        if isinstance(value, str):
            if value not in names:
                none = f" There are no names here: give {_ALLOWED}, from 0 to {size - 1}."
                hint = did_you_mean(value, names) or (f" Known: {list(names)[:10]}." if names else none)
                raise TargetError(f"target {value!r} is not the name of a {what}.{hint}")
            return list(names).index(value)
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TargetError(f"target {target!r} is not allowed: give {_ALLOWED}{named}, indexing {size} {what}s")
        try:
            index = operator.index(value)
        except TypeError as error:
            raise TargetError(f"target {target!r} is not allowed: give {_ALLOWED}{named}: {error}") from error
        if not -size <= index < size:
            raise TargetError(f"target {index} is out of range: there are {size} {what}s (0 to {size - 1})")
        return index % size

    if isinstance(target, np.ndarray):
        target = target.tolist()
    if isinstance(target, Tensor) and target.is_floating_point():
        raise TargetError(f"target has dtype {target.dtype}: give {_ALLOWED}{named}")
    if isinstance(target, Tensor) and target.numel() != 1:
        if target.ndim != 1:
            raise TargetError(f"target has shape {tuple(target.shape)}: give {_ALLOWED}{named}")
        values = target.tolist()
    elif isinstance(target, list):
        values = target
    else:
        return torch.full((n,), one(target), dtype=torch.long)
    if len(values) != n:
        raise TargetError(f"target has {len(values)} entries for {n} examples; give one each, or a single int")
    return torch.tensor([one(value) for value in values], dtype=torch.long)
