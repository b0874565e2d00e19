"""SpatialACV beside Captum's TCAV: which concepts move which class, where the concept is, and the time for all of it.

    python -m benchmarks.run.tcav [--guides 150] [--images 10] [--scenes 15]

The bundled classifier and scenes, so the truth is known: a class is a conjunction of two words ("red circle"), and
every word has an exact mask. Guidance images are crops around single objects, the same for both methods: those that
show the word against those that do not. Needs no data.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from captum.concept import TCAV, Concept
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.peers import maps as peers
from benchmarks.record import RESULTS, environment, write
from benchmarks.run.map_tables import interval, measure, pairs
from captum_concepts import SpatialACV, demo
from captum_concepts.datasets import CaptionedScenes

SEED = 40_001
LAYER = "layer3"
CAPTUM_RUNS = 5


def crops(n: int, seed: int) -> tuple[list[str], dict[str, Tensor], dict[str, Tensor]]:
    """``n`` crops around single objects; for every word of objects those that show it, and those that do not."""
    data = CaptionedScenes(n, seed=seed, size=64)
    words = [w for kind in ("shape", "colour", "texture") for w in data.concept_groups[kind]]
    images, shows = [], []
    for scene in data:
        x0, y0, x1, y1 = scene.boxes[0].round().int().tolist()
        crop = scene.image[:, max(y0, 0) : y1 + 1, max(x0, 0) : x1 + 1]
        images.append(F.interpolate(crop[None], (64, 64), mode="bilinear", align_corners=False)[0])
        shows.append({data.concepts[c] for c in scene.objects[0].tolist()})
    stack = torch.stack(images)
    has = {w: torch.tensor([w in one for one in shows]) for w in words}
    words = [w for w in words if int(has[w].sum()) >= 5]
    return words, {w: stack[has[w]] for w in words}, {w: stack[~has[w]] for w in words}


def auroc(scores: np.ndarray, truth: np.ndarray) -> float:
    positive, negative = scores[truth], scores[~truth]
    return float(((positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)).mean())


def auroc_interval(scores: Tensor, truth: Tensor) -> list[float]:
    """With a 95 % bootstrap interval over classes."""
    s, t = scores.double().numpy(), truth.numpy()
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(1000):
        rows = rng.integers(0, len(s), len(s))
        drawn.append(auroc(s[rows].ravel(), t[rows].ravel()))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return [auroc(s.ravel(), t.ravel()), float(low), float(high)]


def own_concepts(data: CaptionedScenes, words: list[str]) -> Tensor:
    """``(classes, words)``: is the word one of the class's two?"""
    return torch.tensor([[data.concepts.index(w) in pair for w in words] for pair in data.class_concepts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guides", type=int, default=150, help="crops of single objects, for all words together")
    parser.add_argument("--images", type=int, default=10, help="images a class")
    parser.add_argument("--scenes", type=int, default=15, help="scenes with masks")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = demo.load("classifier")
    layer = model.get_submodule(LAYER)
    words, shown, absent = crops(args.guides, SEED)
    data = CaptionedScenes(60 * args.images, seed=SEED + 1, size=64)
    rows = [torch.nonzero(data.labels == c).flatten()[: args.images].tolist() for c in range(len(data.classes))]
    images = [data.stack(r).image for r in rows]
    truth = own_concepts(data, words)

    start = time.perf_counter()
    acv = SpatialACV(model, LAYER).fit(shown)  # negatives: the other words' crops that do not show this one
    fitted = time.perf_counter() - start
    found = {"sign_count": torch.zeros(len(images), len(words)), "magnitude": torch.zeros(len(images), len(words))}
    for c, x in enumerate(images):
        for kind, value in acv.tcav(x, c).items():
            found[kind][c] = value
    ours = {"seconds": time.perf_counter() - start, "seconds_to_fit": fitted}
    table_rows: list[dict[str, Any]] = [row("SpatialACV.tcav", found, truth, ours)]
    print(table_rows[-1], flush=True)

    runs, vectors = [], torch.zeros(0)
    for seed in range(CAPTUM_RUNS):
        theirs, weights, spent = captum_tcav(model, words, shown, absent, images, seed)
        runs.append(row("captum TCAV", theirs, truth, spent))
        print(runs[-1], flush=True)
        vectors = vectors if len(vectors) else weights
    table_rows.append(averaged(runs))
    chance = torch.rand(found["sign_count"].shape, generator=torch.Generator().manual_seed(0))
    table_rows.append(row("random", {"sign_count": chance, "magnitude": chance}, truth, {}))
    print(table_rows[-1], flush=True)

    wheres = where(args, model, layer, words, acv, vectors)
    aurocs = [f"{run['auroc_magnitude'][0]:.2f}" for run in runs]
    note = (
        f"Derivative of each class along each of {len(words)} words, mean over {args.images} images of the class; "
        "AUROC of the class's own two words against the others, over all classes (95 % bootstrap over the six "
        f"classes). Captum's classifier draws its test split and its order: means of {CAPTUM_RUNS} seeds, AUROC of the "
        f"magnitude {', '.join(aurocs)}."
    )
    first = {"title": "which concepts move which class", "note": note, "rows": table_rows}
    part = {
        "environment": environment("scikit-learn"),
        "arguments": {**vars(args), "layer": LAYER, "seed": SEED},
        "tables": [first, wheres],
    }
    write("tcav", {"parts": {"scenes": part}})
    print(f"written to {(RESULTS / 'tcav.json').name}")


def row(name: str, found: dict[str, Tensor], truth: Tensor, spent: dict[str, float]) -> dict[str, Any]:
    scores = {f"auroc_{kind}": auroc_interval(value, truth) for kind, value in found.items()}
    first = truth[torch.arange(len(truth)), found["magnitude"].argmax(1)].float()
    return {"method": name, **scores, "largest_is_own": interval(first), **spent}


def captum_tcav(
    model: Any,
    words: list[str],
    shown: dict[str, Tensor],
    absent: dict[str, Tensor],
    images: list[Tensor],
    seed: int,
) -> tuple[dict[str, Tensor], Tensor, dict[str, float]]:
    """Captum's scores ``(classes, words)``, its vectors, and what they took."""
    # Its default classifier draws the test split with Python's generator and the order with NumPy's.
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    start = time.perf_counter()
    theirs = {kind: torch.zeros(len(images), len(words)) for kind in ("sign_count", "magnitude")}
    with tempfile.TemporaryDirectory() as folder:
        sets = []
        for k, w in enumerate(words):
            pair = [
                Concept(2 * k + i, name, DataLoader(list(x), batch_size=32))
                for i, (name, x) in enumerate(((w, shown[w]), (f"not {w}", absent[w])))
            ]
            sets.append(pair)
        method = TCAV(model, [LAYER], save_path=folder)
        cavs = method.compute_cavs(sets)
        fitted = time.perf_counter() - start
        for c, x in enumerate(images):
            scores = method.interpret(x, sets, target=c)
            for k in range(len(words)):
                one = scores[f"{2 * k}-{2 * k + 1}"][LAYER]
                theirs["sign_count"][c, k] = one["sign_count"][0]
                theirs["magnitude"][c, k] = one["magnitude"][0]
        vectors = torch.stack([_weights(cavs[f"{2 * k}-{2 * k + 1}"][LAYER]) for k in range(len(words))])
    return theirs, vectors, {"seconds": time.perf_counter() - start, "seconds_to_fit": fitted}


def averaged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One row from those of several seeds: means of the values and of the ends of their intervals."""
    return {
        key: value if isinstance(value, str) else np.mean([run[key] for run in runs], 0).tolist()
        for key, value in runs[0].items()
    }


def _weights(cav: Any) -> Tensor:
    """The CAV of the concept: its weights minus those of the other set."""
    weights = torch.as_tensor(cav.stats["weights"]).float()
    return weights[0] - weights[1] if len(weights) == 2 else weights[0]


def where(
    args: argparse.Namespace, model: Any, layer: Any, words: list[str], acv: SpatialACV, vectors: Tensor
) -> dict[str, Any]:
    """Relevance maps against the words' masks; TCAV's vector is read position by position, which is all it can do."""
    data = CaptionedScenes(args.scenes, seed=SEED + 2, size=64)
    columns = [data.concepts.index(w) for w in words]
    items = [(s.image, [(k, s.masks[c]) for k, c in enumerate(columns) if s.presence[c]]) for s in data]
    regions = pairs(items, len(words), SEED)
    read = peers.activations(model, layer)

    def relevance(x: Tensor, target: Tensor) -> Tensor:
        return acv.concept_maps(x)[torch.arange(len(x)), target]

    def captum_map(x: Tensor, target: Tensor) -> Tensor:
        maps = read(x)
        return (maps * vectors[target].reshape(len(x), *maps.shape[1:])).sum(1)

    explainers = {"SpatialACV, relevance": relevance, "TCAV's vector, a position at a time": captum_map}
    note = f"{LAYER}; one vector a channel (SACV) beside one a channel and position (TCAV), the same guidance images."
    return measure("where the word is", note, explainers, regions, energy=read).record()


if __name__ == "__main__":
    main()
