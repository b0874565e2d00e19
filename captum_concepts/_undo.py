"""What a call changes for its duration (training mode, hooks, gradients) is changed back, whatever interrupts it.

Ctrl-C arrives between any two lines, also inside the ``__exit__`` of a context. So a change is made inside
:class:`undone`, which notes how to undo it, and public functions and classes that run a user's model are
:func:`unharming`: once their call ends, whatever has not been undone is, in two ``finally`` blocks, one of which no
single interrupt reaches. This is the only file of the package that registers hooks.

Evaluation mode belongs to the model, not to a thread. Calls that overlap in several threads share it, and the last call
to finish restores it.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

Thing = TypeVar("Thing", bound=Callable[..., Any])


class _Running(threading.local):
    """The changes of the outermost call that runs in this thread, to be undone; None outside of one."""

    changes: list[undone] | None = None


_running = _Running()
_lock = threading.RLock()
_evaluated: dict[nn.Module, set[object]] = {}  # the running calls that hold a training module in evaluation mode


class undone:
    """A context in which something is changed, by the code inside; ``undo`` changes it back, once the context ends.

    Args:
        undo: may run before the change was made, and more than once.
    """

    def __init__(self, undo: Callable[[], Any]) -> None:
        self.undo, self.ended = undo, False

    def __enter__(self) -> None:
        if _running.changes is not None:
            _running.changes.append(self)

    def __exit__(self, *_: object) -> None:
        if not self.ended:  # a context that the garbage collector closes late must not undo what others do by then
            self.undo()
            self.ended = True
        if _running.changes is not None and self in _running.changes:
            _running.changes.remove(self)


@contextmanager
def watching(mode: TorchFunctionMode) -> Iterator[None]:
    """``with mode``, of which an interrupt leaves nothing."""
    found = _get_current_function_mode_stack()

    def leave() -> None:
        while len(_get_current_function_mode_stack()) > len(found):
            _pop_mode()

    with undone(leave):
        _push_mode(mode)
        yield


@contextmanager
def evaluation_mode(model: nn.Module | Iterable[nn.Module] | None) -> Iterator[None]:
    """Run ``model`` as in ``eval()``, then restore the training flag of each submodule.

    In training mode, batch statistics would mix the examples and every call would change the model's buffers.

    Args:
        model: the model, or all of its modules where they have been listed already. None: the model is not known (a
            plain function), and every module that this thread calls meanwhile is held in evaluation mode.
    """
    call = object()
    held: list[nn.Module] = []

    def hold(modules: Iterable[nn.Module]) -> None:
        with _lock:
            for module in modules:
                calls = _evaluated.get(module, ())
                if (module.training or calls) and call not in calls:
                    held.append(module)  # before it changes
                    _evaluated.setdefault(module, set()).add(call)
                    module.training = False

    def release() -> None:
        with _lock:
            while held:
                calls = _evaluated.get(held[-1])
                if calls is not None:
                    calls.discard(call)
                    if not calls:
                        held[-1].training = True
                        _evaluated.pop(held[-1], None)
                held.pop()

    with undone(release):
        if model is None:
            hook = _Hook(lambda module, _args: hold([module]))
            with undone(hook.remove):
                torch_module.register_module_forward_pre_hook(hook)
                hook.active = True
                yield
        else:
            hold(model.modules() if isinstance(model, nn.Module) else model)
            yield


Hook = Callable[[nn.Module, Any, dict[str, Any], Any], Any]


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Hook, *, at_input: bool = False) -> Iterator[None]:
    """Call ``hook(module, args, kwargs, output)`` after each of ``modules`` has run in this thread.

    What the hook returns, unless None, replaces the output. With ``at_input`` it is called before the module as
    ``hook(module, args, kwargs, None)`` and returns the new ``(args, kwargs)``.
    """
    modules = list(modules)
    one = _Hook((lambda module, args, kwargs: hook(module, args, kwargs, None)) if at_input else hook, modules)
    with undone(one.remove):
        for module in modules:
            if at_input:
                module.register_forward_pre_hook(one, with_kwargs=True)
            else:
                if not isinstance(module._forward_hooks, OrderedDict):
                    # torch 2.6 leaves a plain dict where a hook was added and removed inside a compiled graph, and
                    # register_forward_hook fails on it.
                    module._forward_hooks = OrderedDict(module._forward_hooks)
                module.register_forward_hook(one, with_kwargs=True)
        one.active = True
        yield


class _Hook:
    """A hook of one call in one thread. It does nothing before all are registered and once the call has ended."""

    def __init__(self, run: Callable[..., Any], modules: Sequence[nn.Module] = ()) -> None:
        self.run, self.modules, self.thread, self.active = run, modules, threading.get_ident(), False

    def __call__(self, *given: Any) -> Any:
        return self.run(*given) if self.active and threading.get_ident() == self.thread else None

    def remove(self) -> None:
        """Wherever it is: an interrupt may have lost torch's handle of it."""
        self.active = False
        tables: list[tuple[Any, Any]] = [(torch_module._global_forward_pre_hooks, {})]
        for module in self.modules:
            tables.append((module._forward_hooks, module._forward_hooks_with_kwargs))
            tables.append((module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs))
        for hooks, marks in tables:
            for key in [key for key, hook in list(hooks.items()) if hook is self]:
                marks.pop(key, None)
                hooks.pop(key, None)


