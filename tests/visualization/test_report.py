"""The HTML report: complete, safe with hostile names, bounded in size, whole or not there at all."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from conftest import Watched
from PIL import Image

from captum_concepts import ConceptExplanation
from captum_concepts.errors import InputError, InputWarning
from captum_concepts.visualization import ReportWriter, report

HOSTILE = [
    '<script>alert("1")</script>',
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style><svg onload=alert(1)>",
    "javascript:alert(1) & co",
    "nul\x00 and bell\x07",
    "\u202egnitirw thgir",
    "lone \ud800 surrogate",
    "--></title>{{7*7}}",
    "a" * 300,
]
VOID = {"meta", "img", "input", "br", "link", "hr", "image", "use", "path"}


class Parsed(HTMLParser):
    """Elements with their attributes, the text, and whether each element is closed where it must be."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        if len({key for key, _ in attributes}) < len(attributes):
            self.wrong.append(f"an attribute twice in {tag}")
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            self.wrong.append(f"</{tag}> inside {self.open[-1:]}")
        else:
            self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def explanation(n: int = 2, t: int = 3, size: int = 7, **options) -> ConceptExplanation:
    generator = torch.Generator().manual_seed(n * 100 + t)
    names = options.pop("names", [f"concept {k}" for k in range(t)])
    options.setdefault("contributions", torch.randn(n, t, generator=generator))
    options.setdefault("target", torch.arange(n) % 2)
    scores, maps = torch.rand(n, t, generator=generator), torch.rand(n, t, size, size, generator=generator)
    options.setdefault("layer", "layer4")
    options.setdefault("rank_by", "scores")
    return ConceptExplanation(names, scores, maps, method="CE-FAM", **options)


def overlays(path: Path) -> list[str]:
    """The pictures of the maps."""
    return [a["href"] for a in read(path).all("image") if "-m" in a["id"]]


def images(n: int = 2, height: int = 40, width: int = 60) -> torch.Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1))


def read(path: Path) -> Parsed:
    return Parsed(path.read_text(encoding="utf-8"))


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).convert("RGBA")


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return report(
        explanation(3, 4), images(3), tmp_path_factory.mktemp("structure") / "r.html", title="Three images",
        image_names=["a.jpg", "b", "c"], class_names=["red circle", "blue square"],
        settings={"model": "resnet18", "Fingerprints": {"m": "ab" * 16}},
    )  # fmt: skip


