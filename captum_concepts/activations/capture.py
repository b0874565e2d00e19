"""Records, replaces and differentiates the outputs of many layers in one forward pass, without changing the model.

Methods use :class:`~captum_concepts.activations.Layers`, which resolves names to modules once. A model that is trained
through one of its layers uses :func:`read_layer`, which stops the forward pass there.

Compilation is a setting of the process, not of a thread. Calls that overlap in several threads share one mode, and the
last call to finish restores it.
"""

from __future__ import annotations

import copy
import functools
import re
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_concepts._captum import output_tensor
from captum_concepts._undo import (
    autocast_of_the_caller,
    evaluation_mode,
    hooked,
    lock,
    undone,
    unharming,
    watching,
    without_history_in_the_end,
)
from captum_concepts.errors import (
    CaptumConceptsError,
    InputError,
    InputWarning,
    LayerError,
    LayoutError,
    listing,
)

Inputs = Tensor | tuple[Tensor, ...]

_eager: set[object] = set()  # the running calls that disable compiled graphs
_stance: list[Any] = []  # torch's stance, while there are any


@dataclass(frozen=True)
class Captured:
    """The result of one forward pass.

    Args:
        returned: what ``forward_func`` returned; :attr:`output` reads it as one tensor.
        layers: the captured tensor of each layer, in order, in the layer's own layout. With ``gradient=True`` they are
            the tensors to differentiate the output with respect to.
        order: indices of the layers in execution order.
        originals: the same tensors before a ``substitute`` replaced them.
        final: the ``"softmax"`` or ``"sigmoid"`` that ``logits=True`` left out; None if there was none.
    """

    returned: Any
    layers: tuple[Tensor, ...]
    order: tuple[int, ...] = ()
    originals: tuple[Tensor, ...] = ()
    final: str | None = None

    @property
    def output(self) -> Tensor:
        """The model's output as one tensor, see :func:`~captum_concepts.activations.output_tensor`."""
        return output_tensor(self.returned)


# ---------------------------------------------------------------- modes, each restored


@contextmanager
def gradients_enabled() -> Iterator[None]:
    """A context in which autograd records, also under ``torch.no_grad()`` or ``torch.inference_mode()``."""
    found = torch.is_grad_enabled()
    with outside_inference_mode(), undone(lambda: torch._C._set_grad_enabled(found)):
        torch._C._set_grad_enabled(True)
        yield


def outside_inference_mode() -> Any:
    """A context outside of ``torch.inference_mode()``; it does nothing if that is already the case."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


@contextmanager
def eager_mode() -> Iterator[None]:
    """A context in which compiled modules and functions run eagerly, because compiled graphs skip new hooks."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        yield
        return
    call = object()

    def leave() -> None:
        with lock:
            _eager.discard(call)
            if _stance and not _eager:
                _stance[0].__exit__(None, None, None)
                _stance.clear()

    with undone(leave):
        with lock:
            _eager.add(call)
            if not _stance:
                _stance.append(torch.compiler.set_stance("force_eager"))
        yield


# ---------------------------------------------------------------- one forward pass


