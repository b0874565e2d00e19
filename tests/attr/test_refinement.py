"""Refined maps of FAM and SpatialACV against a plain loop over stages, references and positions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_concepts import FeatureActivationMap, SpatialACV
from captum_concepts.attr.concept_fusion import regions
from captum_concepts.errors import InputError


class Net(nn.Module):
    """Three stages whose convolutions pad with zeros, and an embedding of unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU())
        self.c = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.head(self.c(self.b(self.a(x))).mean((2, 3))), dim=1)


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(3, 3, 16, 20, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def bank() -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(2))


def stages_of(net: Net, image: Tensor) -> list[Tensor]:
    a = net.a(image[None])
    b = net.b(a)
    return [a, b, net.c(b)]


def contrasted(scores: list[float], target: int) -> list[float]:
    mean = sum(scores) / len(scores)
    spread = math.sqrt(sum((s - mean) ** 2 for s in scores) / (len(scores) - 1))
    likely = [0.0 if k == target else math.exp((s - mean) / spread) for k, s in enumerate(scores)]
    return [1.0 if k == target else -0.5 * part / sum(likely) for k, part in enumerate(likely)]


def drawn(evidence: list[Tensor], maps: list[Tensor], plain: list[Tensor], image: Tensor) -> Tensor:
    content = [(m - p).detach() for m, p in zip(maps, plain, strict=True)]
    affinity = regions.feature_affinity(content, (16, 20), image[None])
    return regions.of_strongest(regions.fused_maps(evidence, affinity, (16, 20)))[0, 0]


