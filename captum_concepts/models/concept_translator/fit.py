"""Training of a :class:`ConceptTranslator` on cached pairs, from a closed-form start."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_concepts._checks import finite_images, integer, number, one_of
from captum_concepts._undo import unharming
from captum_concepts.errors import ConvergenceWarning, InputError, did_you_mean
from captum_concepts.models.concept_translator.data import TrainingPairs
from captum_concepts.models.concept_translator.network import ConceptTranslator
from captum_concepts.store.processes import lost_peers_named, world

_ROWS = 1024  # rows per validation or statistics step
_PATIENCE = 10  # epochs without a lower validation loss after which the fit ends
_PUBLISHED_LENGTH = 10.0  # of CLIP's raw image embeddings, for which the similarity weight was published
_PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # of ridge regressions on inputs of variance 1
_SLOPES = ((6.0, 0.3), (3.0, 0.3), (1.0, 0.0))  # of hidden units, and the similarity at which they change sign
_START_ROWS, _TRIAL_ROWS = 65_536, 4_096  # for the regressions, and for choosing the slope


@dataclass(frozen=True)
class Training:
    """Options of :func:`fit_translator`.

    Args:
        optimizer: ``"adamw"``, or the published ``"sgd"`` (learning rate 0.1 in the first epoch, then 0.2).
        lr: peak learning rate; None: 3e-4 for AdamW, 0.2 for SGD.
        weight_decay: None: 0.05 for AdamW, 0 for SGD.
        standardize: train on standardized inputs of unit expected length, so that the network starts in the linear
            range of its tanh. The standardization is then folded into the first Linear, so the translator takes raw
            activations. None: True for AdamW.
        start: ``"examples"``: the first layer compares its input with training images, one per hidden unit, and ridge
            regressions determine the other two; penalty and slope are the best of a few on the held-out images.
            ``"random"``: PyTorch's initialization. None: ``"examples"`` for AdamW, otherwise ``"random"``.
        epochs: maximum number of epochs; 0 keeps the start. None: 150 from a random start, 0 from examples.
        batch_size: rows per step.
        patience: epochs without a lower validation loss after which the rate is divided by 10 (0: never).
        validation_fraction: fraction of the images held out, with all their crops (at least one image; 0: none).

    Raises:
        InputError: a value out of range.
    """

    optimizer: str = "adamw"
    lr: float | None = None
    weight_decay: float | None = None
    standardize: bool | None = None
    start: str | None = None
    epochs: int | None = None
    batch_size: int = 128
    patience: int = 4
    validation_fraction: float = 0.1

    def __post_init__(self) -> None:
        one_of("optimizer", self.optimizer, ("adamw", "sgd"))
        one_of("start", self.start, (None, "examples", "random"))
        if self.epochs is not None:
            integer("epochs", self.epochs, least=0)
        integer("batch_size", self.batch_size)
        integer("patience", self.patience, least=0)
        number("validation_fraction", self.validation_fraction, lambda v: 0 <= v < 1, "in [0, 1)")
        for name in ("lr", "weight_decay"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name), lambda v: v >= 0, "0 or more, or None")

    @property
    def from_examples(self) -> bool:
        """Whether the initial weights are computed in closed form."""
        return self.start == "examples" or (self.start is None and self.optimizer == "adamw")

    @classmethod
    def of(cls, given: Training | Mapping[str, Any] | None) -> Training:
        """The options from a dictionary; None takes the defaults.

        Raises:
            InputError: an unknown option.
        """
        if isinstance(given, Training):
            return given
        if given is not None and not isinstance(given, Mapping):
            raise InputError(f"training must be a dictionary of options or a Training, got {type(given).__name__}")
        known = [option.name for option in fields(cls)]
        for name in given or {}:
            if name not in known:
                hint = did_you_mean(str(name), known) or f" Known: {known}."
                seed = " Pass seed= to fit itself." if name == "seed" else hint
                raise InputError(f"training has no option {name!r}.{seed}")
        return cls(**(given or {}))


@dataclass
class FitResult:
    """The history and outcome of :func:`fit_translator`.

    Args:
        history: lists ``"train_loss"``, ``"val_loss"``, ``"val_cosine"`` and ``"lr"`` with one entry per epoch,
            preceded by one for the start from examples, with rate 0.
        best_epoch: the epoch with the lowest validation loss, whose weights are kept; -1 is the start.
        stopped: ``"early"``, ``"epochs"`` or ``"nan"``.
        held_out: indices of the held-out images (all images, if none was held out).
        val_cosine: of the kept weights, on those images.
    """

    history: dict[str, list[float]] = field(default_factory=dict)
    best_epoch: int = -1
    stopped: str = "epochs"
    held_out: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    val_cosine: float = math.nan


@unharming
@lost_peers_named()
def fit_translator(
    translator: ConceptTranslator,
    pairs: TrainingPairs,
    *,
    text: Tensor | None = None,
    logit_scale: float = 100.0,
    similarity_weight: float = 1e-3,
    seed: int = 0,
    show_progress: bool = False,
    **training: Any,
) -> FitResult:
    r"""Fit ``translator`` in place.

    .. math:: \operatorname{mean} (h(z) - e)^2 + \lambda \frac{\ell^2}{10^2} \operatorname{mean} (S(h(z)) - S(e))^2,
        \qquad S^t(v) = \text{scale} \cdot \cos(v, t) + \text{bias}

    with :math:`\ell^2` the mean squared length of the e. CLIP's raw embeddings have a length of about 10, which gives
    the published loss. For embeddings of unit length the first term is a hundred times smaller, and the factor reduces
    the second term accordingly.

    Args:
        translator: changed in place and trained on its device.
        pairs: the cached rows.
        text: ``(T, D)`` for the second term; None omits it.
        logit_scale: of the vision-language model.
        similarity_weight: :math:`\lambda`; 0 omits the second term.
        seed: of the split, initial weights and order. The global random state is unchanged.
        show_progress: show a progress bar of the epochs.
        training: options of :class:`Training`, such as ``optimizer`` or ``epochs``.

    Under ``torch.distributed`` each process computes its part of each batch and gradients are summed, so any number of
    processes takes the same steps.

    Warns:
        ConvergenceWarning: a loss was not finite; the best weights so far are kept.

    Returns:
        The history, and which images were held out.
    """
    options = Training.of(training)
    number("similarity_weight", similarity_weight, lambda v: v >= 0, "0 or more")
    sgd = options.optimizer == "sgd"
    examples = options.from_examples
    rate = options.lr if options.lr is not None else 0.2 if sgd else 3e-4
    decay = options.weight_decay if options.weight_decay is not None else 0.0 if sgd else 0.05
    translator.float()
    generator = torch.Generator().manual_seed(seed)
    _initialize(translator, generator)
    order = torch.randperm(pairs.images, generator=generator)
    fraction = options.validation_fraction
    held = min(max(1, round(pairs.images * fraction)), pairs.images - 1) if fraction else 0
    held_out = order[:held].sort().values if held else order.sort().values
    training_rows, validation = pairs.rows_of(order[held:]), pairs.rows_of(held_out, crops=False)
    device = translator.first.weight.device
    mean, std = _moments(pairs, training_rows)
    standardize = options.standardize if options.standardize is not None else not sgd
    if not standardize and not examples:
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    mean, std = mean.to(device), std.to(device)
    start = examples and start_from_examples(translator, pairs, training_rows, validation, mean, std, generator)
    epochs = options.epochs if options.epochs is not None else 0 if start else 150
    weight = 0.0 if text is None else similarity_weight * _squared_length(pairs, training_rows) / _PUBLISHED_LENGTH**2
    texts = F.normalize(text.to(device).float(), dim=1) if text is not None and weight else None

    def losses(rows: Tensor) -> tuple[Tensor, Tensor]:
        """The summed loss and summed cosine of the rows."""
        z, e = (part.to(device) for part in pairs.rows(rows))
        h = translator((z - mean) / std)
        total = (h - e).square().mean(1).sum()
        if texts is not None:
            off = logit_scale * (F.normalize(h, dim=1) - F.normalize(e, dim=1)) @ texts.T  # the bias cancels
            total = total + weight * off.square().mean(1).sum()
        return total, F.cosine_similarity(h, e).sum()

    @torch.no_grad()
    def validate(on: Tensor = validation) -> tuple[float, float]:
        sums = [torch.stack(losses(rows)) for rows in on.split(_ROWS)]
        value, cosine = (torch.stack(sums).sum(0) / len(on)).tolist()
        return value, cosine

    steps: Any = _make_optimizer(options.optimizer, translator, rate, decay)
    result = FitResult({key: [] for key in ("train_loss", "val_loss", "val_cosine", "lr")}, held_out=held_out)
    translator.eval()
    best = math.inf
    if start or not epochs:
        best, result.val_cosine = validate()
        if not math.isfinite(best):
            _check_finite(pairs)
        before = validate(training_rows[:_TRIAL_ROWS])[0]
        for key, entry in zip(result.history, (before, best, result.val_cosine, 0.0), strict=True):
            result.history[key].append(entry)
    best_state, better = copy.deepcopy(translator.state_dict()), -1
    reduced, lowest, waited = 0, best, 0  # for the learning-rate plateau, which starts after the warm-up
    translator.train()
    for epoch in _epochs(epochs, show_progress):
        batches = training_rows[torch.randperm(len(training_rows), generator=generator)].split(options.batch_size)
        train = 0.0
        warming = sgd and epoch == 0
        now = rate * (0.5 if warming else 0.1**reduced)
        for group in steps.param_groups:
            group["lr"] = now
        for rows in batches:
            train += _step(translator, steps, rows, losses)
            if not math.isfinite(train):
                break
        value, cosine = validate()
        for key, entry in zip(result.history, (train / len(training_rows), value, cosine, now), strict=True):
            result.history[key].append(entry)
        if not math.isfinite(train + value):
            _check_finite(pairs)
            result.stopped = "nan"
            break
        if value < best:
            best, best_state = value, copy.deepcopy(translator.state_dict())
            result.best_epoch, result.val_cosine, better = epoch, cosine, epoch
        if epoch - better >= _PATIENCE:
            result.stopped = "early"
            break
        if not warming:
            lowest, waited = (value, 0) if value < lowest else (lowest, waited + 1)
            if waited == options.patience != 0:
                reduced, waited = reduced + 1, 0
    translator.load_state_dict(best_state)
    translator.fold_standardization(mean, std)
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


def _check_finite(pairs: TrainingPairs) -> None:
    """Refuse rows that are not finite (from older or foreign caches); the message names the image."""
    for rows in torch.arange(len(pairs)).split(_ROWS):
        for values, what in zip(pairs.rows(rows), ("the activation", "the embedding"), strict=True):
            finite_images(values, (rows // pairs.views).tolist(), what)


def _step(translator: nn.Module, steps: Any, rows: Tensor, losses: Callable[[Tensor], tuple[Tensor, Tensor]]) -> float:
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


def _initialize(translator: ConceptTranslator, generator: torch.Generator) -> None:
    """PyTorch's default initialization of Linear, drawn from ``generator`` on the CPU."""
    for module in translator.network:
        if isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            for parameter in (module.weight, module.bias):
                drawn = torch.empty(parameter.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
                parameter.data.copy_(drawn)


@torch.no_grad()
def start_from_examples(
    translator: ConceptTranslator,
    pairs: TrainingPairs,
    rows: Tensor,
    validation: Tensor,
    mean: Tensor,
    std: Tensor,
    generator: torch.Generator,
) -> bool:
    r"""Set the weights in closed form; returns False if the embeddings are constant or not finite.

    Hidden unit j of the first layer is :math:`\tanh(a (x \cdot x_j / C - b))`, the similarity of the standardized
    activations x to those of a training image :math:`x_j` (or of a crop, if images are too few). The second layer
    contains the leading directions of a ridge regression of the embeddings on these units, scaled to stay in the nearly
    linear range of tanh. A second ridge regression on its units determines the last layer. Random units or gradient
    descent would need many more units or epochs for the same accuracy.
    """
    first, second, last = (module for module in translator.network if isinstance(module, nn.Linear))
    device = first.weight.device
    wholes = rows[rows % pairs.views == 0]
    crops = rows[rows % pairs.views != 0]
    order = [part[torch.randperm(len(part), generator=generator)] for part in (wholes, crops)]
    chosen = torch.cat(order)[: translator.hidden[0]]
    used = rows[torch.randperm(len(rows), generator=generator)]

    def read(part: Tensor) -> tuple[Tensor, Tensor]:
        z, e = pairs.rows(part)
        return (z.to(device) - mean) / std, e.to(device)  # std includes the square root of the width

    examples = read(chosen)[0]

    def units(slope: float, middle: float) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.tanh(slope * (x @ examples.T - middle))

    def trial(slope: tuple[float, float]) -> float:
        return _ridge(used[:_TRIAL_ROWS], validation, read, units(*slope))[2]

    slope = min(_SLOPES, key=trial) if len(_SLOPES) > 1 else _SLOPES[0]
    hidden = units(*slope)
    weight, bias, error = _ridge(used[:_START_ROWS], validation, read, hidden)
    if not math.isfinite(error):
        return False
    # The leading directions of the regression, scaled to 0.1, where tanh is nearly linear.
    _, values, directions = torch.linalg.svd(weight.double(), full_matrices=False)
    count = min(translator.hidden[1], int((values > 1e-6 * values[0]).sum()))
    if not count:  # the embeddings do not vary
        return False
    directions = directions[:count].float()
    sample = hidden(read(used[:_TRIAL_ROWS])[0])
    center = sample.mean(0)
    spread = ((sample - center) @ directions.T).std(0, correction=0).clamp(min=1e-12)
    directions = 0.1 * directions / spread.unsqueeze(1)
    shift = -directions @ center
    weight, bias, error = _ridge(
        used[:_START_ROWS], validation, read, lambda x: torch.tanh(hidden(x) @ directions.T + shift)
    )
    for module in (first, second, last):
        module.weight.zero_()
        module.bias.zero_()
    first.weight[: len(examples)] = slope[0] * examples
    first.bias[: len(examples)] = -slope[0] * slope[1]
    second.weight[:count, : len(examples)] = directions
    second.bias[:count] = shift
    last.weight[:, :count] = weight
    last.bias.copy_(bias)
    return math.isfinite(error)


def _ridge(
    rows: Tensor,
    validation: Tensor,
    read: Callable[[Tensor], tuple[Tensor, Tensor]],
    features: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, float]:
    """Weight ``(D, H)``, bias ``(D,)`` and validation error of the best ridge regression of e on the features."""
    sums: list[Tensor] = []
    for part in rows.split(_ROWS):
        x, e = read(part)
        joined = torch.cat([features(x), e, torch.ones_like(e[:, :1])], 1)
        products = (joined.T @ joined).double()
        sums = [products if not sums else sums[0] + products]
    both = sums[0] / len(rows)
    width = both.shape[0] - e.shape[1] - 1
    center, target = both[:width, -1], both[width:-1, -1]
    gram = both[:width, :width] - center.outer(center)
    cross = both[:width, width:-1] - center.outer(target)
    spread = gram.diagonal().clamp(min=0).sqrt()
    spread = torch.where(spread > 1e-4 * spread.max(), spread, torch.inf)  # constant features are not used
    gram, cross = gram / spread.outer(spread), cross / spread.unsqueeze(1)
    x, e = (torch.cat(side) for side in zip(*(read(part) for part in validation.split(_ROWS)), strict=True))
    seen, wanted = (features(x).double() - center) / spread, e.double() - target
    best: tuple[Tensor, Tensor, float] = (cross.T.float(), target.float(), math.inf)
    if not bool(both.isfinite().all()):
        return best[0], best[1], math.nan
    eye = torch.eye(width, dtype=gram.dtype, device=gram.device)
    for penalty in _PENALTIES:
        found = torch.linalg.solve(gram + penalty * eye, cross)
        error = float((seen @ found - wanted).square().mean())
        if error < best[2]:
            weight = (found / spread.unsqueeze(1)).T
            best = (weight.float(), (target - weight @ center).float(), error)
    return best


def _moments(pairs: TrainingPairs, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each input, and its standard deviation times the square root of the width.

    A floor of the deviation keeps nearly constant inputs from being amplified.
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
