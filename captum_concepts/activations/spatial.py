"""Capture and layout in one call: what the attribution methods start from."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts.activations.capture import (
    Inputs,
    Layer,
    capture,
    find_model,
    gradients_enabled,
    layer_name,
    resolve_layer,
)
from captum_concepts.activations.layout import Layout, infer_layout
from captum_concepts.errors import InputError, InputWarning, LayerError


@dataclass(frozen=True)
class SpatialActivations:
    """The layers of one forward pass, readable as maps and differentiable.

    Args:
        output: what the model returned.
        raw: each layer's tensor in its own layout; the points :meth:`gradients` differentiates at.
        layouts: how each of them is read as ``(N, C, h, w)``.
        names: how messages call the layers.
        search: finds the layer to name instead of one whose positions do not reach the output.
        order: numbers of the layers in the order in which they ran.
    """

    output: Tensor
    raw: tuple[Tensor, ...]
    layouts: tuple[Layout, ...]
    names: tuple[str, ...]
    search: Callable[[str], str | None] = field(default=lambda _: None, repr=False)
    order: tuple[int, ...] = ()

    @property
    def maps(self) -> tuple[Tensor, ...]:
        """Each layer as ``(N, C, h, w)``."""
        return tuple(layout.maps(raw) for layout, raw in zip(self.layouts, self.raw, strict=True))

    def gradients(self, values: Tensor, *, retain_graph: bool = False) -> tuple[Tensor, ...]:
        """``d values.sum() / d maps`` for each layer, ``(N, C, h, w)``.

        Raises:
            LayerError: ``values`` does not depend on a layer, or not on its positions (see :meth:`gradient_maps`).
        """
        if not values.requires_grad:
            raise LayerError(
                f"the result does not depend differentiably on layer {self.names[0]!r}; choose a layer on the way to "
                "the output, and a forward_func that does not detach it"
            )
        return self.gradient_maps(
            torch.autograd.grad(values.sum(), self.raw, retain_graph=retain_graph, allow_unused=True)
        )

    def gradient_maps(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """Gradients at :attr:`raw` as maps ``(N, C, h, w)``, never silently zero.

        The patches of a ViT's last block, when only CLS is read, have a gradient of exactly zero: a map made from
        it would be zero without a word. A gradient that is zero throughout (a saturated softmax, dead units) is a
        result, but one that is warned about.

        Raises:
            LayerError: a layer is not on the way to the output, or only its prefix tokens are; a layer to use instead
                is named.
        """
        maps = []
        for name, layout, gradient in zip(self.names, self.layouts, gradients, strict=True):
            if gradient is None:
                raise LayerError(f"the result does not depend on layer {name!r}; choose one on the way to the output")
            maps.append(layout.maps(gradient))
            if maps[-1].any():
                continue
            if layout.prefix_tokens and layout.prefix(gradient).any():
                other = self.search(name)
                raise LayerError(
                    f"no position of layer {name!r} reaches the output, which reads only its prefix (CLS) tokens; "
                    + (f"use layer {other!r} instead" if other else "use an earlier layer instead")
                )
            warnings.warn(
                f"the gradient at layer {name!r} is zero for every example (a saturated output or dead units?); the "
                "maps are zero too",
                InputWarning,
                stacklevel=4,
            )
        return tuple(maps)


def spatial_activations(
    forward_func: Callable[..., Any],
    inputs: Inputs,
    layers: Sequence[Layer],
    *,
    additional_forward_args: Any = None,
    gradient: bool = False,
    attribute_to_layer_input: bool = False,
    layout: str = "auto",
    prefix_tokens: int | None = None,
) -> SpatialActivations:
    """Run the model once and read ``layers`` as maps.

    Args:
        forward_func, inputs, layers, additional_forward_args, gradient, attribute_to_layer_input: as in
            :func:`~captum_concepts.activations.capture`.
        layout, prefix_tokens: as in :func:`~captum_concepts.activations.infer_layout`.

    Raises:
        LayerError, LayoutError: as there.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> seen = spatial_activations(net, torch.rand(2, 3, 16, 16), ["0"], gradient=True)
        >>> seen.maps[0].shape, seen.gradients(seen.output[:, 1])[0].shape
        (torch.Size([2, 4, 7, 7]), torch.Size([2, 4, 7, 7]))
    """
    result = capture(
        forward_func,
        inputs,
        layers,
        additional_forward_args=additional_forward_args,
        gradient=gradient,
        attribute_to_layer_input=attribute_to_layer_input,
    )
    first = inputs[0] if isinstance(inputs, tuple) else inputs
    batch = first.shape[0]
    raw = result.layers
    samples, examples = raw, batch
    if batch > 1 and layout == "auto" and any(r.ndim == 3 and r.shape[:2] == (batch, batch) for r in raw):
        # As many tokens as examples: a single example shows which dimension is which.
        parts = first_example(inputs, batch)
        one = capture(
            forward_func,
            parts,
            layers,
            additional_forward_args=first_example(additional_forward_args, batch),
            attribute_to_layer_input=attribute_to_layer_input,
        )
        samples, examples = one.layers, 1
    size = (first.shape[-2], first.shape[-1]) if first.ndim == 4 else None
    layouts = tuple(
        infer_layout(
            sample,
            examples,
            size,
            layout=layout,
            prefix_tokens=prefix_tokens,
            # A layer's own type tells about its output, not about its input.
            module=None if attribute_to_layer_input else resolve_layer(forward_func, layer),
            model=find_model(forward_func),
            name=layer_name(forward_func, layer),
        )
        for sample, layer in zip(samples, layers, strict=True)
    )
    names = tuple(layer_name(forward_func, layer) for layer in layers)
    search = functools.partial(_nearest_reaching, forward_func, inputs, additional_forward_args)
    return SpatialActivations(result.output, raw, layouts, names, search, result.order)


def first_example(value: Any, batch: int) -> Any:
    """Arguments for the first example alone: tensors of ``batch`` rows are cut to one."""
    if isinstance(value, tuple):
        return tuple(first_example(item, batch) for item in value)
    return value[:1] if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch else value


def full_precision(tensor: Tensor) -> Tensor:
    """At least fp32, so that sums over channels and positions do not round."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def any_reading(output: Tensor) -> Tensor:
    """A scalar that stands for whatever may be read from the output.

    Its weights differ, because the sum of normalised embeddings, or of their squares, is constant.
    """
    weights = torch.arange(1, output.numel() + 1, device=output.device).sqrt().cos()
    return (output.flatten().float() * weights).sum()


