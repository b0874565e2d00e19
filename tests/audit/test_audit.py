"""The audit: planted shortcuts are found and nothing else, numbers agree with slow references, runs resume."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from several import ending_at_once
from torch import Tensor, nn

from captum_concepts import (
    SALFCBM,
    ConceptExplanation,
    SpatialACV,
    audit_dataset,
    compare_audits,
    discover_concepts,
)
from captum_concepts._checks import name_positions
from captum_concepts.audit import ConceptAudit
from captum_concepts.audit.rows import look
from captum_concepts.audit.statistics import (
    binomial_p,
    holm,
    partial_effect,
    permutation_p,
    split_scores,
    stratified_difference,
)
from captum_concepts.errors import ArtifactError, InputError, InputWarning
from captum_concepts.explanation import Selection
from captum_concepts.images import open_images

CONCEPTS = ["shape a", "shape b", "grass", "sand", "noise"]


class Net(nn.Module):
    """Classes 0 and 1 by the shape in channel 0; ``bias`` adds the ground in channel 1 to the evidence."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, x: Tensor) -> Tensor:
        evidence = 3 * (x[:, 0].mean((1, 2)) - 0.5) * 2 + self.bias * (x[:, 1].mean((1, 2)) - 0.5) * 2
        return torch.stack([evidence, -evidence], 1)


class Truth:
    """A ConceptExplainer that reads the concepts off the image, with a rate of mistakes."""

    concepts = CONCEPTS

    def __init__(self, model: Net, presence: bool = True) -> None:
        self.forward_func = model
        if not presence:
            self.presence = None  # type: ignore[assignment]

    @staticmethod
    def get_name() -> str:
        return "Truth"

    def scores(self, inputs: Tensor) -> Tensor:
        shape, ground, noise = (inputs[:, k].mean((1, 2)) for k in range(3))
        return torch.stack([shape, 1 - shape, ground, 1 - ground, noise], 1).clamp(0, 1)

    def presence(self, inputs: Tensor) -> Tensor:
        return self.scores(inputs)

    def concept_maps(self, inputs: Tensor, concepts=None) -> Tensor:
        columns = name_positions(concepts, self.concepts)
        return self.scores(inputs)[:, columns, None, None].expand(-1, -1, 2, 2).contiguous()

    def contributions(self, inputs: Tensor, target=None, concepts=None) -> Tensor:
        logits = self.forward_func(inputs).detach()
        classes = logits.argmax(1) if target is None else torch.as_tensor(target).expand(len(inputs))
        sign = 1.0 - 2.0 * classes.float()
        centered = self.scores(inputs) - 0.5
        bias = float(self.forward_func.bias.detach())
        weights = torch.tensor([3.0, -3.0, bias, -bias, 0.0])
        return (sign[:, None] * centered * weights)[:, name_positions(concepts, self.concepts)]

    def explain(self, inputs, target=None, *, concepts=None, top_k=5, rank_by="scores", contributions=True):
        scores = self.scores(inputs)
        chosen = Selection.choose(self.concepts, scores, concepts=concepts, top_k=top_k, rank_by=rank_by)
        rows = torch.arange(len(inputs))[:, None]
        given = chosen.spread(self.contributions(inputs, target)[rows, chosen.index])
        names = [self.concepts[k] for k in chosen.columns]
        maps = chosen.spread(self.concept_maps(inputs)[rows, chosen.index])
        return ConceptExplanation(names, scores[:, chosen.columns], maps, given, selected=chosen.selected)


