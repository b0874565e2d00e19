"""The training pairs of a translator, collected once: pooled activations and image embeddings of every image."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler, Subset, TensorDataset

from captum_concepts.activations import evaluation_mode, find_model, layer_name, spatial_activations
from captum_concepts.activations.capture import Layer
from captum_concepts.datasets.images import find_images, load_image
from captum_concepts.errors import InputError
from captum_concepts.store.manifest import fingerprint_callable, fingerprint_tensor
from captum_concepts.store.shards import ShardReader, ShardWriter

_SHARD_ROWS = 512  # what a killed run loses at most

Images = Tensor | Dataset[Any] | DataLoader[Any] | str | Path


class TrainingPairs:
    """Rows ``(z, e)``: concatenated pooled activations and image embeddings, in memory or memory-mapped.

    Args:
        parts: one or more sources of rows, read as if joined.
        in_channels: channels of each layer; z is as wide as their sum.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor] | ShardReader], in_channels: Sequence[int]) -> None:
        self.parts = list(parts)
        self.in_channels = tuple(in_channels)
        sizes = [len(part) if isinstance(part, ShardReader) else len(part[0]) for part in self.parts]
        self._starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def embedding_dim(self) -> int:
        """D."""
        return self.rows([0])[1].shape[1]

    def rows(self, index: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """``(z, e)`` at ``index``, in that order."""
        wanted = np.asarray(index, dtype=np.int64)
        which = np.searchsorted(self._starts, wanted, side="right") - 1
        order, z, e = [], [], []
        for number in np.unique(which):
            part, place = self.parts[number], np.flatnonzero(which == number)
            local = wanted[place] - self._starts[number]
            order.append(torch.from_numpy(place))
            if isinstance(part, ShardReader):
                z.append(part.rows("pooled", local))
                e.append(part.rows("embedding", local))
            else:
                z.append(part[0][torch.from_numpy(local)])
                e.append(part[1][torch.from_numpy(local)])
        if len(order) == 1:
            return z[0], e[0]
        back = torch.cat(order).argsort()
        return torch.cat(z)[back], torch.cat(e)[back]


class ImageFolder(Dataset[Tensor]):
    """Every image file under a folder, sorted by path, as RGB in [0, 1] of ``size`` x ``size`` pixels."""

    def __init__(self, root: str | Path, size: int) -> None:
        self.files = find_images(root)
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return load_image(self.files[index], self.size)


def as_loader(data: Images, *, batch_size: int, image_size: int) -> DataLoader[Any]:
    """Batches of ``data`` in a fixed order, so that a run can be resumed and every process sees the same rows.

    A loader with a sampler of its own is read in its data set's order. This process' contiguous share is returned
    where ``torch.distributed`` is initialised.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    options: dict[str, Any] = {"batch_size": batch_size}
    if isinstance(data, DataLoader):
        options = {"collate_fn": data.collate_fn, "num_workers": data.num_workers}
        options["batch_size"] = data.batch_size or batch_size
        if not hasattr(data.dataset, "__len__") or (data.batch_sampler is None and data.batch_size is None):
            return data
        in_order = isinstance(data.sampler, SequentialSampler) and data.batch_size is not None
        if in_order and world()[1] == 1:
            return data
        data = data.dataset
    if isinstance(data, (str, Path)):
        data = ImageFolder(data, image_size)
    dataset: Any = TensorDataset(data) if isinstance(data, Tensor) else data
    if not hasattr(dataset, "__getitem__") and not hasattr(dataset, "__iter__"):
        raise InputError(
            f"data must be images (n, 3, H, W), a folder, a Dataset or a DataLoader, got {type(data).__name__}"
        )
    rank, size = world()
    if size > 1 and hasattr(dataset, "__len__"):
        total = len(dataset)
        dataset = Subset(dataset, range(rank * total // size, (rank + 1) * total // size))
    return DataLoader(dataset, **options)


def world() -> tuple[int, int]:
    """``(rank, number of processes)``; ``(0, 1)`` outside ``torch.distributed``."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def collect_pairs(
    forward_func: Callable[..., Any],
    layers: Sequence[Layer],
    encoder: Any,
    data: Images,
    *,
    batch_size: int = 32,
    image_size: int = 224,
    model_transform: Callable[[Tensor], Tensor] | None = None,
    encoder_transform: Callable[[Tensor], Tensor] | None = None,
    cache_dir: str | Path | None = None,
    memory_budget: int = 2**30,
    layout: str = "auto",
    prefix_tokens: int | None = None,
    show_progress: bool = False,
) -> TrainingPairs:
    """Run classifier and encoder once over ``data`` and keep pooled activations and embeddings.

    Args:
        data: see :meth:`ConceptFusionMap.fit <captum_concepts.ConceptFusionMap.fit>`.
        cache_dir: keep the rows there, and go on with the rows of an earlier run there.
        memory_budget: bytes of rows above which they go to disk even without ``cache_dir`` (to a temporary folder).

    Raises:
        InputError: there is no image.
        ArtifactError: ``cache_dir`` holds rows of another model, encoder, layers or data.
    """
    loader = as_loader(data, batch_size=batch_size, image_size=image_size)
    rank, size = world()
    writer: ShardWriter | None = None
    folder: Path | None = None
    if cache_dir is not None:
        folder = Path(cache_dir) / (f"part-{rank:03d}-of-{size:03d}" if size > 1 else "")
        writer = ShardWriter(folder, _origin(forward_func, layers, encoder, loader), shard_rows=_SHARD_ROWS)
    done = writer.rows if writer is not None else 0
    kept: list[tuple[Tensor, Tensor]] = []
    held = 0
    channels: tuple[int, ...] = tuple(writer.info.get("in_channels", ())) if writer is not None else ()
    if writer is None or not writer.complete:
        for images in _progress(_images(loader), loader, show_progress):
            if done >= len(images):  # rows of an earlier run
                done -= len(images)
                continue
            z, e, channels = _pair(
                forward_func, layers, encoder, images[done:], model_transform, encoder_transform, layout, prefix_tokens
            )
            done = 0
            held += (z.numel() + e.numel()) * 4
            if writer is None and held > memory_budget:
                folder = Path(_temporary())
                writer = ShardWriter(folder, {}, shard_rows=_SHARD_ROWS)
                for old in kept:
                    writer.append({"pooled": old[0], "embedding": old[1]})
                kept = []
            if writer is None:
                kept.append((z, e))
            else:
                writer.info["in_channels"] = list(channels)
                writer.append({"pooled": z, "embedding": e})
    if writer is not None and folder is not None:
        writer.finish()
        parts: list[Any] = [ShardReader(folder)] if writer.rows else []
    else:
        parts = [(torch.cat([z for z, _ in kept]), torch.cat([e for _, e in kept]))] if kept else []
    if size > 1:
        gathered: list[Any] = [None] * size
        torch.distributed.all_gather_object(gathered, (folder if cache_dir else None, parts, channels))
        parts = [
            ShardReader(place) if place is not None else part
            for place, mine, _ in gathered
            for part in (mine or [None])
            if place is not None or part is not None
        ]
        channels = next((c for _, _, c in gathered if c), ())
    if not parts or not channels:
        raise InputError("the data holds no image to fit a translator on")
    return TrainingPairs(parts, channels)


