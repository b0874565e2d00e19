"""Metrics of concept bottlenecks: faithfulness, existence, location and leakage of sets of concepts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from captum_concepts._checks import integer, number, one_of
from captum_concepts.errors import InputError
from captum_concepts.metrics._prepare import MODES, check_maps, check_size, resize_maps

__all__ = ["concept_existence", "concept_location", "concept_task_leakage", "interconcept_leakage", "surf"]

_CELLS = 1 << 22  # distances in memory at once


def surf(
    outputs: Tensor,
    presence: Tensor,
    importance: Tensor,
    *,
    bias: Tensor | None = None,
    space: str = "probability",
) -> Tensor:
    r"""Surrogate faithfulness (SURF), the error of concepts times weights against the model's outputs of all classes.

    .. math:: \hat y_i = \sum_k \alpha_{ik} P_k + b_i, \qquad
        \mathrm{EMD} = \tfrac12 \sum_i |p_i - \hat p_i|, \quad \mathrm{MAE} = \frac1C \sum_i |y_i - \hat y_i|

    where p is the softmax of the outputs y. Lower is better; a SALFCBM with its own ``scores``, ``head.weight`` and
    ``head.bias`` scores 0. The surrogate has no trainable parameters that could compensate for concepts the model does
    not use, such as random directions.

    Args:
        outputs: ``(N, C)`` logits y of the model.
        presence: ``(N, K)`` strength P of each concept, summed over the positions; ``(N, C, K)`` if every class has
            concepts of its own.
        importance: ``(C, K)`` weight of each concept for each class.
        bias: ``(C,)`` bias b of the model's last layer; None: 0. The paper's surrogate is "up to the bias".
        space: ``"probability"`` (EMD, in [0, 1]) or ``"logit"`` (MAE).

    Returns:
        ``(N,)`` float32 (float64 for float64 outputs); the paper reports the mean.

    Raises:
        InputError: shapes that do not match, or another ``space``.

    Reference: Kumar and Ahuja, Measuring the (Un)Faithfulness of Concept-Based Explanations, CVPR 2026,
    arXiv:2504.10833.

    Example:
        >>> presence, weight = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> outputs = torch.tensor([[2.0, 1.0]])
        >>> surf(presence @ weight.T, presence, weight), surf(outputs, presence, weight, space="logit")
        (tensor([0.]), tensor([0.5000]))
    """
    one_of("space", space, ("probability", "logit"))
    _matrix("outputs", outputs)
    outputs = outputs.detach().to(torch.float64 if outputs.dtype == torch.float64 else torch.float32)
    n, classes = outputs.shape
    concepts = importance.shape[-1] if isinstance(importance, Tensor) and importance.ndim else 0
    _shape("importance", importance, (classes, concepts))
    if not isinstance(presence, Tensor) or tuple(presence.shape) not in ((n, concepts), (n, classes, concepts)):
        got = tuple(presence.shape) if isinstance(presence, Tensor) else type(presence).__name__
        raise InputError(f"presence must be ({n}, {concepts}) or ({n}, {classes}, {concepts}), got {got}")
    wide = presence if presence.ndim == 3 else presence[:, None]
    found = (wide.detach().to(outputs) * importance.detach().to(outputs)).sum(2)
    if bias is not None:
        _shape("bias", bias, (classes,))
        found = found + bias.detach().to(outputs)
    if space == "logit":
        return (outputs - found).abs().mean(1)
    return (outputs.softmax(1) - found.softmax(1)).abs().sum(1) / 2


def concept_existence(contributions: Tensor, truth: Tensor, *, k: int = 5) -> Tensor:
    """Concept existence metric (CEM), the fraction of the k largest contributors that are in the image.

    The range is [0, 1], and higher is better. Contributions that are independent of the image score the fraction of
    concepts that are present.

    Args:
        contributions: ``(N, T)`` signed contribution of every concept to the predicted class (in the paper, weight
            times activation).
        truth: ``(N, T)`` bool, whether the image shows the concept.
        k: the paper's l, which is 1, 3 or 5; all T if there are fewer.

    Returns:
        ``(N,)``. Contributions that tie at rank k count fractionally. NaN where a contribution is NaN.

    Raises:
        InputError: shapes that do not match.

    Reference: Aysel et al., Concept-Based Explainable Artificial Intelligence: Metrics and Benchmarks, 2025,
    arXiv:2501.19271.

    Example:
        >>> concept_existence(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[True, False, True]]), k=2)
        tensor([0.5000])
    """
    integer("k", k)
    _matrix("contributions", contributions)
    _shape("truth", truth, tuple(contributions.shape))
    if truth.is_floating_point() and bool(truth.isnan().any()):
        raise InputError("truth contains NaN; pass bool, whether the image shows each concept")
    chosen = _chosen(contributions.detach().double(), min(k, contributions.shape[1]))
    found = (chosen * (truth != 0)).sum(1) / min(k, contributions.shape[1])
    return found.masked_fill(contributions.isnan().any(1), torch.nan).float()


def concept_location(
    maps: Tensor,
    points: Tensor,
    size: tuple[int, int],
    *,
    importance: Tensor | None = None,
    k: int = 5,
    area: float = 0.25,
    mode: str = "bilinear",
) -> Tensor:
    """Concept location metric (CLM), the fraction of concepts whose annotated point lies where their map is highest.

    A concept's region is the fraction ``area`` of the pixels with the highest values, and a hit is a region that
    contains the point. The range is [0, 1], and higher is better. Random maps score ``area`` on average.

    Args:
        maps: ``(N, T, h, w)``, resized to ``size``.
        points: ``(N, T, 2)`` x and y of each concept in pixels; NaN where the image has none. Such a concept is left
            out rather than counted as a miss, and the next most important one is used instead. This is a choice of
            this package, so compare only with values that leave out the same concepts. :func:`concept_existence`
            measures whether the important concepts are present.
        size: ``(H, W)`` of the images.
        importance: ``(N, T)``; only the ``k`` most important concepts that have a point count. None: all of them.
        k: the paper's l.
        area: fraction of the pixels; the paper uses 1, 3 and 6 of 12 parts.
        mode: how maps are resized.

    Returns:
        ``(N,)``. Pixels that tie at the border of the region belong to it with equal probability. NaN where no concept
        has a point, or a map that counts has NaN.

    Raises:
        InputError: shapes that do not match, or a point outside the image.

    Reference: as :func:`concept_existence`.

    Example:
        >>> heat = torch.zeros(1, 1, 4, 4)
        >>> heat[..., :2, :2] = 1
        >>> concept_location(heat, torch.tensor([[[0.5, 1.5]]]), (4, 4)), concept_location(
        ...     heat, torch.tensor([[[3.5, 1.5]]]), (4, 4))
        (tensor([1.]), tensor([0.]))
    """
    integer("k", k)
    number("area", area, lambda a: 0 < a <= 1, "in (0, 1]")
    one_of("mode", mode, MODES)
    check_size(size)
    maps = check_maps(maps)
    if maps.ndim != 4:
        raise InputError(f"maps must be (N, T, h, w), got {tuple(maps.shape)}")
    n, t = maps.shape[:2]
    _shape("points", points, (n, t, 2))
    height, width = size
    known = points.isfinite().all(2)
    x, y = points.nan_to_num(0).unbind(2)
    if not bool((~known | ((x >= 0) & (x < width) & (y >= 0) & (y < height))).all()):
        raise InputError(f"points must be inside the image, 0 <= x < {width} and 0 <= y < {height}, or NaN for none")
    large = resize_maps(maps.reshape(n * t, *maps.shape[2:]), (height, width), mode=mode).flatten(1)
    at = (y.floor() * width + x.floor()).long().reshape(-1, 1).to(large.device)
    value = large.gather(1, at)
    above, tied = (large > value).sum(1), (large == value).sum(1)
    budget = max(1, round(area * height * width))
    hit = ((budget - above) / tied.clamp_min(1)).clamp(0, 1).masked_fill(large.isnan().any(1), torch.nan)
    hits, known = hit.reshape(n, t), known.to(hit.device)
    if importance is not None:
        _shape("importance", importance, (n, t))
        values = importance.detach().double().to(hit.device).masked_fill(~known, -torch.inf)
        share = torch.stack(
            [_chosen(row[None], min(k, int(yes.sum())))[0] for row, yes in zip(values, known, strict=True)]
        )
    else:
        share = known.double()
    counted = torch.where(share * known > 0, hits.double() * share, 0.0)
    total = (share * known).sum(1)
    return (counted.sum(1) / total).masked_fill(total == 0, torch.nan).float()


def concept_task_leakage(
    predicted: Tensor, truth: Tensor, labels: Tensor, *, discrete: bool | None = None, k: int = 3
) -> Tensor:
    r"""Concepts-task leakage (CTL), the information about the class in each predicted concept beyond the true concept.

    .. math:: \mathrm{CTL}_i = \max\left(0, \frac{I(\hat c_i; y) - I(c_i; y)}{H(y)}\right)

    The range is [0, 1], and lower is better. Above 0, a predicted concept carries information that its name does not.

    Args:
        predicted: ``(N, T)`` activations or probabilities of a bottleneck's concepts.
        truth: ``(N, T)`` bool or integers, the annotated concepts.
        labels: ``(N,)`` integers, the classes.
        discrete: whether ``predicted`` takes few values, which are counted; None: if all are whole numbers. Otherwise
            its information is estimated from the k nearest neighbors (Ross, PLoS ONE 2014), as the authors do, but
            without the noise of 1e-10 that they add to separate equal values, so the result is deterministic.
        k: number of neighbors.

    Returns:
        ``(T,)``; the paper's score is the mean. The cost is ``T * N * N`` for continuous values.

    Raises:
        InputError: shapes that do not match, NaN, only one class, or fewer than k + 2 examples (2 if discrete).

    Reference: Parisini et al., Leakage and Interpretability in Concept-Based Models, 2025, arXiv:2504.14094.

    Example:
        >>> truth, labels = torch.tensor([[0], [0], [1], [1]]), torch.tensor([0, 1, 0, 1])
        >>> concept_task_leakage(truth, truth, labels), concept_task_leakage(labels[:, None], truth, labels)
        (tensor([0.]), tensor([1.]))
    """
    values, true, counted = _leakage_inputs(predicted, truth, discrete, k)
    _shape("labels", labels, (len(values),))
    y = _codes(labels.detach().cpu())
    entropy = _information(y, y)
    if entropy <= 0:
        raise InputError("labels are all the same; leakage needs at least two classes")
    found = []
    for own, known in zip(values.T, true.T, strict=True):
        told = _information(_codes(own), y) if counted else _between(own, y, k)
        found.append(max(0.0, told - _information(_codes(known), y)) / entropy)
    return torch.tensor(found)


def interconcept_leakage(predicted: Tensor, truth: Tensor, *, discrete: bool | None = None, k: int = 3) -> Tensor:
    r"""Interconcept leakage (ICL), the information that predicted concepts share beyond that of the true concepts.

    .. math:: \mathrm{ICL}_i = \frac{1}{T - 1} \sum_{j \ne i} \max\left(0, \frac{I(\hat c_i; \hat c_j)}
        {\sqrt{H(\hat c_i) H(\hat c_j)}} - \frac{I(c_i; c_j)}{\sqrt{H(c_i) H(c_j)}}\right)

    The range is [0, 1] (an estimate may exceed it), and lower is better. For continuous values, the authors' estimate
    of I(c; c) replaces the entropy.

    Args:
        predicted, truth, discrete, k: as in :func:`concept_task_leakage`; the information of two continuous variables
            is estimated as in Kraskov et al., Phys. Rev. E 69, 2004, algorithm 1.

    Returns:
        ``(T,)``; the paper's score is the mean. The cost is ``T * T * N * N / 2`` for continuous values.

    Raises:
        InputError: fewer than two concepts; otherwise as :func:`concept_task_leakage`.

    Reference: as :func:`concept_task_leakage`.

    Example:
        >>> truth = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
        >>> interconcept_leakage(truth, truth), interconcept_leakage(truth[:, [0, 0]], truth)
        (tensor([0., 0.]), tensor([1., 1.]))
    """
    values, true, counted = _leakage_inputs(predicted, truth, discrete, k)
    if values.shape[1] < 2:
        raise InputError("leakage between concepts needs at least two concepts")

    def shared(columns: list[Tensor], neighbors: int | None) -> Tensor:
        def told(a: Tensor, b: Tensor) -> float:
            return _information(a, b) if neighbors is None else _neighbors(a, b, neighbors)

        own = [told(one, one) for one in columns]
        table = torch.zeros(len(columns), len(columns), dtype=torch.float64)
        for i, first in enumerate(columns):
            for j in range(i):
                scale = (own[i] * own[j]) ** 0.5
                table[i, j] = table[j, i] = told(first, columns[j]) / scale if scale > 0 else 0.0
        return table

    said = shared([_codes(c) if counted else c for c in values.T], None if counted else k)
    meant = shared([_codes(c) for c in true.T], None)
    return ((said - meant).clamp_min(0).sum(1) / (len(said) - 1)).float()


# ------------------------------------------------------------------------------------------------ information, in nats


def _information(a: Tensor, b: Tensor) -> float:
    """Mutual information of two variables with few values ``0..``, from counts; the entropy if ``a`` equals ``b``."""
    width = int(b.max()) + 1
    joint = torch.bincount(a * width + b, minlength=(int(a.max()) + 1) * width).double().reshape(-1, width) / len(a)
    independent = joint.sum(1, keepdim=True) * joint.sum(0)
    return float(torch.where(joint > 0, joint * (joint / independent.clamp_min(1e-300)).log(), 0.0).sum())


def _between(values: Tensor, labels: Tensor, k: int) -> float:
    """Mutual information of a continuous and a discrete variable, by neighbors (Ross 2014)."""
    counts = torch.bincount(labels)[labels]
    values, labels, counts = (x[counts > 1] for x in (values, labels, counts))
    if not len(values):
        return 0.0
    near = (counts - 1).clamp_max(k)
    within = []
    for rows in _blocks(len(values)):
        gaps = (values[rows, None] - values).abs()
        same = gaps.masked_fill(labels[rows, None] != labels, torch.inf).sort(1).values  # the first one is itself
        radius = _below(same.gather(1, near[rows, None]))
        within.append((gaps <= radius).sum(1))
    mean = torch.digamma(near.double()) - torch.digamma(counts.double()) - torch.digamma(torch.cat(within).double())
    return max(0.0, float(torch.digamma(torch.tensor(float(len(values)), dtype=torch.float64)) + mean.mean()))


def _neighbors(a: Tensor, b: Tensor, k: int) -> float:
    """Mutual information of two continuous variables, by neighbors (Kraskov et al. 2004, algorithm 1)."""
    total = 0.0
    for rows in _blocks(len(a)):
        gaps = [(one[rows, None] - one).abs() for one in (a, b)]
        radius = _below(torch.maximum(*gaps).kthvalue(k + 1, dim=1, keepdim=True).values)  # the first one is itself
        total += sum(float(torch.digamma((gap <= radius).sum(1).double()).sum()) for gap in gaps)
    ends = torch.digamma(torch.tensor([len(a), k], dtype=torch.float64)).sum()
    return max(0.0, float(ends) - total / len(a))


def _below(distance: Tensor) -> Tensor:
    return torch.nextafter(distance, torch.zeros_like(distance))


def _blocks(n: int) -> Iterator[slice]:
    step = max(1, _CELLS // max(n, 1))
    return (slice(start, start + step) for start in range(0, n, step))


def _codes(values: Tensor) -> Tensor:
    return torch.unique(values, return_inverse=True)[1]


# ------------------------------------------------------------------------------------------------ checks


def _chosen(values: Tensor, k: int) -> Tensor:
    """``(N, T)`` weight of each value among its row's k largest: 1, 0, or a fraction where values tie at rank k."""
    if not k:
        return torch.zeros_like(values)
    last = values.topk(k, dim=1).values[:, -1:]
    above, tied = values > last, values == last
    return above + tied * (k - above.sum(1, keepdim=True)) / tied.sum(1, keepdim=True).clamp_min(1)


def _leakage_inputs(predicted: Tensor, truth: Tensor, discrete: bool | None, k: int) -> tuple[Tensor, Tensor, bool]:
    integer("k", k)
    _matrix("predicted", predicted)
    _shape("truth", truth, tuple(predicted.shape))
    values, true = predicted.detach().cpu().double(), truth.detach().cpu().double()
    if not bool(values.isfinite().all()):
        raise InputError("predicted contains NaN or infinite values")
    if not bool((true == true.round()).all()):
        raise InputError("truth must be bool or integers: whether each concept is present, or which value it has")
    counted = bool((values == values.round()).all()) if discrete is None else bool(discrete)
    if len(values) < (2 if counted else k + 2):
        raise InputError(f"{len(values)} examples are too few; pass at least {2 if counted else k + 2}")
    return values, true, counted


def _matrix(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or value.ndim != 2 or not value.shape[1]:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"{name} must be a tensor with one row per example and at least one column, got {got}")


def _shape(name: str, value: Tensor, wanted: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or tuple(value.shape) != wanted:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"{name} must be a tensor {wanted}, got {got}")
