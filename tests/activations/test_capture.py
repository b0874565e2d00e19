"""capture: what is recorded is right, and the model is left as it was found."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict, namedtuple

import pytest
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn

from captum_concepts import FeatureActivationMap
from captum_concepts.activations import (
    capture,
    find_model,
    gradients_enabled,
    layer_name,
    resolve_layer,
    spatial_activations,
)
from captum_concepts.errors import InputError, InputWarning, LayerError

Pair = namedtuple("Pair", ["first", "second"])


class ModelOutput(OrderedDict):
    """As in transformers: a dict whose values are attributes as well."""

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(name)


class Net(nn.Module):
    """A small CNN with everything a hook could disturb: batch norm, in-place ReLU, dropout, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.deep = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.fc = nn.Linear(4, 5)

    def features(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        return x + self.deep(x)

    def forward(self, x: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        return self.fc(self.features(x).mean((2, 3))) + bias


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def state(model: nn.Module) -> dict:
    hooks = {
        name: [len(getattr(m, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
        for name, m in model.named_modules()
    }
    return {
        "hooks": hooks,
        "global hooks": len(torch.nn.modules.module._global_forward_pre_hooks),
        "training": {name: m.training for name, m in model.named_modules()},
        "tensors": {k: v.clone() for k, v in model.state_dict().items()},
        "requires_grad": {k: v.requires_grad for k, v in model.named_parameters()},
        "grad": {k: None if v.grad is None else v.grad.clone() for k, v in model.named_parameters()},
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "rng": torch.get_rng_state(),
    }


def assert_same(before: dict, after: dict) -> None:
    for part, value in before.items():
        now = after[part]
        if part == "rng":
            assert torch.equal(value, now)
        elif part in ("tensors", "grad"):
            assert value.keys() == now.keys()
            for k in value:
                assert value[k] is now[k] is None or torch.equal(value[k], now[k]), k
        else:
            assert value == now, part


# ---------------------------------------------------------------- the model is left as found


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("at_input", [False, True])
@pytest.mark.parametrize("mixed", ["train", "eval", "frozen batch norm"])
def test_the_model_is_left_as_found(net, images, gradient, at_input, mixed) -> None:
    net.train(mixed != "eval")
    net.bn.train(mixed == "train")
    net.fc.bias.grad = torch.ones(5)
    net.conv.weight.requires_grad_(False)
    before = state(net)
    result = capture(net, images, ["conv", "deep.0"], gradient=gradient, attribute_to_layer_input=at_input)
    if gradient:
        with gradients_enabled():
            torch.autograd.grad(result.output.sum(), result.layers)
    assert_same(before, state(net))


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Stop])
@pytest.mark.parametrize("where", ["forward", "substitute", "user hook"])
def test_the_model_is_left_as_found_after_an_exception(net, images, error, where) -> None:
    def fail(*_):
        raise error("planned")

    substitute = {"deep.0": fail} if where == "substitute" else None
    handle = net.deep[0].register_forward_pre_hook(fail) if where == "user hook" else None
    original, net.features = net.features, fail if where == "forward" else net.features
    net.train()
    before = state(net)
    with pytest.raises(error, match="planned"):
        capture(net, images, ["conv", "deep.0", "fc"], gradient=True, substitute=substitute)
    assert_same(before, state(net))
    net.features = original
    if handle is not None:
        handle.remove()
    capture(net, images, ["conv", "deep.0", "fc"], gradient=True)


def test_a_plain_function_leaves_the_model_as_found(net, images) -> None:
    """The model behind a lambda is not known, and is in training mode: batch statistics must not leak."""
    net.train()
    before = state(net)
    result = capture(lambda x: net(x), images, [net.deep], gradient=True)
    assert_same(before, state(net))
    alone = torch.cat([capture(lambda x: net(x), one[None], [net.deep]).layers[0] for one in images])
    torch.testing.assert_close(result.layers[0], alone)


def test_frozen_weights_and_untouched_input(net, images) -> None:
    net.requires_grad_(False)
    x = images.clone().requires_grad_()
    result = capture(net, x, ["deep.0"], gradient=True)
    (gradient,) = torch.autograd.grad(result.output.sum(), result.layers)
    assert gradient.any()
    assert x.grad is None
    assert torch.equal(x, images)


# ---------------------------------------------------------------- modes around the call


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_under_a_mode_that_forbids_them(net, images, mode) -> None:
    expected = capture(net.eval(), images, ["deep.0"], gradient=True)
    (wanted,) = torch.autograd.grad(expected.output[:, 1].sum(), expected.layers)
    with mode():
        inside = images * 1  # an inference tensor under inference_mode
        result = capture(net, inside, ["deep.0"], gradient=True, additional_forward_args=inside.new_zeros(5))
        with gradients_enabled():
            (gradient,) = torch.autograd.grad(result.output[:, 1].sum(), result.layers)
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(gradient, wanted)


class NoGradBackbone(nn.Module):
    def __init__(self, mode) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Tanh())
        self.neck = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 5)
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        with self.mode():
            h = self.backbone(x)
        return self.head(self.neck(h).tanh().mean((2, 3)))


@pytest.mark.parametrize("layers", [["backbone.0"], ["backbone.0", "backbone.2"], ["backbone.0", "neck"]])
def test_a_backbone_under_its_own_no_grad(images, layers) -> None:
    torch.manual_seed(0)
    model = NoGradBackbone(torch.no_grad)
    result = capture(model, images, layers, gradient=True)
    gradients = torch.autograd.grad(result.output[:, 2].sum(), result.layers)
    model.mode = torch.enable_grad
    expected = capture(model, images, layers, gradient=True)
    wanted = torch.autograd.grad(expected.output[:, 2].sum(), expected.layers)
    for one, other in zip(gradients, wanted, strict=True):
        assert other.any()
        torch.testing.assert_close(one, other)


def test_a_model_that_is_wholly_decorated_with_no_grad(images) -> None:
    torch.manual_seed(0)
    calls = []

    class Encoder(Net):
        @torch.no_grad()
        def encode(self, x: Tensor) -> Tensor:
            calls.append(1)
            return self.forward(x)

    model = Encoder()
    result = capture(model.encode, images, ["deep.0"], gradient=True)
    assert len(calls) == 1  # nothing to try again
    assert torch.autograd.grad(result.output.sum(), result.layers)[0].any()


# ---------------------------------------------------------------- in-place operations


def test_an_in_place_operation_behind_the_layer_does_not_change_the_record(net, images) -> None:
    net.eval()
    plain = net.bn(net.conv(images)).detach()
    assert (plain < 0).any()
    for gradient in (False, True):
        result = capture(net, images, ["bn"], gradient=gradient)
        torch.testing.assert_close(result.layers[0].detach(), plain)


def test_the_layer_is_an_in_place_relu(net, images) -> None:
    net.eval()
    plain = net.bn(net.conv(images)).relu().detach()
    result = capture(net, images, ["relu"], gradient=True)
    torch.testing.assert_close(result.layers[0].detach(), plain)
    assert torch.autograd.grad(result.output.sum(), result.layers)[0].any()
    at_input = capture(net, images, ["relu"], attribute_to_layer_input=True)
    torch.testing.assert_close(at_input.layers[0], net.bn(net.conv(images)).detach())


class Overwriting(nn.Module):
    """The layer hands its input on, and the model overwrites that input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        kept = x * 2
        y = self.drop(kept)
        z = self.scale(y)
        kept += 100.0
        return (y + z + kept).mean((2, 3))


@pytest.mark.parametrize("gradient", [False, True])
def test_a_layer_that_hands_its_input_on(images, gradient) -> None:
    torch.manual_seed(0)
    model = Overwriting().eval()
    plain = model.conv(images).detach() * 2
    record = capture(model, images, ["drop"], gradient=gradient).layers[0]
    torch.testing.assert_close(record.detach(), plain)
    at_input = capture(model, images, ["scale"], gradient=gradient, attribute_to_layer_input=True).layers[0]
    torch.testing.assert_close(at_input.detach(), plain)


class Shortcut(nn.Module):
    """What goes into the layer goes along a shortcut as well; what is done in place is done to both."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.front, self.layer, self.branch = nn.Conv2d(3, 4, 3), layer, nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        y = self.layer(x)
        if isinstance(self.layer, nn.Identity | nn.Dropout):
            y += 1  # and so x
        return self.fc((self.branch(y).tanh() * x).mean((2, 3)))


def plainly(model: Shortcut, images: Tensor, at_input: bool) -> tuple[Tensor, Tensor]:
    """The layer's tensor, and the model's output as a function of it, without an operation in place."""
    before = model.front(images).detach()
    handed_on = isinstance(model.layer, nn.Identity | nn.Dropout)
    start = (before if at_input else model.layer(before.clone())).detach().requires_grad_()
    y = model.layer(start.clone()) if at_input else start
    y = y + 1 if handed_on else y
    x = y if handed_on or getattr(model.layer, "inplace", False) else start if at_input else before
    return start, model.fc((model.branch(y).tanh() * x).mean((2, 3)))


@pytest.mark.parametrize("at_input", [False, True])
@pytest.mark.parametrize(
    "layer", [nn.Identity, lambda: nn.Dropout(0.5), lambda: nn.ReLU(inplace=True), nn.ReLU, lambda: nn.Conv2d(4, 4, 1)]
)
def test_a_layers_input_goes_elsewhere_too(images, layer, at_input) -> None:
    """The output is the model's own, and the gradient counts every way to it."""
    torch.manual_seed(0)
    model = Shortcut(layer()).eval()
    start, output = plainly(model, images, at_input)
    expected = torch.autograd.grad(output[:, 2].sum(), start)[0]
    torch.testing.assert_close(output, model(images))
    with gradients_enabled():
        result = spatial_activations(model, images, "layer", gradient=True, attribute_to_layer_input=at_input)
        (gradient,) = result.gradients(result.output[:, 2])
    torch.testing.assert_close(result.output, output)
    torch.testing.assert_close((result.maps[0], gradient), (start, expected))
    plain = capture(model, images, "layer", attribute_to_layer_input=at_input)
    torch.testing.assert_close((plain.output, plain.layers[0]), (output, start))
    if type(model.layer) in (nn.ReLU, nn.Conv2d) and not getattr(model.layer, "inplace", False):
        # Captum replaces what is handed on by a copy.
        captums = LayerGradCam(model, model.layer).attribute(
            images, target=2, relu_attributions=False, attribute_to_layer_input=at_input
        )
        found = (gradient.mean((2, 3), keepdim=True) * start).sum(1, keepdim=True).detach()
        torch.testing.assert_close(found, captums, rtol=1e-4, atol=1e-6)


class Tokens(nn.Module):
    """A layer whose input, a view of patches, goes along a shortcut; ``early`` keeps a view from before the layer."""

    def __init__(self, early: bool = False) -> None:
        super().__init__()
        self.front, self.norm, self.hand_on = nn.Conv2d(3, 4, 2, 2), nn.LayerNorm(4), nn.Identity()
        self.fc, self.early = nn.Linear(4, 5), early

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        if self.early:
            flat = x.flatten(2)
            return self.fc((self.hand_on(x) * flat.view_as(x)).mean((2, 3)))
        t = x.flatten(2).transpose(1, 2)
        return self.fc((self.norm(t).relu() + t).mean(1))


def test_tokens_go_along_a_shortcut_too(images) -> None:
    model = Tokens().eval()
    tokens = model.front(images).flatten(2).transpose(1, 2).detach().requires_grad_()
    output = model.fc((model.norm(tokens).relu() + tokens).mean(1))
    expected = torch.autograd.grad(output[:, 2].sum(), tokens)[0]
    for names in (["norm"], ["front", "norm"]):  # alone, and beside an earlier layer
        with gradients_enabled():
            result = capture(model, images, names, gradient=True, attribute_to_layer_input=True)
            found = torch.autograd.grad(result.output[:, 2].sum(), result.layers[-1])[0]
        torch.testing.assert_close(found, expected)


def test_what_cannot_be_linked_runs_as_before(images) -> None:
    """A view from before the layer forbids it, and buffers without memory of their own are no reason to fail."""
    model = Tokens(early=True).eval()
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.lazy = nn.LazyLinear(2)
    result = capture(model, images, "hand_on", gradient=True)
    torch.testing.assert_close(result.output, model(images))


def test_what_the_model_keeps_gets_no_history(images) -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.drop, self.fc = nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.front(x)
            return self.fc(self.drop(self.last).mean((2, 3)))

    model = Keeping().eval()
    FeatureActivationMap(model, "drop", torch.eye(5)).attribute(images, target=1)
    assert not model.last.requires_grad
    assert model.last.is_leaf


def test_what_belongs_to_the_user_or_the_model_gets_no_history() -> None:
    """Images and buffers that go into a layer as they are."""

    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.rand(1, 3, 8, 8))
            self.first, self.second, self.conv = nn.Identity(), nn.Identity(), nn.Conv2d(3, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.first(x) * 2 + self.second(self.table)).mean((2, 3))

    model, images = Early().eval(), torch.rand(2, 3, 8, 8)
    for name in ("first", "second"):
        for at_input in (False, True):
            capture(model, images, name, gradient=True, attribute_to_layer_input=at_input)
            assert images.is_leaf
            assert model.table.is_leaf
            assert not images.requires_grad
            assert not model.table.requires_grad
    assert images._version == model.table._version == 0


