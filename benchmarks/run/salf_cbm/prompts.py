"""How regions are shown to the encoder: circles, crops, dense regions, a budget of circles; teacher, student, cost."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.data.salf_cbm import scenes
from benchmarks.data.vit_encoder import vit_encoder
from benchmarks.run.salf_cbm.maps import accuracy_interval, score_maps, summary
from benchmarks.run.salf_cbm.scenes import CLASSES, LAYER, MAP_IMAGES, PROMPT, batched
from captum_concepts import demo
from captum_concepts.models.salf_cbm.fit import fit_salf_cbm
from captum_concepts.store import RegionEmbeddingStore
from captum_concepts.vlm import DenseRegions, RegionPrompt
from captum_concepts.vlm.dense import ATTENTIONS, AdaptiveRegions

#: Circles of a budget: with the pass for the other cells a quarter of the 49.
BUDGET = 11
CROPS = RegionPrompt("crop", (7, 7), 32, reference_size=224)
#: Name, encoder with its dense regions or without, regions, passes of the encoder per image.
PROMPTS: dict[str, tuple[bool, Any, int]] = {
    "circles": (True, PROMPT, 49),
    "crops": (True, CROPS, 49),
    "dense regions": (True, DenseRegions(7), 1),
    f"{BUDGET} circles and dense regions": (True, AdaptiveRegions(PROMPT, BUDGET), BUDGET + 1),
    f"{BUDGET} circles, encoder without dense regions": (False, AdaptiveRegions(PROMPT, BUDGET), BUDGET + 1),
    f"{BUDGET} crops and dense regions": (True, AdaptiveRegions(CROPS, BUDGET), BUDGET + 1),
}
#: The same for a vision transformer, whose dense regions can be read in several ways.
TRANSFORMER: dict[str, tuple[bool, Any, int]] = {
    **{name: PROMPTS[name] for name in ("circles", "crops")},
    **{f"dense regions, {kind}": (True, DenseRegions(7, attention=kind), 1) for kind in ATTENTIONS},
    "dense regions, value, outliers kept": (True, DenseRegions(7, remove_outliers=False), 1),
    **{name: given for name, given in PROMPTS.items() if isinstance(given[1], AdaptiveRegions)},
}


class Plain(nn.Module):
    """An encoder without its dense regions."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.logit_scale, self.logit_bias = float(encoder.logit_scale), float(encoder.logit_bias)

    def encode_image(self, images: Tensor) -> Tensor:
        found: Tensor = self.encoder.encode_image(images)
        return found

    def encode_text(self, texts: list[str]) -> Tensor:
        found: Tensor = self.encoder.encode_text(texts)
        return found


def prompts(cache: Path, train_images: int, test_images: int, epochs: int) -> dict[str, Any]:
    """Rows of the bundled encoder, and of a vision transformer."""
    sizes = {"train_images": train_images, "test_images": test_images, "epochs": epochs}
    rows = compared(cache, demo.load("clip"), PROMPTS, "", **sizes)
    return {**sizes, "rows": rows, "transformer": compared(cache, vit_encoder(), TRANSFORMER, "vit-", **sizes)}


def compared(
    cache: Path,
    clip: Any,
    prompts: dict[str, tuple[bool, Any, int]],
    prefix: str,
    *,
    train_images: int,
    test_images: int,
    epochs: int,
) -> list[dict[str, Any]]:
    """One row per prompt: the same scenes, backbone, words and settings in all; every concept is kept."""
    data, train = scenes("train", train_images)
    _, test = scenes("test", test_images)
    part = slice(0, min(MAP_IMAGES, test_images))
    truth = (test.masks[part], test.presence[part])
    rows: list[dict[str, Any]] = []
    text = F.normalize(clip.encode_text(list(data.concepts)), dim=1)
    for name, (dense, regions, passes) in prompts.items():
        encoder = clip if dense else Plain(clip)
        path = cache / f"prompts-{prefix}{name.replace(' ', '-')}-n{train_images}"
        shutil.rmtree(path, ignore_errors=True)  # embedding is timed, so nothing is taken from an earlier run
        start = time.process_time()
        RegionEmbeddingStore.build(path / "regions-train", train.image, encoder, regions, show_progress=True)
        seconds = time.process_time() - start
        model = fit_salf_cbm(
            demo.load("classifier"), LAYER, (train.image, train.label), encoder, list(data.concepts), CLASSES,
            store_path=path, prompt=regions, presence_cutoff=None, interpretability_cutoff=None, batch_size=100,
            nonzeros_per_class=10, bottleneck={"max_epochs": epochs},
        )  # fmt: skip
        teacher = RegionEmbeddingStore.build(path / "regions-test", test.image[part], encoder, regions).similarity(text)
        hits = (batched(model, test.image).argmax(1) == test.label).tolist()
        rows.append(
            {
                "prompt": name,
                "passes": passes,
                "embedding_seconds_per_image": seconds / train_images,
                "teacher": summary(score_maps(teacher.tensor(), *truth)),
                "student": summary(score_maps(batched(model.concept_maps, test.image[part]), *truth)),
                "accuracy": accuracy_interval(hits),
                "pooled_similarity": _mean(model.metadata["pooled_similarity"]),
                "validation_similarity": _mean(model.metadata["validation_similarity"]),
            }
        )
        print(name, rows[-1]["teacher"]["nra_exact"], rows[-1]["student"]["nra_exact"], flush=True)
    circles = rows[0]
    for row in rows:
        row["of_circles"] = {
            f"{who} {key}": row[who][key][0] / circles[who][key][0]
            for who in ("teacher", "student")
            for key in ("nra_exact", "specificity")
        }
    return rows


def _mean(values: dict[str, float]) -> float:
    return float(torch.tensor(list(values.values())).mean())
