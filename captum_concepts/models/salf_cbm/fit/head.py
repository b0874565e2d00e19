"""Concept activations on disk, and the sparse or dense linear head over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from captum_concepts._artifacts import Array, either, flag, list_of, number as a_number, own_folder, table
from captum_concepts._captum import target_indices
from captum_concepts._checks import number, one_of
from captum_concepts._undo import warnings_filtered
from captum_concepts.activations import full_precision
from captum_concepts.errors import InputError, InputWarning, shortened
from captum_concepts.models.salf_cbm.fit.features import GridFeatures
from captum_concepts.models.salf_cbm.fit.objective import ahead
from captum_concepts.models.salf_cbm.fit.steps import all_reduce, digest, first_decides, progress, say, share_of
from captum_concepts.solvers import ElasticNetResult, elastic_net_path, fit_elastic_net, relaxed_fit
from captum_concepts.solvers.elastic_net import open_problem
from captum_concepts.store import ShardReader, default_shard_rows, missing_shards, read_manifest, world
from captum_concepts.store.processes import fill_together

if TYPE_CHECKING:
    from captum_concepts.models.salf_cbm.salf_cbm import SALFCBM

#: Target nonzero weights per class of a sparse head, as in LF-CBM (25 to 35), or half of the concepts if fewer.
NONZEROS = 30
#: Strength of a dense head's ridge penalty, enough for a unique optimum.
DENSE_LAM = 1e-4
#: Strength in the metric of the features, and the fraction of a plain ridge in it. Chosen by cross-validation on the
#: training images of Caltech-101 (539 and 1,018 concepts); a smaller fraction is equally accurate there, but lets the
#: weights of nearly synonymous concepts cancel more.
FEATURE_LAM, PLAIN_SHARE = 1e-2, 0.03
#: Maximum bytes of activations that the solver keeps in memory; larger ones are read from disk in chunks.
IN_MEMORY = 1 << 30
_ROWS = 1024
#: The schema of :attr:`HeadFit.notes` in files.
HEAD_NOTES = table(
    {
        "lam": either(list_of(a_number(0)), a_number(0)),
        "alpha": a_number(0, 1),
        "objective": a_number(),
        "gap": a_number(),
        "converged": flag,
        "nonzeros_per_class": a_number(0),
    }
)


class Activations:
    """``(N, M)`` concept activations (unstandardized means of the concept maps) of this process's images, in chunks.

    Args:
        path: the folder that :func:`compute_activations` wrote.
        made_from: what they must have been computed from.
    """

    def __init__(self, path: Path, made_from: Mapping[str, Any]) -> None:
        self._reader = ShardReader(path, made_from, verify_on_read=True)
        self._share = share_of(len(self._reader))
        self.concepts: int = self._reader.row_shape("activations")[0]

    def __len__(self) -> int:
        return len(self._share)

    def __iter__(self) -> Iterator[Tensor]:
        return ahead(
            lambda start: self._reader.rows("activations", self._share[start : start + _ROWS]),
            range(0, len(self), _ROWS),
        )

    def rows(self) -> Any:
        """The solver's input, one tensor if it fits in memory, otherwise these chunks.

        The tensor is in double precision, because nearly collinear concepts (which are common) keep the duality gap in
        single precision above its tolerance.
        """
        return torch.cat([chunk.double() for chunk in self]) if len(self) * self.concepts * 8 <= IN_MEMORY else self


def compute_activations(
    root: Path,
    name: str,
    features: GridFeatures,
    weight: Tensor,
    made_from: Mapping[str, Any],
    *,
    batch_size: int = 256,
    scratch: Path | None = None,
    show_progress: bool = False,
) -> Activations:
    """Pool the features and apply the bottleneck; the mean of a concept map is the map of the mean feature.

    All processes write shards under ``root``. A killed run resumes with any number of processes.

    Args:
        root: contains the folder ``NAME-DIGEST``.
        name: see above.
        features: of all images.
        weight: ``(M, D)``.
        made_from: what the activations are computed from.
        batch_size: images per read.
        scratch: where each process writes the folder if it is not finished under ``root``; None takes ``root``.
        show_progress: show a progress bar.
    """

    def finished(folder: Path) -> bool:
        known = read_manifest(folder)
        return known is not None and not known.growing and not missing_shards(folder, known)

    folder = own_folder(root / f"{name}-{digest(made_from)}")
    done = first_decides(finished(folder))
    alone = not done and scratch not in (None, root)
    if alone and scratch is not None:
        folder = own_folder(scratch / folder.name)
    say(f"{name}: taken from an earlier run" if done else f"{name}: computing")

    def compute(spans: list[tuple[int, int]], write: Any) -> None:
        total = sum(end - start for start, end in spans)
        with torch.no_grad(), progress(total, "concept activations", "image", show_progress) as advance:
            for span in spans:
                parts = []
                for rows in torch.arange(*span).split(batch_size):
                    pooled = features.rows(rows.numpy()).to(weight.device).float().mean(1)
                    parts.append((pooled @ weight.T).cpu())
                    advance(len(rows))
                write({"activations": torch.cat(parts)}, {})

    fill_together(
        folder,
        made_from,
        len(features),
        compute,
        shard_rows=default_shard_rows(len(features)),
        arrays={"activations": Array("float", ("N", len(weight)))},
        what="the activations at",
        alone=alone,
    )
    return Activations(folder, made_from)


@dataclass(frozen=True)
class HeadFit:
    """A linear head over standardized activations.

    Attributes:
        weight, bias: ``(L, M)`` and ``(L,)``.
        mean, std: ``(M,)`` each, over the training images.
        notes: lam, alpha, objective, gap, converged, nonzeros (mean per class); for independent classes the largest
            gap and the sum of the objectives.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor
    notes: dict[str, Any]


