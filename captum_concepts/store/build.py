"""The source of region embeddings, and the pipeline from images to unit embeddings."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_concepts._artifacts import (
    Array,
    anything,
    check_json,
    integer,
    list_of,
    nothing_or,
    number,
    table,
    text,
)
from captum_concepts._checks import integer as checked_integer
from captum_concepts._memory import Halving
from captum_concepts.activations import evaluation_mode, find_model
from captum_concepts.errors import ArtifactError, InputError
from captum_concepts.store.channel import Channel, Failure, Stop
from captum_concepts.store.lock import FolderLock
from captum_concepts.store.manifest import Manifest, check_fingerprint, fingerprint_callable, read_manifest
from captum_concepts.store.shards import (
    Span,
    Write,
    check_unclaimed,
    damage,
    default_shard_rows,
    fill_shards,
    missing_shards,
    open_shard,
    shard_sizes,
    unlisted_shards,
)
from captum_concepts.store.uniform_images import UniformImages, check_digests, digest
from captum_concepts.vlm import (
    DenseRegions,
    RegionPrompt,
    Regions,
    check_encoder,
    regions_from_dict,
    trial_batch_size,
)

KIND = "region embeddings, version 1"
DTYPES = {"float16": torch.float16, "float32": torch.float32}
_PROBE, _PROBE_TOLERANCE, _PROBE_SIDE = 16, 5e-3, 2048
_SAMPLE = 32
_SIDE = integer(1, 2**20)
_ORIGIN = table(
    {
        "kind": text(KIND),
        "encoder": text(),
        "preprocess": nothing_or(anything),
        "prompt": anything,  # read by regions_from_dict
        "image": list_of(_SIDE, length=3),
        "dtype": text(*DTYPES),
    }
)
_INFO = table(
    {},
    {
        "images": integer(1),
        "shard_rows": integer(1),
        "batch_size": integer(1),
        "probe": list_of(number(-2, 2), most=_PROBE),
        "error_bound": number(0, 1),
    },
)


@dataclasses.dataclass(frozen=True)
class Source:
    """What a store is computed from: images, the encoder, how regions are shown to it, and the precision.

    Args:
        images: the images; None where a store is only compared with an encoder.
        encoder: see :class:`~captum_concepts.vlm.ImageTextEncoder`.
        regions: a :class:`~captum_concepts.vlm.RegionPrompt`, :class:`~captum_concepts.vlm.DenseRegions` or
            ``AdaptiveRegions``.
        shape: of an image.
        dtype: of the stored embeddings.
    """

    images: UniformImages | None
    encoder: Any
    regions: Regions
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        check_encoder(self.encoder)
        if not isinstance(self.regions, Regions):
            raise InputError(f"prompt must be a RegionPrompt or DenseRegions, got {type(self.regions).__name__}")
        if isinstance(self.regions, DenseRegions) and not callable(getattr(self.encoder, "encode_regions", None)):
            raise InputError(
                f"DenseRegions requires an encoder with encode_regions, which {type(self.encoder).__name__} does not "
                "have; use RegionPrompt('crop'), which works with every encoder"
            )
        if self.dtype not in DTYPES.values():
            raise InputError(f"dtype={self.dtype} must be torch.float16 or torch.float32")

    def fingerprint(self) -> dict[str, Any]:
        """Everything that must match for a store to be resumed or reused."""
        preprocess = getattr(self.encoder, "preprocess", None)
        return {
            "kind": KIND,
            "encoder": fingerprint_callable(self.encoder.encode_image),
            "preprocess": json.loads(json.dumps(preprocess, default=str)) if isinstance(preprocess, Mapping) else None,
            "prompt": self.regions.as_dict(),
            "image": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @functools.cached_property
    def probe(self) -> Tensor:
        """The unit embedding of a fixed image, which detects encoders with equal weights but different computation."""
        sides = [min(side, _PROBE_SIDE) for side in self.shape[1:]]  # a forged size must not be allocated
        image = torch.rand(1, self.shape[0], *sides, generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), evaluation_mode(module_of(self.encoder)):
            embedding = check_embedding(self.encoder.encode_image(image.to(device_of(self.encoder))), 1)[0].cpu()
        return F.normalize(embedding, dim=0)


def stored_settings(path: Path, manifest: Manifest) -> tuple[Regions, torch.dtype, tuple[int, ...]]:
    """The regions, precision and image shape of a store.

    Raises:
        ArtifactError: the store is not one of region embeddings, or its manifest is damaged.
    """
    if manifest.fingerprint.get("kind") != KIND:
        raise ArtifactError(f"{path} contains a store, but not one of region embeddings of this version")
    found = check_json(manifest.fingerprint, _ORIGIN, f"the fingerprint in {path}")
    check_json(manifest.info, _INFO, f"the info in {path}")
    try:
        regions = regions_from_dict(found["prompt"])
    except InputError as error:
        raise ArtifactError(f"the prompt in the manifest of {path} is damaged or foreign: {error}") from error
    return regions, DTYPES[found["dtype"]], tuple(found["image"])


def check_origin(path: Path, manifest: Manifest, source: Source) -> None:
    """Refuse a store of another encoder, preprocessing, prompt, grid, image size or precision."""
    regions, _, _ = stored_settings(path, manifest)
    what, wanted = f"the store at {path}", source.fingerprint()
    found = {**manifest.fingerprint, "prompt": regions.as_dict()}  # with the current names
    check_fingerprint(wanted["prompt"], found["prompt"], f"{what} (its prompt)")  # names the one setting
    check_fingerprint({key: value for key, value in wanted.items() if found.get(key) != value}, found, what)
    stored = torch.tensor(manifest.info.get("probe", []), dtype=torch.float32)
    if not torch.allclose(stored, source.probe[: len(stored)], atol=_PROBE_TOLERANCE, rtol=0):
        raise ArtifactError(
            f"{what} was computed by an encoder with the same weights that embeds a test image differently: its "
            "preprocessing or settings have changed"
        )


def stored_arrays(regions: Regions, dtype: torch.dtype, dim: int | None = None) -> dict[str, Array]:
    """The expected tensors of a shard."""
    kind = "F16" if dtype == torch.float16 else "F32"
    return {"embedding": Array(kind, ("N", len(regions), dim)), "digest": Array("I64", ("N",))}


def plan(path: Path, source: Source, *, batch_size: int | None, shard_rows: int | None) -> Manifest:
    """The manifest of the store of all images, written if there is none.

    Raises:
        ArtifactError: the folder contains a store that does not match.
    """
    assert source.images is not None
    count = len(source.images)
    found = read_manifest(path)
    if found is None:
        with explained(path, count), FolderLock(path, "the store at", name="plan", wait=60):
            found = read_manifest(path)  # another process may have been faster
            if found is None:
                check_unclaimed(path)
                rows = shard_rows or default_shard_rows(count)
                info = {
                    "images": count,
                    "shard_rows": rows,
                    "probe": [round(v, 4) for v in source.probe[:_PROBE].tolist() if math.isfinite(v)],
                }
                info["batch_size"] = batch_size or chosen_batch_size(source)
                found = Manifest(source.fingerprint(), shard_sizes(count, rows), info)
                found.write(path)
    check_origin(path, found, source)
    what = f"the store at {path}"
    if found.growing and found.info.get("images", count) == count:  # format 1, unfinished
        found = _continued(path, found, count, shard_rows)
    if found.total != count:
        raise ArtifactError(
            f"{what} has {found.total} images, but the data has {count}; add images with extend(), or build in "
            "another folder"
        )
    return found


def plan_extension(path: Path, source: Source) -> None:
    """Record the shards of more images in the manifest; readers ignore them until :func:`finish_extension`.

    Shards of a killed extension by the same images are kept, those of other images are removed.

    Raises:
        ArtifactError: the store is unfinished or does not match, or the folder contains foreign files.
    """
    assert source.images is not None
    what = f"the store at {path}"
    with explained(path, None), FolderLock(path, "the store at"):
        found = stored_manifest(path)
        check_origin(path, found, source)
        if found.growing or missing_shards(path, found):
            raise ArtifactError(f"{what} is unfinished; call build again with its own images, then extend it")
        started = unlisted_shards(path, found)
        if not _continues(path, found, source):
            for file in started:
                file.unlink(missing_ok=True)
            count = len(source.images)
            rows = shard_sizes(count, found.info.get("shard_rows") or max(found.rows, default=count))
            dataclasses.replace(found, planned=rows).write(path)


def _continues(path: Path, found: Manifest, source: Source) -> bool:
    """Whether an extension by these images is in progress."""
    assert source.images is not None
    if sum(found.planned) != len(source.images):
        return False
    arrays = stored_arrays(source.regions, source.dtype, len(source.probe))
    whole, first = found.extended, len(found.rows)
    sound = [n for n in range(first, len(whole.rows)) if damage(path, whole, n, arrays) is None]
    try:
        _check_images(path, whole, source, sound, arrays, found.total)
    except ArtifactError:
        return False
    return True


def cancel_extension(path: Path, planned: Manifest) -> None:
    """Remove the shards planned by :func:`plan_extension`, from the manifest and the folder."""
    with FolderLock(path, "the store at"):
        found = stored_manifest(path)
        if found == planned:
            dataclasses.replace(found, planned=[]).write(path)
            for file in unlisted_shards(path, found):
                file.unlink(missing_ok=True)


def stored_manifest(path: Path) -> Manifest:
    """The manifest of the store at ``path``.

    Raises:
        FileNotFoundError: there is none.
    """
    found = read_manifest(path)
    if found is None:
        raise FileNotFoundError(f"there is no store at {path}; build it first")
    return found


def finish_extension(path: Path) -> None:
    """Make the planned shards visible to readers once all of them are written."""
    with explained(path, None), FolderLock(path, "the store at"):
        found = stored_manifest(path)
        if found.planned and not missing_shards(path, found.extended):
            found.extended.write(path)


def _continued(path: Path, found: Manifest, count: int, shard_rows: int | None) -> Manifest:
    """The manifest of an unfinished store of format 1, which lists only the written shards, with all its shards."""
    rows = found.info.get("shard_rows") or shard_rows or (found.rows[0] if found.rows else count)
    whole = dataclasses.replace(found, rows=[*found.rows, *shard_sizes(count - found.total, rows)], growing=False)
    whole.write(path)
    return whole


def fill(
    path: Path,
    source: Source,
    manifest: Manifest,
    *,
    batch_size: int | None,
    first: int = 0,
    rank: int = 0,
    size: int = 1,
    show_progress: bool = False,
) -> list[int]:
    """Embed this process's missing or damaged shards and return their numbers.

    Args:
        first: the shard that starts with the first image of ``source``.
    """
    arrays = stored_arrays(source.regions, source.dtype, len(source.probe))
    offset = manifest.spans[first][0]

    def check(sound: list[int]) -> None:
        _check_images(path, manifest, source, sound, arrays, offset)

    failures: list[OSError] = []

    def compute(spans: list[Span], write: Write) -> None:
        def consume(tensors: dict[str, Tensor], rounding: float) -> None:
            with explained(path, manifest):
                write(tensors, {"error_bound": rounding})

        own = [(start - offset, end - offset) for start, end in spans]
        size = batch_size or manifest.info.get("batch_size", 64)
        try:
            embed_spans(source, own, consume, batch_size=size, show=show_progress)
        except OSError as error:  # raised by the data, or explained already
            failures.append(error)

    with explained(path, manifest):
        done = fill_shards(path, manifest, compute, arrays=arrays, check=check, first=first, rank=rank, size=size)
    if failures:
        raise failures[0]
    return done


def _check_images(
    path: Path, manifest: Manifest, source: Source, sound: Sequence[int], arrays: Mapping[str, Array], offset: int
) -> None:
    """Refuse data that differs from the intact shards in a sample; image 0 is row ``offset`` of the store."""
    assert source.images is not None
    ends = list(itertools.accumulate(manifest.rows[number] for number in sound))
    count = ends[-1] if ends else 0
    sample = sorted({*range(0, count, max(1, -(-count // _SAMPLE))), count - 1}) if count else []
    stored, indices = [], []
    for i in sample:
        k = bisect.bisect_right(ends, i)
        row = i - (ends[k - 1] if k else 0)
        stored.append(int(open_shard(path, manifest, sound[k], arrays).tensors["digest"][row]))
        indices.append(manifest.spans[sound[k]][0] + row - offset)
    check_digests(source.images, stored, indices, f"the store at {path}")


def chosen_batch_size(source: Source) -> int:
    """The batch size with the highest throughput in a short trial on the encoder's device."""
    encoder, regions = source.encoder, source.regions
    device = device_of(encoder)
    image = torch.rand(1, *source.shape, generator=torch.Generator().manual_seed(0)).to(device)

    def run(count: int) -> None:
        many = image.repeat(count, 1, 1, 1)
        if isinstance(regions, DenseRegions):
            regions.encode(encoder, many)
        else:
            encoder.encode_image(many)

    with torch.no_grad(), evaluation_mode(module_of(encoder)):
        return trial_batch_size(run, device)


