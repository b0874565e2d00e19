"""A SALFCBM that travels: without its backbone's object, as a program without this package, and from older files."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import open_clip
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from salf_networks import CONCEPTS, ConvNet, conv_model, pictures, standardised, token_model
from torch import nn

from captum_concepts.errors import ArtifactError, InputError
from captum_concepts.images import Preprocessing
from captum_concepts.models.salf_cbm import SALFCBM


def without_head():
    net = torchvision.models.resnet18(weights=None)
    net.fc = nn.Identity()
    return net


def with_other_head():
    net = torchvision.models.squeezenet1_1(weights=None)
    net.classifier[1] = nn.Conv2d(512, 7, 1)
    return net


BACKBONES = {
    "torchvision": (lambda: torchvision.models.mobilenet_v3_small(weights=None, num_classes=5), "features"),
    "torchvision without head": (without_head, "layer4"),
    "torchvision with another head": (with_other_head, "features"),
    "timm": (lambda: timm.create_model("resnet10t", num_classes=3), "layer4"),
    "timm, four channels": (lambda: timm.create_model("resnet10t", num_classes=0, in_chans=4), "layer3"),
    "timm, another size": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=2), "blocks.5"),
    "open_clip": (lambda: open_clip.create_model("ViT-S-32-alt").visual, "transformer.resblocks.3"),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_librarys_backbone_needs_no_object(name, tmp_path):
    make, layer = BACKBONES[name]
    torch.manual_seed(0)
    net = make()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    model = standardised(SALFCBM(net, layer, CONCEPTS, 3))
    model.save_pretrained(tmp_path)
    random = torch.get_rng_state()
    again = SALFCBM.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), random)
    assert type(again.backbone) is type(net)
    channels = next(m.in_channels for m in net.modules() if isinstance(m, nn.Conv2d))
    x = torch.rand(2, channels, *model._reading.image_size, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again(x), model(x))
    assert "from_pretrained" in (tmp_path / "README.md").read_text()
    assert "backbone=backbone" not in (tmp_path / "README.md").read_text()
    smaller = tmp_path / "smaller"
    model.save_pretrained(smaller, save_backbone=False)
    assert (smaller / "model.safetensors").stat().st_size < 200_000
    with pytest.raises(InputError, match="its weights were not saved"):
        SALFCBM.from_pretrained(smaller)


def test_a_changed_network_is_not_mistaken_for_the_librarys(tmp_path):
    net = torchvision.models.resnet18(weights=None)
    net.relu = nn.SiLU()  # the same weights, another function
    model = standardised(SALFCBM(net, "layer4", CONCEPTS, 3, input_size=64))
    model.save_pretrained(tmp_path)
    assert "recipe" not in json.loads((tmp_path / "config.json").read_text())["backbone"]
    with pytest.raises(InputError, match="does not describe how to build it"):
        SALFCBM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "recipe",
    [
        {"library": "os", "name": "system"},
        {"library": "torchvision", "name": "resnet18; rm"},
        {"library": "torchvision", "name": "no_such_model"},
        {"library": "timm", "name": "resnet10t", "in_chans": -1},
        {"library": "timm", "name": "resnet10t", "identity": ["nowhere.fc"]},
        {"library": "timm", "name": "resnet10t", "pretrained": True},
        ["resnet18"],
    ],
    ids=str,
)
def test_a_forged_recipe(recipe, tmp_path):
    from captum_concepts.models.salf_cbm.recipes import build_backbone

    with pytest.raises(ArtifactError, match=r"recipe|cannot be built"):
        build_backbone(recipe, tmp_path, {})


EXPORTED = {
    "convolutions": lambda: conv_model(input_size=(32, 24), preprocessing=Preprocessing((32, 24))),
    "tokens": lambda: token_model(cls_token=True, class_names=["a", "b", "c"]),
    "two layers": lambda: conv_model(hidden=6, input_size=(32, 24)),
}


@pytest.mark.parametrize("kind", EXPORTED)
def test_an_exported_program_says_what_the_model_says(kind, tmp_path):
    model = EXPORTED[kind]()
    extra = {"captum_concepts.json": ""}
    program = torch.export.load(model.export(tmp_path / "model.pt2"), extra_files=extra).module()
    x, target = pictures(5, *model._reading.image_size, seed=3), torch.tensor([0, 1, 2, 1, 0])
    found, predicted = program(x, target), program(x, torch.full((5,), -1))["contributions"]
    with torch.no_grad():
        expected = {
            "logits": model(x),
            "concept_maps": model.concept_maps(x),
            "activations": model.scores(x),
            "contributions": model.contributions(x, target),
        }
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(predicted, model.contributions(x), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(program(x[:1], target[:1])["logits"], model(x[:1]), atol=1e-5, rtol=1e-4)
    names = json.loads(extra["captum_concepts.json"])
    assert names["concepts"] == model.concepts
    assert names["class_names"] == model.class_names
    assert names["image_size"] == list(model._reading.image_size)


def test_an_exported_program_needs_neither_package_nor_library(tmp_path):
    net = torchvision.models.squeezenet1_1(weights=None).eval()
    model = standardised(SALFCBM(net, "features", CONCEPTS, 3, input_size=64))
    x = pictures(3, 64, 64)
    save_file({"x": x}, tmp_path / "x.safetensors")
    script = """
