"""`captum_concepts.load`: the right class for every file, and a word for the wrong ones."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import captum_concepts
from captum_concepts import ConceptExplanation, FeatureActivationMap, SpatialACV, discover_concepts
from captum_concepts.errors import ArtifactError


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def test_every_kind_comes_back(tmp_path):
    net, images = network(), torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    made = [
        FeatureActivationMap(net, "1", torch.eye(3), reference_names=["a", "b", "c"]),
        SpatialACV(net, "1").fit({"bright": images + 1, "dark": images}),
        discover_concepts(net, "1", images, n_concepts=2),
    ]
    for k, explainer in enumerate(made):
        again = captum_concepts.load(explainer.save(tmp_path / f"{k}.safetensors"), net)
        assert type(again) is type(explainer)
        assert torch.equal(again.concept_maps(images), explainer.concept_maps(images))


def test_what_is_no_explainer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*should be a saved explainer"):
        captum_concepts.load(tmp_path / "nothing", network())
    save_file({"x": torch.zeros(1)}, str(tmp_path / "plain.safetensors"))
    with pytest.raises(ArtifactError, match="does not say what it is"):
        captum_concepts.load(tmp_path / "plain.safetensors", network())
    explanation = ConceptExplanation(["a"], torch.ones(1, 1), torch.ones(1, 1, 2, 2)).save(tmp_path / "e.safetensors")
    with pytest.raises(ArtifactError, match="it is a ConceptExplanation"):
        captum_concepts.load(explanation, network())
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="cannot be read"):
        captum_concepts.load(tmp_path / "broken.safetensors", network())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="does not contain a saved SALFCBM"):
        captum_concepts.load(tmp_path / "empty", network())
