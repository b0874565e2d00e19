"""`evaluate`: maps of an explainer on a data set with concept masks, compared with concept-agnostic baselines."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from captum_concepts._checks import integer
from captum_concepts.activations import Layers
from captum_concepts.commands.explainers import Explainer, build_explainer, new_explainer
from captum_concepts.commands.image_files import Failed, number_of_scenes
from captum_concepts.commands.models import LoadedModel
from captum_concepts.commands.outputs import check_outputs
from captum_concepts.commands.settings import ExplainerSettings
from captum_concepts.datasets import (
    Broden,
    CaptionedScenes,
    COCOPanoptic,
    ImageNetS,
    MaskFolder,
    PascalVOC,
    SegmentationDataset,
)
from captum_concepts.errors import CaptumConceptsError, InputError, InputWarning, did_you_mean
from captum_concepts.images import Preprocessing
from captum_concepts.metrics import CenterGaussian, RandomMaps, activation_energy, evaluate
from captum_concepts.metrics.evaluation import METRICS, WORD_METRICS, plain_name, spellings
from captum_concepts.metrics.table import EvaluationTable

FORMATS: dict[str, Callable[..., SegmentationDataset]] = {
    "folder": MaskFolder, "voc": PascalVOC, "broden": Broden, "imagenet-s": ImageNetS, "coco": COCOPanoptic,
}  # fmt: skip
SCORE_METRICS = ("average_drop", "increase_in_confidence", "insertion", "deletion")
MASK_METRICS = tuple(name for name in METRICS if name not in SCORE_METRICS + WORD_METRICS)


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(ExplainerSettings):
    """Options of ``evaluate``; every field is an option of the command line."""

    data: str
    format: str = "folder"
    split: str | None = None
    unlabelled: str | None = None
    metrics: str = "nra,nra_exact,concept_specificity,epg"
    limit: int | None = None
    min_area: float = 0.0
    baselines: bool = True
    n_bootstrap: int = 1000
    seed: int = 0
    output: str | None = None


def evaluate_command(settings: EvaluateSettings) -> tuple[EvaluationTable, dict[str, Any]]:
    """Evaluate the maps of all concepts that data set and explainer have in common, by name.

    All concepts of an image form one example, so intervals resample images.

    Returns:
        The table, and ``{"data", "images", "matched", "unmatched", "failed", ...}``.

    Raises:
        InputError: no data, an unknown metric or format, or no concept in common.
    """
    metrics = _metric_names(settings.metrics)
    write = _writer(settings.output)
    check_outputs(vars(settings), {"--output": settings.output, "--explainer": new_explainer(settings)})
    if settings.limit is not None:
        integer("--limit", settings.limit, 1)
    loaded = settings.load()
    data, known = open_data(settings, loaded.preprocessing)
    if settings.words is None and settings.encoder is not None:
        settings = replace(settings, words=known)  # the names in the data set
    failed: Failed = []
    explainer = build_explainer(settings, loaded, failed)
    columns = match_names(known, explainer.concepts)
    matched = [known[row] for row in columns]
    if not matched:
        raise InputError(
            f"none of the data set's concepts ({', '.join(known[:8])}, ...) is one of the explainer's "
            f"({', '.join(list(explainer.concepts)[:8])}, ...); pass --words, or --classes with the data set's names"
        )
    print(f"{len(matched)} of the {len(known)} concepts of the data set can be explained", file=sys.stderr)
    total = len(data) if settings.limit is None else min(settings.limit, len(data))
    counts = {"images": 0, "images_without": 0, "regions": 0, "filled": 0}
    examples = _examples(data, total, columns, explainer.concepts, failed, counts)
    bar = tqdm(examples, total=total, desc="evaluate", unit="image", file=sys.stderr, disable=None)
    table = evaluate(
        _rows(explainer, loaded, settings.baselines), bar, metrics, batch_size=settings.batch_size,
        n_bootstrap=settings.n_bootstrap, seed=settings.seed, device=settings.device,
    )  # fmt: skip
    if counts.pop("filled") == counts["images"] and settings.unlabelled is None:
        warnings.warn(
            "each image has a single labeled region: pixels of value 0 count as unlabeled and are ignored, so any "
            "map lies inside the region. If they are background, pass --unlabelled background",
            InputWarning,
            stacklevel=2,
        )
    summary = {
        "data": settings.data, "model": settings.model, "method": explainer.name, "layer": explainer.layer, **counts,
        "matched": matched, "unmatched": [name for i, name in enumerate(known) if i not in columns], "failed": failed,
    }  # fmt: skip
    if write is not None:
        try:
            write(table)
        except OSError as error:  # a full disk: the table is still printed
            summary["unsaved"] = f"--output {settings.output} cannot be written: {error}"
    return table, summary


def open_data(settings: EvaluateSettings, preprocessing: Preprocessing) -> tuple[Any, list[str]]:
    """The data set, with images at the model's size, and the names of its concepts."""
    if settings.data.startswith("demo:"):
        number = number_of_scenes(settings.data)
        settings.refuse(("format", "split", "min_area", "unlabelled"), "they are for a folder of images and masks")
        side = preprocessing.size[0] if preprocessing.size else 224
        scenes = CaptionedScenes(number, seed=settings.seed + 1_000_003, size=side)
        return scenes, list(scenes.concepts)
    if settings.format not in FORMATS:
        raise InputError(f"--format {settings.format!r} is not one of {', '.join(FORMATS)}")
    options: dict[str, Any] = {**preprocessing.geometry, "min_area": settings.min_area}
    if settings.split is not None:
        if settings.format == "folder":
            raise InputError("--split does not apply to a folder of images/ and masks/; leave it out")
        options["split"] = settings.split
    if settings.unlabelled is not None:
        if settings.format not in ("folder", "coco"):
            raise InputError(
                f"--unlabelled is for --format folder and coco; {settings.format} defines what its pixels are"
            )
        options["unlabelled"] = settings.unlabelled
    data = FORMATS[settings.format](settings.data, **options)
    return data, list(data.concepts)


