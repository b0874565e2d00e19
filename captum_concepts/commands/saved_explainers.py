"""Explainers that an earlier command saved, told apart by what their files say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from captum_concepts.attr.spatial_acv import SpatialACV
from captum_concepts.errors import ArtifactError
from captum_concepts.models.salf_cbm import SALFCBM


def format_of(file: Path) -> str:
    """The class whose ``save`` wrote a safetensors file, such as ``"SpatialACV"``; empty where it does not say.

    Raises:
        ArtifactError: no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            kind = (opened.metadata() or {}).get("format", "")
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{file} is no file of fit-concepts: {error}") from error
    return kind.removeprefix("captum_concepts.").partition("/")[0]


def load_acv(file: Path, model: nn.Module) -> SpatialACV:
    """Concept vectors for ``model``."""
    return SpatialACV.load(file, model)


def load_salf(folder: Path, backbone: nn.Module) -> Any:
    """A SALF-CBM for its backbone; a folder that holds something else is refused."""
    try:
        return SALFCBM.from_pretrained(folder, backbone=backbone)
    except FileNotFoundError as error:
        raise ArtifactError(f"{folder} holds no model of fit-salf: {error}") from error
