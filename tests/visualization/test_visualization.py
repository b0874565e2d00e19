"""Overlay and panel: what the colours mean, and that nothing overlaps or leaks."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
import weakref
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from captum_concepts import ConceptExplanation
from captum_concepts.errors import InputError, InputWarning
from captum_concepts.visualization import (
    ColorScale,
    as_image,
    heatmap_figure,
    legend,
    overlay,
    panel,
    save_figure,
    upsample,
    value_range,
)
from captum_concepts.visualization.canvas import fit, text_width
from captum_concepts.visualization.pictures import map_picture, photo
from captum_concepts.visualization.regions import outlines, per_image
from captum_concepts.visualization.scale import DIVERGING, SEQUENTIAL


def explanation(n: int = 2, t: int = 3, contributions: bool = True) -> ConceptExplanation:
    generator = torch.Generator().manual_seed(0)
    known = [
        "stripes",
        "a concept whose name goes on and on and on, longer than any cell",
        "grass",
        "Donaudampfschiffe" * 4,
    ]
    names = (known + [f"concept {k}" for k in range(t)])[:t]
    maps = torch.rand(n, t, 7, 5, generator=generator)
    maps[:, 1::2] -= 0.5
    how = torch.randn(n, t, generator=generator) if contributions else None
    return ConceptExplanation(
        names, torch.rand(n, t, generator=generator), maps, how, torch.arange(n), "layer4", "test"
    )


def pixels_of(figure: Figure) -> memoryview:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.buffer_rgba()


def lightness(colours: np.ndarray) -> np.ndarray:
    """CIE L* of sRGB colours."""
    c = colours[..., :3]
    luminance = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
    return 116 * np.where(luminance > 0.008856, np.cbrt(luminance), 7.787 * luminance + 16 / 116) - 16


def test_import_does_not_load_matplotlib():
    code = "import sys, captum_concepts.visualization; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestOverlay:
    def test_extremes_have_the_end_colours(self):
        heat = torch.tensor([[0.0, 1.0, 4.0]])
        result = overlay(torch.full((3, 1, 3), 0.4), heat, alpha=1.0)
        torch.testing.assert_close(result[:, 0, 2], torch.tensor(colormaps[SEQUENTIAL](1.0)[:3]).float())
        torch.testing.assert_close(result[:, 0, 0], torch.full((3,), 0.4))  # nothing to see: the image
        signed = overlay(torch.full((3, 1, 3), 0.4), torch.tensor([[-1.0, 0.0, 1.0]]), alpha=1.0)
        for column, end in ((0, 0.0), (2, 1.0)):
            torch.testing.assert_close(signed[:, 0, column], torch.tensor(colormaps[DIVERGING](end)[:3]).float())
        torch.testing.assert_close(signed[:, 0, 1], torch.full((3,), 0.4))

    def test_opposite_values_are_equally_light(self):
        share = np.linspace(0, 0.5, 65)
        negative, positive = (lightness(colormaps[DIVERGING](x)) for x in (0.5 - share, 0.5 + share))
        assert np.abs(negative - positive).max() < 6  # 5.1; matplotlib's "bwr" has 20.9
        assert abs(negative[-1] - positive[-1]) < 1
        assert negative[0] > 95
        assert (np.diff(negative) < 0.2).all()
        assert (np.diff(positive) < 0.2).all()
        middle = colormaps[DIVERGING](0.5)[:3]
        assert max(middle) - min(middle) < 0.02  # no hue

    def test_larger_values_are_lighter_in_an_unsigned_map(self):
        steps = np.diff(lightness(colormaps[SEQUENTIAL](np.linspace(0, 1, 256))))
        assert (steps > 0).all()

    def test_full_alpha_is_the_color_map_from_half_of_the_scale_on(self):
        heat = torch.linspace(1, 2, 12).reshape(3, 4)
        result = overlay(torch.full((3, 3, 4), 0.2), heat, alpha=1.0)
        expected = torch.from_numpy(colormaps[SEQUENTIAL]((heat / 2).numpy())[..., :3]).permute(2, 0, 1).float()
        torch.testing.assert_close(result, expected)

    @pytest.mark.parametrize("signed", [False, True])
    @pytest.mark.parametrize("brightness", [0.0, 0.5, 1.0])
    def test_a_strong_value_can_be_read_off_the_bar_on_dark_and_bright_pixels(self, brightness, signed):
        values = torch.linspace(0.5, 1, 11)
        heat = torch.cat([values, -values]) if signed else values
        shown = overlay(
            torch.full((3, 1, len(heat)), brightness), heat[None], signed=signed, vmin=-1.0 * signed, vmax=1
        )
        bar = torch.linspace(-1.0 if signed else 0.0, 1, 256)
        name = DIVERGING if signed else SEQUENTIAL
        colors = colormaps[name](np.linspace(0, 1, 256))[:, :3].astype("float32")
        nearest = torch.cdist(shown[:, 0].T, torch.from_numpy(colors)).argmin(1)
        assert (bar[nearest] - heat).abs().max() < 0.13

    def test_what_is_under_a_strong_value_stays_visible_as_lightness(self):
        image = torch.zeros(3, 64, 64)
        image[:, 20:44, 20:44] = 1
        shown = overlay(image, torch.ones(2, 2), vmin=0, vmax=2, signed=False)
        assert (shown[:, 32, 19] - shown[:, 32, 20]).abs().max() > 0.05
        flat = overlay(torch.zeros(3, 64, 64), torch.ones(2, 2), vmin=0, vmax=2, signed=False)
        torch.testing.assert_close(shown[:, 2, 2], flat[:, 2, 2])

    def test_zero_alpha_is_the_grey_image(self):
        image = torch.rand(3, 8, 8)
        torch.testing.assert_close(overlay(image, torch.rand(2, 2), alpha=0.0, saturation=1.0), image)
        grey = overlay(image, torch.rand(2, 2), alpha=0.0, saturation=0.0)
        assert torch.equal(grey[0], grey[1])

    def test_zero_is_neutral_in_a_signed_map(self):
        heat = torch.tensor([[-3.0, 0.0, 1.0]])
        result = overlay(torch.full((3, 1, 3), 0.5), heat, alpha=1.0)
        torch.testing.assert_close(result[:, 0, 1], torch.full((3,), 0.5), atol=0.01, rtol=0)
        assert result[2, 0, 0] > result[0, 0, 0]  # negative is blue
        assert result[0, 0, 2] > result[2, 0, 2]  # positive is red

    def test_one_value_has_one_color_whatever_the_rest(self):
        def color(rest: float) -> torch.Tensor:
            heat = torch.tensor([[0.5, rest]])
            return overlay(torch.zeros(3, 1, 2), heat, alpha=1.0, vmin=0, vmax=1, signed=False)[:, 0, 0]

        assert torch.equal(color(0.1), color(0.9))

    def test_unknown_cells_do_not_pull_their_neighbours(self):
        image, heat = torch.zeros(3, 40, 40), torch.full((4, 4), 0.5)
        heat[1, 1] = float("inf")
        with pytest.warns(InputWarning):
            result = overlay(image, heat, alpha=1.0, vmin=0, vmax=1, signed=False)
        outside = torch.ones(40, 40, dtype=torch.bool)
        outside[10:20, 10:20] = False
        expected = torch.tensor(colormaps[SEQUENTIAL](0.5)[:3]).float()
        torch.testing.assert_close(
            result[:, outside], expected[:, None].expand(3, int(outside.sum())), atol=0.02, rtol=0
        )
        assert torch.equal(result[:, ~outside], image[:, ~outside])

    def test_a_map_of_nothing_but_nan_is_the_image(self):
        image = torch.rand(3, 5, 5)
        with pytest.warns(InputWarning):
            assert torch.equal(overlay(image, torch.full((2, 2), float("nan"))), image)

    def test_images_normalised_for_a_network_warn(self):
        with pytest.warns(InputWarning, match="normalization"):
            result = overlay(torch.randn(3, 8, 8) * 2, torch.rand(2, 2))
        assert result.min() >= 0
        assert result.max() <= 1

    def test_transparency_is_on_white_and_grey_images_are_images(self):
        rgba = np.zeros((4, 5, 4), dtype=np.uint8)
        assert torch.equal(as_image(rgba), torch.ones(3, 4, 5))
        assert torch.equal(as_image(Image.fromarray(rgba)), torch.ones(3, 4, 5))
        assert torch.equal(as_image(torch.full((4, 5), 0.5)), torch.full((3, 4, 5), 0.5))
        assert as_image(Image.new("L", (5, 4), 255)).shape == (3, 4, 5)

    @pytest.mark.parametrize("mode", ["bicubic", "bilinear", "nearest"])
    @pytest.mark.parametrize("size", [(7, 5), (30, 17), (224, 224), (3, 2)])
    def test_upsampling_invents_no_value(self, mode, size):
        heat = torch.rand(7, 5, generator=torch.Generator().manual_seed(0))
        result = upsample(heat, size, mode=mode)
        assert result.shape == size
        assert result.min() >= heat.min()
        assert result.max() <= heat.max()
        if size == (7, 5):
            torch.testing.assert_close(result, heat)

    def test_cells_stay_where_they_are(self):
        heat = torch.zeros(7, 7)
        heat[2, 5] = 1
        up = upsample(heat, (70, 70))
        rows, columns = torch.meshgrid(torch.arange(70.0), torch.arange(70.0), indexing="ij")
        assert float((up * rows).sum() / up.sum()) == pytest.approx(24.5, abs=0.2)
        assert float((up * columns).sum() / up.sum()) == pytest.approx(54.5, abs=0.2)

    @pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
    def test_constant_maps_are_finite_and_uniform(self, value):
        result = overlay(torch.zeros(3, 6, 6), torch.full((3, 3), value), alpha=1.0)
        assert result.isfinite().all()
        flat = result.flatten(1)
        torch.testing.assert_close(flat.amax(1), flat.amin(1), atol=1e-5, rtol=0)

    def test_nan_cells_keep_the_image_and_warn(self):
        image, heat = torch.rand(3, 4, 4), torch.ones(4, 4)
        heat[0, 0] = float("nan")
        with pytest.warns(InputWarning, match="NaN"):
            result = overlay(image, heat)
        assert torch.equal(result[:, 0, 0], image[:, 0, 0])
        assert result.isfinite().all()

    def test_every_kind_of_image_gives_the_same(self):
        pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
        heat = torch.rand(2, 3)
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)
        results = [overlay(i, heat) for i in (pixels, tensor, tensor.float() / 255, Image.fromarray(pixels))]
        for other in results[1:]:
            torch.testing.assert_close(other, results[0])
        assert results[0].shape == (3, 6, 9)

    @pytest.mark.parametrize(
        ("image", "heat", "options", "message"),
        [
            (torch.rand(3, 4, 4), torch.rand(1, 2, 2), {}, "heatmap must be"),
            (torch.rand(2, 4, 4), torch.rand(2, 2), {}, "an image must be"),
            (torch.rand(4, 4, 5), torch.rand(2, 2), {}, "choose three of its 4 channels"),
            (torch.rand(3, 4, 4), torch.rand(2, 2), {"alpha": 1.5}, "alpha"),
            (torch.rand(3, 4, 4), torch.rand(2, 2), {"saturation": -1}, "saturation"),
            (torch.rand(3, 4, 4), torch.rand(2, 2), {"vmin": 1, "vmax": 0}, "vmin must be less"),
            (torch.rand(3, 4, 4), torch.rand(2, 2), {"signed": "maybe"}, "signed must be"),
            (torch.rand(3, 4, 4), torch.tensor([[0, 3e38]]), {}, "too large to draw"),
            (torch.rand(3, 4, 4), torch.tensor([[-9e37, 0]]), {}, "too large to draw"),
            (torch.rand(3, 4, 4), torch.rand(2, 2), {"cmap": "no such map"}, "color map"),
            (torch.rand(3, 4, 4), torch.rand(2, 2), {"mode": "cubic"}, "mode must be"),
            (torch.full((3, 4, 4), 300), torch.rand(2, 2), {}, "0 to 255"),
            (np.full((4, 4), 40_000, np.uint16), torch.rand(2, 2), {}, "0 to 255, got 40000"),
            ("cat.jpg", torch.rand(2, 2), {}, "cat.jpg cannot be read"),
        ],
    )
    def test_bad_input(self, image, heat, options, message):
        with pytest.raises(InputError, match=message):
            overlay(image, heat, **options)


def test_value_range_is_symmetric_only_where_negatives_matter():
    assert value_range(torch.tensor([-0.01, 1.0]))[1] == 1.0
    assert value_range(torch.tensor([-0.01, 1.0]))[0] == pytest.approx(-0.01)
    assert value_range(torch.tensor([-0.5, 1.0])) == (-1.0, 1.0)
    assert value_range(torch.tensor([0.2, 1.0])) == (0.0, 1.0)
    assert value_range(torch.tensor([-3.0, -2.0])) == (-3.0, 3.0)
    assert value_range(torch.tensor([-0.5, 1.0]), signed=False) == (-0.5, 1.0)
    assert value_range(torch.tensor([0.2, 1.0]), signed=True, vmax=2.0) == (-2.0, 2.0)
    assert value_range(torch.tensor([float("nan")])) == (0.0, 1.0)


def test_an_unsigned_scale_that_happens_to_be_symmetric_is_not_diverging():
    scale = ColorScale.of(torch.tensor([0.5]), signed=False, vmin=-1, vmax=1)
    assert scale.colormap().name == SEQUENTIAL


class TestFit:
    @pytest.mark.parametrize(
        "text", ["stripes", "black and white stripes of a zebra", "x" * 80, "many words " * 40, ""]
    )
    @pytest.mark.parametrize("width", [0.4, 1.7, 6.0])
    def test_lines_fit_the_width(self, text, width):
        found = fit(text, width, 8.0, lines=3)
        lines = found.text.split("\n")
        assert len(lines) <= 3
        assert 6 <= found.size <= 8
        assert all(text_width(line, found.size) <= width for line in lines)

    def test_text_is_cut_only_where_nothing_else_helps(self):
        assert fit("two words", 6.0, 8.0).text == "two words"
        assert fit("two words", 0.4, 8.0).text == "two\nwords"
        assert fit("many words " * 40, 1.0, 8.0).text.endswith("…")


def texts_of(figure: Figure) -> list[Text]:
    return [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible()]


def strings_of(figure: Figure) -> list[str]:
    return [t.get_text() for t in texts_of(figure)]


def axes_of(figure: Figure, label: str) -> list:
    return [a for a in figure.axes if a.get_label() == label]


def check_layout(figure: Figure) -> None:
    """No text meets another text or a picture, and all of it lies inside the figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = []
    for text in texts_of(figure):
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0, text.get_text()
        assert box.y0 >= 0, text.get_text()
        assert box.x1 <= figure.bbox.width, text.get_text()
        assert box.y1 <= figure.bbox.height, text.get_text()
        boxes.append((text.get_text(), box))
    # One pixel of overlap is the rounding of extents, not ink.
    boxes = [(name, box.padded(-0.5)) for name, box in boxes]
    for (a, first), (b, second) in combinations(boxes, 2):
        assert not first.overlaps(second), (a, b)
    areas = [axes.get_window_extent(renderer).padded(-0.5) for axes in figure.axes]
    for a, b in combinations(areas, 2):
        assert not a.overlaps(b)
    for axes, area in zip(figure.axes, areas, strict=True):
        if axes.images:
            assert not [name for name, box in boxes if box.overlaps(area)], axes.get_label()


