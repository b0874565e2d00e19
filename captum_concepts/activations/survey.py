"""Which layers of a model have a grid of positions, and which to choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts.activations.capture import Hook, check_images, evaluation_mode, hooked
from captum_concepts.activations.layers import Layers, find_model, reaches_output, resolve_layer
from captum_concepts.activations.layout import Layout, infer_layout
from captum_concepts.errors import InputError, LayerError, LayoutError


@dataclass(frozen=True)
class SurveyedLayer:
    """A layer that can be explained.

    Args:
        name: its dotted name.
        kind: the class of the module.
        channels: C of its maps.
        layout: how its output is read.
    """

    name: str
    kind: str
    channels: int
    layout: Layout


def survey_layers(forward_func: Callable[..., Any], inputs: Tensor) -> list[SurveyedLayer]:
    """The layers with a grid, in the order they finish, found by one forward pass of the first example (twice).

    Layers that run more than once, or whose output has no grid or more than one reading, are left out.

    Raises:
        InputError: ``forward_func`` is a plain function, whose model is not known.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> [(layer.name, layer.channels, layer.layout.grid) for layer in survey_layers(net, torch.rand(1, 3, 16, 16))]
    [('0', 4, (7, 7))]
    """
    model = find_model(forward_func)
    if model is None:
        raise InputError("forward_func is a plain function; pass a torch.nn.Module or one of its methods")
    first = check_images(inputs)[0][:1]
    twice = first.repeat(2, *[1] * (first.ndim - 1))  # one example cannot show which dimension is the batch
    names = {module: name for name, module in model.named_modules() if name}
    outputs: list[tuple[nn.Module, Any]] = []
    record: Hook = lambda module, _args, _kwargs, output: outputs.append((module, output))  # noqa: E731
    with torch.no_grad(), evaluation_mode(model), hooked(names, record):
        forward_func(twice)
    runs = [module for module, _ in outputs]
    found = []
    for module, output in outputs:
        if runs.count(module) > 1 or not isinstance(output, Tensor):
            continue
        try:
            size = (first.shape[-2], first.shape[-1])
            layout = infer_layout(output, 2, size, module=module, model=model, name=names[module])
        except LayoutError:
            continue
        if min(layout.grid) > 1:
            channels = layout.maps(output).shape[1]
            found.append(SurveyedLayer(names[module], type(module).__name__, channels, layout))
    return found


def suggest_layer(forward_func: Callable[..., Any], inputs: Tensor) -> str:
    """The last stage or block with a grid whose positions influence the output.

    Stages and blocks are the children of the model and of its sequences, and the sequences themselves; the projections
    inside an attention, say, are not what one wants to look at.

    Raises:
        LayerError: there is none.
    """
    for layer in reversed(_stages(forward_func, inputs)):
        if reaches_output(Layers.resolve(forward_func, layer.name), inputs[:1]):
            return layer.name
    raise LayerError(
        "no stage of this model has a grid of positions that influence its output; choose a layer yourself"
    )


def suggest_stages(forward_func: Callable[..., Any], inputs: Tensor, most: int = 4) -> list[str]:
    """The last stage of each of the ``most`` coarsest grids, from fine to coarse; where there are fewer grids, filled
    up with blocks of the coarsest.

    Raises:
        LayerError: there is none.
    """
    last = suggest_layer(forward_func, inputs)
    stages = _stages(forward_func, inputs)
    names = [layer.name for layer in stages]
    stages = stages[: names.index(last) + 1]
    grid = stages[-1].layout.grid
    ends: dict[tuple[int, int], str] = {}
    for layer in stages:  # of one grid, the last of the outermost: what is inside a block is no stage
        known = ends.get(layer.layout.grid)
        if known is None or layer.name.count(".") <= known.count("."):
            ends[layer.layout.grid] = layer.name
    ends[grid] = last
    chosen = list(ends.values())[-most:] if len(ends) > 2 else [last]
    families: dict[str, list[str]] = {}
    for layer in stages:
        inner = any(resolve_layer(forward_func, layer.name).children())
        if layer.layout.grid == grid and inner and layer.name != last:
            families.setdefault(layer.name.rpartition(".")[0], []).append(layer.name)
    spare = max(families.values(), key=len, default=[])
    missing = min(most - len(chosen), len(spare))
    chosen += [spare[(2 * k + 1) * len(spare) // (2 * missing)] for k in range(missing)]
    return sorted(chosen, key=names.index)


def _stages(forward_func: Callable[..., Any], inputs: Tensor) -> list[SurveyedLayer]:
    model = find_model(forward_func)
    parents = {child: parent for parent in model.modules() for child in parent.children()} if model is not None else {}
    sequences = (nn.Sequential, nn.ModuleList)
    found = []
    for layer in survey_layers(forward_func, inputs):
        module = resolve_layer(forward_func, layer.name)
        if parents[module] is model or isinstance(parents[module], sequences) or isinstance(module, sequences):
            found.append(layer)
    return found
