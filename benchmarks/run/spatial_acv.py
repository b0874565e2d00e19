"""SpatialACV on real textures, real classifiers and real photographs: accuracy by layer, AUROC, cost, calibration.

    python -m benchmarks.run.spatial_acv DATA [--pictures DIR] [--parts cost mobilenet_v2]

DATA is a folder with ``real_models.py``, ``images/dtd``, ``images/flickr8k`` and ``images/imagenet`` (see the README of
the data). Guidance images are six textures of the Describable Textures Dataset. Negatives are the other five textures,
as in the paper, or 200 ordinary photographs (Flickr8k). The photographs judged are ImageNet's; which of them have a
texture is decided by the name of their class, from the list below, which was written before any result was seen.
``--pictures`` also draws maps and receptive fields, which contain the photographs.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from captum.attr import LayerGradientXActivation
from torch import Tensor, nn

from benchmarks.data.photographs import real_models
from benchmarks.record import RESULTS, environment, median_times, peak_mib, table, write
from captum_concepts.activations import spatial_activations
from captum_concepts.activations.receptive_field import strongest_crops
from captum_concepts.attr.layer_sweep import layer_sweep
from captum_concepts.attr.spatial_acv import SpatialACV
from captum_concepts.images import batches, open_images

LAYERS = {
    "mobilenet_v2": ["features.1", "features.3", "features.6", "features.13", "features.16"],
    "squeezenet1_0": ["features.3", "features.5", "features.7", "features.10", "features.12"],
}
PARTS = ("cost", "memory", "calibration", *LAYERS)
SIZE = {"mobilenet_v2": 224, "squeezenet1_0": 227}
# ImageNet classes that have the texture, by the meaning of the two words.
HAS = {
    "banded": ["zebra", "tiger", "tiger_cat", "king_snake", "banded_gecko", "lionfish"],
    "braided": ["hamper", "shopping_basket", "knot", "pretzel", "chain_mail", "chain"],
    "bubbly": ["golf_ball", "Petri_dish", "custard_apple", "sea_anemone", "cauliflower"],
    "chequered": ["crossword_puzzle", "quilt", "computer_keyboard", "typewriter_keyboard", "tile_roof"],
    "cracked": ["leatherback_turtle", "American_alligator", "alligator_lizard", "African_elephant", "cliff_dwelling"],
    "crosshatched": ["window_screen", "chain_mail", "strainer", "racket", "hamper", "shopping_basket"],
}


def auroc(scores: Tensor, truth: Tensor) -> tuple[float, float]:
    """Area and its standard error (Hanley and McNeil, 1982)."""
    up, down = scores[truth].double(), scores[~truth].double().sort().values
    below = torch.searchsorted(down, up) + torch.searchsorted(down, up, right=True)
    a = float(below.double().mean() / 2 / len(down))
    q1, q2, m, n = a / (2 - a), 2 * a * a / (1 + a), len(up), len(down)
    return a, math.sqrt(max(a * (1 - a) + (m - 1) * (q1 - a * a) + (n - 1) * (q2 - a * a), 0) / (m * n))


def photographs(data: Path, size: int) -> tuple[Tensor, list[str]]:
    files = sorted((data / "images" / "imagenet").glob("*.jpg"))
    images = torch.stack(list(open_images(files, size=size))).half()
    return images, [f.stem.split("_", 2)[2] for f in files]


def highest_relevance(model: nn.Module, layers: list[str], vectors: list[Tensor], images: Tensor) -> list[Tensor]:
    """Per layer ``(N, K)``: the highest relevance of each vector in each image; all layers in one forward pass."""
    out: list[list[Tensor]] = [[] for _ in layers]
    for batch in images.split(25):
        with torch.no_grad():
            seen = spatial_activations(model, batch.float(), layers)
        for parts, maps, v in zip(out, seen.maps, vectors, strict=True):
            parts.append(torch.einsum("nchw,kc->nkhw", maps, v).amax((2, 3)))
    return [torch.cat(parts) for parts in out]


class Replay(nn.Module):
    """Gives back activations by number: an "image" is a number, every layer an identity.

    All layers of all guidance images are computed in one pass over the model instead of one for every layer.
    """

    def __init__(self, names: list[str], features: list[Tensor]) -> None:
        super().__init__()
        self.features = dict(zip(names, features, strict=True))
        self.layers = nn.ModuleDict({name: nn.Identity() for name in names})

    def forward(self, numbers: Tensor) -> Tensor:
        rows = numbers[:, 0].flatten().long()  # the reader makes RGB of one channel
        for name, layer in self.layers.items():
            layer(self.features[name][rows])
        return numbers


def guidance_features(model: nn.Module, layers: list[str], sets: dict[str, Any], size: int) -> tuple[list[Tensor], Any]:
    """Activations of each layer for the images of all sets, and each set as numbers of images."""
    out: list[list[Tensor]] = [[] for _ in layers]
    numbers, done = {}, 0
    for set_name, source in sets.items():
        first = done
        for images in (batch.images for batch in batches(source, 32, size=size, labels=False)):
            with torch.no_grad():
                seen = spatial_activations(model, images, layers)
            for parts, maps in zip(out, seen.maps, strict=True):
                parts.append(maps)
            done += len(images)
        numbers[set_name] = torch.arange(first, done).float().view(-1, 1, 1, 1)
    return [torch.cat(parts) for parts in out], numbers


def textures_and_photographs(
    name: str, model: nn.Module, data: Path, images: Tensor, classes: list[str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Accuracy of every texture at every layer, and AUROC of the highest relevance on the photographs."""
    size, layers = SIZE[name], [f"net.{layer}" for layer in LAYERS[name]]
    sets: dict[str, Any] = {f.name: f for f in sorted((data / "images" / "dtd").iterdir()) if f.is_dir()}
    sets["photographs"] = sorted((data / "images" / "flickr8k").rglob("*.jpg"))[::5][:200]
    features, numbers = guidance_features(model, layers, sets, size)
    ordinary = numbers.pop("photographs")
    keys = [layer.replace(".", "_") for layer in layers]
    replay = Replay(keys, features)
    draw = torch.Generator().manual_seed(0)
    sweeps = {}
    for negatives, given in (("other textures", None), ("photographs", ordinary)):
        sweeps[negatives] = layer_sweep(
            replay,
            [f"layers.{key}" for key in keys],
            numbers,
            given,
            layout="NCHW",
            n_random=40,
            max_rows=16_000,
            show_progress=True,
        )
    chance = [nn.functional.normalize(torch.randn(20, f.shape[1], generator=draw), dim=1) for f in features]
    stacked = [torch.cat([*(sweeps[n].methods[i].vectors for n in sweeps), chance[i]]) for i in range(len(layers))]
    scores = highest_relevance(model, layers, stacked, images)
    rows = []
    count = len(numbers)
    for which, (negatives, sweep) in enumerate(sweeps.items()):
        for i, layer in enumerate(LAYERS[name]):
            for k, texture in enumerate(sweep.concepts):
                truth = torch.tensor([c in HAS[texture] for c in classes])
                if int(truth.sum()) != len(HAS[texture]):
                    raise SystemExit(f"{texture}: some of the classes {HAS[texture]} are not among the photographs")
                area, error = auroc(scores[i][:, which * count + k], truth)
                control = [auroc(scores[i][:, 2 * count + r], truth)[0] for r in range(20)]
                rows.append({
                    "negatives": negatives,
                    "layer": layer,
                    "texture": texture,
                    "accuracy": float(sweep.accuracies[i, k]),
                    "interval": sweep.intervals[i, k].tolist(),
                    "contrast": float(sweep.contrasts[i, k]),
                    "p_holm": float(sweep.p_values[i, k]),
                    "auroc": area,
                    "auroc_standard_error": error,
                    "auroc_random_directions_mean": sum(control) / len(control),
                    "positives": int(truth.sum()),
                    "photographs": len(classes),
                    "rows": sweep.methods[i].rows_[texture],
                })  # fmt: skip
    return rows, sweeps


