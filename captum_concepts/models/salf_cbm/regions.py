"""The fraction of each pixel and grid cell covered by points, boxes and masks in pixels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_concepts.errors import InputError, shortened

Size = tuple[int, int]
_FORMS = {"points": "(x, y)", "boxes": "(x0, y0, x1, y1)"}
#: How far a box may cross the border, in pixels, because detectors round outwards.
_MARGIN = 1.0


def region_mask(
    n: int, image_size: Size, grid: Size, *, points: Any = None, boxes: Any = None, mask: Any = None
) -> Tensor:
    """``(N, H, W)``: the fraction of each pixel in the region; the whole image if no region is passed.

    Pixel ``(x, y)``, column and row, covers ``[x, x+1) x [y, y+1)``.

    Args:
        n: images.
        image_size: ``(H, W)``.
        grid: of the concept maps.
        points: ``(x, y)``; each selects the grid cell that contains it.
        boxes: ``(x0, y0, x1, y1)``, the borders.
        mask: ``(H, W)`` or one per image; bool, or fractions in [0, 1].

    Points and boxes are one for all images; ``(N, 2)`` or ``(N, 4)``, one per image; or ``(N, P, 2)`` or a list of N
    lists, several per image. For a single image, a list of several is accepted.

    Raises:
        InputError: two kinds at once, wrong shape, not finite, outside the image, in fractions of its size, or empty.
    """
    given = {name: value for name, value in (("points", points), ("boxes", boxes), ("mask", mask)) if value is not None}
    if len(given) > 1:
        raise InputError(f"pass a region as points, boxes or mask, not as {' and '.join(given)}")
    if points is not None:
        return _union([_cells(own, image_size, grid) for own in _each(points, n, "points")], n, image_size)
    if boxes is not None:
        return _union([_checked_boxes(own, image_size) for own in _each(boxes, n, "boxes")], n, image_size)
    if mask is not None:
        return _mask(mask, n, image_size)
    return torch.ones(n, *image_size)


def pooled_upsampling(mask: Tensor, grid: Size) -> Tensor:
    """Weights ``(N, h, w)`` for which the weighted sum of a map is the sum of the upsampled map under the mask.

    Bilinear upsampling is linear, so no map is upsampled: :math:`\\sum_p I_p (Uc)_p = \\sum_{ij} (U^T I)_{ij} c_{ij}`.

    >>> mask, maps = torch.rand(1, 9, 8), torch.rand(1, 3, 2)
    >>> large = F.interpolate(maps[None], (9, 8), mode="bilinear")[0]
    >>> torch.allclose((pooled_upsampling(mask, (3, 2)) * maps).sum(), (mask * large).sum())
    True
    """
    rows, columns = (_upsampling(cells, side).to(mask) for cells, side in zip(grid, mask.shape[-2:], strict=True))
    return rows.T @ mask @ columns


def coverage(mask: Tensor, grid: Size) -> Tensor:
    """``(N, h, w)``: the fraction of each cell that the mask covers; their mean is the fraction of the image.

    >>> coverage(torch.ones(1, 5, 5), (2, 3)).unique()
    tensor([1.])
    """
    rows, columns = (_overlap(cells, side).to(mask) for cells, side in zip(grid, mask.shape[-2:], strict=True))
    return rows @ mask @ columns.T


def _upsampling(cells: int, side: int) -> Tensor:
    """``(side, cells)``: the matrix of linear interpolation by ``F.interpolate``."""
    return F.interpolate(torch.eye(cells)[None], side, mode="linear", align_corners=False)[0].T


def _overlap(cells: int, side: int) -> Tensor:
    """``(cells, side)``: the fraction of each cell that each pixel covers."""
    borders = torch.arange(cells + 1, dtype=torch.float64) * side / cells
    return torch.stack([_span(a, b, side) for a, b in pairwise(borders)]).float() * cells / side


def _span(start: Any, stop: Any, side: int) -> Tensor:
    """The fraction of each of ``side`` pixels that lies between two borders."""
    pixel = torch.arange(side, dtype=torch.float64)
    return (torch.clamp(pixel + 1, max=float(stop)) - torch.clamp(pixel, min=float(start))).clamp(0, 1)


def _each(values: Any, n: int, name: str) -> list[Tensor]:
    """One ``(P, 2 or 4)`` tensor per image, or a single one for all images."""
    width, form = (2, _FORMS[name]) if name == "points" else (4, _FORMS[name])
    parts = _numbers(values, name)
    if isinstance(parts, Tensor):
        if parts.ndim not in (1, 2, 3):
            raise InputError(f"{name} must be {form}, or a list of them, got the shape {tuple(parts.shape)}")
        if parts.ndim == 1:
            each = [parts[None]]
        elif parts.ndim == 3 or n == 1:
            each = list(parts) if parts.ndim == 3 else [parts]
        else:
            if parts.ndim == 2 and len(parts) != n:
                raise InputError(
                    f"{len(parts)} {name} were passed for {n} images; pass one for all, one per image, or a list per "
                    f"image: [[{form}, ...], ...]"
                )
            each = list(parts[:, None])
    else:
        each = parts
    if any(own.ndim != 2 or own.shape[1] != width for own in each):
        shapes = sorted({tuple(own.shape) for own in each})
        raise InputError(f"{name} must be {form}, one per image, or a list of them per image; got shapes {shapes}")
    if len(each) != n and not (len(each) == 1 and isinstance(parts, Tensor) and parts.ndim == 1):
        raise InputError(f"{name} were passed for {len(each)} images, but there are {n}")
    if any(not len(own) for own in each):
        raise InputError(f"the region is empty: there are no {name}")
    if any(not bool(own.isfinite().all()) for own in each):
        raise InputError(f"{name} must be finite, got {shortened([own.tolist() for own in each])}")
    return each


def _numbers(values: Any, name: str) -> Tensor | list[Tensor]:
    """One tensor, or one per image if their numbers of points or boxes differ."""
    if isinstance(values, Tensor):
        return values.detach().cpu().double()
    try:
        if isinstance(values, Sequence) and any(isinstance(v, (Tensor, np.ndarray)) for v in values):
            values = [np.asarray(v.tolist() if isinstance(v, Tensor) else v, dtype=np.float64) for v in values]
            alike = len({v.shape for v in values}) == 1
            each = [torch.as_tensor(v) for v in values]
            return torch.stack(each) if alike else each
        return torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        try:
            return [torch.as_tensor(own, dtype=torch.float64) for own in values]
        except (TypeError, ValueError, RuntimeError):
            raise InputError(f"{name} must be numbers {_FORMS[name]}, got {shortened(values)}") from error


def _cells(points: Tensor, image_size: Size, grid: Size) -> Tensor:
    """The cell around each point, as boxes."""
    height, width = image_size
    sides = torch.tensor([width, height], dtype=torch.float64)
    outside = ((points < 0) | (points >= sides)).any(1)
    if outside.any():
        raise InputError(
            f"point {tuple(points[outside][0].tolist())} is outside of the image: x (column) must be in [0, {width}), "
            f"y (row) in [0, {height})"
        )
    if bool((points <= 1).all()) and bool((points != points.round()).any()) and max(image_size) > 1:
        raise InputError(
            f"points {shortened(points.tolist())} look like fractions of the image; they are pixels: multiply x by "
            f"{width} and y by {height}"
        )
    step = sides / torch.tensor([grid[1], grid[0]], dtype=torch.float64)
    first = (points / step).floor()
    return torch.cat([first * step, (first + 1) * step], 1)


def _checked_boxes(boxes: Tensor, image_size: Size) -> Tensor:
    height, width = image_size
    for box in boxes.tolist():
        x0, y0, x1, y1 = box
        if x1 <= x0 or y1 <= y0:
            raise InputError(f"box {tuple(box)} is empty: pass (x0, y0, x1, y1) with x0 < x1 and y0 < y1")
        beyond = max(-x0, -y0, x1 - width, y1 - height)
        if beyond > _MARGIN or x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
            raise InputError(
                f"box {tuple(box)} extends outside of the image, which is {width} wide and {height} high; boxes are "
                "in pixels of the model's input, so scale a box of the original photograph"
            )
    if bool(((boxes >= 0) & (boxes <= 1)).all()) and max(image_size) > 1:
        raise InputError(
            f"boxes {shortened(boxes.tolist())} look like fractions of the image; they are pixels: multiply x by "
            f"{width} and y by {height}"
        )
    return boxes


def _union(regions: list[Tensor], n: int, image_size: Size) -> Tensor:
    height, width = image_size
    masks = []
    for boxes in regions:
        mask = torch.zeros(image_size)
        for x0, y0, x1, y1 in boxes.tolist():
            mask = torch.maximum(mask, torch.outer(_span(y0, y1, height), _span(x0, x1, width)).float())
        masks.append(mask)
    together = torch.stack(masks)
    return together.expand(n, -1, -1) if len(together) == 1 else together


def _mask(mask: Any, n: int, image_size: Size) -> Tensor:
    try:
        given = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"mask must be an array (H, W), got {type(mask).__name__}") from error
    shape = tuple(given.shape)
    if given.ndim == 4 and shape[1] == 1:
        given = given[:, 0]
    if given.ndim == 2:
        given = given[None]
    if given.ndim != 3 or len(given) not in (1, n) or tuple(given.shape[1:]) != image_size:
        raise InputError(
            f"mask must have the size of the image, {image_size}, or be one mask for each of {n} images; got {shape}"
        )
    if given.is_floating_point():
        if not bool(((given >= 0) & (given <= 1)).all()):
            raise InputError("a floating-point mask must lie in [0, 1]; pass a boolean one, or scale it")
        given = given.float()
    else:
        given = (given != 0).float()
    empty = (given.sum((1, 2)) == 0).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"the region is empty: no pixel of the mask is set (image {empty[0]})")
    return given.expand(n, -1, -1)
