"""Where are the concepts? Regions of ConceptFusionMap on COCO, beside its peers and beside maps that know no concept.

    python benchmarks/concept_regions.py --data ../shared/data [--train 1000] [--half 1] [--cache FOLDER]

Real MobileNetV2 and ConSE (a zero-shot model in CLIP's text space); the translator is fitted on other images, without
labels. The design of ``layer="fused"`` was chosen on the images of half 0 only; half 1 is held out. Intervals: 95 %
bootstrap over images.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from _record import RESULTS, environment, table, write
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from captum_concepts.activations import gradients_enabled
from captum_concepts.attr.concept_fusion_map import ConceptFusionMap
from captum_concepts.datasets.images import find_images, load_image
from captum_concepts.metrics import epg, nra, specificity
from captum_concepts.metrics.baselines import activation_energy, center_gaussian
from captum_concepts.models import ConceptTranslator, fit_translator
from captum_concepts.models.concept_translator_data import TrainingPairs, collect_pairs

matplotlib.use("Agg")
LAYERS = ["net.features.3", "net.features.6", "net.features.13", "net.features.18"]
SIZE, MASK = 224, 112
ALIASES = {
    "wine glass": "wineglass",
    "laptop": "laptop_computer",
    "remote": "remote_control",
    "skis": "ski",
    "cell phone": "cellular_telephone",
    "microwave": "microwave_oven",
    "potted plant": "flowerpot",
    "sports ball": "ball",
}


class Files(Dataset[Tensor]):
    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return load_image(self.files[index], SIZE, crop=False)


def training_files(data: Path, count: int, seed: int) -> list[Path]:
    """Images of every other collection, none of COCO."""
    found = sorted(find_images([data / "images" / name for name in ("imagenet", "flickr8k", "caltech101", "dtd")]))
    random.Random(seed).shuffle(found)
    return found[:count]


def regions(data: Path, encoder: Any, half: int) -> tuple[list[str], list[tuple[Tensor, dict[str, Tensor]]]]:
    """The words and, for each image, its present words' masks (at least 1 % of the image)."""
    root = data / "images" / "coco"
    classes = {int(k): v for k, v in json.loads((root / "classes.json").read_text()).items()}

    def word(name: str) -> str | None:
        for form in (name, name.replace(" ", "_"), ALIASES.get(name, name)):
            if form.lower() in encoder._index:
                return form
        return None

    known = {i: w for i, name in classes.items() if (w := word(name)) is not None}
    found = []
    for file in sorted((root / "images").iterdir()):
        pixels = Image.open(root / "masks" / f"{file.stem}.png").resize((MASK, MASK), Image.Resampling.NEAREST)
        labels = torch.from_numpy(np.array(pixels))
        masks: dict[str, Tensor] = {}
        for index, name in known.items():
            here = labels == index
            if here.float().mean() >= 0.01:
                masks[name] = masks.get(name, torch.zeros_like(here)) | here
        if masks:
            found.append((file, masks))
    chosen = [(load_image(f, SIZE, crop=False), m) for f, m in found[half::2]]
    return sorted(set(known.values())), chosen


def fitted(pairs: TrainingPairs, text: Tensor, scale: float, columns: slice, channels: list[int], weight: float) -> Any:
    z, e = pairs.rows(range(len(pairs)))
    part = TrainingPairs([(z[:, columns], e)], channels)
    hidden = (2048, 1024)
    translator = ConceptTranslator(channels, e.shape[1], hidden=hidden)
    result = fit_translator(translator, part, text=text, logit_scale=scale, similarity_weight=weight, epochs=20, seed=0)
    return translator, result


def direct(cefam: ConceptFusionMap, x: Tensor, columns: list[int], rectify: bool) -> Tensor:
    """HiResCAM, or LayerCAM, of the concept logits: all layers, each divided by its maximum, summed."""
    with gradients_enabled():
        _, _, _, seen = next(cefam._passes(x, None))
        logits = cefam._space(seen.embedding).logits(seen.embedding)[0, columns]
        total = torch.zeros(len(columns), 28, 28)
        gradients = [torch.autograd.grad(value, seen.sources, retain_graph=True) for value in logits]
        for layer, maps in enumerate(seen.maps):
            g = torch.cat([row[layer] for row in gradients])
            one = ((g.relu() if rectify else g) * maps).sum(1).relu()
            one = F.interpolate(one[None], (28, 28), mode="bilinear")[0]
            total += one / one.amax((1, 2), keepdim=True).clamp(min=1e-12)
    return total.detach()[None]


