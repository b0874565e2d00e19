"""capture: what it records, and that it leaves the model as it was found."""

from __future__ import annotations

import functools
import math
import threading
from collections import OrderedDict, namedtuple

import pytest
import timm
import torch
from torch import Tensor, nn

from captum_concepts.activations import capture, find_model, gradients_enabled, layer_name, resolve_layer
from captum_concepts.errors import InputError, InputWarning, LayerError


class Net(nn.Module):
    """Two convolutions with an in-place ReLU between, a head, and a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)
        self.norm, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3)
        self.unused = nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(self.embed(x)) * scale

    def embed(self, x: Tensor) -> Tensor:
        return self.conv2(self.norm(self.relu(self.conv1(x)))).relu().mean((2, 3))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


class TestWhatIsRecorded:
    def test_outputs_of_several_layers_in_order(self, net, images):
        first = net.conv1(images)
        second = net.conv2(net.norm(first.relu()))
        result = capture(net, images, ["conv2", net.conv1])
        torch.testing.assert_close(result.layers[0], second)
        torch.testing.assert_close(result.layers[1], first)  # not what the in-place ReLU made of it
        torch.testing.assert_close(result.output, net(images))

    def test_a_layer_that_is_in_place_itself(self, net, images):
        result = capture(net, images, ["conv1", "relu"])
        torch.testing.assert_close(result.layers[1], net.conv1(images).relu())
        assert result.layers[0].min() < 0

    def test_inputs_of_layers(self, net, images):
        result = capture(net, images, ["relu", "norm"], attribute_to_layer_input=True)
        torch.testing.assert_close(result.layers[0], net.conv1(images))
        torch.testing.assert_close(result.layers[1], net.conv1(images).relu())

    @pytest.mark.parametrize("extra", [2.0, (2.0,)])
    def test_additional_forward_args(self, net, images, extra):
        torch.testing.assert_close(capture(net, images, [], additional_forward_args=extra).output, net(images) * 2)

    def test_a_tuple_of_inputs(self, images):
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 2, 1)

            def forward(self, a: Tensor, b: Tensor) -> Tensor:
                return self.conv(a + b)

        two = Two()
        torch.testing.assert_close(capture(two, (images, images), ["conv"]).layers[0], two.conv(2 * images))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_dtypes_and_memory_formats(self, net, images, dtype):
        net, images = net.to(dtype).to(memory_format=torch.channels_last), images.to(dtype)
        result = capture(net, images.contiguous(memory_format=torch.channels_last), ["conv2"], gradient=True)
        assert result.layers[0].dtype == dtype
        assert torch.autograd.grad(result.output.sum(), result.layers)[0].shape == (3, 5, 4, 4)

    @pytest.mark.parametrize("kind", ["tuple", "list", "dict", "namedtuple"])
    def test_layers_that_give_containers(self, images, kind):
        Pair = namedtuple("Pair", ["steps", "x"])
        wrap = {
            "tuple": lambda x: (7, x),
            "list": lambda x: [7, x],
            "dict": lambda x: OrderedDict(steps=7, x=x),
            "namedtuple": lambda x: Pair(7, x),
        }[kind]

        class Inner(nn.Module):
            def forward(self, x: Tensor):
                return wrap(2 * x)

        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = Inner()

            def forward(self, x: Tensor) -> Tensor:
                out = self.inner(x)
                assert (out["steps"] if kind == "dict" else out[0]) == 7
                return out["x"] if kind == "dict" else out[1]

        outer = Outer()
        assert torch.equal(capture(outer, images, ["inner"]).layers[0], 2 * images)
        result = capture(outer, images, [], substitute={"inner": lambda t: t + 1})
        assert torch.equal(result.output, 2 * images + 1)


class TestGradients:
    @pytest.mark.parametrize("frozen", [True, False])
    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    def test_equal_plain_autograd_for_several_layers_at_once(self, net, images, frozen, mode):
        kept = {}
        handles = [
            m.register_forward_hook(lambda _m, _i, o, n=n: kept.update({n: o}) or o.clone())
            for n, m in (("conv1", net.conv1), ("conv2", net.conv2))
        ]
        expected = torch.autograd.grad(net(images)[:, 1].sum(), [kept["conv1"], kept["conv2"]])
        for handle in handles:
            handle.remove()
        net.requires_grad_(not frozen)
        with mode(), gradients_enabled():
            result = capture(net, images, ["conv1", "conv2"], gradient=True)
            found = torch.autograd.grad(result.output[:, 1].sum(), result.layers)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        assert all(p.grad is None for p in net.parameters())

    def test_inference_tensors_as_inputs(self, net, images):
        with torch.inference_mode():
            frozen = images.clone()
        with gradients_enabled():
            result = capture(net, frozen, ["conv2"], gradient=True)
            assert torch.autograd.grad(result.output.sum(), result.layers)[0].any()

    def test_vit(self):
        torch.manual_seed(0)
        vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3).eval()
        images = torch.rand(2, 3, 32, 32)
        result = capture(vit, images, ["blocks.0", "blocks.1"], gradient=True)
        found = torch.autograd.grad(result.output[:, 0].sum(), result.layers)
        tokens = result.layers[0].detach().requires_grad_()
        later = vit.blocks[1](tokens)
        value = vit.forward_head(vit.norm(later))[:, 0].sum()
        for a, b in zip(found, torch.autograd.grad(value, [tokens, later]), strict=True):
            torch.testing.assert_close(a, b)

    def test_nothing_in_front_of_the_first_layer_is_recorded(self, net, images):
        result = capture(net, images.requires_grad_(), ["conv1"], gradient=True)
        assert result.layers[0].is_leaf
        result = capture(net, images, ["norm", "conv2"], gradient=True)
        assert [t.is_leaf for t in result.layers] == [True, False]

    def test_a_backbone_that_the_model_runs_without_gradients(self, images):
        class Frozen(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.backbone, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

            def forward(self, x: Tensor) -> Tensor:
                with torch.no_grad():
                    features = self.backbone(x)
                return self.head(features.mean((2, 3)))

        frozen = Frozen().requires_grad_(False)
        result = capture(frozen, images, ["backbone"], gradient=True)
        gradient = torch.autograd.grad(result.output[:, 1].sum(), result.layers)[0]
        expected = (frozen.head.weight[1] / 36)[None, :, None, None].expand(3, 4, 6, 6)
        torch.testing.assert_close(gradient, expected)


class TestSubstitution:
    def test_another_output(self, net, images):
        result = capture(net, images, ["conv2"], substitute={"conv2": torch.zeros_like})
        assert not result.layers[0].any()
        torch.testing.assert_close(result.output, net.head(torch.zeros(3, 5)))

    def test_a_larger_batch(self, net, images):
        result = capture(net, images, [], substitute={"conv2": lambda t: t.repeat_interleave(4, 0)})
        torch.testing.assert_close(result.output, net(images).repeat_interleave(4, 0))


class TestTheModelIsLeftAsFound:
    def state(self, net: nn.Module) -> tuple:
        return (
            [m.training for m in net.modules()],
            [p.requires_grad for p in net.parameters()],
            {k: v.clone() for k, v in net.state_dict().items()},
            hooks(net),
            torch.get_rng_state(),
        )

    def assert_same(self, before: tuple, after: tuple) -> None:
        assert before[:2] == after[:2]
        assert before[3] == after[3]
        assert torch.equal(before[4], after[4])
        for key, value in before[2].items():
            assert torch.equal(value, after[2][key])

    @pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
    def test_after_success_and_errors(self, net, images, error):
        net.train()
        net.conv1.eval()
        net.conv2.weight.requires_grad_(False)
        net.register_forward_hook(lambda *_: None)
        before = self.state(net)
        if error is None:
            capture(net, images, ["conv1", "conv2"], gradient=True)
        else:

            def fail(tensor: Tensor) -> Tensor:
                raise error("planted")

            with pytest.raises(error, match="planted"):
                capture(net, images, ["conv1", "conv2"], gradient=True, substitute={"conv2": fail})
        self.assert_same(before, self.state(net))
        assert torch.is_grad_enabled()
        assert all(p.grad is None for p in net.parameters())

    def test_train_mode_does_not_mix_the_batch(self, net, images):
        expected = capture(net, images, ["norm"]).layers[0]
        net.train()
        torch.testing.assert_close(capture(net, images, ["norm"]).layers[0], expected)
        torch.testing.assert_close(capture(net, images[:1], ["norm"]).layers[0], expected[:1])

    def test_a_thousand_calls_leave_no_hook(self, net, images):
        for _ in range(200):
            capture(net, images[:1], ["conv1"], gradient=True)
        assert hooks(net) == 0

    def test_two_threads_on_one_model(self, net, images):
        other = images.flip(0) + 1
        expected = [capture(net, x, ["conv2"]).layers[0] for x in (images, other)]
        failures = []

        def work(x: Tensor, wanted: Tensor) -> None:
            for _ in range(30):
                try:
                    torch.testing.assert_close(capture(net, x, ["conv2"]).layers[0], wanted)
                except Exception as error:
                    failures.append(error)

        threads = [threading.Thread(target=work, args=pair) for pair in zip((images, other), expected, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []


class TestWrappers:
    def test_methods_and_partials(self, net, images):
        assert capture(net.embed, images, ["conv2"]).output.shape == (3, 5)
        assert capture(functools.partial(net, scale=3.0), images, ["conv2"]).output.shape == (3, 2)
        assert find_model(functools.partial(net.embed)) is net
        assert capture(lambda x: net(x), images, [net.conv2]).layers[0].shape == (3, 5, 4, 4)

    def test_data_parallel(self, net, images):
        parallel = nn.DataParallel(net)
        expected = capture(net, images, ["conv2"]).layers[0]
        for layer in ("conv2", "module.conv2", net.conv2):
            assert torch.equal(capture(parallel, images, [layer]).layers[0], expected)

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, while it traces
    def test_compiled_model_and_submodule(self, net, images):
        expected = capture(net, images, ["conv1", "conv2"]).layers
        compiled = torch.compile(net, backend="eager")
        compiled(images)  # the graph is made before any hook is there
        for layers in (["conv1", "conv2"], ["_orig_mod.conv1", net.conv2]):
            for a, b in zip(capture(compiled, images, layers).layers, expected, strict=True):
                torch.testing.assert_close(a, b)
        net.conv2 = torch.compile(net.conv2, backend="eager")
        net(images)
        torch.testing.assert_close(capture(net, images, ["conv2"]).layers[0], expected[1])

    def test_compiled_in_place(self, net, images):
        expected = capture(net, images, ["conv2"]).layers[0]
        net.compile(backend="eager")
        net(images)
        torch.testing.assert_close(capture(net, images, ["conv2"]).layers[0], expected)


class TestErrors:
    def test_unknown_names_offer_near_ones(self, net, images):
        with pytest.raises(LayerError, match=r"Net has no layer 'conv3'. Did you mean 'conv2' or 'conv1'"):
            capture(net, images, ["conv3"])
        with pytest.raises(LayerError, match="top-level layers"):
            capture(net, images, ["qqqqqq"])

    def test_names_need_a_model(self, net, images):
        with pytest.raises(LayerError, match="plain function"):
            capture(lambda x: net(x), images, ["conv1"])
        with pytest.raises(LayerError, match="dotted name, got int"):
            capture(net, images, [3])

    def test_a_layer_that_does_not_run(self, net, images):
        for layer in ("unused", nn.Conv2d(3, 3, 1)):
            with pytest.raises(LayerError, match="did not run"):
                capture(net, images, [layer])
        assert hooks(net) == 0

    def test_a_layer_that_runs_twice(self, images):
        relu = nn.ReLU()
        net = nn.Sequential(nn.Conv2d(3, 3, 1), relu, nn.Conv2d(3, 3, 1), relu)
        with pytest.raises(LayerError, match="more than once"):
            capture(net, images, [relu])
        assert hooks(net) == 0

    def test_a_layer_without_a_tensor(self, images):
        class Words(nn.Module):
            def forward(self, x: Tensor) -> str:
                return "words"

        with pytest.raises(LayerError, match="str, which holds no floating-point tensor"):
            capture(nn.Sequential(Words()), images, ["0"])

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            (torch.zeros(0, 3, 8, 8), "hold no example"),
            (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"images\.float\(\) / 255"),
            ([[1.0]], "torch.Tensor"),
            ((), "torch.Tensor"),
        ],
    )
    def test_bad_inputs(self, net, bad, message):
        with pytest.raises(InputError, match=message):
            capture(net, bad, ["conv1"])

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_nan_is_warned_about(self, net, images, value):
        images[1, 0, 0, 0] = value
        with pytest.warns(InputWarning, match="NaN or infinite"):
            capture(net, images, ["conv1"])


def test_names_of_layers(net):
    assert layer_name(net, net.conv2) == "conv2"
    assert layer_name(net.embed, "conv2") == "conv2"
    assert layer_name(lambda x: x, net.conv2) == "Conv2d"
    assert resolve_layer(net, "head") is net.head
