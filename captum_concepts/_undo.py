"""What a call changes for its duration (training mode, hooks, gradients) is changed back, whatever interrupts it.

Ctrl-C arrives between any two lines, also inside the ``__exit__`` of a context. So a change is made inside
:class:`undone`, which notes how to undo it, and public functions and classes that run a user's model are
:func:`unharming`: once their call ends, whatever has not been undone is, in two ``finally`` blocks, one of which no
single interrupt reaches. This is the only file of the package that registers hooks.

Evaluation mode belongs to the model, not to a thread. Calls that overlap in several threads share it, and the last call
to finish restores it. Filters of warnings belong to the process: :func:`warnings_filtered` adds one of its own and
takes that one away.

The caller's ``torch.autocast`` is for the caller's models and functions: they run under it (:func:`evaluation_mode`,
:func:`autocast_of_the_caller`), and what a call computes from their activations does not.
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
    """Of the outermost call that runs in this thread: its changes, to be undone (None outside of one); the device types
    for which the caller has autocast on; whether the caller's own code runs; whether what it returns may be
    differentiated; tensors that have a history for its duration."""

    changes: list[undone] | None = None
    autocast: tuple[str, ...] = ()
    users: bool = False
    live: bool = False
    linked: Sequence[weakref.ref[Tensor]] = ()


_running = _Running()
#: Of what threads share. An interrupt in the exit of a ``with`` leaves it held, and the end of the call frees it.
lock = threading.RLock()
_evaluated: dict[nn.Module, set[object]] = {}  # the running calls that hold a training module in evaluation mode
_filters: set[int] = set()  # the numbers of the filters of warnings that are there now
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")
_LIVE = "captum_concepts.activations"  # its functions return tensors with their graph


def _after_fork() -> None:
    """The child has one thread, and no call of another goes on in it."""
    lock._at_fork_reinit()  # type: ignore[attr-defined]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


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
def warnings_filtered(
    action: Any, category: type[Warning] = Warning, message: str = "", module: str = ""
) -> Iterator[None]:
    """``warnings.filterwarnings(action, message, category, module)`` inside; calls in other threads may overlap.

    ``warnings.catch_warnings`` puts all filters back as it found them, so of two that overlap one may leave its filter
    behind for good.
    """
    if getattr(sys.flags, "context_aware_warnings", False):  # from Python 3.14 on each thread may have its own filters
        with warnings.catch_warnings():
            warnings.filterwarnings(action, message, category, module)
            yield
        return
    with lock:
        number = next(k for k in itertools.count() if k not in _filters)  # few numbers: patterns are compiled once
        _filters.add(number)
    own = f"(?#captum_concepts {number}){message}"  # a comment tells this filter from all others
    found: list[Any] = [warnings.filters]

    def remove() -> None:
        with lock:
            for filters in (*found, warnings.filters):  # whoever is in a catch_warnings has a list of its own
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
    """For code of the caller: the autocast that was on when the call began, if it is off by now."""
    enter, leave = _autocast_of_the_caller()
    with undone(leave):
        enter()
        yield


def _autocast_of_the_caller() -> tuple[Callable[[], None], Callable[[], None]]:
    """What switches it on, and what undoes that."""
    users = _running.users
    kinds = tuple(kind for kind in _running.autocast if not torch.is_autocast_enabled(kind))

    def enter() -> None:
        _running.users = _running.changes is not None
        if _running.autocast:
            _set_autocast(kinds, True)
            torch.clear_autocast_cache()  # of weights that may have changed since

    def leave() -> None:
        if kinds:
            _set_autocast(kinds, False)
        _running.users = users

    return enter, leave


def without_history_in_the_end(tensor: Tensor) -> None:
    """Take ``tensor``, if it still exists, out of its graph once the outermost call ends: a model or hook may keep it.

    Not where what the call returns is still to be differentiated.
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
    """Run ``model`` as in ``eval()``, then restore the training flag of each submodule.

    In training mode, batch statistics would mix the examples and every call would change the model's buffers.

    It also runs under the ``torch.autocast`` that is the caller's, as in ``model(images)``.

    Args:
        model: the model, or all of its modules where they have been listed already. None: the model is not known (a
            plain function), and every module that this thread calls meanwhile is held in evaluation mode.
        autocast: False: more than the model runs inside, and the model has an evaluation mode of its own there.
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


def of_the_model(method: Thing) -> Thing:
    """A method that is a part of the model's own forward pass, and so runs under autocast like it."""
    method.of_the_model = True  # type: ignore[attr-defined]
    return method


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

    # Captum's wrappers call attribute.__wrapped__, without what log_usage adds.
    call.__wrapped__ = getattr(function, "__wrapped__", function)
    return call


def _inside(function: Any, args: Any, kwargs: Any) -> Any:
    """Call it from code of the user that is itself called from here: whose autocast is what it is now."""
    before, kinds = _running.autocast, _with_autocast()

    def leave() -> None:
        _running.autocast, _running.users = before, True
        _set_autocast(kinds, True)

    with undone(leave):
        _running.autocast, _running.users = kinds, False
        _set_autocast(kinds, False)
        return function(*args, **kwargs)


class _Found:
    """The modes of this thread as a call found them."""

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
        """Undo what is left of the changes; may run more than once."""
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
                with warnings.catch_warnings():  # which tells the module that its filters are others
                    pass
        torch._C._set_grad_enabled(self.gradients)
        while lock._is_owned():  # type: ignore[attr-defined]
            lock.release()

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
