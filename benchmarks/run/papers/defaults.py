"""What every default that differs from its paper gains: both settings on the same scenes, with the bundled models.

    python -m benchmarks.run.papers.defaults [--train 600] [--test 100] [--parts ce-fam sacv salf-cbm metrics]

Writes ``results/defaults.json``, and the table of ``docs/published.md`` between its two marks. The settings of the
papers are those of ``captum_concepts.published``.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.data.salf_cbm import scenes
from benchmarks.record import RESULTS, ROOT, environment, table, write
from benchmarks.report.cells import bracketed
from benchmarks.run.map_tables import interval
from captum_concepts import ConceptFusionMap, SpatialACV, demo, fit_salf_cbm, metrics, published
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.metrics import ConceptAUROC
from captum_concepts.vlm import RegionPrompt

PAGE = ROOT / "docs" / "published.md"
MARK = re.compile(r"(?<=<!-- defaults -->\n).*?(?=<!-- /defaults -->)", flags=re.DOTALL)
Row = dict[str, Any]
NOTE = "The same scenes and bundled models for both settings; differences are paired."
#: Seed of the scenes whose corners show a ground alone.
GUIDANCE = 510_004
LAYERS = ["layer2", "layer3", "layer4"]


def row(method: str, option: str, default: str, paper: str, measure: str, ours: Tensor, theirs: Tensor) -> Row:
    """One line of the table; a paired difference with its interval over images."""
    found: Row = {"method": method, "option": option, "default": default, "paper": paper, "measure": measure}
    ours, theirs = ours.float(), theirs.float()
    for name, values in (("ours", ours), ("published", theirs), ("difference", ours - theirs)):
        found[name] = interval(values)
    print({k: [round(x, 3) for x in v] if isinstance(v, list) else v for k, v in found.items()}, flush=True)
    return found


def mean_of_present(values: Tensor, there: Tensor) -> Tensor:
    """``(N,)``: each image's mean over the concepts that it shows."""
    return torch.stack([v[yes].nanmean() for v, yes in zip(values, there, strict=True)])


def ce_fam(train: Any, test: Any, data: Any) -> list[Row]:
    """Words that are right, and contributions of the words that make the class."""
    model, clip, words = demo.load("classifier"), demo.load("clip"), data.concepts
    there = test.presence.bool()

    def fitted(**options: Any) -> ConceptFusionMap:
        return ConceptFusionMap(model, LAYERS).fit(train.image, clip, words, **options)

    def right(cefam: ConceptFusionMap) -> Tensor:
        return ConceptAUROC().per_example(cefam.scores(test.image), there)

    ours = fitted()
    paper = fitted(**{"crops": 0, **published.CONCEPT_FUSION_FIT})
    what = "AUROC: scores of words in the image above the others'"
    recipes = "crops; a start from examples, AdamW", "no crops; SGD"
    maps = [cefam.concept_maps(test.image) for cefam in (ours, paper)]  # the published ones
    found = [
        row("CE-FAM", "training=", *recipes, what,
            right(ours.with_options(calibrated=False)), right(paper.with_options(calibrated=False))),
        row("CE-FAM", "training=", *recipes, "NRA (exact) of the published map, top-1",
            *(mean_of_present(metrics.nra(m, test.masks, baseline="exact"), there) for m in maps)),
        row("CE-FAM", "calibrated=", "True", "False", what, right(ours),
            right(ours.with_options(calibrated=False))),
    ]  # fmt: skip
    of_class = torch.tensor([[word in data.classes[c].split() for word in words] for c in test.label.tolist()])
    shares = []
    for option in (None, 1.0):
        counted = ours.with_options(channel_share=option).contributions(test.image, test.label)
        shares.append(ConceptAUROC().per_example(counted, of_class))
    found.append(
        row("CE-FAM", "channel_share=", "a quarter of the layer", "20 channels, however few there are",
            "AUROC: contributions of the words that make the class above the others'", *shares)
    )  # fmt: skip
    return found


def sacv(_train: Any, test: Any, data: Any) -> list[Row]:
    """Maps of grounds and patterns learned from patches that show nothing else."""
    model, size = demo.load("classifier"), 24
    names = [name for name in data.concept_groups["ground"] if name in data.concepts]
    others = CaptionedScenes(20 * len(names), seed=GUIDANCE, size=test.image.shape[2])
    guidance = {
        name: torch.stack([others.draw(20 * k + i, ground=name).image[:, :size, :size] for i in range(20)])
        for k, name in enumerate(names)
    }
    columns = [data.concepts.index(name) for name in names]
    masks, there = test.masks[:, columns], test.presence.bool()[:, columns]
    values = []
    for options in ({}, published.SPATIAL_ACV_FIT):
        maps = SpatialACV(model, "layer2").fit(guidance, **options).concept_maps(test.image)
        values.append(mean_of_present(metrics.nra(maps, masks, baseline="exact"), there))
    return [
        row("SACV", "lam=", "0.3, on standardized features", "scikit-learn's C=1", "NRA (exact) of the map", *values)
    ]