LONG = "What, where and how much, in a title that is a good deal longer than a narrow figure and must be wrapped"


class TestLayout:
    @pytest.mark.parametrize(
        ("n", "t", "shape", "options"),
        [
            (1, 1, (64, 64), {}),
            (2, 3, (48, 96), {"scale": "map", "map_label": "relevance"}),
            (2, 3, (150, 30), {"scale": "map", "map_label": "relevance", "cell_size": 1.0}),
            (1, 8, (20, 200), {"cell_size": 0.9, "map_label": "contribution to the class"}),
            (2, 8, (64, 64), {"scale": "panel", "class_names": ["tabby", "a class with, so to say, several names"]}),
            (1, 2, (64, 64), {"cell_size": 3.0}),
        ],
    )
    @pytest.mark.parametrize("contributions", [True, False])
    def test_nothing_overlaps_and_nothing_is_clipped(self, n, t, shape, options, contributions):
        flags = torch.arange(t) != 1
        figure = panel(
            explanation(n, t, contributions),
            torch.rand(n, 3, *shape),
            top_k=t,
            title=LONG,
            significant=flags,
            **options,
        )
        check_layout(figure)

    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e7])
    def test_values_of_any_size(self, scale):
        e = explanation(2, 3)
        e = ConceptExplanation(e.concepts, e.scores * scale, e.maps * scale, e.contributions * scale, e.target)
        check_layout(panel(e, torch.rand(2, 3, 32, 32), map_label="value"))

    @pytest.mark.parametrize("own", [{"image.origin": "lower"}, {"pcolor.shading": "nearest"}])
    def test_images_stay_upright_and_color_bars_whole_under_settings_of_the_user(self, own):
        """With its origin below, an image was upside down, and its outlines were elsewhere."""
        e, image = explanation(1, 2), torch.linspace(0, 1, 30 * 40).reshape(1, 30, 40).expand(3, -1, -1)
        drawn = []
        for settings in ({}, own):
            with rc_context(settings):
                figures = panel(e, image, boxes=(2, 3, 20, 9)), legend(e, image), heatmap_figure(image, e.maps[0, 0])
                drawn.append([np.asarray(pixels_of(figure)) for figure in figures])
        for usual, other in zip(*drawn, strict=True):
            assert np.array_equal(usual, other)

    def test_twenty_images_of_different_shapes(self):
        generator = torch.Generator().manual_seed(0)
        sizes = torch.randint(16, 65, (20, 2), generator=generator).tolist()
        figure = panel(explanation(20, 1, False), [torch.rand(3, *size) for size in sizes], cell_size=0.8)
        assert len(axes_of(figure, "input")) == 20
        check_layout(figure)

    @pytest.mark.parametrize("shape", [(64, 64), (20, 200), (200, 20)])
    def test_heatmap_figure(self, shape):
        check_layout(heatmap_figure(torch.rand(3, *shape), torch.randn(4, 4) * 1e-4, title=LONG, label="cosine"))

    def test_the_users_settings_do_not_break_it(self):
        style = {"figure.autolayout": True, "font.family": "serif", "text.color": "white", "axes.facecolor": "black",
                 "savefig.bbox": "tight", "xtick.color": "white", "font.size": 20, "axes.titlesize": 30}  # fmt: skip
        with rc_context(style):
            figure = panel(explanation(1, 3), torch.rand(1, 3, 32, 32), title="t")
            check_layout(figure)
        assert "white" not in {t.get_color() for t in texts_of(figure)}

    def test_names_are_not_formulas(self):
        e = ConceptExplanation(["costs $5, $6", "a_b^c & $\\frac$"], torch.rand(1, 2), torch.rand(1, 2, 3, 3))
        figure = panel(e, torch.rand(1, 3, 16, 16), title="$x$")
        check_layout(figure)
        assert "costs $5, $6" in strings_of(figure)

    def test_pictures_keep_their_shape(self):
        figure = panel(explanation(2, 1), [torch.rand(3, 40, 80), torch.rand(3, 90, 30)])
        for axes, ratio in zip(axes_of(figure, "input"), (0.5, 3.0), strict=True):
            box = axes.get_window_extent()
            assert box.height / box.width == pytest.approx(ratio, rel=0.02)


