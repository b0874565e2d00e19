"""Calibration of a ConceptFusionMap's scores, on held-out images or the user's labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from captum_concepts.attr.concept_fusion.words import TextBank
from captum_concepts.errors import InputError

_ENOUGH = 20  # minimum number of held-out images for any claim
_BIN = 40  # entries averaged to the top knot of a presence curve
_GROWTH = 1.15  # of the bin size, downwards
_TEMPERATURES = tuple(2 ** (k / 4) for k in range(-8, 25))  # 1/4 to 64
#: Weight of the VLM's prediction on a whole held-out image relative to its crops, for the temperature and for presence.
_WHOLE, _WHOLE_PRESENCE = 1 / 3, 2 / 3
#: Presence reads the odds of a broader softmax than the scores, because several concepts may be present.
_BROADER = 1.5


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Embeddings that a fit keeps to calibrate concepts, including those added later.

    Args:
        mean: ``(D,)`` mean of the translator's unit embeddings of the training images.
        teacher_mean: ``(D,)`` mean of the VLM's.
        student: ``(M, D)`` unit embeddings of the held-out images from the translator.
        teacher: ``(M, V, D)`` unit embeddings from the VLM, of the image and its V - 1 crops.
        independent: False if no image could be held out.
    """

    mean: Tensor
    teacher_mean: Tensor
    student: Tensor
    teacher: Tensor
    independent: bool = True


@dataclass(frozen=True, eq=False)
class Curve:
    """A monotone, piecewise linear function from a logit to a probability.

    Args:
        logits: ``(K,)`` ascending.
        values: ``(K,)`` in [0, 1], not descending.
        images: number of images that it was fitted on.
        source: description of the labels that it was fitted to.
    """

    logits: Tensor
    values: Tensor
    images: int
    source: str

    def __call__(self, logits: Tensor) -> Tensor:
        """Values at ``logits`` of any shape, constant beyond the first and last knot."""
        x, y = self.logits.to(logits), self.values.to(logits)
        if len(x) == 1:
            return y[0].expand_as(logits).clone()
        right = torch.searchsorted(x, logits.contiguous()).clamp(1, len(x) - 1)
        left = right - 1
        t = ((logits - x[left]) / (x[right] - x[left]).clamp(min=1e-12)).clamp(0, 1)
        return y[left] + t * (y[right] - y[left])

    @classmethod
    def fit(cls, logits: Tensor, present: Tensor, images: int, source: str) -> Curve:
        """Isotonic regression of ``present`` (in [0, 1]) on ``logits``, over bins that are smallest at the top.

        A bin's value is the mean of its n entries and one entry of 1/2, so 40 of 40 is not certainty.
        """
        order = logits.flatten().argsort()
        x, y = logits.flatten()[order].double(), present.flatten()[order].double()
        bins: list[tuple[float, float, float]] = []  # mean logit, mean presence, weight
        stop, size = len(x), float(_BIN)
        while stop > 0:
            start = max(0, stop - int(size))
            start = 0 if start < _BIN else start
            part = slice(start, stop)
            count = stop - start
            bins.append((float(x[part].mean()), (float(y[part].sum()) + 0.5) / (count + 1), count))
            stop, size = start, size * _GROWTH
        pooled: list[tuple[float, float, float]] = []
        for entry in reversed(bins):
            pooled.append(entry)
            while len(pooled) > 1 and (pooled[-2][1] >= pooled[-1][1] or pooled[-2][0] >= pooled[-1][0]):
                (x2, y2, w2), (x1, y1, w1) = pooled.pop(), pooled.pop()
                w = w1 + w2
                pooled.append(((x1 * w1 + x2 * w2) / w, (y1 * w1 + y2 * w2) / w, w))
        knots, values, _ = zip(*pooled, strict=True)
        return cls(torch.tensor(knots), torch.tensor(values), images, source)


@dataclass(frozen=True, eq=False)
class Trust:
    """The calibration of a bank's concepts and their agreement with the VLM.

    Args:
        bank: the concepts, centered and with the temperature of the held-out images.
        presence: maps odds to a probability; None if unknown.
        reliability: ``(T, 3)`` correlation of each concept's logit with the VLM's on held-out images, and its 95 %
            interval; None if unknown.
        agreement: fraction of held-out images whose top concept is the VLM's, both centered.
        chance: agreement of independent choices with the same frequencies.
        images: number of held-out images; 0 if none could be held out.
    """

    bank: TextBank
    presence: Curve | None = None
    reliability: Tensor | None = None
    agreement: float = math.nan
    chance: float = math.nan
    images: int = 0

    @property
    def no_better_than_chance(self) -> bool:
        """Whether enough held-out images show that the translator did not learn these concepts."""
        if self.images < _ENOUGH or len(self.bank.names) < 2:
            return False
        error = math.sqrt(max(self.chance * (1 - self.chance), 1e-12) / self.images)
        return self.agreement < self.chance + 1.64 * error

    def sentence(self) -> str:
        """A one-line summary."""
        if not self.images or self.reliability is None:
            return "not measured (fit on images, or calibrate(images, labels))"
        if self.images < _ENOUGH:
            return f"not measured: {self.images} held-out image{'s' * (self.images != 1)} are too few to say"
        if self.no_better_than_chance:
            return (
                f"none: the first concept is the VLM's in {self.agreement:.0%} of {self.images} held-out images, no "
                f"better than chance ({self.chance:.0%})"
            )
        good = int((self.reliability[:, 1] > 0.3).sum())
        return (
            f"the first concept is the VLM's in {self.agreement:.0%} of {self.images} held-out images (chance "
            f"{self.chance:.0%}); {good} of {len(self.bank.names)} concepts follow it reliably"
        )


