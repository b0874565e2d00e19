"""Image files as a data set."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from captum_concepts.images import load_image


class Files(Dataset[Tensor]):
    """Images without labels, ``size`` pixels square: the middle (``crop``), or the whole, squashed."""

    def __init__(self, files: list[Path], size: int, *, crop: bool = True) -> None:
        self.files, self.size, self.crop = files, size, crop

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return load_image(self.files[index], self.size, resize="crop" if self.crop else "squash")