def capture_modules(
    run: Callable[..., Any],
    inputs: Inputs,
    modules: Sequence[nn.Module],
    names: Sequence[str],
    *,
    parts: Iterable[nn.Module] | None,
    additional_forward_args: Any = None,
    gradient: bool = False,
    substitute: Mapping[nn.Module, Callable[[Tensor], Tensor]] | None = None,
    attribute_to_layer_input: bool = False,
    logits: bool = False,
) -> Captured:
    """Run ``run`` once and record the output of each of ``modules``; see :meth:`Layers.capture`.

    Args:
        run: the model without wrappers that would run copies or graphs, or any callable.
        modules, names: the modules to record, and their names in messages.
        parts: all modules of the model, to be kept in evaluation mode; None if the model is unknown.
        substitute: for some of ``modules``.
    """
    arguments = (*check_inputs(inputs), *forward_arguments(additional_forward_args))
    if gradient:  # a layer's input gets a history, which the caller's tensors must not
        arguments = tuple(part.detach() if isinstance(part, Tensor) else part for part in arguments)
    unique = dict(zip(modules, names, strict=True))
    parts = None if parts is None else list(parts)

    def attempt(enabled_before: bool, link: bool = True) -> tuple[Any, str | None, _Recorder]:
        recorder = _Recorder(unique, substitute or {}, gradient, parts or (), link)
        activations = _FinalActivations()
        hook = recorder.at_input if attribute_to_layer_input else recorder.at_output
        with (
            eager_mode(),
            outside_inference_mode(),
            torch.set_grad_enabled(enabled_before),
            evaluation_mode(parts),
            hooked(unique, hook, at_input=attribute_to_layer_input),
            watching(activations) if logits else nullcontext(),
        ):
            try:
                with input_errors(arguments, parts):
                    output = run(*copied(arguments))
            except RuntimeError as error:  # an in-place operation on a linked tensor, or on another view of it
                linked = recorder.linked and _IN_PLACE.search(str(error)) is not None
                if not linked:
                    raise
            else:
                linked = False
                output, final = activations.undone(output)
                if recorder.gradients_put_off() and not _differentiable(output):
                    recorder.interrupted = True
        if linked or any(tensor._version != version for tensor, version in recorder.watched):
            return attempt(enabled_before, link=False)
        return output, final, recorder

    output, final, recorder = attempt(enabled_before=False)
    for module, name in unique.items():
        if module not in recorder.record:
            inside = _ran_inside(module, name, run, arguments, parts)
            raise LayerError(
                f"layer {name!r} did not run in this forward pass; "
                + (
                    f"its part {inside!r} did: use that layer (a traced graph or checkpoint_sequential calls the parts)"
                    if inside
                    else "choose a layer that forward_func calls (a layer of another model, of another branch, or "
                    "inside a compiled or exported graph does not)"
                )
            )
    if recorder.interrupted:
        # A model that runs its backbone under its own no_grad() restores "disabled" after the layer; with gradients
        # enabled around the forward pass it restores "enabled".
        output, final, recorder = attempt(enabled_before=True)
    ran = list(recorder.record)
    order = tuple(sorted(range(len(modules)), key=lambda number: ran.index(modules[number])))
    _warn_of_nan(output, {name: recorder.record[module] for module, name in unique.items()}, arguments)
    originals = {**recorder.record, **recorder.originals}
    return Captured(
        output,
        tuple(recorder.record[module] for module in modules),
        order,
        tuple(originals[module] for module in modules),
        final,
    )


#: torch's error for an in-place operation that it cannot record.
_IN_PLACE = re.compile(r"in-?place")
_CHANNELS = re.compile(r"to have (\d+) channels, but got (\d+) channels")
#: Errors for images of an unsupported size, from torch's layers, torchvision, timm and transformers.
_SIZE = re.compile(
    r"[Kk]ernel size can't be greater|[Oo]utput size is too small|shapes cannot be multiplied|"
    r"[Pp]adding size should be less|(height|width|size).{0,40}(doesn't|does not|must) match|"
    r"Wrong image (height|width)|size of tensor a \(\d+\) must match",
    re.DOTALL,
)


@contextmanager
def input_errors(arguments: tuple[Any, ...], parts: Iterable[nn.Module] | None) -> Iterator[None]:
    """A context for a forward pass that explains errors about channels, dtype, size or device of the images.

    Args:
        arguments: of the model.
        parts: its modules, or None if they are unknown.

    Raises:
        InputError: the forward pass raised such an error.
    """
    try:
        yield
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        if isinstance(error, CaptumConceptsError):
            raise
        said = str(error)
        if isinstance(error, TypeError) and "positional argument" in said:
            raise InputError(
                f"the model cannot be called with {len(arguments)} tensors ({said[:200]}); each tensor of a tuple is "
                "a separate argument, so pass several images as one tensor (N, C, H, W)"
            ) from error
        for images in (a for a in arguments if isinstance(a, Tensor) and a.ndim == 4 and a.is_floating_point()):
            found = _CHANNELS.search(said)
            if found and int(found[2]) == images.shape[1]:
                hint = "choose some, as in inputs[:, :3], or move the channels to the front"
                if images.shape[1] == 1:
                    hint = f"repeat the channel, as in inputs.expand(-1, {found[1]}, -1, -1)"
                elif images.shape[1] < int(found[1]):  # files are read as RGB
                    hint = f"files with more bands: images.inputs_for(model, files, bands=range({found[1]}))"
                raise InputError(
                    f"inputs of shape {tuple(images.shape)}, read as (N, C, H, W), have {found[2]} channels, but the "
                    f"model takes {found[1]}; {hint}"
                ) from error
            parameters = [p for part in parts or () for p in part.parameters(recurse=False) if p.is_floating_point()]
            devices = {p.device for p in parameters}
            if devices and images.device not in devices and "device" in said:
                places = ", ".join(sorted(map(str, devices)))
                raise InputError(
                    f"inputs are on device {images.device}, but the model is on {places}; move one of them, as in "
                    "inputs.to(device)"
                ) from error
            dtypes = {p.dtype for p in parameters}
            if dtypes and images.dtype not in dtypes:
                kinds = ", ".join(sorted(map(str, dtypes)))
                raise InputError(
                    f"inputs are {images.dtype}, but the model's weights are {kinds} ({said[:200]}); convert one of "
                    "them"
                ) from error
            if _SIZE.search(said):
                raise InputError(
                    f"the model does not take images of {images.shape[2]} x {images.shape[3]} pixels ({said[:200]}); "
                    "resize them to a size that it accepts"
                    + (", or check the other arguments" if len(arguments) > 1 else "")
                ) from error
        if "Inference tensors cannot be saved" in said:
            raise InputError(
                "the model's weights were created under torch.inference_mode(), so gradients cannot be computed; "
                "build and load the model outside of it, or pass copy.deepcopy(model)"
            ) from error
        raise


