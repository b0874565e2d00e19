"""Concept activations on disk, and the sparse or dense linear head over them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_concepts.errors import InputError, InputWarning
from captum_concepts.models._salf_feature_cache import GridFeatures
from captum_concepts.models._salf_objective import ahead
from captum_concepts.models._salf_steps import all_reduce, digest, progress, say, share_of, world
from captum_concepts.solvers import ElasticNetResult, elastic_net_path, fit_elastic_net
from captum_concepts.store import ShardReader, ShardWriter, all_or_none, read_manifest

#: Nonzero weights a class that a sparse head aims at, as LF-CBM does (25 to 35); half of the concepts where that is
#: less.
NONZEROS = 30
#: Strength of a dense head's ridge penalty: enough for a unique optimum.
DENSE_LAM = 1e-4
#: Activations of up to so many bytes are held in memory by the solver, more are read from disk in chunks.
IN_MEMORY = 1 << 30
_ROWS = 1024


class Activations:
    """``(N, M)`` concept activations (means of the concept maps, as they are) of this process' images, by chunk.

    Args:
        path: the folder that :func:`compute_activations` wrote.
        made_from: what they must have been made from.
    """

    def __init__(self, path: Path, made_from: Mapping[str, Any]) -> None:
        self._reader = ShardReader(path, made_from, verify_on_read=True)
        self.concepts: int = self._reader.row_shape("activations")[0]

    def __len__(self) -> int:
        return len(self._reader)

    def __iter__(self) -> Iterator[Tensor]:
        return ahead(
            lambda start: self._reader.rows("activations", range(start, min(start + _ROWS, len(self)))),
            range(0, len(self), _ROWS),
        )

    def rows(self) -> Any:
        """What the solver takes: one tensor, or these chunks.

        Double precision where there is room: nearly collinear concepts (which are usual) leave the solver's certificate
        in single precision short of its tolerance.
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
    show_progress: bool = False,
) -> Activations:
    """Pool the features and apply the bottleneck: the mean of a concept map is the map of the mean feature.

    Written shard by shard under ``root``, by each process its own images; goes on after a kill.

    Args:
        root: where the folder ``NAME-DIGEST`` lies.
        name: see above.
        features: of all images.
        weight: ``(M, D)``.
        made_from: see :class:`~captum_concepts.store.ShardWriter`.
        batch_size: images read at a time.
        show_progress: show a bar.
    """
    rank, size = world()
    folder = root / f"{name}-{digest(made_from)}"
    if size > 1:
        folder = folder / f"part-{rank:05d}-of-{size:05d}"
    share = share_of(len(features))

    def write() -> None:
        whole = read_manifest(folder)
        if whole is not None and not whole.growing:
            say(f"{name}: taken from an earlier run")
            return
        say(f"{name}: computing")
        writer = ShardWriter(folder, made_from, shard_rows=_ROWS)
        mine = torch.tensor(share, dtype=torch.long)[writer.rows :]
        with torch.no_grad(), progress(len(mine), "concept activations", "image", show_progress) as advance:
            for part in (part for span in mine.split(_ROWS) for part in span.split(batch_size)):
                pooled = features.rows(part.numpy()).to(weight.device).float().mean(1)
                writer.append({"activations": pooled @ weight.T})
                advance(len(part))
        writer.finish()

    all_or_none(write)
    return Activations(folder, made_from)


