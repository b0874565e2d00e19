"""`explain`: the user's images, the user's model, one picture an image; and all of them in one HTML report."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from captum_concepts._artifacts import write_atomically
from captum_concepts.commands.explainers import Explainer, build_explainer
from captum_concepts.commands.image_files import each_image, folder_labels
from captum_concepts.commands.report import facts, open_report
from captum_concepts.commands.settings import ExplainerSettings
from captum_concepts.errors import InputError
from captum_concepts.explanation import ConceptExplanation
from captum_concepts.images import find_images, names_of


@dataclass(frozen=True, kw_only=True)
class ExplainSettings(ExplainerSettings):
    """What ``explain`` or ``report`` was asked to do; every field is an option of the command line.

    Args:
        output: folder for pictures and ``explanations.json``; None writes neither.
        report: an HTML file; None writes none.
        save: keep each explanation as ``NAME.safetensors`` in ``output``.
    """

    images: Sequence[str]
    output: str | None = None
    top_k: int = 3
    report: str | None = None
    save: bool = False
    title: str | None = None


def explain(settings: ExplainSettings) -> dict[str, Any]:
    """Explain every readable image, one after another: pictures, ``explanations.json``, an HTML report.

    With ``words`` (or an ``explainer`` that was saved) concepts are explained by CE-FAM, SpatialACV or SALF-CBM; with
    ``references`` (one folder a class) the model's embedding is compared with the class prototypes by FAM; without
    either, the model's own outputs are explained by FAM.

    Returns:
        ``{"explained": [...], "failed": [...], ...}``, as written to ``explanations.json``.

    Raises:
        InputError, LayerError, ArtifactError: nothing can be explained with these settings.
    """
    paths = find_images(settings.images)
    files = dict(zip(names_of(paths), paths, strict=True))
    if settings.top_k < 1 or settings.batch_size < 1:
        raise InputError("--top-k and --batch-size must be at least 1")
    out = None if settings.output is None else Path(settings.output)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    loaded = settings.load()
    failed: list[dict[str, str]] = []
    explainer = build_explainer(settings, loaded, failed)
    summary: dict[str, Any] = {"model": settings.model, "method": explainer.name, "layer": explainer.layer}
    summary |= {"size": loaded.size, "classes": list(explainer.class_names or []), "explained": [], "failed": failed}
    pictures = _picture_names(paths)
    truths = dict(zip(paths, folder_labels(paths, explainer.class_names) or [None] * len(paths), strict=True))
    with ExitStack() as stack:
        if out is not None:  # also after Ctrl-C: what was done is listed
            stack.callback(lambda: write_atomically(out / "explanations.json", json.dumps(summary, indent=2) + "\n"))
        page = None
        if settings.report is not None:
            page = open_report(settings, explainer.class_names, facts(settings, loaded, explainer), failed)
            stack.push(page)
        progress = stack.enter_context(tqdm(total=len(paths), unit="image", file=sys.stderr, disable=None))
        for name, image in each_image(loaded.open(list(files.values())), failed):
            path = files[name]
            inputs = loaded.prepare(image[None]).to(settings.device)
            explanation = explainer.explain(inputs, settings.top_k).to("cpu")
            entry = {"image": str(path), **_entry(explanation, explainer.class_names)}
            if out is not None:
                _draw(image, explanation, out / pictures[path], name, explainer)
                entry["picture"] = pictures[path]
                if settings.save:
                    entry["explanation"] = Path(pictures[path]).with_suffix(".safetensors").name
                    explanation.save(out / entry["explanation"])
                    entry["significant"] = explainer.significant(explanation)
            if page is not None:
                page.add(image[None], explanation, name, explainer.significant(explanation), truths[path])
            summary["explained"].append(entry)
            progress.update()
    return summary


def _entry(explanation: ConceptExplanation, names: Sequence[str] | None) -> dict[str, Any]:
    """One image's line of ``explanations.json``."""
    entry: dict[str, Any] = {
        "top": {c: _number(s) for c, s in zip(explanation.concepts, explanation.scores[0], strict=True)}
    }
    if explanation.presence is not None:
        values = zip(explanation.concepts, explanation.presence[0], strict=True)
        entry["presence"] = {c: _number(v) for c, v in values}
    if explanation.target is not None:
        target = int(explanation.target[0])
        entry["target"] = names[target] if names else target
    if explanation.target_probability is not None:
        entry["target_probability"] = _number(explanation.target_probability[0])
    if explanation.contributions is not None:
        values = zip(explanation.concepts, explanation.contributions[0], strict=True)
        entry["contributions"] = {c: _number(v) for c, v in values}
    return entry


def _number(value: Tensor) -> float | None:
    """Six digits; None, which JSON can hold, where it is not finite."""
    number = float(value)
    return round(number, 6) if math.isfinite(number) else None


def _picture_names(paths: Sequence[Path]) -> dict[Path, str]:
    """One picture name for each image, told apart where two folders hold files of one name."""
    names: dict[Path, str] = {}
    used: set[str] = set()
    for path in paths:
        name, k = f"{path.stem}.png", 1
        while name in used:
            k += 1
            name = f"{path.stem}-{k}.png"
        used.add(name)
        names[path] = name
    return names


def _draw(image: Tensor, explanation: ConceptExplanation, path: Path, title: str, explainer: Explainer) -> None:
    from captum_concepts.visualization import panel, save_figure

    flags, names = explainer.significant(explanation), explainer.class_names
    k = len(explanation.concepts)
    save_figure(panel(explanation, image[None], top_k=k, title=title, class_names=names, significant=flags), path)
