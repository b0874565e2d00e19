"""Explainers from the options of a command."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts._captum import output_tensor
from captum_concepts.activations import Layers, hooked
from captum_concepts.activations.survey import suggest_layer, suggest_stages
from captum_concepts.attr.concept_fusion.ablation import class_link, class_log_probability
from captum_concepts.attr.concept_fusion_map import ConceptFusionMap
from captum_concepts.attr.feature_activation_map import FeatureActivationMap
from captum_concepts.attr.saved import kind_of, load
from captum_concepts.commands.image_files import Failed, each_image, readable
from captum_concepts.commands.models import LoadedModel, load_encoder, without_head
from captum_concepts.commands.settings import ExplainerSettings, ModelSettings
from captum_concepts.errors import InputError, shortened
from captum_concepts.explanation import ConceptExplanation
from captum_concepts.images import class_folders, find_images, read_words


@dataclass(frozen=True)
class Explainer:
    """A fitted method, with what pages and tables report in addition.

    Args:
        method: the :class:`~captum_concepts.explanation.ConceptExplainer`.
        layer: name of the layer, for the report.
        class_names: names of the targets by index, or None.
        model, looks_at: model and layer of the activation energy, a concept-agnostic baseline.
        link: how outputs of ``model`` become class probabilities (``ablation.class_link``); None if the method reports
            them itself, or if the outputs are not classes.
    """

    method: Any
    layer: str
    class_names: Sequence[str] | None
    model: nn.Module
    looks_at: str
    link: str | None = None

    @property
    def name(self) -> str:
        """Name of the method."""
        return str(getattr(self.method, "get_name", lambda: "SALF-CBM")())

    @property
    def concepts(self) -> list[str]:
        """Names of its concepts."""
        return list(self.method.concepts)

    def explain(self, inputs: Tensor, top_k: int) -> ConceptExplanation:
        """Explanation of one image, with class names and the target's probability."""
        outputs: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...], __: Any, output: Any) -> None:
            if not outputs and args and isinstance(args[0], Tensor) and torch.equal(args[0], inputs):
                outputs.append(output_tensor(output).detach())

        # Record the outputs of the method's own forward pass, as another one would cost as much.
        with hooked([] if self.link is None else [self.model], keep):
            made: ConceptExplanation = self.method.explain(inputs, top_k=top_k)
        if self.class_names is None or made.target is None:
            return made
        if self.link is not None:
            with torch.no_grad():
                output = outputs[0] if outputs else output_tensor(self.model(inputs.clone()))
            chance = class_log_probability(output, int(made.target), self.link).exp().to(made.scores.device)
            made = replace(made, target_probability=chance if bool(chance.isfinite()) else None)
        return replace(made, class_names=list(self.class_names))

    def significant(self, explanation: ConceptExplanation) -> list[bool] | None:
        """Whether the layer encodes each concept of ``explanation``; None if that was not tested."""
        flags = getattr(self.method, "significant_", None)
        if flags is None:
            return None
        encoded = dict(zip(self.concepts, flags.tolist(), strict=True))
        return [encoded[name] for name in explanation.concepts]


def build_explainer(settings: ExplainerSettings, loaded: LoadedModel, failed: Failed) -> Explainer:
    """The saved explainer, CE-FAM if words are given, or else FAM."""
    probe = loaded.empty()
    saved = None if settings.explainer is None else Path(settings.explainer)
    if saved is not None and saved.exists():
        kind = kind_of(saved)
        if kind == "SALFCBM":
            salf = load(saved, loaded.model)
            ignored = ("words", *_TRAINED, *_COMPARED, "layer", *(("classes",) if salf.class_names else ()))
            settings.refuse(ignored, f"the model in {saved} has its own concepts, classes and layer")
            names = salf.class_names or _class_names(settings, loaded, salf.num_classes)
            return Explainer(salf, salf.layer, names, loaded.model, salf.layer)
        if kind != "ConceptFusionMap":
            return _saved(saved, settings, loaded, probe)
    if settings.words is not None or saved is not None:
        return _words(settings, loaded, probe, failed)
    settings.refuse(_TRAINED, "they are for --words")
    if settings.references is None:
        settings.refuse(("similarity",), "it is for --references")
        return _outputs(settings, loaded, probe)
    settings.refuse(("classes",), "the folders of --references name the classes")
    return _prototypes(settings, loaded, probe, failed)


#: Options for training with words, and for prototypes.
_TRAINED = ("encoder", "encoder_weights", "train", "layers")
_COMPARED = ("references", "similarity")


def new_explainer(settings: ExplainerSettings) -> str | None:
    """File to which a newly trained explainer will be saved; None if there is none."""
    file = settings.explainer
    return None if file is None or settings.words is None or Path(file).exists() else file


def _class_names(settings: ExplainerSettings, loaded: LoadedModel, outputs: int) -> list[str]:
    names = read_words(settings.classes) if settings.classes else loaded.classes
    names = names or [f"output {k}" for k in range(outputs)]
    if len(names) != outputs:
        raise InputError(f"{len(names)} class names for the {outputs} outputs of {settings.model}")
    return [name if names.count(name) == 1 else f"{name} ({k})" for k, name in enumerate(names)]