class TestStructure:
    def test_every_element_is_closed_and_every_id_is_unique(self, path):
        page = read(path)
        assert page.wrong == []
        assert page.open == []
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids)) > 15
        wanted = {a[key].lstrip("#") for _, a in page.elements for key in ("href", "aria-labelledby") if key in a}
        assert {one for one in wanted if not one.startswith("data:")} <= set(ids)

    def test_every_image_has_words(self, path):
        drawings = read(path).all("svg")
        assert len(drawings) == 3 * (1 + 4)
        assert all(drawing.get("aria-label") and drawing.get("role") == "img" for drawing in drawings)
        said = [drawing["aria-label"] for drawing in drawings]
        assert "Input: a.jpg" in said
        assert sum("above half of that" in words for words in said) == 12

    def test_every_picture_is_in_the_file_once(self, path):
        source = path.read_text()
        uris = re.findall(r'"(data:image/[^"]*)"', source)
        assert len(uris) == len(set(uris)) == 3 * (1 + 4)

    def test_it_asks_for_nothing_from_outside(self, path):
        source = path.read_text()
        page = Parsed(source)
        assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "embed", "base", "form"}
        for _, attributes in page.elements:
            assert not [key for key in attributes if key.startswith("on")]
            for key in ("src", "href", "srcset", "action", "poster", "data"):
                value = attributes.get(key)
                assert value is None or value.startswith(("data:image/", "#"))
        assert "http:" not in source
        assert "https:" not in source
        assert "@import" not in source
        assert re.findall(r"url\(", source) == []
        policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
        assert "default-src 'none'" in policy
        assert "img-src data:" in policy

    def test_it_says_what_where_how_and_for_which_class(self, path):
        words = read(path).text
        e = explanation(3, 4)
        for part in ("Three images", "a.jpg", "contribution to red circle", "explained class blue square", "layer4",
                     "CE-FAM", "resnet18", "ab" * 16, "7 x 7", "60 x 40"):  # fmt: skip
            assert part in words
        for value in e.scores.flatten().tolist():
            assert f"{value:.3g}" in words
        for value in e.contributions.flatten().tolist():
            assert f"{value:+.3g}".replace("-", "−") in words

    def test_strongest_first_and_bars_to_scale(self, path):
        e = explanation(3, 4)
        names = re.findall(r'<tr class="c\d"><td.*?<bdi>(.*?)</bdi>', path.read_text(), re.DOTALL)
        for i in range(3):
            assert names[4 * i : 4 * i + 4] == e[i].top(4).concepts
        source = path.read_text()
        bars = re.findall(r'<i class="(for|against)" style="left:(.*?)%;width:(.*?)%"', source)
        ends = [float(v) for v in re.findall(r"bars to ±([\d.]+)", source)]
        shown = [(n, i) for i in range(3) for n in e[i].top(4).concepts]
        for (concept, i), (sign, left, width) in zip(shown, bars, strict=True):
            value = float(e[i, concept].contributions)
            assert float(width) == pytest.approx(50 * abs(value) / ends[i], rel=1e-3)
            assert float(left) == pytest.approx(50 if value >= 0 else 50 - float(width), abs=0.02)
            assert sign == ("for" if value >= 0 else "against")
        for i in range(3):  # each image's own end, so that no card has slivers only
            assert float(e[i].contributions.abs().max()) <= ends[i] <= 2 * float(e[i].contributions.abs().max())

    def test_regions_are_chosen_by_radio_buttons_of_one_group_an_image(self, path):
        page = read(path)
        groups = [a["name"] for a in page.all("input")]
        assert [groups.count(f"e{i}") for i in (1, 2, 3)] == [5, 5, 5]
        assert sum("checked" in a for a in page.all("input")) == 4  # the input of each image, and the theme

    def test_the_same_run_gives_the_same_file(self, path, tmp_path):
        again = report(
            explanation(3, 4), images(3), tmp_path / "s.html", title="Three images", image_names=["a.jpg", "b", "c"],
            class_names=["red circle", "blue square"], settings={"model": "resnet18", "Fingerprints": {"m": "ab" * 16}},
        )  # fmt: skip
        assert again.read_bytes() == path.read_bytes()