def odds(bank: TextBank, logits: Tensor) -> Tensor:
    """``(..., T)`` log odds that presence is read from, of a ``_BROADER`` softmax, or the logits under a sigmoid."""
    scaled = logits / bank.temperature
    if bank.link == "sigmoid" or len(bank.names) == 1:
        return scaled
    scaled = scaled / _BROADER
    # log(p / (1 - p)) = S_t - log sum of the others
    total = scaled.logsumexp(-1, keepdim=True)
    share = (scaled - total).exp()
    return scaled - total - torch.log1p(-share.clamp(max=1 - 1e-6))


@torch.no_grad()
def judge(bank: TextBank, held_out: HeldOut | None) -> Trust:
    """The :class:`Trust` in the concepts of ``bank``, calibrated on the held-out images.

    Logits of translator and VLM are centered by their own mean per concept over the training images, because a weak
    regression predicts what is common, and some texts are close to every image in a VLM. A sigmoid is absolute, so its
    mean logit is set to the VLM's instead. The temperature calibrates the softmax on held-out images against the VLM's
    predictions on the image and on crops of it, whose disagreement measures the VLM's uncertainty.
    """
    if held_out is None or held_out.student.shape[1] != bank.direction.shape[1]:
        return Trust(bank)
    student, teacher = held_out.student.float(), held_out.teacher.float()
    words = bank.direction.float()
    level = held_out.teacher_mean if bank.link == "sigmoid" else torch.zeros_like(held_out.mean)
    means = held_out.mean, held_out.teacher_mean
    own, vlm = (
        replace(bank, offset=bank.offset + (bank.scale * ((level - mean) @ words.T)).to(bank.offset)) for mean in means
    )
    taught = vlm.logits(teacher)
    verdicts = vlm.probability(taught)

    def said(weight: float) -> Tensor:
        """``(M, T)`` predictions of the VLM on each image and its crops."""
        whole = verdicts[:, 0]
        return weight * whole + (1 - weight) * verdicts[:, 1:].mean(1) if teacher.shape[1] > 1 else whole

    logits = own.logits(student)
    if bank.link == "softmax" and len(bank.names) > 1:
        losses = [-(said(_WHOLE) * (logits / t).log_softmax(1)).sum(1).mean() for t in _TEMPERATURES]
        own = replace(own, temperature=_TEMPERATURES[int(torch.stack(losses).argmin())])
    images = len(student)
    first, second = logits.argmax(1), taught[:, 0].argmax(1)
    counts = [torch.bincount(one, minlength=len(bank.names)).double() / images for one in (first, second)]
    presence = None
    if images >= _ENOUGH and (bank.link == "sigmoid" or len(bank.names) > 1):
        seen = said(_WHOLE_PRESENCE)
        presence = Curve.fit(odds(own, logits), seen, images, f"the VLM's verdicts on {images} held-out images")
    return Trust(
        own, presence, correlations(logits, taught[:, 0]), float((first == second).double().mean()),
        float((counts[0] * counts[1]).sum()), images if held_out.independent else 0,
    )  # fmt: skip


def correlations(one: Tensor, other: Tensor) -> Tensor:
    """``(T, 3)`` Pearson correlation of each column and its Fisher 95 % interval; 0 for a constant column."""
    n = len(one)
    a, b = (m.double() - m.double().mean(0) for m in (one, other))
    r = (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp(min=1e-12)
    half = 1.96 / math.sqrt(n - 3) if n > 3 else math.inf
    z = torch.atanh(r.clamp(-1 + 1e-9, 1 - 1e-9))
    return torch.stack([r, torch.tanh(z - half), torch.tanh(z + half)], 1).float()


def presence_table(labels: Any, names: Sequence[str], count: int) -> Tensor:
    """``(N, T)`` of 0 and 1, NaN where unknown, from the forms that ``calibrate`` accepts.

    Raises:
        InputError: the labels are neither a table nor a list of the concepts of each image.
    """
    if not isinstance(labels, Tensor):
        rows = list(labels)
        if rows and all(isinstance(row, (list, tuple, set, frozenset)) for row in rows) and not _numbers(rows[0]):
            table = torch.zeros(len(rows), len(names))
            for i, row in enumerate(rows):
                unknown = [name for name in row if name not in names]
                if unknown:
                    raise InputError(f"labels of image {i} name {unknown[:5]}, which are not among the concepts")
                for name in row:
                    table[i, list(names).index(name)] = 1
        else:
            try:
                table = torch.as_tensor(rows)
            except (TypeError, ValueError, RuntimeError):
                table = torch.zeros(0)
    else:
        table = labels
    if table.ndim != 2 or tuple(table.shape) != (count, len(names)):
        raise InputError(
            f"labels must state which of the {len(names)} concepts each of the {count} images shows: pass a table "
            f"({count}, {len(names)}) of 0 and 1 (NaN: unknown), or {count} lists of names; got {tuple(table.shape)}"
        )
    table = table.float().cpu()
    known = table[~table.isnan()]
    if not bool(((known == 0) | (known == 1)).all()):
        raise InputError("labels must be 0 or 1, or NaN where unknown")
    if not len(known):
        raise InputError("labels are all NaN (unknown); pass at least one known label")
    return table


def _numbers(row: Any) -> bool:
    return any(isinstance(value, (int, float)) for value in row)
