"""RegionPrompt against drawings made pixel by pixel, and against areas measured by subsampling."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from captum_concepts import published
from captum_concepts.demo.prompting import draw_circles
from captum_concepts.errors import InputError
from captum_concepts.vlm import RegionPrompt


def images(n=2, size=(15, 19), dtype=torch.float64):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def overlap(low, high, a, b):
    return max(0.0, min(high, b) - max(low, a))


def slow_circle(image, centre, radius, width, color):
    """One pixel after another: the share of [d - 1/2, d + 1/2] within the line."""
    out = image.clone()
    for i in range(image.shape[1]):
        for j in range(image.shape[2]):
            d = math.hypot(i + 0.5 - centre[0], j + 0.5 - centre[1])
            share = overlap(d - 0.5, d + 0.5, radius - width / 2, radius + width / 2)
            for c in range(3):
                out[c, i, j] = (1 - share) * float(image[c, i, j]) + share * color[c]
    return out


def bilinear(image, y, x):
    """The image at a continuous position; pixel values sit at the pixels' centres, the border is repeated."""
    h, w = image.shape[1:]
    y, x = min(max(y - 0.5, 0), h - 1), min(max(x - 0.5, 0), w - 1)
    i, j = min(int(y), h - 2), min(int(x), w - 2)
    a, b = y - i, x - j
    top = (1 - b) * image[:, i, j] + b * image[:, i, j + 1]
    return (1 - a) * top + a * ((1 - b) * image[:, i + 1, j] + b * image[:, i + 1, j + 1])


def slow_crop(image, centre, radius, border):
    h, w = image.shape[1:]
    y, x = centre
    if border == "shift":
        radius = min(radius, min(h, w) / 2)
    half_h, half_w = radius * h / min(h, w), radius * w / min(h, w)
    if border == "shift":
        y, x = min(max(y, half_h), h - half_h), min(max(x, half_w), w - half_w)
    out = torch.empty_like(image)
    for i in range(h):
        for j in range(w):
            out[:, i, j] = bilinear(image, y + (2 * (i + 0.5) / h - 1) * half_h, x + (2 * (j + 0.5) / w - 1) * half_w)
    return out


def slow_blur(image, centre, radius, sigma):
    h, w = image.shape[1:]
    reach = math.ceil(3 * sigma)
    weights = {k: math.exp(-0.5 * (k / sigma) ** 2) for k in range(-reach, reach + 1)}
    total = sum(weights.values())
    out = torch.empty_like(image)
    for i in range(h):
        for j in range(w):
            value = torch.zeros(3, dtype=image.dtype)
            for di, a in weights.items():
                for dj, b in weights.items():
                    value += a * b / total**2 * image[:, min(max(i + di, 0), h - 1), min(max(j + dj, 0), w - 1)]
            d = math.hypot(i + 0.5 - centre[0], j + 0.5 - centre[1])
            share = overlap(d - 0.5, d + 0.5, -math.inf, radius)
            out[:, i, j] = share * image[:, i, j] + (1 - share) * value
    return out


@pytest.mark.parametrize("placement", ["paper", "inset", "cells"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("circle", {"width": 2}),
        ("circle", {"width": 0.6, "color": (0.2, 0.9, 0.4)}),
        ("crop", {}),
        ("crop", {"border": "shift"}),
        ("blur", {"blur_sigma": 0.9}),
    ],
)
def test_equal_to_the_slow_drawing(kind, options, placement):
    x = images()
    prompt = RegionPrompt(kind, (2, 3), 5.5, placement=placement, **options)
    drawn = prompt.draw(x)
    assert drawn.shape == (2, 6, 3, 15, 19)
    for n in range(2):
        for k, centre in enumerate(prompt.centers(15, 19).tolist()):
            if kind == "circle":
                expected = slow_circle(x[n], centre, 5.5, prompt.width, prompt.color)
            elif kind == "crop":
                expected = slow_crop(x[n], centre, 5.5, prompt.border)
            else:
                expected = slow_blur(x[n], centre, 5.5, prompt.blur_sigma)
            # Distances of up to 25 pixels are computed in float32.
            torch.testing.assert_close(drawn[n, k], expected, atol=2e-5, rtol=0, check_dtype=False)


def test_the_published_prompt_drawn_slowly():
    x = images(1, (224, 224), torch.float32)
    prompt = RegionPrompt(**published.REGION_PROMPT)
    drawn = prompt.draw(x)[0]
    assert drawn.shape == (49, 3, 224, 224)
    for row, column in ((0, 0), (2, 3), (6, 6)):
        expected = slow_circle(x[0], (37 * row, 37 * column), 32, 2, (1, 0, 0))
        torch.testing.assert_close(drawn[7 * row + column], expected, atol=2e-5, rtol=0)


