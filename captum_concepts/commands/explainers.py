"""From the options of a command to something that explains an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts.activations.survey import suggest_layer, suggest_stages
from captum_concepts.attr.concept_fusion_map import ConceptFusionMap
from captum_concepts.attr.feature_activation_map import FeatureActivationMap
from captum_concepts.commands.image_files import Failed, each_image, readable
from captum_concepts.commands.models import LoadedModel, load_encoder, without_head
from captum_concepts.commands.saved_explainers import format_of, load_acv, load_salf
from captum_concepts.commands.settings import ExplainerSettings, ModelSettings
from captum_concepts.errors import InputError
from captum_concepts.explanation import ConceptExplanation
from captum_concepts.images import class_folders, find_images, read_words


@dataclass(frozen=True)
class Explainer:
    """A method ready to explain.

    Args:
        explain: ``(inputs, top_k=)`` to a :class:`ConceptExplanation`.
        method, layer: for the report.
        class_names: what a target index means, or None.
        concepts: the names that it can explain.
        maps: ``(inputs, columns)`` to ``(N, k, h, w)``, the maps of the concepts ``columns (N, k)`` of each image.
        model, looks_at: a model and a layer whose activations show where anything is seen at all.
        encoded: for each concept whether the layer encodes it, where that was tested.
    """

    explain: Callable[..., ConceptExplanation]
    method: str
    layer: str
    class_names: Sequence[str] | None
    concepts: Sequence[str]
    maps: Callable[[Tensor, Tensor], Tensor]
    model: nn.Module
    looks_at: str
    encoded: Mapping[str, bool] | None = None

    def significant(self, explanation: ConceptExplanation) -> list[bool] | None:
        """Flags for the concepts of ``explanation``, as the pictures take them."""
        return None if self.encoded is None else [self.encoded[name] for name in explanation.concepts]


def one_by_one(method: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Maps by a method whose ``attribute`` takes one concept an image."""
    return lambda inputs, columns: torch.cat([method.attribute(inputs, target=c) for c in columns.T], 1)


