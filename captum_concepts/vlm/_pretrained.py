"""The preprocessing of local files and published weights, and messages for weights that cannot be loaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from captum_concepts.errors import InputError, InputWarning, did_you_mean
from captum_concepts.vlm._preprocessing import IMAGE_KEYS


def check_file(name: str, source: str, tags: list[str]) -> None:
    """Raise an error if ``source`` is not a file, listing the nearest tags."""
    if not Path(source).is_file():
        raise InputError(
            f"pretrained={source!r} is neither a file nor a tag of {name!r}.{did_you_mean(source, tags)} Tags: {tags}"
        )


def published_preprocess(open_clip: Any, name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessing of a model's published weights, for a local file that does not record its own."""
    found: list[dict[str, Any]] = []
    for tag in open_clip.list_pretrained_tags_by_model(name):
        config = open_clip.get_pretrained_cfg(name, tag)
        config = {key: config[key] for key in IMAGE_KEYS if key != "size" and config.get(key) is not None}
        if config not in found:
            found.append(config)
    if len(found) == 1:
        return found[0]
    differing = {key for config in found for key in config if any(other.get(key) != config[key] for other in found)}
    if differing - set(overrides):
        warnings.warn(
            f"the published weights of {name!r} differ in preprocessing ({sorted(differing)}) and a file does not "
            "state which it needs, so open_clip's default is used. Pass preprocess= to choose, for example "
            f"preprocess={found[0]}",
            InputWarning,
            stacklevel=3,
        )
    return {}


def failure(name: str, source: str | None, error: Exception) -> str:
    """The message for weights that could not be loaded."""
    reason = first_line(error)
    if source is not None and Path(source).is_file():
        return (
            f"the weights in {source!r} could not be loaded into {name!r} ({reason}). The file must be a state dict of "
            "this very model: .safetensors, or .pt/.bin/.pth holding tensors only. OpenAI's TorchScript archives have "
            "to be saved as a state dict first; OpenAI's weights need the name with '-quickgelu'"
        )
    if name.startswith("local-dir:"):
        return (
            f"{name!r} could not be loaded ({reason}). The folder must contain open_clip_config.json and its weights, "
            "open_clip_model.safetensors"
        )
    return (
        f"{name!r} with pretrained={source!r} could not be loaded ({reason}). Weights that are not cached need the "
        "network: connect once, or fetch the file elsewhere and pass its path as pretrained="
    )


def first_line(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
