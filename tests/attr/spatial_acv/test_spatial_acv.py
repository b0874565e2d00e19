"""SpatialACV finds what was planted, equals Captum's own gradients, says what it does not know, and can be saved."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from captum.attr import LayerGradientXActivation, NoiseTunnel
from captum.concept import TCAV, Classifier, Concept
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from captum_concepts.attr.layer_sweep import layer_sweep
from captum_concepts.attr.spatial_acv import (
    SpatialACV,
    classifier,
    fit as fitting,
    problem,
    rows as row_module,
    statistics,
)
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.datasets._drawing import COLOURS, TEXTURES, ObjectSpec, draw_object
from captum_concepts.errors import ArtifactError, InputError, InputWarning, LayerError, NotFittedError, TargetError
from captum_concepts.images import open_images
from captum_concepts.metrics import epg, nra

CHANNELS = 24


class Planted(nn.Module):
    """Random features of the first three input channels, plus a fixed direction wherever the fourth says so."""

    def __init__(self, seed: int = 0, strength: float = 3.0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(4, CHANNELS, 5, stride=2, padding=2)
        nn.init.zeros_(self.conv.weight[:, 3:])
        self.direction = nn.Parameter(F.normalize(torch.randn(CHANNELS), dim=0))
        self.strength, self.at, self.tail = strength, nn.Identity(), nn.Conv2d(CHANNELS, 10, 3, padding=1)
        self.head = nn.Linear(10, 5)

    def forward(self, x):
        planted = F.avg_pool2d(x[:, 3:], 2) * self.direction.view(1, -1, 1, 1)
        a = self.at(F.relu(self.conv(x)) + self.strength * planted)
        return self.head(F.relu(self.tail(a), inplace=True).mean((2, 3)))


def scenes_with(mask: Tensor, seed: int) -> Tensor:
    """Noise images whose fourth channel is ``mask`` ``(n, H, W)``."""
    draw = torch.Generator().manual_seed(seed)
    return torch.cat([torch.rand(len(mask), 3, *mask.shape[1:], generator=draw), mask[:, None]], 1)


@pytest.fixture(scope="module")
def planted():
    net = Planted().eval()
    where = torch.zeros(12, 24, 24)
    for n in range(12):
        where[n, 2 + n : 10 + n, 4:14] = 1
    return {
        "net": net,
        "concept": scenes_with(torch.ones(14, 24, 24), 1),
        "negatives": scenes_with(torch.zeros(18, 24, 24), 2),
        "test": scenes_with(where, 3),
        "where": F.avg_pool2d(where, 2) > 0.5,
    }


def auroc(scores: Tensor, truth: Tensor) -> float:
    """Mann-Whitney's statistic, ties counted half."""
    up, down = scores[truth].double(), scores[~truth].double()
    order = torch.searchsorted(down.sort().values, up) + torch.searchsorted(down.sort().values, up, right=True)
    return float(order.double().mean() / 2 / len(down))


def planted_check(planted: dict) -> tuple[float, float]:
    """Cosine with the planted direction, and AUROC of the relevance against the planted positions."""
    acv = SpatialACV(planted["net"], "at").fit({"planted": planted["concept"]}, planted["negatives"])
    cosine = float(acv.vectors[0] @ F.normalize(planted["net"].direction.detach(), dim=0))
    return cosine, auroc(acv.concept_maps(planted["test"])[:, 0], planted["where"])


def passes(cosine: float, area: float) -> bool:
    return cosine > 0.95 and area > 0.99


# ------------------------------------------------------------------------------------------------ a planted concept


def test_a_planted_concept_is_found(planted):
    cosine, area = planted_check(planted)
    assert passes(cosine, area), (cosine, area)


def test_the_reshape_of_the_public_notebook_fails_the_check(planted, monkeypatch):
    monkeypatch.setattr(row_module, "rows_of", lambda maps: maps.reshape(len(maps), -1, maps.shape[1]))
    assert not passes(*planted_check(planted))


def test_the_label_swap_of_the_public_notebook_fails_the_check(planted, monkeypatch):
    for module in (problem, classifier, fitting, statistics):
        monkeypatch.setattr(module, "LABEL_CONCEPT", 0)
        monkeypatch.setattr(module, "LABEL_NEGATIVE", 1, raising=False)
    cosine, area = planted_check(planted)
    assert not passes(cosine, area)
    assert cosine < -0.95


def test_statistics_of_a_planted_concept_and_of_noise(planted):
    noise = scenes_with(torch.zeros(14, 24, 24), 9)
    acv = SpatialACV(planted["net"], "at")
    assert acv.fit({"planted": planted["concept"], "noise": noise}, planted["negatives"], n_random=20) is acv
    assert acv.concepts == ["planted", "noise"]
    assert torch.allclose(acv.vectors.norm(dim=1), torch.ones(2))
    assert acv.accuracies_[0] > 0.97
    assert abs(acv.accuracies_[1] - 0.5) < 0.1
    low, high = acv.confidence_intervals_.T
    assert bool(((low <= acv.accuracies_) & (acv.accuracies_ <= high)).all())
    assert acv.contrasts_[0] > 3 > 1 > abs(acv.contrasts_[1])
    assert acv.p_values_[0] < 0.01
    assert acv.p_values_[1] > 0.05
    assert acv.significant_.tolist() == [True, False]
    lines = acv.summary().splitlines()
    assert "not encoded here" not in lines[1]
    assert "not encoded here" in lines[2]


def test_permuted_labels_are_reported_as_not_significant(planted):
    both = torch.cat([planted["concept"], planted["negatives"][:14]])
    mixed = both[torch.randperm(28, generator=torch.Generator().manual_seed(0))]
    acv = SpatialACV(planted["net"], "at").fit({"permuted": mixed[:14]}, mixed[14:], n_random=20)
    assert acv.significant_.tolist() == [False]


def test_without_random_sets_there_is_no_p_value(planted):
    acv = SpatialACV(planted["net"], "at").fit({"a": planted["concept"]}, planted["negatives"])
    assert acv.p_values_ is None
    assert acv.significant_ is None


# ------------------------------------------------------------------------------------------------ the two maps


@pytest.fixture(scope="module")
def fitted(planted):
    sets = {f"c{k}": scenes_with(torch.full((4, 24, 24), k / 3), 20 + k) for k in range(4)}
    return SpatialACV(planted["net"], "at").fit(sets, planted["negatives"])


