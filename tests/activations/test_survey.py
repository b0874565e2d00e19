"""Finding the layers that can be explained."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
import torchvision

from captum_concepts.activations import spatial_activations
from captum_concepts.activations.survey import suggest_layer, suggest_stages, survey_layers
from captum_concepts.errors import InputError, LayerError


def test_every_surveyed_layer_can_be_captured():
    model = torchvision.models.resnet18().eval()
    images = torch.rand(1, 3, 64, 64)
    found = survey_layers(model, images)
    assert {"conv1", "layer1", "layer4.1.conv2"} <= {layer.name for layer in found}
    assert "layer1.0.relu" not in {layer.name for layer in found}  # runs twice
    for layer in found[::7]:
        seen = spatial_activations(model, images, [layer.name])
        assert seen.maps[0].shape == (1, layer.channels, *layer.layout.grid)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("build", "size", "expected"),
    [
        (torchvision.models.resnet18, 96, "layer4"),
        (torchvision.models.mobilenet_v2, 96, "features"),
        (lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3), 64, "blocks.1"),
    ],
)
def test_the_suggestion_is_the_last_layer_that_reaches_the_output(build, size, expected):
    assert suggest_layer(build().eval(), torch.rand(2, 3, size, size)) == expected


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (torchvision.models.resnet18, ["layer1", "layer2", "layer3", "layer4"]),
        (torchvision.models.mobilenet_v2, ["features.3", "features.6", "features.13", "features"]),
        (lambda: timm.create_model("convnextv2_atto"), ["stem", "stages.1", "stages.2", "norm_pre"]),
        (
            lambda: timm.create_model("vit_tiny_patch16_224", img_size=96, depth=8),
            ["blocks.1", "blocks.3", "blocks.5", "blocks.6"],
        ),
    ],
)
def test_stages_are_blocks_from_fine_to_coarse(build, expected):
    assert suggest_stages(build().eval(), torch.rand(1, 3, 96, 96)) == expected


def test_a_layer_whose_first_dimension_is_no_batch_is_no_stage():
    """The bias of Swin V2's attention, (1, 15, 15, C): with one example it would look like a grid."""
    model = torchvision.models.swin_transformer.SwinTransformer(
        [4, 4], 8, [1, 1], [1, 2], [4, 4], block=torchvision.models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=torchvision.models.swin_transformer.PatchMergingV2,
    )  # fmt: skip
    found = [layer.name for layer in survey_layers(model.eval(), torch.rand(1, 3, 64, 64))]
    assert found
    assert not [name for name in found if "cpb_mlp" in name]


def test_a_plain_function_has_no_layers_to_survey():
    with pytest.raises(InputError, match="plain function"):
        survey_layers(lambda x: x, torch.rand(1, 3, 8, 8))


def test_what_cannot_be_surveyed_is_said():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(2)).eval()
    images = torch.rand(1, 3, 8, 8)
    net(images)
    with pytest.raises(InputError, match=r"forward_func must be a torch\.nn\.Module or a function .*got str"):
        suggest_layer("resnet50", images)
    with pytest.raises(InputError, match="does not take images of 2 x 2 pixels"):
        suggest_layer(net, images[:, :, :2, :2])
    with pytest.raises(InputError, match="on device cpu, but the model is on meta"):
        suggest_layer(net.to("meta"), images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's advice
        traced = torch.jit.trace(torch.nn.Conv2d(3, 4, 3), images)
    with pytest.raises(LayerError, match=r"torch\.jit model"):
        suggest_layer(traced, images)


def test_a_compiled_model_is_not_compiled_again():
    """It was traced with the hooks of the survey."""
    graphs = []

    def backend(graph, _examples):
        graphs.append(graph)
        return graph.forward

    parts = [torch.nn.Conv2d(3, 4, 3), torch.nn.Tanh(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    net = torch.nn.Sequential(*parts).eval()
    compiled, images = torch.compile(net, backend=backend), torch.rand(2, 3, 12, 12)
    compiled(images)
    assert suggest_layer(compiled, images) == "1"
    assert len(graphs) == 1
