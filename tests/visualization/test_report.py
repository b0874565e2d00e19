"""The HTML report: complete, safe with hostile names, bounded in size, whole or not there at all."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from chromium import Page, chromium, find_chromium
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
VOID = {"meta", "img", "input", "br", "link", "hr"}


class Parsed(HTMLParser):
    """Elements with their attributes, the text, and whether each element is closed where it must be."""

    def __init__(self, source: str) -> None:
        super().__init__()
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
    return ConceptExplanation(names, scores, maps, method="CE-FAM", **options)


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
        image_titles=["a.jpg", "b", "c"], class_names=["red circle", "blue square"],
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
        assert wanted <= set(ids)

    def test_every_image_has_words(self, path):
        pictures = read(path).all("img")
        assert len(pictures) == 3 * (1 + 2 * 4)
        assert all(picture.get("alt") for picture in pictures)
        alts = [picture["alt"] for picture in pictures]
        assert "Input: a.jpg" in alts
        assert all("above half of that" in alt for alt in alts if alt.startswith("Region"))

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
        for part in ("Three images", "a.jpg", "contribution to red circle", "for the class blue square", "layer4",
                     "CE-FAM", "resnet18", "ab" * 16, "7 x 7", "60 x 40"):  # fmt: skip
            assert part in words
        for value in e.scores.flatten().tolist():
            assert f"{value:.3g}" in words
        for value in e.contributions.flatten().tolist():
            assert f"{value:+.3g}".replace("-", "−") in words

    def test_strongest_first_and_bars_to_scale(self, path):
        e = explanation(3, 4)
        names = re.findall(r'<tr class="c\d"><td.*?<bdi>(.*?)</bdi>', path.read_text())
        for i in range(3):
            assert names[4 * i : 4 * i + 4] == e[i].top(4).concepts
        source = path.read_text()
        lengths = [float(v) for v in re.findall(r'<i class="(?:for|against)" style="--v:(.*?)"', source)]
        signs = re.findall(r'<i class="(for|against)"', source)
        shown = [(n, i) for i in range(3) for n in e[i].top(4).concepts]
        for (concept, i), length, sign in zip(shown, lengths, signs, strict=True):
            value = float(e[i, concept].contributions)
            assert length == pytest.approx(abs(value), rel=1e-4)
            assert sign == ("for" if value >= 0 else "against")
        end = float(re.search(r"--how-end:([\d.]+)", source).group(1))
        assert max(lengths) <= end <= 2 * max(lengths)

    def test_regions_are_chosen_by_radio_buttons_of_one_group_an_image(self, path):
        page = read(path)
        groups = [a["name"] for a in page.all("input")]
        assert [groups.count(f"e{i}") for i in (1, 2, 3)] == [5, 5, 5]
        assert sum("checked" in a for a in page.all("input")) == 4  # the input of each image, and the theme

    def test_the_same_run_gives_the_same_file(self, path, tmp_path):
        again = report(
            explanation(3, 4), images(3), tmp_path / "s.html", title="Three images", image_titles=["a.jpg", "b", "c"],
            class_names=["red circle", "blue square"], settings={"model": "resnet18", "Fingerprints": {"m": "ab" * 16}},
        )  # fmt: skip
        assert again.read_bytes() == path.read_bytes()


class TestPictures:
    def test_the_map_is_where_it_should_be(self, tmp_path):
        maps = torch.zeros(1, 1, 4, 4)
        maps[..., 0, 3] = 1
        e = ConceptExplanation(["corner"], torch.ones(1, 1), maps)
        path = report(e, torch.full((3, 50, 100), 0.5), tmp_path / "r.html")
        region = next(a for a in read(path).all("img") if "map" in a.get("class", ""))
        assert "upper right" in region["alt"]
        pixels = torch.from_numpy(np.array(decoded(region["src"])))[..., :3].sum(-1)
        assert pixels[:8, -8:].float().mean() > pixels[-8:, :8].float().mean() + 300
        thumb = next(a for a in read(path).all("img") if "class" not in a)
        shown = decoded(thumb["src"])
        assert shown.size == (152, 76)
        corner, opposite = shown.getpixel((149, 2)), shown.getpixel((2, 73))
        assert corner[0] > opposite[0] + 60

    def test_unknown_cells_are_transparent_and_warned_about(self, tmp_path):
        maps = torch.rand(1, 2, 4, 4)
        maps[0, 0, :2] = torch.nan
        e = ConceptExplanation(["half", "whole"], torch.tensor([[2.0, 1.0]]), maps)
        with pytest.warns(InputWarning, match="left uncoloured"):
            path = report(e, torch.rand(3, 20, 20), tmp_path / "r.html")
        half, whole = (decoded(a["src"]) for a in read(path).all("img") if "map" in a.get("class", ""))
        assert half.getpixel((30, 5))[3] == 0
        assert half.getpixel((30, 60))[3] > 60
        assert np.array(whole)[..., 3].min() > 60

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
        for picture in page.all("img"):
            decoded(picture["src"]).load()

    def test_not_significant_is_pale_and_without_region(self, tmp_path):
        e = explanation(2, 3)
        page = read(report(e, images(), tmp_path / "r.html", significant=torch.tensor([True, False, True])))
        rows = [a["class"] for a in page.all("tr") if "c" in (a.get("class") or "")]
        assert rows == ["c0", "c1", "c2 absent"] * 2
        assert sum("map" in a.get("class", "") for a in page.all("img")) == 4
        assert page.text.count("not encoded here") == 2
        own = torch.tensor([[True, True, True], [False, True, True]])
        page = read(report(e, images(), tmp_path / "s.html", significant=own))
        assert sum("map" in a.get("class", "") for a in page.all("img")) == 5

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
        path = report(
            e, images(), tmp_path / "r.html", title=HOSTILE[0], image_titles=HOSTILE[5:7], class_names=HOSTILE[7:9],
            settings={HOSTILE[1]: HOSTILE[2], HOSTILE[3]: {HOSTILE[4]: [HOSTILE[9], None, 1.5, True]}},
        )  # fmt: skip
        page = read(path)
        assert page.wrong == []
        assert page.open == []
        assert not {tag for tag, _ in page.elements} & {"script", "svg"}
        for _, attributes in page.elements:
            assert not [key for key in attributes if key.startswith("on")]
        for value in HOSTILE[:5]:
            assert value in page.text
        assert "nul\ufffd and bell\ufffd" in page.text
        assert "lone \ufffd surrogate" in page.text
        alts = [a["alt"] for a in page.all("img")]
        assert any(HOSTILE[1] in alt for alt in alts)

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

    def test_batches_of_explanations_and_images(self, tmp_path):
        path = report([explanation(2), explanation(3)], [images(4), images(1)[0]], tmp_path / "r.html")
        assert len(read(path).all("article")) == 5

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"images": images(3)}, "more images than explained"),
            ({"images": images(1)}, "fewer images than explained"),
            ({"image_titles": ["a"]}, "fewer image_titles"),
            ({"image_titles": ["a", "b", "c"]}, "more image_titles"),
            ({"class_names": ["a"]}, "no name for target 1"),
            ({"top_k": 0}, "top_k must be"),
            ({"by": "colour"}, "by must be"),
            ({"alpha": 2}, "alpha must be"),
            ({"scale": "panel"}, "scale must be"),
            ({"settings": ["a"]}, "settings must be"),
            ({"significant": torch.ones(3)}, "must be bool"),
            ({"explanations": [1]}, "must be ConceptExplanation"),
            ({"explanations": []}, "more images"),
            ({"explanations": [], "images": []}, "nothing to report"),
        ],
    )
    def test_what_does_not_fit_is_said_and_the_old_file_stays(self, given, message, tmp_path):
        path = tmp_path / "r.html"
        path.write_text("old")
        options = {"explanations": explanation(), "images": images(), **given}
        with pytest.raises(InputError, match=message):
            report(options.pop("explanations"), options.pop("images"), path, **options)
        assert path.read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["r.html"]

    def test_no_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no folder"):
            report(explanation(), images(), tmp_path / "missing" / "r.html")

    def test_an_interrupt_leaves_the_old_file_or_what_was_done(self, tmp_path):
        path = tmp_path / "r.html"
        path.write_text("old")
        writer = ReportWriter(path)
        writer.add(images(1), explanation(1))
        with pytest.raises(KeyboardInterrupt), writer:
            raise KeyboardInterrupt
        assert path.read_text() == "old"
        writer = ReportWriter(path)
        writer.add(images(1), explanation(1))
        writer.finish()
        assert len(read(path).all("article")) == 1
        with pytest.raises(InputError, match="finished"):
            writer.add(images(1), explanation(1))
        with pytest.raises(InputError, match="finished already"):
            writer.finish()
        assert [p.name for p in tmp_path.iterdir()] == ["r.html"]

    def test_ranked_by_contribution_or_not_at_all(self, tmp_path):
        e = ConceptExplanation(
            ["a", "b"], torch.tensor([[0.9, 0.1]]), torch.rand(1, 2, 3, 3), torch.tensor([[0.1, -0.5]])
        )
        for by, order in (("scores", ["a", "b"]), ("contributions", ["b", "a"]), (None, ["a", "b"])):
            source = report(e, images(1), tmp_path / "r.html", by=by).read_text()
            assert re.findall(r'<th scope="row"><bdi>([ab])</bdi>', source) == order

    def test_the_maps_share_a_scale_or_not(self, tmp_path):
        maps = torch.stack([torch.full((3, 3), 0.1), torch.full((3, 3), 1.0)])[None]
        maps[..., 0, 0] = 0
        e = ConceptExplanation(["weak", "strong"], torch.tensor([[1.0, 0.5]]), maps)
        seen = {}
        for scale in ("row", "map"):
            page = read(report(e, images(1), tmp_path / "r.html", scale=scale))
            weak, strong = (decoded(a["src"]) for a in page.all("img") if "map" in a.get("class", ""))
            seen[scale] = weak.getpixel((60, 60)), strong.getpixel((60, 60))
        assert seen["row"][0] != seen["row"][1]
        assert seen["map"][0] == seen["map"][1] == seen["row"][1]

    def test_without_target_or_contributions(self, tmp_path):
        page = read(report(explanation(2, contributions=None, target=None), images(), tmp_path / "r.html"))
        assert "contribution" not in page.text
        assert "for the class" not in page.text


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    binary = find_chromium()
    if binary is None:
        pytest.skip("no Chromium on the path (Debian: apt-get install chromium)")
    with chromium(binary, tmp_path_factory.mktemp("profile")) as page:
        yield page


def shown(page: Page, selector: str) -> bool:
    return page.evaluate(f"getComputedStyle(document.querySelector({selector!r})).visibility") == "visible"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "r.html"
    names = [*HOSTILE[:3], "grass", HOSTILE[9]]
    return report(explanation(2, 5, names=names), images(2, 200, 300), path, class_names=[HOSTILE[0], HOSTILE[9]])


class TestInTheBrowser:
    def test_no_request_no_script_no_complaint(self, browser, hostile):
        browser.open(hostile)
        assert [url for url in browser.requests if not url.startswith(("file:", "data:", "about:"))] == []
        assert browser.complaints == []
        assert browser.evaluate("document.scripts.length") == 0
        assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")

    @pytest.mark.parametrize("script", [True, False])
    def test_a_region_appears_under_the_pointer_and_stays_after_a_click(self, browser, hostile, script):
        browser.open(hostile, script=script)
        assert not shown(browser, "#e1 .m1")
        browser.point("#e1 .c1 .score")
        assert shown(browser, "#e1 .m1")
        assert not shown(browser, "#e2 .m1")
        browser.point("#e1 .c2 .score", click=True)
        browser.point("h1")
        assert shown(browser, "#e1 .m2")
        assert not shown(browser, "#e1 .m1")
        browser.point("#e1 .c0 .score")  # pointing at another looks at that one, while the chosen stays chosen
        assert shown(browser, "#e1 .m0")
        assert not shown(browser, "#e1 .m2")

    def test_by_keyboard(self, browser, hostile):
        browser.open(hostile)
        browser.evaluate("document.querySelector('#e1-input').focus()")
        browser.press("ArrowDown", 40)
        assert browser.evaluate("document.activeElement.id") == "e1-c0"
        assert shown(browser, "#e1 .m0")
        browser.press("ArrowDown", 40)
        assert shown(browser, "#e1 .m1")
        assert not shown(browser, "#e1 .m0")
        browser.press("Tab", 9)
        assert browser.evaluate("document.activeElement.id").startswith("e2-")

    @pytest.mark.parametrize("width", [320, 390, 768, 1280])
    def test_nothing_is_wider_than_the_screen(self, browser, hostile, width):
        browser.open(hostile, width, 800)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        beyond = "[...document.querySelectorAll('.example *:not(.hidden)')]" + (
            ".filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 90))"
        )
        assert browser.evaluate(beyond) == []

    def test_light_and_dark_by_preference_and_by_choice_with_readable_contrast(self, browser, hostile):
        colours = """(() => { const c = s => getComputedStyle(document.querySelector(s));
            return [c('body').backgroundColor, c('.example').backgroundColor, c('h1').color, c('.soft').color] })()"""
        seen = {}
        for dark in (False, True):
            browser.open(hostile, dark=dark)
            seen[dark] = browser.evaluate(colours)
            ground, card, ink, soft = (luminance(colour) for colour in seen[dark])
            assert (ground < 0.1) == dark
            for behind in (ground, card):
                assert contrast(ink, behind) > 12
                assert contrast(soft, behind) > 4.5
        browser.evaluate("document.querySelector('#theme-light').click()")
        assert browser.evaluate(colours) == seen[False]
        browser.open(hostile, dark=False)
        browser.evaluate("document.querySelector('#theme-dark').click()")
        assert browser.evaluate(colours) == seen[True]
        browser.media("print")
        assert luminance(browser.evaluate(colours)[1]) > 0.9
        browser.media()

    def test_prints(self, browser, hostile, tmp_path):
        browser.open(hostile)
        pdf = browser.pdf(tmp_path / "r.pdf").read_bytes()
        assert pdf.startswith(b"%PDF")
        browser.media("print")
        assert browser.evaluate("getComputedStyle(document.querySelector('.theme')).display") == "none"
        browser.media()


def luminance(colour: str) -> float:
    """WCAG's relative luminance of ``rgb(r, g, b)``."""
    parts = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: float, b: float) -> float:
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)
