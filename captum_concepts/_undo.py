"""Temporary changes of a call (training mode, hooks, gradients), which are undone whatever interrupts it.

Ctrl-C can arrive between any two lines, even inside the ``__exit__`` of a context. Every change is therefore made
inside :class:`undone`, which records how to undo it, and public functions and classes that run a user's model are
:func:`unharming`. When their call ends, remaining changes are undone in two ``finally`` blocks, as a single interrupt
cannot reach both. This is the only file of the package that registers hooks.

Evaluation mode belongs to the model, not to a thread. Overlapping calls in several threads share it, and the last call
to finish restores it. Warning filters belong to the process; :func:`warnings_filtered` adds its own filter and removes
only that one.

The caller's ``torch.autocast`` applies to the caller's models and functions (:func:`evaluation_mode`,
:func:`autocast_of_the_caller`), but not to what a call computes from their activations.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import sys
import threading
import traceback
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

Thing = TypeVar("Thing", bound=Callable[..., Any])


class _Running(threading.local):
    """State of the outermost call in this thread: its changes to undo (None outside of a call); the device types for
    which the caller has autocast on; whether the caller's own code is running; whether the result may be
    differentiated; and tensors that have a history for the duration of the call."""

    changes: list[undone] | None = None
    autocast: tuple[str, ...] = ()
    users: bool = False
    live: bool = False
    linked: Sequence[weakref.ref[Tensor]] = ()


_running = _Running()
#: Guards state shared by threads. An interrupt in the exit of a ``with`` leaves it locked until the end of the call.
lock = threading.RLock()
_evaluated: dict[nn.Module, set[object]] = {}  # running calls that keep a training module in evaluation mode
_filters: set[int] = set()  # numbers of the active warning filters
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")
_LIVE = "captum_concepts.activations"  # its functions return tensors with their graph


def _after_fork() -> None:
    """Reset the lock in a forked child, which has one thread and no other running calls."""
    lock._at_fork_reinit()  # type: ignore[attr-defined]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class undone:
    """A context whose code makes a change, which ``undo`` reverts when the context ends.

    Args:
        undo: may be called before the change was made, and more than once.
    """

    def __init__(self, undo: Callable[[], Any]) -> None:
        self.undo, self.ended = undo, False

    def __enter__(self) -> None:
        if _running.changes is not None:
            _running.changes.append(self)

    def __exit__(self, *_: object) -> None:
        if not self.ended:  # a context that is garbage collected late must not undo changes of later calls
            self.undo()
            self.ended = True
        if _running.changes is not None and self in _running.changes:
            _running.changes.remove(self)


@contextmanager
def watching(mode: TorchFunctionMode) -> Iterator[None]:
    """``with mode``, which is removed even after an interrupt."""
    found = _get_current_function_mode_stack()

    def leave() -> None:
        while len(_get_current_function_mode_stack()) > len(found):
            _pop_mode()

    with undone(leave):
        _push_mode(mode)
        yield


@contextmanager
def warnings_filtered(
    action: Any, category: type[Warning] = Warning, message: str = "", module: str = ""
) -> Iterator[None]:
    """A context with ``warnings.filterwarnings(action, message, category, module)``, which may overlap in threads.

    ``warnings.catch_warnings`` restores all filters on exit, so one of two overlapping contexts may leave its filter
    behind.
    """
    if getattr(sys.flags, "context_aware_warnings", False):  # since Python 3.14, each thread may have its own filters
        with warnings.catch_warnings():
            warnings.filterwarnings(action, message, category, module)
            yield
        return
    with lock:
        number = next(k for k in itertools.count() if k not in _filters)  # few numbers, as patterns are compiled once
        _filters.add(number)
    own = f"(?#captum_concepts {number}){message}"  # the comment identifies this filter
    found: list[Any] = [warnings.filters]

    def remove() -> None:
        with lock:
            for filters in (*found, warnings.filters):  # a catch_warnings block has its own list
                for entry in [entry for entry in filters if getattr(entry[1], "pattern", None) == own]:
                    filters.remove(entry)
            _filters.discard(number)

    with undone(remove):
        with lock:
            warnings.filterwarnings(action, own, category, module)
        found.append(warnings.filters)
        yield


def _with_autocast() -> tuple[str, ...]:
    return tuple(kind for kind in _AUTOCAST if torch.is_autocast_enabled(kind))


def _set_autocast(kinds: Iterable[str], enabled: bool) -> None:
    for kind in kinds:
        torch.set_autocast_enabled(kind, enabled)


@contextmanager
def autocast_of_the_caller() -> Iterator[None]:
    """A context for the caller's code with the autocast that was on when the call began."""
    enter, leave = _autocast_of_the_caller()
    with undone(leave):
        enter()
        yield


