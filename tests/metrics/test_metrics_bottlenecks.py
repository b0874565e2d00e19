"""SURF, existence, location and leakage against slow references written from the papers' formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from captum_concepts import metrics
from captum_concepts.errors import InputError


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestSurf:
    def test_is_the_formula(self):
        outputs, importance, bias = noise(5, 3), noise(3, 4, seed=1), noise(3, seed=2)
        for presence in (noise(5, 4, seed=3), noise(5, 3, 4, seed=4)):
            emd, mae = [], []
            for n in range(5):
                y = outputs[n].tolist()
                said = []
                for i in range(3):
                    row = presence[n] if presence.ndim == 2 else presence[n, i]
                    said.append(sum(float(importance[i, k] * row[k]) for k in range(4)) + float(bias[i]))
                p, q = (np.exp(v) / np.exp(v).sum() for v in (np.array(y), np.array(said)))
                emd.append(np.abs(p - q).sum() / 2)
                mae.append(np.abs(np.array(y) - np.array(said)).mean())
            found = metrics.surf(outputs, presence, importance, bias=bias)
            torch.testing.assert_close(found, torch.tensor(emd).float(), atol=1e-6, rtol=1e-5)
            found = metrics.surf(outputs, presence, importance, bias=bias, space="logit")
            torch.testing.assert_close(found, torch.tensor(mae).float(), atol=1e-6, rtol=1e-5)

    def test_random_concepts_score_worse(self):
        """The paper's own sanity check, with K concepts of a linear head: the best directions, and random ones."""
        features, head = noise(200, 32).relu(), noise(10, 32, seed=1)
        outputs = features @ head.T
        best = torch.linalg.svd(head)[2][:5]
        errors = {"logit": [], "probability": []}
        for seed in range(20):
            random = torch.linalg.qr(noise(32, 5, seed=seed + 9))[0].T
            for space, kept in errors.items():
                kept.append(float(metrics.surf(outputs, features @ random.T, head @ random.T, space=space).mean()))
        for space, kept in errors.items():
            assert float(metrics.surf(outputs, features @ best.T, head @ best.T, space=space).mean()) < min(kept)
        complete = torch.linalg.qr(noise(32, 32, seed=7))[0].T
        assert float(metrics.surf(outputs, features @ complete.T, head @ complete.T).max()) < 1e-4

    def test_a_bottleneck_is_its_own_surrogate(self):
        from captum_concepts import SALFCBM

        net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=4), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        model = SALFCBM(net, "0", ["fur", "wheels", "grass"], 4).eval()
        images = noise(3, 3, 32, 32)
        with torch.no_grad():
            own = metrics.surf(model(images), model.scores(images), model.head.weight, bias=model.head.bias)
        assert float(own.max()) < 1e-6

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((noise(5), noise(5, 2), noise(3, 2)), "outputs must be"),
            ((noise(5, 3), noise(5, 2), noise(2, 2)), "importance must be"),
            ((noise(5, 3), noise(4, 2), noise(3, 2)), "presence must be"),
            ((noise(5, 3), noise(5, 3), noise(3, 2)), "presence must be"),
        ],
    )
    def test_wrong_shapes(self, arguments, message):
        with pytest.raises(InputError, match=message):
            metrics.surf(*arguments)
        with pytest.raises(InputError, match="bias must be"):
            metrics.surf(noise(5, 3), noise(5, 2), noise(3, 2), bias=noise(2))


