"""From a model and layers to activation maps: names become modules once, then travel as one value."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts.activations.capture import Captured, Inputs, capture_modules, gradients_enabled
from captum_concepts.activations.layout import LAYOUTS, Layout, ModelTraits, infer_layout
from captum_concepts.errors import InputError, InputWarning, LayerError, did_you_mean

Layer = nn.Module | str
_WRAPPER_PARTS = ("module", "_orig_mod")  # what DataParallel and torch.compile insert into dotted names


@dataclass(frozen=True, eq=False)
class Layers:
    """Layers of one model, resolved: what every method reads maps from.

    Make one with :meth:`resolve`, at the start of a call, and pass it on instead of names. A module added to the model
    later is not part of it.

    Args:
        forward_func: the model, one of its methods, or any callable that runs it.
        model: the module behind ``forward_func``; None if that is not known.
        modules: the L layers.
        names: their dotted names, or class names where the model is not known.
        named: all modules of the model by dotted name; None if the model is not known.
        layout, prefix_tokens: hints of the user, see :func:`~captum_concepts.activations.infer_layout`.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> layers = Layers.resolve(net, "0")
        >>> result = layers.run(torch.rand(2, 3, 16, 16), gradient=True)
        >>> result.maps[0].shape, result.gradients(result.output[:, 1])[0].shape
        (torch.Size([2, 4, 7, 7]), torch.Size([2, 4, 7, 7]))
    """

    forward_func: Callable[..., Any]
    model: nn.Module | None
    modules: tuple[nn.Module, ...]
    names: tuple[str, ...]
    named: Mapping[str, nn.Module] | None = field(default=None, repr=False)
    layout: str = "auto"
    prefix_tokens: int | None = None

    @classmethod
    def resolve(
        cls,
        forward_func: Callable[..., Any],
        layers: Layer | Sequence[Layer],
        *,
        layout: str = "auto",
        prefix_tokens: int | None = None,
    ) -> Layers:
        """Look up ``layers`` (modules or dotted names, one or several) in the model behind ``forward_func``.

        The parts that DataParallel and ``torch.compile`` insert into names may be present or not.

        Raises:
            LayerError: no such name; the nearest names are listed.
            InputError: an unknown layout, or a negative number of prefix tokens.
        """
        if layout not in LAYOUTS:
            raise InputError(f"layout must be one of {LAYOUTS}, got {layout!r}")
        if prefix_tokens is not None and prefix_tokens < 0:
            raise InputError(f"prefix_tokens must be 0 or more, got {prefix_tokens}")
        wanted = [layers] if isinstance(layers, (nn.Module, str)) else list(layers)
        model = find_model(forward_func)
        named = None if model is None else dict(model.named_modules(remove_duplicate=False))
        modules = tuple(_find(model, named or {}, layer) for layer in wanted)
        names = tuple(_name(named or {}, layer) for layer in wanted)
        return cls(forward_func, model, modules, names, named, layout, prefix_tokens)

    def __len__(self) -> int:
        return len(self.modules)

    def __getitem__(self, index: int) -> Layers:
        """One of the layers, alone."""
        return replace(self, modules=(self.modules[index],), names=(self.names[index],))

    def other(self, module: nn.Module) -> Layers:
        """Another layer of the same model, read without hints."""
        return replace(
            self, modules=(module,), names=(_name(self.named or {}, module),), layout="auto", prefix_tokens=None
        )

    @functools.cached_property
    def traits(self) -> ModelTraits:
        """What the model tells about its grids and prefix tokens."""
        return ModelTraits.of(self.named or {})

    def run(
        self,
        inputs: Inputs,
        *,
        additional_forward_args: Any = None,
        gradient: bool = False,
        attribute_to_layer_input: bool = False,
        substitute: Mapping[Layer, Callable[[Tensor], Tensor]] | None = None,
    ) -> SpatialActivations:
        """Run the model once and read the layers as maps ``(N, C, h, w)``.

        Args:
            inputs, additional_forward_args, gradient, attribute_to_layer_input, substitute: see :meth:`capture`.

        Raises:
            LayerError: as :meth:`capture`.
            LayoutError: a layer has no grid of positions, or more than one reading fits.
        """
        options = {
            "additional_forward_args": additional_forward_args,
            "attribute_to_layer_input": attribute_to_layer_input,
        }
        result = self.capture(inputs, gradient=gradient, substitute=substitute, **options)
        parts = inputs if isinstance(inputs, tuple) else (inputs,)
        examples = batch = parts[0].shape[0]
        samples = result.originals
        if batch > 1 and self.layout == "auto" and any(r.ndim == 3 and r.shape[:2] == (batch, batch) for r in samples):
            # As many tokens as examples: a single example shows which dimension is which.
            options["additional_forward_args"] = first_example(additional_forward_args, batch)
            samples, examples = self.capture(first_example(inputs, batch), **options).layers, 1
        size = image_size(parts)
        layouts = tuple(
            infer_layout(
                sample,
                examples,
                size,
                layout=self.layout,
                prefix_tokens=self.prefix_tokens,
                # The type of a layer describes its output, not its input.
                module=None if attribute_to_layer_input else module,
                model=self.traits,
                name=name,
            )
            for sample, module, name in zip(samples, self.modules, self.names, strict=True)
        )
        search = functools.partial(_nearest_reaching, self, inputs, additional_forward_args)
        return SpatialActivations(result.output, result.layers, layouts, self.names, search, result.order)

    def capture(
        self,
        inputs: Inputs,
        *,
        additional_forward_args: Any = None,
        gradient: bool = False,
        attribute_to_layer_input: bool = False,
        substitute: Mapping[Layer, Callable[[Tensor], Tensor]] | None = None,
    ) -> Captured:
        """Run the model once and record the layers in their own layout, whatever it is.

        Args:
            inputs: one tensor or a tuple, passed as positional arguments.
            additional_forward_args: passed after the inputs, as in Captum.
            gradient: make ``output`` differentiable with respect to the recorded tensors (differentiate inside
                :func:`gradients_enabled`). Nothing upstream of the first layer is recorded by autograd, so a
                backward pass never goes further down, and it works with frozen weights.
            substitute: ``{layer: function}`` for some of the layers, by module or name; the layer's output is replaced
                by ``function(output)``, which may have another batch size, and recorded after that.
            attribute_to_layer_input: take each layer's (first) input instead of its output.

        Hooks, training mode, buffers and ``.grad`` of the model are unchanged afterwards, also after an exception;
        evaluation mode draws no random numbers. Other threads may run the same model meanwhile; their calls are not
        recorded.

        Raises:
            LayerError: a layer did not run, or ran more than once.
            InputError: bad inputs, or a substitute for something that is not one of the layers.
        """
        # Calling a wrapper (DataParallel, torch.compile) would run copies or graphs that skip the hooks.
        direct = self.model is not None and isinstance(self.forward_func, nn.Module)
        return capture_modules(
            self.model if direct and self.model is not None else self.forward_func,
            inputs,
            self.modules,
            self.names,
            parts=None if self.named is None else self.named.values(),
            additional_forward_args=additional_forward_args,
            gradient=gradient,
            substitute={self._module(layer): function for layer, function in (substitute or {}).items()},
            attribute_to_layer_input=attribute_to_layer_input,
        )

    def _module(self, layer: Layer) -> nn.Module:
        if isinstance(layer, nn.Module) and unwrap(layer) in self.modules:
            return unwrap(layer)
        if isinstance(layer, str) and layer in self.names:
            return self.modules[self.names.index(layer)]
        raise InputError(f"substitute has {layer!r}, which is not one of the layers {list(self.names)[:10]}")


@dataclass(frozen=True)
class SpatialActivations:
    """The layers of one forward pass, readable as maps and differentiable.

    Args:
        output: what the model returned.
        raw: each layer's tensor in its own layout; :meth:`gradients` differentiates with respect to them.
        layouts: how each of them is read as ``(N, C, h, w)``.
        names: how messages refer to the layers.
        search: finds the layer to suggest instead of one whose positions do not reach the output.
        order: the numbers of the layers in the order in which they ran.
    """

    output: Any
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
        """Gradients with respect to :attr:`raw` as maps ``(N, C, h, w)``, never silently zero.

        The patches of a ViT's last block, when only CLS is read, have a gradient of exactly zero, and so would a map
        computed from it. A gradient that is zero throughout (a saturated softmax, dead units) is a result, with a
        warning.

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


