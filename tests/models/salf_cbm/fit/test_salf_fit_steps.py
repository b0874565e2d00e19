"""The steps of a fit alone, against slow references: objective, start, cache, activations, head, concepts."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F
from salf_tiny import PROMPT, WORDS, Colours, backbone, fit, images_and_labels
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import TensorDataset

from captum_concepts.concepts import Vocabulary
from captum_concepts.errors import ArtifactError, InputError
from captum_concepts.models.cubic_similarity import cubic_similarity
from captum_concepts.models.salf_cbm import SALFCBM
from captum_concepts.models.salf_cbm.fit import (
    CachedFeatures,
    LiveFeatures,
    cache_features,
    compute_activations,
    concept_presence,
    fit_head,
    interpretable_concepts,
    labeled_images,
    objective,
    present_concepts,
)
from captum_concepts.models.salf_cbm.fit.filters import WHOLE
from captum_concepts.models.salf_cbm.fit.objective import Samples, Validation, ahead, batch_similarity
from captum_concepts.models.salf_cbm.fit.start import gather_moments, least_squares, unit_variance
from captum_concepts.models.salf_cbm.fit.steps import progress
from captum_concepts.models.salf_cbm.presence import reliabilities
from captum_concepts.solvers import fit_elastic_net
from captum_concepts.store import RegionEmbeddingStore


class InMemory:
    """Features, or region embeddings, that are simply there."""

    def __init__(self, values):
        self.values, self.dim, self.embedding_dim, self.prompt = values, values.shape[2], values.shape[2], values[0]

    def rows(self, index):
        return self.values[torch.as_tensor(index)]

    embeddings = rows

    def __len__(self):
        return len(self.values)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def problem():
    """21 images, 6 places, 7 features, 5 embedding dimensions, 4 concepts."""
    features, embeddings = random(21, 6, 7), F.normalize(random(21, 6, 5, seed=1), dim=2)
    return InMemory(features), InMemory(embeddings), F.normalize(random(4, 5, seed=2), dim=1), random(4, 7, seed=3)


def expected_similarity(features, embeddings, weight, text):
    """(M,) by the plain formula on whole tensors."""
    q, p = features @ weight.T, embeddings @ text.T
    return cubic_similarity(q, p).mean(0)


@pytest.mark.parametrize("part", [1, 200, 1 << 21])
def test_batch_similarity_and_its_gradients(problem, monkeypatch, part):
    monkeypatch.setattr(objective, "PART", part)
    features, embeddings, text, weight = problem
    f, w = features.values.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = expected_similarity(f, embeddings.values, w, text)
    expected.sum().backward()
    found, by_weight, by_features = batch_similarity(
        features.values, embeddings.values, weight, text, 21, feature_gradient=True
    )
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(by_weight, w.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(by_features, f.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("part", "batch_size"), [(1, 1), (50, 4), (1 << 21, 256)])
def test_validation_in_parts_is_validation_at_once(problem, monkeypatch, part, batch_size):
    monkeypatch.setattr(objective, "PART", part)
    features, embeddings, text, weight = problem
    rows = torch.tensor([20, 3, 4, 9, 11, 0, 17, 5, 6])
    validate = Validation(Samples(features, embeddings, rows), text, batch_size=batch_size)
    found = validate([weight, -weight, weight * 0])
    f, e = features.values[rows], embeddings.values[rows]
    torch.testing.assert_close(found[0], expected_similarity(f, e, weight, text), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], -found[0])
    assert torch.equal(found[2], torch.zeros(4))
    q = f @ weight.T
    torch.testing.assert_close(validate.spread(weight), (q - q.mean(0)).square().mean((0, 1)).sqrt())
    assert torch.equal(validate.spread(weight * 0), torch.ones(4))


@pytest.mark.parametrize("n", [9, 60, 500])
def test_features_or_similarities_that_never_change_give_nothing_to_follow(n):
    """What rounding leaves of a constant is no signal, although the similarity does not depend on scale."""
    features, embeddings = random(n, 3, 8) + 100 * random(8, seed=4), random(n, 3, 6, seed=1)
    features[:, 1] = features[0, 1].clone()
    embeddings[:, 2] = embeddings[0, 2].clone()
    weight, text = random(5, 8, seed=2), random(5, 6, seed=3)
    for place in range(3):
        f, e = (values[:, place : place + 1].contiguous() for values in (features, embeddings))
        found, gradient, by_features = batch_similarity(f, e, weight, text, n, feature_gradient=True)
        samples = Samples(InMemory(f), InMemory(e), torch.arange(n))
        validated = Validation(samples, text, batch_size=4)([weight])[0]
        if place == 0:
            expected = expected_similarity(f.double(), e.double(), weight.double(), text.double()).float()
            for values in (found, validated):
                torch.testing.assert_close(values, expected, atol=1e-3, rtol=1e-3)
            continue
        for values in (found, validated, gradient, by_features):
            assert torch.equal(values, torch.zeros_like(values))


def test_start_is_the_ridge_solution_of_p(problem):
    features, embeddings, text, _ = problem
    features.values[:, :, 6] = 3.0  # a channel that never changes
    moments = gather_moments(Samples(features, embeddings, torch.arange(21)), torch.device("cpu"), batch_size=5)
    centred = (features.values - features.values.mean(0)).flatten(0, 1).double()
    p = (embeddings.values @ text.T).double()
    p = (p - p.mean(0)).flatten(0, 1)
    assert moments.scale[6] == 0
    x = centred[:, :6] * moments.scale[:6]
    torch.testing.assert_close(x.square().mean(0), torch.ones(6, dtype=torch.float64), atol=1e-5, rtol=1e-5)
    for strength, found in zip((0.01, 0.5), least_squares(moments, text, (0.01, 0.5)), strict=True):
        expected = torch.linalg.solve(x.T @ x / len(x) + strength * torch.eye(6), x.T @ p / len(x)).T
        torch.testing.assert_close(found[:, :6], expected, atol=1e-5, rtol=1e-4)
        maps = x @ unit_variance(found, moments)[:, :6].T
        torch.testing.assert_close(maps.square().mean(0), torch.ones(4, dtype=torch.float64), atol=1e-5, rtol=1e-5)


def test_start_from_some_of_many_images(problem, monkeypatch):
    features, embeddings, _, _ = problem
    monkeypatch.setattr("captum_concepts.models.salf_cbm.fit.start.MOST_IMAGES", 10)
    samples = Samples(features, embeddings, torch.arange(21))
    first, again = (gather_moments(samples, torch.device("cpu"), seed=3) for _ in range(2))
    other = gather_moments(samples, torch.device("cpu"), seed=4)
    assert torch.equal(first.features, again.features)
    assert not torch.equal(first.features, other.features)


def test_reading_ahead_keeps_order_and_passes_errors_on():
    assert list(ahead(lambda x: x + 1, range(7), depth=3)) == list(range(1, 8))

    def fail(x):
        if x == 3:
            raise InputError("three")
        return x

    seen = []
    with pytest.raises(InputError, match="three"):
        seen += [x for x in ahead(fail, range(9))]  # noqa: C416
    reader = ahead(fail, range(3))
    assert next(reader) == 0
    reader.close()


@pytest.fixture
def source():
    x, _ = images_and_labels(30)
    model = SALFCBM(backbone(), "1", WORDS, 3, (2, 2))
    return LiveFeatures(model, labeled_images((x, torch.arange(30) % 3), 3), batch_size=7), x


def test_features_are_those_of_the_backbone(source):
    live, x = source
    with torch.no_grad():
        expected = F.interpolate(backbone()[:2](x), (2, 2), mode="bilinear", align_corners=False)
    expected = expected.flatten(2).transpose(1, 2)
    torch.testing.assert_close(live.rows(range(30)), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(live.rows([5, 2]), expected[[5, 2]], atol=1e-6, rtol=1e-5)
    assert live.rows([]).shape == (0, 4, 12)
    assert (live.cells, live.dim, len(live)) == (4, 12, 30)


def test_a_cache_is_resumed_to_the_same_bytes(source, tmp_path, monkeypatch):
    live, _ = source
    whole = cache_features(tmp_path / "whole", live, {"a": 1}, shard_rows=8)
    assert torch.equal(whole.rows(range(30)), live.rows(range(30)).half())
    batches = LiveFeatures.batches

    def broken(self, index):
        if index[0] == 16:
            raise KeyboardInterrupt
        return batches(self, index)

    monkeypatch.setattr(LiveFeatures, "batches", broken)
    with pytest.raises(KeyboardInterrupt):
        cache_features(tmp_path / "broken", live, {"a": 1}, shard_rows=8)
    assert len(list((tmp_path / "broken").glob("shard-*"))) == 2
    with pytest.raises(ArtifactError, match="unfinished"):
        CachedFeatures(tmp_path / "broken")
    seen = []
    monkeypatch.setattr(LiveFeatures, "batches", lambda self, index: seen.append(index) or batches(self, index))
    cache_features(tmp_path / "broken", live, {"a": 1}, shard_rows=8)
    assert seen == [range(16, 24), range(24, 30)]
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "broken" / file.name).read_bytes()
    with pytest.raises(ArtifactError, match="a is 1, not 2"):
        cache_features(tmp_path / "whole", live, {"a": 2})
    with pytest.raises(InputError, match=r"float16 or torch\.float32"):
        cache_features(tmp_path / "other", live, {"a": 1}, dtype=torch.bfloat16)


def test_activations_are_pooled_maps(problem, tmp_path):
    features, _, _, weight = problem
    found = compute_activations(tmp_path, "activations", features, weight, {"a": 1}, batch_size=4)
    expected = (features.values @ weight.T).mean(1)
    torch.testing.assert_close(torch.cat(list(found)), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.rows(), expected.double(), atol=1e-6, rtol=1e-5)


def test_more_activations_than_memory_are_read_in_chunks(tmp_path, monkeypatch):
    values = InMemory(random(300, 2, 6))
    y = (values.values.mean(1) @ random(6, 3, seed=5)).argmax(1)
    monkeypatch.setattr("captum_concepts.models.salf_cbm.fit.head._ROWS", 64)
    activations = compute_activations(tmp_path, "activations", values, torch.eye(6), {"a": 1}, batch_size=50)
    at_once = fit_head(activations.rows(), y, 3, lam=0.01, tol=1e-6)
    monkeypatch.setattr("captum_concepts.models.salf_cbm.fit.head.IN_MEMORY", 10)
    assert activations.rows() is activations
    in_chunks = fit_head(activations.rows(), y, 3, lam=0.01, tol=1e-4)
    torch.testing.assert_close(in_chunks.weight, at_once.weight, atol=1e-3, rtol=1e-3)


def test_head_against_scikit_learn():
    x = random(200, 6) * torch.tensor([1.0, 5, 0.1, 2, 1, 1]) + 3
    y = (x @ random(6, 3, seed=1)).argmax(1)
    found = fit_head(x, y, 3, lam=0.01, tol=1e-7)
    standard = ((x - x.mean(0)) / x.std(0, correction=0)).double().numpy()
    # Version 1.8 says by l1_ratio alone what needed the word before.
    kind = {} if tuple(map(int, version("scikit-learn").split(".")[:2])) >= (1, 8) else {"penalty": "elasticnet"}
    peer = LogisticRegression(l1_ratio=0.99, C=1 / (200 * 0.01), solver="saga", max_iter=20_000, tol=1e-7, **kind)
    peer.fit(standard, y.numpy())
    torch.testing.assert_close(found.weight, torch.tensor(peer.coef_).float(), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(found.mean, x.mean(0))
    torch.testing.assert_close(found.std, x.std(0, correction=0))
    assert float(found.bias.mean()) == pytest.approx(0, abs=1e-5)


def test_a_sparse_head_keeps_thirty_concepts_per_class_unless_asked():
    x = random(600, 80)
    y = (x @ random(80, 4, seed=1) + 2 * random(600, 4, seed=2)).argmax(1)
    found = fit_head(x, y, 4)
    assert found.notes["nonzeros_per_class"] == pytest.approx(30, rel=0.1)
    few = fit_head(x[:, :20], y, 4)
    assert few.notes["nonzeros_per_class"] == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("head", [{"lam": 0.02}, {"head": "dense"}, {"nonzeros_per_class": 2}])
def test_heads_of_classes_that_do_not_exclude_each_other(head):
    """Each one is the logistic regression of its class alone, with a certificate."""
    x = random(200, 6) + 3
    y = ((x - 3) @ random(6, 3, seed=1) > 0.5).float()
    found = fit_head(x, y, 3, tol=1e-6, **head)
    assert found.notes["converged"]
    assert found.notes["gap"] < 1e-4
    for k in range(3):
        lam = found.notes["lam"][k]
        alone = fit_elastic_net(
            x, y[:, k].long(), lam, alpha=found.notes["alpha"], loss="logistic", standardize=True, tol=1e-6
        )
        torch.testing.assert_close(found.weight[k : k + 1], alone.weight.float(), atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(found.bias[k : k + 1], alone.bias.float(), atol=2e-3, rtol=2e-3)
    logits = (x - found.mean) / found.std @ found.weight.T + found.bias
    assert ((logits > 0) == (y > 0)).float().mean() > 0.8


def collinear(n=400, concepts=12, seed=0):
    """Features, a bottleneck whose concepts mean nearly the same, and classes that differ by the rest."""
    z = random(n, 8, seed=seed).double()
    weight = random(concepts, 1, seed=seed + 1) + 0.03 * random(concepts, 8, seed=seed + 2)
    return z, weight, (z @ random(8, 3, seed=seed + 3).double()).argmax(1)


def penalized_by_hand(activations, labels, bottleneck, lam):
    """Newton's method on the objective as it is written, in the concepts' own weights; the last class's are free."""
    mean, std = activations.mean(0), activations.std(0, correction=0)
    c, k = (activations - mean) / std, int(labels.max()) + 1
    made = bottleneck.double() / std[:, None]
    r = made @ made.T + (0.03 * torch.linalg.matrix_norm(made, 2)) ** 2 * torch.eye(len(made)).double()
    r /= r.diagonal().mean()

    def objective(theta):
        w, b = theta[:-k].view(k, -1), theta[-k:]
        return F.cross_entropy(c @ w.T + b, labels) + lam / 2 * torch.einsum("km,mn,kn->", w, r, w)

    theta = torch.zeros(k * c.shape[1] + k, dtype=torch.float64)
    for _ in range(60):
        slope = torch.autograd.functional.jacobian(objective, theta)
        curvature = torch.autograd.functional.hessian(objective, theta)
        theta = theta - torch.linalg.pinv(curvature, hermitian=True, rtol=1e-12) @ slope
    return theta[:-k].view(k, -1), theta[-k:], float(objective(theta))


