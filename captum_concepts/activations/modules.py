"""Moved to :mod:`captum_concepts.activations`."""

from torch import nn

from captum_concepts.activations.layers import Layer, find_model, layer_name, resolve_layer, unwrap

__all__ = ["Layer", "find_model", "hookable", "layer_name", "resolve_layer", "unwrap"]


def hookable(module: nn.Module) -> nn.Module:
    """See :func:`~captum_concepts.activations.capture.hooked`, which does it."""
    from collections import OrderedDict

    if not isinstance(module._forward_hooks, OrderedDict):
        module._forward_hooks = OrderedDict(module._forward_hooks)
    return module
