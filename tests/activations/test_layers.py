"""Layers: names are resolved once and travel as one value."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_concepts import SALFCBM
from captum_concepts.activations import Layers, gradients_enabled, read_layer, survey_layers
from captum_concepts.activations.layers import any_reading
from captum_concepts.errors import InputError, LayerError, LayoutError


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(inplace=True))
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))


def test_names_modules_and_one_layer_alone(net) -> None:
    layers = Layers.resolve(net, ["1.0", net[0]])
    assert layers.names == ("1.0", "0")
    assert layers.modules == (net[1][0], net[0])
    assert layers.model is net
    assert len(layers) == 2
    assert [one.names for one in layers] == [("1.0",), ("0",)]
    assert layers[1].modules == (net[0],)
    assert Layers.resolve(net, "1").modules == Layers.resolve(net, net[1]).modules == (net[1],)  # one, not its children
    result = layers.run(torch.rand(2, 3, 16, 20))
    assert [tuple(maps.shape) for maps in result.maps] == [(2, 6, 5, 7), (2, 4, 7, 9)]
    assert result.order == (1, 0)


def test_options_are_checked_when_resolved(net) -> None:
    with pytest.raises(InputError, match="layout must be one of"):
        Layers.resolve(net, "0", layout="nchw")
    for number in (-1, 1.5, "1", True, torch.ones(2)):
        with pytest.raises(InputError, match="prefix_tokens must be 0 or more, as an integer, or None"):
            Layers.resolve(net, "0", prefix_tokens=number)
    with pytest.raises(LayerError, match="no layer 'x'"):
        Layers.resolve(net, ["0", "x"])


def test_the_model_is_listed_once_for_any_number_of_runs(net, monkeypatch) -> None:
    lists = []
    original = nn.Module.named_modules
    monkeypatch.setattr(
        nn.Module, "named_modules", lambda self, *a, **k: (lists.append(self is net), original(self, *a, **k))[1]
    )
    layers = Layers.resolve(net, ["1.0", "0", "1"])
    for batch in (1, 2, 5):
        result = layers.run(torch.rand(batch, 3, 16, 20), gradient=True)
        result.gradients(result.output[:, 1])
    assert sum(lists) == 1


def test_hints_belong_to_the_layers(net) -> None:
    image = torch.rand(2, 3, 11, 11)
    assert Layers.resolve(net, "0", layout="NHWC").run(image).layouts[0].kind == "NHWC"
    assert Layers.resolve(net, "0").run(image).layouts[0].kind == "NCHW"


def test_substitutes_are_some_of_the_layers(net) -> None:
    layers = Layers.resolve(net, ["0", "1"])
    image = torch.rand(1, 3, 16, 20)
    for key in ("1", net[1]):
        result = layers.run(image, substitute={key: lambda raw: torch.cat([raw, raw * 0, raw])})
        assert result.maps[1].shape == (3, 6, 5, 7)
        assert result.layouts[1].grid == (5, 7)
        torch.testing.assert_close(result.output[0], net(image)[0].detach())
        torch.testing.assert_close(result.output[1], net[4].bias.detach())
    with pytest.raises(InputError, match=r"'4', which is not one of the layers \['0', '1'\]"):
        layers.run(image, substitute={"4": lambda raw: raw})


def test_read_layer_stops_after_the_layer(net) -> None:
    ran = []
    net[2].register_forward_pre_hook(lambda *_: ran.append("pool"))
    image = torch.rand(2, 3, 16, 20)
    output = read_layer(net, "1", image)
    torch.testing.assert_close(output, net[1](net[0](image)))
    assert ran == []
    output.sum().backward()
    assert net[0].weight.grad.any()
    assert not any(m._forward_hooks for m in net.modules())
    net.forward = lambda x: x
    with pytest.raises(LayerError, match="'2' did not run"):
        read_layer(net, "2", image)


def test_a_value_without_a_gradient(net) -> None:
    result = Layers.resolve(net, "1").run(torch.rand(2, 3, 16, 20), gradient=True)
    with pytest.raises(LayerError, match="does not depend on layer '1'"):
        result.gradients(torch.ones(2))


def test_the_order_in_which_layers_ran() -> None:
    net = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(4)], nn.Flatten())
    assert Layers.resolve(net, ["2", "3", "0"]).run(torch.rand(1, 3, 4, 5)).order == (2, 0, 1)  # "0", "2", "3"


@pytest.mark.parametrize("last", [nn.LayerNorm(5, elementwise_affine=False), nn.Softmax(1)], ids=["norm", "softmax"])
def test_a_reading_of_outputs_whose_sum_is_constant_has_a_gradient(net, last) -> None:
    """Far above rounding: the sum of what a softmax or a LayerNorm gives has a gradient of rounding errors alone."""
    model = nn.Sequential(*net, last)
    result = Layers.resolve(model, "1").run(torch.rand(2, 3, 16, 20), gradient=True)
    with gradients_enabled():
        (logits,) = torch.autograd.grad(any_reading(result.returned), result.raw)
    assert logits.abs().max() > 1e-5
    values = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    expected = torch.tensor(1.0).cos() + 2 * torch.tensor(2.0).cos()
    torch.testing.assert_close(any_reading(values), expected)
    torch.testing.assert_close(any_reading({"a": values, "b": values, "ids": torch.ones(3).long()}), 2 * expected)


class OwnTokens(nn.Module):
    """A vision transformer of the user's own: patches of 16 pixels, and a class token somewhere."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.cls_token = order, nn.Parameter(torch.randn(1, 1, 16))
        self.patches, self.head = nn.Conv2d(3, 16, 16, 16), nn.Linear(16, 5)
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(16, 2, 16, 0.0, batch_first=True, norm_first=True) for _ in range(2))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, (192, 192)) if self.order == "resized" else x
        y = self.patches(x)
        y = (y.transpose(2, 3) if self.order == "by columns" else y).flatten(2).transpose(1, 2)
        before = {"last": y.shape[1], "between": y.shape[1] // 2}.get(self.order, 0)
        y = torch.cat([y[:, :before], self.cls_token.expand(len(y), -1, -1), y[:, before:]], 1)
        return self.head(self.blocks(y).mean(1))


@pytest.mark.parametrize("block", ["blocks.0", "blocks.1"])
@pytest.mark.parametrize(
    ("order", "size", "message"),
    [
        ("first", (96, 128), None),
        ("first", (224, 224), None),
        ("last", (96, 128), "lie 1 place before where they are read, in rows of 8"),
        ("last", (224, 224), "lie 1 place before"),
        ("between", (96, 128), "lie 1 place before"),
        ("by columns", (96, 96), "not in the order of the image's rows"),
        ("by columns", (96, 128), "not in the order of the image's rows"),
        ("resized", (192, 192), None),
        ("resized", (144, 256), "resizes or crops its images itself"),
    ],
)
def test_tokens_of_a_model_of_ones_own_lie_where_they_are_read(order, size, message, block) -> None:
    """Their number fits in every case, and a wrong reading would be a wrong map."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = OwnTokens(order).eval()
        images = torch.rand(2, 3, *size)
        if message is not None:
            with pytest.raises(LayoutError, match=message):
                Layers.resolve(model, block).run(images)
            assert block not in {layer.name for layer in survey_layers(model, images)}
            with pytest.raises(LayoutError, match=message):
                SALFCBM(model, block, ["a"], 2, input_size=size)
            continue
        expected = model.blocks[: int(block[-1]) + 1](
            torch.cat([model.cls_token.expand(2, -1, -1), model.patches(images).flatten(2).transpose(1, 2)], 1)
        )[:, 1:]
        grid = size[0] // 16, size[1] // 16
        found = Layers.resolve(model, block).run(images).maps[0]
        torch.testing.assert_close(found, expected.transpose(1, 2).unflatten(2, grid))


def test_the_order_is_tried_once() -> None:
    model, runs = OwnTokens("first").eval(), []
    model.register_forward_hook(lambda *_: runs.append(1))
    layers = Layers.resolve(model, "blocks.0")
    for _ in range(3):
        layers.run(torch.rand(2, 3, 96, 96))
    assert len(runs) == 4
