"""Whether a concept is there: what held-out images, or the user's own labels, say of a ConceptFusionMap's scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from captum_concepts.attr.concept_fusion.words import TextBank
from captum_concepts.errors import InputError

_ENOUGH = 20  # held-out images below which nothing is claimed
_BIN = 40  # entries whose mean is one knot of a presence curve, at the top
_GROWTH = 1.15  # of the bins downwards
_TEMPERATURES = tuple(2 ** (k / 4) for k in range(-8, 25))  # 1/4 to 64
#: Weight of the VLM's verdict on a whole held-out image, beside those on its crops: for the temperature, for presence.
_WHOLE, _WHOLE_PRESENCE = 1 / 3, 2 / 3
#: Presence reads the odds of a broader softmax than the scores: several words may be there, so runners-up count less.
_BROADER = 1.5


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What a fit keeps of its images to judge words, also those that come later.

    Args:
        mean: ``(D,)`` of the translator's unit embeddings of the training images.
        teacher_mean: ``(D,)`` of the VLM's.
        student: ``(M, D)`` the translator's unit embeddings of the held-out images.
        teacher: ``(M, V, D)`` the VLM's, of the image and its V - 1 crops.
        independent: False if no image could be held out.
    """

    mean: Tensor
    teacher_mean: Tensor
    student: Tensor
    teacher: Tensor
    independent: bool = True


@dataclass(frozen=True, eq=False)
class Curve:
    """A monotone, piecewise linear function of a logit to a probability.

    Args:
        logits: ``(K,)`` ascending.
        values: ``(K,)`` in [0, 1], not descending.
        images: on how many images it was fitted.
        source: what said what is present, in words.
    """

    logits: Tensor
    values: Tensor
    images: int
    source: str

    def __call__(self, logits: Tensor) -> Tensor:
        """Values at ``logits`` of any shape; those of the first and last knot beyond them."""
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

        The value of a bin is that of ``n + 1`` entries, one of which is a half: 40 of 40 are not certainty.
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
    """What is known about the words of a bank.

    Args:
        bank: the words, centered and with the temperature of the held-out images.
        presence: from odds to a probability; None if nothing is known.
        reliability: ``(T, 3)`` correlation of each word's logit with the VLM's on held-out images, and its 95 %
            interval; None if nothing is known.
        agreement: fraction of held-out images whose first word is the VLM's, each less its own mean.
        chance: of two independent choices of as frequent words.
        images: the number of held-out images.
    """

    bank: TextBank
    presence: Curve | None = None
    reliability: Tensor | None = None
    agreement: float = math.nan
    chance: float = math.nan
    images: int = 0

    @property
    def no_better_than_chance(self) -> bool:
        """Whether enough held-out images say that the translator did not learn these words."""
        if self.images < _ENOUGH or len(self.bank.names) < 2:
            return False
        error = math.sqrt(max(self.chance * (1 - self.chance), 1e-12) / self.images)
        return self.agreement < self.chance + 1.64 * error

    def sentence(self) -> str:
        """One line for people."""
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
    """``(..., T)`` log odds of a softmax of ``_BROADER`` temperature (or the logits), which presence is read from."""
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
    """What the held-out images say about the words of ``bank``, and the bank that they make of it.

    Centering: the mean logit of each word over the training images is subtracted, the translator's from its own and the
    VLM's from its own: a regression that knows little says what is common, and some words are near every image in a
    VLM. A sigmoid, which is absolute, gets the VLM's mean logit instead. The temperature makes the softmax as sure as
    it is right on held-out images, where right is what the VLM says of the image and of crops of it: a VLM that changes
    its mind was not sure either.
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
        """``(M, T)`` what the VLM says of each image, and of crops of it."""
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
    """``(T, 3)``: Pearson's correlation of each column, and Fisher's 95 % interval; 0 for a constant column."""
    n = len(one)
    a, b = (m.double() - m.double().mean(0) for m in (one, other))
    r = (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp(min=1e-12)
    half = 1.96 / math.sqrt(n - 3) if n > 3 else math.inf
    z = torch.atanh(r.clamp(-1 + 1e-9, 1 - 1e-9))
    return torch.stack([r, torch.tanh(z - half), torch.tanh(z + half)], 1).float()


def presence_table(labels: Any, names: Sequence[str], count: int) -> Tensor:
    """``(N, T)`` of 0 and 1, NaN where unknown, from the forms that ``calibrate`` accepts.

    Raises:
        InputError: neither a table nor a list of the concepts of each image.
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
            f"labels must say of each of {count} images which of the {len(names)} concepts are there: a table "
            f"({count}, {len(names)}) of 0 and 1 (NaN: unknown), or {count} lists of names; got {tuple(table.shape)}"
        )
    table = table.float().cpu()
    known = table[~table.isnan()]
    if not bool(((known == 0) | (known == 1)).all()):
        raise InputError("labels must be 0 or 1, or NaN where unknown")
    if not len(known):
        raise InputError("labels are all unknown (NaN)")
    return table


def _numbers(row: Any) -> bool:
    return any(isinstance(value, (int, float)) for value in row)
