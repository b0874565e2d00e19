"""The reading side of a store of region embeddings: rows by image, similarities by text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_concepts.errors import InputError
from captum_concepts.store import _region_build as building
from captum_concepts.store.shards import ShardReader
from captum_concepts.store.similarity import Similarity
from captum_concepts.vlm import RegionPrompt


class RegionReader:
    """A finished store, opened. See :class:`~captum_concepts.store.region_embeddings.RegionEmbeddingStore`."""

    def __init__(self, path: str | os.PathLike[str], *, encoder: Any = None, verify: bool = False) -> None:
        self.path = Path(path)
        self.encoder = encoder
        self._reader = ShardReader(self.path, verify=verify, verify_on_read=True)
        self.fingerprint: dict[str, Any] = self._reader.fingerprint
        self.prompt, self.dtype = building.made_with({"fingerprint": self.fingerprint})
        self.grid = self.prompt.grid
        self.image_shape = tuple(self.fingerprint["image"])
        self.error_bound = float(self._reader.info["error_bound"])
        self.embedding_dim: int = self._reader.row_shape("embedding")[-1]
        if encoder is not None:
            self._check(encoder, self.prompt)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._reader)

    def embeddings(self, index: int | slice | Sequence[int] | Tensor | np.ndarray[Any, Any]) -> Tensor:
        """Unit embeddings as stored (:attr:`dtype`; ``.float()`` before arithmetic on a CPU), places row by row.

        Args:
            index: an image's number (negative ones count from the end), a slice, or several numbers in any order.

        Returns:
            ``(h*w, D)`` for one number, else ``(n, h*w, D)``. A zero vector where the encoder gave zeros.

        Raises:
            InputError: a number outside the store.
            ArtifactError: the file is damaged.
        """
        rows, single = self._rows(index)
        found = self._reader.rows("embedding", rows)
        return found[0] if single else found

    def similarity(self, text: Tensor | str | Sequence[str], *, chunk_size: int = 256) -> Similarity:
        """P[n, m, i, j], the cosine of image n with place (i, j) marked and text m, computed as it is read.

        Args:
            text: text embeddings ``(M, D)`` of any length, or texts, which the store's encoder embeds.
            chunk_size: images at a time.

        Returns:
            A :class:`~captum_concepts.store.similarity.Similarity` of shape (N, M, h, w): iterate it for chunks
            ``(n, M, h, w)``, index it by images, or take all with ``.tensor()``. float32, on the device of ``text``.

        Raises:
            InputError: texts without an encoder, embeddings of another width, not finite.
        """
        return Similarity(self, self._text(text), chunk_size)

    def top_activations(self, text: Tensor | Sequence[str], k: int = 5, *, chunk_size: int = 256) -> Tensor:
        """How strongly each concept appears in the data: mean of the k largest P over images, the best place of each.

        Feed it to :func:`captum_concepts.concepts.drop_absent`.

        Returns:
            ``(M,)`` float32.
        """
        if k < 1:
            raise InputError(f"k={k} must be at least 1")
        best: Tensor | None = None
        for chunk in self.similarity(text, chunk_size=chunk_size):
            found = chunk.flatten(2).amax(2)
            joined = found if best is None else torch.cat([best, found])
            best = joined.topk(min(k, len(joined)), dim=0).values
        if best is None:
            raise InputError("the store is empty")
        return best.mean(0)

    def digests(self) -> Tensor:
        """``(N,)`` int64, 64 bits of a hash of each image's pixels."""
        return self._reader.rows("digest", range(len(self)))

    def _check(self, encoder: Any, prompt: RegionPrompt) -> None:
        wanted = building.origin(encoder, prompt, self.image_shape, self.dtype)
        manifest = {"fingerprint": self.fingerprint, "info": self._reader.info}
        found = building.probe(encoder, self.image_shape)
        building.check_origin(manifest, wanted, found, f"the store at {self.path}")

    def _rows(self, index: Any) -> tuple[np.ndarray[Any, Any], bool]:
        count = len(self)
        if isinstance(index, slice):
            return np.arange(count)[index], False
        rows = np.asarray(index)
        if rows.dtype == bool and rows.shape == (count,):
            return np.flatnonzero(rows), False
        if rows.ndim > 1 or (rows.size and rows.dtype.kind not in "iu"):
            raise InputError(f"index must be one number, a slice, or a list of numbers, got {index!r}")
        wanted = np.atleast_1d(rows).astype(np.int64)
        if wanted.size and (wanted.min() < -count or wanted.max() >= count):
            raise InputError(f"images {wanted.min()} to {wanted.max()} are asked of a store of {count}")
        return np.where(wanted < 0, wanted + count, wanted), rows.ndim == 0

    def _text(self, text: Any) -> Tensor:
        if not isinstance(text, Tensor):
            texts = [text] if isinstance(text, str) else list(text)
            if self.encoder is None:
                raise InputError("texts need the encoder: open the store with encoder=, or give embeddings (M, D)")
            if not texts:
                raise InputError("text is empty; give at least one")
            text = self.encoder.encode_text(texts)
        if text.ndim == 1:
            text = text[None]
        if text.ndim != 2 or text.shape[1] != self.embedding_dim or not text.shape[0]:
            raise InputError(f"text embeddings must be (M, {self.embedding_dim}), got {tuple(text.shape)}")
        text = text.detach().float()
        if not text.isfinite().all():
            raise InputError("text embeddings hold NaN or infinite values")
        return F.normalize(text, dim=1)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)

    def __repr__(self) -> str:
        h, w = self.grid
        return (
            f"{type(self).__name__}({str(self.path)!r}: {len(self)} images, {self.prompt.kind} on {h} x {w}, "
            f"D={self.embedding_dim}, {str(self.dtype).removeprefix('torch.')})"
        )
