"""`Similarity`: the image-concept similarities P of a store, computed in chunks when read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from captum_concepts._checks import integer


class Embeddings(Protocol):
    """Unit embeddings indexed by image, as :class:`Similarity` reads them."""

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w)."""
        ...

    def embeddings(self, index: Any) -> Tensor:
        """``(n, h*w, D)``."""
        ...

    def __len__(self) -> int: ...


class Similarity:
    """P[n, m, i, j] = I[n, ij] . T[m] of unit vectors, a matrix product computed when read.

    Iterate it for chunks in the order of the images, index it by images (a number, a slice, a list of numbers) for
    those rows, or call :meth:`tensor` for all of it. Chunks are not kept, so memory is that of one chunk.

    Args:
        store: contains the embeddings.
        text: ``(M, D)`` unit vectors, float32; P is computed on their device.
        chunk_size: images per chunk.

    Example:
        >>> class Two:
        ...     grid = (1, 2)
        ...     def __len__(self):
        ...         return 3
        ...     def embeddings(self, index):
        ...         return torch.eye(2).half().expand(3, 2, 2)[index]
        >>> p = Similarity(Two(), torch.tensor([[1.0, 0.0]]), chunk_size=2)
        >>> p.shape, p[0], [len(chunk) for chunk in p]
        ((3, 1, 1, 2), tensor([[[1., 0.]]]), [2, 1])
    """

    def __init__(self, store: Embeddings, text: Tensor, chunk_size: int = 256) -> None:
        integer("chunk_size", chunk_size)
        self.store, self.text, self.chunk_size = store, text, chunk_size

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, M, h, w)."""
        return len(self.store), len(self.text), *self.store.grid

    def __len__(self) -> int:
        """Number of chunks."""
        return -(-len(self.store) // self.chunk_size)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.store), self.chunk_size):
            yield self[start : start + self.chunk_size]

    def __getitem__(self, index: Any) -> Tensor:
        """``(M, h, w)`` for one image, else ``(n, M, h, w)``, float32; ``p[n, m]`` is ``p[n][m]``, as in a tensor."""
        if isinstance(index, tuple):
            part = self[index[0]]
            return part[index[1:] if part.ndim == 3 else (slice(None), *index[1:])]
        found = self.store.embeddings(index)
        rows = found if found.ndim == 3 else found[None]
        p = rows.to(self.text.device).float() @ self.text.T
        p = p.transpose(1, 2).reshape(len(rows), len(self.text), *self.store.grid)
        return p if found.ndim == 3 else p[0]

    def tensor(self) -> Tensor:
        """All of P, ``(N, M, h, w)`` in memory."""
        if not len(self.store):
            return self.text.new_empty(self.shape)
        return torch.cat(list(self))

    def __repr__(self) -> str:
        return f"Similarity{self.shape}"
