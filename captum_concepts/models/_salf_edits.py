"""Edits of concept maps as users write them, and which concepts lead."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_concepts.errors import InputError
from captum_concepts.models._salf_names import concept_position

_REGION = ("points", "boxes", "mask")
_EDIT = ("concept", "beta", *_REGION)


def parse_edits(
    concept: Any, beta: Any, regions: Mapping[str, Any], concepts: Sequence[str]
) -> list[tuple[int, float, Mapping[str, Any]]]:
    """``(column, beta, region)`` of every edit; see ``SALFCBM.intervene``."""
    many = isinstance(concept, (list, tuple))
    if many and concept and all(isinstance(edit, Mapping) for edit in concept):
        if beta is not None or any(value is not None for value in regions.values()):
            raise InputError("a list of edits brings betas and regions of its own; give them there only")
        found: list[tuple[int, float, Mapping[str, Any]]] = []
        for edit in concept:
            if unknown := sorted(set(edit) - set(_EDIT)):
                raise InputError(f"an edit has {list(_EDIT)}, got {unknown}")
            if "concept" not in edit:
                raise InputError(f"an edit needs a concept, got {dict(edit)!r}")
            where = {name: edit.get(name) for name in _REGION}
            found.append((concept_position(edit["concept"], concepts), beta_of(edit.get("beta")), where))
        return found
    names = list(concept) if many else [concept]
    if not names:
        raise InputError("no concept to edit is given")
    betas = beta.tolist() if hasattr(beta, "tolist") else beta
    betas = list(betas) if isinstance(betas, (list, tuple)) else [betas] * len(names)
    if len(betas) != len(names):
        raise InputError(f"{len(betas)} betas for {len(names)} concepts; give one number, or one each")
    return [(concept_position(n, concepts), beta_of(b), regions) for n, b in zip(names, betas, strict=True)]


def beta_of(beta: Any) -> float:
    """A finite number."""
    if isinstance(beta, bool) or not hasattr(beta, "__float__") or not math.isfinite(beta):
        raise InputError(f"beta must be a finite number (what is added to the map), got {beta!r}")
    return float(beta)


def count(k: Any) -> int:
    """A positive integer."""
    if isinstance(k, bool) or not hasattr(k, "__index__") or k < 1:
        raise InputError(f"top_k must be an integer of at least 1, or None for all, got {k!r}")
    return int(k)


def leading(values: Tensor, top_k: int | None) -> list[int]:
    """The columns with the highest values over the examples; NaN ranks last."""
    k = values.shape[1] if top_k is None else count(top_k)
    best = values.nan_to_num(nan=-torch.inf).amax(0)
    return torch.argsort(best, descending=True, stable=True)[:k].tolist()
