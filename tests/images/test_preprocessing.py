"""What models want to see, against the metadata of the libraries themselves; nothing is downloaded."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import torchvision
from torch import nn

from captum_concepts.errors import InputError, InputWarning
from captum_concepts.images import Preprocessing, inputs_for, open_images, preprocessing_of

TORCHVISION = torchvision.models.list_models(module=torchvision.models)


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_model_of_torchvision(name: str):
    weights = torchvision.models.get_model_weights(name)
    for one in [name, *weights]:
        theirs = (weights.DEFAULT if one == name else one).transforms()
        ours = preprocessing_of(one)
        assert ours.size == (theirs.crop_size[0],) * 2
        assert (ours.mean, ours.std) == (tuple(theirs.mean), tuple(theirs.std))
        assert ours.interpolation == theirs.interpolation.value
        assert ours.crop == pytest.approx(theirs.crop_size[0] / theirs.resize_size[0])
        assert str(weights.DEFAULT if one == name else one) in str(ours)


SMALL = [
    "resnet18",
    "efficientnet_b3",
    "inception_v3",
    "googlenet",
    "vit_b_16",
    "swin_v2_t",
    "densenet121",
    "squeezenet1_1",
    "mobilenet_v2",  # two sets of weights, of one size
]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("classes", [1000, 7])
def test_models_of_torchvision_are_recognized(name: str, classes: int):
    options = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=classes, **options)
    assert preprocessing_of(model) == preprocessing_of(name)
    assert preprocessing_of(nn.DataParallel(model)) == preprocessing_of(name)


def test_every_model_of_timm():
    for name in timm.list_models():
        config = timm.get_pretrained_cfg(name)
        if config is None:  # registered by somebody else
            continue
        theirs = timm.data.resolve_data_config(pretrained_cfg=config.to_dict())
        ours = preprocessing_of(f"timm/{name}")
        assert ours.size == theirs["input_size"][-2:], name
        assert (ours.mean, ours.std) == (theirs["mean"], theirs["std"]), name
        assert (ours.interpolation, ours.crop) == (theirs["interpolation"], theirs["crop_pct"]), name


def test_models_of_timm():
    model = timm.create_model("efficientnet_b1")
    assert preprocessing_of(model).size == (240, 240)
    assert "timm efficientnet_b1" in str(preprocessing_of(model))
    small = {"img_size": 64, "depth": 1, "embed_dim": 12, "num_heads": 2}
    assert preprocessing_of(timm.create_model("vit_tiny_patch16_224", **small)).size == (64, 64)
    gray = preprocessing_of(timm.create_model("resnet18", in_chans=1))
    assert gray.mean == (pytest.approx(0.449),)
    assert gray(torch.ones(2, 1, 4, 4)).shape == (2, 1, 4, 4)


VIT = {
    "do_resize": True, "size": {"height": 224, "width": 224}, "resample": 2, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip
CLIP = {
    "size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224},
    "resample": 3, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
}  # fmt: skip
CONVNEXT = {
    "size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 3, "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip
EFFICIENTNET = {
    "size": {"height": 600, "width": 600}, "rescale_factor": 1 / 127.5, "rescale_offset": True,
    "image_mean": [0.0] * 3, "image_std": [1.0] * 3,
}  # fmt: skip


class TestHuggingFace:
    def test_configurations(self):
        vit, clip = preprocessing_of(VIT), preprocessing_of(CLIP)
        assert (vit.size, vit.resize, vit.interpolation, vit.mean) == ((224, 224), "squash", "bilinear", (0.5,) * 3)
        assert (clip.size, clip.resize, clip.crop, clip.interpolation) == ((224, 224), "crop", 1.0, "bicubic")
        assert preprocessing_of(CONVNEXT).crop == 0.875
        assert preprocessing_of({**CONVNEXT, "size": {"shortest_edge": 384}}).resize == "squash"
        assert preprocessing_of({**VIT, "size": [192, 256]}).size == (192, 256)
        assert preprocessing_of({**VIT, "size": 192}).size == (192, 192)
        beit = {**VIT, "size": {"height": 256, "width": 256}, "do_center_crop": True, "crop_size": 224}
        assert (preprocessing_of(beit).size, preprocessing_of(beit).crop) == ((224, 224), 0.875)
        white = preprocessing_of(EFFICIENTNET)(torch.ones(3, 2, 2))
        assert torch.allclose(white, torch.ones(3, 2, 2))
        assert torch.allclose(preprocessing_of(EFFICIENTNET)(torch.zeros(3, 2, 2)), -torch.ones(3, 2, 2))
        plain = preprocessing_of({**VIT, "do_normalize": False})
        assert (plain.mean, plain.std) == ((0.0,), (1.0,))

    def test_from_the_folder_of_a_model(self, tmp_path):
        class Config:
            _name_or_path = str(tmp_path)

        class Model(nn.Module):
            config = Config()

        assert preprocessing_of(Model()) is None
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(VIT))
        assert preprocessing_of(Model()).size == (224, 224)


def test_open_clip():
    import open_clip

    model = open_clip.create_model("RN50", pretrained=None)
    found = preprocessing_of(model)
    assert (found.size, found.mean[0], found.interpolation) == ((224, 224), 0.48145466, "bicubic")


def test_nothing_known():
    assert preprocessing_of(nn.Linear(2, 2)) is None
    assert preprocessing_of(torch.sin) is None
    with pytest.raises(InputError, match="resnet1"):
        preprocessing_of("resnet1")


def test_reading_with_it():
    p = Preprocessing((4, 6), (0.5,) * 3, (0.25,) * 3, "bilinear", 0.5)
    source = open_images(torch.rand(2, 3, 16, 24), preprocessing=p)
    assert source[0].shape == (3, 4, 6)
    assert (source.reading.interpolation, source.reading.crop) == ("bilinear", 0.5)
    assert torch.allclose(p.undo(p(source[0])), source[0], atol=1e-6)
    with pytest.raises(InputError, match="4 channels"):
        p(torch.ones(1, 4, 2, 2))


class TestInputsForAModel:
    model = torchvision.models.squeezenet1_1()

    def test_what_torchvision_would_feed_it(self, tmp_path):
        from PIL import Image

        Image.effect_noise((30, 20), 40).convert("RGB").resize((300, 200)).save(tmp_path / "a.png")
        theirs = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.transforms()(Image.open(tmp_path / "a.png"))
        source = inputs_for(self.model, tmp_path / "a.png")
        assert source[0].shape == theirs.shape
        assert (source[0] - theirs).abs().mean() < 0.03
        assert "SqueezeNet1_1_Weights" in str(source.preprocessing)

    def test_float_tensors_are_prepared_already(self):
        images = torch.randn(2, 3, 50, 40)
        assert torch.equal(torch.stack(list(inputs_for(self.model, images))), images)
        assert torch.equal(torch.stack(list(inputs_for(self.model, list(images), transform=lambda x: x * 0))), images)
        assert inputs_for(self.model, (images * 255).to(torch.uint8))[0].shape == (3, 224, 224)
        assert inputs_for(self.model, (images * 255).to(torch.uint8), size=64)[0].min() < -1
        gray = (images[:, :1] * 255).to(torch.uint8)
        assert inputs_for(self.model, gray)[0].shape == (3, 224, 224)

    def test_models_that_nothing_is_known_of(self):
        from PIL import Image

        gray = nn.Sequential(nn.Conv2d(1, 2, 3))
        for given in ([Image.new("RGB", (10, 20), (255, 255, 255))], torch.full((1, 1, 9, 9), 255).byte()):
            with pytest.warns(
                InputWarning,
                match=r"of Sequential is unknown.* 224 x 224 pixels in \[0, 1\]; to change this, pass .*size=",
            ):
                source = inputs_for(gray, given)
            assert source[0].shape == (1, 224, 224)
            assert source[0].unique().tolist() == [1.0]
        source = inputs_for(gray, torch.ones(1, 1, 9, 9))  # prepared: nothing is read, and nobody warned
        assert source[0].unique().tolist() == [1.0]
        blocks = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, 2, 3))
        assert inputs_for(blocks, [Image.new("RGB", (8, 8))], size=8)[0].shape == (3, 8, 8)
        five = nn.Sequential(nn.Conv2d(5, 2, 3))
        assert inputs_for(five, torch.zeros(1, 5, 8, 8))[0].shape == (5, 8, 8)
        made = inputs_for(gray, [Image.new("L", (4, 4))], transform=lambda image: torch.ones(1, 2, 2))
        assert made[0].shape == (1, 2, 2)
