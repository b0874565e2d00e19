"""SALF-CBM in the demo, with a model trained on the spot, its rules, and wrong predictions corrected by one edit."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from captum_concepts import demo
from captum_concepts.datasets import CaptionedScenes, Scene
from captum_concepts.explanation import ConceptExplanation
from captum_concepts.models.salf_cbm import SALFCBM
from captum_concepts.models.salf_cbm.fit import fit_salf_cbm
from captum_concepts.models.salf_cbm.regions import coverage, region_mask
from captum_concepts.vlm import RegionPrompt

#: Number of training scenes (with 49 visual prompts each), of scenes searched for mistakes, and of epochs.
TRAIN, SEARCHED, EPOCHS = 180, 500, 40
PROMPT = RegionPrompt("circle", (7, 7))


@dataclass(frozen=True)
class Correction:
    """A wrong prediction, the concepts in one region, and the prediction after one edit there.

    Args:
        image: ``(3, H, W)``.
        truth, called, corrected: the true class, the predicted one, and the one predicted after the edit.
        box: the region, x0, y0, x1, y1 in pixels.
        concept: the edited concept.
        seen: the strongest concepts of :meth:`~captum_concepts.SALFCBM.explain_region` and the edited one, with scores.
        beta: the value added to the concept's map in the region.
        map_before, map_after: ``(h, w)``, in standard deviations of the pooled activation.
        before, after: ``(K,)`` probabilities of the classes.
    """

    image: Tensor
    truth: str
    called: str
    corrected: str
    box: tuple[float, float, float, float]
    concept: str
    seen: list[tuple[str, float]]
    beta: float
    map_before: Tensor
    map_after: Tensor
    before: Tensor
    after: Tensor


def train(scenes: CaptionedScenes, n: int = TRAIN) -> SALFCBM:
    """A SALFCBM of the bundled classifier, fitted with the bundled VLM and ``n`` labeled scenes."""
    data = CaptionedScenes(n, seed=scenes.seed + 3, size=scenes.size)
    known = data.stack()
    with tempfile.TemporaryDirectory() as folder:
        return fit_salf_cbm(
            demo.load("classifier"),
            "layer4",
            (known.image, known.label),
            demo.load("clip"),
            data.concepts,
            len(data.classes),
            store_path=folder,
            prompt=PROMPT,
            class_names=data.classes,
            presence_cutoff=None,
            interpretability_cutoff=None,
            nonzeros_per_class=6,
            bottleneck={"max_epochs": EPOCHS},
            prompt_batch_size=98,
            batch_size=80,
        )


class Search(NamedTuple):
    """Result of :func:`find_corrections`, the numbers of wrong and of corrected predictions, and some corrections."""

    wrong: int
    corrected: int
    shown: list[Correction]


def logits(model: SALFCBM, images: Tensor) -> Tensor:
    """``(N, K)`` logits, computed in batches."""
    with torch.no_grad():
        return torch.cat([model(part) for part in images.split(100)])


def find_corrections(model: SALFCBM, scenes: Scene, most: int = 3) -> Search:
    """Wrong predictions that one edit of one concept around one object corrects.

    As a user would, it applies :meth:`~captum_concepts.SALFCBM.explain_region` to each object, finds the absent concept
    that most supports the predicted class over the true one, and resets it to its training mean in that box. Each
    mistake is corrected by its smallest such edit.
    """
    predicted = logits(model, scenes.image).argmax(1)
    wrong = torch.nonzero(predicted != scenes.label).flatten().tolist()
    found = []
    for i in wrong:
        tried = [_try(model, scenes, i, int(predicted[i]), k) for k in range(3) if int(scenes.objects[i, k, 0]) >= 0]
        worked = [c for c in tried if c.corrected == c.truth]
        if worked:
            found.append(min(worked, key=lambda c: abs(c.beta)))
    found.sort(key=lambda c: float(c.after.max()), reverse=True)
    first_of_kind = {(c.called, c.concept): c for c in reversed(found)}
    # Concepts that were detected too strongly are easier to understand than missed ones.
    varied = sorted(
        found,
        key=lambda c: (c.beta > 0, first_of_kind[c.called, c.concept] is not c or float(c.after.max()) < 0.5),
    )
    return Search(len(wrong), len(found), varied[:most])


def _contributions(explanation: ConceptExplanation) -> Tensor:
    if explanation.contributions is None:
        raise RuntimeError("explain_region gave no contributions")
    return explanation.contributions[0]


def _try(model: SALFCBM, scenes: Scene, i: int, called: int, k: int) -> Correction:
    """Correction by an edit of the most misleading concept in the box of object ``k``."""
    x, truth = scenes.image[i : i + 1], int(scenes.label[i])
    size = float(scenes.image.shape[-1])
    box = tuple(scenes.boxes[i, k].clamp(0, size).tolist())
    seen, other = (model.explain_region(x, c, boxes=box, top_k=None) for c in (called, truth))
    there = {model.concepts[int(word)] for word in scenes.objects[i, k]}
    misleads = _contributions(seen) - _contributions(other)[[other.index(word) for word in seen.concepts]]
    wrongly = torch.tensor([word not in there for word in seen.concepts])
    at = int(misleads.masked_fill(~wrongly, -torch.inf).argmax())
    concept = seen.concepts[at]
    j = model.concepts.index(concept)
    # The region's part of c*_j becomes 0, that is, its mean there becomes the training mean.
    weight = float((model.head.weight[called, j] - model.head.weight[truth, j]).detach())
    area = (box[2] - box[0]) * (box[3] - box[1]) / size**2
    beta = -float(misleads[at]) / (weight * area) if weight else 0.0
    before, after = model.intervene(x, concept, beta=beta, units="std", boxes=box)
    with torch.no_grad():
        map_before = (model.concept_maps(x)[0, j] - model.concept_mean[j]) / model.concept_std[j]
    share = coverage(region_mask(1, (x.shape[2], x.shape[3]), model.grid, boxes=box), model.grid)[0]
    names = model.class_names or []
    return Correction(
        image=scenes.image[i],
        truth=names[truth],
        called=names[called],
        corrected=names[int(after.argmax())],
        box=(box[0], box[1], box[2], box[3]),
        concept=concept,
        seen=[(seen.concepts[n], float(seen.scores[0, n])) for n in sorted({*range(4), max(at, 4)})],
        beta=beta,
        map_before=map_before,
        map_after=map_before + beta * share,
        before=before.softmax(1)[0].detach(),
        after=after.softmax(1)[0].detach(),
    )
