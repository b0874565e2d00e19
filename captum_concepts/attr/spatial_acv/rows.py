"""Rows of activations, one per position of every concept example, sampled in one pass within a budget."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from captum_concepts._checks import finite_images
from captum_concepts.activations import full_precision
from captum_concepts.errors import InputError
from captum_concepts.images import digest


@dataclass(frozen=True)
class GuidanceRows:
    """Rows of one or several sets of concept or negative examples.

    Args:
        x: ``(m, C)`` activations.
        image: ``(m,)`` image number of each row; identical images have the same number.
        digests: content digest of each image, by number.
        origins: the set each image was first read from, by number.
        counts: how often each image was read, by number.
        positions: number of rows of each image before sampling, by number.
    """

    x: Tensor
    image: Tensor
    digests: tuple[bytes, ...]
    origins: tuple[str, ...]
    counts: tuple[int, ...]
    positions: tuple[int, ...]

    @property
    def images(self) -> int:
        """The number of images read, including repeated ones."""
        return sum(self.counts)

    @property
    def seen(self) -> int:
        """The number of rows before sampling."""
        return sum(self.positions)

    def select(self, keep: Callable[[bytes, str], bool]) -> GuidanceRows:
        """The rows of images for which ``keep(digest, origin)`` is true."""
        kept = torch.tensor([keep(*pair) for pair in zip(self.digests, self.origins, strict=True)], dtype=torch.bool)
        if bool(kept.all()):
            return self
        rows = kept.to(self.image.device)[self.image]
        number = (kept.cumsum(0) - 1).to(self.image.device)
        return GuidanceRows(
            self.x[rows],
            number[self.image[rows]],
            tuple(compress(self.digests, kept)),
            tuple(compress(self.origins, kept)),
            tuple(compress(self.counts, kept)),
            tuple(compress(self.positions, kept)),
        )


def rows_of(maps: Tensor) -> Tensor:
    """``(n, h*w, C)`` activations at each position, from maps ``(n, C, h, w)``.

    >>> maps = torch.arange(8.0).view(1, 2, 2, 2)
    >>> rows_of(maps)[0, 1], maps[0, :, 0, 1]
    (tensor([1., 5.]), tensor([1., 5.]))
    """
    return maps.flatten(2).transpose(1, 2)


def gather(
    batches: Iterable[tuple[str, Tensor]], maps_of: Callable[[Tensor], Tensor], budget: int, seed: int
) -> GuidanceRows:
    """At most ``budget`` rows, a seeded uniform sample of the positions of all images, each run once.

    Each position draws a key from ``(seed, set, image)`` and the smallest keys are kept, so memory is bounded for an
    unknown number of images, and the sample does not depend on how images are batched.

    Args:
        batches: ``(set name, images)`` one after another.
        maps_of: converts images to activation maps ``(n, C, h, w)``.
        budget: maximum number of rows to keep.
        seed: of the sample.

    Raises:
        InputError: activations are NaN or infinite, or the layer's channel count depends on the image.
    """
    buffer: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, keys, image numbers
    numbers: dict[bytes, int] = {}
    origins: list[str] = []
    counts: list[int] = []
    positions: list[int] = []
    of_set: dict[str, int] = {}
    held, limit = 0, 2.0
    for name, batch in batches:
        rows = rows_of(full_precision(maps_of(batch).detach()))
        if buffer and rows.shape[2] != buffer[0][0].shape[1]:
            raise InputError(
                f"the layer returns {rows.shape[2]} and {buffer[0][0].shape[1]} channels for different images of "
                f"{name!r}"
            )
        for image, own in zip(batch, rows, strict=True):
            index = of_set[name] = of_set.get(name, -1) + 1
            code = digest(image)
            if code not in numbers:
                numbers[code] = len(numbers)
                origins.append(name)
                counts.append(0)
                positions.append(0)
            counts[numbers[code]] += 1
            positions[numbers[code]] += len(own)
            key = torch.rand(len(own), generator=_generator(seed, name, index), dtype=torch.float64)
            chosen = (key < limit).nonzero().flatten()
            taken = own[chosen.to(own.device)]
            finite_images(taken[None], [f"image {index} of {name!r}"], "the layer's activation")
            buffer.append((taken, key[chosen], torch.full((len(chosen),), numbers[code])))
            held += len(chosen)
        if held > 2 * budget:
            buffer = [_smallest(buffer, budget)]
            limit, held = float(buffer[0][1].max()), budget
    if not buffer:
        raise InputError("the concept examples contain no images")
    x, _, number = _smallest(buffer, budget)
    return GuidanceRows(x, number.to(x.device), tuple(numbers), tuple(origins), tuple(counts), tuple(positions))


def merge(parts: Sequence[GuidanceRows]) -> GuidanceRows:
    """The rows of several sets as one; an image that is in two of them stays one image."""
    numbers: dict[bytes, int] = {}
    origins: list[str] = []
    counts: list[int] = []
    positions: list[int] = []
    images = []
    for part in parts:
        for code, origin in zip(part.digests, part.origins, strict=True):
            if code not in numbers:
                numbers[code] = len(numbers)
                origins.append(origin)
                counts.append(0)
                positions.append(0)
        new = torch.tensor([numbers[code] for code in part.digests])
        for number, count, position in zip(new.tolist(), part.counts, part.positions, strict=True):
            counts[number] += count
            positions[number] += position
        images.append(new.to(part.image.device)[part.image])
    x = torch.cat([part.x for part in parts])
    return GuidanceRows(x, torch.cat(images), tuple(numbers), tuple(origins), tuple(counts), tuple(positions))


def _smallest(buffer: list[tuple[Tensor, Tensor, Tensor]], budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of the ``budget`` smallest keys, in their original order."""
    key = torch.cat([part[1] for part in buffer])
    order = key.argsort()[:budget].sort().values
    x = torch.cat([part[0] for part in buffer])
    return x[order.to(x.device)], key[order], torch.cat([part[2] for part in buffer])[order]


def _generator(seed: int, name: str, index: int) -> torch.Generator:
    code = hashlib.blake2b(f"{seed}/{name}/{index}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(code, "big"))
