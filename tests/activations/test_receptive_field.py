"""Receptive fields against kernel arithmetic, and crops of the strongest positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from captum_concepts.activations.receptive_field import (
    ReceptiveField,
    effective_receptive_field,
    receptive_field,
    strongest_crops,
)
from captum_concepts.errors import InputError, LayerError


def arithmetic(layers: list[tuple[int, int, int, int]], index: int, size: int) -> tuple[int, int]:
    """First and last + 1 input index that output ``index`` sees, through (kernel, stride, padding, dilation) layers.

    The set of indices is carried back layer by layer; taps that fall into a layer's padding see nothing.
    """
    sizes = [size]
    for kernel, stride, padding, dilation in layers:
        sizes.append((sizes[-1] + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
    seen = {index}
    for (kernel, stride, padding, dilation), length in zip(reversed(layers), reversed(sizes[:-1]), strict=True):
        taps = {i * stride - padding + t * dilation for i in seen for t in range(kernel)}
        seen = {i for i in taps if 0 <= i < length}
    return min(seen), max(seen) + 1


@pytest.mark.parametrize("seed", range(12))
def test_equals_kernel_arithmetic(seed):
    draw = torch.Generator().manual_seed(seed)
    pick = lambda low, high: int(torch.randint(low, high + 1, (), generator=draw))  # noqa: E731
    settings, modules, channels = [], [], 3
    for _ in range(3):
        kernel, stride, dilation = pick(1, 4), pick(1, 3), pick(1, 2)
        padding = pick(0, kernel // 2)
        settings.append((kernel, stride, padding, dilation))
        if pick(0, 2) == 0:
            modules.append(nn.MaxPool2d(kernel, stride, padding, dilation))
        else:
            modules += [nn.Conv2d(channels, 4, kernel, stride, padding, dilation), nn.ReLU(inplace=True)]
            channels = 4
    net = nn.Sequential(*modules).eval()
    height, width = 61, 47
    h, w = net(torch.rand(1, 3, height, width)).shape[2:]
    row, column = pick(0, h - 1), pick(0, w - 1)
    layer = str(len(net) - 1)
    top, bottom = arithmetic(settings, row, height)
    left, right = arithmetic(settings, column, width)
    for position in ((row, column), (row - h, column - w)):
        box = receptive_field(net, layer, (height, width), position, layout="NCHW")
        assert box == (top, left, bottom, right)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 5, padding=2)
        self.excite = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Sigmoid())
        self.both, self.out = nn.Identity(), nn.Identity()

    def forward(self, x):
        x = self.both(self.narrow(x) + self.wide(x))
        return self.out(x * self.excite(x))


def test_branches_take_the_widest_and_global_gates_see_everything():
    net = Block().eval()
    assert receptive_field(net, "narrow", 16, (8, 8)) == (8, 8, 9, 9)
    assert receptive_field(net, "both", 16, (8, 8)) == (6, 6, 11, 11)
    assert receptive_field(net, "out", 16, (8, 8)) == (0, 0, 16, 16)


def test_dead_units_do_not_shrink_the_field():
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.ReLU()).eval()
    nn.init.constant_(net[0].bias, -100.0)
    nn.init.zeros_(net[2].weight)
    assert receptive_field(net, "3", 12, (0, 0)) == (0, 0, 5, 5)


def test_tokens_see_their_patch_first_and_everything_after_attention():
    timm = pytest.importorskip("timm")
    net = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1).eval()
    assert receptive_field(net, "patch_embed", 64, (1, 2)) == (16, 32, 32, 48)
    assert receptive_field(net, "blocks.0", 64, (1, 2)) == (0, 0, 64, 64)


def test_bad_questions_are_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU()).eval()
    with pytest.raises(InputError, match="outside the 7 x 7 grid"):
        receptive_field(net, "0", 16, (7, 0))
    for position in (5, (0.5, 1), (1,), (0, 0, 0), "ab", None):
        with pytest.raises(InputError, match=r"position must be \(row, column\)"):
            receptive_field(net, "0", 16, position)
        with pytest.raises(InputError, match=r"position must be \(row, column\)"):
            effective_receptive_field(net, "0", torch.rand(1, 3, 16, 16), position)
    for size in ("16", (16,), 16.0, 0, -3, None):
        with pytest.raises(InputError, match=r"size must be (one side|from 1)"):
            receptive_field(net, "0", size, (0, 0))
    with pytest.raises(InputError, match="channels"):
        receptive_field(net, "0", 16, (0, 0), channels="3")
    assert receptive_field(net, "0", np.int64(16), (0, 0)) == receptive_field(net, "0", 16, (0, 0))

    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 2, 4, 4)

    with pytest.raises(LayerError, match="does not depend on the image"):
        receptive_field(nn.Sequential(Constant()), "0", 16, (0, 0))


def test_model_is_left_as_it_was():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    receptive_field(net, "1", 16, (3, 3))
    assert net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not net[0]._forward_hooks


def test_strongest_crops_are_the_pixels_behind_the_highest_positions():
    net = nn.Sequential(nn.Conv2d(3, 1, 3, stride=2, padding=1)).eval()
    images = torch.rand(3, 3, 16, 16)
    maps = torch.zeros(3, 1, 8, 8)
    maps[1, 0, 2, 5], maps[0, 0, 7, 7], maps[2, 0, 0, 0], maps[1, 0, 3, 3] = 9.0, 4.0, -7.0, 8.0
    crops = strongest_crops(net, "0", images, maps, k=2)
    assert [(c.example, c.position, c.value) for c in crops] == [(1, (2, 5), 9.0), (0, (7, 7), 4.0)]
    assert crops[0].field == ReceptiveField(3, 9, 6, 12)
    assert torch.equal(crops[0].image, images[1, :, 3:6, 9:12])
    low = strongest_crops(net, "0", images, maps, k=1, lowest=True)[0]
    assert (low.example, low.position, low.value) == (2, (0, 0), -7.0)
    assert [c.value for c in strongest_crops(net, "0", images, maps, k=2, per_image=2)] == [9.0, 8.0]
    with pytest.raises(InputError, match="for one concept"):
        strongest_crops(net, "0", images, torch.zeros(3, 2, 8, 8))
    for options, message in (({"k": 2.5}, "k must be"), ({"per_image": "a"}, "per_image must be")):
        with pytest.raises(InputError, match=message):
            strongest_crops(net, "0", images, maps, **options)
    with pytest.raises(InputError, match=r"maps must be a torch\.Tensor .* got ndarray"):
        strongest_crops(net, "0", images, maps.numpy())


@pytest.mark.parametrize("grid", [(4, 8), (8, 4), (16, 16)])
def test_maps_of_another_grid_have_no_crops(grid):
    net = nn.Sequential(nn.Conv2d(3, 1, 3, stride=2, padding=1)).eval()
    maps = torch.zeros(2, *grid)
    maps[:, 1, 1] = 1  # inside the grid of the layer, but other pixels
    with pytest.raises(InputError, match=r"maps have \d+ x \d+ positions, but layer '0' has 8 x 8"):
        strongest_crops(net, "0", torch.rand(2, 3, 16, 16), maps)


def test_positions_without_a_value_have_no_crop():
    net = nn.Sequential(nn.Conv2d(3, 1, 3, stride=2, padding=1)).eval()
    maps = torch.full((3, 8, 8), torch.nan)  # the concept is not among those selected for these images
    maps[1, 2, 5] = -1.0
    for lowest in (False, True):
        crops = strongest_crops(net, "0", torch.rand(3, 3, 16, 16), maps, per_image=2, lowest=lowest)
        assert [(c.example, c.position, c.value) for c in crops] == [(1, (2, 5), -1.0)]


def test_crops_of_images_that_are_no_squares():
    net = nn.Sequential(nn.Conv2d(3, 1, 3, stride=2, padding=1)).eval()
    images, maps = torch.rand(1, 3, 8, 24), torch.zeros(1, 4, 12)
    maps[0, 3, 11] = 1.0
    (crop,) = strongest_crops(net, "0", images, maps, k=1)
    assert crop.field == ReceptiveField(5, 21, 8, 24)
    assert torch.equal(crop.image, images[0, :, 5:8, 21:24])


def test_the_effective_field_of_equal_weights_is_known():
    """Two 5 x 5 box filters: rows weigh 1 2 3 4 5 4 3 2 1 of 25; the middle 70 % leaves 3 of 25 off either end."""
    net = nn.Sequential(nn.Conv2d(1, 1, 5, bias=False), nn.Conv2d(1, 1, 5, bias=False)).eval()
    nn.init.ones_(net[0].weight), nn.init.ones_(net[1].weight)
    image = torch.rand(1, 24, 24)
    assert effective_receptive_field(net, "1", image, (4, 6), share=1.0) == (4, 6, 13, 15)
    assert effective_receptive_field(net, "1", image, (4, 6), share=0.7) == (6, 8, 11, 13)
    assert receptive_field(net, "1", 24, (4, 6), channels=1) == (4, 6, 13, 15)


def test_the_effective_field_lies_inside_the_field_and_leaves_the_model_alone():
    torch.manual_seed(0)
    convolutions = [m for _ in range(4) for m in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True))]
    net = nn.Sequential(*convolutions, nn.BatchNorm2d(3)).train()
    image = torch.rand(1, 3, 20, 20)
    with torch.no_grad():
        whole = receptive_field(net, "6", 20, (9, 2))
        most = effective_receptive_field(net, "6", image, (9, 2), share=0.8)
    assert whole.top < most.top < most.bottom < whole.bottom
    assert whole.left <= most.left < most.right < whole.right
    assert net.training
    assert not net[6]._forward_hooks
    assert all(p.grad is None for p in net.parameters())
    maps = torch.zeros(1, 20, 20)
    maps[0, 9, 2] = 1
    (crop,) = strongest_crops(net, "6", image, maps, k=1, share=0.8)
    assert crop.field == most
    assert torch.equal(crop.image, most.crop(image[0]))
    with pytest.raises(InputError, match="share"):
        effective_receptive_field(net, "6", image, (9, 2), share=0.0)
    with pytest.raises(InputError, match="share"):
        effective_receptive_field(net, "6", image, (9, 2), share="0.9")
    dead = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU())
    nn.init.constant_(dead[0].bias, -1e9)
    with pytest.raises(LayerError, match="no pixel"):
        effective_receptive_field(dead, "1", image, (0, 0))


def test_batch_statistics_are_neither_used_nor_changed():
    """In training mode the batch normalization would mix all positions, and every call would move its statistics."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Dropout(0.5)).train()
    net[1].running_mean.normal_()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    image = torch.rand(3, 14, 18)
    maps = torch.zeros(1, 10, 14)
    maps[0, 2, 5] = 1.0
    for call in (
        lambda: receptive_field(net, "3", (14, 18), (2, 5)),
        lambda: effective_receptive_field(net, "3", image, (2, 5), share=1.0),
        lambda: strongest_crops(net, "3", image[None], maps, k=1)[0].field,
        lambda: strongest_crops(net, "3", image[None], maps, k=1, share=1.0)[0].field,
    ):
        assert call() == (2, 5, 7, 10)
        assert net.training
        assert net[1].training
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_effective_field_is_where_the_image_matters_at_that_position():
    """Rows and columns of the position are not exchanged, and an in-place ReLU after the layer changes nothing."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(inplace=True))
    for layer in ("0", "1"):
        for position in ((1, 6), (4, 2), (-1, -2)):
            row, column = position[0] % 7, position[1] % 9
            box = effective_receptive_field(net, layer, torch.rand(3, 15, 19), position, share=1.0)
            assert box == (2 * row, 2 * column, 2 * row + 3, 2 * column + 3)