@pytest.mark.parametrize("target", [2, (1,), [0, 4, 1], torch.tensor([3, 3, 0]), torch.tensor(1)])
def test_contributions_equal_a_loop_over_concepts_with_captums_gradients(planted, fitted, target):
    x = planted["test"][:3]
    maps = fitted.attribute(x, target=target)
    gradient = LayerGradientXActivation(planted["net"], planted["net"].at, multiply_by_inputs=False)
    expected = gradient.attribute(x, target=target)
    assert maps.shape == (3, 4, 12, 12)
    assert not maps.requires_grad
    assert maps.is_contiguous()
    for k in range(4):
        loop = sum(expected[:, c] * fitted.vectors[k, c] for c in range(CHANNELS))
        assert torch.allclose(maps[:, k], loop.detach(), atol=1e-5 * float(loop.abs().max()), rtol=0)


@pytest.mark.parametrize("target", [2, (2,), [2, 2, 2], [(2,)] * 3, torch.tensor([2])])
def test_the_explained_output_is_recorded(planted, fitted, target):
    assert fitted.explain(planted["test"][:3], target=target).target.tolist() == [2, 2, 2]


def test_relevance_is_the_projection_of_each_position(planted, fitted):
    x = planted["test"][:2]
    seen = {}
    handle = planted["net"].at.register_forward_hook(lambda m, i, o: seen.update(a=o.detach()))
    planted["net"](x)
    handle.remove()
    maps = fitted.concept_maps(x)
    for n, k, i, j in ((0, 0, 3, 4), (1, 3, 11, 0), (1, 2, 5, 5)):
        assert float(maps[n, k, i, j]) == pytest.approx(float(seen["a"][n, :, i, j] @ fitted.vectors[k]), abs=1e-5)


def test_probabilities_are_in_order_with_relevance_and_right_on_average(planted):
    acv = SpatialACV(planted["net"], "at").fit({"a": planted["concept"]}, planted["negatives"])
    yes, no = (acv.concept_maps(planted[side], probability=True) for side in ("concept", "negatives"))
    assert bool(((yes >= 0) & (yes <= 1)).all())
    assert yes.mean() > 0.7 > 0.3 > no.mean()
    assert float(yes.mean() + no.mean()) == pytest.approx(1, abs=0.02)  # the intercept: both classes weigh the same
    bare = acv.concept_maps(planted["concept"])
    assert torch.equal(bare.flatten().argsort()[-50:].sort().values, yes.flatten().argsort()[-50:].sort().values)


def test_tcav_scores_are_sign_and_mean_of_the_summed_maps(planted, fitted):
    x = planted["test"]
    scores = fitted.tcav(x, 1)
    total = torch.zeros(12, 4)
    for n in range(12):
        total[n] = fitted.attribute(x[n : n + 1], 1)[0].sum((1, 2))
    assert torch.allclose(scores["magnitude"], total.mean(0), atol=1e-6)
    assert torch.equal(scores["sign_count"], (total > 0).float().mean(0))
    # the derivative of the output along the concept, added everywhere: a finite difference agrees
    net, k, step = copy.deepcopy(planted["net"]).double(), 2, 1e-6
    v = fitted.vectors[k].double()
    shift = torch.zeros(())
    handle = net.at.register_forward_hook(lambda m, i, o: o + shift * v.view(1, -1, 1, 1))
    base = net(x.double())[:, 1]
    shift = torch.tensor(step, dtype=torch.float64)
    slope = (net(x.double())[:, 1] - base) / step
    handle.remove()
    assert torch.allclose(slope.detach().float(), total[:, k], atol=1e-4)


def test_explain_puts_the_three_together(planted, fitted):
    x = planted["test"][:5]
    e = fitted.explain(x, top_k=None)
    best = planted["net"](x).argmax(1)
    assert sorted(e.concepts) == sorted(fitted.concepts)
    order = [fitted.concepts.index(name) for name in e.concepts]
    assert e.target.tolist() == best.tolist()
    assert (e.layer, e.method) == ("at", fitted.get_name())
    torch.testing.assert_close(e.maps, fitted.concept_maps(x)[:, order])
    torch.testing.assert_close(e.scores, fitted.scores(x)[:, order])
    torch.testing.assert_close(e.contributions, fitted.contributions(x)[:, order])
    torch.testing.assert_close(e.contributions, fitted.attribute(x, best).sum((2, 3))[:, order])
    assert fitted.explain(x, concepts=["c2", 0], contributions=False).contributions is None
    named = fitted.explain(x, target=3, concepts=["c2", 0])
    assert named.concepts == ["c2", "c0"]
    assert named.target.tolist() == [3] * 5
    torch.testing.assert_close(named.contributions, fitted.contributions(x, 3, ["c2", "c0"]))
    torch.testing.assert_close(named.maps, fitted.concept_maps(x, ["c2", "c0"]))


@pytest.mark.parametrize("rank_by", ["scores", "contributions"])
def test_an_image_says_the_same_in_a_batch_as_alone(planted, fitted, rank_by):
    x = torch.cat([planted["test"], planted["concept"][:3], planted["negatives"][:3]])
    batch = fitted.explain(x, top_k=2, rank_by=rank_by)
    for n, one in enumerate(batch):
        alone = fitted.explain(x[n : n + 1], top_k=2, rank_by=rank_by)
        assert one.concepts == alone.concepts
        torch.testing.assert_close(one.scores, alone.scores)
        torch.testing.assert_close(one.maps, alone.maps, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.contributions, alone.contributions, rtol=1e-4, atol=1e-6)


def test_what_is_not_encoded_ranks_last(planted):
    noise = scenes_with(torch.zeros(14, 24, 24), 9)
    sets = {"noise": noise, "planted": planted["concept"]}
    acv = SpatialACV(planted["net"], "at").fit(sets, planted["negatives"], n_random=20)
    assert acv.explain(planted["negatives"], target=0, top_k=2).concepts == ["planted", "noise"]
    for rank_by in ("scores", "contributions"):
        assert acv.explain(planted["negatives"], target=0, top_k=1, rank_by=rank_by).concepts == ["planted"]


