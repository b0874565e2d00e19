"""Edits for one call and for good, models without concepts, and whether the names can be believed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from salf_networks import CONCEPTS, conv_model, pictures, slow_activations, slow_maps
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from captum_concepts.errors import InputError, TargetError
from captum_concepts.models.salf_cbm import SALFCBM
from captum_concepts.models.salf_cbm.fit import fit_head, refit_head, relax_head
from captum_concepts.models.salf_cbm.presence import fit_presence


class TestRegionsAfterAnEdit:
    @pytest.mark.parametrize("units", ["map", "std"])
    def test_the_edited_maps_pixel_by_pixel(self, units):
        """Figure 7: the map is edited where the mask is, then the region is explained again."""
        model, x = conv_model(), pictures(2, 28, 28)
        mask = torch.zeros(28, 28, dtype=torch.bool)
        mask[4:16, 8:24] = True
        beta, m = 1.5, 3
        large = F.interpolate(slow_maps(model, x), (28, 28), mode="bilinear", align_corners=False)
        large[:, m] += beta * (model.concept_std[m] if units == "std" else 1.0) * mask
        inside = large[:, :, mask].mean(2)
        logits = model.head((large.mean((2, 3)) - model.concept_mean) / model.concept_std).detach()
        before, after, regions = model.intervene(x, m, beta=beta, units=units, mask=mask, return_regions=True)
        torch.testing.assert_close(before, model(x).detach())
        torch.testing.assert_close(after, logits, atol=1e-5, rtol=1e-4)
        expected = (inside - model.concept_mean) / model.concept_std
        torch.testing.assert_close(regions[:, CONCEPTS].scores, expected, atol=1e-4, rtol=1e-4)
        assert regions.target.tolist() == after.argmax(1).tolist()
        whole, edited = (
            model.explain_region(x, after.argmax(1), mask=mask, top_k=None)[:, CONCEPTS], regions[:, CONCEPTS]
        )  # fmt: skip
        others = [c for c in range(5) if c != m]
        torch.testing.assert_close(edited.scores[:, others], whole.scores[:, others])
        torch.testing.assert_close(edited.contributions[:, others], whole.contributions[:, others])
        moved = edited.contributions[:, m] - whole.contributions[:, m]
        change = (after - before).gather(1, after.argmax(1)[:, None])[:, 0]
        torch.testing.assert_close(moved, change, atol=1e-5, rtol=1e-4)  # all of the edit lies in the region
        # The map on the grid: one cell is 4 x 4 pixels.
        step = beta * (float(model.concept_std[m]) if units == "std" else 1.0)
        covered = F.avg_pool2d(mask[None, None].float(), 4)[0, 0]
        torch.testing.assert_close(edited.maps[:, m] - whole.maps[:, m], (step * covered).expand(2, -1, -1))

    def test_edits_with_regions_of_their_own_are_explained_together(self):
        model, x = conv_model(), pictures(1, 28, 28)
        edits = [
            {"concept": "grass", "beta": 2.0, "boxes": (0, 0, 8, 8)},
            {"concept": "wheels", "beta": -1.0, "boxes": (12, 12, 20, 28), "units": "std"},
        ]
        _, _, regions = model.intervene(x, edits, units="map", return_regions=True)
        both = torch.zeros(28, 28)
        both[:8, :8] = both[12:28, 12:20] = 1
        before = model.explain_region(x, mask=both, top_k=None)[:, CONCEPTS].scores
        moved = regions[:, CONCEPTS].scores - before
        share = 64 / float(both.sum()), 128 / float(both.sum())
        expected = torch.zeros(1, 5)
        expected[0, 2] = 2.0 * share[0] / model.concept_std[2]
        expected[0, 1] = -share[1]
        torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-4)

    def test_units_must_be_said(self):
        model, x = conv_model(), pictures()
        with pytest.raises(InputError, match=r"needs units=: 'map' adds beta.*formerly standardize=True"):
            model.intervene(x, "grass", beta=1.0)
        with pytest.raises(InputError, match="units must be one of 'map', 'std'"):
            model.intervene(x, "grass", beta=1.0, units="sigma")
        edit = {"concept": "grass", "beta": 1.0, "units": "std"}
        assert torch.equal(model.intervene(x, [edit])[1], model.intervene(x, "grass", beta=1.0, units="std")[1])


class TestWithEdits:
    def test_rules_are_set_and_raised_in_a_copy(self):
        model, x = conv_model(metadata={"a": 1}), pictures()
        old = copy.deepcopy(model.state_dict())
        edits = [
            {"target": "car", "concept": "wheels", "weight": 2.5},
            {"target": 0, "concept": 2, "add": -0.25},
        ]
        new = model.with_edits(edits)
        assert all(torch.equal(v, old[n]) for n, v in model.state_dict().items())
        assert new.backbone is model.backbone
        weight = old["head.weight"].clone()
        weight[1, 1] = 2.5
        weight[0, 2] -= 0.25
        torch.testing.assert_close(new.head.weight.detach(), weight)
        expected = slow_activations(model, x) @ weight.T + old["head.bias"]
        torch.testing.assert_close(new(x).detach(), expected, atol=1e-5, rtol=1e-4)
        first, second = new.metadata["edits"]
        assert (first["target"], first["concept"], first["after"]) == ("car", "wheels", 2.5)
        assert second["after"] == pytest.approx(second["before"] - 0.25)
        again = new.with_edits([{"target": 0, "concept": "grass", "weight": 0}])
        assert len(again.metadata["edits"]) == 3
        assert "grass" not in dict(again.decision_rules(0))
        assert model.metadata == {"a": 1}

    @pytest.mark.parametrize(
        ("edits", "message"),
        [
            ([], "no edit"),
            ({"target": 0, "concept": 0, "weight": 1}, "list of dictionaries"),
            (["grass"], "must be a dictionary"),
            ([{"target": 0, "concept": 0}], "either weight or add"),
            ([{"target": 0, "concept": 0, "weight": 1, "add": 1}], "either weight or add"),
            ([{"concept": 0, "weight": 1}], "needs target"),
            ([{"target": 0, "concept": "gras", "weight": 1}], "Did you mean 'grass'"),
            ([{"target": 0, "concept": ["grass", "wheels"], "weight": 1}], "one concept"),
            ([{"target": 0, "concept": 0, "weight": math.nan}], "finite"),
            ([{"target": 0, "concept": 0, "beta": 1.0}], "hold for one call of intervene only"),
        ],
    )
    def test_bad(self, edits, message):
        with pytest.raises(InputError, match=message):
            conv_model().with_edits(edits)

    def test_no_such_class(self):
        with pytest.raises(TargetError, match="Did you mean 'car'"):
            conv_model().with_edits([{"target": "cars", "concept": 0, "weight": 1.0}])


class TestWithout:
    @pytest.mark.parametrize("removed", ["grass", ["grass"], 2, torch.tensor([2]), [False, False, True, False, False]])
    def test_the_others_decide_as_before(self, removed):
        model, x = conv_model(), pictures()
        part = model.without(removed)
        assert part.concepts == [c for c in CONCEPTS if c != "grass"]
        kept = [0, 1, 3, 4]
        expected = slow_activations(model, x)[:, kept] @ model.head.weight[:, kept].T + model.head.bias
        torch.testing.assert_close(part(x), expected, atol=1e-5, rtol=1e-4)
        assert "grass" not in dict(part.decision_rules("cat"))

    @pytest.mark.parametrize(
        "copied",
        [
            lambda model: model.without("grass"),
            lambda model: model.select_concepts([0, 1]),
            lambda model: model.with_edits([{"target": "cat", "concept": 0, "weight": 1.0}]),
        ],
        ids=["without", "select_concepts", "with_edits"],
    )
    def test_the_shared_backbone_is_left_as_it_is(self, copied):
        model = conv_model()
        model.backbone.stem[1].double().requires_grad_(True)  # mixed precision, and a part that the user trains
        model.backbone.stem[1].train()

        def state():
            parameters = {n: (p.dtype, p.requires_grad, p.data_ptr()) for n, p in model.backbone.named_parameters()}
            return parameters, {n: m.training for n, m in model.backbone.named_modules()}

        before = state()
        new = copied(model)
        assert state() == before
        assert new.freeze_backbone
        assert new.backbone is model.backbone

    def test_a_head_without_a_bias(self):
        model, x = conv_model(), pictures()
        weight = model.head.weight
        model.head = torch.nn.Linear(*reversed(weight.shape), bias=False)
        model.head.weight = weight
        torch.testing.assert_close(model.select_concepts(list(range(5)))(x), model(x))

    def test_a_bottleneck_of_ones_own_is_not_copied_in_part(self):
        model = conv_model()
        model.bottleneck = torch.nn.Conv2d(model.feature_dim, len(CONCEPTS), 1)
        with pytest.raises(InputError, match="without a bias"):
            model.without("grass")

    def test_bad(self):
        with pytest.raises(InputError, match="would remove all"):
            conv_model().without(CONCEPTS)
        with pytest.raises(InputError, match="Did you mean 'grass'"):
            conv_model().without("gras")

    def test_rules_fitted_again(self):
        model, x = conv_model(), pictures(90)
        values = model.scores(x)[:, 1].contiguous()
        labels = torch.bucketize(values, values.quantile(torch.tensor([0.3, 0.7])))
        part = model.without("grass")
        new = refit_head(part, x, labels, head="dense")
        assert (new(x).argmax(1) == labels).float().mean() > 0.9
        activations = new.scores(x)
        torch.testing.assert_close(activations.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(activations.std(0, correction=0), torch.ones(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(new.concept_maps(x), part.concept_maps(x))
        assert new.metadata["head"]["converged"]
        with pytest.raises(InputError, match="3 labels for 90 images"):
            refit_head(part, x, [0, 1, 0])
        for columns in (2, 4):
            with pytest.raises(InputError, match=rf"must be \(N,\) class indices or names, got \(90, {columns}\)"):
                refit_head(part, x, torch.ones(90, columns))
            with pytest.raises(InputError, match=rf"\(N, 3\), one column per class, got \(90, {columns}\)"):
                fit_head(values[:, None], torch.ones(90, columns), 3)
        named = refit_head(part, x, [model.class_names[int(label)] for label in labels], head="dense")
        assert torch.equal(named.head.weight, new.head.weight)
        with pytest.raises(TargetError, match="Did you mean 'car'"):
            refit_head(part, x, ["cars"] * 90)
        with pytest.raises(InputError, match="must be class indices or names, got None"):
            refit_head(part, x, None)
        for options in ({"nonzeros_per_class": "3"}, {"class_weights": {0: 1.0}}):
            with pytest.raises(InputError, match=next(iter(options))):
                refit_head(part, x, labels, **options)
        similarities = {f"{kind}_similarity": dict.fromkeys(CONCEPTS, 0.5) for kind in ("validation", "pooled")}
        model.metadata |= {"accuracy": {"validation": 0.9}, **similarities}
        assert not {"accuracy", "head"} & set(new.without("wheels").metadata)
        for name in similarities:
            assert list(model.without("grass").metadata[name]) == [c for c in CONCEPTS if c != "grass"]


class TestRelaxedRules:
    def model(self, **options):
        model, x = conv_model(**options), pictures(90)
        values = model.scores(x)[:, 1].contiguous()
        labels = torch.bucketize(values, values.quantile(torch.tensor([0.3, 0.7])))
        if model.multi_label:
            labels = (labels[:, None] == torch.arange(3)).long()
        return refit_head(model, x, labels, nonzeros_per_class=2), x, labels

    @pytest.mark.parametrize("multi_label", [False, True])
    @pytest.mark.parametrize("balanced", [False, True])
    def test_the_same_concepts_and_the_best_weights(self, multi_label, balanced):
        """Against a plain descent over the selected weights and the biases."""
        model, x, labels = self.model(multi_label=multi_label)
        weights = torch.tensor([1.0, 2.0, 0.5]).double() if balanced else torch.ones(3).double()
        new = relax_head(model, x, labels, lam=0.01, class_weights=weights.tolist() if balanced else None, tol=1e-7)
        chosen = model.head.weight != 0
        assert torch.equal(new.head.weight != 0, chosen)
        a = model.scores(x).double()
        torch.testing.assert_close(new.scores(x).double(), a)

        def loss(weight, bias):
            logits = a @ (weight * chosen).T + bias
            if multi_label:  # one problem per class
                each = torch.where(labels > 0, weights, 1.0)
                terms = F.binary_cross_entropy_with_logits(logits, labels.double(), reduction="none")
                value = ((each * terms).sum(0) / each.sum(0)).sum()
            else:
                value = F.cross_entropy(logits, labels, weights)
            return value + 0.005 * (weight * chosen).square().sum()

        free = [torch.zeros(3, 5).double().requires_grad_(), torch.zeros(3).double().requires_grad_()]
        descent = torch.optim.LBFGS(free, max_iter=2000, tolerance_grad=1e-9, tolerance_change=0)

        def closure():
            descent.zero_grad()
            value = loss(*free)
            value.backward()
            return value

        descent.step(closure)
        found = float(loss(new.head.weight.detach().double(), new.head.bias.detach().double()))
        assert found == pytest.approx(float(loss(*free).detach()), abs=1e-5)
        assert found < float(loss(model.head.weight.detach().double(), model.head.bias.detach().double())) - 0.01
        assert new.metadata["head"]["objective"] == pytest.approx(found, abs=1e-5)
        assert new.metadata["head"]["converged"]

    def test_nothing_else_changes(self, tmp_path):
        model, x, labels = self.model()
        model.metadata["accuracy"] = {"validation": 0.9}
        before = model.head.weight.clone()
        new = relax_head(model, x, [model.class_names[int(label)] for label in labels])
        assert torch.equal(model.head.weight, before)
        torch.testing.assert_close(new.concept_maps(x), model.concept_maps(x))
        assert "accuracy" not in new.metadata
        new.save_pretrained(tmp_path)
        assert SALFCBM.from_pretrained(tmp_path, backbone=model.backbone).metadata["head"]["relaxed"] == 90

    def test_bad(self):
        model, x, labels = self.model()
        with pytest.raises(InputError, match="lam must be a positive number; got 0"):
            relax_head(model, x, labels, lam=0)
        with pytest.raises(InputError, match="3 labels for 90 images"):
            relax_head(model, x, labels[:3])
        with pytest.raises(InputError, match="class_weights must be 3 positive numbers"):
            relax_head(model, x, labels, class_weights=[1.0])
        with pytest.raises(InputError, match=r"must be \(N,\) class indices or names, got \(90, 3\)"):
            relax_head(model, x, torch.ones(90, 3))
        dense = refit_head(model, x, labels, head="dense")
        with pytest.raises(InputError, match="no weight of this head is zero; use refit_head"):
            relax_head(dense, x, labels)


def labels_for(model, x, seed=0):
    """Concepts that are there with a probability that grows with their activation."""
    activations = model.scores(x)
    chance = torch.sigmoid(2 * (activations - activations.mean(0)) / activations.std(0) - 0.5)
    return torch.rand(chance.shape, generator=torch.Generator().manual_seed(seed)) < chance


class TestPresence:
    def test_it_is_calibrated_and_saved(self, tmp_path):
        model, x = conv_model(), pictures(400)
        assert model.explain(x[:2]).presence is None
        assert "unknown" in model.trust
        with pytest.raises(InputError, match="not calibrated"):
            model.presence(x)
        labels = labels_for(model, x)
        assert model.calibrate(x, labels) is model
        presence, other = model.presence(x), labels_for(model, x, seed=1)
        assert ((presence >= 0) & (presence <= 1)).all()
        constant = labels.float().mean(0)
        brier, worst = (presence - other.float()).square().mean(), (constant - other.float()).square().mean()
        assert brier < worst - 0.01
        for low, high in ((0.0, 0.3), (0.3, 0.6), (0.6, 1.0)):  # of what is said with p, p are there
            said = (presence >= low) & (presence < high)
            assert abs(float(other[said].float().mean()) - float(presence[said].mean())) < 0.06
        explanation = model.explain(x[:3], top_k=2)
        columns = [CONCEPTS.index(c) for c in explanation.concepts]
        torch.testing.assert_close(explanation.presence, presence[:3, columns])
        model.save_pretrained(tmp_path)
        again = SALFCBM.from_pretrained(tmp_path, backbone=model.backbone)
        assert torch.equal(again.presence(x), presence)
        assert again.reliability_ == model.reliability_
        assert again.trust == model.trust
        assert model.trust in repr(model)
        assert "Trust: " in (tmp_path / "README.md").read_text()
        two = model.select_concepts(["grass", 0]).presence(x)  # another convolution: sums may round otherwise
        torch.testing.assert_close(two, presence[:, [2, 0]], atol=1e-5, rtol=1e-5)

    def test_reliability_is_the_area_under_the_curve(self):
        model, x = conv_model(), pictures(60)
        labels = labels_for(model, x)
        labels[:, 4] = False
        model.calibrate(x, labels)
        for j, name in enumerate(CONCEPTS[:4]):
            one = model.reliability_[name]
            expected = roc_auc_score(labels[:, j].numpy(), model.scores(x)[:, j].numpy())
            assert one.agreement == pytest.approx(expected)
            assert 0 <= one.low < one.agreement < one.high <= 1
            assert (one.positives, one.images) == (int(labels[:, j].sum()), 60)
        assert math.isnan(model.reliability_["windows"].agreement)
        assert float(model.presence(x)[:, 4].max()) < 0.2  # never seen, so hardly ever said
        assert "on 60 held-out images" in model.trust

    def test_concepts_no_better_than_chance_are_named(self):
        model, x = conv_model(), pictures(80)
        labels = torch.rand(80, 5, generator=torch.Generator().manual_seed(3)) < 0.5
        model.calibrate(x, labels)
        assert model.trust.startswith("low: ")
        assert "no better than chance" in model.trust

    def test_a_part_of_the_concepts_is_judged_by_labels(self):
        model, x = conv_model(), pictures(60)
        model.metadata["reliability"] = {
            name: {"agreement": 0.9, "low": 0.8, "high": 0.95, "positives": 20, "images": 40} for name in CONCEPTS
        }
        assert "on 40 held-out images the concepts rank images as the vision-language model does" in model.trust
        model.calibrate(x[:12], {CONCEPTS[0]: labels_for(model, x[:12])[:, 0]})
        assert "on 40 held-out images the concepts rank images as the vision-language model does" in model.trust
        assert f"without '{CONCEPTS[0]}' (judged by your labels)" in model.trust
        assert "labels" not in model.without(CONCEPTS[0]).trust
        model.calibrate(x, labels_for(model, x))
        assert "on 60 held-out images the concepts rank images as your labels do" in model.trust

    def test_forms_of_labels(self):
        model, x = conv_model(), pictures(50)
        labels = labels_for(model, x)
        expected = model.calibrate(x, labels).presence(x)
        names = [[CONCEPTS[j] for j in row.nonzero().flatten().tolist()] for row in labels]
        assert torch.equal(conv_model().calibrate(x, names).presence(x), expected)
        assert torch.equal(conv_model().calibrate(x, labels.int().numpy()).presence(x), expected)
        some = conv_model().calibrate(x, labels)
        some.calibrate(x, {"grass": ~labels[:, 2]})
        others = [0, 1, 3, 4]
        assert torch.equal(some.presence(x)[:, others], expected[:, others])
        assert not torch.equal(some.presence(x)[:, 2], expected[:, 2])

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (torch.zeros(3, 5), r"must be \(4, 5\)"),
            (torch.full((4, 5), 0.5), "of 0 and 1"),
            ([["grass"]] * 3, "3 labels were passed for 4 images"),
            ([["gras"]] * 4, "Did you mean 'grass'"),
            ({"gras": [0, 1, 1, 0]}, "Did you mean 'grass'"),
            ({"grass": [0, 1]}, r"labels\['grass'\]"),
            ("grass", "labels must be"),
        ],
    )
    def test_bad_labels(self, labels, message):
        with pytest.raises(InputError, match=message):
            conv_model().calibrate(pictures(), labels)

    def test_against_scikit_learn(self):
        """With many images the prior weighs nothing."""
        x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
        chance = torch.sigmoid(torch.tensor([2.0, 0.7]) * x + torch.tensor([-1.0, 0.3]))
        y = torch.rand(chance.shape, generator=torch.Generator().manual_seed(1)) < chance
        slope, offset = fit_presence(x, y)
        for j in range(2):
            peer = LogisticRegression(C=1e6).fit(x[:, j : j + 1].numpy(), y[:, j].numpy())
            assert float(slope[j]) == pytest.approx(float(peer.coef_[0, 0]), abs=0.02)
            assert float(offset[j]) == pytest.approx(float(peer.intercept_[0]), abs=0.02)
