"""`Broden`: NetDissect's broadly and densely labeled images."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captum_concepts.datasets.annotation import Annotation, Layer, read_ids
from captum_concepts.datasets.segmentation import SegmentationDataset
from captum_concepts.datasets.trees import inside, require
from captum_concepts.errors import InputError, did_you_mean
from captum_concepts.images import read_text

_TREE = """  ROOT/index.csv       image,split,ih,iw,sh,sw,color,object,part,material,scene,texture
  ROOT/label.csv       number,name,category,frequency,coverage,syns
  ROOT/category.csv    name,first,last,count,frequency
  ROOT/images/...      the pictures, and PNGs of label numbers (R + 256 G) beside them"""
_WHERE = "http://netdissect.csail.mit.edu/data/broden1_224.zip (also broden1_227, broden1_384)"
_NUMBER = re.compile(r"[0-9]{1,9}")


class Broden(SegmentationDataset):
    """Broden in NetDissect's layout: colors, objects, parts, materials, scenes and textures.

    A pixel may have several labels, since an image has any number of label maps per category. A concept's mask is the
    union over the maps of the chosen categories. A map is a PNG of label numbers, R + 256 G (broden1_224 stores them at
    half the image's size; they are enlarged by nearest neighbor), or one number for the whole image (scenes and
    textures). Number 0 is unlabeled and counts as background, as in NetDissect. An image that is not annotated for a
    category has no masks of its concepts, so use ``regions="present"``, which contains only the present concepts.

    Bau et al., Network Dissection, CVPR 2017.

    Args:
        root: the unpacked folder, e.g. ``dataset/broden1_224``.
        categories: keep only the concepts of these ("color", "object", "part", "material", "scene", "texture"), and
            images annotated for at least one of them.
        split: "train" or "val"; None for both.
        options: see :class:`SegmentationDataset`.

    Attributes:
        categories: the chosen categories.
        concept_categories: for each concept, its categories in label.csv.

    Raises:
        InputError: a file is missing, broken or mismatched; the message names it.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        categories: Sequence[str] | None = None,
        split: str | None = None,
        **options: Any,
    ) -> None:
        self.root, self.split = Path(root), split
        index, label, category = (
            require(self.root / f"{name}.csv", tree=_TREE, where=_WHERE) for name in ("index", "label", "category")
        )
        require(self.root / "images", tree=_TREE, where=_WHERE, folder=True)
        known = [row["name"] for row in _rows(category, ["name"])]
        if isinstance(categories, str):
            categories = [categories]
        for name in categories or ():
            if name not in known:
                raise InputError(f"unknown category {name!r}; {category} has {known}.{did_you_mean(name, known)}")
        self.categories = known if categories is None else list(categories)
        labels = {}
        for row in _rows(label, ["number", "name", "category"]):
            if not _NUMBER.fullmatch(row["number"]):
                raise InputError(f"{label} has the label number {row['number']!r}, which is not a number")
            # "object(1203);part(17)" lists each category with its frequency
            labels[int(row["number"])] = row["name"], tuple(re.findall(r"([^;(]+)(?:\([^)]*\))?", row["category"]))
        rows = _rows(index, ["image", "split", *self.categories])
        splits = sorted({row["split"] for row in rows})
        if split is not None and split not in splits:
            raise InputError(f"split={split!r} must be one of {splits}, as in {index}")
        kept = ("image", *self.categories)
        self._rows = [
            {name: row[name] for name in kept}
            for row in rows
            if split in (None, row["split"]) and any(row[name] for name in self.categories)
        ]
        names = {n: name for n, (name, kinds) in labels.items() if n and set(kinds) & set(self.categories)}
        super().__init__(names, **options)
        self._known = frozenset(labels)
        numbers = {row: number for number, row in self._row.items()}
        self.concept_categories = [labels[numbers[row]][1] for row in range(len(self.concepts))]

    def __len__(self) -> int:
        return len(self._rows)

    def _annotation(self, index: int) -> Annotation:
        row = self._rows[index]
        layers = []
        for category in self.categories:
            for entry in filter(None, row[category].split(";")):
                if _NUMBER.fullmatch(entry):
                    layers.append(Layer(int(entry), f"index.csv ({row['image']}, {category})"))
                else:
                    path = inside(self.root / "images", entry, "index.csv")
                    layers.append(Layer(read_ids(path, "rg"), str(path), rescale=True))
        return Annotation(inside(self.root / "images", row["image"], "index.csv"), layers, row["image"])


def _rows(path: Path, columns: list[str]) -> list[dict[str, str]]:
    try:
        reader = csv.DictReader(read_text(path).split("\n"))
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        rows = list(reader)
    except csv.Error as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if missing:
        raise InputError(f"{path} lacks the columns {missing}; it has {reader.fieldnames}")
    short = next((i for i, row in enumerate(rows) if any(row[name] is None for name in columns)), None)
    if short is not None:
        raise InputError(f"{path} is truncated or damaged in row {short + 2}")
    if not rows:
        raise InputError(f"{path} contains no rows")
    return rows