def _ran_inside(
    module: nn.Module, name: str, run: Callable[..., Any], arguments: Any, parts: Iterable[nn.Module] | None
) -> str | None:
    """The name of the last module inside ``module``, which did not run, that ran once."""
    inside = {child: f"{name}.{child_name}" for child_name, child in module.named_modules() if child is not module}
    ran: list[nn.Module] = []
    with (
        eager_mode(),
        torch.no_grad(),
        evaluation_mode(parts),
        hooked(inside, lambda child, *_: ran.append(child)),
    ):
        run(*copied(arguments))
    return next((inside[child] for child in reversed(ran) if ran.count(child) == 1), None)


class _FinalActivations(TorchFunctionMode):
    """Records the inputs of the last softmaxes and sigmoids of a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: deque[tuple[Tensor, Tensor, str]] = deque(maxlen=4)  # attention would keep many alive

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        source = args[0] if args else kwargs.get("input")
        name = getattr(func, "__name__", "")
        if name not in ("softmax", "sigmoid", "sigmoid_"):
            return func(*args, **kwargs)
        before = source.clone() if name == "sigmoid_" else source
        result = func(*args, **kwargs)
        self.calls.append((before, result, name.rstrip("_")))
        return result

    def undone(self, output: Any) -> tuple[Any, str | None]:
        """The input and name of the softmax or sigmoid that returned the model's output; else the output and None."""
        if not self.calls:
            return output, None
        tensor = output_tensor(output)
        for before, after, name in reversed(self.calls):
            if after is tensor or (_same_memory(after, tensor) and after.numel() == tensor.numel()):
                return before.reshape(tensor.shape), name
        return output, None


_PASSES = re.compile(
    r"(View|UnsafeView|ReshapeAlias|Squeeze|Unsqueeze|Select|Slice|Clone|ToCopy|Transpose|T|Permute|Alias|Index|Clamp)"
    r"(Min|Max)?Backward\d"
)


def final_activation(output: Tensor) -> str | None:
    """``"softmax"`` or ``"sigmoid"`` if the output is that of one, according to its autograd graph; else None.

    The gradient of a probability close to 0 or 1 vanishes, and so does a map of the most certain predictions.
    ``Layers.run(..., logits=True)`` returns the output before the softmax or sigmoid.

    >>> scores = torch.rand(2, 5, requires_grad=True)
    >>> final_activation(scores.softmax(1)[:, 2]), final_activation(scores * 2)
    ('softmax', None)
    """
    node = output.grad_fn
    while node is not None:
        name = type(node).__name__
        if name.startswith(("SoftmaxBackward", "SigmoidBackward")):
            return "softmax" if name.startswith("Soft") else "sigmoid"
        if not _PASSES.fullmatch(name):
            return None
        node = node.next_functions[0][0]
    return None


