"""The layers of a model that have a grid of positions, and suggestions which to choose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts._checks import repeat_rows, take_rows
from captum_concepts._undo import evaluation_mode, hooked, unharming, warnings_filtered
from captum_concepts.activations.capture import (
    Inputs,
    batch_size,
    check_images,
    eager_mode,
    first_tensor,
    forward_arguments,
    gradients_enabled,
    input_errors,
)
from captum_concepts.activations.layers import Layers, reaches_output
from captum_concepts.activations.layout import Layout
from captum_concepts.activations.token_order import misordered
from captum_concepts.errors import InputError, InputWarning, LayerError


@dataclass(frozen=True)
class SurveyedLayer:
    """A layer with a grid of positions, which can be explained.

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


@unharming
def survey_layers(
    forward_func: Callable[..., Any], inputs: Inputs, *, additional_forward_args: Any = None
) -> list[SurveyedLayer]:
    """The layers with a grid, in the order they finish, from one forward pass of two copies of the first example.

    For a layer that returns a tuple or a mapping, the first floating-point tensor is used, as in
    :meth:`Layers.capture`. Layers that run more than once, or whose output has no grid or more than one layout, are
    left out.

    Raises:
        InputError: ``forward_func`` is a plain function, whose model is unknown.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> [(layer.name, layer.channels, layer.layout.grid) for layer in survey_layers(net, torch.rand(1, 3, 16, 16))]
    [('0', 4, (7, 7))]
    """
    return [layer for layer, _, _ in _survey(forward_func, inputs, additional_forward_args)]


@unharming
def suggest_layer(
    forward_func: Callable[..., Any],
    inputs: Inputs,
    *,
    additional_forward_args: Any = None,
    for_gradients: bool = False,
) -> str:
    """The last stage or block with a grid whose positions influence the output.

    Stages and blocks are the children of the model and of its sequences, and the sequences themselves, but not, for
    example, the projections inside an attention.

    Args:
        for_gradients: leave out layers that only linear operations follow, where the gradient is the same for every
            image (see :func:`followed_by_linear`).

    Raises:
        LayerError: there is none.
    """
    first, extra = _first(inputs, additional_forward_args)
    names = [stage.name for stage in reversed(_stages(forward_func, first, extra))]
    at_once = 1  # the last stage is usually suitable; otherwise each pass judges twice as many
    while names:
        try:
            suitable = _suitable(forward_func, names[:at_once], first, extra, for_gradients)
        except InputError:
            if at_once == 1:
                raise
            at_once = 1  # the error may belong to a stage before a suitable one
            continue
        if suitable:
            return suitable[0]
        names, at_once = names[at_once:], 2 * at_once
    raise LayerError(
        "no stage of this model has a grid of positions that affects its output"
        + (" other than linearly" if for_gradients else "")
        + "; choose a layer yourself"
    )


def _suitable(
    forward_func: Callable[..., Any], names: list[str], first: Inputs, extra: Any, for_gradients: bool
) -> list[str]:
    """The layers whose positions influence the output, in other ways than linearly with ``for_gradients``."""
    layers = Layers.resolve(forward_func, names)
    reached = reaches_output(layers, first, additional_forward_args=extra)
    names = [name for name, reaches in zip(names, reached, strict=True) if reaches]
    if not for_gradients or not names:
        return names
    linear = followed_by_linear(Layers.resolve(forward_func, names), first, additional_forward_args=extra)
    return [name for name, alike in zip(names, linear, strict=True) if not alike]


