"""Reading and checking of the configuration of `fit-salf`, and the resulting arguments of `fit_salf_cbm`."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from captum_concepts._artifacts import (
    anything,
    check_json,
    either,
    flag,
    integer,
    is_there,
    list_of,
    mapping_of,
    nothing_or,
    number,
    table,
    text,
)
from captum_concepts.activations.survey import suggest_layer
from captum_concepts.commands.image_files import LabelledImages, labelled_images
from captum_concepts.commands.models import load_encoder, load_model, to_device
from captum_concepts.concepts import Vocabulary
from captum_concepts.errors import InputError, did_you_mean
from captum_concepts.images import read_json, read_words
from captum_concepts.images.pixels import RESIZES
from captum_concepts.models.salf_cbm.fit import fit_salf_cbm
from captum_concepts.vlm import regions_from_dict

EXAMPLE = {
    "model": "resnet50",
    "weights": "pretrained",
    "layer": "layer4",
    "encoder": "ViT-B-16",
    "encoder_weights": "openai",
    "train": "images/train",
    "val": "images/val",
    "concepts": "concepts.txt",
    "prompt": {"kind": "circle", "grid": 7, "radius": 32},
    "nonzeros_per_class": 30,
    "store": "work/store",
    "output": "work/model",
}
TRIAL = {
    "model": "demo:classifier",
    "layer": "layer4",
    "encoder": "demo:clip",
    "train": "demo:scenes:200",
    "val": "demo:scenes:100",
    "concepts": ["circle", "square", "triangle", "star", "red", "blue", "striped", "dotted"],
    "store": "work/store",
    "output": "work/model",
}
_REQUIRED = ("model", "encoder", "train", "concepts", "store", "output")
_OWN = (
    *_REQUIRED, "weights", "layer", "size", "resize", "num_classes", "encoder_weights", "val", "templates", "clean",
    "filter", "classes", "prompt", "device", "skip_unreadable", "within_hours",
)  # fmt: skip
_WORDS = list_of(text(), least=1)
#: Types of the entries that :func:`fit_salf_cbm` does not check itself.
_TYPES = {
    **dict.fromkeys(("model", "encoder", "store", "output"), text()),
    **dict.fromkeys(("weights", "layer", "encoder_weights"), nothing_or(text())),
    **dict.fromkeys(("clean", "skip_unreadable"), nothing_or(flag)),
    "size": nothing_or(integer(1, 4096)),
    "resize": nothing_or(text(*RESIZES)),
    "num_classes": nothing_or(integer(1, 1_000_000)),
    "templates": nothing_or(either(text(), _WORDS)),
    "filter": nothing_or(
        either(flag, table({}, {"similarity": flag, "max_length": nothing_or(number(0)), "class_cutoff": number()}))
    ),
    "classes": text(),
    "prompt": nothing_or(mapping_of(anything)),
    "device": text(),
    "within_hours": number(1e-12, 1e6),
    "feature_dtype": text("float16", "float32"),
}
_NOT_HERE = (
    "backbone", "encoder", "images", "val_data", "concepts", "store_path", "class_names", "model_transform",
    "encoder_transform", "show_progress", "prompt",
)  # fmt: skip


def fit_options() -> dict[str, Any]:
    """Options of :func:`fit_salf_cbm` that a configuration may contain, with their defaults."""
    parameters = inspect.signature(fit_salf_cbm).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in (*_NOT_HERE, *_OWN)}


def help_text() -> str:
    """Help on the configuration, with examples."""
    options = ", ".join(sorted(fit_options()))
    return f"""\
the configuration is a JSON file; relative paths are relative to the current folder:

{json.dumps(EXAMPLE, indent=2)}

  model, weights, layer, size, resize, num_classes, encoder, encoder_weights, device: as for explain
  train, val: a folder with one folder of images per class, or demo:scenes:N (the bundled synthetic scenes)
  concepts: a list, a file (one per line, or JSON), or "classes" for "An image of a CLASS"
  templates: texts with {{}} for the concept; clean: true removes near-duplicates
  filter: removes concepts that are too long or too similar, e.g. {{"max_length": 30, "class_cutoff": 0.85}};
    "similarity": false filters only by length and class name, for encoders with a fixed vocabulary
  classes: a file with the class names, in the order of the folders
  prompt: {{"kind": "circle", "crop" or "blur", "grid": 7, "radius": 32, ...}} (RegionPrompt), or one encoder pass per
          image: {{"kind": "dense", "grid": 7}} (DenseRegions)
  regions_per_image: 11 prompts only 11 cells of each image, those that differ most from the rest of it
  skip_unreadable: true reads every image first and leaves out those that cannot be read
  within_hours: time limit for which the dry run computes the number of machines (default: 24)
  options of fit_salf_cbm: {options}

an example that runs offline in a few minutes:

