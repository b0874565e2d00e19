"""IoU of the p most salient pixels with a mask for every p at once, from one integer sort per map; ties are exact."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from captum_concepts.metrics._prepare import Chunk, Pairs

_IGNORED_KEY = 0x7FFFFFFF  # above the key of every number, +inf included
_ROW_BITS = 34  # a 32-bit key, the mask's bit, and a spare
_LONG_GROUP = 512


def all_areas(
    pairs: Pairs, map_rows: Tensor | None = None, mask_rows: Tensor | None = None, *, thresholds: str = "all"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """AUC, mask size, number of pixels, and whether the map has NaN, for every row; see :func:`authors_weights`."""
    device = pairs.masks.device
    n = len(pairs) if mask_rows is None else len(mask_rows)
    home = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    # Preallocated: small tensors that outlive the chunks' large ones would fragment the memory.
    auc = torch.empty(n, dtype=torch.float64, device=home)
    region, pixels = (torch.empty(n, dtype=torch.long, device=home) for _ in range(2))
    broken = torch.empty(n, dtype=torch.bool, device=home)
    work: dict[str, Tensor] = {}
    start = 0
    for chunk in pairs.chunks(map_rows, mask_rows):
        if home != device:
            chunk = Chunk(*(None if x is None else x.cpu() for x in vars(chunk).values()))  # type: ignore[arg-type]
        rows = slice(start, start + len(chunk.masks))
        auc[rows], region[rows], pixels[rows] = _chunk_auc(chunk, work, thresholds)
        broken[rows] = chunk.broken
        start = rows.stop
    return auc, region, pixels, broken


def _chunk_auc(chunk: Chunk, work: dict[str, Tensor], thresholds: str) -> tuple[Tensor, Tensor, Tensor]:
    """AUC, mask size and number of pixels of each row; ``work`` keeps buffers, as allocating costs as much as sorting.

    On a CPU, NumPy runs the long loops: one map is too little work for several threads, and on a busy machine
    synchronizing them takes many times longer than the work itself.
    """
    keys = _sorted_keys(chunk, work)
    p = keys.shape[1]
    if "count" not in work:
        work["count"] = torch.arange(1, p + 1, dtype=torch.float64, device=keys.device)
    bits = _buffer(work, "bits", keys.shape, torch.int64, keys.device)
    inside = _buffer(work, "inside", keys.shape, torch.float64, keys.device)
    iou = _buffer(work, "iou", keys.shape, torch.float64, keys.device)
    if keys.device.type == "cpu":
        count, b, i, u = (x.numpy() for x in (work["count"], bits, inside, iou))
        np.cumsum(np.bitwise_and(keys.numpy(), 1, out=b), axis=1, out=b)
        i[...] = b
        np.subtract(count, i, out=u)
        u += i[:, -1:]  # the union, M + p - intersection
        np.divide(i, u, out=u)
    else:
        torch.cumsum(torch.bitwise_and(keys, 1, out=bits), 1, dtype=torch.float64, out=inside)
        torch.sub(work["count"], inside, out=iou).add_(inside[:, -1:])
        torch.div(inside, iou, out=iou)
    region = inside[:, -1].long()
    pixels = torch.full_like(region, p) if chunk.ignore is None else p - chunk.ignore.sum(1)
    _share_ties(iou, keys, inside, region)
    if chunk.ignore is not None:
        iou.masked_fill_(work["count"] > pixels[:, None], 0)
    if thresholds == "authors":
        rows = [iou[i, :count] @ authors_weights(count).to(iou) for i, count in enumerate(pixels.tolist())]
        return torch.stack(rows) if rows else iou.new_zeros(0), region, pixels
    total = torch.from_numpy(iou.numpy().sum(1)) if iou.device.type == "cpu" else iou.sum(1)
    return total / pixels, region, pixels


@lru_cache(maxsize=8)
def authors_weights(pixels: int) -> Tensor:
    """``(pixels,)`` weights of IoU(1), IoU(2), ... in the authors' integral.

    The first hundredth of the pixels have weight 1/P each; from there on, every (P // 100)-th has weight 1/100.

    >>> authors_weights(1000)[[0, 9, 10, 11, 20]]
    tensor([0.0010, 0.0010, 0.0100, 0.0000, 0.0100], dtype=torch.float64)
    """
    step = max(1, pixels // 100)
    at = torch.arange(pixels)
    weights = (at % step == 0).double() / 100
    weights[:step] = 1 / pixels
    return weights


def _buffer(work: dict[str, Tensor], name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    if name not in work or work[name].shape[0] < shape[0]:
        work[name] = torch.empty(shape, dtype=dtype, device=device)
    return work[name][: shape[0]]


def _sorted_keys(chunk: Chunk, work: dict[str, Tensor]) -> Tensor:
    """``(B, P)`` int64, each row sorted: a pixel's rank by descending saliency, times two, plus its mask bit.

    One sort of plain integers replaces a sort with indices and a gather. Floats sort by their bits as integers once
    the bits below the sign of negative ones are flipped.
    """
    values = chunk.values
    if bool(chunk.broken.any()):
        values = values.masked_fill(chunk.broken[:, None], 0)
    keys = _buffer(work, "keys", values.shape, torch.int64, values.device)
    if values.dtype == torch.float64:  # 64 bits leave no room for the mask's bit, so the distinct values are numbered
        ordered, order = torch.sort(values, dim=1, descending=True)
        step = torch.zeros_like(order)
        step[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        keys.scatter_(1, order, step.cumsum(1))
    elif values.device.type == "cpu":
        bits = np.negative(values.numpy())
        bits += np.float32(0)  # turns -0.0 into 0.0
        order32 = bits.view(np.int32)
        flip = order32 >> 31
        flip &= 0x7FFFFFFF
        keys.numpy()[...] = np.bitwise_xor(order32, flip, out=flip)
    else:
        order32 = (-values).add_(0.0).view(torch.int32)
        keys.copy_(order32.bitwise_xor_((order32 >> 31).bitwise_and_(0x7FFFFFFF)))
    if chunk.ignore is not None:
        keys.masked_fill_(chunk.ignore, _IGNORED_KEY)
    if keys.device.type == "cpu":
        k = keys.numpy()
        k <<= 1
        k += chunk.masks.numpy()
    else:
        keys.mul_(2).add_(chunk.masks)
    return _sort_rows(keys)


def _sort_rows(keys: Tensor) -> Tensor:
    if keys.device.type == "cpu":
        keys.numpy().sort(axis=1)  # vectorized, several times faster than torch.sort, which also sorts indices
        return keys
    return torch.sort(keys, dim=1).values


def _share_ties(iou: Tensor, keys: Tensor, inside: Tensor, region: Tensor) -> None:
    """Write the expected IoU in place into every group of equal pixels that lies partly inside the mask.

    In a sorted row, the even (outside) keys of a group come before its odd ones, so neighbors that differ only in the
    last bit mark exactly these groups.
    """
    if keys.device.type == "cpu":
        k = keys.numpy()
        rows, cols = (torch.from_numpy(x) for x in np.nonzero(k[:, 1:] ^ k[:, :-1] == 1))
    else:
        rows, cols = ((keys[:, 1:] ^ keys[:, :-1]) == 1).nonzero(as_tuple=True)
    if not len(rows):
        return
    n, p = keys.shape
    flat = keys
    if n > 1:  # all rows as one sorted sequence
        flat = keys + (torch.arange(n, device=keys.device) << _ROW_BITS)[:, None]
    flat = flat.reshape(-1)
    even = flat[rows * p + cols]
    start = torch.searchsorted(flat, even)
    size = torch.searchsorted(flat, even + 1, right=True) - start
    before = inside.reshape(-1)[start]  # the first pixel of a group is outside the mask
    rate = (inside.reshape(-1)[start + size - 1] - before) / size
    union = (start - rows * p + region[rows]) - before  # before the group's first pixel
    small = torch.ones_like(start, dtype=torch.bool)
    target = iou.view(-1)
    if keys.device.type == "cpu":  # slices beat gathers for a few long groups (the zeros of a ReLU)
        small = size < _LONG_GROUP
        for g in (~small).nonzero()[:, 0].tolist():
            at = torch.arange(1, int(size[g]) + 1, dtype=torch.float64)
            hits = (at * rate[g]).add_(before[g])
            target[int(start[g]) : int(start[g] + size[g])] = hits / at.add_(union[g] + before[g]).sub_(hits)
        start, size, before, rate, union = (x[small] for x in (start, size, before, rate, union))
    group = torch.repeat_interleave(torch.arange(len(start), device=keys.device), size)
    place = torch.arange(1, len(group) + 1, device=keys.device) - (size.cumsum(0) - size)[group]
    hits = before[group] + place * rate[group]
    target[start[group] + place - 1] = hits / (union[group] + before[group] + place - hits)


@lru_cache(maxsize=1 << 16)
def expected_auc(region: int, pixels: int) -> float:
    """Mean over p of the expected IoU of p random pixels with a mask of ``region`` of the ``pixels`` pixels."""
    if not 0 < region <= pixels:
        return 0.0
    count = torch.arange(1, pixels + 1, dtype=torch.float64)
    expected = count * region / pixels
    return float((expected / (count + region - expected)).sum() / pixels)
