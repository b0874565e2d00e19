"""`evaluate` runs explainers over a data set and returns a tidy table with confidence intervals."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_concepts._checks import one_of, unique_names
from captum_concepts._undo import autocast_of_the_caller, unharming
from captum_concepts.errors import InputError, InputWarning, did_you_mean
from captum_concepts.explanation import ConceptExplainer, ConceptExplanation, ContributionExplainer
from captum_concepts.images import preprocessing_of
from captum_concepts.metrics import streaming_maps as m, streaming_scores as s, streaming_words as w
from captum_concepts.metrics._batches import Batch, batches
from captum_concepts.metrics.baselines import Blind
from captum_concepts.metrics.streaming import ExampleMetric
from captum_concepts.metrics.table import EvaluationTable, Samples, check_resampling

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
    "box_iou": m.BoxIoU,
    "pixel_accuracy": m.PixelAccuracy,
    "mean_iou": m.MeanIoU,
    "average_precision": m.AveragePrecision,
    "average_drop": s.AverageDrop,
    "increase_in_confidence": s.IncreaseInConfidence,
    "insertion": s.Insertion,
    "deletion": s.Deletion,
    "top1_present": w.Top1Present,
    "concept_auroc": w.ConceptAUROC,
    "presence_brier": w.PresenceBrier,
    "concept_existence": w.ConceptExistence,
}
#: Metrics of the concepts that a ConceptExplainer reports, instead of its maps.
WORD_METRICS = ("top1_present", "concept_auroc", "presence_brier", "concept_existence")
_NEEDS_SCORES = ("average_drop", "increase_in_confidence", "insertion", "deletion")


class _Function(ExampleMetric):
    """A user's own ``(maps, masks) -> (N,)``."""

    higher_is_better = None

    def __init__(self, function: Callable[..., Tensor], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.function = function

    def per_example(self, maps: Tensor, masks: Tensor) -> Tensor:
        found = self.function(maps, masks)
        if not isinstance(found, Tensor) or not found.ndim or len(found) != len(masks):  # such as a mean of the batch
            got = f"{tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            name = getattr(self.function, "__name__", "the metric")
            raise InputError(
                f"{name} must return a tensor with one value per example, ({len(masks)},) for this batch, got {got}"
            )
        return found


@unharming
def evaluate(
    explainers: Any,
    data: Iterable[Any],
    metrics: Sequence[Any] | Mapping[str, Any] = ("nra", "nra_exact", "hit_rate", "epg"),
    *,
    score_fn: Callable[..., Tensor] | None = None,
    concepts: Sequence[str] | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 32,
    channels: str = "sum",
    nan_policy: str = "omit",
    n_bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    device: torch.device | str | None = None,
    show_progress: bool = False,
) -> EvaluationTable:
    """Evaluate one or several explainers on a data set and return a table of metrics.

    Data is read once, one batch at a time, and only a few numbers per example are kept. Confidence intervals are
    percentile bootstrap intervals over examples. Pass the T concepts of an image as one example with masks (T, H, W),
    so that they are resampled together. All explainers and metrics share the resamples, so differences are paired
    (:meth:`EvaluationTable.compare`).

    Maps are matched with masks by name. If the data names its masks (see ``concepts``), the maps of a
    :class:`~captum_concepts.explanation.ConceptExplainer` are ``concept_maps(inputs, names)``; names that it does not
    know are left out for every explainer and listed in ``table.unmatched``. Otherwise, with one mask per image, the map
    is ``attribute(inputs, target=target)``.

    Args:
        explainers: one explainer, or a dict name -> explainer. Each is a ConceptExplainer (this package's methods), an
            object with ``attribute(inputs, target=...)`` (Captum's attributions), a callable ``inputs -> maps`` (also
            called with ``target`` and ``concepts`` if it has parameters of these names) that returns maps or a
            ``ConceptExplanation``, or a ``ConceptExplanation`` of all images in the order of ``data``.
        data: batches or single examples: a ``DataLoader``, a ``Dataset`` (including the readers of ``datasets``), a
            list or a generator of ``(inputs, masks)``, ``(inputs, masks, target)``, or dicts with these keys and
            optionally ``ignore``, ``concepts`` and ``score_target``. Images are ``(C, H, W)`` or ``(N, C, H, W)``;
            masks are ``(H, W)`` or ``(T, H, W)``, with a leading N for batches. ``concepts``: T names of the masks, or
            one name for a single mask. ``target``: the output of the model for ``attribute`` and ``score_fn``, never a
            concept; ``score_target`` if the outputs of ``score_fn`` are not those that ``attribute`` explains. Single
            examples are collated while their shapes agree. ``masks`` may be None if no metric uses them; an image
            without concepts, T = 0, is an example without values.
        metrics: names from ``METRICS``, streaming metrics of this package (their state is unchanged), or functions
            ``(maps, masks) -> (N,)``; or a dict name -> one of these. ``"top1_present"``, ``"concept_auroc"``,
            ``"presence_brier"`` and ``"concept_existence"`` (of contributions to the predicted class) measure whether
            the reported concepts are in the image, not where. They need ConceptExplainers and names, and are undefined
            for other rows, such as baselines.
        score_fn: for the names ``average_drop``, ``increase_in_confidence``, ``insertion`` and ``deletion``: images ->
            scores ``(N,)``, or ``(N, K)``, of which each example's ``target`` selects one.
        concepts: names of the T masks of ``(N, T, H, W)`` and the vocabulary of the metrics of reported concepts; None:
            those of the items, or ``data.concepts``.
        transform: computes the model's inputs from a batch of the data's images. The readers of ``datasets`` return
            images in [0, 1]; for a network trained on normalized images, pass ``images.preprocessing_of(model)``.
        batch_size: examples per collated batch, and images per call of ``score_fn``.
        channels: how attributions ``(N, C, H, W)`` of the input or of a layer's channels are reduced to one map if the
            masks are ``(N, H, W)``: ``"sum"`` or ``"abs_sum"`` (the sum of absolute values).
        nan_policy: see :class:`ExampleMetric`; the table counts undefined values under each policy.
        n_bootstrap: number of resamples; 0 for no intervals. Fewer than 5 examples have no intervals either.
        confidence: coverage of the intervals.
        seed: random seed of the resampling.
        device: device to which inputs, masks and targets are moved; None leaves them where they are.
        show_progress: show a tqdm bar over the batches.

    Returns:
        An :class:`EvaluationTable`.

    Raises:
        InputError: an unknown metric, data or maps that do not match, a metric without what it needs, or masks without
            names or with class labels where a ConceptExplainer needs the names of concepts.

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
    named = dict(explainers) if isinstance(explainers, Mapping) else {_name(explainers): explainers}
    measures = _measures(metrics, score_fn, nan_policy, batch_size)
    if not named or not measures:
        raise InputError("pass at least one explainer and one metric")
    for what, names in (("explainer", named), ("metric", measures)):
        for name in names:
            if not isinstance(name, str):
                raise InputError(f"the name of each {what} must be a string, got {name!r}")
    check_resampling(n_bootstrap, confidence, seed)  # before the work
    one_of("channels", channels, ("sum", "abs_sum"))
    for name, one in named.items():
        if not (isinstance(one, ConceptExplanation) or callable(getattr(one, "attribute", one))):
            raise InputError(
                f"explainer {name!r} is a {type(one).__name__}, which has no attribute() and is not callable"
            )
    words = Words.of(named, data, concepts)
    if words is None and any(isinstance(metric, w.WordMetric) for metric in measures.values()):
        raise InputError(f"{', '.join(WORD_METRICS)} require ConceptExplainers and data that names its concepts")
    kept = {(e, k): Samples() for e in named for k in measures}
    _warn_of_raw_images(named, data, transform)
    seen = 0
    for batch in _progress(batches(data, batch_size, device), data, show_progress):
        if transform is not None:
            inputs = transform(batch.inputs)
            if not isinstance(inputs, Tensor) or not inputs.ndim or len(inputs) != len(batch):
                got = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
                raise InputError(f"transform must return a tensor with {len(batch)} images, got {got}")
            batch = replace(batch, inputs=inputs)
        chosen, columns, rows = (batch, None, None) if words is None else words.known_part(batch)
        asked = batch if rows is None else chosen
        places = [seen + i for i in (range(len(batch)) if rows is None else rows)]
        for name, one in named.items():
            maps: Tensor | None = None
            for key, metric in measures.items():
                if isinstance(metric, w.WordMetric):
                    statistics = words.statistics(metric, name, one, batch)  # type: ignore[union-attr]
                elif not places:
                    statistics = _without(metric, [], (), len(batch))
                else:
                    if maps is None:
                        maps = _maps(one, name, asked, chosen, columns, places, channels)
                    statistics = _statistics(metric, key, chosen, maps)
                    if rows is not None:
                        statistics = _without(metric, rows, statistics, len(batch))
                kept[name, key].add(*statistics)
        seen += len(batch)
    for name, one in named.items():
        if isinstance(one, ConceptExplanation) and len(one) != seen:
            raise InputError(f"explainer {name!r} explains {len(one)} examples, but the data contains {seen}")
    if not seen:
        raise InputError("data is empty")
    unmatched = [] if words is None else sorted(words.unmatched)
    return EvaluationTable.summarize(
        kept, measures, n_bootstrap=n_bootstrap, confidence=confidence, seed=seed, unmatched=unmatched
    )


@dataclass
class Words:
    """The names that data and explainers share.

    Args:
        vocabulary: the names in the data; empty if only its items have names.
        columns: for each named explainer, its own spelling of a name by the plain one.
        unmatched: names of the data that some explainer does not know, collected during the run.
    """

    vocabulary: list[str]
    columns: dict[str, dict[str, str]]
    unmatched: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, explainers: Mapping[str, Any], data: Any, given: Sequence[str] | None) -> Words | None:
        """The names that data and explainers share; None if no explainer has named concepts."""
        named = {name: one for name, one in explainers.items() if isinstance(one, ConceptExplainer)}
        if not named:
            return None
        vocabulary = given if given is not None else getattr(data, "concepts", None)
        if vocabulary is None:
            vocabulary = getattr(getattr(data, "dataset", None), "concepts", None) or []
        columns = {}
        for name, one in named.items():
            if one.concepts is None:
                raise InputError(f"explainer {name!r} has no concepts yet")
            columns[name] = spellings(one.concepts)
        return cls(unique_names(list(vocabulary), "concept"), columns)

    def knows(self, name: str) -> bool:
        """Whether every named explainer has the concept."""
        known = all(plain_name(name) in own for own in self.columns.values())
        if not known:
            self.unmatched.add(name)
        return known

    def known_part(self, batch: Batch) -> tuple[Batch, list[int] | None, list[int] | None]:
        """The batch with only the masks of known names, their indices in T for masks (N, T, H, W), and the indices of
        the examples with known names if each example has one name."""
        if batch.masks is None or (batch.masks.ndim == 3 and batch.concepts is None):
            return batch, None, None
        names = batch.concepts if batch.concepts is not None else self.vocabulary
        if batch.masks.ndim == 3:
            rows = [i for i, name in enumerate(names) if self.knows(name)]
            return (batch, None, None) if len(rows) == len(names) else (batch.of(rows), None, rows)
        if len(names) != batch.masks.shape[1]:
            what = "have no names" if not names else f"do not fit the {len(names)} concepts of the data"
            raise InputError(
                f"masks {tuple(batch.masks.shape)} {what}; pass concepts= with one name for each mask, to match them "
                "with the explainer's concepts"
            )
        columns = [k for k, name in enumerate(names) if self.knows(name)]
        ignore = batch.ignore[:, columns] if batch.ignore is not None and batch.ignore.ndim == 4 else batch.ignore
        masks = batch.masks[:, columns]
        return replace(batch, masks=masks, ignore=ignore, concepts=[names[k] for k in columns]), columns, None

    @autocast_of_the_caller()
    def statistics(self, metric: Any, name: str, explainer: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Statistics of a metric of reported concepts over the vocabulary."""
        if not self.vocabulary or batch.masks is None:
            raise InputError(f"{type(metric).__name__} requires masks and data that names its concepts")
        if name not in self.columns:  # a baseline, or bare maps, reports no concepts
            nothing = torch.zeros(len(batch))
            return nothing[:, None], nothing, nothing
        known = [word for word in self.vocabulary if self.knows(word)]
        truth = self._truth(batch, known)
        own = self.columns[name]
        wanted = [own[plain_name(word)] for word in known]
        if metric.values == "presence":
            values = explainer.explain(batch.inputs, concepts=wanted, contributions=False).presence
            if values is None:
                raise InputError(
                    f"explainer {name!r} does not decide which concepts are present; fit or calibrate it with "
                    "held-out images"
                )
        elif metric.values == "contributions":
            if not isinstance(explainer, ContributionExplainer):
                raise InputError(f"explainer {name!r} has no contributions, which {type(metric).__name__} requires")
            values = explainer.contributions(batch.inputs, concepts=wanted)
        else:
            columns = [list(explainer.concepts).index(word) for word in wanted]
            values = explainer.scores(batch.inputs)[:, columns]
        return metric.statistics(values, truth.to(values.device))

    def _truth(self, batch: Batch, known: Sequence[str]) -> Tensor:
        """``(N, T)`` bool, whether the image shows the concept."""
        masks = batch.masks
        assert masks is not None
        if masks.ndim == 3:
            raise InputError(
                f"{', '.join(WORD_METRICS)} need all concepts of an image, but each example is one mask; pass masks "
                "(T, H, W) with T names, that is the data sets of captum_concepts.datasets themselves, not their "
                "pairs() or a collated batch"
            )
        names = batch.concepts if batch.concepts is not None else self.vocabulary
        shown = masks.flatten(-2).any(-1)
        found = [{names[k] for k in row.nonzero().flatten().tolist()} for row in shown]
        return torch.tensor([[word in row for word in known] for row in found], dtype=torch.bool)


def plain_name(name: str) -> str:
    """The name in lower case, with spaces instead of ``_`` and ``-``.

    >>> plain_name("Traffic_Light")
    'traffic light'
    """
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def spellings(concepts: Sequence[str]) -> dict[str, str]:
    """The concept for each of its plain names; commas separate synonyms, as in ImageNet's class names.

    >>> spellings(["traffic_light", "dog, domestic dog"])["domestic dog"]
    'dog, domestic dog'
    """
    found: dict[str, str] = {}
    for concept in concepts:
        for part in (concept, *concept.split(",")):
            found.setdefault(plain_name(part), concept)
    return found


def _warn_of_raw_images(explainers: Mapping[str, Any], data: Any, transform: Any) -> None:
    """Warn if images in [0, 1], as from the readers of ``datasets``, reach a network trained on normalized images."""
    if transform is not None or not hasattr(data, "reading"):
        return
    for name, one in explainers.items():
        model = next((getattr(one, key) for key in ("backbone", "forward_func") if hasattr(one, key)), None)
        known = preprocessing_of(model) if isinstance(model, torch.nn.Module) else None
        if known is not None and any(known.mean):
            warnings.warn(
                f"{type(data).__name__} returns images in [0, 1], but the network of {name!r} was trained on "
                f"normalized ones ({known.source}); pass transform=images.preprocessing_of(model)",
                InputWarning,
                stacklevel=3,
            )
            return


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
        elif isinstance(metric, type):
            raise InputError(f"the metric {metric.__name__} is a class; pass an instance, {metric.__name__}()")
        elif callable(metric):
            found, default = _Function(metric, nan_policy=nan_policy), getattr(metric, "__name__", "metric")
        else:
            raise InputError(f"a metric is a name, a streaming metric or a function, got {type(metric).__name__}")
        if (name or default) in out:
            raise InputError(f"two metrics are called {name or default!r}; pass a dict name -> metric")
        out[name or default] = found
    return out


@autocast_of_the_caller()
def _maps(
    explainer: Any, name: str, batch: Batch, chosen: Batch, columns: list[int] | None, places: list[int], channels: str
) -> Tensor:
    """The maps for the masks of ``chosen``, which are ``columns`` of those of ``batch``, the data's examples
    ``places``."""
    n = len(batch)
    found: Any
    several = batch.masks is not None and batch.masks.ndim == 4
    answers = isinstance(explainer, ConceptExplainer)
    if answers and chosen.concepts is not None:
        return _named_maps(explainer, chosen)
    if isinstance(explainer, ConceptExplanation):
        if places[-1] >= len(explainer):
            raise InputError(f"explainer {name!r} explains {len(explainer)} examples, but the data contains more")
        found = explainer[places, explainer.concepts].to(batch.inputs.device)
    elif answers and getattr(explainer, "target_is_concept", False):
        raise InputError(
            f"explainer {name!r} explains concepts, but the data names none (class labels are not concepts); pass "
            "items with the key 'concepts'"
        )
    elif hasattr(explainer, "attribute"):
        found = explainer.attribute(batch.inputs, **({} if batch.target is None else {"target": batch.target}))
        if answers and isinstance(found, Tensor) and found.ndim == 4 and found.shape[1] > 1:
            raise InputError(
                f"explainer {name!r} returns {found.shape[1]} maps for one mask per image; name the concept of each "
                "under the key 'concepts'"
            )
    else:
        extra = {"target": batch.target, "concepts": batch.concepts}
        found = explainer(batch.inputs, **{key: extra[key] for key in _parameters(explainer) if key in extra})
    if isinstance(found, ConceptExplanation):
        if len(found.concepts) > 1 and not several:
            raise InputError(
                f"explainer {name!r} explains {len(found.concepts)} concepts; pass masks (N, T, H, W), one for each, "
                "or select one with explanation[:, name]"
            )
        found = found.maps
    if isinstance(found, np.ndarray):
        found = torch.from_numpy(found)
    if not isinstance(found, Tensor) or found.ndim not in (3, 4) or len(found) != n:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"explainer {name!r} must return maps ({n}, h, w) or ({n}, T, h, w), got {got}")
    found = found.detach()
    if found.ndim == 3 and several and isinstance(explainer, Blind) and batch.masks is not None:
        found = found[:, None].expand(-1, batch.masks.shape[1], -1, -1)  # concept-agnostic: one map for all
    if found.ndim == 4 and found.shape[1] > 1 and not several:
        found = (found.abs() if channels == "abs_sum" else found).float().sum(1)
    return found[:, columns] if several and columns is not None and found.ndim == 4 else found


