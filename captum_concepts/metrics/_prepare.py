"""Checks and resizing shared by all metrics, which define what a map, a mask and an ignored pixel are."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_concepts.errors import InputError, InputWarning

MODES = ("bilinear", "bicubic", "nearest", "nearest-exact", "area")
NAN_POLICIES = ("omit", "raise", "propagate", "zero")
#: Label of unknown pixels in VOC, ADE20K, Cityscapes and others.
_VOID = 255

# One 224 x 224 map has 2**15.6 pixels. On a CPU, larger working sets miss the cache and new pages cost more than the
# arithmetic; an accelerator needs large chunks.
_CPU_PIXELS = 1 << 16
_ACCELERATOR_PIXELS = 1 << 23


@dataclass(frozen=True)
class Chunk:
    """Some maps at mask resolution, flattened: ``values`` and ``masks`` are ``(B, P)``, P = H * W pixels."""

    values: Tensor
    masks: Tensor
    ignore: Tensor | None
    broken: Tensor

    @property
    def valid(self) -> Tensor:
        """``(B, P)`` pixels that are not ignored."""
        return torch.ones_like(self.masks) if self.ignore is None else ~self.ignore


@dataclass(frozen=True)
class Pairs:
    """Checked maps and masks, one map per row: ``maps`` (R, h, w), ``masks`` and ``ignore`` (R, H, W)."""

    maps: Tensor
    masks: Tensor
    ignore: Tensor | None
    mode: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """float64 for float64 maps, else float32; half precision is never reduced in half precision."""
        return torch.float64 if self.maps.dtype == torch.float64 else torch.float32

    def __len__(self) -> int:
        return self.masks.shape[0]

    def chunks(self, map_rows: Tensor | None = None, mask_rows: Tensor | None = None) -> Iterator[Chunk]:
        """Rows at mask resolution, a bounded number of pixels at a time; by default row i of both maps and masks."""
        pixels = self.masks.shape[1] * self.masks.shape[2]
        budget = _CPU_PIXELS if self.masks.device.type == "cpu" else _ACCELERATOR_PIXELS
        step = max(1, budget // pixels)
        n = len(self) if mask_rows is None else len(mask_rows)
        for start in range(0, n, step):
            maps = _take(self.maps, map_rows, start, step)
            masks = _take(self.masks, mask_rows, start, step)
            ignore = None if self.ignore is None else _take(self.ignore, mask_rows, start, step).flatten(1)
            values = resize_maps(maps, masks.shape[-2:], mode=self.mode).flatten(1)
            masks = masks.flatten(1)
            if ignore is None:
                on_cpu = values.device.type == "cpu"  # NumPy's loop does not wait for threads
                top = torch.from_numpy(values.numpy().max(1)) if on_cpu else values.amax(1)
                broken = top.isnan()
            else:
                broken, masks = (values.isnan() & ~ignore).any(1), masks & ~ignore
            yield Chunk(values, masks, ignore, broken)

    def per_row(self, function: Callable[[Chunk], Tensor], *width: int) -> Tensor:
        """``(*shape, *width)`` results of ``function``, which returns ``(B, *width)`` for each chunk.

        They are preallocated, as small tensors that outlive the chunks' large ones would fragment the memory.
        """
        out = torch.empty(len(self), *width, dtype=self.dtype, device=self.masks.device)
        start = 0
        for chunk in self.chunks():
            stop = start + len(chunk.masks)
            out[start:stop] = function(chunk)
            start = stop
        return out.reshape(*self.shape, *width)


def _take(x: Tensor, rows: Tensor | None, start: int, step: int) -> Tensor:
    return x[start : start + step] if rows is None else x[rows[start : start + step]]


def resize_maps(maps: Tensor, size: tuple[int, int] | torch.Size, *, mode: str = "bilinear") -> Tensor:
    """Maps ``(N, h, w)`` resized to ``size``, in float32 (float64 stays), ``align_corners=False``, no antialiasing.

    A map that already has this size is returned unchanged, and a constant map stays exactly constant.
    """
    if mode not in MODES:
        raise InputError(f"mode must be one of {MODES}, got {mode!r}")
    check_size(size)
    if not isinstance(maps, Tensor):
        raise InputError(f"maps must be a torch.Tensor (N, h, w), got {type(maps).__name__}")
    if maps.dtype != torch.float64:
        maps = maps.float()
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    corners = {"align_corners": False} if mode in ("bilinear", "bicubic") else {}
    resized = F.interpolate(maps[:, None], size=tuple(size), mode=mode, **corners)[:, 0]
    level = maps.flatten(1)[:, :1]
    constant = (maps.flatten(1) == level).all(1)
    if bool(constant.any()):  # a pixel's weights add up to 1 only up to rounding, which would leave a pattern
        resized = torch.where(constant[:, None, None], level[:, :, None], resized)
    return resized


def min_max(values: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows scaled to [0, 1], and which rows are constant and become 0."""
    low = (values if valid is None else values.masked_fill(~valid, math.inf)).amin(-1, keepdim=True)
    high = (values if valid is None else values.masked_fill(~valid, -math.inf)).amax(-1, keepdim=True)
    constant = ~(high > low)
    spread = high - low
    if bool((spread.isinf() & high.isfinite() & low.isfinite()).any()):  # the range of finite values overflows
        values, low, spread = values / 2, low / 2, high / 2 - low / 2
    scaled = (values - low) / spread.masked_fill(constant, 1)
    return scaled.masked_fill(constant, 0), constant[..., 0]


