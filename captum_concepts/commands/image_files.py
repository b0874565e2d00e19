"""Images for a command, read one by one; unreadable ones are recorded and skipped."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from captum_concepts.datasets import CaptionedScenes
from captum_concepts.errors import InputError
from captum_concepts.images import ImageSource, batches, class_folders, open_images

Failed = list[dict[str, str]]


def each_image(source: ImageSource, failed: Failed) -> Iterator[tuple[str, Tensor]]:
    """Iterate over names and pixels of readable images; the others are added to ``failed``."""
    before = len(failed)
    try:
        for batch in batches(source, 1):
            failed[before:] = source.skipped
            yield batch.names[0], batch.images[0]
    finally:
        failed[before:] = source.skipped


def readable(source: ImageSource, failed: Failed, what: str) -> ImageSource:
    """``source`` after all its images were read once; unreadable ones are left out and added to ``failed``.

    Raises:
        InputError: none of them can be read.
    """
    for _ in tqdm(each_image(source, failed), desc=f"reading {what}", unit="image", file=sys.stderr, disable=None,
                  leave=False):  # fmt: skip
        pass
    return source


def folder_labels(paths: Sequence[Path], class_names: Sequence[str] | None) -> Sequence[str | None] | None:
    """True class of each image, the name of its folder; None unless all folders are named after classes."""
    labels = [path.parent.name for path in paths]
    return labels if paths and set(labels) <= set(class_names or ()) else None


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Data set of images and their classes.

    Attributes:
        classes: names of the classes.
        targets: the class of each image.
    """

    def __init__(self, images: Any, classes: list[str], targets: list[int]) -> None:
        self.images, self.classes, self.targets = images, classes, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        item = self.images[index]
        return item.image if hasattr(item, "image") else item, self.targets[index]


def number_of_scenes(source: str) -> int:
    """N of ``demo:scenes:N``.

    Raises:
        InputError: it is not a positive number in digits.

    >>> number_of_scenes("demo:scenes:30")
    30
    """
    number = source.removeprefix("demo:scenes:")
    if not (number.isascii() and number.isdigit()) or int(number) == 0:
        raise InputError(f"{source!r} is not demo:scenes:N, where N is a number of scenes")
    return int(number)


def labelled_images(source: Any, size: int, failed: Failed | None = None, *, seed: int = 0, **options: Any) -> Any:
    """Labeled images of a configuration's entry.

    Args:
        source: a folder with one folder of images per class, or ``demo:scenes:N``.
        size: side of the images in pixels.
        failed: a list to which unreadable files are added after all files were read once; None: unreadable files raise
            on access.
        seed: random seed of the scenes.
        options: options of :func:`~captum_concepts.images.open_images`.

    Raises:
        InputError: the folder does not exist or has no class folders, or the number of scenes is invalid.
    """
    if not isinstance(source, str):
        raise InputError(f"images must be a folder or demo:scenes:N, got {source!r}")
    if source.startswith("demo:"):
        scenes = CaptionedScenes(number_of_scenes(source), seed=seed, size=size)
        return LabelledImages(scenes, scenes.classes, scenes.labels.tolist())
    folders = class_folders(source)  # raises for a folder without class folders, or with empty ones
    files = [file for inside in folders.values() for file in inside]
    labels = [k for k, inside in enumerate(folders.values()) for _ in inside]
    opened = open_images(files, size=size, labels=labels, skip_broken=failed is not None, **options)
    if failed is not None:
        readable(opened, failed, str(source))
    return LabelledImages(opened, list(folders), [int(label) for label in opened.labels or ()])
