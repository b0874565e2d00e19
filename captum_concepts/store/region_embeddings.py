"""`RegionEmbeddingStore`: unit image embeddings of every region of every image, from which P is computed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from captum_concepts.errors import InputError
from captum_concepts.store import _region_build as building
from captum_concepts.store._distributed import all_or_none, world
from captum_concepts.store._region_data import Images, Pictures
from captum_concepts.store._region_reader import RegionReader
from captum_concepts.store._region_repair import repair, verify
from captum_concepts.store.shard_files import read_manifest
from captum_concepts.vlm import RegionPrompt


class RegionEmbeddingStore(RegionReader):
    """The embeddings I[n, ij] = E_img(x_n with region ij marked) / |...| of a data set, on disk.

    SALF-CBM needs the similarities P[n, m, i, j] = cos(E_img(x_n with region ij marked), E_text(t_m)) of every image,
    concept and place. P has rank D, so it is never stored: the embeddings are, ``(N, h*w, D)`` in half precision, and P
    is one matrix product with the texts. Other concepts need no image again.

    The folder holds shards (safetensors), each written whole or not at all, and a manifest with their checksums and
    with what they were made from: encoder weights and preprocessing, prompt and grid, image size, and a digest of every
    image's pixels. A build that is killed at any moment goes on when it is called again, and ends with the same bytes.
    A store of something else is refused, with what differs. Its size is ``N*h*w*D*2`` bytes and less than 1 % more.

    Rounding to half precision changes no P by more than :attr:`error_bound`, which is measured while building: the
    largest distance between an embedding and its rounded self, by Cauchy-Schwarz a bound for every unit text. It is
    below 2^-11 = 4.9e-4 by construction, about 2e-4 in practice.

    Open one with :meth:`open`, make one with :meth:`build`. Stores can be pickled (the path travels, not the data), so
    loader processes can use them.

    Example:
        >>> import tempfile, torch
        >>> from captum_concepts.store import RegionEmbeddingStore
        >>> from captum_concepts.vlm import RegionPrompt
        >>> class MeanColour:
        ...     logit_scale, logit_bias = 10.0, 0.0
        ...     def encode_image(self, images):
        ...         return images.mean((2, 3))
        ...     def encode_text(self, texts):
        ...         return torch.stack([torch.eye(3)[["red", "green", "blue"].index(t)] for t in texts])
        >>> images, prompt = torch.rand(5, 3, 16, 16), RegionPrompt("crop", (2, 3), 4)
        >>> store = RegionEmbeddingStore.build(tempfile.mkdtemp(), images, MeanColour(), prompt)
        >>> store.embeddings(0).shape, store.embeddings([3, 1]).shape
        (torch.Size([6, 3]), torch.Size([2, 6, 3]))
        >>> [chunk.shape for chunk in store.similarity(["red", "blue"], chunk_size=4)]
        [torch.Size([4, 2, 2, 3]), torch.Size([1, 2, 2, 3])]

    Attributes:
        path: the folder.
        grid: (h, w).
        embedding_dim: D.
        dtype: of the stored embeddings.
        prompt: the :class:`~captum_concepts.vlm.RegionPrompt` that was used.
        image_shape: (3, H, W) of the images.
        error_bound: see above.
        fingerprint: what the store was made from.
    """

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        encoder: Any = None,
        prompt: RegionPrompt | None = None,
        verify: bool = False,
    ) -> RegionEmbeddingStore:
        """Open a finished store for reading; a folder without the right to write will do.

        Args:
            path: the folder.
            encoder: checked against the one that made the store; then :meth:`similarity` takes words.
            prompt: checked against the one that made the store.
            verify: compare all checksums now. In any case sizes are compared now, and the checksum of a shard when it
                is first read, so damaged values are never returned.

        Raises:
            FileNotFoundError: no store there.
            ArtifactError: unfinished, damaged, or made by another encoder or prompt.
        """
        store = cls(path, encoder=encoder, verify=verify)
        if prompt is not None:
            building.check_fingerprint(prompt.as_dict(), store.fingerprint["prompt"], f"the store at {store.path}")
        return store

    @classmethod
    def build(
        cls,
        path: str | os.PathLike[str],
        data: Images,
        encoder: Any,
        prompt: RegionPrompt,
        *,
        batch_size: int = 64,
        resume: bool = True,
        dtype: torch.dtype = torch.float16,
        shard_rows: int | None = None,
        num_workers: int = 0,
        show_progress: bool = False,
    ) -> RegionEmbeddingStore:
        """Embed every region of every image, or go on with it; a finished store of the same things is just opened.

        Loading, drawing and writing run in threads beside the encoder. In a process group of ``torch.distributed``
        (``torchrun``, gloo or nccl) every process embeds its share and all return the whole store; its bytes do not
        depend on the number of processes, of one kind of device and with equal ``batch_size``.

        Args:
            path: the folder; made if missing.
            data: images ``(N, 3, H, W)``, or a data set (or loader) whose items are, or begin with, an image
                ``(3, H, W)``; RGB in [0, 1] or uint8, of one size, the same each time. Marks are drawn on these images,
                before the encoder's own resizing.
            encoder: an :class:`~captum_concepts.vlm.ImageTextEncoder`. It runs where its weights are.
            prompt: the regions and how they are marked.
            batch_size: marked pictures in one call of the encoder (h*w of them make one image's share).
            resume: go on with what is there; False begins anew.
            dtype: ``torch.float16``, or ``torch.float32`` for twice the size and no rounding.
            shard_rows: images in one file; None chooses about 200 files.
            num_workers: processes that read the data ahead.
            show_progress: show a bar.

        Raises:
            InputError: unusable data, encoder or setting; NaN from the encoder (the image is named).
            ArtifactError: the folder holds a store of another encoder, prompt, grid, image size or data set; is damaged
                (then :meth:`repair`); or another process is writing it.
            OSError: the disk is full or read-only; says how many images are safe. Nothing written is lost.
        """
        rank, size = world()
        options: dict[str, Any] = {"batch_size": batch_size, "resume": resume, "dtype": dtype, "shard_rows": shard_rows}
        options |= {"num_workers": num_workers, "show_progress": show_progress and rank == 0}
        all_or_none(
            lambda: cls.build_part(path, data, encoder, prompt, rank=rank, num_replicas=size, **options),
        )
        return cls(path, encoder=encoder)

    @classmethod
    def build_part(
        cls,
        path: str | os.PathLike[str],
        data: Images,
        encoder: Any,
        prompt: RegionPrompt,
        *,
        rank: int,
        num_replicas: int,
        batch_size: int = 64,
        resume: bool = True,
        dtype: torch.dtype = torch.float16,
        shard_rows: int | None = None,
        num_workers: int = 0,
        show_progress: bool = False,
    ) -> bool:
        """One share of :meth:`build`, for jobs without a process group (a job array on a shared file system).

        Share ``rank`` of ``num_replicas`` is a run of whole shards. Whoever finishes last joins the parts.

        Returns:
            Whether the store is whole now.
        """
        return building.build_part(
            Path(path),
            Pictures(data, num_workers),
            encoder,
            prompt,
            batch_size=batch_size,
            rank=rank,
            num_replicas=num_replicas,
            resume=resume,
            dtype=dtype,
            shard_rows=shard_rows,
            show_progress=show_progress,
        )

    def extend(
        self,
        data: Images,
        encoder: Any = None,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        show_progress: bool = False,
    ) -> RegionEmbeddingStore:
        """Append more images, with the same prompt, without computing the others again.

        Call it again with the same images after a kill (through :meth:`extend_at`, because an unfinished store cannot
        be opened). In a process group the first process does the work.

        Returns:
            The longer store; this one keeps showing the rows it had.
        """
        encoder = self.encoder if encoder is None else encoder
        return self.extend_at(
            self.path, data, encoder, batch_size=batch_size, num_workers=num_workers, show_progress=show_progress
        )

    @classmethod
    def extend_at(
        cls,
        path: str | os.PathLike[str],
        data: Images,
        encoder: Any,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        show_progress: bool = False,
    ) -> RegionEmbeddingStore:
        """:meth:`extend` of the store at ``path``, also of one whose extension was killed."""
        manifest = read_manifest(Path(path))
        if manifest is None:
            raise FileNotFoundError(f"there is no store at {path}; build it first")
        if encoder is None:
            raise InputError("give the encoder that made the store")
        prompt, dtype = building.made_with(manifest)
        options: dict[str, Any] = {"batch_size": batch_size, "dtype": dtype, "show_progress": show_progress}

        def append() -> None:
            if world()[0] == 0:
                building.extend(Path(path), Pictures(data, num_workers), encoder, prompt, **options)

        all_or_none(append)
        return cls(path, encoder=encoder)

    @classmethod
    def repair(
        cls,
        path: str | os.PathLike[str],
        data: Images,
        encoder: Any,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        show_progress: bool = False,
    ) -> list[int]:
        """Compute the images of damaged files again, and only those; for stores that cannot be opened any more.

        Args:
            path, data, encoder: as for :meth:`build`; with the same ``batch_size`` the files get their old bytes back.

        Returns:
            The numbers of the images that were embedded again; empty for a sound store.

        Raises:
            ArtifactError: another encoder or data set, or the manifest itself is broken.
        """
        manifest = read_manifest(Path(path))
        if manifest is None:
            raise FileNotFoundError(f"there is no store at {path}")
        prompt, dtype = building.made_with(manifest)
        pictures = Pictures(data, num_workers)
        options: dict[str, Any] = {"batch_size": batch_size, "dtype": dtype, "show_progress": show_progress}
        return repair(Path(path), pictures, encoder, prompt, **options)

    @property
    def nbytes(self) -> int:
        """Size of the folder on disk."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    @staticmethod
    def expected_bytes(
        images: int, prompt: RegionPrompt, embedding_dim: int, dtype: torch.dtype = torch.float16
    ) -> int:
        """N*h*w*D bytes of embeddings; the folder is at most 1 % larger.

        >>> RegionEmbeddingStore.expected_bytes(1_281_167, RegionPrompt(grid=7), 512) / 1e9
        64.283835392
        """
        return images * len(prompt) * embedding_dim * dtype.itemsize

    def verify(self, data: Images | None = None) -> dict[str, int]:
        """Read everything: all sizes and checksums, and that every embedding is finite and has unit length.

        Args:
            data: also compare the pixels of all images with those that were embedded.

        Returns:
            ``{"images": N, "shards": ..., "bytes": ...}``.

        Raises:
            ArtifactError: lists every damaged file and its images.
        """
        return verify(self, None if data is None else Pictures(data))