class _Batch(NamedTuple):
    """The input of one encoder call: drawn prompts, or the images to draw them on."""

    images: Tensor
    which: Tensor
    cells: Tensor
    digests: list[int]
    drawn: bool


#: Receives the rows of one span, ``{"embedding": (rows, h*w, D), "digest": (rows,)}``, and the largest Euclidean
#: rounding error of an embedding.
Consumer = Callable[[dict[str, Tensor], float], None]


def embed_spans(
    source: Source, spans: Sequence[Span], consume: Consumer, *, batch_size: int, show: bool = False
) -> None:
    """Embed the images of each span [start, stop) and pass each finished span to ``consume``.

    One thread loads and draws ahead (an accelerator draws itself), one normalizes and consumes. Each span starts a new
    batch, so its bits depend neither on where a run began nor on other processes.
    """
    stop = Stop()
    batches, results = Channel(2, stop), Channel(8, stop)
    device = device_of(source.encoder)

    def load() -> None:
        try:
            with torch.no_grad():
                for batch in _batches(source, spans, batch_size, draw=device.type == "cpu"):
                    if not batches.put(batch):
                        return
            batches.put(None)
        except BaseException as error:
            batches.put(Failure(error))

    failures: list[BaseException] = []

    def write() -> None:
        try:
            with torch.no_grad():
                _write(results, spans, len(source.regions), source.dtype, consume)
        except BaseException as error:
            failures.append(error)
            stop.is_set = True

    threads = [threading.Thread(target=task, daemon=True, name=task.__name__) for task in (load, write)]
    for thread in threads:
        thread.start()
    try:
        _encode(batches, results, source, device, _bar(spans, show))
    finally:  # also after an error, so that computed rows are written before it propagates
        results.put(None)
        threads[1].join()
        stop.is_set = True
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def _batches(source: Source, spans: Sequence[Span], size: int, *, draw: bool) -> Iterator[_Batch]:
    regions, data = source.regions, source.images
    assert data is not None
    prompt = regions if isinstance(regions, RegionPrompt) else None
    views_each = 1 if prompt is None else len(prompt)
    for start, end in spans:
        reader, first = data.read(range(start, end)), 0
        kept: list[Tensor] = []  # images first, first + 1, ... of the span
        for v0 in range(0, (end - start) * views_each, size):
            views = torch.arange(v0, min(v0 + size, (end - start) * views_each))
            rows, cells = views // views_each, views % views_each
            kept, first = kept[int(rows[0]) - first :], int(rows[0])
            digests = []
            while first + len(kept) <= int(rows[-1]):
                kept.append(next(reader))
                digests.append(digest(kept[-1]))
            images, which = torch.stack(kept[: int(rows[-1]) - first + 1]), rows - first
            if prompt is not None and draw:
                images = prompt.draw_cells(images, which, cells)
            yield _Batch(images, which, cells, digests, draw)
        for _ in reader:  # exhausting the loader ends its worker processes
            pass


