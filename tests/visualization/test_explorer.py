"""The explorer: what its page says equals what Python says, on every device of input, and nothing leaves it."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from torch import nn

import captum_concepts
from captum_concepts import (
    SALFCBM,
    ConceptExplanation,
    ConceptFusionMap,
    ConceptTranslator,
    FeatureActivationMap,
    SpatialACV,
    demo,
)
from captum_concepts.errors import InputError, InputWarning
from captum_concepts.images import inputs_for
from captum_concepts.visualization import Explorer, explore, report

SIZE, CLASSES = 64, 6
HOSTILE = [
    '<script>alert("1")</script>',
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</script><script>alert(2)</script>",
    "<!--<script>",
    "]]></style><svg onload=alert(1)>",
    "javascript:alert(1) & co \u2028 \u2029",
    "nul\x00 and bell\x07",
    "\u202egnitirw thgir",
    "lone \ud800 surrogate",
    "{{7*7}} ${7*7} `7`",
    "__proto__",
    "a" * 300,
]
#: Hostile names and images in the page: a sample in `make test`, 10,000 in `make fuzz`.
FUZZ = int(os.environ.get("FUZZ", "1000"))


def salf(kind: str = "cnn", concepts: int = 5, **options) -> SALFCBM:
    """A model with random concepts, whose activations are standardized on random images."""
    torch.manual_seed(concepts)
    if kind == "vit":
        backbone, layer = demo.load("vit"), "blocks.2"
    else:
        net = [nn.Conv2d(3, 24, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, CLASSES)]
        backbone, layer = nn.Sequential(*net), "1"
    names = options.pop("names", [f"concept {k}" for k in range(concepts)])
    options.setdefault("class_names", [f"class {k}" for k in range(CLASSES)])
    model = SALFCBM(backbone, layer, names, CLASSES, options.pop("grid", (7, 7)), **options)
    with torch.no_grad():
        pooled = model.concept_maps(images(16, seed=9)).mean((2, 3))
        model.set_standardization(pooled.mean(0), pooled.std(0))
        model.head.weight.copy_(torch.randn(CLASSES, concepts) * (torch.rand(CLASSES, concepts) > 0.5))
    return model.eval().requires_grad_(False)


def images(n: int = 2, height: int = SIZE, width: int = SIZE, seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)


def explanation(n: int = 2, t: int = 3, **options) -> ConceptExplanation:
    generator = torch.Generator().manual_seed(t)
    names = options.pop("names", [f"concept {k}" for k in range(t)])
    options.setdefault("contributions", torch.randn(n, t, generator=generator))
    options.setdefault("target", torch.arange(n) % 2)
    return ConceptExplanation(names, torch.rand(n, t, generator=generator), torch.rand(n, t, 6, 7), **options)


def standardized(model: SALFCBM, image: torch.Tensor) -> torch.Tensor:
    """``(M, H, W)``: the standardized maps at the image's size."""
    with torch.no_grad():
        maps = model.concept_maps(image).double()
    large = F.interpolate(maps, image.shape[-2:], mode="bilinear", align_corners=False)[0]
    return (large - model.concept_mean.double()[:, None, None]) / model.concept_std.double()[:, None, None]


class Page:
    """The page as somebody uses it."""

    def __init__(self, seen) -> None:
        self.seen, self.page = seen, seen.page

    def listed(self, testid: str = "concept") -> dict[str, float]:
        found = self.seen.evaluate(
            f"[...document.querySelectorAll('[data-testid={testid}]')].map(e => [e.dataset.concept, +e.dataset.score])"
        )
        return dict(found)

    def classes(self) -> dict[str, tuple[float, float]]:
        found = self.seen.evaluate(
            "[...document.querySelectorAll('[data-testid=class]')].map(e => "
            "[e.dataset.class, +e.dataset.before, +e.dataset.after])"
        )
        return {name: (before, after) for name, before, after in found}

    def box(self) -> dict[str, float]:
        return self.page.get_by_test_id("stage").bounding_box()

    def at(self, x: float, y: float) -> tuple[float, float]:
        box = self.box()
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    def drag(self, *points: tuple[float, float]) -> None:
        self.page.get_by_test_id("stage").scroll_into_view_if_needed()
        self.page.mouse.move(*self.at(*points[0]))
        self.page.mouse.down()
        for point in points[1:]:
            self.page.mouse.move(*self.at(*point), steps=4)
        self.page.mouse.up()

    def tool(self, name: str) -> None:
        self.page.get_by_test_id(f"tool-{name}").click()

    def choose(self, concept: str) -> None:
        self.page.locator(f"[data-testid=concept][data-concept='{concept}']").click()

    def beta(self, value: float) -> None:
        self.page.get_by_test_id("beta").fill(str(value))

    def opacity(self, *points: tuple[float, float]) -> list[int]:
        """Of the painted map, at points of the image."""
        return self.page.evaluate(
            """points => { const c = document.querySelector('#heat'); const pen = c.getContext('2d');
            return points.map(([x, y]) => pen.getImageData(x * c.width, y * c.height, 1, 1).data[3]) }""",
            points,
        )

    def region_after(self, model: SALFCBM, x: torch.Tensor) -> dict[str, float]:
        """The scores of the edit's region after it, from ``intervene``."""
        edits = self.run(model=model, images=x)["edits"]
        regions = model.intervene(x, edits, units="std", return_regions=True)[2]
        return dict(zip(regions.concepts, regions.scores[0].tolist(), strict=True))

    @property
    def code(self) -> str:
        return self.page.get_by_test_id("python").text_content()

    def run(self, **names) -> dict:
        """The page's Python, executed."""
        exec(self.code, names)
        return names


@pytest.fixture
def opened(visit, tmp_path):
    def of(*arguments, screen: dict | None = None, **options) -> Page:
        return Page(visit(explore(*arguments, **options).save(tmp_path / "e.html"), **(screen or {})))

    return of


def close(found: dict[str, float], expected: dict[str, float]) -> None:
    assert set(found) <= set(expected)
    assert len(found) >= min(len(expected), 5)
    largest = max(abs(v) for v in expected.values())
    for name, value in found.items():
        assert value == pytest.approx(expected[name], rel=1e-3, abs=1e-5 * largest), name
    values = list(found.values())
    assert values == sorted(values, reverse=True)


REGIONS = {
    "box": lambda page: page.drag((0.2, 0.3), (0.61, 0.77)),
    "point": lambda page: page.drag((0.33, 0.8)),
    "brush": lambda page: page.drag((0.2, 0.2), (0.5, 0.7), (0.8, 0.4)),
}