def test_results_do_not_depend_on_the_batch_size(planted):
    x, sets = planted["test"], {"a": planted["concept"], "b": planted["test"]}
    extra = torch.arange(12.0).view(-1, 1) / 10

    def forward(images, scale=1.0):
        return planted["net"](images) * scale

    whole, small = (
        SpatialACV(forward, planted["net"].at, batch_size=size).fit(sets, planted["negatives"], n_random=5)
        for size in (64, 5)
    )
    target = torch.arange(12) % 5
    assert torch.allclose(whole.vectors, small.vectors, atol=1e-5)
    assert torch.allclose(whole.accuracies_, small.accuracies_, atol=1e-3)
    assert torch.allclose(whole.attribute(x, target, extra), small.attribute(x, target, extra), atol=1e-6)
    assert torch.allclose(whole.attribute(x, target, (extra,)), small.attribute(x, target, (extra,)), atol=1e-6)
    assert torch.allclose(whole.concept_maps(x), small.concept_maps(x), atol=1e-5)
    assert torch.allclose(whole.contributions(x), small.contributions(x), atol=1e-5)


def test_presence_is_calibrated_per_image_not_the_maximum_over_positions(planted, tmp_path):
    """Small regions, none, or everything: the truth is planted, and the calibration has seen none of these images."""
    acv = SpatialACV(planted["net"], "at").fit({"planted": planted["concept"]}, planted["negatives"])
    none, small = torch.zeros(30, 24, 24), torch.zeros(30, 24, 24)
    for n in range(30):
        small[n, n % 16 : n % 16 + 8, 3 * (n % 6) : 3 * (n % 6) + 8] = 1
    x = torch.cat([scenes_with(none, 40), scenes_with(small, 41)])
    truth = torch.arange(60) >= 30
    explanation = acv.explain(x, target=0)
    assert torch.equal(explanation.presence, acv.scores(x))
    assert float((explanation.presence[:, 0] - truth.float()).square().mean()) < 0.05
    value, low, high = acv.reliability_[0].tolist()
    assert 0.9 < value <= high <= 1
    assert low > 0.5
    assert "AUROC" in acv.trust
    assert "planted" in repr(acv)
    noise = SpatialACV(planted["net"], "at").fit({"noise": scenes_with(none[:14], 9)}, planted["negatives"])
    assert abs(float(noise.scores(x).mean()) - 0.5) < 0.15  # nothing known: as likely as not
    assert noise.reliability_[0, 1] < 0.5
    assert "not encoded at this layer: 'noise'" in noise.trust
    path = acv.save(tmp_path / "acv")
    again = SpatialACV.load(path, planted["net"])
    assert torch.equal(again.scores(x), acv.scores(x))
    assert again.trust == acv.trust


def test_the_evidence_is_the_mean_logit_of_the_strongest_tenth(planted, fitted):
    x = planted["test"][:2]
    state = fitted._fitted
    maps = fitted.concept_maps(x)
    for n in range(2):
        for k in range(4):
            logits = sorted((float(s) * float(state.slopes[k]) + float(state.intercepts[k])
                             for s in maps[n, k].flatten()), reverse=True)  # fmt: skip
            value = sum(logits[:14]) / 14  # of 144 positions
            logit = value * float(state.presence_slopes[k]) + float(state.presence_intercepts[k])
            assert float(fitted.scores(x)[n, k]) == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-5)


def test_calibrate_learns_the_rate_of_the_users_own_images(planted, tmp_path):
    sets = {"planted": planted["concept"], "noise": scenes_with(torch.zeros(14, 24, 24), 9)}
    acv = SpatialACV(planted["net"], "at").fit(sets, planted["negatives"])
    truth = torch.arange(40) < 4  # a rare concept
    x = scenes_with(truth[:, None, None].float().expand(-1, 24, 24), 50)
    assert acv.calibrate(x, ["planted" if yes else None for yes in truth]) is acv
    assert float(acv.scores(x)[:, 0].mean()) == pytest.approx(0.1, abs=0.05)
    assert float(acv.scores(x)[:, 1].mean()) < 0.05
    assert "40 labeled images" in acv.trust
    again = SpatialACV.load(acv.save(tmp_path / "acv"), planted["net"])
    assert torch.equal(again.scores(x), acv.scores(x))
    with pytest.raises(InputError, match="39 labels for 40 images"):
        acv.calibrate(x, [None] * 39)
    with pytest.raises(InputError, match="no batch dimension"):
        acv.calibrate(x[0], [None])


