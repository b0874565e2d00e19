"""How much happens inside the package for one call: layers are resolved once, and an image costs few calls."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import captum_concepts
from captum_concepts import SALFCBM, ConceptFusionMap, ConceptTranslator, FeatureActivationMap, SpatialACV, demo
from captum_concepts.activations import survey_layers
from captum_concepts.datasets import CaptionedScenes

PACKAGE = str(Path(captum_concepts.__file__).parent)
MOST = 700
MOST_FUSED = 900  # four layers, each read locally and spread over the network's own affinity
LAYERS = ["layer1", "layer2", "layer3", "layer4"]


def calls(run: Callable[[], Any]) -> Counter[str]:
    """How often each function of the package ran; comprehensions are part of their function, and what torch calls back
    for each operation of the user's network is not counted."""
    counted: Counter[str] = Counter()

    def profile(frame: Any, event: str, _argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and not code.co_name.startswith(("<", "__torch")):
            counted[code.co_qualname if hasattr(code, "co_qualname") else code.co_name] += 1

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return counted


@pytest.fixture(scope="module")
def scenes() -> torch.Tensor:
    return CaptionedScenes(8, seed=0, size=64).stack().image


@pytest.fixture(params=["FAM", "SpatialACV", "CE-FAM", "CE-FAM fused", "SALF-CBM"])
def explainer(request, scenes) -> Any:
    net = demo.load("classifier")
    torch.manual_seed(0)
    if request.param == "FAM":
        return FeatureActivationMap(net, "layer4", torch.eye(6))
    if request.param == "SpatialACV":
        return SpatialACV(net, "layer3").fit({"bright": scenes + 1}, scenes)
    if request.param == "SALF-CBM":
        return SALFCBM(net, "layer4", ["a", "b", "c"], 6, grid=(3, 3), input_size=(64, 64)).eval()
    channels = {found.name: found.channels for found in survey_layers(net, scenes[:1])}
    translator = ConceptTranslator([channels[name] for name in LAYERS], 16, hidden=(32, 32))
    bank, kind = torch.randn(3, 16), "fused" if "fused" in request.param else "auto"
    return ConceptFusionMap(net, LAYERS, translator, ["a", "b", "c"], bank, map_layer=kind)


def test_one_image_costs_few_calls(explainer, scenes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        explainer.explain(scenes[:1], target=0)  # what is found out once
        counted = calls(lambda: explainer.explain(scenes[:1], target=0))
    most = MOST_FUSED if getattr(explainer, "map_layer", None) == "fused" else MOST
    assert counted.total() <= most, counted.most_common(8)


def test_layers_are_resolved_once_for_any_batch(explainer, scenes):
    """With three images per forward pass, eight are three batches. SALF-CBM resolves its layer when it is built."""
    explainer.batch_size, expected = 3, 0 if isinstance(explainer, SALFCBM) else 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        explainer.explain(scenes[:1], target=0)
        for count in (1, 8):
            counted = calls(lambda count=count: explainer.explain(scenes[:count], target=0, top_k=2))
            resolved = sum(n for name, n in counted.items() if name in ("Layers.resolve", "resolve"))
            assert resolved == expected, count
