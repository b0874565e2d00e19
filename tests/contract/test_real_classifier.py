"""Every method on a real ImageNet network and real photographs, in every clone: nothing of it lies beside the checkout.

A flower fills the left half of an image, a palace the right one: maps must tell them apart.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam

from captum_concepts import FeatureActivationMap, SpatialACV, fit_salf_cbm
from captum_concepts.demo.photos import PREPROCESSING, class_names, photo_explainer
from captum_concepts.images import find_images, open_images
from captum_concepts.metrics import deletion
from captum_concepts.vlm import RegionPrompt

NAMES = class_names()
DAISY, PALACE = NAMES.index("daisy"), NAMES.index("palace")


@pytest.fixture(scope="module")
def halves(photographs) -> torch.Tensor:
    middle = slice(56, 168)
    return torch.cat([photographs["flower"][..., middle], photographs["palace"][..., middle]], -1)[None]


@pytest.fixture(scope="module")
def embed(real_classifier):
    def pooled(images: torch.Tensor) -> torch.Tensor:
        features = real_classifier.blocks(real_classifier.stem(PREPROCESSING(images)))
        return real_classifier.last(features).mean((2, 3))

    return pooled


def left(maps: torch.Tensor) -> torch.Tensor:
    """The fraction of the positive part that lies in the left half."""
    positive = maps.clamp(min=0)
    return positive[..., : maps.shape[-1] // 2].sum((-2, -1)) / positive.sum((-2, -1))


def crops(image: torch.Tensor) -> torch.Tensor:
    """Nine overlapping parts of one photograph, in its size."""
    parts = [image[:, i : i + 160, j : j + 160] for i in (0, 32, 64) for j in (0, 32, 64)]
    return F.interpolate(torch.stack(parts), size=image.shape[1:], mode="bilinear", antialias=True)


def test_it_knows_what_is_on_the_photographs(real_classifier, photographs):
    likely = real_classifier(torch.stack(list(photographs.values()))).topk(3).indices.tolist()
    assert [NAMES[row[0]] for row in likely[:2]] == ["palace", "daisy"]
    assert "military uniform" in [NAMES[index] for index in likely[2]]


def test_accuracy_on_real_images(real_classifier, shared_data):
    """As measured with the weights' own preprocessing, 0.88 of these 125; ImageNet's usual mean gives 0.77."""
    files = find_images(shared_data / "images" / "imagenet")[::4]
    labels = torch.tensor([int(file.name.split("_")[0]) for file in files])
    source = open_images(files, preprocessing=PREPROCESSING)
    with torch.no_grad():
        logits = torch.cat([real_classifier(source[number][None]) for number in range(len(source))])
    assert (logits.argmax(1) == labels).float().mean() >= 0.85


def test_feature_activation_map(real_classifier, embed, photographs, halves):
    references = embed(torch.stack([photographs["flower"], photographs["palace"]]))
    fam = FeatureActivationMap(
        embed, real_classifier.last, references, reference_names=["flower", "palace"],
        normalize="none", weights="gradient",
    )  # fmt: skip
    maps = fam.attribute(halves.expand(2, -1, -1, -1), target=[0, 1])
    assert left(maps)[0, 0] > 0.6
    assert left(maps)[1, 0] < 0.4
    similarity = F.cosine_similarity(embed(halves), references)
    torch.testing.assert_close(maps.mean((1, 2, 3)), similarity, rtol=1e-5, atol=1e-5)  # completeness


def test_spatial_acv(real_classifier, photographs, halves):
    sacv = SpatialACV(real_classifier, "blocks.10")
    examples = {name: crops(photographs[name]) for name in ("flower", "palace")}
    sacv.fit(examples, crops(photographs["person"]))
    assert (sacv.accuracies_ > 0.9).all()
    relevance = left(sacv.concept_maps(halves))[0]
    assert relevance[0] > 0.8
    assert relevance[1] < 0.2
    assert sacv.attribute(halves, target=DAISY).any()


def test_concept_fusion_map(real_classifier, photographs, halves):
    cefam = photo_explainer(real_classifier)
    images = torch.stack(list(photographs.values()))
    torch.testing.assert_close(cefam.scores(images), real_classifier(images).softmax(1), rtol=1e-2, atol=1e-4)
    maps = cefam.attribute(halves.expand(2, -1, -1, -1), target=["daisy", "palace"])
    assert left(maps)[0, 0] > 0.8
    assert left(maps)[1, 0] < 0.2
    # With one layer that the head reads, the published map is Grad-CAM's of the class.
    gradcam = LayerGradCam(real_classifier, real_classifier.last).attribute(halves, DAISY, relu_attributions=True)
    torch.testing.assert_close(maps[:1], gradcam, rtol=1e-3, atol=1e-4)
    flower = photographs["flower"][None]
    own, foreign = cefam.contributions(flower, target=DAISY, concepts=["daisy", "palace"])[0]
    assert own > 0.5
    assert own > foreign + 0.2


def test_deleting_what_the_map_shows_first(real_classifier, photographs):
    flower = photographs["flower"][None]
    maps = photo_explainer(real_classifier).attribute(flower, target="daisy")[:, 0]

    def score(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return real_classifier(images).softmax(1)[:, DAISY]

    assert deletion(score, flower, maps, n_steps=14) < deletion(score, flower, -maps, n_steps=14)


class Reads:
    """The network as an image-text encoder: words are its classes."""

    logit_scale, logit_bias = 10.0, 0.0
    words = ("daisy", "palace", "military uniform", "castle", "bee")

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = self.model(F.interpolate(images, (224, 224), mode="bilinear"))
        return logits[:, [NAMES.index(word) for word in self.words]]

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        return torch.eye(len(self.words))[[self.words.index(text) for text in texts]]


def test_salf_cbm(real_classifier, photographs, halves, tmp_path):
    images = torch.cat([crops(photographs[name])[:6] for name in ("flower", "palace", "person")])
    labels = torch.arange(3).repeat_interleave(6)
    model = fit_salf_cbm(
        real_classifier, "last", (images, labels), Reads(real_classifier), ["daisy", "palace", "military uniform"], 3,
        store_path=tmp_path, prompt=RegionPrompt("crop", 2, 56), bottleneck={"max_epochs": 30},
    )  # fmt: skip
    with torch.no_grad():
        assert (model(images).argmax(1) == labels).float().mean() > 0.9
        maps = model.concept_maps(halves)[0]
    more = {word: float(m[:, 0].mean() - m[:, -1].mean()) for word, m in zip(model.concepts, maps, strict=True)}
    assert more["daisy"] > 0 > more["palace"]
