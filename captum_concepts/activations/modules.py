"""From a callable to the model behind it, and from a layer's name to the layer."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn

from captum_concepts.errors import LayerError, did_you_mean

Layer = nn.Module | str
_WRAPPER_PARTS = ("module", "_orig_mod")  # what DataParallel and torch.compile put into dotted names


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


def hookable(module: nn.Module) -> nn.Module:
    """The same module, ready to take forward hooks.

    Where a hook was put in and taken out inside a compiled graph, torch 2.6 leaves a plain dict behind, and
    ``register_forward_hook`` fails on it.
    """
    if not isinstance(module._forward_hooks, OrderedDict):
        module._forward_hooks = OrderedDict(module._forward_hooks)
    return module


def resolve_layer(forward_func: Callable[..., Any], layer: Layer) -> nn.Module:
    """The module that ``layer`` means.

    Args:
        forward_func: the model, or a method of it.
        layer: a module, or its dotted name as in ``model.named_modules()``; the parts that DataParallel and
            ``torch.compile`` put into names may be there or not.

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
    plain = {_without_wrappers(name): module for name, module in reversed(names.items())}
    known = {**plain, **names}
    for candidate in (layer, _without_wrappers(layer)):
        if candidate and candidate in known:
            return unwrap(known[candidate])
    hint = did_you_mean(layer, [name for name in plain if name])
    hint = hint or f" Its top-level layers are {[name for name, _ in model.named_children()]}."
    raise LayerError(f"{type(model).__name__} has no layer {layer!r}.{hint}")


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def layer_name(forward_func: Callable[..., Any], layer: Layer) -> str:
    """The dotted name of ``layer`` in the model, or its class name where it has none."""
    if isinstance(layer, str):
        return layer
    model = find_model(forward_func)
    module = unwrap(layer)
    named = () if model is None else model.named_modules()
    return next((name for name, m in named if m is module and name), type(module).__name__)
