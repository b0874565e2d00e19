"""Does an audit find the planted shortcuts, all of them, and nothing else? Needs no data.

    python -m benchmarks.run.audit.shortcuts [--images 800] [--resamples 40] [--cases ground-ce-fam ...]

Networks that were trained on scenes with a planted shortcut are audited on scenes without it: grounds (the bundled
biased classifier, by ConceptFusionMap, SpatialACV and SALFCBM; another network with other pairs), a color, a texture of
some object, and a mark in a corner. The words come from the bundled image-text model or from examples, nothing is told
about the shortcuts. Each network has a counterpart without shortcut, whose audits of resampled images should find
nothing. ``oracle`` is the same audit by the exact presence of each concept.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.data.scenes import crops, trained
from benchmarks.record import RESULTS, environment, table, write
from benchmarks.run.ce_fam.scenes import network
from benchmarks.run.salf_cbm.scenes import fit
from captum_concepts import ConceptFusionMap, SpatialACV, audit_dataset, demo
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.demo.run import texture_guidance
from captum_concepts.explanation import ConceptExplanation
from captum_concepts.vlm import RegionPrompt

SIZE, SEED = 64, 60_001
RESNET, SMALL = ["layer2", "layer3", "layer4"], ["2", "5", "8", "11"]
#: Class by class: the planted ground (not the bundled networks'), another object's color, its texture.
PAIRS = {
    "ground": {"red circle": "snow", "striped circle": "wood", "red square": "sand", "striped square": "water",
               "blue triangle": "brick", "dotted star": "grass"},
    "color": {"blue triangle": "orange", "dotted star": "purple", "red circle": "green"},
    "texture": {"red circle": "checkered", "blue triangle": "striped", "red square": "dotted"},
    "mark": {"blue triangle": "mark", "striped circle": "mark"},
}  # fmt: skip


class Split(NamedTuple):
    """Images, labels, and which concepts (the 21 words, or with the mark 22) they show."""

    images: Tensor
    labels: Tensor
    presence: Tensor
    concepts: list[str]
    classes: list[str]

    def rows(self, index: Tensor) -> Split:
        return self._replace(images=self.images[index], labels=self.labels[index], presence=self.presence[index])


@functools.cache
def split(n: int, seed: int, *, shortcut: str | None = None, rate: float = 0.0, marked: bool = False) -> Split:
    """Scenes in which each class shows its planted concept with probability ``rate``, other classes with 1 - ``rate``;
    with ``rate`` 0 as they come (a mark in half of them).
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = PAIRS[shortcut] if shortcut is not None and rate else {}
    chosen = shortcut in ("color", "texture") and bool(pairs)
    data = CaptionedScenes(12 * n if chosen else n, seed=seed, size=SIZE)
    index = list(range(n))
    if chosen:  # scenes are chosen, not changed: shape, color and texture of an object belong together
        wanted = torch.rand(len(data), generator=generator) < rate
        fits = torch.ones(len(data), dtype=torch.bool)
        for word in set(pairs.values()):
            own = torch.tensor([pairs.get(name) == word for name in data.classes])[data.labels]
            defined = torch.tensor([word in name.split() for name in data.classes])[data.labels]
            shown = data.presence[:, data.concepts.index(word)]
            fits &= (shown == (own == wanted)) | defined
        index = fits.nonzero().flatten()[:n].tolist()
    scenes = []
    for i in index:
        scene = data[i]
        if shortcut == "ground" and pairs and float(torch.rand((), generator=generator)) < rate:
            scene = data.draw(i, ground=pairs[data.classes[scene.label]])
        scenes.append((scene.image, scene.label, scene.presence))
    images, labels, presence = (torch.stack([torch.as_tensor(scene[k]) for scene in scenes]) for k in range(3))
    concepts = list(data.concepts)
    if marked:
        own = torch.tensor([name in PAIRS["mark"] for name in data.classes])[labels]
        chance = torch.where(own, rate, 1 - rate) if rate else torch.full((len(index),), 0.5)
        with_mark = torch.rand(len(index), generator=generator) < chance
        images[with_mark] = mark(images[with_mark])
        presence, concepts = torch.cat([presence, with_mark[:, None]], 1), [*concepts, "mark"]
    return Split(images, labels, presence, concepts, list(data.classes))


