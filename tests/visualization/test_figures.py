"""Several concepts at once, rules of classes, images that activate a concept, and explanations in a notebook."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.text import Text
from PIL import Image
from test_visualization import check_layout
from torch import nn
from torchvision.utils import save_image

from captum_concepts import ConceptExplanation, FeatureActivationMap
from captum_concepts.errors import InputError
from captum_concepts.images import inputs_for
from captum_concepts.visualization import ReportWriter, explore, legend, most_activating, report, sankey, show
from captum_concepts.visualization.figures import COLORS

POOL = nn.AdaptiveAvgPool2d(1), nn.Flatten()


def corners(**options) -> ConceptExplanation:
    """Two concepts in opposite corners, one nowhere."""
    maps = torch.zeros(1, 3, 4, 4)
    maps[0, 0, 0, 0] = 1
    maps[0, 1, 3, 3] = 5
    return ConceptExplanation(["a", "b", "c"], torch.tensor([[0.9, 0.5, 0.1]]), maps, **options)


def strings_of(figure) -> str:
    return " ".join(t.get_text() for t in figure.findobj(Text)).replace("\n", " ")


def axes_of(figure, label: str):
    return [a for a in figure.axes if a.get_label() == label]


class TestLegend:
    def test_each_pixel_has_the_color_of_its_strongest_concept(self):
        figure = legend(corners(), torch.full((3, 40, 40), 0.5), threshold=0.6)
        pixels = np.asarray(axes_of(figure, "legend")[0].images[0].get_array(), dtype=float) / 255
        height = pixels.shape[0]
        for (y, x), color in (((3, 3), COLORS[0]), ((height - 4, height - 4), COLORS[1])):
            near = np.abs(pixels[y, x] - np.array(to_rgba(color)[:3])).max()
            assert near < 0.3
            assert np.ptp(pixels[y, x]) > 0.2
        assert np.ptp(pixels[height // 2, height // 2]) < 0.01
        text = strings_of(figure)
        assert "no pixels assigned" in text
        assert "score 0.9" in text
        assert [to_rgba(a.get_facecolor())[3] for a in axes_of(figure, "patch")] == [1, 1, 0]

    def test_what_is_not_seen_or_below_average_claims_nothing(self):
        e = corners(presence=torch.tensor([[0.9, 0.1, 0.9]]))
        assert "not seen · no pixels assigned" in strings_of(legend(e, torch.rand(3, 40, 40)))
        e = ConceptExplanation(["a"], torch.tensor([[-0.5]]), torch.rand(1, 1, 3, 3), score_unit="standard deviations")
        assert "no pixels assigned" in strings_of(legend(e, torch.rand(3, 40, 40)))

    def test_layout(self):
        names = ["a concept whose name goes on and on and on, longer than any cell", "b", "c", "d", "e"]
        e = ConceptExplanation(
            names, torch.rand(3, 5), torch.rand(3, 5, 6, 6), target=torch.arange(3), class_names=["x", "y" * 60, "z"],
            score_unit="standard deviations", image_names=["one.jpg", "two.jpg", "n" * 80],
        )  # fmt: skip
        pictures = [torch.rand(3, 30, 60), torch.rand(3, 80, 20), torch.rand(3, 40, 40)]
        check_layout(legend(e, pictures, title="A title that is rather long for a narrow figure " * 2))

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"top_k": 9}, "at most 8"), ({"threshold": 0}, "threshold"), ({"image_names": ["a", "b"]}, "2 image_names")],
    )
    def test_bad_input(self, options, message):
        with pytest.raises(InputError, match=message):
            legend(corners(), torch.rand(3, 8, 8), **options)
        with pytest.raises(InputError, match="comes first: legend"):
            legend(torch.rand(3, 8, 8), corners())


class Rules:
    """A model that goes by rules."""

    class_names = ("cat", "dog", "fish")
    num_classes = 3
    weights = (("fur", 2.0), ("fins", -0.5)), (("fur", 1.0), ("tail", 1.0)), (("fins", 3.0),)

    def decision_rules(self, target, top_k=None):
        return list(self.weights[target][:top_k])


class TestSankey:
    def test_bands_are_as_wide_as_the_weights_and_red_where_they_support(self):
        figure = sankey(Rules())
        axes = axes_of(figure, "bands")[0]
        bands = [p for p in axes.patches if isinstance(p, PathPatch)]
        assert len(bands) == 5
        heights = sorted(abs(b.get_path().vertices[7, 1] - b.get_path().vertices[0, 1]) for b in bands)
        assert [h / heights[0] for h in heights] == pytest.approx([1, 2, 2, 4, 6])
        blue = [b for b in bands if b.get_facecolor()[2] > b.get_facecolor()[0]]
        assert len(blue) == 1
        nodes = [p for p in axes.patches if isinstance(p, Rectangle)]
        assert len(nodes) == 3 + 3
        for name in ("cat", "dog", "fish", "fur", "fins", "tail"):
            assert name in strings_of(figure)
        check_layout(figure)

    def test_chosen_classes(self):
        assert "fish" not in strings_of(sankey(Rules(), ["cat", 1], top_k=1))
        with pytest.raises(InputError, match="'bird' is not among"):
            sankey(Rules(), "bird")
        with pytest.raises(InputError, match="requires a model with decision_rules"):
            sankey(corners())

    @pytest.mark.parametrize("break_", ["\n", "\r\n", "\u2028"])
    def test_names_of_several_lines(self, break_):
        rules, name = Rules(), f"cat{break_}and kittens"
        rules.class_names = (name, "dog", "fish")
        rules.weights = (((f"soft{break_}fur", 2.0),), (("tail", 1.0),), (("fins", 3.0),))
        drawn = strings_of(sankey(rules))
        assert "cat and kittens" in drawn
        assert "soft fur" in drawn
        e = replace(corners(), concepts=[f"soft{break_}fur", *corners().concepts[1:]])
        check_layout(legend(e, torch.rand(len(e.scores), 3, 8, 8)))

    def test_in_the_report(self, tmp_path):
        e = corners(target=torch.tensor([2]), class_names=["cat", "dog", "fish"])
        writer = ReportWriter(tmp_path / "r.html")
        writer.add(e, torch.rand(3, 20, 20))
        writer.add_rules(Rules())
        source = writer.finish().read_text()
        assert "What each class relies on" in source
        assert source.count("data:image/svg+xml") == 1
        assert "<bdi>fins</bdi> +3" in source
        assert "<bdi>tail</bdi>" not in source  # no image of a dog

    def test_a_button_opens_the_explorer(self, tmp_path, visit):
        e = corners()
        path = report(e, torch.rand(3, 20, 20), tmp_path / "r.html", explorer=explore(e, torch.rand(3, 20, 20)))
        seen = visit(path)
        seen.page.get_by_text("Open the explorer").click()
        seen.page.get_by_test_id("concept").first.wait_for()


class Channels:
    """A concept is a channel."""

    concepts = ("red", "green", "blue")

    def scores(self, inputs):
        return inputs.mean((2, 3))

    def concept_maps(self, inputs, concepts=None):
        maps = torch.nn.functional.avg_pool2d(inputs, 4)
        return maps if concepts is None else maps[:, concepts]

    def explain(self, inputs, target=None, *, concepts=None, top_k=5, rank_by="scores", contributions=True):
        return ConceptExplanation(list(self.concepts), self.scores(inputs), self.concept_maps(inputs))


class TestMostActivating:
    def test_the_strongest_images_with_their_regions(self):
        images = torch.zeros(6, 3, 16, 16)
        for i in range(6):
            images[i, 0, :8, :8] = (i + 1) / 10
        figure = most_activating(Channels(), images, ["red"], k=3, batch_size=2)
        shown = axes_of(figure, "red")
        assert len(shown) == 3
        scores = [t.get_text() for t in figure.findobj(Text) if t.get_text().startswith("0.")]
        assert scores == ["0.15", "0.125", "0.1"]
        for axes in shown:
            pixels = np.asarray(axes.images[0].get_array(), dtype=float)
            assert pixels[5, 5, 0] > 0
            assert len(axes.collections) == 2
        check_layout(figure)

    def test_files(self, tmp_path):
        for k, color in enumerate(("red", "green", "blue")):
            Image.new("RGB", (32, 32), color).save(tmp_path / f"{k}.png")
        figure = most_activating(Channels(), inputs_for(Channels(), tmp_path, size=32), k=1)
        for channel, name in enumerate(Channels.concepts):
            pixels = np.asarray(axes_of(figure, name)[0].images[0].get_array())
            assert pixels.mean((0, 1)).argmax() == channel

    def test_bad_input(self):
        with pytest.raises(InputError, match="requires an explainer"):
            most_activating(corners(), torch.rand(1, 3, 8, 8))
        with pytest.raises(InputError, match="'pink' is not among"):
            most_activating(Channels(), torch.rand(1, 3, 8, 8), "pink")
        many = Channels()
        many.concepts = [f"c{k}" for k in range(41)]
        with pytest.raises(InputError, match="41 concepts are too many"):
            most_activating(many, torch.rand(1, 3, 8, 8))


class TestInANotebook:
    def test_images_maps_and_bars(self):
        e = corners(
            contributions=torch.tensor([[0.5, -0.2, 0.0]]), target=torch.tensor([1]), class_names=["x", "<b>cat</b>"],
            target_probability=torch.tensor([0.75]), presence=torch.tensor([[0.9, 0.9, 0.1]]), image_names=["a.jpg"],
        )  # fmt: skip
        html = show(e, torch.rand(3, 30, 40))._repr_html_()
        assert html.count("<img") == 1 + 3
        assert "&lt;b&gt;cat&lt;/b&gt; 0.75" in html
        assert "not seen" in html
        assert "+0.5" in html
        assert "−0.2" in html
        assert "<script" not in html
        assert "<style" not in html
        assert repr(show(e, torch.rand(3, 30, 40))) == repr(e)

    def test_an_image_that_selected_none_of_the_concepts(self):
        selected = torch.tensor([[True, False], [False, True]])
        e = ConceptExplanation(["a", "b"], torch.rand(2, 2), torch.rand(2, 2, 3, 3), selected=selected)
        assert e["a"]._repr_html_().count("Map of") == 1
        assert show(e["a"], torch.rand(2, 3, 8, 8))._repr_html_().count("<img") == 3

    def test_without_images_the_maps_alone(self):
        html = corners()._repr_html_()
        assert html.count("<img") == 3
        assert "Map of b: strongest at the lower right" in html

    def test_large_photographs_become_small_and_smooth(self):
        """Of stripes of one pixel a smaller picture can only show their mean."""
        stripes = (torch.arange(800) % 2).float().expand(3, 600, 800)
        html = show(corners(), stripes)._repr_html_()
        files = [base64.b64decode(uri) for uri in re.findall(r'src="data:image/\w+;base64,([^"]+)"', html)]
        assert len(files) == 1 + 3
        for k, file in enumerate(files):
            picture = Image.open(io.BytesIO(file)).convert("L")
            assert picture.size == ((224, 168) if k else (336, 252))
            assert len(file) <= (9_000 if k else 16_000)
            pixels = np.asarray(picture, dtype=float)
            assert np.abs(np.diff(pixels[:, 4:-4], axis=1)).mean() < 8

    def test_many_images_are_cut_and_said(self):
        e = ConceptExplanation(["a"], torch.rand(12, 1), torch.rand(12, 1, 3, 3))
        assert "4 more images" in e._repr_html_()

    def test_pictures_are_loaded_when_they_are_shown(self):
        code = (
            "import sys, torch\nfrom captum_concepts import ConceptExplanation\n"
            "e = ConceptExplanation(['a'], torch.rand(1, 1), torch.rand(1, 1, 2, 2))\n"
            "assert 'matplotlib' not in sys.modules and '<img' in e._repr_html_()"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    @pytest.mark.filterwarnings("ignore:the preprocessing of .* is unknown:captum_concepts.errors.InputWarning")
    @pytest.mark.parametrize("given", ["tensor", "normalized", "folder"])
    def test_a_method_gives_its_explanation_the_images(self, tmp_path, given):
        """Each image keeps its own, through every way of taking images and concepts."""
        pixels = torch.zeros(3, 3, 32, 32)
        pixels[[0, 1, 2], [0, 1, 2]] = 1.0  # a red, a green and a blue image
        for k, image in enumerate(pixels):
            save_image(image, tmp_path / f"{k}.png")
        images = {"tensor": pixels, "normalized": 5 * pixels - 2, "folder": str(tmp_path)}[given]
        fam = FeatureActivationMap(nn.Sequential(nn.Conv2d(3, 4, 8, 8), *POOL), "0", torch.rand(5, 4))
        e = fam.explain(images, top_k=2)
        for chosen, expected in ((e, [0, 1, 2]), (e[1], [1]), (e[[2, 0]], [2, 0]), (e.top(1)[1:], [1, 2]),
                                 (replace(e.to("cpu")[:, :1], method="mine"), [0, 1, 2])):  # fmt: skip
            strongest = [int(one.float().mean((1, 2)).argmax()) for one in chosen.pictures]
            assert strongest == expected
        assert e[1]._repr_html_().count("<img") == 1 + 2
        assert 'alt="Input' in e[1]._repr_html_()

    def test_what_may_change_when_it_is_read_again_is_not(self):
        class Counted(torch.utils.data.Dataset):
            read = 0

            def __len__(self):
                return 2

            def __getitem__(self, i):
                if i >= 2:
                    raise IndexError(i)
                self.read += 1
                return torch.rand(3, 32, 32)

        data = Counted()
        fam = FeatureActivationMap(nn.Sequential(nn.Conv2d(3, 4, 8, 8), *POOL), "0", torch.rand(5, 4))
        e = fam.explain(data)
        assert data.read == 2
        assert list(e.pictures) == []
