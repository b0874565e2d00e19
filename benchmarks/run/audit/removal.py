"""Does taking the suspects away repair as much as taking the planted pairs away? Needs no data.

    python -m benchmarks.run.audit.removal [--train 400] [--test 1000]

A SALFCBM is fitted over the bundled biased classifier to scenes whose ground gives the class away, and audited on
scenes where it does not. Its suspects are taken out of its head in three ways, and so are the planted pairs (the
oracle):

- *pairs*: each suspected concept loses its weight for the suspected class;
- *concepts*: the suspected concepts lose all weights (``without``);
- *refitted*: then the head is fitted again to the same biased scenes (``refit_head``).

Counted on other scenes, with independent and with planted grounds.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import environment, table, write
from captum_concepts import audit_dataset, demo, fit_salf_cbm
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.models.salf_cbm.fit import refit_head
from captum_concepts.vlm import RegionPrompt

SIZE, SEED = 64, 61_001


def scenes(n: int, seed: int, spurious: float) -> Any:
    return CaptionedScenes(n, seed=seed, size=SIZE, spurious=spurious).stack()


@torch.no_grad()
def predicted(model: Any, images: Tensor) -> Tensor:
    return torch.cat([model(part) for part in images.split(100)]).argmax(1)


def counted(before: Tensor, after: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, and shares of the wrong ones made right and of the right ones made wrong."""
    was, now = before == labels, after == labels
    return {
        "accuracy": float(now.double().mean()),
        "repaired": float(now[~was].double().mean()),
        "broken": float((~now[was]).double().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=400)
    parser.add_argument("--test", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=40)
    args = parser.parse_args()
    backbone, clip = demo.load("classifier-spurious"), demo.load("clip")
    data = CaptionedScenes(1, seed=0, size=SIZE)
    known = scenes(args.train, SEED, 0.9)
    with tempfile.TemporaryDirectory() as folder:
        model = fit_salf_cbm(
            backbone, "layer4", (known.image, known.label), clip, data.concepts, 6, store_path=folder,
            prompt=RegionPrompt("circle", (7, 7)), class_names=data.classes, presence_cutoff=None,
            interpretability_cutoff=None, nonzeros_per_class=10, bottleneck={"max_epochs": args.epochs},
            prompt_batch_size=98, batch_size=80,
        )  # fmt: skip
    audited, test, planted = (
        scenes(n, SEED + k, rate) for k, (n, rate) in enumerate([(args.test, 0), (args.test, 0), (args.test, 1)], 1)
    )
    audit = audit_dataset(model, audited.image, labels=audited.label, batch_size=100)
    pairs = {
        "suspects": [(s.class_name, s.concept) for s in audit.suspects()],
        "oracle": [(name, data.concepts[k]) for name, k in zip(data.classes, data.planted_grounds, strict=True)],
    }
    print("suspects", pairs["suspects"], flush=True)
    before = {"independent": predicted(model, test.image), "planted": predicted(model, planted.image)}
    record: dict[str, Any] = {
        "arguments": vars(args),
        "pairs": {name: [list(pair) for pair in found] for name, found in pairs.items()},
        "before": {
            "independent": float((before["independent"] == test.label).double().mean()),
            "planted": float((before["planted"] == planted.label).double().mean()),
        },
        "after": {},
    }
    rows = []
    for name, found in pairs.items():
        concepts = sorted({concept for _, concept in found})
        ways = {"pairs": model.with_edits([{"target": c, "concept": t, "weight": 0.0} for c, t in found])}
        ways["concepts"] = model.without(concepts)
        ways["refitted"] = refit_head(ways["concepts"], known.image, known.label, nonzeros_per_class=10)
        for way, repaired in ways.items():
            entry = {
                split: counted(before[split], predicted(repaired, part.image), part.label)
                for split, part in (("independent", test), ("planted", planted))
            }
            record["after"][f"{name}, {way}"] = entry
            rows.append([name, way, *entry["independent"].values(), entry["planted"]["accuracy"]])
    print(table(["removed", "how", "accuracy", "repaired", "broken", "accuracy, planted"], rows))
    record["environment"] = environment("open-clip-torch")
    write("audit_removal", record)


if __name__ == "__main__":
    main()
