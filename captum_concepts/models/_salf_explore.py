"""Looking around with a SALFCBM: video, the images that show a concept most, segmentation by class prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from captum_concepts._captum import target_indices
from captum_concepts.concepts import CLASS_TEMPLATE
from captum_concepts.errors import InputError
from captum_concepts.explanation import ConceptExplanation
from captum_concepts.models._salf_edits import count
from captum_concepts.models._salf_explain import SALFExplanations
from captum_concepts.models._salf_names import concept_position, concept_positions

Data = Tensor | DataLoader[Any] | Sequence[Any] | Iterable[Any]


class Segmentation(NamedTuple):
    """What :meth:`SALFExploration.zero_shot_segmentation` returns.

    Args:
        heatmaps: ``(N, H, W)`` in [0, 1].
        masks: ``(N, H, W)`` bool, the foreground.
        concepts: for each image, the concept whose map it is.
    """

    heatmaps: Tensor
    masks: Tensor
    concepts: list[str]


class SALFExploration(SALFExplanations):
    """Queries over many frames, images or classes."""

    def explain_video(
        self,
        frames: Iterable[Tensor],
        target: Any = None,
        top_k: int | None = 5,
        *,
        concepts: str | int | Sequence[str | int] | None = None,
        batch_size: int = 1,
    ) -> Iterator[ConceptExplanation]:
        """One explanation a frame, as frames come: a generator that holds ``batch_size`` frames at a time.

        Args:
            frames: images ``(C, H, W)`` or batches of one, from any iterable: a tensor ``(T, C, H, W)``, a decoder.
            target: class of the contributions; None takes the predicted one of each frame.
            top_k: as in :meth:`explain`, for each frame of its own.
            concepts: follow these through the video instead; columns then mean the same in every frame.
            batch_size: frames a forward pass. Frames of another size begin a new one.

        Raises:
            InputError: at once for an unknown concept or bad number; while it runs for a frame that is no image.
        """
        size = count(batch_size)
        if concepts is not None:
            concept_positions(concepts, self.concepts)
        if top_k is not None:
            count(top_k)
        target_indices(0 if target is None else target, 1, self.num_classes, self.class_names or (), what="class")
        return self._video(frames, target, top_k, concepts, size)

    def _video(
        self, frames: Iterable[Tensor], target: Any, top_k: int | None, concepts: Any, batch_size: int
    ) -> Iterator[ConceptExplanation]:
        singles = (
            frame[0] if isinstance(frame, Tensor) and frame.ndim == 4 and len(frame) == 1 else frame for frame in frames
        )
        for batch in _batched(singles, batch_size):
            whole = self.explain(batch.to(self.concept_mean.device), target, None, concepts=concepts)
            for one in whole:
                yield one if concepts is not None or top_k is None else one.top(top_k, by="contributions")

    def most_activating(
        self,
        data: Data,
        concepts: str | int | Sequence[str | int] | None = None,
        k: int = 5,
        *,
        batch_size: int = 32,
        show_progress: bool = False,
    ) -> dict[str, list[tuple[int, float]]]:
        """The images with the highest activation c* of each concept: what its name really stands for in this model.

        Args:
            data: images: a tensor, a data set or loader, or any iterable; items or batches may be images or tuples and
                dicts that begin with or hold one. A shuffling loader is read in its data set's order.
            concepts: names or indices; None for all.
            k: how many images a concept.
            batch_size: images a forward pass (a loader brings its own). Memory does not grow with the data.
            show_progress: a bar.

        Returns:
            ``{concept: [(index in data, activation), ...]}``, strongest first; the earlier image first among equals.
            Images whose activation is NaN are left out.

        Raises:
            InputError: no image, or an unknown concept.
        """
        columns = list(range(len(self.concepts))) if concepts is None else concept_positions(concepts, self.concepts)
        count(k)
        best = torch.empty(0, len(columns))
        where = torch.empty(0, len(columns), dtype=torch.long)
        seen = 0
        for images in _progress(_image_batches(data, count(batch_size)), show_progress):
            _, activations, _ = self._look(images.to(self.concept_mean.device))
            values = (
                activations[:, columns].float().cpu().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            )
            rows = torch.arange(seen, seen + len(values))[:, None].expand_as(values)
            best, where = torch.cat([best, values]), torch.cat([where, rows])
            order = torch.argsort(best, dim=0, descending=True, stable=True)[:k]
            best, where = best.gather(0, order), where.gather(0, order)
            seen += len(values)
        if not seen:
            raise InputError("data holds no image")
        return {
            self.concepts[column]: [
                (int(i), float(v)) for i, v in zip(where[:, j], best[:, j], strict=True) if v != -torch.inf
            ]
            for j, column in enumerate(columns)
        }

    def zero_shot_segmentation(
        self,
        x: Tensor,
        target: Any = None,
        *,
        template: str = CLASS_TEMPLATE,
        threshold: float | str = "mean",
        size: tuple[int, int] | None = None,
    ) -> Segmentation:
        """Foreground by the map of a class prompt: the paper's protocol on ImageNet-segmentation.

        The model's concepts must hold a prompt for each class ("An image of a {class}",
        :meth:`Vocabulary.from_classes <captum_concepts.concepts.Vocabulary.from_classes>`). Its map is enlarged
        bilinearly, scaled to [0, 1] by its own minimum and maximum, and binarised.

        Args:
            x: images.
            target: the class, or one for each image, by name or index; a concept's own name is taken as it is. None
                takes the predicted classes.
            template: how a class name becomes a concept.
            threshold: ``"mean"`` (the protocol): above the heatmap's own mean; or a number in [0, 1].
            size: ``(H, W)`` of the result; None takes the images'.

        Raises:
            InputError: no such concept (the nearest are offered), ``class_names`` missing, or a bad threshold.
            TargetError: a bad target.
        """
        if threshold != "mean" and (isinstance(threshold, (str, bool)) or not 0 <= threshold <= 1):
            raise InputError(f"threshold must be 'mean' or a number in [0, 1], got {threshold!r}")
        if "{class}" not in template:
            raise InputError(f"template needs a place {{class}}, got {template!r}")
        features, _, logits = self._look(x)
        columns = self._prompts(target, logits, template)
        used = sorted(set(columns))
        maps = self._maps_of(features, used)
        own = torch.tensor([used.index(column) for column in columns], device=maps.device)
        maps = maps[torch.arange(len(maps), device=maps.device), own][:, None]
        large = F.interpolate(maps, size or tuple(x.shape[-2:]), mode="bilinear", align_corners=False)[:, 0]
        low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
        heat = (large - low) / torch.where(high > low, high - low, torch.ones_like(high))
        limit = heat.mean((1, 2), keepdim=True) if threshold == "mean" else torch.full_like(low, float(threshold))
        return Segmentation(heat, heat > limit, [self.concepts[column] for column in columns])

    def _prompts(self, target: Any, logits: Tensor, template: str) -> list[int]:
        """The column of each image's class prompt."""
        n = len(logits)
        wanted = target if isinstance(target, (list, tuple)) and not (len(target) == 1 and n > 1) else [target] * n
        if isinstance(target, str) and target in self.concepts:
            return [self.concepts.index(target)] * n
        if isinstance(target, list) and len(target) == n and all(t in self.concepts for t in wanted):
            return [self.concepts.index(t) for t in wanted]
        classes = self._target(target, logits).tolist()
        if self.class_names is None:
            if len(self.concepts) == self.num_classes:  # one prompt a class, in their order
                return classes
            raise InputError("the model has no class_names to fill the template with; set them, or name concepts")
        return [concept_position(template.replace("{class}", self.class_names[c]), self.concepts) for c in classes]