@pytest.mark.parametrize("refine", [["a", "b", "c"], ["b", "a"]])
def test_fam_is_the_loop_over_stages_and_references(net, images, bank, refine):
    fam = FeatureActivationMap(net, "c", bank, refine=refine)
    result, scores = fam.attribute(images, target=[0, 2, 3]), fam.scores(images)
    assert result.shape == (3, 1, 16, 20)
    assert float(result.min()) >= 0
    assert float(result.max()) == pytest.approx(1)
    for n, target in enumerate([0, 2, 3]):
        weights = contrasted(scores[n].tolist(), target)
        evidence = []
        plain = stages_of(net, images[n].mean((1, 2), keepdim=True).expand_as(images[n]))
        maps = stages_of(net, images[n])
        f = net.head(maps[2].mean((2, 3)))[0]  # before its norm, which is held
        goal = sum(w * (f @ F.normalize(r, dim=0)) / f.norm().detach() for w, r in zip(weights, bank, strict=True))
        for activation, blank, slope in zip(maps, plain, torch.autograd.grad(goal, maps), strict=True):
            one = torch.zeros(1, 1, *activation.shape[2:])
            for i in range(one.shape[2]):
                for j in range(one.shape[3]):
                    one[0, 0, i, j] = (activation - blank)[0, :, i, j].detach() @ slope[0, :, i, j]
            evidence.append(one)
        torch.testing.assert_close(result[n, 0], drawn(evidence, maps, plain, images[n]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("similarity", ["dot", "euclidean", lambda f, r: -(f - r).abs().sum(1)])
def test_every_similarity_is_refined_and_an_image_says_the_same_alone(net, images, bank, similarity):
    fam = FeatureActivationMap(net, "c", bank, similarity=similarity, refine=True, batch_size=2)
    maps = fam.concept_maps(images)
    assert maps.shape == (3, 4, 16, 20)
    torch.testing.assert_close(fam.concept_maps(images[1:2]), maps[1:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fam.attribute(images, target=2), maps[:, 2:3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fam.explain(images, concepts=["2"]).maps, maps[:, 2:3], rtol=1e-4, atol=1e-5)


def test_one_reference_has_no_contrast(net, images, bank):
    assert bool(FeatureActivationMap(net, "c", bank[:1], refine=True).attribute(images).amax((1, 2, 3)).gt(0.99).all())


@pytest.fixture(scope="module")
def acv(net, images) -> SpatialACV:
    draw = torch.Generator().manual_seed(3)
    red = torch.rand(8, 3, 16, 20, generator=draw) * torch.tensor([1, 0.3, 0.3]).view(3, 1, 1)
    blue = torch.rand(8, 3, 16, 20, generator=draw) * torch.tensor([0.3, 0.3, 1]).view(3, 1, 1)
    return SpatialACV(net, "b", refine=["a"]).fit({"red": red, "blue": blue})


def test_sacv_is_the_projection_beyond_the_image_without_content(net, images, acv):
    result, scores = acv.concept_maps(images), acv.scores(images)
    assert result.shape == (3, 2, 16, 20)
    for n, image in enumerate(images):
        plain, maps = (stages_of(net, one)[:2] for one in (image.mean((1, 2), keepdim=True).expand_as(image), image))
        for k in range(2):
            weights = contrasted(scores[n].tolist(), k)
            direction = weights[0] * acv.vectors[0] + weights[1] * acv.vectors[1]
            evidence = torch.einsum("nchw,c->nhw", (maps[1] - plain[1]).detach(), direction)[:, None]
            torch.testing.assert_close(result[n, k], drawn([evidence], maps, plain, image), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(acv.explain(images, 1, concepts=["red"]).maps[:, 0], result[:, 0], rtol=1e-4, atol=1e-5)
    assert acv.attribute(images, 1).shape == (3, 2, 8, 10)  # what moves the output stays as it is


def test_marks_of_padding_are_taken_out(net, acv):
    """A faint red patch in the middle of a gray image: the border cells are marked more than it is, until refined."""
    image = torch.full((1, 3, 16, 20), 0.4)
    image[:, 0, 6:10, 8:12] += 0.05
    unrefined = SpatialACV(net, "b")
    unrefined._fitted = acv._fitted
    plain, refined = (method.concept_maps(image, ["red"])[0, 0] for method in (unrefined, acv))
    inside = torch.zeros(8, 10, dtype=torch.bool)
    inside[3:5, 4:6] = True
    marks = (plain - plain[2, 2]).abs()
    marks[2:6, 3:7][~inside[2:6, 3:7]] = 0  # around the patch
    assert float(marks[~inside].max()) > 2 * float(marks[inside].max())
    border = torch.ones(16, 20, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    assert float(refined[border].max()) <= 1.02 * float(refined[3:5, 3:17].max())  # no brighter than gray inside
    assert float(refined[6:10, 8:12].max()) == float(refined.max())


def test_the_option_is_saved(net, images, bank, acv, tmp_path):
    again = SpatialACV.load(acv.save(tmp_path / "acv"), net)
    assert again.refine == ["a"]
    assert torch.equal(again.concept_maps(images), acv.concept_maps(images))
    for refine, kept in ((True, True), ([net.a, "b"], ["a", "b"]), (False, False)):
        fam = FeatureActivationMap(net, "c", bank, refine=refine)
        loaded = FeatureActivationMap.load(fam.save(tmp_path / "fam"), net)
        assert loaded.refine == kept
        assert torch.equal(loaded.attribute(images, 1), fam.attribute(images, 1))


@pytest.mark.parametrize("refine", ["fused", 1, [], ["a", 2], None])
def test_bad_options_are_refused(net, refine):
    for method in (FeatureActivationMap, SpatialACV):
        with pytest.raises(InputError, match="refine must be True, False or a list of layers"):
            method(net, "c", refine=refine)


def test_what_cannot_be_refined_is_said_so(net, images, bank, acv):
    fam = FeatureActivationMap(lambda x: net(x), net.c, bank, refine=True)
    with pytest.raises(InputError, match="refine=True does not find the stages"):
        fam.attribute(images, target=0)
    assert FeatureActivationMap(lambda x: net(x), net.c, bank, refine=[net.a, net.b]).attribute(images, 0).any()
    with pytest.raises(InputError, match="a refined map has no probabilities"):
        acv.concept_maps(images, probability=True)


def test_a_callable_without_a_hash_needs_a_list_of_layers(net, images, bank):
    @dataclass
    class Call:  # a dataclass has no hash
        model: nn.Module

        def __call__(self, images: Tensor) -> Tensor:
            return self.model(images)

    layer = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
    with pytest.raises(InputError, match=r"Call, has no hash.*; pass a list of layers"):
        FeatureActivationMap(Call(net), layer, bank, refine=True).attribute(images, target=0)
    assert FeatureActivationMap(Call(net), layer, bank, refine=[layer]).attribute(images, target=0).isfinite().all()
