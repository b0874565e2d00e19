"""`explain`: the user's images, the user's model, FeatureActivationMap, one picture an image."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_concepts.activations.survey import suggest_layer
from captum_concepts.attr.feature_activation_map import FeatureActivationMap
from captum_concepts.commands.models import LoadedModel, load_model, read_names, without_head
from captum_concepts.datasets.images import class_folders, find_images, load_image
from captum_concepts.errors import CaptumConceptsError, InputError
from captum_concepts.explanation import ConceptExplanation


@dataclass(frozen=True)
class ExplainSettings:
    """What ``explain`` was asked to do; every field is an option of the command line."""

    images: Sequence[str]
    model: str
    output: str
    layer: str | None = None
    references: str | None = None
    weights: str | None = None
    classes: str | None = None
    similarity: str = "cosine"
    top_k: int = 3
    size: int | None = None
    num_classes: int | None = None
    batch_size: int = 8
    device: str = "cpu"


def explain(settings: ExplainSettings) -> dict[str, Any]:
    """Explain every readable image and write ``NAME.png`` for each and ``explanations.json`` into the output folder.

    With ``references`` (one folder a class) the model's embedding is compared with the class prototypes; without, the
    model's own outputs are explained.

    Returns:
        ``{"explained": [...], "failed": [...], ...}``, as written to ``explanations.json``.

    Raises:
        InputError, LayerError: nothing can be explained with these settings.
    """
    paths = find_images(settings.images)
    if settings.top_k < 1 or settings.batch_size < 1:
        raise InputError("--top-k and --batch-size must be at least 1")
    out = Path(settings.output)
    out.mkdir(parents=True, exist_ok=True)
    loaded = load_model(settings.model, weights=settings.weights, size=settings.size, num_classes=settings.num_classes)
    loaded.model.to(settings.device)
    probe = torch.zeros(1, 3, loaded.size, loaded.size, device=settings.device)
    failed: list[dict[str, str]] = []
    explainer = _explainer(settings, loaded, probe, failed)
    report: dict[str, Any] = {"model": settings.model, "layer": explainer.layer, "explained": [], "failed": failed}
    pictures = _picture_names(paths)
    try:
        with tqdm(total=len(paths), unit="image", file=sys.stderr, disable=None) as progress:
            for names, images in _batches(paths, loaded.size, settings.batch_size, failed):
                inputs = loaded.prepare(images).to(settings.device)
                explanation = explainer.explain(inputs).to("cpu")
                for path, image, one in zip(names, images, explanation, strict=True):
                    top = one.top(settings.top_k)
                    _draw(image, top, out / pictures[path], path.name, explainer.reference_names)
                    scores = {name: round(float(s), 6) for name, s in zip(top.concepts, top.scores[0], strict=True)}
                    report["explained"].append({"image": str(path), "picture": pictures[path], "top": scores})
                progress.update(len(names))
    finally:  # also after Ctrl-C: what was done is listed
        _write(out / "explanations.json", json.dumps(report, indent=2) + "\n")
    return report


def _explainer(
    settings: ExplainSettings, loaded: LoadedModel, probe: Tensor, failed: list[dict[str, str]]
) -> FeatureActivationMap:
    model: nn.Module = loaded.model
    if settings.references is None:
        with torch.no_grad():
            outputs = model(probe)
        if not isinstance(outputs, Tensor) or outputs.ndim != 2:
            raise InputError(f"{settings.model} does not give (N, classes); give --references DIR, one folder a class")
        names = read_names(settings.classes) if settings.classes else loaded.classes
        names = names or [f"output {k}" for k in range(outputs.shape[1])]
        if len(names) != outputs.shape[1]:
            raise InputError(f"{len(names)} class names for the {outputs.shape[1]} outputs of {settings.model}")
        names = [name if names.count(name) == 1 else f"{name} ({k})" for k, name in enumerate(names)]
        references, similarity = torch.eye(outputs.shape[1], device=probe.device), "dot"
    else:
        model = without_head(model, probe)
        names, rows = [], []
        for name, files in class_folders(settings.references).items():
            batches = list(_batches(files, loaded.size, settings.batch_size, failed))
            if not batches:
                raise InputError(f"no readable image in {Path(settings.references) / name}")
            images = loaded.prepare(torch.cat([part for _, part in batches])).to(probe.device)
            rows.append(
                FeatureActivationMap.prototypes(model, images, [0] * len(images), batch_size=settings.batch_size)
            )
            names.append(name)
        references, similarity = torch.cat(rows), settings.similarity
    layer = settings.layer or suggest_layer(model, probe + 0.5)
    if settings.references is None:
        # The outputs are linear in what is read off them: gradient weights make this Grad-CAM without its ReLU.
        return FeatureActivationMap(
            model, layer, references, reference_names=names, similarity=similarity, weights="gradient"
        )
    return FeatureActivationMap(model, layer, references, reference_names=names, similarity=similarity)


def _batches(
    paths: Sequence[Path], size: int, batch_size: int, failed: list[dict[str, str]]
) -> Iterator[tuple[list[Path], Tensor]]:
    """Readable images in batches; the others go to ``failed`` and to stderr."""
    names: list[Path] = []
    images: list[Tensor] = []
    for i, path in enumerate(paths):
        try:
            images.append(load_image(path, size))
            names.append(path)
        except CaptumConceptsError as error:
            failed.append({"image": str(path), "reason": str(error)})
            print(f"skipped: {error}", file=sys.stderr)
        if images and (len(images) == batch_size or i == len(paths) - 1):
            yield names, torch.stack(images)
            names, images = [], []


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


def _draw(image: Tensor, explanation: ConceptExplanation, path: Path, title: str, names: Sequence[str] | None) -> None:
    from captum_concepts.visualization import panel, save_figure

    save_figure(panel(image[None], explanation, top_k=len(explanation.concepts), title=title, class_names=names), path)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