class TestEqualsPython:
    @pytest.mark.parametrize("concepts", [5, 370, 4741])
    @pytest.mark.parametrize("kind", ["cnn", "vit"])
    @pytest.mark.parametrize("tool", REGIONS)
    def test_region_and_edit(self, opened, kind, concepts, tool):
        model, x = salf(kind, concepts), images(3)
        page = opened(model, x)
        page.page.get_by_test_id("image").nth(1).click()
        page.tool(tool)
        REGIONS[tool](page)
        ran = page.run(model=model, images=x)
        assert torch.equal(ran["image"], x[1:2])
        region = re.search(r"\((?:points|boxes|mask)=.*?\)|(points|boxes|mask)=(\(.*?\)|mask)", page.code)
        assert region
        mask = pixel_mask(page.code)
        z = standardized(model, x[1:2])
        slow = (z * mask).sum((1, 2)) / mask.sum()
        close(page.listed(), dict(zip(model.concepts, slow.tolist(), strict=True)))
        seen = ran["seen"]
        close(page.listed(), {**page.listed(), **dict(zip(seen.concepts, seen.scores[0].tolist(), strict=True))})

        concept = list(page.listed())[2]
        page.choose(concept)
        page.beta(7.3)
        ran = page.run(model=model, images=x)
        assert [e["concept"] for e in ran["edits"]] == [concept]
        before = model(x[1:2]).softmax(1)[0]
        activations = z.mean((1, 2)) * 0 + ((model.concept_maps(x[1:2]).double().mean((2, 3))
                      - model.concept_mean) / model.concept_std)[0]  # fmt: skip
        activations[model.concepts.index(concept)] += 7.3 * mask.mean()
        after = model.head(activations.float()).softmax(0)
        for k, (name, (shown_before, shown_after)) in enumerate(sorted(page.classes().items())):
            assert name == model.class_names[k]
            # A millionth: the logits are sums over thousands of concepts, and a tiny probability has their rounding.
            assert shown_before == pytest.approx(float(before[k]), rel=1e-3, abs=1e-6)
            assert shown_after == pytest.approx(float(after[k]), rel=1e-3, abs=1e-6)
            assert shown_after == pytest.approx(float(ran["probabilities"][0, k]), rel=1e-3, abs=1e-6)
        slow[model.concepts.index(concept)] += 7.3 * (mask * mask).sum() / mask.sum()
        close(page.listed("region-concept-after"), dict(zip(model.concepts, slow.tolist(), strict=True)))

    def test_several_edits_in_regions_that_overlap(self, opened):
        model, x = salf("cnn", 5, grid=(5, 9)), images(1, 40, 72)
        page = opened(model, x)
        page.drag((0.1, 0.1), (0.6, 0.6))
        page.choose("concept 3")
        page.beta(20)
        page.tool("brush")
        page.drag((0.4, 0.4), (0.9, 0.9))
        first = pixel_mask(page.code, "boxes", size=(40, 72))
        page.choose("concept 1")
        page.beta(-12.5)
        page.tool("point")
        page.drag((0.5, 0.5))
        ran = page.run(model=model, images=x)
        assert [(e["concept"], e["beta"]) for e in ran["edits"]] == [("concept 3", 20), ("concept 1", -12.5)]
        for k, (_, after) in enumerate(v for _, v in sorted(page.classes().items())):
            assert after == pytest.approx(float(ran["probabilities"][0, k]), rel=1e-3)
        cell = pixel_mask(page.code.split("edits")[0], "points", grid=(5, 9), size=(40, 72))
        slow = (standardized(model, x) * cell).sum((1, 2)) / cell.sum()
        slow[3] += 20 * (first * cell).sum() / cell.sum()
        slow[1] -= 12.5 * (ran["mask"] * cell).sum() / cell.sum()
        close(page.listed("region-concept-after"), dict(zip(model.concepts, slow.tolist(), strict=True)))

    def test_the_region_after_the_edit_is_that_of_intervene(self, opened):
        model, x = salf("vit", 5), images(1)
        page = opened(model, x)
        page.drag((0.2, 0.1), (0.71, 0.64))
        page.choose("concept 4")
        page.beta(11)
        close(page.listed("region-concept-after"), page.region_after(model, x))

    def test_an_edited_concept_is_listed_wherever_it_has_gone(self, opened):
        model, x = salf("cnn", 40), images(1)
        page = opened(model, x)
        page.drag((0.2, 0.1), (0.71, 0.64))
        lowered = next(iter(page.listed()))
        page.choose(lowered)
        page.beta(-20)
        slow, after = page.region_after(model, x), page.listed("region-concept-after")
        close(after, slow)
        assert list(after) == [*sorted(slow, key=slow.__getitem__, reverse=True)[:12], lowered]
        for testid in ("concept", "region-concept-after"):
            shown = page.page.locator(f"[data-testid={testid}] .score").all_inner_texts()
            assert {text[0] for text in shown} <= {"+", "−"}  # the same scale before and after

    def test_independent_classes_and_presence(self, opened):
        model, x = salf("cnn", 5, multi_label=True), images(1)
        model.set_presence(torch.full((5,), 3.0), torch.zeros(5))
        page = opened(model, x)
        page.beta(4)
        after = page.run(model=model, images=x)["probabilities"][0]
        for k, (before, shown) in enumerate(v for _, v in sorted(page.classes().items())):
            assert before == pytest.approx(float(model(x).sigmoid()[0, k]), rel=1e-3)
            assert shown == pytest.approx(float(after[k]), rel=1e-3)
        absent = [name for name, p in zip(model.concepts, model.presence(x)[0], strict=True) if p < 0.5]
        pale = page.page.locator("#concepts .pale [data-testid=concept]").all()
        assert sorted(one.get_attribute("data-concept") for one in pale) == sorted(absent)

    def test_a_dense_and_a_sparse_head_say_the_same(self, opened):
        model, x = salf("cnn", 12), images(1)
        for sparse in (False, True):
            with torch.no_grad():
                model.head.weight[:, 2:] *= 0 if sparse else 1
            page = opened(model, x)
            page.beta(3)
            for k, (_, after) in enumerate(v for _, v in sorted(page.classes().items())):
                assert after == pytest.approx(float(page.run(model=model, images=x)["probabilities"][0, k]), rel=1e-3)

    def test_contributions_of_a_region_are_those_of_explain_region(self, opened):
        model, x = salf("cnn", 5), images(1)
        page = opened(model, x, target="class 2")
        page.drag((0.15, 0.2), (0.7, 0.93))
        shown = page.page.locator("[data-testid=concept] .how").all_inner_texts()
        code = page.code.replace('units="std")', 'units="std", target=2, top_k=None)')
        names = {"model": model, "images": x}
        exec(code, names)
        expected = dict(zip(names["seen"].concepts, names["seen"].contributions[0].tolist(), strict=True))
        for name, text in zip(page.listed(), shown, strict=True):
            assert float(text.replace("−", "-")) == pytest.approx(
                expected[name], abs=6e-3 * max(1, abs(expected[name]))
            )

    def test_a_selection_of_concepts_leaves_the_decision_as_it_is(self, opened):
        model, x = salf("cnn", 12), images(1)
        page = opened(model, x, concepts=["concept 7", 3])
        assert set(page.listed()) == {"concept 7", "concept 3"}
        page.choose("concept 7")
        page.beta(4)
        probabilities = page.run(model=model, images=x)["probabilities"][0]
        for k, (before, after) in enumerate(v for _, v in sorted(page.classes().items())):
            assert before == pytest.approx(float(model(x).softmax(1)[0, k]), rel=1e-3)
            assert after == pytest.approx(float(probabilities[k]), rel=1e-3)

    def test_the_mode_of_the_model_is_left_as_it_was(self):
        model = salf("cnn", 3)
        model.train()
        modes = [m.training for m in model.modules()]
        explore(model, images(1))
        assert [m.training for m in model.modules()] == modes

    def test_the_maps_of_an_explanation(self, opened):
        e, x = explanation(2, 4, image_names=["a.jpg", "b.jpg"]), images(2)
        page = opened(e, x)
        page.drag((0.25, 0.25), (0.75, 0.5))
        scores = page.run(explanation=e, images=x)["scores"]
        close(page.listed(), dict(zip(e.concepts, scores.tolist(), strict=True)))
        assert page.page.get_by_test_id("beta").is_hidden()
        assert "without the model" in page.page.inner_text("#why")

    def test_unknown_cells(self, opened):
        e = explanation(1, 2)
        e.maps[:] = 0.5
        e.maps[0, 0, :, :3] = torch.nan
        page = opened(e, images(1))
        page.drag((0.8, 0.2), (0.95, 0.6))
        assert all(value == value for value in page.listed().values())
        page.drag((0.05, 0.2), (0.2, 0.6))
        assert page.listed()["concept 0"] != page.listed()["concept 0"]
        assert "n/a" in page.page.locator("[data-concept='concept 0']").first.inner_text()
        page.choose("concept 1")
        assert 0 not in page.opacity((0.1, 0.5), (0.95, 0.5))
        page.choose("concept 0")
        unknown, known = page.opacity((0.1, 0.5), (0.95, 0.5))
        assert unknown == 0 < known


