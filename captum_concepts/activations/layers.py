"""From a model and layers to activation maps: names become modules once, then travel as one value."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts._captum import output_tensor
from captum_concepts._checks import take_rows, warn_of_batch_statistics
from captum_concepts._undo import hooked, unharming
from captum_concepts.activations.capture import (
    Captured,
    Inputs,
    batch_size,
    capture_modules,
    gradients_enabled,
    require_images,
    tensors_in,
)
from captum_concepts.activations.layout import LAYOUTS, Layout, ModelTraits, infer_layout, pyramid
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
                    f"layer {name!r} is part of a torch.jit model, whose layers cannot be read: it runs no hooks. Pass "
                    "the original torch.nn.Module; load_state_dict(scripted.state_dict()) gives it the same weights"
                )
        return cls(forward_func, model, modules, names, named, layout, prefix_tokens)

    def __len__(self) -> int:
        return len(self.modules)

    def __getitem__(self, index: int | Sequence[int]) -> Layers:
        """One or some of the layers, alone."""
        chosen = [index] if isinstance(index, int) else index
        return replace(self, modules=tuple(self.modules[k] for k in chosen), names=tuple(self.names[k] for k in chosen))

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
        logits: bool = False,
    ) -> SpatialActivations:
        """Run the model once and read the layers as maps ``(N, C, h, w)``.

        Args:
            inputs, additional_forward_args, gradient, attribute_to_layer_input, substitute, logits: see
                :meth:`capture`.

        Raises:
            LayerError: as :meth:`capture`.
            LayoutError: a layer has no grid of positions, or more than one reading fits.
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
            # As many tokens as examples: a single example shows which dimension is which.
            options["additional_forward_args"] = take_rows(additional_forward_args, slice(1), batch)
            samples, examples = self.capture(take_rows(inputs, slice(1), batch), **options).layers, 1
        layouts = tuple(
            # The type of a layer describes its output, not its input.
            self.layout_of(sample, examples, images, None if attribute_to_layer_input else module, name)
            for sample, module, name in zip(samples, self.modules, self.names, strict=True)
        )
        if self.layout == "auto":
            self.check_order(
                inputs,
                layouts,
                additional_forward_args=additional_forward_args,
                attribute_to_layer_input=attribute_to_layer_input,
            )
            check_order_of_own_models(self, inputs, layouts, additional_forward_args, attribute_to_layer_input)
        source = _Source(self, inputs, additional_forward_args, attribute_to_layer_input)
        return SpatialActivations(
            result.returned, result.layers, layouts, self.names, result.order, source, result.final
        )

    def layout_of(
        self, output: Tensor, batch: int, images: Sequence[Tensor], module: nn.Module | None, name: str
    ) -> Layout:
        """How the output of a layer for ``batch`` examples is read, if all inputs that are images agree.

        Raises:
            LayoutError: there is no grid, or more than one reading fits.
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
                f"layer {name!r} returns {tuple(output.shape)}, and the inputs are images of the sizes "
                f"{listing(sizes)}: it can be read as {listing(readings, 2)}; pass one of the images by "
                "additional_forward_args"
            )
        if not readings and failure is not None:
            raise failure
        return readings[0]

    def check_order(
        self,
        inputs: Inputs,
        layouts: Sequence[Layout],
        *,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> None:
        """Make sure that tokens are in the order of the image's rows, in models that may reorder them.

        See :meth:`misordered`.

        Raises:
            LayoutError: the tokens of a layer are in another order.
        """
        wrong = self.misordered(
            inputs, layouts, additional_forward_args=additional_forward_args,
            attribute_to_layer_input=attribute_to_layer_input,
        )  # fmt: skip
        if wrong:
            raise LayoutError(next(iter(wrong.values())))

    def misordered(
        self,
        inputs: Inputs,
        layouts: Sequence[Layout],
        *,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> dict[int, str]:
        """The layers whose tokens are not in the order of the image's rows, by number, each with what to say of it.

        Some models sort tokens into windows (Hiera's mask units, for example), by their scores, or at random. Patches
        of the first image are changed: the tokens that change most by far have to be at or next to that position. It
        costs one forward pass per grid, once, of a model whose code names such an operation, or whose tokens are not
        the patches of the images as they are given (it resizes or crops them itself).
        """
        images = [part for part in (inputs if isinstance(inputs, tuple) else (inputs,)) if part.ndim == 4]
        if len(images) != 1:
            return {}
        size = (images[0].shape[2], images[0].shape[3])
        batch = batch_size(inputs)
        grids: dict[tuple[int, int], list[int]] = {}
        for number, layout in enumerate(layouts):
            if not self.traits.reorders and self._as_patches(layout, size):
                continue
            known = _ordered.setdefault(self.modules[number], set())
            if layout.kind != "NCHW" and (layout, attribute_to_layer_input) not in known:
                grids.setdefault(layout.grid, []).append(number)
        wrong = {}
        for grid, numbers in grids.items():
            cells = _spread(grid)
            parts = repeat_rows(take_rows(inputs, slice(1), batch), len(cells) + 1, 1)
            parts = parts if isinstance(parts, tuple) else (parts,)
            parts = tuple(_changed(part, cells, grid) if part.ndim == 4 else part for part in parts)
            extra = repeat_rows(take_rows(additional_forward_args, slice(1), batch), len(cells) + 1, 1)
            try:
                with warnings.catch_warnings():  # of the changed pixels' range
                    warnings.simplefilter("ignore", InputWarning)
                    seen = self[numbers].capture(
                        parts, additional_forward_args=extra, attribute_to_layer_input=attribute_to_layer_input
                    )
            except (InputError, RuntimeError):
                continue  # a model of one batch size
            for number, raw in zip(numbers, seen.layers, strict=True):
                try:
                    maps = full_precision(layouts[number].maps(raw))
                except RuntimeError:
                    continue  # another number of tokens for another number of images: windows, not examples
                message = self._disorder(self.names[number], maps, cells, grid)
                if message is None:
                    _ordered[self.modules[number]].add((layouts[number], attribute_to_layer_input))
                else:
                    wrong[number] = message
        return wrong

    def _as_patches(self, layout: Layout, size: tuple[int, int]) -> bool:
        """Whether a layout needs no check: no tokens, or the model's own prefix and patches of images of ``size``."""
        if layout.kind in ("NCHW", "NHWC"):
            return True
        prefix = sum(self.traits.prefix_parts) if self.prefix_tokens is None else self.prefix_tokens
        stride = self.traits.patch_stride
        return stride is not None and layout.prefix_tokens == prefix and layout.grid in pyramid(size, stride)[0]

    def _disorder(self, name: str, maps: Tensor, cells: Sequence[tuple[int, int]], grid: tuple[int, int]) -> str | None:
        """What is wrong with maps of an image and of itself changed at each of ``cells``; None: nothing."""
        strays, hits = _strays((maps[1:] - maps[:1]).norm(dim=1), cells)
        if 2 * len(strays) > len(cells):
            return (
                f"the tokens of layer {name!r} are not in the order of the image's rows: a change of the image at "
                f"cell {strays[0][0]} of the {grid[0]} x {grid[1]} grid appears at {strays[0][1]}; choose a layer "
                "before they are reordered or after that is undone. A model that resizes or crops its images itself "
                "needs images of the size that it works on"
            )
        if self.traits.unrolls and 2 * hits < len(cells):
            return (
                f"the tokens of layer {name!r} may not be in the order of the image's rows, in a model that "
                "unrolls them: no change of the image appears at one position; choose the block around it"
            )
        return None

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
            logits: if the model's output is that of a final softmax or sigmoid, return what went into it, so that
                gradients do not vanish where the probability is close to 0 or 1 (see :func:`final_activation`).

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
        names: how messages refer to the layers.
        order: the numbers of the layers in the order in which they ran.
        source: what was run, to be run again where a message needs to name another layer.
        final: the ``"softmax"`` or ``"sigmoid"`` that ``logits=True`` left out; None: there was none.
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
                stop = self.source.gradient_stop(name) if self.source else None
                raise LayerError(
                    f"the result does not depend on layer {name!r}: no gradient passes {stop}; "
                    "choose a layer after that, or a model without it"
                    if stop
                    else f"the result does not depend on layer {name!r}; choose one on the way to the output"
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


@unharming
def capture(
    forward_func: Callable[..., Any], inputs: Inputs, layers: Layer | Sequence[Layer], **options: Any
) -> Captured:
    """One forward pass, for a single use: ``Layers.resolve(forward_func, layers).capture(inputs, **options)``."""
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


def full_precision(tensor: Tensor) -> Tensor:
    """At least fp32, so that sums over channels and positions do not round."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def any_reading(output: Any) -> Tensor:
    """A scalar that stands for whatever may be read from the output; of many tensors, from any of them.

    Its weights differ, because the sum of normalized embeddings, or of their squares, is constant.
    """
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
    """One forward pass, to be repeated on its first example where a message needs more than it recorded."""

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
        """The last layer before layer ``name`` of the same type, or else block, whose positions reach the output."""
        if self.layers.named is None:
            return None
        inputs, extra = self.first
        target = self.layers.modules[self.layers.names.index(name)]
        modules = list(dict.fromkeys(self.layers.named.values()))
        before = modules[: modules.index(target)] if target in modules else modules
        same = [m for m in before if type(m) is type(target)]
        # A norm or an encoder of another type than its blocks: the blocks themselves.
        blocks = [c for m in modules if isinstance(m, (nn.Sequential, nn.ModuleList)) for c in m.children()]
        nested = {m for block in blocks for m in list(block.modules())[1:]}
        blocks = [block for block in blocks if block not in nested]
        for module in dict.fromkeys([*reversed(same), *reversed(blocks)]):
            candidate = self.layers.other(module)
            if reaches_output(candidate, inputs, additional_forward_args=extra):
                return candidate.names[0]
        return None

    def gradient_stop(self, name: str) -> str | None:
        """The module after layer ``name`` that no gradient passes, in words."""
        if self.layers.named is None:
            return None
        inputs, extra = self.first
        names = {module: other for other, module in self.layers.named.items() if other}
        runs: list[tuple[nn.Module, list[Tensor], list[Tensor]]] = []

        def record(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            # Copies, because an in-place operation after the module changes its output.
            before, after = ([t.clone() for t in tensors_in(part)] for part in ((args, kwargs), output))
            runs.append((module, before, after))

        with hooked(names, record), gradients_enabled(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
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


# The layouts of a layer that have been found to be in order, and whether they are of its input.
_ordered: weakref.WeakKeyDictionary[nn.Module, set[tuple[Layout, bool]]] = weakref.WeakKeyDictionary()


def _spread(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Up to six cells of a grid, whose numbers differ between row by row and other usual orders."""
    h, w = grid
    cells = [(0, w - 1), (h - 1, 0), (h // 2, w // 3), (h // 3, w // 2), (1 % h, w - 1), (h - 1, 1 % w)]
    return list(dict.fromkeys(cells))


def _changed(images: Tensor, cells: Sequence[tuple[int, int]], grid: tuple[int, int]) -> Tensor:
    """Copies of one image; in each but the first, the pixels of one cell are another pattern."""
    images = images.clone()
    scale = images[0].float().std().nan_to_num() + 0.1
    for copy, (i, j) in zip(images[1:], cells, strict=True):
        rows, columns = (
            slice(c * side // count, max((c + 1) * side // count, c * side // count + 1))
            for c, side, count in zip((i, j), copy.shape[1:], grid, strict=True)
        )
        copy[:, rows, columns] = copy[:, rows, columns].flip(1, 2) + 2 * scale.to(copy)
    return images


def _strays(
    change: Tensor, cells: Sequence[tuple[int, int]]
) -> tuple[list[tuple[tuple[int, int], tuple[int, int]]], int]:
    """The cells whose change ``(K, h, w)`` appears far from them, with where, and the number of the others."""
    h, w = change.shape[1:]
    reach = 1 if min(h, w) > 3 else 0
    strays, hits = [], 0
    for (i, j), one in zip(cells, change, strict=True):
        near = torch.zeros(h, w, dtype=torch.bool, device=one.device)
        near[max(i - reach, 0) : i + reach + 1, max(j - reach, 0) : j + reach + 1] = True
        far = one.masked_fill(near, 0)
        if far.max() > 2 * one[near].max() and far.max() > 3 * one.median():
            strays.append(((i, j), divmod(int(far.argmax()), w)))
        hits += bool(one[near].max() > 1.2 * far.max())
    return strays, hits


def check_order_of_own_models(
    layers: Layers, inputs: Inputs, layouts: Sequence[Layout], additional_forward_args: Any, at_input: bool
) -> None:
    """Refuse tokens that look like the patches of the image and lie elsewhere, in models of no library: a class token
    may stand last, columns may come before rows, the model may resize images to a size with as many patches.

    One cell of the first image is changed at a time, as in :meth:`Layers.misordered`; the greatest change has to be
    there. It costs one forward pass per layer, once.

    Raises:
        LayoutError: the tokens of a layer are in another order.
    """
    images = [part for part in (inputs if isinstance(inputs, tuple) else (inputs,)) if part.ndim == 4]
    stride = layers.traits.patch_stride
    if len(images) != 1 or stride is None:
        return

    def by_a_library(name: str) -> bool:
        """What wraps a library's network may resize images, which only shows in the shape of others than squares."""
        steps = name.split(".") if name else []
        for depth in range(len(steps) + 1):
            owner = (layers.named or {}).get(".".join(steps[:depth]))
            if owner is not None and type(owner).__module__.partition(".")[0] in (
                "torchvision", "timm", "open_clip", "transformers", "captum_concepts"
            ):  # fmt: skip
                embeds = any(isinstance(m, nn.Conv2d) and m.in_channels in (1, 3, 4) for m in owner.modules())
                return embeds and (depth == 0 or images[0].shape[2] == images[0].shape[3])
        return False

    for number, (name, module, layout) in enumerate(zip(layers.names, layers.modules, layouts, strict=True)):
        known = _ordered.setdefault(module, set())
        if layout.kind not in ("NLC", "LNC") or (layout, at_input) in known or by_a_library(name):
            continue
        cells, batch, width = _spread(layout.grid), batch_size(inputs), layout.grid[1]
        parts = repeat_rows(take_rows(inputs, slice(1), batch), len(cells) + 1, 1)
        parts = parts if isinstance(parts, tuple) else (parts,)
        parts = tuple(_changed(part, cells, layout.grid) if part.ndim == 4 else part for part in parts)
        extra = repeat_rows(take_rows(additional_forward_args, slice(1), batch), len(cells) + 1, 1)
        try:
            with warnings.catch_warnings():  # of the changed pixels' range
                warnings.simplefilter("ignore", InputWarning)
                seen = layers[number].capture(parts, additional_forward_args=extra, attribute_to_layer_input=at_input)
            maps = full_precision(layout.maps(seen.layers[0]))
        except (InputError, RuntimeError):
            continue  # a model of one batch size
        change = (maps[1:] - maps[:1]).norm(dim=1)
        places = [int(one.argmax()) - (i * width + j) for (i, j), one in zip(cells, change, strict=True)]
        shift, times = Counter(places).most_common(1)[0]
        if shift and times >= 3 and 2 * times >= len(cells):
            raise LayoutError(
                f"the tokens of layer {name!r} lie {abs(shift)} place{'s' * (abs(shift) > 1)} "
                f"{'before' if shift < 0 else 'after'} where they are read, in rows of {width}: its prefix tokens "
                "(class token, registers) do not stand before the patches, or are of another number. Pass "
                "prefix_tokens if only their number differs; tokens that stand after the patches or between them "
                "cannot be read, so choose a layer before they are joined"
            )
        strays, _ = _strays(change, cells)
        if 2 * len(strays) > len(cells):
            raise LayoutError(
                f"the tokens of layer {name!r} are not in the order of the image's rows: a change of the image at "
                f"cell {strays[0][0]} of the {layout.grid[0]} x {width} grid appears at {strays[0][1]}. A model that "
                "resizes or crops its images itself needs images of the size that it works on; where tokens are "
                "reordered, choose a layer before that"
            )
        known.add((layout, at_input))


def repeat_rows(value: Any, count: int, batch: int) -> Any:
    """``count`` copies of every row of tensors, also in nested tuples, that have one for each of ``batch`` examples."""
    if isinstance(value, tuple):
        return tuple(repeat_rows(item, count, batch) for item in value)
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch:
        return value.repeat_interleave(count, 0)
    return value


def reaches_output(layer: Layers, inputs: Inputs, *, additional_forward_args: Any = None) -> bool:
    """Whether the positions of one layer influence the model's output, by one forward and backward pass."""
    try:
        with gradients_enabled(), warnings.catch_warnings():
            warnings.simplefilter("ignore", InputWarning)
            result = layer.run(inputs, additional_forward_args=additional_forward_args, gradient=True)
            result = replace(result, source=None)  # the caller is a search already
            return bool(result.gradients(any_reading(result.returned))[0].any())
    except (InputError, RuntimeError, AttributeError):
        return False  # no grid, does not run, or has no gradient