@torch.no_grad()
def _encode(
    batches: Channel,
    results: Channel,
    source: Source,
    device: torch.device,
    progress: Any,
) -> None:
    waiting: tuple[Tensor, list[int]] | None = None
    halving = Halving("batch_size")
    encoder, regions = source.encoder, source.regions
    with evaluation_mode(module_of(encoder)), progress as bar:
        try:
            while (batch := batches.get()) is not None:
                if isinstance(batch, Failure):
                    raise batch.error
                images = batch.images if device.type == "cpu" else batch.images.to(device, non_blocking=True)

                def embed(views: Tensor, batch: _Batch = batch, images: Tensor = images) -> Tensor:
                    if not isinstance(regions, RegionPrompt):
                        shown = images if len(views) == len(images) else images[views.to(images.device)]
                        return regions.encode(encoder, shown).detach().float().flatten(0, 1)
                    if batch.drawn:
                        drawn = images if len(views) == len(images) else images[views]
                    else:
                        drawn = regions.draw_cells(images, batch.which[views], batch.cells[views])
                    return check_embedding(encoder.encode_image(drawn), len(views))

                every = torch.arange(len(batch.cells))
                embedding = torch.cat(halving(embed, every, lambda views: views.chunk(2)))
                if waiting is not None:  # one batch late, so that an accelerator stays busy while a result is read
                    results.put((waiting[0].cpu(), waiting[1]))
                waiting = embedding, batch.digests
                if bar is not None:
                    bar.update(len(batch.digests))
        finally:
            if waiting is not None:
                results.put((waiting[0].cpu(), waiting[1]))


