"""SALFCBM as a network: what it computes, how it reads its backbone, and that it is an ordinary module."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from salf_networks import (
    CONCEPTS,
    ChannelsLast,
    ConvNet,
    Tokens,
    awake,
    conv_model,
    pictures,
    slow_activations,
    slow_features,
    slow_maps,
    token_model,
)
from torch import nn
from torch.nn import functional as F

from captum_concepts.concepts import Vocabulary
from captum_concepts.errors import InputError, LayerError, LayoutError
from captum_concepts.models.salf_cbm import SALFCBM


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


class TestFormula:
    def test_maps_activations_and_logits_are_the_papers(self):
        model, x = conv_model(), pictures()
        maps, activations = slow_maps(model, x), slow_activations(model, x)
        torch.testing.assert_close(model.concept_maps(x), maps)
        torch.testing.assert_close(model.concept_activations(x), activations, atol=1e-5, rtol=1e-5)
        for n in range(len(x)):
            for label in range(3):
                logit = sum(model.head.weight[label, m] * activations[n, m] for m in range(5)) + model.head.bias[label]
                torch.testing.assert_close(model(x)[n, label], logit, atol=1e-5, rtol=1e-5)

    def test_features_are_left_alone_where_the_grid_fits(self):
        model, x = conv_model(grid=(8, 6)), pictures(height=32, width=24)
        seen = []
        handle = model.backbone.body.register_forward_hook(lambda _m, _a, output: seen.append(output.clone()))
        model.backbone(x)
        handle.remove()
        assert torch.equal(model.features(x), seen[0])

    @pytest.mark.parametrize("size", [(32, 32), (40, 24), (20, 64), (224, 224)])
    def test_images_of_any_size(self, size):
        model, x = conv_model(), pictures(2, *size)
        assert model.features(x).shape == (2, 8, 7, 7)
        torch.testing.assert_close(model.features(x), slow_features(model, x))

    def test_unfitted_standardisation_is_the_identity(self):
        torch.manual_seed(0)
        model, x = SALFCBM(awake(ConvNet()), "body", CONCEPTS, 3).eval(), pictures()
        torch.testing.assert_close(model.concept_activations(x), slow_maps(model, x).mean((2, 3)))

    def test_pooling_first_and_pooling_last_agree(self):
        model, x = conv_model(), pictures()
        expected = model(x)
        seen = []
        handle = model.bottleneck.register_forward_hook(lambda _m, _a, output: seen.append(output))
        watched = model(x)
        handle.remove()
        assert seen[0].shape == (4, 5, 7, 7)
        torch.testing.assert_close(watched, expected)

    def test_another_bottleneck_is_not_pooled_first(self):
        model, x = conv_model(), pictures()
        model.bottleneck = nn.Sequential(model.bottleneck, nn.ReLU())
        expected = slow_maps_of_sequence(model, x)
        torch.testing.assert_close(model.concept_activations(x), expected, atol=1e-5, rtol=1e-5)


def slow_maps_of_sequence(model: SALFCBM, x: torch.Tensor) -> torch.Tensor:
    maps = model.bottleneck(slow_features(model, x))
    return (maps.mean((2, 3)) - model.concept_mean) / model.concept_std


class TestBackbones:
    @pytest.mark.parametrize("batch_first", [True, False])
    def test_tokens_with_and_without_cls(self, batch_first):
        x = pictures(3, 16, 16)
        model = token_model(batch_first, grid=(4, 4))
        seen = []
        handle = model.backbone.block.register_forward_hook(lambda _m, _a, output: seen.append(output))
        model.backbone(x)
        handle.remove()
        tokens = seen[0] if batch_first else seen[0].transpose(0, 1)
        patches = torch.stack([tokens[:, 1 + 4 * i : 5 + 4 * i].transpose(1, 2) for i in range(4)], 2)
        torch.testing.assert_close(model.features(x), patches)
        both = token_model(batch_first, grid=(4, 4), cls_token=True)
        assert both.bottleneck.in_channels == both.feature_dim == 16
        expected = torch.cat([patches, tokens[:, 0, :, None, None].expand(-1, -1, 4, 4)], 1)
        torch.testing.assert_close(both.features(x), expected)

    def test_as_many_images_as_tokens(self):
        x = pictures(17, 16, 16)
        for batch_first in (True, False):
            model = token_model(batch_first)
            torch.testing.assert_close(model(x)[:2], model(x[:2]))

    def test_tokens_of_another_size_and_shape(self):
        model, x = token_model(grid=(8, 3)), pictures(2, 32, 12)
        seen = []
        handle = model.backbone.block.register_forward_hook(lambda _m, _a, output: seen.append(output))
        model.backbone(x)
        handle.remove()
        torch.testing.assert_close(model.features(x), seen[0][:, 1:].transpose(1, 2).reshape(2, 8, 8, 3))

    def test_channels_last(self):
        net = ChannelsLast()
        model = SALFCBM(net, "norm", CONCEPTS, 3, grid=(4, 4))
        x = pictures(2, 16, 16)
        torch.testing.assert_close(model.features(x), net.norm(net.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    def test_layer_as_module_name_or_the_backbone_itself(self):
        net, x = awake(ConvNet()), pictures()
        by_module = SALFCBM(net, net.stem[0], CONCEPTS, 3)
        assert by_module.layer == "stem.0"
        by_name = SALFCBM(net, "stem.0", CONCEPTS, 3)
        assert torch.equal(by_module.features(x), by_name.features(x))
        trunk = nn.Sequential(net.stem, net.body)
        whole = SALFCBM(trunk, trunk, CONCEPTS, 3)
        assert whole.layer == ""
        assert torch.equal(whole.features(x), SALFCBM(net, "body", CONCEPTS, 3).features(x))
        assert not [name for name in by_module.state_dict() if name.startswith("layer")]

    def test_constructor_arguments_are_attributes(self):
        net = awake(ConvNet())
        model = SALFCBM(net, "body", Vocabulary(CONCEPTS), 2, (5, 6), class_names=["a", "b"], metadata={"data": "x"})
        assert model.backbone is net
        assert (model.layer, model.concepts, model.num_classes, model.grid) == ("body", CONCEPTS, 2, (5, 6))
        assert (model.cls_token, model.class_names, model.freeze_backbone) == (False, ["a", "b"], True)
        assert (model.layout, model.prefix_tokens, model.feature_dim, model.metadata) == (
            "auto",
            None,
            8,
            {"data": "x"},
        )
        assert isinstance(model.bottleneck, nn.Conv2d)
        assert model.bottleneck.weight.shape == (5, 8, 1, 1)
        assert model.bottleneck.bias is None
        assert model.head.weight.shape == (2, 5)

    def test_a_known_width_needs_no_probe(self):
        calls = []

        class Counting(ConvNet):
            def forward(self, x):
                calls.append(tuple(x.shape))
                return super().forward(x)

        net = awake(Counting())
        assert SALFCBM(net, "body", CONCEPTS, 3, feature_dim=8).feature_dim == 8
        assert calls == []
        SALFCBM(net, "body", CONCEPTS, 3, input_size=(20, 28))
        assert calls == [(1, 3, 20, 28)]

    def test_the_probe_leaves_no_trace(self):
        net = awake(ConvNet()).train()
        trunk = nn.Sequential(net.stem, net.body)
        before = copy.deepcopy(net.state_dict())
        states = []
        for model, layer, width in ((net, "body", 8), (net, "body", None), (trunk, "", None)):
            torch.manual_seed(5)
            SALFCBM(model, layer, CONCEPTS, 3, freeze_backbone=False, feature_dim=width)
            states.append(torch.get_rng_state())
        assert torch.equal(states[0], states[1])  # the first needs no probe
        assert torch.equal(states[0], states[2])
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert net.training
        assert net.stem[1].training
        assert hooks(net) == 0
        assert all(p.grad is None for p in net.parameters())

    def test_a_head_for_one_size_only_is_never_reached(self):
        class Flat(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
                self.fc = nn.Linear(8 * 7 * 7, 4)

            def forward(self, x):
                return self.fc(self.conv(x).flatten(1))

        model = SALFCBM(Flat(), "conv", CONCEPTS, 3)
        assert model(pictures(2, 40, 30)).shape == (2, 3)

    def test_nothing_behind_the_layer_is_computed(self):
        model = conv_model()
        reached = []
        model.backbone.fc.register_forward_pre_hook(lambda *_: reached.append(1))
        model(pictures())
        assert reached == []

    def test_hooks_around_the_layer_still_run_and_features_are_kept_from_in_place_operations(self):
        model, x = conv_model("body.0"), pictures()
        expected = model.features(x)
        assert (expected < 0).any()
        seen = []
        handle = model.backbone.register_forward_hook(lambda _m, _a, output: seen.append(output))
        torch.testing.assert_close(model.features(x), expected)
        handle.remove()
        assert len(seen) == 1

    def test_a_users_hook_on_the_layer_takes_effect(self):
        model, x = conv_model(), pictures()
        handle = model.backbone.body.register_forward_hook(lambda _m, _a, output: torch.zeros_like(output))
        assert not model.features(x).any()
        handle.remove()
        assert model.features(x).any()

    def test_a_backbone_compiled_in_place(self):
        model, x = conv_model(), pictures()
        expected = model(x)
        runs = []
        model.backbone.stem[0].register_forward_hook(lambda *_: runs.append(1))
        model.backbone.body.compile(backend="eager")
        model.backbone.compile(backend="eager")
        model.backbone(x)
        runs.clear()
        torch.testing.assert_close(model(x), expected)
        assert len(runs) == 1

    def test_a_wrapped_backbone(self):
        net, x = awake(ConvNet()), pictures()
        torch.manual_seed(3)
        plain = SALFCBM(net, "body", CONCEPTS, 3)
        for wrapper in (nn.DataParallel(net), torch.compile(net, backend="eager")):
            torch.manual_seed(3)
            model = SALFCBM(wrapper, "body", CONCEPTS, 3)
            torch.testing.assert_close(model(x), plain(x))


class TestAsModule:
    def test_state_dict_round_trip(self):
        model, x = conv_model(), pictures()
        torch.manual_seed(9)
        other = SALFCBM(ConvNet(), "body", CONCEPTS, 3).eval()
        assert not torch.allclose(other(x), model(x))
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(other(x), model(x))
        own = {name for name in model.state_dict() if not name.startswith("backbone.")}
        assert own == {"bottleneck.weight", "head.weight", "head.bias", "concept_mean", "concept_std"}
        model.calibrate(pictures(30), torch.rand(30, 5) > 0.5)
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(other.presence(x), model.presence(x))
        other.load_state_dict({"head.bias": torch.zeros(3)}, strict=False)
        assert torch.equal(other.presence(x), model.presence(x))
        other.load_state_dict(conv_model().state_dict(), strict=True)
        assert other.presence_slope is None

    def test_deepcopy_is_independent(self):
        model, x = conv_model(), pictures()
        expected = model(x)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            twin.backbone.body[0].weight.zero_()
            twin.bottleneck.weight.zero_()
        assert torch.equal(model(x), expected)
        assert not torch.equal(twin(x), expected)

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.1)])
    def test_dtypes(self, dtype, tolerance):
        model, x = conv_model(), pictures()
        expected = model(x)
        model.to(dtype)
        logits = model(x.to(dtype))
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.float(), expected.float(), atol=tolerance, rtol=tolerance)

    def test_it_follows_a_backbone_in_double_precision(self):
        model = SALFCBM(awake(ConvNet()).double(), "body", CONCEPTS, 3)
        assert model(pictures().double()).dtype == torch.float64

    def test_autocast(self):
        model, x = conv_model(), pictures()
        expected = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x)
            logits.float().sum().backward()
        torch.testing.assert_close(logits.float(), expected, atol=0.1, rtol=0.1)
        assert model.bottleneck.weight.grad.isfinite().all()

    def test_a_frozen_backbone_stays_frozen(self):
        model, x = conv_model(), pictures()
        statistics = copy.deepcopy(model.backbone.state_dict())
        model.train()
        assert model.training
        assert model.bottleneck.training
        assert not any(m.training for m in model.backbone.modules())
        x.requires_grad_()
        model(x).sum().backward()
        assert all(p.grad is None for p in model.backbone.parameters())
        assert model.bottleneck.weight.grad.abs().sum() > 0
        assert x.grad.abs().sum() > 0
        assert all(torch.equal(v, statistics[name]) for name, v in model.backbone.state_dict().items())

    def test_a_trained_backbone(self):
        torch.manual_seed(0)
        net = ConvNet()
        model = SALFCBM(net, "body", CONCEPTS, 3, freeze_backbone=False).train()
        assert net.training
        assert not net.fc.weight.requires_grad  # it would wait for gradients for ever
        before = net.stem[1].running_mean.clone()
        model(pictures()).sum().backward()
        assert net.stem[0].weight.grad.abs().sum() > 0
        assert not torch.equal(before, net.stem[1].running_mean)
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        assert model.eval() is model
        assert not net.training

    def test_no_hook_is_left_also_after_an_exception(self):
        model = conv_model()
        model(pictures())
        assert hooks(model) == 0
        with pytest.raises(InputError, match="5 channels"):
            model(torch.rand(2, 5, 32, 24))  # five channels
        assert hooks(model) == 0
        assert "captum_concepts" not in model.backbone.body._forward_hooks

    def test_threads_do_not_see_each_other(self):
        model = conv_model()
        inputs = [pictures(seed=seed) for seed in range(6)]
        expected = [model(x) for x in inputs]
        found: list = [None] * 6

        def run(i):
            for _ in range(10):
                found[i] = model(inputs[i])

        threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert hooks(model) == 0

    def test_results_do_not_depend_on_the_batch(self):
        model, x = conv_model(), pictures(6)
        torch.testing.assert_close(torch.cat([model(one) for one in x.split(1)]), model(x))

    def test_print(self):
        assert "layer='body', 5 concepts, grid=(7, 7)" in repr(conv_model())


class TestSelectConcepts:
    @pytest.mark.parametrize("chosen", [["grass", "striped fur"], [2, 0], torch.tensor([2, 0]), [2, -5]])
    def test_rows_in_order(self, chosen):
        model, x = conv_model(), pictures()
        part = model.select_concepts(chosen)
        assert part.concepts == ["grass", "striped fur"]
        assert part.backbone is model.backbone
        torch.testing.assert_close(part.concept_activations(x), model.concept_activations(x)[:, [2, 0]])
        expected = model.concept_activations(x)[:, [2, 0]] @ model.head.weight[:, [2, 0]].T + model.head.bias
        torch.testing.assert_close(part(x), expected)
        with torch.no_grad():
            part.bottleneck.weight.zero_()
        assert model.bottleneck.weight.abs().sum() > 0

    def test_mask_and_state(self):
        model = conv_model(metadata={"data": "x"})
        part = model.train().select_concepts([True, False, False, False, True])
        assert part.concepts == ["striped fur", "windows"]
        assert part.training
        assert model.training
        assert not part.backbone.training
        assert part.metadata == {"data": "x"}
        assert part.class_names == model.class_names

    def test_a_backbone_in_training_stays_in_training(self):
        model = SALFCBM(ConvNet(), "body", CONCEPTS, 3, freeze_backbone=False).train()
        model.backbone.body.eval()  # batch statistics of a part held still
        part = model.select_concepts([0])
        assert part.training
        assert part.head.training
        assert model.backbone.stem[1].training
        assert not model.backbone.body[1].training

    @pytest.mark.parametrize(
        ("chosen", "message"),
        [([], "no concept"), (["gras"], "Did you mean 'grass'"), ([0, 0], "more than once"), ([7], "out of range")],
    )
    def test_bad(self, chosen, message):
        with pytest.raises(InputError, match=message):
            conv_model().select_concepts(chosen)


class TestBadInput:
    @pytest.mark.parametrize(
        ("concepts", "message"),
        [
            ([], "there is no concept"),
            (["a", "a"], "more than once: \\['a'\\]"),
            (["a", " "], "non-empty"),
            (["a", 3], "must be non-empty strings"),
            ("abc", "list of names"),
            (None, "list of names"),
        ],
    )
    def test_concepts(self, concepts, message):
        with pytest.raises(InputError, match=message):
            SALFCBM(ConvNet(), "body", concepts, 3)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"grid": (0, 7)}, "grid"),
            ({"grid": (7, 7, 7)}, "grid"),
            ({"grid": 2.5}, "grid"),
            ({"num_classes": 0}, "num_classes"),
            ({"num_classes": True}, "num_classes"),
            ({"class_names": ["a"]}, "1 class names for 3"),
            ({"class_names": ["a", "b", "b"]}, "more than once"),
            ({"metadata": ["x"]}, "metadata must be a dictionary"),
            ({"layout": "NCWH"}, "layout must be one of"),
            ({"input_size": (32, -1)}, "input_size"),
        ],
    )
    def test_options(self, options, message):
        arguments = {"num_classes": 3, **options}
        with pytest.raises(InputError, match=message):
            SALFCBM(ConvNet(), "body", CONCEPTS, **arguments)

    def test_backbone_and_layer(self):
        with pytest.raises(InputError, match=r"must be a torch\.nn\.Module"):
            SALFCBM(lambda x: x, "body", CONCEPTS, 3)
        with pytest.raises(LayerError, match="Did you mean 'body'"):
            SALFCBM(ConvNet(), "bodi", CONCEPTS, 3)
        with pytest.raises(LayerError, match="not part of the backbone"):
            SALFCBM(ConvNet(), nn.ReLU(), CONCEPTS, 3)
        with pytest.raises(LayoutError, match="not a grid of positions"):
            SALFCBM(ConvNet(), "fc", CONCEPTS, 3)
        with pytest.raises(LayerError, match="cls_token=True"):
            SALFCBM(ConvNet(), "body", CONCEPTS, 3, cls_token=True)

    def test_a_pooled_layer_cannot_say_where(self):
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        with pytest.raises(LayoutError, match="single position"):
            SALFCBM(net, "1", CONCEPTS, 3)
        assert SALFCBM(net, "1", CONCEPTS, 3, grid=(1, 1))(pictures()).shape == (4, 3)  # a bottleneck without space

    def test_a_layer_that_runs_twice_or_never(self):
        class Twice(ConvNet):
            def forward(self, x):
                return self.relu(self.body(self.stem(x)) + 1).mean((2, 3)) + self.relu(x).mean()

        with pytest.raises(LayerError, match="more than once"):
            SALFCBM(Twice(), "relu", CONCEPTS, 3)
        with pytest.raises(LayerError, match="did not run"):
            SALFCBM(Twice(), "fc", CONCEPTS, 3)

    def test_a_failed_construction_leaves_the_backbone_as_it_was(self):
        net = ConvNet().train()
        with pytest.raises(LayoutError):
            SALFCBM(net, "fc", CONCEPTS, 3)
        assert net.training
        assert all(p.requires_grad for p in net.parameters())
        assert hooks(net) == 0

    def test_a_backbone_that_takes_no_image(self):
        with pytest.raises(InputError, match="pass input_size="):
            SALFCBM(nn.Sequential(nn.Linear(5, 5)), "0", CONCEPTS, 3)

    @pytest.mark.parametrize("x", [torch.rand(3, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)])
    def test_images(self, x):
        with pytest.raises(InputError, match=r"floating-point batch \(N, C, H, W\)"):
            conv_model()(x)

    @pytest.mark.parametrize(
        ("mean", "std", "message"),
        [
            ([0.0] * 4, [1.0] * 5, "mean must be 5 finite numbers"),
            ([0.0] * 5, [[1.0]] * 5, "std must be 5 finite numbers"),
            ([0.0, float("nan"), 0, 0, 0], [1.0] * 5, "mean must be"),
            ([0.0] * 5, [1.0, 0.0, 1.0, 1.0, -1.0], r"are constant, so drop them: \['wheels', 'windows'\]"),
        ],
    )
    def test_standardisation(self, mean, std, message):
        model = conv_model()
        before = model.concept_mean.clone()
        with pytest.raises(InputError, match=message):
            model.set_standardization(mean, std)
        assert torch.equal(model.concept_mean, before)


def test_tokens_that_fit_no_grid_are_an_error():
    class Pruned(Tokens):
        """Drops a token of large images, as token pruning does."""

        def forward(self, x):
            tokens = self.patch(x).flatten(2).transpose(1, 2)
            kept = tokens[:, : -1 if x.shape[-1] > 16 else None]
            return self.block(torch.cat([self.cls_token.expand(x.shape[0], -1, -1), kept], 1))[:, 0]

    model = SALFCBM(Pruned().eval(), "block", CONCEPTS, 3, input_size=(16, 16))
    assert model(pictures(1, 16, 16)).shape == (1, 3)
    with pytest.raises(LayoutError, match=r"layer 'block' returns \(1, 20, 8\)"):
        model(pictures(1, 16, 20))


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("size", [(18, 16), (31, 22), (16, 41), (64, 16)])
def test_tokens_of_sizes_that_patches_do_not_divide(size, padding):
    """Borders are cut, or padded: the grid is rounded down, or up."""
    torch.manual_seed(0)
    net = Tokens().eval()
    net.patch.padding = (padding, padding)
    x = pictures(2, *size)
    model = SALFCBM(net, "block", CONCEPTS, 3, (4, 4), input_size=(16, 16))
    grid = net.patch(x).shape[-2:]
    tokens = net.block(torch.cat([net.cls_token.expand(2, -1, -1), net.patch(x).flatten(2).transpose(1, 2)], 1))
    maps = tokens[:, 1:].transpose(1, 2).reshape(2, 8, *grid)
    expected = F.interpolate(maps, (4, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model.features(x), maps if tuple(grid) == (4, 4) else expected)


def test_the_class_token_is_the_first_of_the_prefix():
    class Registers(Tokens):
        def forward(self, x):
            tokens = self.patch(x).flatten(2).transpose(1, 2)
            cls = self.cls_token.expand(x.shape[0], -1, -1)
            return self.block(torch.cat([cls, cls + 1, cls - 2, tokens], 1))[:, 0]

    net, x = Registers().eval(), pictures(2, 16, 16)
    model = SALFCBM(net, "block", CONCEPTS, 3, (4, 4), cls_token=True, prefix_tokens=3, input_size=(16, 16))
    seen = []
    handle = net.block.register_forward_hook(lambda _m, _a, output: seen.append(output))
    net(x)
    handle.remove()
    expected = seen[0][:, 0, :, None, None].expand(-1, -1, 4, 4)
    torch.testing.assert_close(model.features(x)[:, 8:], expected)
    torch.testing.assert_close(model.features(x)[:, :8], seen[0][:, 3:].transpose(1, 2).reshape(2, 8, 4, 4))


def test_both_networks_of_the_helper_differ_in_layout():
    assert Tokens(batch_first=False)(pictures(2, 16, 16)).shape == (2, 4)