@dataclass(frozen=True)
class HeadFit:
    """A linear head over standardised activations.

    Attributes:
        weight, bias: ``(K, M)`` and ``(K,)``.
        mean, std: ``(M,)`` each, over the training images.
        notes: lam, alpha, objective, gap, converged, nonzeros (mean a class).
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor
    notes: dict[str, Any]


def check_head(head: str, lam: float | None, nonzeros_per_class: float | None, concepts: int) -> None:
    """Refuse contradicting settings before the long steps.

    Raises:
        InputError: both ``lam`` and ``nonzeros_per_class``, or one that is out of range.
    """
    if head not in ("sparse", "dense"):
        raise InputError(f"head must be 'sparse' or 'dense', got {head!r}")
    if lam is not None and nonzeros_per_class is not None:
        raise InputError(f"give lam={lam} or nonzeros_per_class={nonzeros_per_class}, not both: one decides the other")
    if head == "dense" and nonzeros_per_class is not None:
        raise InputError(
            f"nonzeros_per_class={nonzeros_per_class} is for head='sparse'; a dense head keeps all weights"
        )
    if lam is not None and (isinstance(lam, bool) or not isinstance(lam, (int, float)) or not 0 <= lam < float("inf")):
        raise InputError(f"lam must be a number of at least 0, got {lam!r}")
    if nonzeros_per_class is not None and not 0 < nonzeros_per_class <= concepts:
        raise InputError(f"nonzeros_per_class={nonzeros_per_class} must lie in (0, {concepts}], the number of concepts")


def fit_head(
    activations: Any,
    labels: Tensor,
    num_classes: int,
    *,
    lam: float | None = None,
    nonzeros_per_class: float | None = None,
    head: str = "sparse",
    alpha: float = 0.99,
    tol: float = 1e-4,
    device: torch.device | str | None = None,
    show_progress: bool = False,
) -> HeadFit:
    r"""Cross-entropy over standardised activations, plus an elastic net (SALF-CBM, section 3.4).

    .. math:: \frac1N \sum_n \mathrm{CE}(W c^*_n + b, y_n) + \lambda \left(\tfrac{1-\alpha}{2} \|W\|_F^2 +
        \alpha \|W\|_1\right)

    Args:
        activations: ``(N, M)`` tensor, array, or re-iterable of chunks, not standardised; this process' rows under
            ``torch.distributed``.
        labels: ``(N,)`` of the same rows.
        num_classes: K.
        lam: strength. For a sparse head None aims at ``nonzeros_per_class``; for a dense one it is 1e-4.
        nonzeros_per_class: mean number of weights a class keeps (met within 10 % where possible); None stands for 30,
            or half of the concepts where that is less, or as many as it takes where classes are told apart by fewer.
        head: ``"sparse"``, or ``"dense"``: ridge alone (alpha 0).
        alpha: share of the absolute values, for a sparse head.
        tol: accuracy of the optimum; see :func:`~captum_concepts.solvers.fit_elastic_net`.
        device: where to compute.
        show_progress: show a bar.

    Example:
        >>> c = torch.tensor([[0.0, 1.0], [1.0, 1.1], [2.0, 1.1], [3.0, 1.0]] * 3)
        >>> fit = fit_head(c, torch.tensor([0, 0, 1, 1] * 3), 2, lam=0.1)
        >>> (fit.weight != 0).tolist(), fit.mean
        ([[True, False], [True, False]], tensor([1.5000, 1.0500]))
    """
    width = activations.shape[1] if hasattr(activations, "shape") else next(iter(activations)).shape[1]
    check_head(head, lam, nonzeros_per_class, width)
    options: dict[str, Any] = {
        "num_classes": num_classes,
        "tol": tol,
        "standardize": True,
        "device": device,
        "process_group": True if world()[1] > 1 else None,
        "show_progress": show_progress and world()[0] == 0,
    }
    if head == "dense":
        found = fit_elastic_net(activations, labels, DENSE_LAM if lam is None else lam, alpha=0.0, **options)
    elif lam is not None:
        found = fit_elastic_net(activations, labels, lam, alpha=alpha, **options)
    else:
        wanted = nonzeros_per_class or min(NONZEROS, width / 2)
        with warnings.catch_warnings():
            if nonzeros_per_class is None:  # nobody asked for that number: classes that are easily told apart need less
                warnings.filterwarnings("ignore", "no point of the path", InputWarning)
            path = elastic_net_path(activations, labels, nonzeros_per_class=wanted, alpha=alpha, **options)
        if path.selected is None:
            raise InputError("the elastic-net path is empty")
        found = path.selected
    return _head_fit(found)


def _head_fit(found: ElasticNetResult) -> HeadFit:
    if found.feature_mean is None or found.feature_std is None:
        raise InputError("the head was fitted without standardisation")
    notes = {
        "lam": found.lam,
        "alpha": found.alpha,
        "objective": found.objective,
        "gap": found.gap,
        "converged": found.converged,
        "nonzeros_per_class": float(found.nonzeros.double().mean()),
    }
    bias = found.bias.detach().double().cpu()
    bias -= bias.mean()  # a shift of all logits changes nothing, and the solver leaves it where it happens to be
    weight, mean, std = (v.detach().float().cpu() for v in (found.weight, found.feature_mean, found.feature_std))
    return HeadFit(weight, bias.float(), mean, std, notes)


def accuracy(activations: Activations, labels: Tensor, head: HeadFit) -> float:
    """Share of the images (of all processes) whose largest logit is that of their label."""
    right, start = torch.zeros(2, dtype=torch.float64), 0
    for chunk in activations:
        logits = (chunk - head.mean) / head.std @ head.weight.T + head.bias
        right += torch.tensor([(logits.argmax(1) == labels[start : start + len(chunk)]).sum(), len(chunk)])
        start += len(chunk)
    correct, total = all_reduce(right).tolist()
    return correct / total