def check_size(size: Any) -> None:
    """Raise an ``InputError`` for anything but two positive integers."""
    try:
        sides = [operator.index(n) for n in size]
    except TypeError:
        sides = []
    if len(sides) != 2 or min(sides) < 1:
        raise InputError(f"size must be (H, W), two positive integers, got {size!r}")


def check_maps(maps: Tensor, name: str = "maps") -> Tensor:
    """``maps``, detached and converted to floating point."""
    if not isinstance(maps, Tensor):
        raise InputError(f"{name} must be a torch.Tensor (N, h, w) or (N, T, h, w), got {type(maps).__name__}")
    if maps.ndim not in (3, 4) or 0 in maps.shape[-2:]:
        raise InputError(f"{name} must be (N, h, w), (N, 1, h, w) or (N, T, h, w), got {tuple(maps.shape)}")
    if maps.is_complex():
        raise InputError(f"{name} must contain real numbers, got {maps.dtype}")
    maps = maps.detach()
    return maps if maps.is_floating_point() else at_least_single(maps)


def at_least_single(values: Tensor) -> Tensor:
    """``values`` in float32, or in float64 if they have it or are integers that float32 would merge."""
    wide = values.dtype in (torch.float64, torch.int32, torch.int64)
    return values.to(torch.float64 if wide else torch.float32)


def prepare(
    maps: Tensor,
    masks: Tensor,
    *,
    ignore: Tensor | None = None,
    ignore_index: int | None = None,
    mode: str = "bilinear",
) -> Pairs:
    """Maps and masks, checked against each other and paired row by row.

    Args:
        maps: ``(N, h, w)`` or ``(N, 1, h, w)``; ``(N, T, h, w)`` where masks are ``(N, T, H, W)``.
        masks: ``(N, H, W)`` or ``(N, T, H, W)``: bool, integers (not 0 is the region) or floats (above 0.5).
            The T regions of an example may overlap.
        ignore: bool, the shape of ``masks`` or ``(N, H, W)``: pixels that the metric leaves out.
        ignore_index: the value in integer ``masks`` that marks such pixels.
        mode: how maps are resized to the masks, see :func:`resize_maps`.

    Raises:
        InputError: anything else.

    Warns:
        InputWarning: integer masks contain 255 next to other labels, and no ``ignore_index`` was passed.
    """
    if mode not in MODES:
        raise InputError(f"mode must be one of {MODES}, got {mode!r}")
    maps = check_maps(maps)
    if not isinstance(masks, Tensor):
        raise InputError(f"masks must be a torch.Tensor (N, H, W) or (N, T, H, W), got {type(masks).__name__}")
    if masks.ndim not in (3, 4) or 0 in masks.shape[-2:]:
        raise InputError(f"masks must be (N, H, W) or (N, T, H, W), got {tuple(masks.shape)}")
    lead = tuple(masks.shape[:-2])
    fits = [lead] + [(lead[0], 1)] * (len(lead) == 1) + [lead[:1]] * (len(lead) == 2 and lead[1] == 1)
    if tuple(maps.shape[:-2]) not in fits:
        wanted = " or ".join(str((*f, "h", "w")).replace("'", "") for f in fits)
        raise InputError(
            f"maps {tuple(maps.shape)} do not match masks {tuple(masks.shape)}; pass maps {wanted}, one map per mask"
        )
    if maps.device != masks.device:
        raise InputError(f"maps are on {maps.device} but masks on {masks.device}; move one to the other")
    regions, ignored = _regions(masks.detach(), ignore_index)
    if ignore is not None:
        given = _check_ignore(ignore, masks)
        ignored = given if ignored is None else ignored | given
    size = masks.shape[-2:]
    return Pairs(
        maps.reshape(-1, *maps.shape[-2:]),
        regions.reshape(-1, *size),
        None if ignored is None else ignored.reshape(-1, *size),
        mode,
        lead,
    )


