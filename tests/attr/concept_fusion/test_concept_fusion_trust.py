"""Presence, reliability and trust: what held-out images and labels say of the scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from captum_concepts.attr.concept_fusion.trust import Curve, HeldOut, correlations, judge, odds
from captum_concepts.attr.concept_fusion.words import TextBank
from captum_concepts.attr.concept_fusion_map import ConceptFusionMap
from captum_concepts.errors import ConvergenceWarning, InputError

WORDS = ["red", "green", "blue"]


class Color(nn.Module):
    """A vision-language model of the mean color."""

    logit_scale, logit_bias = 20.0, 0.0

    def encode_image(self, images):
        return images.mean((2, 3)) - 0.25

    def encode_text(self, words):
        return torch.eye(3)[[WORDS.index(word) for word in words]]


class Noise(Color):
    """Embeddings that do not depend on what the image shows."""

    def encode_image(self, images):
        return torch.sin(1e4 * images.flatten(1)[:, :3])


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 10, 3, 2, 1), nn.ReLU(), nn.Conv2d(10, 12, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip


def images(n=400, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 16, 16, generator=g) * torch.rand(n, 3, 1, 1, generator=g)


def fit(encoder=None, n=400, **options):
    return ConceptFusionMap(classifier(), ["1", "3"]).fit(images(n), encoder or Color(), WORDS, **options)


@pytest.fixture(scope="module")
def fitted():
    return fit(crops=2)


def embeddings(seed, *shape):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def bank(link="softmax", words=4, width=8):
    names = tuple(f"w{i}" for i in range(words))
    return TextBank(names, embeddings(0, words, width), torch.zeros(words), 10.0, link)


def held_out(m=200, views=3, width=8, noise=0.3):
    teacher = embeddings(1, m, views, width)
    student = F.normalize(teacher[:, 0] + noise * embeddings(2, m, width) + 0.5 * embeddings(3, width), dim=1)
    return HeldOut(student.mean(0), teacher[:, 0].mean(0), student, teacher)


class TestJudge:
    def test_centering_subtracts_the_mean_of_each_word(self):
        held = held_out()
        plain, judged = bank(), judge(bank(), held).bank
        h = embeddings(5, 7, 8)
        expected = plain.logits(h) - plain.scale * plain.direction @ held.mean
        torch.testing.assert_close(judged.logits(h), expected)
        plain, judged = bank("sigmoid"), judge(bank("sigmoid"), held).bank
        expected = plain.logits(h) + plain.scale * plain.direction @ (held.teacher_mean - held.mean)
        torch.testing.assert_close(judged.logits(h), expected)

    def test_the_temperature_is_the_best_of_its_grid(self):
        held = held_out()
        trust = judge(bank(), held)
        taught = 10 * (held.teacher - held.teacher_mean) @ bank().direction.T
        verdicts = taught.softmax(-1)
        said = verdicts[:, 0] / 3 + verdicts[:, 1:].mean(1) * 2 / 3

        def loss(t):
            return -(said * (trust.bank.logits(held.student) / t).log_softmax(1)).sum(1).mean()

        t = trust.bank.temperature
        assert loss(t) <= loss(t * 2**0.25)
        assert loss(t) <= loss(t / 2**0.25)
        assert t > 1  # the translator is less sure than its logits

    def test_a_word_that_the_vlm_finds_in_every_image_is_not_the_first(self):
        """Words near every image, as in CLIP's narrow cone, are no verdict."""
        held = held_out(noise=0.1)
        near = bank().direction[0] * 3  # the VLM's embeddings all lean towards the first word
        teacher = F.normalize(held.teacher + near, dim=-1)
        leaning = HeldOut(held.mean, teacher[:, 0].mean(0), held.student, teacher)
        assert (bank().logits(teacher[:, 0]).argmax(1) == 0).all()
        trust = judge(bank(), leaning)
        assert trust.agreement > 0.7
        assert trust.presence(odds(trust.bank, trust.bank.logits(held.student)))[:, 1:].max() > 0.4

    def test_agreement_and_reliability(self):
        held = held_out()
        trust = judge(bank(), held)
        logits = trust.bank.logits(held.student)
        taught = 10 * (held.teacher[:, 0] - held.teacher_mean) @ bank().direction.T
        assert trust.agreement == pytest.approx((logits.argmax(1) == taught.argmax(1)).float().mean().item())
        for t in range(4):
            wanted = np.corrcoef(logits[:, t], taught[:, t])[0, 1]
            assert trust.reliability[t, 0].item() == pytest.approx(wanted, abs=1e-4)
        assert (trust.reliability[:, 1] < trust.reliability[:, 0]).all()
        assert (trust.reliability[:, 2] > trust.reliability[:, 0]).all()
        assert not trust.no_better_than_chance

    def test_intervals_cover(self):
        g = torch.Generator().manual_seed(0)
        a, e = torch.randn(60, 2000, generator=g), torch.randn(60, 2000, generator=g)
        low, high = correlations(a, 0.6 * a + 0.8 * e)[:, 1:].T
        assert 0.93 < ((low < 0.6) & (high > 0.6)).float().mean() < 0.97
        assert torch.equal(correlations(torch.ones(9, 1), torch.randn(9, 1))[:, 0], torch.zeros(1))

    def test_no_held_out_images_leave_the_published_bank(self):
        given = bank()
        trust = judge(given, None)
        assert trust.bank is given
        assert (trust.presence, trust.reliability) == (None, None)
        assert "not measured" in trust.sentence()

    def test_odds(self):
        logits = torch.randn(5, 4) * 8
        p = (logits / 2 / 1.5).softmax(1).double()
        found = odds(TextBank(tuple("abcd"), torch.eye(4), torch.zeros(4), 1.0, "softmax", 2.0), logits)
        torch.testing.assert_close(found.double(), (p / (1 - p)).log(), atol=1e-3, rtol=1e-3)


