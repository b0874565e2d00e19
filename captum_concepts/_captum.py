"""The only file that uses private names of Captum.

It also extracts one tensor from a model's output, and converts all forms of ``target`` that Captum accepts to indices.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from captum._utils.common import _select_targets
from captum.attr import LayerAttribution
from captum.log import log_usage
from torch import Tensor

from captum_concepts.errors import InputError, InputWarning, TargetError, did_you_mean, shortened

__all__ = ["LayerAttribution", "layer_attribution", "output_tensor", "select_output", "target_indices"]

_ALLOWED = "an int, a 0-d or 1-d integer tensor, a list of ints or of 1-tuples, or a tuple of one int"
#: Names of a model's main output in transformers, torchvision's segmentation networks and mmseg.
_OUTPUT_KEYS = ("logits", "image_embeds", "pooler_output", "out", "seg_logits")

Method = TypeVar("Method", bound=Callable[..., Any])
#: Keywords of Captum's other attributions, and what to do instead.
_ELSEWHERE = {
    "baselines": "no baseline is involved; see the method's docstring",
    "n_steps": "nothing is integrated",
    "return_convergence_delta": "nothing is integrated, so nothing converges",
    "internal_batch_size": "give batch_size= to the constructor",
}


def layer_attribution(attribute: Method) -> Method:
    """``attribute`` with Captum's logging and the keywords of its ``LayerGradCam``.

    ``relu_attributions=True`` keeps the positive part of the maps. ``attr_dim_summation=True`` has no effect, as maps
    have one value per position. Keywords of other attributions raise an error that suggests an alternative.
    """

    @functools.wraps(attribute)
    def answered(
        self: Any, *args: Any, relu_attributions: bool = False, attr_dim_summation: bool = True, **kwargs: Any
    ) -> Any:
        for name in kwargs.keys() & _ELSEWHERE.keys():
            raise InputError(f"{type(self).__name__}.attribute does not accept {name}: {_ELSEWHERE[name]}")
        if not attr_dim_summation:
            raise InputError(
                f"{type(self).__name__}.attribute has one value per position; attr_dim_summation=False is for "
                "captum's LayerGradCam, which has one per channel"
            )
        maps = attribute(self, *args, **kwargs)
        return maps.relu() if relu_attributions else maps

    return log_usage()(answered)


def output_tensor(output: Any) -> Tensor:
    """Main tensor of a model's output, so that models need no wrapper.

    A tensor is returned unchanged. From a mapping (``ModelOutput`` of transformers), a dataclass, a named tuple or
    another object, the result is the entry ``logits``, ``image_embeds``, ``pooler_output``, ``out`` or ``seg_logits``,
    or else the only floating-point tensor; from a tuple or list, the first floating-point tensor.

    Raises:
        TargetError: there is no such tensor, or more than one.

    Warns:
        InputWarning: a tuple contains another tensor ``(N, K)``, which may be the intended one.

    >>> output_tensor({"loss": None, "logits": torch.ones(2, 5)}).shape
    torch.Size([2, 5])
    """
    if isinstance(output, Tensor):
        return output
    named = _named_entries(output)
    entries = list(named.items()) if named is not None else []
    if named is None and isinstance(output, (tuple, list)):
        entries = [(str(i), item) for i, item in enumerate(output)]
    tensors = {key: t for key, t in entries if isinstance(t, Tensor) and t.is_floating_point() and t.ndim}
    for key in _OUTPUT_KEYS:
        if key in tensors and named is not None:
            return tensors[key]
    if len(tensors) == 1 or (tensors and named is None):
        first, *others = tensors.values()
        if any(other.ndim == 2 for other in others) or (others and first.ndim > 2):
            warnings.warn(
                f"the model returns {_described(output, tensors)}; the first tensor is explained. Wrap the model in a "
                "module that returns one tensor to choose",
                InputWarning,
                stacklevel=3,
            )
        return first
    raise TargetError(
        f"the model returns {_described(output, tensors)}; wrap it in a module whose forward returns the one tensor "
        "(N, K) to explain"
    )


def _named_entries(output: Any) -> Mapping[str, Any] | None:
    if isinstance(output, Mapping):
        return output
    if isinstance(output, tuple) and hasattr(output, "_asdict"):
        return output._asdict()
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return vars(output)
    return {key: getattr(output, key) for key in _OUTPUT_KEYS if hasattr(output, key)} or None


def _described(output: Any, tensors: Mapping[str, Tensor]) -> str:
    shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in list(tensors.items())[:8])
    return f"a {type(output).__name__} " + (f"with the tensors {shapes}" if tensors else "without a tensor")


def select_output(output: Any, target: Any) -> Tensor:
    """``(N,)`` values of ``output`` at ``target``, selected as in Captum.

    Args:
        output: ``(N, ...)`` output of the model, see :func:`output_tensor`.
        target: int, tuple, 0-d or 1-d tensor, list of ints or of tuples; None if ``output`` is ``(N,)``.

    Returns:
        ``(N,)``, one value per example.

    Raises:
        TargetError: ``target`` does not match ``output``.

    >>> select_output(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [1, 0])
    tensor([2., 3.])
    """
    output = output_tensor(output)
    shape = tuple(output.shape)
    if output.is_complex():
        raise TargetError(
            f"the model's output is complex ({output.dtype}), which has no gradient of one value; wrap the model so "
            "that it returns real numbers, as in output.abs()"
        )
    _refuse_table(target)
    target = target.tolist() if isinstance(target, (np.ndarray, np.integer)) else target
    try:
        selected = _select_targets(output, target)
    except (AssertionError, IndexError, TypeError, RuntimeError, ValueError) as error:
        found = _of_any_form(output, target)
        if found is None:
            raise TargetError(
                f"target {shortened(target)} does not fit the model's output of shape {shape}: {error}"
            ) from error
        selected = found
    if selected.ndim != 1:
        raise TargetError(
            f"target {shortened(target)} selects values of shape {tuple(selected.shape)} from the output of shape "
            f"{shape}; pass a target that selects one value per example"
        )
    return selected


def _of_any_form(output: Tensor, target: Any) -> Tensor | None:
    """Values of a classifier's output at a target in a form that :func:`target_indices` accepts, else None."""
    if target is None or output.ndim not in (1, 2):
        return None
    try:
        index = target_indices(target, len(output), 1 if output.ndim == 1 else output.shape[1])
    except TargetError:
        return None
    return output if output.ndim == 1 else output.gather(1, index.to(output.device)[:, None])[:, 0]


