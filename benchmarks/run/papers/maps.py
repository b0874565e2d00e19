"""The papers' tables of maps: regions of concepts (CE-FAM) and of the predicted class (SALF-CBM), streamed."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.data.photographs import Files
from benchmarks.data.published import AVERAGED, LAST_LAYER, TEMPLATES, TOP_1, TOP_4
from benchmarks.peers import maps as peers
from benchmarks.report.cells import OTHER, SHUFFLED
from benchmarks.run.map_tables import Explainer, interval
from benchmarks.run.papers.inputs import classifier, image_text, words_of
from captum_concepts import SALFCBM, ConceptFusionMap, metrics, published
from captum_concepts.datasets import Broden, ImageNetS, ImageNetSegmentation
from captum_concepts.images import find_images

Row = dict[str, Any]
REGION_COLUMNS = ("epg", "nra", "nra_exact", "hit_rate", "specificity")


# ------------------------------------------------------------------------------------------------ worse on purpose


def blind(read: Callable[[Tensor], Tensor], device: str) -> dict[str, Explainer]:
    """The rows that know no concept."""
    noise = torch.Generator().manual_seed(0)
    return {
        "activation energy": lambda x, _: metrics.activation_energy(read(x.to(device))),
        "centre Gaussian": lambda x, _: metrics.center_gaussian(len(x), (56, 56)),
        "random": lambda x, _: torch.rand(len(x), 7, 7, generator=noise),
    }


def worse(name: str, explain: Explainer, targets: int) -> dict[str, Explainer]:
    """The same maps exchanged between images (each image is given the last one's) and of another target."""
    last: list[Tensor] = []

    def shuffled(x: Tensor, target: Tensor) -> Tensor:
        maps = explain(x, target)
        before = last[0] if last else maps.flip(2)  # the first image has no image before it
        last[:] = [maps]
        return before[torch.arange(len(x)) % len(before)]

    def other(x: Tensor, target: Tensor) -> Tensor:
        absent = [t for t in range(targets) if t not in set(target.tolist())]
        chosen = torch.tensor([absent[int(t) * 31 % len(absent)] for t in target.tolist()])
        return explain(x, chosen)

    return {f"{name}: {SHUFFLED}": shuffled, f"{name}: {OTHER}": other}


# ------------------------------------------------------------------------------------------------ concepts (CE-FAM)


class Prompted:
    """An image-text model that is asked for each word in a template of its own."""

    def __init__(self, encoder: Any, texts: dict[str, str]) -> None:
        self.encoder, self.texts = encoder, texts
        self.logit_scale, self.logit_bias = encoder.logit_scale, encoder.logit_bias
        self.encode_image = encoder.encode_image

    def encode_text(self, words: list[str]) -> Tensor:
        return self.encoder.encode_text([self.texts.get(word, word) for word in words])


def concept_regions(args: argparse.Namespace) -> list[Row]:
    """Both tables of CE-FAM: Broden and ImageNet-S."""
    broden = args.table == "ce-fam-broden"
    if broden:
        data: Any = Broden(args.root, size=args.size, split=args.split)
        kinds = [found[0] for found in data.concept_categories]
    else:
        data, kinds = ImageNetS(args.root, args.split or "validation", size=args.size), None
    if args.train is None:
        raise SystemExit("--train FOLDER: images for the translator, ImageNet's training set in the paper")
    words = words_of(data.concepts)
    templates = [TEMPLATES.get(kind, TEMPLATES["object"]) for kind in kinds or ["object"] * len(words)]
    texts = {word: template.format(word) for word, template in zip(words, templates, strict=True)}
    encoder = Prompted(image_text(args.encoder, args.encoder_weights, args.device), texts)
    if not _knows(encoder, words):
        print("the image-text model does not know the authors' prompts: the words stand alone")
        encoder.texts = {}
    probe = Files(sorted(find_images([args.train]))[: args.train_images], args.size)
    every = broden and not args.last_layer
    own = args.layers if every else args.layers[-1:]  # otherwise a translator of the last layer alone
    explainers, protocols = concept_explainers(words, probe, encoder, own, args)
    rows = region_rows(data, explainers, kinds, args.limit)
    return [{"method": row.pop("method"), "protocol": protocols.get(name, ""), **row}
            for row, name in zip(rows, explainers, strict=True)]  # fmt: skip


def _knows(encoder: Any, words: list[str]) -> bool:
    try:
        encoder.encode_text(words)
    except (KeyError, ValueError):
        return False
    return True


def concept_explainers(
    words: list[str], probe: Files, encoder: Any, own: list[str], args: argparse.Namespace
) -> tuple[dict[str, Explainer], dict[str, str]]:
    """CE-FAM by the authors' protocols and fused, the single channels, maps made worse, what knows nothing.

    Returns:
        Explainers, and the protocol of those that have one. Maps ``(T, L, h, w)`` are those of L layers, the best of
        which counts, of the peers' single channels as of CE-FAM.
    """
    model = classifier(args.model, args.model_weights, args.device)
    unique = list(dict.fromkeys(words))  # two classes may share their word
    column = torch.tensor([unique.index(word) for word in words])
    fit: dict[str, Any] = {"image_size": args.size, "crops": args.crops}

    def cache(layers: list[str]) -> Path | None:  # both fits have the same rows where they have the same layers
        return None if args.cache is None else args.cache / "-".join(layers)

    recipe = published.CONCEPT_FUSION_FIT
    as_published = ConceptFusionMap(model, own, **published.CONCEPT_FUSION_MAP).fit(
        probe, encoder, unique, **{**recipe, "training": {**recipe["training"], "epochs": args.epochs}},
        cache_dir=cache(own), **fit,
    )  # fmt: skip
    fused = ConceptFusionMap(model, args.layers, map_layer="fused").fit(
        probe, encoder, unique, cache_dir=cache(args.layers), **fit
    )

    def read_as(cefam: ConceptFusionMap) -> Explainer:
        return lambda x, target: cefam.attribute(x.to(args.device), target=column[target].tolist())[:, 0]

    def best(each: list[Explainer]) -> Explainer:
        def run(x: Tensor, target: Tensor) -> Tensor:
            maps = [one(x, target)[:, None] for one in each]
            size = max((m.shape[-2:] for m in maps), key=lambda side: side[0] * side[1])
            return torch.cat([F.interpolate(m, size, mode="bilinear") for m in maps], 1)

        return run

    found = {"CE-FAM": read_as(as_published)}
    protocols = {"CE-FAM": TOP_1 if len(own) > 1 else LAST_LAYER}
    layers = {"CE-FAM": [read_as(as_published.with_options(map_layer=number)) for number in range(len(own))]}
    reads = [peers.activations(model, layer) for layer in own]
    for name, tables in peers.channel_tables(reads, encoder, probe, unique, args.device).items():
        single = [peers.single_channel(read, table) for read, table in zip(reads, tables, strict=True)]
        layers[name] = [lambda x, target, one=one: one(x.to(args.device), column[target]) for one in single]
        found[name] = layers[name][-1]
        protocols[name] = LAST_LAYER
    if len(own) > 1:
        for name, each in layers.items():
            found[f"{name}, best layer"] = best(each)
            protocols[f"{name}, best layer"] = TOP_4
    found['CE-FAM, map_layer="fused"'] = read_as(fused)
    protocols['CE-FAM, map_layer="fused"'] = "no layer to choose; default training"
    bad = worse('CE-FAM, map_layer="fused"', found['CE-FAM, map_layer="fused"'], len(words))
    return {**found, **blind(reads[-1], args.device), **bad}, protocols


def region_rows(
    data: Any, explainers: dict[str, Explainer], kinds: list[str] | None = None, limit: int | None = None
) -> list[Row]:
    """Every (image, concept): means with intervals over images, over all and by category; images one at a time.

    Args:
        data: a segmentation data set of regions that are present.
        explainers: by name.
        kinds: category of each concept.
        limit: only the first images.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in explainers}
    image, category = [], []
    for n in range(min(len(data), limit or len(data))):
        item = data[n]
        target = torch.as_tensor(item.target)
        if not len(target):
            continue
        image += [n] * len(target)
        category += ["" if kinds is None else kinds[t] for t in target.tolist()]
        x = item.image.expand(len(target), -1, -1, -1)
        for name, explain in explainers.items():
            found[name].append(_scores(explain(x, target).detach().float().cpu(), item.masks, item.ignore))
    if not image:
        raise SystemExit("the data set shows none of the concepts")
    groups = torch.tensor(image)
    rows = []
    for name in explainers:
        scores = torch.cat(found[name])
        row: Row = {"method": name, "regions": len(scores)}
        row.update(_columns(scores, groups, ""))
        for kind in sorted(set(category) - {""}):
            own = torch.tensor([c == kind for c in category])
            row.update(_columns(scores[own], groups[own], f", {kind}"))
        if kinds is not None:
            averaged = [kind for kind in AVERAGED if kind in category]
            parts = [[row[f"{c}, {kind}"] for kind in averaged] for c in REGION_COLUMNS]
            for c, each in zip(REGION_COLUMNS, parts, strict=True):
                means = [value[0] for value in each if value is not None]
                row[f"{c}, mean of categories"] = [sum(means) / len(means), None, None] if means else None
        rows.append(row)
    return rows


def _scores(maps: Tensor, masks: Tensor, ignore: Tensor) -> Tensor:
    """``(T, 5)``: the columns of every concept of one image; of L layers those of the layer of best NRA."""
    if maps.ndim == 4:
        layers = torch.stack([_scores(one, masks, ignore) for one in maps.unbind(1)])
        best = layers[..., REGION_COLUMNS.index("nra")].nan_to_num(-1.0).argmax(0)
        return layers[best, torch.arange(len(masks))]
    skip = ignore.expand(masks.shape)
    authors = metrics.nra(maps, masks, ignore=skip, **published.NRA)
    hit = (authors > 0.5).float().masked_fill(authors.isnan(), torch.nan)
    special = metrics.concept_specificity(maps[None], masks[None], ignore=skip[None])[0]
    exact = metrics.nra(maps, masks, baseline="exact", ignore=skip)
    return torch.stack([metrics.epg(maps, masks, ignore=skip), authors, exact, hit, special], 1)


def _columns(scores: Tensor, groups: Tensor, suffix: str) -> Row:
    return {f"{c}{suffix}": interval(scores[:, i], groups) for i, c in enumerate(REGION_COLUMNS)}


# ------------------------------------------------------------------------------------------------ classes (SALF-CBM)


def segmentation(args: argparse.Namespace) -> list[Row]:
    """ImageNet-segmentation: maps of the predicted class, binarised at their mean; pictures squashed, as published."""
    data = ImageNetSegmentation(args.root, size=args.size, resize="squash")
    model = classifier(args.model, args.model_weights, args.device)
    layer = model.get_submodule(args.layers[-1])
    with torch.no_grad():
        classes = model(data[0].image[None].to(args.device)).shape[1]
    explainers: dict[str, Explainer] = {
        "Grad-CAM (captum)": peers.captum_grad_cam(model, layer),
        "integrated gradients (captum)": integrated_gradients(model),
    }
    if importlib.util.find_spec("pytorch_grad_cam") is None:
        print("pytorch-grad-cam is not installed (pip install '.[benchmark]'): its rows are missing")
    else:
        wanted = {"Grad-CAM++": "GradCAMPlusPlus", **({"Score-CAM": "ScoreCAM"} if args.score_cam else {})}
        for name, kind in wanted.items():
            explainers[f"{name} (pytorch-grad-cam)"] = peers.pytorch_grad_cam(kind, model, layer)
    if args.salf is not None:
        explainers["SALF-CBM"] = salf_maps(args.salf, model, classes, args.device)
    chosen = "SALF-CBM" if "SALF-CBM" in explainers else "Grad-CAM (captum)"
    bad = worse(chosen, explainers[chosen], classes)
    explainers |= {**blind(peers.activations(model, layer), args.device), **bad}
    return segmentation_rows(data, model, explainers, args.device, args.limit)


def segmentation_rows(
    data: Any, model: nn.Module, explainers: dict[str, Explainer], device: str, limit: int | None = None
) -> list[Row]:
    """Each explainer is asked for the class that the model predicts. A map with NaN draws nothing, as published."""
    counts: dict[str, list[Tensor]] = {name: [] for name in explainers}
    precision: dict[str, list[Tensor]] = {name: [] for name in explainers}
    for n in range(min(len(data), limit or len(data))):
        item = data[n]
        x, mask = item.image[None].to(device), item.masks[None]
        with torch.no_grad():
            target = model(x).argmax(1)
        for name, explain in explainers.items():
            heat = explain(x, target).detach().float().cpu()
            heat = heat.reshape(1, *heat.shape[-2:])
            heat = torch.zeros_like(heat) if bool(heat.isnan().any()) else heat
            counts[name].append(metrics.segmentation_counts(heat, mask)[0].double())
            precision[name].append(metrics.average_precision(heat, mask)[0])
    return [_segmentation_row(name, torch.stack(counts[name]), torch.stack(precision[name])) for name in explainers]


def _segmentation_row(name: str, counts: Tensor, precision: Tensor) -> Row:
    """Sums over all images before dividing, as published; intervals by resampling images."""

    def ratios(total: Tensor) -> tuple[Tensor, Tensor]:
        front, union, back, back_union = total.unbind(-1)
        return (front + back) / (union + back), 0.5 * (front / union + back / back_union)

    draws = torch.randint(len(counts), (1000, len(counts)), generator=torch.Generator().manual_seed(0))
    row: Row = {"method": name, "images": len(counts)}
    whole, drawn = ratios(counts.sum(0)), ratios(counts[draws].sum(1))
    ends = torch.tensor([0.025, 0.975], dtype=counts.dtype)
    for key, value, others in zip(("pixel_accuracy", "mean_iou"), whole, drawn, strict=True):
        row[key] = [float(value), *torch.quantile(others, ends).tolist()]
    row["average_precision"] = interval(precision)
    return row


def integrated_gradients(model: nn.Module) -> Explainer:
    """Captum's, of the pixels, from black; absolute values of the sums over colours."""
    from captum.attr import IntegratedGradients

    method = IntegratedGradients(model)
    return lambda x, target: method.attribute(x, target=target, n_steps=50, internal_batch_size=10).sum(1).abs()


def salf_maps(folder: Path, backbone: nn.Module, classes: int, device: str) -> Explainer:
    """The map of "An image of a {class}" of a class: concept t is class t."""
    salf = SALFCBM.from_pretrained(folder, backbone=backbone).to(device).eval()
    if len(salf.concepts) != classes:
        raise SystemExit(
            f"{folder.name} has {len(salf.concepts)} concepts, but the model has {classes} classes; fit it with a "
            "concept a class, in the classes' order, --presence-cutoff none and --interpretability-cutoff none"
        )

    def run(x: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            return salf.concept_maps(x)[torch.arange(len(x)), target.cpu()]

    return run