# ---------------------------------------------------------------- gradients


def test_gradients_of_several_layers_equal_plain_autograd(net, images) -> None:
    net.eval()
    a = net.conv(images).detach().requires_grad_()
    b = net.bn(a)
    h = b.clone().relu()
    c = net.deep[0](h)
    out = net.fc((h + c.relu()).mean((2, 3)))
    wanted = torch.autograd.grad(out[:, 3].sum(), (a, b, c))
    result = capture(net, images, ["conv", "bn", "deep.0"], gradient=True)
    torch.testing.assert_close(result.output, out)
    for one, other in zip(torch.autograd.grad(result.output[:, 3].sum(), result.layers), wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_on_a_vision_transformer_equal_plain_autograd() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=12, depth=3, num_heads=2, num_classes=4
    ).eval()
    x = torch.rand(2, 3, 32, 32)
    kept = {}
    handles = [
        model.blocks[i].register_forward_hook(lambda m, _, out, i=i: (out.retain_grad(), kept.update({i: out}))[0])
        for i in (0, 1)
    ]
    model(x)[:, 2].sum().backward()
    for handle in handles:
        handle.remove()
    result = capture(model, x, ["blocks.1", model.blocks[0]], gradient=True)
    gradients = torch.autograd.grad(result.output[:, 2].sum(), result.layers)
    torch.testing.assert_close(gradients[0], kept[1].grad)
    torch.testing.assert_close(gradients[1], kept[0].grad)


