"""Faithfulness by perturbing the image: average drop, increase in confidence, insertion and deletion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from captum_concepts._checks import integer
from captum_concepts._undo import unharming
from captum_concepts.errors import InputError
from captum_concepts.metrics._prepare import min_max, resize_maps
from captum_concepts.metrics._scoring import ScoreFn, Scorer, baseline_images

__all__ = ["average_drop", "deletion", "increase_in_confidence", "insertion"]


@unharming
def average_drop(
    score_fn: ScoreFn,
    inputs: Tensor,
    maps: Tensor,
    *,
    target: Any = None,
    additional_forward_args: Any = None,
    scores: str = "probability",
    baseline: str | Tensor = "zero",
    normalize: bool = True,
    mode: str = "bilinear",
    batch_size: int = 32,
) -> Tensor:
    r"""Average drop, the fraction of the score that is lost when the image is multiplied by its map.

    .. math:: \mathrm{AD}_i = \max(0,\, Y_i - O_i) \,/\, Y_i

    where Y is the score of the image x, O the score of ``x * a + baseline * (1 - a)``, and a the map, resized to the
    image and scaled to [0, 1]. The mean times 100 is the published "average drop %". The range is [0, 1] (above 1 if O
    can be negative), and lower is better.

    Args:
        score_fn: images ``(B, C, H, W)`` -> scores ``(B,)``, or ``(B, K)`` with ``target``, such as probabilities,
            similarities or concept scores. It is called without gradients, on ``batch_size`` images at a time.
        inputs: ``(N, C, H, W)`` inputs of ``score_fn``.
        maps: ``(N, h, w)`` or ``(N, 1, h, w)``.
        target: the column of ``score_fn``'s output: one int, or one int per example.
        additional_forward_args: passed to ``score_fn`` after the images; tensors with N rows are split into batches.
        scores: the scale of Y and O, whose ratio needs a meaningful zero. ``"probability"``: unchanged, checked to lie
            in [0, 1]; ``"similarity"``: checked to lie in [-1, 1] and mapped to [0, 1] by ``(1 + s) / 2``; ``"raw"``:
            unchanged. Logits have no meaningful zero, so convert them to probabilities in ``score_fn``.
        baseline: what replaces the hidden part: ``"zero"`` (published; in the scale of ``inputs``, hence the mean color
            of normalized images), ``"mean"`` (the image's mean color), ``"blur"`` (RISE's kernel of 11 pixels),
            ``"gaussian"`` (sigma 5, 11 pixels, mirrored borders), or a tensor that broadcasts to ``inputs``.
        normalize: scale each map to [0, 1]; a constant map becomes 0. If False, maps must lie in [0, 1].
        mode: how maps are resized, ``align_corners=False``.
        batch_size: images per call.

    Returns:
        ``(N,)`` float32 (float64 for float64 scores). NaN where Y is not above 0, a score is NaN, or a map has NaN or
        infinite values.

    Raises:
        InputError: shapes that do not match, scores outside the stated scale, or an unknown option.
        TargetError: ``target`` does not match the output.

    Reference: Grad-CAM++, WACV 2018, arXiv:1710.11063, section 4.1.

    Example:
        >>> import torch
        >>> image = torch.tensor([[[[1.0, 3.0]]]])
        >>> average_drop(lambda x: x.sum((1, 2, 3)), image, torch.tensor([[[1.0, 0.0]]]), scores="raw")
        tensor([0.7500])
    """
    run = Scorer(score_fn, inputs, target, additional_forward_args, scores, batch_size)
    full, shown = _full_and_shown(run, maps, baseline, normalize, mode)
    return ((full - shown).clamp(min=0) / full).masked_fill(~(full > 0), torch.nan)


@unharming
def increase_in_confidence(
    score_fn: ScoreFn,
    inputs: Tensor,
    maps: Tensor,
    *,
    target: Any = None,
    additional_forward_args: Any = None,
    scores: str = "raw",
    baseline: str | Tensor = "zero",
    normalize: bool = True,
    mode: str = "bilinear",
    batch_size: int = 32,
) -> Tensor:
    """1 where the score rises when the image is multiplied by its map (``Y < O``), else 0.

    The mean times 100 is the published "% increase in confidence", and higher is better. Only the order of Y and O
    matters, not the scale of the scores.

    Args and errors: as in :func:`average_drop`.

    Returns:
        ``(N,)`` of 0 and 1; NaN where a score is NaN, or a map has NaN or infinite values.

    Reference: Grad-CAM++, WACV 2018, arXiv:1710.11063, section 4.1.

    Example:
        >>> import torch
        >>> image = torch.tensor([[[[1.0, -3.0]]]])
        >>> increase_in_confidence(lambda x: x.sum((1, 2, 3)), image, torch.tensor([[[1.0, 0.0]]]))
        tensor([1.])
    """
    run = Scorer(score_fn, inputs, target, additional_forward_args, scores, batch_size)
    full, shown = _full_and_shown(run, maps, baseline, normalize, mode)
    return (shown > full).to(full.dtype).masked_fill(full.isnan() | shown.isnan(), torch.nan)


@unharming
def deletion(
    score_fn: ScoreFn,
    inputs: Tensor,
    maps: Tensor,
    *,
    target: Any = None,
    additional_forward_args: Any = None,
    scores: str = "raw",
    baseline: str | Tensor = "zero",
    n_steps: int | None = None,
    mode: str = "bilinear",
    batch_size: int = 32,
    seed: int = 0,
    return_curve: bool = False,
    show_progress: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Area under the score curve as the most salient pixels are removed step by step; lower is better.

    The curve runs from the image to the baseline over the fraction of removed pixels, and its area is integrated by the
    trapezoidal rule. It has the range and the unit of the scores.

    Args:
        score_fn, inputs, maps, target, additional_forward_args, scores, mode: as in :func:`average_drop`.
        baseline: what removed pixels become: ``"zero"`` (published), or another of :func:`average_drop`.
        n_steps: number of steps; ``round(k * H * W / n_steps)`` pixels have changed after step k. None: as many as the
            map has positions, at most H, because more steps add no information. The published number is H (224 at
            224 px, W pixels per step), which costs H / (h * w) times as much.
        batch_size: images per call of ``score_fn``, over examples and steps together, which bounds the memory.
        seed: random seed of the order of tied pixels (the same for every example and any batching), so that a constant
            map removes pixels at random instead of row by row.
        return_curve: also return the scores ``(N, n_steps + 1)``.
        show_progress: show a progress bar.

    Returns:
        ``(N,)``, or ``(area, curve)``. NaN for a map with NaN.

    Raises:
        InputError, TargetError: as in :func:`average_drop`.

    ``PixelFlipping`` of Quantus is the curve without its first point. It ranks the values of each channel separately
    instead of removing whole pixels, takes tied values in memory order, and its "black" is the minimum.

    Reference: RISE, BMVC 2018, arXiv:1806.07421, section 4.1.

    Example:
        >>> import torch
        >>> image, heat = torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[0.0, 1.0]]])
        >>> deletion(lambda x: x.sum((1, 2, 3)), image, heat, n_steps=2, return_curve=True)
        (tensor([1.5000]), tensor([[4., 1., 0.]]))
    """
    run = Scorer(score_fn, inputs, target, additional_forward_args, scores, batch_size)
    return _curve(run, maps, baseline, n_steps, mode, seed, return_curve, show_progress, insert=False)


