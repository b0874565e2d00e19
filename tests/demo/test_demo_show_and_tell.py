"""SALF-CBM in the demo: its corrections are what `intervene` gives, and nothing in its picture overlaps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from drawings import compare_with_baseline

from captum_concepts.datasets import CaptionedScenes
from captum_concepts.demo import show_and_tell
from captum_concepts.demo._corrections_figure import corrections_figure


@pytest.fixture(scope="module")
def scenes():
    return CaptionedScenes(250, seed=77, size=64)


@pytest.fixture(scope="module")
def model(scenes):
    return show_and_tell.train(scenes, 64)  # as few as that: the test needs mistakes


@pytest.fixture(scope="module")
def found(model, scenes):
    return show_and_tell.find_corrections(model, scenes.stack())


def test_the_model_has_learnt_something(model, scenes):
    labels = scenes.labels
    assert (show_and_tell.logits(model, scenes.stack().image).argmax(1) == labels).float().mean() > 0.6


def test_a_search_counts_the_wrong_and_the_corrected(model, scenes, found):
    batch = scenes.stack()
    wrong = (show_and_tell.logits(model, batch.image).argmax(1) != batch.label).sum()
    assert found.wrong == int(wrong)
    assert 0 < found.corrected <= found.wrong
    assert len(found.shown) == min(3, found.corrected)


def test_each_correction_is_what_intervene_gives(model, scenes, found):
    for c in found.shown:
        assert c.called != c.truth == c.corrected
        before, after = model.intervene(c.image[None], c.concept, beta=c.beta, units="std", boxes=c.box)
        for logits, shown, name in ((before, c.before, c.called), (after, c.after, c.truth)):
            assert torch.allclose(logits.softmax(1)[0], shown, atol=1e-6)
            assert scenes.classes[int(logits.argmax())] == name
        region = model.explain_region(c.image[None], boxes=c.box, top_k=None)
        for word, score in c.seen:
            assert float(region.scores[0, region.index(word)]) == pytest.approx(score, abs=1e-5)
        assert c.concept in dict(c.seen)


def test_the_edited_concept_is_not_in_the_object(scenes, found):
    batch = scenes.stack()
    for c in found.shown:
        i = next(i for i, image in enumerate(batch.image) if torch.equal(image, c.image))
        k = next(k for k in range(3) if torch.allclose(batch.boxes[i, k].clamp(0, 64), torch.tensor(c.box)))
        assert c.concept not in {scenes.concepts[int(word)] for word in batch.objects[i, k]}


def test_the_map_after_is_the_map_before_and_beta_in_the_box(found):
    for c in found.shown:
        # A pixel on the border of two cells counts for both: 64 pixels of 7 parts each are 7 cells of 64 parts.
        pixel = torch.arange(64)
        sides = [
            ((pixel + 1).clamp(max=high) - pixel.clamp(min=low))
            .clamp(min=0)
            .repeat_interleave(7)
            .reshape(7, 64)
            .mean(1)
            for low, high in ((c.box[1], c.box[3]), (c.box[0], c.box[2]))
        ]
        share = sides[0][:, None] * sides[1]
        assert torch.allclose(c.map_after - c.map_before, c.beta * share, atol=1e-4)


def test_the_picture_is_drawn_as_before():
    """Of two corrections that were made up, beside a baseline (``BASELINE=write`` makes it anew)."""
    weights = {"cat": [("fur", 2.0), ("grass", -0.5)], "dog": [("grass", 1.25), ("a long name of a concept", 0.75)]}
    rules = SimpleNamespace(
        class_names=list(weights), concepts=["fur", "grass", "a long name of a concept"],
        decision_rules=lambda c, top_k: weights[list(weights)[c]][:top_k],
    )  # fmt: skip
    ramp = torch.linspace(0, 1, 48).reshape(3, 4, 4)
    corrections = [
        show_and_tell.Correction(
            ramp, "cat", "dog", "cat", (1.0, 0.0, 3.0, 2.0), "fur", [("grass", 2.5), ("fur", 0.5)], beta,
            torch.tensor([[0.0, 1.0], [2.0, -1.0]]), torch.tensor([[0.0, 3.0], [2.0, -1.0]]), before, before.flip(0),
        )
        for beta, before in ((2.0, torch.tensor([0.03, 0.97])), (-1.5, torch.tensor([0.4, 0.6])))
    ]  # fmt: skip
    figure = corrections_figure(rules, corrections, "A title", "A note below the picture.")
    compare_with_baseline(figure, "corrections")


def test_no_text_of_the_picture_overlaps_or_is_cut(model, found):
    figure = corrections_figure(model, found.shown, "A title " * 8, "A note that is long enough for two lines. " * 6)
    figure.canvas.draw()
    whole = figure.bbox
    boxes = [(t.get_text(), t.get_window_extent()) for t in figure.texts if t.get_text()]
    assert len(boxes) > 40
    for text, box in boxes:
        assert min(box.x0 - whole.x0, whole.x1 - box.x1, box.y0 - whole.y0, whole.y1 - box.y1) >= 0, text
    for i, (text, box) in enumerate(boxes):
        for other, second in boxes[i + 1 :]:
            across = min(box.x1, second.x1) - max(box.x0, second.x0)
            down = min(box.y1, second.y1) - max(box.y0, second.y0)
            assert across <= 1 or down <= 2, (text, other)
