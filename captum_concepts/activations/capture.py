"""One forward pass, many layers: record, substitute and differentiate layer outputs, and leave no trace."""

from __future__ import annotations

import copy
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts.errors import InputError, InputWarning, LayerError, did_you_mean

Layer = nn.Module | str
Inputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Captured:
    """The result of one forward pass.

    Args:
        output: what ``forward_func`` returned.
        layers: the captured tensor of each asked layer, in order, in the layer's own layout. With
            ``gradient=True`` they are the points to differentiate ``output`` at.
    """

    output: Any
    layers: tuple[Tensor, ...]


def find_model(forward_func: Callable[..., Any]) -> nn.Module | None:
    """The module behind ``forward_func``: itself, the owner of a bound method, or what a partial wraps."""
    while isinstance(forward_func, functools.partial):
        forward_func = forward_func.func
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
    """The module that ``layer`` means.

    Args:
        forward_func: the model, or a method of it.
        layer: a module, or its dotted name as in ``model.named_modules()``.

    Raises:
        LayerError: no such name; the nearest ones are offered.
    """
    if isinstance(layer, nn.Module):
        return unwrap(layer)
    if not isinstance(layer, str):
        raise LayerError(f"layer must be a torch.nn.Module or its dotted name, got {type(layer).__name__}")
    model = find_model(forward_func)
    if model is None:
        raise LayerError(
            f"layer {layer!r} cannot be looked up, because forward_func is a plain function; "
            "pass the layer as a module, or forward_func as a torch.nn.Module or one of its methods"
        )
    names = dict(model.named_modules(remove_duplicate=False))
    for candidate in (layer, layer.removeprefix("module."), layer.removeprefix("_orig_mod.")):
        if candidate and candidate in names:
            return unwrap(names[candidate])
    hint = did_you_mean(layer, [n for n in names if n])
    hint = hint or f" Its top-level layers are {[name for name, _ in model.named_children()]}."
    raise LayerError(f"{type(model).__name__} has no layer {layer!r}.{hint}")


def layer_name(forward_func: Callable[..., Any], layer: Layer) -> str:
    """The dotted name of ``layer`` in the model, or its class name where it has none."""
    if isinstance(layer, str):
        return layer
    model = find_model(forward_func)
    module = unwrap(layer)
    named = () if model is None else model.named_modules()
    return next((name for name, m in named if m is module and name), type(module).__name__)


def check_images(inputs: Inputs) -> tuple[Tensor, ...]:
    """The inputs as a tuple, with the mistakes named that would otherwise give a wrong map silently.

    Raises:
        InputError: not a tensor, an empty batch, or integer pixels.
    """
    parts = inputs if isinstance(inputs, tuple) else (inputs,)
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        kinds = [type(part).__name__ for part in parts]
        raise InputError(f"inputs must be a torch.Tensor or a tuple of tensors, got {kinds}")
    first = parts[0]
    if first.ndim == 0 or first.shape[0] == 0:
        raise InputError(f"inputs of shape {tuple(first.shape)} hold no example; give a batch (N, 3, H, W)")
    if not first.is_floating_point():
        raise InputError(
            f"inputs have dtype {first.dtype}; convert pixels to floating point the way the model was trained, "
            "for example images.float() / 255"
        )
    # A sum is NaN or infinite whenever a value is, and costs a fraction of a full isfinite mask.
    if not first.detach().sum(dtype=torch.float32).isfinite() and not first.detach().isfinite().all():
        warnings.warn("the inputs contain NaN or infinite values; so will the result", InputWarning, stacklevel=3)
    return parts