def interval(values: list[list[float]], rng: np.random.Generator) -> list[float]:
    """Mean over all regions, and its 95 % bootstrap interval over images."""
    kept = [v for v in values if v]
    sums = np.array([[sum(v), len(v)] for v in kept])
    draws = rng.integers(0, len(kept), (1000, len(kept)))
    means = sums[draws].sum(1)
    low, high = np.quantile(means[:, 0] / means[:, 1], [0.025, 0.975])
    return [float(sums[:, 0].sum() / sums[:, 1].sum()), float(low), float(high)]


def sensitivity(fused: ConceptFusionMap, images: list[Any], half: int) -> None:
    """NRA and specificity of the fused map with one constant changed at a time."""
    from captum_concepts.attr import _concept_regions as constants

    given = {name: getattr(constants, name) for name in ("STEPS", "CONTRAST", "TEMPERATURE")}
    settings: list[dict[str, float]] = [{}, {"STEPS": 1}, {"STEPS": 3}, {"CONTRAST": 0.25}, {"CONTRAST": 0.75}]
    settings += [{"TEMPERATURE": 1.0}, {"TEMPERATURE": 10.0}]
    rows = []
    for setting in settings:
        for name, value in {**given, **setting}.items():
            setattr(constants, name, value)
        found: dict[str, list[list[float]]] = {"nra": [], "specificity": []}
        for image, present in images:
            masks = torch.stack(list(present.values()))[None]
            maps = fused.explain(image[None], concepts=list(present), contributions=False).maps
            found["nra"].append(nra(maps, masks)[0].tolist())
            own = specificity(maps, masks)[0] if len(present) > 1 else torch.zeros(0)
            found["specificity"].append(own[~own.isnan()].tolist())
        means = {key: float(np.mean([x for v in values for x in v])) for key, values in found.items()}
        rows.append({"changed": setting, **means})
        print(rows[-1], flush=True)
    for name, value in given.items():
        setattr(constants, name, value)
    record = {
        "environment": environment(),
        "half": half,
        "images": len(images),
        "seed": 0,
        "given": given,
        "rows": rows,
    }
    write("concept_regions_sensitivity", record)
    lines = [[str(r["changed"] or "as given"), r["nra"], r["specificity"]] for r in rows]
    text = table(["changed", "NRA", "specificity"], lines)
    (RESULTS / "concept_regions_sensitivity.md").write_text(f"# Constants of the fused map, {given}\n\n{text}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--half", type=int, default=1)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--sensitivity", type=int, metavar="IMAGES", help="only vary the fused map's few constants")
    args = parser.parse_args()
    sys.path.insert(0, str(args.data))
    from real_models import ConSE

    torch.manual_seed(0)
    encoder = ConSE()
    model = encoder.classifier
    words, images = regions(args.data, encoder, args.half)
    text = encoder.encode_text(words)
    files = training_files(args.data, args.train, 0)
    pairs = collect_pairs(model, LAYERS, encoder, Files(files), cache_dir=args.cache)
    channels, scale = list(pairs.in_channels), encoder.logit_scale
    full, result = fitted(pairs, text, scale, slice(None), channels, 1e-3)
    if args.sensitivity:
        fused = ConceptFusionMap(model, LAYERS, full, words, text, layer="fused")
        sensitivity(fused, images[: args.sensitivity], args.half)
        return
    unsupervised, _ = fitted(pairs, text, scale, slice(None), channels, 0.0)
    single, _ = fitted(pairs, text, scale, slice(sum(channels[:-1]), None), channels[-1:], 1e-3)
    z, e = pairs.rows(range(len(pairs)))
    wanted = F.normalize(e, dim=1) @ text.T
    last = z[:, -channels[-1] :]
    standard = [(v - v.mean(0)) / v.std(0).clamp(min=1e-6) for v in (wanted, last)]
    channel = (standard[0].T @ standard[1]).argmax(1)  # CLIP-Dissect's idea: the unit that goes with the word

    def explainer(translator: Any, layers: Any = LAYERS, **options: Any) -> ConceptFusionMap:
        return ConceptFusionMap(model, layers, translator, words, text, **options)

    makers = {
        "published (auto layer)": explainer(full),
        "published, no similarity loss": explainer(unsupervised),
        "published, single layer": explainer(single, LAYERS[-1:]),
        "branch gradient": explainer(full, gradient="branch"),
        "fused": explainer(full, layer="fused"),
        "fused, branch gradient": explainer(full, layer="fused", gradient="branch"),
    }
    generator = torch.Generator().manual_seed(0)
    rows: dict[str, dict[str, list[list[float]]]] = {}
    drops: dict[str, list[list[float]]] = {"published (auto layer)": [], "fused": [], "random": []}
    shown = []
    for image, present in images:
        names = list(present)
        masks = torch.stack([present[name] for name in names])[None]
        columns = [words.index(name) for name in names]
        x = image[None]
        repeated = image.expand(len(names), -1, -1, -1)
        maps = {k: m.explain(x, concepts=names, contributions=False).maps for k, m in makers.items()}
        maps["HiResCAM, 4 layers"] = direct(makers["fused"], x, columns, False)
        maps["LayerCAM, 4 layers"] = direct(makers["fused"], x, columns, True)
        with torch.no_grad():
            activation = next(makers["fused"]._passes(x, None, gradient=False))[3].maps[-1]
        maps["single channel"] = activation[:, channel[columns]]
        maps["activation energy"] = activation_energy(activation).reshape(1, 1, 7, 7).expand(-1, len(names), -1, -1)
        centre = center_gaussian(1, (56, 56)).reshape(1, 1, 56, 56)
        maps["centre Gaussian"] = centre.expand(-1, len(names), -1, -1)
        maps["random"] = torch.rand(1, len(names), 14, 14, generator=generator)
        for name, value in maps.items():
            into = rows.setdefault(name, {key: [] for key in ("nra", "nra_exact", "specificity", "epg", "hit_rate")})
            published = nra(value, masks)
            into["nra"].append(published[0].tolist())
            into["nra_exact"].append(nra(value, masks, baseline="exact")[0].tolist())
            own = specificity(value, masks)[0] if len(names) > 1 else torch.zeros(0)
            into["specificity"].append(own[~own.isnan()].tolist())
            into["epg"].append(epg(value, masks)[0].tolist())
            into["hit_rate"].append((published[0] > 0.5).float().tolist())
        base = makers["fused"].logits(x)[0, columns]
        for name, into_drop in drops.items():
            area = F.interpolate(maps[name], (SIZE, SIZE), mode="bilinear")[0].flatten(1)
            area = area + 1e-9 * torch.rand(area.shape, generator=generator)
            cut = area.argsort(1, descending=True).argsort(1) < SIZE * SIZE // 5
            gone = torch.where(cut.view(-1, 1, SIZE, SIZE), image.mean((1, 2))[None, :, None, None], repeated)
            after = makers["fused"].logits(gone)[range(len(columns)), columns]
            into_drop.append((base - after).tolist())
        if len(shown) < 4 and len(names) > 1:
            shown.append((image, names[0], masks[0, 0], maps["published (auto layer)"][0, 0], maps["fused"][0, 0]))
    rng = np.random.default_rng(0)
    record = {
        "environment": environment("torchvision"),
        "data": {
            "images": len(images),
            "regions": sum(len(m) for _, m in images),
            "half": args.half,
            "train_images": len(files),
            "seed": 0,
            "words": len(words),
        },
        "translator": {"val_cosine": result.history["val_cosine"][result.best_epoch], "best_epoch": result.best_epoch},
        "rows": {name: {key: interval(v, rng) for key, v in row.items()} for name, row in rows.items()},
        "deletion": {name: interval(values, rng) for name, values in drops.items()},
    }
    write(f"concept_regions_coco_half{args.half}", record)
    columns = ["method", "NRA", "NRA exact", "specificity", "EPG", "hit rate"]
    lines = [
        [name, *(f"{v[0]:.3f} [{v[1]:.3f}, {v[2]:.3f}]" for v in row.values())] for name, row in record["rows"].items()
    ]
    deleted = [[name, f"{v[0]:.2f} [{v[1]:.2f}, {v[2]:.2f}]"] for name, v in record["deletion"].items()]
    report = (
        f"# Concept regions on COCO, half {args.half}\n\n{record['data']}\n\n{table(columns, lines)}\n\n"
        f"Drop of the concept's logit when the fifth of the pixels its map ranks highest becomes the mean colour:\n\n"
        f"{table(['region deleted', 'drop'], deleted)}\n"
    )
    (RESULTS / f"concept_regions_coco_half{args.half}.md").write_text(report)
    print(report)
    picture(shown, RESULTS / f"concept_regions_coco_half{args.half}.png")


def picture(shown: list[Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(shown), 4, figsize=(10, 2.5 * len(shown)), squeeze=False)
    for row, (image, name, mask, published, fused) in zip(axes, shown, strict=True):
        for axis, value, title in zip(
            row, (None, mask, published, fused), (name, "mask", "published", "fused"), strict=True
        ):
            axis.imshow(image.permute(1, 2, 0))
            if value is not None:
                axis.imshow(value, cmap="inferno", alpha=0.6, extent=(0, SIZE, SIZE, 0), interpolation="bilinear")
            axis.set_title(title)
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=45)


if __name__ == "__main__":
    main()
