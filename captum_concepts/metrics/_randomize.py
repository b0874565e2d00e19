"""Randomizing and restoring a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from captum_concepts._undo import undone
from captum_concepts.errors import InputError, did_you_mean


def layer_names(model: nn.Module, layers: Sequence[str] | None) -> list[str]:
    """Checked ``layers``; None: all modules with parameters of their own, last first."""
    own = [name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None]
    if layers is None:
        names = own[::-1]
    else:
        known = dict(model.named_modules())
        names = list(layers)
        for name in names:
            if name not in known:
                raise InputError(f"the model has no module {name!r}.{did_you_mean(name, own)}")
            if next(known[name].parameters(), None) is None:
                raise InputError(f"module {name!r} has no parameters to randomize")
    if not names:
        raise InputError("the model has no parameters to randomize")
    return names


def randomize(module: nn.Module, seed: int) -> None:
    """Randomize a module and its submodules; the global random state is unchanged."""
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for part in module.modules():
            reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
            own = list(part.parameters(recurse=False))
            if own and callable(reset):
                kept = [p.detach().clone() for p in own]
                reset()
                own = [p for p, k in zip(own, kept, strict=True) if torch.equal(p, k) and p.numel() > 1]
                own = [p for p in own if bool((p != p.flatten()[0]).any())]  # a constant reset is intended
            for p in own:
                order = torch.randperm(p.numel()).to(p.device)
                p.copy_(p.flatten()[order].reshape(p.shape))


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """On exit, restore parameters, buffers, gradients, training modes and the random state in place."""
    tensors = [*model.parameters(), *model.buffers()]
    kept = [t.detach().clone() for t in tensors]
    gradients = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    grad_values = [None if g is None else g.detach().clone() for _, g, _ in gradients]
    modes = [(module, module.training) for module in model.modules()]
    state = torch.get_rng_state()

    def restore() -> None:
        with torch.no_grad():
            for tensor, saved in zip(tensors, kept, strict=True):
                tensor.copy_(saved)
            for (p, gradient, needed), value in zip(gradients, grad_values, strict=True):
                p.requires_grad_(needed)
                p.grad = gradient
                if gradient is not None and value is not None:
                    gradient.copy_(value)
        for module, mode in modes:
            module.training = mode
        torch.set_rng_state(state)

    with undone(restore):
        yield