def cost(model: nn.Module, layer: str, repeats: int) -> dict[str, float]:
    """Seconds of contribution maps for 8 images of 224 px, K = 1 and K = 50, and of Captum's gradient K times."""
    torch.manual_seed(0)
    images = torch.rand(8, 3, 224, 224)
    guide, rest = {f"c{k}": torch.rand(2, 3, 64, 64) for k in range(50)}, torch.rand(2, 3, 64, 64)
    many = SpatialACV(model, layer).fit(guide, rest)
    one = SpatialACV(model, layer).fit({"c0": guide["c0"]}, rest)
    captum = LayerGradientXActivation(model, model.get_submodule(layer), multiply_by_inputs=False)

    def loop() -> None:
        for vector in many.vectors[:5]:
            (captum.attribute(images, target=1) * vector.view(1, -1, 1, 1)).sum(1)

    def bare() -> None:
        with torch.no_grad():
            model(images)

    seconds = median_times(
        {
            "bare forward": bare,
            "K = 1": lambda: one.attribute(images, target=1),
            "K = 50": lambda: many.attribute(images, target=1),
            "a Captum gradient for each of 5": loop,
        },
        repeats=repeats,
    )
    return {**seconds, "ratio K=50 / K=1": seconds["K = 50"] / seconds["K = 1"]}


