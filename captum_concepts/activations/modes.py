"""Modes a forward pass runs in, each put back as it was: gradients, evaluation, no compiled graphs.

Evaluation mode and compilation belong to the model and the process, not to a thread. Calls that overlap in several
threads therefore share one mode, and the last of them to finish puts it back.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

_lock = threading.RLock()
_evaluated: dict[nn.Module, int] = {}  # by how many calls a training module is held in evaluation mode
_eager: list[Any] = []  # one entry for each running call; the first one holds torch's stance


@contextmanager
def gradients_enabled() -> Iterator[None]:
    """Let autograd record inside, also when called under ``torch.no_grad()`` or ``torch.inference_mode()``."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def evaluation_mode(model: nn.Module | None) -> Iterator[None]:
    """Run ``model`` as in ``eval()``, then put each submodule's training flag back as it was.

    In training mode batch statistics would mix the examples and every call would change the model's buffers. With
    None, the model is not known (a plain function); every module that this thread calls meanwhile is then held in
    evaluation mode.
    """
    held: set[nn.Module] = set()

    def hold(module: nn.Module) -> None:
        with _lock:
            if module not in held and (module.training or module in _evaluated):
                _evaluated[module] = _evaluated.get(module, 0) + 1
                module.training = False
                held.add(module)

    try:
        if model is None:
            with _on_each_call(hold):
                yield
        else:
            for module in model.modules():
                hold(module)
            yield
    finally:
        with _lock:
            for module in held:
                _evaluated[module] -= 1
                if not _evaluated[module]:
                    del _evaluated[module]
                    module.training = True


@contextmanager
def _on_each_call(function: Callable[[nn.Module], None]) -> Iterator[None]:
    thread = threading.get_ident()

    def hook(module: nn.Module, _args: Any) -> None:
        if threading.get_ident() == thread:
            function(module)

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def eager_mode() -> Iterator[None]:
    """Let compiled modules and functions run eagerly meanwhile, because compiled graphs skip new hooks."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        yield
        return
    with _lock:
        _eager.append(None if _eager else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _lock:
            if len(_eager) == 1:
                _eager[0].__exit__(None, None, None)
                _eager.clear()
            else:
                _eager.pop()