def _temporary() -> str:
    # Deleted when the process ends: readers keep memory maps of the files until then.
    folder = tempfile.mkdtemp(prefix="captum_concepts-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _origin(
    forward_func: Callable[..., Any], layers: Sequence[Layer], encoder: Any, loader: DataLoader[Any]
) -> dict[str, Any]:
    dataset: Any = loader.dataset
    items = len(dataset) if hasattr(dataset, "__len__") else None
    sample = None
    if items and hasattr(dataset, "__getitem__"):
        seen = [_first(dataset[i]) for i in sorted({0, items // 2, items - 1})]
        sample = [fingerprint_tensor(x) for x in seen if isinstance(x, Tensor)]
    return {
        "model": fingerprint_callable(forward_func),
        "layers": [layer_name(forward_func, layer) for layer in layers],
        "encoder": fingerprint_callable(encoder.encode_image),
        "images": items,
        "sample": sample,
    }


def _first(item: Any) -> Any:
    return item[0] if isinstance(item, (tuple, list)) else item


def _images(loader: DataLoader[Any]) -> Iterator[Tensor]:
    for batch in loader:
        images = _first(batch)
        if isinstance(images, dict):
            images = images.get("image", images.get("images"))
        if not isinstance(images, Tensor):
            raise InputError(f"the data must give image tensors, or tuples that begin with one, got {type(images)}")
        yield images


def _progress(batches: Iterator[Tensor], loader: DataLoader[Any], show: bool) -> Iterator[Tensor]:
    if not show:
        return batches
    from tqdm.auto import tqdm

    try:
        total: int | None = len(loader)
    except TypeError:
        total = None
    return iter(tqdm(batches, total=total, desc="activations and embeddings"))


@torch.no_grad()
def _pair(
    forward_func: Callable[..., Any],
    layers: Sequence[Layer],
    encoder: Any,
    images: Tensor,
    model_transform: Callable[[Tensor], Tensor] | None,
    encoder_transform: Callable[[Tensor], Tensor] | None,
    layout: str,
    prefix_tokens: int | None,
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    device = device_of(forward_func)
    images = images if device is None else images.to(device)
    seen = spatial_activations(
        forward_func,
        images if model_transform is None else model_transform(images),
        layers,
        layout=layout,
        prefix_tokens=prefix_tokens,
    )
    pooled = [maps.float().mean((2, 3)).cpu() for maps in seen.maps]
    with evaluation_mode(find_model(encoder) or find_model(encoder.encode_image)):
        e = encoder.encode_image(images if encoder_transform is None else encoder_transform(images))
    if not isinstance(e, Tensor) or e.ndim != 2 or len(e) != len(images):
        raise InputError(
            f"encoder.encode_image must give (N, D) for {len(images)} images, got "
            f"{tuple(e.shape) if isinstance(e, Tensor) else type(e).__name__}"
        )
    return torch.cat(pooled, 1), e.detach().float().cpu(), tuple(p.shape[1] for p in pooled)


def device_of(forward_func: Callable[..., Any]) -> torch.device | None:
    """Where the model's parameters lie, if there is a model."""
    model = find_model(forward_func)
    parameter = next(model.parameters(), None) if model is not None else None
    return None if parameter is None else parameter.device