@unharming
def suggest_stages(
    forward_func: Callable[..., Any], inputs: Inputs, most: int = 4, *, additional_forward_args: Any = None
) -> list[str]:
    """The last stage of each of the ``most`` coarsest grids, from fine to coarse.

    If there are fewer grids, blocks of the coarsest are added.

    Raises:
        LayerError: there is none.
    """
    first, extra = _first(inputs, additional_forward_args)
    last = suggest_layer(forward_func, first, additional_forward_args=extra)
    stages = _stages(forward_func, first, extra)
    names = [layer.name for layer in stages]
    stages = stages[: names.index(last) + 1]
    grid = stages[-1].layout.grid
    ends: dict[tuple[int, int], str] = {}
    for layer in stages:  # the last of the outermost layers of a grid, because layers inside a block are not stages
        known = ends.get(layer.layout.grid)
        if known is None or layer.name.count(".") <= known.count("."):
            ends[layer.layout.grid] = layer.name
    ends[grid] = last
    chosen = list(ends.values())[-most:] if len(ends) > 2 else [last]
    modules = dict(zip(names, Layers.resolve(forward_func, names).modules, strict=True))
    families: dict[str, list[str]] = {}
    for layer in stages:
        if layer.layout.grid == grid and any(modules[layer.name].children()) and layer.name != last:
            families.setdefault(layer.name.rpartition(".")[0], []).append(layer.name)
    spare = max(families.values(), key=len, default=[])
    missing = min(most - len(chosen), len(spare))
    chosen += [spare[(2 * k + 1) * len(spare) // (2 * missing)] for k in range(missing)]
    return sorted(chosen, key=names.index)


def followed_by_linear(layers: Layers, inputs: Inputs, *, additional_forward_args: Any = None) -> tuple[bool, ...]:
    """Whether the gradient of the output at each layer is the same for every image.

    That is the case if only linear operations follow (global average pooling and the classifier, for example); a map of
    gradients is then independent of the image. The function compares the gradients of the first example and of its
    mirror image with noise. A final softmax or sigmoid is ignored.

    Raises:
        LayerError: a layer did not run, or has no gradient.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    >>> followed_by_linear(Layers.resolve(net, ["0", "1"]), torch.rand(1, 3, 8, 8))
    (False, True)
    """
    first, extra = _first(inputs, additional_forward_args)
    parts, extra = check_images(first), repeat_rows(extra, 2, 1)
    noise = torch.Generator().manual_seed(0)
    same = [True] * len(layers)
    for strength in (1, 4, 16):  # gradients of similar small images may agree by chance
        if any(same):
            agree = _agree(layers, parts, extra, strength, noise)
            same = [one and other for one, other in zip(same, agree, strict=True)]
    return tuple(same)


def _agree(
    layers: Layers, parts: tuple[Tensor, ...], extra: Any, strength: float, noise: torch.Generator
) -> Iterator[bool]:
    """Whether the gradient at each layer is the same for an image and for its mirror image with noise."""

    def pair(part: Tensor) -> Tensor:
        if part.ndim != 4 or not part.is_floating_point():
            return part.repeat_interleave(2, 0)
        scale = strength * (part.detach().float().std().nan_to_num() + 0.1)
        moved = part.detach().flip(2, 3) + scale.to(part) * torch.randn(part.shape, generator=noise).to(part)
        return torch.cat([part.detach(), moved])

    with gradients_enabled(), warnings_filtered("ignore", InputWarning):  # of the noise's range
        result = layers.run(tuple(map(pair, parts)), additional_forward_args=extra, gradient=True, logits=True)
        output = result.output
        values = output.flatten(1) if output.ndim > 1 else output.reshape(-1, 1)
        reading = torch.arange(1, values.shape[1] + 1, device=values.device).sqrt().cos()  # the same of both images
        gradients = result.gradients((values.float() * reading).sum(1))
    for raw, gradient in zip(result.raw, gradients, strict=True):
        one, other = gradient.detach().float()
        tolerance = 1e-4 if gradient.element_size() >= 4 else 3e-2
        largest = float(gradient.abs().max())
        # NaN activations have no gradient after a rectifier, so the comparison is undecided.
        finite = bool(raw.isfinite().all())
        yield finite and largest > 0 and float((one - other).abs().max()) <= tolerance * largest


def _first(inputs: Inputs, extra: Any) -> tuple[Inputs, Any]:
    batch = batch_size(inputs) if isinstance(inputs, (Tensor, tuple)) and len(inputs) else 1
    return take_rows(inputs, slice(1), batch), take_rows(extra, slice(1), batch)


def _survey(
    forward_func: Callable[..., Any], inputs: Inputs, extra: Any
) -> Iterator[tuple[SurveyedLayer, nn.Module, bool]]:
    """Each layer with its module and whether it returns a mapping."""
    layers = Layers.resolve(forward_func, [])
    if layers.named is None:
        raise InputError("forward_func is a plain function; pass a torch.nn.Module or one of its methods")
    if isinstance(layers.model, torch.jit.ScriptModule):
        raise LayerError(
            "the layers of a torch.jit model cannot be read because it does not run hooks. Pass the original "
            "torch.nn.Module; load_state_dict(scripted.state_dict()) loads the same weights"
        )
    first, extra = _first(inputs, extra)
    images = check_images(first)
    # Use two copies, because one example cannot show which dimension is the batch.
    twice = repeat_rows(images, 2, 1)
    names = {
        module: name
        for name, module in reversed(list(layers.named.items()))
        if name and not isinstance(module, torch.jit.ScriptModule)
    }
    outputs: list[tuple[nn.Module, Any]] = []

    def record(module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        outputs.append((module, output))

    arguments, parts = (*twice, *repeat_rows(forward_arguments(extra), 2, 1)), layers.named.values()
    with eager_mode(), torch.no_grad(), evaluation_mode(parts), hooked(names, record), input_errors(arguments, parts):
        forward_func(*arguments)
    runs = [module for module, _ in outputs]
    read = []
    for module, output in outputs:
        if runs.count(module) > 1:
            continue
        try:
            tensor, _ = first_tensor(output, names[module])
            layout = layers.layout_of(tensor, 2, images, module, names[module])
        except LayerError:
            continue
        if min(layout.grid) > 1:
            surveyed = SurveyedLayer(names[module], type(module).__name__, layout.maps(tensor).shape[1], layout)
            read.append((surveyed, module, isinstance(output, Mapping)))
    there = replace(
        layers, modules=tuple(module for _, module, _ in read), names=tuple(surveyed.name for surveyed, _, _ in read)
    )
    wrong = misordered(there, first, [surveyed.layout for surveyed, _, _ in read], additional_forward_args=extra)
    yield from (one for number, one in enumerate(read) if number not in wrong)


def _stages(forward_func: Callable[..., Any], inputs: Inputs, extra: Any) -> list[SurveyedLayer]:
    model = Layers.resolve(forward_func, []).model
    parents = {child: parent for parent in model.modules() for child in parent.children()} if model is not None else {}
    sequences = (nn.Sequential, nn.ModuleList)
    stages = []
    for layer, module, mapping in _survey(forward_func, inputs, extra):
        in_sequence = isinstance(parents[module], sequences)
        # A mapping (transformers' ModelOutput) comes from a whole network inside a network, unless that is a block.
        if in_sequence or (not mapping and (parents[module] is model or isinstance(module, sequences))):
            stages.append(layer)
    return stages
