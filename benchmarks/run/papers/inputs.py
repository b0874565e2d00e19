"""Models of the papers' tables from local weights, and the words of concepts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts import demo


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
