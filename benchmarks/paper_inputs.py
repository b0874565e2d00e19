"""Models and images of the papers' tables: local weights, files without labels, class folders, words of concepts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from captum_concepts import demo
from captum_concepts.datasets.images import class_folders, load_image


class Files(Dataset[Tensor]):
    """Images without labels."""

    def __init__(self, files: list[Path], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return load_image(self.files[index], self.size)


class Folders(Dataset[tuple[Tensor, int]]):
    """Class folders; labels follow the order of their names."""

    def __init__(self, root: Path, size: int) -> None:
        found = class_folders(root)
        self.classes, self.size = list(found), size
        self.items = [(path, label) for label, name in enumerate(found) for path in found[name]]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.items[index]
        return load_image(path, self.size), label


class Normalised(nn.Module):
    """RGB in [0, 1] to what the network expects; its layers are at ``.net``."""

    def __init__(self, net: nn.Module, mean: Iterable[float], std: Iterable[float]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(list(mean)).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean) / self.std)


def classifier(name: str, weights: str, device: str) -> nn.Module:
    """A bundled model (``demo:classifier``), or a timm model with its own preprocessing.

    Weights are a .safetensors file, whose head may have any number of classes, or ``"pretrained"``.
    """
    if name.startswith("demo:"):
        return demo.load(name.removeprefix("demo:")).to(device)
    import timm
    from safetensors.torch import load_file
    from timm.data import resolve_model_data_config

    net = timm.create_model(name, pretrained=weights == "pretrained")
    if weights != "pretrained":
        state = load_file(weights)
        net.reset_classifier(len(state[f"{net.pretrained_cfg['classifier']}.weight"]))
        net.load_state_dict(state)
    about = resolve_model_data_config(net)
    return Normalised(net, about["mean"], about["std"]).eval().requires_grad_(False).to(device)


def image_text(name: str, weights: str, device: str) -> Any:
    """The bundled image-text model (``demo:clip``), or an open_clip model and a file or tag of weights."""
    if name == "demo:clip":
        return demo.load("clip").to(device)
    from captum_concepts.vlm import OpenCLIPEncoder

    return OpenCLIPEncoder.from_pretrained(name, weights).to(device)


def words_of(names: Iterable[str]) -> list[str]:
    """Concept names as words: "swimming_pool", "swimming_pool-s" and "swimming_pool (3)" are "swimming pool"."""
    out = []
    for name in names:
        word = name.removesuffix(")").rpartition(" (")[0] if name.endswith(")") and name[-2].isdigit() else name
        out.append(word.removesuffix("-s").removesuffix("-c").replace("_", " ").strip())
    return out