class Untouchable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        raise AssertionError("the backward pass went below the first layer")


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_nothing_in_front_of_the_first_layer_is_recorded(images, mode) -> None:
    """Also when the model's own no_grad() makes a second pass necessary."""

    class Model(NoGradBackbone):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(Untouchable.apply(self.front(x)))

    torch.manual_seed(0)
    model = Model(mode)
    model.front = nn.Conv2d(3, 3, 1)
    x = images.clone().requires_grad_()
    result = capture(model, x, ["backbone.0", "neck"], gradient=True)
    assert result.layers[0].is_leaf
    result.output.sum().backward()
    assert x.grad is None
    assert model.front.weight.grad is None
    assert result.layers[0].grad.any()

    def functions(node, seen):
        if node is not None and node not in seen:
            seen.add(node)
            for following, _ in node.next_functions:
                functions(following, seen)
        return {type(one).__name__ for one in seen}

    assert not any("Untouchable" in name for name in functions(result.output.grad_fn, set()))


def test_without_gradient_nothing_is_recorded_at_all(net, images) -> None:
    result = capture(net, images, ["conv"])
    assert not result.output.requires_grad
    assert not result.layers[0].requires_grad


# ---------------------------------------------------------------- substitution


def test_substitution_replaces_what_runs_on_and_is_what_is_captured(net, images) -> None:
    net.eval()
    result = capture(net, images, ["deep.0"], substitute={"deep.0": torch.zeros_like})
    assert not result.layers[0].any()
    h = net.relu(net.bn(net.conv(images)))
    torch.testing.assert_close(result.output, net.fc(h.mean((2, 3))).detach())


