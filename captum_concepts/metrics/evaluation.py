"""`evaluate`: explainers over a data set, streamed, into a tidy table with confidence intervals."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_concepts.errors import InputError, did_you_mean
from captum_concepts.explanation import ConceptExplanation
from captum_concepts.metrics import streaming_maps as m, streaming_scores as s
from captum_concepts.metrics._batches import Batch, batches
from captum_concepts.metrics.streaming import ExampleMetric
from captum_concepts.metrics.table import EvaluationTable, Samples

__all__ = ["METRICS", "evaluate"]

METRICS: dict[str, Callable[..., ExampleMetric]] = {
    "nra": m.NormalizedRegionAccuracy,
    "nra_exact": lambda **options: m.NormalizedRegionAccuracy(baseline="exact", **options),
    "hit_rate": m.HitRate,
    "concept_specificity": m.ConceptSpecificity,
    "region_auc": m.RegionAUC,
    "epg": m.EnergyPointingGame,
    "pointing_game": m.PointingGame,
    "iou": m.IoU,
    "pixel_accuracy": m.PixelAccuracy,
    "mean_iou": m.MeanIoU,
    "average_precision": m.AveragePrecision,
    "average_drop": s.AverageDrop,
    "increase_in_confidence": s.IncreaseInConfidence,
    "insertion": s.Insertion,
    "deletion": s.Deletion,
}
_NEEDS_SCORES = ("average_drop", "increase_in_confidence", "insertion", "deletion")


class _Function(ExampleMetric):
    """A user's own ``(maps, masks) -> (N,)``."""

    higher_is_better = None

    def __init__(self, function: Callable[..., Tensor], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.function = function

    def per_example(self, maps: Tensor, masks: Tensor) -> Tensor:
        return self.function(maps, masks)


def evaluate(
    explainer: Any,
    data: Iterable[Any],
    metrics: Sequence[Any] | Mapping[str, Any] = ("nra", "nra_exact", "hit_rate", "epg"),
    *,
    score_fn: Callable[..., Tensor] | None = None,
    batch_size: int = 32,
    channels: str = "sum",
    nan_policy: str = "omit",
    n_bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    device: torch.device | str | None = None,
    show_progress: bool = False,
) -> EvaluationTable:
    """Run one or several explainers over a data set and measure them.

    Data is read once, a batch at a time; only a few numbers of every example are kept. Confidence intervals come from
    resampling examples (percentile bootstrap; give the T concepts of an image as one example with masks (T, H, W), so
    that they are resampled together; the same resamples for every explainer and metric, so that
    differences are paired: :meth:`EvaluationTable.compare`).

    Args:
        explainer: one, or a dict name -> explainer. Each is anything with ``attribute(inputs, target=...)`` (Captum's
            attributions and this package's methods), a callable ``inputs -> maps`` (given ``target`` if it has a
            parameter of that name) that returns maps or a ``ConceptExplanation``, or a ``ConceptExplanation`` of all
            images in the order of ``data``.
        data: batches or single examples: a ``DataLoader``, a ``Dataset``, a list or a generator of ``(inputs, masks)``,
            ``(inputs, masks, target)``, or dicts with these keys and, if wanted, ``ignore``. Images ``(C, H, W)`` or
            ``(N, C, H, W)``; masks ``(H, W)`` or ``(T, H, W)``, with N in front for batches. Single examples are
            put together while their shapes agree. ``masks`` may be None if no metric looks at them; an image without
            concepts, T = 0, is an example without values.
        metrics: names out of ``METRICS``, streaming metrics of this package (their state is not touched), or functions
            ``(maps, masks) -> (N,)``; or a dict name -> one of these.
        score_fn: for the names ``average_drop``, ``increase_in_confidence``, ``insertion`` and ``deletion``: images ->
            scores ``(N,)`` or ``(N, K)``; then each example's ``target`` picks one.
        batch_size: examples put together, and images a call of ``score_fn``.
        channels: how attributions ``(N, C, H, W)`` of the input or of a layer's channels become one map where the masks
            are ``(N, H, W)``: ``"sum"`` or ``"abs_sum"`` (the sum of absolute values).
        nan_policy: see :class:`ExampleMetric`; the table counts undefined values under each.
        n_bootstrap: resamples; 0 for no intervals.
        confidence: coverage of the intervals.
        seed: of the resampling.
        device: where inputs, masks and targets are moved first; by default they stay where they are.
        show_progress: a tqdm bar over the batches.

    Returns:
        An :class:`EvaluationTable`.

    Raises:
        InputError: an unknown metric, data or maps that do not fit, a metric without what it needs.

    Example:
        >>> import torch
        >>> masks = torch.zeros(4, 8, 8).bool()
        >>> masks[:, 2:5, 2:5] = True
        >>> images = masks[:, None].float().expand(-1, 3, -1, -1)
        >>> explainers = {"brightness": lambda x: x.mean(1), "inverse": lambda x: -x.mean(1)}
        >>> table = evaluate(explainers, [(images, masks)], ["nra", "epg"], n_bootstrap=0)
        >>> print(table.to_markdown(digits=2))
        | explainer | nra ↑ | epg ↑ |
        |---|---|---|
        | brightness | 1.00 | 1.00 |
        | inverse | 0.00 | 0.00 |
        <BLANKLINE>
        4 examples.
    """
    explainers = dict(explainer) if isinstance(explainer, Mapping) else {_name(explainer): explainer}
    measures = _measures(metrics, score_fn, nan_policy, batch_size)
    if not explainers or not measures:
        raise InputError("give at least one explainer and one metric")
    if channels not in ("sum", "abs_sum"):
        raise InputError(f"channels must be 'sum' or 'abs_sum', got {channels!r}")
    for name, one in explainers.items():
        if not (isinstance(one, ConceptExplanation) or callable(getattr(one, "attribute", one))):
            raise InputError(f"explainer {name!r} has no attribute() and is not callable: {type(one).__name__}")
    kept: dict[tuple[str, str], list[Samples]] = {(e, k): [] for e in explainers for k in measures}
    seen = 0
    for batch in _progress(batches(data, batch_size, device), data, show_progress):
        for name, one in explainers.items():
            maps = _maps(one, name, batch, seen, channels)
            for key, metric in measures.items():
                kept[name, key].append(Samples.of(*_statistics(metric, key, batch, maps)))
        seen += len(batch)
    for name, one in explainers.items():
        if isinstance(one, ConceptExplanation) and len(one) != seen:
            raise InputError(f"explainer {name!r} explains {len(one)} examples, but the data holds {seen}")
    if not seen:
        raise InputError("data is empty")
    joined = {key: Samples.join(parts) for key, parts in kept.items()}
    return EvaluationTable.summarize(joined, measures, n_bootstrap=n_bootstrap, confidence=confidence, seed=seed)


def _name(explainer: Any) -> str:
    if isinstance(explainer, ConceptExplanation):
        return explainer.method or "explanation"
    if hasattr(explainer, "get_name"):
        return str(explainer.get_name())
    return getattr(explainer, "__name__", type(explainer).__name__)


def _measures(
    metrics: Sequence[Any] | Mapping[str, Any], score_fn: Callable[..., Tensor] | None, nan_policy: str, batch_size: int
) -> dict[str, ExampleMetric]:
    if isinstance(metrics, str) or not isinstance(metrics, (Sequence, Mapping)):
        raise InputError(f"metrics must be a list or a dict, got {metrics!r}")
    items = list(metrics.items()) if isinstance(metrics, Mapping) else [(None, metric) for metric in metrics]
    out: dict[str, ExampleMetric] = {}
    for name, metric in items:
        if isinstance(metric, ExampleMetric):
            found, default = metric, type(metric).__name__
        elif isinstance(metric, str):
            if metric not in METRICS:
                hint = did_you_mean(metric, METRICS)
                raise InputError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}.{hint}")
            options: dict[str, Any] = {"nan_policy": nan_policy}
            if metric in _NEEDS_SCORES:
                if score_fn is None:
                    raise InputError(f"metric {metric!r} needs score_fn=, a callable images -> scores")
                options |= {"score_fn": score_fn, "batch_size": batch_size}
            found, default = METRICS[metric](**options), metric
        elif callable(metric):
            found, default = _Function(metric, nan_policy=nan_policy), getattr(metric, "__name__", "metric")
        else:
            raise InputError(f"a metric is a name, a streaming metric or a function, got {type(metric).__name__}")
        if (name or default) in out:
            raise InputError(f"two metrics are called {name or default!r}; give a dict name -> metric")
        out[name or default] = found
    return out


