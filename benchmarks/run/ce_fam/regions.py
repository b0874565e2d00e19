"""Where are the concepts? Regions of ConceptFusionMap beside its peers and beside maps that know no concept.

    python -m benchmarks.run.ce_fam.regions [--task coco] --data ../shared/data [--train 5000] [--half 1]
        [--cache FOLDER]
    python -m benchmarks.run.ce_fam.regions --task scenes      # the bundled ResNet and image-text model
    python -m benchmarks.run.ce_fam.regions --task vit         # the bundled ViT
    python -m benchmarks.run.ce_fam.regions --sensitivity 40   # the fused map's constants, all three tasks

``coco``: real MobileNetV2 and ConSE (a zero-shot model in CLIP's text space); the translator is fitted to other images,
without labels. The design of ``map_layer="fused"`` was chosen on the images of half 0 only; half 1 is held out.
``scenes`` and ``vit``: drawn scenes with the exact mask of each concept (those of ``--sensitivity``, and of the design,
have another seed). Intervals: 95 % bootstrap over images.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.data.photographs import Files, real_models
from benchmarks.record import RESULTS, environment, table, write
from captum_concepts import demo
from captum_concepts.activations import Layers, gradients_enabled, spatial_activations
from captum_concepts.attr.concept_fusion_map import ConceptFusionMap
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.images import find_images, load_image
from captum_concepts.metrics import concept_specificity, epg, nra
from captum_concepts.metrics.baselines import activation_energy, center_gaussian
from captum_concepts.models import ConceptTranslator, fit_translator
from captum_concepts.models.concept_translator.data import TrainingPairs, collect_pairs

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


@dataclass
class Task:
    """What is explained: a classifier, words, training pairs, and images with the masks of their words."""

    name: str
    model: Any
    layers: list[str]
    words: list[str]
    text: Tensor
    scale: float
    pairs: TrainingPairs
    images: list[tuple[Tensor, dict[str, Tensor]]]
    facts: dict[str, Any]


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
    chosen = [(load_image(f, SIZE, resize="squash"), m) for f, m in found[half::2]]
    return sorted(set(known.values())), chosen


def coco(args: argparse.Namespace) -> Task:
    encoder = real_models(args.data).ConSE()
    words, images = regions(args.data, encoder, args.half)
    files = training_files(args.data, args.train, 0)
    kept = args.cache / f"pairs{len(files)}" if args.cache else None
    pairs = collect_pairs(
        Layers.resolve(encoder.classifier, LAYERS), encoder, Files(files, SIZE, resize="squash"), cache_dir=kept
    )
    facts: dict[str, Any] = {"half": args.half, "train_images": len(files)}
    text = encoder.encode_text(words)
    name = f"coco_half{args.half}"
    return Task(name, encoder.classifier, LAYERS, words, text, encoder.logit_scale, pairs, images, facts)


def scenes(args: argparse.Namespace, seed: int) -> Task:
    vit = args.task == "vit"
    layers = [f"blocks.{i}" for i in range(4)] if vit else [f"layer{i}" for i in range(1, 5)]
    model, encoder = demo.load("vit" if vit else "classifier"), demo.load("clip")
    training = CaptionedScenes(600, seed=5, size=64)
    test = CaptionedScenes(args.scenes, seed=seed, size=64).stack()
    words = list(training.concepts)
    pairs = collect_pairs(Layers.resolve(model, layers), encoder, training.stack().image, batch_size=100)
    images = [
        (image, {word: mask for word, mask, here in zip(words, masks, present.tolist(), strict=True) if here})
        for image, masks, present in zip(test.image, test.masks, test.presence, strict=True)
    ]
    facts: dict[str, Any] = {"train_images": len(pairs), "seed_of_scenes": seed}
    return Task(args.task, model, layers, words, encoder.encode_text(words), encoder.logit_scale, pairs, images, facts)


def fitted(task: Task, weight: float, args: argparse.Namespace, last: bool = False) -> ConceptTranslator:
    """A translator (of the last layer only), kept in the cache folder; its validation cosine goes to ``facts``."""
    z, e = task.pairs.rows(range(len(task.pairs)))
    channels = list(task.pairs.in_channels)[-1:] if last else list(task.pairs.in_channels)
    translator = ConceptTranslator(channels, e.shape[1])
    kind = "coco" if task.name.startswith("coco") else task.name  # both halves share one translator
    name = f"{kind}-{len(z)}-{weight:g}-{args.epochs}{'-last' if last else ''}"
    cosines = task.facts.setdefault("validation_cosines", {})
    file = args.cache / f"{name}.safetensors" if args.cache else None
    if file is not None and file.exists():
        with safe_open(file, "pt") as kept:
            translator.load_state_dict({key: kept.get_tensor(key) for key in kept.keys()})  # noqa: SIM118
            cosines[name] = float(kept.metadata()["cosine"])
        return translator.eval()
    part = TrainingPairs([(z[:, -sum(channels) :], e)], channels)
    options: dict[str, Any] = {"logit_scale": task.scale, "similarity_weight": weight, "epochs": args.epochs}
    result = fit_translator(translator, part, text=task.text, seed=0, **options)
    cosines[name] = result.history["val_cosine"][result.best_epoch]
    print(name, f"{cosines[name]:.3f}", flush=True)
    if file is not None:
        save_file(translator.state_dict(), file, {"cosine": str(cosines[name])})
    return translator


def direct(task: Task, translator: Any, x: Tensor, columns: list[int]) -> tuple[dict[str, Tensor], Tensor]:
    """HiResCAM and LayerCAM of the concept logits (all layers, each divided by its maximum, summed); the last layer."""
    total: dict[str, Any] = {"HiResCAM, all layers": 0.0, "LayerCAM, all layers": 0.0}
    with gradients_enabled():
        seen = spatial_activations(task.model, x, task.layers, gradient=True)
        h = F.normalize(translator([maps.mean((2, 3)) for maps in seen.maps]), dim=1)
        logits = task.scale * (h @ F.normalize(task.text, dim=1).T)[0, columns]
        raw = [torch.autograd.grad(logit, seen.raw, retain_graph=True) for logit in logits]
    for number, (maps, layout) in enumerate(zip(seen.maps, seen.layouts, strict=True)):
        products = torch.stack([layout.maps(one[number])[0] for one in raw])
        for name, rectify in zip(total, (False, True), strict=True):
            one = ((products.relu() if rectify else products) * maps.detach()).sum(1).relu()[None]
            one = F.interpolate(one, (28, 28), mode="bilinear")
            total[name] += one / one.amax((2, 3), keepdim=True).clamp(min=1e-12)
    return total, seen.maps[-1].detach()


def channels_of_words(task: Task) -> dict[str, Tensor]:
    """For each word a channel of the last layer, as CLIP-Dissect and WWW choose them (the other way round)."""
    z, e = task.pairs.rows(range(len(task.pairs)))
    last = z[:, -task.pairs.in_channels[-1] :]
    wanted = F.normalize(e, dim=1) @ F.normalize(task.text, dim=1).T
    cubed = [((v - v.mean(0)) / v.std(0).clamp(min=1e-6)) ** 3 for v in (wanted, last)]
    cosine = F.normalize(cubed[0], dim=0).T @ F.normalize(cubed[1], dim=0)
    telling = wanted - wanted.mean(1, keepdim=True)  # less what resembles any word
    examples = telling[last.topk(min(20, len(last)), dim=0).indices].mean(0)
    return {
        "single channel (CLIP-Dissect, cubed cosine)": cosine.argmax(1),
        "single channel (WWW, 20 top images)": examples.argmax(0),
    }


def interval(values: list[list[float]], rng: np.random.Generator) -> list[float]:
    """Mean over all regions, and its 95 % bootstrap interval over images."""
    kept = [v for v in values if v]
    sums = np.array([[sum(v), len(v)] for v in kept])
    draws = rng.integers(0, len(kept), (1000, len(kept)))
    means = sums[draws].sum(1)
    low, high = np.quantile(means[:, 0] / means[:, 1], [0.025, 0.975])
    return [float(sums[:, 0].sum() / sums[:, 1].sum()), float(low), float(high)]


def sensitivity(tasks: list[tuple[Task, ConceptFusionMap]], count: int) -> None:
    """NRA and specificity of the fused map with one constant changed at a time."""
    from captum_concepts.attr.concept_fusion import local as reading, regions as constants

    changes: dict[str, list[float]] = {
        "STEPS": [1, 2, 4],
        "SHARE": [0, 1, 3],
        "LOCAL": [0.0, 0.5, 2.0],
        "FAINT": [0.0, 0.1],
    }
    changes |= {"CONTRAST": [0.0, 0.25, 0.75], "TEMPERATURE": [1.5, 6.0]}
    given = {name: getattr(constants, name) for name in changes}
    settings: list[dict[str, float]] = [{}, *({name: v} for name, values in changes.items() for v in values)]
    rows: list[dict[str, Any]] = []
    for setting in settings:
        for name, value in {**given, **setting}.items():
            setattr(constants, name, value)
        reading.TEMPERATURE = constants.TEMPERATURE
        row: dict[str, Any] = {"changed": ", ".join(f"{k} = {v:g}" for k, v in setting.items()) or "nothing"}
        for task, fused in tasks:
            found: dict[str, list[float]] = {"NRA": [], "specificity": []}
            for image, present in task.images[:count]:
                masks = torch.stack(list(present.values()))[None]
                maps = fused.explain(image[None], concepts=list(present), contributions=False).maps
                found["NRA"] += nra(maps, masks)[0].tolist()
                own = concept_specificity(maps, masks)[0] if len(present) > 1 else torch.zeros(0)
                found["specificity"] += own[~own.isnan()].tolist()
            row |= {f"{task.name}, {key}": float(np.mean(values)) for key, values in found.items()}
        rows.append(row)
        print(row, flush=True)
    for name, value in given.items():
        setattr(constants, name, value)
    reading.TEMPERATURE = constants.TEMPERATURE
    facts = {task.name: {**task.facts, "images": len(task.images[:count])} for task, _ in tasks}
    write("concept_regions_sensitivity", {"environment": environment(), **facts, "given": given, "rows": rows})
    text = table(list(rows[0]), [list(row.values()) for row in rows])
    head = f"# Constants of the fused map, one changed at a time\n\nAs given: {given}. {facts}"
    (RESULTS / "concept_regions_sensitivity.md").write_text(f"{head}\n\n{text}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("coco", "scenes", "vit"), default="coco")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--train", type=int, default=5000, help="at most so many photographs")
    parser.add_argument("--epochs", type=int, default=100, help="at most so many")
    parser.add_argument("--similarity", type=float, default=1e-3, help="weight of the similarity loss")
    parser.add_argument("--half", type=int, default=1)
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--sensitivity", type=int, metavar="IMAGES", help="only vary the fused map's few constants")
    args = parser.parse_args()
    torch.manual_seed(0)

    def explainer(task: Task, translator: Any, layers: list[str] | None = None, **options: Any) -> ConceptFusionMap:
        read = task.layers if layers is None else layers
        return ConceptFusionMap(task.model, read, translator, task.words, task.text, logit_scale=task.scale, **options)

    if args.sensitivity:
        tasks = []
        for name in ("coco", "scenes", "vit"):
            args.task, args.half = name, 0
            task = coco(args) if name == "coco" else scenes(args, seed=101)
            tasks.append((task, explainer(task, fitted(task, args.similarity, args), map_layer="fused")))
        sensitivity(tasks, args.sensitivity)
        return
    task = coco(args) if args.task == "coco" else scenes(args, seed=77)
    full = fitted(task, args.similarity, args)
    free, single = fitted(task, 0.0, args), fitted(task, args.similarity, args, last=True)
    makers = {
        "published (auto layer)": explainer(task, full),
        "published, no similarity loss": explainer(task, free),
        "published, single-layer translator": explainer(task, single, task.layers[-1:]),
        "branch gradient": explainer(task, full, gradient="branch"),
        "fused": explainer(task, full, map_layer="fused"),
        "fused, no similarity loss": explainer(task, free, map_layer="fused"),
        "fused, branch gradient": explainer(task, full, map_layer="fused", gradient="branch"),
    }
    chosen = channels_of_words(task)
    generator = torch.Generator().manual_seed(0)
    rows: dict[str, dict[str, list[list[float]]]] = {}
    drops: dict[str, list[list[float]]] = {"published (auto layer)": [], "fused": [], "random": []}
    shown: list[Any] = []
    for image, present in task.images:
        names = list(present)
        masks = torch.stack([present[name] for name in names])[None]
        columns = [task.words.index(name) for name in names]
        x = image[None]
        maps = {k: m.explain(x, concepts=names, contributions=False).maps for k, m in makers.items()}
        peers, activation = direct(task, full, x, columns)
        maps.update(peers)
        for name, channel in chosen.items():
            maps[name] = activation[:, channel[columns]]
        maps["activation energy"] = activation_energy(activation)[:, None].expand(-1, len(names), -1, -1)
        maps["centre Gaussian"] = center_gaussian(1, (56, 56))[:, None].expand(-1, len(names), -1, -1)
        maps["random"] = torch.rand(1, len(names), 14, 14, generator=generator)
        for name, value in maps.items():
            into = rows.setdefault(name, {key: [] for key in ("nra", "nra_exact", "specificity", "epg", "hit_rate")})
            published = nra(value, masks)
            into["nra"].append(published[0].tolist())
            into["nra_exact"].append(nra(value, masks, baseline="exact")[0].tolist())
            own = concept_specificity(value, masks)[0] if len(names) > 1 else torch.zeros(0)
            into["specificity"].append(own[~own.isnan()].tolist())
            into["epg"].append(epg(value, masks)[0].tolist())
            into["hit_rate"].append((published[0] > 0.5).float().tolist())
        for name, into_drop in drops.items():
            into_drop.append(deleted(makers["fused"], image, maps[name], columns, generator))
        if len(shown) < 4 and len(names) > 1:
            one = len(shown) % len(names)  # another place in the list each time
            shown.append(
                (image, names[one], masks[0, one], maps["published (auto layer)"][0, one], maps["fused"][0, one])
            )
    rng = np.random.default_rng(0)
    sizes = {"images": len(task.images), "regions": sum(len(m) for _, m in task.images), "words": len(task.words)}
    record = {
        "environment": environment("torchvision"),
        "data": {"task": task.name, **sizes, **task.facts, "similarity_weight": args.similarity, "seed": 0},
        "rows": {name: {key: interval(v, rng) for key, v in row.items()} for name, row in rows.items()},
        "deletion": {name: interval(values, rng) for name, values in drops.items()},
    }
    write(f"concept_regions_{task.name}", record)
    head = ["method", "NRA", "NRA exact", "specificity", "EPG", "hit rate"]
    lines = [
        [name, *(f"{v[0]:.3f} [{v[1]:.3f}, {v[2]:.3f}]" for v in row.values())] for name, row in record["rows"].items()
    ]
    cut = [[name, f"{v[0]:.2f} [{v[1]:.2f}, {v[2]:.2f}]"] for name, v in record["deletion"].items()]
    report = (
        f"# Concept regions, {task.name}\n\n{record['data']}\n\n{table(head, lines)}\n\n"
        f"Drop of the concept's logit when the fifth of the pixels its map ranks highest becomes the mean colour:\n\n"
        f"{table(['region deleted', 'drop'], cut)}\n"
    )
    (RESULTS / f"concept_regions_{task.name}.md").write_text(report)
    print(report)
    picture(shown, RESULTS / f"concept_regions_{task.name}.png")


def deleted(
    cefam: ConceptFusionMap, image: Tensor, maps: Tensor, columns: list[int], generator: torch.Generator
) -> list[float]:
    """How far each concept's logit falls without the fifth of the pixels that its map ranks highest."""
    side = image.shape[-2:]
    area = F.interpolate(maps, side, mode="bilinear")[0].flatten(1)
    area = area + 1e-9 * torch.rand(area.shape, generator=generator)
    cut = area.argsort(1, descending=True).argsort(1) < area.shape[1] // 5
    gone = torch.where(cut.view(-1, 1, *side), image.mean((1, 2))[None, :, None, None], image)
    logits = cefam.logits(torch.cat([image[None], gone]))
    return (logits[0, columns] - logits[range(1, len(columns) + 1), columns]).tolist()


def picture(shown: list[Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(shown), 4, figsize=(10, 2.5 * len(shown)), squeeze=False)
    for row, (image, name, mask, published, fused) in zip(axes, shown, strict=True):
        for axis, value, title in zip(
            row, (None, mask, published, fused), (name, "mask", "published", "fused"), strict=True
        ):
            axis.imshow(image.permute(1, 2, 0))
            if value is not None:
                axis.imshow(
                    value,
                    cmap="inferno",
                    alpha=0.6,
                    extent=(0, image.shape[-1], image.shape[-2], 0),
                    interpolation="bilinear",
                )
            axis.set_title(title)
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=60)


if __name__ == "__main__":
    main()
