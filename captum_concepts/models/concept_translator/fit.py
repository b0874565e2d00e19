"""Training a :class:`ConceptTranslator` on cached pairs: every epoch is MLP work only."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_concepts.errors import ConvergenceWarning, InputError
from captum_concepts.models.concept_translator.network import ConceptTranslator
from captum_concepts.models.concept_translator.data import TrainingPairs, world

_WARM_UP_EPOCHS = 5
_ROWS = 1024  # rows of one validation or statistics step
_PUBLISHED_LENGTH = 10.0  # of CLIP's raw image embeddings, to which the published similarity weight belongs


@dataclass
class FitResult:
    """How a fit went.

    Args:
        history: one list for each of ``"train_loss"``, ``"val_loss"``, ``"val_cosine"`` and ``"lr"``, one entry an
            epoch.
        best_epoch: whose weights are kept (by validation loss; -1: none was finite).
        stopped: ``"early"``, ``"epochs"`` or ``"nan"``.
    """

    history: dict[str, list[float]] = field(default_factory=dict)
    best_epoch: int = -1
    stopped: str = "epochs"


def fit_translator(
    translator: ConceptTranslator,
    pairs: TrainingPairs,
    *,
    text: Tensor | None = None,
    logit_scale: float = 100.0,
    similarity_weight: float = 1e-3,
    optimizer: str = "adamw",
    lr: float | None = None,
    weight_decay: float | None = None,
    standardize: bool | None = None,
    epochs: int = 150,
    batch_size: int = 128,
    patience: int = 4,
    stop_after: int = 10,
    validation_fraction: float = 0.1,
    seed: int = 0,
    show_progress: bool = False,
) -> FitResult:
    r"""Fit ``translator`` in place.

    .. math:: \operatorname{mean} (h(z) - e)^2 + \lambda \frac{\ell^2}{10^2} \operatorname{mean} (S(h(z)) - S(e))^2,
        \qquad S^t(v) = \text{scale} \cdot \cos(v, t) + \text{bias}

    with :math:`\ell^2` the mean squared length of the e. CLIP's raw embeddings are about 10 long, which gives the
    published loss; those of an encoder that divides by the length are 1 long, and their first term is a hundred times
    smaller beside the same second one, were it not balanced.

    Args:
        translator: changed in place; on another device, training happens there.
        pairs: the cached rows.
        text: ``(T, D)`` for the second term; None leaves it out.
        similarity_weight: :math:`\lambda`; 0 leaves the second term out.
        optimizer: ``"adamw"``, or ``"sgd"``: the published one (rate 0.1 warmed up to 0.2, on raw activations).
        lr: peak rate; None takes 3e-4 for AdamW, 0.2 for SGD.
        weight_decay: None takes 0.05 for AdamW, 0 for SGD.
        standardize: train on standardised inputs of unit expected length, folded into the first Linear afterwards, so
            that the translator still takes raw activations; None does so for AdamW. The small inputs start the network
            in the linear range of its tanh: validation cosine .71 instead of .62 on 3,040 images.
        epochs, batch_size: at most so many epochs.
        patience: epochs without a lower validation loss after which the rate is divided by 10.
        stop_after: epochs without a lower validation loss after which the fit ends.
        validation_fraction: share of the rows held out (at least one row where there are two).
        seed: of split, initial weights and order. The global random state is left alone.

    Under ``torch.distributed`` every process computes its share of each batch and gradients are summed, so that one
    and several processes take the same steps.

    Warns:
        ConvergenceWarning: a loss was not finite; the best weights so far are kept.

    Returns:
        The history.
    """
    if optimizer not in ("adamw", "sgd"):
        raise InputError(f"optimizer must be 'adamw' or 'sgd', got {optimizer!r}")
    if epochs < 1 or batch_size < 1 or patience < 0 or stop_after < 1 or not 0 <= validation_fraction < 1:
        raise InputError(
            f"epochs, batch_size and stop_after must be positive, patience at least 0 and validation_fraction in "
            f"[0, 1), got {epochs}, {batch_size}, {stop_after}, {patience}, {validation_fraction}"
        )
    if similarity_weight < 0:
        raise InputError(f"similarity_weight must be 0 or more, got {similarity_weight}")
    rate = lr if lr is not None else 3e-4 if optimizer == "adamw" else 0.2
    decay = weight_decay if weight_decay is not None else 0.05 if optimizer == "adamw" else 0.0
    generator = torch.Generator().manual_seed(seed)
    _initialise(translator, generator)
    order = torch.randperm(len(pairs), generator=generator)
    held = min(max(1, round(len(pairs) * validation_fraction)), len(pairs) - 1) if validation_fraction else 0
    training, validation = order[held:], order[:held] if held else order
    device = translator.first.weight.device
    mean, std = torch.zeros(sum(pairs.in_channels)), torch.ones(sum(pairs.in_channels))
    if standardize if standardize is not None else optimizer == "adamw":
        mean, std = _moments(pairs, training)
    mean, std = mean.to(device), std.to(device)
    weight = similarity_weight * _squared_length(pairs, training) / _PUBLISHED_LENGTH**2 if text is not None else 0.0
    texts = F.normalize(text.to(device).float(), dim=1) if text is not None and weight else None

    def losses(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss and summed cosine of the rows."""
        z, e = (part.to(device) for part in pairs.rows(rows))
        h = translator((z - mean) / std)
        total = (h - e).square().mean(1).sum()
        if texts is not None:
            off = logit_scale * (F.normalize(h, dim=1) - F.normalize(e, dim=1)) @ texts.T  # the bias cancels
            total = total + weight * off.square().mean(1).sum()
        return total, F.cosine_similarity(h, e).sum()

    steps: Any = _make_optimizer(optimizer, translator, rate, decay)
    result = FitResult({key: [] for key in ("train_loss", "val_loss", "val_cosine", "lr")})
    best, best_state, reduced = math.inf, copy.deepcopy(translator.state_dict()), 0
    translator.train()
    for epoch in _epochs(epochs, show_progress):
        warm = min(1.0, 0.5 + 0.5 * epoch / _WARM_UP_EPOCHS) if optimizer == "sgd" else 1.0
        now = rate * warm * 0.1**reduced
        for group in steps.param_groups:
            group["lr"] = now
        train = 0.0
        for rows in training[torch.randperm(len(training), generator=generator)].split(batch_size):
            train += _step(translator, steps, rows, losses)
            if not math.isfinite(train):
                break
        with torch.no_grad():
            sums = [torch.stack(losses(rows)) for rows in validation.split(_ROWS)]
            value, cosine = (torch.stack(sums).sum(0) / len(validation)).tolist()
        for key, entry in zip(result.history, (train / len(training), value, cosine, now), strict=True):
            result.history[key].append(entry)
        if not math.isfinite(train + value):
            result.stopped = "nan"
            break
        if value < best:
            best, result.best_epoch, best_state = value, epoch, copy.deepcopy(translator.state_dict())
        waited = epoch - result.best_epoch
        if waited >= stop_after:
            result.stopped = "early"
            break
        if waited and patience and waited % patience == 0:
            reduced += 1
    translator.load_state_dict(best_state)
    translator.fold_standardisation(mean, std)
    translator.eval()
    if result.stopped == "nan":
        kept = f"the weights of epoch {result.best_epoch}" if result.best_epoch >= 0 else "the initial weights"
        warnings.warn(
            f"the loss was not finite in epoch {len(result.history['lr']) - 1}, so the fit stopped and keeps {kept}; "
            f"use a lower lr than {rate:g}, standardize=True, or look for NaN in the data",
            ConvergenceWarning,
            stacklevel=2,
        )
    return result


