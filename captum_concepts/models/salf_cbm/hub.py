"""Saving and loading of a SALFCBM (safetensors, JSON and a model card), locally and on the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor, nn

from captum_concepts._artifacts import (
    anything,
    check_expanded,
    check_json,
    flag,
    integer,
    list_of,
    mapping_of,
    nothing_or,
    number,
    open_artifact,
    open_safetensors,
    read_json,
    save_artifact,
    table,
    text,
    write_atomically,
)
from captum_concepts.activations import unwrap
from captum_concepts.errors import ArtifactError, InputError
from captum_concepts.images import Preprocessing
from captum_concepts.models.salf_cbm.card import card_fields
from captum_concepts.models.salf_cbm.reading import Reading, freeze_unreached, input_channels
from captum_concepts.models.salf_cbm.recipes import build_backbone, recipe_of
from captum_concepts.store import fingerprint_module

if TYPE_CHECKING:
    from captum_concepts.models.salf_cbm.salf_cbm import SALFCBM

Model = TypeVar("Model", bound="SALFCBM")

FORMAT = "captum_concepts.SALFCBM/2"
_FIRST = "captum_concepts.SALFCBM/1"
#: Defaults of the keys that format 1 lacks; it has the same names for all others.
_SINCE_2 = {"hidden": None, "multi_label": False, "preprocessing": None, "batch_size": 32}
#: Arguments of the constructor besides the backbone; all are attributes of the model.
ARGUMENTS = (
    "layer",
    "concepts",
    "num_classes",
    "grid",
    "cls_token",
    "class_names",
    "freeze_backbone",
    "layout",
    "prefix_tokens",
    "feature_dim",
    "input_size",
    "metadata",
    *_SINCE_2,
)
_WEIGHTS, _CONFIG, _CARD, _PICTURE = "model.safetensors", "config.json", "README.md", "examples.png"
_TEMPLATE = Path(__file__).with_name("card.md")
_BUFFERS = ("concept_mean", "concept_std", "presence_slope", "presence_offset")
_BACKBONE = "backbone."
_WHAT = "a saved SALFCBM"

_MOST_NUMBERS, _MOST_PIXELS = 1 << 24, 1 << 22
_SIZE = integer(1, 2**31)
_PAIR = list_of(_SIZE, length=2)
_FIELDS = {
    "format": text(FORMAT, _FIRST),
    "layer": text(),
    "concepts": list_of(text(), least=1),
    "num_classes": _SIZE,
    "grid": _PAIR,
    "cls_token": flag,
    "class_names": nothing_or(list_of(text())),
    "freeze_backbone": flag,
    "layout": text(),
    "prefix_tokens": nothing_or(integer(0, 2**31)),
    "feature_dim": _SIZE,
    "input_size": nothing_or(_PAIR),
    "metadata": mapping_of(anything),
    "backbone": table({"class": text(), "fingerprint": text(), "stored": flag}, {"recipe": anything}),
    "reading": nothing_or(
        table(
            {
                "kind": text("NCHW", "NHWC", "NLC", "LNC"),
                "prefix_tokens": integer(0, 2**31),
                "channels": _SIZE,
                "image_size": _PAIR,
                "grid": _PAIR,
            }
        )
    ),
}
_NEWER = {
    "hidden": nothing_or(_SIZE),
    "multi_label": flag,
    "batch_size": _SIZE,
    "preprocessing": nothing_or(
        table(
            {
                "size": nothing_or(_PAIR),
                "mean": list_of(number(), least=1, most=1024),
                "std": list_of(number(1e-12), least=1, most=1024),
                "interpolation": text(),
                "crop": number(0, 1),
                "resize": text(),
                "source": text(),
            }
        )
    ),
}
_SCHEMA = table(_FIELDS, {**_NEWER, "nonzeros": integer()})


# ------------------------------------------------------------------------------------------------- saving


def save_folder(model: SALFCBM, folder: Path, name: str, data: ModelCardData, images: Tensor | None) -> None:
    """Write all files of a model; those of an older one are replaced only after all are complete."""
    config = config_of(model)
    check_expanded(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as new:
        write_files(model, config, Path(new))
        card = str(model_card(model, config, name, data))
        if images is not None:
            card = _with_picture(model, images, Path(new) / _PICTURE, card)
        write_atomically(Path(new) / _CARD, card)
        for file in (_WEIGHTS, _CONFIG, _PICTURE, _CARD):
            if (Path(new) / file).exists():
                (Path(new) / file).replace(folder / file)


def write_files(model: SALFCBM, config: Mapping[str, Any], folder: Path) -> None:
    """Write weights and configuration."""
    state = model.state_dict()
    own = {name: value for name, value in state.items() if not name.startswith(_BACKBONE)}
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    if shapes != _shapes(config, own) or not isinstance(model.head, nn.Linear):
        raise InputError(
            "save_pretrained keeps the model's own bottleneck and head, but they were replaced "
            f"({type(model.bottleneck).__name__}, {type(model.head).__name__}); save such a model with its "
            "state_dict()"
        )
    if (too_large := _too_large(config)) is not None:
        raise InputError(f"this model cannot be saved: {too_large}")
    try:
        content = json.dumps(config, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"metadata must be JSON-serializable (strings, finite numbers, lists, dictionaries): {error}"
        ) from error
    whole = {name: v for name, v in _plain(state).items() if isinstance(v, Tensor)}
    tensors = whole if config["backbone"]["stored"] else own
    save_artifact(folder / _WEIGHTS, FORMAT, {"config": _digest(config)}, tensors)
    write_atomically(folder / _CONFIG, content)


def config_of(model: SALFCBM) -> dict[str, Any]:
    """The content of ``config.json``."""
    backbone = unwrap(model.backbone)
    recipe = recipe_of(backbone, model.layer, None if model._reading is None else model._reading.image_size)
    stored = model._save_backbone
    if stored is None:
        stored = not model.freeze_backbone or recipe is not None
    values = {name: getattr(model, name) for name in ARGUMENTS}
    preprocessing = model.preprocessing
    values["preprocessing"] = None if preprocessing is None else asdict(preprocessing)
    about = {"class": type(backbone).__name__, "fingerprint": fingerprint_module(backbone), "stored": stored}
    return {
        "format": FORMAT,
        **values,
        "nonzeros": int((model.head.weight != 0).sum()) if isinstance(model.head, nn.Linear) else 0,
        "backbone": about if recipe is None else {**about, "recipe": recipe},
        "reading": None if model._reading is None else asdict(model._reading),
    }


def model_card(model: SALFCBM, config: Mapping[str, Any], name: str, data: ModelCardData) -> ModelCard:
    """The model card, from the template ``card.md``."""
    values = card_fields(model, config, name)
    return ModelCard.from_template(data, template_path=str(_TEMPLATE), **values)


def _with_picture(model: SALFCBM, images: Tensor, path: Path, card: str) -> str:
    from captum_concepts.visualization import panel

    shown = images[:4]
    explanation = model.explain(shown, top_k=3)
    pixels = shown.detach().float().cpu()
    pixels = pixels if model.preprocessing is None else model.preprocessing.undo(pixels)
    if model.preprocessing is None and not bool(((pixels >= 0) & (pixels <= 1)).all()):
        low, high = pixels.amin((1, 2, 3), keepdim=True), pixels.amax((1, 2, 3), keepdim=True)
        pixels = (pixels - low) / (high - low).clamp_min(1e-12)
    panel(explanation, pixels.clamp(0, 1)).savefig(path, dpi=100, bbox_inches="tight")
    return f"{card.rstrip()}\n\n## Examples\n\n![Images, the concepts that decided, and where]({_PICTURE})\n"


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with names without the prefixes of ``torch.compile`` and DataParallel around the backbone."""
    wrappers = ("_orig_mod", "module")
    plain = {}
    for name, value in state.items():
        head, *rest = name.split(".")
        while head == "backbone" and rest and rest[0] in wrappers:
            rest = rest[1:]
        plain[".".join([head, *rest])] = value
    return plain


