"""The user study: who is drawn, what the form shows and saves, and what the scores are."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from captum_concepts.attr.layer_channels import LayerChannels
from captum_concepts.errors import ArtifactError, InputError
from captum_concepts.visualization import UserStudy, most_activating, score_user_study, strongest_images, user_study


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class Thresholds:
    """Forty concepts: concept t is image t's own color, and a little of the others."""

    concepts = tuple(f"word {t}" for t in range(40))

    def __init__(self, seed: int = 0) -> None:
        self.weight = noise(40, 3, seed=seed)

    def scores(self, inputs):
        return inputs.mean((2, 3)) @ self.weight.T

    def concept_maps(self, inputs, concepts=None):
        return torch.einsum("nchw,tc->nthw", inputs, self.weight)[
            :, list(concepts) if concepts is not None else slice(None)
        ]

    def explain(self, inputs, target=None, *, concepts=None, top_k=5, rank_by="scores", contributions=True):
        raise NotImplementedError


IMAGES = noise(30, 3, 8, 8, seed=5)
INTERPRETABILITY = {"ours": noise(40, seed=1), "zero <b>": noise(40, seed=2)}


def made(**options) -> UserStudy:
    models = {"ours": Thresholds(0), "zero <b>": Thresholds(3)}
    return user_study(models, IMAGES, INTERPRETABILITY, **{"n_neurons": 5, **options})


class TestChannels:
    torch.manual_seed(0)  # another start may leave a channel without any activation
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )

    def test_scores_and_maps_are_the_activations(self):
        channels = LayerChannels(self.net, "1", IMAGES[:1], labels={2: "beak"}, batch_size=7)
        with torch.no_grad():
            maps = self.net[:2](IMAGES)
        torch.testing.assert_close(channels.scores(IMAGES), maps.mean((2, 3)))
        torch.testing.assert_close(channels.concept_maps(IMAGES, ["beak (channel 2)", 0]), maps[:, [2, 0]])
        explained = channels.explain(IMAGES, top_k=2)
        assert explained.selected.sum(1).tolist() == [2] * 30
        assert explained.contributions is None
        with pytest.raises(InputError, match="no contributions"):
            channels.explain(IMAGES, rank_by="contributions")
        with pytest.raises(InputError, match=r"0 to 5, to names; got \[6\]"):
            LayerChannels(self.net, "1", IMAGES[:1], labels={6: "x"})

    def test_strongest_images_and_their_figure(self):
        channels = LayerChannels(self.net, "1", IMAGES[:1])
        found = strongest_images(channels, IMAGES, ["channel 3"], k=4, batch_size=7)["channel 3"]
        scores = channels.scores(IMAGES)[:, 3]
        assert [one.index for one in found] == scores.argsort(descending=True)[:4].tolist()
        assert [one.score for one in found] == pytest.approx(scores.sort(descending=True).values[:4].tolist())
        assert torch.equal(found[0].picture, IMAGES[found[0].index])
        figure = most_activating(channels, IMAGES, ["channel 3", 0], k=2)
        assert figure.get_size_inches()[0] > 1

    def test_for_every_kind_of_method(self):
        """The data of `most_activating` comes from scores alone, so it is the same function for each of them."""
        from captum_concepts import FeatureActivationMap, SpatialACV

        fam = FeatureActivationMap(self.net, "1", torch.eye(6))
        acv = SpatialACV(self.net, "1").fit({"bright": IMAGES[:8] + 1}, IMAGES[8:16])
        for method in (fam, acv):
            found = strongest_images(method, IMAGES, [0], k=3)
            (own,) = found.values()
            assert [one.index for one in own] == method.scores(IMAGES)[:, 0].argsort(descending=True, stable=True)[
                :3
            ].tolist()