class TestPanel:
    def test_each_image_shows_its_own_strongest_concepts(self):
        e = ConceptExplanation(["a", "b"], torch.tensor([[0.9, 0.1], [0.1, 0.8]]), torch.rand(2, 2, 3, 3))
        found = strings_of(panel(e, torch.rand(2, 3, 16, 16), top_k=1))
        assert {"a", "b", "score 0.9", "score 0.8"} <= set(found)
        assert "score 0.1" not in found

    def test_order_by_contribution_shows_what_spoke_against_the_target(self):
        how = torch.tensor([[0.1, -0.7, 0.3]])
        e = ConceptExplanation(["x", "y", "z"], torch.tensor([[0.9, 0.5, 0.1]]), torch.rand(1, 3, 3, 3), how)
        figure = panel(e, torch.rand(1, 3, 16, 16), top_k=2, rank_by="contributions")
        assert [a.get_label() for a in figure.axes if a.images and a.get_label() != "input"] == ["y", "z"]
        assert any("contribution −0.7" in text for text in strings_of(figure))

    def test_without_a_ranking_the_order_stays(self):
        e = ConceptExplanation(["x", "y"], torch.tensor([[0.1, 0.9]]), torch.rand(1, 2, 3, 3))
        figure = panel(e, torch.rand(1, 3, 16, 16))
        assert [a.get_label() for a in figure.axes if a.images] == ["input", "x", "y"]

    def test_insignificant_concepts_are_grey_and_last_and_say_so(self):
        e = ConceptExplanation(["a", "b"], torch.tensor([[0.9, 0.1]]), torch.rand(1, 2, 3, 3), torch.ones(1, 2))
        figure = panel(e, torch.rand(1, 3, 16, 16), significant=torch.tensor([False, True]))
        assert [a.get_label() for a in figure.axes if a.images] == ["input", "b", "a"]
        assert strings_of(figure).count("not encoded here") == 1
        assert "score 0.9" not in " ".join(strings_of(figure))
        drawn = {a.get_label(): np.asarray(a.images[0].get_array(), dtype=int) for a in figure.axes if a.images}
        assert np.ptp(drawn["a"], axis=-1).max() == 0
        assert np.ptp(drawn["b"], axis=-1).max() > 30
        first, second = (bar.get_facecolor() for bar in axes_of(figure, "contributions")[0].patches)
        assert len(set(second[:3])) == 1
        assert len(set(first[:3])) > 1

    def test_flags_with_names_go_to_their_concepts(self):
        """An explanation has its strongest concept first, a fitted method has the order of its fit."""
        e = ConceptExplanation(["b", "a"], torch.tensor([[0.9, 0.1]]), torch.rand(1, 2, 3, 3), rank_by="scores")
        fitted = SimpleNamespace(concepts=["a", "unused", "b"], significant_=torch.tensor([False, True, True]))
        flags = dict(zip(fitted.concepts, fitted.significant_, strict=True))
        for given in (fitted, flags, torch.tensor([True, False]), [[True, False]]):
            drawn = [a for a in panel(e, torch.rand(1, 3, 16, 16), significant=given).axes if a.images]
            gray = [
                a.get_label() for a in drawn if np.ptp(np.asarray(a.images[0].get_array(), dtype=int), -1).max() == 0
            ]
            assert gray == ["a"]
        fitted.significant_ = None  # not tested
        assert "not encoded here" not in strings_of(panel(e, torch.rand(1, 3, 16, 16), significant=fitted))

    @pytest.mark.parametrize("contributions", [True, False])
    @pytest.mark.parametrize("scale", ["row", "map", "panel"])
    def test_an_image_that_selected_none_of_the_concepts_says_so(self, scale, contributions):
        selected = torch.tensor([[True, False, True], [False, True, False]])
        e = dataclasses.replace(explanation(2, 3, contributions), selected=selected)
        for one in (e["stripes"], e[["stripes", "grass"]]):
            figure = panel(one, torch.rand(2, 3, 32, 32), scale=scale, class_names=["tabby", "tiger"])
            check_layout(figure)
            assert [" ".join(s.split()) for s in strings_of(figure)].count("none of these concepts is selected") == 1
            assert [a.get_label() for a in figure.axes if a.images] == ["input", *one.concepts, "input"]
            check_layout(legend(one, torch.rand(2, 3, 32, 32)))
        with pytest.raises(InputError, match="none of the 1 concepts is selected for any of the 1 images"):
            panel(e[1:, "stripes"], torch.rand(1, 3, 32, 32))

    @pytest.mark.parametrize("scale", ["row", "panel"])
    def test_the_bars_of_a_row_reach_its_own_end(self, scale):
        """Bars of a row with small contributions are no slivers, unless one scale for the whole panel is asked for."""
        e = explanation(2)
        small = e.contributions * torch.tensor([[1.0], [1e-3]])
        e = ConceptExplanation(e.concepts, e.scores, e.maps, small, e.target)
        ends = [
            axes.get_xlim()[1] for axes in axes_of(panel(e, torch.rand(2, 3, 16, 16), scale=scale), "contributions")
        ]
        largest = small.abs().amax(1).tolist()
        assert largest[0] <= ends[0] <= 2 * largest[0]
        assert ends[1] == ends[0] if scale == "panel" else largest[1] <= ends[1] <= 2 * largest[1]

    def test_bars_show_the_sign(self):
        e = explanation(1)
        figure = panel(e, torch.rand(1, 3, 16, 16))
        bars = axes_of(figure, "contributions")[0].patches
        top = e.top(3)
        assert [bar.get_width() for bar in bars] == pytest.approx(top.contributions[0].tolist())
        assert [bar.get_y() + bar.get_height() / 2 for bar in bars] == pytest.approx([0, 1, 2])
        colours = {(bar.get_width() >= 0): bar.get_facecolor() for bar in bars}
        assert colours[True][0] > colours[True][2]
        assert colours[False][2] > colours[False][0]

    def test_scales_are_shared_as_stated(self):
        maps = torch.tensor([1.0, 2.0, 4.0, 8.0]).reshape(2, 2, 1, 1).expand(2, 2, 3, 3)
        e = ConceptExplanation(["a", "b"], torch.rand(2, 2), maps)
        ends = {}
        for scale in ("map", "row", "panel"):
            figure = panel(e, torch.rand(2, 3, 16, 16), scale=scale)
            ends[scale] = [a.get_ylim()[1] for a in axes_of(figure, "colorbar")]
            assert any("scale" in text for text in strings_of(figure))
        assert ends == {"map": [1, 2, 4, 8], "row": [2, 8], "panel": [8, 8]}

    def test_equal_values_have_equal_colours_within_a_row(self):
        maps = torch.zeros(1, 2, 3, 3)
        maps[0, 0], maps[0, 1] = 0.5, 0.5
        maps[0, 1, 2, 2] = 2.0
        e = ConceptExplanation(["a", "b"], torch.rand(1, 2), maps)
        figure = panel(e, torch.zeros(1, 3, 30, 30), mode="nearest")
        a, b = (np.asarray(x.images[0].get_array())[0, 0] for x in figure.axes if x.get_label() in ("a", "b"))
        assert (a == b).all()

    @pytest.mark.parametrize("target", [-1, 9])
    def test_a_target_without_a_name_is_refused(self, target: int):
        e = dataclasses.replace(explanation(1), target=torch.tensor([target]))
        with pytest.raises(InputError, match=f"no name for target {target} among 9 class_names"):
            panel(e, torch.rand(1, 3, 16, 16), class_names=[f"name {k}" for k in range(9)])

    def test_target_layer_and_method_are_named(self):
        names = [f"name {k}" for k in range(9)]
        e = dataclasses.replace(explanation(), class_names=names, target_probability=torch.tensor([0.5, 1e-9]))
        text = " ".join(strings_of(panel(e, torch.rand(2, 3, 16, 16)))).replace("\n", " ")
        assert "target: name 1 < 0.001" in text
        assert "target: name 0 0.5" in text
        text = " ".join(strings_of(panel(explanation(), torch.rand(2, 3, 16, 16), class_names=names)))
        text = text.replace("\n", " ")
        for part in ("target: name 1", "contribution to name 1", "layer layer4", "test"):
            assert part in text
        e = ConceptExplanation(["a"], torch.rand(1, 1), torch.rand(1, 1, 2, 2), layer=[["block.3"]])
        assert any("layer block.3" in part for part in strings_of(panel(e, torch.rand(3, 16, 16))))

    def test_not_finite_values(self):
        e = ConceptExplanation(
            ["a", "b"], torch.tensor([[float("nan"), 1.0]]), torch.rand(1, 2, 3, 3), torch.tensor([[float("inf"), 1.0]])
        )
        found = " ".join(strings_of(panel(e, torch.rand(1, 3, 16, 16))))
        assert "score n/a" in found
        assert "contribution n/a" in found
        maps = torch.rand(1, 2, 3, 3)
        maps[0, 0, 0, 0] = float("nan")
        with pytest.warns(InputWarning, match="NaN"):
            panel(ConceptExplanation(["a", "b"], torch.rand(1, 2), maps), torch.rand(1, 3, 16, 16))

    def test_half_precision(self):
        e = ConceptExplanation(["a"], torch.rand(1, 1).bfloat16(), torch.rand(1, 1, 3, 3).bfloat16())
        panel(e, torch.rand(1, 3, 16, 16).half())

    def test_pyplot_and_settings_are_not_touched(self, tmp_path: Path):
        code = """
import sys, torch, matplotlib
from captum_concepts import ConceptExplanation
from captum_concepts.visualization import heatmap_figure, panel, save_figure
def settings():  # reading "backend" would itself import pyplot
    return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}
before = settings()
e = ConceptExplanation(["a"], torch.rand(1, 1), torch.rand(1, 1, 3, 3), torch.rand(1, 1))
save_figure(panel(e, torch.rand(1, 3, 16, 16)), sys.argv[1])
heatmap_figure(torch.rand(3, 16, 16), torch.rand(3, 3), title="t", label="value")
sys.exit("matplotlib.pyplot" in sys.modules or settings() != before)
"""
        command = [sys.executable, "-c", code, str(tmp_path / "a.png")]
        assert subprocess.run(command, check=False).returncode == 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"significant": torch.ones(2)}, "significant"),
            ({"significant": torch.ones(3)}, "must be bool"),
            ({"significant": {"stripes": True}}, r"lacks \['a concept"),
            ({"significant": dict.fromkeys(explanation().concepts, 0.3)}, "must be bool"),
            ({"significant": "all"}, "significant must be a fitted SpatialACV"),
            ({"image_names": ["one"]}, "image_names"),
            ({"class_names": ["one"]}, "no name for target 1"),
            ({"top_k": 0}, "top_k"),
            ({"rank_by": "names"}, "rank_by must be"),
            ({"scale": "all"}, "scale must be"),
            ({"cell_size": 0.1}, "cell_size"),
            ({"boxes": (1, 2, 3)}, "boxes must be 4 numbers"),
            ({"boxes": (1, 2, 3, 4), "points": (1, 2)}, "points and boxes"),
            ({"points": [[(1, 2)]]}, "points were passed for 1 images, but there are 2"),
            ({"mask": torch.ones(3, 3)}, "mask must be"),
            ({"crop": (0, 0, 9, 4)}, "crop must be one box"),
        ],
    )
    def test_bad_input(self, options, message):
        with pytest.raises(InputError, match=message):
            panel(explanation(), torch.rand(2, 3, 8, 8), **options)

    def test_other_numbers_of_images(self):
        with pytest.raises(InputError, match="the explanation comes first: panel"):
            panel(torch.rand(2, 3, 8, 8), explanation())
        with pytest.raises(InputError, match="panel requires a ConceptExplanation, got Tensor"):
            panel(torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8))
        with pytest.raises(InputError, match="1 images for an explanation of 2"):
            panel(explanation(), torch.rand(1, 3, 8, 8))
        with pytest.raises(InputError, match="nothing to draw"):
            panel(explanation()[:0], [])


