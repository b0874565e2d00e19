"""How many of the concepts that a layer encodes does a discovery without words find? Needs no data.

    python -m benchmarks.run.audit.discovery [--seeds 0 1 2]

The last stage of the bundled classifier, scenes with 21 known concepts. A concept is encoded if a linear probe on the
pooled activations tells on other scenes which show it (AUROC at least .9). It is found if the score of one factor does;
which factor, and which way around, is decided on the scenes of the discovery. Beside ``discover_concepts`` stand
scikit-learn's non-negative factorization of the same positions and pytorch-grad-cam's deep feature factorization, with
as many factors; both are read at other scenes by non-negative least squares. ``named`` is the share of the encoded
concepts whose best factor has the right one of the 21 words as its name.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import environment, table, write
from benchmarks.run.spatial_acv import auroc
from captum_concepts import demo, discover_concepts
from captum_concepts.activations import spatial_activations
from captum_concepts.attr.discovered_concepts import descend
from captum_concepts.datasets import CaptionedScenes

LAYER, SIZE, SEED = "layer4", 64, 62_001
Scores = Callable[[Tensor], Tensor]


def activations(model: nn.Module, images: Tensor) -> Tensor:
    """``(N, C, h, w)``."""
    return torch.cat([spatial_activations(model, part, [LAYER]).maps[0].detach() for part in images.split(100)])


def probed(maps: Tensor, presence: Tensor, other: Tensor, truth: Tensor) -> Tensor:
    """``(T,)`` AUROC on ``other`` of ridge regressions on mean and largest activations."""
    rows = [torch.cat([m.mean((2, 3)), m.amax((2, 3))], 1).double() for m in (maps, other)]
    mean, std = rows[0].mean(0), rows[0].std(0) + 1e-6
    known, new = ((r - mean) / std for r in rows)
    penalty = 0.1 * len(known) * torch.eye(known.shape[1], dtype=known.dtype)
    weights = torch.linalg.solve(known.T @ known + penalty, known.T @ (presence.double() - presence.double().mean(0)))
    return torch.tensor([auroc(new @ w, t)[0] for w, t in zip(weights.T, truth.T.bool(), strict=True)])


def factors(directions: Tensor, model: nn.Module) -> Scores:
    """Mean weights of given directions, by non-negative least squares."""

    def scores(images: Tensor) -> Tensor:
        maps = activations(model, images).clamp(min=0)
        rows = maps.permute(0, 2, 3, 1).flatten(0, 2)
        weights = descend(
            rows.new_zeros(len(rows), len(directions)), directions @ directions.T, rows @ directions.T, 100
        )
        return weights.reshape(len(maps), -1, len(directions)).mean(1)

    return scores


def peers(model: nn.Module, images: Tensor, count: int, seed: int) -> dict[str, Scores]:
    """Those that are installed."""
    maps = activations(model, images).clamp(min=0)
    found: dict[str, Scores] = {}
    try:
        from sklearn.decomposition import NMF
    except ImportError:
        pass
    else:
        rows = maps.permute(0, 2, 3, 1).flatten(0, 2).numpy()
        made = NMF(count, init="nndsvda", max_iter=200, random_state=seed).fit(rows)
        found["scikit-learn NMF"] = factors(torch.as_tensor(made.components_, dtype=torch.float32), model)
    try:
        from pytorch_grad_cam.feature_factorization.deep_feature_factorization import dff
    except ImportError:
        pass
    else:
        concepts, _ = dff(maps.numpy().copy(), n_components=count)
        directions = torch.as_tensor(concepts, dtype=torch.float32)
        directions = directions if directions.shape[1] == maps.shape[1] else directions.T
        found["pytorch-grad-cam DFF"] = factors(directions.clamp(min=0), model)
    return found


def matched(scores: Scores, known: Any, new: Any) -> tuple[Tensor, list[int]]:
    """Per concept, the AUROC on new scenes of the factor that tells it best on the known ones, and which that is."""
    rows = [torch.cat([scores(part) for part in split.image.split(100)]) for split in (known, new)]
    values, chosen = [], []
    for t in range(known.presence.shape[1]):
        own = torch.tensor([auroc(column, known.presence[:, t].bool())[0] for column in rows[0].T])
        best = int(own.argmax())
        chosen.append(best)
        values.append(auroc(rows[1][:, best], new.presence[:, t].bool())[0])
    return torch.tensor(values), chosen


def one(seed: int, images: int, count: int, rows: list[list[Any]], entries: dict[str, Any]) -> None:
    """All methods on other scenes for each seed."""
    model, clip = demo.load("classifier"), demo.load("clip")
    known, new = (CaptionedScenes(images, seed=SEED + 10 * seed + k, size=SIZE).stack() for k in range(2))
    concepts = CaptionedScenes(1, seed=0, size=SIZE).concepts
    probe = probed(activations(model, known.image), known.presence, activations(model, new.image), new.presence)
    encoded = probe >= 0.9
    start = time.process_time()
    found = discover_concepts(
        model, LAYER, known.image, n_concepts=count, encoder=clip, words=concepts, seed=seed, batch_size=100
    )
    seconds = time.process_time() - start
    methods: dict[str, Scores] = {"discover_concepts": found.scores, **peers(model, known.image, count, seed)}
    for name, scores in methods.items():
        values, chosen = matched(scores, known, new)
        entry: dict[str, Any] = {
            "encoded": int(encoded.sum()),
            "found_at_0.9": float((values[encoded] >= 0.9).double().mean()),
            "found_at_0.8": float((values[encoded] >= 0.8).double().mean()),
            "mean_auroc": float(values[encoded].mean()),
        }
        if name == "discover_concepts":
            right = [re.sub(r" \d+$", "", found.concepts[k]) == concepts[t] for t, k in enumerate(chosen)]
            entry["named"] = float(torch.tensor(right)[encoded].double().mean())
            entry["cpu_seconds"] = seconds
        entry["auroc"] = dict(
            zip(concepts, [[float(a), float(b)] for a, b in zip(probe, values, strict=True)], strict=True)
        )
        entries[f"{name}, seed {seed}"] = entry
        rows.append(
            [name, seed, *(entry.get(k) for k in ("encoded", "found_at_0.9", "found_at_0.8", "mean_auroc", "named"))]
        )
        print(rows[-1], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--count", type=int, default=40, help="factors")
    args = parser.parse_args()
    rows: list[list[Any]] = []
    entries: dict[str, Any] = {}
    for seed in args.seeds:
        one(seed, args.images, args.count, rows, entries)
    head = ["method", "seed", "encoded", "found at .9", "found at .8", "mean AUROC", "named"]
    print(table(head, rows))
    packages = ("scikit-learn", "grad-cam")
    write("audit_discovery", {"arguments": vars(args), "methods": entries, "environment": environment(*packages)})


if __name__ == "__main__":
    main()