class TestSampling:
    def test_the_strata_are_those_of_the_paper(self):
        study = made()
        assert len(study.neurons) == 20
        for model, scores in INTERPRETABILITY.items():
            top = set(scores.argsort(descending=True)[:12].tolist())  # 30 % of 40
            own = [n for n in study.neurons.values() if n.model == model]
            for neuron in own:
                assert (Thresholds.concepts.index(neuron.concept) in top) == (neuron.stratum == "top")
            assert [n.stratum for n in own].count("top") == 5
        for name, neuron in study.neurons.items():
            model = Thresholds(0) if neuron.model == "ours" else Thresholds(3)
            t = Thresholds.concepts.index(neuron.concept)
            assert neuron.images == model.scores(IMAGES)[:, t].argsort(descending=True)[:5].tolist()
            assert len(study.pictures[name]) == 5

    def test_the_seed_decides(self):
        assert made().neurons == made().neurons
        assert made(seed=1).neurons != made().neurons

    def test_refused(self):
        with pytest.raises(InputError, match="seed must be an integer, got 'a'"):
            made(seed="a")
        with pytest.raises(InputError, match=r"12 of them in the stratum 'top'; n_neurons=13"):
            made(n_neurons=13)
        with pytest.raises(InputError, match=r"models must be a mapping by the names of the models.*got Thresholds"):
            user_study(Thresholds(), IMAGES, INTERPRETABILITY)
        with pytest.raises(InputError, match=r"interpretability must be a mapping.*got Tensor"):
            user_study({"a": Thresholds()}, IMAGES, torch.rand(40))
        with pytest.raises(InputError, match="the models are"):
            user_study({"a": Thresholds()}, IMAGES, INTERPRETABILITY)
        with pytest.raises(InputError, match="must be 40 finite numbers, got 39"):
            user_study({"a": Thresholds()}, IMAGES, {"a": torch.ones(39)})


class TestForm:
    def test_it_tells_participants_neither_model_nor_stratum(self, tmp_path):
        study = made(labels={"zero <b>": dict.fromkeys(Thresholds.concepts, "a <i>beak</i>")})
        page = study.save(tmp_path).read_text()
        assert "zero" not in page
        assert '"ours"' not in page
        assert "&lt;i&gt;beak" in page
        assert "stratum" not in page
        assert page.count("<fieldset>") == 40
        read = UserStudy.load(tmp_path / "key.json")
        assert read.neurons == study.neurons
        assert read.fingerprint == study.fingerprint
        with pytest.raises(InputError, match="no images"):
            read.save(tmp_path)
        (tmp_path / "key.json").write_text("{}")
        with pytest.raises(ArtifactError, match="not the key"):
            UserStudy.load(tmp_path / "key.json")

    def test_a_participant_fills_it_in(self, tmp_path, visit):
        study = made()
        seen = visit(study.save(tmp_path), accept_downloads=True)
        page = seen.page
        page.get_by_test_id("participant").fill("P 7")
        for i, name in enumerate(study.neurons):
            page.check(f'input[name="{name}.consistency"][value="{i % 5 + 1}"]')
            page.check(f'input[name="{name}.accuracy"][value="4"]')
        assert page.get_by_test_id("count").inner_text() == "40 of 40 ratings"
        with page.expect_download() as download:
            page.get_by_test_id("save").click()
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        assert path.name == "answers-P_7.json"
        page.reload()  # whoever comes next finds nothing of this
        assert page.get_by_test_id("participant").input_value() == ""
        assert page.get_by_test_id("count").inner_text() == "0 of 40 ratings"
        scores = score_user_study(tmp_path / "key.json", [path], n_bootstrap=50)
        means = {(r.model, r.stratum, r.question): r.mean for r in scores.rows}
        assert means["ours", "all", "accuracy"] == means["zero <b>", "top", "accuracy"] == 4
        expected = np.mean([i % 5 + 1 for i, n in enumerate(study.neurons.values()) if n.model == "ours"])
        assert means["ours", "all", "consistency"] == pytest.approx(expected)
        assert (seen.outside, seen.complaints) == ([], [])

    def test_the_next_participant_starts_anew(self, tmp_path, visit):
        study = made()
        page = visit(study.save(tmp_path), accept_downloads=True).page
        page.on("dialog", lambda dialog: dialog.accept())
        page.get_by_test_id("participant").fill("李 七")
        page.check(f'input[name="{next(iter(study.neurons))}.accuracy"][value="4"]')
        page.reload()  # in the midst of it nothing is lost
        assert page.get_by_test_id("participant").input_value() == "李 七"
        assert page.get_by_test_id("count").inner_text() == "1 of 40 ratings"
        with page.expect_download() as download:
            page.get_by_test_id("save").click()
        assert download.value.suggested_filename == "answers-李_七.json"
        page.get_by_test_id("next").click()
        assert page.get_by_test_id("participant").input_value() == ""
        assert page.get_by_test_id("count").inner_text() == "0 of 40 ratings"


