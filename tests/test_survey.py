"""Finding the layers that can be explained."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision

from captum_concepts.activations import spatial_activations
from captum_concepts.activations.survey import suggest_layer, survey_layers
from captum_concepts.errors import InputError


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


def test_a_plain_function_has_no_layers_to_survey():
    with pytest.raises(InputError, match="plain function"):
        survey_layers(lambda x: x, torch.rand(1, 3, 8, 8))
