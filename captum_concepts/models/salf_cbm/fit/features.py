"""Backbone features on the grid, cached on disk or computed on demand."""

from __future__ import annotations

import functools
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from captum_concepts._artifacts import Array, open_artifact, own_folder, save_artifact
from captum_concepts._checks import integer, one_of
from captum_concepts._memory import Halving
from captum_concepts.activations import evaluation_mode
from captum_concepts.errors import ArtifactError, InputError, InputWarning
from captum_concepts.models.salf_cbm.fit.data import LabeledImages, Transform
from captum_concepts.models.salf_cbm.fit.steps import digest, first_decides, progress, say
from captum_concepts.store import ShardReader, default_shard_rows, missing_shards, read_manifest, world
from captum_concepts.store.processes import fill_together

#: float16's smallest normal number, below which precision is lost.
_SMALLEST = 2.0**-14


class GridFeatures(Protocol):
    """The features of images at every grid cell."""

    @property
    def dim(self) -> int:
        """D."""
        ...

    def rows(self, index: Sequence[int]) -> Tensor:
        """``(n, h*w, D)``, cells in row-major order."""
        ...

    def __len__(self) -> int: ...


class LiveFeatures:
    """Features computed from the images on demand, by the model in evaluation mode.

    Args:
        model: has ``features(images) -> (N, D, h, w)``, like :class:`~captum_concepts.models.salf_cbm.SALFCBM`.
        images: the images.
        transform: from a batch of them to the backbone's input; None leaves them unchanged.
        batch_size: images per forward pass.

    Attributes:
        cells: h*w.
        dim: D.
        device: of the model.
    """

    def __init__(
        self, model: Any, images: LabeledImages, transform: Transform | None = None, batch_size: int = 32
    ) -> None:
        self.model, self.images, self.transform = model, images, transform
        self.batch_size = integer("batch_size", batch_size)
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        self.device, self.dtype = like.device, like.dtype
        with torch.no_grad():
            self.cells, self.dim = self._compute([images.source[0]]).shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, index: Sequence[int]) -> Tensor:
        """``(n, h*w, D)`` float32 on the model's device; differentiable if gradients are enabled."""
        if not len(index):
            return torch.empty(0, self.cells, self.dim, device=self.device, dtype=torch.float32)
        return torch.cat(list(self.batches([int(i) for i in index])))

    def batches(self, index: Sequence[int]) -> Iterator[Tensor]:
        """:meth:`rows` in parts of ``batch_size`` images.

        Raises:
            InputError: NaN or infinite features; the message names the image.
        """
        kept: list[Tensor] = []
        first = 0
        halving = Halving("batch_size")
        for number, image in enumerate(self.images.read(index)):
            kept.append(image)
            if len(kept) == self.batch_size or number == len(index) - 1:
                features = torch.cat(halving(self._compute, kept, _halves))
                finite = features.detach().isfinite().flatten(1).all(1)
                if not bool(finite.all()):
                    bad = index[first + int((~finite).nonzero()[0])]
                    raise InputError(f"the backbone's features of image {bad} contain NaN or infinite values")
                yield features
                kept, first = [], number + 1

    def _compute(self, images: list[Tensor]) -> Tensor:
        batch = torch.stack(images).to(self.device)
        inputs = batch if self.transform is None else self.transform(batch)
        with evaluation_mode(self.model):  # also while the backbone is trained, to fix its batch statistics
            maps = self.model.features(inputs.to(self.dtype))
        return maps.flatten(2).transpose(1, 2).float()


