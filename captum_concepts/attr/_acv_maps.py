"""Inputs in chunks, gradients, and projections on vectors: the arithmetic of SpatialACV's maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts._captum import select_output
from captum_concepts.activations import capture, check_images, gradients_enabled
from captum_concepts.activations.capture import Inputs
from captum_concepts.activations.spatial import full_precision
from captum_concepts.errors import TargetError

Chunk = tuple[Inputs, Any, Any]


def chunks(inputs: Inputs, extra: Any, target: Any, batch_size: int) -> Iterator[Chunk]:
    """Inputs, additional arguments and targets, at most ``batch_size`` examples at a time.

    Raises:
        TargetError: a list of targets that is not one for each example.
    """
    parts = check_images(inputs)
    n = parts[0].shape[0]
    listed = isinstance(target, list) or (isinstance(target, Tensor) and target.ndim > 0 and target.numel() > 1)
    if listed and len(target) != n:
        raise TargetError(f"target has {len(target)} entries for {n} examples; give one each, or a single int")
    if n <= batch_size:
        yield inputs, extra, target
        return
    for start in range(0, n, batch_size):
        rows = slice(start, start + batch_size)
        cut = tuple(part[rows] for part in parts)
        yield (
            cut if isinstance(inputs, tuple) else cut[0],
            _cut(extra, rows, n),
            target[rows] if listed else target,
        )


def halves(chunk: Chunk) -> list[Chunk]:
    """A chunk as two of half as many examples; one example stays one."""
    inputs, extra, target = chunk
    return list(chunks(inputs, extra, target, -(-len(check_images(inputs)[0]) // 2)))


def _cut(value: Any, rows: slice, n: int) -> Any:
    """``additional_forward_args`` of some examples: tensors of ``n`` rows are cut, the rest goes on as it is."""
    if isinstance(value, tuple):
        return tuple(_cut(item, rows, n) for item in value)
    return value[rows] if isinstance(value, Tensor) and value.ndim and value.shape[0] == n else value


def project(maps: Tensor, vectors: Tensor) -> Tensor:
    """``(N, K, h, w)``: the component of each position of ``(N, C, h, w)`` along each row of ``(K, C)``."""
    return torch.einsum("nchw,kc->nkhw", full_precision(maps), vectors)


def recorded_target(output: Tensor, target: Any) -> Tensor | None:
    """The explained index of each example as ``(N,)``, the highest output where ``target`` is None.

    None where the model's output is not ``(N, classes)``.
    """
    if output.ndim != 2:
        return None
    if target is None:
        return output.detach().argmax(1)
    if isinstance(target, list) and target and isinstance(target[0], tuple):
        target = [item[0] for item in target]
    index = torch.as_tensor(target, device=output.device).long().flatten()
    return index.expand(output.shape[0]) if len(index) == 1 else index


def all_channels(
    forward_func: Callable[..., Any], layer: nn.Module, chunk: Chunk, attribute_to_layer_input: bool
) -> Tensor:
    """The gradient at a layer, in the layer's own layout, which is how Captum's TCAV flattens activations."""
    inputs, extra, target = chunk
    with gradients_enabled():
        seen = capture(
            forward_func,
            inputs,
            [layer],
            additional_forward_args=extra,
            gradient=True,
            attribute_to_layer_input=attribute_to_layer_input,
        )
        value = select_output(seen.output, target)
        return torch.autograd.grad(value.sum(), seen.layers[0])[0].detach()
