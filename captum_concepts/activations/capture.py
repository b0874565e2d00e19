"""One forward pass, many layers: record, substitute and differentiate layer outputs, and leave no trace."""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts.activations.modes import eager_mode, evaluation_mode, gradients_enabled
from captum_concepts.activations.modules import Layer, find_model, hookable, layer_name, resolve_layer, unwrap
from captum_concepts.errors import InputError, InputWarning, LayerError

__all__ = [
    "Captured",
    "Inputs",
    "Layer",
    "capture",
    "check_images",
    "evaluation_mode",
    "find_model",
    "gradients_enabled",
    "layer_name",
    "resolve_layer",
    "unwrap",
]

Inputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Captured:
    """The result of one forward pass.

    Args:
        output: what ``forward_func`` returned.
        layers: the captured tensor of each asked layer, in order, in the layer's own layout. With
            ``gradient=True`` they are the points to differentiate ``output`` at.
        order: numbers of the asked layers in the order in which they ran.
    """

    output: Any
    layers: tuple[Tensor, ...]
    order: tuple[int, ...] = ()


def check_images(inputs: Inputs) -> tuple[Tensor, ...]:
    """The inputs as a tuple, with the mistakes named that would otherwise give a wrong map silently.

    Raises:
        InputError: not a tensor, an empty batch, or integer pixels.
    """
    parts = inputs if isinstance(inputs, tuple) else (inputs,)
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        kinds = [type(part).__name__ for part in parts]
        raise InputError(
            f"inputs must be a torch.Tensor or a tuple of tensors, got {kinds}; make one batch (N, 3, H, W), "
            "for example torch.stack(images) of tensors"
        )
    first = parts[0]
    if first.ndim == 0 or first.shape[0] == 0:
        raise InputError(f"inputs of shape {tuple(first.shape)} hold no example; give a batch (N, 3, H, W)")
    if not first.is_floating_point():
        raise InputError(
            f"inputs have dtype {first.dtype}; convert pixels to floating point the way the model was trained, "
            "for example images.float() / 255"
        )
    if any(part.is_floating_point() and _has_nonfinite(part.detach()) for part in parts):
        warnings.warn("the inputs contain NaN or infinite values; so will the result", InputWarning, stacklevel=3)
    return parts


def _warn_of_nan(output: Any, layers: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> None:
    """Weights that are NaN, or half precision that overflows: ReLU's gradient hides it, and a map would look sound."""
    broken = [name for name, values in layers.items() if values.is_floating_point() and _has_nonfinite(values.detach())]
    scores = [values.detach() for values in _tensors(output) if values.is_floating_point()]
    # Infinite scores are meant where a model rules classes out; infinite activations are not.
    where = f"layer {broken[0]!r}" if broken else "the model's output" if any(map(_has_nan, scores)) else ""
    if where and not any(part.is_floating_point() and _has_nonfinite(part.detach()) for part in inputs):
        warnings.warn(
            f"{where} contains NaN or infinite values although the inputs do not; so will the result, or it will be "
            "wrong. Look for NaN weights, or for values that half precision cannot hold",
            InputWarning,
            stacklevel=4,
        )


def _has_nan(values: Tensor) -> bool:
    return bool(values.sum(dtype=torch.float32).isnan()) and bool(values.isnan().any())


def _has_nonfinite(values: Tensor) -> bool:
    # A sum is NaN or infinite whenever a value is, and costs a fraction of a full isfinite mask.
    return not bool(values.sum(dtype=torch.float32).isfinite()) and not bool(values.isfinite().all())


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
        layers: modules or dotted names; each must run exactly once in the forward. May be empty beside ``substitute``.
        additional_forward_args: passed after the inputs, as Captum does.
        gradient: make ``output`` differentiable with respect to the captured tensors (differentiate inside
            :func:`gradients_enabled`). Nothing in front of the first layer is recorded by autograd, so a backward
            pass never goes further down, and it works with frozen weights.
        substitute: ``{layer: function}``; the layer's output is replaced by ``function(output)``, which may also
            have another batch size. It is captured after that.
        attribute_to_layer_input: take each layer's (first) input instead of its output.

    The model is left as found: hooks, training mode, buffers and ``.grad``, also after an exception; evaluation mode
    draws no random numbers. Other threads may run the same model meanwhile; their calls are not recorded.

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

    def attempt(enabled_before: bool) -> tuple[Any, _Recorder]:
        recorder = _Recorder(names, replace, gradient, frozenset(wanted))
        with ExitStack() as stack:
            stack.enter_context(eager_mode())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(enabled_before))
            stack.enter_context(evaluation_mode(model))
            for module in dict.fromkeys([*wanted, *replace]):
                if attribute_to_layer_input:
                    handle = module.register_forward_pre_hook(recorder.at_input, with_kwargs=True)
                else:
                    handle = hookable(module).register_forward_hook(recorder.at_output, with_kwargs=True)
                stack.callback(handle.remove)
            arguments = [_normal(argument) for argument in (*parts, *additional_forward_args)]
            output = run(*arguments)
            if recorder.gradients_put_off() and not _differentiable(output):
                recorder.interrupted = True
        return output, recorder

    output, recorder = attempt(enabled_before=False)
    for module in dict.fromkeys([*wanted, *replace]):
        if module not in recorder.record:
            raise LayerError(
                f"layer {names[module]!r} did not run in this forward pass; choose a layer that forward_func "
                "calls (a layer of another model, of another branch, or inside a compiled function does not)"
            )
    if recorder.interrupted:
        # A model that runs its backbone under its own no_grad() restores "disabled" behind the layer; with
        # gradients enabled around the forward it restores "enabled".
        output, recorder = attempt(enabled_before=True)
    ran = list(recorder.record)
    order = tuple(sorted(range(len(wanted)), key=lambda number: ran.index(wanted[number])))
    _warn_of_nan(output, {names[module]: recorder.record[module] for module in wanted}, parts)
    return Captured(output, tuple(recorder.record[module] for module in wanted), order)