def unharming(thing: Thing) -> Thing:
    """The same function, or class with its public methods, that leaves modes and hooks as it found them.

    ``forward`` and ``train`` of a class stay as they are: they are called by what calls the module.
    """
    if not inspect.isclass(thing):
        return _unharming(thing)
    for name, member in list(vars(thing).items()):
        if name.startswith("_") or name in ("forward", "train") or inspect.isgeneratorfunction(member):
            continue
        if inspect.isfunction(member):
            setattr(thing, name, _unharming(member))
        elif isinstance(member, classmethod):
            setattr(thing, name, classmethod(_unharming(member.__func__)))
    return thing


def _unharming(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _running.changes is not None:
            return function(*args, **kwargs)
        found = _Found()
        try:
            try:
                _running.changes = found.changes
                result = function(*args, **kwargs)
                found.ended_well = True
                return result
            finally:
                found.restore()
        finally:
            found.restore()

    # Captum's wrappers call attribute.__wrapped__, without what log_usage adds.
    call.__wrapped__ = getattr(function, "__wrapped__", function)
    return call


class _Found:
    """The modes of this thread as a call found them."""

    def __init__(self) -> None:
        self.changes: list[undone] = []
        self.ended_well = False
        self.gradients = torch.is_grad_enabled()
        self.modes = _get_current_function_mode_stack()
        self.layers = torch._C._functorch.get_dynamic_layer_stack_depth()  # of vmap
        self.filters = warnings.filters
        self.handled = sys.exc_info()[1]

    def restore(self) -> None:
        """Undo what is left of the changes; may run more than once."""
        if not self.ended_well:
            self._close()
        while self.changes:
            change = self.changes[-1]
            if not change.ended:
                change.undo()
                change.ended = True
            self.changes.pop()
        _running.changes = None
        if not self.ended_well:
            if torch._C._functorch.get_dynamic_layer_stack_depth() > self.layers:
                torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(self.layers)
            if _get_current_function_mode_stack() != self.modes:
                while _get_current_function_mode_stack():
                    _pop_mode()
                for mode in self.modes:
                    _push_mode(mode)
            if warnings.filters is not self.filters:
                warnings.filters = self.filters
                with warnings.catch_warnings():  # which tells the module that its filters are others
                    pass
        torch._C._set_grad_enabled(self.gradients)

    def _close(self) -> None:
        """Close the generators of torch's contexts that an interrupt found half closed.

        Their frames live as long as the traceback does, and what they undo in the end would be changed once more.
        """
        error, errors = sys.exc_info()[1], []
        while error is not None and error is not self.handled:
            errors.append(error)
            error = error.__context__
        if any(not isinstance(error, Exception) for error in errors):
            for error in errors:
                traceback.clear_frames(error.__traceback__)
