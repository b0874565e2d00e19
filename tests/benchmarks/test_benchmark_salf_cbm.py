"""The SALF-CBM benchmark measures what it says: scores, heads, the peer, repairs, and the split of real images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from benchmarks.data import photographs, salf_cbm as salf_cbm_data
from benchmarks.peers import salf_cbm as salf_cbm_peers
from benchmarks.run.salf_cbm import heads as salf_cbm_heads, maps as salf_cbm_maps, planted as salf_cbm_planted
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.models.cubic_similarity import cubic_similarity
from captum_concepts.models.salf_cbm import SALFCBM
from captum_concepts.solvers import fit_elastic_net


@pytest.fixture(scope="module")
def batch():
    return CaptionedScenes(6, seed=11, size=48).stack()


def test_scores_of_perfect_and_of_blind_maps(batch):
    perfect = salf_cbm_maps.summary(salf_cbm_maps.score_maps(batch.masks.float(), batch.masks, batch.presence))
    for key in ("nra", "nra_exact", "pixel_accuracy", "mean_iou", "mean_iou_half", "average_precision"):
        assert perfect[key] == pytest.approx([1, 1, 1], abs=1e-5)
    same = torch.rand(6, 1, 6, 6, generator=torch.Generator().manual_seed(0)).expand(-1, 21, -1, -1)
    blind = salf_cbm_maps.summary(salf_cbm_maps.score_maps(same, batch.masks, batch.presence))
    assert blind["specificity"] == pytest.approx([0, 0, 0], abs=1e-5)
    assert perfect["specificity"][0] > 0.5


def test_only_what_is_present_is_scored(batch):
    scores = salf_cbm_maps.score_maps(batch.masks.float(), batch.masks, batch.presence)
    assert [len(v) for v in scores["nra"]] == batch.presence.sum(1).tolist()
    nothing = batch.presence.clone()
    nothing[0] = False
    assert len(salf_cbm_maps.score_maps(batch.masks.float(), batch.masks, nothing)["nra"]) == 5


def test_intervals_resample_images():
    values = [torch.tensor([0.0, 1.0]), torch.tensor([1.0]), torch.tensor([0.5, torch.nan])]
    mean, low, high = salf_cbm_maps.bootstrap(values, seed=3)
    draws = np.random.default_rng(3).integers(0, 3, (salf_cbm_maps.DRAWS, 3))
    slow = []
    for rows in draws:
        picked = torch.cat([values[i] for i in rows])
        slow.append(float(picked[~picked.isnan()].mean()))
    assert mean == pytest.approx(2.5 / 4)
    assert [low, high] == pytest.approx(np.quantile(slow, [0.025, 0.975]).tolist())


def test_mean_iou_interval_holds_its_value():
    counts = [torch.tensor([[3.0, 4.0, 8.0, 9.0]]), torch.tensor([[1.0, 4.0, 5.0, 9.0]])]
    mean, low, high = salf_cbm_maps.bootstrap_mean_iou(counts)
    assert mean == pytest.approx((4 / 8 + 13 / 18) / 2)
    assert low == pytest.approx((1 / 4 + 5 / 9) / 2)
    assert high == pytest.approx((3 / 4 + 8 / 9) / 2)


def test_sparse_heads_keep_their_promise():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 20, generator=generator)
    y = (x[:, :4] + 0.5 * torch.randn(300, 4, generator=generator)).argmax(1)
    test = (x[:50], y[:50])
    few = salf_cbm_peers.sparse_head(x, y, test, most=3, num_classes=4)
    many = salf_cbm_peers.sparse_head(x, y, test, most=12, num_classes=4)
    assert few.nonzeros_most <= 3 < many.nonzeros_most <= 12
    average = salf_cbm_peers.sparse_head(x, y, test, most=6, num_classes=4, on_average=True)
    assert average.nonzeros_mean == pytest.approx(6, rel=0.1)
    dense = salf_cbm_peers.dense_head(x, y, test, num_classes=4)
    assert dense.accuracy > 0.6
    assert dense.accuracy == sum(dense.hits) / 50


def test_rows_of_heads_name_their_settings():
    """NEC=5 counts weights over all classes; a strength is taken as it is, however many weights it leaves."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(300, 20, generator=generator)
    y = (x[:, :4] * torch.tensor([3.0, 1, 1, 1]) + 0.5 * torch.randn(300, 4, generator=generator)).argmax(1)
    split = (x[:240], y[:240]), (x[240:], y[240:])
    rows, found = salf_cbm_heads.heads("a model", *split, 4, [3], effective=5, lam=0.05)
    assert [row["head"] for row in rows] == ["sparse, at most 3 a class", "dense", "sparse, NEC=5", "sparse, lam=0.05"]
    assert list(found) == [3, None]
    effective, strength = rows[2:]
    assert effective["nonzeros_a_class_mean"] == pytest.approx(5, rel=0.1)
    by_hand = fit_elastic_net(*split[0], 0.05, alpha=0.99, num_classes=4, standardize=True)
    right = by_hand.decision_function(split[1][0]).argmax(1) == split[1][1]
    assert strength["lam"] == 0.05
    assert strength["accuracy"][0] == pytest.approx(float(right.double().mean()))
    assert strength["nonzeros_a_class_mean"] == float(by_hand.nonzeros.double().mean())