def test_a_file_of_an_earlier_version_still_opens(planted, fitted, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = fitted.save(tmp_path / "acv")
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
        old = {k: opened.get_tensor(k) for k in opened.keys() if "presence" not in k and k != "reliability"}  # noqa: SIM118
    info = json.loads(metadata["info"])
    del info["presence"]
    save_file(old, tmp_path / "old", {"format": "captum_concepts.SpatialACV/1", "info": json.dumps(info)})
    again = SpatialACV.load(tmp_path / "old", planted["net"])
    assert torch.equal(again.concept_maps(planted["test"]), fitted.concept_maps(planted["test"]))
    assert again.explain(planted["test"], target=0).presence is None
    assert again.reliability_ is None


class Decided(Planted):
    """Class 0 is decided by the planted direction, class 1 by brightness, class 2 is what is left."""

    def forward(self, x):
        planted = F.avg_pool2d(x[:, 3:], 2) * self.direction.view(1, -1, 1, 1)
        a = self.at(F.relu(self.conv(x)) + self.strength * planted)
        along = torch.einsum("nchw,c->nhw", a, F.normalize(self.direction, dim=0))
        rest = a.sum(1) - along * F.normalize(self.direction, dim=0).sum()
        return torch.stack(
            [F.relu(along - 1.5).mean((1, 2)), 0.2 * F.relu(rest).mean((1, 2)), along.new_zeros(len(x))], 1
        )


@pytest.fixture(scope="module")
def decided(planted):
    sets = {"planted": planted["concept"], "noise": scenes_with(torch.zeros(14, 24, 24), 9)}
    return SpatialACV(Decided().eval(), "at", batch_size=16).fit(sets, planted["negatives"], n_random=20)


def test_evidence_names_the_concept_that_decides_and_none_where_none_does(planted, decided):
    x = planted["test"]
    found = decided.evidence(x, target=0)
    assert found.first() == ["planted"] * 12
    assert bool((found.shares[:, 0] > 0.5).all())
    assert not bool(found.decides[:, 1].any())
    assert found.target.tolist() == [0] * 12
    assert "planted" in repr(found)
    elsewhere = decided.evidence(x, target=1)
    assert elsewhere.first() == [None] * 12
    without = decided.evidence(planted["negatives"], target=0)
    assert bool((without.effects[:, 0].abs() < 0.1 * found.effects[:, 0].min()).all())


def test_the_effect_is_what_the_margin_loses(planted, decided):
    """Against a plain loop: the projection lowered to the threshold at each position, the network run again."""
    x, state = planted["test"][:3], decided._fitted
    found = decided.evidence(x, target=1, steps=40)
    margin = lambda out: out[:, 1] - (out[:, 0] + out[:, 2]) / 2  # noqa: E731
    for k in range(2):
        v, threshold = state.vectors[k], float(-state.intercepts[k] / state.slopes[k])

        def lowered(_module, _inputs, a, v=v, threshold=threshold):
            excess = (torch.einsum("nchw,c->nhw", a, v) - threshold).clamp(min=0)
            return a - excess[:, None] * v.view(1, -1, 1, 1)

        net = decided.forward_func
        before = margin(net(x))
        handle = net.at.register_forward_hook(lowered)
        after = margin(net(x))
        handle.remove()
        torch.testing.assert_close(found.effects[:, k], (before - after).detach(), rtol=0.05, atol=2e-3)
    torch.testing.assert_close(found.margins, margin(decided.forward_func(x)).detach())
    torch.testing.assert_close(found.shares, found.effects / found.margins.abs()[:, None])


def test_evidence_needs_random_sets_and_does_not_depend_on_batches(planted, decided, tmp_path):
    x = planted["test"][:5]
    plain = SpatialACV(decided.forward_func, "at").fit({"planted": planted["concept"]}, planted["negatives"])
    assert plain.evidence(x, target=0).p_values is None
    assert not bool(plain.evidence(x, target=0).decides.any())
    whole = decided.evidence(x, target=[0, 1, 0, 1, 2])
    for n, target in enumerate([0, 1, 0, 1, 2]):
        one = decided.evidence(x[n : n + 1], target=target)
        torch.testing.assert_close(one.effects, whole.effects[n : n + 1], rtol=1e-4, atol=1e-6)
    again = SpatialACV.load(decided.save(tmp_path / "acv"), decided.forward_func)
    torch.testing.assert_close(again.evidence(x, target=0).p_values, decided.evidence(x, target=0).p_values)
    with pytest.raises(InputError, match="alpha"):
        decided.evidence(x, alpha=0)


def test_a_layer_that_only_linear_operations_follow_is_said_so_with_another_one(planted):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).eval()
    acv = SpatialACV(net, "1").fit({"planted": planted["concept"]}, planted["negatives"])
    for call in (acv.contributions, acv.explain, lambda x: acv.attribute(x, 1), lambda x: acv.tcav(x, 1)):
        with pytest.warns(InputWarning, match=r"same for every image.*use layer '1\.0' instead"):
            call(planted["test"])
    acv.concept_maps(planted["test"])  # these differ from image to image
    acv.explain(planted["test"], contributions=False)
    early = SpatialACV(net, "0").fit({"planted": planted["concept"]}, planted["negatives"])
    assert early.contributions(planted["test"]).std(0) > 0


def test_k_concepts_cost_one_backward_pass(planted, fitted):
    calls = []
    handle = planted["net"].head.register_full_backward_hook(lambda *a: calls.append(1))
    fitted.attribute(planted["test"][:2], 1)
    handle.remove()
    assert len(calls) == 1


# ------------------------------------------------------------------------------------------------ guidance and options


def test_other_concepts_are_the_negatives_where_none_are_given(planted):
    sets = {"a": planted["concept"], "b": planted["negatives"]}
    acv = SpatialACV(planted["net"], "at").fit(sets)
    assert float(acv.vectors[0] @ acv.vectors[1]) < -0.99
    again = SpatialACV(planted["net"], "at").fit(sets, dict(sets))  # an image is never its own negative
    assert torch.allclose(acv.vectors, again.vectors, atol=1e-4)
    with pytest.raises(InputError, match="a single concept needs negatives"):
        SpatialACV(planted["net"], "at").fit({"a": planted["concept"]})


def test_negatives_that_have_the_name_of_a_concept_are_those_of_the_others(planted):
    sets = {"planted": planted["concept"], "noise": torch.rand(5, 4, 24, 24)}
    others = {"planted": torch.rand(3, 4, 24, 24), "rest": planted["negatives"][:6]}
    acv = SpatialACV(planted["net"], "at").fit(sets, others)
    assert [acv.rows_[name]["negative_images"] for name in sets] == [6, 9]


def test_captum_concepts_and_tensors_agree(planted):
    make = lambda i, name, x: Concept(i, name, DataLoader(x, batch_size=4))  # noqa: E731
    a = SpatialACV(planted["net"], "at").fit({"a": planted["concept"]}, planted["negatives"])
    b = SpatialACV(planted["net"], "at").fit(
        [make(0, "a", planted["concept"])], [make(1, "random", planted["negatives"])]
    )
    # the sets' names seed only the row sample, and no row was cut here
    assert torch.allclose(a.vectors, b.vectors, atol=1e-6)
    assert b.concepts == ["a"]


def test_the_row_budget_is_kept_and_reported(planted):
    acv = SpatialACV(planted["net"], "at").fit({"a": planted["concept"]}, planted["negatives"], max_rows=600)
    assert acv.rows_["a"] == {
        "concept_images": 14, "concept_rows": 300, "concept_rows_seen": 14 * 144,
        "negative_images": 18, "negative_rows": 300, "negative_rows_seen": 18 * 144,
    }  # fmt: skip
    assert "300 of 2016" in acv.summary()
    again = SpatialACV(planted["net"], "at").fit({"a": planted["concept"]}, planted["negatives"], max_rows=600)
    assert torch.equal(acv.vectors, again.vectors)
    other = SpatialACV(planted["net"], "at").fit({"a": planted["concept"]}, planted["negatives"], max_rows=600, seed=1)
    assert not torch.equal(acv.vectors, other.vectors)


