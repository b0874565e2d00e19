"""`ImageNetS`: ImageNet images with semantic masks."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captum_concepts.datasets.annotation import Annotation, Layer, read_ids
from captum_concepts.datasets.imagenet import class_indices, names_of
from captum_concepts.datasets.segmentation import SegmentationDataset
from captum_concepts.datasets.trees import paired, require
from captum_concepts.errors import InputError
from captum_concepts.images import read_text

_TREE = """  ROOT/validation/n01443537/ILSVRC2012_val_00000236.JPEG                (ROOT is ImageNetS50, 300 or 919)
  ROOT/validation-segmentation/n01443537/ILSVRC2012_val_00000236.png    RGB, class id = R + 256 G
  ROOT/ImageNetS_categories_im50.txt                                    one WordNet id a line: line i is class i"""
_WHERE = (
    "https://github.com/LUSSeg/ImageNet-S (datapreparation/data_preparation.sh, with your own copy of ImageNet; "
    "the class tables are in data/categories)"
)


class ImageNetS(SegmentationDataset):
    """ImageNet-S, semantic masks of ImageNet images with 50, 300 or 919 classes.

    The class id is R + 256 G of the PNG; 0 is background, and 1000 and 65535 are ignored. The i-th line of the
    published class table is class id i, counted from 1. The table of 919 is required because it is *not* sorted; the
    tables of 50 and 300 are sorted and can be inferred from the folders if all are present.

    An item's ``label`` is the ImageNet-1k class index of its folder. ``regions="label"`` returns the mask of that class
    with ``target=label``, as ``metrics.evaluate`` needs for Grad-CAM and similar methods. Concepts are named by the
    first synonym of their synset, or by all synonyms if two classes share the first ("crane"). Gao et al., Large-scale
    Unsupervised Semantic Segmentation, TPAMI 2022.

    Args:
        root: ``ImageNetS50``, ``ImageNetS300`` or ``ImageNetS919``.
        split: "validation" or "train-semi", the two with public masks.
        categories: the class table, as a file or as the WordNet ids in order. By default
            ``ImageNetS_categories_im*.txt`` in ``root`` or the folder above, else the sorted folders.
        options: see :class:`SegmentationDataset`.

    Attributes:
        wnids: WordNet id of each class, at the index class id - 1.

    Raises:
        InputError: a file is missing, broken or mismatched; the message names it.
    """

    void = frozenset({1000, 65535})

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "validation",
        *,
        categories: str | os.PathLike[str] | Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        self.root, self.split = Path(root), split
        images, masks = self.root / split, self.root / f"{split}-segmentation"
        for folder in (images, masks):
            require(folder, tree=_TREE, where=_WHERE, folder=True)
        folders = sorted(path.name for path in images.iterdir() if path.is_dir())
        self.wnids = _class_table(self.root, categories, folders)
        index = {wnid: i + 1 for i, wnid in enumerate(self.wnids)}
        classes = class_indices()
        self._files: list[tuple[Path, Path, int, int | None]] = []
        for wnid in folders:
            if wnid not in index:
                raise InputError(f"{images / wnid} is not in the class table of {len(index)} WordNet ids")
            require(masks / wnid, tree=_TREE, where=_WHERE, folder=True)
            for image, mask in paired(images / wnid, masks / wnid):
                self._files.append((image, mask, index[wnid], classes.get(wnid)))
        if not self._files:
            raise InputError(f"{images} contains no class folders. Expected tree:\n{_TREE}")
        super().__init__(dict(enumerate(names_of(self.wnids), start=1)), **options)

    def __len__(self) -> int:
        return len(self._files)

    def _annotation(self, index: int) -> Annotation:
        image, mask, label_id, label = self._files[index]
        name = f"{image.parent.name}/{image.name}"
        return Annotation(image, [Layer(read_ids(mask, "rg"), str(mask))], name, label=label, label_id=label_id)


def _class_table(root: Path, given: Any, folders: list[str]) -> list[str]:
    if given is None:
        count = re.search(r"(\d+)$", root.resolve().name)
        pattern = f"ImageNetS_categories_im{count[1] if count else '*'}.txt"
        files = [file for folder in (root, root.resolve().parent) for file in sorted(folder.glob(pattern))]
        if files:
            given = files[0]
        elif len(folders) in (50, 300):
            return folders
        else:
            raise InputError(
                f"{root} contains {len(folders)} class folders, so the class ids cannot be inferred from them; add "
                f"{pattern} to it or pass categories=, from {_WHERE}"
            )
    wnids = read_text(Path(given)).split() if isinstance(given, (str, os.PathLike)) else [str(w) for w in given]
    wrong = [w for w in wnids if not re.fullmatch(r"n\d{8}", w)]
    if wrong or not wnids or len(set(wnids)) < len(wnids):
        what = f"got {wrong[:3]}" if wrong else "one is named twice" if wnids else "it is empty"
        raise InputError(f"the class table {given if isinstance(given, (str, os.PathLike)) else 'categories='} must "
                         f"contain one WordNet id (n01443537) per line: {what}")  # fmt: skip
    return wnids