def check_target(output: Any, target: Any) -> None:
    """Raise if ``target``, unless it is None, does not select one value per example; see :func:`select_output`.

    Raises:
        TargetError: ``target`` does not match ``output``.

    >>> check_target(torch.zeros(1, 2), 2)
    Traceback (most recent call last):
    ...
    captum_concepts.errors.TargetError: target 2 does not fit the model's output of shape (1, 2): index 2 is out of
    bounds for dimension 1 with size 2
    """
    if target is not None:
        select_output(output, target)


def target_indices(target: Any, n: int, size: int, names: Sequence[str] = (), *, what: str = "concept") -> Tensor:
    """``(n,)`` indices below ``size``, one per example, from any form of target that Captum accepts.

    With ``names``, names are accepted wherever indices are.

    Raises:
        TargetError: wrong type, length or range.

    >>> target_indices((1,), 3, 2)
    tensor([1, 1, 1])
    >>> target_indices(["sea", 0], 2, 2, ["sky", "sea"])
    tensor([1, 0])
    """
    named = " or a name" if names else ""
    plural = f"{what}es" if what.endswith("s") else f"{what}s"

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
            raise TargetError(
                f"target {shortened(target)} is not allowed; pass {_ALLOWED}{named}, indexing {size} {plural}"
            )
        try:
            index = operator.index(value)
        except TypeError as error:
            raise TargetError(f"target {shortened(target)} is not allowed; pass {_ALLOWED}{named}: {error}") from error
        if not -size <= index < size:
            raise TargetError(f"target {index} is out of range: there are {size} {plural} (0 to {size - 1})")
        return index % size

    _refuse_table(target)
    if isinstance(target, np.ndarray):
        target = target.tolist()
    if isinstance(target, Tensor) and target.is_floating_point():
        raise TargetError(f"target has dtype {target.dtype}; pass {_ALLOWED}{named}")
    if isinstance(target, Tensor) and target.numel() != 1:
        values = target.tolist()
    elif isinstance(target, list):
        values = target
    else:
        return torch.full((n,), one(target), dtype=torch.long)
    if len(values) != n:
        raise TargetError(f"target has {len(values)} entries for {n} examples; pass one per example, or a single int")
    return torch.tensor([one(value) for value in values], dtype=torch.long)


def _refuse_table(target: Any) -> None:
    """Raise for rows of several entries, such as multi-hot labels, which are not indices."""
    if isinstance(target, (Tensor, np.ndarray)):
        table = target.ndim > 1 and len(target.flatten()) > 1
        said = f"of shape {tuple(target.shape)}"
    else:
        rows = target if isinstance(target, list) else []
        table = any(isinstance(row, list) or (isinstance(row, (Tensor, np.ndarray)) and row.ndim > 0) for row in rows)
        said = shortened(target)
    if table:
        raise TargetError(
            f"target {said} is two-dimensional; pass {_ALLOWED}. Convert a multi-hot or one-hot target to indices, "
            "explaining one output per call or repeating the images"
        )
