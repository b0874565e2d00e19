"""An estimate of the disk space, time and processes of a fit, without writing anything."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from captum_concepts._checks import number
from captum_concepts.activations import evaluation_mode
from captum_concepts.models.salf_cbm.fit.features import features_bytes, fits, free_bytes
from captum_concepts.models.salf_cbm.fit.filters import WHOLE
from captum_concepts.models.salf_cbm.fit.objective import batch_similarity
from captum_concepts.models.salf_cbm.fit.pipeline import FitRun, bound_arguments, prepare
from captum_concepts.store import RegionEmbeddingStore, device_of, module_of
from captum_concepts.vlm import RegionPrompt

#: Approximate passes over the activations for a path of sparse heads.
_HEAD_PASSES = 150
_TRIAL_IMAGES = 8


@dataclass(frozen=True)
class FitPlan:
    """The estimated disk space, time and processes of a fit.

    Attributes:
        images: number of images per data set.
        cells, concepts, classes, embedding_dim, feature_dim: sizes.
        bytes: disk space per folder.
        free_bytes: on the disk of ``store_path``.
        cached: whether the backbone's features would be cached.
        seconds: per step, for one process; for the bottleneck an upper limit, with all its epochs.
        within_hours: see :attr:`processes`.
    """

    images: dict[str, int]
    cells: int
    concepts: int
    classes: int
    embedding_dim: int
    feature_dim: int
    bytes: dict[str, int]
    free_bytes: int
    cached: bool
    seconds: dict[str, float] = field(default_factory=dict)
    within_hours: float = 24.0

    @property
    def total_seconds(self) -> float:
        """The seconds of all steps, for one process."""
        return sum(self.seconds.values())

    @property
    def processes(self) -> int:
        """The number of machines (or accelerators) like this one that finish within :attr:`within_hours`."""
        return max(1, math.ceil(self.total_seconds / 3600 / self.within_hours))

    def as_dict(self) -> dict[str, Any]:
        """The plan as a JSON-serializable dictionary."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return found | {"total_seconds": self.total_seconds, "processes": self.processes}

    def __str__(self) -> str:
        total = sum(self.bytes.values())
        sets = ", ".join(f"{count:,} images of {name}" for name, count in self.images.items())
        lines = [
            f"{sets}; {self.cells} cells, {self.concepts} concepts, {self.classes} classes; embeddings of "
            f"{self.embedding_dim}, features of {self.feature_dim} channels",
            "disk:",
            *(f"  {name:<28}{_bytes(size):>12}" for name, size in self.bytes.items()),
            f"  {'total':<28}{_bytes(total):>12}   ({_bytes(self.free_bytes)} free)",
            "time of one process, measured in a short trial on this machine:",
            *(f"  {name:<28}{_duration(seconds):>12}" for name, seconds in self.seconds.items()),
            f"  {'total':<28}{_duration(self.total_seconds):>12}",
            f"machines like this one needed to finish in {self.within_hours:g} hours: {self.processes} (torchrun; "
            f"{', '.join(f'{n}: {_duration(self.total_seconds / n)}' for n in (2, 8, 64))})",
        ]
        if not self.cached:
            lines.append("features are computed on the fly, once per epoch, because a cache would not fit")
        if total > self.free_bytes:
            lines.append("NOT ENOUGH DISK SPACE at store_path")
        return "\n".join(lines)


