"""What SALF-CBM costs: a forward pass and an explanation against the backbone alone."""

from __future__ import annotations

import json
from typing import Any

import torch
import torchvision

from benchmarks.record import RESULTS, median_times
from captum_concepts.models.salf_cbm import SALFCBM

CONCEPTS, CLASSES = 500, 1000


def inference(repeats: int, batch: int = 4, size: int = 224) -> dict[str, Any]:
    """ResNet-50 and MobileNetV2 (random weights; time does not depend on them): seconds a batch, and ratios.

    The backbone runs with its own head, as it is used; ``explain`` gives the maps of the five leading concepts,
    contributions and the prediction.
    """
    found = {}
    x = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    for name, make, layer in (
        ("ResNet-50", torchvision.models.resnet50, "layer4"),
        ("MobileNetV2", torchvision.models.mobilenet_v2, "features"),
    ):
        backbone = make(weights=None).eval()
        model = SALFCBM(backbone, layer, [f"concept {i}" for i in range(CONCEPTS)], CLASSES, input_size=size).eval()

        @torch.no_grad()
        def run(function: Any) -> Any:
            return function(x)

        times = median_times(
            {
                "backbone": lambda f=backbone: run(f),
                "forward": lambda f=model: run(f),
                "explain": lambda f=model: run(f.explain),
            },
            repeats=repeats,
        )
        found[name] = {
            "seconds": times,
            "forward_over_backbone": times["forward"] / times["backbone"],
            "explain_over_backbone": times["explain"] / times["backbone"],
        }
        print(name, found[name], flush=True)
    return found


def recorded() -> dict[str, Any]:
    """The other ratios, which have benchmarks of their own: embedding, its size on disk, an epoch of the bottleneck."""
    found = {}
    for name in ("region_store", "salf_epoch"):
        path = RESULTS / f"{name}.json"
        if path.exists():
            found[name] = json.loads(path.read_text())["rows"]
    return found