def capture(
    forward_func: Callable[..., Any], inputs: Inputs, layers: Layer | Sequence[Layer], **options: Any
) -> Captured:
    """One forward pass, for a single use: ``Layers.resolve(forward_func, layers).capture(inputs, **options)``."""
    wanted = [layers] if isinstance(layers, (nn.Module, str)) else list(layers)
    more = [layer for layer in options.get("substitute") or {} if layer not in wanted]
    result = Layers.resolve(forward_func, [*wanted, *more]).capture(inputs, **options)
    count = len(wanted)
    order = tuple(number for number in result.order if number < count)
    return Captured(result.output, result.layers[:count], order, result.originals[:count])


def spatial_activations(
    forward_func: Callable[..., Any],
    inputs: Inputs,
    layers: Layer | Sequence[Layer],
    *,
    layout: str = "auto",
    prefix_tokens: int | None = None,
    **options: Any,
) -> SpatialActivations:
    """One forward pass, for a single use: ``Layers.resolve(forward_func, layers, ...).run(inputs, **options)``.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Flatten())
    >>> spatial_activations(net, torch.rand(2, 3, 16, 16), "0").maps[0].shape
    torch.Size([2, 4, 7, 7])
    """
    return Layers.resolve(forward_func, layers, layout=layout, prefix_tokens=prefix_tokens).run(inputs, **options)


# ---------------------------------------------------------------- models, names, modules