def _outputs(settings: ExplainerSettings, loaded: LoadedModel, probe: Tensor) -> Explainer:
    """FAM of the model's own outputs, with unit vectors as references (Grad-CAM without its ReLU)."""
    with torch.no_grad():
        outputs = output_tensor(loaded.model(probe))
    if outputs.ndim != 2:
        raise InputError(
            f"{settings.model} returns {tuple(outputs.shape)}, not (N, classes). For a model of boxes, pixels or "
            "keypoints, explain one number per image from Python; see captum_concepts.targets"
        )
    names = _class_names(settings, loaded, outputs.shape[1])
    layer = settings.layer or suggest_layer(loaded.model, probe)
    bank = torch.eye(outputs.shape[1], device=probe.device)
    fam = FeatureActivationMap(loaded.model, layer, bank, reference_names=names, similarity="dot", weights="gradient")
    return Explainer(fam, layer, names, loaded.model, layer, _link(loaded.model, layer, probe))


def _link(model: nn.Module, layer: str, probe: Tensor) -> str:
    """How the model's outputs become probabilities; "none" if it ends in a softmax or sigmoid."""
    seen = Layers.resolve(model, layer).capture(probe, logits=True)
    return "none" if seen.final is not None else class_link("auto", output_tensor(seen.output), None)


def _prototypes(settings: ExplainerSettings, loaded: LoadedModel, probe: Tensor, failed: Failed) -> Explainer:
    """FAM with the mean embedding of each class folder as references."""
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
        normalize="l1",  # not "minmax": the maps of an image share one color scale
    ).fit(torch.stack(examples), names)  # fmt: skip
    return Explainer(fam, layer, fam.concepts, model, layer)


def _saved(file: Path, settings: ExplainerSettings, loaded: LoadedModel, probe: Tensor) -> Explainer:
    """Concept vectors of ``fit-concepts --concepts``, discovered concepts, or references."""
    settings.refuse(("words", *_TRAINED, *_COMPARED, "layer"), f"the concepts and the layer of {file} are fixed")
    made = load(file, loaded.model)
    with torch.no_grad():
        names = _class_names(settings, loaded, output_tensor(loaded.model(probe)).shape[1])
    layer = Layers.resolve(made.forward_func, made.layer).names[0]
    return Explainer(made, layer, names, loaded.model, layer, _link(loaded.model, layer, probe))


def _words(settings: ExplainerSettings, loaded: LoadedModel, probe: Tensor, failed: Failed) -> Explainer:
    """CE-FAM with a translator to a VLM that is loaded from a file or trained on a folder of images."""
    file = None if settings.explainer is None else Path(settings.explainer)
    settings.refuse(
        (*_COMPARED, "layer"), "text concepts are read from several layers (--layers), and are not compared with images"
    )
    if file is not None and file.is_file():
        made = ConceptFusionMap.load(file, loaded.model)
        if settings.words is not None:
            made = made.with_concepts(word_list(settings.words), encoder_of(settings))
    else:
        if settings.words is None or settings.train is None:
            missing = f"no explainer file at {file}; " if file else ""
            raise InputError(
                f"{missing}text concepts need a translator; to train one, pass --words, --encoder and --train DIR "
                "(some thousand such images)"
            )
        made = fit_words(settings, loaded, failed)
        if file is not None:
            made.save(file)
    if made.concepts is None:
        raise InputError(f"{file} was fitted without concepts; pass --words and --encoder")
    with torch.no_grad():
        outputs = output_tensor(loaded.model(probe))
    names = _class_names(settings, loaded, outputs.shape[1])
    last = made.layers[-1] if isinstance(made.layers[-1], str) else suggest_layer(loaded.model, probe)
    return Explainer(made, str(made.map_layer), names, loaded.model, last)


def fit_words(settings: ModelSettings, loaded: LoadedModel, failed: Failed) -> ConceptFusionMap:
    """CE-FAM trained on the images in ``settings.train``, with the words of ``settings.words``, if any."""
    encoder = encoder_of(settings)
    words = None if settings.words is None else word_list(settings.words)
    layers = [name.strip() for name in (settings.layers or "").split(",") if name.strip()]
    layers = layers or suggest_stages(loaded.model, loaded.empty())
    images = readable(loaded.open(find_images(settings.train or "")), failed, "training images")
    made = ConceptFusionMap(loaded.model, layers, map_layer="fused", batch_size=settings.batch_size)
    return made.fit(images, encoder, words, model_transform=loaded.prepare, show_progress=True)


def encoder_of(settings: ModelSettings) -> Any:
    """The vision-language model of ``--encoder``."""
    if settings.encoder is None:
        raise InputError("--words requires --encoder: demo:clip, an open_clip name, or FILE.py:FUNCTION")
    return load_encoder(settings.encoder, settings.encoder_weights)


def word_list(words: str | Sequence[str]) -> list[str]:
    """Words from a file, from comma-separated text, or from a list."""
    if not isinstance(words, str):
        return list(words)
    if os.path.isfile(words):  # noqa: PTH113 - unlike Path.is_file, False for a text that is too long for a name
        return read_words(words)
    found = [word.strip() for word in words.split(",") if word.strip()]
    if len(found) == 1 and Path(found[0]).suffix.lower() in (".txt", ".csv", ".json", ".md", ".tsv", ".list"):
        raise InputError(f"there is no concept file at {found[0]}")
    if not found:
        raise InputError(
            f"--words {shortened(words)} contains no concept and is not a file; pass 'stripes, grass, sky' or a file"
        )
    return found