def test_substitution_with_a_larger_batch_runs_the_front_once(images) -> None:
    torch.manual_seed(0)
    sizes = []
    front = nn.Conv2d(3, 4, 3)
    front.register_forward_hook(lambda _m, _i, out: sizes.append(len(out)))
    model = nn.Sequential(front, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    scale = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1)

    def expand(a: Tensor) -> Tensor:
        return torch.cat([a * s for s in scale])

    result = capture(model, images, ["1", model[0]], substitute={model[0]: expand}, gradient=True)
    assert sizes == [2]
    assert result.output.shape == (6, 2)
    assert result.layers[1].shape[0] == result.layers[0].shape[0] == 6
    expected = torch.cat([model[1:](front(images).detach() * s) for s in scale])
    torch.testing.assert_close(result.output, expected)
    assert torch.autograd.grad(result.output.sum(), result.layers)[1].shape[0] == 6


def test_bad_substitutes(net, images) -> None:
    result = capture(net, images, "conv", substitute={"conv": torch.zeros_like})
    assert torch.equal(result.output[0], result.output[1])
    net.lost = nn.Identity()
    with pytest.raises(LayerError, match="'lost' did not run"):
        capture(net, images, "lost", substitute={"lost": torch.zeros_like})
    with pytest.raises(InputError, match="must return a tensor"):
        capture(net, images, "conv", substitute={"conv": lambda a: None})