def all_at_once(maps: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Maps by a method that gives those of all concepts at the price of one."""

    def picked(inputs: Tensor, columns: Tensor) -> Tensor:
        found = maps(inputs)
        return found[torch.arange(len(found), device=found.device)[:, None], columns.to(found.device)]

    return picked


def build_explainer(settings: ExplainerSettings, loaded: LoadedModel, failed: Failed) -> Explainer:
    """What was saved, or CE-FAM where words are given, or else FAM."""
    probe = loaded.empty()
    saved = None if settings.explainer is None else Path(settings.explainer)
    if saved is not None and saved.is_dir():
        return _bottleneck(saved, loaded)
    if saved is not None and saved.is_file() and format_of(saved) == "SpatialACV":
        return _vectors(saved, settings, loaded, probe)
    if settings.words is not None or saved is not None:
        return _words(settings, loaded, probe, failed)
    if settings.references is None:
        return _outputs(settings, loaded, probe)
    return _prototypes(settings, loaded, probe, failed)


def _class_names(settings: ExplainerSettings, loaded: LoadedModel, outputs: int) -> list[str]:
    names = read_words(settings.classes) if settings.classes else loaded.classes
    names = names or [f"output {k}" for k in range(outputs)]
    if len(names) != outputs:
        raise InputError(f"{len(names)} class names for the {outputs} outputs of {settings.model}")
    return [name if names.count(name) == 1 else f"{name} ({k})" for k, name in enumerate(names)]


def _outputs(settings: ExplainerSettings, loaded: LoadedModel, probe: Tensor) -> Explainer:
    """The model's own outputs: FAM with unit vectors as references, which is Grad-CAM without its ReLU."""
    with torch.no_grad():
        outputs = loaded.model(probe)
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        raise InputError(f"{settings.model} does not give (N, classes); give --references DIR, one folder a class")
    names = _class_names(settings, loaded, outputs.shape[1])
    layer = settings.layer or suggest_layer(loaded.model, probe)
    bank = torch.eye(outputs.shape[1], device=probe.device)
    fam = FeatureActivationMap(loaded.model, layer, bank, reference_names=names, similarity="dot", weights="gradient")
    return Explainer(fam.explain, fam.get_name(), layer, names, names, one_by_one(fam), loaded.model, layer)


def _prototypes(settings: ExplainerSettings, loaded: LoadedModel, probe: Tensor, failed: Failed) -> Explainer:
    """Similarity of the model's embedding to the mean embedding of each class folder."""
    model = without_head(loaded.model, probe)
    names: list[str] = []
    examples: list[Tensor] = []
    for name, files in class_folders(settings.references or "").items():
        images = [image for _, image in each_image(loaded.open(files), failed)]
        if not images:
            raise InputError(f"no readable image in {Path(settings.references or '') / name}")
        examples += loaded.prepare(torch.stack(images))
        names += [name] * len(images)
    layer = settings.layer or suggest_layer(model, probe)
    fam = FeatureActivationMap(
        model, layer, similarity=settings.similarity, batch_size=settings.batch_size,
        normalize="l1",  # not "minmax": the maps of an image share one colour scale
    ).fit(torch.stack(examples), names)  # fmt: skip
    return Explainer(fam.explain, fam.get_name(), layer, fam.concepts, fam.concepts, one_by_one(fam), model, layer)


def _vectors(file: Path, settings: ExplainerSettings, loaded: LoadedModel, probe: Tensor) -> Explainer:
    """Concept vectors of ``fit-concepts --concepts``."""
    if settings.words is not None:
        raise InputError(f"{file} holds concept vectors, whose concepts are fixed; leave --words out")
    acv = load_acv(file, loaded.model)
    with torch.no_grad():
        names = _class_names(settings, loaded, loaded.model(probe).shape[1])
    flags = None if acv.significant_ is None else dict(zip(acv.concepts, acv.significant_.tolist(), strict=True))
    return Explainer(
        acv.explain, acv.get_name(), acv.layer, names, acv.concepts, all_at_once(acv.concept_maps), loaded.model,
        acv.layer, flags,
    )  # fmt: skip


def _bottleneck(folder: Path, loaded: LoadedModel) -> Explainer:
    """A model of ``fit-salf`` on its backbone."""
    salf = load_salf(folder, loaded.model)
    return Explainer(
        salf.explain, "SALF-CBM", salf.layer, salf.class_names, list(salf.concepts), all_at_once(salf.concept_maps),
        loaded.model, salf.layer,
    )  # fmt: skip


def _words(settings: ExplainerSettings, loaded: LoadedModel, probe: Tensor, failed: Failed) -> Explainer:
    """Words the model saw: a translator to an image-text model, read from a file or trained on a folder of images."""
    file = None if settings.explainer is None else Path(settings.explainer)
    if file is not None and file.is_file():
        made = ConceptFusionMap.load(file, loaded.model)
        if settings.words is not None:
            made = made.with_concepts(word_list(settings.words), encoder_of(settings))
    else:
        if settings.words is None or settings.train is None:
            missing = f"no explainer file at {file}; " if file else ""
            raise InputError(
                f"{missing}to train one, give --words, --encoder and --train DIR (some thousand such images)"
            )
        made = fit_words(settings, loaded, failed)
        if file is not None:
            made.save(file)
    if made.concepts is None:
        raise InputError(f"{file} was fitted without words; give --words and --encoder")
    with torch.no_grad():
        outputs = loaded.model(probe)
    names = _class_names(settings, loaded, outputs.shape[1])
    last = made.layers[-1] if isinstance(made.layers[-1], str) else suggest_layer(loaded.model, probe)
    return Explainer(
        made.explain,
        made.get_name(),
        str(made.map_layer),
        names,
        list(made.concepts),
        one_by_one(made),
        loaded.model,
        last,
    )


def fit_words(settings: ModelSettings, loaded: LoadedModel, failed: Failed) -> ConceptFusionMap:
    """CE-FAM trained on the images below ``settings.train``, with the words of ``settings.words``, if any."""
    encoder = encoder_of(settings)
    words = None if settings.words is None else word_list(settings.words)
    layers = settings.layers.split(",") if settings.layers else suggest_stages(loaded.model, loaded.empty())
    images = readable(loaded.open(find_images(settings.train or "")), failed, "training images")
    made = ConceptFusionMap(loaded.model, layers, map_layer="fused", batch_size=settings.batch_size)
    return made.fit(images, encoder, words, image_size=loaded.size, model_transform=loaded.prepare, show_progress=True)


def encoder_of(settings: ModelSettings) -> Any:
    """The image-text model of ``--encoder``."""
    if settings.encoder is None:
        raise InputError("--words needs --encoder: demo:clip, an open_clip name, or FILE.py:FUNCTION")
    return load_encoder(settings.encoder, settings.encoder_weights)


def word_list(words: str | Sequence[str]) -> list[str]:
    """Words of a file, of a text separated by commas, or as they are."""
    if not isinstance(words, str):
        return list(words)
    if Path(words).is_file():
        return read_words(words)
    found = [word.strip() for word in words.split(",") if word.strip()]
    if not found:
        raise InputError(f"--words {words!r} names no word and is no file; give 'stripes, grass, sky' or a file")
    return found
