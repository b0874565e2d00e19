"""Segmentation and detection networks as they are, explained through `captum_concepts.targets`."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from captum_concepts import ConceptFusionMap, ConceptTranslator, FeatureActivationMap, SpatialACV
from captum_concepts.activations import Layers
from captum_concepts.errors import InputError, InputWarning
from captum_concepts.targets import Box, SemanticSegmentation


class Pixels(nn.Module):
    """Logits of two classes: the red and the green of each pixel."""

    def __init__(self, wrap=lambda y: y):
        super().__init__()
        self.layer, self.wrap = nn.Conv2d(3, 2, 1, bias=False), wrap
        self.layer.weight.data = torch.eye(3)[:2, :, None, None]

    def forward(self, x):
        return self.wrap(self.layer(x))


def red_left():
    """One image: its left half red .8, its right half green .6."""
    image = torch.zeros(1, 3, 8, 8)
    image[:, 0, :, :4], image[:, 1, :, 4:] = 0.8, 0.6
    return image


@pytest.mark.parametrize(
    "wrap",
    [lambda y: y, lambda y: {"out": y, "aux": None}, lambda y: (y, None), lambda y: type("O", (), {"logits": y})()],
)
def test_segmentation_scores(wrap):
    image = red_left()
    assert torch.allclose(SemanticSegmentation(Pixels(wrap))(image), torch.tensor([[0.8, 0.6]]))
    assert torch.allclose(SemanticSegmentation(Pixels(wrap), "all")(image), torch.tensor([[0.4, 0.3]]))
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:, :4] = True  # the left quarter, in another resolution
    assert torch.allclose(SemanticSegmentation(Pixels(wrap), mask)(image), torch.tensor([[0.8, 0.0]]))


def test_a_region_smaller_than_a_cell_counts():
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[3, 3] = True
    assert torch.allclose(SemanticSegmentation(Pixels(), mask)(red_left()), torch.tensor([[0.8, 0.0]]))


def test_a_class_that_no_pixel_has_scores_zero():
    assert SemanticSegmentation(Pixels())(red_left()[..., :4])[0, 1] == 0


def test_what_is_no_segmentation_is_refused():
    with pytest.raises(InputError, match="'predicted', 'all'"):
        SemanticSegmentation(Pixels(), "everything")
    with pytest.raises(InputError, match="at least one pixel that is True"):
        SemanticSegmentation(Pixels(), torch.zeros(4, 4, dtype=torch.bool))
    for net in (nn.Flatten(), Pixels(lambda y: y.argmax(1, keepdim=True))):
        with pytest.raises(InputError, match=r"no logits \(N, L, h, w\)"):
            SemanticSegmentation(net)(torch.rand(1, 3, 4, 4))


class Detections(nn.Module):
    def __init__(self, boxes, labels, scores):
        super().__init__()
        self.found = {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels), "scores": torch.tensor(scores)}

    def forward(self, images):
        return [self.found] * len(images)


def test_box_takes_the_best_detection_of_its_label():
    net = Detections([[0.0, 0, 4, 4], [0, 0, 4, 2], [8, 8, 12, 12]], [1, 2, 1], [0.5, 0.9, 0.7])
    x = torch.rand(2, 3, 16, 16)
    asked = [[0, 0, 4, 4], [0, 0, 4, 4], [8.0, 8, 12, 12], [0, 0, 4, 4]]
    assert torch.allclose(Box(net, asked, [1, 2, 1, 3])(x), torch.tensor([[0.5, 0.45, 0.7, 0.0]]).expand(2, -1))
    assert torch.allclose(Box(net, asked[:1])(x), torch.tensor([[0.5], [0.5]]))


def test_no_detection_scores_zero():
    net = Detections(torch.zeros(0, 4).tolist(), [], [])
    net.found["boxes"] = torch.zeros(0, 4)
    assert Box(net, [[0, 0, 4, 4]], [1])(torch.rand(1, 3, 8, 8)).tolist() == [[0.0]]


def test_queries_of_detr():
    class Fixed(nn.Module):
        def forward(self, x):
            logits = torch.tensor([[[5.0, 0, 0], [0, 0, 5]]]).expand(len(x), -1, -1)
            return {"pred_logits": logits, "pred_boxes": torch.tensor([[[0.25, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]])}

    chance = torch.tensor([5.0, 0, 0]).softmax(0)[0]
    found = Box(Fixed(), [[0, 0, 8, 8]], [0])(torch.rand(1, 3, 8, 16))  # 8 high, 16 wide: the left half
    assert torch.allclose(found, chance[None, None])


@pytest.mark.parametrize(
    ("boxes", "labels", "message"),
    [
        ([0, 0, 4, 4], None, r"\(K, 4\)"),
        ([[4, 0, 0, 4]], None, "x1 > x0"),
        ([[0, 0, 4, float("nan")]], None, r"\(K, 4\)"),
        ([[0, 0, 4, 4]], [1, 2], "one per box"),
        ([[0, 0, 4, 4]], [0.5], "class indices"),
        ([[0, 0, 4, 4]], [-1], "of 0 or more"),
        ([[0, 0, 4, 4]], [True], "of 0 or more"),
        ([[0, 0, 4, 4]], ["person"], "class indices"),
        ([], [], "at least one box"),
        ([[0, 0, 4, 4], [1, 2, 3]], None, r"\(K, 4\)"),
        ("box", None, r"\(K, 4\)"),
        (None, None, r"\(K, 4\)"),
    ],
)
def test_boxes_and_labels_are_checked(boxes, labels, message):
    with pytest.raises(InputError, match=message):
        Box(nn.Identity(), boxes, labels)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([0.1, 0.1, 0.5, 0.9], "multiply x by 12 and y by 8"),
        ([4, 4, 14, 8], "12 wide and 8 high"),
        ([4, -3, 9, 8], "12 wide"),
    ],
)
def test_boxes_are_in_pixels_of_the_image(box, message):
    """In fractions, or of the original photograph, they would score next to nothing, unsaid."""
    net = Detections([[0.0, 0, 4, 4]], [1], [0.5])
    with pytest.raises(InputError, match=message):
        Box(net, [box], [1])(torch.rand(1, 3, 8, 12))
    assert Box(net, [[-1, 0, 4, 9]], [1])(torch.rand(1, 3, 8, 12)).item() > 0  # detectors round outwards


class Queries(nn.Module):
    """A detector of two boxes of each image, with the outputs of DETR."""

    def __init__(self, classes=2, outputs=3, config=True):
        super().__init__()
        self.layer, self.head = nn.Conv2d(3, 4, 4, 4), nn.Linear(4, 2 * outputs)
        if config:
            self.config = type("Config", (), {"num_labels": classes})()

    def forward(self, x):
        logits = self.head(self.layer(x).relu().mean((2, 3))).unflatten(1, (2, -1))
        boxes = torch.tensor([[0.25, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]).expand(len(x), -1, -1)
        return {"logits": logits, "pred_boxes": boxes}


def test_detectors_without_a_no_object_class_have_sigmoids():
    """Deformable, Conditional and RT-DETR have the outputs of DETR, but no column for "no object"."""
    torch.manual_seed(0)
    x, whole = torch.rand(2, 3, 8, 16), [[0, 0, 16, 8]]
    softmax, sigmoid, unknown = Queries(2, 3), Queries(3, 3), Queries(config=False)
    sigmoid.load_state_dict(softmax.state_dict())
    unknown.load_state_dict(softmax.state_dict())
    logits = softmax(x)["logits"][..., 1].detach(), softmax(x)["logits"].detach().softmax(-1)[..., 1]
    iou = torch.tensor([0.5, 1.0])
    by_sigmoid, by_softmax = (logits[0].sigmoid() * iou).amax(1), (logits[1] * iou).amax(1)
    assert torch.allclose(Box(softmax, whole, [1])(x)[:, 0], by_softmax)
    assert torch.allclose(Box(unknown, whole, [1])(x)[:, 0], by_softmax)
    assert torch.allclose(Box(sigmoid, whole, [1])(x)[:, 0], by_sigmoid)
    assert torch.allclose(Box(unknown, whole, [1], no_object=False)(x)[:, 0], by_sigmoid)
    assert Box(sigmoid, whole, [2])(x).shape == (2, 1)  # its last class is a class
    with pytest.raises(InputError, match="label 2 is not among the 2 classes"):
        Box(softmax, whole, [2])(x)
    with pytest.raises(InputError, match="3 logits per box, but its config has num_labels=5; pass no_object="):
        Box(Queries(5, 3), whole, [1])(x)


def test_contributions_change_the_score_itself():
    """Not its softmax over the boxes, which would call a score of .01 beside another of .01 a probability of .5."""
    torch.manual_seed(0)
    x = torch.rand(2, 3, 8, 16)
    for boxes in ([[0, 0, 16, 8]], [[0, 0, 16, 8], [0, 0, 4, 4]]):
        model = Box(Queries(), boxes, [1] * len(boxes))
        words = ConceptFusionMap(model, ["model.layer"], ConceptTranslator([4], 4), ["a", "b"], torch.randn(2, 4))
        found = words.explain(x, target=0)
        assert torch.allclose(found.target_probability, model(x)[:, 0].detach(), atol=1e-6)


class Bright(nn.Module):
    """A list of detections: one box in each image that is bright enough."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 1)
        nn.init.constant_(self.layer.weight, 0.3)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x):
        score = self.layer(x).mean((1, 2, 3))
        found = score > 0.1
        boxes = torch.tensor([[0.0, 0, 4, 4]])
        return [
            {"boxes": boxes[: int(yes)], "labels": torch.ones(int(yes)).long(), "scores": score[i : i + int(yes)]}
            for i, yes in enumerate(found)
        ]