def _step(translator: nn.Module, steps: Any, rows: Tensor, losses: Any) -> float:
    rank, size = world()
    mine = rows[rank::size]
    steps.zero_grad()
    nothing = torch.stack([p.sum() * 0 for p in translator.parameters()]).sum()
    total: Tensor = losses(mine)[0] if len(mine) else nothing
    (total / len(rows)).backward()
    value = total.detach().float()
    if size > 1:
        for parameter in translator.parameters():
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
        torch.distributed.all_reduce(value)
    steps.step()
    return float(value)


def _initialise(translator: ConceptTranslator, generator: torch.Generator) -> None:
    """PyTorch's default initialisation of Linear, drawn from ``generator`` on the CPU."""
    for module in translator.network:
        if isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            for parameter in (module.weight, module.bias):
                drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                parameter.data.copy_(drawn)


def _moments(pairs: TrainingPairs, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and standard deviation times the root of the width, of each input.

    A nearly constant input is not blown up beyond its layer's scale.
    """
    total = torch.zeros(sum(pairs.in_channels), dtype=torch.float64)
    squares = torch.zeros_like(total)
    for part in rows.split(_ROWS):
        z = pairs.rows(part)[0].double()
        total += z.sum(0)
        squares += z.square().sum(0)
    mean = total / len(rows)
    std = (squares / len(rows) - mean.square()).clamp(min=0).sqrt()
    floors = [
        (layer.square().mean().sqrt() * 0.05).clamp(min=1e-6).expand_as(layer) for layer in std.split(pairs.in_channels)
    ]
    return mean.float(), (torch.maximum(std, torch.cat(floors)) * len(std) ** 0.5).float()


def _squared_length(pairs: TrainingPairs, rows: Tensor) -> float:
    """Mean squared length of the embeddings."""
    total = sum(float(pairs.rows(part)[1].double().square().sum()) for part in rows.split(_ROWS))
    return total / len(rows)


def _make_optimizer(name: str, translator: nn.Module, rate: float, decay: float) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(translator.parameters(), lr=rate, weight_decay=decay)
    return torch.optim.SGD(translator.parameters(), lr=rate, weight_decay=decay)


def _epochs(epochs: int, show: bool) -> Iterator[int]:
    if not show:
        return iter(range(epochs))
    from tqdm.auto import tqdm

    return iter(tqdm(range(epochs), desc="epochs"))