def calibration(model: nn.Module, layer: str, data: Path, trials: int) -> dict[str, float]:
    """How often p < 0.05 when textures' labels are permuted: it should be 5 %, whatever the layer knows."""
    folders = [sorted(f.glob("*.jpg"))[:20] for f in sorted((data / "images" / "dtd").iterdir()) if f.is_dir()]
    images = torch.cat([torch.stack(list(open_images(files, size=224))) for files in folders])
    with torch.no_grad():
        parts = [spatial_activations(model, batch, [layer]).maps[0] for batch in images.split(32)]
    features = torch.cat(parts)
    stub = nn.Sequential(nn.Identity())
    draw = torch.Generator().manual_seed(0)
    p = []
    for trial in range(trials):
        order = torch.randperm(len(features), generator=draw)
        acv = SpatialACV(stub, "0", layout="NCHW", batch_size=256)
        acv.fit({"x": features[order[:20]]}, features[order[20:]], n_random=20, seed=trial, max_rows=4000)
        p.append(float(acv.p_values_))
    values = torch.tensor(p)
    return {
        "trials": trials,
        **{f"share p < {level}": float((values < level).float().mean()) for level in (0.05, 0.2, 0.5)},
    }


def memory(model: nn.Module, layer: str) -> dict[str, float]:
    """Growth of the peak resident memory (MiB) while 120 + 120, then 480 + 480 images of 224 px are fitted."""

    def peak() -> float:
        gc.collect()
        return peak_mib()

    class Images:
        def __init__(self, n: int, seed: int) -> None:
            self.n, self.seed = n, seed

        def __len__(self) -> int:
            return self.n

        def __getitem__(self, i: int) -> Tensor:
            return torch.rand(3, 224, 224, generator=torch.Generator().manual_seed(self.seed + i))

    fit = lambda n: SpatialACV(model, layer).fit({"a": Images(n, 0)}, Images(n, 10_000), max_rows=20_000)  # noqa: E731
    out = {}
    fit(40)
    before = peak()
    for n in (120, 480):
        acv = fit(n)
        out[f"{n} + {n} images"] = peak() - before
        out[f"{n} + {n} images, rows seen"] = acv.rows_["a"]["concept_rows_seen"] + acv.rows_["a"]["negative_rows_seen"]
    out["20,000 rows as floats, MiB"] = 20_000 * acv.vectors.shape[1] * 4 / 2**20
    return out