def mark(images: Tensor) -> Tensor:
    """A small magenta cross with a black rim in the lower right corner."""
    marked = images.clone()
    color = torch.tensor([0.9, 0.1, 0.9])[:, None, None]
    marked[:, :, -9:-1, -9:-1] = 0.05
    marked[:, :, -6:-4, -8:-2] = color
    marked[:, :, -8:-2, -6:-4] = color
    return marked


def train(known: Split, epochs: int, seed: int) -> nn.Sequential:
    """A small convolutional network; cropped by up to 4 pixels at random, not mirrored."""
    torch.manual_seed(seed)
    shifted = lambda x: x.roll(torch.randint(-4, 5, (2,)).tolist(), (2, 3)) - 0.5  # noqa: E731
    return trained(network(), known.images, known.labels, epochs, augment=shifted).requires_grad_(False)


class Shifted(nn.Module):
    """Takes RGB in [0, 1]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - 0.5)


def _key(image: Tensor) -> bytes:
    return image.numpy().tobytes()


class Known(nn.Module):
    """What was computed of each image before, so that many audits of the same images cost one."""

    def __init__(self, images: Tensor, rows: Tensor) -> None:
        super().__init__()
        self._rows = {_key(x): row for x, row in zip(images, rows, strict=True)}

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([self._rows[_key(x)] for x in inputs])


class Reader:
    """What and where alone, from tables: an audit without the ablations of each image."""

    def __init__(self, concepts: list[str], model: Known, scores: Known, presence: Known | None) -> None:
        self.concepts, self.forward_func, self._scores, self._presence = concepts, model, scores, presence

    @classmethod
    def of(cls, explainer: Any, known: Split) -> Reader:
        model = getattr(explainer, "forward_func", explainer)
        made = [[], [], []]
        with torch.no_grad():
            for part in known.images.split(100):
                made[0].append(model(part))
                made[1].append(explainer.scores(part))
                made[2].append(getattr(explainer, "presence", lambda _: None)(part) if not _salf(explainer) else None)
        logits, scores = (Known(known.images, torch.cat(column)) for column in made[:2])
        presence = None if made[2][0] is None else Known(known.images, torch.cat(made[2]))
        return cls(list(explainer.concepts), logits, scores, presence)

    @classmethod
    def exact(cls, explainer: Any, known: Split) -> Reader:
        """Knows which concepts an image shows."""
        model = getattr(explainer, "forward_func", explainer)
        with torch.no_grad():
            logits = torch.cat([model(part) for part in known.images.split(100)])
        shown = Known(known.images, known.presence.float())
        return cls(known.concepts, Known(known.images, logits), shown, shown)

    def scores(self, inputs: Any) -> Tensor:
        return self._scores(inputs)

    def presence(self, inputs: Any) -> Tensor | None:
        return None if self._presence is None else self._presence(inputs)

    def concept_maps(self, inputs: Any, concepts: Any = None) -> Tensor:  # noqa: ARG002
        return torch.zeros(len(inputs), 1, 1, 1)

    def explain(self, inputs: Any, target: Any = None, **options: Any) -> ConceptExplanation:
        raise NotImplementedError("an audit of what and where alone needs none")


def _salf(explainer: Any) -> bool:
    """A SALFCBM, which fit_salf_cbm leaves uncalibrated."""
    return not hasattr(explainer, "forward_func")


def words(model: nn.Module, layers: list[str], images: int) -> ConceptFusionMap:
    """All 21 words, from unlabeled scenes without shortcut."""
    data = CaptionedScenes(images, seed=SEED, size=SIZE)
    cefam = ConceptFusionMap(model, layers, map_layer=-1, batch_size=100)
    return cefam.fit(data.stack().image, demo.load("clip"), data.concepts)


def vectors(model: nn.Module, layer: str, *, marked: bool) -> SpatialACV:
    """From crops of objects and of grounds, tiles of textures, and corners with the mark; each against the others.

    The negatives of :func:`texture_guidance` are for textures alone: they show shapes, colors and grounds. What was
    learned from crops is too low for a whole image of which the concept is a small part, so presence is calibrated.
    """
    data = CaptionedScenes(300, seed=SEED + 1, size=SIZE)
    known = data.stack()
    tiles, _ = texture_guidance(data)
    examples = {}
    for t, word in enumerate(data.concepts):
        if word not in data.concept_groups["ground"]:
            examples[word] = tiles[word] if word in tiles else crops(known, t)
            continue
        corners = [(y, x) for y in (0, 40) for x in (0, 40)]
        whole = [
            image[:, y : y + 24, x : x + 24]
            for image, mask in zip(known.image, known.masks[:, t], strict=True)
            for y, x in corners
            if mask[y : y + 24, x : x + 24].all()
        ]
        examples[word] = F.interpolate(torch.stack(whole[:40]), (32, 32), mode="bilinear")
    if not marked:
        return calibrated(SpatialACV(model, layer, batch_size=100).fit(examples), marked=False)
    # Corners with the mark; images like those to be explained, without it, tell what it is not.
    corners = F.interpolate(mark(known.image)[:60, :, -12:, -12:], (16, 16), mode="bilinear")
    examples = {word: examples[word] for word in data.concept_groups["ground"]} | {"mark": corners}
    return calibrated(SpatialACV(model, layer, batch_size=100).fit(examples, known.image[60:]), marked=True)


def calibrated(explainer: Any, *, marked: bool) -> Any:
    """By 100 labeled scenes."""
    known = split(100, SEED + 13, marked=marked)
    columns = [known.concepts.index(word) for word in explainer.concepts]
    return explainer.calibrate(known.images, known.presence[:, columns].bool())


def pairs_of(audit: Any) -> list[list[Any]]:
    """Class, concept, effect, adjusted p, confirmed."""
    return [
        [s.class_name, s.concept, round(s.effect.value, 4), float(f"{s.p:.3g}"), s.confirmed] for s in audit.suspects()
    ]


def judged(found: Sequence[Sequence[Any]], planted: set[tuple[str, str]], true: set[tuple[str, str]]) -> dict[str, Any]:
    """Recall of the planted pairs, precision by these, and by all that the exact presence finds."""
    pairs = {(row[0], row[1]) for row in found}
    share = lambda part: len(part) / len(pairs) if pairs else None  # noqa: E731
    return {
        "found": len(pairs),
        "planted_found": len(pairs & planted),
        "planted": len(planted),
        "precision": share(pairs & planted),
        "precision_by_exact_presence": share(pairs & (planted | true)),
        "suspects": [list(row) for row in found],
    }


def audited(name: str, explainer: Any, known: Split, planted: set[tuple[str, str]]) -> dict[str, Any]:
    """One audit with everything, and the oracle's."""
    start = time.perf_counter()
    given = {"labels": known.labels, "class_names": known.classes, "batch_size": 100}
    audit = audit_dataset(explainer, known.images, top_k=1, **given)
    exact = audit_dataset(Reader.exact(explainer, known), known.images, n_bootstrap=0, **given)
    true = {(row[0], row[1]) for row in pairs_of(exact)}
    entry = judged(pairs_of(audit), planted, true) | {
        "oracle": pairs_of(exact),
        "not_told_apart": audit.not_told_apart,
        "accuracy": audit.accuracy,
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(name, {k: v for k, v in entry.items() if k not in ("suspects", "oracle")}, flush=True)
    for row in entry["suspects"]:
        print("   ", row, "" if (row[0], row[1]) in planted else "NOT PLANTED", flush=True)
    print("    oracle", entry["oracle"], flush=True)
    return entry


def resampled(explainer: Any, known: Split, count: int, images: int) -> dict[str, Any]:
    """How many of ``count`` audits of ``images`` drawn images find anything."""
    generator = torch.Generator().manual_seed(SEED)
    reader = Reader.of(explainer, known)
    found = []
    for k in range(count):
        part = known.rows(torch.randperm(len(known.labels), generator=generator)[:images])
        audit = audit_dataset(
            reader, part.images, labels=part.labels, class_names=part.classes, n_bootstrap=0, seed=k, batch_size=100
        )
        found.append([[s.class_name, s.concept] for s in audit.suspects()])
    none = sum(not one for one in found)
    print(f"    without suspects: {none} of {count}", [one for one in found if one], flush=True)
    return {"audits": count, "without_suspects": none, "share": none / count, "found": [one for one in found if one]}


def salf(model: nn.Module, spurious: float) -> Any:
    """A SALFCBM of the bundled network."""
    data = CaptionedScenes(400, seed=SEED + 2, size=SIZE, spurious=spurious)
    known = data.stack()
    with tempfile.TemporaryDirectory() as folder:
        return fit(
            Path(folder), "scenes", model, known, data.concepts, RegionPrompt("circle", (7, 7)),
            class_names=data.classes, nonzeros_per_class=10, bottleneck={"max_epochs": 40},
        )  # fmt: skip


def case(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Biased and unbiased network of one case."""
    kind, method = name.split("-", 1)
    bundled = kind == "bundled"
    marked = kind == "mark"
    test = split(args.images, SEED + 10, marked=marked)
    pool = split(args.pool, SEED + 11, marked=marked)
    data = CaptionedScenes(1, seed=0, size=SIZE)
    if bundled:
        models = [demo.load("classifier-spurious"), demo.load("classifier")]
        own = dict(zip(data.classes, (data.concepts[k] for k in data.planted_grounds), strict=True))
    else:
        known = split(args.train, SEED + 12, shortcut=kind, rate=0.9, marked=marked)
        fair = split(args.train, SEED + 12, marked=marked)
        models = [Shifted(train(part, args.epochs, 0)).eval() for part in (known, fair)]
        own = PAIRS[kind]
    entry: dict[str, Any] = {"pairs": own}
    for which, model in zip(("biased", "unbiased"), models, strict=True):
        if method == "salf":
            explainer = salf(model, 0.9 if which == "biased" else 0.0)
        elif method == "sacv":
            explainer = vectors(model, "layer3" if bundled else "net.8", marked=marked)
        else:
            layers = RESNET if bundled else [f"net.{layer}" for layer in SMALL]
            explainer = words(model, layers, args.words)
            explainer = calibrated(explainer, marked=False) if method == "ce-fam-calibrated" else explainer
        planted = set(own.items()) if which == "biased" else set()
        entry[which] = audited(f"{name}, {which}", explainer, test, planted)
        if which == "unbiased":
            entry["resampled"] = resampled(explainer, pool, args.resamples, args.images)
        else:  # the same pairs again, from other images?
            entry["resampled_biased"] = resampled(explainer, pool, args.repeats, args.images)
    return entry


CASES = ["bundled-ce-fam", "bundled-sacv", "bundled-salf", "ground-ce-fam", "color-ce-fam", "texture-ce-fam",
         "color-ce-fam-calibrated", "texture-ce-fam-calibrated", "color-sacv", "texture-sacv", "mark-sacv"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--pool", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--words", type=int, default=1000, help="scenes that the words are learned from")
    parser.add_argument("--train", type=int, default=3000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    args = parser.parse_args()
    path = RESULTS / "audit_shortcuts.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"cases": {}}
    arguments = {key: value for key, value in vars(args).items() if key != "cases"}
    for name in args.cases:  # one that is recorded again takes its old place
        found = case(name, args)
        record["cases"][name] = {"environment": environment("open-clip-torch"), "arguments": arguments, **found}
        write("audit_shortcuts", record)
    rows = [
        [name, f"{one['biased']['planted_found']} of {one['biased']['planted']}", one["biased"]["precision"],
         one["biased"]["precision_by_exact_presence"], one["resampled"]["share"]]
        for name, one in record["cases"].items()
    ]  # fmt: skip
    print(table(["case", "planted found", "precision", "by exact presence", "audits without suspects"], rows))


if __name__ == "__main__":
    main()
