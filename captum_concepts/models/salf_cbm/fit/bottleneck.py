"""Training of the bottleneck with Adam on the cubic cosine similarity, with early stopping, resumable by epoch."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts._artifacts import Array, integer, list_of, number, table, text
from captum_concepts.errors import ConvergenceWarning, InputError
from captum_concepts.models.salf_cbm.fit.data import FEWEST
from captum_concepts.models.salf_cbm.fit.features import LiveFeatures
from captum_concepts.models.salf_cbm.fit.objective import Samples, Validation, batch_similarity
from captum_concepts.models.salf_cbm.fit.settings import BottleneckSettings
from captum_concepts.models.salf_cbm.fit.start import gather_moments, least_squares, unit_variance
from captum_concepts.models.salf_cbm.fit.steps import StepResult, all_reduce, first_decides
from captum_concepts.store import world

#: Seconds between saved states; a kill loses at most that and the current epoch.
CHECKPOINT_SECONDS = 5.0
#: Minimum steps without progress before training may stop.
_LEAST_STEPS = 50
_REDUCTIONS, _FACTOR = 2, 0.3
#: The default learning rate times the root of the number of features.
_RATE = 0.1


_EPOCH = integer(-1, 10**6)
_HISTORY = table({name: list_of(number()) for name in ("train_similarity", "val_similarity")})
#: Schemas of the notes of a stored result and of a stored state.
RESULT_NOTES = table(
    {
        "history": _HISTORY,
        "best_epoch": _EPOCH,
        "stopped": text("early", "epochs", "nan"),
        "start_similarity": number(),
    }
)
PROGRESS_NOTES = table(
    {
        "history": _HISTORY,
        "best_epoch": _EPOCH,
        "next_epoch": integer(0, 10**6),
        "steps_waited": integer(),
        "reduced_at": list_of(_EPOCH, most=_REDUCTIONS),
        "start": number(),
    }
)


def stored_arrays(concepts: int, dim: int, backbone: nn.Module | None) -> tuple[dict[str, Array], dict[str, Array]]:
    """The expected tensors of a stored result and of a stored state."""
    trained = {} if backbone is None else {n: p for n, p in backbone.named_parameters() if p.requires_grad}
    changing = {"weight": (concepts, dim), **{f"backbone.{n}": tuple(p.shape) for n, p in trained.items()}}
    own = {name: Array("float", shape) for name, shape in changing.items()}
    state = {"scale": Array("float", (dim,)), "best_similarity": Array("float", (concepts,))}
    for name, array in own.items():
        state |= {f"adam.{name}.{key}": array for key in ("exp_avg", "exp_avg_sq")}
        state |= {f"adam.{name}.step": Array("float", ()), f"best.{name}": array}
    return {**own, "similarity": Array("float", (concepts,))}, {**own, **state}


@dataclass
class BottleneckFit:
    """A trained bottleneck.

    Attributes:
        weight: ``(M, D)``; each concept map has variance 1 over the validation images and cells, so maps of different
            concepts can be compared.
        validation_similarity: ``(M,)``, mean over the cells.
        history: lists with one entry per epoch, ``"train_similarity"`` and ``"val_similarity"`` (means over concepts
            and cells; the loss is -M h w times that).
        best_epoch: the epoch whose weight is kept; -1 is the start.
        start_similarity: the validation similarity of the start.
        stopped: ``"early"``, ``"epochs"`` or ``"nan"``.
        backbone: the state of the backbone, if it was trained.
    """

    weight: Tensor
    validation_similarity: Tensor
    history: dict[str, list[float]] = field(default_factory=dict)
    best_epoch: int = -1
    start_similarity: float = math.nan
    stopped: str = "epochs"
    backbone: dict[str, Tensor] = field(default_factory=dict)


def fit_bottleneck(
    train: Samples,
    validation: Samples,
    text: Tensor,
    settings: BottleneckSettings | None = None,
    *,
    backbone: nn.Module | None = None,
    resume: StepResult | None = None,
    checkpoint: Callable[[StepResult], None] | None = None,
    show_progress: bool = False,
) -> BottleneckFit:
    r"""The bottleneck ``W`` whose maps ``W f`` match the similarities P (SALF-CBM, section 3.3).

    .. math:: L = -\sum_{m, i, j} \operatorname{sim}\big((W f)[:, m, i, j],\, P[:, m, i, j]\big)

    with the cubic cosine similarity over the samples of a batch. Under ``torch.distributed`` each process computes its
    part of a batch, and means, sums and gradients are reduced, so N processes take the same steps as one.

    Args:
        train, validation: the images; validation images must not be used for training.
        text: ``(M, E)`` unit text embeddings, on the device to train on.
        settings: see :class:`BottleneckSettings`.
        backbone: also trained, at ``settings.backbone_lr`` and with fixed batch statistics; needs
            :class:`~captum_concepts.models.salf_cbm.fit.LiveFeatures`. None trains the bottleneck only.
        resume: a state passed to ``checkpoint``; training resumes from it and gives the same bits.
        checkpoint: called with the state after an epoch, every few seconds.
        show_progress: show a progress bar.

    Raises:
        InputError: too few images, or constant features.

    Warns:
        ConvergenceWarning: the loss was not finite; the best weight so far is kept.
    """
    settings = settings or BottleneckSettings()
    for samples, what in ((train, "training"), (validation, "validation")):
        if len(samples.rows) < FEWEST:
            raise InputError(
                f"{len(samples.rows)} {what} images are too few; pass at least {FEWEST}, preferably hundreds"
            )
    if backbone is not None and not isinstance(train.features, LiveFeatures):
        raise InputError("training the backbone requires features computed on the fly, not cached ones")
    validate = Validation(validation, text, changing=backbone is not None)
    state = _State(settings, train, text, backbone, validate, resume)
    saved = time.monotonic()
    for epoch in _epochs(state, settings, show_progress):
        total = torch.zeros(len(text), device=text.device, dtype=torch.float32)
        parts = _batches(train.rows, settings, epoch)
        rank, size = world()
        with nullcontext() if backbone is not None else torch.no_grad():
            for part, (features, embeddings) in zip(parts, train.batches([p[rank::size] for p in parts]), strict=True):
                total += len(part) * state.step(features, embeddings, len(part))
        trained = float((total / len(train.rows)).mean())
        if not math.isfinite(trained):
            state.stopped = "nan"
            break
        state.finish_epoch(epoch, trained, validate([state.weight()])[0], len(parts))
        if (
            checkpoint is not None
            and not state.stopped
            and first_decides(time.monotonic() - saved >= CHECKPOINT_SECONDS)
        ):
            checkpoint(state.dump())
            saved = time.monotonic()
    return state.result()


class _State:
    """The training state, which can be saved after an epoch and resumed."""

    def __init__(
        self,
        settings: BottleneckSettings,
        train: Samples,
        text: Tensor,
        backbone: nn.Module | None,
        validate: Validation,
        resume: StepResult | None,
    ) -> None:
        self.settings, self.text, self.backbone, self.validate = settings, text, backbone, validate
        self.stopped, self.next_epoch, self.steps_waited, self.best_epoch = "", 0, 0, -1
        self.reduced_at: list[int] = []  # the epochs after which the rate was lowered
        self.history: dict[str, list[float]] = {"train_similarity": [], "val_similarity": []}
        kept = None if resume is None else resume.tensors
        if kept is None:
            moments = gather_moments(train, text.device, seed=settings.seed)
            start, self.best_similarity = _start(settings, moments, text, validate)
            self.scale = moments.scale.to(text)
            self.start = float(self.best_similarity.mean())
        else:
            start, self.scale = kept["weight"].to(text), kept["scale"].to(text)
        self.parameter = nn.Parameter(start)
        trained = {} if backbone is None else {n: p for n, p in backbone.named_parameters() if p.requires_grad}
        self.lr = settings.lr or _RATE / start.shape[1] ** 0.5
        groups: list[dict[str, Any]] = [{"params": [self.parameter], "lr": self.lr}]
        if trained:
            groups.append({"params": list(trained.values()), "lr": settings.backbone_lr})
        self.trained = {"weight": self.parameter, **{f"backbone.{n}": p for n, p in trained.items()}}
        self.adam = torch.optim.Adam(groups)
        if kept is None or resume is None:
            self.best = self._copy()
        else:
            self._load(kept, resume.notes)

    def weight(self) -> Tensor:
        """``(M, D)`` for unscaled features."""
        return self.parameter.detach() * self.scale

    def step(self, features: Tensor, embeddings: Tensor, total: int) -> Tensor:
        """Take one step of Adam and return the batch's similarity ``(M,)``."""
        live = self.backbone is not None
        similarity, gradient, by_features = batch_similarity(
            features.detach(), embeddings, self.weight(), self.text, total, feature_gradient=live
        )
        self.adam.zero_grad()
        self.parameter.grad = -all_reduce(gradient) * self.scale
        if by_features is not None and features.requires_grad:
            features.backward(-by_features)
        for name, parameter in self.trained.items():
            if name != "weight":
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                all_reduce(parameter.grad)
        self.adam.step()
        return similarity

    def finish_epoch(self, epoch: int, trained: float, similarity: Tensor, steps: int) -> None:
        """Record the epoch, keep the best weights, and decide whether to stop."""
        value = float(similarity.mean())
        self.history["train_similarity"].append(trained)
        self.history["val_similarity"].append(value)
        self.next_epoch = epoch + 1
        if value > float(self.best_similarity.mean()):
            self.best, self.best_similarity, self.best_epoch = self._copy(), similarity, epoch
            self.steps_waited = 0
            return
        self.steps_waited += steps
        since = max([self.best_epoch, *self.reduced_at])
        if epoch - since < self.settings.patience or self.steps_waited < _LEAST_STEPS:
            return
        if len(self.reduced_at) == _REDUCTIONS:
            self.stopped = "early"
            return
        self.reduced_at.append(epoch)
        self.steps_waited = 0
        self._take_best()
        self._set_rates()

    def _set_rates(self) -> None:
        rates = [self.lr, self.settings.backbone_lr]
        for group, rate in zip(self.adam.param_groups, rates, strict=False):
            group["lr"] = rate * _FACTOR ** len(self.reduced_at)

    @torch.no_grad()
    def _take_best(self) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(self.best[name])

    def dump(self) -> StepResult:
        """The state after the last finished epoch."""
        tensors = {**self._copy(), "scale": self.scale, "best_similarity": self.best_similarity}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for name, parameter in self.trained.items():
            tensors |= {f"adam.{name}.{key}": value for key, value in self.adam.state[parameter].items()}
        notes = {"history": self.history, "best_epoch": self.best_epoch, "next_epoch": self.next_epoch}
        notes |= {"steps_waited": self.steps_waited, "reduced_at": self.reduced_at, "start": self.start}
        return StepResult(tensors, notes)

    def _load(self, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        self.history = {key: list(values) for key, values in notes["history"].items()}
        self.best_epoch, self.next_epoch = notes["best_epoch"], notes["next_epoch"]
        self.steps_waited, self.start = notes["steps_waited"], notes["start"]
        self.reduced_at = list(notes["reduced_at"])
        self._set_rates()
        self.best_similarity = tensors["best_similarity"].to(self.text)
        self.best = {name: tensors[f"best.{name}"].to(p.device) for name, p in self.trained.items()}
        for name, parameter in self.trained.items():
            parameter.data.copy_(tensors[name])
            keys = ("step", "exp_avg", "exp_avg_sq")
            found = {key: tensors[f"adam.{name}.{key}"] for key in keys}
            self.adam.state[parameter] = {k: v if k == "step" else v.to(parameter) for k, v in found.items()}

    def _copy(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    def result(self) -> BottleneckFit:
        if self.stopped == "nan":
            warnings.warn(
                f"the similarity was not finite in epoch {self.next_epoch}, so training stopped and keeps the "
                f"bottleneck of epoch {self.best_epoch} (-1: the start); use a lower lr than {self.lr:g}"
                + (f" or backbone_lr than {self.settings.backbone_lr:g}" if self.backbone is not None else ""),
                ConvergenceWarning,
                stacklevel=3,
            )
        self._take_best()
        weight = self.weight() / self.validate.spread(self.weight())[:, None]
        backbone = {name.removeprefix("backbone."): v for name, v in self.best.items() if name != "weight"}
        return BottleneckFit(
            weight,
            self.best_similarity,
            self.history,
            self.best_epoch,
            self.start,
            self.stopped or "epochs",
            backbone,
        )


@torch.no_grad()
def _start(settings: BottleneckSettings, moments: Any, text: Tensor, validate: Validation) -> tuple[Tensor, Tensor]:
    """The initial weight (for features times their scale) and its validation similarity."""
    if settings.init == "least_squares":
        starts = least_squares(moments, text)
    else:
        shape = (len(text), len(moments.scale))
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(settings.seed), dtype=torch.float64)
        starts = [drawn]
    scaled = [unit_variance(start, moments).to(text) for start in starts]
    if world()[1] > 1:
        for start in scaled:
            torch.distributed.broadcast(start, 0)
    found = validate([start * moments.scale.to(text) for start in scaled])
    best = max(range(len(found)), key=lambda i: float(found[i].mean()))
    return scaled[best], found[best]


def _batches(rows: Tensor, settings: BottleneckSettings, epoch: int) -> list[Tensor]:
    """The epoch's batches, of equal size and with sorted rows, which read faster."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    order = rows[torch.randperm(len(rows), generator=generator)]
    return [part.sort().values for part in order.tensor_split(-(-len(rows) // settings.batch_size))]


def _epochs(state: _State, settings: BottleneckSettings, show: bool) -> Iterator[int]:
    bar = None
    if show and world()[0] == 0:
        from tqdm.auto import tqdm

        bar = tqdm(total=settings.max_epochs, initial=state.next_epoch, desc="bottleneck", unit="epoch")
    while state.next_epoch < settings.max_epochs and not state.stopped:
        yield state.next_epoch
        if bar is not None and state.history["val_similarity"]:
            bar.set_postfix(similarity=f"{state.history['val_similarity'][-1]:.3f}")
            bar.update()
    if bar is not None:
        bar.close()
