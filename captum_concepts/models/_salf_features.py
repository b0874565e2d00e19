"""How SALFCBM reads a layer of its backbone: one forward, no hook left behind, nothing behind the layer computed."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts.activations import evaluation_mode, gradients_enabled, infer_layout, resolve_layer
from captum_concepts.activations.capture import Layer, capture, unwrap
from captum_concepts.activations.modes import eager_mode
from captum_concepts.activations.modules import hookable
from captum_concepts.errors import InputError, LayerError, LayoutError

_SIZES = (224, 64, 32, 96, 128, 256, 288, 299, 336, 384, 448, 512, 28)  # sides to try where the model does not tell


class _ReachedError(BaseException):
    """Ends a forward at the layer. Not an ``Exception``, so that no model catches it."""


@dataclass(frozen=True)
class Reading:
    """How the layer's output is read, found once, so that no forward has to guess.

    Args:
        kind: ``"NCHW"``, ``"NHWC"``, ``"NLC"`` or ``"LNC"``.
        prefix_tokens: tokens in front of the grid.
        channels: C.
        image_size, grid: a size of images and the grid that it gave.
    """

    kind: str
    prefix_tokens: int
    channels: int
    image_size: tuple[int, int]
    grid: tuple[int, int]

    def grid_of(self, positions: int, image_size: tuple[int, int]) -> tuple[int, int] | None:
        """The grid of that many tokens for images of another size; None where that is not clear."""
        if image_size == self.image_size and positions == self.grid[0] * self.grid[1]:
            return self.grid
        sides = [
            size * cells / known for size, cells, known in zip(image_size, self.grid, self.image_size, strict=True)
        ]
        fits = {
            (h, w)
            for h in (math.floor(sides[0]), math.ceil(sides[0]))
            for w in (math.floor(sides[1]), math.ceil(sides[1]))
            if h * w == positions
        }
        if len(fits) == 1:
            return fits.pop()
        return self.grid if not fits and positions == self.grid[0] * self.grid[1] else None

    def maps(self, output: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor | None] | None:
        """``(N, C, h, w)`` and the first prefix token ``(N, C)``; None where ``output`` has another form."""
        if self.kind in ("NCHW", "NHWC"):
            if output.ndim != 4:
                return None
            return (output if self.kind == "NCHW" else output.permute(0, 3, 1, 2)), None
        if output.ndim != 3:
            return None
        tokens = output.transpose(0, 1) if self.kind == "LNC" else output
        grid = self.grid_of(tokens.shape[1] - self.prefix_tokens, image_size)
        if grid is None:
            return None
        maps = tokens[:, self.prefix_tokens :].transpose(1, 2).unflatten(2, grid)
        return maps, (tokens[:, 0] if self.prefix_tokens else None)


def name_in(backbone: nn.Module, layer: Layer) -> str:
    """The dotted name of ``layer``, ``""`` for the backbone itself.

    Raises:
        LayerError: the backbone has no such layer.
    """
    model = unwrap(backbone)
    if layer == "" or (isinstance(layer, nn.Module) and unwrap(layer) is model):
        return ""
    module = resolve_layer(model, layer)
    name = next((name for name, other in model.named_modules() if unwrap(other) is module and name), None)
    if name is None:
        raise LayerError(
            f"the given layer, a {type(module).__name__}, is no part of the backbone {type(model).__name__}; give one "
            "of its modules or a dotted name"
        )
    return name


def read_layer(backbone: nn.Module, name: str, x: Tensor) -> Tensor:
    """The output of one layer for a batch, differentiable, the cheapest way that leaves no trace.

    Eagerly the forward ends at the layer, unless a module around it is watched by the user's hooks. Compilers and
    exporters see a forward that runs through; what nothing reads they remove.

    Raises:
        LayerError: the layer did not run, or gives no tensor.
    """
    model = unwrap(backbone)  # a compiled graph inside would not see the hook
    if name == "":
        return _tensor(model(x), name)
    layer = model.get_submodule(name)
    if torch.compiler.is_compiling():
        return _read_compiled(model, layer, name, x)
    in_place = any(getattr(m, "_compiled_call_impl", None) is not None for m in (*_around(model, name), layer))
    with eager_mode() if in_place else nullcontext():  # parts compiled by module.compile() would not see the hook
        seen = _read_eager(model, layer, name, x)
    if not seen:
        raise LayerError(f"layer {name!r} did not run in the backbone's forward; choose one that does")
    return seen[0]


def _read_compiled(model: nn.Module, layer: nn.Module, name: str, x: Tensor) -> Tensor:
    seen: list[Tensor] = []

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(_tensor(output, name).clone())  # an in-place ReLU may follow

    # torch._dynamo traces neither register_forward_hook nor an assignment into an OrderedDict; it does trace this.
    kept = layer._forward_hooks
    layer._forward_hooks = {**kept, "captum_concepts": hook}  # type: ignore[dict-item]
    try:
        model(x)
    finally:
        layer._forward_hooks = kept
    return seen[0]


def _read_eager(model: nn.Module, layer: nn.Module, name: str, x: Tensor) -> list[Tensor]:
    owner = threading.get_ident()
    seen: list[Tensor] = []
    whole = any(_watched(module) for module in _around(model, name))

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        if threading.get_ident() != owner:
            return
        tensor = _tensor(output, name)
        seen.append(tensor.clone() if whole else tensor)
        if not whole:
            raise _ReachedError

    handle = hookable(layer).register_forward_hook(hook)
    try:
        model(x)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return seen


def _around(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules that hold the layer: they would not end."""
    parts = name.split(".")
    return (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts)))


