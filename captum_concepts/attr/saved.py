"""`load` for saved explainers of any method."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from captum_concepts._artifacts import open_safetensors
from captum_concepts.errors import ArtifactError, listing

#: The module of each class with a ``save`` method.
KINDS = {
    "ConceptFusionMap": "captum_concepts.attr.concept_fusion_map",
    "DiscoveredConcepts": "captum_concepts.attr.discovered_concepts",
    "FeatureActivationMap": "captum_concepts.attr.feature_activation_map",
    "SpatialACV": "captum_concepts.attr.spatial_acv",
}


def kind_of(path: str | os.PathLike[str]) -> str:
    """The class whose ``save`` wrote ``path``: a name of :data:`KINDS`, or ``"SALFCBM"`` for a folder.

    Raises:
        FileNotFoundError: the path does not exist.
        ArtifactError: the file is not a saved explainer.
    """
    path = Path(path)
    if path.is_dir():
        return "SALFCBM"
    with open_safetensors(path, "a saved explainer") as opened:
        found = (opened.metadata() or {}).get("format", "")
    kind = found.removeprefix("captum_concepts.").partition("/")[0]
    if kind not in KINDS:
        what = f"it is a {kind}" if kind else "it does not say what it is"
        raise ArtifactError(
            f"{path} is not a saved explainer ({what}); these are {listing(KINDS)}, and SALFCBM folders"
        )
    return kind


def load(path: str | os.PathLike[str], model: Any, layers: Any = None) -> Any:
    """The explainer saved in ``path``, of any method, for its model.

    Args:
        path: a file written by ``save``, or a folder written by ``SALFCBM.save_pretrained``.
        model: the model that the explainer was saved for (for a ``SALFCBM`` its backbone, or None to build it by name).
        layers: needed only if the saved names do not identify the layers (modules of a plain function).

    Raises:
        FileNotFoundError: the path does not exist.
        ArtifactError: the file is damaged, is not a saved explainer, or was saved for another model.

    Example:
        >>> import tempfile, torch
        >>> import captum_concepts
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> fam = captum_concepts.FeatureActivationMap(net, "0", torch.eye(4), reference_names=list("abcd"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = captum_concepts.load(fam.save(f"{folder}/fam.safetensors"), net)
        >>> again.concepts
        ['a', 'b', 'c', 'd']
    """
    kind = kind_of(path)
    if kind == "SALFCBM":
        from captum_concepts.models.salf_cbm import SALFCBM

        try:
            return SALFCBM.from_pretrained(path, backbone=model)
        except FileNotFoundError as error:
            raise ArtifactError(f"{path} does not contain a saved SALFCBM: {error}") from error
    return getattr(importlib.import_module(KINDS[kind]), kind).load(path, model, layers)