def draw_pictures(folder: Path, name: str, model: nn.Module, data: Path) -> None:
    """Maps and receptive fields of some photographs (paper, Fig. 2)."""
    images, classes = photographs(data, SIZE[name])
    textures = {f.name: f for f in sorted((data / "images" / "dtd").iterdir()) if f.is_dir()}
    ordinary = sorted((data / "images" / "flickr8k").rglob("*.jpg"))[::5][:200]
    layers = [f"net.{LAYERS[name][i]}" for i in (1, 3)]
    sweep = layer_sweep(model, layers, textures, ordinary, image_size=SIZE[name], max_rows=16_000)
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    shown = [
        ("zebra", "banded"),
        ("crossword_puzzle", "chequered"),
        ("chain_mail", "crosshatched"),
        ("tiger", "banded"),
    ]
    early, late = sweep.methods
    figure = Figure(figsize=(13, 10), layout="constrained")
    axes = figure.subplots(len(shown), 7)
    for row, (what, texture) in enumerate(shown):
        image = images[classes.index(what)].float()[None]
        target = int(model(image).argmax())
        k = sweep.concepts.index(texture)
        relevance = [m.concept_maps(image)[0, k] for m in (early, late)]
        contribution = late.attribute(image, target=target)[0, k]
        axes[row, 0].imshow(image[0].permute(1, 2, 0).clamp(0, 1))
        axes[row, 0].set_title(f"{what}: {texture}", fontsize=8)
        titles = (f"relevance {early.layer}", f"relevance {late.layer}", f"contribution to class {target}")
        for column, (values, title) in enumerate(zip((*relevance, contribution), titles, strict=True), 1):
            limit = float(values.abs().max())
            axes[row, column].imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit)
            axes[row, column].set_title(title, fontsize=8)
        crops = strongest_crops(model, late.layer, image, contribution[None], k=2, per_image=2, share=0.8)
        crops += strongest_crops(model, late.layer, image, contribution[None], k=1, lowest=True, share=0.8)
        for column, crop in enumerate(crops, 4):
            axes[row, column].imshow(crop.image.permute(1, 2, 0).clamp(0, 1))
            axes[row, column].set_title(f"contribution {crop.value:+.2g}", fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(folder / f"spatial_acv_{name}.png", dpi=110)


CELL: dict[str, Callable[[dict[str, Any]], str]] = {
    "accuracy": lambda r: f"{r['accuracy']:.3f}" + ("" if r["p_holm"] < 0.05 else " (not encoded)"),
    "auroc": lambda r: f"{r['auroc']:.2f} ({r['auroc_random_directions_mean']:.2f})",
}


def report(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = ["# SpatialACV on real textures and photographs", ""]
    lines += [
        'Held-out (by image) balanced accuracy of six DTD textures at each layer (chance 0.5; "not encoded":',
        "Holm-adjusted p of 40 random sets >= 0.05), and AUROC of the highest relevance on 500 ImageNet photographs:",
        "classes that have the texture against the rest. There are 5 or 6 positives, so its standard error is about",
        "0.1; in brackets the mean of 20 random directions of the same layer.",
        "",
    ]
    for name, rows in record["models"].items():
        textures = list(dict.fromkeys(r["texture"] for r in rows))
        for negatives in dict.fromkeys(r["negatives"] for r in rows):
            for key in ("accuracy", "auroc"):
                body = []
                for layer in dict.fromkeys(r["layer"] for r in rows):
                    own = [r for r in rows if (r["layer"], r["negatives"]) == (layer, negatives)]
                    cells = [CELL[key](r) for r in own]
                    body.append([layer, *cells, f"{sum(r[key] for r in own) / len(own):.3f}"])
                title = "held-out accuracy" if key == "accuracy" else "AUROC on photographs (random directions)"
                lines += [
                    f"## {name}, negatives: {negatives}: {title}",
                    "",
                    table(["layer", *textures, "mean"], body),
                    "",
                ]
    for title, key in (
        ("Cost (seconds, MobileNetV2 features.13, 8 images)", "cost"),
        ("Permuted labels: share of small p-values", "calibration"),
        ("Peak memory growth (MiB, 28 x 28 positions)", "memory"),
    ):
        rows = [[k, v] for k, v in record.get(key, {}).items()]
        lines += [] if not rows else [f"## {title}", "", table(["what", "value"], rows), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="each replaces its own record")
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--trials", type=int, default=200)
    args = parser.parse_args()
    models = real_models(args.data)
    path = RESULTS / "spatial_acv.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"models": {}}
    record.update(environment=environment("torchvision"), has=HAS)

    def keep() -> None:
        write("spatial_acv", record)
        (RESULTS / "spatial_acv.md").write_text(report(record) + "\n")

    mobilenet = models.mobilenet_v2()
    for part in args.parts:
        if part == "cost":
            record[part] = cost(mobilenet, "net.features.13", args.repeats)
        elif part == "memory":
            record[part] = memory(mobilenet, "net.features.6")
        elif part == "calibration":
            record[part] = calibration(mobilenet, "net.features.16", args.data, args.trials)
        else:
            model = getattr(models, part)()
            images, classes = photographs(args.data, SIZE[part])
            rows, sweeps = textures_and_photographs(part, model, args.data, images, classes)
            record["models"][part] = rows
            figure = dataclasses.replace(sweeps["other textures"], layers=LAYERS[part]).plot()
            figure.savefig(RESULTS / f"spatial_acv_{part}.png", dpi=100)
        keep()
    for name in LAYERS if args.pictures else ():
        draw_pictures(args.pictures, name, getattr(models, name)(), args.data)
    print(report(record))


if __name__ == "__main__":
    main()
