"""Readers for published segmentation data sets, one class per format, with the items of `SegmentationDataset`.

=============================  =====================================================================
:class:`Broden`                NetDissect's layout: index.csv, label.csv, category.csv, images/
:class:`ImageNetS`             ImageNetS50, ImageNetS300, ImageNetS919: images and PNGs by class folder
:class:`ImageNetSegmentation`  gtsegs_ijcv.mat, or a folder converted from it
:class:`PascalVOC`             JPEGImages, SegmentationClass, ImageSets/Segmentation
:class:`COCOPanoptic`          panoptic_*.json and its PNGs
:class:`CUB`                   CUB-200-2011: parts as keypoints, attributes
:class:`COCOParts`             PartImageNet, PartImageNet++: COCO's instance format
:class:`MaskFolder`            images/, masks/ and classes.json
=============================  =====================================================================
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from captum_concepts.datasets.annotation import Annotation, Layer, read_ids
from captum_concepts.datasets.broden import Broden
from captum_concepts.datasets.coco_panoptic import COCOPanoptic
from captum_concepts.datasets.coco_parts import COCOParts
from captum_concepts.datasets.cub import CUB
from captum_concepts.datasets.imagenet_s import ImageNetS
from captum_concepts.datasets.imagenet_segmentation import ImageNetSegmentation
from captum_concepts.datasets.segmentation import SegmentationDataset
from captum_concepts.datasets.segmented_image import SegmentedBatch, SegmentedImage, collate_segmented
from captum_concepts.datasets.trees import inside, paired, require, unlabelled_ids
from captum_concepts.errors import InputError, InputWarning, did_you_mean
from captum_concepts.images import read_json, read_text

__all__ = [
    "CUB",
    "VOC_CLASSES",
    "Broden",
    "COCOPanoptic",
    "COCOParts",
    "ImageNetS",
    "ImageNetSegmentation",
    "MaskFolder",
    "PascalVOC",
    "SegmentationDataset",
    "SegmentedBatch",
    "SegmentedImage",
    "collate_segmented",
]

#: The classes of Pascal VOC; pixel value i + 1 is class i, 0 the background, 255 void.
VOC_CLASSES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
               "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")  # fmt: skip

_FOLDER_TREE = """  ROOT/classes.json            {"0": "unlabeled", "1": "person", ...}: pixel value -> name
  ROOT/images/NAME.jpg
  ROOT/masks/NAME.png          one channel, pixel = id in classes.json, 0 unlabelled"""
_VOC_TREE = """  ROOT/JPEGImages/NAME.jpg
  ROOT/SegmentationClass/NAME.png
  ROOT/ImageSets/Segmentation/{train,val,trainval}.txt     one NAME a line"""
_VOC_WHERE = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/ (ROOT is VOCdevkit/VOC2012)"


class MaskFolder(SegmentationDataset):
    """Your own images with semantic masks, as ``images/``, ``masks/`` with the same names, and ``classes.json``.

    ``classes.json`` maps pixel values to names; pixel 0 is unlabeled. Masks have one channel (8 or 16 bit) and the
    size of their image.

    Args:
        root: the folder with these three.
        unlabelled: how pixels of value 0 are handled: ``"ignore"`` leaves them out of metrics; ``"background"`` counts
            them as showing no concept. None: background if that is the name of 0 in ``classes.json``, else ignore.
        void: further pixel values to ignore, such as 255 for borders.
        options: see :class:`SegmentationDataset`.

    Raises:
        InputError: a file is missing, broken or mismatched; the message names it.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for part in ("images", "masks"):
        ...     (root / part).mkdir()
        >>> Image.new("RGB", (40, 30)).save(root / "images" / "a.jpg")
        >>> mask = Image.new("L", (40, 30))
        >>> mask.paste(2, (10, 5, 20, 25))
        >>> mask.save(root / "masks" / "a.png")
        >>> _ = (root / "classes.json").write_text('{"1": "cat", "2": "dog"}')
        >>> data = MaskFolder(root, size=30)
        >>> data, data[0].concepts, data[0].masks.shape, int(data[0].masks.sum())
        (MaskFolder(1 images, 2 concepts), ('dog',), torch.Size([1, 30, 30]), 200)
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        unlabelled: str | None = None,
        void: Iterable[int] = (),
        **options: Any,
    ) -> None:
        self.root = Path(root)
        if isinstance(void, int | str):
            raise InputError(f"void={void!r} must be a list of pixel values, as in void=[255]")
        where = "your own masks; nothing is downloaded"
        classes = require(self.root / "classes.json", tree=_FOLDER_TREE, where=where)
        for part in ("images", "masks"):
            require(self.root / part, tree=_FOLDER_TREE, where=where, folder=True)
        try:
            names = {int(i): str(name) for i, name in read_json(classes, dict).items()}
        except ValueError:
            raise InputError(f"{classes} must map pixel values to names, as in {{'1': 'person'}}") from None
        zero = names.pop(0, "unlabelled").strip().casefold().strip("_")
        if zero not in ("", "background", "ignore", "ignored", "none", "unknown", "unlabeled", "unlabelled", "void"):
            warnings.warn(
                f"{classes} names pixels of value 0 {zero!r}, but 0 means unlabeled, so the name is ignored; number "
                "the classes from 1",
                InputWarning,
                stacklevel=2,
            )
        by_name = "background" if zero == "background" else "ignore"
        self.unlabelled = by_name if unlabelled is None else unlabelled
        self.void = unlabelled_ids(self.unlabelled) | frozenset(void)
        self._files = paired(self.root / "images", self.root / "masks")
        super().__init__(names, **options)

    def __len__(self) -> int:
        return len(self._files)

    def _annotation(self, index: int) -> Annotation:
        image, mask = self._files[index]
        return Annotation(image, [Layer(read_ids(mask), str(mask))], image.name)


