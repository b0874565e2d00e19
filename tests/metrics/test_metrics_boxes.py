"""Boxes from maps, against connected components of scipy and boxes by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from scipy import ndimage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from captum_concepts import metrics
from captum_concepts.errors import InputError


def slow_box(heat: np.ndarray, threshold: float) -> list[float]:
    scaled = (heat - heat.min()) / (heat.max() - heat.min())
    labels, count = ndimage.label(scaled > threshold, structure=np.ones((3, 3)))
    sizes = [(labels == k).sum() for k in range(1, count + 1)]
    ys, xs = np.nonzero(labels == int(np.argmax(sizes)) + 1)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.6, 0.9])
def test_the_largest_component(threshold):
    rng = np.random.default_rng(0)
    maps = np.stack([ndimage.gaussian_filter(rng.random((17, 23)), 1.5) for _ in range(20)])
    found = metrics.box_from_map(torch.tensor(maps), (17, 23), threshold=threshold)
    assert found.tolist() == [slow_box(heat, threshold) for heat in maps]
    wide = metrics.box_from_map(torch.tensor(maps), (17, 23), threshold=threshold, component="all")
    assert bool((wide[:, :2] <= found[:, :2]).all() and (wide[:, 2:] >= found[:, 2:]).all())


def test_a_coarse_map_gives_a_box_in_pixels():
    heat = torch.zeros(1, 1, 4, 4)
    heat[0, 0, 1, 2] = 1
    assert metrics.box_from_map(heat, (40, 80), mode="nearest").tolist() == [[40, 10, 60, 20]]


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is computed."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)), 0)
        return out


def test_each_box_is_compared_with_its_own_mask_only():
    generator = torch.Generator().manual_seed(0)
    maps, masks = torch.rand(200, 3, 4, generator=generator), torch.rand(200, 3, 4, generator=generator) > 0.8
    with Largest() as largest:
        found = metrics.box_iou(maps, masks)
    assert largest.elements <= 2 * maps.numel()  # all pairs of boxes would be 200 x 200
    boxes = metrics.box_from_map(maps, (3, 4)), metrics.box_from_map(masks.float(), (3, 4), component="all")
    expected = torchvision.ops.box_iou(*boxes).diagonal()  # NaN for an empty mask
    torch.testing.assert_close(found, expected, equal_nan=True, atol=1e-6, rtol=0)


def test_iou_with_the_box_of_the_mask():
    heat, masks = torch.zeros(2, 2, 8, 8), torch.zeros(2, 2, 8, 8, dtype=torch.bool)
    heat[0, 0, :4, :4] = heat[0, 1, 4:, 4:] = 1
    masks[0, 0, :4, :8] = True
    masks[0, 1, 4, 4] = masks[0, 1, 7, 7] = True  # its box is the square
    heat[1, 0, 0, 0] = torch.nan
    masks[1, 0] = True
    masks[1, 1, 2:4] = True  # and the map is constant
    value = metrics.box_iou(heat, masks)
    assert torch.allclose(value, torch.tensor([[0.5, 1.0], [torch.nan, 0.0]]), equal_nan=True)
    assert metrics.box_iou(heat[:, 0], masks[:, 0])[0] == 0.5
    assert metrics.box_iou(heat[:, 0], torch.zeros(2, 8, 8)).isnan().all()
    metric = metrics.BoxIoU()
    metric.update(heat[:1], masks[:1])
    assert metric.compute() == 0.75
    table = metrics.evaluate(lambda x: x[:, :1], [(heat[:1], masks[:1, 0])], ["box_iou"], n_bootstrap=0)
    assert table.rows[0]["value"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.0}, "threshold must be in"),
        ({"component": "first"}, "component must be one of"),
        ({"maps": torch.rand(2, 3, 4, 4)}, "maps must be"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        metrics.box_from_map(**{"maps": torch.rand(2, 4, 4), "size": (8, 8), **arguments})
    with pytest.raises(InputError, match="do not match"):
        metrics.box_iou(torch.rand(2, 4, 4), torch.ones(3, 8, 8))