class TestPictures:
    def test_the_map_is_where_it_should_be(self, tmp_path):
        maps = torch.zeros(1, 1, 4, 4)
        maps[..., 0, 3] = 1
        e = ConceptExplanation(["corner"], torch.ones(1, 1), maps)
        path = report(e, torch.full((3, 50, 100), 0.5), tmp_path / "r.html")
        assert "upper right" in read(path).all("svg")[1]["aria-label"]
        pixels = torch.from_numpy(np.array(decoded(overlays(path)[0]))).float()
        assert pixels[:4, -4:, :3].sum(-1).mean() > pixels[-4:, :4, :3].sum(-1).mean() + 300
        assert pixels[:4, -4:, 3].mean() > 230  # the color of the bar, whatever is below
        assert pixels[-4:, :4, 3].mean() < 5

    def test_unknown_cells_are_transparent_and_warned_about(self, tmp_path):
        maps = 0.5 + torch.rand(1, 2, 4, 4)
        maps[0, 0, :2] = torch.nan
        e = ConceptExplanation(["half", "whole"], torch.tensor([[2.0, 1.0]]), maps)
        with pytest.warns(InputWarning, match="left uncolored"):
            path = report(e, torch.rand(3, 20, 20), tmp_path / "r.html")
        half, whole = (np.array(decoded(uri))[..., 3] for uri in overlays(path))
        assert (half[:15] == 0).all()
        assert half[17:].mean() > 60
        assert whole.mean() > 60

    def test_undefined_numbers_are_called_so(self, tmp_path):
        e = ConceptExplanation(
            ["a", "b"], torch.tensor([[torch.nan, torch.inf]]), torch.zeros(1, 2, 2, 2),
            torch.tensor([[torch.nan, -torch.inf]]),
        )  # fmt: skip
        page = read(report(e, torch.rand(3, 20, 20), tmp_path / "r.html"))
        assert page.text.count("n/a") >= 4
        assert page.wrong == []

    @pytest.mark.parametrize(
        "image",
        [
            torch.rand(1, 30, 30),
            (torch.rand(3, 700, 31) * 255).byte(),
            torch.rand(3, 1, 1),
            torch.rand(3, 2, 900).numpy(),
            Image.new("RGBA", (33, 20), (255, 0, 0, 0)),
        ],
        ids=["grey", "tall", "one pixel", "flat", "transparent PIL"],
    )
    def test_images_of_every_kind(self, image, tmp_path):
        page = read(report(explanation(1, 2), image, tmp_path / "r.html"))
        for picture in page.all("image"):
            decoded(picture["href"]).load()

    def test_not_significant_is_pale_and_without_region(self, tmp_path):
        e = explanation(2, 3)
        page = read(report(e, images(), tmp_path / "r.html", significant=torch.tensor([True, False, True])))
        rows = [a["class"] for a in page.all("tr") if "c" in (a.get("class") or "")]
        assert rows == ["c0", "c1", "c2 pale"] * 2
        assert len(page.all("g")) == 4
        assert page.text.count("not encoded here") == 2
        own = torch.tensor([[True, True, True], [False, True, True]])
        page = read(report(e, images(), tmp_path / "s.html", significant=own))
        assert len(page.all("g")) == 5

    def test_flags_stay_with_their_concepts_where_images_have_other_orders(self, tmp_path):
        scores = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5]])
        e = ConceptExplanation(["a", "b", "c"], scores, torch.rand(2, 3, 4, 4), rank_by="scores")
        some = dataclasses.replace(e, selected=torch.tensor([[True, True, False], [True, True, True]]))
        flags = torch.tensor([True, False, True])
        sources = (e, [e], iter([e[0, :], e[1, :]]), some)
        ways = (flags, flags.tolist(), flags.expand(2, 3), dict(zip("cba", [True, False, True], strict=True)))
        for source, given in [*zip(sources, [flags] * 4, strict=True), *((some, way) for way in ways)]:
            page = read(report(source, images(), tmp_path / "r.html", significant=given))
            said = [d["aria-label"] for d in page.all("svg") if "not encoded here" in d["aria-label"]]
            assert said == ["Map of b: not encoded here"] * 2

    def test_flags_of_an_explainer_go_by_its_own_concepts(self, tmp_path):
        class Explainer:
            concepts = ("a", "b")

            def scores(self, inputs):
                return torch.tensor([[0.1, 0.9]]).expand(len(inputs), -1)

            def concept_maps(self, inputs, concepts=None):
                return torch.ones(len(inputs), 2, 2, 2)

            def explain(self, inputs, target=None, *, concepts=None, top_k=5, rank_by="scores", contributions=True):
                shown = self.scores(inputs).flip(1)
                return ConceptExplanation(["b", "a"], shown, self.concept_maps(inputs), rank_by=rank_by)

        page = read(report(Explainer(), images(), tmp_path / "r.html", significant=torch.tensor([True, False])))
        said = [d["aria-label"] for d in page.all("svg") if "not encoded here" in d["aria-label"]]
        assert said == ["Map of b: not encoded here"] * 2

    def test_an_image_that_selected_none_of_the_concepts_is_shown_and_says_so(self, tmp_path):
        e = explanation(2, 3, selected=torch.tensor([[True, True, False], [False, True, True]]))
        page = read(report(e["concept 0"], images(), tmp_path / "r.html"))
        assert page.wrong == []
        assert page.text.count("none of these concepts is selected") == 2  # in the index, and on the card
        assert [d["aria-label"].split(":")[0] for d in page.all("svg")] == ["Input", "Map of concept 0", "Input"]

    @pytest.mark.parametrize("what", ["noise", "photograph"])
    def test_twenty_images_of_eight_concepts_stay_below_5_MB(self, what, tmp_path, request):
        if what == "noise":  # what compresses worst: the bound holds for everything
            shown = [torch.rand(3, 300, 400) for _ in range(20)]
        else:
            from captum_concepts.images import load_image

            folder = request.getfixturevalue("shared_data") / "images" / "coco" / "images"
            shown = [load_image(path) for path in sorted(folder.iterdir())[:20]]
        path = report(explanation(20, 8, size=64), shown, tmp_path / "r.html")
        assert path.stat().st_size < 5_000_000