class MeanDifference(Classifier):
    """A captum Classifier: the difference of the class means."""

    def __init__(self, order=(0, 1)):
        self.order = order

    def train_and_eval(self, dataloader, **kwargs):
        parts = list(dataloader)
        x, y = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
        self.labels = sorted(y.unique().tolist())
        first, second = (x[y == label].mean(0) for label in self.labels)
        self.w = torch.stack([first - second, second - first])

    def weights(self):
        return self.w[list(self.order)]

    def classes(self):
        return [self.labels[i] for i in self.order]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_any_captum_classifier_works_in_any_class_order(planted, order):
    classifier = MeanDifference(order)
    acv = SpatialACV(planted["net"], "at", classifier=classifier)
    acv.fit({"planted": planted["concept"]}, planted["negatives"])
    assert acv.classifier is classifier
    assert float(acv.vectors[0] @ F.normalize(planted["net"].direction.detach(), dim=0)) > 0.99
    assert acv.accuracies_[0] > 0.97
    assert acv.concept_maps(planted["concept"], probability=True).mean() > 0.8


@pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy.ndarrays")  # inside Captum
def test_captums_default_classifier_works_and_leaves_the_random_states(planted):
    pytest.importorskip("sklearn")
    from captum.concept._utils.classifier import DefaultClassifier

    with pytest.warns(UserWarning, match="default classifier"):
        classifier = DefaultClassifier()
    state = torch.get_rng_state()
    acv = SpatialACV(planted["net"], "at", classifier=classifier)
    acv.fit({"planted": planted["concept"]}, planted["negatives"], max_rows=800)
    assert torch.equal(state, torch.get_rng_state())
    assert float(acv.vectors[0] @ F.normalize(planted["net"].direction.detach(), dim=0)) > 0.9
    assert acv.accuracies_[0] > 0.95


def test_the_layers_input_can_be_fitted_and_explained(planted):
    net = planted["net"]
    acv = SpatialACV(net, "tail").fit(
        {"planted": planted["concept"]}, planted["negatives"], attribute_to_layer_input=True
    )
    output = SpatialACV(net, "at").fit({"planted": planted["concept"]}, planted["negatives"])
    assert torch.allclose(acv.vectors, output.vectors, atol=1e-5)
    x = planted["test"][:2]
    assert torch.allclose(acv.attribute(x, 1, attribute_to_layer_input=True), output.attribute(x, 1), atol=1e-6)
    assert torch.allclose(acv.concept_maps(x), output.concept_maps(x), atol=1e-4)
    assert torch.allclose(acv.tcav(x, 1)["magnitude"], output.tcav(x, 1)["magnitude"], atol=1e-5)
    with pytest.raises(InputError, match="fitted with True"):
        acv.attribute(x, 1)


# ------------------------------------------------------------------------------------------------ inside Captum


@pytest.mark.parametrize("is_fitted", [False, True])
def test_captums_tcav_takes_it_as_its_attribution_method(planted, tmp_path, is_fitted):
    net, x = planted["net"], planted["test"][:6]
    concepts = [
        Concept(0, "planted", DataLoader(planted["concept"], batch_size=7)),
        Concept(1, "random", DataLoader(planted["negatives"][:14], batch_size=7)),
    ]
    acv = SpatialACV(net, "at")
    if is_fitted:
        acv.fit([concepts[0]], [concepts[1]])
    scores = []
    for name, method in (("own", None), ("acv", acv)):
        tcav = TCAV(
            net, ["at", "tail"], classifier=MeanDifference(), layer_attr_method=method, save_path=str(tmp_path / name)
        )
        scores.append(tcav.interpret(x, [concepts], target=2))
    for layer in ("at", "tail"):
        for kind in ("sign_count", "magnitude"):
            assert torch.allclose(scores[0]["0-1"][layer][kind], scores[1]["0-1"][layer][kind], atol=1e-5)
    # afterwards it is what it was before
    assert acv.layer == "at"
    if is_fitted:
        assert acv.attribute(x, 1).shape == (6, 1, 12, 12)
    else:
        with pytest.raises(NotFittedError):
            acv.attribute(x, 1)


def test_noise_tunnel_averages_noisy_maps(planted, fitted):
    torch.manual_seed(0)
    x = planted["test"][:2]
    smooth = NoiseTunnel(fitted).attribute(x, nt_samples=3, stdevs=1e-4, target=1)
    assert torch.allclose(smooth, fitted.attribute(x, 1), atol=1e-3)


# ------------------------------------------------------------------------------------------------ save and load


def test_saved_and_loaded_maps_are_bit_identical(planted, tmp_path):
    sets = {"planted": planted["concept"], "other": planted["test"]}
    acv = SpatialACV(planted["net"], "at", batch_size=7).fit(sets, planted["negatives"], n_random=5)
    path = acv.save(tmp_path / "acv.safetensors")
    for layer in ("at", planted["net"].at, None):
        again = SpatialACV.load(path, planted["net"], layer)
        x = planted["test"]
        assert torch.equal(again.concept_maps(x), acv.concept_maps(x))
        assert torch.equal(again.concept_maps(x, probability=True), acv.concept_maps(x, probability=True))
        assert torch.equal(again.attribute(x, 1), acv.attribute(x, 1))
        for name in ("accuracies_", "confidence_intervals_", "contrasts_", "p_values_", "significant_"):
            assert torch.equal(getattr(again, name), getattr(acv, name))
        assert (again.concepts, again.rows_, again.batch_size) == (acv.concepts, acv.rows_, 7)


def test_a_foreign_or_broken_file_is_refused(planted, fitted, tmp_path):
    path = fitted.save(tmp_path / "acv")
    with pytest.raises(ArtifactError, match="fitted on layer 'at', not 'tail'"):
        SpatialACV.load(path, planted["net"], "tail")
    with pytest.raises(ArtifactError, match="another model"):
        SpatialACV.load(path, Planted(seed=1).eval(), "at")
    changed = copy.deepcopy(planted["net"])
    with torch.no_grad():
        changed.conv.weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(ArtifactError, match="another model"):
        SpatialACV.load(path, changed, "at")
    with pytest.raises(ArtifactError, match="fitted on layer 'at'"):
        SpatialACV.load(path, nn.Sequential(nn.Conv2d(3, 4, 3)), None)
    with pytest.raises(FileNotFoundError):
        SpatialACV.load(tmp_path / "none", planted["net"], "at")
    whole = path.read_bytes()
    for broken in (b"", whole[:40], whole[:-10], b"x" * 100):
        (tmp_path / "broken").write_bytes(broken)
        with pytest.raises(ArtifactError):
            SpatialACV.load(tmp_path / "broken", planted["net"], "at")
    explanation = fitted.explain(planted["test"]).save(tmp_path / "explanation")
    with pytest.raises(ArtifactError, match="not a saved SpatialACV"):
        SpatialACV.load(explanation, planted["net"], "at")