def salf_cbm(train: Any, test: Any, data: Any) -> list[Row]:
    """Maps, training and regions of a bottleneck."""
    model, clip, there = demo.load("classifier"), demo.load("clip"), test.presence.bool()
    paper_prompt = RegionPrompt(**published.REGION_PROMPT, reference_size=224)
    ours_prompt = RegionPrompt("circle", (7, 7), 32, reference_size=224)
    free = {"presence_cutoff": None, "interpretability_cutoff": None, "batch_size": 100, "prompt_batch_size": 98}

    with tempfile.TemporaryDirectory() as folder:

        def fitted(prompt: RegionPrompt, init: str) -> Any:
            return fit_salf_cbm(
                model, "layer4", (train.image, train.label), clip, data.concepts, len(data.classes), prompt=prompt,
                store_path=Path(folder) / prompt.placement, bottleneck={"init": init, "max_epochs": 40}, **free,
            )  # fmt: skip

        ours, random = (fitted(ours_prompt, init) for init in ("least_squares", "random"))
        paper = fitted(paper_prompt, "least_squares")

    def nra(salf: Any) -> Tensor:
        return mean_of_present(metrics.nra(salf.concept_maps(test.image), test.masks, baseline="exact"), there)

    def similarity(salf: Any) -> Tensor:
        return torch.tensor([salf.metadata["validation_similarity"][name] for name in data.concepts])

    boxes = test.boxes[:, 0]
    inside = []
    for (x0, y0, x1, y1), masks in zip(boxes.tolist(), test.masks, strict=True):
        part = masks[:, int(y0) : int(y1) + 1, int(x0) : int(x1) + 1].flatten(1).float()
        inside.append(part.mean(1) > 0.25)
    held = []
    for options in ({}, published.EXPLAIN_REGION):
        explained = ours.explain_region(test.image, boxes=boxes, top_k=1, **options)
        names = [one.concepts[0] for one in explained]
        held.append(torch.tensor([bool(yes[data.concepts.index(n)]) for n, yes in zip(names, inside, strict=True)]))
    return [
        row("SALF-CBM", "prompt=", 'placement="cells"', 'placement="paper"', "NRA (exact) of the concept maps",
            nra(ours), nra(paper)),
        row("SALF-CBM", "bottleneck=", 'init="least_squares"', 'init="random"',
            "cubic similarity on validation images, by concept", similarity(ours), similarity(random)),
        row("SALF-CBM", "explain_region", 'units="std", reduction="mean"', 'units="map", reduction="sum"',
            "the first concept covers a quarter of the region", *held),
    ]  # fmt: skip


def of_metrics(_train: Any, test: Any, _data: Any) -> list[Row]:
    """How far shortcuts of the metrics are from the published loops."""
    model = demo.load("classifier")
    maps = torch.rand(len(test.image), 5, 5, generator=torch.Generator().manual_seed(0))

    def score(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x).softmax(1)

    rows = test.image.shape[2]
    found = []
    for name in ("insertion", "deletion"):
        function, paper = getattr(metrics, name), {**getattr(published, name.upper()), "n_steps": rows}
        areas = [function(score, test.image, maps, target=test.label, **options) for options in ({}, paper)]
        found.append(row("metrics", f"{name}(n_steps=)", "one per position of the map", "one per row of pixels",
                         f"area ({maps[0].numel()} steps, {rows} steps)", *areas))  # fmt: skip
    masks = test.object_masks[:, 0]
    values = [metrics.nra(maps, masks, **options) for options in ({}, published.NRA)]
    found.append(row("metrics", "nra(thresholds=)", "every pixel", "a coarser grid beyond 1 % of the image",
                     "NRA of random maps", *values))  # fmt: skip
    return found


PARTS = {"ce-fam": ce_fam, "sacv": sacv, "salf-cbm": salf_cbm, "metrics": of_metrics}


def markdown(record: dict[str, Any]) -> str:
    """The table of the page."""
    rows = []
    for part in PARTS:
        for r in record["parts"][part]["tables"][0]["rows"] if part in record["parts"] else ():
            values = [bracketed(r[k]) for k in ("ours", "published", "difference")]
            rows.append([r["method"], f"`{r['option']}`", r["default"], r["paper"], r["measure"], *values])
    head = ["method", "option", "default", "paper", "measured", "default", "paper", "difference"]
    return f"{table(head, rows)}\n"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=600)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--no-page", action="store_true", help="leave docs/published.md as it is")
    args = parser.parse_args(argv)
    path = RESULTS / "defaults.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"parts": {}}
    data, train = scenes("train", args.train)
    _, test = scenes("test", args.test)
    for name in args.parts:
        rows = PARTS[name](train, test, data)
        arguments = {"train": args.train, "test": args.test}
        tables = [{"title": rows[0]["method"], "note": NOTE, "rows": rows}]
        record["parts"][name] = {
            "environment": environment("open-clip-torch"), "arguments": arguments, "tables": tables
        }  # fmt: skip
        write("defaults", record)
    if not args.no_page:
        PAGE.write_text(MARK.sub(lambda _: markdown(record), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return record


if __name__ == "__main__":
    main()