# ---------------------------------------------------------------- inputs of layers, containers


@pytest.mark.parametrize("gradient", [False, True])
def test_attribute_to_layer_input(net, images, gradient) -> None:
    net.eval()
    result = capture(net, images, ["deep.0", "fc"], gradient=gradient, attribute_to_layer_input=True)
    h = net.relu(net.bn(net.conv(images)))
    torch.testing.assert_close(result.layers[0].detach(), h.detach())
    pooled = (h + net.deep(h)).mean((2, 3))
    torch.testing.assert_close(result.layers[1].detach(), pooled.detach())


@pytest.mark.parametrize("call", ["positional", "keyword", "mixed"])
def test_layer_inputs_given_by_keyword(images, call) -> None:
    class Layer(nn.Module):
        def forward(self, mask, hidden_states=None):
            return hidden_states * mask if hidden_states is not None else mask

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()

        def forward(self, x):
            if call == "positional":
                return self.layer(x).mean((2, 3))
            if call == "keyword":
                return self.layer(mask=2, hidden_states=x).mean((2, 3))
            return self.layer(2, hidden_states=x).mean((2, 3))

    result = capture(Model(), images, ["layer"], attribute_to_layer_input=True, gradient=True)
    assert torch.equal(result.layers[0].detach(), images)
    factor = 1 if call == "positional" else 2
    gradient = torch.autograd.grad(result.output.sum(), result.layers)[0]
    torch.testing.assert_close(gradient, torch.full_like(images, factor / 64))
    cut = capture(Model(), images, "layer", substitute={"layer": torch.zeros_like}, attribute_to_layer_input=True)
    assert not cut.output.any()


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda t: (t, None), lambda out: out[0]),
        (lambda t: (torch.ones(2, dtype=torch.long), t), lambda out: out[1]),
        (lambda t: [t, "text"], lambda out: out[0]),
        (lambda t: {"mask": None, "hidden": t}, lambda out: out["hidden"]),
        (lambda t: Pair(None, t), lambda out: out.second),
        (lambda t: ModelOutput(last_hidden_state=t, pooled=None), lambda out: out.last_hidden_state),
    ],
    ids=["tuple", "second of a tuple", "list", "dict", "namedtuple", "ModelOutput"],
)
def test_containers(images, wrap, unwrap) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return wrap(self.conv(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()

        def forward(self, x):
            out = self.layer(x)
            assert type(out) is type(wrap(x))
            return unwrap(out).square().mean((2, 3))

    torch.manual_seed(0)
    model = Model()
    result = capture(model, images, ["layer"], gradient=True)
    plain = model.layer.conv(images).detach()
    torch.testing.assert_close(result.layers[0].detach(), plain)
    torch.testing.assert_close(torch.autograd.grad(result.output.sum(), result.layers)[0], plain * 2 / 36)
    assert not capture(model, images, ["layer"], substitute={"layer": torch.zeros_like}).output.any()


def test_layers_without_a_usable_tensor(images) -> None:
    class Odd(nn.Module):
        def __init__(self, value) -> None:
            super().__init__()
            self.value = value

        def forward(self, x):
            return self.value

    class Model(nn.Module):
        def __init__(self, value) -> None:
            super().__init__()
            self.odd = Odd(value)

        def forward(self, x):
            self.odd(x)
            return x.mean((2, 3))

    for value in (None, "text", (1, 2), {"ids": torch.ones(2, dtype=torch.long)}):
        with pytest.raises(LayerError, match=r"layer 'odd' returns .* contains no floating-point tensor"):
            capture(Model(value), images, ["odd"])
    with pytest.raises(LayerError, match=r"layer 'odd' has no gradient.*int64"):
        capture(Model(torch.ones(2, dtype=torch.long)), images, ["odd"], gradient=True)


# ---------------------------------------------------------------- names and bad layers


def test_a_layer_used_twice(images) -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 4, 3), relu)
    with pytest.raises(LayerError, match=r"'1' runs more than once"):
        capture(model, images, ["1"])
    with pytest.raises(LayerError, match=r"more than once"):
        capture(model, images, [relu], attribute_to_layer_input=True)