{json.dumps(TRIAL, indent=2)}

several processes: torchrun --nproc-per-node 4 -m captum_concepts fit-salf --config FILE
if interrupted or killed, repeat the same command to resume.

"""


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration, checked for missing and unknown entries.

    Raises:
        InputError: no such file, not a JSON object, or a missing or unknown entry (a close match is suggested).
    """
    file = Path(path)
    if not is_there(file):
        raise InputError(f"there is no configuration file at {file}")
    config = read_json(file, dict)
    missing = [name for name in _REQUIRED if config.get(name) is None]
    if missing:
        raise InputError(f"{file} lacks {', '.join(missing)}; see fit-salf --help for an example")
    known = [*_OWN, *fit_options()]
    for name in config:
        if name not in known:
            raise InputError(f"{file} has an unknown key {name!r}.{did_you_mean(name, known)}")
        if config[name] == "":
            raise InputError(f"{name} is empty in {file}; leave it out, or give it a value")
    return dict(check_json(config, table({}, {**dict.fromkeys(known, anything), **_TYPES}), str(file), InputError))


def fit_arguments(
    config: Mapping[str, Any], device: str
) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, str]]]:
    """Preprocessing to record with the model, the arguments of :func:`fit_salf_cbm`, and skipped files.

    Raises:
        InputError: model, encoder, images, concepts or an option cannot be used.
    """
    skipped: list[dict[str, str]] = []
    loaded = load_model(
        config["model"],
        weights=config.get("weights"),
        size=config.get("size"),
        resize=config.get("resize"),
        num_classes=config.get("num_classes"),
    )
    to_device(loaded.model, device)
    encoder = load_encoder(config["encoder"], config.get("encoder_weights"))
    if callable(getattr(encoder, "to", None)):
        encoder = encoder.to(device)
    opened = {
        name: labelled_images(
            config[name],
            loaded.size,
            skipped if config.get("skip_unreadable") else None,
            seed=seed,
            preprocessing=loaded.preprocessing,
        )
        for seed, name in enumerate(("train", "val"))
        if config.get(name) is not None
    }
    train = opened["train"]
    if "val" in opened and opened["val"].classes != train.classes:
        val = opened["val"]
        different = sorted(set(val.classes) ^ set(train.classes))
        if different:
            raise InputError(f"train and val have different classes: {different[:10]}")
        numbers = [train.classes.index(name) for name in val.classes]  # the same classes in another order
        opened["val"] = LabelledImages(val.images, train.classes, [numbers[k] for k in val.targets])
    names = read_words(config["classes"]) if "classes" in config else train.classes
    if len(names) != len(train.classes):
        raise InputError(f"{len(names)} names in {config['classes']} for {len(train.classes)} class folders")
    options = {name: config[name] for name in fit_options() if name in config}
    if "feature_dtype" in options:
        options["feature_dtype"] = getattr(torch, options["feature_dtype"])
    if isinstance(config.get("prompt"), dict):
        options["prompt"] = regions_from_dict(config["prompt"], complete=False)
    elif config.get("prompt") is not None:
        raise InputError(f"prompt must be an object such as {EXAMPLE['prompt']}, got {config['prompt']!r}")
    layer = config.get("layer")
    if layer is None:
        layer = suggest_layer(loaded.model, loaded.empty())
    arguments = {
        "backbone": loaded.model,
        "layer": layer,
        "encoder": encoder,
        "images": train,
        "val_data": opened.get("val"),
        "concepts": _vocabulary(config, names, encoder),
        "num_classes": len(names),
        "class_names": names,
        "model_transform": loaded.prepare,
        "store_path": config["store"],
        **options,
    }
    p = loaded.preprocessing
    seen = {
        "size": loaded.size,
        "mean": list(p.mean),
        "std": list(p.std),
        "pixels": "RGB in [0, 1]",
        "prepared": str(p),
    }
    return seen, arguments, skipped


def _vocabulary(config: Mapping[str, Any], names: list[str], encoder: Any) -> Vocabulary:
    given, templates = config["concepts"], config.get("templates")
    if given == "classes":
        made = Vocabulary.from_classes(names)
    elif isinstance(given, str):
        if not is_there(Path(given)):
            raise InputError(f"there is no concept file at {given}; pass a file, a list, or 'classes'")
        made = Vocabulary.load(given)
    elif isinstance(given, list):
        made = Vocabulary(given)
    else:
        raise InputError(f"concepts must be a list, a file, or 'classes', got {given!r}")
    if templates is not None:
        made = Vocabulary(made, templates=templates, sources=made.sources, report=made.report)
    if config.get("clean"):
        made = made.clean()
    if config.get("filter"):
        wanted = dict(config["filter"]) if isinstance(config["filter"], dict) else {}
        made = made.filter(names, encoder if wanted.pop("similarity", True) else None, **wanted)
    return made
