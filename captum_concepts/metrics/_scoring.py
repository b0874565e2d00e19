"""Calls of the user's score function on perturbed images, with batches, targets, the scale of scores and baselines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts._captum import output_tensor
from captum_concepts._checks import integer, one_of
from captum_concepts._memory import Halving
from captum_concepts._undo import evaluation_mode
from captum_concepts.errors import InputError, TargetError
from captum_concepts.metrics._prepare import MODES, check_maps

ScoreFn = Callable[..., Tensor]
SCORES = ("raw", "probability", "similarity")
BASELINES = ("zero", "mean", "blur", "gaussian")


def blur(inputs: Tensor, kernel: str = "published") -> Tensor:
    """Images ``(N, C, H, W)`` blurred with an 11 x 11 kernel.

    Args:
        inputs: the images.
        kernel: ``"published"``: the kernel of RISE's code, a Gaussian of sigma 5 reflected at the borders of its
            11 x 11 window and therefore nearly a box (.0088 at the center, .0074 at the corners); images are padded
            with zeros. ``"gaussian"``: a truncated Gaussian of sigma 5; images are mirrored at the border.

    >>> blur(torch.ones(1, 1, 31, 31))[0, 0, 15, 15].isclose(torch.tensor(1.0)).item()
    True
    """
    x = inputs if inputs.dtype == torch.float64 else inputs.float()
    weights = _kernel(kernel).to(x)
    pad = len(weights) // 2
    for dim in (2, 3):
        size = x.shape[dim]
        at = torch.arange(-pad, size + pad, device=x.device)
        period = max(1, 2 * (size - 1))  # mirrored as often as needed for small images
        index = at.abs() % period
        index = torch.minimum(index, period - index).clamp(max=size - 1)
        wide = x.index_select(dim, index)
        if kernel == "published":
            inside = ((at >= 0) & (at < size)).to(x)
            wide = wide * (inside[:, None] if dim == 2 else inside)
        x = wide.unfold(dim, len(weights), 1).matmul(weights)
    return x.to(inputs.dtype)


def _kernel(kind: str) -> Tensor:
    """The 11 weights of one dimension, float64."""
    size, sigma = 11, 5.0
    at = torch.arange(size, dtype=torch.float64) - size // 2
    if kind == "gaussian":
        weights = torch.exp(-(at**2) / (2 * sigma**2))
        return weights / weights.sum()
    # A Gaussian of 4 sigma around the center of the window, whose tails are reflected back into it.
    far = torch.arange(-int(4 * sigma + 0.5), int(4 * sigma + 0.5) + 1)
    gauss = torch.exp(-(far.double() ** 2) / (2 * sigma**2))
    place = (far + size // 2) % (2 * size)
    place = torch.where(place < size, place, 2 * size - 1 - place)
    return torch.zeros(size, dtype=torch.float64).index_add_(0, place, gauss / gauss.sum())


class Scorer:
    """Float scores of ``score_fn`` on the stated scale, for any rows of the inputs, one batch at a time."""

    def __init__(self, score_fn: ScoreFn, inputs: Tensor, target: Any, args: Any, scores: str, batch_size: int) -> None:
        if not callable(score_fn):
            raise InputError(f"score_fn must be callable (images -> scores), got {type(score_fn).__name__}")
        if not isinstance(inputs, Tensor) or inputs.ndim != 4 or not inputs.is_floating_point():
            got = (tuple(inputs.shape), inputs.dtype) if isinstance(inputs, Tensor) else type(inputs).__name__
            hint = "; no batch dimension: pass image[None]" if getattr(inputs, "ndim", 0) == 3 else ""
            raise InputError(f"inputs must be floating point images (N, C, H, W), got {got}{hint}")
        if not inputs.numel() or inputs.layout != torch.strided:
            what = "contain no example" if inputs.layout == torch.strided else f"have the layout {inputs.layout}"
            raise InputError(f"inputs of shape {tuple(inputs.shape)} {what}; pass a dense batch (N, C, H, W)")
        one_of("scores", scores, SCORES)
        integer("batch_size", batch_size)
        self.score_fn, self.scores, self.batch_size = score_fn, scores, batch_size
        self.inputs = inputs.detach()
        self.halving = Halving("batch_size")
        self.args = () if args is None else args if isinstance(args, tuple) else (args,)
        self.target = self._targets(target, len(inputs), inputs.device)

    @staticmethod
    def _targets(target: Any, n: int, device: torch.device) -> Tensor | None:
        if target is None:
            return None
        try:
            chosen = torch.as_tensor(target, device=device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TargetError(f"target must be an int or {n} ints, got {target!r}") from error
        if chosen.ndim == 2 and chosen.shape[1] == 1:  # Captum's list of 1-tuples
            chosen = chosen[:, 0]
        if chosen.is_floating_point() or chosen.dtype == torch.bool or chosen.numel() not in (1, n) or chosen.ndim > 1:
            raise TargetError(f"target must be an int or {n} ints, one for each example, got {target!r}")
        return chosen.reshape(-1).long().expand(n)

    @torch.no_grad()
    def __call__(self, images: Tensor, rows: Tensor) -> Tensor:
        """Scores ``(B,)`` of images ``(B, C, H, W)`` computed from the inputs ``rows`` ``(B,)``."""
        return torch.cat(self.halving(lambda part: self._score(*part), (images, rows), _halves))

    def _score(self, images: Tensor, rows: Tensor) -> Tensor:
        n = len(self.inputs)
        args = [a[rows] if isinstance(a, Tensor) and a.ndim and len(a) == n else a for a in self.args]
        with evaluation_mode(self.score_fn if isinstance(self.score_fn, nn.Module) else None):
            made = self.score_fn(images.clone(), *args)  # it may normalize in place
        try:
            out = output_tensor(made)
        except TargetError as error:
            raise InputError(f"score_fn must return a tensor, or one output that is read as such: {error}") from error
        if out.ndim == 2 and self.target is not None:
            chosen = self.target[rows].to(out.device)
            if bool(((chosen < -out.shape[1]) | (chosen >= out.shape[1])).any()):
                raise TargetError(f"target {chosen.tolist()} is out of range for {out.shape[1]} scores per image")
            out = out.gather(1, (chosen % out.shape[1])[:, None])
        if out.numel() != len(images) or out.ndim > 2:
            raise InputError(
                f"score_fn returned {tuple(out.shape)} for {len(images)} images: return ({len(images)},), or (images, "
                "K) and pass target="
            )
        out = out.reshape(-1).to(torch.float64 if out.dtype == torch.float64 else torch.float32)
        low = {"raw": -torch.inf, "probability": 0.0, "similarity": -1.0}[self.scores]
        off = (out < low - 1e-4) | (out > 1 + 1e-4) if self.scores != "raw" else torch.zeros_like(out).bool()
        if bool(off.any()):
            raise InputError(
                f"scores='{self.scores}' means values in [{low:g}, 1], but score_fn returned {out[off][0]:.4g}; "
                "use scores='raw', or turn logits into probabilities in score_fn"
            )
        return (1 + out) / 2 if self.scores == "similarity" else out

    def check(self, maps: Tensor, mode: str) -> Tensor:
        """``maps`` as ``(N, h, w)``, one per input."""
        maps = check_maps(maps)
        n = len(self.inputs)
        if maps.ndim == 4 and maps.shape[1] == 1:
            maps = maps[:, 0]
        if maps.ndim != 3 or len(maps) != n:
            raise InputError(f"maps must be ({n}, h, w) or ({n}, 1, h, w) for {n} inputs, got {tuple(maps.shape)}")
        if maps.device != self.inputs.device:
            raise InputError(f"maps are on {maps.device} but inputs on {self.inputs.device}; move one to the other")
        if mode not in MODES:
            raise InputError(f"mode must be one of {MODES}, got {mode!r}")
        return maps


def _halves(part: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    images, rows = part
    return list(zip(images.chunk(2), rows.chunk(2), strict=True))


def baseline_images(inputs: Tensor, baseline: str | Tensor, rows: slice, like: torch.Size) -> Tensor:
    """Images whose pixels replace the hidden ones of ``inputs``, the ``rows`` of all inputs of shape ``like``."""
    if isinstance(baseline, Tensor):
        try:
            whole = baseline.to(inputs).expand(like)
        except RuntimeError as error:
            raise InputError(f"baseline {tuple(baseline.shape)} does not fit inputs {tuple(like)}") from error
        return whole[rows]
    if baseline == "zero":
        return torch.zeros_like(inputs)
    if baseline == "mean":
        return inputs.mean((2, 3), keepdim=True).expand_as(inputs)
    if baseline in ("blur", "gaussian"):
        return blur(inputs, "published" if baseline == "blur" else "gaussian")
    raise InputError(f"baseline must be one of {BASELINES} or a tensor, got {baseline!r}")