class TestHostileNames:
    def test_all_places(self, tmp_path):
        layers = tuple(tuple(HOSTILE[:5]) for _ in range(2))
        e = explanation(2, 5, names=HOSTILE[:5], layer=layers)
        with pytest.warns(InputWarning, match="no output of the model is called"):
            path = report(
                e, images(), tmp_path / "r.html", title=HOSTILE[0], image_names=HOSTILE[5:7], labels=HOSTILE[:2],
                class_names=HOSTILE[7:9],
                settings={HOSTILE[1]: HOSTILE[2], HOSTILE[3]: {HOSTILE[4]: [HOSTILE[9], None, 1.5, True]}},
            )  # fmt: skip
        page = read(path)
        assert page.wrong == []
        assert page.open == []
        assert not {tag for tag, _ in page.elements} & {"script", "img"}
        assert page.source.count("<svg") == len(page.all("svg")) == 2 * (1 + 5)
        for _, attributes in page.elements:
            assert not [key for key in attributes if key.startswith("on")]
        for value in HOSTILE[:5]:
            assert value in page.text
        assert "nul\ufffd and bell\ufffd" in page.text
        assert "lone \ufffd surrogate" in page.text
        assert any(HOSTILE[1] in a["aria-label"] for a in page.all("svg"))

    def test_a_failure_is_named_and_escaped(self, tmp_path):
        writer = ReportWriter(tmp_path / "r.html")
        writer.add_failure(HOSTILE[1], HOSTILE[0])
        page = read(writer.finish())
        assert page.wrong == []
        assert HOSTILE[1] in page.text
        assert "Not explained" in page.text


