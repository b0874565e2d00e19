"""The layout of SALFCBM's backbone layer, inferred once for all forward passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts.activations import (
    Layer,
    Layers,
    Layout,
    evaluation_mode,
    gradients_enabled,
    infer_layout,
    read_layer,
    resolve_layer,
    unwrap,
)
from captum_concepts.activations.layout import ModelTraits
from captum_concepts.activations.token_order import check_order
from captum_concepts.errors import InputError, LayerError, LayoutError
from captum_concepts.images import preprocessing_of

_SIZES = (224, 64, 32, 96, 128, 256, 288, 299, 336, 384, 448, 512, 28)  # tried if the model declares no size


@dataclass(frozen=True)
class Reading:
    """The layout of a layer's output.

    Args:
        kind: ``"NCHW"``, ``"NHWC"``, ``"NLC"`` or ``"LNC"``.
        prefix_tokens: tokens before the grid.
        channels: C.
        image_size, grid: an image size and the resulting grid.
    """

    kind: str
    prefix_tokens: int
    channels: int
    image_size: tuple[int, int]
    grid: tuple[int, int]

    def grid_of(self, positions: int, image_size: tuple[int, int]) -> tuple[int, int] | None:
        """The grid of ``positions`` tokens for images of ``image_size``; None if ambiguous."""
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
        """``(N, C, h, w)`` and the first prefix token ``(N, C)``; None if ``output`` has another layout."""
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
            f"the given layer, a {type(module).__name__}, is not part of the backbone {type(model).__name__}; pass one "
            "of its modules or a dotted name"
        )
    return name


def input_channels(model: nn.Module) -> int:
    """The number of image channels, that of the first convolution's input or else 3."""
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)


def probe(
    backbone: nn.Module, name: str, layout: str, prefix_tokens: int | None, input_size: tuple[int, int] | None
) -> tuple[Reading, Tensor]:
    """Run the backbone once on an empty image of a size that it accepts.

    Returns:
        The layout of the layer, and that image.

    Raises:
        LayerError, LayoutError: the layer does not run, or runs twice, or has no grid.
        InputError: no image size was accepted.
    """
    model = unwrap(backbone)
    like = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), torch.empty(0))
    channels = input_channels(model)
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
        reading = reading_of(model, name, output, 1, size, layout, prefix_tokens)
        if name and layout == "auto":
            read = Layout(reading.kind, reading.grid, reading.prefix_tokens)
            check_order(Layers.resolve(model, name), _noise(image), [read])
        return reading, image
    raise InputError(
        f"the backbone {type(model).__name__} does not run on an empty image of {channels} channels "
        f"({str(failure)[:200]}); pass input_size=, the size of its images, or feature_dim=, the channels of the layer"
    ) from failure


def _probed(model: nn.Module, name: str, image: Tensor) -> Tensor:
    with torch.no_grad(), evaluation_mode(model):
        if name == "":
            return read_layer(model, name, image)
        try:
            return Layers.resolve(model, name).capture(image).layers[0]  # a full pass, which detects a layer used twice
        except (LayerError, LayoutError):
            raise
        except (RuntimeError, ValueError, AssertionError):
            return read_layer(model, name, image)  # only layers after it refuse this size


def reading_of(
    model: nn.Module,
    name: str,
    output: Tensor,
    batch: int,
    size: tuple[int, int],
    layout: str,
    prefix_tokens: int | None,
    traits: ModelTraits | None = None,
) -> Reading:
    """The layout of one output; ``traits`` are those of the model, if known.

    Raises:
        LayoutError: no grid, or an ambiguous one.
    """
    module = unwrap(model).get_submodule(name)
    inferred = infer_layout(
        output,
        batch,
        size,
        layout=layout,
        prefix_tokens=prefix_tokens,
        module=module,
        model=unwrap(model) if traits is None else traits,
        name=name or type(module).__name__,
    )
    return Reading(inferred.kind, inferred.prefix_tokens, inferred.maps(output).shape[1], size, inferred.grid)


def freeze_unreached(backbone: nn.Module, name: str, image: Tensor) -> None:
    """Freeze parameters without influence on the layer, for whose gradients distributed training would wait forever."""
    free = [p for p in backbone.parameters() if p.requires_grad]
    if not free:
        return
    with gradients_enabled(), evaluation_mode(backbone):
        output = read_layer(unwrap(backbone), name, image)
        gradients = torch.autograd.grad(output.float().sum(), free, allow_unused=True) if output.requires_grad else ()
    reached = {id(p) for p, gradient in zip(free, gradients, strict=False) if gradient is not None}
    for parameter in free:
        if id(parameter) not in reached:
            parameter.requires_grad_(False)


def _noise(like: Tensor) -> Tensor:
    """A fixed random image per size; on an empty image, a changed patch hardly changes its token."""
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(0)).to(like)


def _declared(model: Any) -> Iterator[tuple[int, int]]:
    """The image sizes that a model declares, its own before those of the weights' preprocessing."""
    places: list[Callable[[], Any]] = [
        lambda: model.patch_embed.img_size,  # timm: before the configuration, which describes the pretrained weights
        lambda: preprocessing_of(model).size,  # type: ignore[union-attr]
        lambda: model.image_size,
        lambda: model.config.image_size,
        lambda: model.visual.image_size,
    ]
    for place in places:
        try:
            size = place()
        except (AttributeError, KeyError, TypeError, IndexError, InputError):
            continue
        sides = [size, size] if isinstance(size, int) else list(size)[-2:] if isinstance(size, (tuple, list)) else []
        if len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides):
            yield sides[0], sides[1]
