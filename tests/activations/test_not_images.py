"""What is not a grid of image positions is refused, and the right one of several inputs is read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from captum_concepts import SALFCBM
from captum_concepts.activations import Layers, check_images, infer_layout
from captum_concepts.activations.survey import suggest_layer, survey_layers
from captum_concepts.errors import InputError, LayoutError


class Tokens(nn.Module):
    """Patches of images, videos or volumes as tokens."""

    def __init__(self, embed: nn.Module, prepare=lambda x: x) -> None:
        super().__init__()
        self.embed, self.prepare = embed, prepare
        self.block = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 12))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(self.prepare(x)).flatten(2).transpose(1, 2)).mean(1))


def volume() -> nn.Conv3d:
    return nn.Conv3d(1, 12, 16, stride=16)


CASES = {
    "video of 4 x 4 x 4 tokens": (Tokens(nn.Conv3d(3, 12, (2, 8, 8), (2, 8, 8))), "block", (2, 3, 8, 32, 32)),
    "frames first": (Tokens(nn.Conv3d(3, 12, 8, 8), lambda x: x.transpose(1, 2)), "block", (2, 32, 3, 32, 32)),
    "volume": (Tokens(volume()), "block", (2, 1, 64, 64, 64)),
    "volume without channels": (Tokens(volume(), lambda x: x.unsqueeze(1)), "block", (2, 64, 64, 64)),
    "sequence of 64 channels": (nn.Sequential(nn.Conv1d(3, 64, 5), nn.ReLU(), nn.Flatten()), "0", (2, 3, 36)),
    "one sequence": (nn.Sequential(nn.Conv1d(3, 64, 5), nn.ReLU(), nn.Flatten()), "1", (1, 3, 36)),
    "features": (nn.Sequential(nn.Unflatten(1, (4, 4, 4)), nn.Flatten()), "0", (2, 64)),
}


@pytest.mark.parametrize("case", CASES)
def test_videos_volumes_and_sequences_are_refused(case):
    model, layer, shape = CASES[case]
    with pytest.raises(LayoutError, match=r"images \(N, C, H, W\)|3-d convolutions"):
        Layers.resolve(model, layer).run(torch.rand(shape))
    if len(shape) == 4:
        assert layer not in {surveyed.name for surveyed in survey_layers(model, torch.rand(shape))}


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 32, 32), (13, 32, 32)])
def test_an_image_without_a_batch_dimension(shape):
    net = nn.Sequential(nn.Conv2d(shape[0], 4, 3), nn.Flatten())
    for call in (check_images, Layers.resolve(net, "0").run, lambda x: survey_layers(net, x)):
        with pytest.raises(InputError, match=r"have no batch dimension; .*image\[None\]"):
            call(torch.rand(shape))


class MetadataFirst(nn.Module):
    """`(metadata, image)`: 4 x 9 tokens of an image of 32 x 72."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = Tokens(nn.Conv2d(3, 12, 8, 8))
        self.meta = nn.Linear(7, 5)

    def forward(self, metadata: Tensor, image: Tensor) -> Tensor:
        return self.tokens(image) + self.meta(metadata.float())


@pytest.mark.parametrize("metadata", [torch.rand(2, 7), torch.ones(2, 7, dtype=torch.long)], ids=["float", "integer"])
def test_the_image_among_several_inputs_is_read(metadata):
    model, image = MetadataFirst().eval(), torch.rand(2, 3, 32, 72)
    result = Layers.resolve(model, "tokens.block").run((metadata, image))
    assert result.layouts[0].grid == (4, 9)
    assert suggest_layer(model, (metadata, image)) in ("tokens.block", "tokens.block.1")


class TwoImages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = Tokens(nn.Conv2d(3, 12, 8, 8))

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        return self.tokens(image) + other.mean((1, 2, 3))[:, None]


def test_several_images_have_to_agree():
    layers = Layers.resolve(TwoImages(), "tokens.block")
    image = torch.rand(2, 3, 32, 72)
    assert layers.run((image, torch.rand(2, 1, 32, 72))).layouts[0].grid == (4, 9)
    assert layers.run((image, torch.rand(2, 3, 16, 16))).layouts[0].grid == (4, 9)  # 36 tokens are no 2 x 2
    with pytest.raises(LayoutError, match=r"images of sizes \(32, 72\), \(48, 48\)"):
        layers.run((image, torch.rand(2, 3, 48, 48)))
    assert layers.run(image, additional_forward_args=torch.rand(2, 3, 48, 48)).layouts[0].grid == (4, 9)

    class Turned(TwoImages):
        def forward(self, other: Tensor, image: Tensor) -> Tensor:
            return super().forward(image, other)

    turned = Layers.resolve(Turned(), "tokens.block")
    assert turned.run((torch.rand(2, 3, 16, 16), image)).layouts[0].grid == (4, 9)