def _shapes(config: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The expected shapes of all tensors but the backbone's; only a calibrated model has presence."""
    m, width, classes, hidden = len(config["concepts"]), config["feature_dim"], config["num_classes"], config["hidden"]
    shapes: dict[str, tuple[int, ...]] = {"head.weight": (classes, m), "head.bias": (classes,)}
    if hidden is None:
        shapes["bottleneck.weight"] = (m, width, 1, 1)
    else:
        shapes |= {"bottleneck.0.weight": (hidden, width, 1, 1), "bottleneck.0.bias": (hidden,)}
        shapes["bottleneck.2.weight"] = (m, hidden, 1, 1)
    there = _BUFFERS if "presence_slope" in own else _BUFFERS[:2]
    return shapes | dict.fromkeys(there, (m,))


# ------------------------------------------------------------------------------------------------- loading


def find_folder(name: str | os.PathLike[str], download: Mapping[str, Any]) -> Path:
    """The folder ``name``, or the downloaded Hub repository of that name."""
    path = str(name)
    if Path(path).is_dir():
        return Path(path)
    if Path(path).is_file():
        raise InputError(f"{path} is a file; pass the folder that save_pretrained wrote, which contains {_WHAT}")
    if isinstance(name, os.PathLike) or path[:1] in ("/", ".", "~") or "\\" in path:
        raise FileNotFoundError(f"there is no folder {path}, which should contain {_WHAT}")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=[_WEIGHTS, _CONFIG], **download))