# ------------------------------------------------------------------------------------------------ other layouts


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_tokens_and_channels_last(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    size = 64 if "vit" in name else 224
    options = {"img_size": size, "depth": 2} if "vit" in name else {"depths": (1, 1)}
    net = timm.create_model(name, num_classes=3, **options).eval()
    layer = "blocks.0" if "vit" in name else "layers.0"
    draw = torch.Generator().manual_seed(0)
    light, dark = torch.rand(3, 3, size, size, generator=draw), torch.rand(3, 3, size, size, generator=draw) * 0.2
    acv = SpatialACV(net, layer).fit({"light": light}, dark)
    grid = (4, 4) if "vit" in name else (56, 56)
    halves = torch.cat([light[:1, :, :, : size // 2], dark[:1, :, :, size // 2 :]], 3)
    seen = acv.concept_maps(halves)
    assert seen.shape == (1, 1, *grid)
    assert seen[..., : grid[1] // 2].mean() > seen[..., grid[1] // 2 :].mean()
    maps = acv.attribute(halves, 1)
    module = net.get_submodule(layer)
    raw = LayerGradientXActivation(net, module, multiply_by_inputs=False).attribute(halves, 1).detach()
    plain = (raw[:, 1:] if "vit" in name else raw.flatten(1, 2)) @ acv.vectors[0]
    assert torch.allclose(maps.flatten(1), plain, atol=1e-5 * float(plain.abs().max()))


def test_half_precision_models(planted):
    net = Planted().eval().bfloat16()
    acv = SpatialACV(net, "at").fit({"planted": planted["concept"]}, planted["negatives"])
    assert float(acv.vectors[0] @ F.normalize(net.direction.detach().float(), dim=0)) > 0.95
    maps = acv.attribute(planted["test"][:2].bfloat16(), 1)
    assert maps.dtype == torch.float32


# ------------------------------------------------------------------------------------------------ scenes


class TextureEnergy(nn.Module):
    """Local energy of oriented gratings in the luminance, and the colours it was made from."""

    def __init__(self):
        super().__init__()
        t = torch.arange(9) - 4.0
        y, x = torch.meshgrid(t, t, indexing="ij")
        bank = []
        for period in (4.0, 5.5, 8.0):
            for k in range(8):
                along = x * torch.tensor(k * torch.pi / 8).cos() + y * torch.tensor(k * torch.pi / 8).sin()
                for phase in (0.0, torch.pi / 2):
                    g = torch.cos(2 * torch.pi * along / period + phase) * torch.exp(-(x**2 + y**2) / 12)
                    bank.append(g - g.mean())
        self.luminance = nn.Conv2d(3, 1, 1, bias=False)
        self.luminance.weight.data = torch.tensor([0.2126, 0.7152, 0.0722]).view(1, 3, 1, 1)
        self.gratings = nn.Conv2d(1, len(bank), 9, padding=4, bias=False)
        self.gratings.weight.data = torch.stack(bank)[:, None]
        self.energy, self.gray = nn.Identity(), nn.AvgPool2d(8)
        self.head = nn.Linear(len(bank) // 2, 2)

    def forward(self, x):
        light = self.luminance(x)
        self.gray(light)
        pairs = self.gratings(light).square().unflatten(1, (-1, 2)).sum(2)
        # the eight orientations of a period in order of strength: stripes run one way, dots and checks several
        pooled = F.avg_pool2d(pairs, 5, 2, 2).log1p().unflatten(1, (3, 8)).sort(2, descending=True).values
        energy = self.energy(pooled.flatten(1, 2))
        return self.head(energy.mean((2, 3)))


def texture_images(texture: str, n: int, seed: int) -> Tensor:
    """Images all over of one texture, drawn as the scenes draw theirs."""
    draw = torch.Generator().manual_seed(seed)
    u = lambda low, high: float(torch.rand((), generator=draw)) * (high - low) + low  # noqa: E731
    images = torch.zeros(n, 3, 64, 64)
    for image in images:
        colour = int(u(0, 6))
        spec = ObjectSpec(
            shape=1, colour=colour, texture=TEXTURES.index(texture), x=0.5, y=0.5, radius=2.0, angle=0.0,
            texture_angle=u(0, 3.14), period=u(0.075, 0.095), phase=(u(0, 1), u(0, 1)),
            rgb=list(COLOURS.values())[colour],
        )  # fmt: skip
        draw_object(image.numpy(), spec)
    return images


def test_striped_is_found_on_scenes_and_controls_are_not():
    net = TextureEnergy().eval()
    known = CaptionedScenes(80, seed=6, size=64)
    k = known.concepts.index("striped")
    others = known.stack([i for i in range(80) if not known.presence[i, k]]).image
    acv = SpatialACV(net, "energy", layout="NCHW").fit(
        {"striped": texture_images("striped", 24, 0)}, others, n_random=20
    )
    assert acv.accuracies_[0] > 0.85
    assert bool(acv.significant_[0])
    scenes = CaptionedScenes(120, seed=5, size=64)
    chosen = [i for i in range(120) if scenes.presence[i, k]][:40]
    batch = scenes.stack(chosen)
    maps, masks = acv.concept_maps(batch.image, probability=True)[:, 0], batch.masks[:, k]
    # controls: a random direction, and vectors of permuted labels
    mixed = torch.cat([texture_images("striped", 24, 0), others])
    mixed = mixed[torch.randperm(len(mixed), generator=torch.Generator().manual_seed(0))]
    permuted = SpatialACV(net, "energy", layout="NCHW").fit({"x": mixed[:24]}, mixed[24:], n_random=20)
    assert not bool(permuted.significant_[0])
    random = copy.copy(acv)
    vectors = F.normalize(torch.randn(20, 24, generator=torch.Generator().manual_seed(1)), dim=1)
    random._fitted = type(acv._fitted)(
        tuple(str(i) for i in range(20)), vectors, *[torch.zeros(20)] * 3, torch.zeros(20, 2), torch.zeros(20), None, {}
    )
    by_random = random.concept_maps(batch.image)
    own = float(nra(maps, masks, baseline="exact").mean()), float(epg(maps, masks).mean())
    shuffled = permuted.concept_maps(batch.image, probability=True)[:, 0]
    control = [(float(nra(m, masks, baseline="exact").mean()), float(epg(m, masks).mean()))
               for m in (shuffled, *by_random.unbind(1))]  # fmt: skip
    by_chance = [sum(c[i] for c in control[1:]) / 20 for i in (0, 1)]
    # Single random directions of so small a layer may be stripe detectors themselves; on average they are not.
    assert own[0] > 0.4
    assert own[0] > control[0][0] + 0.2
    assert own[0] > by_chance[0] + 0.15
    assert own[1] > 2 * control[0][1]
    assert own[1] > 1.25 * by_chance[1]


def test_what_a_layer_cannot_know_is_not_significant():
    """Hue at a layer that is given the luminance alone: the same images, their hue turned, the luminance kept."""
    net = TextureEnergy().eval()
    images = torch.cat([texture_images(t, 10, i) for i, t in enumerate(TEXTURES)])
    gray = (images * net.luminance.weight.detach()).sum(1, keepdim=True)
    # red up and green down, or the reverse, so that 0.2126 r + 0.7152 g + 0.0722 b stays
    turn = torch.tensor([0.7152, -0.2126, 0.0]).view(1, 3, 1, 1) * 0.1
    half = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    reddish, greenish = gray[half[:20]] + turn, gray[half[20:]] - turn
    known = SpatialACV(net, "luminance").fit({"reddish": reddish}, greenish, n_random=20)
    assert not bool(known.significant_[0])
    energy = SpatialACV(net, "energy", layout="NCHW").fit({"reddish": reddish}, greenish, n_random=20)
    assert not bool(energy.significant_[0])


def test_layer_sweep_compares_layers_and_draws_them(planted):
    noise = scenes_with(torch.zeros(14, 24, 24), 9)
    sets = {"planted": planted["concept"], "noise": noise}
    sweep = layer_sweep(planted["net"], ["conv", "at", planted["net"].tail], sets, planted["negatives"], n_random=20)
    assert sweep.layers == ["conv", "at", "tail"]
    assert sweep.accuracies.shape == sweep.contrasts.shape == sweep.p_values.shape == (3, 2)
    assert sweep.accuracies[0, 0] < 0.62  # the direction is added behind conv
    assert sweep.accuracies[1, 0] > 0.97
    assert sweep.p_values[0, 0] > 0.05 > sweep.p_values[1, 0]
    assert sweep.best()["planted"] in ("at", "tail")
    single = SpatialACV(planted["net"], "at").fit(sets, planted["negatives"], n_random=20)
    assert torch.equal(sweep.methods[1].vectors, single.vectors)
    assert torch.equal(sweep.accuracies[1], single.accuracies_)
    figure = sweep.plot()
    left, right = figure.axes
    assert [t.get_text() for t in left.get_xticklabels()] == ["conv", "at", "tail"]
    assert [t.get_text() for t in right.get_legend().get_texts()] == ["planted", "noise"]
    again = SpatialACV.layer_sweep(planted["net"], ["at"], sets, planted["negatives"])
    assert again.p_values is None
    with pytest.raises(InputError, match="list of at least one layer"):
        layer_sweep(planted["net"], "at", sets, planted["negatives"])


def test_no_call_of_the_model_sees_more_than_a_batch(planted):
    sizes = []
    handle = planted["net"].register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    acv = SpatialACV(planted["net"], "at", batch_size=5)
    acv.fit([Concept(0, "a", DataLoader(planted["concept"], batch_size=14))], planted["negatives"])
    acv.attribute(planted["test"], 1), acv.concept_maps(planted["test"]), acv.explain(planted["test"])
    acv.tcav(planted["test"], 1)
    handle.remove()
    assert max(sizes) == 5
    assert sizes[:7] == [5, 5, 5, 3, 5, 5, 4]  # the negatives, then the concept: full batches, each image once


def test_images_of_several_sizes_teach_together(planted):
    small = scenes_with(torch.ones(4, 16, 20), 5)
    acv = SpatialACV(planted["net"], "at").fit({"a": [*planted["concept"][:4], *small]}, planted["negatives"])
    assert acv.rows_["a"]["concept_rows_seen"] == 4 * 144 + 4 * 80
    assert float(acv.vectors[0] @ F.normalize(planted["net"].direction.detach(), dim=0)) > 0.9


def test_the_picture_greys_what_is_not_encoded(planted):
    from matplotlib.text import Text

    from captum_concepts.visualization import panel

    noise = scenes_with(torch.zeros(14, 24, 24), 9)
    sets = {"noise": noise, "planted": planted["concept"]}
    acv = SpatialACV(planted["net"], "at").fit(sets, planted["negatives"], n_random=20)
    x = planted["test"][:1]
    e = acv.explain(x)
    assert (acv.concepts, e.concepts) == (["noise", "planted"], ["planted", "noise"])  # two orders
    figure = panel(e, x[:, :3], significant=acv)
    words = [text.get_text() for text in figure.findobj(Text)]
    assert sum("not encoded here" in text for text in words) == 1
    drawn = {a.get_label(): np.asarray(a.images[0].get_array(), dtype=int) for a in figure.axes if a.images}
    assert np.ptp(drawn["noise"], axis=-1).max() == 0
    assert np.ptp(drawn["planted"], axis=-1).max() > 30
    every = panel(acv.explain(x), x[:, :3], significant=torch.tensor([True, True]))
    assert not any("not encoded here" in text.get_text() for text in every.findobj(Text))


def test_real_textures_and_photographs(shared_data, monkeypatch):
    """Stripes and checks of real photographs, in a real network."""
    monkeypatch.syspath_prepend(str(shared_data))
    real_models = pytest.importorskip("real_models")
    net = real_models.mobilenet_v2()
    files = {f.name: sorted(f.iterdir())[:10] for f in (shared_data / "images" / "dtd").iterdir()}
    acv = SpatialACV(net, "net.features.13").fit(files, image_size=160, n_random=20)
    assert acv.accuracies_.mean() > 0.75
    assert bool(acv.significant_.all())
    photographs = sorted((shared_data / "images" / "imagenet").glob("*.jpg"))
    zebra = [f for f in photographs if "zebra" in f.name]
    others = photographs[::30]
    scores = []
    for paths in (zebra, others):
        images = torch.stack(list(open_images(paths, size=160)))
        scores.append(acv.concept_maps(images, "banded").amax((1, 2, 3)))
    assert float((scores[0] > scores[1]).float().mean()) > 0.8


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("concepts", "negatives", "message"),
    [
        (lambda p: {"a": p["concept"][:1]}, "negatives", "1 image, 1 distinct"),
        (lambda p: {"a": p["concept"][:1].repeat(5, 1, 1, 1)}, "negatives", "5 images, 1 distinct"),
        (lambda p: {"a": p["concept"][:0]}, "negatives", "no image"),
        (lambda p: {"a": p["negatives"].clone()}, "negatives", "identical images"),
        (lambda p: {"a": p["negatives"]}, "negatives", "identical images"),
        (lambda p: {"a": p["concept"][0]}, "negatives", "no batch dimension"),
        (lambda p: {}, "negatives", "empty"),
    ],
)
def test_guidance_that_cannot_teach_is_refused(planted, concepts, negatives, message):
    acv = SpatialACV(planted["net"], "at")
    with pytest.raises(InputError, match=message):
        acv.fit(concepts(planted), planted[negatives])
    with pytest.raises(NotFittedError):
        acv.concept_maps(planted["test"])


def test_gray_examples_are_read_as_rgb_and_four_channels_are_refused():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    light, dark = torch.rand(4, 1, 12, 12) * 0.3 + 0.7, torch.rand(4, 3, 12, 12) * 0.3
    mixed = SpatialACV(net, "1").fit({"light": light}, dark)
    plain = SpatialACV(net, "1").fit({"light": light.expand(-1, 3, -1, -1)}, dark)
    assert torch.equal(mixed.vectors, plain.vectors)
    with pytest.raises(InputError, match=r"4 channels.*bands="):
        SpatialACV(net, "1").fit({"light": light}, torch.rand(4, 4, 12, 12))


@pytest.mark.parametrize(
    "option",
    [
        {"n_random": -1},
        {"n_random": 1},
        {"folds": 1},
        {"max_rows": 3},
        {"lam": 0.0},
        {"seed": "x"},
        {"seed": 2**63},
        {"n_random": True},
    ],
)
def test_bad_options_are_refused(planted, option):
    with pytest.raises(InputError, match=next(iter(option))):
        SpatialACV(planted["net"], "at").fit({"a": planted["concept"]}, planted["negatives"], **option)


def test_bad_construction_and_use_are_refused(planted, fitted):
    with pytest.raises(LayerError, match="no layer 'nowhere'"):
        SpatialACV(planted["net"], "nowhere")
    with pytest.raises(InputError, match="Classifier or None"):
        SpatialACV(planted["net"], "at", classifier=object())
    with pytest.raises(InputError, match="batch_size"):
        SpatialACV(planted["net"], "at", batch_size=0)
    with pytest.raises(NotFittedError, match="call fit"):
        SpatialACV(planted["net"], "at").vectors
    with pytest.raises(InputError, match="construct another SpatialACV"):
        fitted.layer = "tail"
    for target in (5, [0, 1], torch.tensor([0, 1, 2]), 1.5, None):
        with pytest.raises(TargetError):
            fitted.attribute(planted["test"], target=target)
    with pytest.raises(InputError, match="top_k"):
        fitted.explain(planted["test"], top_k=0)


def test_a_layer_that_does_not_reach_the_target_is_said_so(planted):
    class Unread(Planted):
        def forward(self, x):
            super().forward(x)
            return self.head(x.mean((2, 3))[:, :1].expand(-1, 10))

    acv = SpatialACV(Unread().eval(), "at").fit({"planted": planted["concept"]}, planted["negatives"])
    with pytest.raises(LayerError, match="does not depend"):
        acv.attribute(planted["test"], 1)

    class Dead(Planted):
        def forward(self, x):
            return super().forward(x) * 0.0

    acv = SpatialACV(Dead().eval(), "at").fit({"planted": planted["concept"]}, planted["negatives"])
    with pytest.warns(InputWarning, match="zero for every example"):
        assert not acv.attribute(planted["test"], 1).any()
    assert acv.concept_maps(planted["test"]).any()

    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3).eval()
    images = torch.rand(6, 3, 64, 64)
    last = SpatialACV(vit, "blocks.1").fit({"a": images[:3]}, images[3:] * 0.3)
    with pytest.raises(LayerError, match=r"use layer 'blocks\.0' instead"):
        last.attribute(images, 1)


def test_the_model_is_left_as_it_was(planted):
    net = Planted().train()
    for p in net.parameters():
        p.requires_grad_(False)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    rng = torch.get_rng_state()
    data = Concept(0, "planted", DataLoader(TensorDataset(planted["concept"]), batch_size=4, shuffle=True))
    with torch.no_grad():
        acv = SpatialACV(net, "at").fit([data], planted["negatives"], n_random=5)
        acv.attribute(planted["test"], 1)
        acv.explain(planted["test"])
    assert torch.equal(rng, torch.get_rng_state())
    assert net.training
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_too_few_images_or_random_sets_are_not_taken_for_not_encoded(planted):
    acv = SpatialACV(Planted(), "at")
    with pytest.warns(InputWarning, match="cannot be tested with 6 images"):
        acv.fit({"planted": planted["concept"][:3]}, planted["negatives"][:3], n_random=20)
    with pytest.warns(InputWarning, match="n_random=2 random sets"):
        acv.fit({"planted": planted["concept"]}, planted["negatives"], n_random=2)
    acv.fit({"planted": planted["concept"][:3]}, planted["negatives"][:3])  # without a test


@pytest.mark.parametrize("target", [torch.tensor([1, 0, 1], dtype=torch.uint8), [-1, 0, -1], list(np.array([1, 0, 1]))])
def test_every_form_of_a_target(planted, target):
    acv = SpatialACV(Planted(), "at").fit({"planted": planted["concept"]}, planted["negatives"])
    x = planted["test"][:3]
    outputs = Planted()(x).shape[1]
    assert torch.equal(acv.attribute(x, target), acv.attribute(x, [int(t) % outputs for t in target]))
    with pytest.raises(TargetError):
        acv.explain(x, target=99, contributions=False)
