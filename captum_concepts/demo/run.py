"""One run of the library on the bundled models, with figures and a table of how well maps match the exact masks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_concepts import demo
from captum_concepts._artifacts import write_atomically
from captum_concepts.attr.concept_fusion_map import ConceptFusionMap
from captum_concepts.attr.feature_activation_map import FeatureActivationMap
from captum_concepts.attr.spatial_acv import SpatialACV
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.demo import show_and_tell
from captum_concepts.explanation import ConceptExplanation
from captum_concepts.metrics import center_gaussian, concept_specificity, epg, nra

QUERIES, SHOWN, PAGE = 48, 4, "report.html"


@dataclass(frozen=True)
class DemoRow:
    """One row of the table.

    Args:
        method, model: the method and the explained model.
        question: what was explained.
        regions: number of maps compared with an exact mask.
        nra: mean normalized region accuracy of the maps (published baseline).
        nra_centre: mean NRA of a center Gaussian, a concept-agnostic baseline, on the same masks.
        epg: mean fraction of the map's energy inside the mask.
        specificity: NRA of a concept's own map minus that of the other concepts' maps; None for a single region.
        picture: file name of the figure.
    """

    method: str
    model: str
    question: str
    regions: int
    nra: float
    nra_centre: float
    epg: float
    specificity: float | None
    picture: str


@dataclass
class DemoResult:
    """The table and the locations of the figures; prints as a summary."""

    output: Path
    rows: list[DemoRow] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The result as a JSON-compatible dictionary."""
        return {"output": str(self.output), "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        head = ["method", "model", "explained", "regions", "NRA", "NRA of a centered Gaussian", "EPG", "specificity"]
        cells = []
        for r in self.rows:
            special = "" if r.specificity is None else f"{r.specificity:.2f}"
            numbers = [f"{r.nra:.2f}", f"{r.nra_centre:.2f}", f"{r.epg:.2f}", special]
            cells.append([r.method, r.model, r.question, str(r.regions), *numbers])
        widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
        lines = ["  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) for line in [head, *cells]]
        lines.insert(1, "-" * len(lines[0]))
        pictures = "\n".join(f"  {self.output / r.picture}" for r in self.rows)
        return "\n".join(lines) + f"\n\nFigures:\n{pictures}\n\nPage (open it in a browser):\n  {self.output / PAGE}"


def run_demo(output: str | os.PathLike[str] = "demo_output", *, seed: int = 0) -> DemoResult:
    """Explain synthetic scenes with the bundled models.

    Args:
        output: folder for ``*.png``, ``report.html`` and ``demo.json``.
        seed: random seed of the scenes, which are never those the models were trained on.

    Returns:
        One row per method and model.
    """
    out = Path(output)
    out.mkdir(parents=True, exist_ok=True)
    result = DemoResult(out)
    scenes = CaptionedScenes(QUERIES, seed=1_000_003 + 2 * seed, size=64)
    for section in tqdm(SECTIONS, desc="demo (about a minute)", unit="part", file=sys.stderr, disable=None):
        result.rows += section(scenes, out)
    write_atomically(out / "demo.json", (json.dumps(result.as_dict(), indent=2) + "\n").encode())
    return result


def few_shot(scenes: CaptionedScenes, out: Path) -> list[DemoRow]:
    """FAM with refinement on two networks without their heads, with prototypes of five images per class."""
    examples = CaptionedScenes(120, seed=scenes.seed + 1, size=scenes.size).stack()
    chosen = torch.cat([torch.nonzero(examples.label == c).flatten()[:5] for c in range(len(scenes.classes))])
    queries = scenes.stack()
    rows = []
    for name, layer, head in (("classifier", "layer4", "fc"), ("vit", "blocks.3", "head")):
        model = demo.load(name)
        setattr(model, head, nn.Identity())
        names = [scenes.classes[k] for k in examples.label[chosen].tolist()]
        fam = FeatureActivationMap(model, layer, normalize="l1", refine=True).fit(examples.image[chosen], names)
        explanation = fam.explain(queries.image)
        maps = fam.attribute(queries.image, target=[scenes.classes[k] for k in queries.label.tolist()])[:, 0]
        picture = _picture(
            queries.image,
            explanation,
            out / f"fam_{name}.png",
            f"FAM, refined: similarity to class prototypes, {name} {layer}",
        )
        question = "class of the main object, 5 examples per class"
        rows.append(_row("FAM", name, question, maps, queries.object_masks[:, 0], picture))
    return rows


def zero_shot(scenes: CaptionedScenes, out: Path) -> list[DemoRow]:
    """FAM on the image tower of the bundled CLIP, with similarity to text."""
    clip = demo.load("clip")
    queries = scenes.stack()
    layer = "model.visual.trunk.layer4"
    text = clip.encode_text(scenes.concepts)
    fam = FeatureActivationMap(clip, layer, text, reference_names=scenes.concepts, normalize="l1")
    explanation = fam.explain(queries.image)
    picture = _picture(queries.image, explanation, out / "fam_clip.png", "FAM: similarity to text, CLIP image encoder")
    return [_concept_row("FAM", "clip", "21 concepts", fam.concept_maps(queries.image), queries, picture)]


def textures(scenes: CaptionedScenes, out: Path) -> list[DemoRow]:
    """SACV with concept examples of each texture against the others and grounds, on whole scenes."""
    model = demo.load("classifier")
    words = scenes.concept_groups["texture"]
    examples, negatives = texture_guidance(CaptionedScenes(500, seed=scenes.seed + 1, size=scenes.size))
    acv = SpatialACV(model, "layer2", refine=True).fit(examples, negatives, n_random=20, lam=0.003)
    queries = scenes.stack()
    explanation = acv.explain(queries.image, target=queries.label)
    columns = [scenes.concepts.index(word) for word in words]
    significant = torch.as_tensor(acv.significant_)[[words.index(c) for c in explanation.concepts]]
    picture = _picture(
        queries.image, explanation, out / "sacv_classifier.png", "SACV: where layer2 encodes each texture",
        class_names=scenes.classes, significant=significant,
    )  # fmt: skip
    one = queries._replace(masks=queries.masks[:, columns], presence=queries.presence[:, columns])
    maps = acv.concept_maps(queries.image, words)
    return [_concept_row("SACV", "classifier", "4 textures, from example tiles", maps, one, picture)]


def words_and_grounds(scenes: CaptionedScenes, out: Path) -> list[DemoRow]:
    """CE-FAM with text concepts; wrong predictions are traced to the ground that they rely on, also as a page."""
    from captum_concepts.visualization import report

    clip, queries = demo.load("clip"), scenes.stack()
    training = CaptionedScenes(800, seed=scenes.seed + 2, size=scenes.size).stack().image
    known = CaptionedScenes(200, seed=scenes.seed + 5, size=scenes.size).stack()
    layers = ["layer1", "layer2", "layer3", "layer4"]
    rows = []
    for name in ("classifier", "classifier-spurious"):
        model = demo.load(name)
        cefam = ConceptFusionMap(model, layers, map_layer="fused", batch_size=100)
        cefam.fit(training, clip, scenes.concepts)
        # Concepts of four kinds are present together, and the ground wins their softmax, so scores are calibrated.
        cefam.calibrate(known.image, known.presence)
        maps = cefam.attribute(queries.image)
        predicted = model(queries.image).argmax(1)
        title, chosen = "CE-FAM: what, where and how much, for the true class", list(range(SHOWN))
        if name == "classifier-spurious":
            title = "CE-FAM: wrong predictions, and what supports (red) and opposes (blue) the true class"
            wrong = torch.nonzero(predicted != queries.label).flatten()[:12]
            grounds = scenes.concept_groups["ground"]
            against = cefam.contributions(queries.image[wrong], target=queries.label[wrong], concepts=grounds)
            own = [grounds.index(scenes.concepts[int(k)]) for k in queries.ground[wrong]]
            ground = against[torch.arange(len(own)), own]
            chosen = wrong[ground.argsort()[:SHOWN]].tolist()
        images, target = queries.image[chosen], queries.label[chosen]
        named = [(scenes.classes[int(queries.label[i])], scenes.classes[int(predicted[i])]) for i in chosen]
        titles = [true if true == said else f"{true}, predicted as {said}" for true, said in named]
        explanation = cefam.explain(images, target=target, top_k=len(scenes.concepts))
        picture = _picture(
            images, explanation, out / f"ce_fam_{name}.png", title, class_names=scenes.classes, image_names=titles
        )
        rows.append(_concept_row("CE-FAM", name, "21 concepts", maps, queries, picture))
    settings = {"model": name, "layers": layers, "training images": len(training), "seed": scenes.seed}
    report(
        explanation, images, out / PAGE, title="Wrong predictions, explained by concepts", class_names=scenes.classes,
        image_names=titles, settings=settings,
    )  # fmt: skip
    return rows


def rules_and_corrections(scenes: CaptionedScenes, out: Path) -> list[DemoRow]:
    """SALF-CBM trained on the spot, its rules, and wrong predictions that one edit of one concept corrects."""
    from captum_concepts.demo._corrections_figure import corrections_figure
    from captum_concepts.visualization import save_figure

    model = show_and_tell.train(scenes)
    search = CaptionedScenes(show_and_tell.SEARCHED, seed=scenes.seed + 4, size=scenes.size).stack()
    found = show_and_tell.find_corrections(model, search)
    right = float((show_and_tell.logits(model, search.image).argmax(1) == search.label).float().mean())
    note = (
        f"SALFCBM   ·   trained on {show_and_tell.TRAIN} scenes, accuracy {right:.1%} on {len(search.label)} others   "
        f"·   {found.corrected} of the {found.wrong} wrong predictions are corrected by resetting one absent concept "
        "to its usual value in one box"
    )
    title = "SALF-CBM: what a model relies on, and wrong predictions corrected by editing one concept in one box"
    name = "salf_cbm_classifier.png"
    save_figure(corrections_figure(model, found.shown, title, note), out / name)
    queries = scenes.stack()
    maps = model.concept_maps(queries.image).detach()
    return [_concept_row("SALF-CBM", "classifier", "21 concepts", maps, queries, name)]


def texture_guidance(known: CaptionedScenes, most: int = 100) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Concept examples of each texture, and negatives by name, at half the size of the scenes.

    Examples show only the texture, as inner squares of objects repeated by mirroring, so that it has the same scale as
    in scenes. Negatives are grounds, and objects of the other textures with their surroundings (a set with the
    concept's own name is never its negative).
    """
    half, words = known.size // 2, known.concept_groups["texture"]
    tiles: dict[str, list[Tensor]] = {word: [] for word in words}
    windows: dict[str, list[Tensor]] = {word: [] for word in words}
    grounds: list[Tensor] = []
    for scene in known:
        image, masks = scene.image, scene.object_masks
        for n, (concepts, box) in enumerate(zip(scene.objects.tolist(), scene.boxes.tolist(), strict=True)):
            word = known.concepts[concepts[2]]
            if concepts[2] < 0:
                continue
            x0, y0, x1, y1 = box
            dx, dy = (x1 - x0) / 4, (y1 - y0) / 4
            part = image[:, round(y0 + dy) : round(y1 - dy) + 1, round(x0 + dx) : round(x1 - dx) + 1]
            if min(part.shape[1:]) >= half // 4:
                tiles[word].append(part[:, _mirrored(part.shape[1], half)][:, :, _mirrored(part.shape[2], half)])
            left, top = (min(max(round(middle) - half // 2, 0), half) for middle in ((x0 + x1) / 2, (y0 + y1) / 2))
            window = (slice(None), slice(top, top + half), slice(left, left + half))
            if not torch.cat([masks[:n], masks[n + 1 :]])[window].any():
                windows[word].append(image[window])
        for top, left in ((0, 0), (0, half), (half, 0), (half, half)):
            window = (slice(None), slice(top, top + half), slice(left, left + half))
            if not masks[window].any():
                grounds.append(image[window])
    examples = {word: torch.stack(tiles[word][:most]) for word in words}
    negatives = {word: torch.cat([torch.stack(windows[word][:most]), examples[word]]) for word in words}
    return examples, {**negatives, "grounds": torch.stack(grounds[: 2 * most])}


def _mirrored(n: int, size: int) -> Tensor:
    """``size`` indices that run through 0 ... n - 1 forward and backward."""
    index = torch.arange(size) % (2 * n)
    return torch.where(index < n, index, 2 * n - 1 - index)


SECTIONS: Sequence[Callable[[CaptionedScenes, Path], list[DemoRow]]] = (
    few_shot,
    zero_shot,
    textures,
    words_and_grounds,
    rules_and_corrections,
)


def _row(method: str, model: str, question: str, maps: Tensor, masks: Tensor, picture: str) -> DemoRow:
    """A row on one region per image."""
    centre = center_gaussian(len(masks), (masks.shape[-2], masks.shape[-1]))
    return DemoRow(
        method, model, question, len(masks),
        nra=_mean(nra(maps, masks)), nra_centre=_mean(nra(centre, masks)), epg=_mean(epg(maps, masks)),
        specificity=None, picture=picture,
    )  # fmt: skip


def _concept_row(method: str, model: str, question: str, maps: Tensor, queries: Any, picture: str) -> DemoRow:
    """A row on all concepts that are present in the images."""
    masks = queries.masks[queries.presence]
    row = _row(method, model, question, maps[queries.presence], masks, picture)
    special = concept_specificity(maps, queries.masks)[queries.presence]
    return replace(row, specificity=_mean(special))


def _mean(values: Tensor) -> float:
    return round(float(values.nanmean()), 4)


def _picture(images: Tensor, explanation: ConceptExplanation, path: Path, title: str, **options: Any) -> str:
    from captum_concepts.visualization import panel, save_figure

    shown = explanation[:SHOWN]
    options.setdefault("class_names", shown.class_names or shown.concepts)
    save_figure(panel(shown, images[:SHOWN], top_k=4, title=title, **options), path)
    return path.name