def pixel_mask(code: str, kind: str | None = None, grid=(7, 7), size=(SIZE, SIZE)) -> torch.Tensor:
    """The region that the page's code names, pixel by pixel, computed without the package."""
    height, width = size
    if (kind is None and "mask" in code) or kind == "mask":
        names: dict = {}
        exec(code.split("seen =")[0].split("]:")[0].split("image =")[0] + "\n", names)
        block = re.search(r"mask = .*?(?=\nseen|\nedits)", code, re.DOTALL).group(0)
        exec(block, names)
        return names["mask"]
    found = re.search(rf"({kind or 'points|boxes'})(?:=|\": )\((.*?)\)", code)
    numbers = [float(v) for v in found.group(2).split(",")]
    if found.group(1) == "points":
        dx, dy = width / grid[1], height / grid[0]
        x, y = numbers[0] // dx * dx, numbers[1] // dy * dy
        numbers = [x, y, x + dx, y + dy]
    x0, y0, x1, y1 = numbers
    columns = (torch.arange(width) + 1.0).clamp(max=x1) - torch.arange(width).clamp(min=x0)
    rows = (torch.arange(height) + 1.0).clamp(max=y1) - torch.arange(height).clamp(min=y0)
    return torch.outer(rows.clamp(0, 1), columns.clamp(0, 1)).double()


