"""The training pairs of a translator, i.e. pooled activations and VLM embeddings of every image."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from captum_concepts import images as reader
from captum_concepts._artifacts import Array, check_json, integer as integer_from, list_of, table
from captum_concepts._checks import finite_images, integer
from captum_concepts.activations import Layers, evaluation_mode, find_model, full_precision
from captum_concepts.activations.capture import copied
from captum_concepts.errors import ArtifactError, InputError
from captum_concepts.store.manifest import fingerprint_callable
from captum_concepts.store.processes import all_or_none, fill_together, lost_peers_named, world
from captum_concepts.store.shards import ShardReader, ShardWriter

_SHARD_ROWS = 256  # the most a killed run loses, and the unit of work per process
_INFO = table({}, {"in_channels": list_of(integer_from(1, 2**24), least=1, most=10_000)})
_PROBES = 4  # images whose transformed pixels identify a transform
#: Fraction of the image's area in random crops, and their maximum aspect ratio.
_AREA, _ASPECT = (0.1, 0.7), 2**0.5

Transform = Callable[[Tensor], Tensor]


class TrainingPairs:
    """Rows ``(z, e)``: concatenated pooled activations and image embeddings, in memory or memory-mapped.

    Args:
        parts: one or more sources of rows, concatenated.
        in_channels: channels of each layer, which sum to the width of z.
        views: consecutive rows per image, the whole image and then its crops.
    """

    def __init__(
        self, parts: Sequence[tuple[Tensor, Tensor] | ShardReader], in_channels: Sequence[int], *, views: int = 1
    ) -> None:
        self.parts = list(parts)
        self.in_channels = tuple(in_channels)
        self.views = views
        sizes = [len(part) if isinstance(part, ShardReader) else len(part[0]) for part in self.parts]
        self._starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def images(self) -> int:
        """The number of images."""
        return len(self) // self.views

    @property
    def embedding_dim(self) -> int:
        """D."""
        return self.rows([0])[1].shape[1]

    def rows_of(self, images: Tensor, *, crops: bool = True) -> Tensor:
        """The row indices of these images, of all views or of the whole images only."""
        first = images * self.views
        return (first.unsqueeze(1) + torch.arange(self.views)).flatten() if crops else first

    def rows(self, index: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """``(z, e)`` at ``index``, in that order, in float32."""
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
            return z[0].float(), e[0].float()
        back = torch.cat(order).argsort()
        return torch.cat(z)[back].float(), torch.cat(e)[back].float()


@lost_peers_named()
def collect_pairs(
    layers: Layers,
    encoder: Any,
    images: Any,
    *,
    crops: int = 0,
    seed: int = 0,
    batch_size: int = 32,
    image_size: Any = None,
    model_transform: Transform | None = None,
    encoder_transform: Transform | None = None,
    cache_dir: str | Path | None = None,
    memory_budget: int = 2**30,
    show_progress: bool = False,
) -> TrainingPairs:
    """The pooled activations and embeddings of all images, from one pass of the classifier and encoder.

    Args:
        layers: of the classifier.
        encoder: with ``encode_image(images) -> (N, D)``.
        images: see :meth:`ConceptFusionMap.fit <captum_concepts.ConceptFusionMap.fit>`.
        crops: random crops per image, as additional rows.
        seed: of the crops, which depend only on it and the image's index.
        batch_size: images and crops per forward pass.
        image_size, model_transform, encoder_transform: see ``ConceptFusionMap.fit``.
        cache_dir: folder that stores the rows and resumes from those of an earlier run.
        memory_budget: bytes of rows above which they are written to a temporary folder if ``cache_dir`` is None.
        show_progress: show a progress bar.

    Raises:
        InputError: there is no image, or NaN from the classifier or encoder (the message names the image).
        ArtifactError: ``cache_dir`` contains rows of another model, encoder, layer, layout, transform or crops, or of
            other images.
    """
    views = 1 + integer("crops", crops, least=0)
    source, model_transform = _opened(layers, images, image_size, model_transform)
    rank, size = world()
    if size > 1 and source.streamed:
        raise InputError("a stream of images cannot be shared by several processes; pass a data set with a length")
    read = _Pairs(layers, encoder, model_transform, encoder_transform, views, seed)
    parts: list[tuple[Tensor, Tensor] | ShardReader]
    if cache_dir is not None:
        parts, channels = _cached(read, source, Path(cache_dir), batch_size, show_progress)
    elif size == 1:
        parts, channels = _kept(read, source, None, batch_size, memory_budget, show_progress)
    else:
        share = range(rank * len(source) // size, (rank + 1) * len(source) // size)
        gathered: list[Any] = [None] * size

        def gather() -> None:
            gathered[rank] = _kept(read, source, share, batch_size, memory_budget, show_progress)

        all_or_none(gather)
        torch.distributed.all_gather_object(gathered, gathered[rank])
        parts = [part for mine, _ in gathered for part in mine]
        channels = next((c for _, c in gathered if c), ())
    if not parts or not channels:
        raise InputError("there is no image to fit a translator to")
    check_cached_rows(parts, read, source, cache_dir)
    pairs = TrainingPairs(parts, channels, views=views)
    if pairs.images == 1:
        raise InputError("a translator cannot be fitted to a single image; pass some hundred")
    return pairs


def check_cached_rows(parts: Sequence[Any], read: _Pairs, source: reader.ImageSource, cache_dir: Any) -> None:
    """Refuse a cache of a model or encoder with the same weights but other settings, such as another dilation.

    Raises:
        ArtifactError: the first image's rows differ from the cached ones by more than rounding.
    """
    if cache_dir is None:
        return
    pooled, embedding, _ = next(iter(read(source, range(1), 1)))
    for name, now, who in (("pooled", pooled, "classifier"), ("embedding", embedding, "encoder")):
        then = parts[0].rows(name, [0])[0].float()
        rounding = 0.05 * float(now[0].norm())  # of another machine, or of half precision in a deep network
        if now[0].shape != then.shape or float((now[0] - then).norm()) > rounding:
            raise ArtifactError(
                f"the cache at {cache_dir} was computed with the same weights but other settings of the {who}, whose "
                "outputs have changed. Pass another cache_dir, or delete that folder"
            )


def _cached(
    read: _Pairs, source: reader.ImageSource, folder: Path, batch_size: int, show: bool
) -> tuple[list[Any], tuple[int, ...]]:
    """The rows in ``folder`` and the channels; each process computes its part of the missing rows.

    Each file starts a new batch, so the files do not depend on the number of processes.
    """
    made_from = read.origin(source)

    def compute(spans: list[tuple[int, int]], write: Any) -> None:
        count = sum(end - start for start, end in spans) // read.views
        for start, end in _progress(spans, count, show):
            rows = list(read(source, range(start // read.views, end // read.views), batch_size))
            tensors = {"pooled": torch.cat([z for z, _, _ in rows]), "embedding": torch.cat([e for _, e, _ in rows])}
            write(tensors, {"in_channels": list(rows[0][2])})

    fill_together(
        folder,
        made_from,
        len(source) * read.views,
        compute,
        shard_rows=max(1, _SHARD_ROWS // read.views) * read.views,
        what="the cache at",
    )
    if not len(source):
        return [], ()
    found = ShardReader(folder)
    info = check_json({**found.info, **found.notes[0]}, _INFO, f"the info in {folder}")  # in info in earlier versions
    channels = tuple(info.get("in_channels", ()))
    arrays = {"pooled": Array("float", ("N", sum(channels))), "embedding": Array("float", ("N", None))}
    return [ShardReader(folder, arrays=arrays)], channels


def _kept(
    read: _Pairs, source: reader.ImageSource, share: range | None, batch_size: int, budget: int, show: bool
) -> tuple[list[Any], tuple[int, ...]]:
    """The rows of some images in memory, or in a temporary folder if they exceed ``budget`` bytes."""
    kept: list[tuple[Tensor, Tensor]] = []
    writer: ShardWriter | None = None
    held = 0
    channels: tuple[int, ...] = ()
    count = len(share) if share is not None else None if source.streamed else len(source)
    for z, e, found in _progress(read(source, share, batch_size), count, show):
        channels = found
        held += (z.numel() + e.numel()) * 4
        kept.append((z, e))
        if writer is None and held > budget:
            writer = ShardWriter(_temporary(), {}, shard_rows=_SHARD_ROWS)
        if writer is not None:
            for pooled, embedding in kept:
                writer.append({"pooled": pooled, "embedding": embedding})
            kept = []
    if writer is not None:
        writer.finish()
        return [ShardReader(writer.path)], channels
    return [(torch.cat([z for z, _ in kept]), torch.cat([e for _, e in kept]))] if kept else [], channels


def _opened(
    layers: Layers, images: Any, image_size: Any, model_transform: Transform | None
) -> tuple[reader.ImageSource, Transform | None]:
    """The images in [0, 1] (float tensors unchanged), and the transform to the classifier's inputs."""
    if isinstance(images, reader.ImageSource):  # already opened by the caller
        return images, model_transform
    prepared = _is_prepared(images)
    known = None if prepared or model_transform is not None else reader.preprocessing_of(layers.model)
    mode = {1: "L", 3: "RGB", None: "RGB"}.get(reader.input_channels(layers.model), "any")
    size = image_size or (known.size if known is not None else None) or 224
    source = reader.open_images(
        images, size=size, mode=mode, labels=False, preprocessing=known, normalize=reader.Preprocessing(None)
    )
    return source, model_transform or known


