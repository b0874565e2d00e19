"""What the SALF-CBM benchmarks are run on: scenes with exact masks, Caltech-101, and stores of their regions."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts.activations import capture
from captum_concepts.datasets import CaptionedScenes, Scene
from captum_concepts.images import find_images
from captum_concepts.store import RegionEmbeddingStore
from captum_concepts.vlm import RegionPrompt

SIZE = 64
#: Seeds of the scenes; none of them made a scene that a bundled model was trained or tested on.
SEEDS = {"train": 510_001, "test": 510_002, "biased": 510_003}


def scenes(split: str, n: int, spurious: float = 0.0) -> tuple[CaptionedScenes, Scene]:
    """The data set and all its scenes as one batch."""
    data = CaptionedScenes(n, seed=SEEDS[split], size=SIZE, spurious=spurious)
    return data, data.stack()


def caltech(data: Path, train: int, test: int, seed: int) -> tuple[list[str], dict[str, list[Path]], dict[str, Tensor]]:
    """Classes of Caltech-101 and, by split, files and labels.

    ``train`` and ``test`` files a class, drawn without replacement; a class with fewer files than both is left out.
    "Faces" and "Faces_easy" show the same photographs, so the second is left out and no image is in both splits.
    """
    root = data / "images" / "caltech101"
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name != "Faces_easy")
    files: dict[str, list[Path]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    kept: list[str] = []
    for name in names:
        found = sorted(find_images([root / name]))
        if len(found) < train + test:
            continue
        random.Random(f"{seed} {name}").shuffle(found)
        for split, part in (("train", found[:train]), ("test", found[train : train + test])):
            files[split] += part
            labels[split] += [len(kept)] * len(part)
        kept.append(name)
    return kept, files, {split: torch.tensor(values) for split, values in labels.items()}


class CropEncoder(nn.Module):
    """ConSE for crops, in ``channels_last``: faster on a CPU."""

    def __init__(self, conse: Any) -> None:
        super().__init__()
        self.conse = conse
        self.logit_scale, self.logit_bias = conse.logit_scale, conse.logit_bias

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        return self.conse.encode_image(images.contiguous(memory_format=torch.channels_last))

    def encode_text(self, texts: list[str]) -> Tensor:
        return self.conse.encode_text(texts)


def folder(cache: Path, name: str, images: int, prompt: RegionPrompt) -> Path:
    """Where a fit on these images keeps its steps; the regions lie in ``regions-train`` below it."""
    height, width = prompt.grid
    radius = "" if prompt.radius is None else f"-r{prompt.radius:g}"
    return cache / f"{name}-{prompt.kind}-{height}x{width}{radius}-{prompt.placement}-n{images}"


def region_store(path: Path, images: Any, encoder: Any, prompt: RegionPrompt, batch_size: int) -> RegionEmbeddingStore:
    """Build the store of a fit, or open the one that is there."""
    start = time.perf_counter()
    store = RegionEmbeddingStore.build(path / "regions-train", images, encoder, prompt, batch_size=batch_size)
    print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)
    return store


@torch.no_grad()
def features(model: nn.Module, layer: str, images: Any, batch_size: int = 100) -> tuple[Tensor, Tensor]:
    """Activations ``(N, D, h, w)`` of a layer, and the model's outputs."""
    maps, outputs = [], []
    for start in range(0, len(images), batch_size):
        rows = range(start, min(start + batch_size, len(images)))
        batch = images[rows.start : rows.stop] if isinstance(images, Tensor) else torch.stack([images[i] for i in rows])
        seen = capture(model, batch, [layer])
        maps.append(seen.layers[0].clone())
        outputs.append(seen.output)
    return torch.cat(maps), torch.cat(outputs)