def test_channels_first_tokens_are_not_taken_for_tokens():
    """A map of 64 channels, flattened: neither 8 x 8 positions nor anything but a question."""
    net = nn.Sequential(nn.Conv2d(3, 64, 3, 4, 1), nn.Flatten(2), nn.Conv1d(64, 64, 1), nn.Dropout(), nn.Flatten())
    for layer in ("1", "2", "3"):
        with pytest.raises(LayoutError, match=r"may be channels first \(N, C, L\)"):
            Layers.resolve(net, layer).run(torch.rand(2, 3, 32, 32))
    tokens = nn.Sequential(nn.Linear(64, 64), nn.GELU())
    assert infer_layout(torch.rand(2, 64, 64), 2, (32, 32), module=tokens).grid == (8, 8)
    assert infer_layout(torch.rand(2, 64, 64), 2, (32, 32), module=nn.Dropout(), layout="NLC").grid == (8, 8)


def test_without_an_image_a_given_layout_is_taken_and_tokens_are_refused():
    assert infer_layout(torch.rand(2, 5, 3, 4), 2, None, layout="NCHW").grid == (3, 4)
    for output, layout in (
        (torch.rand(2, 16, 8), "NLC"),
        (torch.rand(2, 16, 8), "auto"),
        (torch.rand(2, 8, 4, 4), "auto"),
    ):
        with pytest.raises(LayoutError, match="the inputs are not images"):
            infer_layout(output, 2, None, layout=layout)


# ---------------------------------------------------------------- tokens in another order


class Windows(nn.Module):
    """Tokens in windows of 2 x 2, window after window, as in the masked units of Hiera."""

    def forward(self, tokens: Tensor) -> Tensor:
        n, _, c = tokens.shape
        return tokens.reshape(n, 4, 2, 6, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, 96, c)

    def undo(self, tokens: Tensor) -> Tensor:
        n, _, c = tokens.shape
        return tokens.reshape(n, 4, 6, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, 96, c)


class Windowed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 8, 8)
        self.before = nn.Linear(12, 12)
        self.windows = Windows()
        self.inside = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, dropout=0.0)
        self.after = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, dropout=0.0)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.inside(self.windows(self.before(self.embed(x).flatten(2).transpose(1, 2))))
        return self.head(self.after(self.windows.undo(tokens)).mean(1))


def test_tokens_in_windows_are_refused_and_those_put_back_are_read():
    torch.manual_seed(0)
    model, images = Windowed().eval(), torch.rand(2, 3, 64, 96)
    for layer in ("windows", "inside"):
        with pytest.raises(LayoutError, match=rf"'{layer}' are not in the order of the image's rows.*8 x 12 grid"):
            Layers.resolve(model, layer).run(images)
    for layer in ("before", "after"):
        assert Layers.resolve(model, layer).run(images).layouts[0].grid == (8, 12)
    assert {layer.name for layer in survey_layers(model, images)} >= {"embed", "before", "after"}
    assert not {layer.name for layer in survey_layers(model, images)} & {"windows", "inside"}
    assert suggest_layer(model, images) == "after"


def test_a_bottleneck_model_refuses_them_as_well():
    torch.manual_seed(0)
    model = Windowed().eval()
    with pytest.raises(LayoutError, match="not in the order"):
        SALFCBM(model, "inside", ["a", "b"], 2, grid=(3, 3), input_size=(64, 96))
    assert SALFCBM(model, "after", ["a", "b"], 2, grid=(3, 3), input_size=(64, 96)) is not None


