"""Where are the concepts, and are they there? ConceptFusionMap, its peers, and maps that know no concept.

    python -m benchmarks.run.ce_fam.regions [--task coco] --data ../shared/data [--train 2700] [--half 1]
        [--cache FOLDER]
    python -m benchmarks.run.ce_fam.regions --task scenes      # the bundled ResNet and image-text model
    python -m benchmarks.run.ce_fam.regions --task vit         # the bundled ViT
    python -m benchmarks.run.ce_fam.regions --sensitivity 40   # the fused map's constants, all three tasks

``coco``: real MobileNetV2 and ConSE (a zero-shot model in CLIP's text space); the translator is fitted to other images,
without labels. Constants of ``map_layer="fused"`` and of presence were chosen on the images of half 0 only.
``scenes`` and ``vit``: drawn scenes with the exact mask of each concept (those of ``--sensitivity``, and of the design,
have another seed). Intervals: 95 % bootstrap over images.

Rows of one layer name their protocol: ``top-1`` takes the layer of highest relevance, as the paper describes;
``top-4, uses the mask`` gives each region the layer whose map has the best NRA, as the authors' evaluation of Broden
does. "Published training" is the authors' recipe (SGD, published similarity loss) on the crops that the default uses.
"""

from __future__ import annotations

import argparse
import atexit
import json
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.data.photographs import Files, real_models
from benchmarks.data.published import TOP_1, TOP_4
from benchmarks.record import RESULTS, environment, write
from benchmarks.report import renderers
from captum_concepts import demo, published
from captum_concepts.activations import Layers, gradients_enabled, spatial_activations
from captum_concepts.attr.concept_fusion import ConceptFusionMap
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