def load_folder(cls: type[Model], folder: Path, backbone: nn.Module | None, check_backbone: bool) -> Model:
    """The model in ``folder``; see ``SALFCBM.from_pretrained``."""
    config = _read_config(folder / _CONFIG)
    backbone = _backbone(config, folder) if backbone is None else backbone
    with open_artifact(folder / _WEIGHTS, {FORMAT: {}, _FIRST: {}}, _WHAT) as (info, tensors):
        if info.get("config") != _digest(config):
            raise ArtifactError(f"{folder / _CONFIG} and {_WEIGHTS} next to it do not belong together")
        inner = {n.removeprefix(_BACKBONE): t for n, t in tensors.items() if n.startswith(_BACKBONE)}
        own = {n: t for n, t in tensors.items() if not n.startswith(_BACKBONE)}
        _check_tensors(config, own, folder)
        given = unwrap(backbone)
        about = config["backbone"]
        if about["stored"]:
            _check_fit({n: v for n, v in given.state_dict().items() if isinstance(v, Tensor)}, inner, folder)
        elif check_backbone and fingerprint_module(given) != about["fingerprint"]:
            raise ArtifactError(
                f"the model in {folder} was trained with a {about['class']} whose weights or dtype differ from those "
                f"of the {type(given).__name__} passed; pass the original backbone, or check_backbone=False"
            )
        options = {name: config[name] for name in ARGUMENTS}
        if options["preprocessing"] is not None:
            values: dict[str, Any] = options["preprocessing"]
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            options["preprocessing"] = Preprocessing(**values)
        with torch.random.fork_rng(devices=[]):  # its first weights are replaced
            model = cls(backbone, **options)
        given.load_state_dict(inner, strict=False)
        model.load_state_dict(own, strict=False)
        model.set_standardization(own["concept_mean"], own["concept_std"])
        if config["reading"] is not None:
            model._reading = _reading(config["reading"])
            model._check_reading(model._reading)
            if not model.freeze_backbone:
                image = torch.zeros(1, input_channels(given), *model._reading.image_size).to(model.concept_mean)
                freeze_unreached(backbone, model.layer, image)
        return model.eval()


