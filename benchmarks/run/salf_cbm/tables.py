"""SALF-CBM measured: accuracy, maps against exact masks, grid and radius, a planted error, Caltech-101, speed.

    python -m benchmarks.run.salf_cbm.tables scenes grid prompts planted speed [--cache FOLDER]
    python -m benchmarks.run.salf_cbm.tables caltech caltech_present caltech_early --data ../shared/data

Each part leaves a record ``results/salf_cbm_PART.json``. The stores of regions, which take most of the time (about 1.7
ms a circled picture of 64 px, 3 to 10 ms a crop of 128 px on one core), are kept in ``--cache`` and used again; what is
kept there is found again by what it was made from. Intervals: 95 %, bootstrap over images (1,000 draws).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.data.salf_cbm import SEEDS
from benchmarks.record import environment, write

Record = dict[str, Any]


def scenes(args: argparse.Namespace) -> tuple[list[Record], Record]:
    """Accuracy of every head, concept maps, class maps."""
    from benchmarks.run.salf_cbm.scenes import EFFECTIVE, LAM, accuracy_and_maps

    found = accuracy_and_maps(args.cache, args.train, args.test, args.epochs)
    of = (
        f"{found['train_images']} training and {found['test_images']} other scenes of 64 px; backbone: the bundled "
        "classifier, layer4; encoder: the bundled CLIP; 7 x 7 circles of radius 32 at 224 px."
    )
    heads = (
        "Every model has the same concepts, none dropped, and its heads come from the same solver. P-CBM: concept "
        "vectors of a support vector machine on the backbone's features, from the images that the encoder scores "
        "highest; LF-CBM: units trained on the encoder's embedding of the whole image. "
        f"NEC={EFFECTIVE}: {EFFECTIVE} nonzero weights per class on average (within 10 %), as later papers compare; "
        f"lam={LAM:g}: the strength of LF-CBM's public command for CUB-200, however many weights it leaves."
    )
    sides = [
        {"method": name, **{f"NRA exact, {kind}": value for kind, value in row.items()}}
        for name, row in found["nra_exact_by_kind"].items()
    ]
    return [
        {"title": "accuracy on scenes, 21 concepts", "note": f"{of} {heads}", "rows": counted(found)},
        {
            "title": "maps of the 21 words on scenes",
            "note": "Every concept that is present, against its exact mask. P is what the bottleneck learns from: the "
            "encoder's similarities to the circled images, 49 passes of it for each image.",
            "rows": by_method(found["concept_maps"]),
        },
        {"title": "maps by kind of word", "note": "", "rows": sides},
        {
            "title": "zero-shot segmentation by class prompts (the paper's Table 2, on scenes)",
            "note": 'Concepts "an image of a {class}"; the map of the true class against the mask of the object that '
            "makes the class; maps binarised at their mean.",
            "rows": by_method(found["class_maps"]),
        },
    ], found


def grid(args: argparse.Namespace) -> tuple[list[Record], Record]:
    """The paper's Table 3."""
    from benchmarks.run.salf_cbm.scenes import grid_and_radius

    found = grid_and_radius(args.cache, args.grid_train, args.test, args.grids, args.radii, args.epochs)
    rows = [
        {
            "method": f"{row['grid']} x {row['grid']}, r={row['radius']}",
            "accuracy": row["accuracy"],
            "nra_exact": row["maps"]["nra_exact"],
            "specificity": row["maps"]["specificity"],
            "mean_iou": row["maps"]["mean_iou"],
            "validation_similarity": row["validation_similarity"],
        }
        for row in found["rows"]
    ]
    note = (
        f"{found['train_images']} training scenes, radius in pixels at 224; the sparse head has about 10 weights a "
        f"class; at most {found['epochs']} epochs."
    )
    return [{"title": "grid and radius (the paper's Table 3, on scenes)", "note": note, "rows": rows}], found


