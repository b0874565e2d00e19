"""Outlines of regions that are given as boxes, points or masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_concepts.errors import InputError

#: ``(x0, y0, x1, y1)`` in pixels, the ends of a line or the borders of a box.
Box = tuple[float, float, float, float]


def per_image(values: Any, n: int, width: int, name: str) -> list[list[tuple[float, ...]]]:
    """Rows of ``width`` numbers for each of n images: a single row for all, a row per image, or a list per image.

    For a single image, a list of several rows is accepted.

    >>> per_image((1, 2), 2, 2, "points"), per_image([[(1, 2)], [(3, 4), (5, 6)]], 2, 2, "points")
    ([[(1.0, 2.0)], [(1.0, 2.0)]], [[(1.0, 2.0)], [(3.0, 4.0), (5.0, 6.0)]])
    """
    message = f"{name} must be {width} numbers, or {width} numbers or a list of such rows for each of the {n} images"
    plain = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(plain, Sequence) or isinstance(plain, str) or not plain:
        raise InputError(f"{message}; got {values!r}"[:400])
    plain = [v.tolist() if hasattr(v, "tolist") else v for v in plain]

    def row(value: Any) -> tuple[float, ...]:
        try:
            numbers = tuple(float(v) for v in value)
        except (TypeError, ValueError):
            numbers = ()
        if len(numbers) != width or not bool(torch.tensor(numbers).isfinite().all()):
            raise InputError(f"{message}; got {value!r}"[:400])
        return numbers

    if not isinstance(plain[0], Sequence):
        return [[row(plain)] for _ in range(n)]
    if not (plain[0] and isinstance(plain[0][0], Sequence)):
        rows = [row(value) for value in plain]
        if n == 1:
            return [rows]
        plain = [[value] for value in rows]
    if len(plain) != n:
        raise InputError(f"{name} were passed for {len(plain)} images, but there are {n}")
    return [[row(value) for value in own] for own in plain]


def outlines(
    sizes: Sequence[tuple[int, int]], grid: tuple[int, int], points: Any = None, boxes: Any = None, mask: Any = None
) -> list[list[Box]]:
    """For each image, the lines around its region; empty without a region.

    Args:
        sizes: ``(H, W)`` of each image.
        grid: ``(h, w)`` of the maps; a point selects the position that contains it.
        points, boxes, mask: as in ``SALFCBM.explain_region``, at most one of them.

    Raises:
        InputError: more than one of them, or an invalid form or size.

    >>> outlines([(8, 8)], (2, 2), points=(1, 6))
    [[(0.0, 4.0, 4.0, 4.0), (0.0, 8.0, 4.0, 8.0), (0.0, 4.0, 0.0, 8.0), (4.0, 4.0, 4.0, 8.0)]]
    """
    given = [name for name, value in (("points", points), ("boxes", boxes), ("mask", mask)) if value is not None]
    if len(given) > 1:
        raise InputError(f"pass a region as points, boxes or mask, not as {' and '.join(given)}")
    n = len(sizes)
    if points is not None:
        found = []
        for (height, width), own in zip(sizes, per_image(points, n, 2, "points"), strict=True):
            dx, dy = width / grid[1], height / grid[0]
            cells = [(x // dx * dx, y // dy * dy) for x, y in own]
            found.append([line for x, y in cells for line in frame((x, y, x + dx, y + dy))])
        return found
    if boxes is not None:
        return [[line for x0, y0, x1, y1 in own for line in frame((x0, y0, x1, y1))]
                for own in per_image(boxes, n, 4, "boxes")]  # fmt: skip
    if mask is None:
        return [[] for _ in range(n)]
    flags = torch.as_tensor(mask).detach().cpu()
    flags = flags[:, 0] if flags.ndim == 4 and flags.shape[1] == 1 else flags
    flags = flags[None] if flags.ndim == 2 else flags
    if flags.ndim != 3 or len(flags) not in (1, n) or any(tuple(flags.shape[1:]) != tuple(size) for size in sizes):
        raise InputError(f"mask must be (H, W) or (N, H, W) of the images' size {sizes[0]}, got {tuple(flags.shape)}")
    return [edges(flag > 0.5 if flag.is_floating_point() else flag != 0) for flag in flags.expand(n, -1, -1)]


def frame(box: Box) -> list[Box]:
    """The four sides of a box."""
    x0, y0, x1, y1 = box
    return [(x0, y0, x1, y0), (x0, y1, x1, y1), (x0, y0, x0, y1), (x1, y0, x1, y1)]


def edges(mask: Tensor) -> list[Box]:
    """Border of a mask, as horizontal and vertical lines."""
    padded = torch.nn.functional.pad(mask, (1, 1, 1, 1))
    lines: list[Box] = []
    for y, start, stop in _runs(padded[1:, 1:-1] != padded[:-1, 1:-1]):
        lines.append((start, y, stop, y))
    for x, start, stop in _runs((padded[1:-1, 1:] != padded[1:-1, :-1]).T):
        lines.append((x, start, x, stop))
    return lines


def _runs(flags: Tensor) -> list[tuple[int, int, int]]:
    """``(row, start, stop)`` of every run of True in the rows."""
    change = torch.diff(torch.nn.functional.pad(flags.int(), (1, 1)), dim=1)
    starts, stops = (change == 1).nonzero().tolist(), (change == -1).nonzero().tolist()
    return [(row, a, b) for (row, a), (_, b) in zip(starts, stops, strict=True)]
