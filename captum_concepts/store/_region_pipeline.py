"""From images to unit embeddings of their regions: loading, drawing and writing run beside the encoder."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_concepts._memory import Halving
from captum_concepts.activations import evaluation_mode, find_model
from captum_concepts.errors import InputError
from captum_concepts.store._region_data import Pictures, digest
from captum_concepts.vlm import RegionPrompt

#: Takes the rows of one span, in order: ``{"embedding": (rows, h*w, D), "digest": (rows,)}`` and the largest rounding
#: error of an embedding (Euclidean).
Consumer = Callable[[dict[str, Tensor], float], None]


class _Batch(NamedTuple):
    """What one call of the encoder sees: pictures that are drawn already, or what to draw them from."""

    images: Tensor
    which: Tensor
    cells: Tensor
    digests: list[int]
    drawn: bool


class _Failure(NamedTuple):
    error: BaseException


def embed_spans(
    pictures: Pictures,
    spans: Sequence[tuple[int, int]],
    encoder: Any,
    prompt: RegionPrompt,
    consume: Consumer,
    *,
    batch_size: int,
    dtype: torch.dtype,
    show_progress: bool = False,
) -> None:
    """Embed the images of each span [start, stop) and hand every span over as a whole.

    One thread loads and draws ahead (on an accelerator the drawing is done there), one normalises and consumes. Batches
    of ``batch_size`` marked pictures begin anew with each span, so the result of a span depends neither on where a run
    began nor on who else works: the same calls give the same bits.
    """
    if not spans:
        return
    stop = threading.Event()
    batches: queue.Queue[Any] = queue.Queue(maxsize=2)
    results: queue.Queue[Any] = queue.Queue(maxsize=8)
    device = device_of(encoder)

    def load() -> None:
        try:
            with torch.no_grad():
                for batch in _batches(pictures, spans, prompt, batch_size, draw=device.type == "cpu"):
                    if not _put(batches, batch, stop):
                        return
            _put(batches, None, stop)
        except BaseException as error:
            _put(batches, _Failure(error), stop)

    failures: list[BaseException] = []

    def write() -> None:
        try:
            with torch.no_grad():
                _write(results, spans, len(prompt), dtype, consume, stop)
        except BaseException as error:
            failures.append(error)
            stop.set()

    threads = [threading.Thread(target=task, daemon=True, name=task.__name__) for task in (load, write)]
    for thread in threads:
        thread.start()
    try:
        _encode(batches, results, encoder, prompt, device, stop, _bar(spans, show_progress))
    finally:  # also after an error: what is computed is written before it goes on
        _put(results, None, stop)
        threads[1].join()
        stop.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def _batches(
    pictures: Pictures, spans: Sequence[tuple[int, int]], prompt: RegionPrompt, size: int, *, draw: bool
) -> Iterator[_Batch]:
    places = len(prompt)
    for start, end in spans:
        reader, first = pictures.read(range(start, end)), 0
        kept: list[Tensor] = []  # images first, first + 1, ... of the span
        for v0 in range(0, (end - start) * places, size):
            views = torch.arange(v0, min(v0 + size, (end - start) * places))
            rows, cells = views // places, views % places
            kept, first = kept[int(rows[0]) - first :], int(rows[0])
            digests = []
            while first + len(kept) <= int(rows[-1]):
                kept.append(next(reader))
                digests.append(digest(kept[-1]))
            images, which = torch.stack(kept[: int(rows[-1]) - first + 1]), rows - first
            yield _Batch(prompt.draw_cells(images, which, cells) if draw else images, which, cells, digests, draw)
        for _ in reader:  # an exhausted loader ends its worker processes
            pass


@torch.no_grad()
def _encode(
    batches: queue.Queue[Any],
    results: queue.Queue[Any],
    encoder: Any,
    prompt: RegionPrompt,
    device: torch.device,
    stop: threading.Event,
    progress: Any,
) -> None:
    waiting: tuple[Tensor, list[int]] | None = None
    halving = Halving("batch_size")
    with evaluation_mode(module_of(encoder)), progress:
        try:
            while (batch := _get(batches, stop)) is not None:
                if isinstance(batch, _Failure):
                    raise batch.error
                images = batch.images if device.type == "cpu" else batch.images.to(device, non_blocking=True)

                def embed(views: Tensor, batch: _Batch = batch, images: Tensor = images) -> Tensor:
                    if batch.drawn:
                        drawn = images if len(views) == len(images) else images[views]
                    else:
                        drawn = prompt.draw_cells(images, batch.which[views], batch.cells[views])
                    return check_embedding(encoder.encode_image(drawn), len(views))

                every = torch.arange(len(batch.cells))
                embedding = torch.cat(halving(embed, every, lambda views: views.chunk(2)))
                if waiting is not None:  # one batch late: an accelerator gets work before its last result is awaited
                    _put(results, (waiting[0].cpu(), waiting[1]), stop)
                waiting = embedding, batch.digests
                progress.update(len(batch.digests))
        finally:
            if waiting is not None:
                _put(results, (waiting[0].cpu(), waiting[1]), stop)


def check_embedding(embedding: Any, count: int) -> Tensor:
    """``(count, D)`` in float32, or an error that says what the encoder gave."""
    if not isinstance(embedding, Tensor) or embedding.ndim != 2 or len(embedding) != count:
        found = tuple(embedding.shape) if isinstance(embedding, Tensor) else type(embedding).__name__
        raise InputError(f"encoder.encode_image must give ({count}, D) for {count} images, got {found}")
    return embedding.detach().float()


def _write(
    results: queue.Queue[Any],
    spans: Sequence[tuple[int, int]],
    places: int,
    dtype: torch.dtype,
    consume: Consumer,
    stop: threading.Event,
) -> None:
    for start, end in spans:
        wanted, rounding = (end - start) * places, 0.0
        parts: list[Tensor] = []
        digests: list[int] = []
        done = 0
        while done < wanted:
            found = _get(results, stop)
            if found is None:
                return
            raw, new = found
            finite = raw.isfinite().all(1)
            if not finite.all():
                bad = done + int((~finite).nonzero()[0])
                raise InputError(
                    f"the encoder gives NaN or infinite values for image {start + bad // places}, place {bad % places}"
                )
            unit = F.normalize(raw, dim=1)
            parts.append(unit.to(dtype))
            rounding = max(rounding, float((parts[-1].float() - unit).norm(dim=1).max()))
            digests += new
            done += len(raw)
        consume(
            {"embedding": torch.cat(parts).unflatten(0, (end - start, places)), "digest": torch.tensor(digests)},
            rounding,
        )


def module_of(encoder: Any) -> nn.Module | None:
    """The network behind an encoder: itself, or what its ``encode_image`` belongs to or holds."""
    found = find_model(encoder) or find_model(encoder.encode_image)
    if found is None and hasattr(encoder, "__dict__"):
        found = next((value for value in vars(encoder).values() if isinstance(value, nn.Module)), None)
    return found


def device_of(encoder: Any) -> torch.device:
    """Where the encoder takes its images: its ``device``, or that of its weights; else the CPU."""
    given = getattr(encoder, "device", None)
    if isinstance(given, (str, torch.device)):
        return torch.device(given)
    module = module_of(encoder)
    tensors = [] if module is None else [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _put(target: queue.Queue[Any], item: Any, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            target.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False


def _get(source: queue.Queue[Any], stop: threading.Event) -> Any:
    while not stop.is_set():
        try:
            return source.get(timeout=0.1)
        except queue.Empty:
            continue
    return None


class _Silent:
    def update(self, count: int) -> None:
        """Count nothing."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def _bar(spans: Sequence[tuple[int, int]], show: bool) -> Any:
    if not show:
        return _Silent()
    from tqdm.auto import tqdm

    return tqdm(total=sum(end - start for start, end in spans), desc="region embeddings", unit="image")