class Remembered(nn.Module):
    """A model that does not run again on the tensor it saw last: ConSE looks through the explained classifier."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.last: tuple[Any, Any] = (None, None)
        model.register_forward_hook(self.remember)

    def remember(self, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.last = inputs[0], output

    def forward(self, x: Tensor) -> Tensor:
        return self.last[1].detach() if x is self.last[0] else self.model(x)


@dataclass
class Task:
    """What is explained, and by what.

    Args:
        name: of the record.
        encoder: the image-text model.
        fused: fitted as the package does by default.
        recipe: fitted as published.
        pairs: what both were trained on.
        images: with the masks of the words that are there.
        facts: for the record.
    """

    name: str
    encoder: Any
    fused: ConceptFusionMap
    recipe: ConceptFusionMap
    pairs: TrainingPairs
    images: list[tuple[Tensor, dict[str, Tensor]]]
    facts: dict[str, Any]

    @property
    def words(self) -> list[str]:
        return list(self.fused.concepts or ())


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
    classifier = encoder.classifier.to(memory_format=torch.channels_last)
    encoder.classifier = Remembered(classifier)
    words, images = regions(args.data, encoder, args.half)
    files = training_files(args.data, args.train, 0)
    training = Files(files, SIZE, crop=False)
    name = f"coco_half{args.half}"
    return task(name, classifier, LAYERS, encoder, words, training, images, args, {"half": args.half})


def scenes(args: argparse.Namespace, seed: int) -> Task:
    vit = args.task == "vit"
    layers = [f"blocks.{i}" for i in range(4)] if vit else [f"layer{i}" for i in range(1, 5)]
    model, encoder = demo.load("vit" if vit else "classifier"), demo.load("clip")
    training = CaptionedScenes(600, seed=5, size=64)
    test = CaptionedScenes(args.scenes, seed=seed, size=64).stack()
    words = list(training.concepts)
    images = [
        (image, {word: mask for word, mask, here in zip(words, masks, present.tolist(), strict=True) if here})
        for image, masks, present in zip(test.image, test.masks, test.presence, strict=True)
    ]
    facts = {"seed_of_scenes": seed}
    return task(args.task, model, layers, encoder, words, training.stack().image, images, args, facts)


def task(
    name: str,
    model: nn.Module,
    layers: list[str],
    encoder: Any,
    words: list[str],
    training: Any,
    images: list[tuple[Tensor, dict[str, Tensor]]],
    args: argparse.Namespace,
    facts: dict[str, Any],
) -> Task:
    """Both fits, of the same rows; kept in the cache folder."""
    kind = name.split("_", 1)[0]  # both halves share everything
    folder = args.cache or Path(tempfile.mkdtemp())
    if not args.cache:  # the rows are read until the end
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    rows = folder / f"{kind}-{len(training)}"
    common: dict[str, Any] = {"cache_dir": rows, "crops": args.crops}
    recipe = {**published.CONCEPT_FUSION_FIT["training"], "epochs": args.epochs}
    fits: dict[str, dict[str, Any]] = {
        "default": {},
        "published": {**published.CONCEPT_FUSION_FIT, "training": recipe},
    }
    options: dict[str, dict[str, Any]] = {"default": {"map_layer": "fused"}, "published": published.CONCEPT_FUSION_MAP}
    made = {}
    for how, fit in fits.items():
        file = folder / f"{kind}-{len(training)}-{how}-{args.epochs if fit else 0}.safetensors"
        if args.cache and file.exists():
            made[how] = ConceptFusionMap.load(file, model)
        else:
            made[how] = ConceptFusionMap(model, layers, batch_size=40, **options[how])
            made[how].fit(training, encoder, words, **common, **fit, show_progress=True)
            made[how].save(file)
        print(made[how], flush=True)
    pairs = collect_pairs(Layers.resolve(model, layers), encoder, training, crops=args.crops, seed=0, cache_dir=rows)
    facts |= {"train_images": pairs.images, "crops": args.crops, "published_training": recipe}
    facts["trust"] = {how: one.trust for how, one in made.items()}
    histories = {how: one.history_ or {} for how, one in made.items()}
    facts["validation_cosines"] = {how: max(history["val_cosine"]) for how, history in histories.items()}
    return Task(name, encoder, made["default"], made["published"], pairs, images, facts)


def of_last_layer(task: Task) -> ConceptFusionMap:
    """The published map of a translator that reads the last layer alone."""
    z, e = task.pairs.rows(range(len(task.pairs)))
    channels = list(task.pairs.in_channels)[-1:]
    translator = ConceptTranslator(channels, e.shape[1])
    fit_translator(translator, TrainingPairs([(z[:, -channels[0] :], e)], channels, views=task.pairs.views), seed=0)
    fused = task.fused
    scale = fused.logit_scale
    return ConceptFusionMap(
        fused.forward_func, fused.layers[-1:], translator, fused.concepts, fused.text_embeddings, logit_scale=scale
    )


def direct(fused: ConceptFusionMap, x: Tensor, columns: list[int]) -> tuple[dict[str, Tensor], Tensor]:
    """HiResCAM and LayerCAM of the concept logits (all layers, each divided by its maximum, summed); the last layer."""
    assert fused.translator is not None
    assert fused.text_embeddings is not None
    total: dict[str, Any] = {"HiResCAM, all layers": 0.0, "LayerCAM, all layers": 0.0}
    with gradients_enabled():
        seen = spatial_activations(fused.forward_func, x, list(fused.layers), gradient=True)
        h = F.normalize(fused.translator([maps.mean((2, 3)) for maps in seen.maps]), dim=1)
        logits = float(fused.logit_scale or 1) * (h @ F.normalize(fused.text_embeddings, dim=1).T)[0, columns]
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
    z, e = task.pairs.rows(task.pairs.rows_of(torch.arange(task.pairs.images), crops=False))
    last = z[:, -task.pairs.in_channels[-1] :]
    assert task.fused.text_embeddings is not None
    wanted = F.normalize(e, dim=1) @ F.normalize(task.fused.text_embeddings, dim=1).T
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


def sensitivity(tasks: list[Task], count: int) -> None:
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
        for task in tasks:
            found: dict[str, list[float]] = {"NRA": [], "specificity": []}
            for image, present in task.images[:count]:
                masks = torch.stack(list(present.values()))[None]
                maps = task.fused.concept_maps(image[None], list(present))
                found["NRA"] += nra(maps, masks)[0].tolist()
                own = concept_specificity(maps, masks)[0] if len(present) > 1 else torch.zeros(0)
                found["specificity"] += own[~own.isnan()].tolist()
            row |= {f"{task.name}, {key}": float(np.mean(values)) for key, values in found.items()}
        rows.append(row)
        print(row, flush=True)
    for name, value in given.items():
        setattr(constants, name, value)
    reading.TEMPERATURE = constants.TEMPERATURE
    facts = {task.name: {**task.facts, "images": len(task.images[:count])} for task in tasks}
    write("concept_regions_sensitivity", {"environment": environment(), **facts, "given": given, "rows": rows})


NO_CHOICE = "no layer to choose"
SINGLE = "one layer"
AGNOSTIC = "concept-agnostic"


def makers(task: Task) -> dict[str, tuple[str, ConceptFusionMap]]:
    """Name -> protocol and map. ``TOP_4`` is computed from all layers of the map."""
    fused, recipe = task.fused, task.recipe
    ours = fused.with_options(map_layer="auto")
    return {
        "fused": (NO_CHOICE, fused),
        "fused, branch gradient": (NO_CHOICE, fused.with_options(gradient="branch")),
        "fused, published training": (NO_CHOICE, recipe.with_options(map_layer="fused", calibrated=True)),
        "published map, top-1": (TOP_1, ours),
        "published map, top-4": (TOP_4, ours),
        "published map, branch gradient": (TOP_1, ours.with_options(gradient="branch")),
        "published map, translator of the last layer": (SINGLE, of_last_layer(task)),
        "published map and training, top-1": (TOP_1, recipe),
        "published map and training, top-4": (TOP_4, recipe),
    }


def best_layer(cefam: ConceptFusionMap, x: Tensor, names: list[str], masks: Tensor) -> Tensor:
    """``(1, T, h, w)`` the published map of whichever layer has the best NRA against the region's own mask."""
    each = [cefam.with_options(map_layer=number).concept_maps(x, names) for number in range(len(cefam.layers))]
    scores = torch.stack([nra(maps, masks, **published.NRA)[0] for maps in each]).nan_to_num(-1.0)
    grid = max((maps.shape[-2:] for maps in each), key=lambda side: side[0] * side[1])
    resized = torch.stack([F.interpolate(maps, grid, mode="bilinear")[0] for maps in each])
    return resized[scores.argmax(0), torch.arange(len(names))][None]


