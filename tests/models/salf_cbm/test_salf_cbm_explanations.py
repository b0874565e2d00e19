"""What a SALFCBM says about its decisions, against the paper's formulas written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from salf_networks import CONCEPTS, ConvNet, awake, conv_model, pictures, slow_activations, slow_maps, token_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_concepts import published
from captum_concepts.errors import InputError, InputWarning, TargetError
from captum_concepts.explanation import ConceptExplanation
from captum_concepts.images import Preprocessing
from captum_concepts.models.salf_cbm import SALFCBM


class TestContributions:
    @pytest.mark.parametrize("last", [1, 2])
    def test_one_class_for_images_of_several_batches(self, last):
        model, x = conv_model(), pictures(3 * 2 + last)
        model.batch_size = 3
        expected = model.contributions(x, 1)
        assert torch.equal(model.contributions(x, torch.tensor([1])), expected)
        explained = [model.explain(x, target) for target in (1, torch.tensor([1]))]
        assert torch.equal(explained[0].contributions, explained[1].contributions)
        assert torch.equal(
            model.explain_region(x, boxes=(0, 0, 8, 8), target=torch.tensor([1])).contributions,
            model.explain_region(x, boxes=(0, 0, 8, 8), target=1).contributions,
        )

    @pytest.mark.parametrize("target", [1, "car", [1, 0, 2, 1], ["car", "cat", 2, 1], torch.tensor([1, 0, 2, 1]), None])
    def test_weight_times_activation(self, target):
        model, x = conv_model(), pictures()
        found = model.contributions(x, target)
        activations = slow_activations(model, x)
        if target is None:
            classes = model(x).argmax(1).tolist()
        else:
            names = target if isinstance(target, list) else target.tolist() if torch.is_tensor(target) else [target] * 4
            classes = [model.class_names.index(c) if isinstance(c, str) else c for c in names]
        for n in range(4):
            for m in range(5):
                expected = model.head.weight[classes[n], m] * activations[n, m]
                torch.testing.assert_close(found[n, m], expected.detach(), atol=1e-5, rtol=1e-4)

    def test_with_the_bias_they_are_the_logit(self):
        model, x = conv_model(), pictures()
        torch.testing.assert_close(model.contributions(x, 2).sum(1) + model.head.bias[2], model(x)[:, 2])

    @pytest.mark.parametrize("target", [3, -4, "dog", 1.5, [0, 1], torch.tensor([[0]] * 4), True])
    def test_bad_target(self, target):
        with pytest.raises(TargetError) as caught:
            conv_model().contributions(pictures(), target)
        assert isinstance(caught.value, AssertionError)

    def test_a_head_that_is_not_linear(self):
        model = conv_model()
        model.head = nn.Sequential(nn.Linear(5, 3))
        with pytest.raises(InputError, match="linear head"):
            model.contributions(pictures())


class TestExplain:
    def test_what_where_and_how_much(self):
        model, x = conv_model(), pictures()
        found = model.explain(x, top_k=None)
        assert isinstance(found, ConceptExplanation)
        assert set(found.concepts) == set(CONCEPTS)
        columns = [CONCEPTS.index(c) for c in found.concepts]
        torch.testing.assert_close(found.scores, slow_activations(model, x)[:, columns], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.maps, slow_maps(model, x)[:, columns])
        torch.testing.assert_close(found.contributions, model.contributions(x)[:, columns])
        assert found.target.tolist() == model(x).argmax(1).tolist()
        assert (found.layer, found.method) == ("body", "SALFCBM")
        assert not found.maps.requires_grad

    def test_the_leading_concepts_by_absolute_contribution(self):
        model, x = conv_model(), pictures(1)
        shares = model.contributions(x, "bird")[0].abs()
        expected = [CONCEPTS[m] for m in sorted(range(5), key=lambda m: -shares[m])[:3]]
        found = model.explain(x, "bird", top_k=3)
        assert found.concepts == expected
        assert found.maps.shape == (1, 3, 7, 7)
        torch.testing.assert_close(found.maps, slow_maps(model, x)[:, [CONCEPTS.index(c) for c in expected]])
        whole = model.explain(x, "bird", top_k=None)
        assert whole.top(3, by="contributions").concepts == expected

    @pytest.mark.parametrize("rank_by", ["contributions", "scores"])
    def test_each_image_has_its_own_concepts(self, rank_by):
        model, x = conv_model(batch_size=3), pictures(7)
        shares, scores = model.contributions(x), slow_activations(model, x)
        values = shares.abs() if rank_by == "contributions" else scores
        found = model.explain(x, top_k=2, rank_by=rank_by)
        for n in range(7):
            own = values[n].argsort(descending=True)[:2].tolist()
            assert found[n].concepts == [CONCEPTS[j] for j in own]
            torch.testing.assert_close(found[n].maps, slow_maps(model, x[n : n + 1])[:, own])
            torch.testing.assert_close(found[n].contributions, shares[n : n + 1, own])
            alone = model.explain(x[n : n + 1], top_k=2, rank_by=rank_by)
            assert alone.concepts == found[n].concepts
            torch.testing.assert_close(alone.maps, found[n].maps)

    def test_names_units_and_probability(self):
        model, x = conv_model(), pictures()
        found = model.explain(x)
        assert found.class_names == ["cat", "car", "bird"]
        assert (found.score_unit, found.contribution_unit) == ("standard deviations", "logit")
        torch.testing.assert_close(found.target_probability, model(x).softmax(1).amax(1).detach())
        several = conv_model(multi_label=True)
        expected = several(x).sigmoid()[:, 1].detach()
        torch.testing.assert_close(several.explain(x, "car").target_probability, expected)
        without = model.explain(x, contributions=False)
        assert (without.contributions, without.rank_by) == (None, "scores")
        region = model.explain_region(x, "car", boxes=(0, 0, 9, 9), units="map", reduction="sum")
        assert region.score_unit == "map units x pixels"
        assert region.target.tolist() == [1] * 4

    def test_scores_and_maps_need_no_linear_head(self):
        model, x = conv_model(), pictures()
        scores = model.explain(x, contributions=False).scores
        model.head = nn.Sequential(model.head, nn.ReLU())
        torch.testing.assert_close(model.explain(x, contributions=False).scores, scores)
        with pytest.raises(InputError, match="contributions require a linear head, but head is a Sequential"):
            model.explain(x)

    def test_what_people_have(self, tmp_path):
        from torchvision.transforms.functional import to_pil_image

        size = Preprocessing((32, 24), (0.5, 0.4, 0.3), (0.2, 0.2, 0.3))
        model = conv_model(preprocessing=size, batch_size=2)
        x = (pictures(3) * 255).round() / 255
        for n in range(3):
            to_pil_image(x[n]).save(tmp_path / f"{n}.png")
        expected = model.explain(size(x), "car", top_k=None)
        for form in (
            tmp_path,
            str(tmp_path / "*.png"),
            [to_pil_image(one) for one in x],
            (x * 255).to(torch.uint8).numpy(),
        ):
            found = model.explain(form, "car", top_k=None)
            torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=1e-4)
        assert model.explain(tmp_path).image_names == ["0.png", "1.png", "2.png"]
        torch.testing.assert_close(model.scores(DataLoader(TensorDataset(size(x)), 2)), model.scores(size(x)))

    def test_given_concepts(self):
        model, x = conv_model(), pictures()
        found = model.explain(x, concepts=["grass", 1])
        assert found.concepts == ["grass", "wheels"]
        torch.testing.assert_close(found.scores, slow_activations(model, x)[:, [2, 1]], atol=1e-5, rtol=1e-4)

    def test_more_than_there_are(self):
        assert len(conv_model().explain(pictures(), top_k=50).concepts) == 5

    def test_five_concepts_of_each_image_by_default(self):
        model = SALFCBM(awake(ConvNet()), "body", list("abcdefgh"), 3).eval()
        assert model.explain(pictures(2)).scores.shape == (2, 5)

    @pytest.mark.parametrize("images", [pictures(2)[0], pictures(2)[None], [pictures(1)[0]]])
    def test_a_region_is_asked_of_a_batch(self, images):
        with pytest.raises(InputError, match=r"images must be a .*\(N, C, H, W\)"):
            conv_model().explain_region(images, "car", points=(3, 3))

    def test_several_classes_of_one_image(self):
        model, x = conv_model(), pictures(1)
        found = model.explain_classes(x, ["cat", 2], top_k=2)
        assert list(found) == ["cat", 2]
        for key, explanation in found.items():
            expected = model.explain(x, key, top_k=2)
            assert explanation.concepts == expected.concepts
            assert torch.equal(explanation.contributions, expected.contributions)
        with pytest.raises(InputError, match="list of classes"):
            model.explain_classes(x, "cat")
        with pytest.raises(TargetError, match="Did you mean 'cat'"):
            model.explain_classes(x, ["cats"])

    def test_tokens(self):
        model, x = token_model(cls_token=True), pictures(2, 16, 16)
        torch.testing.assert_close(model.explain(x, top_k=None, concepts=CONCEPTS).maps, model.concept_maps(x).detach())

    def test_one_forward_in_evaluation_mode_without_a_trace(self):
        model, x = conv_model(freeze_backbone=False), pictures()
        calls = []
        model.backbone.stem[0].register_forward_hook(lambda m, *_: calls.append(m.training))
        model.train()
        statistics = model.backbone.stem[1].running_mean.clone()
        for explain in (
            lambda: model.explain(x),
            lambda: model.contributions(x),
            lambda: model.explain_classes(x, [0, 1]),
            lambda: model.explain_region(x, points=(3, 3)),
            lambda: model.intervene(x, 0, beta=1, units="map"),
            lambda: model.zero_shot_segmentation(x, target="grass"),
        ):
            calls.clear()
            explain()
            assert calls == [False]
        assert model.training
        assert model.backbone.stem[1].training
        assert torch.equal(statistics, model.backbone.stem[1].running_mean)
        assert all(p.grad is None for p in model.parameters())

    @pytest.mark.parametrize("top_k", [0, -1, 1.5, True])
    def test_bad_top_k(self, top_k):
        with pytest.raises(InputError, match="top_k must be"):
            conv_model().explain(pictures(), top_k=top_k)

    def test_unknown_concept(self):
        with pytest.raises(InputError, match="Did you mean 'wheels'"):
            conv_model().explain(pictures(), concepts=["wheel"])

    def test_images_with_nan_are_warned_about(self):
        x = pictures()
        x[1, 0, 3, 3] = float("nan")
        model = conv_model()
        with pytest.warns(InputWarning, match="NaN") as caught:
            found = model.explain(x, 0, top_k=None)
        assert len(caught) == 1
        assert found.scores[1].isnan().all()
        assert found.scores[[0, 2, 3]].isfinite().all()

    def test_half_precision(self):
        model, x = conv_model(), pictures()
        expected = model.explain(x, concepts=CONCEPTS)
        found = model.bfloat16().explain(x.bfloat16(), concepts=CONCEPTS)
        torch.testing.assert_close(found.maps.float(), expected.maps, atol=0.1, rtol=0.1)
        before, after = model.intervene(x.bfloat16(), "grass", beta=1.0, units="map")
        assert before.dtype == after.dtype == torch.bfloat16


class TestDecisionRules:
    def test_strongest_first_without_zeros(self):
        model = conv_model()
        with torch.no_grad():
            model.head.weight[1] = torch.tensor([0.0, -2.0, 0.5, 0.0, 1.0])
        expected = [("wheels", -2.0), ("windows", 1.0), ("grass", 0.5)]
        assert model.decision_rules(1) == model.decision_rules("car") == model.decision_rules(-2) == expected
        assert model.decision_rules(1, top_k=1) == expected[:1]

    @pytest.mark.parametrize("label", [3, "cra", None, 0.5])
    def test_no_such_class(self, label):
        with pytest.raises(TargetError):
            conv_model().decision_rules(label)


def boolean_mask(height, width):
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[3:17, 5:14] = True
    mask[20, 20] = True
    return mask


class TestExplainRegion:
    @pytest.mark.parametrize("size", [(28, 28), (32, 24), (56, 35)])
    def test_the_published_sum(self, size):
        """a(x, m | I) = sum of I times the enlarged map."""
        model, x = conv_model(), pictures(3, *size)
        mask = boolean_mask(*size)
        large = F.interpolate(slow_maps(model, x), size, mode="bilinear", align_corners=False)
        expected = torch.zeros(3, 5)
        for n in range(3):
            for m in range(5):
                expected[n, m] = sum(large[n, m, i, j] for i, j in mask.nonzero().tolist())
        found = model.explain_region(x, mask=mask, top_k=None, **published.EXPLAIN_REGION)
        columns = [CONCEPTS.index(c) for c in found.concepts]
        torch.testing.assert_close(found.scores, expected[:, columns], atol=1e-3, rtol=1e-4)
        mean = model.explain_region(x, mask=mask, units="map", top_k=None)
        torch.testing.assert_close(mean[:, CONCEPTS].scores, expected / mask.sum(), atol=1e-5, rtol=1e-4)
        standard = model.explain_region(x, mask=mask, top_k=None)[CONCEPTS]
        torch.testing.assert_close(
            standard.scores, (expected / mask.sum() - model.concept_mean) / model.concept_std, atol=1e-4, rtol=1e-4
        )

    def test_strongest_first_and_only_its_maps(self):
        model, x = conv_model(), pictures(1)
        found = model.explain_region(x, boxes=(0, 0, 8, 8), top_k=2)
        whole = model.explain_region(x, boxes=(0, 0, 8, 8), top_k=None)
        assert whole.scores[0].tolist() == sorted(whole.scores[0].tolist(), reverse=True)
        assert found.concepts == whole.concepts[:2]
        torch.testing.assert_close(found.maps, slow_maps(model, x)[:, [CONCEPTS.index(c) for c in found.concepts]])

    def test_a_planted_concept_is_found_where_it_is(self):
        model = conv_model("stem.0", grid=(8, 8))
        with torch.no_grad():  # concept 0 sees red, concept 1 blue
            model.backbone.stem[0].weight.zero_()
            model.backbone.stem[0].bias.zero_()
            model.backbone.stem[0].weight[0, 0] = model.backbone.stem[0].weight[1, 2] = 1 / 9
            model.bottleneck.weight.zero_()
            model.bottleneck.weight[0, 0] = 100.0  # on another scale
            model.bottleneck.weight[1, 1] = 1.0
        model.set_standardization([25.0, 0.25, 0, 0, 0], [25.0, 0.25, 1, 1, 1])
        x = torch.zeros(1, 3, 64, 64)
        x[:, 0, :32, :32] = 1
        x[:, 2, 32:, 32:] = 1
        assert model.explain_region(x, boxes=(0, 0, 32, 32)).concepts[0] == CONCEPTS[0]
        assert model.explain_region(x, boxes=(32, 32, 64, 64)).concepts[0] == CONCEPTS[1]
        assert model.explain_region(x, points=(50, 40)).concepts[0] == CONCEPTS[1]
        assert model.explain_region(x, points=(40, 10)).concepts[0] not in CONCEPTS[:2]
        # Blue everywhere, and a little red: the weaker one on its own scale, the stronger one in plain sums.
        x[:, 2] = 1
        x[:, 0] = 0.1
        assert model.explain_region(x, boxes=(0, 0, 64, 64)).concepts[0] == CONCEPTS[1]
        plain = model.explain_region(x, boxes=(0, 0, 64, 64), units="map")
        assert plain.concepts[0] == CONCEPTS[0]

    def test_the_parts_of_a_tiling_add_up(self):
        model, x = conv_model(), pictures(2, 32, 24)
        boxes = [(0, 0, 10, 13), (10, 0, 24, 13), (0, 13, 24, 32)]
        parts = [model.explain_region(x, 1, boxes=box, top_k=None)[:, CONCEPTS].contributions for box in boxes]
        torch.testing.assert_close(sum(parts), model.contributions(x, 1), atol=1e-5, rtol=1e-4)

    def test_the_whole_image_is_the_global_explanation(self):
        model, x = conv_model(), pictures(2, 28, 28)
        found = model.explain_region(x, boxes=(0, 0, 28, 28), top_k=None)[CONCEPTS]
        torch.testing.assert_close(found.scores, slow_activations(model, x), atol=1e-4, rtol=1e-4)

    def test_bad(self):
        model, x = conv_model(), pictures()
        with pytest.raises(InputError, match="pass the region as"):
            model.explain_region(x)
        with pytest.raises(InputError, match="reduction"):
            model.explain_region(x, points=(1, 1), reduction="max")
        with pytest.raises(InputError, match="not as points and mask"):
            model.explain_region(x, points=(1, 1), mask=torch.ones(32, 24))
        with pytest.raises(TargetError):
            model.explain_region(x, points=(1, 1), target=9)


class TestIntervene:
    @pytest.mark.parametrize("size", [(28, 28), (56, 35)])
    def test_the_published_edit(self, size):
        """c(x)[m] <- c(x)[m] + beta I on the enlarged maps, pooled, normalised, and the last layer run again."""
        model, x = conv_model(), pictures(2, *size)
        mask, beta, m = boolean_mask(*size), -1.5, 3
        large = F.interpolate(slow_maps(model, x), size, mode="bilinear", align_corners=False)
        large[:, m] += beta * mask
        pooled = large.flatten(2).mean(2)
        expected = model.head((pooled - model.concept_mean) / model.concept_std)
        before, after = model.intervene(x, CONCEPTS[m], mask=mask, beta=beta, **published.INTERVENE)
        torch.testing.assert_close(before, model(x).detach())
        torch.testing.assert_close(after, expected.detach(), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(before, after)

    def test_the_effect_is_exact_for_any_size(self):
        model, x = conv_model(), pictures(2, 30, 50)
        before, after = model.intervene(x, 1, boxes=(3, 4, 20, 22), beta=2.0, units="map")
        expected = model.head.weight[:, 1] * 2.0 * (17 * 18) / (30 * 50) / model.concept_std[1]
        torch.testing.assert_close(after - before, expected.detach().expand(2, 3), atol=1e-5, rtol=1e-4)

    def test_whole_image_in_standard_deviations(self):
        model, x = conv_model(), pictures()
        before, after = model.intervene(x, "grass", beta=1.0, units="std")
        torch.testing.assert_close(after - before, model.head.weight[:, 2].detach().expand(4, 3))
        before, after = model.intervene(x, "grass", beta=1.0, units="map")
        expected = model.head.weight[:, 2] / model.concept_std[2]
        torch.testing.assert_close(after - before, expected.detach().expand(4, 3))

    def test_a_point_edits_its_cell(self):
        model, x = conv_model(), pictures()
        before, after = model.intervene(x, 2, points=(5, 5), beta=49.0, units="std")
        torch.testing.assert_close(after - before, model.head.weight[:, 2].detach().expand(4, 3), atol=1e-5, rtol=1e-4)

    def test_several_edits_at_once(self):
        model, x = conv_model(), pictures()
        first = model.intervene(x, "grass", beta=2.0, boxes=(0, 0, 9, 9), units="map")
        second = model.intervene(x, "wheels", beta=-1.0, points=(20, 30), units="map")
        edits = [
            {"concept": "grass", "beta": 2.0, "boxes": (0, 0, 9, 9)},
            {"concept": "wheels", "beta": -1.0, "points": (20, 30)},
        ]
        before, after = model.intervene(x, edits, units="map")
        torch.testing.assert_close(after - before, first[1] - first[0] + second[1] - second[0])
        together = model.intervene(x, ["grass", 1], beta=[2.0, -1.0], boxes=(0, 0, 9, 9), units="map")
        alone = model.intervene(x, 1, beta=-1.0, boxes=(0, 0, 9, 9), units="map")
        torch.testing.assert_close(together[1] - before, first[1] - before + alone[1] - before)
        same = model.intervene(x, ["grass", "grass"], beta=1.0, boxes=(0, 0, 9, 9), units="map")
        torch.testing.assert_close(same[1], first[1])

    def test_a_region_for_each_image(self):
        model, x = conv_model(), pictures(2)
        masks = torch.zeros(2, 32, 24, dtype=torch.bool)
        masks[0, :16] = True
        masks[1, :, :6] = True
        _, after = model.intervene(x, 0, mask=masks, beta=1.0, units="map")
        for n in range(2):
            torch.testing.assert_close(
                after[n : n + 1], model.intervene(x[n : n + 1], 0, mask=masks[n], beta=1.0, units="map")[1]
            )

    def test_the_model_is_left_as_it_was(self):
        model, x = conv_model(), pictures()
        expected = model(x)
        model.intervene(x, 0, beta=5.0, units="map")
        assert torch.equal(model(x), expected)

    @pytest.mark.parametrize(
        "beta", [float("nan"), float("inf"), None, "1", True, [1.0, 2.0], torch.tensor([1.0, 2.0])]
    )
    def test_bad_beta(self, beta):
        with pytest.raises(InputError, match="beta"):
            conv_model().intervene(pictures(), "grass", beta=beta, units="map")

    @pytest.mark.parametrize(
        ("concept", "message"),
        [
            ("gras", "Did you mean 'grass'"),
            (7, "out of range"),
            ([], "no concept"),
            ([{"concept": "grass"}], "beta must be"),
            ([{"beta": 1.0}], "needs a concept"),
            ([{"concept": "grass", "beta": 1.0, "box": (1, 2, 3, 4)}], "got \\['box'\\]"),
        ],
    )
    def test_bad_concept_or_edit(self, concept, message):
        edits = isinstance(concept, list) and concept
        with pytest.raises(InputError, match=message):
            conv_model().intervene(pictures(), concept, units="map", **({} if edits else {"beta": 1.0}))

    def test_edits_bring_their_own_regions(self):
        with pytest.raises(InputError, match="its own betas and regions"):
            conv_model().intervene(pictures(), [{"concept": 0, "beta": 1.0}], beta=2.0, units="map")