def answer(study: UserStudy, who: str, rate) -> dict:
    items = {
        name: {"consistency": rate(n, "consistency"), "accuracy": rate(n, "accuracy")}
        for name, n in study.neurons.items()
    }
    return {"participant": who, "study": study.fingerprint, "answers": items}


class TestScores:
    def test_means_intervals_and_differences(self):
        study, rng = made(), np.random.default_rng(0)

        def rate(neuron, question):
            better = (neuron.model == "ours") + (neuron.stratum == "top")
            return int(np.clip(2 + better + rng.integers(-1, 2), 1, 5))

        given = [answer(study, f"p{i}", rate) for i in range(25)]
        scores = score_user_study(study, given, n_bootstrap=400)
        assert len(scores.rows) == 2 * 3 * 2
        for row in scores.rows:
            own = [
                a["answers"][name][row.question] for a in given for name, n in study.neurons.items()
                if n.model == row.model and row.stratum in (n.stratum, "all")
            ]  # fmt: skip
            assert row.mean == pytest.approx(np.mean(own))
            assert row.low < row.mean < row.high
            assert row.participants == 25
            assert row.neurons == (10 if row.stratum == "all" else 5)
        difference, low, high = scores.differences["ours", "zero <b>", "all", "accuracy"]
        assert 0.4 < low < difference < high < 1.6  # 1 as the ratings were made
        assert "| ours | top (5) | accuracy | " in scores.to_markdown()

    def test_answers_left_out_are_said(self):
        study = made()
        whole, part = answer(study, "a", lambda *_: 3), answer(study, "b", lambda *_: 5)
        first = next(iter(study.neurons))
        del part["answers"][first]["accuracy"]
        scores = score_user_study(study, [whole, part], n_bootstrap=20)
        assert scores.incomplete == ["b"]
        assert {r.mean for r in scores.rows if r.question == "consistency"} == {4}

    def test_few_ratings_have_no_interval(self):
        study = made()
        first = next(iter(study.neurons))
        one = answer(study, "a", lambda *_: 4)
        for name, rated in one["answers"].items():
            for question in list(rated) if name != first else []:
                del rated[question]
        scores = score_user_study(study, [one], n_bootstrap=20)
        rated = [row for row in scores.rows if row.mean == row.mean]
        assert rated
        assert all(np.isnan([row.low, row.high]).all() for row in rated)
        assert "| 4.00 | 1 |" in scores.to_markdown()
        assert "none for fewer than 5 ratings" in scores.to_markdown()

    def test_refused(self, tmp_path):
        study = made()
        good = answer(study, "a", lambda *_: 3)
        with pytest.raises(InputError, match="answered twice"):
            score_user_study(study, [good, good])
        with pytest.raises(InputError, match="seed must be"):
            score_user_study(study, [good], seed=-1)
        with pytest.raises(InputError, match="no answers"):
            score_user_study(study, [])
        with pytest.raises(InputError, match="answers the study"):
            score_user_study(made(seed=1), [good])
        for wrong, message in ((0, "with 0; ratings are 1 to 5"), (True, "with True"), ("4", "with '4'")):
            with pytest.raises(InputError, match=message):
                score_user_study(study, [answer(study, "a", lambda *_, w=wrong: w)])
        (tmp_path / "a.json").write_text(json.dumps({"participant": "a"}))
        with pytest.raises(InputError, match="not a file saved by the form of a study"):
            score_user_study(study, [tmp_path / "a.json"])