def words_said(task: Task, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Whether the first word is there, and the words that are said to be present."""
    x = torch.stack([image for image, _ in task.images])
    there = torch.tensor([[word in present for word in task.words] for _, present in task.images])
    each = torch.arange(len(there))
    kept = {"CE-FAM": task.fused, "CE-FAM, published training and scores": task.recipe}
    unit = F.normalize(task.encoder.encode_image(x).float(), dim=1)
    assert task.fused.text_embeddings is not None
    teacher = float(task.encoder.logit_scale) * unit @ F.normalize(task.fused.text_embeddings, dim=1).T
    found = {name: (cefam.scores(x), cefam.presence(x)) for name, cefam in kept.items()}
    found["the image-text model itself"] = (teacher.softmax(1), None)
    rows = []
    for name, (scores, presence) in found.items():
        best, first = scores.max(1)
        row: dict[str, Any] = {
            "what": name,
            "first word present": interval([[float(v)] for v in there[each, first]], rng),
            "mean first score": float(best.mean()),
        }
        for least in (0.5, 0.9) if presence is not None else ():
            said = presence >= least
            right = [there[i, said[i]].float().tolist() for i in range(len(there))]
            row[f"said with {least}, words per image"] = float(said.sum() / len(said))
            row[f"said with {least}, present"] = interval(right, rng) if said.any() else None
        if presence is not None:
            rate = there.float().mean()
            row["Brier score of presence"] = float((presence - there.float()).square().mean())
            row["Brier score of the rate"] = float((rate - there.float()).square().mean())
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("coco", "scenes", "vit"), default="coco")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--train", type=int, default=2700, help="at most so many photographs")
    parser.add_argument("--crops", type=int, default=4, help="of each image, for both fits")
    parser.add_argument("--epochs", type=int, default=40, help="of the published training, at most (150 in the paper)")
    parser.add_argument("--half", type=int, default=1)
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--sensitivity", type=int, metavar="IMAGES", help="only vary the fused map's few constants")
    parser.add_argument("--words", action="store_true", help="only whether the words are there, into the last record")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.sensitivity:
        tasks = []
        for name in ("coco", "scenes", "vit"):
            args.task, args.half = name, 0
            tasks.append(coco(args) if name == "coco" else scenes(args, seed=101))
        sensitivity(tasks, args.sensitivity)
        return
    task = coco(args) if args.task == "coco" else scenes(args, seed=77)
    rng = np.random.default_rng(0)
    words = words_said(task, rng)
    for row in words:
        print(row, flush=True)
    if args.words:
        record = json.loads((RESULTS / f"concept_regions_{task.name}.json").read_text())
        keep(task.name, {**record, "environment": environment("torchvision"), "words": words})
        return
    made, channels = makers(task), channels_of_words(task)
    protocols = {name: protocol for name, (protocol, _) in made.items()}
    generator = torch.Generator().manual_seed(0)
    rows: dict[str, dict[str, list[list[float]]]] = {}
    drops: dict[str, list[list[float]]] = {name: [] for name in ("fused", "published map, top-1", "random")}
    shown: list[Any] = []
    for image, present in task.images:
        names = list(present)
        masks = torch.stack([present[name] for name in names])[None]
        columns = [task.words.index(name) for name in names]
        x = image[None]
        maps = {
            name: best_layer(one, x, names, masks) if protocol == TOP_4 else one.concept_maps(x, names)
            for name, (protocol, one) in made.items()
        }
        peers, activation = direct(task.fused, x, columns)
        maps.update(peers)
        for name, channel in channels.items():
            maps[name] = activation[:, channel[columns]]
            protocols[name] = SINGLE
        agnostic = {
            "activation energy": activation_energy(activation)[:, None].expand(-1, len(names), -1, -1),
            "centre Gaussian": center_gaussian(1, (56, 56))[:, None].expand(-1, len(names), -1, -1),
            "random": torch.rand(1, len(names), 14, 14, generator=generator),
        }
        protocols |= dict.fromkeys(agnostic, AGNOSTIC)
        maps.update(agnostic)
        for name, value in maps.items():
            into = rows.setdefault(
                name, {key: [] for key in ("nra", "nra_authors", "nra_exact", "specificity", "epg", "hit_rate")}
            )
            authors = nra(value, masks, **published.NRA)[0]
            into["nra"].append(nra(value, masks)[0].tolist())
            into["nra_authors"].append(authors.tolist())
            into["nra_exact"].append(nra(value, masks, baseline="exact")[0].tolist())
            own = concept_specificity(value, masks)[0] if len(names) > 1 else torch.zeros(0)
            into["specificity"].append(own[~own.isnan()].tolist())
            into["epg"].append(epg(value, masks)[0].tolist())
            into["hit_rate"].append((authors > 0.5).float().tolist())
        for name, dropped in drops.items():
            dropped.append(deleted(task.fused, image, maps[name], columns, generator))
        if len(shown) < 4 and len(names) > 1:
            one = len(shown) % len(names)  # another concept of the list each time
            shown.append(
                (image, names[one], masks[0, one], maps["published map, top-1"][0, one], maps["fused"][0, one])
            )
    sizes = {"images": len(task.images), "regions": sum(len(m) for _, m in task.images), "words": len(task.words)}
    record = {
        "environment": environment("torchvision"),
        "data": {"task": task.name, **sizes, **task.facts, "seed": 0},
        "rows": {
            name: {"protocol": protocols.get(name, NO_CHOICE), **{key: interval(v, rng) for key, v in row.items()}}
            for name, row in rows.items()
        },
        "deletion": {name: interval(values, rng) for name, values in drops.items()},
        "words": words,
    }
    keep(task.name, record)
    picture(shown, RESULTS / f"concept_regions_{task.name}.png")


def keep(name: str, record: dict[str, Any]) -> None:
    """Write the record, and print its section of the page."""
    write(f"concept_regions_{name}", record)
    print("\n".join(renderers.regions(record)))


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
    for row, (image, name, mask, top_1, fused) in zip(axes, shown, strict=True):
        for axis, value, title in zip(
            row, (None, mask, top_1, fused), (name, "mask", "published", "fused"), strict=True
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