def match_names(known: Sequence[str], explained: Sequence[str]) -> dict[int, int]:
    """Column in the explainer of each name of the data set that it has, ignoring case, ``_`` and ``-``.

    Commas separate synonyms, as in ImageNet's class names.

    >>> match_names(["Dog", "traffic light", "sea"], ["n/a", "traffic_light", "dog, domestic dog"])
    {0: 2, 1: 1}
    """
    own, column = spellings(explained), {name: k for k, name in enumerate(explained)}
    return {row: column[own[plain]] for row, name in enumerate(known) if (plain := plain_name(name)) in own}


def _examples(
    data: Any,
    total: int,
    columns: dict[int, int],
    explained: Sequence[str],
    failed: Failed,
    counts: dict[str, int],
) -> Iterator[dict[str, Any]]:
    """Iterate over images with the masks of their concepts; unreadable ones are added to ``failed``.

    Raises:
        InputError: at the end, if no image shows any of the concepts.
    """
    for i in range(total):
        try:
            item = data[i]
        except (CaptumConceptsError, OSError) as error:
            failed.append({"image": f"image {i}", "reason": str(error)})
            continue
        if isinstance(data, CaptionedScenes):
            rows = torch.nonzero(item.presence).flatten().tolist()
            masks, ignore = item.masks[rows], None
        else:
            rows, masks, ignore = torch.as_tensor(item.target).tolist(), item.masks, item.ignore
        kept = [k for k, row in enumerate(rows) if row in columns]
        if not kept:
            counts["images_without"] += 1
            continue
        counts["images"] += 1
        counts["regions"] += len(kept)
        counts["filled"] += ignore is not None and bool((masks[kept].all(0) | ignore).all())
        names = [explained[columns[rows[k]]] for k in kept]
        yield {"inputs": item.image, "masks": masks[kept], "ignore": ignore, "concepts": names}
    if not counts["images"]:
        shown = [data.concepts[row] for row in columns]
        raise InputError(f"none of the {total} images shows any of {', '.join(shown[:8])}")


def _rows(explainer: Explainer, loaded: LoadedModel, baselines: bool) -> dict[str, Callable[..., Tensor]]:
    """The explainer, followed by concept-agnostic baselines; each returns maps (N, k, h, w)."""

    def maps(inputs: Tensor, concepts: list[str]) -> Tensor:
        return explainer.method.concept_maps(loaded.prepare(inputs), concepts)

    def energy(inputs: Tensor, concepts: list[str]) -> Tensor:
        with torch.no_grad():
            seen = Layers.resolve(explainer.model, explainer.looks_at).run(loaded.prepare(inputs))
        return activation_energy(seen.maps[0])[:, None].expand(-1, len(concepts), -1, -1)

    def center(inputs: Tensor, concepts: list[str]) -> Tensor:
        return CenterGaussian(n_maps=len(concepts))(inputs)

    def noise(inputs: Tensor, concepts: list[str]) -> Tensor:
        return RandomMaps(n_maps=len(concepts))(inputs)

    rows: dict[str, Callable[..., Tensor]] = {explainer.name: maps}
    return rows | ({"activation energy": energy, "centre Gaussian": center, "random": noise} if baselines else {})


def _metric_names(given: str) -> list[str]:
    names = list(dict.fromkeys(part.strip() for part in given.split(",") if part.strip()))
    for name in names:
        if name in SCORE_METRICS:
            raise InputError(f"{name} measures a score, not a region; call captum_concepts.metrics.{name} from Python")
        if name in WORD_METRICS:
            raise InputError(
                f"{name} measures whether concepts are detected, not where; call captum_concepts.metrics.evaluate "
                "from Python"
            )
        if name not in MASK_METRICS:
            hint = did_you_mean(name, MASK_METRICS)
            raise InputError(f"there is no metric {name!r}; known: {', '.join(MASK_METRICS)}.{hint}")
    if not names:
        raise InputError(f"--metrics is empty; pass some of {', '.join(MASK_METRICS)}")
    return names


def _writer(output: str | None) -> Callable[[EvaluationTable], Any] | None:
    """Function that writes a table in the format of the suffix, checked before the evaluation starts."""
    if output is None:
        return None
    path = Path(output)
    writers: dict[str, Callable[[EvaluationTable], Any]] = {
        ".csv": lambda table: table.to_csv(path),
        ".json": lambda table: table.to_json(path),
        ".md": lambda table: table.to_markdown(path),
    }
    if path.suffix.lower() not in writers:
        raise InputError(f"--output {output!r} must end in {', '.join(writers)}")
    return writers[path.suffix.lower()]
