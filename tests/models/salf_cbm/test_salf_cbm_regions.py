"""Regions in pixels as weights on the grid, against pixel-by-pixel counting; and regions that are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from captum_concepts.errors import InputError
from captum_concepts.models.salf_cbm.regions import coverage, pooled_upsampling, region_mask

SIZE, GRID = (30, 44), (7, 5)
sides = st.integers(1, 40)


def mask_of(**region):
    return region_mask(2, SIZE, GRID, **region)


@settings(max_examples=40, deadline=None)
@given(sides, sides, st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_pooled_upsampling_is_the_sum_of_the_enlarged_map(height, width, h, w, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(1, height, width, generator=generator) > 0.5).double()
    maps = torch.randn(1, 1, h, w, generator=generator, dtype=torch.float64)
    large = F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)[:, 0]
    found = (pooled_upsampling(mask, (h, w)) * maps[:, 0]).sum()
    torch.testing.assert_close(found, (mask * large).sum(), atol=1e-4, rtol=1e-4)


def slow_coverage(mask, grid):
    """Each pixel cut into 12 x 12 or so parts, each of which lies in one cell (sides divide the parts)."""
    h, w = grid
    fine = mask.repeat_interleave(h, 0).repeat_interleave(w, 1)  # h x w parts a pixel: borders of cells are borders
    rows, columns = fine.shape[0] // h, fine.shape[1] // w
    return torch.stack(
        [
            torch.stack([fine[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].mean() for j in range(w)])
            for i in range(h)
        ]
    )


@settings(max_examples=40, deadline=None)
@given(sides, sides, st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_coverage_is_the_share_of_each_cell(height, width, h, w, seed):
    mask = (torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) > 0.5).float()
    found = coverage(mask[None], (h, w))[0]
    torch.testing.assert_close(found, slow_coverage(mask, (h, w)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.mean(), mask.mean(), atol=1e-5, rtol=1e-4)


class TestPoints:
    def test_x_is_the_column_and_y_the_row(self):
        mask = mask_of(points=(40, 2))
        assert mask.shape == (2, *SIZE)
        share = coverage(mask, GRID)[0]
        assert share.argmax() == 4  # first row, last column
        assert share[0, 4] > 0.9  # the rest lies in pixels that the cell's border cuts
        assert share.sum().item() == pytest.approx(1, abs=1e-4)

    def test_several_points_count_each_cell_once(self):
        for n in (1, 2):
            each = [[(1, 1), (2, 2), (43.9, 29.9)]] * n
            share = coverage(region_mask(n, SIZE, GRID, points=each), GRID)
            assert share[-1].sum().item() == pytest.approx(2, abs=1e-4)
        share = coverage(region_mask(1, SIZE, GRID, points=each[0]), GRID)
        assert share[0].sum().item() == pytest.approx(2, abs=1e-4)

    @pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
    def test_points_for_each_image(self, kind):
        share = coverage(mask_of(points=kind([[[1, 1]], [[43, 29]]])), GRID)
        assert share[0].argmax() == 0
        assert share[1].argmax() == 34
        ragged = coverage(mask_of(points=[[(1, 1)], [(1, 1), (43, 29)]]), GRID)
        assert ragged.sum((1, 2)).tolist() == pytest.approx([1, 2], abs=1e-3)
        one_each = coverage(mask_of(points=kind([[1, 1], [43, 29]])), GRID)
        torch.testing.assert_close(one_each, share)
        arrays = coverage(mask_of(points=[torch.tensor([[1, 1]]), np.array([[1, 1], [43, 29]])]), GRID)
        torch.testing.assert_close(arrays, ragged)

    @pytest.mark.parametrize(
        ("points", "message"),
        [
            ((44, 3), r"point \(44.0, 3.0\) is outside of the image: x \(column\) must be in \[0, 44\)"),
            ((3, 30), r"y \(row\) in \[0, 30\)"),
            ((-0.1, 3), "outside"),
            ([], "must be"),
            (torch.empty(0, 2), "0 points were passed for 2 images"),
            (torch.empty(2, 0, 2), "empty"),
            ((1, 2, 3), "must be"),
            ((float("nan"), 1), "finite"),
            ("ab", "must be numbers"),
            ([[[1, 1]]] * 3, "3 images, but there are 2"),
            ([(1, 1), (2, 2), (3, 3)], "3 points were passed for 2 images"),
            ((0.25, 0.5), "look like fractions of the image.*multiply x by 44 and y by 30"),
            ([(0.25, 0.5), (1.0, 0.75)], "look like fractions"),
            (torch.rand(2, 2, 2, 2), "got the shape"),
        ],
    )
    def test_bad(self, points, message):
        with pytest.raises(InputError, match=message):
            mask_of(points=points)


class TestBoxes:
    def test_half_open_in_pixels(self):
        mask = mask_of(boxes=(3, 4, 10, 6))
        expected = torch.zeros(SIZE)
        expected[4:6, 3:10] = 1
        assert torch.equal(mask[0], expected)

    def test_parts_of_pixels(self):
        mask = mask_of(boxes=(3.5, 4, 5, 4.25))
        assert mask[0].sum().item() == pytest.approx(1.5 * 0.25)

    def test_overlapping_boxes_are_a_union(self):
        pair = [(0, 0, 4, 4), (2, 2, 6, 6)]
        assert mask_of(boxes=[pair, pair]).sum((1, 2)).tolist() == [28, 28]
        assert region_mask(1, SIZE, GRID, boxes=pair).sum() == 16 + 16 - 4  # a single image has both
        assert mask_of(boxes=pair).sum((1, 2)).tolist() == [16, 16]  # of two images, one each

    def test_one_for_each_image(self):
        boxes = torch.tensor([[0, 0, 2, 2], [40, 28, 44, 30]])
        for form in (boxes, boxes[:, None], boxes.tolist(), boxes.numpy(), [boxes[:1], boxes[1:]]):
            assert mask_of(boxes=form).sum((1, 2)).tolist() == [4, 8]

    def test_a_rounded_border_is_cut(self):
        assert mask_of(boxes=(40, 28, 44.6, 30.9)).sum((1, 2)).tolist() == [8, 8]

    @pytest.mark.parametrize(
        ("boxes", "message"),
        [
            ((44, 0, 50, 10), "outside of the image, which is 44 wide and 30 high"),
            ((0, -5, 10, 0), "outside"),
            ((40, 28, 60, 60), "extends outside.*scale a box of the original photograph"),
            ((-3, 0, 10, 10), "outside"),
            ((0.1, 0.2, 0.6, 0.8), "look like fractions of the image.*multiply x by 44 and y by 30"),
            ((0, 0, 1, 1), "look like fractions"),
            ([(0, 0, 9, 9)] * 3, "3 boxes were passed for 2 images"),
            ((5, 5, 5, 9), "is empty: pass"),
            ((9, 5, 5, 9), "x0 < x1"),
            ((1, 2, 3), "must be"),
            ((0, 0, float("inf"), 3), "finite"),
            (None, None),
        ],
    )
    def test_bad(self, boxes, message):
        if message is None:
            assert mask_of(boxes=boxes).all()  # no region is the whole image
            return
        with pytest.raises(InputError, match=message):
            mask_of(boxes=boxes)


class TestMasks:
    @pytest.mark.parametrize("kind", ["bool", "uint8", "float", "numpy", "each", "channel"])
    def test_forms(self, kind):
        mask = torch.zeros(SIZE, dtype=torch.bool)
        mask[3:9, 4:20] = True
        given_as = {
            "bool": mask,
            "uint8": mask.to(torch.uint8) * 255,
            "float": mask.float(),
            "numpy": mask.numpy(),
            "each": mask.expand(2, -1, -1),
            "channel": mask.expand(2, 1, -1, -1),
        }[kind]
        assert torch.equal(mask_of(mask=given_as), mask.float().expand(2, -1, -1))

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (torch.zeros(SIZE), "empty: no pixel"),
            (torch.stack([torch.ones(SIZE), torch.zeros(SIZE)]), r"\(image 1\)"),
            (torch.ones(7, 5), "size of the image"),
            (torch.ones(3, *SIZE), "one mask for each of 2 images"),
            (torch.full(SIZE, 255.0), r"must lie in \[0, 1\]"),
            (torch.full(SIZE, float("nan")), r"must lie in \[0, 1\]"),
            ("mask.png", "must be an array"),
        ],
    )
    def test_bad(self, mask, message):
        with pytest.raises(InputError, match=message):
            mask_of(mask=mask)