def _autocast_of_the_caller() -> tuple[Callable[[], None], Callable[[], None]]:
    """Functions that switch the caller's autocast on, and that undo this."""
    users = _running.users
    kinds = tuple(kind for kind in _running.autocast if not torch.is_autocast_enabled(kind))

    def enter() -> None:
        _running.users = _running.changes is not None
        if _running.autocast:
            _set_autocast(kinds, True)
            torch.clear_autocast_cache()  # weights may have changed since

    def leave() -> None:
        if kinds:
            _set_autocast(kinds, False)
        _running.users = users

    return enter, leave


def without_history_in_the_end(tensor: Tensor) -> None:
    """Detach ``tensor``, which a model or hook may keep, when the outermost call ends.

    Tensors are not detached if the result of the call may be differentiated.
    """
    if _running.changes is not None and not _running.live:
        _running.linked = [*(one for one in _running.linked if one() is not None), weakref.ref(tensor)]


def _without_history(tensor: Tensor | None) -> None:
    if tensor is None or not tensor.requires_grad:
        return
    if tensor.is_leaf:
        tensor.requires_grad_(False)
    elif not tensor._is_view():
        tensor.detach_()


@contextmanager
def evaluation_mode(model: nn.Module | Iterable[nn.Module] | None, *, autocast: bool = True) -> Iterator[None]:
    """A context in which ``model`` is as in ``eval()``; the training flag of each submodule is then restored.

    In training mode, batch statistics would mix the examples and every call would change the model's buffers. The model
    also runs under the caller's ``torch.autocast``, as in ``model(images)``.

    Args:
        model: the model, or all of its modules if they are already listed. None: the model is unknown (a plain
            function), and every module that this thread calls is set to evaluation mode.
        autocast: False if code other than the model runs inside, in which the model has its own ``evaluation_mode``.
    """
    call = object()
    held: list[nn.Module] = []
    enter, leave = _autocast_of_the_caller()

    def hold(modules: Iterable[nn.Module]) -> None:
        with lock:
            for module in modules:
                calls = _evaluated.get(module, ())
                if (module.training or calls) and call not in calls:
                    held.append(module)  # before it changes
                    _evaluated.setdefault(module, set()).add(call)
                    module.training = False

    def release() -> None:
        with lock:
            while held:
                calls = _evaluated.get(held[-1])
                if calls is not None:
                    calls.discard(call)
                    if not calls:
                        held[-1].training = True
                        _evaluated.pop(held[-1], None)
                held.pop()
        if autocast:
            leave()

    with undone(release):
        if autocast:
            enter()
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
    """A context in which ``hook(module, args, kwargs, output)`` is called after each of ``modules`` in this thread.

    The hook's return value, unless None, replaces the output. With ``at_input``, it is called before the module as
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
                    # torch 2.6 leaves a plain dict after a hook was added and removed inside a compiled graph, on
                    # which register_forward_hook fails.
                    module._forward_hooks = OrderedDict(module._forward_hooks)
                module.register_forward_hook(one, with_kwargs=True)
        one.active = True
        yield


class _Hook:
    """A hook of one call in one thread, inactive until all hooks are registered and after the call has ended."""

    def __init__(self, run: Callable[..., Any], modules: Sequence[nn.Module] = ()) -> None:
        self.run, self.modules, self.thread, self.active = run, modules, threading.get_ident(), False

    def __call__(self, *given: Any) -> Any:
        return self.run(*given) if self.active and threading.get_ident() == self.thread else None

    def remove(self) -> None:
        """Remove the hook without torch's handle, which an interrupt may have lost."""
        self.active = False
        tables: list[tuple[Any, Any]] = [(torch_module._global_forward_pre_hooks, {})]
        for module in self.modules:
            tables.append((module._forward_hooks, module._forward_hooks_with_kwargs))
            tables.append((module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs))
        for hooks, marks in tables:
            for key in [key for key, hook in list(hooks.items()) if hook is self]:
                marks.pop(key, None)
                hooks.pop(key, None)


