"""Refined maps: evidence relative to an image without content, spread over positions with similar features."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_concepts._checks import take_rows
from captum_concepts.activations import Inputs, Layer, Layers, SpatialActivations, full_precision
from captum_concepts.activations.capture import images_among
from captum_concepts.activations.survey import suggest_stages
from captum_concepts.attr.batches import count, first_example
from captum_concepts.attr.concept_fusion import regions
from captum_concepts.errors import InputError
from captum_concepts.images import ImageSource

#: ``True`` infers the stages of the network, a list names them, ``False`` keeps the published map.
Refine = bool | Sequence[Layer]
CONTRAST = 0.5  # fraction of the others' evidence that is subtracted


@dataclass(frozen=True)
class Refinement:
    """Content and affinities that turn evidence into refined maps, for the N images of one forward pass.

    Args:
        numbers: indices of the layers read, in execution order; the explained layer, index 0, is the last.
        content: ``(N, C_l, h_l, w_l)`` for each of them: activations minus those of the image without content.
        affinity: ``(N, P, P)``, see :func:`~captum_concepts.attr.concept_fusion.regions.feature_affinity`.
        grid: size of the refined map.
    """

    numbers: tuple[int, ...]
    content: tuple[Tensor, ...]
    affinity: Tensor
    grid: tuple[int, int]

    def maps(self, evidence: Sequence[Tensor]) -> Tensor:
        """``(N, J, h, w)`` in [0, 1], from signed evidence ``(N, J, h_l, w_l)`` of some of the layers."""
        return regions.of_strongest(regions.fused_maps(evidence, self.affinity, self.grid)).detach()


def checked(refine: Any) -> Refine:
    """``refine`` as a bool, or as a list of layers.

    Raises:
        InputError: ``refine`` is neither.
    """
    if isinstance(refine, bool):
        return refine
    if isinstance(refine, (list, tuple)) and refine and all(isinstance(layer, (str, nn.Module)) for layer in refine):
        return list(refine)
    raise InputError(f"refine must be True, False or a list of layers (names or modules), got {refine!r}")


def with_stages(
    layers: Layers, refine: Refine, known: dict[Any, list[str]], inputs: Inputs | ImageSource, extra: Any
) -> Layers:
    """``layers`` (a single layer), followed by the stages of the network that ``refine`` asks for, if any.

    Args:
        known: cache of the stages found earlier, updated in place.
        inputs: all examples; the first is run if the stages must be inferred.
        extra: additional arguments of all examples.

    Raises:
        InputError: the stages cannot be inferred, because the network that ``forward_func`` runs is unknown.
    """
    if refine is False:
        return layers
    forward_func = layers.forward_func
    if isinstance(refine, bool):
        if not isinstance(forward_func, Hashable):
            raise InputError(
                "refine=True does not find the stages of the network (forward_func, a "
                f"{type(forward_func).__name__}, has no hash); pass a list of layers"
            )
        if forward_func not in known:
            first, more = first_example(inputs, layers.model), take_rows(extra, slice(1), count(inputs))
            try:
                known[forward_func] = suggest_stages(forward_func, first, additional_forward_args=more)
            except InputError as error:
                why = f"refine=True does not find the stages of the network ({error}); pass a list of layers"
                raise InputError(why) from error
        refine = known[forward_func]
    others = Layers.resolve(forward_func, refine, layout=layers.layout, prefix_tokens=layers.prefix_tokens)
    kept = [k for k, module in enumerate(others.modules) if module is not layers.modules[0]]
    return replace(
        others,
        modules=(*layers.modules, *(others.modules[k] for k in kept)),
        names=(*layers.names, *(others.names[k] for k in kept)),
    )


def prepare(layers: Layers, seen: SpatialActivations, inputs: Inputs, extra: Any, of_input: bool) -> Refinement:
    """The :class:`Refinement` of a forward pass.

    Padding and position embeddings affect activations independently of the image content, even for an image of one
    color. So each image is run once more, painted in its own mean color, and the difference is used.

    Args:
        layers: from :func:`with_stages`.
        seen: their run on ``inputs``.
        extra: additional arguments of that run.
        of_input: whether that run read the layers' inputs.
    """
    numbers = tuple(seen.order[: seen.order.index(0) + 1])
    with torch.no_grad():
        plain = layers.run(without_content(inputs), additional_forward_args=extra, attribute_to_layer_input=of_input)
    maps = [full_precision(seen.maps[k].detach()) for k in numbers]
    content = tuple(a - full_precision(plain.maps[k]) for a, k in zip(maps, numbers, strict=True))
    pixels = images_among(inputs)
    size = None if pixels is None else (pixels.shape[2], pixels.shape[3])
    grid = regions.fused_grid([(a.shape[2], a.shape[3]) for a in maps], size)
    return Refinement(numbers, content, regions.feature_affinity(content, grid, pixels), grid)


def only(seen: SpatialActivations, numbers: Sequence[int]) -> SpatialActivations:
    """``seen`` restricted to some of its layers, so that only these need a gradient."""
    return replace(
        seen,
        raw=tuple(seen.raw[k] for k in numbers),
        layouts=tuple(seen.layouts[k] for k in numbers),
        names=tuple(seen.names[k] for k in numbers),
    )


def without_content(inputs: Inputs) -> Inputs:
    """Each image painted in its own mean color; other tensors are unchanged.

    >>> without_content(torch.tensor([[[[1.0, 3.0]]]]))
    tensor([[[[2., 2.]]]])
    """
    if isinstance(inputs, tuple):
        return tuple(part for one in inputs for part in [without_content(one)] if isinstance(part, Tensor))
    if inputs.ndim != 4 or not inputs.is_floating_point():
        return inputs
    return inputs.mean((2, 3), keepdim=True).expand_as(inputs).contiguous()


def contrast(scores: Tensor, target: Tensor) -> Tensor:
    """``(N, K)`` weights of the concepts' evidence: 1 for the target, and -1/2 in total for the others.

    The others are weighted by the softmax of their scores, in standard deviations over all concepts. So evidence that
    supports all concepts equally, such as the presence of any object, counts half.

    Args:
        scores: ``(N, K)``.
        target: ``(N,)``.

    >>> contrast(torch.tensor([[3.0, 1.0, 1.0]]), torch.tensor([0]))
    tensor([[ 1.0000, -0.2500, -0.2500]])
    """
    own = F.one_hot(target, scores.shape[1]).to(scores)
    if scores.shape[1] == 1:
        return own
    spread = scores.std(1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    likely = ((scores - scores.mean(1, keepdim=True)) / spread).masked_fill(own > 0, -torch.inf).softmax(1)
    return own - CONTRAST * likely


def names(refine: Refine, layers: Layers) -> bool | list[str]:
    """``refine`` with layers as names, for saving."""
    if isinstance(refine, bool):
        return refine
    return list(Layers.resolve(layers.forward_func, refine).names)