@dataclass
class _Recorder:
    """The hooks of one forward pass and the tensors they recorded.

    Args:
        parts: the modules of the model, whose own tensors stay unchanged.
        link: pass a layer's input on as the same tensor, which may also be used elsewhere.
    """

    names: Mapping[nn.Module, str]
    replace: Mapping[nn.Module, Callable[[Tensor], Tensor]]
    gradient: bool
    parts: Iterable[nn.Module]
    link: bool
    record: dict[nn.Module, Tensor] = field(default_factory=dict)
    originals: dict[nn.Module, Tensor] = field(default_factory=dict)
    linked: bool = False
    watched: list[tuple[Tensor, int]] = field(default_factory=list)
    interrupted: bool = False

    def at_output(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook."""
        tensor, rebuild = first_tensor(output, f"layer {self.names[module]!r} returns")
        # nn.Identity, dropout in evaluation mode and nn.ReLU(inplace=True) return their input, also used elsewhere.
        given = list(tensors_in((args, kwargs)))
        shared = any(_same_memory(tensor, other) for other in given)
        return rebuild(self._take(module, tensor, shared, any(tensor is other for other in given)))

    def at_input(self, module: nn.Module, args: Any, kwargs: dict[str, Any], _output: None) -> Any:
        """Forward pre-hook."""
        name = f"layer {self.names[module]!r} is called with"
        if kwargs and not any(value.is_floating_point() for value in tensors_in(args)):
            tensor, rebuild = first_tensor(kwargs, name)
            return args, rebuild(self._take(module, tensor, True, True))
        tensor, rebuild = first_tensor(args, name)
        return rebuild(self._take(module, tensor, True, True)), kwargs

    def _take(self, module: nn.Module, given: Tensor, shared: bool, is_input: bool) -> Tensor:
        """Record a tensor (a copy if its memory is ``shared``) and return the tensor that replaces it.

        A layer's input may also be used elsewhere, for example in a shortcut, so the tensor itself is passed on.
        """
        tensor = given
        if module in self.record:
            raise LayerError(
                f"layer {self.names[module]!r} runs more than once in one forward pass, so its activation is not one "
                "tensor; choose a layer that runs once (a shared ReLU, for example, has the layer before it)"
            )
        if self.gradient and not tensor.is_floating_point():
            raise LayerError(f"layer {self.names[module]!r} has no gradient, because it returns {tensor.dtype}")
        self.interrupted = self.interrupted or self.gradients_put_off()
        first = not self.record
        if self.gradient and is_input and not first and given.requires_grad and self.link and not self.replace:
            return self._watch(module, given)
        if self.gradient and first:
            tensor = tensor.detach()  # nothing upstream of the first layer is differentiated
        if shared:
            tensor = tensor.clone()
        if module in self.replace:
            self.originals[module] = tensor
            tensor = self.replace[module](tensor)
            if not isinstance(tensor, Tensor):
                raise InputError(f"substitute for layer {self.names[module]!r} must return a tensor, got {tensor!r}")
        if self.gradient:
            if not tensor.requires_grad:
                tensor = tensor.detach().requires_grad_()
            torch.set_grad_enabled(True)
        self.record[module] = tensor
        if module not in self.replace:
            if shared and not self.gradient:
                return given  # the recorded tensor is a copy
            if is_input and first and self._may_link(given):
                return given if self._link(given, tensor) else self._watch(module, given)
        # Pass on a copy, so that an in-place operation after the layer cannot overwrite the recorded tensor.
        return tensor.clone()

    def _may_link(self, given: Tensor) -> bool:
        """Whether ``given`` was created in this forward pass, without a history."""
        if not self.link or given.requires_grad or given.is_inference():
            return False
        own = (t for m in self.parts for t in (*m._parameters.values(), *m._buffers.values()) if t is not None)
        return not any(_same_memory(given, other) for other in own)

    def _link(self, given: Tensor, recorded: Tensor) -> bool:
        """Make ``given``, wherever it is used, a copy of ``recorded``; False if torch does not allow that."""
        self.linked = True
        try:
            given.copy_(recorded)
        except RuntimeError:  # a view created while gradients were disabled
            return False
        without_history_in_the_end(given)
        return True

    def _watch(self, module: nn.Module, given: Tensor) -> Tensor:
        """Record ``given`` itself, which must not change afterwards."""
        self.linked = True
        if not given.requires_grad:
            given.requires_grad_()
            without_history_in_the_end(given)
        self.watched.append((given, given._version))
        self.record[module] = given
        return given

    def gradients_put_off(self) -> bool:
        """Whether the model has disabled gradients again since the first layer."""
        return self.gradient and bool(self.record) and not torch.is_grad_enabled()


class _ReachedError(BaseException):
    """Ends a forward pass at the layer. Not an ``Exception``, so that no model catches it."""


@unharming
def read_layer(model: nn.Module, name: str, *args: Any) -> Tensor:
    """The output of one layer of ``model(*args)``, differentiable; nothing after the layer is computed.

    The model runs in its own training mode, and autograd records it if gradients are enabled. The forward pass ends at
    the layer, unless a module around it has hooks of the user, which would then not run. Compilers and exporters see a
    complete forward pass, from which they remove unused operations.

    Args:
        model: without a wrapper (see :func:`unwrap`).
        name: the dotted name as in ``model.get_submodule``; ``""`` for the model's own output.

    Raises:
        LayerError: the layer did not run, or returns no tensor.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(7, 2))  # a head of the wrong size
    >>> read_layer(net, "1", torch.rand(2, 3, 8, 8)).shape
    torch.Size([2, 4, 6, 6])
    """
    args = copied(args)
    if name == "":
        with autocast_of_the_caller():
            return _tensor_of(model(*args), name)
    layer = model.get_submodule(name)
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    if torch.compiler.is_compiling():
        return _read_compiled(model, layer, name, args)
    whole = any(m._forward_hooks or m._backward_hooks or m._backward_pre_hooks for m in around)
    recorded: list[Tensor] = []

    def hook(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        tensor = _tensor_of(output, name)
        recorded.append(tensor.clone() if whole else tensor)
        if not whole:
            raise _ReachedError

    in_place = any(getattr(m, "_compiled_call_impl", None) is not None for m in (*around, layer))
    try:
        with (
            eager_mode() if in_place else nullcontext(),
            hooked([layer], hook),
            input_errors(args, [*model.modules()]),
            autocast_of_the_caller(),
        ):
            model(*args)
    except _ReachedError:
        pass
    if not recorded:
        raise LayerError(f"layer {name!r} did not run in the model's forward pass; choose one that does")
    return recorded[0]


def _read_compiled(model: nn.Module, layer: nn.Module, name: str, args: Any) -> Tensor:
    recorded: list[Tensor] = []

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        recorded.append(_tensor_of(output, name).clone())  # an in-place ReLU may follow

    # torch._dynamo traces neither register_forward_hook nor an assignment into an OrderedDict, but this.
    kept = layer._forward_hooks
    layer._forward_hooks = {**kept, "captum_concepts": hook}  # type: ignore[dict-item]
    try:
        model(*args)
    finally:
        layer._forward_hooks = kept
    return recorded[0]


# ---------------------------------------------------------------- tensors in, tensors out


def check_images(inputs: Inputs) -> tuple[Tensor, ...]:
    """The inputs as a tuple, of which one is a batch of images ``(N, C, H, W)``.

    Raises:
        InputError: an input is not a tensor, the batch is empty, or pixels are integers.
        LayoutError: none of them is a batch of images (but a single image, a volume, a video, a sequence).
    """
    parts = check_inputs(inputs)
    require_images(parts)
    return parts


def require_images(parts: Sequence[Tensor]) -> None:
    """Raise if no input is a batch of images; see :func:`check_images`."""
    if parts and all(isinstance(part, Tensor) and part.ndim != 4 for part in parts):
        shapes = ", ".join(str(tuple(part.shape)) for part in parts[:5])
        if any(part.ndim == 3 for part in parts):
            raise LayoutError(
                f"inputs of shape {shapes} have no batch dimension; pass a batch of images (N, C, H, W), for example "
                "image[None]"
            )
        raise LayoutError(
            f"inputs of shape {shapes} are not images (N, C, H, W); volumes, videos and feature vectors are not "
            "supported"
        )


def check_inputs(inputs: Inputs) -> tuple[Tensor, ...]:
    """The inputs as a tuple, checked for mistakes that would otherwise silently lead to a wrong map.

    Raises:
        InputError: an input is not a tensor, the batch is empty, or pixels are integers.
    """
    parts = inputs if isinstance(inputs, tuple) else (inputs,)
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        kinds = [type(part).__name__ for part in parts]
        raise InputError(
            f"inputs must be a torch.Tensor or a tuple of tensors, got {listing(kinds)}; pass one batch (N, 3, H, W), "
            "for example torch.stack(images)"
        )
    if any(part.layout != torch.strided or part.is_meta for part in parts):
        raise InputError("inputs must be dense tensors with values; got a sparse one, or one on the meta device")
    images = images_among(parts)
    images = parts[0] if images is None else images
    if images.ndim == 0 or images.numel() == 0:
        raise InputError(f"inputs of shape {tuple(images.shape)} contain no examples; pass a batch (N, 3, H, W)")
    if not images.is_floating_point():
        raise InputError(
            f"inputs have dtype {images.dtype}; convert pixels to floating point as in the model's training, for "
            "example images.float() / 255"
        )
    if any(part.is_floating_point() and _has_nonfinite(part.detach()) for part in parts):
        warnings.warn("the inputs contain NaN or infinite values, and so will the result", InputWarning, stacklevel=3)
    return parts


def images_among(inputs: Inputs) -> Tensor | None:
    """The (first) images ``(N, C, H, W)`` of one or several inputs; None if there are none."""
    parts = inputs if isinstance(inputs, tuple) else (inputs,)
    return next((part for part in parts if part.ndim == 4), None)


def batch_size(inputs: Inputs) -> int:
    """The number of examples N, of the images if there are several inputs."""
    images = images_among(inputs)
    first = inputs[0] if isinstance(inputs, tuple) else inputs
    return (first if images is None else images).shape[0]


def forward_arguments(additional_forward_args: Any) -> tuple[Any, ...]:
    """Captum's ``additional_forward_args`` (None, one value or a tuple) as a tuple."""
    if additional_forward_args is None:
        return ()
    return additional_forward_args if isinstance(additional_forward_args, tuple) else (additional_forward_args,)