def _nearest_reaching(forward_func: Callable[..., Any], inputs: Inputs, extra: Any, name: str) -> str | None:
    """The last layer of the type of layer ``name`` in front of it, or else block, whose positions reach the output."""
    model = find_model(forward_func)
    if model is None:
        return None
    try:
        target = resolve_layer(forward_func, name)
    except LayerError:
        return None  # it runs, but is not registered in the model
    first = inputs[0] if isinstance(inputs, tuple) else inputs
    parts = first_example(inputs, first.shape[0])
    extra = first_example(extra, first.shape[0])
    modules = list(model.modules())
    front = modules[: modules.index(target)] if target in modules else modules
    same = [m for m in front if type(m) is type(target)]
    # A norm or an encoder of another type than its blocks: the blocks themselves.
    blocks = [c for m in modules if isinstance(m, (nn.Sequential, nn.ModuleList)) for c in m.children()]
    nested = {m for block in blocks for m in list(block.modules())[1:]}
    blocks = [block for block in blocks if block not in nested]
    for module in dict.fromkeys([*reversed(same), *reversed(blocks)]):
        try:
            with gradients_enabled(), warnings.catch_warnings():
                warnings.simplefilter("ignore", InputWarning)
                seen = spatial_activations(forward_func, parts, [module], additional_forward_args=extra, gradient=True)
                seen = replace(seen, search=lambda _: None)  # this loop is the search
                if seen.gradients(any_reading(seen.output))[0].any():
                    return layer_name(forward_func, module)
        except (InputError, RuntimeError, AttributeError):
            continue  # this candidate has no grid or does not run; the one before it may
    return None