class TestWhatAStrangerAsks:
    def test_one_color_scheme_per_figure(self):
        maps = torch.rand(2, 2, 4, 4) + 0.1
        maps[1, 1, 0, 0] = -1
        e = ConceptExplanation(["a", "b"], torch.rand(2, 2), maps)
        for scale in ("map", "row", "panel"):
            figure = panel(e, torch.rand(2, 3, 16, 16), scale=scale)
            lows = [a.get_ylim()[0] for a in axes_of(figure, "colorbar")]
            assert all(low < 0 for low in lows), scale
        figure = panel(e[0], torch.rand(1, 3, 16, 16))
        assert axes_of(figure, "colorbar")[0].get_ylim()[0] == 0

    def test_negative_values_count_beside_those_of_their_own_scale(self):
        """A hundredth of the other map below zero: a map of its own shows it, a scale for both does not."""
        maps = torch.stack([torch.linspace(0, 10, 9), torch.linspace(-0.05, 0.05, 9)]).reshape(1, 2, 3, 3)
        e = ConceptExplanation(["a", "b"], torch.rand(1, 2), maps)
        for scale, diverging in (("map", True), ("row", False), ("panel", False)):
            low, high = axes_of(panel(e, torch.rand(1, 3, 16, 16), scale=scale), "colorbar")[0].get_ylim()
            assert (low == -high) == diverging, scale

    def test_nothing_is_said_below_a_panel_of_one_plain_map(self):
        e = ConceptExplanation(["a"], torch.rand(1, 1), torch.rand(1, 1, 3, 3))
        plain, noted = (panel(one, torch.rand(1, 3, 16, 16)) for one in (e, dataclasses.replace(e, method="FAM")))
        check_layout(plain)
        assert 0.1 < noted.get_figheight() - plain.get_figheight() < 0.3

    def test_absence_is_explained_only_where_it_contributes(self):
        options = {"target": torch.tensor([0]), "score_unit": "standard deviations", "class_names": ["cat"]}
        maps, score = torch.rand(1, 1, 3, 3), torch.tensor([[-2.0]])
        for how, said in ((torch.tensor([[0.7]]), True), (torch.tensor([[0.0]]), False), (None, False)):
            figure = panel(ConceptExplanation(["a"], score, maps, how, **options), torch.rand(1, 3, 16, 16))
            assert any("its absence supports cat" in text.replace("\n", " ") for text in strings_of(figure)) == said
            assert any("absence" in text for text in strings_of(figure)) == said

    def test_not_seen_is_pale_and_last_and_says_so(self):
        presence = torch.tensor([[0.2, 0.9, 0.4999]])
        e = ConceptExplanation(
            ["a", "b", "c"],
            torch.tensor([[0.9, 0.5, 0.1]]),
            torch.rand(1, 3, 3, 3),
            torch.ones(1, 3),
            presence=presence,
        )
        for significant, order, notes in ((None, "bac", 2), (torch.tensor([False, True, True]), "bca", 1)):
            figure = panel(e, torch.rand(1, 3, 16, 16), significant=significant)
            assert [a.get_label() for a in figure.axes if a.images] == ["input", *order]
            found = [line for text in strings_of(figure) for line in text.split("\n")]
            assert found.count("not seen") == notes
        drawn = {a.get_label(): np.asarray(a.images[0].get_array()).mean() for a in figure.axes if a.images}
        assert drawn["c"] > drawn["b"] + 40
        bars = axes_of(figure, "contributions")[0].patches
        assert [bar.get_alpha() for bar in bars] == [None, 0.45, None]
        assert any("probability of presence below 0.5" in text for text in strings_of(figure))

    def test_units_and_tiny_numbers(self):
        e = ConceptExplanation(
            ["a"], torch.tensor([[8.6e-14]]), torch.rand(1, 1, 3, 3), torch.tensor([[0.5]]), score_unit="cosine",
            contribution_unit="logit",
        )  # fmt: skip
        text = " ".join(strings_of(panel(e, torch.rand(1, 3, 16, 16)))).replace("\n", " ")
        assert "score < 0.001 cosine" in text
        assert "logit" in text
        assert "e-14" not in text

    def test_a_red_bar_beside_a_blue_map_is_explained(self):
        e = ConceptExplanation(
            ["a", "b"], torch.tensor([[-1.0, -2.0]]), -torch.rand(1, 2, 3, 3), torch.tensor([[0.5, -0.3]]),
            torch.tensor([1]), class_names=["x", "cat"], score_unit="standard deviations",
        )  # fmt: skip
        lines = [line for text in strings_of(panel(e, torch.rand(1, 3, 16, 16))) for line in text.split("\n")]
        assert "its absence supports cat" in lines
        assert "its absence opposes cat" in lines
        other = dataclasses.replace(e, score_unit="cosine")
        text = " ".join(strings_of(panel(other, torch.rand(1, 3, 16, 16)))).replace("\n", " ")
        assert "absence" not in text
        assert "a map shows where a concept is (blue: its opposite), a bar what it does to the target" in text

    def test_each_image_has_its_own_concepts(self):
        selected = torch.tensor([[True, True, False], [False, False, True]])
        e = ConceptExplanation(["a", "b", "c"], torch.rand(2, 3), torch.rand(2, 3, 3, 3), selected=selected)
        figure = panel(e, torch.rand(2, 3, 16, 16))
        assert [a.get_label() for a in figure.axes if a.images] == ["input", "a", "b", "input", "c"]

    def test_at_most_eight_unless_asked(self):
        e = explanation(1, 12)
        figure = panel(e, torch.rand(1, 3, 16, 16))
        assert sum(bool(a.images) for a in figure.axes) == 1 + 8
        assert any("4 more concepts not shown" in text for text in strings_of(figure))
        assert sum(bool(a.images) for a in panel(e, torch.rand(1, 3, 16, 16), top_k=12).axes) == 1 + 12

    def test_region_and_crop_are_drawn_on_the_photograph(self):
        maps = torch.zeros(1, 1, 2, 2)
        maps[..., 0, 0] = 1
        e = ConceptExplanation(["a"], torch.rand(1, 1), maps)
        image = torch.rand(3, 20, 40)
        figure = panel(e, image, boxes=(12, 2, 20, 8), crop=(10, 0, 30, 20), mode="nearest")
        source, drawn = (a for a in figure.axes if a.images)
        ends = [tuple(map(tuple, line)) for c in source.collections for line in c.get_segments()]
        assert ((12, 2), (20, 2)) in ends
        assert ((10, 0), (10, 20)) in ends
        pixels = np.asarray(drawn.images[0].get_array(), dtype=int)
        height, width, _ = pixels.shape
        part = pixels[: height // 2, width // 4 : width // 2]
        assert np.abs(part - np.array(colormaps[SEQUENTIAL](1.0)[:3]) * 255).mean() < 30
        assert np.ptp(pixels[:, : width // 4 - 8], axis=-1).max() == 0  # outside of the crop: pale gray

    def test_outlines(self):
        mask = torch.zeros(4, 4, dtype=torch.bool)
        mask[1:3, 2:4] = True
        square = {(2, 1, 4, 1), (2, 3, 4, 3), (2, 1, 2, 3), (4, 1, 4, 3)}
        assert set(outlines([(4, 4)], (2, 2), mask=mask)[0]) == square
        assert set(outlines([(4, 4)], (4, 2), boxes=[2, 1, 4, 3])[0]) == square
        assert set(outlines([(8, 4)], (4, 2), points=torch.tensor([3.9, 3.0]))[0]) == {
            (2, 2, 4, 2), (2, 4, 4, 4), (2, 2, 2, 4), (4, 2, 4, 4)
        }  # fmt: skip
        square_of = [
            set(lines) for lines in outlines([(4, 4)] * 2, (4, 2), boxes=torch.tensor([[0, 0, 1, 1], [2, 1, 4, 3]]))
        ]
        assert square_of[1] == square != square_of[0]  # a row per image, as in SALFCBM.explain_region
        assert per_image(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 1, 2, "points") == [[(1, 2), (3, 4)]]
        assert outlines([(4, 4)], (2, 2), mask=mask[None, None]) == outlines([(4, 4)], (2, 2), mask=mask)
        with pytest.raises(InputError, match="for 2 images, but there are 3"):
            per_image(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 3, 2, "points")


class TestSave:
    @pytest.mark.parametrize(("suffix", "head"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
    def test_formats(self, tmp_path: Path, suffix: str, head: bytes):
        path = save_figure(heatmap_figure(torch.rand(3, 16, 16), torch.rand(3, 3)), tmp_path / f"a.{suffix}")
        assert path.read_bytes().startswith(head)
        assert [p.name for p in tmp_path.iterdir()] == [f"a.{suffix}"]

    @pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
    def test_one_figure_gives_one_file(self, tmp_path: Path, suffix: str):
        image, heat = torch.rand(3, 16, 16), torch.rand(3, 3)
        files = [save_figure(heatmap_figure(image, heat), tmp_path / f"{k}.{suffix}").read_bytes() for k in "ab"]
        assert files[0] == files[1]

    def test_size_is_inches_times_dpi(self, tmp_path: Path):
        figure = heatmap_figure(torch.rand(3, 16, 16), torch.rand(3, 3))
        with rc_context({"savefig.bbox": "tight"}):
            path = save_figure(figure, tmp_path / "a.png", 100)
        with Image.open(path) as image:
            assert image.size == pytest.approx(figure.get_size_inches() * 100, abs=1)

    def test_no_figure_is_kept(self, tmp_path: Path):
        figure = panel(explanation(1), torch.rand(1, 3, 16, 16))
        save_figure(figure, tmp_path / "a.png", 50)
        gone = weakref.ref(figure)
        del figure
        gc.collect()
        assert gone() is None

    def test_a_failed_save_leaves_the_old_file_and_no_part(self, tmp_path: Path, monkeypatch):
        figure = heatmap_figure(torch.rand(3, 16, 16), torch.rand(3, 3))
        (tmp_path / "a.png").write_bytes(b"old")

        def fail(partial, **_options):
            partial.write(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(figure, "savefig", fail)
        with pytest.raises(OSError, match="disk full"):
            save_figure(figure, tmp_path / "a.png")
        assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.png", b"old")]

    def test_bad_input(self, tmp_path: Path):
        figure = heatmap_figure(torch.rand(3, 16, 16), torch.rand(3, 3))
        with pytest.raises(InputError, match=r"\.png"):
            save_figure(figure, tmp_path / "a.bmp")
        with pytest.raises(InputError, match="dpi"):
            save_figure(figure, tmp_path / "a.png", 0)
        with pytest.raises(FileNotFoundError, match="no folder"):
            save_figure(figure, tmp_path / "absent" / "a.png")


def test_images_are_read_as_everywhere_else(tmp_path):
    ramp = Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8))
    ramp.save(tmp_path / "xray.png")
    for image in (ramp, tmp_path / "xray.png", str(tmp_path / "xray.png")):
        assert as_image(image).shape == (3, 8, 8)
        assert abs(float(as_image(image).mean()) - 0.5) < 0.01


def test_photographs_keep_as_many_pixels_as_their_bytes_allow():
    noise = torch.rand(3, 400, 300, generator=torch.Generator().manual_seed(0))
    free, bounded = photo(noise, 512, 10**6), photo(noise, 512, 12_000)
    assert (free.width, free.height) == (300, 400)
    assert len(bounded.uri) < 12_000 * 4 / 3 + 100
    larger = photo(noise, bounded.height * 5 // 4 + 1, 10**6)  # a step larger, and as many bytes as the quality takes
    assert len(larger.uri) > len(bounded.uri)
    assert bounded.height > 100


def test_an_image_may_be_a_batch_of_one():
    heat = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    for channels in (1, 3):
        image = torch.rand(channels, 8, 10, generator=torch.Generator().manual_seed(1))
        assert torch.equal(overlay(image[None], heat), overlay(image, heat))
    with pytest.raises(InputError, match="pass one image at a time"):
        overlay(torch.rand(2, 3, 8, 10), heat)
    with pytest.raises(InputError, match="pass one image at a time"):
        overlay(torch.rand(2, 1, 8, 10), heat)


def test_thin_pictures_keep_a_pixel():
    thin = torch.rand(3, 2, 900)
    assert (photo(thin, 100).width, photo(thin, 100).height) == (100, 1)
    turned = photo(thin.transpose(1, 2), 100)
    assert (turned.width, turned.height) == (1, 100)
    for heat in (torch.rand(1, 400), torch.rand(400, 1)):
        made = map_picture(heat, ColorScale.of([heat]), 0.5, "bilinear")
        assert min(made.width, made.height) >= 1