@contextmanager
def gradients_enabled() -> Iterator[None]:
    """Let autograd record inside, also when called under ``torch.no_grad()`` or ``torch.inference_mode()``."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def evaluation_mode(model: nn.Module | None) -> Iterator[None]:
    """Run ``model`` as in ``eval()``, then put each submodule's training flag back as it was.

    In training mode batch statistics would mix the examples and every call would change the model's buffers.
    """
    training = [] if model is None else [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def capture(
    forward_func: Callable[..., Any],
    inputs: Inputs,
    layers: Sequence[Layer],
    *,
    additional_forward_args: Any = None,
    gradient: bool = False,
    substitute: Mapping[Layer, Callable[[Tensor], Tensor]] | None = None,
    attribute_to_layer_input: bool = False,
) -> Captured:
    """Run ``forward_func`` once and record the output of each of ``layers``.

    Args:
        forward_func: the model, one of its methods, or any callable that runs it.
        inputs: one tensor or a tuple, passed as positional arguments.
        layers: modules or dotted names; each must run exactly once in the forward.
        additional_forward_args: passed after the inputs, as Captum does.
        gradient: make ``output`` differentiable with respect to the captured tensors (differentiate inside
            :func:`gradients_enabled`). Nothing in front of the first layer is recorded by autograd, so a backward
            pass never goes further down, and it works with frozen weights.
        substitute: ``{layer: function}``; the layer's output is replaced by ``function(output)``, which may also
            have another batch size. It is captured after that.
        attribute_to_layer_input: take each layer's (first) input instead of its output.

    The model is left as found: hooks, training mode, ``.grad`` and random state, also after an exception.
    Other threads may run the same model meanwhile; their calls are not recorded.

    Raises:
        LayerError: unknown layer, a layer that did not run, or ran more than once.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten())
        >>> result = capture(net, torch.rand(2, 3, 8, 8), ["0"], gradient=True)
        >>> result.layers[0].shape, torch.autograd.grad(result.output.sum(), result.layers)[0].shape
        (torch.Size([2, 4, 6, 6]), torch.Size([2, 4, 6, 6]))
    """
    parts = check_images(inputs)
    wanted = [resolve_layer(forward_func, layer) for layer in layers]
    replace = {resolve_layer(forward_func, layer): f for layer, f in (substitute or {}).items()}
    names = {resolve_layer(forward_func, layer): layer_name(forward_func, layer) for layer in (*layers, *replace)}
    if additional_forward_args is None:
        additional_forward_args = ()
    elif not isinstance(additional_forward_args, tuple):
        additional_forward_args = (additional_forward_args,)
    model = find_model(forward_func)
    # Calling a wrapper (DataParallel, torch.compile) would run copies or graphs that skip the hooks.
    run = model if model is not None and isinstance(forward_func, nn.Module) else forward_func

    def attempt(enabled_before: bool) -> tuple[Any, dict[nn.Module, Tensor]]:
        record: dict[nn.Module, Tensor] = {}
        with ExitStack() as stack:
            stack.enter_context(_eager())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(enabled_before))
            stack.enter_context(evaluation_mode(model))
            for module in dict.fromkeys([*wanted, *replace]):
                hook = _make_hook(module, names[module], record, replace.get(module), gradient)
                if attribute_to_layer_input:
                    handle = module.register_forward_pre_hook(hook)
                else:
                    handle = module.register_forward_hook(lambda _m, _i, out, hook=hook: hook(_m, out))
                stack.callback(handle.remove)
            args = [p.clone() if p.is_inference() else p for p in parts]
            output = run(*args, *additional_forward_args)
        return output, record

    output, record = attempt(enabled_before=False)
    for module in dict.fromkeys([*wanted, *replace]):
        if module not in record:
            raise LayerError(
                f"layer {names[module]!r} did not run in this forward pass; choose a layer that forward_func "
                "calls (a layer of another model, of another branch, or inside a compiled function does not)"
            )
    if gradient and isinstance(output, Tensor) and not output.requires_grad:
        # A model that runs its backbone under its own no_grad() restores "disabled" behind the layer; with
        # gradients enabled around the forward it restores "enabled".
        output, record = attempt(enabled_before=True)
    return Captured(output, tuple(record[module] for module in wanted))


def _make_hook(
    module: nn.Module,
    name: str,
    record: dict[nn.Module, Tensor],
    replace: Callable[[Tensor], Tensor] | None,
    gradient: bool,
) -> Callable[[nn.Module, Any], Any]:
    owner = threading.get_ident()

    def hook(_module: nn.Module, value: Any) -> Any:
        if threading.get_ident() != owner:
            return None
        if module in record:
            raise LayerError(
                f"layer {name!r} runs more than once in one forward pass, so its activation is not one tensor; "
                "choose a layer that runs once (a shared ReLU, for example, has the layer before it)"
            )
        tensor, rebuild = _first_tensor(value, name)
        if replace is not None:
            tensor = replace(tensor)
        if gradient:
            if not tensor.requires_grad:
                tensor = tensor.detach().requires_grad_()
            torch.set_grad_enabled(True)
        record[module] = tensor
        # A copy goes on, so that an in-place operation behind the layer cannot overwrite what was recorded.
        return rebuild(tensor.clone())

    return hook


def _first_tensor(value: Any, name: str) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The (first) floating-point tensor in a layer's output and how to put another in its place."""
    if isinstance(value, Tensor):
        return value, lambda new: new
    keyed = list(enumerate(value)) if isinstance(value, (tuple, list)) else []
    if isinstance(value, MutableMapping):  # transformers' ModelOutput
        keyed = list(value.items())
    for key, item in keyed:
        if isinstance(item, Tensor) and item.is_floating_point():
            return item, functools.partial(_put, value, key)
    raise LayerError(f"layer {name!r} gives {type(value).__name__}, which holds no tensor; choose a layer that does")


def _put(value: Any, key: Any, new: Tensor) -> Any:
    """A copy of the container ``value`` with ``new`` at ``key``."""
    if hasattr(value, "_replace"):  # a namedtuple
        return value._replace(**{value._fields[key]: new})
    if isinstance(value, tuple):
        return (*value[:key], new, *value[key + 1 :])
    copied = copy.copy(value)
    copied[key] = new
    return copied


@contextmanager
def _eager() -> Iterator[None]:
    """Let compiled submodules and functions run eagerly meanwhile, because compiled graphs skip new hooks."""
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield
