"""Layouts: every architecture without hints, the right position in the right cell, and no wrong guess in silence."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from captum_concepts.activations import Layout, infer_layout, spatial_activations
from captum_concepts.activations.layout import ModelTraits
from captum_concepts.errors import InputError, LayerError, LayoutError

# ---------------------------------------------------------------- the architectures, built small


def _torchvision(name: str) -> nn.Module:
    import torchvision.models as tv

    swin = {"patch_size": [4, 4], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    v2 = {"block": tv.swin_transformer.SwinTransformerBlockV2, "downsample_layer": tv.swin_transformer.PatchMergingV2}
    block = tv.convnext.CNBlockConfig
    build = {
        "resnet": tv.resnet18,
        "vgg": lambda: nn.ModuleDict({"features": tv.vgg.make_layers(tv.vgg.cfgs["A"], batch_norm=True)}),
        "densenet": lambda: tv.DenseNet(8, (2, 2, 2, 2), 16),
        "mobilenet_v2": lambda: tv.mobilenet_v2(width_mult=0.25),
        "mobilenet_v3": tv.mobilenet_v3_small,
        "efficientnet": tv.efficientnet_b0,
        "convnext": lambda: tv.ConvNeXt([block(16, 32, 1), block(32, None, 1)]),
        "swin": lambda: tv.SwinTransformer(**swin),
        "swin_v2": lambda: tv.SwinTransformer(**swin, **v2),
        "maxvit": lambda: tv.MaxVit((64, 64), 24, 2, [24, 32], [1, 2], 8, 0.0, num_classes=3),
        "vit": lambda: tv.VisionTransformer(64, 16, 2, 2, 24, 48, num_classes=4),
    }
    model = build[name]()
    if name == "vgg":  # without the 120 million weights of its head
        model.forward = lambda x: model["features"](x)
    return model


def _timm(name: str) -> nn.Module:
    import timm

    small = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    name, settings_ = {
        "vit with registers": ("vit_small_patch14_reg4_dinov2", {"img_size": (42, 70), **small}),
        "deit": ("deit_tiny_distilled_patch16_224", {"img_size": (64, 96), **small}),
        "beit": ("beit_base_patch16_224", {"img_size": 64, **small}),
        "swin": (
            "swin_tiny_patch4_window7_224",
            {"img_size": (64, 96), "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)},
        ),
        "convnext": ("convnext_atto", {}),
        "hybrid": ("vit_tiny_r_s16_p8_224", {"img_size": (64, 96), **small}),
        "cait": ("cait_xxs24_224", {"img_size": 64, **small}),
        "pvt": ("pvt_v2_b0", {}),
    }[name]
    return timm.create_model(name, **settings_)


def _open_clip(name: str) -> nn.Module:
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    vision = {
        "vit": CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=16, image_size=64),
        "resnet": CLIPVisionCfg(layers=(1, 1, 1, 1), width=16, image_size=64),
    }[name]
    return CustomTextCLIP(16, vision, CLIPTextCfg(width=16, heads=2, layers=1, vocab_size=20)).visual


@functools.cache
def build(library: str, name: str) -> nn.Module:
    torch.manual_seed(0)
    return {"torchvision": _torchvision, "timm": _timm, "open_clip": _open_clip}[library](name).eval()


# library, model, image size, {layer: (kind, grid, prefix tokens)}
WIDE = (64, 96)
CASES = [
    ("torchvision", "resnet", WIDE, {"conv1": (32, 48), "layer1": (16, 24), "layer2.0": (8, 12), "layer4": (2, 3)}),
    ("torchvision", "vgg", WIDE, {"features.2": (64, 96), "features.3": (32, 48), "features": (2, 3)}),
    ("torchvision", "densenet", WIDE, {"features.denseblock1": (16, 24), "features.norm5": (2, 3)}),
    ("torchvision", "mobilenet_v2", WIDE, {"features.0.2": (32, 48), "features.3": (16, 24), "features": (2, 3)}),
    ("torchvision", "mobilenet_v3", WIDE, {"features.0": (32, 48), "features.4": (4, 6), "features": (2, 3)}),
    ("torchvision", "efficientnet", WIDE, {"features.1": (32, 48), "features.3": (8, 12), "features": (2, 3)}),
    ("torchvision", "convnext", WIDE, {"features.0": (16, 24), "features.1": (16, 24), "features": (8, 12)}),
    ("torchvision", "swin", WIDE, {"features.0": "NHWC 16 24", "features.1.0.norm1": "NHWC 16 24"}),
    ("torchvision", "swin", WIDE, {"features.2": "NHWC 8 12", "norm": "NHWC 8 12", "permute": (8, 12)}),
    ("torchvision", "swin_v2", WIDE, {"features.1": "NHWC 16 24", "features.3": "NHWC 8 12", "permute": (8, 12)}),
    ("torchvision", "maxvit", (64, 64), {"stem": (32, 32), "blocks.0": (16, 16), "blocks.1": (8, 8)}),
    ("torchvision", "vit", (64, 64), {"conv_proj": (4, 4), "encoder.layers.encoder_layer_0": "NLC 4 4 1"}),
    ("torchvision", "vit", (64, 64), {"encoder.layers.encoder_layer_0.mlp": "NLC 4 4 1", "encoder": "NLC 4 4 1"}),
    ("timm", "vit with registers", (42, 70), {"patch_embed": "NLC 3 5 0", "blocks.0": "NLC 3 5 5"}),
    ("timm", "vit with registers", (42, 70), {"blocks.0.attn": "NLC 3 5 5", "norm": "NLC 3 5 5"}),
    ("timm", "deit", WIDE, {"blocks.0": "NLC 4 6 2", "blocks.1.norm2": "NLC 4 6 2", "norm": "NLC 4 6 2"}),
    ("timm", "beit", (64, 64), {"blocks.0": "NLC 4 4 1", "blocks.1.mlp": "NLC 4 4 1"}),
    ("timm", "swin", WIDE, {"patch_embed": "NHWC 16 24", "layers.0.blocks.1": "NHWC 16 24", "norm": "NHWC 8 12"}),
    ("timm", "convnext", WIDE, {"stem": (16, 24), "stages.1": (8, 12), "stages.3": (2, 3)}),
    ("timm", "hybrid", WIDE, {"patch_embed.backbone": (16, 24), "patch_embed": "NLC 2 3 0", "blocks.1": "NLC 2 3 1"}),
    ("timm", "cait", (64, 64), {"blocks.0": "NLC 4 4 0", "blocks.1": "NLC 4 4 0"}),
    ("timm", "pvt", WIDE, {"stages.0.blocks.0": "NLC 16 24 0", "stages.1": (8, 12), "stages.3.blocks.0": "NLC 2 3 0"}),
    ("open_clip", "vit", (64, 64), {"conv1": (4, 4), "ln_pre": "NLC 4 4 1", "transformer.resblocks.1": "NLC 4 4 1"}),
    ("open_clip", "resnet", (64, 64), {"act1": (32, 32), "layer1": (16, 16), "layer4": (2, 2)}),
]


def expected_layout(text) -> Layout:
    if isinstance(text, tuple):
        return Layout("NCHW", text)
    kind, *numbers = text.split()
    h, w, *prefix = map(int, numbers)
    return Layout(kind, (h, w), *prefix)


@pytest.mark.parametrize(("library", "name", "size", "layers"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_known_architectures_need_no_hint(library, name, size, layers) -> None:
    model = build(library, name)
    wanted = [expected_layout(text) for text in layers.values()]
    tokens = {w.grid[0] * w.grid[1] + w.prefix_tokens for w in wanted if w.kind == "NLC"}
    for batch in {1, 2, *(t for t in tokens if t < 32)}:  # also as many examples as tokens
        seen = spatial_activations(model, torch.rand(batch, 3, *size), list(layers))
        assert list(seen.layouts) == wanted
        for layout, raw, maps in zip(seen.layouts, seen.raw, seen.maps, strict=True):
            assert maps.shape[0] == batch
            assert maps.shape[2:] == layout.grid
            assert torch.equal(restored(layout, maps, raw), raw)


# ---------------------------------------------------------------- position (i, j) is the image's region (i, j)


class Encoder(nn.Module):
    """torch's own transformer encoder on patches, batch first or tokens first."""

    def __init__(self, batch_first: bool, prefix: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        self.cls_token = nn.Parameter(torch.randn(1, prefix, 16)) if prefix else None
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1)
        if self.batch_first:
            return self.encoder(tokens).mean(1)
        return self.encoder(tokens.transpose(0, 1)).mean(0)