def _watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def watched(module: nn.Module) -> bool:
    """Whether somebody's hooks look at what goes into or comes out of ``module``."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _tensor(output: Any, name: str) -> Tensor:
    """The (first) floating-point tensor in a layer's output."""
    if isinstance(output, Tensor):
        return output
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    for item in items:
        if isinstance(item, Tensor) and item.is_floating_point():
            return item
    raise LayerError(f"layer {name!r} gives {type(output).__name__}, which holds no floating-point tensor")


def probe(
    backbone: nn.Module, name: str, layout: str, prefix_tokens: int | None, input_size: tuple[int, int] | None
) -> tuple[Reading, Tensor]:
    """Run the backbone once on an empty image of a size that it takes.

    Returns:
        How the layer is read, and that image.

    Raises:
        LayerError, LayoutError: the layer runs not or twice, or has no grid.
        InputError: no size of images was accepted.
    """
    model = unwrap(backbone)
    like = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), torch.empty(0))
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    sizes = [input_size] if input_size is not None else [*_declared(model), *((s, s) for s in _SIZES)]
    failure: Exception | None = None
    for size in dict.fromkeys(sizes):
        image = torch.zeros((1, channels, *size), dtype=like.dtype, device=like.device)
        try:
            output = _probed(model, name, image)
        except (LayerError, LayoutError):
            raise
        except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
            failure = failure or error
            continue
        return reading_of(model, name, output, 1, size, layout, prefix_tokens), image
    raise InputError(
        f"the backbone {type(model).__name__} took no empty image of {channels} channels ({failure}); say input_size=, "
        "the size of its images, or feature_dim=, the channels of the layer"
    ) from failure


def _probed(model: nn.Module, name: str, image: Tensor) -> Tensor:
    with torch.no_grad(), evaluation_mode(model):
        if name == "":
            return _tensor(model(image), name)
        try:
            return capture(model, image, [name]).layers[0]  # runs through: a layer used twice is found
        except (LayerError, LayoutError):
            raise
        except (RuntimeError, ValueError, AssertionError):
            return read_layer(model, name, image)  # only what is behind the layer refuses this size


def reading_of(
    model: nn.Module,
    name: str,
    output: Tensor,
    batch: int,
    size: tuple[int, int],
    layout: str,
    prefix_tokens: int | None,
) -> Reading:
    """Read the layout off one output.

    Raises:
        LayoutError: no grid, or not clear which.
    """
    module = unwrap(model).get_submodule(name)
    found = infer_layout(
        output,
        batch,
        size,
        layout=layout,
        prefix_tokens=prefix_tokens,
        module=module,
        model=unwrap(model),
        name=name or type(module).__name__,
    )
    return Reading(found.kind, found.prefix_tokens, found.maps(output).shape[1], size, found.grid)


def freeze_unreached(backbone: nn.Module, name: str, image: Tensor) -> None:
    """Freeze what has no influence on the layer (the old classifier): it would wait for gradients for ever."""
    free = [p for p in backbone.parameters() if p.requires_grad]
    if not free:
        return
    with gradients_enabled(), evaluation_mode(backbone):
        found = read_layer(backbone, name, image)
        gradients = torch.autograd.grad(found.float().sum(), free, allow_unused=True) if found.requires_grad else ()
    reached = {id(p) for p, gradient in zip(free, gradients, strict=False) if gradient is not None}
    for parameter in free:
        if id(parameter) not in reached:
            parameter.requires_grad_(False)


def _declared(model: Any) -> Iterator[tuple[int, int]]:
    """The sizes that timm, torchvision, open_clip and transformers models say they take."""
    places: list[Callable[[], Any]] = [
        lambda: model.patch_embed.img_size,  # before timm's configuration, which tells of the pretrained weights
        lambda: model.pretrained_cfg["input_size"],
        lambda: model.default_cfg["input_size"],
        lambda: model.image_size,
        lambda: model.config.image_size,
        lambda: model.visual.image_size,
    ]
    for place in places:
        try:
            size = place()
        except (AttributeError, KeyError, TypeError, IndexError):
            continue
        sides = [size, size] if isinstance(size, int) else list(size)[-2:] if isinstance(size, (tuple, list)) else []
        if len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides):
            yield sides[0], sides[1]
