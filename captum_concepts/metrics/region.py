"""Region accuracy over all thresholds: normalised region accuracy, hit rate and specificity."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from captum_concepts.errors import InputError
from captum_concepts.metrics._prepare import Chunk, Pairs, prepare, settle

__all__ = ["hit_rate", "nra", "region_auc", "specificity"]

BASELINES = ("published", "exact")
_IGNORED_KEY = 0x7FFFFFFF  # above the key of every number, +inf included
_ROW_BITS = 34  # a 32-bit key, the mask's bit, and a spare
_LONG_GROUP = 512


def nra(
    maps: Tensor,
    masks: Tensor,
    *,
    baseline: str = "published",
    ignore: Tensor | None = None,
    ignore_index: int | None = None,
    mode: str = "bilinear",
) -> Tensor:
    r"""Normalised region accuracy: where a map stands between a random and the ideal order of the pixels.

    .. math::
        \mathrm{NRA} = \frac{\max(\mathrm{AUC} - \mathrm{AUC}_{low},\, 0)}{\mathrm{AUC}_{high} - \mathrm{AUC}_{low}},
        \qquad \mathrm{AUC} = \frac1P \sum_{p=1}^{P} \mathrm{IoU}(p)

    IoU(p) compares the p pixels of highest saliency with the mask of M of the P pixels;
    :math:`\mathrm{AUC}_{high}` is that of the ideal order, the mean of ``min(p, M) / max(p, M)``.

    Range [0, 1], higher is better. It uses only the order of the pixels: any strictly increasing function of the
    map gives the same value.

    Tied pixels share the expected value: inside a group of g equal pixels, m of them in the mask, that starts
    after a pixels with b in the mask, the intersection at p is its expectation under a random order of the
    group, ``E(p) = b + (p - a) * m / g``, and ``IoU(p) = E(p) / (p + M - E(p))``. So nothing depends on how a
    sort breaks ties, and a constant map scores what a random one is expected to.

    Args:
        maps: ``(N, h, w)`` or ``(N, 1, h, w)``; ``(N, T, h, w)`` for masks ``(N, T, H, W)``. Resized to the masks
            by ``mode``, ``align_corners=False``. Of any real dtype; half precision is computed in float32.
        masks: ``(N, H, W)`` or, for several (also overlapping) concepts an image, ``(N, T, H, W)``; bool, integers
            (not 0 is the region) or floats (above 0.5 is the region).
        baseline: :math:`\mathrm{AUC}_{low}`. ``"published"``: the area under the line from 0 to M/P, ``M / 2P``, which
            is comparable with the paper but below what a random map really gets. ``"exact"``: the mean of the
            expected IoU, ``E / (p + M - E)`` with ``E = p M / P``; a constant map then scores exactly 0.
        ignore: bool ``(N, H, W)`` or the shape of ``masks``; pixels left out as if the image did not have them.
        ignore_index: the label in integer ``masks`` of pixels to leave out.
        mode: ``"bilinear"``, ``"bicubic"``, ``"nearest"``, ``"nearest-exact"`` or ``"area"``.

    Returns:
        The shape of ``masks`` without its last two: ``(N,)`` or ``(N, T)``; float32, float64 for float64 maps. NaN
        where it is undefined: a map with NaN, an empty mask (there is nothing to find) or a full one (every
        order is ideal). Infinite values keep their place in the order if the map is not resized.

    Raises:
        InputError: a wrong shape, dtype, device, ``baseline`` or ``mode``.

    Reference: CE-FAM: Concept-Based Explanation via Fusion of Activation Maps, ICCV 2025, arXiv:2509.23849.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[[1, 1, 0], [0, 0, 0]]])
        >>> nra(mask.float(), mask), nra(torch.ones(1, 2, 3), mask, baseline="exact")
        (tensor([1.]), tensor([0.]))
    """
    pairs = prepare(maps, masks, ignore=ignore, ignore_index=ignore_index, mode=mode)
    return _rows(pairs, baseline).to(pairs.dtype).reshape(pairs.shape)


def region_auc(
    maps: Tensor,
    masks: Tensor,
    *,
    ignore: Tensor | None = None,
    ignore_index: int | None = None,
    mode: str = "bilinear",
) -> Tensor:
    """The AUC inside :func:`nra`, not normalised: mean IoU over all area thresholds, in (0, 1], higher is better.

    It is high for any map if the mask is large, which is what NRA corrects. Arguments, ties and errors as there;
    NaN for a map with NaN and for an empty mask.

    Example:
        >>> import torch
        >>> region_auc(torch.tensor([[[2.0, 1.0]]]), torch.tensor([[[True, False]]]))  # IoU 1, then 1/2
        tensor([0.7500])
    """
    pairs = prepare(maps, masks, ignore=ignore, ignore_index=ignore_index, mode=mode)
    auc, region, _, broken = _all_areas(pairs)
    return auc.masked_fill(broken | (region == 0), torch.nan).to(pairs.dtype).reshape(pairs.shape)


def hit_rate(
    maps: Tensor,
    masks: Tensor,
    *,
    threshold: float = 0.5,
    baseline: str = "published",
    ignore: Tensor | None = None,
    ignore_index: int | None = None,
    mode: str = "bilinear",
    nan_policy: str = "omit",
) -> Tensor:
    """Share of samples whose :func:`nra` is above ``threshold``: a quantity of the whole data set.

    Args:
        maps, masks, baseline, ignore, ignore_index, mode: as in :func:`nra`. With ``(N, T, H, W)`` masks every
            (image, concept) is a sample.
        threshold: the published one is 0.5; a hit is strictly above it.
        nan_policy: what to do with samples whose NRA is undefined. ``"omit"``: leave them out, and say how many in
            an ``InputWarning``; ``"zero"``: count them as misses; ``"propagate"``: the result is NaN; ``"raise"``.

    Returns:
        0-d tensor in [0, 1], higher is better; NaN if no sample is left.

    Raises:
        InputError: see :func:`nra`; ``threshold`` outside [0, 1]; undefined samples under ``nan_policy="raise"``.

    Example:
        >>> import torch
        >>> masks = torch.tensor([[[True, False]], [[True, False]]])
        >>> hit_rate(torch.tensor([[[2.0, 1.0]], [[1.0, 2.0]]]), masks)
        tensor(0.5000)
    """
    if not 0 <= threshold <= 1:
        raise InputError(f"threshold must lie in [0, 1], the range of NRA, got {threshold}")
    scores = nra(maps, masks, baseline=baseline, ignore=ignore, ignore_index=ignore_index, mode=mode)
    scores = settle(scores.flatten(), nan_policy, "NRA")
    return (scores > threshold).to(scores.dtype).masked_fill(scores.isnan(), torch.nan).mean()


def specificity(
    maps: Tensor,
    masks: Tensor,
    *,
    baseline: str = "published",
    ignore: Tensor | None = None,
    ignore_index: int | None = None,
    mode: str = "bilinear",
) -> Tensor:
    r"""How much better a concept's own map finds its region than the maps of the image's other concepts do.

    .. math:: \mathrm{spec}_t = \mathrm{NRA}(A_t, M_t) - \frac{1}{|O_t|} \sum_{s \in O_t} \mathrm{NRA}(A_s, M_t)

    :math:`O_t` are the other concepts that are present, that is, whose mask in this image is not empty. Range
    [-1, 1], higher is better; 0 for maps that do not know their concept (the same map for all, the centre of the
    photograph, mere activation energy) and 0 in expectation for random ones. NRA alone rewards such maps.

    Args:
        maps: ``(N, T, h, w)``.
        masks: ``(N, T, H, W)``.
        baseline, ignore, ignore_index, mode: as in :func:`nra`.

    Returns:
        ``(N, T)``. NaN where it is undefined: the concept is absent (empty mask) or fills the image, its map has
        NaN, or no other concept is present. Another concept's map with NaN is left out of the mean.

    Raises:
        InputError: see :func:`nra`; masks that are not ``(N, T, H, W)``.

    Example:
        >>> import torch
        >>> masks = torch.tensor([[[[1, 0, 0]], [[0, 0, 1]]]])
        >>> specificity(masks.float(), masks), specificity(torch.ones(1, 2, 1, 3), masks)
        (tensor([[0.9750, 0.9750]]), tensor([[0., 0.]]))
    """
    if isinstance(masks, Tensor) and masks.ndim != 4:
        raise InputError(f"specificity needs masks (N, T, H, W) of several concepts, got {tuple(masks.shape)}")
    pairs = prepare(maps, masks, ignore=ignore, ignore_index=ignore_index, mode=mode)
    n, t = pairs.shape
    at = torch.arange(n * t, device=masks.device).reshape(n, t)
    map_rows = at[:, None, :].expand(n, t, t).reshape(-1)  # entry (i, t, s): map s of image i on mask t
    mask_rows = at[:, :, None].expand(n, t, t).reshape(-1)
    scores = _rows(pairs, baseline, map_rows, mask_rows).reshape(n, t, t)
    regions = pairs.masks if pairs.ignore is None else pairs.masks & ~pairs.ignore
    present = regions.flatten(1).any(1).reshape(n, t)
    own = scores.diagonal(dim1=1, dim2=2)
    others = present[:, None, :] & ~torch.eye(t, dtype=torch.bool, device=masks.device) & ~scores.isnan()
    mean = scores.nan_to_num(0).mul(others).sum(-1) / others.sum(-1)  # 0 / 0 is the NaN of "no other concept"
    return (own - mean).to(pairs.dtype)


def _rows(pairs: Pairs, baseline: str, map_rows: Tensor | None = None, mask_rows: Tensor | None = None) -> Tensor:
    """NRA of each row (or of each given pair of rows), in float64."""
    if baseline not in BASELINES:
        raise InputError(f"baseline must be one of {BASELINES}, got {baseline!r}")
    auc, region, pixels, broken = _all_areas(pairs, map_rows, mask_rows)
    undefined = broken | (region == 0) | (region == pixels)
    m, p = region.clamp(min=1).double(), pixels.clamp(min=1).double()
    high = ((m + 1) / 2 + m * (torch.digamma(p + 1) - torch.digamma(m + 1))) / p  # sums of 1/p are harmonic numbers
    if baseline == "published":
        low = m / (2 * p)
    else:
        sizes = zip(region.tolist(), pixels.tolist(), strict=True)
        low = torch.tensor([_expected_auc(*size) for size in sizes], dtype=torch.float64, device=auc.device)
    gain = auc - low
    gain = gain.masked_fill(gain < 1e-12, 0)  # the same sum in two shapes may differ in its last bit
    return (gain / (high - low)).clamp(max=1).masked_fill(undefined, torch.nan)


def _all_areas(
    pairs: Pairs, map_rows: Tensor | None = None, mask_rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """AUC, mask size, number of pixels, and whether the map has NaN, for every row."""
    device = pairs.masks.device
    found = []
    work: dict[str, Tensor] = {}
    for chunk in pairs.chunks(map_rows, mask_rows):
        if device.type == "mps":  # has no float64
            chunk = Chunk(*(None if x is None else x.cpu() for x in vars(chunk).values()))  # type: ignore[arg-type]
        found.append(_chunk_auc(chunk, work))
    if not found:
        none = torch.zeros(0, dtype=torch.long, device=device)
        return none.double(), none, none, none.bool()
    auc, region, pixels, broken = (torch.cat(parts) for parts in zip(*found, strict=True))
    return auc, region, pixels, broken


def _chunk_auc(chunk: Chunk, work: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``work`` holds buffers from one chunk to the next: fetching fresh memory costs as much as the sorting."""
    keys = _sorted_keys(chunk, work)
    p = keys.shape[1]
    region = chunk.masks.sum(1)
    pixels = torch.full_like(region, p) if chunk.ignore is None else p - chunk.ignore.sum(1)
    if "count" not in work:
        work["count"] = torch.arange(1, p + 1, dtype=torch.float64, device=keys.device)
    bits = torch.bitwise_and(keys, 1, out=_buffer(work, "bits", keys.shape, torch.int64, keys.device))
    inside = _buffer(work, "inside", keys.shape, torch.float64, keys.device)
    torch.cumsum(bits, 1, dtype=torch.float64, out=inside)
    iou = _buffer(work, "iou", keys.shape, torch.float64, keys.device)
    torch.sub(work["count"], inside, out=iou).add_(region[:, None])  # the union, M + p - intersection
    torch.div(inside, iou, out=iou)
    _share_ties(iou, keys, inside, region)
    if chunk.ignore is not None:
        iou.masked_fill_(work["count"] > pixels[:, None], 0)
    return iou.sum(1) / pixels, region, pixels, chunk.broken