def find_model(forward_func: Callable[..., Any]) -> nn.Module | None:
    """The module behind ``forward_func``: itself, the owner of a bound method, or what a partial wraps."""
    while True:
        if isinstance(forward_func, functools.partial):
            forward_func = forward_func.func
        elif not isinstance(forward_func, nn.Module) and hasattr(forward_func, "_torchdynamo_orig_callable"):
            forward_func = forward_func._torchdynamo_orig_callable  # torch.compile of a method
        else:
            break
    owner = forward_func if isinstance(forward_func, nn.Module) else getattr(forward_func, "__self__", None)
    return unwrap(owner) if isinstance(owner, nn.Module) else None


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile`` and (Distributed)DataParallel wrappers.

    Their copies and compiled graphs do not run hooks reliably; the module inside computes the same.
    """
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


def resolve_layer(forward_func: Callable[..., Any], layer: Layer) -> nn.Module:
    """The module that ``layer`` refers to; see :meth:`Layers.resolve`, which does several at once."""
    return Layers.resolve(forward_func, [layer]).modules[0]


def layer_name(forward_func: Callable[..., Any], layer: Layer) -> str:
    """The dotted name of ``layer`` in the model, or its class name where it has none."""
    return layer if isinstance(layer, str) else Layers.resolve(forward_func, [layer]).names[0]


def _find(model: nn.Module | None, named: Mapping[str, nn.Module], layer: Layer) -> nn.Module:
    if isinstance(layer, nn.Module):
        return unwrap(layer)
    if not isinstance(layer, str):
        raise LayerError(f"layer must be a torch.nn.Module or its dotted name, got {type(layer).__name__}")
    if model is None:
        raise LayerError(
            f"layer {layer!r} cannot be looked up, because forward_func is a plain function; "
            "pass the layer as a module, or forward_func as a torch.nn.Module or one of its methods"
        )
    if layer and layer in named:
        return unwrap(named[layer])
    plain = {_without_wrappers(name): module for name, module in reversed(list(named.items()))}
    for candidate in (layer, _without_wrappers(layer)):
        if candidate and candidate in plain:
            return unwrap(plain[candidate])
    hint = did_you_mean(layer, [name for name in plain if name])
    hint = hint or f" Its top-level layers are {[name for name, _ in model.named_children()]}."
    raise LayerError(f"{type(model).__name__} has no layer {layer!r}.{hint}")


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def _name(named: Mapping[str, nn.Module], layer: Layer) -> str:
    if isinstance(layer, str):
        return layer
    module = unwrap(layer)
    return next((name for name, other in named.items() if other is module and name), type(module).__name__)


# ---------------------------------------------------------------- reading


def image_size(inputs: Sequence[Tensor]) -> tuple[int, int] | None:
    """``(H, W)`` of the images among the inputs, which are the tensors of four dimensions; None if there are none."""
    sizes = {(part.shape[-2], part.shape[-1]) for part in inputs if part.ndim == 4}
    return sizes.pop() if len(sizes) == 1 else None


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

    Its weights differ, because the sum of normalized embeddings, or of their squares, is constant.
    """
    weights = torch.arange(1, output.numel() + 1, device=output.device).sqrt().cos()
    return (output.flatten().float() * weights).sum()


def _nearest_reaching(layers: Layers, inputs: Inputs, extra: Any, name: str) -> str | None:
    """The last layer before layer ``name`` of the same type, or else block, whose positions reach the output."""
    if layers.named is None:
        return None
    target = layers.modules[layers.names.index(name)]
    batch = (inputs[0] if isinstance(inputs, tuple) else inputs).shape[0]
    parts, extra = first_example(inputs, batch), first_example(extra, batch)
    modules = list(dict.fromkeys(layers.named.values()))
    upstream = modules[: modules.index(target)] if target in modules else modules
    same = [m for m in upstream if type(m) is type(target)]
    # A norm or an encoder of another type than its blocks: the blocks themselves.
    blocks = [c for m in modules if isinstance(m, (nn.Sequential, nn.ModuleList)) for c in m.children()]
    nested = {m for block in blocks for m in list(block.modules())[1:]}
    blocks = [block for block in blocks if block not in nested]
    for module in dict.fromkeys([*reversed(same), *reversed(blocks)]):
        candidate = layers.other(module)
        if reaches_output(candidate, parts, additional_forward_args=extra):
            return candidate.names[0]
    return None


def reaches_output(layer: Layers, inputs: Inputs, *, additional_forward_args: Any = None) -> bool:
    """Whether the positions of one layer influence the model's output, by one forward and backward pass."""
    try:
        with gradients_enabled(), warnings.catch_warnings():
            warnings.simplefilter("ignore", InputWarning)
            result = layer.run(inputs, additional_forward_args=additional_forward_args, gradient=True)
            result = replace(result, search=lambda _: None)  # the caller is a search already
            return bool(result.gradients(any_reading(result.output))[0].any())
    except (InputError, RuntimeError, AttributeError):
        return False  # no grid, does not run, or has no gradient