def check_embedding(embedding: Any, count: int) -> Tensor:
    """``(count, D)`` in float32; raises an error that reports what the encoder returned instead."""
    if not isinstance(embedding, Tensor) or embedding.ndim != 2 or len(embedding) != count:
        found = tuple(embedding.shape) if isinstance(embedding, Tensor) else type(embedding).__name__
        raise InputError(f"encoder.encode_image must return ({count}, D) for {count} images, got {found}")
    return embedding.detach().float()


def _write(
    results: Channel,
    spans: Sequence[Span],
    cells: int,
    dtype: torch.dtype,
    consume: Consumer,
) -> None:
    for start, end in spans:
        wanted, rounding = (end - start) * cells, 0.0
        parts: list[Tensor] = []
        digests: list[int] = []
        done = 0
        while done < wanted:
            found = results.get()
            if found is None:
                return
            raw, new = found
            finite = raw.isfinite().all(1)
            if not finite.all():
                bad = done + int((~finite).nonzero()[0])
                raise InputError(
                    f"the encoder returns NaN or infinite values for image {start + bad // cells}, cell {bad % cells}"
                )
            unit = F.normalize(raw, dim=1)
            parts.append(unit.to(dtype))
            rounding = max(rounding, float((parts[-1].float() - unit).norm(dim=1).max()))
            digests += new
            done += len(raw)
        consume(
            {"embedding": torch.cat(parts).unflatten(0, (end - start, cells)), "digest": torch.tensor(digests)},
            rounding,
        )