class TestWriting:
    def test_streams(self, tmp_path):
        """Only one image is asked for at a time."""
        asked: list[int] = []

        def pictures():
            for i in range(5):
                asked.append(i)
                yield torch.rand(3, 24, 24)

        def parts():
            for i in range(5):
                assert len(asked) <= i + 1
                yield explanation(1, 2)

        path = report(parts(), pictures(), tmp_path / "r.html")
        assert len(read(path).all("article")) == 5

    def test_many_images_go_to_several_pages(self, tmp_path):
        """Each page has its own cards; the first one knows all images, and leads to them."""
        path = tmp_path / "my report #1.html"
        theirs = tmp_path / "my report #1.2.html"
        theirs.write_text("not a report")
        e = explanation(5, 2, image_names=[*"abcde"], class_names=["x", "y"])
        found = {}
        for _ in range(2):  # again: our own pages are replaced, what somebody else wrote is not
            report(e, images(5), path, labels=["x"] * 5, images_per_page=2, settings={"model": "resnet18"})
            found = {p.name: read(p) for p in tmp_path.iterdir() if p != theirs}
        assert theirs.read_text() == "not a report"
        second, third = "my report #1.2-2.html", "my report #1.3.html"
        assert set(found) == {path.name, second, third}
        cards = {name: [a["id"] for a in page.all("article")] for name, page in found.items()}
        assert cards == {path.name: ["e1", "e2"], second: ["e3", "e4"], third: ["e5"]}
        for page in found.values():
            assert page.wrong == []
            assert page.open == []
            for link in (a["href"] for a in page.all("a")):
                name, _, anchor = link.partition("#")
                assert not name or unquote(name) in found
                if anchor.startswith("e"):
                    assert anchor in cards[unquote(name) or path.name]
        assert sum(a["href"].endswith("#e5") for a in found[path.name].all("a")) == 2  # index and inputs
        assert "Images 3 to 4 of 5" in found[second].text
        assert ["resnet18" in found[name].text for name in (path.name, second, third)] == [True, False, False]
        assert len(read(report(e, images(5), tmp_path / "one.html", images_per_page=None)).all("article")) == 5

    def test_batches_of_explanations_and_images(self, tmp_path):
        path = report([explanation(2), explanation(3)], [images(4), images(1)[0]], tmp_path / "r.html")
        assert len(read(path).all("article")) == 5

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"images": images(3)}, "more images than explained"),
            ({"images": images(1)}, "fewer images than explained"),
            ({"image_names": ["a"]}, "fewer image_names"),
            ({"image_names": ["a", "b", "c"]}, "more image_names"),
            ({"labels": [1]}, "fewer labels"),
            ({"labels": [1, 1, 1]}, "more labels"),
            ({"class_names": ["a"]}, "no name for target 1"),
            ({"top_k": 0}, "top_k must be"),
            ({"images_per_page": 0}, "images_per_page must be"),
            ({"rank_by": "colour"}, "rank_by must be"),
            ({"alpha": 2}, "alpha must be"),
            ({"scale": "panel"}, "scale must be"),
            ({"settings": ["a"]}, "settings must be"),
            ({"significant": torch.ones(3)}, "must be bool"),
            ({"source": [1]}, "must contain ConceptExplanation"),
            ({"source": 1}, "an iterable of them or an explainer"),
            ({"source": images(), "images": explanation()}, "pass the explanation first"),
            ({"source": []}, "more images"),
            ({"source": [], "images": []}, "nothing to report"),
        ],
    )
    def test_what_does_not_fit_is_said_and_the_old_file_stays(self, given, message, tmp_path):
        path = tmp_path / "r.html"
        path.write_text("old")
        options = {"source": explanation(), "images": images(), **given}
        with pytest.raises(InputError, match=message):
            report(options.pop("source"), options.pop("images"), path, **options)
        assert path.read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["r.html"]

    def test_no_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no folder"):
            report(explanation(), images(), tmp_path / "missing" / "r.html")

    def test_an_interrupt_leaves_the_old_file_or_what_was_done(self, tmp_path):
        path = tmp_path / "r.html"
        path.write_text("old")
        writer = ReportWriter(path)
        writer.add(explanation(1), images(1))
        with pytest.raises(KeyboardInterrupt), writer:
            raise KeyboardInterrupt
        assert path.read_text() == "old"
        writer = ReportWriter(path)
        writer.add(explanation(1), images(1))
        writer.finish()
        assert len(read(path).all("article")) == 1
        with pytest.raises(InputError, match="finished"):
            writer.add(explanation(1), images(1))
        with pytest.raises(InputError, match="finished already"):
            writer.finish()
        assert [p.name for p in tmp_path.iterdir()] == ["r.html"]

    def test_ranked_by_contribution_or_not_at_all(self, tmp_path):
        e = ConceptExplanation(
            ["a", "b"], torch.tensor([[0.9, 0.1]]), torch.rand(1, 2, 3, 3), torch.tensor([[0.1, -0.5]])
        )
        for rank_by, order in (("scores", ["a", "b"]), ("contributions", ["b", "a"]), (None, ["a", "b"])):
            source = report(e, images(1), tmp_path / "r.html", rank_by=rank_by).read_text()
            assert re.findall(r'<th scope="row"><bdi>([ab])</bdi>', source) == order

    def test_the_maps_share_a_scale_or_not(self, tmp_path):
        maps = torch.stack([torch.full((3, 3), 0.1), torch.full((3, 3), 1.0)])[None]
        maps[..., 0, 0] = 0
        e = ConceptExplanation(["weak", "strong"], torch.tensor([[1.0, 0.5]]), maps)
        seen = {}
        for scale in ("row", "map"):
            path = report(e, images(1), tmp_path / "r.html", scale=scale)
            weak, strong = (decoded(uri) for uri in overlays(path))
            seen[scale] = weak.getpixel((30, 30)), strong.getpixel((30, 30))
        assert seen["row"][0] != seen["row"][1]
        assert seen["map"][0] == seen["map"][1] == seen["row"][1]

    def test_without_target_or_contributions(self, tmp_path):
        page = read(report(explanation(2, contributions=None, target=None), images(), tmp_path / "r.html"))
        assert "contribution" not in page.text
        assert "explained class" not in page.text

    def test_probability_true_label_units_and_summary(self, tmp_path):
        e = dataclasses.replace(
            explanation(3, 2), class_names=["cat", "dog"], image_names=["1.jpg", "2.jpg", "3.jpg"],
            target_probability=torch.tensor([0.75, 0.5, 1e-6]), score_unit="cosine", contribution_unit="logit",
        )  # fmt: skip
        page = read(report(e, images(3), tmp_path / "r.html", labels=[0, "cat", 0]))
        for part in ("1.jpg", "explained class cat , probability 0.75", "true label cat", "score, cosine",
                     "contribution to cat , logit", "probability < 0.001"):  # fmt: skip
            assert part in page.text
        assert "1 of 3 explained classes is not the true label" in page.text
        assert [a["class"].split()[1] for a in page.all("article")] == ["right", "wrong", "right"]
        page = read(report(e, images(3), tmp_path / "r.html"))
        assert "true label" not in page.text

    def test_not_seen_is_pale_and_last(self, tmp_path):
        e = dataclasses.replace(explanation(1, 3), presence=torch.tensor([[0.1, 0.9, 0.6]]))
        page = read(report(e, images(1), tmp_path / "r.html"))
        assert [a["class"] for a in page.all("tr") if "c" in (a.get("class") or "")] == ["c0", "c1", "c2 pale"]
        assert page.text.count("not seen") == 1
        e = dataclasses.replace(explanation(2, 2), presence=torch.full((2, 2), 0.2))
        assert "No concept was detected in any of these images" in read(report(e, images(2), tmp_path / "r.html")).text

    def test_region_and_crop(self, tmp_path):
        writer = ReportWriter(tmp_path / "r.html")
        writer.add(explanation(1, 1), images(1), boxes=(2, 3, 10, 20), crop=(10, 0, 50, 40))
        page = read(writer.finish())
        assert next(a["d"] for a in page.all("path") if a["class"] == "mark").startswith("M2 3L10 3")
        over = next(a for a in page.all("image") if a["id"] == "e1-m0")
        assert [float(over[key]) for key in ("x", "y", "width", "height")] == [10, 0, 40, 40]