def test_the_peer_learns_linear_concepts_and_maps_pool_to_activations():
    generator = torch.Generator().manual_seed(1)
    maps = torch.rand(400, 10, 3, 3, generator=generator)
    pooled = maps.mean((2, 3))
    truth = torch.randn(4, 10, generator=generator)
    p = pooled @ truth.T
    names = ["a", "b", "c", "d"]
    peer = salf_cbm_peers.fit_lf_cbm(pooled[:300], p[:300], names, (pooled[300:], p[300:]), steps=400, lr=0.02)
    assert peer.concepts == names
    assert float(peer.similarity.min()) > 0.9
    assert torch.allclose(peer.similarity, cubic_similarity(pooled[300:] @ peer.weight.T, p[300:]), atol=1e-4)
    raw = peer.activations(pooled) * peer.std + peer.mean
    assert torch.allclose(peer.maps(maps).mean((2, 3)), raw, atol=1e-4)
    p[:, 2:] = torch.randn(400, 2, generator=generator)  # nothing in the features says these
    cut = salf_cbm_peers.fit_lf_cbm(pooled[:300], p[:300], names, (pooled[300:], p[300:]), steps=400, lr=0.02)
    assert cut.concepts == ["a", "b"]
    assert cut.activations(pooled).shape == (400, 2)


def test_the_similarity_of_the_peer_is_the_packages():
    generator = torch.Generator().manual_seed(2)
    q, p = torch.randn(30, 5, generator=generator), torch.randn(30, 5, generator=generator)
    assert torch.allclose(salf_cbm_peers.cubic_similarity(q, p), cubic_similarity(q, p), atol=1e-5)


def test_grad_cam_by_its_definition():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    images = torch.rand(3, 3, 8, 8)
    found = salf_cbm_peers.grad_cam(net, net[1], images, torch.tensor([0, 1, 2]), batch_size=2)
    with torch.no_grad():
        maps = net[:2](images)
        slow = torch.einsum("nk,nkhw->nhw", net[4].weight / 36, maps).relu()  # the gradient of a mean is 1 / 36
    assert torch.allclose(found, slow, atol=1e-6)


def test_repairs_by_hand():
    label = torch.tensor([0, 0, 1, 1])
    before = F.one_hot(torch.tensor([0, 1, 1, 0]), 2).float()
    after = F.one_hot(torch.tensor([0, 0, 0, 0]), 2).float()
    row = salf_cbm_planted.repaired(before, after, label, torch.tensor([0, 1, 0, 1]))
    assert [row[k][0] for k in ("accuracy", "wrong_repaired", "right_broken")] == [0.5, 0.5, 0.5]
    assert row["planted_errors_repaired"][0] == 1  # scene 1, called class 1 on the ground of class 1
    none = salf_cbm_planted.repaired(before, after, label, torch.tensor([1, 0, 0, 1]))
    assert none["planted_errors_repaired"] is None


def test_intervention_takes_the_region_back_to_the_training_mean():
    torch.manual_seed(0)
    data = CaptionedScenes(3, seed=4, size=32)
    scenes = data.stack()
    backbone = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6))
    model = SALFCBM(backbone, "1", data.concepts, 6, (8, 8), input_size=32).eval()
    model.set_standardization(torch.randn(21), torch.rand(21) + 0.5)
    grounds = data.concept_groups["ground"]
    one, every, named = salf_cbm_planted.by_intervention(model, scenes, grounds)
    assert set(named) <= set(grounds)
    for i in range(3):
        mask = scenes.masks[i, int(scenes.ground[i])]
        seen = model.explain_region(scenes.image[i : i + 1], mask=mask, top_k=None)
        score = torch.tensor([float(seen.scores[0, seen.index(c)]) for c in model.concepts])
        assert named[i] == max(grounds, key=lambda w: float(seen.scores[0, seen.index(w)]))
        activations = model.concept_activations(scenes.image[i : i + 1]).detach()
        edited = activations - score * mask.float().mean()
        assert torch.allclose(every[i], model.head(edited).detach()[0], atol=1e-4)
        j = model.concepts.index(named[i])
        alone = activations.clone()
        alone[0, j] = edited[0, j]
        assert torch.allclose(one[i], model.head(alone).detach()[0], atol=1e-4)


def test_no_photograph_is_on_both_sides_of_the_split(tmp_path):
    root = tmp_path / "images" / "caltech101"
    for name, count in (("ant", 6), ("bass", 5), ("Faces", 6), ("Faces_easy", 6)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (4, 4), (i, i, i)).save(root / name / f"{i}.png")
    names, files, labels = salf_cbm_data.caltech(tmp_path, 4, 2, seed=0)
    assert names == ["Faces", "ant"]
    assert not set(files["train"]) & set(files["test"])
    assert [len(files["train"]), len(files["test"])] == [8, 4]
    for split, found in files.items():
        assert [names[int(c)] for c in labels[split]] == [f.parent.name for f in found]
    assert salf_cbm_data.caltech(tmp_path, 4, 2, seed=0)[1] == files
    assert salf_cbm_data.caltech(tmp_path, 4, 2, seed=1)[1] != files
    assert photographs.Files(files["train"], 4)[0].shape == (3, 4, 4)