def _regions(masks: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor | None]:
    if masks.dtype == torch.bool:
        if ignore_index is not None:
            raise InputError("ignore_index requires integer masks; for bool masks pass ignore=, a bool tensor")
        return masks, None
    if masks.is_complex():
        raise InputError(f"masks must be bool, integer or float, got {masks.dtype}")
    if str(masks.dtype) in ("torch.uint16", "torch.uint32", "torch.uint64"):
        raise InputError(f"torch cannot compare {masks.dtype}; pass masks.long()")
    if masks.is_floating_point():
        if ignore_index is not None:
            raise InputError(f"ignore_index requires integer masks, got {masks.dtype}; pass ignore= instead")
        if bool(masks.isnan().any()):
            raise InputError("masks contain NaN; mark pixels of unknown label with ignore=, a bool tensor")
        return masks > 0.5, None
    ignored = None if ignore_index is None else masks == ignore_index
    negative = masks < 0 if ignored is None else (masks < 0) & ~ignored
    if bool(negative.any()):
        raise InputError(
            f"masks contain negative labels (least {int(masks.min())}); if they mark pixels of unknown label, "
            "pass ignore_index="
        )
    regions = masks != 0
    if ignore_index is None and bool((void := masks == _VOID).any()) and bool((regions & ~void).any()):
        warnings.warn(
            f"integer masks contain {_VOID} next to other labels: many data sets mark unknown pixels this way, but "
            f"without ignore_index={_VOID} it counts as the region, like every label except 0; pass ignore_index=, or "
            "bool masks",
            InputWarning,
            stacklevel=4,
        )
    return regions, ignored


def _check_ignore(ignore: Tensor, masks: Tensor) -> Tensor:
    if not isinstance(ignore, Tensor) or ignore.dtype != torch.bool:
        kind = str(ignore.dtype) if isinstance(ignore, Tensor) else type(ignore).__name__
        raise InputError(f"ignore must be a bool torch.Tensor (True: leave the pixel out), got {kind}")
    if ignore.shape == (len(masks), *masks.shape[2:]):
        ignore = ignore[:, None].expand(masks.shape)
    if ignore.shape != masks.shape:
        raise InputError(f"ignore {tuple(ignore.shape)} does not fit masks {tuple(masks.shape)}")
    if ignore.device != masks.device:
        raise InputError(f"ignore is on {ignore.device} but masks on {masks.device}")
    return ignore


def check_nan_policy(nan_policy: str) -> None:
    """Raise an ``InputError`` for anything but one of ``NAN_POLICIES``."""
    if nan_policy not in NAN_POLICIES:
        raise InputError(f"nan_policy must be one of {NAN_POLICIES}, got {nan_policy!r}")


def settle(values: Tensor, nan_policy: str, what: str) -> Tensor:
    """Per-example values after ``nan_policy``, ready for a mean; ``omit`` returns fewer values."""
    check_nan_policy(nan_policy)
    undefined = values.isnan()
    n = int(undefined.sum())
    if nan_policy == "zero":
        return values.masked_fill(undefined, 0)
    if n and nan_policy == "raise":
        raise InputError(f"{n} of {values.numel()} values of {what} are undefined (NaN map, empty or full mask)")
    if n and nan_policy == "omit":
        message = f"{n} of {values.numel()} values of {what} are undefined (NaN map, empty or full mask): left out"
        warnings.warn(message, InputWarning, stacklevel=3)
        return values[~undefined]
    return values