def _buffer(work: dict[str, Tensor], name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    if name not in work or work[name].shape[0] < shape[0]:
        work[name] = torch.empty(shape, dtype=dtype, device=device)
    return work[name][: shape[0]]


def _sorted_keys(chunk: Chunk, work: dict[str, Tensor]) -> Tensor:
    """``(B, P)`` int64, each row sorted: a pixel's rank by descending saliency, times two, plus its mask bit.

    One sort of plain integers replaces a sort with indices and a gather. The integer order of a float's bits is
    the order of the floats once the bits below the sign of negative ones are flipped.
    """
    values = chunk.values
    if bool(chunk.broken.any()):
        values = values.masked_fill(chunk.broken[:, None], 0)
    keys = _buffer(work, "keys", values.shape, torch.int64, values.device)
    if values.dtype == torch.float64:  # 64 bits leave no room for the mask's: number the distinct values instead
        ordered, order = torch.sort(values, dim=1, descending=True)
        step = torch.zeros_like(order)
        step[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        keys.scatter_(1, order, step.cumsum(1))
    else:
        bits = (-values).add_(0.0).view(torch.int32)  # adding 0 makes -0.0 and 0.0 one value
        keys.copy_(bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF)))
    if chunk.ignore is not None:
        keys.masked_fill_(chunk.ignore, _IGNORED_KEY)
    keys.mul_(2).add_(chunk.masks)
    if keys.device.type == "cpu":
        keys.numpy().sort(axis=1)  # vectorised, and several times faster than torch.sort, which carries indices
        return keys
    return torch.sort(keys, dim=1).values


