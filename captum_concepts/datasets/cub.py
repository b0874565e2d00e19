"""`CUB`: birds with part keypoints, and attributes of each image."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_concepts._artifacts import is_there
from captum_concepts._checks import number, one_of
from captum_concepts.datasets.annotation import Annotation, Layer
from captum_concepts.datasets.segmentation import SegmentationDataset
from captum_concepts.datasets.trees import inside, require
from captum_concepts.errors import InputError
from captum_concepts.images import opened_image, read_text

_TREE = """  ROOT/images.txt  image_class_labels.txt  train_test_split.txt  classes.txt  bounding_boxes.txt
  ROOT/images/001.Black_footed_Albatross/NAME.jpg
  ROOT/parts/parts.txt, part_locs.txt                  15 parts per image: x, y, visible
  ROOT/attributes/image_attribute_labels.txt           312 attributes per image: present, certainty
  ROOT/attributes/attributes.txt                       their names (in the archive next to CUB_200_2011/)"""
_WHERE = "https://www.vision.caltech.edu/datasets/cub_200_2011/ (ROOT is CUB_200_2011)"
_NUMBER = re.compile(r"[0-9]{1,9}")
_LARGEST = 10**9


class CUB(SegmentationDataset):
    r"""CUB-200-2011: 200 bird species, 15 parts as keypoints and 312 attributes per image.

    The concepts are the parts. CUB annotates them as points, so the mask of a visible part is a disk around its point
    with a radius of ``radius`` times :math:`\sqrt{wh}` of the bird's bounding box; disks may overlap. Use them with
    metrics of the maximum of a map, such as the pointing game, rather than with area metrics.

    Wah et al., The Caltech-UCSD Birds-200-2011 Dataset, 2011.

    Args:
        root: ``CUB_200_2011``.
        split: ``"train"``, ``"test"``, or None for both.
        radius: relative radius of the disks, in (0, 1].
        options: see :class:`SegmentationDataset`.

    Attributes:
        classes: names of the species; an item's ``label`` is the index of its species.
        attribute_names: the 312 attributes, such as ``"has_bill_shape::cone"``.
        attributes: ``(N, 312)`` bool, whether an image shows them.
        certainty: ``(N, 312)`` int8 certainty of the annotator: 1 not visible, 2 guessing, 3 probably, 4 definitely.

    Raises:
        InputError: a file is missing or broken; the message names it.
    """

    def __init__(
        self, root: str | os.PathLike[str], split: str | None = "test", *, radius: float = 0.08, **options: Any
    ) -> None:
        self.root, self.split = Path(root), one_of("split", split, ("train", "test", None))
        self.radius = number("radius", radius, lambda r: 0 < r <= 1, "in (0, 1]")
        files = dict(self._pairs("images.txt"))
        train = {i: one == "1" for i, one in self._pairs("train_test_split.txt")}
        labels = {int(i): int(one) - 1 for i, one in self._numbers("image_class_labels.txt", 2).tolist()}
        names = dict(self._pairs("classes.txt"))
        self.classes = [names[i].split(".", 1)[-1].replace("_", " ") for i in sorted(names)]
        parts = dict(self._pairs("parts/parts.txt"))
        kept = sorted(i for i in files if split is None or train.get(i) == (split == "train"))
        if not kept:
            raise InputError(f"{self.root / 'train_test_split.txt'} assigns no image to split={split!r}")
        missing = [i for i in kept if i not in labels]
        if missing:
            raise InputError(f"{self.root / 'image_class_labels.txt'} has no label of image {missing[0]}")
        self._ids, self._names, self._labels = kept, files, labels
        boxes = self._numbers("bounding_boxes.txt", 5)
        if (boxes[:, 3:] < 0).any():
            raise InputError(f"{self.root / 'bounding_boxes.txt'} has a box of a negative width or height")
        self._side = {int(i): math.sqrt(w * h) for i, _, _, w, h in boxes.tolist()}
        places = self._numbers("parts/part_locs.txt", 5)
        order = {i: row for row, i in enumerate(kept)}
        self._points = np.zeros((len(kept), len(parts), 3), dtype=np.float32)
        part_rows = {i: row for row, i in enumerate(sorted(parts))}
        for i, part, x, y, visible in places.tolist():
            if int(part) not in part_rows:
                raise InputError(f"{self.root / 'parts/part_locs.txt'} has part {part:g}, which is not in parts.txt")
            if int(i) in order:
                self._points[order[int(i)], part_rows[int(part)]] = x, y, visible
        self.attribute_names, self.attributes, self.certainty = self._read_attributes(order)
        super().__init__({row + 1: parts[i] for row, i in enumerate(sorted(parts))}, **options)

    def __len__(self) -> int:
        return len(self._ids)

    def _annotation(self, index: int) -> Annotation:
        name = self._names[self._ids[index]]
        path = inside(self.root / "images", name, "images.txt")
        if not is_there(path):
            raise InputError(f"no image at {path}, which is named by the index")
        with opened_image(path) as file:
            width, height = file.size
        columns, rows = np.arange(width)[None], np.arange(height)[:, None]
        radius = max(1.0, self.radius * self._side.get(self._ids[index], 0.0))
        layers = []
        for part, (x, y, visible) in enumerate(self._points[index].tolist()):
            if visible:
                disk = (columns - x) ** 2 + (rows - y) ** 2 <= radius**2
                layers.append(Layer(disk.astype(np.int32) * np.int32(part + 1), f"part_locs.txt ({name})"))
        return Annotation(path, layers, name, label=self._labels[self._ids[index]])

    def keypoints(self, index: int) -> Tensor:
        """``(15, 3)`` x and y in pixels of the stored image, and 1 where the part is visible."""
        return torch.from_numpy(self._points[index].copy())

    def _file(self, name: str) -> Path:
        return require(self.root / name, tree=_TREE, where=_WHERE)

    def _pairs(self, name: str) -> list[tuple[int, str]]:
        """Number and text of every line."""
        path = self._file(name)
        lines = [line.split(maxsplit=1) for line in read_text(path).split("\n") if line.strip()]
        bad = next((i for i, line in enumerate(lines) if len(line) != 2 or not _NUMBER.fullmatch(line[0])), None)
        if bad is not None or not lines:
            raise InputError(f"{path} must have a number and a name on every line; line {(bad or 0) + 1} does not")
        return [(int(i), text.strip()) for i, text in lines]

    def _numbers(self, name: str, columns: int) -> np.ndarray[Any, Any]:
        """The first ``columns`` numbers of every line; the published attribute file has longer lines."""
        path = self._file(name)
        try:
            rows = [line.split()[:columns] for line in read_text(path).split("\n") if line.strip()]
            table = np.array(rows, dtype=np.float64)
        except ValueError as error:
            raise InputError(f"{path} must have {columns} numbers per line: {error}") from error
        if table.ndim != 2 or table.shape[1] != columns:
            raise InputError(f"{path} must have {columns} numbers per line, got {table.shape}")
        if not (abs(table) < _LARGEST).all():
            raise InputError(f"{path} has a number that is not finite or beyond {_LARGEST:,}")
        return table

    def _read_attributes(self, order: dict[int, int]) -> tuple[list[str], Tensor, Tensor]:
        places = [self.root / "attributes" / "attributes.txt", self.root / "attributes.txt"]
        places.append(self.root.parent / "attributes.txt")
        found = next((place for place in places if place.is_file()), places[0])
        lines = read_text(require(found, tree=_TREE, where=_WHERE)).split("\n")
        names = [line.split(maxsplit=1)[1].strip() for line in lines if len(line.split(maxsplit=1)) == 2]
        table = self._numbers("attributes/image_attribute_labels.txt", 4)
        present = torch.zeros(len(order), len(names), dtype=torch.bool)
        certainty = torch.zeros(len(order), len(names), dtype=torch.int8)
        rows = np.array([order.get(int(i), -1) for i in table[:, 0]])
        columns = table[:, 1].astype(np.int64) - 1
        if len(columns) and (columns.min() < 0 or columns.max() >= len(names)):
            raise InputError(
                f"image_attribute_labels.txt has attribute {columns.max() + 1}, {found} names {len(names)}"
            )
        kept = rows >= 0
        at = torch.from_numpy(rows[kept]), torch.from_numpy(columns[kept])
        present[at] = torch.from_numpy(table[kept, 2] == 1)
        certainty[at] = torch.from_numpy(table[kept, 3].astype(np.int8))
        return names, present, certainty