def scenes(n: int, seed: int, correlated: float = 0.5) -> tuple[Tensor, Tensor]:
    """Images of a shape on a ground that goes with the class in a fraction of the images."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    ground = np.where(rng.random(n) < correlated, labels == 0, labels != 0)
    clear = rng.uniform(0.75, 1, n)  # how clearly the shape is seen
    values = np.stack([np.where(labels == 0, clear, 1 - clear), ground * 0.8 + 0.1, rng.random(n)], 1)
    images = torch.tensor(values, dtype=torch.float32)[:, :, None, None].expand(-1, -1, 4, 4)
    return images + 0.01 * torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed)), torch.tensor(labels)


def audited(bias: float, n: int = 200, seed: int = 0, **options) -> ConceptAudit:
    images, labels = scenes(n, seed)
    options = {"n_bootstrap": 100, "class_names": ["a", "b"], **options}
    return audit_dataset(Truth(Net(bias)), images, labels=labels, **options)


class TestSuspects:
    def test_the_planted_ground_is_found_and_confirmed(self):
        audit = audited(2.5)
        pairs = {(s.class_name, s.concept) for s in audit.suspects()}
        assert pairs == {("a", "grass"), ("b", "sand")}
        for suspect in audit.suspects():
            assert suspect.p < 0.05
            assert suspect.effect.low > 0
            assert suspect.effect.low <= suspect.effect.value <= suspect.effect.high
            assert suspect.effect.value == min(suspect.raises, suspect.lowers)
            assert suspect.confirmed is True
            assert "ablation confirms it" in suspect.sentence()
            column, c = CONCEPTS.index(suspect.concept), audit.class_names.index(suspect.class_name)
            for i in suspect.images:
                assert int(audit.labels[i]) != c
                assert audit.rows.presence[i, column] >= 0.5
        assert "2 suspects" in repr(audit)

    def test_an_unbiased_model_has_none_in_nearly_all_audits(self):
        found = sum(bool(audited(0.0, n=120, seed=seed, min_effect=0.0).suspects()) for seed in range(20))
        assert found <= 3  # at 5 % each, more has a probability below 2 %

    def test_what_defines_a_class_is_not_tested(self):
        audit = audited(2.5, alpha=0.999, min_effect=0.0)
        assert not {s.concept for s in audit.suspects()} & {"shape a", "shape b"}

    def test_an_effect_too_small_to_matter(self):
        weak = audited(0.3, n=2000, min_effect=0.0)
        assert {(s.class_name, s.concept) for s in weak.suspects()} == {("a", "grass"), ("b", "sand")}
        assert not audited(0.3, n=2000, min_effect=0.5).suspects()

    def test_a_concept_that_only_comes_with_the_shortcut_is_none(self):
        class Confused(Truth):
            """Also reads "lawn" and "mud", which follow the ground with mistakes of their own."""

            def __init__(self, model: Net) -> None:
                super().__init__(model)
                self.concepts = [*CONCEPTS, "lawn", "mud"]

            def scores(self, inputs: Tensor) -> Tensor:
                known = super().scores(inputs)
                wrong = (inputs[:, 2, 0, 0] * 1e4 % 1 < 0.2).float()[:, None]
                ground = known[:, 2:4]
                return torch.cat([known, ground * (1 - wrong) + (1 - ground) * wrong], 1)

            presence = scores
            contributions = None  # type: ignore[assignment]

        images, labels = scenes(400, 0)
        audit = audit_dataset(Confused(Net(2.5)), images, labels=labels, class_names=["a", "b"], n_bootstrap=0)
        assert {(s.class_name, s.concept) for s in audit.suspects()} == {("a", "grass"), ("b", "sand")}

    def test_a_second_shortcut_beside_a_stronger_one(self):
        class Two(Net):
            """A mark in channel 2, which has nothing to do with the ground, speaks for class 0 as well."""

            def forward(self, x: Tensor) -> Tensor:
                mark = 1.5 * (x[:, 2].mean((1, 2)) - 0.5)
                return super().forward(x) + torch.stack([mark, -mark], 1)

        class Reads(Truth):
            contributions = None  # type: ignore[assignment]

        images, labels = scenes(400, 0)
        images[:, 2] = (images[:, 2].mean((1, 2)) > 0.5)[:, None, None] * 0.8 + 0.1
        audit = audit_dataset(Reads(Two(2.5)), images, labels=labels, class_names=["a", "b"], n_bootstrap=0)
        found = [(s.class_name, s.concept) for s in audit.suspects()]
        assert set(found) == {("a", "grass"), ("b", "sand"), ("a", "noise")}
        assert found.index(("a", "grass")) < found.index(("a", "noise"))

    def test_what_belongs_to_a_class(self):
        images, labels = scenes(300, 0)
        truth = Truth(Net(2.5))
        for names, belongs, left in [
            (["grass thing", "b"], None, {("b", "sand")}),
            (["grassy thing", "b"], None, {("grassy thing", "grass"), ("b", "sand")}),
            (["a", "b"], {"b": ["sand"]}, {("a", "grass")}),
            (["grass", "b"], {}, {("grass", "grass"), ("b", "sand")}),
        ]:
            audit = audit_dataset(truth, images, labels=labels, class_names=names, belongs=belongs, n_bootstrap=0)
            assert {(s.class_name, s.concept) for s in audit.suspects()} == left
        for wrong, message in (({"c": ["sand"]}, "not among the classes"), ({"a": ["sandy"]}, "sandy")):
            with pytest.raises(InputError, match=message):
                audit_dataset(truth, images, labels=labels, class_names=["a", "b"], belongs=wrong)

    @pytest.mark.parametrize("how", ["never", "raises", "none", "below"])
    def test_presence_that_does_not_say(self, how):
        """Not there, not calibrated, or a softmax over words of which several are there: never above one half."""

        class Unsure(Truth):
            def presence(self, inputs: Tensor) -> Tensor | None:
                if how == "raises":
                    raise InputError("the model is not calibrated; call calibrate(images, labels)")
                return None if how == "none" else self.scores(inputs) / 4

        explainer = Unsure(Net(2.5)) if how != "never" else Truth(Net(2.5), presence=False)
        images, labels = scenes(300, 0)
        audit = audit_dataset(explainer, images, labels=labels, class_names=["a", "b"], n_bootstrap=0)
        assert {(s.class_name, s.concept) for s in audit.suspects()} == {("a", "grass"), ("b", "sand")}
        assert audit.settings["presence"] == "scores split in two groups"

    def test_a_concept_that_is_not_told_apart_is_not_tested(self, tmp_path):
        class Vague(Truth):
            """Between grass and sand there is everything."""

            presence = None  # type: ignore[assignment]

            def scores(self, inputs: Tensor) -> Tensor:
                known = super().scores(inputs)
                g = torch.Generator().manual_seed(0)
                known[:, 3] = 0.3 * known[:, 3] + torch.randn(len(known), generator=g)
                known[:, 4] = torch.randn(len(known), generator=g)
                return known

        images, labels = scenes(300, 0)
        options = {"labels": labels, "class_names": ["a", "b"], "n_bootstrap": 0, "batch_size": 300}
        audit = audit_dataset(Vague(Net(2.5)), images, **options)
        assert audit.not_told_apart == ["sand", "noise"]
        assert audit.rows.presence[:, 3:].isnan().all()
        assert {(s.class_name, s.concept) for s in audit.suspects()} == {("a", "grass")}
        assert not {row["concept"] for row in audit.errors} & {"sand", "noise"}
        assert "not tested" in repr(audit)
        assert "'sand', 'noise'" in repr(audit)
        again = ConceptAudit.load(audit.save(tmp_path / "audit.safetensors"))
        assert again.not_told_apart == audit.not_told_apart
        html = again.report(tmp_path / "audit.html").read_text()
        assert "from images that do not: <bdi>sand</bdi>, <bdi>noise</bdi>." in html
        assert "not separated" in html

        class Blind(Vague):
            def scores(self, inputs: Tensor) -> Tensor:
                return torch.randn(len(inputs), 5, generator=torch.Generator().manual_seed(0))

        with pytest.warns(InputWarning, match="no concept could be tested"):
            assert not audit_dataset(Blind(Net(2.5)), images, **options).suspects()

    def test_without_labels(self):
        images, _ = scenes(40, 0)
        audit = audit_dataset(Truth(Net(1.0)), images, n_bootstrap=10)
        assert audit.accuracy is None
        assert audit.errors == []
        with pytest.raises(InputError, match="require the true classes"):
            audit.suspects()

    def test_without_labels_it_is_kept_and_compared_too(self, tmp_path):
        images, labels = scenes(40, 0)
        options = {"n_bootstrap": 10, "class_names": ["a", "b"]}
        audit = audit_dataset(Truth(Net(1.0)), images, **options)
        again = ConceptAudit.load(audit.save(tmp_path / "audit.safetensors"))
        assert again.labels is None
        assert json.dumps(again.drivers) == json.dumps(audit.drivers)
        labeled = audit_dataset(Truth(Net(0.5)), images, labels=labels, **options)
        for before, after in ((audit, labeled), (labeled, audit)):
            assert compare_audits(before, after, n_bootstrap=10).accuracy is None


class TestNumbers:
    def test_drivers_by_hand(self):
        audit = audited(2.5, n=120, top_k=2)
        rows = audit.rows
        predicted = audit.predicted
        for row in audit.drivers:
            c, t = audit.class_names.index(row["class"]), CONCEPTS.index(row["concept"])
            here = predicted == c
            if row["where"] != "all":
                here &= (predicted == audit.labels) == (row["where"] == "right")
            values = rows.contributions[here, t]
            values = values[~values.isnan()]
            assert row["images"] == int(here.sum())
            assert row["presence_rate"] == pytest.approx(float((rows.presence[here, t] >= 0.5).float().mean()))
            assert row["n"] == len(values)
            if len(values):
                assert row["contribution"] == pytest.approx(float(values.mean()), abs=1e-6)
            if len(values) >= 5:
                assert row["low"] <= row["contribution"] <= row["high"]
        assert (~rows.contributions.isnan()).sum(1).tolist() == [2] * len(rows)

    def test_errors_by_hand(self):
        audit = audited(5.0, n=300)
        labels, predicted = audit.labels.numpy(), audit.predicted.numpy()
        assert audit.accuracy == pytest.approx(float((labels == predicted).mean()))
        first = audit.errors[0]
        assert (first["true"], first["predicted"], first["concept"]) in {("a", "b", "sand"), ("b", "a", "grass")}
        for row in audit.errors:
            y, c = audit.class_names.index(row["true"]), audit.class_names.index(row["predicted"])
            t = CONCEPTS.index(row["concept"])
            wrong = (labels == y) & (predicted == c)
            present = audit.rows.presence.numpy()[:, t] >= 0.5
            assert row["n"] == wrong.sum()
            assert row["presence_rate"] == pytest.approx(present[wrong].mean())
            right = (labels == y) & (predicted == y)
            assert row["expected_rate"] == pytest.approx((present[right].sum() + 0.5) / (right.sum() + 1))
            assert row["lift"] == pytest.approx(row["presence_rate"] / row["expected_rate"])
        assert {row["true"] for row in audit.errors} == {"a", "b"}
        raw = {}
        for row in audit.errors:
            k = round(row["presence_rate"] * row["n"])
            raw[row["true"], row["predicted"], row["concept"]] = binomial_p(k, row["n"], row["expected_rate"])
        assert dict(zip(raw, holm(list(raw.values())), strict=True)) == pytest.approx(
            {(row["true"], row["predicted"], row["concept"]): row["p"] for row in audit.errors}
        )
        assert any(row["p"] != raw[row["true"], row["predicted"], row["concept"]] for row in audit.errors)

    def test_scores_are_split_where_presence_is_unknown(self):
        images, labels = scenes(100, 1)
        audit = audit_dataset(Truth(Net(2.5), presence=False), images, labels=labels, n_bootstrap=10)
        assert audit.settings["presence"] == "scores split in two groups"
        grass = images[:, 1].mean((1, 2)) > 0.5
        assert torch.equal(audit.rows.presence[:, 2] >= 0.5, grass)

    def test_probabilities_close_to_one_are_split_by_their_log_odds(self):
        class Sure(Truth):
            def scores(self, inputs: Tensor) -> Tensor:
                scores = super().scores(inputs)
                ground = inputs[:, 1].mean((1, 2))
                odds = torch.where(ground > 0.5, 9.0, 3.0) + inputs[:, 2].mean((1, 2))
                odds[ground < 0.05] = 1.0  # the one probability of .73 is far from all others, .95 to .9999
                return torch.cat([scores[:, :2], odds.sigmoid()[:, None], scores[:, 3:]], 1)

        images, labels = scenes(100, 1)
        images[0, 1] = 0.0
        audit = audit_dataset(Sure(Net(2.5), presence=False), images, labels=labels, n_bootstrap=10)
        assert torch.equal(audit.rows.presence[:, 2] >= 0.5, images[:, 1].mean((1, 2)) > 0.5)

    def test_the_permutation_test_against_all_permutations(self):
        rng = np.random.default_rng(0)
        values, seen = rng.random(8), np.array([True, True, False, False, False, True, False, True])
        strata = np.array([0, 0, 0, 0, 1, 1, 1, 1])
        observed = stratified_difference(values, seen, strata)
        larger = total = 0
        for first in itertools.combinations(range(4), 2):
            for second in itertools.combinations(range(4, 8), 2):
                other = np.zeros(8, dtype=bool)
                other[[*first, *second]] = True
                total += 1
                larger += stratified_difference(values, other, strata) >= observed - 1e-12
        values = values + np.where(seen, 0.3, 0)  # clear enough to be drawn, not approximated
        observed = stratified_difference(values, seen, strata)
        exact = 0
        for first in itertools.combinations(range(4), 2):
            for second in itertools.combinations(range(4, 8), 2):
                other = np.zeros(8, dtype=bool)
                other[[*first, *second]] = True
                exact += stratified_difference(values, other, strata) >= observed - 1e-12
        drawn = permutation_p(values, seen, strata, np.random.default_rng(1), 20_000)
        assert drawn == pytest.approx(exact / total, abs=4 * math.sqrt(0.25 / 20_000) + 1e-4)

    def test_permutation_p_is_uniform_without_an_effect(self):
        rng = np.random.default_rng(3)
        strata = np.repeat([0, 1, 2], 20)
        p = []
        for _ in range(400):
            seen = np.concatenate([rng.permutation(20) < k for k in (6, 10, 14)])
            p.append(permutation_p(rng.random(60) ** 4 + strata, seen, strata, rng, 400))
        for level in (0.01, 0.05, 0.2):
            rate = np.mean(np.array(p) <= level)
            assert rate <= level + 4 * math.sqrt(level * (1 - level) / 400)
        assert 0.4 < np.mean(p) < 0.6

    def test_permutation_p_of_what_is_clear_is_drawn_by_nobody(self):
        """Where the bound is below the least p, drawing says the same."""
        seen = np.arange(200) % 2 == 0
        values = np.random.default_rng(0).random(200) + 2 * seen
        strata = np.zeros(200, dtype=int)

        class Unused:
            def random(self, size):
                raise AssertionError(size)

        assert permutation_p(values, seen, strata, Unused(), 5000) == 1 / 5001
        draws = np.random.default_rng(1)
        observed = stratified_difference(values, seen, strata)
        assert all(stratified_difference(values, draws.permutation(seen), strata) < observed for _ in range(500))

    def test_partial_effects_are_those_of_least_squares(self):
        rng = np.random.default_rng(0)
        other = rng.random((90, 2)) < 0.5
        seen = np.where(rng.random(90) < 0.7, other[:, 0], rng.random(90) < 0.5)
        values = 0.2 * seen + 0.5 * other[:, 0] + 0.1 * rng.random(90)
        design = np.column_stack([np.ones(90), seen, other]).astype(float)
        expected = np.linalg.lstsq(design, values, rcond=None)[0][1]
        effect, p = partial_effect(values, seen, other, np.zeros(90, dtype=int))
        assert effect == pytest.approx(expected)
        assert p < 1e-6
        assert partial_effect(0.5 * other[:, 0], seen, other, np.zeros(90, dtype=int))[0] == pytest.approx(0)
        assert partial_effect(values, other[:, 1], ~other[:, 1:], np.zeros(90, dtype=int)) is None

    def test_a_concept_that_others_nearly_determine_has_no_partial_effect(self):
        rng = np.random.default_rng(0)
        seen, strata = rng.random(80) < 0.5, np.repeat([0, 1], 40)
        others = np.column_stack([seen + 1e-7 * rng.random(80), rng.random(80)])
        assert partial_effect(rng.random(80), seen, others, strata) is None

    def test_a_tenth_of_a_concept_must_be_its_own(self):
        """What is left of its variance beside the others, against all of it."""
        rng = np.random.default_rng(0)
        seen = np.arange(400) % 2 == 0
        for share in (0.05, 0.15):
            noise = rng.normal(size=400)
            noise -= noise.mean() + (noise @ (seen - 0.5)) / 100 * (seen - 0.5)
            noise *= math.sqrt(100 * share / (1 - share) / (noise @ noise))  # so that this share is left
            other = (seen - 0.5 + noise)[:, None]
            found = partial_effect(rng.random(400), seen, other, np.zeros(400, dtype=int))
            assert (found is None) == (share < 0.1)

    def test_p_of_a_partial_effect(self):
        """Its normal approximation, by a loop over strata and images."""
        rng = np.random.default_rng(1)
        seen, other, strata = rng.random(60) < 0.5, rng.random((60, 1)) < 0.5, np.repeat([0, 1, 2], 20)
        for strength in (0.0, 0.1, -0.1):
            values = strength * seen + 0.2 * other[:, 0] + rng.random(60)
            products, squares = [], []
            for stratum in range(3):
                here = strata == stratum
                known = np.column_stack([np.ones(20), other[here]])
                x, y = (v[here] - known @ np.linalg.pinv(known) @ v[here] for v in (seen.astype(float), values))
                products += list(x * y)
                squares += list(x**2)
            z = sum(products) / math.sqrt(sum(value**2 for value in products))
            effect, p = partial_effect(values, seen, other, strata)
            assert effect == pytest.approx(sum(products) / sum(squares))
            assert p == pytest.approx(1 - 0.5 * (1 + math.erf(z / math.sqrt(2))), abs=1e-12)
            assert 1e-4 < p < 1 - 1e-4

    def test_one_or_two_values_are_split(self):
        for values, above in (([], []), ([2.0], [False]), ([2.0, 1.0], [True, False])):
            assert split_scores(np.array(values))[0].tolist() == above

    def test_holm_binomial_and_split(self):
        assert holm([]) == []
        assert holm([0.2, 0.01]) == [0.2, 0.02]
        assert binomial_p(0, 5, 0.3) == pytest.approx(1)
        assert binomial_p(2, 3, 0.5) == pytest.approx(0.5)
        assert (binomial_p(1, 3, 0.0), binomial_p(0, 3, 0.0), binomial_p(3, 3, 1.0)) == (0, 1, 1)
        assert split_scores(np.array([3.0, 3.0]))[0].tolist() == [0, 0]
        above, separation = split_scores(np.array([0.0, 0.1, 0.05, 5.0, 5.2]))
        assert above.tolist() == [0, 0, 0, 1, 1]
        assert 0.99 < separation < 1


class TestRuns:
    def test_a_killed_audit_resumes_with_the_same_bytes(self, tmp_path):
        whole = audited(2.5, n=600, store_path=tmp_path / "whole").save(tmp_path / "whole.safetensors")
        images, labels = scenes(600, 0)
        calls = []

        class Killed(Truth):
            def explain(self, inputs, *args, **kwargs):
                calls.append(len(inputs))
                if sum(calls) > 300:
                    raise KeyboardInterrupt
                return super().explain(inputs, *args, **kwargs)

        options = {"labels": labels, "n_bootstrap": 100, "class_names": ["a", "b"], "store_path": tmp_path / "parts"}
        with pytest.raises(KeyboardInterrupt):
            audit_dataset(Killed(Net(2.5)), images, **options)
        assert [path.name for path in (tmp_path / "parts").iterdir()] == ["part-000000.safetensors"]
        saved = audit_dataset(Truth(Net(2.5)), images, **options).save(tmp_path / "resumed.safetensors")
        assert saved.read_bytes() == whole.read_bytes()

    def test_two_processes_say_what_one_says(self, tmp_path):
        whole = audited(2.5, n=600, store_path=tmp_path / "whole").save(tmp_path / "whole.safetensors")
        torch.multiprocessing.spawn(_audited_by_two, args=(str(tmp_path),), nprocs=2)
        for rank in range(2):
            assert (tmp_path / f"rank{rank}.safetensors").read_bytes() == whole.read_bytes()

    def test_asked_once_for_everything(self):
        """Methods that explain all concepts at once: one pass, and the numbers of separate calls."""
        g = torch.Generator().manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(6, 2),
        )  # fmt: skip
        images = torch.rand(12, 3, 8, 8, generator=g)
        acv = SpatialACV(net, "2").fit({"dark": images * 0.3, "light": 1 - images * 0.3, "red": images * 0.5})
        salf = SALFCBM(net, "2", ["dark", "light", "red"], num_classes=2).eval()
        passes = []
        net.register_forward_hook(lambda *_: passes.append(1))
        for explainer in (acv, salf, discover_concepts(net, "1", images, n_concepts=3)):
            first = look(explainer, images[:2], 1)
            passes.clear()
            rows = look(explainer, images, 1)
            assert len(passes) <= 1, explainer
            assert torch.equal(rows.digests[:2], first.digests)
            model = explainer if explainer is salf else net
            torch.testing.assert_close(rows.probabilities, model(images).softmax(1).detach())
            torch.testing.assert_close(rows.scores, explainer.scores(images).detach().float())
            assert (~rows.contributions.isnan()).sum(1).tolist() == [1] * 12
            chosen = explainer.explain(images, target=rows.probabilities.argmax(1).tolist(), top_k=1)
            columns = [list(explainer.concepts).index(name) for name in chosen.concepts]
            torch.testing.assert_close(rows.contributions[:, columns], chosen.contributions.float(), equal_nan=True)

    def test_a_model_in_half_precision(self):
        net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
        salf = SALFCBM(net, "1", ["dark", "light", "red"], num_classes=2).eval()
        images = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        expected = look(salf, images, 1).probabilities
        found = look(salf.bfloat16(), images.bfloat16(), 1).probabilities
        torch.testing.assert_close(found, expected, atol=8 * 2**-8, rtol=0)  # a few roundings of logits about 1

    def test_classes_that_do_not_exclude_each_other_are_refused(self):
        net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
        salf = SALFCBM(net, "1", ["dark", "light"], num_classes=2, multi_label=True).eval()
        with pytest.raises(InputError, match="multi_label=True"):
            audit_dataset(salf, torch.rand(12, 3, 8, 8), labels=[0, 1] * 6)

    def test_two_classes_of_one_name(self):
        audit = audited(2.5, class_names=["crane", "crane"])
        assert audit.class_names == ["crane (0)", "crane (1)"]
        expected = audited(2.5)
        assert [(s.class_name[-2], s.concept, s.effect) for s in audit.suspects()] == [
            (str("ab".index(s.class_name)), s.concept, s.effect) for s in expected.suspects()
        ]
        images, _ = scenes(20, 0)
        with pytest.raises(InputError, match="name of 2 classes"):
            audit_dataset(Truth(Net(2.5)), images, labels=["crane"] * 20, class_names=["crane", "crane"])

    @pytest.mark.parametrize("stored", [False, True])
    def test_each_image_is_read_once(self, tmp_path, stored):
        """And a few again: the first, those of suspects. Also those whose rows are there: they may be others by now."""
        images, labels = scenes(600, 0)
        reads = []

        class Reading(torch.utils.data.Dataset):
            def __len__(self):
                return len(images)

            def __getitem__(self, i):
                reads.append(i)
                return images[i]

        options = {"labels": labels, "n_bootstrap": 0, "store_path": tmp_path if stored else None}
        audit = audit_dataset(Truth(Net(2.5)), Reading(), **options)
        few = 80 * len(audit.suspects())
        assert len(reads) <= 600 + few
        reads.clear()
        audit_dataset(Truth(Net(2.5)), Reading(), **options)
        assert len(reads) <= 600 + few

    def test_an_image_that_has_changed_since_is_noticed(self, tmp_path):
        """Wherever in its part it is."""
        images, labels = scenes(40, 0)
        options = {"labels": labels, "n_bootstrap": 0, "store_path": tmp_path}
        audit_dataset(Truth(Net(2.5)), images, **options)
        for k in (0, 17, 39):
            changed = images.clone()
            changed[k, 1] = 1 - changed[k, 1]
            with pytest.raises(ArtifactError, match=f"image {k} has different pixels|belongs to another audit"):
                audit_dataset(Truth(Net(2.5)), changed, **options)

    def test_another_audit_is_refused(self, tmp_path):
        audited(2.5, n=20, store_path=tmp_path)
        with pytest.raises(ArtifactError, match="with different "):
            audited(2.5, n=20, seed=1, store_path=tmp_path)
        with pytest.raises(ArtifactError, match="with different probe"):  # another model
            audited(1.0, n=20, store_path=tmp_path)
        images, labels = scenes(20, 0)
        images[19] += 0.1
        with pytest.raises(ArtifactError, match="image 19 has different pixels"):
            audit_dataset(
                Truth(Net(2.5)), images, labels=labels, class_names=["a", "b"], n_bootstrap=100, store_path=tmp_path
            )

    def test_what_kernels_make_of_a_number_is_no_other_audit(self, tmp_path):
        folder = tmp_path / "new" / "parts"
        audited(2.5, n=20, store_path=folder)
        part = folder / "part-000000.safetensors"
        before = part.stat().st_mtime_ns
        audited(2.5 * (1 + 2e-5), n=20, store_path=folder)  # goes on with the part
        assert part.stat().st_mtime_ns == before
        with pytest.raises(ArtifactError, match="with different probe"):
            audited(2.5 * 1.05, n=20, store_path=folder)

    def test_the_default_dtype_does_not_matter(self):
        images, labels = scenes(60, 0)
        explainer = Truth(Net(2.5))
        expected = audit_dataset(explainer, images, labels=labels, n_bootstrap=0)
        torch.set_default_dtype(torch.float64)
        try:
            found = audit_dataset(explainer, images, labels=labels, n_bootstrap=0)
        finally:
            torch.set_default_dtype(torch.float32)
        assert repr(found) == repr(expected)

    def test_it_prints_nothing_unless_asked(self, capsys):
        audited(2.5, n=20)
        assert capsys.readouterr() == ("", "")
        audited(2.5, n=20, show_progress=True)
        assert "audit: 100%" in capsys.readouterr().err

    def test_results_do_not_depend_on_batches(self):
        one, other = audited(2.5, n=90, batch_size=90), audited(2.5, n=90, batch_size=7)
        assert one.drivers == other.drivers
        assert one.errors == other.errors

    def test_saved_loaded_and_forged(self, tmp_path):
        audit = audited(2.5)
        path = audit.save(tmp_path / "audit.safetensors")
        again = ConceptAudit.load(path)
        assert again.suspects() == audit.suspects()
        assert json.dumps(again.drivers) == json.dumps(audit.drivers)
        assert again.errors == audit.errors
        assert torch.equal(again.maps, audit.maps)
        assert torch.equal(again.labels, audit.labels)
        path.write_bytes(path.read_bytes()[:300])
        with pytest.raises(ArtifactError):
            ConceptAudit.load(path)

    def test_frames(self):
        audit = audited(2.5)
        for kind in ("drivers", "errors", "suspects", "images"):
            records = audit.to_records(kind)
            assert records
            frame = audit.to_frame(kind)
            assert list(frame["concept"]) == [record["concept"] for record in records]
        assert {"class", "concept", "effect", "p", "confirmed"} <= set(audit.to_records("suspects")[0])
        with pytest.raises(InputError, match="kind must be one of"):
            audit.to_frame("words")

    def test_the_page(self, tmp_path):
        images, _ = scenes(200, 0)
        audit = audited(2.5, class_names=["<b>a", "b"])
        path = audit.report(tmp_path / "audit.html", images.clamp(0, 1), title="<script>")
        html = path.read_text()
        assert audit.maps.shape == (2, 12, 2, 2)
        suspect = audit.suspects()[1]
        here = Truth(Net(2.5)).concept_maps(images[list(suspect.counterexamples)], [suspect.concept])
        torch.testing.assert_close(audit.maps[1, 6 : 6 + len(here)], here[:, 0])
        assert "and its map" in html
        assert "<script" not in html
        assert "<b>a" not in html
        assert html.count("confirmed by ablation") == 2
        assert html.count("data:image/") >= 6
        assert "predicted as" in audited(5.0).report(tmp_path / "plain.html").read_text()
        bare = replace(audit, settings={})  # a file may lack them
        assert "Presence: –" in bare.report(tmp_path / "bare.html", images.clamp(0, 1)).read_text()
        with pytest.raises(InputError, match="3 images for an audit of 200"):
            audit.report(tmp_path / "x.html", images[:3].clamp(0, 1))

    def test_the_confusions_of_the_page(self, tmp_path):
        audit = audited(5.0, n=300)
        html = audit.report(tmp_path / "audit.html").read_text()
        table = html[html.index('<table class="confusion">') :].split("</table>")[0]
        cells = re.findall(r'<td class="(right|wrong|)">(\d*)(.*?)</td>', table)
        counts = torch.zeros(2, 2, dtype=torch.long)
        for y, c in zip(audit.labels.tolist(), audit.predicted.tolist(), strict=True):
            counts[y, c] += 1
        assert [int(count or 0) for _, count, _ in cells] == counts.flatten().tolist()
        assert [kind for kind, _, _ in cells] == ["right", "wrong", "wrong", "right"]
        for place, (true, predicted) in ((1, ("a", "b")), (2, ("b", "a"))):
            lifted = [
                row["concept"]
                for row in audit.errors
                if (row["true"], row["predicted"]) == (true, predicted) and row["p"] < 0.05
            ]
            assert lifted
            assert re.findall("<bdi>(.*?)</bdi>", cells[place][2]) == lifted[:3]

    @pytest.mark.parametrize(("classes", "shown"), [(3, True), (40, True), (41, False)])
    def test_more_classes_than_two(self, classes, shown, tmp_path):
        """A table of confusions is read up to 40 classes."""

        class More(Net):
            def forward(self, x: Tensor) -> Tensor:
                return torch.nn.functional.pad(super().forward(x), (0, classes - 2), value=-9.0)

        images, labels = scenes(60, 0)
        audit = audit_dataset(Truth(More(5.0)), images, labels=labels, n_bootstrap=0)
        assert audit.rows.probabilities.shape == (60, classes)
        assert ('<h2 id="confusion">' in audit.report(tmp_path / "audit.html").read_text()) is shown

    @pytest.mark.parametrize("channels", [1, 2, 4])
    def test_the_page_of_images_that_are_not_rgb(self, channels, tmp_path):
        """One and two channels are shown by their first, four by three of them."""
        images, _ = scenes(200, 0)
        audit = audited(2.5)
        shown = images.clamp(0, 1)[:, :1].repeat(1, channels, 3, 3)
        pages = [
            re.findall(
                r"data:image/[^\"]+", audit.report(tmp_path / f"{k}.html", open_images(given, mode="any")).read_text()
            )
            for k, given in enumerate((shown, shown[:, :1].expand(-1, 3, -1, -1)))
        ]
        assert pages[0] == pages[1]
        assert len(pages[0]) >= 6


class TestComparison:
    def test_what_a_repaired_model_lost(self):
        before, after = audited(2.5), audited(0.0)
        change = compare_audits(before, after, n_bootstrap=200)
        assert {(s.class_name, s.concept) for s in change.lost} == {("a", "grass"), ("b", "sand")}
        assert change.gained == change.kept == []
        value, low, high = change.accuracy_change
        assert value == pytest.approx(change.accuracy[1] - change.accuracy[0])
        assert low <= value <= high
        assert {row["concept"] for row in change.changes if row["p"] < 0.05} >= {"grass", "sand"}
        assert all(row["before"] == row["after"] or math.isnan(row["before"]) for row in change.presence)
        assert "suspects lost: 2" in repr(change)
        same = compare_audits(before, before)
        assert same.gained == same.lost == []
        assert all(row["change"] == 0 and row["p"] == 1 for row in same.changes)
        assert len({change, same}) == 2  # by identity: their tables cannot be hashed

    def test_the_order_of_images_does_not_matter(self):
        images, labels = scenes(200, 0)
        options = {"n_bootstrap": 0, "class_names": ["a", "b"]}
        there = audit_dataset(Truth(Net(2.5)), images, labels=labels, **options)
        back = audit_dataset(Truth(Net(2.5)), images.flip(0), labels=labels.flip(0), **options)
        change = compare_audits(there, back, n_bootstrap=0)
        assert all(row["change"] == pytest.approx(0, abs=1e-6) for row in change.changes)
        with pytest.raises(InputError, match="n_bootstrap must be an integer of at least 0, got -1"):
            compare_audits(there, back, n_bootstrap=-1)

    def test_other_images_classes_or_concepts(self):
        one = audited(2.5, n=40)
        with pytest.raises(InputError, match="different images: 80"):
            compare_audits(one, audited(2.5, n=40, seed=1))
        with pytest.raises(InputError, match="different class_names"):
            compare_audits(one, audited(2.5, n=40, class_names=["a", "c"]))


@ending_at_once
def _audited_by_two(rank: int, folder: str) -> None:
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    audited(2.5, n=600, store_path=f"{folder}/parts").save(f"{folder}/rank{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


IMAGES, LABELS = scenes(8, 0)


@pytest.mark.parametrize(
    ("explainer", "changes", "error", "message"),
    [
        (Truth(Net(1.0)), {"labels": [0, 1]}, InputError, "label"),
        (Truth(Net(1.0)), {"labels": [5] * 8}, InputError, "label 5 is out of range"),
        (Truth(Net(1.0)), {"labels": ["a"] * 8}, InputError, "label 'a' is not the name of a class.*class_names"),
        (Truth(Net(1.0)), {"class_names": ["a"]}, InputError, "1 class_names for a model with 2"),
        (Truth(Net(1.0)), {"alpha": 0}, InputError, "alpha must be"),
        (Truth(Net(1.0)), {"min_effect": 2}, InputError, "min_effect must be"),
        (Truth(Net(1.0)), {"top_k": 0}, InputError, "top_k must be"),
        (Truth(Net(1.0)), {"seed": -1}, InputError, "seed must be"),
        (Truth(Net(1.0)), {"seed": "1"}, InputError, "seed must be"),
        (object(), {}, InputError, "explainer must have"),
    ],
)
def test_wrong_input(explainer, changes, error, message):
    with pytest.raises(error, match=message):
        audit_dataset(explainer, IMAGES, **{"labels": LABELS, **changes})


def test_wrong_input_of_a_comparison():
    one = audit_dataset(Truth(Net(1.0)), IMAGES, labels=LABELS, n_bootstrap=0)
    with pytest.raises(InputError, match="seed must be"):
        compare_audits(one, one, seed=-1)
    with pytest.raises(InputError, match="after must be a ConceptAudit, got str"):
        compare_audits(one, "audit.safetensors")


def test_a_model_that_is_no_classifier():
    explainer = Truth(Net(1.0))
    explainer.forward_func = lambda x: x.mean((1, 2, 3))
    with pytest.raises(InputError, match="needs a classifier"):
        audit_dataset(explainer, IMAGES, labels=LABELS)
    explainer.forward_func = lambda x: x.mean((1, 2, 3))[:, None]
    with pytest.raises(InputError, match=r"needs a classifier with outputs \(N, classes\), got \(1, 1\)"):
        audit_dataset(explainer, IMAGES, labels=LABELS)


class TestProbabilities:
    def build(self, last: nn.Module):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3), last)
        x = torch.rand(12, 3, 8, 8)
        return SpatialACV(net.eval(), "0").fit({"dark": x * 0.1, "light": x}), x

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_of_a_model_that_ends_in_a_softmax(self, dtype):
        """Rounded to half precision, they do not sum to 1 exactly."""
        explainer, x = self.build(nn.Softmax(1))
        x = x * torch.linspace(1, 40, 12)[:, None, None, None]
        expected = explainer.forward_func(x).detach()
        explainer.forward_func.to(dtype)
        found = audit_dataset(explainer, x.to(dtype), labels=[0, 1, 2] * 4, n_bootstrap=0).rows.probabilities
        torch.testing.assert_close(found, expected, atol=0.03, rtol=0)

    def test_of_independent_labels_are_refused(self):
        explainer, x = self.build(nn.Sigmoid())
        with pytest.raises(InputError, match="ends in a sigmoid"):
            audit_dataset(explainer, x, labels=[0, 1, 2] * 4)
        explainer, x = self.build(nn.Identity())
        explainer.class_probability = "sigmoid"
        with pytest.raises(InputError, match="class_probability='sigmoid'"):
            audit_dataset(explainer, x, labels=[0, 1, 2] * 4)


def test_a_comparison_says_how_many_predictions_changed():
    """Contributions are to the predicted class, so a changed prediction changes them without any concept's doing."""
    before, after = audited(2.5, n=120), audited(0.0, n=120)
    alike = (before.predicted == after.predicted).double()
    for row in compare_audits(before, after, n_bootstrap=0).changes:
        of_class = before.labels == before.class_names.index(row["class"])
        assert row["n"] == int(of_class.sum())
        assert row["agree"] == pytest.approx(float(alike[of_class].mean()))
    assert {row["agree"] for row in compare_audits(before, before, n_bootstrap=0).changes} == {1.0}
