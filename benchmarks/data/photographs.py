"""Image files as a data set, and the real models beside them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

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


def real_models(folder: Path) -> ModuleType:
    """``real_models.py`` of the folder of data: classifiers, and an image-text model."""
    spec = importlib.util.spec_from_file_location("real_models", folder / "real_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
