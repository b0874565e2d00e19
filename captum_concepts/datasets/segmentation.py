"""Base class and shared options of the readers for images with concept masks."""

from __future__ import annotations

import copy
import operator
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from captum_concepts._checks import one_of, unique_names
from captum_concepts.datasets.annotation import OUTSIDE, Annotation, Ids, load_pair
from captum_concepts.datasets.segmented_image import SegmentedImage
from captum_concepts.errors import InputError, did_you_mean
from captum_concepts.images import Reading

REGIONS = ("present", "all", "label")


class SegmentationDataset(Dataset[SegmentedImage], ABC):
    """Base class of the readers in :mod:`captum_concepts.datasets.folders`, with images and a mask per concept.

    Only the index is read at construction; images and masks are read on access, in the worker that accesses them. An
    image is resized with ``interpolation``, and its labels by nearest neighbor with the same geometry. An EXIF rotation
    applies to both, unless the mask has the size of the rotated image. If the size is ambiguous (a square image, or one
    rotated by 180 degrees), the mask is assumed to match the pixels as stored, with a warning.

    Args:
        names: concept name by pixel id. The id is appended to a name that occurs twice.
        concepts: names to keep, in this order; None keeps all. The rest counts as background.
        size, resize, interpolation, crop: see :class:`captum_concepts.images.Reading`; padding pixels are ignored.
        min_area: minimum fraction of the returned image's pixels, in [0, 1), that a concept must cover to be present.
        regions: ``"present"``: one mask per present concept, with its index as ``target``; ``"all"``: one mask per
            concept of the data set, empty if absent; ``"label"``: the mask of the image's class.

    Attributes:
        concepts: the T concept names, indexed by targets.

    Raises:
        InputError: a value out of range or an unknown concept; on access, a missing, broken or mismatched file.
    """

    void: frozenset[int] = frozenset()  #: ids of pixels to ignore
    background: frozenset[int] = frozenset({0})  #: ids of pixels without a concept

    def __init__(
        self,
        names: Mapping[int, str],
        *,
        concepts: Sequence[str] | None = None,
        size: int | Sequence[int] | None = None,
        resize: str = "crop",
        interpolation: str = "bicubic",
        crop: float = 1.0,
        min_area: float = 0.0,
        regions: str = "present",
    ) -> None:
        twice = {name for name, count in Counter(names.values()).items() if count > 1}
        by_name = {f"{name} ({i})" if name in twice else name: i for i, name in names.items()}
        self.concepts = list(by_name) if concepts is None else unique_names(concepts, "concept")
        for name in self.concepts:
            if name not in by_name:
                raise InputError(f"unknown concept {name!r} among {len(by_name)}.{did_you_mean(name, by_name)}")
        self.reading = Reading(size, resize=resize, interpolation=interpolation, crop=crop)
        if not isinstance(min_area, (int, float)) or not 0 <= min_area < 1:
            raise InputError(f"min_area={min_area!r} must be a fraction of the image in [0, 1)")
        self.min_area = float(min_area)
        self.regions = one_of("regions", regions, REGIONS)
        self._known = frozenset(names)
        self._row = {by_name[name]: row for row, name in enumerate(self.concepts)}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _annotation(self, index: int) -> Annotation:
        """Location of image ``index``, and its layers of ids."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} images, {len(self.concepts)} concepts)"

    def __iter__(self) -> Iterator[SegmentedImage]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> SegmentedImage:
        i = operator.index(index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        annotation = self._annotation(i % len(self))
        image, layers = load_pair(annotation, self.reading)
        found, void = self._regions_of(annotation, layers, tuple(image.shape[-2:]))
        least = max(1.0, self.min_area * void.size)
        rows = [row for row in sorted(found) if found[row].sum() >= least]
        empty = np.zeros_like(void)
        target: Tensor | int | None = None
        if self.regions == "present":
            masks = np.stack([found[row] for row in rows]) if rows else empty[None][:0]
            target = torch.tensor(rows, dtype=torch.long)
        elif self.regions == "all":
            rows, present = list(range(len(self.concepts))), set(rows)
            masks = np.stack([found[row] if row in present else empty for row in rows])
        else:
            row = self._label_row(annotation)
            masks, rows = found[row] if row in rows else empty, [row]
            target = annotation.label
        return SegmentedImage(
            image=image,
            masks=torch.from_numpy(masks),
            concepts=tuple(self.concepts[row] for row in rows),
            ignore=torch.from_numpy(void),
            target=target,
            label=annotation.label,
            name=annotation.name,
        )

    def pairs(self) -> ConceptRegions:
        """The data set as :class:`ConceptRegions`, one example per image and present concept."""
        return ConceptRegions(self)

    def _regions_of(
        self, annotation: Annotation, layers: list[Ids], shape: tuple[int, ...]
    ) -> tuple[dict[int, Any], Any]:
        found: dict[int, Any] = {}
        void = np.zeros(shape, dtype=bool)
        for layer, ids in zip(annotation.layers, layers, strict=True):
            values = _values(ids)
            unknown = [v for v in values if v not in self._known | self.void | self.background | {OUTSIDE}]
            if unknown:
                raise InputError(f"{layer.source} contains the label ids {unknown[:8]}, which the index does not list")
            for value in values:
                if value in self.void or value == OUTSIDE:
                    void |= ids == value
                elif value in self._row:
                    row = self._row[value]
                    found[row] = found[row] | (ids == value) if row in found else ids == value
        return found, void

    def _label_row(self, annotation: Annotation) -> int:
        if annotation.label_id is None:
            raise InputError(f'regions="label" needs a class for each image, but {type(self).__name__} has none')
        if annotation.label_id not in self._row:
            raise InputError(
                f"the class of {annotation.name} is not among the concepts; regions='label' needs them all"
            )
        return self._row[annotation.label_id]


class ConceptRegions(IterableDataset[dict[str, Any]]):
    """One example per image and present concept, a dict of ``inputs``, ``masks``, ``ignore`` and ``concepts``.

    The shapes are ``(3, H, W)``, ``(H, W)`` and ``(H, W)``; ``concepts`` is the concept's name.
    ``metrics.evaluate(method, data.pairs(), ...)`` calls ``method.concept_maps(inputs, [name])`` for every region.
    With ``size=``, a ``DataLoader`` batches it without a collate function and splits the images among its workers.
    """

    def __init__(self, data: SegmentationDataset) -> None:
        self.data = copy.copy(data)
        self.data.regions = "present"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        start, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for i in range(start, len(self.data), step):
            item = self.data[i]
            for mask, name in zip(item.masks, item.concepts, strict=True):
                yield {"inputs": item.image, "masks": mask, "ignore": item.ignore, "concepts": name}


def _values(ids: Ids) -> list[int]:
    """Unique ids in ascending order; for small ids, counting is many times faster than sorting."""
    if ids.size and ids.min() >= 0 and ids.max() < 1 << 17:
        return [int(v) for v in np.flatnonzero(np.bincount(ids.ravel()))]
    return [int(v) for v in np.unique(ids)]