def _warn_of_nan(output: Any, layers: Mapping[str, Tensor], arguments: tuple[Any, ...]) -> None:
    """Warn of NaN from weights or half-precision overflow, which ReLU's gradient would hide in a map."""
    broken = [name for name, values in layers.items() if values.is_floating_point() and _has_nonfinite(values.detach())]
    scores = [values.detach() for values in tensors_in(output) if values.is_floating_point()]
    # Infinite scores may be intended, to exclude classes; infinite activations are not.
    where = f"layer {broken[0]!r}" if broken else "the model's output" if any(map(_has_nan, scores)) else ""
    inputs = [a.detach() for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
    if where and not any(map(_has_nonfinite, inputs)):
        warnings.warn(
            f"{where} contains NaN or infinite values although the inputs do not, so the result will contain them or "
            "be wrong. Look for NaN weights, or for values outside the range of half precision",
            InputWarning,
            stacklevel=5,
        )


def _has_nan(values: Tensor) -> bool:
    return bool(values.sum(dtype=torch.float32).isnan()) and bool(values.isnan().any())


def _has_nonfinite(values: Tensor) -> bool:
    # A sum is NaN or infinite if any value is, and costs a fraction of a full isfinite mask.
    return not bool(values.sum(dtype=torch.float32).isfinite()) and not bool(values.isfinite().all())


def copied(arguments: Iterable[Any]) -> tuple[Any, ...]:
    """Copies of tensors, which the model may change in place (``images.sub_(mean)``); other values unchanged.

    Images stay the caller's, and a second pass sees them as the first did. Of tensors created under inference_mode(),
    autograd can record only a copy.
    """
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in arguments)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def _differentiable(output: Any) -> bool:
    tensors = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
    return bool(tensors) and all(tensor.requires_grad for tensor in tensors)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    try:
        return one.device == other.device and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError, ValueError):  # sparse, not initialized, of a library of its own
        return False


def first_tensor(value: Any, name: str) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The (first) floating-point tensor in a layer's output or input, and a function that replaces it."""
    if isinstance(value, Tensor):
        return value, lambda new: new
    keyed = list(enumerate(value)) if isinstance(value, (tuple, list)) else []
    if isinstance(value, MutableMapping):  # transformers' ModelOutput
        keyed = list(value.items())
    for key, item in keyed:
        if isinstance(item, Tensor) and item.is_floating_point():
            return item, functools.partial(_put, value, key)
    raise LayerError(
        f"{name} {type(value).__name__}, which contains no floating-point tensor; choose a layer that does"
    )


def _tensor_of(output: Any, name: str) -> Tensor:
    return output if isinstance(output, Tensor) else first_tensor(output, f"layer {name!r} returns")[0]


def _put(value: Any, key: Any, new: Tensor) -> Any:
    """A copy of the container ``value`` with ``new`` at ``key``."""
    if isinstance(value, tuple) and hasattr(value, "_replace"):  # a namedtuple
        return value._replace(**{value._fields[key]: new})  # type: ignore[attr-defined]
    if isinstance(value, tuple):
        return (*value[:key], new, *value[key + 1 :])
    copied = copy.copy(value)
    copied[key] = new
    return copied
