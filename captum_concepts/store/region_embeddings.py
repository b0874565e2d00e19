"""`RegionEmbeddingStore`: unit image embeddings of every region of every image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_concepts._artifacts import check_json, number, table
from captum_concepts._undo import unharming
from captum_concepts.concepts import embed_texts
from captum_concepts.errors import ArtifactError, InputError
from captum_concepts.store import build as building
from captum_concepts.store.build import Source
from captum_concepts.store.lock import FolderLock
from captum_concepts.store.manifest import check_fingerprint, shard_name
from captum_concepts.store.processes import all_or_none, world
from captum_concepts.store.shards import ShardReader, clear_store, damage
from captum_concepts.store.similarity import Similarity
from captum_concepts.store.uniform_images import UniformImages, check_digests
from captum_concepts.vlm import Regions

_NOTES = table({}, {"error_bound": number(0, 1)})


@unharming
class RegionEmbeddingStore:
    """The embeddings I[n, ij] = E_img(x_n with region ij marked) / |...| of a data set, on disk.

    SALF-CBM needs the similarities P[n, m, i, j] = cos(E_img(x_n with region ij marked), E_text(t_m)) of every image,
    concept and grid cell. P has rank D, so the store contains only the embeddings, ``(N, h*w, D)`` in half precision,
    and computes P as a matrix product with the texts. Other concepts do not require encoding the images again.

    The folder contains a manifest and shards (safetensors). The manifest records what the embeddings are computed from
    (encoder weights and preprocessing, prompt and grid, image size). Each shard is written atomically and contains its
    own checksum and a digest of each image's pixels. :meth:`build` computes every shard that is missing or damaged, so
    a build that is killed at any moment resumes when called again and ends with the same bytes. A store that does not
    match is refused, and the message names what differs. The size is ``N*h*w*D*2`` bytes plus less than 1 %.

    Rounding to half precision changes no P by more than :attr:`error_bound`, the largest distance between an embedding
    and its rounded value, which is measured while building (by Cauchy-Schwarz it bounds the error for every unit text).
    It is below 2^-11 = 4.9e-4 by construction, about 2e-4 in practice.

    Open a store with :meth:`open` and create one with :meth:`build`. Pickling a store saves the path, not the data, so
    loader processes can use it.

    Example:
        >>> import tempfile, torch
        >>> from captum_concepts.store import RegionEmbeddingStore
        >>> from captum_concepts.vlm import RegionPrompt
        >>> class MeanColor:
        ...     logit_scale, logit_bias = 10.0, 0.0
        ...     def encode_image(self, images):
        ...         return images.mean((2, 3))
        ...     def encode_text(self, texts):
        ...         return torch.stack([torch.eye(3)[["red", "green", "blue"].index(t)] for t in texts])
        >>> images, prompt = torch.rand(5, 3, 16, 16), RegionPrompt("crop", (2, 3), 4)
        >>> store = RegionEmbeddingStore.build(tempfile.mkdtemp(), images, MeanColor(), prompt)
        >>> store.embeddings(0).shape, store.embeddings([3, 1]).shape
        (torch.Size([6, 3]), torch.Size([2, 6, 3]))
        >>> [chunk.shape for chunk in store.similarity(["red", "blue"], chunk_size=4)]
        [torch.Size([4, 2, 2, 3]), torch.Size([1, 2, 2, 3])]

    Attributes:
        path: the folder.
        grid: (h, w).
        embedding_dim: D.
        dtype: of the stored embeddings.
        prompt: the :class:`~captum_concepts.vlm.RegionPrompt` or :class:`~captum_concepts.vlm.DenseRegions`.
        image_shape: (3, H, W) of the images.
        error_bound: see above.
        fingerprint: what the store was computed from.
    """

    def __init__(self, path: str | os.PathLike[str], *, encoder: Any = None, verify: bool = False) -> None:
        self.path = Path(path)
        self.encoder = encoder
        manifest = building.stored_manifest(self.path)
        self.prompt, self.dtype, self.image_shape = building.stored_settings(self.path, manifest)
        self.grid = self.prompt.grid
        self._reader = ShardReader(
            self.path,
            verify=verify,
            verify_on_read=True,
            arrays=building.stored_arrays(self.prompt, self.dtype),
        )
        if not len(self._reader):
            raise ArtifactError(f"the store at {self.path} is damaged: it has no shards")
        self.fingerprint: dict[str, Any] = self._reader.fingerprint
        notes = [check_json(note, _NOTES, f"a shard of {self.path}") for note in self._reader.notes]
        bounds = [part["error_bound"] for part in (manifest.info, *notes) if "error_bound" in part]
        self.error_bound = float(max(bounds, default=0.0))
        self.embedding_dim: int = self._reader.row_shape("embedding")[-1]
        if encoder is not None:
            source = Source(None, encoder, self.prompt, self.image_shape, self.dtype)
            building.check_origin(self.path, manifest, source)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        encoder: Any = None,
        prompt: Regions | None = None,
        verify: bool = False,
    ) -> RegionEmbeddingStore:
        """The finished store at ``path``, opened for reading; the folder may be read-only.

        Args:
            path: the folder.
            encoder: compared with the one that computed the store; required for :meth:`similarity` of texts.
            prompt: compared with the one that the store was computed with.
            verify: compare all checksums now. Headers and sizes are always compared now, and the checksum of a shard
                when it is first read, so damaged values are never returned.

        Raises:
            FileNotFoundError: there is no store at ``path``.
            ArtifactError: unfinished, damaged, or computed with another encoder or prompt.
        """
        store = cls(path, encoder=encoder, verify=verify)
        if prompt is not None:
            check_fingerprint(prompt.as_dict(), store.prompt.as_dict(), f"the store at {store.path}")
        return store

    @classmethod
    def build(
        cls,
        path: str | os.PathLike[str],
        data: Any,
        encoder: Any,
        prompt: Regions,
        *,
        batch_size: int | None = None,
        resume: bool = True,
        dtype: torch.dtype = torch.float16,
        shard_rows: int | None = None,
        num_workers: int = 0,
        show_progress: bool = False,
    ) -> RegionEmbeddingStore:
        """The finished store of every region of every image; embeds what is not on disk yet.

        All checksums are compared, and missing or damaged shards are computed. Loading, drawing and writing run in
        threads in parallel to the encoder. In a process group of ``torch.distributed`` (``torchrun``, gloo or nccl)
        process r of n computes the shards r, r + n, ... and all return the whole store. Its bytes do not depend on the
        number of processes, given the same kind of device and ``batch_size``.

        Args:
            path: the folder; created if missing.
            data: whatever :func:`captum_concepts.images.open_images` accepts, except a stream; RGB images of one size,
                the same at each access. Prompts are drawn on these images, before the encoder's own resizing.
            encoder: an :class:`~captum_concepts.vlm.ImageTextEncoder`. It runs on the device of its weights.
            prompt: the regions and how they are shown to the encoder.
            batch_size: images per encoder call, counting each of the h*w visual prompts of an image. None takes the
                fastest size in a short trial on the device, and records it in the manifest for later calls.
            resume: keep existing shards; False starts again.
            dtype: ``torch.float16``, or ``torch.float32`` for twice the size and no rounding.
            shard_rows: images per file; None chooses about 200 files.
            num_workers: processes that load the data.
            show_progress: show a progress bar.

        Raises:
            InputError: unusable data, encoder or setting; NaN from the encoder (the message names the image).
            ArtifactError: the folder contains a store of another encoder, prompt, grid, image size or data set; shards
                without a manifest, which are never removed; a damaged manifest; or another process is writing it.
            OSError: the disk is full or read-only. The message reports how many images are safe; no written data is
                lost.
        """
        path, (rank, size) = Path(path), world()

        def start_again() -> None:
            if rank == 0 and not resume:
                with FolderLock(path, "the store at"):
                    clear_store(path)

        all_or_none(start_again)
        options: dict[str, Any] = {"batch_size": batch_size, "dtype": dtype, "shard_rows": shard_rows}
        options |= {"num_workers": num_workers, "show_progress": show_progress and rank == 0}
        all_or_none(lambda: cls.build_part(path, data, encoder, prompt, rank=rank, num_replicas=size, **options))
        return cls(path, encoder=encoder)

    @classmethod
    def build_part(
        cls,
        path: str | os.PathLike[str],
        data: Any,
        encoder: Any,
        prompt: Regions,
        *,
        rank: int,
        num_replicas: int,
        batch_size: int | None = None,
        dtype: torch.dtype = torch.float16,
        shard_rows: int | None = None,
        num_workers: int = 0,
        show_progress: bool = False,
    ) -> bool:
        """Compute part ``rank`` of :meth:`build` in a job without a process group (a job array on a shared disk).

        Part ``rank`` is every ``num_replicas``-th shard from shard ``rank`` on. Parts may run in any order or at the
        same time, and ``num_replicas`` may change between runs.

        Returns:
            Whether the store is complete now.
        """
        building.check_options(batch_size, shard_rows, rank, num_replicas)
        images = UniformImages(data, num_workers)
        source = Source(images, encoder, prompt, images.shape, dtype)
        manifest = building.plan(Path(path), source, batch_size=batch_size, shard_rows=shard_rows)
        share: dict[str, Any] = {"rank": rank, "size": num_replicas, "show_progress": show_progress}
        building.fill(Path(path), source, manifest, batch_size=batch_size, **share)
        return not building.missing_shards(Path(path), manifest)

    def extend(
        self,
        data: Any,
        encoder: Any = None,
        *,
        batch_size: int | None = None,
        num_workers: int = 0,
        show_progress: bool = False,
    ) -> RegionEmbeddingStore:
        """Append more images with the same prompt, without recomputing the others.

        Readers see the old store until all new rows are written. After a kill or a full disk the same call resumes; a
        call with other images replaces an unfinished extension.

        Returns:
            The extended store; this object keeps its old rows.

        Raises:
            InputError: unusable images or NaN from the encoder; the store is unchanged.
            ArtifactError: another encoder, an unfinished store, or foreign files in the folder.
        """
        encoder = self.encoder if encoder is None else encoder
        return self.extend_at(
            self.path, data, encoder, batch_size=batch_size, num_workers=num_workers, show_progress=show_progress
        )

    @classmethod
    def extend_at(
        cls,
        path: str | os.PathLike[str],
        data: Any,
        encoder: Any,
        *,
        batch_size: int | None = None,
        num_workers: int = 0,
        show_progress: bool = False,
    ) -> RegionEmbeddingStore:
        """:meth:`extend` of the store at ``path``."""
        path, (rank, size) = Path(path), world()
        building.check_options(batch_size, None)
        source = _source(path, data, encoder, num_workers)

        def append() -> None:
            planned = building.stored_manifest(path)
            share: dict[str, Any] = {"rank": rank, "size": size, "show_progress": show_progress and rank == 0}
            try:
                building.fill(path, source, planned.extended, batch_size=batch_size, first=len(planned.rows), **share)
            except InputError:  # these images cannot be used
                building.cancel_extension(path, planned)
                raise

        all_or_none(lambda: building.plan_extension(path, source) if rank == 0 else None)
        all_or_none(append)
        all_or_none(lambda: building.finish_extension(path) if rank == 0 else None)
        return cls(path, encoder=encoder)

    @classmethod
    def repair(
        cls,
        path: str | os.PathLike[str],
        data: Any,
        encoder: Any,
        *,
        batch_size: int | None = None,
        num_workers: int = 0,
        show_progress: bool = False,
    ) -> list[int]:
        """Compute missing or damaged shards, with the store's own prompt and precision.

        Args:
            path, data, encoder: as for :meth:`build`; the same ``batch_size`` restores the same bytes.

        Returns:
            The indices of the images that were embedded again; empty for an intact store.

        Raises:
            ArtifactError: another encoder or data set, or the manifest itself is damaged.
        """
        path = Path(path)
        building.check_options(batch_size, None)
        source = _source(path, data, encoder, num_workers)
        manifest = building.plan(path, source, batch_size=batch_size, shard_rows=None)
        done = building.fill(path, source, manifest, batch_size=batch_size, show_progress=show_progress)
        return [image for shard in done for image in range(*manifest.spans[shard])]

    def __len__(self) -> int:
        """Number of images."""
        return len(self._reader)

    def embeddings(self, index: int | slice | Sequence[int] | Tensor | np.ndarray[Any, Any]) -> Tensor:
        """Unit embeddings as stored, cells in row-major order.

        They have the precision :attr:`dtype`; call ``.float()`` before arithmetic on a CPU.

        Args:
            index: an image's index (negative ones count from the end), a slice, or several indices in any order.

        Returns:
            ``(h*w, D)`` for one index, otherwise ``(n, h*w, D)``. Zero vectors where the encoder returned zeros.

        Raises:
            InputError: an index outside the store.
            ArtifactError: the file is damaged.
        """
        rows, single = self._rows(index)
        found = self._reader.rows("embedding", rows)
        return found[0] if single else found

    def similarity(self, text: Tensor | str | Sequence[str], *, chunk_size: int = 256) -> Similarity:
        """P[n, m, i, j], the cosine between image n with cell (i, j) marked and text m, computed when read.

        Args:
            text: text embeddings ``(M, D)`` of any length, or texts, which the store's encoder embeds.
            chunk_size: images per chunk.

        Returns:
            A :class:`~captum_concepts.store.similarity.Similarity` of shape (N, M, h, w), float32, on the device of
            ``text``. Iterate it for chunks ``(n, M, h, w)``, index it by images, or take all with ``.tensor()``.

        Raises:
            InputError: texts without an encoder, or embeddings of another width or not finite.
        """
        return Similarity(self, self._text(text), chunk_size)

    def digests(self) -> Tensor:
        """``(N,)`` int64, 64 bits of a hash of each image's pixels."""
        return self._reader.rows("digest", range(len(self)))

    @property
    def nbytes(self) -> int:
        """Size of the folder on disk."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    @staticmethod
    def expected_bytes(images: int, prompt: Regions, embedding_dim: int, dtype: torch.dtype = torch.float16) -> int:
        """N*h*w*D bytes of embeddings; the folder is at most 1 % larger.

        >>> from captum_concepts.vlm import RegionPrompt
        >>> RegionEmbeddingStore.expected_bytes(1_281_167, RegionPrompt(grid=7), 512) / 1e9
        64.283835392
        """
        return images * len(prompt) * embedding_dim * dtype.itemsize

    def verify(self, data: Any | None = None) -> dict[str, int]:
        """Check all sizes and checksums, and that every embedding is finite and has unit length (or is zero).

        Args:
            data: also check that these images have the pixels that were embedded.

        Returns:
            ``{"images": N, "shards": ..., "bytes": ...}``.

        Raises:
            ArtifactError: lists every damaged file and its images.
        """
        manifest = building.stored_manifest(self.path)
        found = {n: why for n in range(len(manifest.rows)) if (why := damage(self.path, manifest, n)) is not None}
        if found:
            spans = manifest.spans
            files = [f"{shard_name(n)} (images {spans[n][0]} to {spans[n][1] - 1}): {why}" for n, why in found.items()]
            raise ArtifactError(
                f"the store at {self.path} is damaged: {'; '.join(files[:3])}"
                f"{f'; and {len(files) - 3} more' if len(files) > 3 else ''}. build() or repair() computes them again"
            )
        tolerance = 2.0**-10 if self.dtype == torch.float16 else 1e-5
        for start in range(0, len(self), 256):
            norm = self.embeddings(slice(start, start + 256)).float().norm(dim=2)
            if not ((norm - 1).abs() < tolerance).logical_or(norm == 0).all():
                raise ArtifactError(
                    f"images {start} to {start + 255} of the store at {self.path} have no unit embeddings"
                )
        if data is not None:
            images, count = UniformImages(data), len(self)
            if len(images) != count:
                raise ArtifactError(f"the store at {self.path} has {count} images, the data {len(images)}")
            check_digests(images, self.digests().tolist(), range(count), f"the store at {self.path}")
        return {"images": len(self), "shards": len(manifest.rows), "bytes": self.nbytes}

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
            raise InputError(f"images {wanted.min()} to {wanted.max()} were requested from a store of {count}")
        return np.where(wanted < 0, wanted + count, wanted), rows.ndim == 0

    def _text(self, text: Any) -> Tensor:
        if not isinstance(text, Tensor):
            if self.encoder is None:
                raise InputError("texts require the encoder; open the store with encoder=, or pass embeddings (M, D)")
            text = embed_texts(self.encoder, [text] if isinstance(text, str) else text)
        if text.ndim == 1:
            text = text[None]
        if text.ndim != 2 or text.shape[1] != self.embedding_dim or not text.shape[0]:
            raise InputError(f"text embeddings must be (M, {self.embedding_dim}), got {tuple(text.shape)}")
        text = text.detach().float()
        if not text.isfinite().all():
            raise InputError("text embeddings contain NaN or infinite values")
        return F.normalize(text, dim=1)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)

    def __repr__(self) -> str:
        h, w = self.grid
        return (
            f"{type(self).__name__}({str(self.path)!r}: {len(self)} images, {self.prompt.kind} on {h} x {w}, "
            f"D={self.embedding_dim}, {str(self.dtype).removeprefix('torch.')})"
        )


def _source(path: Path, data: Any, encoder: Any, num_workers: int) -> Source:
    """The source for writing more of the store at ``path``, with its prompt and precision."""
    manifest = building.stored_manifest(path)
    if encoder is None:
        raise InputError("pass the encoder that the store was computed with")
    prompt, dtype, _ = building.stored_settings(path, manifest)
    images = UniformImages(data, num_workers)
    return Source(images, encoder, prompt, images.shape, dtype)