class TestExistenceAndLocation:
    def test_existence_is_the_formula(self):
        contributions, truth = noise(20, 7), noise(20, 7, seed=1) > 0
        for k in (1, 3, 5, 9):
            expected = []
            for row, there in zip(contributions.tolist(), truth.tolist(), strict=True):
                q = sorted(range(7), key=lambda j: -row[j])[:k]
                expected.append(sum(there[j] for j in q) / len(q))
            torch.testing.assert_close(metrics.concept_existence(contributions, truth, k=k), torch.tensor(expected))

    def test_equal_contributions_share_their_places(self):
        truth = torch.tensor([[True, False, False, False], [False, False, False, True]])
        found = metrics.concept_existence(torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0]]), truth, k=2)
        assert found.tolist() == [0.25, pytest.approx(0.5 / 3)]
        assert metrics.concept_existence(torch.tensor([[math.nan, 1.0]]), truth[:1, :2]).isnan().all()

    def test_location_is_the_formula(self):
        maps, size = noise(6, 4, 5, 5), (20, 24)
        points = torch.rand(6, 4, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([24.0, 20.0])
        points[noise(6, 4, seed=2) > 0.5] = math.nan
        points[0], importance = math.nan, noise(6, 4, seed=3)
        for area in (1 / 12, 3 / 12, 6 / 12):
            for k in (1, 2, 4):
                expected = []
                for n in range(6):
                    known = [t for t in range(4) if not points[n, t].isnan().any()]
                    known = sorted(known, key=lambda t, n=n: -importance[n, t])[:k]
                    hits = []
                    for t in known:
                        large = torch.nn.functional.interpolate(maps[n : n + 1, t : t + 1], size, mode="bilinear")[0, 0]
                        x, y = points[n, t].tolist()
                        highest = large.flatten().argsort(descending=True)[: round(area * 20 * 24)].tolist()
                        hits.append(int(y) * 24 + int(x) in highest)
                    expected.append(sum(hits) / len(hits) if hits else math.nan)
                found = metrics.concept_location(maps, points, size, importance=importance, k=k, area=area)
                torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True)

    def test_a_map_that_knows_nothing_scores_the_area(self):
        points = torch.rand(3, 2, 2) * 16
        found = metrics.concept_location(torch.ones(3, 2, 4, 4), points, (16, 16), area=0.25)
        assert found.tolist() == [0.25] * 3
        maps = torch.ones(3, 2, 4, 4)
        maps[0, 0] = math.nan
        assert metrics.concept_location(maps, points, (16, 16)).isnan().tolist() == [True, False, False]
        points[0, 0] = math.nan  # nobody asks for the broken map any more
        assert not metrics.concept_location(maps, points, (16, 16)).isnan().any()
        with pytest.raises(InputError, match="points must be inside the image"):
            metrics.concept_location(maps, points + 16, (16, 16))

    def test_location_from_the_keypoints_of_cub(self):
        """Shapes as :meth:`CUB.keypoints` returns them: x, y, visible."""
        keypoints = torch.tensor([[3.0, 2.0, 1], [0, 0, 0]])
        points = keypoints[:, :2].masked_fill(keypoints[:, 2:] == 0, math.nan)[None]
        maps = torch.zeros(1, 2, 8, 8)
        maps[0, 0, 2, 3] = 1
        assert metrics.concept_location(maps, points, (8, 8), area=1 / 64).tolist() == [1]


def plug_in(a: list[int], b: list[int]) -> float:
    """I(a; b) from counts, in nats."""
    n, total = len(a), 0.0
    for x in set(a):
        for y in set(b):
            p = sum(i == x and j == y for i, j in zip(a, b, strict=True)) / n
            if p:
                total += p * math.log(p / (a.count(x) / n) / (b.count(y) / n))
    return total