@pytest.mark.parametrize(
    ("model", "layer", "size", "kind"),
    [
        (("torchvision", "resnet"), "layer1.0", (64, 96), "NCHW"),
        (("torchvision", "convnext"), "features.1", (64, 96), "NCHW"),
        (("torchvision", "swin"), "features.1", (64, 96), "NHWC"),
        (("timm", "deit"), "blocks.0", (64, 96), "NLC"),
        (("timm", "vit with registers"), "blocks.0", (42, 70), "NLC"),
        ((True, 2), "encoder.layers.0", (40, 24), "NLC"),
        ((False, 0), "encoder.layers.0", (40, 24), "LNC"),
        ((False, 1), "encoder.layers.1", (40, 24), "LNC"),
    ],
    ids=str,
)
def test_a_cell_is_where_its_patch_is(model, layer, size, kind) -> None:
    torch.manual_seed(0)
    net = build(*model) if isinstance(model[0], str) else Encoder(*model).eval()
    image = torch.rand(2, 3, *size)
    before = spatial_activations(net, image, [layer])
    assert before.layouts[0].kind == kind
    h, w = before.layouts[0].grid
    for i, j in [(0, 0), (0, w - 1), (h - 1, 0), (h // 2, w // 3)]:
        changed = image.clone()
        ys, xs = (slice(i * size[0] // h, (i + 1) * size[0] // h), slice(j * size[1] // w, (j + 1) * size[1] // w))
        changed[1, :, ys, xs] += 1.0
        change = (spatial_activations(net, changed, [layer]).maps[0] - before.maps[0]).abs().sum(1)
        assert not change[0].any()  # the other example
        at = int(change[1].argmax())
        assert (at // w, at % w) == (i, j) or (kind == "NCHW" and abs(at // w - i) <= 1 and abs(at % w - j) <= 1)


@pytest.mark.parametrize("batch", [1, 2, 15, 16])
@pytest.mark.parametrize("layer", ["encoder", "encoder.layers.0", "encoder.layers.0.linear2", "encoder.layers.1.norm2"])
def test_tokens_first(layer, batch) -> None:
    """Also with as many examples as tokens: one example alone then shows which is which."""
    torch.manual_seed(0)
    seen = spatial_activations(Encoder(False, 1).eval(), torch.rand(batch, 3, 40, 24), [layer])
    assert seen.layouts == (Layout("LNC", (5, 3), 1),)
    assert seen.maps[0].shape == (batch, 16, 5, 3)


class SwinTokens(nn.Module):
    """As in transformers: Swin stages that hand (N, L, C) on, L quartered by each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.stages = nn.ModuleList([nn.Linear(8, 8), nn.Linear(32, 16), nn.Linear(64, 32)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for stage in self.stages:
            h, w = x.shape[2:]
            x = stage(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (h, w))
            if stage is not self.stages[-1]:
                x = F.pixel_unshuffle(F.pad(x, (0, w % 2, 0, h % 2)), 2)
        return x.mean((2, 3))


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (40, 72), (100, 36)])
def test_hierarchical_tokens(size) -> None:
    h, w = size[0] // 4, size[1] // 4
    wanted = [(h, w), (math.ceil(h / 2), math.ceil(w / 2)), (math.ceil(h / 4), math.ceil(w / 4))]
    seen = spatial_activations(SwinTokens(), torch.rand(2, 3, *size), ["stages.0", "stages.1", "stages.2"])
    assert [layout.grid for layout in seen.layouts] == wanted
    assert all(layout.prefix_tokens == 0 for layout in seen.layouts)


# ---------------------------------------------------------------- any ViT


class Patches(nn.Module):
    def __init__(self, patch: tuple[int, int], prefix: dict[str, int], patch_embed: bool = True) -> None:
        super().__init__()
        if patch_embed:
            self.proj = nn.Conv2d(3, 4, patch, stride=patch)
        for name, count in prefix.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(1, count, 4)))


@settings(max_examples=300, deadline=None)
@given(
    h=st.integers(1, 40),
    w=st.integers(1, 40),
    patch=st.tuples(st.integers(2, 32), st.integers(2, 32)),
    cut=st.tuples(st.integers(0, 31), st.integers(0, 31)),
    cls=st.booleans(),
    registers=st.integers(0, 8),
    named=st.booleans(),
    batch_first=st.booleans(),
)
def test_any_vit_is_recovered(h, w, patch, cut, cls, registers, named, batch_first) -> None:
    """The grid is found if the model names its CLS and register tokens; else found or refused, but never wrong."""
    assume(h * w > 1)
    prefix = {name: count for name, count in (("cls_token", int(cls)), ("reg_token", registers)) if count}
    size = (h * patch[0] + cut[0] % patch[0], w * patch[1] + cut[1] % patch[1])  # what is left over is cut off
    model = Patches(patch, prefix if named else {})
    length = h * w + sum(prefix.values())
    batch = length + 1
    output = torch.empty(batch, length, 4) if batch_first else torch.empty(length, batch, 4)
    wanted = Layout("NLC" if batch_first else "LNC", (h, w), sum(prefix.values()))
    if named:
        assert infer_layout(output, batch, size, model=model) == wanted
    elif cut[0] % patch[0] == 0 and cut[1] % patch[1] == 0 and not 0 < length - h * w > 16:
        try:
            found = infer_layout(output, batch, size, model=model)
        except LayoutError:
            return
        assert found == wanted


@settings(max_examples=100, deadline=None)
@given(side=st.integers(2, 40), patch=st.integers(4, 16), prefix=st.sampled_from([0, 1, 2, 4, 5]))
def test_sizes_alone_are_enough_for_the_usual_ones(side, patch, prefix) -> None:
    """Neither model nor module known. 9 tokens are 3 x 3, or 2 x 2 with CLS and four registers: refused."""
    length = side * side + prefix
    output, size = torch.empty(2, length, 8), (side * patch, side * patch)
    try:
        found = infer_layout(output, 2, size)
    except LayoutError as error:
        assert length == 9
        assert "prefix_tokens=" in str(error)  # noqa: PT017
        found = infer_layout(output, 2, size, prefix_tokens=prefix)
    assert found == Layout("NLC", (side, side), prefix) or (length == 9 and side == 3)


def test_prefix_or_grid() -> None:
    """9 tokens: 3 x 3, or 2 x 2 with five in front. The model knows."""
    nine = torch.empty(2, 9, 4)
    registers = {"cls_token": 1, "reg_token": 4}
    assert infer_layout(nine, 2, (32, 32), model=Patches((16, 16), registers)) == Layout("NLC", (2, 2), 5)
    assert infer_layout(nine, 2, (32, 32), model=Patches((16, 16), {})) == Layout("NLC", (2, 2), 5)
    assert infer_layout(nine, 2, (33, 33), model=Patches((11, 11), registers)) == Layout("NLC", (3, 3), 0)
    assert infer_layout(nine, 2, (33, 33), model=Patches((11, 11), {}, False), prefix_tokens=5).grid == (2, 2)
    assert infer_layout(nine, 2, (32, 32), model=Patches((16, 16), registers, False)) == Layout("NLC", (2, 2), 5)
    ten = torch.empty(2, 10, 4)
    assert infer_layout(ten, 2, (48, 48), model=Patches((16, 16), {"cls_token": 1})) == Layout("NLC", (3, 3), 1)


def test_images_resized_inside_the_model() -> None:
    """The input's size then does not tell the grid, but the position embedding tells that no token is missing."""
    model = Patches((16, 16), {"cls_token": 1})
    tokens = torch.empty(2, 197, 4)
    with pytest.raises(LayoutError):
        infer_layout(tokens, 2, (256, 256), model=model)
    model.pos_embed = nn.Parameter(torch.zeros(1, 197, 4))
    assert infer_layout(tokens, 2, (256, 256), model=model) == Layout("NLC", (14, 14), 1)


def test_patches_that_are_not_square() -> None:
    """Rows come from the image's height and the stride's first number, also where the grid is halved."""
    model = Patches((16, 8), {})
    assert infer_layout(torch.empty(2, 32, 4), 2, (64, 64), model=model) == Layout("NLC", (4, 8))
    assert infer_layout(torch.empty(2, 8, 4), 2, (64, 64), model=model) == Layout("NLC", (2, 4))
    assert infer_layout(torch.empty(2, 24, 4), 2, (32, 96), model=Patches((8, 16), {})) == Layout("NLC", (4, 6))
    # An odd grid is cut off or padded when it is halved.
    for halved in ((3, 4), (2, 3)):
        tokens = torch.empty(2, halved[0] * halved[1], 4)
        assert infer_layout(tokens, 2, (80, 56), model=Patches((16, 8), {})) == Layout("NLC", halved)


@pytest.mark.parametrize(
    ("size", "grid", "fits"),
    [
        ((64, 96), (8, 12), True),
        ((64, 96), (8, 13), True),  # a border without padding costs a cell
        ((64, 96), (8, 14), False),
        ((160, 160), (80, 82), True),  # on a fine grid a little more
        ((160, 160), (40, 42), False),
        ((96, 64), (8, 12), False),
        ((6, 9), (8, 11), True),
        ((6, 9), (9, 13), False),  # finer than the pixels
    ],
)
def test_how_far_a_grid_may_be_from_the_images_shape(size, grid, fits) -> None:
    output = torch.empty(2, *grid, 5)
    if fits:
        assert infer_layout(output, 2, size, module=Opaque()) == Layout("NHWC", grid)
    else:
        with pytest.raises(LayoutError, match="fits no grid of the input"):
            infer_layout(output, 2, size, module=Opaque())


# ---------------------------------------------------------------- what must be refused


@pytest.mark.parametrize("length", [181, 170, 150, 101, 77, 64, 32])
def test_tokens_that_are_no_grid_are_refused(length) -> None:
    """Merged or dropped patches, text, latents: even where the length is nearly a square."""
    model = Patches((16, 16), {"cls_token": 1})
    model.pos_embed = nn.Parameter(torch.zeros(1, 197, 4))
    with pytest.raises(LayoutError, match=rf"{length} tokens.*patches of 16 x 16.*prefix_tokens="):
        infer_layout(torch.empty(2, length, 8), 2, (224, 224), model=model)


def test_channels_first_tokens_are_refused() -> None:
    with pytest.raises(LayoutError):
        infer_layout(torch.empty(2, 256, 196), 2, (224, 224), model=Patches((16, 16), {}))


def test_one_token_is_no_grid() -> None:
    for model in (None, Patches((16, 16), {"cls_token": 1}), Patches((32, 32), {})):
        with pytest.raises(LayoutError, match="no grid fits"):
            infer_layout(torch.empty(2, 1, 8), 2, (32, 32), model=model)


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("shape", [(2, 8, 8, 8), (2, 7, 7, 8), (2, 8, 7, 7), (2, 9, 8, 8), (2, 3, 2, 3)])
def test_ambiguous_images_are_refused(shape) -> None:
    with pytest.raises(LayoutError, match=r"layer 'mix' returns \(2, .*layout='NCHW' or layout='NHWC'") as caught:
        infer_layout(torch.empty(shape), 2, (32, 32), module=Opaque(), name="mix")
    assert str(shape) in str(caught.value)
    assert infer_layout(torch.empty(shape), 2, (32, 32), layout="NCHW").grid == shape[2:]
    assert infer_layout(torch.empty(shape), 2, (32, 32), layout="NHWC").grid == shape[1:3]


class LayerNorm2d(nn.LayerNorm):
    """As torchvision and timm have it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PermutedPatches(nn.Module):
    """As in SAM: only a convolution inside, but channels last come out."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Conv2d(3, 8, 3), "NCHW"),
        (nn.BatchNorm2d(8), "NCHW"),
        (nn.GroupNorm(2, 8), "NCHW"),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), "NCHW"),
        (nn.ConvTranspose2d(3, 8, 3), "NCHW"),
        (LayerNorm2d(8), "NCHW"),
        (nn.Sequential(nn.Conv2d(3, 8, 3), LayerNorm2d(8)), "NCHW"),
        (nn.LayerNorm(8), "NHWC"),
        (nn.Linear(4, 8), "NHWC"),
        (nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), "NHWC"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)
def test_the_layers_type_decides_where_channels_are_as_many_as_rows(module, kind) -> None:
    assert infer_layout(torch.empty(2, 8, 8, 8), 2, (32, 32), module=module) == Layout(kind, (8, 8))


def test_small_cnns_whose_channels_equal_the_grid() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(1), nn.Flatten(), nn.Linear(512, 2))
    seen = spatial_activations(net, torch.rand(2, 3, 16, 16), ["0", "1", "2"])
    assert [layout.kind for layout in seen.layouts] == ["NCHW"] * 3


def test_permuted_convolutions_are_not_taken_for_channels_first() -> None:
    net = nn.Sequential(PermutedPatches(), nn.LayerNorm(8), nn.Flatten(), nn.Linear(512, 2))
    images = torch.rand(2, 3, 32, 32)
    with pytest.raises(LayoutError, match="layout='NCHW' or layout='NHWC'"):
        spatial_activations(net, images, ["0"])
    assert spatial_activations(net, images, ["1"]).layouts[0].kind == "NHWC"
    larger = PermutedPatches()(torch.rand(2, 3, 64, 64)).detach()
    assert infer_layout(larger, 2, (64, 64), module=net[0], model=net) == Layout("NHWC", (16, 16))


def test_attention_is_no_image() -> None:
    weights = torch.rand(2, 4, 16, 16).softmax(-1)
    with pytest.raises(LayoutError, match="attention weights"):
        infer_layout(weights, 2, (64, 64), module=nn.Dropout(), name="attn_drop")
    with pytest.raises(LayoutError):  # queries of each head, normalised
        infer_layout(torch.empty(2, 12, 197, 64), 2, (224, 224), module=nn.LayerNorm(64))


def test_inside_windowed_attention() -> None:
    model, timm_model = build("torchvision", "swin"), build("timm", "swin")
    with pytest.raises(LayerError, match="choose the block around"):
        spatial_activations(timm_model, torch.rand(2, 3, 64, 96), ["layers.0.blocks.0.attn"])
    assert spatial_activations(model, torch.rand(2, 3, 64, 96), ["features.1.0.attn"]).layouts[0].kind == "NHWC"
    with pytest.raises(LayoutError, match=r"\(12, 16, 8\) for 2 examples: no dimension is the batch"):
        infer_layout(torch.empty(12, 16, 8), 2, (64, 64))


@pytest.mark.parametrize("shape", [(2, 8), (2,), (2, 3, 4, 5, 6)])
def test_outputs_without_a_grid(shape) -> None:
    with pytest.raises(LayoutError, match=r"layer 'fc' returns \(2,.*not a grid of positions; choose a layer before"):
        infer_layout(torch.empty(shape), 2, (32, 32), name="fc")


def test_wrong_hints_are_refused() -> None:
    tokens, image = torch.empty(2, 17, 8), torch.empty(2, 8, 4, 4)
    with pytest.raises(LayoutError, match="no grid fits with 0 prefix tokens"):
        infer_layout(tokens, 2, (64, 64), prefix_tokens=0, model=Patches((16, 16), {}))
    with pytest.raises(LayoutError, match="with 3 prefix tokens"):
        infer_layout(tokens, 2, (64, 64), prefix_tokens=3)
    with pytest.raises(LayoutError, match="with 17 prefix tokens"):
        infer_layout(tokens, 2, (64, 64), prefix_tokens=17)
    with pytest.raises(LayoutError, match="three dimensions; layout='NCHW' is for four"):
        infer_layout(tokens, 2, (64, 64), layout="NCHW")
    with pytest.raises(LayoutError, match="four dimensions; layout='NLC' is for three"):
        infer_layout(image, 2, (64, 64), layout="NLC")
    with pytest.raises(LayoutError, match="read as LNC, is not a batch of 2 examples"):
        infer_layout(tokens, 2, (64, 64), layout="LNC")
    with pytest.raises(InputError, match="layout must be one of"):
        infer_layout(image, 2, (64, 64), layout="nchw")
    with pytest.raises(InputError, match="prefix_tokens must be 0 or more"):
        infer_layout(tokens, 2, (64, 64), prefix_tokens=-1)
    with pytest.raises(LayoutError, match=r"torch\.int64"):
        infer_layout(torch.ones(2, 8, 4, 4, dtype=torch.long), 2, (64, 64))
    with pytest.raises(LayoutError, match="its first dimension is not the batch"):
        infer_layout(torch.empty(20, 8, 4, 4), 2, (64, 64))


def test_as_many_examples_as_tokens_is_ambiguous_for_a_bare_tensor() -> None:
    square = torch.empty(16, 16, 8)
    with pytest.raises(LayoutError, match="layout='NLC' or layout='LNC'"):
        infer_layout(square, 16, (64, 64))
    for batch_first in (True, False):
        module = nn.TransformerEncoderLayer(8, 2, batch_first=batch_first)
        assert infer_layout(square, 16, (64, 64), module=module).kind == ("NLC" if batch_first else "LNC")


# ---------------------------------------------------------------- maps and their inverse


def restored(layout: Layout, maps: Tensor, output: Tensor) -> Tensor:
    """The inverse of ``Layout.maps``, with the prefix tokens of ``output``."""
    if layout.kind in ("NCHW", "NHWC"):
        return maps if layout.kind == "NCHW" else maps.permute(0, 2, 3, 1)
    tokens = torch.cat([layout.prefix(output), maps.flatten(2).transpose(1, 2)], 1)
    return tokens.transpose(0, 1) if layout.kind == "LNC" else tokens


@pytest.mark.parametrize("kind", ["NCHW", "NHWC", "NLC", "LNC"])
@pytest.mark.parametrize("prefix", [0, 3])
def test_maps_lose_nothing_but_the_prefix(kind, prefix) -> None:
    shape = {"NCHW": (2, 5, 3, 4), "NHWC": (2, 3, 4, 5), "NLC": (2, 12 + prefix, 5), "LNC": (12 + prefix, 2, 5)}[kind]
    output = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    layout = Layout(kind, (3, 4), prefix if kind in ("NLC", "LNC") else 0)
    maps = layout.maps(output)
    assert maps.shape == (2, 5, 3, 4)
    assert layout.prefix(output).shape == (2, layout.prefix_tokens, 5)
    assert torch.equal(restored(layout, maps, output), output)
    value = {"NCHW": (1, 4, 2, 3), "NHWC": (1, 2, 3, 4), "NLC": (1, 11 + prefix, 4), "LNC": (11 + prefix, 1, 4)}[kind]
    assert maps[1, 4, 2, 3] == output[value]


def test_norms_over_channels_first_say_so_by_an_attribute() -> None:
    """transformers' ConvNeXt: one class, and data_format tells which dimension it normalizes."""

    class Norm(nn.LayerNorm):
        def __init__(self, data_format: str) -> None:
            super().__init__(6)
            self.data_format = data_format

    square = torch.empty(2, 6, 6, 6)
    assert infer_layout(square, 2, (48, 48), module=Norm("channels_first")).kind == "NCHW"
    assert infer_layout(square, 2, (48, 48), module=Norm("channels_last")).kind == "NHWC"


@pytest.mark.parametrize(("grid", "fits"), [((77, 79), False), ((78, 80), True), ((2, 3), True), ((2, 4), False)])
def test_how_far_a_grid_may_be_from_the_shape_of_the_image(grid, fits) -> None:
    """A cell, and one more for 80 cells."""
    maps = torch.empty(2, 300, *grid)
    if fits:
        assert infer_layout(maps, 2, (160, 160)).grid == grid
    else:
        with pytest.raises(LayoutError, match="fits no grid"):
            infer_layout(maps, 2, (160, 160))


def test_traits_are_read_off_parameters_and_names() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cls_token = nn.Parameter(torch.zeros(8))
            self.reg_token = nn.Parameter(torch.zeros(4, 8))

    class Shuffled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, torch.randperm(x.shape[1])]

    def traits(model: nn.Module) -> ModelTraits:
        return ModelTraits.of(dict(model.named_modules()))

    assert traits(Model()).prefix_parts == (1, 4)
    assert traits(Shuffled()).reorders
    assert not traits(nn.Sequential(nn.PixelShuffle(2), nn.ChannelShuffle(2))).reorders  # torch's own are known
