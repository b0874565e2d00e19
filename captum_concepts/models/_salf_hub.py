"""SALFCBM on disk and on the Hugging Face Hub: safetensors, JSON and a model card."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn

from captum_concepts._artifacts import open_artifact, parse_json, save_artifact, write_atomically
from captum_concepts.activations.capture import unwrap
from captum_concepts.errors import ArtifactError, InputError
from captum_concepts.models._salf_card import card_text
from captum_concepts.models._salf_explore import SALFExploration
from captum_concepts.models._salf_features import Reading, freeze_unreached
from captum_concepts.models._salf_names import check_size
from captum_concepts.store.manifest import fingerprint_module

_KIND = "captum_concepts.SALFCBM/1"
_WEIGHTS, _CONFIG, _CARD = "model.safetensors", "config.json", "README.md"
_ARGUMENTS = (
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
)
_OWN = ("bottleneck.weight", "head.weight", "head.bias", "concept_mean", "concept_std")
_BACKBONE = "backbone."
_WHAT = "a saved SALFCBM"


class SALFHub(
    SALFExploration,
    PyTorchModelHubMixin,
    library_name="captum_concepts",
    pipeline_tag="image-classification",
    tags=["concept-bottleneck", "interpretability", "captum"],
):
    """Saving and loading; ``push_to_hub`` comes from ``huggingface_hub``."""

    _save_backbone: bool | None = None

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        save_backbone: bool | None = None,
        config: Any = None,  # noqa: ARG002
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write ``model.safetensors``, ``config.json`` and a model card (``README.md``) into a folder.

        All are complete before the first of an older model is replaced.

        Args:
            save_directory: the folder; it is made where it does not exist.
            save_backbone: store the backbone's weights, too; None stores those of a backbone that was not frozen.
                Otherwise a fingerprint is stored, and loading checks that the same backbone is given.
            config: not used; ``config.json`` is written from the model.
            repo_id, push_to_hub, push_to_hub_kwargs: of ``huggingface_hub``.
            model_card_kwargs: ``{"name": ...}``, the title of the card; else the folder's name.

        Returns:
            The address on the Hub, or None.

        Raises:
            InputError: ``metadata`` is no JSON, or bottleneck or head were replaced by something else.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        card = {"name": repo_id or folder.resolve().name, **(model_card_kwargs or {})}
        before = self._save_backbone  # pushing to the Hub saves once more, into a folder of its own
        self._save_backbone = before if save_backbone is None else save_backbone
        try:
            with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as new:
                self._save_pretrained(Path(new))
                write_atomically(Path(new) / _CARD, str(self.generate_model_card(**card)))
                for name in (_WEIGHTS, _CONFIG, _CARD):
                    (Path(new) / name).replace(folder / name)
            if push_to_hub:
                return self.push_to_hub(repo_id or folder.name, model_card_kwargs=card, **push_to_hub_kwargs)
            return None
        finally:
            self._save_backbone = before

    def _save_pretrained(self, save_directory: Path) -> None:
        stored = not self.freeze_backbone if self._save_backbone is None else self._save_backbone
        state = self.state_dict()
        own = {name: value for name, value in state.items() if not name.startswith(_BACKBONE)}
        if set(own) != set(_OWN) or not self._is_pointwise() or not isinstance(self.head, nn.Linear):
            raise InputError(
                "save_pretrained keeps the model's own bottleneck and head, but they were replaced "
                f"({type(self.bottleneck).__name__}, {type(self.head).__name__}); save such a model by its state_dict()"
            )
        try:
            config = self._config(stored)
            text = json.dumps(config, indent=2)
        except (TypeError, ValueError) as error:
            raise InputError(f"metadata must be JSON-able (texts, numbers, lists, dictionaries): {error}") from error
        tensors = {name: v for name, v in _plain(state).items() if isinstance(v, Tensor)} if stored else own
        save_artifact(save_directory / _WEIGHTS, _KIND, {"config": _digest(config)}, tensors)
        write_atomically(save_directory / _CONFIG, text)

    def _config(self, stored: bool) -> dict[str, Any]:
        backbone = unwrap(self.backbone)
        return {
            "format": _KIND,
            **{name: getattr(self, name) for name in _ARGUMENTS},
            "nonzeros": int((self.head.weight != 0).sum()),
            "backbone": {
                "class": type(backbone).__name__,
                "fingerprint": fingerprint_module(backbone),
                "stored": stored,
            },
            "reading": None if self._reading is None else asdict(self._reading),
        }

    def generate_model_card(self, name: str = "SALF-CBM", **_options: Any) -> ModelCard:
        """The model card, with data, accuracy and drops from :attr:`metadata`."""
        stored = not self.freeze_backbone if self._save_backbone is None else self._save_backbone
        return ModelCard(card_text(self._config(stored), name, self._hub_mixin_info.model_card_data.to_yaml()))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        backbone: nn.Module | None = None,
        check_backbone: bool = True,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> Any:
        """Load what :meth:`save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: a folder, or the name of a repository on the Hub.
            backbone: the module that the model was made with; where its weights were stored, they are loaded into it.
            check_backbone: refuse a backbone with other weights than the one the model was made with.
            revision, cache_dir, force_download, local_files_only, token: of ``huggingface_hub``.

        Returns:
            The model in evaluation mode, on the backbone's device.

        Raises:
            InputError: no backbone is given.
            FileNotFoundError: no such folder, or a file is missing.
            ArtifactError: a file is truncated, corrupt or foreign, or the backbone is another one.
        """
        if not isinstance(backbone, nn.Module):
            raise InputError("give backbone=, the module that the model was made with (config.json names its class)")
        path = str(pretrained_model_name_or_path)
        if Path(path).is_dir():
            folder = Path(path)
        elif isinstance(pretrained_model_name_or_path, os.PathLike) or path[:1] in ("/", ".", "~") or "\\" in path:
            raise FileNotFoundError(f"there is no folder {path}, which should hold {_WHAT}")
        else:
            from huggingface_hub import snapshot_download

            folder = Path(
                snapshot_download(
                    path,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                    allow_patterns=[_WEIGHTS, _CONFIG],
                )
            )
        return cls._from_folder(folder, backbone, check_backbone)

    @classmethod
    def _from_folder(cls, folder: Path, backbone: nn.Module, check_backbone: bool) -> Any:
        config = _read_config(folder / _CONFIG)
        with open_artifact(folder / _WEIGHTS, _KIND, _WHAT) as (info, tensors):
            if info.get("config") != _digest(config):
                raise ArtifactError(f"{folder / _CONFIG} and {_WEIGHTS} beside it do not belong together")
            found = unwrap(backbone)
            inner = {n.removeprefix(_BACKBONE): t for n, t in tensors.items() if n.startswith(_BACKBONE)}
            own = {n: t for n, t in tensors.items() if not n.startswith(_BACKBONE)}
            _check_tensors(config, own, folder)
            if config["backbone"]["stored"]:
                _check_fit({n: v for n, v in found.state_dict().items() if isinstance(v, Tensor)}, inner, folder)
            elif check_backbone and fingerprint_module(found) != config["backbone"]["fingerprint"]:
                raise ArtifactError(
                    f"the model in {folder} was made with a {config['backbone']['class']} of other weights (or another "
                    f"dtype) than the {type(found).__name__} given; give that one, or check_backbone=False"
                )
            model = cls(backbone, **{name: config[name] for name in _ARGUMENTS})
            found.load_state_dict(inner, strict=False)
            with torch.no_grad():
                for name in _OWN[:3]:
                    model.get_parameter(name).copy_(own[name])
            model.set_standardization(own["concept_mean"], own["concept_std"])
            if config["reading"] is not None:
                model._reading = _reading(config["reading"])
                if not model.freeze_backbone:
                    channels = next((c.in_channels for c in found.modules() if isinstance(c, nn.Conv2d)), 3)
                    image = torch.zeros(1, channels, *model._reading.image_size).to(model.concept_mean)
                    freeze_unreached(backbone, model.layer, image)
            return model.eval()


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Names without what ``torch.compile`` and DataParallel put around a backbone."""
    wrappers = ("_orig_mod", "module")
    found = {}
    for name, value in state.items():
        head, *rest = name.split(".")
        while head == "backbone" and rest and rest[0] in wrappers:
            rest = rest[1:]
        found[".".join([head, *rest])] = value
    return found


def _check_tensors(config: Mapping[str, Any], own: Mapping[str, Tensor], folder: Path) -> None:
    m, width, classes = (check_size((n, 1), "size")[0] for n in _sizes(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    wanted = dict(zip(_OWN, [(m, width, 1, 1), (classes, m), (classes,), (m,), (m,)], strict=True))
    if shapes != wanted:
        raise ArtifactError(f"{folder / _WEIGHTS} holds {shapes}, but its configuration asks for {wanted}")
    if not all(t.is_floating_point() and bool(t.isfinite().all()) for t in own.values()):
        raise ArtifactError(f"{folder / _WEIGHTS} holds values that are not finite numbers")


def _sizes(config: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    return len(config["concepts"]), config["feature_dim"], config["num_classes"]


def _check_fit(given: Mapping[str, Tensor], stored: Mapping[str, Tensor], folder: Path) -> None:
    """Before anything is copied: a backbone that does not fit stays as it is."""
    if other := sorted(set(given) ^ set(stored)):
        raise ArtifactError(f"the backbone stored in {folder} and the one given differ in {other[:5]}")
    if other := [name for name in given if given[name].shape != stored[name].shape]:
        raise ArtifactError(f"the backbone stored in {folder} and the one given differ in the shapes of {other[:5]}")


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}, which should be the configuration of {_WHAT}")
    try:
        config = parse_json(path.read_bytes())
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != _KIND:
        raise ArtifactError(f"{path} is not the configuration of {_WHAT} (format {_KIND!r})")
    if missing := sorted({*_ARGUMENTS, "backbone", "reading"} - set(config)):
        raise ArtifactError(f"{path} is not the configuration of {_WHAT}: {missing} are missing")
    return config


def _reading(values: Mapping[str, Any]) -> Reading:
    size, grid = (tuple(int(side) for side in values[name]) for name in ("image_size", "grid"))
    return Reading(str(values["kind"]), int(values["prefix_tokens"]), int(values["channels"]), size, grid)  # type: ignore[arg-type]


def _digest(config: Mapping[str, Any]) -> str:
    """Of what the tensors mean; the metadata may be corrected by hand."""
    meant = {name: config[name] for name in (*_ARGUMENTS, "backbone") if name not in ("metadata", "class_names")}
    return hashlib.sha256(json.dumps(meant, sort_keys=True).encode()).hexdigest()[:32]