def _halves(images: list[Tensor]) -> list[list[Tensor]]:
    middle = -(-len(images) // 2)
    return [part for part in (images[:middle], images[middle:]) if part]


class CachedFeatures:
    """Features read from the folder that :func:`cache_features` wrote, through memory maps.

    Args:
        path: the folder.
        made_from: what the folder must have been computed from.
    """

    def __init__(self, path: str | os.PathLike[str], made_from: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        self._reader = ShardReader(self.path, made_from, verify_on_read=True)
        self.dim: int = self._reader.row_shape("features")[-1]

    def __len__(self) -> int:
        return len(self._reader)

    def rows(self, index: Sequence[int]) -> Tensor:
        """``(n, h*w, D)`` as stored, on the CPU."""
        return self._reader.rows("features", index)


def check_first_image(path: Path, source: LiveFeatures, *, keep: bool) -> None:
    """Refuse results of a backbone with the same weights but other settings, such as another dilation.

    Args:
        path: file with the first image's features, written by the first run.
        source: the features now.
        keep: write the file if there is none.

    Raises:
        ArtifactError: the first image's features differ by more than rounding on another machine.
    """
    with torch.no_grad():
        now, kind = source.rows([0]).cpu(), "captum_concepts.FirstImage/1"
    if not path.exists():
        if keep and world()[0] == 0:
            save_artifact(path, kind, {}, {"features": now})
        return
    arrays = {"features": Array("float", (1, None, None))}
    with open_artifact(path, kind, "the features of a first image", arrays=arrays) as (_, tensors):
        then = tensors["features"]
    rounding = 5e-3 if source.dtype in (torch.float32, torch.float64) else 5e-2
    if now.shape != then.shape or float((now - then).norm()) > rounding * float(now.norm()) + _SMALLEST:
        raise ArtifactError(
            f"the results in {path.parent} were computed by a backbone with the same weights but other settings, "
            "whose outputs have changed. Pass another store_path, or delete that folder"
        )


def features_bytes(images: int, cells: int, dim: int, dtype: torch.dtype) -> int:
    """The size of a cache in bytes.

    >>> features_bytes(1_281_167, 49, 2048, torch.float16) / 1e9
    257.135341568
    """
    return images * cells * dim * dtype.itemsize


def fits(path: Path, size: int, limit: int | None) -> bool:
    """Whether a cache of ``size`` bytes is at most ``limit``, or half of the free disk if ``limit`` is None."""
    return size <= (free_bytes(path) // 2 if limit is None else limit)


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of ``path``, which need not exist."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def cache_features(
    path: Path,
    source: LiveFeatures,
    made_from: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float16,
    shard_rows: int | None = None,
    show_progress: bool = False,
) -> CachedFeatures:
    """Compute all features once and store them in ``path``; resumes a killed run.

    Each process writes every n-th shard, so the files depend neither on the number of processes nor on where a run was
    interrupted. Shards contain checksums that are compared when they are first read.

    Args:
        path: the folder.
        source: computes the features.
        made_from: what the features are computed from.
        dtype: ``torch.float16`` or ``torch.float32``.
        shard_rows: images per file; None chooses.
        show_progress: show a progress bar.

    Raises:
        InputError: NaN, or values beyond half precision.
        ArtifactError: the features in the folder do not match, or it is being written.
    """
    if dtype not in (torch.float16, torch.float32):
        raise InputError(f"feature_dtype={dtype} must be torch.float16 or torch.float32")
    count = len(source)
    fill_together(
        path,
        made_from,
        count,
        functools.partial(_fill, source, dtype, show_progress),
        shard_rows=shard_rows or default_shard_rows(count),
        what="the features at",
    )
    return CachedFeatures(path, made_from)


def _fill(source: LiveFeatures, dtype: torch.dtype, show: bool, spans: list[tuple[int, int]], write: Any) -> None:
    total = sum(end - start for start, end in spans)
    with torch.no_grad(), progress(total, "backbone features", "image", show) as advance:
        for start, end in spans:  # each file starts a new batch
            parts = []
            for features in source.batches(range(start, end)):
                values = features.to(dtype).cpu()
                if not bool(values.isfinite().all()):
                    raise InputError(
                        f"features reach {float(features.abs().max()):.3g}, which is outside the range of half "
                        "precision; use feature_dtype=torch.float32"
                    )
                if dtype == torch.float16 and 0 < (most := float(features.abs().max())) < _SMALLEST:
                    warnings.warn(
                        f"features are at most {most:.3g}, where half precision keeps few or no digits; use "
                        "feature_dtype=torch.float32",
                        InputWarning,
                        stacklevel=2,
                    )
                parts.append(values)
                advance(len(features))
            write({"features": torch.cat(parts)}, {})


def open_features(
    root: Path,
    name: str,
    source: LiveFeatures,
    made_from: Mapping[str, Any],
    *,
    cache: bool | str,
    max_bytes: int | None,
    dtype: torch.dtype,
    show_progress: bool,
) -> GridFeatures:
    """Cached features under ``root``, or ``source`` itself if a cache is unwanted, too large, or (for ``"finished"``)
    missing."""
    one_of("cache_features", cache, (True, False, "auto", "finished"))
    if cache is False:
        return source
    folder = own_folder(root / f"{name}-{digest(made_from)}")
    size = features_bytes(len(source), source.cells, source.dim, dtype)
    manifest = read_manifest(folder)
    if first_decides(manifest is not None and not missing_shards(folder, manifest)):
        say(f"{name}: taken from an earlier run ({folder.name})")
    elif cache == "finished":
        say(f"{name}: computed on the fly")
        return source
    elif cache == "auto" and not first_decides(fits(root, size, max_bytes)):
        say(f"{name}: computed on the fly, because a cache of {size / 1e9:.2f} GB is too large")
        return source
    else:
        say(f"{name}: computing once, {size / 1e9:.3g} GB ({folder.name})")
    return cache_features(folder, source, made_from, dtype=dtype, show_progress=show_progress)
