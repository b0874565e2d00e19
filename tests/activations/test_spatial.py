"""spatial_activations: gradients as maps, and a useful refusal where no position reaches the output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from captum_concepts.activations import gradients_enabled, spatial_activations
from captum_concepts.errors import InputWarning, LayerError


def timm_vit(**settings) -> nn.Module:
    import timm

    torch.manual_seed(0)
    small = {"img_size": 32, "embed_dim": 12, "depth": 3, "num_heads": 2, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", **small, **settings).eval()


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(32, 16, 3, 2, 24, 48, num_classes=4).eval()
    nn.init.normal_(model.heads.head.weight)  # zero at first
    return model


def open_clip_vit() -> nn.Module:
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=3, width=32, head_width=16, patch_size=16, image_size=32)
    return CustomTextCLIP(8, vision, CLIPTextCfg(width=16, heads=2, layers=1, vocab_size=20)).visual.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("build", "layer", "instead"),
    [
        (timm_vit, "blocks.2", "blocks.1"),
        (timm_vit, "blocks.2.mlp", "blocks.1.mlp"),
        (timm_vit, "norm", "blocks.2.norm1"),
        (torchvision_vit, "encoder", "encoder.layers.encoder_layer_1"),
        (open_clip_vit, "transformer.resblocks.2", "transformer.resblocks.1"),
    ],
)
def test_the_last_block_that_only_cls_leaves_names_the_layer_to_use(build, layer, instead, images) -> None:
    model = build()
    for given in (layer, model.get_submodule(layer)):
        seen = spatial_activations(model, images, [given], gradient=True)
        with pytest.raises(LayerError, match=rf"no position of layer '{layer}' .*use layer '{instead}' instead"):
            seen.gradients(seen.output[:, 1])
    usable = spatial_activations(model, images, [instead], gradient=True)
    assert usable.gradients(usable.output[:, 1])[0].flatten(1).any(1).all()


def test_an_average_of_the_patches_reaches_the_output(images) -> None:
    model = timm_vit(global_pool="avg", class_token=False)
    seen = spatial_activations(model, images, ["blocks.2"], gradient=True)
    assert seen.gradients(seen.output[:, 1])[0].any()


def test_a_plain_function_gets_the_refusal_without_a_name(images) -> None:
    model = timm_vit()
    seen = spatial_activations(lambda x: model(x), images, [model.blocks[2]], gradient=True, prefix_tokens=1)
    with pytest.raises(LayerError, match="use an earlier layer instead"):
        seen.gradients(seen.output[:, 1])


def test_the_search_is_not_repeated_inside_itself(images) -> None:
    """Many layers that do not reach the output: each is tried once, not once for every later one.

    The sum of squares of what a LayerNorm gives is constant; the search must not ask for its gradient.
    """

    class Tail(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = timm_vit()
            self.more = nn.Sequential(*[type(self.vit.norm)(12) for _ in range(8)])
            self.forwards = 0

        def forward(self, x: Tensor) -> Tensor:
            self.forwards += 1
            return self.more(self.vit.forward_features(x))[:, 0]

    model = Tail()
    seen = spatial_activations(model, images, ["more.7"], gradient=True)
    with pytest.raises(LayerError, match=r"use layer 'vit\.blocks\.2\.norm1' instead"):
        seen.gradients(seen.output[:, 1])
    assert model.forwards < 25  # two for each of the layers: one tries the order of its tokens


def test_gradients_equal_autograd_in_the_layers_own_layout(images) -> None:
    model = timm_vit()
    seen = spatial_activations(model, images, ["blocks.0", "patch_embed"], gradient=True)
    wanted = torch.autograd.grad(seen.output[:, 2].sum(), seen.raw, retain_graph=True)
    gradients = seen.gradients(seen.output[:, 2])
    torch.testing.assert_close(gradients[0], wanted[0][:, 1:].transpose(1, 2).unflatten(2, (2, 2)))
    torch.testing.assert_close(gradients[1], wanted[1].transpose(1, 2).unflatten(2, (2, 2)))


def test_under_inference_mode(images) -> None:
    model = timm_vit()
    with torch.inference_mode():
        seen = spatial_activations(model, images, ["blocks.0"], gradient=True)
        with gradients_enabled():
            assert seen.gradients(seen.output[:, 0])[0].any()


class Side(nn.Module):
    """A layer beside the way to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.side = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.side(x)
        return self.conv(x).mean((2, 3))


def test_a_layer_beside_the_way_is_refused(images) -> None:
    seen = spatial_activations(Side(), images, ["conv", "side"], gradient=True)
    with pytest.raises(LayerError, match="does not depend on layer 'side'"):
        seen.gradients(seen.output[:, 0])
    alone = spatial_activations(Side(), images, ["side"], gradient=True)
    with pytest.raises(LayerError, match="does not depend on layer 'side'"):
        alone.gradients(alone.output[:, 0])


def test_a_dead_layer_is_warned_about(images) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    nn.init.constant_(net[0].bias, -100.0)
    seen = spatial_activations(net, images, ["0"], gradient=True)
    with pytest.warns(InputWarning, match="gradient at layer '0' is zero"):
        assert not seen.gradients(seen.output[:, 0])[0].any()