class TestWithHands:
    def test_undo_reset_and_removal(self, opened):
        page = opened(salf(), images(2))
        untouched = page.classes()
        page.choose("concept 2")
        page.beta(3)
        once = page.classes()
        assert once != untouched
        page.beta(-2)
        page.choose("concept 0")
        page.beta(1)
        assert page.page.locator("#edits li").count() == 2
        undo = page.page.get_by_test_id("undo")
        undo.click()
        undo.click()
        assert page.classes() == once
        undo.click()
        assert page.classes() == untouched
        assert undo.is_disabled()
        page.beta(2)
        page.page.get_by_test_id("reset").click()
        assert page.classes() == untouched
        undo.click()
        assert page.classes() != untouched
        page.page.get_by_role("button", name="Remove the edit of concept 0").click()
        assert page.classes() == untouched
        assert "intervene" not in page.code

    def test_each_image_keeps_its_own_edits_and_region(self, opened):
        page = opened(salf(), images(2))
        page.drag((0.1, 0.1), (0.4, 0.4))
        page.beta(5)
        first = page.code
        page.page.get_by_test_id("image").nth(1).click()
        assert "edits" not in page.code
        page.page.get_by_test_id("image").nth(0).click()
        assert page.code == first

    def test_by_keyboard_alone(self, opened):
        model, x = salf(), images(2)
        page = opened(model, x)
        keys = page.page.keyboard
        page.page.get_by_test_id("image").first.focus()
        keys.press("ArrowRight")
        keys.press("Enter")
        assert "images[[1]]" in page.code
        page.page.get_by_test_id("stage").focus()
        keys.press("ArrowRight")  # the cursor appears in the middle
        keys.press("ArrowRight")
        keys.press("ArrowUp")
        keys.press("Enter")
        side = SIZE / 7
        x0, y0 = (float(v) for v in re.search(r"points=\((.*?), (.*?)\)", page.code).groups())
        assert (x0 // side, y0 // side) == (4, 2)
        for _ in range(2):
            keys.press("Shift+ArrowDown")
        box = [float(v) for v in re.search(r"boxes=\((.*?)\)", page.code).group(1).split(",")]
        assert box == pytest.approx([4 * side, 2 * side, 5 * side, 5 * side], abs=0.01)
        page.page.get_by_test_id("beta").focus()
        for _ in range(5):
            keys.press("ArrowRight")
        assert page.run(model=model, images=x)["edits"][0]["beta"] == pytest.approx(0.5)
        keys.press("u")  # presses in a row are one step
        assert "edits" not in page.code
        page.page.get_by_test_id("stage").focus()
        keys.press("Escape")
        assert "explain_region" not in page.code
        keys.press("[")
        assert "images[[0]]" in page.code
        keys.press("3")
        assert page.page.get_by_test_id("tool-brush").get_attribute("aria-pressed") == "true"
        keys.press("Enter")
        assert "mask" in page.code
        assert page.seen.complaints == []

    def test_by_touch_on_a_phone(self, opened):
        model, x = salf(), images(2)
        page = opened(model, x, screen={"width": 390, "height": 844, "touch": True})
        assert page.seen.evaluate("document.documentElement.scrollWidth") <= 390
        stage = page.page.get_by_test_id("stage")
        stage.scroll_into_view_if_needed()
        page.page.touchscreen.tap(*page.at(0.7, 0.2))  # a tap with the box tool marks the cell
        assert "points=" in page.code
        session = page.page.context.new_cdp_session(page.page)
        for kind, at in (
            ("touchStart", (0.2, 0.2)),
            ("touchMove", (0.4, 0.5)),
            ("touchMove", (0.7, 0.8)),
            ("touchEnd", None),
        ):
            points = [] if at is None else [dict(zip("xy", page.at(*at), strict=True))]
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        page.page.get_by_test_id("python").filter(has_text="boxes=").wait_for()
        box = [float(v) for v in re.search(r"boxes=\((.*?)\)", page.code).group(1).split(",")]
        assert box == pytest.approx([0.2 * SIZE, 0.2 * SIZE, 0.7 * SIZE, 0.8 * SIZE], abs=0.5)
        mask = pixel_mask(page.code)
        slow = (standardized(model, x[:1]) * mask).sum((1, 2)) / mask.sum()
        close(page.listed(), dict(zip(model.concepts, slow.tolist(), strict=True)))

    def test_the_stage_is_where_the_image_is(self, opened):
        page = opened(salf(), images(1, 40, 90), screen={"width": 1000})
        assert page.box() == page.page.locator("#base").bounding_box()
        assert page.box()["width"] / page.box()["height"] == pytest.approx(90 / 40, rel=0.01)

    def test_the_map_is_painted_where_the_concept_is(self, opened):
        maps = torch.zeros(1, 1, 4, 4)
        maps[..., 0, 3] = 1
        e = ConceptExplanation(["corner"], torch.ones(1, 1), maps)
        page = opened(e, torch.full((1, 3, 32, 64), 0.5))
        assert page.opacity((0.95, 0.05), (0.05, 0.95)) == [255, 0]

    def test_wrong_predictions_first_and_filters(self, opened):
        model, x = salf(), images(5)
        predicted = model(x).argmax(1).tolist()
        labels = [f"class {p}" for p in predicted]
        labels[3] = f"class {(predicted[3] + 1) % CLASSES}"
        page = opened(model, x, labels=labels, image_names=[f"{c}.jpg" for c in "abcde"])
        shown = page.page.get_by_test_id("image")
        assert shown.first.get_attribute("data-index") == "3"
        assert page.page.inner_text("#name") == "d.jpg"
        assert "wrong prediction" in shown.first.text_content()
        page.page.select_option("#verdict", "right")
        assert shown.count() == 4
        page.page.fill("#find", "b.jp")
        assert [one.get_attribute("data-index") for one in shown.all()] == ["1"]
        page.page.fill("#find", "no such thing")
        assert shown.count() == 0
        page.page.fill("#find-concept", "concept 4")
        assert list(page.listed()) == ["concept 4"]
        page.choose("concept 4")
        assert "Add to concept 4 in" in page.page.inner_text("#edit-line")

    def test_images_are_filtered_by_class_and_concept(self, opened):
        e = explanation(4, 8, class_names=["x", "y"])
        page = opened(e, images(4))

        def kept(select: str, value: int) -> list[int]:
            page.page.select_option(select, str(value))
            found = [int(one.get_attribute("data-index")) for one in page.page.get_by_test_id("image").all()]
            page.page.select_option(select, "")
            return found

        assert kept("#of-class", 1) == [1, 3]
        strongest = e.scores.topk(5).indices
        for concept in strongest.unique().tolist():
            assert kept("#of-concept", concept) == [k for k in range(4) if concept in strongest[k]]

    def test_the_focus_stays_in_the_list(self, opened):
        page = opened(salf(), images(2))
        third = page.page.get_by_test_id("concept").nth(2)
        third.focus()
        page.page.keyboard.press("Enter")
        assert third.get_attribute("aria-pressed") == "true"
        page.page.keyboard.press("]")  # the next image has other concepts there
        page.page.keyboard.press("Enter")
        chosen = third.get_attribute("data-concept")
        assert page.page.locator("[data-testid=concept][aria-pressed=true]").get_attribute("data-concept") == chosen

    def test_thumbnails_of_many_images_come_into_view(self, opened):
        page = opened(explanation(60, 2), images(60, 24, 24))
        assert page.page.get_by_test_id("image").count() == 60
        sources = "[...document.querySelectorAll('[data-testid=image] img')].filter(i => i.src).length"
        assert 0 < page.seen.evaluate(sources) < 60
        page.page.get_by_test_id("image").last.scroll_into_view_if_needed()
        page.page.locator("#strip button:last-child img[src]").wait_for()

    @pytest.mark.parametrize("width", [320, 390, 768, 1280, 3840])
    def test_nothing_is_wider_than_the_screen(self, opened, width):
        page = opened(salf(names=[*HOSTILE[:4], "a" * 200], concepts=5), images(3), image_names=["x" * 90, "y", "z"],
                      screen={"width": width, "height": 900})  # fmt: skip
        page.beta(3)
        assert page.seen.evaluate("document.documentElement.scrollWidth") <= width
        assert page.box()["width"] > 200

    def test_dark_print_and_reduced_motion(self, opened):
        page = opened(salf(), images(1), screen={"dark": True, "reduced_motion": "reduce"})
        background = "getComputedStyle(document.body).backgroundColor"
        assert sum(map(int, re.findall(r"\d+", page.seen.evaluate(background))[:3])) < 120
        assert page.seen.evaluate("getComputedStyle(document.querySelector('.bar i')).transitionDuration") == "0s"
        page.page.emulate_media(media="print")
        assert sum(map(int, re.findall(r"\d+", page.seen.evaluate(background))[:3])) > 700
        assert page.page.get_by_test_id("tool-box").is_hidden()
        assert page.page.get_by_test_id("stage").is_visible()

    @pytest.mark.parametrize("width", [320, 1280])
    @pytest.mark.parametrize("dark", [False, True])
    def test_axe_finds_nothing(self, opened, dark, width):
        page = opened(salf(), images(3), labels=[0, 1, 2], screen={"dark": dark, "width": width})
        page.drag((0.2, 0.2), (0.6, 0.6))
        page.beta(4)
        assert page.seen.violations() == []
        page = opened(explanation(3, presence=torch.rand(3, 3)), images(3), screen={"dark": dark, "width": width})
        page.drag((0.2, 0.2), (0.6, 0.6))
        assert page.seen.violations() == []


class TestFromOutside:
    def test_nothing_is_requested_and_nothing_complains(self, opened):
        page = opened(salf(), images(2))
        page.drag((0.2, 0.2), (0.6, 0.6))
        page.beta(4)
        assert page.seen.outside == []
        assert page.seen.complaints == []

    def test_the_policy_allows_this_script_and_this_style_only(self, visit, tmp_path):
        path = explore(salf(), images(1)).save(tmp_path / "e.html")
        source = path.read_text()
        policy = re.search(r'Content-Security-Policy" content="(.*?)"', source).group(1)
        assert "unsafe" not in policy
        assert "default-src 'none'" in policy
        assert "innerHTML" not in source
        assert " style=" not in source
        injected = source.replace("</main>", "<script>document.title = 'injected'</script></main>")
        path.write_text(injected)
        seen = visit(path)
        assert seen.evaluate("document.title") == "Concept explorer"
        assert any("Content Security Policy" in text for text in seen.complaints)

    def test_hostile_names(self, opened):
        model = salf(names=HOSTILE, concepts=len(HOSTILE), class_names=HOSTILE[:CLASSES])
        page = opened(model, images(3), image_names=HOSTILE[:3], labels=HOSTILE[3:6], title=HOSTILE[0])
        page.drag((0.2, 0.2), (0.6, 0.6))
        page.beta(4)
        assert page.seen.evaluate("document.scripts.length") == 2 + 3
        assert page.seen.evaluate("document.querySelectorAll('svg, [onerror], [onload], [onmouseover]').length") == 0
        assert page.seen.complaints == []
        assert page.seen.outside == []
        found = page.page.locator("[data-testid=concept] bdi").all_text_contents()
        for name in HOSTILE[:7]:
            assert name.strip() in found
        assert "nul\ufffd and bell\ufffd" in found
        assert page.seen.evaluate("document.title") == HOSTILE[0]

    def test_thousands_of_hostile_names(self, opened):
        """Every one is shown as it is: none becomes an element, a request, or a complaint. FUZZ=10000 tries as many."""
        pieces = ["<", ">", '"', "'", "&", "</script", "<img src=//x>", "onerror=", "javascript:", "\\", "`", "${",
                  "-->", "<!--", "]]>", "\u202e", "\u2028", "\x00", "\ud800", "%3C", "&lt;", "\n", " "]  # fmt: skip
        draw = random.Random(0)
        names = sorted({"".join(draw.choices(pieces, k=draw.randint(1, 6))) + str(k) for k in range(FUZZ)})
        e = ConceptExplanation(names, torch.rand(1, len(names)), torch.rand(1, len(names), 2, 2))
        page = opened(e, images(1), image_names=names[:1])
        more = page.page.locator("#more-concepts")
        while more.is_visible():
            more.click()
        found = page.page.locator("[data-testid=concept] bdi").all_text_contents()
        expected = [re.sub("[\x00\ud800]", "\ufffd", name.strip()) for name in names]
        assert sorted(found) == sorted(expected)
        assert page.seen.evaluate("document.querySelectorAll('img').length") == 3
        assert page.seen.evaluate("document.scripts.length") == 2 + 1
        assert page.seen.complaints == []
        assert page.seen.outside == []

    def test_hostile_images(self, visit, tmp_path):
        """Names, metadata and trailing bytes of files stay behind: a page contains pixels that were drawn anew."""
        draw, names = random.Random(1), [name for name in HOSTILE if not set("/\x00\ud800") & set(name)][:6]
        attack = b"<script>document.title='attacked'</script><img src=//x onerror=alert(1)>"
        folder = tmp_path / "images"
        folder.mkdir()
        for k in range(FUZZ // 10):
            image = Image.new("RGB", (draw.randint(1, 40), draw.randint(1, 40)), tuple(draw.choices(range(256), k=3)))
            text, exif = PngImagePlugin.PngInfo(), Image.Exif()
            text.add_itxt("</script>", attack.decode())
            exif[0x010E] = attack.decode()
            name = f"{k} {draw.choice(names)[:40]}".encode("utf-8", "replace").decode()
            path, kind = folder / name, k % 3
            options = [{"pnginfo": text}, {"comment": attack, "exif": exif}, {"comment": attack}][kind]
            image.save(path.with_name(f"{name}.{('png', 'jpg', 'gif')[kind]}"), **options)
        for file in folder.iterdir():
            file.write_bytes(file.read_bytes() + attack)
        n = len(list(folder.iterdir()))
        model = salf()
        seen = visit(explore(model, inputs_for(model, folder, size=64)).save(tmp_path / "e.html"))
        assert seen.page.get_by_test_id("image").count() == n == FUZZ // 10
        stored = re.findall(r"base64,([^\"]*)", (tmp_path / "e.html").read_text())
        assert len(stored) == 2 * n
        assert not any(b"attacked" in base64.b64decode(one) for one in stored)
        for k in range(0, n, max(n // 20, 1)):
            seen.page.locator(f"[data-testid=image][data-index='{k}']").click()
            assert seen.evaluate("document.querySelector('#base').complete")
        assert seen.evaluate("document.title") == "Concept explorer"
        assert seen.evaluate("document.scripts.length") == 2 + n
        assert seen.complaints == []
        assert seen.outside == []

    def test_the_code_survives_hostile_names(self, opened):
        model, x = salf(names=HOSTILE[:7] + ['quote " \\ back'], concepts=8), images(1)
        page = opened(model, x)
        for name in list(page.listed()):
            page.page.locator("[data-testid=concept]").filter(has=page.page.get_by_text(name, exact=True)).click()
            page.beta(2)
        assert {edit["concept"] for edit in page.run(model=model, images=x)["edits"]} == set(model.concepts)


class TestWhatIsGiven:
    def test_it_is_exported_and_says_what_it_is(self):
        found = captum_concepts.explore(salf(), images(2))
        assert isinstance(found, Explorer)
        assert repr(found) == "Explorer(2 images, 5 concepts, edits of concepts)"
        assert repr(explore(explanation(1), images(1))) == "Explorer(1 image, 3 concepts, without edits)"

    def test_a_method_without_edits_says_why(self, opened):
        class Method:
            concepts = ("red", "green", "blue")

            def scores(self, inputs):
                return inputs.mean((2, 3))

            def concept_maps(self, inputs, concepts=None):
                return F.avg_pool2d(inputs, 8)

            def explain(self, inputs, target=None, *, concepts=None, top_k=5, rank_by="scores", contributions=True):
                index = torch.zeros(len(inputs), dtype=torch.long) if target is None else torch.as_tensor(target)
                e = ConceptExplanation(
                    list(self.concepts), self.scores(inputs), self.concept_maps(inputs), target=index,
                    class_names=["a", "b"], target_probability=torch.full((len(inputs),), 0.25), method="FAM",
                )  # fmt: skip
                return e.top(3 if top_k is None else top_k) if concepts is None else e[list(concepts)]

        method, x = Method(), images(3)
        page = opened(method, x, batch_size=2, target=[1, 0, 1])
        page.drag((0.25, 0.25), (0.75, 0.5))
        scores = page.run(explainer=method, images=x)["scores"]
        close(page.listed(), dict(zip(method.concepts, scores.tolist(), strict=True)))
        assert "fit_salf_cbm" in page.page.inner_text("#why")
        assert page.classes() == {"b": (0.25, 0.25)}
        page = opened(method, x, concepts=["blue", "red"])
        assert set(page.listed()) == {"blue", "red"}

    def test_files_are_read_as_the_model_wants_them(self, opened, tmp_path):
        for k in range(2):
            Image.new("RGB", (80, 60), (120 * k, 60, 30)).save(tmp_path / f"{k}.png")
        with pytest.warns(InputWarning, match="the preprocessing of .* is unknown"):
            page = opened(salf(), tmp_path)
        assert page.page.get_by_test_id("image").count() == 2
        assert "inputs_for(model.backbone, images)[0][None]" in page.code
        assert page.page.inner_text("#name") == "0.png"

    def test_normalized_inputs_are_shown_as_images(self, tmp_path):
        """The model gets what is given, people see an image, and nobody is warned."""
        x = images(2)
        path = explore(salf(), 4 * x - 2).save(tmp_path / "e.html")
        data = json.loads(re.search(r'id="image-0">(.*?)</script>', path.read_text()).group(1))
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["picture"].split(",")[1]))))
        expected = (x[0] - x[0].min()) / (x[0].max() - x[0].min())
        assert np.abs(shown / 255 - expected.permute(1, 2, 0).numpy()).max() < 0.01

    @pytest.mark.parametrize("method", ["FAM", "CE-FAM", "SACV"])
    def test_the_methods(self, opened, method, tmp_path):
        model, x = demo.load("classifier"), images(3)
        if method == "FAM":
            model.fc = nn.Identity()
            explainer = FeatureActivationMap(model, "layer4", torch.rand(4, model(x[:1]).shape[1]))
        elif method == "CE-FAM":
            translator = ConceptTranslator([model.num_features], 16, hidden=(8, 8)).eval()
            explainer = ConceptFusionMap(model, ["layer4"], translator, ["a", "b", "c"], torch.randn(3, 16))
        else:
            explainer = SpatialACV(model, "layer3").fit({"a": images(6, seed=3), "b": images(6, seed=4).flip(2)})
        page = opened(explainer, x)
        assert page.page.get_by_test_id("image").count() == 3
        page.drag((0.25, 0.25), (0.75, 0.5))
        close(
            page.listed(),
            dict(zip(explainer.concepts, page.run(explainer=explainer, images=x)["scores"].tolist(), strict=True)),
        )
        assert "fit_salf_cbm" in page.page.inner_text("#why")
        assert report(explainer, x, tmp_path / "r.html").read_text().count("<article") == 3

    def test_a_nonlinear_head_has_no_edits(self, opened):
        model = salf()
        model.head = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, CLASSES))
        page = opened(model, images(1))
        assert page.page.get_by_test_id("beta").is_hidden()
        assert "not one linear layer" in page.page.inner_text("#why")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"image_names": ["a"]}, "1 image_names for 2 images"),
            ({"labels": [1, 2, 3]}, "3 labels for 2 images"),
            ({"concepts": ["concept 9"]}, "'concept 9' is not among"),
            ({"class_names": ["a"]}, "1 class names for 6"),
            ({"class_names": "abcdef"}, "class_names must be a list"),
            ({"target": "no class"}, "'no class' is not the name of a class"),
            ({"target": 6}, "there are 6 classes"),
            ({"target": [0]}, "target"),
            ({"target": [0, 1, 2]}, "3 targets for 2 images"),
            ({"target": np.array([0, 1, 2])}, "3 targets for 2 images"),
            ({"labels": [0, -1]}, "must be an integer of at least 0 and at most 5, got -1"),
            ({"labels": [0, 6]}, "at most 5, got 6"),
            ({"labels": [True, False]}, "got True"),
            ({"labels": 5}, "labels must be a list"),
            ({"image_names": "ab"}, "image_names must be a list"),
            ({"batch_size": 0}, "batch_size"),
        ],
    )
    def test_what_does_not_fit_is_said(self, options, message):
        with pytest.raises(InputError, match=message):
            explore(salf(), images(2), **options)

    def test_two_classes_may_share_a_name(self, opened):
        """As in torchvision's names of ImageNet: two kinds of crane."""
        page = opened(explanation(2), images(2), class_names=["crane", "crane", "sloth"])
        assert page.page.inner_text("#verdict-line") == "explained: crane"
        with pytest.raises(InputError, match="1 class names for at least 2"):
            explore(explanation(2), images(2), class_names=["crane"])

    def test_a_label_by_index_is_one_of_two_classes_of_one_name(self, opened):
        model, x = salf(), images(1)
        predicted = int(model(x).argmax(1))
        names = [f"class {k}" for k in range(CLASSES)]
        names[predicted] = names[(predicted + 1) % CLASSES] = "crane"
        page = opened(model, x, class_names=names, labels=[(predicted + 1) % CLASSES])
        assert page.page.locator("#verdict-line.wrong").inner_text() == "predicted crane; true label crane"
        assert page.page.locator("[data-testid=class] small:not([hidden])").count() == 1
        page = opened(model, x, class_names=names, labels=[predicted])
        assert page.page.locator("#verdict-line.right").count() == 1

    def test_an_explained_class_is_not_called_the_prediction(self, opened):
        """What a model predicts is known of its own choice of target, and of logits."""
        model, x = demo.load("classifier"), images(3)
        model.class_names = None
        explainer = ConceptFusionMap(
            model, ["layer4"], ConceptTranslator([model.num_features], 16, hidden=(8, 8)).eval(), ["a", "b", "c"],
            torch.randn(3, 16),
        )  # fmt: skip
        predicted = model(x).argmax(1).tolist()
        page = opened(explainer, x, labels=predicted)
        assert page.page.inner_text("#verdict-line").startswith("predicted class")
        assert "target" not in page.code
        other = [(k + 1) % 6 for k in predicted]
        page = opened(explainer, x, target=other, labels=predicted)
        assert page.page.inner_text("#verdict-line").startswith(f"explained: class {other[0]}")
        assert "3 whose explained class is not the true label" in page.page.inner_text("#count")
        assert "wrong" not in page.page.inner_text("main")
        seen = page.run(explainer=explainer, images=x)["seen"]
        assert int(seen.target) == other[0]
        page = opened(explainer.explain(x), x, labels=predicted)
        assert page.page.inner_text("#verdict-line").startswith("explained: class")
        model = salf()
        page = opened(model, x, target=2)
        assert page.page.inner_text("#verdict-line") == f"predicted class {int(model(x[:1]).argmax())}"
        assert int(page.run(model=model, images=x)["seen"].target) == 2

    @pytest.mark.parametrize("target", [2, (2,), torch.tensor([2]), np.array(2), "class 2"])
    def test_one_target_is_for_all_images_of_all_batches(self, target):
        about = explore(salf(), images(3), target=target, batch_size=2).html
        assert re.findall(r'"target":(\d)', about) == ["2"] * 3

    def test_names_of_folders_judge_nothing_where_no_output_is_called_so(self, opened, tmp_path):
        for k, name in enumerate(("cat", "dog")):
            (tmp_path / "data" / name).mkdir(parents=True)
            Image.new("RGB", (SIZE, SIZE), (120 * k, 60, 30)).save(tmp_path / "data" / name / "0.png")
        model = salf()
        source = inputs_for(model, tmp_path / "data", size=SIZE)
        with pytest.warns(InputWarning, match=r"no output of the model is called 'cat'.*pass class_names="):
            page = opened(model, source)
        assert "wrong" not in page.page.inner_text("#count")
        assert page.page.inner_text("#verdict-line").endswith("true label cat")
        assert page.page.locator("#verdict").is_hidden()
        page = opened(model, source, class_names=["cat", "dog", "e", "f", "g", "h"])
        assert page.page.locator("#verdict").is_visible()
        assert 'images[images.names.index("cat/0.png")][None]' in page.code
        page.run(model=model, images=source)

    def test_the_code_of_a_transform_is_what_the_page_shows(self, opened, tmp_path):
        """Regions are marked in pixels of the picture; the code marks them in those of the model's input."""
        for k in range(2):
            Image.fromarray((255 * images(2, 50, 90, k)[k].permute(1, 2, 0).numpy()).astype("uint8")).save(
                tmp_path / f"{k}.png"
            )

        def transform(x):
            return F.interpolate(x, (100, 180), mode="bilinear")

        model = salf()
        page = opened(model, [str(tmp_path / f"{k}.png") for k in range(2)], transform=transform)
        page.page.keyboard.press("]")
        names = {"model": model, "images": [str(tmp_path / f"{k}.png") for k in range(2)], "transform": transform}
        for tool in ("box", "brush"):
            page.tool(tool)
            page.drag((0.1, 0.2), (0.6, 0.7))
            assert "open_images(images)[1][None]" in page.code
            seen = page.run(**names)["seen"]
            expected = dict(zip(seen.concepts, seen.scores[0].tolist(), strict=True))
            for name, value in page.listed().items():
                assert expected.get(name, value) == pytest.approx(value, abs=0.03)  # another grid of pixels

    def test_a_drag_belongs_to_its_image_and_can_be_given_up(self, opened):
        page = opened(salf(), images(2))
        mouse, keys = page.page.mouse, page.page.keyboard
        page.drag((0.1, 0.1), (0.3, 0.3))
        first = page.code
        mouse.move(*page.at(0.5, 0.5))
        mouse.down()
        mouse.move(*page.at(0.9, 0.9))
        keys.press("Escape")
        assert page.code == first
        mouse.up()
        assert page.code == first
        mouse.down()
        mouse.move(*page.at(0.6, 0.6))
        keys.press("]")
        mouse.up()
        assert "explain_region" not in page.code
        assert "images[[1]]" in page.code

    def test_closing_asks_while_there_are_edits(self, opened):
        page = opened(salf(), images(2))
        asked = []
        page.page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
        page.page.reload()
        assert asked == []
        page.beta(3)
        page.page.reload()
        assert asked == ["beforeunload"]

    def test_outputs_that_are_not_finite(self, opened):
        model = salf()
        with torch.no_grad():
            model.head.bias[2] = torch.nan
        page = opened(model, images(1))
        assert "predicted" not in page.page.inner_text("#verdict-line")
        assert "NaN" not in page.page.inner_text("main")

    def test_a_search_without_a_match_says_so(self, opened):
        page = opened(salf(), images(1))
        page.page.fill("#find-concept", "zebra")
        assert page.page.inner_text("#no-concept") == "No concept matches."
        page.page.fill("#find-concept", "concept")
        assert page.page.locator("#no-concept").is_hidden()

    def test_exchanged_or_empty(self, tmp_path):
        with pytest.raises(InputError, match="first: explore"):
            explore(images(1), explanation(1))
        with pytest.raises(InputError, match="got Linear"):
            explore(nn.Linear(2, 2), images(1))
        with pytest.raises(InputError, match="3 images for an explanation of 2"):
            explore(explanation(2), images(3))
        with pytest.raises(FileNotFoundError, match="no folder"):
            explore(explanation(1), images(1)).save(tmp_path / "absent" / "e.html")

    def test_twenty_images_of_370_concepts_stay_below_5_MB(self, tmp_path):
        noise = torch.rand(20, 3, 224, 224)
        path = explore(salf("cnn", 370), noise).save(tmp_path / "e.html")
        assert path.stat().st_size < 5_000_000

    def test_maps_of_4741_concepts_take_half_a_megabyte_per_image(self, tmp_path):
        model, sizes = salf("cnn", 4741), []
        for n in (1, 3):
            path = explore(model, images(n)).save(tmp_path / "e.html")
            sizes.append(path.stat().st_size)
        data = json.loads(re.search(r'id="image-0">(.*?)</script>', path.read_text()).group(1))
        assert len(base64.b64decode(data["maps"])) == 4741 * 49 * 2
        assert (sizes[1] - sizes[0]) / 2 < 0.75e6  # base64, scores, and the picture


