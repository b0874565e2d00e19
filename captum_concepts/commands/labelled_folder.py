"""Labelled images for a command: a folder with one folder of images a class, or the bundled scenes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from captum_concepts.datasets import CaptionedScenes
from captum_concepts.errors import CaptumConceptsError, InputError
from captum_concepts.images import class_folders, load_image


class LabelledFolder(Dataset[tuple[Tensor, int]]):
    """Images of the class folders of ``root``, centre-cropped squares of ``size`` pixels, RGB in [0, 1].

    Args:
        root: the folder.
        size: side in pixels.
        skipped: a list that files which cannot be read are noted in, after looking at each; with None the first one
            that is met raises.

    Attributes:
        classes: names of the folders, sorted.
        targets: the class of each image.
    """

    def __init__(self, root: str | os.PathLike[str], size: int, skipped: list[dict[str, str]] | None = None) -> None:
        folders = class_folders(root)
        self.size, self.classes = size, list(folders)
        self.files = [file for files in folders.values() for file in files]
        self.targets = [k for k, files in enumerate(folders.values()) for _ in files]
        if skipped is not None:
            kept = [i for i, file in enumerate(self.files) if _readable(file, size, skipped)]
            self.files, self.targets = [self.files[i] for i in kept], [self.targets[i] for i in kept]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return load_image(self.files[index], self.size), self.targets[index]


class SceneImages(Dataset[tuple[Tensor, int]]):
    """Image and label of :class:`~captum_concepts.datasets.CaptionedScenes`."""

    def __init__(self, n: int, seed: int, size: int) -> None:
        self.scenes = CaptionedScenes(n, seed=seed, size=size)
        self.classes = self.scenes.classes
        self.targets = self.scenes.labels.tolist()

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        scene = self.scenes[index]
        return scene.image, int(scene.label)


def open_images(source: Any, size: int, skipped: list[dict[str, str]] | None = None, *, seed: int = 0) -> Any:
    """The data set that an entry of a configuration means.

    Args:
        source: a folder, or ``demo:scenes:N``.
        size: side of the images in pixels.
        skipped: see :class:`LabelledFolder`.
        seed: of the scenes.

    Raises:
        InputError: no such folder, no class folders, not a number of scenes.
    """
    if not isinstance(source, str):
        raise InputError(f"images must be a folder or demo:scenes:N, got {source!r}")
    if source.startswith("demo:"):
        number = source.removeprefix("demo:scenes:")
        if not number.isdigit() or int(number) == 0:
            raise InputError(f"{source!r} is not demo:scenes:N, N a number of scenes")
        return SceneImages(int(number), seed, size)
    return LabelledFolder(source, size, skipped)


def _readable(file: Path, size: int, skipped: list[dict[str, str]]) -> bool:
    try:
        load_image(file, size)
    except CaptumConceptsError as error:
        skipped.append({"image": str(file), "reason": str(error)})
        print(f"skipped: {error}", file=sys.stderr)
        return False
    return True