def check_head(head: str, lam: float | None, nonzeros_per_class: float | None, concepts: int) -> None:
    """Refuse contradictory settings before the long steps.

    Raises:
        InputError: both ``lam`` and ``nonzeros_per_class``, or one of them is out of range.
    """
    one_of("head", head, ("sparse", "dense"))
    if lam is not None and nonzeros_per_class is not None:
        raise InputError(
            f"pass lam={lam} or nonzeros_per_class={nonzeros_per_class}, not both, since each determines the other"
        )
    if head == "dense" and nonzeros_per_class is not None:
        raise InputError(
            f"nonzeros_per_class={nonzeros_per_class} requires head='sparse'; a dense head keeps all weights"
        )
    if lam is not None:
        number("lam", lam, lambda value: value >= 0, "a number of at least 0")
    if nonzeros_per_class is not None:
        allowed = f"in (0, {concepts}], the number of concepts"
        number("nonzeros_per_class", nonzeros_per_class, lambda value: 0 < value <= concepts, allowed)


def check_columns(labels: Tensor, num_classes: int) -> None:
    """Refuse independent labels of another number of classes."""
    if labels.ndim > 1 and tuple(labels.shape[1:]) != (num_classes,):
        raise InputError(f"labels must be (N,), or (N, {num_classes}), one column per class, got {tuple(labels.shape)}")


def check_class_weights(weights: str | Sequence[float] | None, num_classes: int) -> None:
    """Refuse weights other than ``"balanced"``, one positive number per class, or None."""
    if weights is None or isinstance(weights, str):
        one_of("class_weights", weights, (None, "balanced"))
        return
    try:
        given = torch.as_tensor(weights, dtype=torch.float64)
        good = given.shape == (num_classes,) and bool(((given > 0) & given.isfinite()).all())
    except (TypeError, ValueError, RuntimeError):
        good = False
    if not good:
        allowed = f"{num_classes} positive numbers or 'balanced'"
        raise InputError(f"class_weights must be {allowed}, got {shortened(weights)}")