def test_an_image_without_detections_says_the_same_alone_as_in_a_batch():
    x = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8) * 0.5])
    model = Box(Bright(), [[0, 0, 4, 4]], [1])
    assert torch.allclose(model(x), torch.tensor([[0.0], [0.45]]))
    shades = torch.linspace(0, 0.2, 4)[:, None, None, None]
    acv = SpatialACV(model, "model.layer").fit({"bright": x[1:] + shades}, x[:1] + shades)
    together = acv.attribute(x, target=0)
    with pytest.warns(InputWarning, match="gradient at layer 'model.layer' is zero"):
        alone = acv.attribute(x[:1], target=0)
    assert torch.equal(alone, together[:1])
    assert together[1].abs().sum() > 0


@pytest.mark.parametrize("region", ["all", "predicted", torch.ones(300, 300, dtype=torch.bool)])
def test_half_precision_counts_every_pixel(region):
    """A sum over 90,000 pixels is beyond the largest number of half precision."""
    x = torch.ones(1, 3, 300, 300)
    score = SemanticSegmentation(Pixels().half(), region)(x.half())
    assert torch.allclose(score, SemanticSegmentation(Pixels(), region)(x), atol=1e-3)


def test_a_mask_of_another_aspect_ratio_is_refused():
    mask = np.ones((16, 16), dtype=bool)
    assert SemanticSegmentation(Pixels(), mask)(red_left()).shape == (1, 2)
    with pytest.raises(InputError, match="16 x 16 pixels, which is not a resized version of images of 8 x 4"):
        SemanticSegmentation(Pixels(), mask)(red_left()[..., :4])


