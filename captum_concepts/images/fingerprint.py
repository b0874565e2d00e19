"""Digests of all pixels of images, which identify them in caches and stores."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor

from captum_concepts._checks import integer
from captum_concepts.images.source import MOST_WORKERS, open_images


def digest(image: Tensor, size: int = 16) -> bytes:
    """A digest of ``size`` bytes of every pixel of ``image``, as float32 on the CPU.

    >>> import torch
    >>> digest(torch.zeros(1, 2, 2)) == digest(torch.zeros(1, 2, 2)) != digest(torch.ones(1, 2, 2))
    True
    """
    pixels = image.detach().float().cpu().contiguous()
    return hashlib.blake2b(pixels.numpy().data if pixels.numel() else b"", digest_size=size).digest()


def fingerprint(source: Any, *, num_workers: int = 0, **options: Any) -> str:
    """A digest of all images of ``source``, their sizes and their order, as they are read with ``options``.

    Args:
        source: anything :func:`~captum_concepts.images.open_images` accepts; it is read once, one image at a time.
        num_workers: processes that read ahead.
        options: of ``open_images``.

    >>> import torch
    >>> images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    >>> fingerprint(images) == fingerprint(list(images)) != fingerprint(images.flip(0))
    True
    """
    code = hashlib.blake2b(digest_size=16)
    num_workers = integer("num_workers", num_workers, 0, MOST_WORKERS)
    for _, image, _ in open_images(source, **options)._rows(num_workers):
        code.update(str(tuple(image.shape)).encode())
        code.update(digest(image))
    return code.hexdigest()
