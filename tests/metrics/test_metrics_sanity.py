"""Sanity checks: they tell maps that know the model from maps that do not, and leave the model as it was."""

from __future__ import annotations

import pytest
import torch
from captum.attr import InputXGradient, LayerGradCam
from scipy.stats import spearmanr
from torch import nn

from captum_concepts import metrics
from captum_concepts.errors import InputError

# Captum says so whenever it differentiates with respect to an input
pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")


def model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Tanh(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        )  # fmt: skip
        net[1].running_mean.normal_()
        net[1].register_buffer("hidden", torch.rand(3), persistent=False)
    return net.eval()


def images(n: int = 12) -> torch.Tensor:
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def test_rank_correlation_is_scipys_with_ties_and_edges():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 5, 5, generator=g).round(), torch.randn(4, 5, 5, generator=g).round()
    expected = [spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(metrics.rank_correlation(a, b), torch.tensor(expected).float())
    torch.testing.assert_close(metrics.rank_correlation(a, -a, absolute=True), torch.ones(4))
    flat, nan = torch.zeros(1, 4), torch.full((1, 4), torch.nan)
    slope = torch.arange(4.0)[None]
    assert metrics.rank_correlation(flat, flat + 3).item() == 1
    assert metrics.rank_correlation(flat, slope).item() == 0
    assert metrics.rank_correlation(nan, slope).isnan()
    with pytest.raises(InputError, match="one shape"):
        metrics.rank_correlation(flat, slope[:, :3])


@pytest.mark.parametrize("order", ["cascade", "independent"])
def test_a_gradient_passes_and_an_edge_detector_fails(order):
    net, x = model(), images()
    blind = metrics.parameter_randomization(metrics.CenterGaussian(), net, x, target=1, order=order)
    assert not blind.passed
    assert blind.value == 1
    assert "FAILED" in str(blind)
    seeing = metrics.parameter_randomization(LayerGradCam(net, net[3]), net, x, target=1, order=order)
    assert seeing.stages == ["7", "3", "1", "0"]
    assert seeing.similarity.shape == (4, 12)
    if order == "cascade":
        assert seeing.passed
        assert "passed" in str(seeing)
        gradient = metrics.parameter_randomization(InputXGradient(net), net, x, target=1)
        assert gradient.passed


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_restored_exactly_also_after_an_error(fails):
    net, x = model(), images(3)
    net[3].train()
    net[0].weight.requires_grad_(False)
    net(x).sum().backward()
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    before = {k: v.detach().clone() for k, v in tensors.items()}
    gradients = {k: None if p.grad is None else p.grad.clone() for k, p in net.named_parameters()}
    modes, state, weights = [m.training for m in net.modules()], torch.get_rng_state(), []

    def explain(inputs: torch.Tensor) -> torch.Tensor:
        weights.append(net[7].weight.detach().clone())
        if len(weights) > 1:  # an explainer that is careless with the randomised model
            net.train()
            net.zero_grad(set_to_none=False)
            if fails and len(weights) > 2:
                raise RuntimeError("stop")
        return net[:3](inputs).sum(1)

    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            metrics.parameter_randomization(explain, net, x)
    else:
        metrics.parameter_randomization(explain, net, x)
    assert not torch.equal(weights[0], weights[1])  # it was randomised in between
    after = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    assert all(after[k] is tensors[k] and torch.equal(after[k], before[k]) for k in before)
    for name, p in net.named_parameters():
        assert p.requires_grad is (name != "0.weight")
        assert (p.grad is None) == (gradients[name] is None)
        assert p.grad is None or torch.equal(p.grad, gradients[name])
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_seeds_and_layers_without_a_reset():
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.arange(12.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(1) * self.token

    net, x = Token(), images(4).abs()
    result = metrics.parameter_randomization(net, net, x)
    assert result.stages == [""]
    assert result.value < 1  # its entries were shuffled
    net = model()
    cam = LayerGradCam(net, net[3])
    one = metrics.parameter_randomization(cam, net, x, target=0, layers=["0", "7"], seed=3)
    assert one.stages == ["0", "7"]
    assert torch.equal(
        one.similarity, metrics.parameter_randomization(cam, net, x, target=0, layers=["0", "7"], seed=3).similarity
    )
    for layers, message in ((["9"], "no module"), (["2"], "no parameters"), ([], "no parameters")):
        with pytest.raises(InputError, match=message):
            metrics.parameter_randomization(cam, net, x, target=0, layers=layers)
    with pytest.raises(InputError, match="order"):
        metrics.parameter_randomization(cam, net, x, target=0, order="random")
    with pytest.raises(InputError, match="must return maps"):
        metrics.parameter_randomization(lambda x: x.sum(), net, x)


@pytest.mark.parametrize("options", [{"seed": -1}, {"seed": "a"}, {"threshold": "0.5"}, {"threshold": None}])
def test_options_are_checked_before_the_work(options):
    def never(x):
        raise AssertionError("the options are checked before the work")

    with pytest.raises(InputError, match=f"{next(iter(options))} must be"):
        metrics.parameter_randomization(never, model(), images(2), **options)
    with pytest.raises(InputError, match=f"{next(iter(options))} must be"):
        metrics.label_randomization(never, model(), never, torch.tensor([0, 1]), images(2), **options)


def test_undefined_similarity_is_counted_and_does_not_pass():
    net, x = model(), images(4)
    result = metrics.parameter_randomization(lambda x: x[:, 0] * torch.nan, net, x)
    assert result.skipped == 4
    assert not result.passed
    assert "undefined" in str(result)


def test_label_randomization_trains_a_copy_on_shuffled_labels():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    x = 0.1 * torch.randn(40, 1, 6, 6, generator=g)
    x[labels == 0, :, :3] += 1
    x[labels == 1, :, 3:] += 1
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    given = []

    def fit(one: nn.Module, targets: torch.Tensor) -> None:
        given.append(targets)
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(one(x), targets).backward()
            optimizer.step()

    fit(net, labels)
    weight = net[1].weight.detach().clone()

    def explain(one: nn.Module) -> InputXGradient:
        return InputXGradient(one)

    result = metrics.label_randomization(explain, net, fit, labels, x, target=0)
    assert result.passed
    assert torch.equal(net[1].weight, weight)
    assert not torch.equal(given[1], labels)
    assert torch.equal(given[1].sort().values, labels.sort().values)
    blind = metrics.label_randomization(lambda one: lambda x, target: x, net, fit, labels, x, target=0)
    assert not blind.passed
    with pytest.raises(InputError, match="labels"):
        metrics.label_randomization(explain, net, fit, torch.zeros(40), x, target=0)
