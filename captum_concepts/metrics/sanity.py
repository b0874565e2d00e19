"""Parameter and label randomization: sanity checks of whether maps depend on what the model has learned."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_concepts._checks import integer, number
from captum_concepts._undo import autocast_of_the_caller, unharming
from captum_concepts.errors import InputError
from captum_concepts.metrics._randomize import layer_names, randomize, restored

__all__ = ["SanityResult", "label_randomization", "parameter_randomization", "rank_correlation"]

Explain = Callable[..., Tensor]
ORDERS = ("cascade", "independent")


@dataclass(frozen=True)
class SanityResult:
    """Similarity of maps before and after randomization, and whether the check passed.

    Args:
        check: ``"parameters"`` or ``"labels"``.
        stages: what was randomized at each stage; in a cascade, everything down to this name.
        similarity: ``(stages, N)`` similarity of each example's maps, NaN where it is undefined.
        judged: indices of the stages that decide whether the check passed.
        threshold: the highest mean similarity that passes.
        interval: 95 % bootstrap interval (over examples) of the judged mean similarity.
    """

    check: str
    stages: list[str]
    similarity: Tensor
    judged: list[int]
    threshold: float
    interval: tuple[float, float]

    @property
    def value(self) -> float:
        """Mean similarity of the judged stages."""
        return float(self.similarity[self.judged].nanmean())

    @property
    def skipped(self) -> int:
        """Number of undefined judged similarities (a map with NaN)."""
        return int(self.similarity[self.judged].isnan().sum())

    @property
    def passed(self) -> bool:
        """Whether the maps changed, that is, the whole interval lies at or below ``threshold``; False if undefined."""
        return self.interval[1] <= self.threshold

    def __str__(self) -> str:
        low, high = self.interval
        reading = (
            "passed: the maps depend on what was randomized"
            if self.passed
            else "FAILED: the maps are (or may be) nearly the same after randomization"
        )
        lines = [f"{self.check} randomization {reading}."]
        lines.append(f"similarity {self.value:.3f} [{low:.3f}, {high:.3f}], passes up to {self.threshold:g}")
        lines += [
            f"  {name or '(model)'}: {float(row.nanmean()):.3f}"
            for name, row in zip(self.stages, self.similarity, strict=True)
        ]
        if self.skipped:
            lines.append(f"  {self.skipped} similarities are undefined (maps with NaN) and left out")
        return "\n".join(lines)


def rank_correlation(first: Tensor, second: Tensor, *, absolute: bool = False) -> Tensor:
    """Spearman's rank correlation of two maps of each example; tied values have their mean rank.

    Args:
        first, second: ``(N, ...)`` of the same shape.
        absolute: correlate absolute values, ignoring changes of sign (Adebayo et al. show both).

    Returns:
        ``(N,)`` in [-1, 1]. 1 if both maps are constant, 0 if one is, and NaN if a map has NaN.

    >>> rank_correlation(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 8.0, 9.0]]))
    tensor([1.])
    """
    if first.shape != second.shape or first.ndim < 2:
        raise InputError(f"maps must have one shape (N, ...), got {tuple(first.shape)} and {tuple(second.shape)}")
    a, b = (x.detach().flatten(1) for x in (first, second))
    if absolute:
        a, b = a.abs(), b.abs()
    out = []
    for x, y in zip(a, b, strict=True):
        if bool(x.isnan().any() | y.isnan().any()):
            out.append(math.nan)
            continue
        p, q = _ranks(x), _ranks(y)
        if not (p.any() and q.any()):
            out.append(float(not (p.any() or q.any())))
        else:
            out.append(float((p @ q) / (p.norm() * q.norm())))
    return torch.tensor(out)


def _ranks(values: Tensor) -> Tensor:
    """Centered mean ranks, in float64 on the CPU."""
    _, which, count = torch.unique(values.cpu(), return_inverse=True, return_counts=True)
    count = count.double()
    return (count.cumsum(0) - (count - 1) / 2)[which] - (len(values) + 1) / 2


@unharming
def parameter_randomization(
    explain: Explain | Any,
    model: nn.Module,
    inputs: Tensor,
    *,
    target: Any = None,
    layers: Sequence[str] | None = None,
    order: str = "cascade",
    similarity: Callable[[Tensor, Tensor], Tensor] = rank_correlation,
    threshold: float = 0.5,
    seed: int = 0,
    show_progress: bool = False,
) -> SanityResult:
    """Similarity of maps before and after the model's weights are randomized, from the last layer to the first.

    A map that stays the same does not explain the model, but shows edges, objects or the center of the image. The
    model is randomized in place and restored exactly, even after an error, including parameters, buffers, training
    modes, gradients and random state. Layers with ``reset_parameters`` are reinitialized, and the entries of other
    parameters are permuted.

    Args:
        explain: ``inputs -> maps`` (called with ``target`` if it is not None), or an object with ``attribute(inputs,
            target=...)``. It must use ``model`` itself, not a copy or cached activations.
        model: the model that ``explain`` explains.
        inputs: the images.
        target: passed to ``explain`` if it is not None.
        layers: names of the modules to randomize, in this order; by default all that have parameters of their own,
            last first. Methods that use no layers after their own (such as FAM) must be judged by the layers before.
        order: ``"cascade"``: each stage adds a layer to those already randomized, and the last stage, with all of them
            random, is judged. ``"independent"``: one layer at a time, and the mean over all stages is judged.
        similarity: returns ``(N,)`` similarities of two batches of maps; high means alike.
        threshold: highest mean similarity that passes. Smooth maps of 7 x 7 positions correlate by chance with a spread
            of about 0.3, so 0.5 is generous; with few images, see the interval.
        seed: random seed of the weights.
        show_progress: show a tqdm bar over the stages.

    Returns:
        A :class:`SanityResult`, which prints as a summary.

    Raises:
        InputError: an unknown layer or option, a layer without parameters, or maps that change their shape.

    ``MPRT`` of Quantus uses the same rank correlation, by default of absolute values (here
    ``similarity=partial(rank_correlation, absolute=True)``). It returns the correlations without a verdict.

    Reference: Adebayo et al., Sanity checks for saliency maps, NeurIPS 2018, arXiv:1810.03292.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 1))
        >>> result = parameter_randomization(lambda x: x[:, 0], net, torch.rand(4, 1, 8, 8))  # shows the image
        >>> result.passed, result.value
        (False, 1.0)
    """
    if order not in ORDERS:
        raise InputError(f"order must be one of {ORDERS}, got {order!r}")
    _check_verdict(threshold, seed)
    names = layer_names(model, layers)
    run = _explainer(explain, target)
    steps: Any = names
    if show_progress:
        from tqdm import tqdm

        steps = tqdm(names, desc="parameter randomization", unit="layer")
    before = run(inputs)
    found = []
    with restored(model):
        for i, name in enumerate(steps):
            if order == "independent":
                with restored(model):
                    randomize(model.get_submodule(name), seed + i)
                    found.append(_compare(similarity, before, run(inputs)))
            else:
                randomize(model.get_submodule(name), seed + i)
                found.append(_compare(similarity, before, run(inputs)))
    judged = [len(names) - 1] if order == "cascade" else list(range(len(names)))
    return _result("parameters", names, torch.stack(found), judged, threshold, seed)


@unharming
def label_randomization(
    explain: Callable[[nn.Module], Explain | Any],
    model: nn.Module,
    fit: Callable[[nn.Module, Tensor], Any],
    labels: Tensor,
    inputs: Tensor,
    *,
    target: Any = None,
    similarity: Callable[[Tensor, Tensor], Tensor] = rank_correlation,
    threshold: float = 0.5,
    seed: int = 0,
) -> SanityResult:
    """Similarity of maps between a model and a copy trained on permuted labels.

    A copy of ``model`` is randomized (as in :func:`parameter_randomization`) and fitted to a permutation of ``labels``;
    ``model`` itself is unchanged. Make sure that the fit memorizes the permuted labels, as in the paper.

    Args:
        explain: returns the explainer of a model: ``model -> (inputs -> maps)`` or ``model -> attribution``.
        model: the model trained on the true labels.
        fit: ``fit(copy, shuffled_labels)`` trains the copy in place.
        labels: ``(n,)`` the true labels.
        inputs, target, similarity, threshold, seed: as in :func:`parameter_randomization`.

    Returns:
        A :class:`SanityResult` with one stage.

    Raises:
        InputError: labels that are not a tensor ``(n,)`` with at least two classes, or maps of another shape.

    Reference: Adebayo et al., Sanity checks for saliency maps, NeurIPS 2018, arXiv:1810.03292, section 4.
    """
    if not isinstance(labels, Tensor) or labels.ndim != 1 or len(labels.unique()) < 2:
        got = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise InputError(f"labels must be a tensor (n,) with at least two classes, got {got}")
    _check_verdict(threshold, seed)
    generator = torch.Generator().manual_seed(seed)
    shuffled = labels[torch.randperm(len(labels), generator=generator).to(labels.device)]
    other = copy.deepcopy(model)
    for i, name in enumerate(layer_names(other, None)):
        randomize(other.get_submodule(name), seed + i)
    fit(other, shuffled)
    before, after = (_explainer(explain(one), target)(inputs) for one in (model, other))
    found = _compare(similarity, before, after)[None]
    return _result("labels", ["shuffled labels"], found, [0], threshold, seed)


def _check_verdict(threshold: float, seed: int) -> None:
    number("threshold", threshold, lambda _: True, "a finite number")
    integer("seed", seed, 0)


def _explainer(explain: Explain | Any, target: Any) -> Callable[[Tensor], Tensor]:
    function = getattr(explain, "attribute", explain)
    if not callable(function):
        raise InputError(f"explain must be callable or have attribute(), got {type(explain).__name__}")
    options = {} if target is None else {"target": target}

    def run(inputs: Tensor) -> Tensor:
        with autocast_of_the_caller():
            maps = function(inputs.clone(), **options)
        if not isinstance(maps, Tensor) or maps.ndim < 2 or len(maps) != len(inputs):
            got = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
            raise InputError(f"explain must return maps ({len(inputs)}, ...), got {got}")
        return maps.detach().clone()

    return run


def _compare(similarity: Callable[[Tensor, Tensor], Tensor], before: Tensor, after: Tensor) -> Tensor:
    if before.shape != after.shape:
        raise InputError(f"maps changed their shape from {tuple(before.shape)} to {tuple(after.shape)}")
    found = similarity(before, after)
    if not isinstance(found, Tensor) or found.shape != (len(before),):
        raise InputError(f"similarity must return ({len(before)},) values, got {found!r}")
    return found.detach().cpu().float()


def _result(
    check: str, stages: list[str], similarity: Tensor, judged: list[int], threshold: float, seed: int
) -> SanityResult:
    values = similarity[judged].double().numpy()
    per_example = np.array([np.nanmean(v) if not np.isnan(v).all() else np.nan for v in values.T])
    per_example = per_example[~np.isnan(per_example)]
    interval = (math.nan, math.nan)
    if len(per_example):
        rng = np.random.default_rng(seed)
        means = per_example[rng.integers(0, len(per_example), (2000, len(per_example)))].mean(1)
        interval = (float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975)))
    return SanityResult(check, stages, similarity, judged, threshold, interval)