@dataclass
class _Recorder:
    """The hooks of one forward pass and what they have seen."""

    names: Mapping[nn.Module, str]
    replace: Mapping[nn.Module, Callable[[Tensor], Tensor]]
    gradient: bool
    wanted: frozenset[nn.Module]
    record: dict[nn.Module, Tensor] = field(default_factory=dict)
    interrupted: bool = False
    owner: int = field(default_factory=threading.get_ident)

    def at_output(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook."""
        if threading.get_ident() != self.owner:
            return None
        tensor, rebuild = _first_tensor(output, f"layer {self.names[module]!r} gives")
        # nn.Identity, or dropout in evaluation mode, hands its input on, which others may overwrite.
        shared = any(_same_memory(tensor, other) for other in _tensors((args, kwargs)))
        return rebuild(self._take(module, tensor, shared))

    def at_input(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook."""
        if threading.get_ident() != self.owner:
            return None
        name = f"layer {self.names[module]!r} is called with"
        if kwargs and not any(value.is_floating_point() for value in _tensors(args)):
            tensor, rebuild = _first_tensor(kwargs, name)
            return args, rebuild(self._take(module, tensor, True))
        tensor, rebuild = _first_tensor(args, name)
        return rebuild(self._take(module, tensor, True)), kwargs

    def _take(self, module: nn.Module, tensor: Tensor, shared: bool) -> Tensor:
        """Record ``tensor`` (a copy, where its memory is ``shared``) and return what goes on in its place."""
        if module in self.record:
            raise LayerError(
                f"layer {self.names[module]!r} runs more than once in one forward pass, so its activation is not one "
                "tensor; choose a layer that runs once (a shared ReLU, for example, has the layer before it)"
            )
        if self.gradient and not tensor.is_floating_point():
            raise LayerError(f"layer {self.names[module]!r} has no gradient, because it gives {tensor.dtype}")
        self.interrupted = self.interrupted or self.gradients_put_off()
        if self.gradient and not self.record:
            tensor = tensor.detach()  # what is in front of the first layer is never differentiated
        if shared:
            tensor = tensor.clone()
        if module in self.replace:
            tensor = self.replace[module](tensor)
            if not isinstance(tensor, Tensor):
                raise InputError(f"substitute for layer {self.names[module]!r} must return a tensor, got {tensor!r}")
        if self.gradient:
            if not tensor.requires_grad:
                tensor = tensor.detach().requires_grad_()
            torch.set_grad_enabled(True)
        self.record[module] = tensor
        # A copy goes on, so that an in-place operation behind the layer cannot overwrite what was asked for.
        return tensor.clone() if module in self.wanted or self.gradient else tensor

    def gradients_put_off(self) -> bool:
        """Whether the model itself has put gradients off again since the first layer."""
        return self.gradient and bool(self.record) and not torch.is_grad_enabled()


def _normal(value: Any) -> Any:
    """Tensors made under inference_mode() cannot be recorded by autograd; their copies can."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _differentiable(output: Any) -> bool:
    tensors = [tensor for tensor in _tensors(output) if tensor.is_floating_point()]
    return bool(tensors) and all(tensor.requires_grad for tensor in tensors)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _first_tensor(value: Any, name: str) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The (first) floating-point tensor in what a layer gives or takes, and how to put another in its place."""
    if isinstance(value, Tensor):
        return value, lambda new: new
    keyed = list(enumerate(value)) if isinstance(value, (tuple, list)) else []
    if isinstance(value, MutableMapping):  # transformers' ModelOutput
        keyed = list(value.items())
    for key, item in keyed:
        if isinstance(item, Tensor) and item.is_floating_point():
            return item, functools.partial(_put, value, key)
    raise LayerError(f"{name} {type(value).__name__}, which holds no floating-point tensor; choose a layer that does")


def _put(value: Any, key: Any, new: Tensor) -> Any:
    """A copy of the container ``value`` with ``new`` at ``key``."""
    if isinstance(value, tuple) and hasattr(value, "_replace"):  # a namedtuple
        return value._replace(**{value._fields[key]: new})  # type: ignore[attr-defined]
    if isinstance(value, tuple):
        return (*value[:key], new, *value[key + 1 :])
    copied = copy.copy(value)
    copied[key] = new
    return copied