def test_a_layer_that_does_not_run(net, images) -> None:
    net.unused = nn.Conv2d(3, 4, 3)
    with pytest.raises(LayerError, match=r"'unused' did not run"):
        capture(net, images, ["unused"])
    with pytest.raises(LayerError, match=r"'Conv2d' did not run"):
        capture(net, images, [nn.Conv2d(3, 4, 3)])


def test_unknown_names_get_the_nearest_ones(net, images) -> None:
    with pytest.raises(LayerError, match=r"Net has no layer 'dep.0'. Did you mean 'deep.0'"):
        capture(net, images, ["dep.0"])
    with pytest.raises(LayerError, match=r"top-level layers are \['conv', 'bn', 'relu', 'deep', 'fc'\]"):
        capture(net, images, ["zzzzzzzz"])
    for bad in ("", "module", ".", "conv."):
        with pytest.raises(LayerError, match="has no layer"):
            capture(net, images, [bad])
    with pytest.raises(LayerError, match=r"must be a torch\.nn\.Module or its dotted name, got int"):
        capture(net, images, [3])


def test_a_plain_function_needs_the_layer_as_a_module(net, images) -> None:
    def function(x):
        return net(x)

    with pytest.raises(LayerError, match=r"'conv' cannot be looked up, because forward_func is a plain function"):
        capture(function, images, ["conv"])
    assert capture(function, images, [net.conv]).layers[0].shape == (2, 4, 8, 8)
    assert layer_name(function, net.conv) == "Conv2d"


@pytest.mark.parametrize("kind", ["method", "partial", "partial of a method", "partial of a partial"])
def test_methods_and_partials(net, images, kind) -> None:
    function = {
        "method": net.features,
        "partial": functools.partial(net, bias=1.0),
        "partial of a method": functools.partial(net.features),
        "partial of a partial": functools.partial(functools.partial(net), bias=2.0),
    }[kind]
    net.eval()
    result = capture(function, images, ["conv"], gradient=True)
    assert find_model(function) is net
    assert layer_name(function, net.deep[0]) == "deep.0"
    torch.testing.assert_close(result.output, function(images))
    assert torch.autograd.grad(result.output.sum(), result.layers)[0].any()


def test_a_submodule_that_is_really_called_module(images) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())

        def forward(self, x):
            return self.module(x)

    model = Wrapper()
    assert resolve_layer(model, "module") is model.module
    assert resolve_layer(model, "module.0") is resolve_layer(model, "0") is model.module[0]


# ---------------------------------------------------------------- wrappers


@pytest.mark.parametrize("name", ["deep.0", "module.deep.0"])
def test_data_parallel(net, images, name) -> None:
    parallel = nn.DataParallel(net)
    expected = capture(net, images, ["deep.0"]).layers[0]
    torch.testing.assert_close(capture(parallel, images, [name]).layers[0], expected)
    torch.testing.assert_close(capture(parallel, images, [parallel.module.deep[0]]).layers[0], expected)