def _share_ties(iou: Tensor, keys: Tensor, inside: Tensor, region: Tensor) -> None:
    """Put the expected IoU into every group of equal pixels that holds both kinds, in place.

    In a sorted row the even (outside) keys of a group come before its odd ones, so that neighbours which differ in
    the last bit alone mark exactly these groups.
    """
    rows, cols = ((keys[:, 1:] ^ keys[:, :-1]) == 1).nonzero(as_tuple=True)
    if not len(rows):
        return
    n, p = keys.shape
    flat = keys
    if n > 1:  # one sorted sequence of all rows
        flat = keys + (torch.arange(n, device=keys.device) << _ROW_BITS)[:, None]
    flat = flat.reshape(-1)
    even = flat[rows * p + cols]
    start = torch.searchsorted(flat, even)
    size = torch.searchsorted(flat, even + 1, right=True) - start
    before = inside.reshape(-1)[start]  # the first pixel of a group lies outside the mask
    rate = (inside.reshape(-1)[start + size - 1] - before) / size
    union = (start - rows * p + region[rows]) - before  # before the group's first pixel
    small = torch.ones_like(start, dtype=torch.bool)
    target = iou.view(-1)
    if keys.device.type == "cpu":  # a few long groups (the zeros of a ReLU): slices beat gathers
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
def _expected_auc(region: int, pixels: int) -> float:
    """Mean over p of the expected IoU of p random pixels of ``pixels`` with a mask of ``region``."""
    if not 0 < region <= pixels:
        return 0.0
    count = torch.arange(1, pixels + 1, dtype=torch.float64)
    expected = count * region / pixels
    return float((expected / (count + region - expected)).sum() / pixels)