def _maps(explainer: Any, name: str, batch: Batch, start: int, channels: str) -> Tensor:
    n = len(batch)
    found: Any
    if isinstance(explainer, ConceptExplanation):
        if start + n > len(explainer):
            raise InputError(f"explainer {name!r} explains {len(explainer)} examples, but the data holds more")
        found = explainer[start : start + n].to(batch.inputs.device)
    elif hasattr(explainer, "attribute"):
        found = explainer.attribute(batch.inputs, **({} if batch.target is None else {"target": batch.target}))
    else:
        found = explainer(batch.inputs, **({"target": batch.target} if _takes_target(explainer) else {}))
    several = batch.masks is not None and batch.masks.ndim == 4
    if isinstance(found, ConceptExplanation):
        if len(found.concepts) > 1 and not several:
            raise InputError(
                f"explainer {name!r} explains {len(found.concepts)} concepts: give masks (N, T, H, W), one for each, "
                "or select one with explanation[:, name]"
            )
        found = found.maps
    if isinstance(found, np.ndarray):
        found = torch.from_numpy(found)
    if not isinstance(found, Tensor) or found.ndim not in (3, 4) or len(found) != n:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"explainer {name!r} must return maps ({n}, h, w) or ({n}, T, h, w), got {got}")
    found = found.detach()
    if found.ndim == 4 and found.shape[1] > 1 and not several:
        found = (found.abs() if channels == "abs_sum" else found).float().sum(1)
    return found


def _takes_target(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return "target" in parameters


def _statistics(metric: ExampleMetric, name: str, batch: Batch, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(metric, s._ScoreMetric):
        if maps.ndim == 4 and maps.shape[1] > 1:
            raise InputError(f"metric {name!r} needs one map an image, got {tuple(maps.shape)}")
        return metric.statistics(batch.inputs, maps, target=batch.target)
    if batch.masks is None:
        raise InputError(f"metric {name!r} needs masks, but data has none")
    if isinstance(metric, _Function):
        return metric.statistics(maps, batch.masks)
    return metric.statistics(maps, batch.masks, batch.ignore)


def _progress(items: Iterator[Batch], data: Any, show: bool) -> Iterable[Batch]:
    if not show:
        return items
    from tqdm import tqdm

    total = len(data) if hasattr(data, "__len__") and isinstance(data, torch.utils.data.DataLoader) else None
    return tqdm(items, desc="evaluate", unit="batch", total=total)