def of_the_model(method: Thing) -> Thing:
    """Mark a method as part of the model's forward pass, so that it runs under autocast."""
    method.of_the_model = True  # type: ignore[attr-defined]
    return method


def unharming(thing: Thing) -> Thing:
    """Decorator of a function, or of a class's public methods, that restores modes and hooks after each call.

    ``forward`` and ``train`` of a class are not decorated, as they run inside calls of the module.
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
    live = function.__module__.startswith(_LIVE)
    users = getattr(function, "of_the_model", False)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if _running.changes is not None:
            return _inside(function, args, kwargs) if _running.users and not users else function(*args, **kwargs)
        found = _Found()
        try:
            try:
                _running.changes, _running.autocast = found.changes, found.autocast
                _running.live, _running.users = live, users
                if not users:
                    _set_autocast(found.autocast, False)
                result = function(*args, **kwargs)
                found.ended_well = True
                return result
            finally:
                found.restore()
        finally:
            found.restore()

    # Captum's wrappers call attribute.__wrapped__, without log_usage.
    call.__wrapped__ = getattr(function, "__wrapped__", function)
    return call


def _inside(function: Any, args: Any, kwargs: Any) -> Any:
    """Call ``function`` from the user's code inside another call, with the current autocast as the caller's."""
    before, kinds = _running.autocast, _with_autocast()

    def leave() -> None:
        _running.autocast, _running.users = before, True
        _set_autocast(kinds, True)

    with undone(leave):
        _running.autocast, _running.users = kinds, False
        _set_autocast(kinds, False)
        return function(*args, **kwargs)


class _Found:
    """The modes of this thread when a call began."""

    def __init__(self) -> None:
        self.changes: list[undone] = []
        self.ended_well = False
        self.gradients = torch.is_grad_enabled()
        self.autocast = _with_autocast()
        self.modes = _get_current_function_mode_stack()
        self.layers = torch._C._functorch.get_dynamic_layer_stack_depth()  # of vmap
        self.filters = warnings.filters
        self.handled = sys.exc_info()[1]

    def restore(self) -> None:
        """Undo the remaining changes; may run more than once."""
        if not self.ended_well:
            self._close()
        while self.changes:
            change = self.changes[-1]
            if not change.ended:
                change.undo()
                change.ended = True
            self.changes.pop()
        while _running.linked:
            _without_history(_running.linked[-1]())
            _running.linked = _running.linked[:-1]
        _running.changes, _running.autocast, _running.users, _running.live = None, (), False, False
        _set_autocast(self.autocast, True)
        if self.autocast:
            torch.clear_autocast_cache()
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
                with warnings.catch_warnings():  # notifies the module that its filters have changed
                    pass
        torch._C._set_grad_enabled(self.gradients)
        while lock._is_owned():  # type: ignore[attr-defined]
            lock.release()

    def _close(self) -> None:
        """Close the generators of torch's contexts that an interrupt left half closed.

        Their frames live as long as the traceback, and would otherwise change modes again when they are closed.
        """
        error, errors = sys.exc_info()[1], []
        while error is not None and error is not self.handled:
            errors.append(error)
            error = error.__context__
        if any(not isinstance(error, Exception) for error in errors):
            for error in errors:
                traceback.clear_frames(error.__traceback__)