def prompts(args: argparse.Namespace) -> tuple[list[Record], Record]:
    """What each way to show regions costs and gives."""
    from benchmarks.run.salf_cbm.prompts import prompts

    found = prompts(args.cache, args.prompts_train, args.test, args.epochs)
    rows, others = ([prompt_row(row) for row in found[name]] for name in ("rows", "transformer"))
    note = (
        f"{found['train_images']} training scenes of 64 px, 7 x 7 cells, the bundled CLIP (a ConvNet). Teacher: the "
        "encoder's similarities P; student: the concept maps of the model, on the first 200 of "
        f"{found['test_images']} other scenes; a head of about 10 weights per class. A budget of circles or crops is "
        "spent where cells differ most from their image; the other cells take the dense regions or, without them, the "
        "embedding of the whole image, shifted by the mean difference."
    )
    transformer = (
        "The same with a vision transformer that reads a class token (`benchmarks.data.vit_encoder`); value, qq, kk: "
        "what a position of its last block attends to."
    )
    return [
        {"title": "how regions are shown to the encoder", "note": note, "rows": rows},
        {"title": "how regions are shown to a vision transformer", "note": transformer, "rows": others},
    ], found


def prompt_row(row: Record) -> Record:
    """One prompt's line of the tables."""
    return {
        "method": row["prompt"],
        "encoder passes per image": row["passes"],
        "CPU ms per image": 1000 * row["embedding_seconds_per_image"],
        "teacher NRA": row["teacher"]["nra_exact"],
        "teacher specificity": row["teacher"]["specificity"],
        "student NRA": row["student"]["nra_exact"],
        "student specificity": row["student"]["specificity"],
        "accuracy": row["accuracy"],
        "student NRA, of circles'": row["of_circles"]["student nra_exact"],
        "student specificity, of circles'": row["of_circles"]["student specificity"],
    }


def planted(args: argparse.Namespace) -> tuple[list[Record], Record]:
    """A planted error and its repair."""
    from benchmarks.run.salf_cbm.planted import planted_error

    found = planted_error(args.cache, args.grid_train, args.planted_test, args.epochs)
    rows = [{"bottleneck from": "(backbone alone)", "repair": "none", "accuracy": found["backbone"]}]
    for name, heads in found["bottlenecks"].items():
        for count, one in heads.items():
            of = {"bottleneck from": name, "weights a class": f"at most {count}"}
            seen = {
                "weight on grounds": one["share_of_weight_on_grounds"],
                "ground read off the other concepts": one["ground_from_other_concepts"],
            }
            rows.append({**of, "repair": "none", "accuracy": one["before"], **seen})
            rows += [{**of, "repair": repair, **values} for repair, values in one["repairs"].items()]
    note = (
        f"Head trained on {found['images']} scenes with planted grounds (0.9), judged on {found['test_images']} unseen "
        "scenes with independent ones. Planted errors: wrong predictions of the class whose planted ground is there."
    )
    return [{"title": "a planted ground and its repair", "note": note, "rows": rows}], found


def caltech(
    args: argparse.Namespace, presence: float | None = None, bottleneck: Record | None = None
) -> tuple[list[Record], Record]:
    """Real images; with ``presence``, only words of which whole images say more than the published cutoff asks; with
    ``bottleneck``, these settings of its training instead of the defaults and the epochs of the arguments."""
    from benchmarks.run.salf_cbm.caltech import PRESENCE, caltech_101

    if args.data is None:
        raise SystemExit("caltech needs --data, the folder with images/caltech101 and real_models.py")
    cutoff = PRESENCE if presence is None else presence
    sizes = args.class_train, args.class_test
    settings = {"max_epochs": args.caltech_epochs} if bottleneck is None else bottleneck
    found = caltech_101(args.cache, args.data, *sizes, args.seed, settings, cutoff)
    note = (
        f"{found['classes']} classes, {found['train_images']} training and {found['test_images']} other images, split "
        f"by file; MobileNetV2 (ImageNet) and ConSE, which is built on it, prompted with {found['crops']:,} crops; "
        f"{found['vocabulary']['kept']} concepts in both models (presence above {cutoff:g}); settings of SALF-CBM's "
        f"bottleneck: {settings}. Mean validation similarity: "
        + ", ".join(f"{name} {value:.2f}" for name, value in found["similarity_on_validation"].items())
        + "."
    )
    title = "accuracy on Caltech-101" + ("" if presence is None else ", words that the images show")
    title += "" if bottleneck is None else ", few epochs"
    return [{"title": title, "note": note, "rows": counted(found)}], found