class TestCurve:
    def test_it_is_calibrated_on_what_it_was_fitted_to(self):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(20_000, generator=g) * 2
        truth = (torch.rand(20_000, generator=g) < x.sigmoid() * 0.7).float()
        curve = Curve.fit(x, truth, 20_000, "")
        assert (curve(x) - x.sigmoid() * 0.7).abs().mean() < 0.02
        assert curve.values.diff().min() >= 0
        assert curve.logits.diff().min() > 0
        assert curve(torch.tensor(100.0)) < 0.8  # it was never surer than that

    @pytest.mark.parametrize("n", [1, 2, 30, 45])
    def test_few_entries(self, n):
        curve = Curve.fit(torch.arange(float(n)), torch.ones(n), n, "")
        values = curve(torch.tensor([-1e9, 0.0, 1e9]))
        assert (values < 1).all()
        assert (values > 0.5).all()

    def test_anything_monotone_is_kept(self):
        curve = Curve.fit(torch.randn(500), torch.rand(500), 500, "")
        assert curve.values.diff().min() >= 0 if len(curve.values) > 1 else True
        shape = curve(torch.randn(2, 3, 4)).shape
        assert shape == (2, 3, 4)


class TestFitted:
    def test_presence_is_calibrated_against_the_encoder(self, fitted):
        x = images(300, seed=9)
        presence = fitted.presence(x)
        said = (20 * F.normalize(Color().encode_image(x), dim=1)).argmax(1)
        first = presence.argmax(1)
        assert (first == said).float().mean() > 0.85
        assert presence.min() >= 0
        assert presence.max() < 1
        e = fitted.explain(x[:5], top_k=2)
        torch.testing.assert_close(e.presence, presence[:5][:, [WORDS.index(c) for c in e.concepts]])

    def test_trust_is_said_and_saved(self, fitted, tmp_path):
        assert "held-out images" in fitted.trust
        assert fitted.trust in repr(fitted)
        assert "3 concepts: red, green, blue" in repr(fitted)
        assert fitted.reliability_.shape == (3, 3)
        assert fitted.reliability_[:, 0].min() > 0.8
        loaded = ConceptFusionMap.load(fitted.save(tmp_path / "file"), classifier())
        x = images(4, seed=3)
        assert torch.equal(loaded.presence(x), fitted.presence(x))
        assert torch.equal(loaded.scores(x), fitted.scores(x))
        assert loaded.trust == fitted.trust

    def test_words_that_come_later_are_judged_too(self, fitted):
        later = fitted.with_concepts(["blue", "green"], Color())
        assert later.reliability_.shape == (2, 3)
        torch.testing.assert_close(later.reliability_, fitted.reliability_[[2, 1]], atol=1e-3, rtol=1e-3)
        assert later.presence(images(3)).shape == (3, 2)

    def test_published_scores_on_request(self, fitted):
        x = images(3, seed=4)
        published = fitted.with_options(calibrated=False)
        h = fitted.translator([m.mean((2, 3)) for m in (classifier()[:2](x), classifier()[:4](x))])
        expected = (20 * F.normalize(h, dim=1) @ torch.eye(3)).softmax(1)
        torch.testing.assert_close(published.scores(x), expected, atol=1e-5, rtol=1e-4)
        assert published.presence(x) is None
        assert "not measured" in published.trust

    def test_labels_calibrate(self, fitted, tmp_path):
        x = images(300, seed=6)
        truth = (x.mean((2, 3)) > 0.3).float()
        cefam = fitted.with_options()
        assert cefam.calibrate(x, truth) is cefam
        assert cefam.trust.count("presence from") == 1
        assert "presence from 300 labeled images" in cefam.trust
        assert "labeled" not in fitted.trust
        names = [[w for w, there in zip(WORDS, row, strict=True) if there] for row in truth.tolist()]
        by_names = fitted.with_options().calibrate(x, names)
        y = images(50, seed=8)
        assert torch.equal(by_names.presence(y), cefam.presence(y))
        assert not torch.equal(by_names.presence(y), fitted.presence(y))
        brier = (cefam.presence(y) - (y.mean((2, 3)) > 0.3).float()).square().mean()
        assert brier < truth.mean() * (1 - truth.mean())
        loaded = ConceptFusionMap.load(cefam.save(tmp_path / "file"), classifier())
        assert torch.equal(loaded.presence(y), cefam.presence(y))
        partly = truth.clone()
        partly[:, 0] = torch.nan
        assert fitted.with_options().calibrate(x, partly).presence(y).isfinite().all()
        for bad in (truth[:3], truth[:, :2], truth + 1, truth * torch.nan, [["purple"]] * 300, "red"):
            with pytest.raises(InputError):
                fitted.with_options().calibrate(x, bad)


def test_a_translator_that_learned_nothing_warns():
    with pytest.warns(ConvergenceWarning, match="no better than chance"):
        cefam = fit(Noise(), crops=0)
    assert cefam.trust.startswith("none:")


def test_few_images_claim_nothing():
    cefam = fit(n=40, crops=1)
    assert "too few" in cefam.trust
    assert cefam.presence(images(2)) is None
    assert cefam.explain(images(2)).presence is None
