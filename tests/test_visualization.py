"""Overlay and panel: what the colours mean, and that nothing overlaps or leaks."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from captum_concepts import ConceptExplanation
from captum_concepts.errors import InputError, InputWarning
from captum_concepts.visualization import heatmap_figure, overlay, panel, save_figure, value_range
from captum_concepts.visualization.overlay import DIVERGING, SEQUENTIAL


def explanation(n: int = 2, t: int = 3, contributions: bool = True) -> ConceptExplanation:
    generator = torch.Generator().manual_seed(0)
    names = ["stripes", "a concept whose name goes on and on", "grass", "sky", "brick wall"][:t]
    maps = torch.rand(n, t, 7, 5, generator=generator)
    maps[:, 1::2] -= 0.5
    how = torch.randn(n, t, generator=generator) if contributions else None
    return ConceptExplanation(
        names, torch.rand(n, t, generator=generator), maps, how, torch.arange(n), "layer4", "test"
    )


def test_import_does_not_load_matplotlib():
    code = "import sys, captum_concepts.visualization; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestOverlay:
    def test_full_alpha_is_the_colour_map(self):
        heat = torch.linspace(0, 2, 12).reshape(3, 4)
        result = overlay(torch.rand(3, 3, 4), heat, alpha=1.0)
        expected = torch.from_numpy(colormaps[SEQUENTIAL]((heat / 2).numpy())[..., :3]).permute(2, 0, 1).float()
        torch.testing.assert_close(result, expected)

    def test_zero_alpha_is_the_grey_image(self):
        image = torch.rand(3, 8, 8)
        torch.testing.assert_close(overlay(image, torch.rand(2, 2), alpha=0.0, saturation=1.0), image)
        grey = overlay(image, torch.rand(2, 2), alpha=0.0, saturation=0.0)
        assert torch.equal(grey[0], grey[1])

    def test_zero_is_neutral_in_a_signed_map(self):
        heat = torch.tensor([[-3.0, 0.0, 1.0]])
        result = overlay(torch.zeros(3, 1, 3), heat, alpha=1.0)
        middle = torch.tensor(colormaps[DIVERGING](0.5)[:3]).float()
        torch.testing.assert_close(result[:, 0, 1], middle, atol=0.01, rtol=0)
        assert result[2, 0, 0] > result[0, 0, 0]  # negative is blue
        assert result[0, 0, 2] > result[2, 0, 2]  # positive is red

    def test_one_value_has_one_colour_whatever_the_rest(self):
        def colour(rest: float) -> torch.Tensor:
            heat = torch.tensor([[0.5, rest]])
            return overlay(torch.zeros(3, 1, 2), heat, alpha=1.0, vmin=0, vmax=1, signed=False)[:, 0, 0]

        assert torch.equal(colour(0.1), colour(0.9))

    @pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
    def test_constant_maps_are_finite_and_uniform(self, value):
        result = overlay(torch.zeros(3, 6, 6), torch.full((3, 3), value), alpha=1.0)
        assert result.isfinite().all()
        assert (result.flatten(1).amax(1) - result.flatten(1).amin(1)).max() < 1e-6

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
            (torch.rand(3, 4, 4), torch.rand(2, 2), {"alpha": 1.5}, "alpha"),
            (torch.rand(3, 4, 4), torch.rand(2, 2), {"saturation": -1}, "saturation"),
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


class TestPanel:
    @pytest.mark.parametrize("n", [1, 3])
    @pytest.mark.parametrize("shape", [(64, 64), (48, 96), (96, 40)])
    @pytest.mark.parametrize("contributions", [True, False])
    def test_no_text_overlaps_and_nothing_is_clipped(self, n, shape, contributions):
        figure = panel(
            torch.rand(n, 3, *shape), explanation(n, 3, contributions), title="What, where and how much, for a test"
        )
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        texts = [
            t for t in figure.findobj(lambda a: hasattr(a, "get_text")) if t.get_text().strip() and t.get_visible()
        ]
        titles = [figure._suptitle, *(axis.title for axis in figure.axes)]
        boxes = [t.get_window_extent(renderer) for t in texts if t in titles]
        assert len(boxes) >= 1 + n * 3
        for a, b in combinations(boxes, 2):
            assert not a.overlaps(b)
        for box in boxes:
            assert box.x0 >= -1
            assert box.y1 <= figure.bbox.height + 1

    def test_each_image_shows_its_own_strongest_concepts(self):
        e = ConceptExplanation(["a", "b"], torch.tensor([[0.9, 0.1], [0.1, 0.9]]), torch.rand(2, 2, 3, 3))
        figure = panel(torch.rand(2, 3, 16, 16), e, top_k=1)
        titles = [axis.get_title() for axis in figure.axes]
        assert "a\nscore 0.9" in titles
        assert "b\nscore 0.9" in titles

    def test_insignificant_concepts_are_grey_and_say_so(self):
        flags = torch.tensor([True, False, True])
        figure = panel(torch.rand(2, 3, 16, 16), explanation(), significant=flags)
        titles = [axis.get_title() for axis in figure.axes]
        assert sum("not encoded here" in t for t in titles) == 2
        for axis in figure.axes:
            if "not encoded here" in axis.get_title():
                pixels = axis.images[0].get_array()
                assert np.ptp(np.asarray(pixels), axis=-1).max() < 1e-6

    def test_bars_show_the_sign(self):
        e = explanation(1)
        figure = panel(torch.rand(1, 3, 16, 16), e)
        bars = figure.axes[4].patches
        top = e.top(3)
        assert [bar.get_width() for bar in bars] == pytest.approx(top.contributions[0].tolist())
        assert len({bar.get_facecolor() for bar in bars}) == len({bool(v >= 0) for v in top.contributions[0]})

    def test_pyplot_state_is_not_touched(self):
        import matplotlib.pyplot as plt

        before = plt.get_fignums()
        panel(torch.rand(2, 3, 16, 16), explanation())
        heatmap_figure(torch.rand(3, 16, 16), torch.rand(3, 3), title="t", label="value")
        assert plt.get_fignums() == before

    def test_bad_input(self):
        with pytest.raises(InputError, match="1 images for an explanation of 2"):
            panel(torch.rand(1, 3, 8, 8), explanation())
        with pytest.raises(InputError, match="significant"):
            panel(torch.rand(2, 3, 8, 8), explanation(), significant=torch.ones(2))
        with pytest.raises(InputError, match="image_titles"):
            panel(torch.rand(2, 3, 8, 8), explanation(), image_titles=["one"])


class TestSave:
    @pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
    def test_formats(self, tmp_path: Path, suffix: str):
        path = save_figure(heatmap_figure(torch.rand(3, 16, 16), torch.rand(3, 3)), tmp_path / f"a.{suffix}")
        assert path.stat().st_size > 1000
        assert [p.name for p in tmp_path.iterdir()] == [f"a.{suffix}"]

    def test_a_failed_save_leaves_the_old_file_and_no_part(self, tmp_path: Path, monkeypatch):
        figure = heatmap_figure(torch.rand(3, 16, 16), torch.rand(3, 3))
        (tmp_path / "a.png").write_bytes(b"old")

        def fail(partial, **_options):
            Path(partial).write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(figure, "savefig", fail)
        with pytest.raises(OSError, match="disk full"):
            save_figure(figure, tmp_path / "a.png")
        assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.png", b"old")]

    def test_other_suffixes_are_refused(self, tmp_path: Path):
        with pytest.raises(InputError, match=r"\.png"):
            save_figure(heatmap_figure(torch.rand(3, 16, 16), torch.rand(3, 3)), tmp_path / "a.bmp")