@pytest.fixture(scope="module")
def compiled_forms():
    """Each form of compilation, already used once, so that a graph without our hooks exists."""
    compile_ = functools.partial(torch.compile, backend="eager")
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    forms = {}
    for form in ("model", "submodule", "in place", "method", "twice"):
        torch.manual_seed(0)
        net = Net().eval()
        plain = capture(net, images, ["deep.0"]).layers[0]
        call = net
        if form == "model":
            call = compile_(net)
        elif form == "submodule":
            net.deep = compile_(net.deep)
        elif form == "in place":
            net.compile(backend="eager")
        elif form == "method":
            call = compile_(net.forward)
        else:
            call = nn.DataParallel(compile_(net))
        with torch.no_grad():
            call(images)
        forms[form] = (call, net, images, plain)
    return forms


@pytest.mark.parametrize("form", ["model", "submodule", "in place", "method", "twice"])
def test_torch_compile(compiled_forms, form) -> None:
    call, net, images, plain = compiled_forms[form]
    stance = torch._dynamo.eval_frame._stance
    result = capture(call, images, ["deep.0"], gradient=True)
    torch.testing.assert_close(result.layers[0].detach(), plain)
    assert torch.autograd.grad(result.output.sum(), result.layers)[0].any()
    assert torch._dynamo.eval_frame._stance is stance
    with torch.no_grad():
        assert call(images).shape == (2, 5)
    if form == "submodule":
        assert resolve_layer(net, "deep") is net.deep._orig_mod
        assert capture(net, images, [net.deep]).layers[0].shape == plain.shape
        assert capture(net, images, ["deep._orig_mod.0"]).layers[0].shape == plain.shape


# ---------------------------------------------------------------- threads


def test_two_threads_on_one_model() -> None:
    """Each call records its own activations, and the model is in evaluation mode until the last call is over."""
    torch.manual_seed(0)
    meeting = threading.Barrier(2, timeout=20)
    late = threading.Event()

    class Meeting(nn.Module):
        def forward(self, x):
            meeting.wait()  # both are inside the forward pass
            if x[0, 0, 0, 0] > 0.5:
                assert late.wait(20)  # the other call has put everything back
            return x

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Identity(), nn.BatchNorm2d(4), nn.Flatten())
    model[0].weight.data.fill_(1.0)
    model[0].bias.data.zero_()
    model[2] = Meeting()
    model.train()
    before = state(model)
    inputs = [torch.full((1, 3, 2, 2), 0.1), torch.full((1, 3, 2, 2), 0.3)]
    results: dict[int, Tensor] = {}
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            results[i] = capture(model, inputs[i], ["0"], gradient=True).layers[0].detach()
        except BaseException as error:
            errors.append(error)
        finally:
            if i == 0:
                late.set()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []
    torch.testing.assert_close(results[0], torch.full((1, 4, 2, 2), 0.3))
    torch.testing.assert_close(results[1], torch.full((1, 4, 2, 2), 0.9))
    assert_same(before, state(model))


# ---------------------------------------------------------------- inputs