class TestLeakage:
    def test_of_discrete_concepts_is_the_formula(self):
        g = torch.Generator().manual_seed(0)
        truth, labels = torch.randint(0, 2, (40, 3), generator=g), torch.randint(0, 4, (40,), generator=g)
        predicted = torch.where(torch.rand(40, 3, generator=g) < 0.3, labels[:, None] % 2, truth)
        y = labels.tolist()
        c, s = [col.tolist() for col in truth.T], [col.tolist() for col in predicted.T]
        expected = [max(0, plug_in(s[i], y) - plug_in(c[i], y)) / plug_in(y, y) for i in range(3)]
        found = metrics.concept_task_leakage(predicted, truth, labels)
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-5)

        def normalized(v, i, j):
            return plug_in(v[i], v[j]) / math.sqrt(plug_in(v[i], v[i]) * plug_in(v[j], v[j]))

        expected = [
            sum(max(0, normalized(s, i, j) - normalized(c, i, j)) for j in range(3) if j != i) / 2 for i in range(3)
        ]
        found = metrics.interconcept_leakage(predicted, truth)
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-5)

    def test_of_continuous_concepts_is_scikit_learns_estimator(self):
        estimators = pytest.importorskip("sklearn.feature_selection._mutual_info", reason="scikit-learn's estimators")
        g = torch.Generator().manual_seed(1)
        truth, labels = torch.randint(0, 2, (120, 3), generator=g), torch.randint(0, 3, (120,), generator=g)
        predicted = (truth + 0.5 * labels[:, None] + torch.randn(120, 3, generator=g)).double()
        y, values = labels.numpy(), predicted.numpy()
        told = [estimators._compute_mi_cd(values[:, i], y, 3) for i in range(3)]
        meant = [plug_in(truth[:, i].tolist(), y.tolist()) for i in range(3)]
        entropy = plug_in(y.tolist(), y.tolist())
        expected = [max(0, a - b) / entropy for a, b in zip(told, meant, strict=True)]
        found = metrics.concept_task_leakage(predicted, truth, labels)
        torch.testing.assert_close(found, torch.tensor(expected).float(), atol=1e-6, rtol=1e-5)

        def said(i, j):
            own = [estimators._compute_mi_cc(values[:, k], values[:, k], 3) for k in (i, j)]
            return estimators._compute_mi_cc(values[:, i], values[:, j], 3) / math.sqrt(own[0] * own[1])

        def true(i, j):
            a, b = truth[:, i].tolist(), truth[:, j].tolist()
            return plug_in(a, b) / math.sqrt(plug_in(a, a) * plug_in(b, b))

        expected = [sum(max(0, said(i, j) - true(i, j)) for j in range(3) if j != i) / 2 for i in range(3)]
        found = metrics.interconcept_leakage(predicted, truth)
        torch.testing.assert_close(found, torch.tensor(expected).float(), atol=1e-6, rtol=1e-5)

    def test_blocks_of_rows_make_no_difference(self, monkeypatch):
        g = torch.Generator().manual_seed(2)
        truth, labels = torch.randint(0, 2, (50, 2), generator=g), torch.randint(0, 3, (50,), generator=g)
        predicted = torch.rand(50, 2, generator=g)
        predicted[:20] = predicted[0]  # equal values
        whole = metrics.concept_task_leakage(predicted, truth, labels), metrics.interconcept_leakage(predicted, truth)
        monkeypatch.setattr("captum_concepts.metrics.bottlenecks._CELLS", 150)
        torch.testing.assert_close(metrics.concept_task_leakage(predicted, truth, labels), whole[0])
        torch.testing.assert_close(metrics.interconcept_leakage(predicted, truth), whole[1])

    def test_a_concept_that_leaks_the_class_is_found(self):
        g = torch.Generator().manual_seed(3)
        labels = torch.randint(0, 4, (400,), generator=g)
        truth = torch.randint(0, 2, (400, 2), generator=g)
        honest = truth + 0.3 * torch.rand(400, 2, generator=g)
        leaky = honest.clone()
        leaky[:, 0] += 0.05 * labels  # the class rides along
        assert metrics.concept_task_leakage(honest, truth, labels).max() < 0.08
        assert metrics.concept_task_leakage(leaky, truth, labels)[0] > 0.15
        both = leaky.clone()
        both[:, 1] = honest[:, 1] + 0.05 * labels
        assert metrics.interconcept_leakage(both, truth).mean() > metrics.interconcept_leakage(honest, truth).mean()

    def test_constant_concepts_tell_nothing(self):
        truth, labels = torch.tensor([[0, 1], [0, 1], [0, 0], [0, 0], [0, 1]]), torch.tensor([0, 1, 0, 1, 0])
        assert metrics.concept_task_leakage(torch.zeros(5, 2), truth, labels).tolist() == [0, 0]
        assert metrics.interconcept_leakage(torch.zeros(5, 2), truth).tolist() == [0, 0]

    @pytest.mark.parametrize(
        ("predicted", "truth", "labels", "message"),
        [
            (noise(9, 2), torch.zeros(9, 3), torch.arange(9), "truth must be a tensor"),
            (noise(9, 2), noise(9, 2), torch.arange(9), "bool or integers"),
            (noise(4, 2), torch.zeros(4, 2), torch.arange(4), "4 examples are too few; pass at least 5"),
            (noise(9, 2), torch.zeros(9, 2), torch.zeros(9), "all the same"),
            (noise(9, 2), torch.zeros(9, 2), torch.arange(8), "labels must be"),
            (noise(9, 2) / 0, torch.zeros(9, 2), torch.arange(9), "NaN or infinite"),
        ],
    )
    def test_wrong_input(self, predicted, truth, labels, message):
        with pytest.raises(InputError, match=message):
            metrics.concept_task_leakage(predicted, truth, labels)


@pytest.mark.parametrize("space", ["probability", "logit"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_surf_is_computed_in_single_precision(space, dtype):
    generator = torch.Generator().manual_seed(0)
    outputs = (9 * torch.randn(4, 3, generator=generator)).to(dtype)
    presence, weight = torch.randn(4, 5, generator=generator), torch.randn(3, 5, generator=generator)
    found = metrics.surf(outputs, presence, weight, space=space)
    assert torch.equal(found, metrics.surf(outputs.float(), presence, weight, space=space))


def test_an_unknown_truth_is_not_a_present_concept():
    with pytest.raises(InputError, match="truth contains NaN"):
        metrics.concept_existence(torch.rand(1, 2), torch.tensor([[1.0, torch.nan]]))