class TestInANotebook:
    def test_it_shows_itself_in_a_frame(self, visit, tmp_path):
        shown = explore(salf(), images(1), title=HOSTILE[1])._repr_html_()
        path = tmp_path / "notebook.html"
        path.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{shown}</body>")
        seen = visit(path)
        frame = seen.page.frame_locator("iframe")
        frame.get_by_test_id("concept").first.wait_for()
        assert seen.outside == []
        heard = """new Promise(done => addEventListener("message", event => done(event.data)))"""
        promise = f"window.heard = {heard}; 0"
        seen.evaluate(promise)
        frame.get_by_test_id("beta").fill("3")
        message = seen.evaluate("window.heard")
        assert message["from"] == "captum_concepts"
        assert message["state"]["edits"]["0"][0]["beta"] == 3

    def test_a_saved_notebook_shows_what_ran_in_it(self, visit, tmp_path):
        nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (extra tutorials)")
        pytest.importorskip("ipykernel", reason="ipykernel is not installed (extra tutorials)")
        import nbformat

        code = (
            "import torch\nfrom captum_concepts import ConceptExplanation, explore\n"
            "e = ConceptExplanation(['sand', 'grass'], torch.tensor([[0.9, 0.2]]), torch.rand(1, 2, 7, 7))\n"
            "explore(e, torch.rand(1, 3, 32, 32), image_names=['beach.jpg'])"
        )
        cells = [nbformat.v4.new_code_cell(code), nbformat.v4.new_code_cell("e")]
        notebook = nbformat.v4.new_notebook(cells=cells)
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
        nbformat.write(notebook, tmp_path / "n.ipynb")
        page, table = (c.outputs[0].data for c in nbformat.read(tmp_path / "n.ipynb", as_version=4).cells)
        assert page["text/plain"] == "Explorer(1 image, 2 concepts, without edits)"
        if view := page.get("application/vnd.jupyter.widget-view+json"):  # with the extra notebook
            saved = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
            state = saved[view["model_id"]]["state"]
            assert state["page"] == html.unescape(re.search('srcdoc="([^"]*)"', page["text/html"]).group(1))
            assert "postMessage" in state["page"]
        assert table["text/html"].count("<img") == 2
        path = tmp_path / "notebook.html"
        path.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{page['text/html']}{table['text/html']}</body>")
        seen = visit(path)
        concepts = seen.page.frame_locator("iframe").get_by_test_id("concept")
        concepts.first.wait_for()
        assert [one.get_attribute("data-concept") for one in concepts.all()] == ["sand", "grass"]
        assert seen.page.locator("img[alt^='Map of sand']").count() == 1
        assert seen.outside == []

    def test_edits_come_back_to_python(self):
        pytest.importorskip("anywidget", reason="anywidget is not installed (extra notebook)")
        model, x = salf(), images(2)
        explorer = explore(model, x)
        assert explorer.edits == []
        widget = explorer.widget()
        assert "captum_concepts" in widget._esm or widget._esm
        widget.state = {
            "image": 1,
            "region": {"boxes": [1, 2, 30, 40]},
            "edits": {
                "1": [
                    {"concept": "concept 2", "beta": 2.0, "mask": [[3, 5, 9], [4, 5, 9]]},
                    {"concept": "concept 0", "beta": 1},
                ]
            },
        }
        assert explorer.image == 1
        assert explorer.region == {"boxes": [1, 2, 30, 40]}
        first, second = explorer.edits
        assert int(first["mask"].sum()) == 8
        assert second == {"concept": "concept 0", "beta": 1}
        before, after = model.intervene(x[[explorer.image]], explorer.edits, units="std")
        assert before.shape == after.shape
        bundle = explorer._repr_mimebundle_()
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        assert {"application/vnd.jupyter.widget-view+json", "text/html", "text/plain"} <= set(data)

    def test_the_widget_hears_the_page(self, visit, tmp_path):
        """Its script in a browser, with the page in its frame; what it sets is what ``intervene`` then takes."""
        pytest.importorskip("anywidget", reason="anywidget is not installed (extra notebook)")
        model, x = salf(), images(2)
        explorer = explore(model, x)
        given = {"script": explorer.widget()._esm, "page": explorer.html}
        path = tmp_path / "cell.html"
        path.write_text("<!DOCTYPE html><meta charset=utf-8><body>")
        seen = visit(path)
        seen.page.evaluate(
            """async ({script, page}) => {
                const { default: widget } = await import("data:text/javascript," + encodeURIComponent(script));
                window.saved = null;
                let state = null;
                const set = (_, value) => { state = value; };
                const model = { get: () => page, set, save_changes: () => { window.saved = state; } };
                widget.render({ model, el: document.body });
            }""",
            given,
        )
        page = seen.page.frame_locator("iframe")
        page.get_by_test_id("image").nth(1).click()
        page.get_by_test_id("stage").click(position={"x": 40, "y": 60})
        page.get_by_test_id("beta").fill("3")
        probabilities = [float(one.get_attribute("data-after")) for one in page.get_by_test_id("class").all()]
        seen.page.wait_for_function("window.saved?.edits['1']")
        explorer.widget().state = seen.evaluate("window.saved")
        assert explorer.image == 1
        assert list(explorer.region) == ["points"]
        after = model.intervene(x[[1]], explorer.edits, units="std")[1].softmax(1)[0]
        assert sorted(probabilities) == pytest.approx(sorted(after.tolist()), rel=1e-3)