def _image_batches(data: Any, batch_size: int) -> Iterator[Tensor]:
    """Images in the order of the data, as batches of one size."""
    if isinstance(data, Tensor):
        if data.ndim != 4:
            raise InputError(f"data must be images (n, C, H, W), got {tuple(data.shape)}")
        yield from data.split(batch_size)
        return
    if isinstance(data, (str, bytes, dict)) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise InputError(f"data must be images, a data set or a loader, got {type(data).__name__}")
    if (
        isinstance(data, DataLoader)
        and not isinstance(data.sampler, SequentialSampler)
        and hasattr(data.dataset, "__len__")
    ):
        data = DataLoader(
            data.dataset,
            batch_size=data.batch_size or batch_size,
            collate_fn=data.collate_fn,
            num_workers=data.num_workers,
        )
    items = iter(data) if hasattr(data, "__iter__") else (data[i] for i in range(len(data)))
    yield from _batched(items, batch_size)


def _batched(items: Iterable[Any], batch_size: int) -> Iterator[Tensor]:
    """Images of one size put together; batches as they are."""
    waiting: list[Tensor] = []
    for number, item in enumerate(items):
        image = _image(item, number)
        if waiting and (image.ndim == 4 or image.shape != waiting[0].shape):
            yield torch.stack(waiting)
            waiting = []
        if image.ndim == 4:
            yield from image.split(batch_size) if len(image) > batch_size else [image] * bool(len(image))
            continue
        waiting.append(image)
        if len(waiting) == batch_size:
            yield torch.stack(waiting)
            waiting = []
    if waiting:
        yield torch.stack(waiting)


def _image(item: Any, number: int) -> Tensor:
    if isinstance(item, dict):
        item = next((item[key] for key in ("image", "images", "pixel_values") if key in item), None)
    if isinstance(item, (tuple, list)) and item:
        item = item[0]
    if not isinstance(item, Tensor) or item.ndim not in (3, 4):
        found = tuple(item.shape) if isinstance(item, Tensor) else type(item).__name__
        raise InputError(f"item {number} begins with {found}, not with an image tensor (C, H, W) or a batch of them")
    return item


def _progress(batches: Iterator[Tensor], show: bool) -> Iterator[Tensor]:
    if not show:
        return batches
    from tqdm.auto import tqdm

    return iter(tqdm(batches, desc="most activating images", unit="batch"))
