"""ConceptFusionMap against truth: regions on scenes with exact masks, contributions of a planted background.

    python -m benchmarks.run.ce_fam.scenes [--train 2500] [--epochs 8]

Two small networks learn the same classes, one from scenes whose ground is independent of the class, one from scenes
whose ground gives the class away (spurious=0.95). The translator is fitted to an ideal image-text model (which concepts
are in the scene), so that what is measured is the explanation. Held-out scenes, another seed.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.data.scenes import trained
from benchmarks.record import environment, write
from benchmarks.report import renderers
from benchmarks.run.map_tables import interval
from captum_concepts.activations import capture
from captum_concepts.attr.concept_fusion_map import ConceptFusionMap
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.metrics import concept_specificity, nra
from captum_concepts.metrics.baselines import activation_energy, center_gaussian
from captum_concepts.models import ConceptTranslator, fit_translator
from captum_concepts.models.concept_translator.data import TrainingPairs

LAYERS = ["2", "5", "8", "11"]
CHANNELS = [24, 48, 96, 128]
SIZE = 64


def network() -> nn.Sequential:
    parts: list[nn.Module] = []
    for before, after, stride in zip([3, *CHANNELS], CHANNELS, (2, 2, 1, 2), strict=False):
        parts += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS[-1], 6))


def train(images: Tensor, labels: Tensor, epochs: int, seed: int) -> nn.Sequential:
    """The network, from batches that are mirrored at random."""
    torch.manual_seed(seed)
    mirrored = lambda x: (x.flip(3) if torch.rand(()) < 0.5 else x) - 0.5  # noqa: E731
    return trained(network(), images, labels, epochs, augment=mirrored)


def explainer(model: nn.Module, scenes: Any, words: list[str], **options: Any) -> ConceptFusionMap:
    pooled = []
    with torch.no_grad():
        for part in (scenes.image - 0.5).split(128):
            pooled.append(torch.cat([m.mean((2, 3)) for m in capture(model, part, LAYERS).layers], 1))
    seen = scenes.presence.float()
    pairs = TrainingPairs([(torch.cat(pooled), seen - seen.mean(0))], CHANNELS)
    translator = ConceptTranslator(CHANNELS, len(words), hidden=(256, 256))
    text = torch.eye(len(words))
    fit_translator(translator, pairs, text=text, logit_scale=10.0, seed=0)
    return ConceptFusionMap(model, LAYERS, translator, words, text, logit_scale=10.0, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=2500)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--test", type=int, default=100)
    args = parser.parse_args()
    fair = CaptionedScenes(args.train, seed=0, size=SIZE)
    biased = CaptionedScenes(args.train, seed=1, size=SIZE, spurious=0.95)
    test = CaptionedScenes(args.test, seed=2, size=SIZE).stack()
    planted = CaptionedScenes(args.test, seed=3, size=SIZE, spurious=1.0).stack()
    words = list(fair.concepts)
    fair_scenes, biased_scenes = fair.stack(), biased.stack()
    record: dict[str, Any] = {"environment": environment(), "arguments": vars(args), "seeds": [0, 1, 2, 3]}
    models = {"unbiased": train(fair_scenes.image, fair_scenes.label, args.epochs, 0),
              "biased": train(biased_scenes.image, biased_scenes.label, args.epochs, 0)}  # fmt: skip
    for name, model in models.items():
        with torch.no_grad():
            right = (model(test.image - 0.5).argmax(1) == test.label).float().mean().item()
        fitted = explainer(model, fair_scenes, words)
        rows = range(len(planted.label))
        ground = torch.as_tensor(planted.ground)
        record[name] = {"accuracy_on_independent_grounds": right, "contributions": {}}
        # Without a limit 20 of the first layer's 24 channels are taken away, which is nearly everything.
        for setting, options in {
            "auto, K=20": {},
            "auto, K=20, no limit of channels": {"channel_share": 1.0},
            "last layer, K=20": {"map_layer": -1},
            "last layer, K=5": {"map_layer": -1, "n_channels": 5},
        }.items():
            cefam = ConceptFusionMap(
                model, LAYERS, fitted.translator, words, fitted.text_embeddings, logit_scale=10.0, **options
            )
            value = cefam.contributions(planted.image - 0.5, target=planted.label.tolist())
            first = (value.masked_fill(~planted.presence, -torch.inf).argmax(1) == ground).float()
            own = [value[i, list(fair.class_concepts[int(c)])].mean() for i, c in enumerate(planted.label)]
            evidence = value.masked_fill(~planted.presence, 0.0).sum(1)
            entry = {
                "ground_is_the_largest": first.mean().item(),
                "ground": value[rows, ground].mean().item(),
                "class_concepts": torch.stack(own).mean().item(),
                "sum_of_evidence": evidence.mean().item(),
            }
            record[name]["contributions"][setting] = entry
            print(name, right, setting, entry, flush=True)
    base = explainer(models["unbiased"], fair_scenes, words)
    x = test.image - 0.5
    with torch.no_grad():
        last = capture(models["unbiased"], x, LAYERS[-1:]).layers[0]
    n, t = test.presence.shape
    made = {"published map, top-1": {}, "branch": {"gradient": "branch"}, "fused": {"map_layer": "fused"},
            "fused, branch": {"map_layer": "fused", "gradient": "branch"}}  # fmt: skip
    maps = {}
    for name, options in made.items():
        same = ConceptFusionMap(base.forward_func, LAYERS, base.translator, words, base.text_embeddings,
                                logit_scale=10.0, **options)  # fmt: skip
        maps[name] = same.attribute(x)
    energy = activation_energy(last)
    maps["activation energy"] = energy.reshape(n, 1, *energy.shape[-2:]).expand(-1, t, -1, -1)
    maps["centre Gaussian"] = center_gaussian(1, (32, 32)).reshape(1, 1, 32, 32).expand(n, t, -1, -1)
    maps["random"] = torch.rand(n, t, 8, 8, generator=torch.Generator().manual_seed(0))
    record["regions"] = {}
    groups = {"all": list(range(t)), **{k: [words.index(w) for w in v] for k, v in fair.concept_groups.items()}}
    for name, value in maps.items():
        scores = {"nra": nra(value, test.masks), "specificity": concept_specificity(value, test.masks)}
        of_image = torch.arange(n).repeat_interleave(t)
        entry: dict[str, Any] = {key: interval(one.flatten(), of_image) for key, one in scores.items()}
        entry["nra_by_kind"] = {k: float(scores["nra"][:, v].nanmean()) for k, v in groups.items()}
        record["regions"][name] = entry
    write("ce_fam_scenes", record)
    print("\n".join(renderers.truth(record)))


if __name__ == "__main__":
    main()
