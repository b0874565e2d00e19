"""Outputs that saturate, and gradients that are the same for every image."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from captum_concepts.activations import Layers, final_activation, gradients_enabled
from captum_concepts.activations.survey import followed_by_linear, suggest_layer
from captum_concepts.errors import LayerError


class Classifier(nn.Module):
    def __init__(self, last) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, 4)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fc(self.conv(x).relu().mean((2, 3)) * 50))


LASTS = {
    "softmax": (nn.Softmax(1), "softmax"),
    "softmax function": (lambda s: torch.softmax(s, 1), "softmax"),
    "softmax method": (lambda s: s.softmax(-1), "softmax"),
    "softmax functional": (lambda s: nn.functional.softmax(s, dim=1), "softmax"),
    "sigmoid": (nn.Sigmoid(), "sigmoid"),
    "sigmoid function": (torch.sigmoid, "sigmoid"),
    "sigmoid in place": (lambda s: s.sigmoid_(), "sigmoid"),
    "sigmoid, viewed": (lambda s: s.sigmoid().view(-1, 2, 2).flatten(1), "sigmoid"),
    "logits": (nn.Identity(), None),
    "log-probabilities": (nn.LogSoftmax(1), None),
    "softmax before a linear map": (lambda s: s.softmax(1) @ torch.ones(4, 4), None),
}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("last", LASTS)
def test_a_final_softmax_or_sigmoid_is_found_and_taken_off(last, images):
    torch.manual_seed(0)
    function, name = LASTS[last]
    model = Classifier(function)
    layers = Layers.resolve(model, "conv")
    result = layers.run(images, gradient=True)
    assert final_activation(result.output) == name
    logits = layers.run(images, gradient=True, logits=True)
    if name is None:
        torch.testing.assert_close(logits.output, result.output)
        return
    scores = model.fc(model.conv(images).relu().mean((2, 3)) * 50)
    torch.testing.assert_close(logits.output.detach(), scores.detach())
    with gradients_enabled():
        (gradient,) = logits.gradients(logits.output[:, 1])
    wanted = Layers.resolve(Classifier(nn.Identity()), "conv")
    wanted.model.load_state_dict(model.state_dict())
    plain = wanted.run(images, gradient=True)
    torch.testing.assert_close(gradient, plain.gradients(plain.output[:, 1])[0])


def test_a_tensor_without_a_graph_has_no_final_activation():
    assert final_activation(torch.rand(2, 3).softmax(1)) is None


def test_logits_of_a_dict_are_read_as_well(images):
    class Dict(Classifier):
        def forward(self, x):
            return {"logits": super().forward(x), "hidden": x}

    model = Dict(nn.Softmax(1))
    output = Layers.resolve(model, "conv").run(images, logits=True).output
    torch.testing.assert_close(output.softmax(1), model(images)["logits"].detach())


@pytest.mark.parametrize("last", [nn.Identity(), nn.Softmax(1), nn.Sigmoid()], ids=lambda m: type(m).__name__)
def test_where_only_linear_operations_follow(last, images):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(6, 4), last,
    ).train()  # fmt: skip
    layers = Layers.resolve(model, ["0", "1", "2", "3", "4"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    assert followed_by_linear(layers, images) == (False, False, False, False, True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert followed_by_linear(layers[4], torch.zeros(1, 3, 8, 8)) == (True,)  # one image, and that an empty one


@pytest.mark.parametrize(
    "pool", [nn.AdaptiveMaxPool2d(1), nn.Sequential(nn.GroupNorm(2, 6), nn.AdaptiveMaxPool2d(1))], ids=["max", "norm"]
)
def test_other_poolings_are_not_linear(pool, images):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), pool, nn.Flatten(), nn.Linear(6, 4))
    assert followed_by_linear(Layers.resolve(model, "1"), images) == (False,)


def test_half_precision_rounds_but_stays_linear(images):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    layers = Layers.resolve(model.bfloat16(), ["0", "1"])
    assert followed_by_linear(layers, images.bfloat16()) == (False, True)


def test_the_suggestion_for_gradients_is_judged_by_a_forward_pass(images):
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    big = torch.rand(1, 3, 64, 96)
    assert suggest_layer(model, big) == "layer4"
    assert suggest_layer(model, big, for_gradients=True) == "layer4.0"
    line = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    assert suggest_layer(line, images) == "0"
    with pytest.raises(LayerError, match="affects its output other than linearly"):
        suggest_layer(line, images, for_gradients=True)


def test_a_long_search_for_gradients_takes_few_passes(images):
    """Each pass judges several stages: past n that only linear operations follow, about 4 log2 n instead of 4 n."""
    torch.manual_seed(0)
    linear = [nn.Conv2d(6, 6, 1) for _ in range(40)]
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), *linear, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    assert suggest_layer(model, images, for_gradients=True) == "0"
    assert len(passes) <= 30


def test_a_stage_that_cannot_be_judged_does_not_hide_a_suitable_one(images, monkeypatch):
    from captum_concepts.activations import survey
    from captum_concepts.errors import LayerError

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    judge = survey.followed_by_linear

    def picky(layers, *arguments, **options):
        if "0" in layers.names:
            raise LayerError("no gradient here")
        return judge(layers, *arguments, **options)

    monkeypatch.setattr(survey, "followed_by_linear", picky)
    assert suggest_layer(model, images, for_gradients=True) == "1"
