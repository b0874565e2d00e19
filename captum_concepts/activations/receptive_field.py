"""Receptive fields of a layer's positions, and image crops of the strongest positions."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_concepts._checks import integer, number
from captum_concepts._undo import evaluation_mode, hooked, unharming, warnings_filtered
from captum_concepts.activations.capture import (
    Inputs,
    check_images,
    first_tensor,
    gradients_enabled,
)
from captum_concepts.activations.layers import Layer, Layers
from captum_concepts.errors import InputError, LayerError
from captum_concepts.images import checked_size


class ReceptiveField(NamedTuple):
    """A box of pixels, rows ``top`` to ``bottom`` and columns ``left`` to ``right``, ends excluded."""

    top: int
    left: int
    bottom: int
    right: int

    def crop(self, image: Tensor) -> Tensor:
        """The pixels of the box in ``image`` ``(..., H, W)``."""
        return image[..., self.top : self.bottom, self.left : self.right]


class Crop(NamedTuple):
    """One strong position with the pixels of its receptive field.

    Attributes:
        image: ``(C, h, w)`` pixels of the receptive field.
        example: index of the image.
        position: ``(row, column)`` in the layer's grid.
        value: value of the map there.
        field: the box in the image.
    """

    image: Tensor
    example: int
    position: tuple[int, int]
    value: float
    field: ReceptiveField


@unharming
def receptive_field(
    model: Callable[..., Any],
    layer: Layer,
    input_size: int | tuple[int, int],
    position: tuple[int, int],
    *,
    channels: int = 3,
    layout: str = "auto",
    prefix_tokens: int | None = None,
) -> ReceptiveField:
    """The exact box of pixels that can influence one position of a layer, for any architecture.

    Rows (columns) of the input are set to NaN, and bisection finds the largest border of the image that can be NaN
    while the position is not. So strides, dilations, odd paddings, branches and pooling need no special case, and dead
    ReLUs and zero weights do not shrink the box. With attention or squeeze-and-excitation, which connect all positions,
    the box is the whole image.

    Args:
        model: the model, one of its methods, or a callable.
        layer: a module or a dotted name.
        input_size: ``(H, W)`` of the image, or one number for a square.
        position: ``(row, column)`` in the layer's grid; negative ones count from the end.
        channels: of the image.
        layout, prefix_tokens: as in :func:`~captum_concepts.activations.infer_layout`.

    Returns:
        The box, clipped to the image.

    Raises:
        InputError: the position is outside the grid.
        LayerError: the position does not depend on the image, or is NaN for a gray image.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, stride=2, padding=1), torch.nn.MaxPool2d(2))
        >>> receptive_field(net, "1", 32, (3, 0))
        ReceptiveField(top=11, left=0, bottom=16, right=4)
    """
    size = checked_size(input_size)
    if size is None:
        raise InputError("input_size must be one side or (height, width) in pixels, got None")
    height, width = size
    integer("channels", channels)
    resolved = Layers.resolve(model, layer, layout=layout, prefix_tokens=prefix_tokens)
    name, owner = resolved.names[0], resolved.model
    parameter = next((p for p in owner.parameters() if p.is_floating_point()), None) if owner is not None else None
    image = torch.full((1, channels, height, width), 0.5)
    image = image if parameter is None else image.to(parameter.device, parameter.dtype)

    def is_spoilt(images: Tensor) -> list[bool]:
        with (
            warnings_filtered("ignore"),  # NaN inputs; oneDNN also warns when it is disabled
            torch.no_grad(),
            # Use plain kernels, because fast ones (Winograd, FFT) mix neighboring outputs and would spread the NaN.
            torch.backends.cudnn.flags(enabled=False),
            torch.backends.mkldnn.flags(enabled=False),
        ):
            maps = resolved.run(images).maps[0]
        return maps[:, :, row, column].isnan().any(1).tolist()

    with torch.no_grad():
        grid = resolved.run(image).layouts[0].grid
    row, column = _inside(position, grid, name)
    if is_spoilt(image)[0]:
        raise LayerError(f"position {position} of layer {name!r} is NaN for a gray image")
    if not is_spoilt(torch.full_like(image, torch.nan))[0]:
        raise LayerError(f"position {position} of layer {name!r} does not depend on the image")

    def spoil(edge: int, lines: int) -> Tensor:
        """The image with ``lines`` NaN rows or columns from one edge: 0 top, 1 left, 2 bottom, 3 right."""
        bad = image.clone()
        along = bad if edge % 2 == 0 else bad.transpose(2, 3)
        start = 0 if edge < 2 else along.shape[2] - lines
        along[:, :, start : start + lines] = torch.nan
        return bad

    # free[e] lines from edge e can be NaN without effect on the position; full[e] lines cannot.
    free, full = [0, 0, 0, 0], [height, width, height, width]
    while any(b - a > 1 for a, b in zip(free, full, strict=True)):
        middle = [(a + b) // 2 for a, b in zip(free, full, strict=True)]
        hit = is_spoilt(torch.cat([spoil(e, m) for e, m in enumerate(middle)]))
        free = [a if h else m for a, m, h in zip(free, middle, hit, strict=True)]
        full = [m if h else b for b, m, h in zip(full, middle, hit, strict=True)]
    return ReceptiveField(free[0], free[1], height - free[2], width - free[3])


@unharming
def effective_receptive_field(
    model: Callable[..., Any],
    layer: Layer,
    image: Tensor,
    position: tuple[int, int],
    *,
    share: float = 0.9,
    layout: str = "auto",
    prefix_tokens: int | None = None,
) -> ReceptiveField:
    """The box of pixels of one image that have most of the influence on one position.

    The center of the receptive field of a deep layer has the most influence (Luo et al., *Understanding the Effective
    Receptive Field in Deep Convolutional Neural Networks*, 2016). With g the absolute gradient of half the squared norm
    of the position's activation by the pixels, the box spans the middle ``share`` of g's sum, for rows and for columns.

    Args:
        model, layer, position, layout, prefix_tokens: as in :func:`receptive_field`.
        image: ``(C, H, W)`` or ``(1, C, H, W)``; the field depends on it.
        share: in (0, 1]; 1 includes every pixel with a gradient.

    Raises:
        InputError: there is more than one image, ``share`` is out of range, or the position is outside the grid.
        LayerError: no pixel has a gradient.
    """
    batch = check_images(image.unsqueeze(0) if image.ndim == 3 else image)[0]
    number("share", share, lambda fraction: 0 < fraction <= 1, "a fraction in (0, 1]")
    if len(batch) != 1:
        raise InputError(f"pass one image, got {tuple(image.shape)}")
    resolved = Layers.resolve(model, layer, layout=layout, prefix_tokens=prefix_tokens)
    name, recorded = resolved.names[0], []

    def record(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        tensor, rebuild = first_tensor(output, f"layer {name!r} returns")
        recorded.append(tensor)
        return rebuild(tensor.clone())  # an in-place ReLU after the layer changes the copy

    read = resolved.run(batch).layouts[0]
    row, column = _inside(position, read.grid, name)
    with evaluation_mode(resolved.model), gradients_enabled(), hooked(resolved.modules, record):
        pixels = batch.detach().clone().requires_grad_()
        model(pixels.clone())
        value = read.maps(recorded[0])[0, :, row, column].float().square().sum() / 2
        gradient = torch.autograd.grad(value, pixels, allow_unused=True)[0] if value.requires_grad else None
    if gradient is None or not gradient.any():
        raise LayerError(f"no pixel of this image has a gradient at position {tuple(position)} of layer {name!r}")
    energy = gradient[0].abs().double().sum(0) if gradient.device.type != "mps" else gradient[0].abs().sum(0)
    (top, bottom), (left, right) = (_middle(energy.sum(dim), share) for dim in (1, 0))
    return ReceptiveField(top, left, bottom, right)


def _middle(weights: Tensor, share: float) -> tuple[int, int]:
    """The shortest range with at most ``(1 - share) / 2`` of the sum on either side, end excluded."""
    below = weights.cumsum(0) / weights.sum()
    above = weights.flip(0).cumsum(0) / weights.sum()
    cut = (1 - share) / 2 + 1e-9
    return int((below <= cut).sum()), len(weights) - int((above <= cut).sum())


@unharming
def strongest_crops(
    model: Callable[..., Any],
    layer: Layer,
    inputs: Inputs,
    maps: Tensor,
    *,
    k: int = 5,
    lowest: bool = False,
    per_image: int = 1,
    share: float | None = None,
    layout: str = "auto",
    prefix_tokens: int | None = None,
) -> list[Crop]:
    """Image crops of the receptive fields of the positions with the highest values of a map (paper, Fig. 2D).

    Args:
        model, layer: the model and layer that the map was computed from.
        inputs: the images ``(N, C, H, W)``.
        maps: ``(N, h, w)`` or ``(N, 1, h, w)`` concept map or sensitivity of one concept.
        k: maximum number of crops, strongest first; positions where the map is NaN have none.
        lowest: use the lowest values instead.
        per_image: maximum number of crops per image.
        share: None crops the whole :func:`receptive_field`, which is nearly the whole image at deep layers; a value
            such as 0.9 crops the :func:`effective_receptive_field`.
        layout, prefix_tokens: as in :func:`receptive_field`.

    Raises:
        InputError: the maps do not match the images, or the grid of the layer.
    """
    images = check_images(inputs)[0]
    if not isinstance(maps, Tensor):
        raise InputError(f"maps must be a torch.Tensor (N, h, w) or (N, 1, h, w), got {type(maps).__name__}")
    flat = maps.squeeze(1) if maps.ndim == 4 and maps.shape[1] == 1 else maps
    if flat.ndim != 3 or len(flat) != len(images):
        raise InputError(
            f"maps must be ({len(images)}, h, w) or ({len(images)}, 1, h, w), for one concept, got {tuple(maps.shape)}"
        )
    integer("k", k)
    integer("per_image", per_image)
    resolved = Layers.resolve(model, layer, layout=layout, prefix_tokens=prefix_tokens)
    with torch.no_grad():
        grid = resolved.run(images[:1]).layouts[0].grid
    if tuple(flat.shape[1:]) != tuple(grid):  # a position would stand for other pixels
        raise InputError(
            f"maps have {flat.shape[1]} x {flat.shape[2]} positions, but layer {resolved.names[0]!r} has "
            f"{grid[0]} x {grid[1]}; pass the layer that the maps were computed from, and maps that are not resized"
        )
    width = flat.shape[2]
    values = flat.detach().flatten(1).float()
    values = (-values if lowest else values).nan_to_num(nan=-torch.inf)
    best, where = values.topk(min(per_image, values.shape[1]), 1)
    order = best.flatten().argsort(descending=True, stable=True)[:k].tolist()
    known: dict[tuple[int, int], ReceptiveField] = {}
    size = (images.shape[2], images.shape[3])
    crops = []
    for index in order:
        example, rank = divmod(index, best.shape[1])
        position = divmod(int(where[example, rank]), width)
        value = float(flat[example, position[0], position[1]])
        if math.isnan(value):
            continue
        if share is not None:
            field = effective_receptive_field(
                model, layer, images[example], position, share=share, layout=layout, prefix_tokens=prefix_tokens
            )
        elif position in known:
            field = known[position]
        else:
            known[position] = receptive_field(
                model, layer, size, position, channels=images.shape[1], layout=layout, prefix_tokens=prefix_tokens
            )
            field = known[position]
        crops.append(Crop(field.crop(images[example]), example, position, value, field))
    return crops


def _inside(position: tuple[int, int], grid: tuple[int, int], name: str) -> tuple[int, int]:
    try:
        row, column = (operator.index(place) for place in position)
    except (TypeError, ValueError) as error:
        raise InputError(f"position must be (row, column), two integers, got {position!r}") from error
    h, w = grid
    if not (-h <= row < h and -w <= column < w):
        raise InputError(f"position {tuple(position)} is outside the {h} x {w} grid of layer {name!r}")
    return row % h, column % w