class Explainer:
    """Counts how many images it is given at a time; a concept is the mean of a channel."""

    concepts = ("red", "green", "blue")

    def __init__(self):
        self.sizes: list[int] = []
        self.ranked: set[str] = set()

    def scores(self, inputs):
        return inputs.mean((2, 3))

    def concept_maps(self, inputs, concepts=None):
        return torch.nn.functional.avg_pool2d(inputs, 4)

    def explain(self, inputs, target=None, *, concepts=None, top_k=5, rank_by="scores", contributions=True):
        self.sizes.append(len(inputs))
        self.ranked.add(rank_by)
        index = torch.zeros(len(inputs), dtype=torch.long) if target is None else torch.as_tensor(target)
        return ConceptExplanation(
            list(self.concepts),
            self.scores(inputs),
            self.concept_maps(inputs),
            self.scores(inputs),
            index,
            rank_by=rank_by,
        ).top(top_k)


class TestFromAnExplainer:
    def test_it_explains_in_batches(self, tmp_path):
        explainer, given = Explainer(), images(5)
        path = report(
            explainer, iter(given), tmp_path / "r.html", batch_size=2, top_k=2, target=[0, 1, 0, 1, 1],
            rank_by="contributions",
            transform=lambda x: 2 * x, class_names=["no", "yes"],
        )  # fmt: skip
        assert explainer.sizes == [2, 2, 1]
        assert explainer.ranked == {"contributions"}
        page = read(path)
        assert len(page.all("article")) == 5
        assert page.text.count("explained class yes") == 3
        source = path.read_text()
        for image in given:
            assert f"{float(2 * image.mean((1, 2)).max()):.3g}" in source

    def test_images_of_other_sizes_begin_a_batch(self, tmp_path):
        explainer = Explainer()
        report(explainer, [*images(3), *images(1, 20, 20)], tmp_path / "r.html", batch_size=8)
        assert explainer.sizes == [3, 1]


