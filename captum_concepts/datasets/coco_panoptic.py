"""`COCOPanoptic`: things and stuff in COCO's panoptic annotations."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np

from captum_concepts._artifacts import check_json, either, flag, integer, list_of, table, text
from captum_concepts.datasets.annotation import Annotation, Ids, Layer, read_ids
from captum_concepts.datasets.segmentation import SegmentationDataset
from captum_concepts.datasets.trees import inside, require, unlabelled_ids
from captum_concepts.errors import InputError
from captum_concepts.images import read_json

_TREE = """  ROOT/SPLIT/NAME.jpg                             e.g. val2017/000000000139.jpg
  ROOT/annotations/panoptic_SPLIT.json
  ROOT/annotations/panoptic_SPLIT/NAME.png        pixel = segment id, R + 256 G + 65536 B"""
_WHERE = (
    "https://cocodataset.org/#download: 2017 images, and panoptic_annotations_trainval2017.zip, "
    "whose inner panoptic_SPLIT.zip has to be unpacked as well"
)
_NUMBER = integer(0, 2**31 - 1)
_ID = either(text(longest=1000), integer(-(2**62), 2**62))
_SCHEMA = table(
    {
        "images": list_of(table({"id": _ID, "file_name": text(longest=1000)}, more=True)),
        "annotations": list_of(
            table(
                {
                    "image_id": _ID,
                    "file_name": text(longest=1000),
                    "segments_info": list_of(table({"id": _NUMBER, "category_id": _NUMBER}, more=True)),
                },
                more=True,
            )
        ),
        "categories": list_of(
            table({"id": _NUMBER, "name": text(longest=1000)}, {"isthing": either(flag, integer(0, 1))}, more=True)
        ),
    },
    more=True,
)


class COCOPanoptic(SegmentationDataset):
    """COCO panoptic segmentation, in which a concept's mask is the union of all its segments in an image.

    A PNG contains segment ids R + 256 G + 65536 B, and the JSON maps segments to categories; 0 is void. Crowds belong
    to the mask of their category. Kirillov et al., Panoptic Segmentation, CVPR 2019.

    Args:
        root: the folder with ``annotations/`` and the images.
        split: "val2017" or "train2017".
        things, stuff: keep the categories of countable things, of stuff, or both; the rest is background.
        images, annotations, masks: the folder of the images, the JSON and the folder of its PNGs, if they are not in
            their usual locations under ``root``.
        unlabelled: ``"ignore"`` void pixels (as COCO's own evaluation does), or count them as ``"background"``.
        options: see :class:`SegmentationDataset`.

    Attributes:
        is_thing: for each concept, whether it is a thing.

    Raises:
        InputError: a file is missing, broken or mismatched; the message names it.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "val2017",
        *,
        things: bool = True,
        stuff: bool = True,
        images: str | os.PathLike[str] | None = None,
        annotations: str | os.PathLike[str] | None = None,
        masks: str | os.PathLike[str] | None = None,
        unlabelled: str = "ignore",
        **options: Any,
    ) -> None:
        self.root, self.split = Path(root), split
        if not (things or stuff):
            raise InputError("things=False and stuff=False leave no concept; pass at least one as True")
        path = self.root / "annotations" / f"panoptic_{split}.json" if annotations is None else Path(annotations)
        self._json = require(path, tree=_TREE, where=_WHERE)
        self._images = Path(images) if images is not None else self.root / split
        self._masks = Path(masks) if masks is not None else path.with_suffix("")
        for folder in (self._images, self._masks):
            require(folder, tree=_TREE, where=_WHERE, folder=True)
        what = f"{path}, which must be in COCO's panoptic format,"
        index = check_json(read_json(path, dict), _SCHEMA, what, InputError)
        categories = {c["id"]: (c["name"], bool(c.get("isthing", 1))) for c in index["categories"]}
        if len(categories) != len(index["categories"]):
            raise InputError(f"{path} has several categories with the same id")
        # Categories may start from 0, which is void in the PNG, so void pixels get an id that no category has.
        self._nothing = next(i for i in itertools.count() if i not in categories)
        self.background = frozenset({self._nothing})
        self.void = self.background if unlabelled_ids(unlabelled) else frozenset()
        files = {image["id"]: image["file_name"] for image in index["images"]}
        if unknown := sorted({str(a["image_id"]) for a in index["annotations"] if a["image_id"] not in files}):
            raise InputError(f"{path} has annotations of the images {unknown[:5]}, which it does not list")
        self._items = [
            (
                files[a["image_id"]],
                a["file_name"],
                {s["id"]: s["category_id"] for s in a["segments_info"]},
            )
            for a in index["annotations"]
        ]
        kept = {i: name for i, (name, thing) in categories.items() if (things if thing else stuff)}
        super().__init__(kept, **options)
        self._known = frozenset(categories)
        self.is_thing = [categories[i][1] for i, _ in sorted(self._row.items(), key=lambda pair: pair[1])]

    def __len__(self) -> int:
        return len(self._items)

    def _annotation(self, index: int) -> Annotation:
        image, mask, segments = self._items[index]
        path = inside(self._masks, mask, self._json)
        layer = Layer(_categories(read_ids(path, "rgb"), segments, self._nothing, path, self._json), str(path))
        return Annotation(inside(self._images, image, self._json), [layer], image)


def _categories(ids: Ids, segments: dict[int, int], nothing: int, path: Path, json: Path) -> Ids:
    """The category of each pixel's segment; ``nothing`` where the segment id is 0."""
    values, where = np.unique(ids, return_inverse=True)
    found = set(values.tolist()) - {0}
    if found != set(segments):
        extra, missing = sorted(found - set(segments))[:5], sorted(set(segments) - found)[:5]
        raise InputError(
            f"{path} does not fit {json}: segments {extra} are in the PNG only, {missing} in the JSON only"
        )
    table = np.array([segments.get(value, nothing) for value in values.tolist()], dtype=np.int32)
    return np.asarray(table[where].reshape(ids.shape), dtype=np.int32)