@unharming
def insertion(
    score_fn: ScoreFn,
    inputs: Tensor,
    maps: Tensor,
    *,
    target: Any = None,
    additional_forward_args: Any = None,
    scores: str = "raw",
    baseline: str | Tensor = "blur",
    n_steps: int | None = None,
    mode: str = "bilinear",
    batch_size: int = 32,
    seed: int = 0,
    return_curve: bool = False,
    show_progress: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Area under the score curve as the most salient pixels are inserted step by step; higher is better.

    Arguments and results are those of :func:`deletion`, but the curve runs from the baseline, by default the blurred
    image as published, to the image.

    Example:
        >>> import torch
        >>> image, heat = torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[0.0, 1.0]]])
        >>> insertion(lambda x: x.sum((1, 2, 3)), image, heat, n_steps=2, baseline="zero")
        tensor([2.5000])
    """
    run = Scorer(score_fn, inputs, target, additional_forward_args, scores, batch_size)
    return _curve(run, maps, baseline, n_steps, mode, seed, return_curve, show_progress, insert=True)


def _full_and_shown(
    run: Scorer, maps: Tensor, baseline: str | Tensor, normalize: bool, mode: str
) -> tuple[Tensor, Tensor]:
    small = run.check(maps, mode)
    full, shown = [], []
    for start in range(0, len(run.inputs), run.batch_size):
        rows = slice(start, start + run.batch_size)
        x = run.inputs[rows]
        index = torch.arange(start, start + len(x), device=x.device)
        heat = resize_maps(small[rows], x.shape[2:], mode=mode)
        broken = ~heat.isfinite().flatten(1).all(1)
        if normalize:
            heat = min_max(heat.flatten(1))[0].reshape(heat.shape)
        elif bool(((heat < -1e-6) | (heat > 1 + 1e-6)).any()):
            raise InputError("maps must lie in [0, 1] with normalize=False; use normalize=True to scale them")
        heat = heat.masked_fill(broken[:, None, None], 0).to(x.dtype)[:, None]
        base = baseline_images(x, baseline, rows, run.inputs.shape)
        full.append(run(x, index))
        shown.append(run(x * heat + base * (1 - heat), index).masked_fill(broken.to(full[-1].device), torch.nan))
    if not full:
        return torch.zeros(0), torch.zeros(0)
    return torch.cat(full), torch.cat(shown)


def _curve(
    run: Scorer,
    maps: Tensor,
    baseline: str | Tensor,
    n_steps: int | None,
    mode: str,
    seed: int,
    return_curve: bool,
    show_progress: bool,
    insert: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    n, _, height, width = run.inputs.shape
    pixels = height * width
    small = run.check(maps, mode)
    if n_steps is None:
        n_steps = max(1, min(height, small.shape[1] * small.shape[2]))
    integer("n_steps", n_steps, 1, pixels)
    integer("seed", seed, None)
    device = run.inputs.device
    shuffle = torch.randperm(pixels, generator=torch.Generator().manual_seed(seed)).to(device)
    changed = torch.tensor([round(k * pixels / n_steps) for k in range(n_steps + 1)], device=device)
    curves = []
    starts = range(0, n, run.batch_size)
    what = "insertion" if insert else "deletion"
    # all steps of a few examples, in batches
    for start in tqdm(starts, desc=what, disable=not show_progress):
        rows = slice(start, start + run.batch_size)
        x = run.inputs[rows]
        base = baseline_images(x, baseline, rows, run.inputs.shape)
        heat = resize_maps(small[rows], (height, width), mode=mode).flatten(1)
        broken = heat.isnan().any(1)
        order = shuffle[torch.sort(heat[:, shuffle], dim=1, descending=True, stable=True).indices]
        rank = torch.empty_like(order)
        rank.scatter_(1, order, torch.arange(pixels, device=device).expand_as(order))
        rank = rank.reshape(len(x), 1, height, width)
        before, after = (base, x) if insert else (x, base)
        pairs = torch.cartesian_prod(torch.arange(len(x), device=device), torch.arange(n_steps + 1, device=device))
        scores = []
        for part in pairs.split(run.batch_size):
            i, k = part[:, 0], part[:, 1]
            images = torch.where(rank[i] < changed[k][:, None, None, None], after[i], before[i])
            scores.append(run(images, i + start))
        curve = torch.cat(scores).reshape(len(x), n_steps + 1)
        curves.append(curve.masked_fill(broken.to(curve.device)[:, None], torch.nan))
    curve = torch.cat(curves) if curves else torch.zeros(0, n_steps + 1)
    share = changed.to(curve.device, curve.dtype) / pixels
    area = torch.trapezoid(curve, share, dim=1)
    return (area, curve) if return_curve else area