def shown(page: Watched, selector: str) -> bool:
    return page.evaluate(f"getComputedStyle(document.querySelector({selector!r})).visibility") == "visible"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "r.html"
    names = [*HOSTILE[:3], "grass", HOSTILE[9]]
    e = dataclasses.replace(explanation(2, 5, names=names), score_unit="probability", contribution_unit="log odds")
    return report(e, images(2, 200, 300), path, class_names=[HOSTILE[0], HOSTILE[9]], labels=[0, 0])


class TestInTheBrowser:
    def test_no_request_no_script_no_complaint(self, visit, hostile):
        seen = visit(hostile)
        assert seen.outside == []
        assert seen.complaints == []
        assert seen.evaluate("document.scripts.length") == 0
        assert seen.evaluate("[...document.querySelectorAll('image')].every(i => i.getBBox().width > 0)")

    @pytest.mark.parametrize("script", [True, False])
    def test_a_map_appears_under_the_pointer_and_stays_after_a_click(self, visit, hostile, script):
        seen = visit(hostile, script=script)
        if not script:  # nothing to ask the page with, but the pixels change
            before = seen.page.locator("#e1 .frame").screenshot()
            seen.page.hover("#e1 .c1 .score", force=True)
            assert seen.page.locator("#e1 .frame").screenshot() != before
            return
        assert not shown(seen, "#e1 .m1")
        seen.page.hover("#e1 .c1 .score", force=True)
        assert shown(seen, "#e1 .m1")
        assert not shown(seen, "#e2 .m1")
        seen.page.click("#e1 .c2 .score", force=True)
        seen.page.hover("h1", force=True)
        assert shown(seen, "#e1 .m2")
        assert not shown(seen, "#e1 .m1")
        # Pointing at another looks at that one, while the chosen stays chosen.
        seen.page.hover("#e1 .c0 .score", force=True)
        assert shown(seen, "#e1 .m0")
        assert not shown(seen, "#e1 .m2")

    def test_by_keyboard(self, visit, hostile):
        seen = visit(hostile)
        seen.page.focus("#e1-input")
        seen.page.keyboard.press("ArrowDown")
        assert seen.evaluate("document.activeElement.id") == "e1-c0"
        assert shown(seen, "#e1 .m0")
        seen.page.keyboard.press("ArrowDown")
        assert shown(seen, "#e1 .m1")
        assert not shown(seen, "#e1 .m0")
        seen.page.keyboard.press("Tab")
        assert seen.evaluate("document.activeElement.id").startswith("e2-")

    @pytest.mark.parametrize("width", [320, 390, 768, 1280])
    def test_nothing_is_wider_than_the_screen_and_nothing_covers_the_rows(self, visit, hostile, width):
        seen = visit(hostile, width, 800)
        assert seen.evaluate("document.documentElement.scrollWidth") <= width
        beyond = "[...document.querySelectorAll('main *:not(.hidden, .hidden *, option)')]" + (
            ".filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 90))"
        )
        assert seen.evaluate(beyond) == []
        row = seen.page.locator("#e1 .c4 .contribution")
        row.scroll_into_view_if_needed()
        box = row.bounding_box()
        top = f"document.elementFromPoint({box['x'] + box['width'] / 2}, {box['y'] + box['height'] / 2})"
        assert seen.evaluate(f"{top}.closest('tr').className").split()[0] == "c4"

    def test_images_are_filtered_by_class_concept_and_agreement(self, visit, tmp_path):
        selected = torch.tensor([[True, False], [True, True], [False, True]])
        e = explanation(3, 2, selected=selected, target=torch.tensor([0, 1, 1]), class_names=["x", "y"])
        seen = visit(report(e, images(3), tmp_path / "r.html", labels=["x", "y", "x"]))

        def left() -> list[str]:
            cards = "[...document.querySelectorAll('article')].filter(e => e.offsetHeight).map(e => e.id)"
            return seen.evaluate(cards)

        assert left() == ["e1", "e2", "e3"]
        for name, label, expected in (
            ("verdict", "explained class is not the true label", ["e3"]),
            ("verdict", "explained class is the true label", ["e1", "e2"]),
            ("class", "y", ["e2", "e3"]),
            ("concept", "concept 0", ["e1", "e2"]),
        ):
            seen.page.select_option(f"#show-{name}", label=label)
            assert left() == expected
            seen.page.select_option(f"#show-{name}", index=0)
        assert "1 of 3 explained classes is not the true label" in seen.page.inner_text("#summary")

    def test_filters_choose_in_the_index_what_is_on_other_pages(self, visit, tmp_path):
        e = explanation(5, 2, target=torch.tensor([0, 1, 0, 1, 0]), class_names=["x", "y"], image_names=[*"abcde"])
        seen = visit(report(e, images(5), tmp_path / "a #b.html", labels=["x", "y", "x", "x", "x"], images_per_page=2))
        seen.page.select_option("#show-verdict", "wrong")
        links = seen.page.locator(".index li:visible")
        assert links.count() == 1
        links.get_by_role("link").click()
        assert seen.page.locator(":target h2").inner_text() == "d"  # waits for the other page, as evaluate does not
        assert seen.page.locator(".pager [aria-current]").first.inner_text() == "3–4"
        seen.page.get_by_role("link", name="The first page").click()
        assert seen.page.locator("article").nth(1).locator("h2").inner_text() == "b"
        assert seen.outside == []

    @pytest.mark.parametrize("dark", [False, True])
    def test_axe_finds_nothing(self, visit, tmp_path, dark):
        e = explanation(5, 3, class_names=["x", "y"], presence=torch.rand(5, 3))
        report(e, images(5), tmp_path / "r.html", labels=["x"] * 5, images_per_page=3)
        seen = visit(tmp_path / ("r.2.html" if dark else "r.html"), dark=dark, bypass_csp=True)
        assert seen.violations() == []

    def test_light_and_dark_by_preference_and_by_choice_with_readable_contrast(self, visit, hostile):
        colors = """(() => { const c = s => getComputedStyle(document.querySelector(s));
            return [c('body').backgroundColor, c('.example').backgroundColor, c('h1').color, c('.soft').color] })()"""
        found = {}
        for dark in (False, True):
            seen = visit(hostile, dark=dark)
            found[dark] = seen.evaluate(colors)
            background, card, ink, soft = (luminance(color) for color in found[dark])
            assert (background < 0.1) == dark
            for behind in (background, card):
                assert contrast(ink, behind) > 12
                assert contrast(soft, behind) > 4.5
        seen.page.click("label:has(#theme-light)")
        assert seen.evaluate(colors) == found[False]
        seen.page.click("label:has(#theme-dark)")
        assert seen.evaluate(colors) == found[True]
        seen.page.emulate_media(media="print")
        assert luminance(seen.evaluate(colors)[1]) > 0.9

    def test_prints_from_the_first_page_on(self, visit, tmp_path):
        """Whatever the number of rows, the first card begins on the first page."""
        for n, t in ((1, 8), (2, 8)):
            path = report(explanation(n, t), images(n, 300, 300), tmp_path / "r.html")
            seen = visit(path)
            assert seen.page.pdf().startswith(b"%PDF")
            seen.page.emulate_media(media="print")
            assert seen.evaluate("getComputedStyle(document.querySelector('.theme')).display") == "none"
            rule = "getComputedStyle(document.querySelector('.example')).breakInside"
            assert seen.evaluate(rule) == "auto"


def luminance(colour: str) -> float:
    """WCAG's relative luminance of ``rgb(r, g, b)``."""
    parts = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: float, b: float) -> float:
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)
