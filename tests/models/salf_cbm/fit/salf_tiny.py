"""A problem small enough to fit in a second: images with coloured quarters, an encoder that names colours.

Also a program: ``python salf_tiny.py FOLDER [SETTINGS]`` fits a model in FOLDER and writes it to
``FOLDER.safetensors``; tests start it to kill it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from captum_concepts.models.salf_cbm.fit import fit_salf_cbm
from captum_concepts.vlm import RegionPrompt

WORDS = ["red", "green", "blue", "yellow", "white"]
_COLOURS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 1, 1]])
PROMPT = RegionPrompt("crop", (2, 2), 4)


class Colours:
    """Embeds a picture by how much of it is of each colour."""

    logit_scale, logit_bias = 10.0, 0.0

    def __init__(self, words=WORDS):
        self.words = list(words)

    def encode_image(self, images: Tensor) -> Tensor:
        pixels = images.flatten(2).transpose(1, 2)
        likeness = (-8 * torch.cdist(pixels, _COLOURS.to(images)).square()).exp().mean(1)
        return torch.cat([likeness, 0.3 * torch.ones_like(likeness[:, :1])], 1)

    def encode_text(self, texts: list[str]) -> Tensor:
        missing = [text for text in texts if text not in self.words]
        if missing:
            raise KeyError(f"unknown words: {missing}")
        return torch.eye(6)[[WORDS.index(text) for text in texts]]


def backbone(seed: int = 0, width: int = 12) -> nn.Module:
    """A random convolution and an old classifier."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, width, 4, stride=4), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)
        ).eval()


def backbone_in_training(seed: int = 0, width: int = 12) -> nn.Module:
    """As torch hands it out, in training mode: its batch statistics are far from the data's, and it drops channels."""
    net = backbone(seed, width)
    norm = nn.BatchNorm2d(width)
    norm.running_mean.fill_(-0.4)
    norm.running_var.fill_(4.0)
    return nn.Sequential(net[0], norm, nn.Dropout(0.4), *net[1:]).train()


def images_and_labels(n: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Four quarters of random colours; the class says whether red, green or neither is in the upper left."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 5, (n, 2, 2), generator=generator)
    shade = 0.7 + 0.3 * torch.rand(n, 2, 2, 1, generator=generator)
    quarters = (_COLOURS[colours] * shade).permute(0, 3, 1, 2)
    images = F.interpolate(quarters, scale_factor=8)
    noise = 0.1 * torch.rand(images.shape, generator=generator)
    counts = (colours.flatten(1)[:, :, None] == torch.arange(2)).sum(1)
    labels = torch.where(counts.sum(1) == 0, 2, counts.argmax(1))
    return (0.9 * images + noise).clamp(0, 1), labels


def fit(path, data=None, **options):
    """:func:`fit_salf_cbm` of the small problem."""
    data = images_and_labels() if data is None else data
    settings = {"max_epochs": 12, "batch_size": 32, "lr": 1e-2, **options.pop("bottleneck", {})}
    options = {
        "prompt_batch_size": 64,
        "presence_cutoff": -1.0,
        "interpretability_cutoff": None,
        "lam": 0.01,
        "prompt": PROMPT,
        **options,
    }
    network, words = options.pop("network", None) or backbone(), options.pop("words", WORDS)
    return fit_salf_cbm(
        network, options.pop("layer", "1"), data, options.pop("encoder", None) or Colours(), words,
        options.pop("classes", 3),
        store_path=path, bottleneck=settings, **options,
    )  # fmt: skip


def state(model) -> dict[str, Tensor]:
    """What was fitted, as a plain dictionary."""
    names = ("bottleneck.weight", "head.weight", "head.bias", "concept_mean", "concept_std")
    return {name: model.state_dict()[name].clone() for name in names}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    made = fit(folder, **json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
    save_file(state(made), folder.with_suffix(".safetensors"))
    folder.with_suffix(".json").write_text(json.dumps(made.metadata))