def fit_head(
    activations: Any,
    labels: Tensor,
    num_classes: int,
    *,
    lam: float | None = None,
    nonzeros_per_class: float | None = None,
    head: str = "sparse",
    alpha: float = 0.99,
    class_weights: str | Sequence[float] | None = None,
    bottleneck: Tensor | None = None,
    tol: float = 1e-4,
    device: torch.device | str | None = None,
    show_progress: bool = False,
) -> HeadFit:
    r"""The linear head over standardized activations, by cross-entropy plus an elastic net (SALF-CBM, section 3.4).

    .. math:: \frac1N \sum_n \mathrm{CE}(W c^*_n + b, y_n) + \lambda \left(\tfrac{1-\alpha}{2} \|W\|_F^2 +
        \alpha \|W\|_1\right)

    The paper prints a sum over the images and an unsquared norm; its values of ``lam`` are for LF-CBM's code, which
    uses the mean and the square as above.

    Args:
        activations: ``(N, M)`` tensor, array, or re-iterable of chunks, not standardized; this process's rows under
            ``torch.distributed``.
        labels: ``(N,)`` of the same rows; or ``(N, L)`` of 0 and 1 for classes that are not mutually exclusive, with
            one logistic regression per class.
        num_classes: L.
        lam: strength. None chooses it to reach ``nonzeros_per_class`` for a sparse head; for a dense one it is 1e-2
            with ``bottleneck``, 1e-4 without.
        nonzeros_per_class: target for the mean number of nonzero weights per class (met within 10 % if possible). None
            takes 30, or half of the concepts if fewer, or as many as needed if fewer separate the classes.
        head: ``"sparse"``, or ``"dense"`` for ridge alone (alpha 0), in the metric of ``bottleneck`` if passed.
        alpha: fraction of the L1 term, for a sparse head.
        class_weights: weight of an image of each class, as L numbers or ``"balanced"``, which gives all classes the
            same total weight. For independent classes it is the weight of an image that has the class. The mean and
            standard deviation that standardize the activations are those of the images without weights.
        bottleneck: ``(M, D)``, which maps the backbone's features to the activations. A dense head is then penalized by
            the weights on the *features*, :math:`\|W R^{1/2}\|_F^2` with :math:`R \propto A A^\top + (0.03\,
            \|A\|_2)^2 I` of mean eigenvalue 1, where row m of A is that of the bottleneck divided by the standard
            deviation of its activation. Concepts are nearly collinear, and a plain ridge would suppress the small
            differences between them that separate classes.
        tol: accuracy of the optimum; see :func:`~captum_concepts.solvers.fit_elastic_net`.
        device: device of the computation.
        show_progress: show a progress bar.

    Example:
        >>> c = torch.tensor([[0.0, 1.0], [1.0, 1.1], [2.0, 1.1], [3.0, 1.0]] * 3)
        >>> fit = fit_head(c, torch.tensor([0, 0, 1, 1] * 3), 2, lam=0.1)
        >>> (fit.weight != 0).tolist(), fit.mean
        ([[True, False], [True, False]], tensor([1.5000, 1.0500]))
    """
    width = activations.shape[1] if hasattr(activations, "shape") else next(iter(activations)).shape[1]
    check_head(head, lam, nonzeros_per_class, width)
    check_columns(labels, num_classes)
    where: dict[str, Any] = {"device": device, "process_group": True if world()[1] > 1 else None}
    one, kind = labels, {"num_classes": num_classes, "loss": "multinomial", **where}
    if labels.ndim == 2:
        one, kind = labels[:, 0].long(), {"num_classes": None, "loss": "logistic", **where}
    metric = None
    if head == "dense" and bottleneck is not None:
        metric = _FeatureMetric(activations, one, bottleneck, **kind)
    rows = activations if metric is None else metric.rows
    if head == "dense" and lam is None:
        lam = DENSE_LAM if metric is None else FEATURE_LAM
    options: dict[str, Any] = {
        **where,
        "tol": tol,
        "standardize": metric is None,
        "show_progress": show_progress and world()[0] == 0,
    }
    how = (lam, nonzeros_per_class, head, alpha, width)
    weights = _class_weights(class_weights, labels, num_classes)
    if labels.ndim == 1:
        each = None if weights is None else weights[labels.long()]
        fit = _head_fit(_solved(rows, labels, how, sample_weight=each, num_classes=num_classes, **options), metric)
        if weights is None or metric is not None:
            return fit
        mean, std = _mean_and_std(activations, one, **kind)
        return HeadFit(*_restandardized([fit], mean, std), mean.float(), std.float(), fit.notes)
    fits = []
    for k in range(num_classes):
        own = labels[:, k].long()
        each = None if weights is None else torch.where(own > 0, weights[k], torch.ones(()).double())
        fits.append(_head_fit(_solved(rows, own, how, sample_weight=each, loss="logistic", **options), metric))
    notes = {
        "lam": [fit.notes["lam"] for fit in fits],
        "alpha": fits[0].notes["alpha"],
        "objective": sum(fit.notes["objective"] for fit in fits),
        "gap": max(fit.notes["gap"] for fit in fits),
        "converged": all(fit.notes["converged"] for fit in fits),
        "nonzeros_per_class": sum(fit.notes["nonzeros_per_class"] for fit in fits) / len(fits),
    }
    mean, std = fits[0].mean, fits[0].std
    if weights is not None and metric is None:  # each class had its own mean and deviation, but the model has only one
        mean, std = _mean_and_std(activations, one, **kind)
    return HeadFit(*_restandardized(fits, mean, std), mean.float(), std.float(), notes)