def _is_prepared(images: Any) -> bool:
    """Whether the images are float tensors, which the classifier takes unchanged."""
    if isinstance(images, Tensor):
        return images.is_floating_point()
    if isinstance(images, DataLoader):
        return _is_prepared(images.dataset)
    if isinstance(images, (str, Path)):
        return False
    if isinstance(images, dict):  # one batch
        return _is_prepared(next((images[key] for key in reader.IMAGE_KEYS if key in images), None))
    if isinstance(images, IterableDataset):
        item = next(iter(images), None)
    elif not hasattr(images, "__getitem__") or not hasattr(images, "__len__"):
        return True
    else:
        item = images[0] if len(images) else None
    if isinstance(item, dict):
        item = next((item[key] for key in reader.IMAGE_KEYS if key in item), None)
    while isinstance(item, (tuple, list)) and len(item):
        item = item[0]
    return isinstance(item, Tensor) and item.is_floating_point()


class _Pairs:
    """Computes rows for batches of images of a source."""

    def __init__(
        self,
        layers: Layers,
        encoder: Any,
        model_transform: Transform | None,
        encoder_transform: Transform | None,
        views: int,
        seed: int,
    ) -> None:
        self.layers, self.encoder, self.views, self.seed = layers, encoder, views, seed
        self.model_transform, self.encoder_transform = model_transform, encoder_transform
        parameter = next(layers.model.parameters(), None) if layers.model is not None else None
        self.device = None if parameter is None else parameter.device

    def origin(self, source: reader.ImageSource) -> dict[str, Any]:
        """What rows in a cache must have been computed from."""
        if source.streamed:
            raise InputError(
                "a stream of images has no fingerprint, so it cannot be cached; pass a data set, or no cache_dir"
            )
        places = sorted({round(i * (len(source) - 1) / (_PROBES - 1)) for i in range(_PROBES)}) if len(source) else []
        probes = [source[i] for i in places]
        return {
            "model": fingerprint_callable(self.layers.forward_func),
            "layers": list(self.layers.names),
            "layout": f"{self.layers.layout}, prefix_tokens={self.layers.prefix_tokens}",
            "encoder": fingerprint_callable(self.encoder.encode_image),
            "images": reader.fingerprint(source),
            "model_transform": _effect(self.model_transform, probes),
            "encoder_transform": _effect(self.encoder_transform, probes),
            "crops": f"{self.views - 1}, seed {self.seed}" if self.views > 1 else "0",
        }

    def __call__(
        self, source: reader.ImageSource, share: range | None, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor, tuple[int, ...]]]:
        """``(z, e, in_channels)`` of the images in ``share``, or of all, in batches."""
        number = 0 if share is None else share.start
        for batch in reader.batches(
            source if share is None else source.select(share), max(1, batch_size // self.views)
        ):
            z, e, channels = self._pair(self._with_crops(batch.images, number))
            finite_images(z, batch.names, "the classifier's activation")
            finite_images(e, batch.names, "the encoder's embedding")
            yield z, e, channels
            number += len(batch)

    def _with_crops(self, images: Tensor, number: int) -> Tensor:
        if self.views == 1:
            return images
        rows = []
        for i, image in enumerate(images):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number + i)
            rows += [image, *random_crops(image, self.views - 1, generator)]
        return torch.stack(rows)

    @torch.no_grad()
    def _pair(self, images: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        images = images if self.device is None else images.to(self.device)
        shown = images if self.model_transform is None else self.model_transform(images)
        model = self.layers.model
        dtypes = [] if model is None else [p.dtype for p in model.parameters() if p.is_floating_point()]
        if isinstance(shown, Tensor) and shown.dtype == torch.float32 and dtypes and torch.float32 not in dtypes:
            shown = shown.to(dtypes[0])  # images are read in single precision
        seen = self.layers.run(shown)
        pooled = [maps.float().mean((2, 3)).cpu() for maps in seen.maps]
        encode = self.encoder.encode_image
        with evaluation_mode(find_model(self.encoder) or find_model(encode)):
            shown = images if self.encoder_transform is None else self.encoder_transform(images)
            e = encode(*copied([shown]))
        if not isinstance(e, Tensor) or e.ndim != 2 or len(e) != len(images):
            found = tuple(e.shape) if isinstance(e, Tensor) else type(e).__name__
            raise InputError(f"encoder.encode_image must return (N, D) for {len(images)} images, got {found}")
        return torch.cat(pooled, 1), e.detach().float().cpu(), tuple(p.shape[1] for p in pooled)


def random_crops(image: Tensor, count: int, generator: torch.Generator) -> list[Tensor]:
    """``count`` random crops of an image ``(C, H, W)``, resized to the size of the image."""
    height, width = image.shape[-2:]
    crops = []
    for _ in range(count):
        draws = torch.rand(4, generator=generator).tolist()
        area = _AREA[0] + draws[0] * (_AREA[1] - _AREA[0])
        aspect = _ASPECT ** (2 * draws[1] - 1)
        h = min(height, max(1, round(height * (area * aspect) ** 0.5)))
        w = min(width, max(1, round(width * (area / aspect) ** 0.5)))
        top, left = int(draws[2] * (height - h + 1)), int(draws[3] * (width - w + 1))
        part = full_precision(image[None, :, top : top + h, left : left + w])
        part = F.interpolate(part, (height, width), mode="bilinear", align_corners=False, antialias=True)
        crops.append(part[0].to(image.dtype))
    return crops


def _effect(transform: Transform | None, probes: Sequence[Tensor]) -> str:
    """A digest of a transform's effect on some images, because names do not separate lambdas."""
    if transform is None:
        return "none"
    return "".join(reader.digest(transform(probe.unsqueeze(0)), 4).hex() for probe in probes)


def _temporary() -> str:
    # Deleted when the process ends, because readers keep memory maps of the files until then.
    folder = tempfile.mkdtemp(prefix="captum_concepts-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _progress(batches: Iterable[Any], count: int | None, show: bool) -> Iterable[Any]:
    if not show:
        return batches
    from tqdm.auto import tqdm

    return tqdm(batches, desc=f"activations and embeddings of {'the' if count is None else f'{count:,}'} images")