def module_of(encoder: Any) -> nn.Module | None:
    """The network of an encoder: the encoder itself, or the module that its ``encode_image`` belongs to or contains."""
    found = find_model(encoder) or find_model(encoder.encode_image)
    if found is None and hasattr(encoder, "__dict__"):
        found = next((value for value in vars(encoder).values() if isinstance(value, nn.Module)), None)
    return found


def device_of(encoder: Any) -> torch.device:
    """The device of the encoder's input: its ``device``, or that of its weights, otherwise the CPU."""
    given = getattr(encoder, "device", None)
    if isinstance(given, (str, torch.device)):
        return torch.device(given)
    module = module_of(encoder)
    tensors = [] if module is None else [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


@contextmanager
def explained(path: Path, manifest: Manifest | int | None) -> Iterator[None]:
    """Add to an ``OSError`` how many images are safe and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, FileNotFoundError):
            raise
        try:
            found = manifest if isinstance(manifest, Manifest) else read_manifest(path)
        except (ArtifactError, OSError):
            found = None
        rows = 0 if found is None else found.total - sum(found.rows[n] for n in missing_shards(path, found))
        total = manifest if isinstance(manifest, int) else None if found is None else found.total
        raise OSError(
            error.errno,
            f"{error.strerror}: the store at {path} cannot be written. "
            f"{rows}{'' if total is None else f' of {total}'} images are stored; free disk space or grant write "
            "permission, then repeat the same call to resume",
            error.filename,
        ) from error


def _bar(spans: Sequence[Span], show: bool) -> Any:
    if not show:
        return nullcontext()
    from tqdm.auto import tqdm

    return tqdm(total=sum(end - start for start, end in spans), desc="region embeddings", unit="image")


def check_options(batch_size: int | None, shard_rows: int | None, rank: int = 0, size: int = 1) -> None:
    """Refuse invalid settings before any work."""
    if batch_size is not None:
        checked_integer("batch_size", batch_size)
    if shard_rows is not None:
        checked_integer("shard_rows", shard_rows)
    checked_integer("num_replicas", size)
    checked_integer("rank", rank, 0, size - 1)