def test_what_is_no_detector_is_refused():
    with pytest.raises(InputError, match="no detections"):
        Box(nn.Flatten(), [[0, 0, 4, 4]])(torch.rand(1, 3, 8, 8))


def explained(model: nn.Module, layer: str, images: torch.Tensor, outputs: int) -> None:
    """Three methods say something about every position of the last layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maps = FeatureActivationMap(model, layer, torch.eye(outputs)).attribute(images, target=0)
        assert maps.abs().sum() > 0
        acv = SpatialACV(model, layer).fit({"bright": images + 1}, images)
        assert acv.attribute(images, target=0).abs().sum() > 0
        channels = Layers.resolve(model, layer).run(images).maps[0].shape[1]
        translator = ConceptTranslator([channels], 4, hidden=(8, 8))
        words = ConceptFusionMap(model, [layer], translator, ["a", "b"], torch.randn(2, 4))
        found = words.explain(images, target=0)
    assert found.contributions is not None
    assert found.contributions.isfinite().all()


def test_deeplab():
    torch.manual_seed(0)
    net = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=4
    )
    images = torch.rand(2, 3, 96, 96)
    net(images)  # statistics of batch normalization: without them nothing of the image reaches the logits
    explained(SemanticSegmentation(net.eval(), "all"), "model.backbone.16", images, 4)


def test_faster_rcnn():
    torch.manual_seed(0)
    net = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, box_score_thresh=0.0, min_size=96, max_size=128
    ).eval()
    images = torch.rand(1, 3, 96, 128)
    found = net(images)[0]
    model = Box(net, found["boxes"][:2].detach(), found["labels"][:2])
    assert torch.allclose(model(images)[0], found["scores"][:2], atol=1e-5)
    maps = FeatureActivationMap(model, "model.backbone.body.16", torch.eye(2)).attribute(images, target=0)
    assert maps.abs().sum() > 0


def test_detr_of_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    tower = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone=None, use_pretrained_backbone=False, backbone_config=tower, d_model=16,
        encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2,
        decoder_attention_heads=2, num_queries=5, num_labels=3,
    )  # fmt: skip
    net = transformers.DetrForObjectDetection(config).eval()
    images = torch.rand(1, 3, 64, 96)
    model = Box(net, [[10, 10, 60, 50]], [1])
    (layer,) = [name for name, _ in model.named_modules() if name.endswith("input_projection")]
    assert FeatureActivationMap(model, layer, torch.eye(1)).attribute(images, target=0).abs().sum() > 0
