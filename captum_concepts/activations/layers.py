"""Activation maps of a model's layers, which are resolved once from names to modules."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts._captum import output_tensor
from captum_concepts._checks import take_rows, warn_of_batch_statistics
from captum_concepts._undo import hooked, unharming, warnings_filtered
from captum_concepts.activations.capture import (
    Captured,
    Inputs,
    batch_size,
    capture_modules,
    gradients_enabled,
    require_images,
    tensors_in,
)
from captum_concepts.activations.layout import LAYOUTS, Layout, ModelTraits, check_prefix_tokens, infer_layout
from captum_concepts.activations.token_order import check_order
from captum_concepts.errors import (
    InputError,
    InputWarning,
    LayerError,
    LayoutError,
    TargetError,
    did_you_mean,
    listing,
)

Layer = nn.Module | str
_WRAPPER_PARTS = ("module", "_orig_mod")  # what DataParallel and torch.compile insert into dotted names


@unharming
@dataclass(frozen=True, eq=False)
class Layers:
    """Resolved layers of one model, from which all methods read maps.

    Create one with :meth:`resolve` at the start of a call, and pass it on instead of names. It does not include modules
    added to the model later.

    Args:
        forward_func: the model, one of its methods, or any callable that runs it.
        model: the module that ``forward_func`` runs; None if unknown.
        modules: the L layers.
        names: their dotted names, or class names if the model is unknown.
        named: all modules of the model by dotted name; None if the model is unknown.
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
        """Look up ``layers`` (modules or dotted names, one or several) in the model that ``forward_func`` runs.

        Names may contain the parts that DataParallel and ``torch.compile`` insert, or leave them out.

        Raises:
            LayerError: a name does not exist; the message lists the nearest names.
            InputError: the layout is unknown, or the number of prefix tokens negative.
        """
        if layout not in LAYOUTS:
            raise InputError(f"layout must be one of {LAYOUTS}, got {layout!r}")
        check_prefix_tokens(prefix_tokens)
        if not callable(forward_func) or isinstance(forward_func, type):
            got = (
                f"the class {forward_func.__name__}" if isinstance(forward_func, type) else type(forward_func).__name__
            )
            raise InputError(f"forward_func must be a torch.nn.Module or a function that runs one, got {got}")
        one = isinstance(layers, (nn.Module, str)) or not isinstance(layers, Iterable)
        wanted: list[Any] = [layers] if one else list(layers)  # type: ignore[arg-type]
        model = find_model(forward_func)
        named = None if model is None else dict(model.named_modules(remove_duplicate=False))
        warn_of_batch_statistics(named or {})
        modules = tuple(_find(model, named or {}, layer) for layer in wanted)
        names = tuple(_name(named or {}, layer) for layer in wanted)
        for name, module in zip(names, modules, strict=True):
            if isinstance(module, torch.jit.ScriptModule):
                raise LayerError(
                    f"layer {name!r} is part of a torch.jit model, whose layers cannot be read because it does not "
                    "run hooks. Pass the original torch.nn.Module; load_state_dict(scripted.state_dict()) loads the "
                    "same weights"
                )
        return cls(forward_func, model, modules, names, named, layout, prefix_tokens)

    def __len__(self) -> int:
        return len(self.modules)

    def __getitem__(self, index: int | Sequence[int]) -> Layers:
        """A subset of the layers."""
        chosen = [index] if isinstance(index, int) else index
        return replace(self, modules=tuple(self.modules[k] for k in chosen), names=tuple(self.names[k] for k in chosen))

    def other(self, module: nn.Module) -> Layers:
        """Another layer of the same model, read without hints."""
        return replace(
            self, modules=(module,), names=(_name(self.named or {}, module),), layout="auto", prefix_tokens=None
        )

    @functools.cached_property
    def traits(self) -> ModelTraits:
        """Grids and prefix tokens according to the model's modules and parameters."""
        return ModelTraits.of(self.named or {})

    def run(
        self,
        inputs: Inputs,
        *,
        additional_forward_args: Any = None,
        gradient: bool = False,
        attribute_to_layer_input: bool = False,
        substitute: Mapping[Layer, Callable[[Tensor], Tensor]] | None = None,
        logits: bool = False,
    ) -> SpatialActivations:
        """Run the model once and read the layers as maps ``(N, C, h, w)``.

        Args:
            inputs, additional_forward_args, gradient, attribute_to_layer_input, substitute, logits: see
                :meth:`capture`.

        Raises:
            LayerError: as for :meth:`capture`.
            LayoutError: a layer has no grid of positions, or more than one layout fits.
        """
        images = inputs if isinstance(inputs, tuple) else (inputs,)
        if self.layout == "auto":
            require_images(images)
        options = {
            "additional_forward_args": additional_forward_args,
            "attribute_to_layer_input": attribute_to_layer_input,
        }
        result = self.capture(inputs, gradient=gradient, substitute=substitute, logits=logits, **options)
        examples = batch = batch_size(inputs)
        samples = result.originals
        if batch > 1 and self.layout == "auto" and any(r.ndim == 3 and r.shape[:2] == (batch, batch) for r in samples):
            # With as many tokens as examples, only a single example shows which dimension is which.
            options["additional_forward_args"] = take_rows(additional_forward_args, slice(1), batch)
            samples, examples = self.capture(take_rows(inputs, slice(1), batch), **options).layers, 1
        layouts = tuple(
            # The type of a layer describes its output, not its input.
            self.layout_of(sample, examples, images, None if attribute_to_layer_input else module, name)
            for sample, module, name in zip(samples, self.modules, self.names, strict=True)
        )
        if self.layout == "auto":
            check_order(
                self,
                inputs,
                layouts,
                additional_forward_args=additional_forward_args,
                attribute_to_layer_input=attribute_to_layer_input,
            )
        source = _Source(self, inputs, additional_forward_args, attribute_to_layer_input)
        return SpatialActivations(
            result.returned, result.layers, layouts, self.names, result.order, source, result.final
        )

    def layout_of(
        self, output: Tensor, batch: int, images: Sequence[Tensor], module: nn.Module | None, name: str
    ) -> Layout:
        """The layout of a layer's output for ``batch`` examples, if it is the same for all inputs that are images.

        Raises:
            LayoutError: there is no grid, or more than one layout fits.
        """
        sizes = list(dict.fromkeys((part.shape[2], part.shape[3]) for part in images if part.ndim == 4))
        readings: list[Layout] = []
        failure: LayoutError | None = None
        candidates: list[tuple[int, int] | None] = [*sizes] or [None]
        for size in candidates:
            try:
                reading = infer_layout(
                    output,
                    batch,
                    size,
                    layout=self.layout,
                    prefix_tokens=self.prefix_tokens,
                    module=module,
                    model=self.traits,
                    name=name,
                )
            except LayoutError as error:
                failure = error
                continue
            readings += [reading] if reading not in readings else []
        if len(readings) > 1:
            raise LayoutError(
                f"layer {name!r} returns {tuple(output.shape)}, and the inputs are images of sizes {listing(sizes)}, "
                f"so it can be read as {listing(readings, 2)}; pass one of the images through additional_forward_args"
            )
        if not readings and failure is not None:
            raise failure
        return readings[0]

    def capture(
        self,
        inputs: Inputs,
        *,
        additional_forward_args: Any = None,
        gradient: bool = False,
        attribute_to_layer_input: bool = False,
        substitute: Mapping[Layer, Callable[[Tensor], Tensor]] | None = None,
        logits: bool = False,
    ) -> Captured:
        """Run the model once and record the layers in their own layout.

        Args:
            inputs: one tensor or a tuple, passed as positional arguments.
            additional_forward_args: passed after the inputs, as in Captum.
            gradient: make ``output`` differentiable with respect to the recorded tensors (differentiate inside
                :func:`gradients_enabled`). Autograd records nothing upstream of the first layer, so a backward pass
                stops there, and it works with frozen weights.
            substitute: ``{layer: function}`` for some of the layers, by module or name; the layer's output is replaced
                by ``function(output)``, which may have another batch size, and recorded after that.
            attribute_to_layer_input: record each layer's (first) input instead of its output.
            logits: if the model ends in a softmax or sigmoid, return its input as the output, so that gradients do not
                vanish for probabilities close to 0 or 1 (see :func:`final_activation`).

        Hooks, training mode, buffers and ``.grad`` of the model are unchanged afterwards, also after an exception;
        evaluation mode draws no random numbers. Other threads may run the same model at the same time; their calls are
        not recorded.

        Raises:
            LayerError: a layer did not run, or ran more than once.
            InputError: the inputs are invalid, or a substitute is for a module that is not one of the layers.
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
            logits=logits,
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
        returned: what the model returned.
        raw: each layer's tensor in its own layout; :meth:`gradients` differentiates with respect to them.
        layouts: how each of them is read as ``(N, C, h, w)``.
        names: names of the layers in messages.
        order: indices of the layers in execution order.
        source: the forward pass, to be repeated if a message needs to name another layer.
        final: the ``"softmax"`` or ``"sigmoid"`` that ``logits=True`` left out; None if there was none.
    """

    returned: Any
    raw: tuple[Tensor, ...]
    layouts: tuple[Layout, ...]
    names: tuple[str, ...]
    order: tuple[int, ...] = ()
    source: _Source | None = field(default=None, repr=False)
    final: str | None = None

    @property
    def output(self) -> Tensor:
        """The model's output as one tensor, see :func:`~captum_concepts.activations.output_tensor`."""
        return output_tensor(self.returned)

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
            return self.gradient_maps([None] * len(self.names))
        with gradient_errors(self.names):
            found = torch.autograd.grad(values.sum(), self.raw, retain_graph=retain_graph, allow_unused=True)
        return self.gradient_maps(found)

    def gradient_maps(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """Gradients with respect to :attr:`raw` as maps ``(N, C, h, w)``, never silently zero.

        If only CLS is read, the patches of a ViT's last block have a gradient of exactly zero, which raises. Other
        gradients that are zero everywhere (a saturated softmax, dead units) are returned with a warning.

        Raises:
            LayerError: a layer is not on the path to the output, or only its prefix tokens are; the message names a
                layer to use instead.
        """
        maps = []
        for name, layout, gradient in zip(self.names, self.layouts, gradients, strict=True):
            if gradient is None:
                stop = self.source.gradient_stop(name) if self.source else None
                raise LayerError(
                    f"the result does not depend on layer {name!r}: no gradient passes {stop}; choose a layer "
                    "after it, or a model without it"
                    if stop
                    else f"the result does not depend on layer {name!r}; choose a layer that the output depends on"
                )
            maps.append(layout.maps(gradient))
            if maps[-1].any():
                continue
            if layout.prefix_tokens and layout.prefix(gradient).any():
                other = self.source.nearest_reaching(name) if self.source else None
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


@contextmanager
def gradient_errors(names: Sequence[str]) -> Iterator[None]:
    """A context for a backward pass to the layers ``names``, which explains torch's checkpointing error.

    Raises:
        LayerError: a part of the model after a layer is checkpointed with ``use_reentrant=True``.
    """
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise LayerError(
            f"a part of the model after layer {names[0]!r} runs in torch.utils.checkpoint with use_reentrant=True, "
            "which gives no gradients of a layer; switch checkpointing off or pass use_reentrant=False"
        ) from error


@unharming
def capture(
    forward_func: Callable[..., Any], inputs: Inputs, layers: Layer | Sequence[Layer], **options: Any
) -> Captured:
    """The result of ``Layers.resolve(forward_func, layers).capture(inputs, **options)``, for a single use."""
    return Layers.resolve(forward_func, layers).capture(inputs, **options)


@unharming
def spatial_activations(
    forward_func: Callable[..., Any],
    inputs: Inputs,
    layers: Layer | Sequence[Layer],
    *,
    layout: str = "auto",
    prefix_tokens: int | None = None,
    **options: Any,
) -> SpatialActivations:
    """The result of ``Layers.resolve(forward_func, layers, ...).run(inputs, **options)``, for a single use.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Flatten())
    >>> spatial_activations(net, torch.rand(2, 3, 16, 16), "0").maps[0].shape
    torch.Size([2, 4, 7, 7])
    """
    return Layers.resolve(forward_func, layers, layout=layout, prefix_tokens=prefix_tokens).run(inputs, **options)


# ---------------------------------------------------------------- models, names, modules


def find_model(forward_func: Callable[..., Any]) -> nn.Module | None:
    """The module that ``forward_func`` runs: itself, the owner of a bound method, or that of a wrapped partial."""
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
    """The module inside ``torch.compile`` and (Distributed)DataParallel wrappers, which do not run hooks reliably."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


def resolve_layer(forward_func: Callable[..., Any], layer: Layer) -> nn.Module:
    """The module that ``layer`` refers to; :meth:`Layers.resolve` resolves several at once."""
    return Layers.resolve(forward_func, [layer]).modules[0]


def layer_name(forward_func: Callable[..., Any], layer: Layer) -> str:
    """The dotted name of ``layer`` in the model, or its class name if it has none."""
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


def full_precision(tensor: Tensor) -> Tensor:
    """``tensor`` in at least fp32, so that sums over channels and positions do not round."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def any_reading(output: Any) -> Tensor:
    """A scalar that depends on every entry of the output, unlike sums, which are constant for normalized embeddings."""
    try:
        parts = [output_tensor(output)]
    except TargetError:
        parts = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
    total = torch.zeros((), device=parts[0].device if parts else None)
    for part in parts:
        weights = torch.arange(1, part.numel() + 1, device=part.device).sqrt().cos()
        total = total + (part.flatten().float() * weights).sum()
    return total


@dataclass(frozen=True)
class _Source:
    """One forward pass, to be repeated on its first example if a message needs more than it recorded."""

    layers: Layers
    inputs: Inputs
    additional_forward_args: Any
    attribute_to_layer_input: bool

    @property
    def first(self) -> tuple[Inputs, Any]:
        """Inputs and additional arguments of the first example."""
        batch = batch_size(self.inputs)
        return take_rows(self.inputs, slice(1), batch), take_rows(self.additional_forward_args, slice(1), batch)

    def nearest_reaching(self, name: str) -> str | None:
        """The last layer before ``name`` of the same type, else the last block, whose positions reach the output."""
        if self.layers.named is None:
            return None
        inputs, extra = self.first
        target = self.layers.modules[self.layers.names.index(name)]
        modules = list(dict.fromkeys(self.layers.named.values()))
        before = modules[: modules.index(target)] if target in modules else modules
        same = [m for m in before if type(m) is type(target)]
        # For a norm or an encoder of another type than its blocks, consider the blocks themselves.
        blocks = [c for m in modules if isinstance(m, (nn.Sequential, nn.ModuleList)) for c in m.children()]
        nested = {m for block in blocks for m in list(block.modules())[1:]}
        blocks = [block for block in blocks if block not in nested]
        for module in dict.fromkeys([*reversed(same), *reversed(blocks)]):
            candidate = self.layers.other(module)
            if reaches_output(candidate, inputs, additional_forward_args=extra)[0]:
                return candidate.names[0]
        return None

    def gradient_stop(self, name: str) -> str | None:
        """A description of the module after layer ``name`` that no gradient passes."""
        if self.layers.named is None:
            return None
        inputs, extra = self.first
        names = {module: other for other, module in self.layers.named.items() if other}
        runs: list[tuple[nn.Module, list[Tensor], list[Tensor]]] = []

        def record(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            # Copies, because an in-place operation after the module changes its output.
            before, after = ([t.clone() for t in tensors_in(part)] for part in ((args, kwargs), output))
            runs.append((module, before, after))

        with hooked(names, record), gradients_enabled(), warnings_filtered("ignore"):
            (raw,) = (
                self.layers[self.layers.names.index(name)]
                .capture(
                    inputs,
                    additional_forward_args=extra,
                    gradient=True,
                    attribute_to_layer_input=self.attribute_to_layer_input,
                )
                .layers
            )

            def reaches(tensors: list[Tensor]) -> bool:
                live = [t for t in tensors if t.requires_grad]
                if not live:
                    return False
                total = torch.stack([t.float().sum() for t in live]).sum()
                return torch.autograd.grad(total, raw, retain_graph=True, allow_unused=True)[0] is not None

            last = None
            for module, before, after in runs:
                if reaches(before) and not reaches(after):
                    return f"through {names[module]!r} ({type(module).__module__}.{type(module).__name__})"
                last = names[module] if reaches(after) else last
        return (
            f"beyond {last or name!r} (nothing uses its output, or only after detach(), under no_grad() or in "
            "checkpointing with use_reentrant=True)"
        )


def reaches_output(layers: Layers, inputs: Inputs, *, additional_forward_args: Any = None) -> list[bool]:
    """Whether the positions of each layer influence the model's output, from one forward and backward pass."""
    try:
        with gradients_enabled(), warnings_filtered("ignore", InputWarning):
            result = layers.run(inputs, additional_forward_args=additional_forward_args, gradient=True)
            value = any_reading(result.returned)
            if not value.requires_grad:
                return [False] * len(layers)
            found = torch.autograd.grad(value, result.raw, allow_unused=True)
            gradients = zip(result.layouts, found, strict=True)
            return [gradient is not None and bool(layout.maps(gradient).any()) for layout, gradient in gradients]
    except (InputError, RuntimeError, AttributeError):
        if len(layers) == 1:
            return [False]  # no grid, does not run, or has no gradient
        each = [
            reaches_output(layers[k], inputs, additional_forward_args=additional_forward_args)
            for k in range(len(layers))
        ]
        return [reached for (reached,) in each]