def _named_maps(explainer: ConceptExplainer, batch: Batch) -> Tensor:
    """``(N, T, h, w)`` maps of the T named masks, or ``(N, h, w)`` maps of the concept named for each image."""
    own = spellings(explainer.concepts)
    names = [own[plain_name(name)] for name in batch.concepts or ()]
    wanted = list(dict.fromkeys(names))
    if not wanted:
        return batch.inputs.new_zeros((len(batch), 0, 1, 1))
    maps = explainer.concept_maps(batch.inputs, wanted).detach()
    columns = torch.tensor([wanted.index(name) for name in names], device=maps.device)
    if batch.masks is not None and batch.masks.ndim == 4:
        return maps[:, columns]
    return maps[torch.arange(len(maps), device=maps.device), columns]


def _without(
    metric: ExampleMetric, rows: list[int], statistics: Sequence[Tensor], n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of n examples, of which only ``rows`` have values."""
    total, counted, skipped = torch.zeros(n, metric.width, dtype=torch.float64), torch.zeros(n), torch.zeros(n)
    for whole, part in zip((total, counted, skipped), statistics, strict=False):
        whole[rows] = part.to(whole)
    return total, counted.long(), skipped.long()


def _parameters(function: Callable[..., Any]) -> Sequence[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []


def _statistics(metric: ExampleMetric, name: str, batch: Batch, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(metric, s._ScoreMetric):
        if maps.ndim == 4 and maps.shape[1] > 1:
            raise InputError(f"metric {name!r} needs one map per image, got {tuple(maps.shape)}")
        goal = batch.target if batch.score_target is None else batch.score_target
        return metric.statistics(batch.inputs, maps, target=goal)
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
