"""Points, boxes and masks in pixels, as the share of each pixel and of each cell that they cover."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_concepts.errors import InputError

Size = tuple[int, int]


def region_mask(
    n: int, image_size: Size, grid: Size, *, points: Any = None, boxes: Any = None, mask: Any = None
) -> Tensor:
    """``(N, H, W)``: how much of each pixel belongs to the region, 0 to 1; all of it where no region is given.

    Pixel ``(x, y)``, column and row, covers ``[x, x+1) x [y, y+1)``.

    Args:
        n: images.
        image_size: ``(H, W)``.
        grid: of the concept maps.
        points: ``(x, y)``; each stands for the cell of the grid that holds it.
        boxes: ``(x0, y0, x1, y1)``, the borders; cut off at the image's.
        mask: ``(H, W)`` or one an image; True, or a share in [0, 1].

    Raises:
        InputError: two kinds at once, another shape, not finite, outside of the image, or empty.
    """
    given = {name: value for name, value in (("points", points), ("boxes", boxes), ("mask", mask)) if value is not None}
    if len(given) > 1:
        raise InputError(f"give a region as points, boxes or mask, not as {' and '.join(given)}")
    if points is not None:
        return _union([_cells(own, image_size, grid) for own in _each(points, n, 2, "points")], n, image_size)
    if boxes is not None:
        return _union([_cut(own, image_size) for own in _each(boxes, n, 4, "boxes")], n, image_size)
    if mask is not None:
        return _mask(mask, n, image_size)
    return torch.ones(n, *image_size)


def pooled_upsampling(mask: Tensor, grid: Size) -> Tensor:
    """Weights ``(N, h, w)`` whose sum over a map is the sum of the enlarged map under the mask.

    Bilinear enlarging is linear, so no map is enlarged: :math:`\\sum_p I_p (Uc)_p = \\sum_{ij} (U^T I)_{ij} c_{ij}`.

    >>> mask, maps = torch.rand(1, 9, 8), torch.rand(1, 3, 2)
    >>> large = F.interpolate(maps[None], (9, 8), mode="bilinear")[0]
    >>> torch.allclose((pooled_upsampling(mask, (3, 2)) * maps).sum(), (mask * large).sum())
    True
    """
    rows, columns = (_upsampling(cells, side).to(mask) for cells, side in zip(grid, mask.shape[-2:], strict=True))
    return rows.T @ mask @ columns


def coverage(mask: Tensor, grid: Size) -> Tensor:
    """``(N, h, w)``: the share of each cell that the mask covers; their mean is the share of the image.

    >>> coverage(torch.ones(1, 5, 5), (2, 3)).unique()
    tensor([1.])
    """
    rows, columns = (_overlap(cells, side).to(mask) for cells, side in zip(grid, mask.shape[-2:], strict=True))
    return rows @ mask @ columns.T


def _upsampling(cells: int, side: int) -> Tensor:
    """``(side, cells)``: linear interpolation as ``F.interpolate`` does it."""
    return F.interpolate(torch.eye(cells)[None], side, mode="linear", align_corners=False)[0].T


def _overlap(cells: int, side: int) -> Tensor:
    """``(cells, side)``: the share of each cell that each pixel fills."""
    borders = torch.arange(cells + 1, dtype=torch.float64) * side / cells
    return torch.stack([_span(a, b, side) for a, b in pairwise(borders)]).float() * cells / side


def _span(start: Any, stop: Any, side: int) -> Tensor:
    """How much of each of ``side`` pixels lies between two borders."""
    pixel = torch.arange(side, dtype=torch.float64)
    return (torch.clamp(pixel + 1, max=float(stop)) - torch.clamp(pixel, min=float(start))).clamp(0, 1)


def _each(values: Any, n: int, width: int, name: str) -> list[Tensor]:
    """One ``(P, width)`` tensor for each image, or a single one for all."""
    form = "(x, y)" if width == 2 else "(x0, y0, x1, y1)"
    try:
        if isinstance(values, Sequence) and any(isinstance(v, (Tensor, np.ndarray)) for v in values):
            values = [np.asarray(v.tolist() if isinstance(v, Tensor) else v, dtype=np.float64) for v in values]
            found = [torch.as_tensor(v, dtype=torch.float64) for v in values]
            found = [torch.stack(found)] if len({v.shape for v in found}) == 1 else found
        else:
            values = values.cpu() if isinstance(values, Tensor) else values  # not every device has doubles
            found = [torch.as_tensor(values, dtype=torch.float64)]
    except (TypeError, ValueError, RuntimeError) as error:
        try:  # another number for each image
            found = [torch.as_tensor(own, dtype=torch.float64) for own in values]
        except (TypeError, ValueError, RuntimeError):
            raise InputError(f"{name} must be numbers {form}, got {values!r}") from error
    if len(found) == 1:
        whole = found[0]
        whole = whole[None] if whole.ndim == 1 else whole
        found = list(whole) if whole.ndim == 3 else [whole]
        per_image = whole.ndim == 3
    else:
        per_image = True
    if any(own.ndim != 2 or own.shape[1] != width for own in found):
        shapes = sorted({tuple(own.shape) for own in found})
        raise InputError(f"{name} must be {form}, a list of them, or such a list for each image; got shapes {shapes}")
    if per_image and len(found) != n:
        raise InputError(f"{name} are given for {len(found)} images, but there are {n}")
    if any(not len(own) for own in found):
        raise InputError(f"the region is empty: there are no {name}")
    if any(not bool(own.isfinite().all()) for own in found):
        raise InputError(f"{name} must be finite, got {[own.tolist() for own in found]}")
    return found


def _cells(points: Tensor, image_size: Size, grid: Size) -> Tensor:
    """The border of the cell around each point, as boxes."""
    height, width = image_size
    sides = torch.tensor([width, height], dtype=torch.float64)
    outside = ((points < 0) | (points >= sides)).any(1)
    if outside.any():
        raise InputError(
            f"point {tuple(points[outside][0].tolist())} lies outside of the image: x (column) must be in "
            f"[0, {width}), y (row) in [0, {height})"
        )
    step = sides / torch.tensor([grid[1], grid[0]], dtype=torch.float64)
    first = (points / step).floor()
    return torch.cat([first * step, (first + 1) * step], 1)


def _cut(boxes: Tensor, image_size: Size) -> Tensor:
    height, width = image_size
    for x0, y0, x1, y1 in boxes.tolist():
        if x1 <= x0 or y1 <= y0:
            raise InputError(f"box {(x0, y0, x1, y1)} is empty: give (x0, y0, x1, y1) with x0 < x1 and y0 < y1")
        if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
            raise InputError(
                f"box {(x0, y0, x1, y1)} lies outside of the image, which is {width} wide and {height} high"
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
    found = torch.stack(masks)
    return found.expand(n, -1, -1) if len(found) == 1 else found


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
            f"mask must have the size of the image, {image_size}, or be one for each of {n} images; got {shape}"
        )
    if given.is_floating_point():
        if not bool(((given >= 0) & (given <= 1)).all()):
            raise InputError("a floating-point mask must lie in [0, 1]; give a boolean one, or scale it")
        given = given.float()
    else:
        given = (given != 0).float()
    empty = (given.sum((1, 2)) == 0).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"the region is empty: no pixel of the mask is set (image {empty[0]})")
    return given.expand(n, -1, -1)
