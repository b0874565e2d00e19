"""Scripted, quantized, checkpointed and traced models, other default dtypes: right, or refused with what to do."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from captum_concepts import FeatureActivationMap
from captum_concepts.activations import Layers, gradients_enabled
from captum_concepts.activations.survey import suggest_layer, survey_layers
from captum_concepts.errors import LONGEST_MESSAGE, LayerError


class Small(nn.Module):
    """Two stages and a head, each stage a sequence; ``stage`` says how it is run."""

    def __init__(self, run=lambda stage, x: stage(x)) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.Tanh())
        self.fc = nn.Linear(8, 4)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.run(self.stage2, self.run(self.stage1, x)).mean((2, 3)))


def small(run=lambda stage, x: stage(x)) -> Small:
    torch.manual_seed(0)
    return Small(run).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def gradient(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    result = Layers.resolve(model, layer).run(images, gradient=True)
    with gradients_enabled():
        return result.gradients(result.output[:, 1])[0]


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_torchscript_is_refused(images):
    model = small()
    model.run = None
    scripted = torch.jit.script(nn.Sequential(model.stage1, model.stage2))
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    traced = torch.jit.trace(nn.Sequential(model.stage1, model.stage2), images)
    for model in (scripted, loaded, traced):
        with pytest.raises(
            LayerError, match=r"layer '0' is part of a torch.jit model.*Pass the original torch.nn.Module"
        ):
            Layers.resolve(model, "0")
    part = nn.Sequential(nn.Conv2d(3, 3, 1), scripted, nn.Flatten())
    with pytest.raises(LayerError, match=r"layer '1.0' is part of a torch.jit model"):
        Layers.resolve(part, "1.0")
    assert gradient(part, "0", images).any()  # what is not scripted itself
    assert [layer.name for layer in survey_layers(part, images)] == ["0"]


def test_a_quantized_head_passes_no_gradient(images):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(small(), {nn.Linear})
        assert Layers.resolve(model, "stage2").run(images).maps[0].any()
        with pytest.raises(
            LayerError, match=r"layer 'stage2': no gradient passes through 'fc' \(torch.*quantized.*Linear\)"
        ):
            gradient(model, "stage2", images)


class Detached(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stage2(self.stage1(x).detach()).mean((2, 3)))


def test_where_a_gradient_is_lost_is_named(images):
    with pytest.raises(LayerError, match=r"layer 'stage1': no gradient passes beyond 'stage1' \(.*detach\(\)"):
        gradient(Detached().eval(), "stage1", images)
    assert gradient(Detached().eval(), "stage2", images).any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_stages(images, reentrant):
    plain = {layer: gradient(small(), layer, images) for layer in ("stage1", "stage2", "stage1.2", "stage2.3")}

    def whole(stage: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(stage, x, use_reentrant=reentrant)

    def in_parts(stage: nn.Module, x: Tensor) -> Tensor:
        return checkpoint_sequential(stage, 2, x, use_reentrant=reentrant)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "None of the inputs have requires_grad=True"
        for layer, wanted in plain.items():
            if reentrant:
                with pytest.raises(LayerError, match=r"no gradient passes beyond 'stage.'.*use_reentrant=True"):
                    gradient(small(whole), layer, images)
            else:
                torch.testing.assert_close(gradient(small(whole), layer, images), wanted)
        with pytest.raises(LayerError, match=r"'stage2' did not run.*its part 'stage2.3' did: use that layer"):
            gradient(small(in_parts), "stage2", images)
        torch.testing.assert_close(gradient(small(in_parts), "stage2.3", images), plain["stage2.3"])


class SecondCheckpointed(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(checkpoint(self.stage2, self.stage1(x), use_reentrant=True).mean((2, 3)))


def test_a_layer_before_a_checkpointed_stage(images):
    with pytest.raises(LayerError, match=r"after layer 'stage1' runs in torch\.utils\.checkpoint with use_reentrant"):
        gradient(SecondCheckpointed().eval(), "stage1", images)


def test_a_traced_graph_names_a_part_that_ran(images):
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    graph = torch.fx.symbolic_trace(model)
    with pytest.raises(LayerError, match=r"'layer4' did not run.*its part 'layer4.1.bn2' did") as caught:
        gradient(graph, "layer4", images)
    assert len(str(caught.value)) <= LONGEST_MESSAGE
    torch.testing.assert_close(gradient(graph, "layer4.1.bn2", images), gradient(model, "layer4.1.bn2", images))
    assert survey_layers(graph, images)


def test_an_exported_graph_has_no_layers(images):
    model = torch.export.export(small(), (images,)).module()
    with pytest.raises(LayerError, match="compiled or exported graph"):
        gradient(model, "stage2", images)


def test_double_precision_by_default(images):
    model, bank = small(), torch.eye(4)
    expected = gradient(model, "stage1", images)
    fam = FeatureActivationMap(model, "stage2", bank).attribute(images, target=1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(gradient(model, "stage1", images), expected)
        assert suggest_layer(model, images) == "stage2"
        again = FeatureActivationMap(model, "stage2", bank).attribute(images, target=1)
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(again, fam)


class Dict(nn.Module):
    """A block that returns a dict, in a sequence of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, 1, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor | int]:
        return {"count": 3, "hidden": self.conv(x).tanh()}


class Tuple(Dict):
    def forward(self, x: Tensor) -> tuple[None, Tensor]:
        return None, self.conv(x).tanh()


class Blocks(nn.Module):
    def __init__(self, kind: type[Dict]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.blocks = nn.ModuleList([kind(), kind()])
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = self.stem(x)
        for block in self.blocks:
            out = block(x)
            x = out["hidden"] if isinstance(out, dict) else out[1]
        return (self.fc(x.mean((2, 3))),)


@pytest.mark.parametrize("kind", [Dict, Tuple])
def test_blocks_that_return_containers_are_surveyed_suggested_and_explained(images, kind):
    model = Blocks(kind).eval()
    surveyed = {layer.name: layer for layer in survey_layers(model, images)}
    assert surveyed["blocks.1"].layout.grid == (8, 12)
    assert surveyed["blocks.1"].channels == 6
    assert suggest_layer(model, images) == "blocks.1"
    assert gradient(model, "blocks.0", images).any()
    maps = FeatureActivationMap(model, "blocks.1", torch.eye(4)).attribute(images, target=1)
    assert maps.shape == (2, 1, 8, 12)
