"""The bottleneck's objective, computed in parts so that P and the concept maps are never in memory as a whole.

The objective decomposes over cells. For each cell the maps are ``q = F W^T`` and the similarities ``p = E T^T``, with
the batch's features F and region embeddings E. Both are centered over the samples before the products, which avoids
cancellation and makes means over several processes cost only one short message.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from captum_concepts.models.cubic_similarity import CubicSums, similarity_and_gradient
from captum_concepts.models.salf_cbm.fit.features import GridFeatures, LiveFeatures
from captum_concepts.models.salf_cbm.fit.steps import all_reduce, share_of
from captum_concepts.store import world
from captum_concepts.store.channel import Channel, Failure, Stop

#: Numbers in one part of q and of p; about four such tensors are in memory at a time.
PART = 1 << 21
#: Bootstrap resamples of the validation images, and the minimum images for an interval.
RESAMPLES, FEWEST_RESAMPLED = 200, 20
_Item = TypeVar("_Item")
_Value = TypeVar("_Value")


class Samples(NamedTuple):
    """The features and region embeddings of a data set, and the selected rows."""

    features: GridFeatures
    regions: Any
    rows: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h*w, D, E)."""
        return len(self.regions.prompt), self.features.dim, self.regions.embedding_dim

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``(n, h*w, D)`` features and ``(n, h*w, E)`` embeddings of ``rows``, as stored."""
        wanted: Any = rows.numpy()
        return self.features.rows(wanted), self.regions.embeddings(wanted)

    def batches(self, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """:meth:`read` of each part in turn, reading ahead of the consumer."""
        if isinstance(self.features, LiveFeatures):
            return map(self.read, parts)
        return ahead(self.read, parts)


def ahead(function: Callable[[_Item], _Value], items: Iterable[_Item], depth: int = 2) -> Iterator[_Value]:
    """``map`` with a thread that works up to ``depth`` items ahead.

    >>> list(ahead(lambda x: x * x, [1, 2, 3]))
    [1, 4, 9]
    """
    stop = Stop()
    given, made = Channel(depth + 1, stop), Channel(depth + 1, stop)

    def work() -> None:
        while (one := given.get()) is not None:
            try:
                made.put(function(*one))
            except BaseException as error:
                made.put(Failure(error))

    def first() -> _Value:
        value = made.get()
        if isinstance(value, Failure):
            raise value.error
        return value

    thread = threading.Thread(target=work, daemon=True, name="ahead")
    thread.start()
    waiting = 0
    try:
        for item in items:
            given.put((item,))
            waiting += 1
            if waiting > depth:
                waiting -= 1
                yield first()
        given.put(None)
        for _ in range(waiting):
            yield first()
    finally:
        stop.is_set = True
        thread.join()


def cells_of(count: int, numbers_each: int) -> Iterator[slice]:
    """Ranges of grid cells with about :data:`PART` numbers each."""
    step = max(1, min(count, PART // max(numbers_each, 1)))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def by_cell(values: Tensor, where: slice, device: torch.device) -> Tensor:
    """``(k, n, D)`` in float32: some cells of ``(n, h*w, D)``."""
    source = values[:, where].to(device).transpose(0, 1)
    # Converts and transposes in one pass.
    return torch.empty(source.shape, device=device, dtype=torch.float32).copy_(source)


def centered(values: Tensor, total: int) -> Tensor:
    """``values`` minus the mean over the samples (dimension 1) of all processes, in place."""
    return without_mean(values, all_reduce(values.sum(1, keepdim=True)) / total)


def without_mean(values: Tensor, mean: Tensor) -> Tensor:
    """``values - mean`` in place, exactly 0 at rounding level, because the similarity is scale-invariant."""
    noise = 16 * torch.finfo(values.dtype).eps * mean.abs()
    values.sub_(mean)
    return values.masked_fill_(values.abs() <= noise, 0)


def batch_similarity(
    features: Tensor,
    embeddings: Tensor,
    weight: Tensor,
    text: Tensor,
    total: int,
    *,
    feature_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The batch's similarity and its gradients.

    Args:
        features: ``(n, h*w, D)``, this process's samples.
        embeddings: ``(n, h*w, E)``.
        weight: ``(M, D)``.
        text: ``(M, E)`` unit.
        total: samples of the batch in all processes.
        feature_gradient: also by the features.

    Returns:
        ``(M,)`` mean over the cells; this process's part of the gradient of its sum by ``weight`` (to be summed over
        processes); and the gradient by ``features`` or None.
    """
    count = features.shape[1]
    mean = torch.zeros(len(weight), device=weight.device, dtype=torch.float32)
    gradient = torch.zeros_like(weight)
    by_features = torch.empty(features.shape, device=weight.device, dtype=torch.float32) if feature_gradient else None
    reduce = all_reduce if world()[1] > 1 else None
    for where in cells_of(count, -(-total // world()[1]) * len(weight)):
        f = centered(by_cell(features, where, weight.device), total)
        e = centered(by_cell(embeddings, where, weight.device), total)
        similarity, slope = similarity_and_gradient(f @ weight.T, e @ text.T, reduce)
        mean += similarity.sum(0)
        gradient += slope.flatten(0, 1).T @ f.flatten(0, 1)
        if by_features is not None:
            by_features[:, where] = centered(slope @ weight, total).transpose(0, 1)
    return mean / count, gradient / count, None if by_features is None else by_features / count


class Validation:
    """Similarities over all validation samples, read in parts.

    Args:
        samples: the validation samples.
        text: ``(M, E)`` unit vectors; similarities are computed on their device.
        changing: whether features change between two calls (a backbone in training).
    """

    def __init__(self, samples: Samples, text: Tensor, *, changing: bool = False, batch_size: int = 256) -> None:
        self.samples, self.text, self.changing = samples, text, changing
        self.parts = samples.rows[torch.tensor(share_of(len(samples.rows)))].split(batch_size)
        self._means: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """``(M,)`` mean over the cells for each of several bottlenecks ``(M, D)``, in one pass over the data."""
        if self._means is None or self.changing:
            self._means = self._mean_rows()
        device = self.text.device
        sums = [CubicSums((len(self._means[0]), len(self.text)), device) for _ in weights]
        for features, embeddings in self.samples.batches(self.parts):
            for where in cells_of(features.shape[1], len(features) * len(self.text)):
                f = without_mean(by_cell(features, where, device), self._means[0][where, None])
                e = without_mean(by_cell(embeddings, where, device), self._means[1][where, None])
                p = e @ self.text.T
                for weight, one in zip(weights, sums, strict=True):
                    one.add(f @ weight.T, p, dim=1, where=where)
        return [one.similarity(all_reduce).mean(0) for one in sums]

    @torch.no_grad()
    def spread(self, weight: Tensor) -> Tensor:
        """``(M,)`` standard deviation of each concept map about the mean of its cell; 1 for a constant one."""
        features_mean = (self._mean_rows() if self._means is None or self.changing else self._means)[0]
        device = self.text.device
        total = torch.zeros(len(weight), device=device, dtype=torch.float32)
        for features, _ in self.samples.batches(self.parts):
            for where in cells_of(features.shape[1], len(features) * len(weight)):
                f = without_mean(by_cell(features, where, device), features_mean[where, None])
                total += (f @ weight.T).square().sum((0, 1))
        spread = (all_reduce(total) / (len(self.samples.rows) * len(features_mean))).sqrt()
        return torch.where(spread > 0, spread, 1.0)

    @torch.no_grad()
    def pooled(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Similarities of the maps' means over the cells, which the head sees and by which LF-CBM filters.

        The cubes make a few images dominate, so with a few dozen images the similarity is mostly chance.

        Returns:
            ``(M,)`` similarities, and the upper ends of their one-sided 95 % intervals (Poisson bootstrap over images;
            1, the maximum, for fewer images than :data:`FEWEST_RESAMPLED`).
        """
        device = self.text.device
        n = len(self.samples.rows)
        counts = torch.poisson(
            torch.ones(RESAMPLES, n, dtype=torch.float32), generator=torch.Generator().manual_seed(0)
        )
        counts = torch.cat([torch.ones(1, n, dtype=torch.float32), counts])[:, torch.tensor(share_of(n))].to(device)
        parts = [[v.to(device).float().mean(1) for v in part] for part in self.samples.batches(self.parts)]
        f, e = (torch.cat(part) for part in zip(*parts, strict=True))
        f, e = (without_mean(v, all_reduce(v.sum(0)) / n) for v in (f, e))
        sums = CubicSums((len(counts), len(self.text)), device)
        for own, seen, share in zip(f.split(4096), e.split(4096), counts.split(4096, 1), strict=True):
            sums.add_resampled(own @ weight.T, seen @ self.text.T, share)
        similarity = sums.similarity(all_reduce)
        upper = similarity[1:].quantile(0.95, dim=0)
        return similarity[0], upper if n >= FEWEST_RESAMPLED else torch.ones_like(upper)

    def _mean_rows(self) -> tuple[Tensor, Tensor]:
        """Mean features ``(h*w, D)`` and embeddings ``(h*w, E)``."""
        count, d, e = self.samples.shape
        device = self.text.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        sums = [torch.zeros(count, width, device=device, dtype=wide) for width in (d, e)]
        for part in self.samples.batches(self.parts):
            for one, values in zip(sums, part, strict=True):
                one += values.to(device).sum(0, dtype=wide)
        features, embeddings = ((all_reduce(part) / len(self.samples.rows)).float() for part in sums)
        return features, embeddings
