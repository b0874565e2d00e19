"""Panels as pixels: the same picture as the figure, without matplotlib's drawing."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from captum_concepts import ConceptExplanation
from captum_concepts.errors import InputError, InputWarning
from captum_concepts.visualization import panel, panel_image, save_figure
from captum_concepts.visualization.canvas import font_of, text_width

NAMES = ["stripes", "a concept with a name that has to be wrapped", "grass"]


def explanation(n: int = 1, *, contributions: bool = True) -> ConceptExplanation:
    generator = torch.Generator().manual_seed(0)
    how = torch.randn(n, 3, generator=generator) if contributions else None
    return ConceptExplanation(
        NAMES, torch.rand(n, 3, generator=generator), torch.randn(n, 3, 5, 5, generator=generator), how,
        None if how is None else torch.zeros(n, dtype=torch.long), method="a method", score_unit="cosine",
        presence=torch.tensor([[0.9, 0.2, 0.8]]).expand(n, -1),
    )  # fmt: skip


def ramp(height: int, width: int) -> torch.Tensor:
    """Colors that change slowly."""
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)[None]
    return torch.stack([x.expand(height, width), y.expand(height, width), (x + y) / 2])


def as_drawn(figure: Figure, dpi: int) -> np.ndarray:
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3]


def blurred(pixels: np.ndarray, side: int = 12) -> np.ndarray:
    """Means of squares: letters that stand half a pixel apart are alike."""
    height, width = (pixels.shape[0] // side * side, pixels.shape[1] // side * side)
    cells = pixels[:height, :width].astype(float).reshape(height // side, side, width // side, side, 3)
    return cells.mean((1, 3))


def test_every_line_of_the_figure_is_a_line_of_the_picture():
    dpi = 600  # a line is four pixels wide, so half of its width is seen
    figure = panel(explanation(), ramp(90, 120), title="lines")
    picture = panel_image(explanation(), ramp(90, 120), title="lines", dpi=dpi)
    pixels = np.asarray(picture.convert("L"), dtype=float)
    lines = [line for line in figure.artists if isinstance(line, Line2D)]
    assert len(lines) > 10
    for line in lines:
        (x0, x1), (y0, y1) = line.get_data()
        for share in (0.3, 0.7):  # not where lines meet
            x = round((x0 + share * (x1 - x0)) * pixels.shape[1])
            y = round((1 - y0 - share * (y1 - y0)) * pixels.shape[0])
            across = pixels[y - 9 : y + 9, x] if y0 == y1 else pixels[y, x - 9 : x + 9]
            gray = 255 * np.dot(to_rgba(line.get_color())[:3], (0.299, 0.587, 0.114))
            alike = np.flatnonzero(np.abs(across - gray) < 40)
            assert abs(alike.mean() - 8.5) <= 1.5, (x, y, across)  # the middle of a line, rounded twice


MASK = torch.zeros(96, 140, dtype=torch.bool)
MASK[20:50, 30:90] = True


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((300, 450), {"title": "a title", "crop": (60, 0, 360, 300)}),
        ((900, 400), {"boxes": (40, 50, 200, 300), "map_label": "relevance"}),
        ((96, 140), {"mask": MASK, "significant": torch.tensor([True, True, False]), "scale": "map"}),
        ((6, 6), {"points": (1, 1), "mode": "nearest", "cell_size": 1.0}),
    ],
)
@pytest.mark.parametrize("contributions", [True, False])
def test_the_image_is_the_figure(size: tuple[int, int], options: dict, contributions: bool):
    e, images = explanation(contributions=contributions), ramp(*size)[None]
    figure = as_drawn(panel(e, images, **options), 200)
    image = np.asarray(panel_image(e, images, **options))
    assert image.shape == figure.shape
    difference = np.abs(blurred(image) - blurred(figure))
    assert difference.mean() < 2.5  # of 255
    assert np.quantile(difference, 0.99) < 35  # letters stand a pixel apart


def test_rows_and_resolution():
    e, images = explanation(2), torch.stack([ramp(64, 64)] * 2)
    small, large = (panel_image(e, images, dpi=dpi) for dpi in (60, 120))
    assert large.size == pytest.approx([2 * side for side in small.size], abs=1)
    for wrong in (0, -1, float("nan")):
        with pytest.raises(InputError, match="dpi"):
            panel_image(e, images, dpi=wrong)
    with pytest.raises(TypeError, match="colour"):
        panel_image(e, images, colour="red")
    with pytest.raises(InputError, match="2 images for an explanation of 1"):
        panel_image(explanation(1), images)


def test_values_that_are_not_finite_are_uncolored_and_said():
    e = explanation()
    e.maps[0, 0, 0, 0] = torch.nan
    with pytest.warns(InputWarning, match="NaN") as caught:
        panel_image(e, ramp(32, 32))
    assert caught[0].filename.endswith("panels.py") or caught[0].filename == __file__


def test_saved_as_png_only_and_always_the_same(tmp_path):
    files = [save_figure(panel_image(explanation(), ramp(50, 70)), tmp_path / f"{k}.png").read_bytes() for k in "ab"]
    assert files[0] == files[1]
    with pytest.raises(InputError, match=r"an image is written as \.png, got 'a\.pdf'"):
        save_figure(panel_image(explanation(), ramp(50, 70)), tmp_path / "a.pdf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_the_font_is_that_of_the_settings_and_has_the_letters():
    assert "DejaVu" in font_of("stripes", 12).path
    with rc_context({"font.family": ["cmr10", "no such font", "DejaVu Sans"]}):
        assert "cmr10" in font_of("stripes", 12).path
        assert "DejaVu" in font_of("полосы", 12).path  # cmr10 has no Cyrillic letters
        assert text_width("stripes", 10) != text_width("stripes", 10, "bold") or "cmr10" in font_of("s", 9, "bold").path
    with rc_context({"font.family": ["no such font"]}):
        assert "DejaVu" in font_of("stripes", 12).path
    assert text_width("stripes", 20) == pytest.approx(2 * text_width("stripes", 10))
    assert text_width("stripes", 10, "bold") > text_width("stripes", 10)


def test_letters_that_no_font_has_are_said():
    e = explanation()
    e = ConceptExplanation(["鳥", *NAMES[1:]], e.scores, e.maps)
    with pytest.warns(InputWarning, match="has '鳥'; drawn as boxes"):
        panel_image(e, ramp(32, 32), dpi=60)


def test_no_figure_is_made_and_nothing_is_kept(monkeypatch):
    e, image = explanation(), ramp(60, 80)

    def refused(*_args, **_options):
        raise AssertionError("a matplotlib figure")

    monkeypatch.setattr(Figure, "__init__", refused)
    counts = []
    for _ in range(4):
        for _ in range(10):
            panel_image(e, image, dpi=40)
        gc.collect()
        counts.append(len(gc.get_objects()))
    assert counts[-1] <= counts[1]
