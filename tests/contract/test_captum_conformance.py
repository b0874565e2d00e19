"""Captum's own tools run on the methods: NoiseTunnel, interpolate, its metrics and its generic test configurations."""

from __future__ import annotations

from copy import deepcopy
from importlib.util import find_spec

import pytest
import torch
from captum.attr import LayerAttribution, NoiseTunnel
from captum.metrics import infidelity, sensitivity_max
from methods import METHODS, Method
from torch import Tensor, nn

from captum_concepts.errors import InputError

try:
    from captum.testing.attr.helpers.test_config import config
    from captum.testing.helpers.basic_models import BasicModel_ConvNet
except ImportError:
    CONVNET_CASES = []  # captum 0.8
else:
    CONVNET_CASES = [
        case
        for case in config
        if isinstance(case["model"], BasicModel_ConvNet) and case.get("layer") and case["layer"].startswith("conv")
    ]

EXAMPLE = torch.rand(1, 1, 10, 10)
needs_captum_testing = pytest.mark.skipif(
    find_spec("captum.testing") is None, reason="captum ships its generic tests since 0.9"
)


class ConvNet(nn.Module):
    """The shape of Captum's own test network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 4, 3)
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.pool1, self.pool2 = nn.MaxPool2d(2), nn.MaxPool2d(2)
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 10)
        self.softmax = nn.Softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool2(self.relu2(self.conv2(self.pool1(self.relu1(self.conv1(x))))))
        return self.softmax(self.fc2(self.relu3(self.fc1(x.flatten(1)))))


@pytest.fixture(params=METHODS)
def method(request) -> Method:
    return METHODS[request.param]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = ConvNet().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 1, 10, 10, generator=torch.Generator().manual_seed(1))


def leftover_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


@needs_captum_testing
def test_captum_ships_configurations_to_test_with():
    assert CONVNET_CASES


@needs_captum_testing
@pytest.mark.filterwarnings("ignore:the gradient at layer")  # some of the images leave no unit alive
@pytest.mark.parametrize("case", CONVNET_CASES, ids=[case["name"] for case in CONVNET_CASES])
def test_generic_target_configurations(method, case):
    """Captum's test_targets: a batch gives what its examples give alone, for every form of target."""
    arguments = {name: v for name, v in case["attribute_args"].items() if name in ("inputs", "target")}
    arguments.setdefault("target", 0)
    model = deepcopy(case["model"]).eval()
    model.softmax = nn.Identity()  # Captum's inputs of 100 saturate it, and gradients are then rounding noise
    explainer = method.build(model, getattr(model, case["layer"]), EXAMPLE)
    whole = explainer.attribute(**arguments)
    inputs, target = arguments["inputs"], arguments.get("target")
    for i in range(len(inputs)):
        own = target[i] if isinstance(target, list) or (isinstance(target, Tensor) and target.numel() > 1) else target
        alone = explainer.attribute(inputs[i : i + 1], target=own)
        torch.testing.assert_close(alone[0], whole[i], rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize(
    "target", [3, torch.tensor(3), torch.tensor([3]), [3, 3, 3, 3], torch.tensor([3, 3, 3, 3]), (3,), [(3,)] * 4]
)
def test_every_form_of_one_target_means_the_same(method, model, images, target):
    explainer = method.build(model, model.conv2, EXAMPLE)
    assert torch.equal(explainer.attribute(images, target=target), explainer.attribute(images, target=3))


@pytest.mark.parametrize("case", ["normal", "bad target", "error in the layer", "error behind the layer"])
def test_hooks_are_removed(method, model, images, case):
    """Captum's test_hook_removal, which asks for an AssertionError on a bad target."""
    explainer = method.build(model, model.conv2, EXAMPLE)

    def fail(*_args):
        raise AssertionError("planted")

    planted = []
    if case == "error in the layer":
        planted = [model.conv2.register_forward_hook(fail)]
    if case == "error behind the layer":
        planted = [model.fc1.register_forward_pre_hook(fail)]
    if case == "normal":
        explainer.attribute(images, target=1)
    else:
        with pytest.raises(AssertionError):
            explainer.attribute(images, target=9999 if case == "bad target" else 1)
    for handle in planted:
        handle.remove()
    assert leftover_hooks(model) == 0


@pytest.mark.parametrize("nt_type", ["smoothgrad", "smoothgrad_sq", "vargrad"])
@pytest.mark.parametrize("samples_batch", [None, 2])
def test_noise_tunnel(method, model, images, nt_type, samples_batch):
    explainer = method.build(model, model.conv2, EXAMPLE)
    torch.manual_seed(0)
    tunnel = NoiseTunnel(explainer).attribute(
        images, nt_type=nt_type, nt_samples=4, nt_samples_batch_size=samples_batch, stdevs=0.1, target=[0, 1, 2, 3]
    )
    assert tunnel.shape == explainer.attribute(images, target=0).shape
    assert tunnel.abs().sum() > 0
    if nt_type == "smoothgrad":
        torch.manual_seed(0)
        still = NoiseTunnel(explainer).attribute(images, nt_samples=2, stdevs=0.0, target=[0, 1, 2, 3])
        # Each image is repeated, so that batches are twice as large and round otherwise.
        torch.testing.assert_close(still, explainer.attribute(images, target=[0, 1, 2, 3]), rtol=1e-4, atol=1e-5)


def test_interpolate_to_the_image(method, model, images):
    maps = method.build(model, model.conv1, EXAMPLE).attribute(images, target=0)
    enlarged = LayerAttribution.interpolate(maps, (10, 10), "bilinear")
    assert enlarged.shape == (4, maps.shape[1], 10, 10)


def test_infidelity_and_sensitivity(method, model, images):
    explainer = method.build(model, model.conv1, EXAMPLE)

    def attribute(x: Tensor, **options) -> Tensor:
        return LayerAttribution.interpolate(explainer.attribute(x, **options)[:, :1], (10, 10))

    def perturb(x: Tensor) -> tuple[Tensor, Tensor]:
        noise = 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        return noise, x - noise

    score = infidelity(model, perturb, images, attribute(images, target=1), target=1)
    # sensitivity_max hands over a tuple and, for more than one example, wants a tuple back.
    sensitivity = sensitivity_max(
        lambda x, **options: (attribute(x[0], **options),), images, target=1, perturb_radius=0.01, n_perturb_samples=3
    )
    direct = sensitivity_max(explainer.attribute, images[:1], target=1, perturb_radius=0.01, n_perturb_samples=3)
    assert direct.isfinite().all()
    assert score.shape == sensitivity.shape == (4,)
    assert score.isfinite().all()
    assert sensitivity.isfinite().all()


def test_the_model_is_left_as_found(method, model, images):
    model.train()
    model.conv1.eval()
    model.conv1.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    with torch.no_grad():
        method.build(model, model.conv2, EXAMPLE).attribute(images, target=0)
    assert model.training
    assert not model.conv1.training
    assert [p.requires_grad for p in model.conv1.parameters()] == [False, True]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
    assert torch.is_grad_enabled()


def test_grad_modes_give_the_same_map(method, model, images):
    explainer = method.build(model, model.conv2, EXAMPLE)
    expected = explainer.attribute(images, target=2)
    with torch.no_grad():
        torch.testing.assert_close(explainer.attribute(images, target=2), expected)
    with torch.inference_mode():
        torch.testing.assert_close(explainer.attribute(images.clone(), target=2), expected)
    model.requires_grad_(False)
    torch.testing.assert_close(explainer.attribute(images, target=2), expected)


@pytest.mark.parametrize("method", [m for m in METHODS.values() if not m.fitted])
def test_layer_input_equals_output_of_the_layer_before(method, model, images):
    of_input = method.build(model, model.conv2, EXAMPLE).attribute(images, target=2, attribute_to_layer_input=True)
    torch.testing.assert_close(of_input, method.build(model, model.pool1, EXAMPLE).attribute(images, target=2))


def test_attribute_is_wrapped_once_and_named(method, model):
    explainer = method.build(model, model.conv2, EXAMPLE)
    assert isinstance(explainer, LayerAttribution)
    assert callable(type(explainer).attribute.__wrapped__)
    assert explainer.get_name()


def test_keywords_of_captums_layer_grad_cam(method, model, images):
    explainer = method.build(model, model.conv2, images)
    maps = explainer.attribute(images, target=1)
    positive = explainer.attribute(images, target=1, relu_attributions=True, attr_dim_summation=True)
    assert torch.equal(positive, maps.relu())
    with pytest.raises(InputError, match="one value per position"):
        explainer.attribute(images, target=1, attr_dim_summation=False)


@pytest.mark.parametrize("keyword", ["baselines", "n_steps", "return_convergence_delta", "internal_batch_size"])
def test_keywords_of_other_attributions_are_answered(method, model, images, keyword):
    with pytest.raises(InputError, match=f"does not accept {keyword}"):
        method.build(model, model.conv2, images).attribute(images, target=1, **{keyword: 1})
