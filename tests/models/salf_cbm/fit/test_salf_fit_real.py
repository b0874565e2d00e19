"""fit_salf_cbm on photographs, with a real backbone and a real image-text model."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from captum_concepts.images import class_folders, load_image
from captum_concepts.models.salf_cbm.fit import fit_salf_cbm
from captum_concepts.vlm import RegionPrompt

CLASSES = ("butterfly", "grand_piano", "Motorbikes")
WORDS = ["butterfly", "piano", "motorcycle", "sunflower", "flower_arrangement", "wheel", "headlight", "keyboard"]


@pytest.fixture
def real(shared_data):
    spec = importlib.util.spec_from_file_location("real_models", shared_data / "real_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_three_classes_of_caltech(real, shared_data, tmp_path):
    folders = class_folders(shared_data / "images" / "caltech101")
    chosen = [(file, k) for k, name in enumerate(CLASSES) for file in folders[name][:11]]
    images = torch.stack([load_image(file, 128) for file, _ in chosen])
    labels = torch.tensor([k for _, k in chosen])
    held_out = torch.arange(len(labels)) % 11 >= 8
    encoder = real.ConSE()
    words = [word for word in WORDS if known(encoder, word)]
    assert len(words) >= 5
    model = fit_salf_cbm(
        real.mobilenet_v2(),
        "net.features.18",
        (images[~held_out], labels[~held_out]),
        encoder,
        words,
        3,
        store_path=tmp_path,
        val_data=(images[held_out], labels[held_out]),
        prompt=RegionPrompt("crop", 2, 48),
        interpretability_cutoff=0.1,
        bottleneck={"max_epochs": 20},
    )
    assert model.metadata["accuracy"]["validation"] >= 0.75
    assert "butterfly" in model.concepts
    drops = {drop["concept"]: drop["reason"] for drop in model.metadata["vocabulary"]["report"]["drops"]}
    assert drops["sunflower"] == "absent from the data"  # no image shows one


def known(encoder, word):
    try:
        encoder.encode_text([word])
    except (KeyError, ValueError):
        return False
    return True
