"""How many of the concepts that a layer encodes does a discovery without words find?

    python -m benchmarks.run.audit.discovery [--seeds 0 1 2] [--data ../shared/data]

The last stage of the bundled classifier, scenes with 21 known concepts. A concept is encoded if a linear probe on the
pooled activations tells on other scenes which show it (AUROC at least .9). It is found if the score of one factor does;
which factor, and which way around, is decided on the scenes of the discovery. Beside ``discover_concepts`` stand
scikit-learn's non-negative factorization of the same positions and pytorch-grad-cam's deep feature factorization, with
as many factors; both are read at other scenes by non-negative least squares. ``named`` is the share of the encoded
concepts whose best factor has the right one of the 21 words as its name. The directions of linear probes, which are
told what each scene shows, are read as those of ``discover_concepts`` are: a discovery can hardly expect more.

With ``--data``, also photographs of COCO with masks and two ImageNet classifiers: per word, the factor whose maps have
the highest mean NRA in one half of its images is judged by NRA in the other half, and the reverse; the difference to
deep feature factorization is paired by word. Words need an image in each half.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.data.photographs import real_models
from benchmarks.record import environment, table, write
from benchmarks.run.ce_fam.regions import regions
from benchmarks.run.spatial_acv import auroc
from captum_concepts import demo, discover_concepts
from captum_concepts.activations import spatial_activations
from captum_concepts.attr.discovered_concepts import DiscoveredConcepts, descend
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.metrics import nra

LAYER, SIZE, SEED = "layer4", 64, 62_001
Scores = Callable[[Tensor], Tensor]


def activations(model: nn.Module, images: Tensor) -> Tensor:
    """``(N, C, h, w)``."""
    return torch.cat([spatial_activations(model, part, [LAYER]).maps[0].detach() for part in images.split(100)])


def ridge(rows: Tensor, presence: Tensor) -> Tensor:
    """``(C, T)`` weights of standardized rows ``(N, C)``."""
    penalty = 0.1 * len(rows) * torch.eye(rows.shape[1], dtype=rows.dtype)
    return torch.linalg.solve(rows.T @ rows + penalty, rows.T @ (presence.double() - presence.double().mean(0)))


def probed(maps: Tensor, presence: Tensor, other: Tensor, truth: Tensor) -> Tensor:
    """``(T,)`` AUROC on ``other`` of ridge regressions on mean and largest activations."""
    rows = [torch.cat([m.mean((2, 3)), m.amax((2, 3))], 1).double() for m in (maps, other)]
    mean, std = rows[0].mean(0), rows[0].std(0) + 1e-6
    known, new = ((r - mean) / std for r in rows)
    weights = ridge(known, presence)
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


def told(model: nn.Module, maps: Tensor, presence: Tensor, concepts: list[str]) -> Scores:
    """The directions of ridge regressions on mean activations, scored as discovered ones."""
    pooled = maps.mean((2, 3)).double()
    spread, unit = pooled.std(0) + 1e-6, maps.std((0, 2, 3))
    weights = ridge((pooled - pooled.mean(0)) / spread, presence)
    directions = (weights.T / spread).float() * unit.square()
    center = maps.mean((0, 2, 3))
    return DiscoveredConcepts(model, LAYER, directions, concepts, center=center, channel_scales=unit).scores


def peers(model: nn.Module, maps: Tensor, count: int, seed: int) -> dict[str, Scores]:
    """Those that are installed, of activations."""
    maps = maps.clamp(min=0)
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
    maps = activations(model, known.image)
    probe = probed(maps, known.presence, activations(model, new.image), new.presence)
    encoded = probe >= 0.9
    start = time.process_time()
    found = discover_concepts(
        model, LAYER, known.image, n_concepts=count, encoder=clip, words=concepts, seed=seed, batch_size=100
    )
    seconds = time.process_time() - start
    methods: dict[str, Scores] = {"discover_concepts": found.scores, **peers(model, maps, count, seed)}
    methods["probes' directions"] = told(model, maps, known.presence, concepts)
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


def crossed(maps: Tensor, masks: list[dict[str, Tensor]]) -> dict[str, list[float]]:
    """Word: NRA of the factor chosen in the other half of the word's images, and of the best in all of them."""
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for i, (shown, there) in enumerate(zip(maps, masks, strict=True)):
        for word, mask in there.items():
            found.setdefault(word, ([], []))[i % 2].append(nra(shown[None], mask.expand(1, len(shown), -1, -1))[0])
    values: dict[str, list[float]] = {}
    for word, halves in sorted(found.items()):
        if min(map(len, halves)):
            first, second = (torch.stack(half) for half in halves)
            judged = [b[:, int(a.mean(0).argmax())] for a, b in ((first, second), (second, first))]
            values[word] = [float(torch.cat(judged).mean()), float(torch.cat([first, second]).mean(0).amax())]
    return values


def photographs(data: Path, seeds: list[int], count: int) -> dict[str, Any]:
    """All networks and methods on the photographs with masks."""
    from pytorch_grad_cam.feature_factorization.deep_feature_factorization import dff

    real = real_models(data)
    halves = [regions(data, real.ConSE(), half)[1] for half in (0, 1)]
    pairs = [item for pair in zip(*halves, strict=False) for item in pair]
    images, masks = torch.stack([image for image, _ in pairs]), [m for _, m in pairs]
    entries: dict[str, Any] = {}
    networks = {
        "MobileNetV2": (real.mobilenet_v2(), "net.features.18"),
        "SqueezeNet": (real.squeezenet1_0(), "net.features.12"),
    }
    for name, (model, layer) in networks.items():
        maps = torch.cat([spatial_activations(model, part, [layer]).maps[0].detach() for part in images.split(25)])
        peer = crossed(torch.as_tensor(dff(maps.numpy().copy(), n_components=count)[1]).float(), masks)
        results = {("pytorch-grad-cam DFF", 0): peer}
        for seed in seeds:
            made = discover_concepts(model, layer, images, n_concepts=count, seed=seed, batch_size=25)
            results["discover_concepts", seed] = crossed(made.concept_maps(images), masks)
        for (method, seed), values in results.items():
            both = torch.tensor([values[word] for word in values])
            apart = both[:, 0] - torch.tensor([peer[word][0] for word in values])
            entry = {
                "words": len(values),
                "nra": float(both[:, 0].mean()),
                "nra_chosen_on_the_same_images": float(both[:, 1].mean()),
                "above_dff": float(apart.mean()),
                "standard_error": float(apart.std() / len(apart) ** 0.5),
            }
            entries[f"{method}, {name}, seed {seed}"] = entry
            print(method, name, seed, entry, flush=True)
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--count", type=int, default=40, help="factors")
    parser.add_argument("--data", type=Path, help="folder of photographs")
    args = parser.parse_args()
    rows: list[list[Any]] = []
    entries: dict[str, Any] = {}
    for seed in args.seeds:
        one(seed, args.images, args.count, rows, entries)
    head = ["method", "seed", "encoded", "found at .9", "found at .8", "mean AUROC", "named"]
    print(table(head, rows))
    record: dict[str, Any] = {"arguments": {"seeds": args.seeds, "images": args.images, "count": args.count}}
    record["methods"] = entries
    if args.data is not None:
        record["photographs"] = photographs(args.data, args.seeds, args.count)
    write("audit_discovery", record | {"environment": environment("scikit-learn", "grad-cam")})


if __name__ == "__main__":
    main()