def test_bad_inputs(net, images) -> None:
    with pytest.raises(InputError, match=r"dtype torch.uint8; convert pixels.*images.float\(\) / 255"):
        capture(net, (images * 255).byte(), ["conv"])
    with pytest.raises(InputError, match=r"shape \(0, 3, 8, 8\) contain no example"):
        capture(net, images[:0], ["conv"])
    for bad in (images.tolist(), None, (), (images, 3)):
        with pytest.raises(InputError, match=r"must be a torch.Tensor or a tuple of tensors"):
            capture(net, bad, ["conv"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_inputs_are_warned_about(net, images, value) -> None:
    images[1, 2, 3, 4] = value
    with pytest.warns(InputWarning, match="NaN or infinite"):
        capture(net, images, ["conv"])
    with pytest.warns(InputWarning, match="NaN or infinite"):
        capture(lambda x, y: net(x), (torch.zeros(2, 3, 8, 8), images), [net.conv])


def test_large_finite_inputs_are_not_warned_about(net) -> None:
    capture(net.double(), torch.full((2, 3, 8, 8), 1e300, dtype=torch.float64), ["conv"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(net, images, dtype) -> None:
    result = capture(net.to(dtype), images.to(dtype), ["deep.0"], gradient=True)
    assert result.layers[0].dtype == result.output.dtype == dtype
    assert torch.autograd.grad(result.output.sum(), result.layers)[0].dtype == dtype


def test_channels_last(net, images) -> None:
    expected = capture(net, images, ["conv", "deep.0"], gradient=True)
    result = capture(
        net.to(memory_format=torch.channels_last),
        images.to(memory_format=torch.channels_last),
        ["conv", "deep.0"],
        gradient=True,
    )
    wanted = torch.autograd.grad(expected.output.sum(), expected.layers)
    for i, gradient in enumerate(torch.autograd.grad(result.output.sum(), result.layers)):
        torch.testing.assert_close(result.layers[i], expected.layers[i])
        torch.testing.assert_close(gradient, wanted[i])


def test_several_inputs_and_additional_arguments(images) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x, y, scale, flag):
            assert flag == "flag"
            return (self.conv(x) * scale).mean((2, 3)) + y.mean()

    model = Two()
    result = capture(model, (images, torch.ones(2)), ["conv"], additional_forward_args=(3.0, "flag"))
    torch.testing.assert_close(result.output, (model(images, torch.ones(2), 3.0, "flag")).detach())


def test_one_additional_argument_that_is_not_a_tuple(net, images) -> None:
    net.eval()
    bias = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    result = capture(net, images, ["conv"], additional_forward_args=bias)
    torch.testing.assert_close(result.output, net(images).detach() + bias)


def test_torchs_own_encoder_layers_run_their_hooks() -> None:
    """Their fused path for inference would skip the layers inside."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    result = capture(encoder, torch.rand(2, 5, 8), ["layers.0.linear1", "layers.1.self_attn", "layers.0"])
    assert [tuple(one.shape) for one in result.layers] == [(2, 5, 16), (2, 5, 8), (2, 5, 8)]


def test_nan_weights_are_warned_about_once_and_ruled_out_classes_are_not(net, images) -> None:
    net.eval()
    with torch.no_grad():
        net.fc.bias[0] = -torch.inf  # a class that the model rules out
    capture(net, images, ["conv", "deep.0"])
    with torch.no_grad():
        net.fc.bias[0] = torch.nan
    with pytest.warns(InputWarning, match="the model's output contains NaN"):
        capture(net, images, ["conv", "deep.0"])
    with torch.no_grad():
        net.deep[0].weight[0] = torch.inf
    with pytest.warns(
        InputWarning, match=r"layer 'deep.0' contains NaN or infinite values although the inputs"
    ) as said:
        capture(net, images, ["conv", "deep.0"])
    assert len(said) == 1
    images[0, 0, 0, 0] = torch.nan
    for read in (capture, spatial_activations):
        with pytest.warns(InputWarning, match="the inputs contain NaN") as said:
            read(net, images, ["conv", "deep.0"])
        assert len(said) == 1


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 4, 8, 8), r"\(2, 4, 8, 8\).* have 4 channels.*takes 3.*inputs\[:, :3\]"),
        (torch.rand(2, 8, 8, 3), "have 8 channels.*move the channels to the front"),
        (torch.rand(2, 2, 8, 8), r"have 2 channels.*takes 3.*inputs_for\(model, files, bands=range\(3\)\)"),
        (torch.rand(2, 1, 8, 8), r"have 1 channels.*takes 3.*inputs.expand\(-1, 3, -1, -1\)"),
        (
            torch.rand(2, 3, 8, 8, dtype=torch.float64),
            "inputs are torch.float64, but the model's weights are torch.float32",
        ),
    ],
)
def test_images_that_the_model_does_not_take(images, message):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    with pytest.raises(InputError, match=message):
        capture(model, images, ["2"])


def test_other_errors_of_the_model_stay_as_they_are():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(5, 5, 3))
    with pytest.raises(RuntimeError, match="to have 5 channels, but got 4"):
        capture(model, torch.rand(1, 3, 8, 8), ["0"])