def test_the_line_covers_its_true_area():
    """A pixel's color is the covered area of its square: 32 x 32 samples in each, for an exact ring."""
    prompt = RegionPrompt("circle", 1, 6.3, width=2, color=(1, 1, 1))
    drawn = prompt.draw(torch.zeros(1, 3, 21, 20, dtype=torch.float64))[0, 0, 0]
    fine = (torch.arange(21 * 32) + 0.5) / 32
    d = torch.hypot(fine[:, None] - 10.5, fine[None, : 20 * 32] - 10)
    true = ((d - 6.3).abs() < 1).double().view(21, 32, 20, 32).mean((1, 3))
    assert (drawn - true).abs().max() < 0.11  # radial instead of square pixels
    assert (drawn - true).abs().mean() < 0.01
    assert abs(drawn.sum() / (2 * math.pi * 6.3 * 2) - 1) < 0.01


class TestPlacement:
    def test_the_papers_centres(self):
        rows = RegionPrompt("circle", (7, 7), 32, placement="paper").centers(224, 224).view(7, 7, 2)
        expected = torch.tensor([0.0, 37, 74, 111, 148, 185, 222])
        assert torch.equal(rows[:, 0, 0], expected)
        assert torch.equal(rows[0, :, 1], expected)

    def test_inset_and_cells(self):
        inset = RegionPrompt("circle", (5, 3), 32, placement="inset").centers(224, 100).view(5, 3, 2)
        assert inset[:, 0, 0].tolist() == [32, 72, 112, 152, 192]
        assert inset[0, :, 1].tolist() == [32, 50, 68]
        cells = RegionPrompt("circle", (7, 2), placement="cells").centers(224, 100).view(7, 2, 2)
        assert cells[:, 0, 0].tolist() == [16 + 32 * i for i in range(7)]
        assert cells[0, :, 1].tolist() == [25, 75]

    def test_row_by_row(self):
        centers = RegionPrompt("crop", (2, 3), 4).centers(20, 30)
        assert centers.tolist() == [[5, 5], [5, 15], [5, 25], [15, 5], [15, 15], [15, 25]]

    @pytest.mark.parametrize("placement", ["paper", "inset", "cells"])
    def test_a_grid_of_one_is_in_the_middle(self, placement):
        assert RegionPrompt("circle", 1, 5, placement=placement).centers(30, 44).tolist() == [[15, 22]]
        assert RegionPrompt("circle", (1, 2), 5, placement=placement).centers(30, 44)[:, 0].tolist() == [15, 15]

    def test_circles_that_do_not_fit_lie_in_the_middle(self):
        centers = RegionPrompt("circle", 3, 50, placement="inset").centers(40, 120)
        assert centers.view(3, 3, 2)[:, 0, 0].tolist() == [20, 20, 20]
        assert centers.view(3, 3, 2)[0, :, 1].tolist() == [50, 60, 70]

    def test_the_papers_grid_must_not_be_finer_than_the_image(self):
        with pytest.raises(InputError, match="coarser"):
            RegionPrompt("circle", 40, 5, placement="paper").centers(30, 30)


class TestSize:
    def test_none_is_the_papers_size_scaled(self):
        assert RegionPrompt().pixels(224, 224) == {"radius": 32, "width": 2, "blur_sigma": 12}
        assert RegionPrompt().pixels(64, 112) == pytest.approx({"radius": 64 / 7, "width": 4 / 7, "blur_sigma": 24 / 7})

    def test_numbers_are_pixels_of_the_image(self):
        assert RegionPrompt(radius=9, width=1).pixels(64, 64)["radius"] == 9
        assert RegionPrompt(radius=9, width=1).pixels(448, 640)["width"] == 1

    def test_numbers_for_a_reference_size(self):
        prompt = RegionPrompt(radius=32, width=2, reference_size=224)
        assert prompt.pixels(448, 640) == {"radius": 64, "width": 4, "blur_sigma": 24}


