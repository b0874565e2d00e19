"""Does taking the suspects away repair as much as taking the planted pairs away? Needs no data.

    python -m benchmarks.run.audit.removal [--train 400] [--test 800]

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
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import environment, table, write
from benchmarks.report.cells import bracketed
from benchmarks.run.salf_cbm.planted import repaired, right
from benchmarks.run.salf_cbm.scenes import batched, fit
from captum_concepts import audit_dataset, demo
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.models.salf_cbm.fit import refit_head
from captum_concepts.vlm import RegionPrompt

SIZE, SEED = 64, 61_001


def scenes(n: int, seed: int, spurious: float) -> Any:
    return CaptionedScenes(n, seed=seed, size=SIZE, spurious=spurious).stack()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=400)
    parser.add_argument("--test", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=40)
    args = parser.parse_args()
    backbone = demo.load("classifier-spurious")
    data = CaptionedScenes(1, seed=0, size=SIZE)
    known = scenes(args.train, SEED, 0.9)
    with tempfile.TemporaryDirectory() as folder:
        model = fit(
            Path(folder), "biased", backbone, known, data.concepts, RegionPrompt("circle", (7, 7)),
            class_names=data.classes, nonzeros_per_class=10, bottleneck={"max_epochs": args.epochs},
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
    before = batched(model, test.image)
    ground = torch.tensor([data.planted_grounds.index(int(k)) for k in test.ground])
    record: dict[str, Any] = {
        "arguments": vars(args),
        "pairs": {name: [list(pair) for pair in found] for name, found in pairs.items()},
        "before": {
            "independent": right(before, test.label),
            "planted": right(batched(model, planted.image), planted.label),
        },
        "after": {},
    }
    rows = []
    for name, found in pairs.items():
        concepts = sorted({concept for _, concept in found})
        ways = {"pairs": model.with_edits([{"target": c, "concept": t, "weight": 0.0} for c, t in found])}
        ways["concepts"] = model.without(concepts)
        ways["refitted"] = refit_head(ways["concepts"], known.image, known.label, nonzeros_per_class=10)
        for way, edited in ways.items():
            entry: dict[str, Any] = {
                "independent": repaired(before, batched(edited, test.image), test.label, ground),
                "planted": right(batched(edited, planted.image), planted.label),
            }
            record["after"][f"{name}, {way}"] = entry
            rows.append([name, way, *map(bracketed, entry["independent"].values()), bracketed(entry["planted"])])
    head = ["accuracy", "planted errors repaired", "wrong repaired", "right broken", "accuracy, planted"]
    print(table(["removed", "how", *head], rows))
    record["environment"] = environment("open-clip-torch")
    write("audit_removal", record)


if __name__ == "__main__":
    main()