class Shuffled(Windowed):
    """An order drawn at random and kept, as when tokens are sorted by a score."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.randperm(96, generator=torch.Generator().manual_seed(1)))
        self.windows = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.before(self.embed(x).flatten(2).transpose(1, 2))[:, self.order]
        return self.head(self.after(self.inside(tokens)).mean(1))


def test_shuffled_tokens_are_refused():
    torch.manual_seed(0)
    model, images = Shuffled().eval(), torch.rand(1, 3, 64, 96)
    assert Layers.resolve(model, "before").run(images).layouts[0].grid == (8, 12)
    for layer in ("inside", "after"):
        with pytest.raises(LayoutError, match="not in the order"):
            Layers.resolve(model, layer).run(images)


def test_the_order_is_checked_once_per_layer_and_never_in_networks_of_a_library():
    torch.manual_seed(0)
    model, images = Windowed().eval(), torch.rand(1, 3, 64, 96)
    sizes: list[int] = []
    model.embed.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    for _ in range(3):
        Layers.resolve(model, "after").run(images)
    assert sizes == [1, 7, 1, 1]
    plain = MetadataFirst().tokens.eval()
    plain.embed.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    for _ in range(2):
        Layers.resolve(plain, "block").run(images)
    assert sizes == [1, 7, 1, 1, 1, 7, 1]
    library = pytest.importorskip("timm").create_model("vit_tiny_patch16_224", img_size=96).eval()
    library.patch_embed.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    Layers.resolve(library, "blocks.3").run(torch.rand(1, 3, 96, 96))
    assert sizes == [1, 7, 1, 1, 1, 7, 1, 1]


def test_hiera_is_read_where_its_tokens_are_in_order():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model, images = timm.create_model("hiera_tiny_224", img_size=128).eval(), torch.rand(1, 3, 128, 128)
    nn.init.normal_(model.head.fc.weight)  # zero at first
    for layer in ("blocks.0", "blocks.2", "blocks.9", "blocks.5.attn"):
        with pytest.raises(LayoutError, match="not be in the order" if "attn" in layer else "not in the order"):
            Layers.resolve(model, layer).run(images)
    last = Layers.resolve(model, "blocks.11").run(images)
    assert last.layouts[0].grid == (4, 4)
    rerolled = model.reroll(last.raw[0], 11).permute(0, 3, 1, 2)  # what the network's own function makes of them
    assert torch.equal(last.maps[0], rerolled)
    assert suggest_layer(model, images) == "blocks.11"


class TestModelsThatResizeTheirImages:
    """Their tokens are a square of their own, whatever the images' aspect ratio: 64 are no 7 x 9 grid and a prefix."""

    @pytest.mark.parametrize("size", [(48, 80), (64, 96), (80, 64), (48, 64), (64, 128), (96, 96)])
    @pytest.mark.parametrize("prefix", ["class token", "registers", "none"])
    def test_a_square_of_positions(self, size, prefix):
        timm = pytest.importorskip("timm")
        torch.manual_seed(0)
        options = {
            "class token": {},
            "registers": {"reg_tokens": 4, "class_token": False, "global_pool": "avg"},
            "none": {"class_token": False, "global_pool": "avg"},
        }[prefix]
        vit = timm.create_model(
            "vit_tiny_patch16_224", img_size=64, patch_size=8, depth=2, num_classes=5, **options
        ).eval()
        model = nn.Sequential(nn.UpsamplingBilinear2d((64, 64)), vit)
        layers = Layers.resolve(model, "1.blocks.0")
        x = torch.rand(1, 3, *size)
        maps = layers.run(x).maps[0]
        assert maps.shape[2:] == (8, 8)
        alone = Layers.resolve(vit, "blocks.0").run(model[0](x)).maps[0]
        assert torch.equal(maps, alone)

    def test_a_wrong_reading_is_refused(self):
        """Where no position embedding tells how many tokens there are, the order of the tokens does."""

        class Patches(nn.Module):
            def __init__(self):
                super().__init__()
                self.patches, self.block, self.head = nn.Conv2d(3, 8, 8, 8), nn.Identity(), nn.Linear(8, 4)

            def forward(self, x):
                x = nn.functional.interpolate(x, (64, 64))
                return self.head(self.block(self.patches(x).flatten(2).transpose(1, 2)).relu().mean(1))

        torch.manual_seed(0)
        layers = Layers.resolve(Patches(), "block")
        assert layers.run(torch.rand(1, 3, 64, 64)).maps[0].shape[2:] == (8, 8)
        with pytest.raises(LayoutError, match="resizes or crops its images itself needs images of the size"):
            layers.run(torch.rand(1, 3, 48, 80))  # 6 x 10 and four registers