def plan_salf_cbm(*arguments: Any, within_hours: float = 24.0, **options: Any) -> FitPlan:
    """The disk space, time and processes that :func:`fit_salf_cbm` needs with the same arguments; writes nothing.

    The estimate extrapolates from a few images through the encoder and backbone and a few bottleneck steps on random
    numbers. Times are for this machine under its current load, without slow disks or communication between processes.

    Args:
        arguments, options: as for :func:`fit_salf_cbm`.
        within_hours: time limit that determines the number of processes.

    Returns:
        A :class:`FitPlan`, to ``print`` or convert with ``as_dict()``.

    Raises:
        InputError: ``within_hours`` is not positive, or ``fit_salf_cbm``, the encoder or the backbone refuse the input.
    """
    number("within_hours", within_hours, lambda hours: hours > 0, "a positive number")
    run = prepare(bound_arguments(arguments, options))
    o, live = run.options, run.splits[0].live
    images = {split.name: len(split.images) for split in run.splits}
    total, cells, m = sum(images.values()), len(o.prompt), len(run.vocabulary)
    each, whole, embedding_dim = _time_encoder(run)
    size = {"region embeddings": sum(
        RegionEmbeddingStore.expected_bytes(count, o.prompt, embedding_dim) for count in images.values()
    )}  # fmt: skip
    if o.presence_cutoff is not None:
        size["image embeddings"] = RegionEmbeddingStore.expected_bytes(images["train"], WHOLE, embedding_dim)
    cache = features_bytes(total, cells, live.dim, o.feature_dtype)
    cached = not o.train_backbone and (
        o.cache_features is True or (o.cache_features == "auto" and fits(run.path, cache, o.max_cache_bytes))
    )
    if cached:
        size["backbone features"] = cache
    size["concept activations"] = total * m * 4
    size["bottleneck and head"] = 4 * m * (live.dim * 5 + run.num_classes)
    count = min(_TRIAL_IMAGES, images["train"])
    with torch.no_grad(), evaluation_mode(run.model):
        forward = _timed(lambda: live.rows(range(count)), run.device) / count
    epoch = _time_step(run, embedding_dim) * total
    products = _time_product(run) * total * _HEAD_PASSES
    passes = 1 if cached else o.bottleneck.max_epochs + 3
    seconds = {
        **({} if o.presence_cutoff is None else {"presence of concepts": whole * images["train"]}),
        "region embeddings": each * total,
        "backbone features": forward * total * passes,
        f"bottleneck, {o.bottleneck.max_epochs} epochs": epoch * o.bottleneck.max_epochs,
        "head": products,
    }
    return FitPlan(
        images, cells, m, run.num_classes, embedding_dim, live.dim, size, free_bytes(run.path), cached, seconds,
        within_hours,
    )  # fmt: skip


def _time_encoder(run: FitRun) -> tuple[float, float, int]:
    """Seconds for all regions of an image, seconds for the plain image, and the embedding dimension."""
    prompt, encoder, device = run.options.prompt, run.encoder, device_of(run.encoder)
    image = run.splits[0].images.shown[0][None].to(device)
    with torch.no_grad(), evaluation_mode(module_of(encoder)):
        width = encoder.encode_image(image).shape[1]
        several = image.expand(_TRIAL_IMAGES, -1, -1, -1)
        if not isinstance(prompt, RegionPrompt):
            dense = _timed(lambda: prompt.encode(encoder, several), device) / _TRIAL_IMAGES
            return dense, _timed(lambda: encoder.encode_image(several), device) / _TRIAL_IMAGES, width
        batch = min(run.options.prompt_batch_size or 64, 4 * len(prompt))
        cells = torch.arange(batch, device=device) % len(prompt)
        views = prompt.draw_cells(image, torch.zeros_like(cells), cells)
        one = _timed(lambda: encoder.encode_image(views), device) / batch
    return one * len(prompt), one, width


def _time_step(run: FitRun, embedding_dim: int) -> float:
    """Seconds per image of a bottleneck step, from a few cells of random numbers."""
    cells, live = len(run.options.prompt), run.splits[0].live
    total = min(run.options.bottleneck.batch_size, len(run.splits[0].images))
    few = min(cells, 4)
    generator = torch.Generator().manual_seed(0)
    features, embeddings = (
        torch.randn(total, few, width, generator=generator, dtype=torch.float32).to(run.device)
        for width in (live.dim, embedding_dim)
    )
    weight, text = (
        torch.randn(len(run.text), width, generator=generator, dtype=torch.float32).to(run.device)
        for width in (live.dim, embedding_dim)
    )
    with torch.no_grad():
        found = _timed(lambda: batch_similarity(features, embeddings, weight, text, total), run.device)
    return found / total * cells / few


def _time_product(run: FitRun) -> float:
    """Seconds per image of the two matrix products in a pass of the head."""
    x = torch.rand(2048, len(run.text), device=run.device, dtype=torch.float32)
    weight = torch.rand(run.num_classes, len(run.text), device=run.device, dtype=torch.float32)
    return _timed(lambda: (x @ weight.T).T @ x, run.device) / len(x)


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the faster of two runs after a warm-up run."""
    work()
    found = []
    for _ in range(2):
        _synchronize(device)
        start = time.perf_counter()
        work()
        _synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def _duration(seconds: float) -> str:
    for limit, unit, factor in ((100, "s", 1), (6000, "min", 60), (100 * 3600, "h", 3600)):
        if seconds < limit:
            return f"{seconds / factor:.3g} {unit}"
    days = seconds / 86400
    return f"{days:.3g} days" if days < 100 else f"{days:,.0f} days"
