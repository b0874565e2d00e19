"""`ImageNetSegmentation`: foreground masks of ImageNet images, used in the ImageNet-segmentation tables."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from captum_concepts.datasets.annotation import Annotation, Layer, read_ids
from captum_concepts.datasets.imagenet import class_indices
from captum_concepts.datasets.segmentation import SegmentationDataset
from captum_concepts.datasets.trees import paired, require
from captum_concepts.errors import InputError
from captum_concepts.images.files import MOST_PIXELS

_TREE = """  gtsegs_ijcv.mat            the published file, or
  ROOT/images/NAME.jpg       a folder converted from it
  ROOT/masks/NAME.png        one channel, not 0 is the object"""
#: Errors of h5py, or of later code, for damaged files.
_BROKEN = (AttributeError, LookupError, MemoryError, OSError, OverflowError, RuntimeError, TypeError, ValueError)
_MOST_PICTURES = 1_000_000
_WHERE = "http://calvin-vision.net/bigstuff/proj-imagenet/data/gtsegs_ijcv.mat"


class ImageNetSegmentation(SegmentationDataset):
    """4,276 ImageNet images with the mask of their object; the only concept is "foreground".

    The published file has MATLAB's v7.3 format (HDF5) and needs ``h5py``. It is opened on first use in each process, so
    a ``DataLoader`` may use any number of workers. Guillaumin et al., ImageNet Auto-Annotation with Segmentation
    Propagation, IJCV 2014. For the protocol of the metrics, see ``metrics.pixel_accuracy``, ``mean_iou`` and
    ``average_precision``.

    Args:
        path: ``gtsegs_ijcv.mat`` (or its folder), or a folder with ``images/`` and ``masks/``.
        labelled: keep only images whose class is in ImageNet-1k, and use its index as ``label`` and ``target`` (.mat
            file only; some of its 445 classes are not). False: no labels, as in the published protocol, which explains
            the model's own prediction.
        options: see :class:`SegmentationDataset`; ``regions`` defaults to "label", one mask ``(H, W)`` per image.

    Raises:
        InputError: a file is missing, broken or mismatched, or h5py is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], *, labelled: bool = False, **options: Any) -> None:
        self.path, self.labelled = Path(path), labelled
        if self.path.is_dir() and (self.path / "gtsegs_ijcv.mat").is_file():
            self.path = self.path / "gtsegs_ijcv.mat"
        self._files: list[tuple[Path, Path]] | None = None
        self._open: tuple[int, Any] | None = None
        if self.path.is_dir():
            for part in ("images", "masks"):
                require(self.path / part, tree=_TREE, where=_WHERE, folder=True)
            if labelled:
                raise InputError("labelled=True needs gtsegs_ijcv.mat: a folder of masks has no classes")
            self._files = paired(self.path / "images", self.path / "masks")
            self._index: list[tuple[int, int | None]] = [(i, None) for i in range(len(self._files))]
        else:
            require(self.path, tree=_TREE, where=_WHERE)
            self._index = self._read_index()
        super().__init__({1: "foreground"}, **{"regions": "label", **options})

    def __len__(self) -> int:
        return len(self._index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}  # an open HDF5 file cannot be sent to another process

    def wnid(self, index: int) -> str | None:
        """WordNet id of an image's class (``value/target`` of the .mat file), or None for a folder."""
        if self._files is not None:
            return None
        file = self._mat()
        return _text(file, file["value/target"][self._index[index][0], 0]) if "target" in file["value"] else None

    def _annotation(self, index: int) -> Annotation:
        i, label = self._index[index]
        if self._files is not None:
            path, drawn = self._files[i]
            return Annotation(path, [Layer(_binary(read_ids(drawn)), str(drawn))], path.name, label_id=1)
        file, source = self._mat(), f"{self.path}, example {i}"
        try:
            # MATLAB is column-major, so shapes are (3, W, H) and (W, H). The mask is in a cell of its own.
            pixels = _array(file[file["value/img"][i, 0]]).transpose(2, 1, 0)
            mask = _array(file[file[file["value/gt"][i, 0]][0, 0]]).transpose(1, 0)
        except _BROKEN as error:
            raise InputError(f"{source} cannot be read: {error}") from error
        if pixels.dtype != np.uint8 or pixels.shape[2] != 3:
            raise InputError(f"{source} must be a uint8 RGB image, got {pixels.dtype} {pixels.shape}")
        layer = Layer(_binary(mask), f"value/gt of {source}")
        return Annotation(np.ascontiguousarray(pixels), [layer], f"{i}", label=label, label_id=1)

    def _mat(self) -> Any:
        """The file, opened once per process because HDF5 handles do not survive a fork."""
        if self._open is None or self._open[0] != os.getpid():
            try:
                h5py = import_module("h5py")  # optional, and without types
            except ImportError as error:
                raise InputError(
                    f"{self.path.name} is an HDF5 file: install h5py (pip install h5py), or pass a folder converted "
                    f"elsewhere:\n{_TREE}"
                ) from error
            try:
                self._open = os.getpid(), h5py.File(self.path, "r")
            except OSError as error:
                raise InputError(f"{self.path} is damaged or not a MATLAB v7.3 (HDF5) file: {error}") from error
        return self._open[1]

    def _read_index(self) -> list[tuple[int, int | None]]:
        file = self._mat()
        try:
            count = len(file["value/img"])
            if count > _MOST_PICTURES:
                raise ValueError(f"it claims {count:,} pictures")
            if len(file["value/gt"]) != count:
                raise InputError(f"{self.path} has {count} images but {len(file['value/gt'])} masks")
            if not self.labelled:
                return [(i, None) for i in range(count)]
            targets, classes = file["value/target"], class_indices()
            labels = [classes.get(_text(file, targets[i, 0])) for i in range(count)]
        except InputError:
            raise
        except _BROKEN as error:
            raise InputError(
                f"{self.path} is not laid out like gtsegs_ijcv.mat: {error}. Get it from {_WHERE}"
            ) from error
        kept: list[tuple[int, int | None]] = [(i, label) for i, label in enumerate(labels) if label is not None]
        if not kept:
            raise InputError(f"no image of {self.path} has a class of ImageNet-1k")
        return kept


def _text(file: Any, reference: Any) -> str:
    """Text of a MATLAB string, an array of UTF-16 codes."""
    return "".join(chr(code) for code in _array(file[reference]).ravel())


def _array(data: Any) -> Any:
    """The array of an HDF5 data set; raises if it claims more values than a large image."""
    if data.size > 3 * MOST_PIXELS:
        raise ValueError(f"it claims {data.size:,} numbers, more than {3 * MOST_PIXELS:,}")
    return np.asarray(data)


def _binary(mask: Any) -> Any:
    return (np.asarray(mask) != 0).astype(np.int32)