import sys, torch
from safetensors.torch import load_file, save_file
program = torch.export.load(sys.argv[1]).module()
found = program(load_file("x.safetensors")["x"], torch.tensor([0, -1, 2]))
assert not [name for name in sys.modules if name.startswith(("captum", "timm", "torchvision"))]
save_file({k: v.detach().contiguous() for k, v in found.items()}, "y.safetensors")
"""
    path = model.export(tmp_path / "model.pt2")
    run = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    found = load_file(tmp_path / "y.safetensors")
    torch.testing.assert_close(found["logits"], model(x).detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["concept_maps"], model.concept_maps(x), atol=1e-5, rtol=1e-4)


def test_export_refuses_what_it_cannot_trace(tmp_path):
    class Branching(ConvNet):
        def forward(self, x):
            return super().forward(x if float(x.mean()) > 0.5 else -x)

    model = standardised(SALFCBM(Branching().eval(), "body", CONCEPTS, 3, input_size=32))
    with pytest.raises(InputError, match=r"torch\.export cannot trace the backbone Branching"):
        model.export(tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
    unseen = standardised(SALFCBM(ConvNet().eval(), "body", CONCEPTS, 3, feature_dim=8))
    with pytest.raises(InputError, match="pass size="):
        unseen.export(tmp_path / "model.pt2")
    assert unseen.export(tmp_path / "model.pt2", size=32).is_file()


def test_files_of_format_1_are_read(tmp_path):
    """Written as version 1 wrote them: fewer keys, and a digest of those."""
    model, x = conv_model(metadata={"accuracy": 0.5}), pictures()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("hidden", "multi_label", "preprocessing", "batch_size"):
        del config[key]
    config["format"] = "captum_concepts.SALFCBM/1"
    old = [
        "layer", "concepts", "num_classes", "grid", "cls_token", "freeze_backbone", "layout", "prefix_tokens",
        "feature_dim", "input_size", "backbone",
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps({k: config[k] for k in old}, sort_keys=True).encode()).hexdigest()[:32]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    header = {"format": "captum_concepts.SALFCBM/1", "info": json.dumps({"config": digest})}
    save_file(tensors, tmp_path / "model.safetensors", metadata=header)
    again = SALFCBM.from_pretrained(tmp_path, backbone=model.backbone)
    assert torch.equal(again(x), model(x))
    assert (again.hidden, again.multi_label, again.preprocessing) == (None, False, None)
    assert again.metadata == {"accuracy": 0.5}


def test_all_options_come_back(tmp_path):
    size = Preprocessing((32, 24), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), source="test")
    model = conv_model(hidden=6, multi_label=True, preprocessing=size, batch_size=3)
    model.save_pretrained(tmp_path)
    again, x = SALFCBM.from_pretrained(tmp_path, backbone=model.backbone), pictures(5)
    assert (again.hidden, again.multi_label, again.preprocessing, again.batch_size) == (6, True, size, 3)
    assert torch.equal(again(x), model(x))
    explanation = again.explain(x, top_k=2)
    chosen = model(x).max(1)
    torch.testing.assert_close(explanation.target_probability, chosen.values.sigmoid().detach())


def test_the_card_shows_rules_limits_and_pictures(tmp_path):
    model = conv_model()
    with torch.no_grad():
        model.head.weight[1] = torch.tensor([0.0, -2.0, 0.5, 0.0, 1.0])
    model.save_pretrained(tmp_path, images=pictures(3))
    card = (tmp_path / "README.md").read_text()
    assert "- car: wheels -2.00, windows +1.00, grass +0.50" in card
    assert "## Limits" in card
    assert "![" in card
    assert (tmp_path / "examples.png").read_bytes()[:4] == b"\x89PNG"
