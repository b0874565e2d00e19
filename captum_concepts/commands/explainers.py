"""From the options of ``explain`` to something that explains an image."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from captum_concepts.activations.survey import suggest_layer, suggest_stages
from captum_concepts.attr.concept_fusion_map import ConceptFusionMap
from captum_concepts.attr.feature_activation_map import FeatureActivationMap
from captum_concepts.commands.models import LoadedModel, load_encoder, read_names, without_head
from captum_concepts.datasets.images import class_folders, load_image
from captum_concepts.errors import CaptumConceptsError, InputError
from captum_concepts.explanation import ConceptExplanation

Failed = list[dict[str, str]]


class Settings(Protocol):
    """What is read of the command's settings."""

    model: str
    layer: str | None
    layers: str | None
    references: str | None
    classes: str | None
    similarity: str
    batch_size: int
    words: str | None
    encoder: str | None
    encoder_weights: str | None
    train: str | None
    explainer: str | None


@dataclass(frozen=True)
class Explainer:
    """A method ready to explain.

    Args:
        explain: ``(inputs, top_k=)`` to a :class:`ConceptExplanation`.
        method, layer: for the report.
        class_names: what a target index means, or None.
    """

    explain: Callable[..., ConceptExplanation]
    method: str
    layer: str
    class_names: Sequence[str] | None


def build_explainer(settings: Any, loaded: LoadedModel, failed: Failed) -> Explainer:
    """CE-FAM where words or a saved explainer are given, FAM otherwise."""
    if settings.words is not None or settings.explainer is not None:
        return _words(settings, loaded)
    probe = _probe(loaded)
    if settings.references is None:
        return _outputs(settings, loaded, probe)
    return _prototypes(settings, loaded, probe, failed)


def _probe(loaded: LoadedModel) -> Tensor:
    parameter = next(loaded.model.parameters(), torch.zeros(()))
    return torch.full((1, 3, loaded.size, loaded.size), 0.5, device=parameter.device)


def _class_names(settings: Settings, loaded: LoadedModel, outputs: int) -> list[str]:
    names = read_names(settings.classes) if settings.classes else loaded.classes
    names = names or [f"output {k}" for k in range(outputs)]
    if len(names) != outputs:
        raise InputError(f"{len(names)} class names for the {outputs} outputs of {settings.model}")
    return [name if names.count(name) == 1 else f"{name} ({k})" for k, name in enumerate(names)]


def _outputs(settings: Settings, loaded: LoadedModel, probe: Tensor) -> Explainer:
    """The model's own outputs: FAM with unit vectors as references, which is Grad-CAM without its ReLU."""
    with torch.no_grad():
        outputs = loaded.model(probe)
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        raise InputError(f"{settings.model} does not give (N, classes); give --references DIR, one folder a class")
    names = _class_names(settings, loaded, outputs.shape[1])
    layer = settings.layer or suggest_layer(loaded.model, probe)
    bank = torch.eye(outputs.shape[1], device=probe.device)
    fam = FeatureActivationMap(loaded.model, layer, bank, reference_names=names, similarity="dot", weights="gradient")
    return Explainer(fam.explain, fam.get_name(), layer, names)


def _prototypes(settings: Settings, loaded: LoadedModel, probe: Tensor, failed: Failed) -> Explainer:
    """Similarity of the model's embedding to the mean embedding of each class folder."""
    model = without_head(loaded.model, probe)
    names, rows = [], []
    for name, files in class_folders(settings.references or "").items():
        images = [image for _, image in readable_images(files, loaded.size, failed)]
        if not images:
            raise InputError(f"no readable image in {Path(settings.references or '') / name}")
        inputs = loaded.prepare(torch.stack(images)).to(probe.device)
        rows.append(FeatureActivationMap.prototypes(model, inputs, [0] * len(inputs), batch_size=settings.batch_size))
        names.append(name)
    layer = settings.layer or suggest_layer(model, probe)
    fam = FeatureActivationMap(model, layer, torch.cat(rows), reference_names=names, similarity=settings.similarity)
    return Explainer(fam.explain, fam.get_name(), layer, names)


def _words(settings: Settings, loaded: LoadedModel) -> Explainer:
    """Words the model saw: a translator to an image-text model, read from a file or trained on a folder of images."""
    probe = _probe(loaded)
    file = None if settings.explainer is None else Path(settings.explainer)
    if file is not None and file.is_file():
        made = ConceptFusionMap.load(file, loaded.model)
        if settings.words is not None:
            made = made.with_concepts(_word_list(settings.words), _encoder(settings))
    else:
        if settings.words is None or settings.train is None:
            missing = f"no explainer file at {file}; " if file else ""
            raise InputError(
                f"{missing}to train one, give --words, --encoder and --train DIR (some thousand such images)"
            )
        layers = settings.layers.split(",") if settings.layers else suggest_stages(loaded.model, probe)
        made = ConceptFusionMap.fit(
            loaded.model,
            layers,
            _encoder(settings),
            settings.train,
            _word_list(settings.words),
            image_size=loaded.size,
            model_transform=loaded.prepare,
            batch_size=settings.batch_size,
            layer="fused",
            show_progress=True,
        )
        if file is not None:
            made.save(file)
    with torch.no_grad():
        outputs = loaded.model(probe)
    names = _class_names(settings, loaded, outputs.shape[1])
    return Explainer(made.explain, made.get_name(), str(made.layer), names)


def _encoder(settings: Settings) -> Any:
    if settings.encoder is None:
        raise InputError("--words needs --encoder: demo:clip, an open_clip name, or FILE.py:FUNCTION")
    return load_encoder(settings.encoder, settings.encoder_weights)


def _word_list(words: str) -> list[str]:
    """Words of a file, or of a text separated by commas."""
    if Path(words).is_file():
        return read_names(words)
    found = [word.strip() for word in words.split(",") if word.strip()]
    if not found:
        raise InputError(f"--words {words!r} names no word and is no file; give 'stripes, grass, sky' or a file")
    return found


def readable_images(paths: Sequence[Path], size: int, failed: Failed) -> Iterator[tuple[Path, Tensor]]:
    """Each readable image; the others go to ``failed`` and to stderr."""
    for path in paths:
        try:
            image = load_image(path, size)
        except CaptumConceptsError as error:
            failed.append({"image": str(path), "reason": str(error)})
            print(f"skipped: {error}", file=sys.stderr)
            continue
        yield path, image