@pytest.mark.parametrize("kind", ["circle", "crop", "blur"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_precision(kind, dtype):
    prompt = RegionPrompt(kind, (2, 2), 6)
    drawn = prompt.draw(images(dtype=dtype))
    assert drawn.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(drawn.double(), prompt.draw(images(dtype=dtype).double()), atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind", ["circle", "crop", "blur"])
class TestDrawing:
    def test_some_pictures_are_those_of_all(self, kind):
        prompt = RegionPrompt(kind, (3, 3), 5)
        x = images(4)
        which, cells = torch.tensor([3, 0, 0, 2, 3]), torch.tensor([8, 0, 4, 4, 8])
        assert torch.equal(prompt.draw_cells(x, which, cells), prompt.draw(x)[which, cells])

    def test_the_input_is_not_changed(self, kind):
        x = images()
        before = x.clone()
        RegionPrompt(kind, 2, 5).draw(x)
        assert torch.equal(x, before)

    def test_values_stay_in_range(self, kind):
        drawn = RegionPrompt(kind, (4, 4), 7).draw(images(dtype=torch.float32).round())
        assert drawn.min() >= 0
        assert drawn.max() <= 1 + 1e-6

    def test_gradients_reach_the_images(self, kind):
        x = images(1).requires_grad_()
        prompt = RegionPrompt(kind, (2, 1), 5.2)
        with torch.inference_mode():
            prompt.draw(images(1))  # what it keeps for the next call must not belong to this mode
        assert torch.autograd.gradcheck(prompt.draw, (x[:, :, :7, :9],))

    def test_tiny_images_and_huge_marks(self, kind):
        assert RegionPrompt(kind, (2, 2), 500).draw(images(1, (3, 5))).isfinite().all()
        assert RegionPrompt(kind, (2, 2), 0.1).draw(images(1, (3, 5))).isfinite().all()
        assert RegionPrompt(kind, (2, 2)).draw(images(0, (8, 8))).shape == (0, 4, 3, 8, 8)

    def test_constant_images_stay_constant_outside_the_line(self, kind):
        x = torch.full((1, 3, 16, 16), 0.3)
        drawn = RegionPrompt(kind, (2, 2), 3, width=1).draw(x)
        changed = (drawn - 0.3).abs() > 1e-6
        assert changed.any() == (kind == "circle")
        assert not changed[..., 0, 0].any()


def test_a_crop_holds_only_its_region():
    """Each quarter of the image has a color of its own; a crop inside a quarter has that color everywhere."""
    x = torch.zeros(1, 3, 32, 48)
    x[:, 0, :16, :24], x[:, 1, :16, 24:], x[:, 2, 16:, :24], x[:, :, 16:, 24:] = 1, 1, 1, 1
    drawn = RegionPrompt("crop", (2, 2), 6).draw(x)[0]
    expected = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
    assert torch.allclose(drawn, expected[:, :, None, None].expand_as(drawn), atol=1e-6)


def test_agrees_with_the_circles_the_demo_model_was_trained_with():
    x = images(3, (40, 64), torch.float32)
    prompt = RegionPrompt("circle", (3, 4), 9, width=1.5)
    for k, centre in enumerate(prompt.centers(40, 64)):
        expected = draw_circles(x, centre.flip(0).expand(3, 2), torch.full((3,), 9.0), 1.5)
        assert torch.allclose(prompt.draw(x)[:, k], expected, atol=1e-5)


def test_a_named_color_is_that_color():
    for name, letters in {"red": "r", "green": "g", "blue": "b", "yellow": "rg", "white": "rgb", "black": ""}.items():
        ring = RegionPrompt("circle", 1, 6, width=2, color=name).draw(torch.full((1, 3, 32, 32), 0.5))[0, 0]
        inside = (ring - 0.5).abs().sum(0).flatten().argmax()  # a pixel that the line covers whole
        assert ring.flatten(1)[:, inside].tolist() == [float(letter in letters) for letter in "rgb"]


def test_it_is_a_value():
    prompt = RegionPrompt("crop", (2, 3), 5, placement="inset", color="blue", width=1.5, reference_size=100)
    assert RegionPrompt.from_dict(prompt.as_dict()) == prompt
    assert pickle.loads(pickle.dumps(prompt)) == prompt
    assert hash(RegionPrompt(grid=7)) == hash(RegionPrompt(grid=(7, 7)))
    assert len(prompt) == 6
    assert RegionPrompt() == RegionPrompt("circle", (7, 7))
    with pytest.raises(AttributeError):
        prompt.radius = 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "circel"}, "Did you mean 'circle'"),
        ({"placement": "grid"}, "placement"),
        ({"grid": 0}, "grid"),
        ({"grid": (2, 3, 4)}, "grid"),
        ({"grid": (2.5, 3)}, "grid"),
        ({"radius": 0}, "radius"),
        ({"radius": math.nan}, "radius"),
        ({"radius": "32"}, "radius"),
        ({"width": -1}, "width"),
        ({"blur_sigma": math.inf}, "blur_sigma"),
        ({"color": "mauve"}, "color"),
        ({"color": (255, 0, 0)}, "color"),
        ({"color": (0, 0)}, "color"),
        ({"color": (0, 0, "1")}, "color"),
        ({"color": ([0], 0, 0)}, "color"),
        ({"color": 3}, "color"),
        ({"color": None}, "color"),
        ({"grid": (True, 2)}, "grid"),
        ({"grid": "77"}, "grid"),
        ({"grid": None}, "grid"),
        ({"grid": 257}, "grid's rows must be an integer of at least 1 and at most 256"),
        ({"radius": True}, "radius"),
        ({"radius": 1e308}, "radius"),
        ({"blur_sigma": 2**80}, "blur_sigma"),
        ({"kind": None}, "kind"),
        ({"reference_size": True}, "reference_size"),
        ({"reference_size": 2.0}, "reference_size"),
        ({"border": "zeros"}, "border"),
        ({"reference_size": 0}, "reference_size"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        RegionPrompt(**arguments)


@pytest.mark.parametrize(
    "x",
    [torch.rand(3, 8, 8), torch.rand(2, 1, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [1]],
    ids=["no batch", "one channel", "integers", "a list"],
)
def test_wrong_images(x):
    with pytest.raises(InputError, match="RGB"):
        RegionPrompt().draw(x)