class TestDenseHead:
    def test_by_hand(self):
        z, weight, y = collinear()
        c = z @ weight.double().T + 2
        for lam in (0.1, 1e-3):
            found = fit_head(c, y, 3, head="dense", lam=lam, bottleneck=weight, tol=1e-8)
            w, b, objective = penalized_by_hand(c, y, weight, lam)
            assert found.notes["objective"] == pytest.approx(objective, abs=1e-7)
            torch.testing.assert_close(found.weight.double(), w, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(found.bias - found.bias.mean(), (b - b.mean()).float(), atol=1e-3, rtol=1e-3)

    def test_reaches_what_the_features_tell(self):
        """A plain ridge of the same strength keeps to what all concepts share."""
        z, weight, y = collinear()
        c = z @ weight.double().T
        right = {}
        for name, bottleneck in (("plain", None), ("features", weight)):
            f = fit_head(c, y, 3, head="dense", lam=1e-2, bottleneck=bottleneck)
            right[name] = float((((c - f.mean) / f.std @ f.weight.double().T + f.bias).argmax(1) == y).float().mean())
        assert right["features"] > right["plain"] + 0.1

    def test_in_chunks_and_with_a_constant_concept(self):
        z, weight, y = collinear()
        weight[3] = 0
        c = z @ weight.double().T + 1
        at_once = fit_head(c, y, 3, head="dense", bottleneck=weight, tol=1e-7)
        in_chunks = fit_head(c.split(70), y, 3, head="dense", bottleneck=weight, tol=1e-7)
        torch.testing.assert_close(in_chunks.weight, at_once.weight, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(in_chunks.mean, at_once.mean)
        assert at_once.std[3] == 1
        torch.testing.assert_close(at_once.weight[:, 3], torch.zeros(3), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("bottleneck", [None, random(4, 8), random(5, 8)], ids=["none", "another", "its own"])
    def test_what_cannot_be_fitted_is_refused(self, bottleneck):
        c, y = random(60, 5), torch.arange(60) % 3
        if bottleneck is not None and len(bottleneck) == 4:
            with pytest.raises(InputError, match=r"bottleneck must be \(M, D\), M=5 concepts, got \(4, 8\)"):
                fit_head(c, y, 3, head="dense", bottleneck=bottleneck)
        c[7, 2] = torch.nan
        with pytest.raises(InputError, match="NaN or infinite values in 1 of 5 columns"):
            fit_head(c, y, 3, head="dense", bottleneck=bottleneck)

    def test_of_several_labels_an_image(self):
        z, weight, y = collinear()
        several = F.one_hot(y, 3).float()
        c = z @ weight.double().T
        found = fit_head(c, several, 3, head="dense", bottleneck=weight)
        logits = (c - found.mean) / found.std @ found.weight.double().T + found.bias
        assert ((logits > 0) == (several > 0)).float().mean() > 0.85

    def test_orthogonal_concepts_of_equal_deviation_are_a_plain_ridge(self):
        z = torch.linalg.qr(random(200, 5).double() - random(200, 5).double().mean(0)).Q * 200**0.5
        y = (z @ random(5, 3, seed=1).double()).argmax(1)
        lam = 0.05
        plain, metric = (fit_head(z, y, 3, head="dense", lam=lam, bottleneck=b, tol=1e-8) for b in (None, torch.eye(5)))
        torch.testing.assert_close(plain.weight, metric.weight, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("show", [True, False])
def test_progress_is_shown_where_it_is_asked_for(show, capsys):
    with progress(3, "reading", "image", show) as advance:
        advance(2)
    assert ("reading" in capsys.readouterr().err) == show


def test_intervals_of_agreement_stay_between_0_and_1():
    """An activation that is small where the concept is: its area is near 0, the interval around it is wide."""
    seen = torch.tensor([[True], [True], [False], [False], [False]])
    for sign in (1, -1):
        found = reliabilities(sign * torch.tensor([[0.0], [2.0], [1.0], [3.0], [4.0]]), seen, ["a"])["a"]
        assert found["agreement"] == pytest.approx(1 / 6 if sign == 1 else 5 / 6)
        assert (found["low"], found["high"])[sign < 0] == (0.0 if sign == 1 else 1.0)
        assert 0 < found["high"] - found["low"] < 1


def test_class_weights():
    x = random(300, 4)
    y = (x[:, 0] + 0.8 * random(300, seed=1) > 1.0).long()  # one in six or so
    plain, balanced = (fit_head(x, y, 2, head="dense", class_weights=w) for w in (None, "balanced"))
    share = y.float().mean()
    by_hand = fit_head(x, y, 2, head="dense", class_weights=[0.5 / float(1 - share), 0.5 / float(share)])
    torch.testing.assert_close(balanced.weight, by_hand.weight, atol=1e-4, rtol=1e-4)
    recall = [
        (((x - f.mean) / f.std @ f.weight.T + f.bias).argmax(1)[y == 1] == 1).float().mean() for f in (plain, balanced)
    ]
    assert recall[1] > recall[0] + 0.1


def test_class_weights_of_a_sparse_head():
    """The penalty is on weights of weighted standard deviations, the model keeps those of the images."""
    x = random(300, 4) * torch.tensor([1.0, 2.0, 5.0, 1.0]) + torch.tensor([0.0, 3.0, -1.0, 0.5])
    y = (x[:, 0] + 0.8 * random(300, seed=1) > 1.0).long()
    fit = fit_head(x, y, 2, lam=0.01, class_weights=[1.0, 5.0])
    torch.testing.assert_close(fit.mean, x.mean(0))
    torch.testing.assert_close(fit.std, x.std(0, unbiased=False))
    alone = fit_elastic_net(x, y, 0.01, standardize=True, sample_weight=torch.where(y == 1, 5.0, 1.0))
    logits = (x - fit.mean) / fit.std @ fit.weight.T + fit.bias
    torch.testing.assert_close(logits, alone.decision_function(x).float(), atol=1e-3, rtol=1e-3)


def test_class_weights_of_independent_classes():
    """Each class is standardized with its own weights; the model has one mean and deviation for all."""
    x = random(300, 4) * torch.tensor([1.0, 2.0, 5.0, 1.0]) + torch.tensor([0.0, 3.0, -1.0, 0.5])
    several = torch.stack([x[:, 0] + 0.8 * random(300, seed=1) < 1.0, x[:, 1] + random(300, seed=2) > 6.0], 1).float()
    for given in ("balanced", [3.0, 0.2]):
        many = fit_head(x, several, 2, head="dense", class_weights=given)
        assert many.notes["converged"]
        torch.testing.assert_close(many.mean, x.mean(0))
        torch.testing.assert_close(many.std, x.std(0, unbiased=False))
        logits = (x - many.mean) / many.std @ many.weight.T + many.bias
        for k, y in enumerate(several.T.long()):
            ratio = float((1 - y).sum() / y.sum()) if given == "balanced" else given[k]
            weights = torch.where(y == 1, ratio, 1.0).double()
            alone = fit_elastic_net(x, y, 1e-4, alpha=0.0, loss="logistic", standardize=True, sample_weight=weights)
            torch.testing.assert_close(logits[:, k], alone.decision_function(x)[:, 0].float(), atol=1e-3, rtol=1e-3)


def test_presence_is_judged_on_images_as_they_are(tmp_path):
    """The published filter, by a loop: a concept's five best images, unmarked."""
    x, _ = images_and_labels(30)
    text = Colours().encode_text(WORDS)
    whole = RegionEmbeddingStore.build(tmp_path / "whole", x, Colours(), WHOLE)
    embeddings = F.normalize(torch.stack([Colours().encode_image(image[None])[0] for image in x]), dim=1)
    cosines = embeddings @ F.normalize(text, dim=1).T
    for k in (1, 5, 100):
        expected = cosines.sort(0, descending=True).values[:k].mean(0)
        torch.testing.assert_close(concept_presence(whole, text, k=k, batch_size=7), expected, atol=2e-3, rtol=0)
    regions = RegionEmbeddingStore.build(tmp_path / "regions", x, Colours(), PROMPT)
    marked = regions.similarity(text).tensor().amax((2, 3)).sort(0, descending=True).values[:5].mean(0)
    assert (marked > concept_presence(whole, text) + 0.02).all()  # what it was compared with
    with pytest.raises(InputError, match="4 prompted cells of each"):
        concept_presence(regions, text)
    with pytest.raises(InputError, match="k must be"):
        concept_presence(whole, text, k=0)


def test_the_unmarked_prompt_changes_nothing():
    for size in ((224, 224), (51, 80), (16, 9)):
        x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(WHOLE.draw(x)[:, 0], x, atol=1e-4, rtol=0)


def test_concepts_that_are_not_there_are_refused_before_regions_are_embedded(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Colours, "encode_image", _counted(Colours.encode_image, seen))
    with pytest.raises(InputError, match="no concept is left"):
        fit(tmp_path, presence_cutoff=0.99, prompt_batch_size=32)
    assert sum(seen) <= 96 + 16  # one pass per image, and what a store tries first
    assert not (tmp_path / "regions-train").exists()


def _counted(function, seen):
    def encode(self, images):
        seen.append(len(images))
        return function(self, images)

    return encode


def test_filters_keep_order_and_reasons():
    words = Vocabulary(["a", "b", "c"])
    assert present_concepts(words, torch.tensor([0.3, 0.1, 0.4]), None) is words
    kept = present_concepts(words, torch.tensor([0.3, 0.1, 0.4]), 0.25)
    assert list(kept) == ["a", "c"]
    kept = interpretable_concepts(kept, torch.tensor([0.2, 0.5]), 0.45)
    assert list(kept) == ["c"]
    assert [(d.concept, d.reason) for d in kept.report.drops] == [
        ("b", "absent from the data"),
        ("a", "low validation similarity"),
    ]
    assert kept.report.drops[1].value == pytest.approx(0.2)
    assert interpretable_concepts(words, torch.ones(3), 0.45) is words
    with pytest.raises(InputError, match="2 similarities for 3 concepts"):
        interpretable_concepts(words, torch.ones(2), 0.45)


def test_only_what_is_surely_below_the_cutoff_is_dropped():
    words = Vocabulary(["a", "b", "c"])
    similarity, upper = torch.tensor([0.2, 0.3, 0.6]), torch.tensor([0.4, 0.5, 0.7])
    kept = interpretable_concepts(words, similarity, 0.45, upper=upper)
    assert list(kept) == ["b", "c"]
    assert kept.report.drops[0].value == pytest.approx(0.2)
    with pytest.raises(InputError, match=r"validation similarity of 0\.6, below interpretability_cutoff=0\.8"):
        interpretable_concepts(words, similarity, 0.8, upper=upper)
    with pytest.raises(InputError, match="1 upper ends for 3 concepts"):
        interpretable_concepts(words, similarity, 0.45, upper=upper[:1])


@pytest.mark.parametrize("n", [24, 400])
def test_the_interval_of_a_similarity(n):
    """Against drawing the images again, with replacement, one resample after another.

    The .95 quantile of 200 draws is the 190th, which lies between the .88 and the .99 quantile of all draws in 999 of
    1,000 cases.
    """
    p = random(n, 2, 1, seed=1)
    features = torch.cat([p, random(n, 2, 1, seed=2)], 2)
    weight, text = torch.tensor([[1.0, 0.5], [0.0, 1.0]]), torch.ones(2, 1)
    samples = Samples(InMemory(features), InMemory(p), torch.arange(n))
    similarity, upper = Validation(samples, text, batch_size=7).pooled(weight)
    q, seen = features.mean(1) @ weight.T, p.mean(1) @ text.T
    torch.testing.assert_close(similarity, cubic_similarity(q, seen), atol=1e-5, rtol=1e-5)
    q, seen = ((v - v.mean(0)).double() ** 3 for v in (q, seen))
    draws = torch.randint(n, (5000, n), generator=torch.Generator().manual_seed(3))
    q, seen = q[draws], seen[draws]
    drawn = (q * seen).sum(1) / (q.square().sum(1) * seen.square().sum(1)).sqrt()
    low, high = drawn.quantile(torch.tensor([0.88, 0.99], dtype=torch.float64), dim=0)
    assert bool(((low < upper) & (upper < high)).all())


def test_of_few_images_nothing_is_surely_low():
    features, embeddings = random(19, 3, 8), random(19, 3, 6, seed=1)
    samples = Samples(InMemory(features), InMemory(embeddings), torch.arange(19))
    _, upper = Validation(samples, random(5, 6, seed=3)).pooled(random(5, 8, seed=2))
    assert torch.equal(upper, torch.ones(5))


class Relabelled(torch.utils.data.Dataset):
    """Its list of targets and its items disagree about ``wrong`` of the images."""

    def __init__(self, x, y, wrong):
        self.x, self.y, self.targets = x, y, y.tolist()
        for i in wrong:
            self.targets[i] = (self.targets[i] + 1) % 3
        self.labels = self.targets

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index], int(self.y[index])


@pytest.mark.parametrize("wrong", [range(60), range(7, 55, 4), [31]])
def test_labels_are_those_of_the_items(wrong):
    x, y = images_and_labels(60)
    data = Relabelled(x, y, wrong)
    assert torch.equal(labeled_images(data, 3).labels, y)
    backwards = torch.utils.data.Subset(data, range(59, -1, -1))
    assert torch.equal(labeled_images(backwards, 3).labels, y.flip(0))
    joined = torch.utils.data.ConcatDataset([TensorDataset(x, y), data])
    assert torch.equal(labeled_images(joined, 3).labels, y.repeat(2))


def test_labels_of_an_image_folder(tmp_path):
    from PIL import Image
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import to_tensor

    for number in range(12):
        (tmp_path / f"class {number % 3}").mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"class {number % 3}" / f"{number}.png")
    expected = torch.arange(3).repeat_interleave(4)
    assert torch.equal(labeled_images(ImageFolder(tmp_path, to_tensor), 3).labels, expected)
    swapped = ImageFolder(tmp_path, to_tensor, target_transform=lambda label: 2 - label)
    assert torch.equal(labeled_images(swapped, 3).labels, 2 - expected)

    class Merged(ImageFolder):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image, min(label, 1)

    assert torch.equal(labeled_images(Merged(tmp_path, to_tensor), 2).labels, expected.clamp(max=1))


@pytest.mark.parametrize("key", ["label", "labels", "target", "y"])
def test_labels_in_dictionaries_and_bad_ones(key):
    x, y = images_and_labels(12)
    items = [{"image": image, key: label.float()} for image, label in zip(x, y, strict=True)]
    assert torch.equal(labeled_images(items, 3, all_classes=False).labels, y)
    items[7][key] = 1.5
    with pytest.raises(InputError, match="one class index per image"):
        labeled_images(items, 3, all_classes=False)


def test_vit_with_cls_token(tmp_path):
    class Tokens(nn.Module):
        """A patch embedding with a class token in front, as ViTs have it."""

        def __init__(self):
            super().__init__()
            self.patch_embed = nn.Conv2d(3, 8, 4, stride=4)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
            self.block = nn.Linear(8, 8)

        def forward(self, images):
            patches = self.patch_embed(images).flatten(2).transpose(1, 2)
            mean = patches.mean(1, keepdim=True) + self.cls_token
            return self.block(torch.cat([mean, patches], 1))[:, 0]

    torch.manual_seed(0)
    network = Tokens()
    x, _ = images_and_labels(5)
    for cls_token, channels in ((False, 8), (True, 16)):
        model = fit(tmp_path, network=network, cls_token=cls_token, layer="block")
        assert model.bottleneck.weight.shape == (5, channels, 1, 1)
        assert model.concept_maps(x).shape == (5, 5, 2, 2)


def test_the_rate_falls_where_no_progress_is_made(tmp_path, monkeypatch):
    from captum_concepts.models.salf_cbm.fit import bottleneck as module

    monkeypatch.setattr(module, "_LEAST_STEPS", 3)
    rates, finish = [], module._State.finish_epoch

    def watch(self, *arguments):
        rates.append(self.adam.param_groups[0]["lr"])
        finish(self, *arguments)

    monkeypatch.setattr(module._State, "finish_epoch", watch)
    settings = {"init": "random", "lr": 0.3, "max_epochs": 400, "patience": 3}
    model = fit(tmp_path, bottleneck=settings)
    assert model.metadata["bottleneck"]["stopped"] == "early"
    assert sorted(set(rates), reverse=True) == pytest.approx([0.3, 0.09, 0.027])
    history = model.metadata["history"]["val_similarity"]
    kept = sum(model.metadata["validation_similarity"].values()) / 5
    assert kept == pytest.approx(max(history), abs=1e-6)
    assert len(rates) == len(history) < 400


def test_the_rate_depends_on_the_number_of_features(tmp_path, monkeypatch):
    """With many features, steps of .01 are large beside the initial weights."""
    from captum_concepts.models.salf_cbm.fit import bottleneck as module

    rates, make = [], torch.optim.Adam
    monkeypatch.setattr(module.torch.optim, "Adam", lambda groups: rates.append(groups[0]["lr"]) or make(groups))
    default, given = (fit(tmp_path / str(lr), bottleneck={"lr": lr, "max_epochs": 2}) for lr in (None, 0.02))
    assert rates == pytest.approx([0.1 / default.feature_dim**0.5, 0.02])
    assert given.feature_dim == default.feature_dim
