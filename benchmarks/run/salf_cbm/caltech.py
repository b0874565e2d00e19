"""SALF-CBM on Caltech-101: a real MobileNetV2, and a zero-shot image-text model that is prompted with crops."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.data.photographs import Files, real_models
from benchmarks.data.salf_cbm import CropEncoder, caltech, features, folder, region_store
from benchmarks.peers.salf_cbm import CUTOFF, fit_lf_cbm
from benchmarks.run.salf_cbm.heads import heads
from captum_concepts.concepts import Vocabulary
from captum_concepts.models.salf_cbm.fit import (
    WHOLE,
    BottleneckSettings,
    Samples,
    concept_presence,
    fit_bottleneck,
    present_concepts,
)
from captum_concepts.store import RegionEmbeddingStore
from captum_concepts.vlm import RegionPrompt

LAYER = "net.features"
SIZE, CROP_SIZE = 224, 128
PROMPT = RegionPrompt("crop", (7, 7), 64, reference_size=224)
#: Mean of the five highest similarities of whole images below which a concept counts as absent: the published number,
#: and what the library takes for an encoder that knows certain words only.
PRESENCE = 0.25
SPARSE = [5, 30]


class Held:
    """Features of images in memory, as :func:`~captum_concepts.models.salf_cbm.fit.fit_bottleneck` reads them."""

    def __init__(self, maps: Tensor) -> None:
        self.values = maps.flatten(2).transpose(1, 2)
        self.dim = int(self.values.shape[2])

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, index: Sequence[int]) -> Tensor:
        """``(n, h*w, D)``."""
        return self.values[torch.as_tensor(index)]


def seen(cache: Path, split: str, model: Any, files: list[Path]) -> tuple[Tensor, Tensor]:
    """Feature maps (half precision) and logits of the 1,000 ImageNet classes, computed once."""
    path = cache / f"caltech-features-{split}.safetensors"
    if not path.exists():
        maps, logits = features(model, LAYER, Files(files, SIZE), 25)
        save_file({"maps": maps.half().contiguous(), "logits": logits.contiguous()}, path)
    held = load_file(path)
    return held["maps"], held["logits"]


def vocabulary(classes: list[str], encoder: Any) -> Vocabulary:
    """The encoder's 1,203 words by the paper's rules: no class's name, nothing close to one, no near duplicates."""
    names = [name.replace("_", " ") for name in classes]
    known = [name for name in names if name.lower() in encoder._index]
    words = Vocabulary([name.replace("_", " ") for name in encoder.names]).clean().known_to(encoder)
    return words.filter(names).filter(known, encoder)


def caltech_101(
    cache: Path, data: Path, train: int, test: int, seed: int, training: dict[str, Any], cutoff: float = PRESENCE
) -> dict[str, Any]:
    """Sparse and dense heads on the backbone's features, LF-CBM's and SALF-CBM's concepts: the same, none dropped.

    The backbone never saw Caltech's labels, so its own head is a dense one on pooled features. "dense, of the library"
    is ``fit_head(head="dense", bottleneck=)`` as it is; the strength of the other dense heads is chosen on a tenth of
    the training images. Crops are embedded at 128 px; LF-CBM gets one embedding of the whole image at 224 px.
    """
    names, files, labels = caltech(data, train, test, seed)
    encoder = real_models(data).ConSE()
    encoder.classifier.to(memory_format=torch.channels_last)
    maps, logits = seen(cache, "train", encoder.classifier, files["train"])
    maps_test, _ = seen(cache, "test", encoder.classifier, files["test"])
    prompt, path = PROMPT, folder(cache, "caltech", len(files["train"]), PROMPT)
    store = region_store(path, Files(files["train"], CROP_SIZE), CropEncoder(encoder), prompt, 14)
    whole_images = RegionEmbeddingStore.build(path / "images-train", Files(files["train"], SIZE), encoder, WHOLE)
    words = vocabulary(names, encoder)
    presence = concept_presence(whole_images, words.encode(encoder))
    words = present_concepts(words, presence, cutoff)
    text = words.encode(encoder)
    print(words.report.summary(), flush=True)
    order = torch.randperm(len(maps), generator=torch.Generator().manual_seed(seed))
    val, rest = order[: len(order) // 10].sort().values, order[len(order) // 10 :].sort().values
    held = Held(maps)
    start = time.perf_counter()
    settings = BottleneckSettings(**training, seed=seed)
    fit = fit_bottleneck(Samples(held, store, rest), Samples(held, store, val), text, settings)
    seconds = time.perf_counter() - start
    save_file({"weight": fit.weight, "similarity": fit.validation_similarity}, cache / "caltech-bottleneck.safetensors")
    pooled, pooled_test = maps.float().mean((2, 3)), maps_test.float().mean((2, 3))
    whole = F.normalize(
        logits.softmax(1)[:, encoder._classes] @ encoder.text[encoder._rows], dim=1
    )  # what encode_image gives for the images at 224 px
    p = whole @ text.T
    peer = fit_lf_cbm(pooled[rest], p[rest], list(words), (pooled[val], p[val]), cutoff=-1.0)
    inputs: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {
        "backbone's features": (pooled, pooled_test, None),
        "LF-CBM": (peer.activations(pooled), peer.activations(pooled_test), peer.weight / peer.std[:, None]),
        "SALF-CBM": (pooled @ fit.weight.T, pooled_test @ fit.weight.T, fit.weight),
    }
    record: dict[str, Any] = {
        "classes": len(names),
        "train_images": len(maps),
        "test_images": len(maps_test),
        "crops": len(maps) * len(prompt),
        "vocabulary": {**words.report.as_dict(), "drops": len(words.report.drops), "kept": len(words)},
        "similarity_on_validation": {
            "SALF-CBM": float(fit.validation_similarity.mean()), "LF-CBM": float(peer.similarity.mean())
        },
        "similar_enough_for_lf_cbm": {
            "SALF-CBM": int((fit.validation_similarity >= CUTOFF).sum()),
            "LF-CBM": int((peer.similarity >= CUTOFF).sum()),
        },
        "bottleneck": {"start": fit.start_similarity, "best_epoch": fit.best_epoch, "seconds": seconds},
        "accuracy": [],
    }  # fmt: skip
    print({k: v for k, v in record.items() if k != "vocabulary"}, flush=True)
    rows = record["accuracy"]
    for name, (x, y, bottleneck) in inputs.items():
        given = (x, labels["train"]), (y, labels["test"]), len(names)
        found, _ = heads(name, *given, SPARSE, on_average=True, bottleneck=bottleneck, relaxed=True)
        rows += found
    return record