class PascalVOC(SegmentationDataset):
    """Pascal VOC segmentation with 20 classes; pixel 0 is background, 255 (borders and difficult objects) is ignored.

    Everingham et al., IJCV 2010.

    Args:
        root: ``VOCdevkit/VOC2012`` (or another year), or the folder above it if it contains only one year.
        split: a list in ``ImageSets/Segmentation``: "train", "val" or "trainval".
        options: see :class:`SegmentationDataset`.

    Raises:
        InputError: a file is missing, broken or mismatched; the message names it.
    """

    void = frozenset({255})

    def __init__(self, root: str | os.PathLike[str], split: str = "val", **options: Any) -> None:
        self.root, self.split = _voc_root(Path(root)), split
        for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            require(self.root / part, tree=_VOC_TREE, where=_VOC_WHERE, folder=True)
        lists = self.root / "ImageSets" / "Segmentation"
        known = sorted(path.stem for path in lists.glob("*.txt"))
        if split not in known:
            raise InputError(f"split={split!r} must be one of {known} in {lists}.{did_you_mean(split, known)}")
        self._names = read_text(lists / f"{split}.txt").split()
        if not self._names:
            raise InputError(f"{lists / split}.txt lists no image")
        super().__init__({i + 1: name for i, name in enumerate(VOC_CLASSES)}, **options)

    def __len__(self) -> int:
        return len(self._names)

    def _annotation(self, index: int) -> Annotation:
        name = self._names[index]
        mask = inside(self.root / "SegmentationClass", f"{name}.png", "a list of ImageSets/Segmentation")
        image = self.root / "JPEGImages" / f"{name}.jpg"
        return Annotation(image, [Layer(read_ids(mask), str(mask))], image.name)


def _voc_root(root: Path) -> Path:
    if not (root / "JPEGImages").is_dir():
        for inner in (root / "VOCdevkit", root):
            years = sorted(inner.glob("VOC*/JPEGImages"))
            if len(years) > 1:
                raise InputError(f"{inner} contains several years; choose one: {[str(y.parent) for y in years]}")
            if years:
                return years[0].parent
    return root
