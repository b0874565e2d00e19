"""Networks of `transformers` from small random configurations: blocks return tuples, outputs are no tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_concepts import FeatureActivationMap
from captum_concepts.activations import Layers
from captum_concepts.activations.survey import suggest_layer, suggest_stages, survey_layers

transformers = pytest.importorskip("transformers")

WIDTH: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
MLP: dict[str, Any] = {**WIDTH, "intermediate_size": 48}
IMAGE: dict[str, Any] = {"image_size": (64, 96), "patch_size": 16}
SQUARE: dict[str, Any] = {"image_size": 64, "patch_size": 16}
SWIN: dict[str, Any] = {
    "image_size": 64,
    "embed_dim": 12,
    "depths": [1, 1, 1],
    "num_heads": [2] * 3,
    "window_size": 4,
}
HIERA: dict[str, Any] = {
    "embed_dim": 16,
    "image_size": [128, 128],
    "depths": [1, 1, 2, 1],
    "num_heads": [1, 2, 4, 8],
}
STAGES: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}


class Patchified(nn.Module):
    """SigLIP 2 of any resolution takes patches, their mask and their grid instead of images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        n, _, height, width = images.shape
        patches = images.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        mask = torch.ones(patches.shape[:2], dtype=torch.long)
        return self.network(patches, mask, torch.tensor([[height // 16, width // 16]] * n))


def build(kind: str, config: dict[str, Any], network: str = "") -> nn.Module:
    network = network or f"{kind}ForImageClassification"
    if not hasattr(transformers, network):
        pytest.skip(f"this version of transformers has no {network}")
    torch.manual_seed(0)
    found = getattr(transformers, network)(getattr(transformers, f"{kind}Config")(**config))
    return (Patchified(found) if kind == "Siglip2Vision" else found).eval()


#: Name -> how it is built, the layer that is suggested, its grid, prefix tokens.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, int], int]] = {
    "ViT": (lambda: build("ViT", {**MLP, **IMAGE}), "vit.layers.1", (4, 6), 1),
    "DINOv2": (lambda: build("Dinov2", {**WIDTH, **SQUARE}, "Dinov2Model"), "encoder.layer.1", (4, 6), 1),
    "DINOv2 with registers": (
        lambda: build("Dinov2WithRegisters", {**WIDTH, **SQUARE}),
        "dinov2_with_registers.encoder.layer.2",
        (4, 6),
        5,
    ),
    "DINOv3": (
        lambda: build("DINOv3ViT", {**MLP, **SQUARE, "num_register_tokens": 4}, "DINOv3ViTModel"),
        "model.layer.1",
        (4, 6),
        5,
    ),
    "Swin": (lambda: build("Swin", SWIN), "swin.encoder.layers.2", (4, 6), 0),
    "BEiT": (lambda: build("Beit", {**MLP, **IMAGE}), "beit.layers.2", (4, 6), 1),
    "SigLIP 2": (
        lambda: build("SiglipVision", {**MLP, "image_size": 64, "patch_size": 16}, "SiglipVisionModel"),
        "",
        (4, 4),
        0,
    ),
    "SigLIP 2, any resolution": (
        lambda: build("Siglip2Vision", {**MLP, "num_patches": 16, "patch_size": 16}, "Siglip2VisionModel"),
        "",
        (4, 6),
        0,
    ),
    "CLIP": (
        lambda: build(
            "CLIPVision",
            {**MLP, "image_size": 64, "patch_size": 16, "projection_dim": 8},
            "CLIPVisionModelWithProjection",
        ),
        "vision_model.encoder.layers.1",
        (4, 4),
        1,
    ),
    "ConvNeXt V2": (lambda: build("ConvNextV2", STAGES), "convnextv2.encoder.stages.3", (2, 3), 0),
    "ResNet": (lambda: build("ResNet", {**STAGES, "embedding_size": 8}), "resnet.encoder.stages.3", (2, 3), 0),
    "Hiera": (
        lambda: build(
            "Hiera", {"embed_dim": 16, "image_size": [128, 128], "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]}
        ),
        "hiera.encoder.stages.3",
        (4, 4),
        0,
    ),
    "Mask2Former's backbone": (
        lambda: build("Swin", {**SWIN, "out_features": ["stage1", "stage2", "stage3"]}, "SwinBackbone"),
        "swin.encoder.layers.2.blocks.0",
        (4, 6),
        0,
    ),
}


def images_for(name: str) -> Tensor:
    size = {"SigLIP 2": (64, 64), "CLIP": (64, 64), "Hiera": (128, 128)}.get(name, (64, 96))
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_last_block_is_suggested_and_read(name):
    make, layer, grid, prefix = NETWORKS[name]
    model, images = make(), images_for(name)
    suggested = suggest_layer(model, images)
    assert not layer or suggested == layer
    surveyed = {found.name: found for found in survey_layers(model, images)}
    assert surveyed[suggested].layout.grid == grid
    assert surveyed[suggested].layout.prefix_tokens == prefix
    seen = Layers.resolve(model, suggested).run(images)
    assert seen.layouts[0] == surveyed[suggested].layout
    assert seen.maps[0].shape == (2, surveyed[suggested].channels, *grid)
    stages = suggest_stages(model, images)
    assert stages[-1] == suggested
    assert len(stages) >= 2


@pytest.mark.parametrize("name", NETWORKS)
def test_a_bright_corner_is_found_in_its_cell(name):
    """In the first block with a grid, the cell that changes with a corner of the image is that corner's."""
    model, images = NETWORKS[name][0](), images_for(name)[:1]
    layer = suggest_stages(model, images)[0]
    layers = Layers.resolve(model, layer)
    h, w = layers.run(images).layouts[0].grid
    for i, j in ((0, 0), (0, w - 1), (h - 1, 0), (h - 1, w - 1)):
        changed = images.clone()
        height, width = images.shape[2] // h, images.shape[3] // w
        changed[:, :, i * height : (i + 1) * height, j * width : (j + 1) * width] += 3
        change = (layers.run(changed).maps[0] - layers.run(images).maps[0])[0].norm(dim=0)
        at = divmod(int(change.argmax()), w)
        overlap = 1 if layers.run(images).layouts[0].kind == "NCHW" else 0  # of the convolutions' kernels
        assert abs(at[0] - i) <= overlap
        assert abs(at[1] - j) <= overlap


@pytest.mark.parametrize("name", ["ViT", "DINOv2", "Swin", "CLIP", "ConvNeXt V2"])
def test_methods_need_no_wrapper(name):
    """The output is a ModelOutput: logits, image_embeds or pooler_output are read off it."""
    model, images = NETWORKS[name][0](), images_for(name)
    with torch.no_grad():
        returned = model(images)
    key = next(key for key in ("logits", "image_embeds", "pooler_output") if key in returned)
    layers = Layers.resolve(model, suggest_layer(model, images))
    assert torch.equal(layers.run(images).output, returned[key])
    maps = FeatureActivationMap(model, layers.names[0], torch.randn(3, returned[key].shape[1])).attribute(
        images, target=1
    )
    assert maps.isfinite().all()
    assert maps.abs().sum() > 0


def test_masks_of_several_outputs_are_asked_about():
    """Mask2Former has class logits and mask logits. Which is meant cannot be known; the layers are found anyway."""
    if not hasattr(transformers, "Mask2FormerForUniversalSegmentation"):
        pytest.skip("this version of transformers has no Mask2Former")
    four = {"depths": [1] * 4, "num_heads": [2] * 4, "out_features": [f"stage{k}" for k in range(1, 5)]}
    backbone = transformers.SwinConfig(**SWIN | four)
    small = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "dim_feedforward": 32}
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, **small, decoder_layers=2, encoder_layers=1, encoder_feedforward_dim=32,
        num_attention_heads=2, num_queries=5,
    )  # fmt: skip
    torch.manual_seed(0)
    model, images = transformers.Mask2FormerForUniversalSegmentation(config).eval(), torch.rand(1, 3, 64, 64)
    surveyed = {found.name for found in survey_layers(model, images)}
    assert any(
        name.startswith("model.pixel_level_module.encoder.") and name.endswith("layers.3.blocks.0") for name in surveyed
    )
    suggest_layer(model, images)