def speed(args: argparse.Namespace) -> tuple[list[Record], Record]:
    """Ratios."""
    from benchmarks.run.salf_cbm.speed import CLASSES, CONCEPTS, inference, recorded

    found = {"inference": inference(args.repeats), "recorded_elsewhere": recorded()}
    rows = [
        {"backbone": name, **{f"{k}_ms": 1000 * v for k, v in row["seconds"].items()},
         "forward_over_backbone": row["forward_over_backbone"], "explain_over_backbone": row["explain_over_backbone"]}
        for name, row in found["inference"].items()
    ]  # fmt: skip
    note = (
        f"A batch of 4 images of 224 px, {CONCEPTS} concepts, {CLASSES} classes; medians of {args.repeats}, in turn in "
        "one process. The backbone with its own head; explain: prediction, contributions and the maps of five concepts."
    )
    return [{"title": "cost of a forward pass and of an explanation", "note": note, "rows": rows}], found


PARTS: dict[str, Callable[[argparse.Namespace], tuple[list[Record], Record]]] = {
    "scenes": scenes,
    "grid": grid,
    "prompts": prompts,
    "planted": planted,
    "caltech": caltech,
    "caltech_present": partial(caltech, presence=0.4),
    # Chosen by the accuracy of a head of 5 weights per class on held-out training images.
    "caltech_early": partial(caltech, presence=0.4, bottleneck={"lr": 1e-2, "max_epochs": 3}),
    "speed": speed,
}


def counted(found: Record) -> list[Record]:
    """Rows of accuracies, with the number of images beside the rounded share."""
    n = found["test_images"]
    return [{**row, "right": f"{round(row['accuracy'][0] * n)} of {n}"} for row in found["accuracy"]]


def by_method(rows: dict[str, Record]) -> list[Record]:
    """Rows of a table of maps."""
    return [{"method": name, **row} for name, row in rows.items()]


def shown(value: Any) -> Any:
    """Lists of settings as text: three numbers in a list are an interval elsewhere in a record."""
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="+", choices=list(PARTS))
    parser.add_argument("--cache", type=Path, default=Path(".cache/salf_cbm"), help="stores and steps are kept here")
    parser.add_argument("--data", type=Path, help="folder of real_models.py and images/caltech101")
    parser.add_argument("--train", type=int, default=2000, help="scenes")
    parser.add_argument("--test", type=int, default=1000, help="scenes")
    parser.add_argument("--grid-train", type=int, default=1000, help="scenes for the parts grid and planted")
    parser.add_argument("--prompts-train", type=int, default=600, help="scenes for the part prompts")
    parser.add_argument("--planted-test", type=int, default=400)
    parser.add_argument("--grids", type=int, nargs="+", default=[5, 7, 9])
    parser.add_argument("--radii", type=int, nargs="+", default=[27, 32, 37])
    parser.add_argument("--epochs", type=int, default=40, help="most epochs of a bottleneck on scenes")
    parser.add_argument("--class-train", type=int, default=20, help="images of a class")
    parser.add_argument("--class-test", type=int, default=10)
    parser.add_argument("--caltech-epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0, help="of the split of Caltech-101 and of training there")
    parser.add_argument("--repeats", type=int, default=7, help="of timings")
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    for part in args.part:
        tables, details = PARTS[part](args)
        record = {
            "environment": environment("open-clip-torch", "torchvision"),
            "arguments": {k: shown(v) for k, v in vars(args).items() if not isinstance(v, Path) and k != "part"},
            "seeds": {**SEEDS, "torch": args.seed},
            "tables": tables,
            "details": details,
        }
        print(write(f"salf_cbm_{part}", record), flush=True)


if __name__ == "__main__":
    main()