def _backbone(config: Mapping[str, Any], folder: Path) -> nn.Module:
    about = config["backbone"]
    if "recipe" not in about:
        raise InputError(
            f"pass backbone=, the {about['class']} that the model in {folder} was trained with; the folder does not "
            "describe how to build it"
        )
    if not about["stored"]:
        raise InputError(
            f"pass backbone=, the {about['class']} that the model in {folder} was trained with; its weights were not "
            "saved (save_backbone=False)"
        )
    with open_safetensors(folder / _WEIGHTS, _WHAT) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    stored = {name.removeprefix(_BACKBONE): shape for name, shape in shapes.items() if name.startswith(_BACKBONE)}
    return build_backbone(about["recipe"], folder, stored)


def _check_tensors(config: Mapping[str, Any], own: Mapping[str, Tensor], folder: Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    wanted = _shapes(config, own)
    if shapes != wanted:
        wrong = sorted(name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name))[:3]
        found = ", ".join(f"{name} {shapes.get(name, 'missing')}, not {wanted.get(name, 'expected')}" for name in wrong)
        raise ArtifactError(f"{folder / _WEIGHTS} does not match its configuration: {found}")
    if not all(t.is_floating_point() and bool(t.isfinite().all()) for t in own.values()):
        raise ArtifactError(f"{folder / _WEIGHTS} contains values that are not finite numbers")


def _check_fit(given: Mapping[str, Tensor], stored: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse a backbone that does not match, before anything is copied into it."""
    if other := sorted(set(given) ^ set(stored)):
        raise ArtifactError(f"the backbone stored in {folder} and the one passed differ in {other[:5]}")
    if other := [name for name in given if given[name].shape != stored[name].shape]:
        raise ArtifactError(f"the backbone stored in {folder} and the one passed differ in the shapes of {other[:5]}")


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path, anything, f"the configuration of {_WHAT}")
    if not isinstance(config, dict) or config.get("format") not in (FORMAT, _FIRST):
        raise ArtifactError(f"{path} is not the configuration of {_WHAT} (format {FORMAT!r} or {_FIRST!r})")
    found: dict[str, Any] = check_json({**_SINCE_2, **config}, _SCHEMA, str(path))
    if (too_large := _too_large(found)) is not None:
        raise ArtifactError(f"{path} is damaged or not of this format: {too_large}")
    return found


def _too_large(config: Mapping[str, Any]) -> str | None:
    """Why sizes that no stored tensor determines are implausibly large; None if they are not."""
    (h, w), width = config["grid"], max(config["feature_dim"], len(config["concepts"]))
    if h * w * width > _MOST_NUMBERS:
        return f"a grid of {h} x {w} cells of {width} numbers each is larger than any model's"
    sizes = [config["input_size"], *([] if config["reading"] is None else [config["reading"]["image_size"]])]
    large = next((size for size in sizes if size is not None and size[0] * size[1] > _MOST_PIXELS), None)
    return None if large is None else f"images of {large[0]} x {large[1]} pixels are larger than any model's"


def _reading(values: Mapping[str, Any]) -> Reading:
    pairs = {name: tuple(values[name]) for name in ("image_size", "grid")}
    return Reading(**{f.name: pairs.get(f.name, values.get(f.name)) for f in fields(Reading)})  # type: ignore[arg-type]


def _digest(config: Mapping[str, Any]) -> str:
    """A digest of what the tensors mean; class names and metadata are excluded, so they can be edited by hand."""
    unbound = ("metadata", "class_names", *(_SINCE_2 if config["format"] == _FIRST else ()))
    meant = {name: config[name] for name in (*ARGUMENTS, "backbone") if name not in unbound}
    return hashlib.sha256(json.dumps(meant, sort_keys=True).encode()).hexdigest()[:32]
