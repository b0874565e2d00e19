"""SALF-CBM on scenes whose concepts, masks and classes are known exactly: accuracy, maps, grid and radius."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients
from torch import Tensor, nn

from benchmarks.data.salf_cbm import features, folder, scenes
from benchmarks.peers.salf_cbm import LFCBM, blind_maps, fit_lf_cbm, fit_p_cbm, grad_cam
from benchmarks.run.salf_cbm.heads import backbone_row, heads, install
from benchmarks.run.salf_cbm.maps import bootstrap, score_maps, summary
from captum_concepts import demo, published
from captum_concepts.metrics import nra
from captum_concepts.models.salf_cbm.fit import fit_salf_cbm
from captum_concepts.store import RegionEmbeddingStore
from captum_concepts.vlm import RegionPrompt

LAYER, CLASSES = "layer4", 6
#: The paper's prompt: 7 x 7 circles of radius 32 and a line of 2 px on 224 px.
PROMPT = RegionPrompt("circle", (7, 7), 32, reference_size=224)
MOST = [5, 10, 30]
#: Effective concepts per class on average, as later papers compare, and the strength of LF-CBM's command for CUB-200.
EFFECTIVE, LAM = 5, published.SALF_CBM_DATA["CUB-200"]["lam"]
MAP_IMAGES = 200
UNIT = "LF-CBM, activation map of the concept unit"


def fit(
    cache: Path,
    name: str,
    backbone: nn.Module,
    train: Any,
    concepts: Sequence[str],
    prompt: RegionPrompt,
    **options: Any,
) -> Any:
    """SALF-CBM with every concept kept, so that each has a map to be judged."""
    return fit_salf_cbm(
        backbone, LAYER, (train.image, train.label), demo.load("clip"), list(concepts), CLASSES,
        store_path=folder(cache, name, len(train.label), prompt), prompt=prompt, presence_cutoff=None,
        interpretability_cutoff=None, batch_size=100, prompt_batch_size=98, **options,
    )  # fmt: skip


@torch.no_grad()
def batched(function: Any, images: Tensor, batch_size: int = 100) -> Tensor:
    """``function`` on parts of the images."""
    return torch.cat([function(part) for part in images.split(batch_size)])


def above(maps: Tensor, mean: Tensor) -> Tensor:
    """What exceeds a concept's mean over the training data: the zero of a bottleneck's map is free, this one is not."""
    return (maps - mean.reshape(-1, 1, 1)).relu()


def global_embeddings(images: Tensor) -> Tensor:
    """One unit embedding an image, no mark: what LF-CBM learns from."""
    return F.normalize(batched(demo.load("clip").encode_image, images), dim=1)


def label_free(pooled: Tensor, images: Tensor, concepts: Sequence[str]) -> LFCBM:
    """LF-CBM with every concept kept; a tenth of the images validates, as for SALF-CBM."""
    text = F.normalize(demo.load("clip").encode_text(list(concepts)), dim=1)
    p = global_embeddings(images) @ text.T
    order = torch.randperm(len(p), generator=torch.Generator().manual_seed(0))
    val, train = order[: len(p) // 10], order[len(p) // 10 :]
    return fit_lf_cbm(pooled[train], p[train], list(concepts), (pooled[val], p[val]), cutoff=-1.0)


def accuracy_and_maps(cache: Path, train_images: int, test_images: int, epochs: int) -> dict[str, Any]:
    """Heads of every model, maps of the 21 words, and maps of the class by class prompts (the paper's Table 2)."""
    data, train = scenes("train", train_images)
    _, test = scenes("test", test_images)
    backbone = demo.load("classifier")
    a, _ = features(backbone, LAYER, train.image)
    b, outputs = features(backbone, LAYER, test.image)
    pooled, pooled_test = a.mean((2, 3)), b.mean((2, 3))
    settings = {"bottleneck": {"max_epochs": epochs}}
    model = fit(cache, "scenes", backbone, train, data.concepts, PROMPT, **settings)
    peer = label_free(pooled, train.image, data.concepts)
    text = F.normalize(demo.load("clip").encode_text(list(data.concepts)), dim=1)
    bank = fit_p_cbm(pooled, global_embeddings(train.image) @ text.T, list(data.concepts))
    inputs = {
        "backbone's features": (pooled, pooled_test),
        "P-CBM": (bank.activations(pooled), bank.activations(pooled_test)),
        "LF-CBM": (peer.activations(pooled), peer.activations(pooled_test)),
        "SALF-CBM": (batched(model.concept_activations, train.image), batched(model.concept_activations, test.image)),
    }
    rows, kept = [backbone_row(outputs, test.label)], {}
    for name, (x, y) in inputs.items():
        labelled = (x, train.label), (y, test.label)
        found, kept[name] = heads(name, *labelled, CLASSES, MOST, effective=EFFECTIVE, lam=LAM)
        rows += found
    install(model, kept["SALF-CBM"][30])
    end_to_end = float((batched(model, test.image).argmax(1) == test.label).double().mean())
    record: dict[str, Any] = {
        "train_images": train_images,
        "test_images": test_images,
        "accuracy": rows,
        "accuracy_of_the_model_with_the_head_of_30": end_to_end,
        "rules": {name: model.decision_rules(c, 6) for c, name in enumerate(data.classes)},
        "similarity_on_validation": model.metadata["validation_similarity"],
        "similarity_of_lf_cbm": dict(zip(data.concepts, peer.similarity.tolist(), strict=True)),
        "bottleneck": model.metadata["bottleneck"],
    }
    part = slice(0, min(MAP_IMAGES, test_images))
    images, seen, truth = test.image[part], b[part], (test.masks[part], test.presence[part])
    store = RegionEmbeddingStore.build(cache / "scenes-test-regions", images, demo.load("clip"), PROMPT, batch_size=98)
    count = len(data.concepts)
    cam = grad_cam(backbone, backbone.get_submodule(LAYER), images, outputs[part].argmax(1))
    own, other = batched(model.concept_maps, images), peer.maps(seen)
    maps = {
        "SALF-CBM": own,
        "SALF-CBM, above its training mean": above(own, model.concept_mean),
        UNIT: other,
        f"{UNIT}, above its training mean": above(other, peer.mean),
        "Grad-CAM of the predicted class": cam[:, None].expand(-1, count, -1, -1),
        **blind_maps(seen, count),
        "P: the encoder on circled images (teacher)": store.similarity(data.concepts).tensor(),
    }
    record["concept_maps"] = {name: summary(score_maps(m, *truth)) for name, m in maps.items()}
    record["nra_exact_by_kind"] = {
        name: {
            kind: bootstrap(list(found[:, [data.concepts.index(word) for word in words]]))
            for kind, words in data.concept_groups.items()
        }
        for name in ("SALF-CBM", UNIT)
        for found in [nra(maps[name], truth[0], baseline="exact")]
    }
    record["class_maps"] = class_maps(cache, backbone, train, test, part, pooled, seen, data, settings)
    return record


def class_maps(
    cache: Path,
    backbone: nn.Module,
    train: Any,
    test: Any,
    part: slice,
    pooled: Tensor,
    seen: Tensor,
    data: Any,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Maps of the true class against the mask of the object that makes the class: concepts "an image of a {class}"."""
    from pytorch_grad_cam import GradCAMPlusPlus, ScoreCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    prompts = [f"an image of a {name}" for name in data.classes]
    images, label, masks = test.image[part], test.label[part], test.object_masks[part, 0]
    rows = torch.arange(len(label))
    salf = fit(cache, "scenes", backbone, train, prompts, PROMPT, head="dense", **settings)
    peer = label_free(pooled, train.image, prompts)
    own, other = batched(salf.concept_maps, images), peer.maps(seen)
    maps = {
        "SALF-CBM": own[rows, label],
        "SALF-CBM, above its training mean": above(own, salf.concept_mean)[rows, label],
        UNIT: other[rows, label],
        f"{UNIT}, above its training mean": above(other, peer.mean)[rows, label],
        "Grad-CAM": grad_cam(backbone, backbone.get_submodule(LAYER), images, label),
    }
    free = demo.load("classifier").requires_grad_()
    for name, method in (("Grad-CAM++", GradCAMPlusPlus), ("Score-CAM", ScoreCAM)):
        quiet = contextlib.redirect_stderr(io.StringIO())  # a progress bar a batch
        with warnings.catch_warnings(), quiet, method(free, [free.get_submodule(LAYER)]) as explainer:
            warnings.simplefilter("ignore")
            if name == "Score-CAM":
                explainer.batch_size = 128
            targets = [ClassifierOutputTarget(int(c)) for c in label]
            found = [explainer(x, targets[i * 50 : i * 50 + len(x)]) for i, x in enumerate(images.split(50))]
            maps[name] = torch.cat([torch.as_tensor(v) for v in found])
    integrated = IntegratedGradients(backbone)
    maps["integrated gradients"] = torch.cat(
        [
            integrated.attribute(x, target=y, n_steps=20, internal_batch_size=200).abs().sum(1).detach()
            for x, y in zip(images.split(50), label.split(50), strict=True)
        ]
    )
    maps |= {name: m[:, 0] for name, m in blind_maps(seen, 1).items()}
    here = torch.ones(len(label), 1, dtype=torch.bool)
    return {
        name: summary(score_maps(m[:, None], masks[:, None], here), leave_out=("specificity",))
        for name, m in maps.items()
    }


def grid_and_radius(
    cache: Path, train_images: int, test_images: int, grids: Sequence[int], radii: Sequence[int], epochs: int
) -> dict[str, Any]:
    """The paper's Table 3 on scenes: one row a grid and radius, the same images and settings in all."""
    data, train = scenes("train", train_images)
    _, test = scenes("test", test_images)
    backbone = demo.load("classifier")
    rows = []
    part = slice(0, min(MAP_IMAGES, test_images))
    for grid in grids:
        for radius in radii:
            prompt = RegionPrompt("circle", (grid, grid), radius, reference_size=224)
            options = {"nonzeros_per_class": 10, "bottleneck": {"max_epochs": epochs}}
            model = fit(cache, "scenes", backbone, train, data.concepts, prompt, **options)
            hits = (batched(model, test.image).argmax(1) == test.label).tolist()
            scores = score_maps(batched(model.concept_maps, test.image[part]), test.masks[part], test.presence[part])
            found = summary(scores)
            similarity = list(model.metadata["validation_similarity"].values())
            rows.append(
                {
                    "grid": grid, "radius": radius, "accuracy": sum(hits) / len(hits), "hits": sum(hits),
                    "maps": found, "validation_similarity": sum(similarity) / len(similarity),
                }
            )  # fmt: skip
            print(grid, radius, rows[-1]["accuracy"], found["nra_exact"], flush=True)
    return {"train_images": train_images, "test_images": test_images, "epochs": epochs, "rows": rows}