def _mean_and_std(activations: Any, labels: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``(M,)`` from the solver, which also refuses data it cannot fit."""
    with warnings_filtered("ignore", InputWarning):  # about classes without images; the fit itself warns
        stats = open_problem(
            activations, labels, standardize=True, sample_weight=None, chunk_size=None, **options
        ).stats
    assert stats.mean is not None
    assert stats.std is not None
    return stats.mean.double().cpu(), stats.std.double().cpu()


def _restandardized(fits: Sequence[HeadFit], mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """``(L, M)`` weights and ``(L,)`` biases with the same logits for activations standardized by ``mean``, ``std``."""
    weight, bias = [], []
    for fit in fits:
        raw = fit.weight.double() / fit.std.double()
        weight.append(raw * std)
        bias.append(fit.bias.double() + raw @ (mean.double() - fit.mean.double()))
    return torch.cat(weight).float(), torch.cat(bias).float()


class _FeatureMetric:
    """Coordinates in which the penalty on the weights of the features is a plain ridge.

    Args:
        activations, labels: as for :func:`fit_head`.
        bottleneck: ``(M, D)``.
        options: of the solver, which computes mean and standard deviation and refuses data it cannot fit.
    """

    def __init__(self, activations: Any, labels: Tensor, bottleneck: Tensor, **options: Any) -> None:
        self.mean, self.std = _mean_and_std(activations, labels, **options)
        made = bottleneck.detach().double().cpu()
        if made.ndim != 2 or len(made) != len(self.std):
            raise InputError(f"bottleneck must be (M, D), M={len(self.std)} concepts, got {tuple(made.shape)}")
        made = made / self.std[:, None]
        gram = made @ made.T
        gram += PLAIN_SHARE**2 * torch.linalg.eigvalsh(gram)[-1] * torch.eye(len(gram)).double()
        values, vectors = torch.linalg.eigh(gram / gram.diagonal().mean())
        self.basis = vectors / values.sqrt()  # |W R^(1/2)| = |V| with W = V basis^T
        held = isinstance(activations, (Tensor, np.ndarray))
        self._chunks: Iterable[Any] = [torch.as_tensor(activations)] if held else activations
        self.rows: Any = next(iter(self)) if held else self

    def __iter__(self) -> Iterator[Tensor]:
        return (((chunk.detach().double().cpu() - self.mean) / self.std) @ self.basis for chunk in self._chunks)


def _solved(
    activations: Any,
    labels: Tensor,
    how: tuple[float | None, float | None, str, float, int],
    **options: Any,
) -> ElasticNetResult:
    lam, nonzeros_per_class, head, alpha, width = how
    if lam is not None:
        return fit_elastic_net(activations, labels, lam, alpha=0.0 if head == "dense" else alpha, **options)
    wanted = nonzeros_per_class or min(NONZEROS, width / 2)
    # If the number is a default, do not warn, because easily separated classes need fewer.
    unasked = warnings_filtered("ignore", InputWarning, "no point of the path")
    with unasked if nonzeros_per_class is None else nullcontext():
        path = elastic_net_path(activations, labels, nonzeros_per_class=wanted, alpha=alpha, **options)
    if path.selected is None:
        raise InputError("the elastic-net path is empty")
    if nonzeros_per_class is None and not path.target_met and isinstance(activations, Tensor):
        # Fewer weights suffice, so take the strongest penalty that is as accurate as the weakest.
        right = [_right(result, activations, labels) for result in path]
        return path[next(i for i, count in enumerate(right) if count >= right[-1])]
    return path.selected


def _right(result: ElasticNetResult, activations: Tensor, labels: Tensor) -> float:
    """The number of images (of all processes) that a solution of the path classifies correctly."""
    logits = result.decision_function(activations.to(result.weight))
    own = labels.to(logits.device)
    found = logits.argmax(1) == own if logits.shape[1] > 1 else (logits[:, 0] > 0) == (own > 0)
    return float(all_reduce(found.sum().double().cpu()))


def _class_weights(weights: str | Sequence[float] | None, labels: Tensor, num_classes: int) -> Tensor | None:
    """``(L,)`` weights of an image of each class."""
    if weights is None:
        return None
    check_class_weights(weights, num_classes)
    if isinstance(weights, str):
        counts = torch.bincount(labels, minlength=num_classes) if labels.ndim == 1 else labels.sum(0)
        total = torch.cat([counts.double(), torch.tensor([len(labels)]).double()])
        counts, n = all_reduce(total)[:-1], total[-1]
        ratio = n / (num_classes * counts) if labels.ndim == 1 else (n - counts) / counts
        return torch.where(counts > 0, ratio, 1.0)
    return torch.as_tensor(weights, dtype=torch.float64)


def _head_fit(result: ElasticNetResult, metric: _FeatureMetric | None) -> HeadFit:
    notes = {
        "lam": result.lam,
        "alpha": result.alpha,
        "objective": result.objective,
        "gap": result.gap,
        "converged": result.converged,
        "nonzeros_per_class": float(result.nonzeros.double().mean()),
    }
    if metric is not None:
        tensors = (result.weight.double().cpu() @ metric.basis.T, result.bias, metric.mean, metric.std)
    elif result.feature_mean is not None and result.feature_std is not None:
        tensors = (result.weight, result.bias, result.feature_mean, result.feature_std)
    else:
        raise InputError("the head was fitted without standardization, which this requires")
    weight, bias, mean, std = (value.detach().float().cpu() for value in tensors)
    return HeadFit(weight, bias, mean, std, notes)


def accuracy(activations: Iterable[Tensor], labels: Tensor, head: HeadFit) -> float:
    """The fraction of images (of all processes) classified correctly; for independent classes, of all decisions."""
    right, start = torch.zeros(2, dtype=torch.float64), 0
    for chunk in activations:
        logits = (chunk - head.mean) / head.std @ head.weight.T + head.bias
        own = labels[start : start + len(chunk)]
        same = logits.argmax(1) == own if own.ndim == 1 else (logits > 0) == (own > 0)
        right += torch.tensor([same.sum(), same.numel()])
        start += len(chunk)
    correct, total = all_reduce(right).tolist()
    return correct / total


@torch.no_grad()
def refit_head(model: SALFCBM, images: Any, labels: Any, **options: Any) -> SALFCBM:
    """A copy of ``model`` with the same concepts, whose rules and standardization are refitted to labeled images.

    This is useful after :meth:`~captum_concepts.SALFCBM.without`, or for other examples of the classes.

    Args:
        model: a SALFCBM with a linear head.
        images: as for :meth:`~captum_concepts.SALFCBM.explain`.
        labels: ``(N,)`` class indices or names; ``(N, L)`` of 0 and 1 for a model with ``multi_label=True``.
        options: of :func:`fit_head`: ``lam``, ``nonzeros_per_class``, ``head``, ...

    Raises:
        InputError: wrong number of labels, or labels of the other kind.
        TargetError: no such class.
    """
    labels = _as_labels(model, labels)
    new = model.select_concepts(list(range(len(model.concepts))))
    std, mean = (full_precision(v).cpu() for v in (model.concept_std, model.concept_mean))
    pooled = full_precision(model.scores(images)).cpu() * std + mean
    if len(labels) != len(pooled):
        raise InputError(f"{len(labels)} labels for {len(pooled)} images")
    linear = model.pointwise
    weight = None if linear is None else full_precision(linear.weight).flatten(1)
    fit = fit_head(pooled.double(), labels, model.num_classes, bottleneck=weight, **options)
    new.head.weight.copy_(fit.weight)
    new.head.bias.copy_(fit.bias)
    new.set_standardization(fit.mean, fit.std)
    if model.presence_slope is not None and model.presence_offset is not None:
        slope, offset = model.presence_slope.cpu(), model.presence_offset.cpu()
        new.set_presence(slope * fit.std / std, offset + slope * (fit.mean - mean) / std)
    new.metadata["head"] = {**fit.notes, "refitted": len(labels)}
    new.metadata.pop("accuracy", None)
    return new


@torch.no_grad()
def relax_head(
    model: SALFCBM,
    images: Any,
    labels: Any,
    *,
    lam: float = 1e-3,
    class_weights: str | Sequence[float] | None = None,
    tol: float = 1e-4,
    device: torch.device | str | None = None,
) -> SALFCBM:
    r"""A copy of ``model`` whose nonzero weights are refitted without the L1 penalty (relaxed lasso, Meinshausen 2007).

    Each class keeps its concepts, and only the values of their weights change; the standardization stays. The fewer
    weights per class, the stronger is the L1 penalty that selected them, and the more it shrank them.

    Args:
        model: a SALFCBM with a sparse linear head.
        images: the training images, as for :meth:`~captum_concepts.SALFCBM.explain`.
        labels: as for :func:`refit_head`.
        lam: strength of the ridge penalty :math:`\tfrac{\lambda}{2} \|W\|_F^2`, positive.
        class_weights, tol, device: as for :func:`fit_head`.

    Raises:
        InputError: wrong number of labels, labels of the other kind, or a head without zero weights.
        TargetError: no such class.
    """
    labels = _as_labels(model, labels)
    check_columns(labels, model.num_classes)
    check_class_weights(class_weights, model.num_classes)
    new = model.select_concepts(list(range(len(model.concepts))))
    weight, bias = (full_precision(value).cpu() for value in (new.head.weight, new.head.bias))
    if bool((weight != 0).all()):
        raise InputError("relax_head is for a sparse head, but no weight of this head is zero; use refit_head")
    activations = full_precision(model.scores(images)).cpu().double()
    if len(labels) != len(activations):
        raise InputError(f"{len(labels)} labels for {len(activations)} images")
    weights = _class_weights(class_weights, labels, model.num_classes)
    options: dict[str, Any] = {"tol": tol, "device": device}
    if labels.ndim == 1:
        options |= {"num_classes": model.num_classes, "warm_start": (weight, bias)}
        each = None if weights is None else weights[labels.long()]
        fits = [relaxed_fit(activations, labels, weight != 0, lam, sample_weight=each, **options)]
    else:
        fits = []
        for k, own in enumerate(labels.long().T):
            options |= {"loss": "logistic", "warm_start": (weight[k : k + 1], bias[k : k + 1])}
            each = None if weights is None else torch.where(own > 0, weights[k], 1.0)
            fits.append(relaxed_fit(activations, own, weight[k : k + 1] != 0, lam, sample_weight=each, **options))
    new.head.weight.copy_(torch.cat([fit.weight for fit in fits]))
    new.head.bias.copy_(torch.cat([fit.bias for fit in fits]))
    new.metadata["head"] = {
        "lam": lam,
        "alpha": 0.0,
        "objective": sum(fit.objective for fit in fits),
        "gap": max(fit.gap for fit in fits),
        "converged": all(fit.converged for fit in fits),
        "nonzeros_per_class": float((new.head.weight != 0).double().sum(1).mean()),
        "relaxed": len(labels),
    }
    new.metadata.pop("accuracy", None)
    return new


def _as_labels(model: SALFCBM, labels: Any) -> Tensor:
    """``labels`` as class indices (N,), or (N, L) of 0 and 1, as the model's classes ask for."""
    labels = labels.tolist() if isinstance(labels, np.ndarray) else labels
    if isinstance(labels, Sequence) and any(isinstance(label, str) for label in labels):
        labels = target_indices(list(labels), len(labels), model.num_classes, model.class_names or (), what="class")
    try:
        labels = torch.as_tensor(labels).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"labels must be class indices or names, got {shortened(labels)}") from error
    if (labels.ndim == 2) != model.multi_label:
        wanted = f"(N, {model.num_classes}) of 0 and 1" if model.multi_label else "(N,) class indices or names"
        raise InputError(
            f"labels of a model with multi_label={model.multi_label} must be {wanted}, got {tuple(labels.shape)}"
        )
    return labels
