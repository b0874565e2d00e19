"""`COCOParts`: parts of objects in COCO's instance format, as in PartImageNet and PartImageNet++."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from captum_concepts._artifacts import check_json, either, integer, is_there, list_of, nothing_or, number, table, text
from captum_concepts.datasets.annotation import Annotation, Ids, Layer
from captum_concepts.datasets.imagenet import class_indices
from captum_concepts.datasets.segmentation import SegmentationDataset
from captum_concepts.datasets.trees import inside, require
from captum_concepts.errors import InputError
from captum_concepts.images import read_json
from captum_concepts.images.files import MOST_PIXELS

_TREE = """  ANNOTATIONS.json, or a folder of such files (PartImageNet++: json/n01440764.json, one per class)
      {"images": [{"id", "file_name", "height", "width"}], "categories": [{"id", "name"}],
       "annotations": [{"image_id", "category_id", "segmentation": polygons or run lengths}]}
  IMAGES/FILE_NAME, or IMAGES/n01440764/FILE_NAME"""
_WHERE = (
    "https://huggingface.co/datasets/lixiao20/PartImageNetPP (the images are those of ImageNet-1k) or "
    "https://github.com/TACJu/PartImageNet"
)
_ID = either(text(longest=1000), integer(-(2**62), 2**62))
_SIDE = integer(1, 2**20)
_RUNS = list_of(integer(0, 2**40))
_SHAPE = either(
    table({"size": list_of(_SIDE, length=2), "counts": either(text(longest=10_000_000), _RUNS)}, more=True),
    list_of(list_of(number(-(2**31), 2**31))),
)
_SCHEMA = table(
    {
        "images": list_of(
            table({"id": _ID, "file_name": text(longest=1000), "height": _SIDE, "width": _SIDE}, more=True)
        ),
        "annotations": list_of(
            table({"image_id": _ID, "category_id": _ID, "segmentation": nothing_or(_SHAPE)}, more=True)
        ),
        "categories": list_of(table({"id": _ID, "name": text(longest=1000)}, more=True)),
    },
    more=True,
)


class COCOParts(SegmentationDataset):
    """Part masks in COCO's instance format; the concepts are its categories, with one mask per category and image.

    Segmentations may be polygons, uncompressed or compressed run lengths. If the JSON or the image's folder is named by
    the WordNet id of an ImageNet-1k class, or the file name starts with one and ``_``, its index is the ``label``.

    Li et al., PartImageNet++ Dataset, ECCV 2024; He et al., PartImageNet, ECCV 2022.

    Args:
        annotations: a JSON file, or a folder of them. Categories of the same name are one concept.
        images: the folder of the images.
        options: see :class:`SegmentationDataset`.

    Raises:
        InputError: a file is missing, broken or mismatched; the message names it.
    """

    def __init__(self, annotations: str | os.PathLike[str], images: str | os.PathLike[str], **options: Any) -> None:
        self.annotations, self.images = Path(annotations), Path(images)
        require(self.images, tree=_TREE, where=_WHERE, folder=True)
        files = [self.annotations]
        if self.annotations.is_dir():
            files = sorted(file for file in self.annotations.glob("*.json") if not file.name.startswith("."))
        if not files:
            raise InputError(f"no JSON in {self.annotations}. Expected tree:\n{_TREE}\nGet it from {_WHERE}")
        ids: dict[str, int] = {}
        self._items: list[tuple[str, str, tuple[int, int], list[tuple[int, Any]]]] = []
        for file in files:
            self._items += _read(require(file, tree=_TREE, where=_WHERE), ids)
        if not self._items:
            raise InputError(f"{self.annotations} lists no image")
        super().__init__({i: name for name, i in ids.items()}, **options)

    def __len__(self) -> int:
        return len(self._items)

    def _annotation(self, index: int) -> Annotation:
        name, stem, size, segments = self._items[index]
        path = inside(self.images, name, f"{stem}.json")
        path = next((p for p in (path, self.images / stem / name) if is_there(p)), path)
        whole: dict[int, Ids] = {}
        for category, shape in segments:
            mask = _mask(shape, size, f"{stem}.json, {name}")
            whole[category] = whole[category] | mask if category in whole else mask
        layers = [Layer(mask * np.int32(category), f"{stem}.json ({name})") for category, mask in whole.items()]
        wnids = [part for part in (stem, path.parent.name, path.name.split("_")[0]) if part in class_indices()]
        return Annotation(path, layers, name, label=class_indices()[wnids[0]] if wnids else None)


def _read(file: Path, ids: dict[str, int]) -> list[tuple[str, str, tuple[int, int], list[tuple[int, Any]]]]:
    """The images of one JSON; adds a number for each category name to ``ids``."""
    what = f"{file}, which must be in COCO's instance format,"
    found = check_json(read_json(file, dict), _SCHEMA, what, InputError)
    names = {c["id"]: ids.setdefault(c["name"], len(ids) + 1) for c in found["categories"]}
    if len(names) != len(found["categories"]):
        raise InputError(f"{file} has several categories with the same id")
    segments: dict[Any, list[tuple[int, Any]]] = {image["id"]: [] for image in found["images"]}
    for a in found["annotations"]:
        if a["image_id"] not in segments or a["category_id"] not in names:
            raise InputError(f"{file} has an annotation of an image or a category that it does not list: {a}")
        if a["segmentation"]:
            segments[a["image_id"]].append((names[a["category_id"]], a["segmentation"]))
    return [
        (image["file_name"], file.stem, (image["height"], image["width"]), segments[image["id"]])
        for image in found["images"]
    ]


def _mask(shape: Any, size: tuple[int, int], source: str) -> Ids:
    """Mask ``(h, w)`` of zeros and ones of a segmentation."""
    height, width = size
    if height * width > MOST_PIXELS:
        raise InputError(f"{source} claims {height} x {width} pixels")
    try:
        if isinstance(shape, dict):
            counts = shape["counts"]
            if list(shape["size"]) != [height, width]:
                raise ValueError(f"a mask of {shape['size']} pixels in an image of {[height, width]}")
            return _from_runs(_decoded(counts) if isinstance(counts, (str, bytes)) else counts, size)
        mask = np.zeros(size, dtype=np.int32)
        for polygon in shape:
            mask |= _filled(np.asarray(polygon, dtype=np.float64).reshape(-1, 2), size)
        return mask
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"{source}: a segmentation cannot be read: {error}") from error


def _filled(polygon: np.ndarray[Any, Any], size: tuple[int, int]) -> Ids:
    """Mask of the pixels whose center is inside the polygon, by the even-odd rule."""
    turns = np.zeros((size[0], size[1] + 1), dtype=np.int32)
    rows = np.arange(size[0]) + 0.5
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        crossed = np.flatnonzero((rows > y0) != (rows > y1))
        x = x0 + (rows[crossed] - y0) / (y1 - y0 or 1) * (x1 - x0)
        np.add.at(turns, (crossed, np.clip(np.ceil(x - 0.5), 0, size[1]).astype(np.int64)), 1)
    return np.asarray(turns[:, :-1].cumsum(1) % 2, dtype=np.int32)


def _from_runs(counts: Sequence[int], size: tuple[int, int]) -> Ids:
    """Mask from alternating run lengths of zeros and ones in column-major order."""
    runs = np.asarray(counts, dtype=np.int64)
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise ValueError(f"run lengths of {int(runs.sum())} pixels for {size[0] * size[1]}")
    return np.repeat(np.arange(len(runs)) % 2, runs).reshape(size, order="F").astype(np.int32)


def _decoded(text: str | bytes) -> list[int]:
    """Run lengths from COCO's compressed form, five bits per character, each relative to the run before the last."""
    codes = [code - 48 for code in (text.encode() if isinstance(text, str) else text)]
    runs: list[int] = []
    at = 0
    while at < len(codes):
        value = shift = 0
        while True:
            code = codes[at]
            at += 1
            value |= (code & 31) << shift
            shift += 5
            if not code & 32:
                break
        if code & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs
