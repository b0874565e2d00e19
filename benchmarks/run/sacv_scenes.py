"""SpatialACV against planted truth on scenes: is it the stripes, is the texture there, and where.

    python -m benchmarks.run.sacv_scenes [--images 120] [--train 2400]

Two networks are trained here, from the bundled classifier's weights. The classes of one *are* textures (of scenes that
show one kind besides plain, or none): the texture of an image's class is what decides it. The classes of the other are
grounds: no texture decides them. Both are asked by ``SpatialACV.evidence`` which texture decides the class they predict
rightly. Presence and concept maps are those of the bundled classifier. Guidance images are mirrored tiles of objects of
other scenes; negatives are objects of the other textures with their surroundings, and grounds. Needs no data.
"""

from __future__ import annotations

import argparse
import copy
import functools
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.data.scenes import trained
from benchmarks.peers import maps as peers
from benchmarks.record import environment, table, write
from benchmarks.run.map_tables import interval, measure, pairs
from captum_concepts import SpatialACV, demo
from captum_concepts.datasets import CaptionedScenes, Scene
from captum_concepts.demo.run import texture_guidance

SEED = 610_001
SIZE = 64
LAYERS = ("layer2", "layer3")
DIRECTION, FILTER = (
    0.3,
    0.003,
)  # penalties: the concept's own direction (the default), or what tells textures apart best


def textures(data: CaptionedScenes) -> list[str]:
    return data.concept_groups["texture"]


def texture_labels(data: CaptionedScenes, scenes: Scene) -> Tensor:
    """The one texture besides plain that a scene shows, or plain; -1 where there are several."""
    words = textures(data)
    shown = scenes.presence[:, [data.concepts.index(w) for w in words]].clone()
    plain = words.index("plain")
    shown[:, plain] = False
    labels = torch.where(shown.any(1), shown.float().argmax(1), torch.tensor(plain))
    return labels.masked_fill(shown.sum(1) > 1, -1)


def ground_labels(data: CaptionedScenes, scenes: Scene) -> Tensor:
    columns = [data.concepts.index(w) for w in data.concept_groups["ground"]]
    return torch.tensor([columns.index(int(g)) for g in scenes.ground])


def trained_on(images: Tensor, labels: Tensor, classes: int, epochs: int) -> nn.Module:
    """The bundled classifier, with another head, trained on."""
    torch.manual_seed(SEED)
    net = demo.load("classifier").requires_grad_(True).train()
    net.fc = nn.Linear(net.fc.in_features, classes)
    return trained(net, images, labels, epochs, lr=2e-3, weight_decay=0.01).requires_grad_(False)


@functools.cache
def fitted(net: nn.Module, layer: str, known: CaptionedScenes, lam: float) -> SpatialACV:
    return SpatialACV(net, layer).fit(*guidance(known), n_random=20 if lam == DIRECTION else 0, lam=lam)


guidance = functools.cache(texture_guidance)


def decided(net: nn.Module, layer: str, known: CaptionedScenes, images: Tensor, labels: Tensor) -> Any:
    """Which texture the evidence puts first, for images that the network classifies rightly."""
    right = torch.cat([net(part).argmax(1) for part in images.split(64)]) == labels
    acv = fitted(net, layer, known, DIRECTION)
    return acv.evidence(images[right]), labels[right], float(right.float().mean())


def evidence_rows(data: CaptionedScenes, nets: dict[str, Any]) -> list[dict[str, Any]]:
    words, rows = textures(data), []
    for name, (net, images, labels) in nets.items():
        for layer in LAYERS:
            found, truth, accuracy = decided(net, layer, data, images, labels)
            first = found.first()
            largest = [found.concepts[k] for k in found.effects.argmax(1).tolist()]
            shared: dict[str, Any] = {"classes": name, "layer": layer, "accuracy": accuracy}
            if name == "grounds":
                none = torch.tensor([float(one is None) for one in first])
                rows.append({**shared, "class": "all", "images": len(first), "nothing claimed": interval(none)})
                continue
            right = [words[t] for t in truth.tolist()]
            hit = torch.tensor([float(one == word) for one, word in zip(first, right, strict=True)])
            wrong = torch.tensor([float(one not in (None, word)) for one, word in zip(first, right, strict=True)])
            most = torch.tensor([float(one == word) for one, word in zip(largest, right, strict=True)])
            for of in [*words, "all"]:
                own = torch.ones(len(hit), dtype=torch.bool) if of == "all" else truth == words.index(of)
                rows.append({
                    **shared, "class": of, "images": int(own.sum()),
                    "right texture claimed first": interval(hit[own]),
                    "another claimed": interval(wrong[own]),
                    "largest effect is the right one's": interval(most[own]),
                })  # fmt: skip
    return rows


def presence_rows(net: nn.Module, data: CaptionedScenes, scenes: Scene) -> list[dict[str, Any]]:
    """Brier scores of ``scores`` beside those of the constant that is best for these very scenes."""
    rows = []
    truth = scenes.presence[:, [data.concepts.index(w) for w in textures(data)]].float()
    constant = (truth.mean(0) - truth).square()
    for layer, lam in ((layer, lam) for layer in LAYERS for lam in (DIRECTION, FILTER)):
        scores = fitted(net, layer, data, lam).scores(scenes.image)
        for k, word in [*enumerate(textures(data)), (slice(None), "all")]:
            score = (scores[:, k] - truth[:, k]).square().reshape(len(truth), -1).mean(1)
            other = constant[:, k].reshape(len(truth), -1).mean(1)
            rows.append({
                "layer": layer, "penalty": lam, "texture": word, "shown": float(truth[:, k].mean()),
                "Brier score": interval(score), "of the best constant": float(other.mean()),
                "difference": interval(score - other),
            })  # fmt: skip
    return rows


def where(net: nn.Module, layer: str, data: CaptionedScenes, scenes: Scene) -> dict[str, Any]:
    columns = [data.concepts.index(w) for w in textures(data)]
    items = []
    for image, masks, presence in zip(scenes.image, scenes.masks, scenes.presence, strict=True):
        items.append((image, [(k, masks[c]) for k, c in enumerate(columns) if presence[c]]))
    regions = pairs([item for item in items if item[1]], len(columns), SEED)

    def maps(lam: float, refine: bool = False) -> Any:
        acv = copy.copy(fitted(net, layer, data, lam))
        acv.refine = refine
        return lambda x, target: acv.concept_maps(x)[torch.arange(len(x)), target]

    explainers = {
        "SpatialACV": maps(lam=DIRECTION),
        "SpatialACV, refined": maps(lam=DIRECTION, refine=True),
        f"SpatialACV, lam={FILTER}": maps(lam=FILTER),
        f"SpatialACV, lam={FILTER}, refined": maps(lam=FILTER, refine=True),
    }
    blind = {"activation energy, refined": peers.refined_energy(net, layer)}
    note = f"Concept maps of textures in {layer} of the bundled classifier; truth: all objects of the texture."
    energy = peers.activations(net, layer)
    title = f"where the texture is, {layer}"
    return measure(title, note, explainers, regions, energy=energy, blind=blind, degrade="SpatialACV, refined").record()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=120, help="scenes that are asked about")
    parser.add_argument("--train", type=int, default=2400, help="scenes that the two networks are trained on")
    parser.add_argument("--epochs", type=int, default=8, help="of the network whose classes are textures")
    args = parser.parse_args()
    start = time.perf_counter()
    training = CaptionedScenes(args.train, seed=SEED, size=SIZE).stack()
    data = CaptionedScenes(500, seed=SEED + 1, size=SIZE)
    scenes = CaptionedScenes(args.images, seed=SEED + 2, size=SIZE).stack()
    labels, asked = texture_labels(data, training), texture_labels(data, scenes)
    one, few = labels >= 0, asked >= 0
    texture_net = trained_on(training.image[one], labels[one], len(textures(data)), args.epochs)
    ground_net = trained_on(training.image, ground_labels(data, training), len(data.concept_groups["ground"]), 3)
    print(f"trained in {time.perf_counter() - start:.0f} s", flush=True)
    nets = {
        "textures": (texture_net, scenes.image[few], asked[few]),
        "grounds": (ground_net, scenes.image, ground_labels(data, scenes)),
    }
    bundled = demo.load("classifier")
    tables = [
        {
            "title": "is it the texture?",
            "note": "Classes that are textures: the right one should be claimed first. Classes that are grounds: no "
            "texture should be claimed. Images that the network classifies rightly.",
            "rows": evidence_rows(data, nets),
        },
        {
            "title": "is the texture there?",
            "note": "The bundled classifier. The constant is the best for these scenes: their own rate.",
            "rows": presence_rows(bundled, data, scenes),
        },
        *(where(bundled, layer, data, scenes) for layer in LAYERS),
    ]
    for one_table in tables[:2]:
        keys = list(dict.fromkeys(key for row in one_table["rows"] for key in row))
        print(table(keys, [[row.get(key, "") for key in keys] for row in one_table["rows"]]))
    part = {
        "environment": environment(),
        "arguments": {**vars(args), "seed": SEED},
        "seconds": time.perf_counter() - start,
        "tables": tables,
    }
    print(f"written to {write('sacv_scenes', {'parts': {'scenes': part}}).name}")


if __name__ == "__main__":
    main()
