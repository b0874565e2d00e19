"""Parsing of edits of concept maps (for one call) and of rules (permanent)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from captum_concepts._captum import target_indices
from captum_concepts._checks import name_positions, number, one_of
from captum_concepts.errors import InputError

UNITS = ("map", "std")
_REGION = ("points", "boxes", "mask")
_MAP_EDIT = ("concept", "beta", "units", *_REGION)
_RULE_EDIT = ("target", "concept", "weight", "add")


class MapEdit(NamedTuple):
    """An edit that adds ``beta`` to the map of concept ``column`` inside a region."""

    column: int
    beta: float
    units: str
    region: Mapping[str, Any]


class RuleEdit(NamedTuple):
    """An edit that sets the weight of a concept for a class to ``weight``, or increases it by ``weight`` if ``add``."""

    target: int
    column: int
    weight: float
    add: bool


def map_edits(
    concept: Any, beta: Any, units: Any, regions: Mapping[str, Any], concepts: Sequence[str]
) -> list[MapEdit]:
    """The edits of a call of ``SALFCBM.intervene``.

    Raises:
        InputError: unknown concept, units or key; or ``beta`` is missing, not finite, or not one per concept.
    """
    many = isinstance(concept, (list, tuple))
    if many and concept and all(isinstance(edit, Mapping) for edit in concept):
        if beta is not None or any(value is not None for value in regions.values()):
            raise InputError("a list of edits contains its own betas and regions; pass them there only")
        edits = []
        for edit in concept:
            if unknown := sorted(set(edit) - set(_MAP_EDIT)):
                raise InputError(f"an edit has the keys {list(_MAP_EDIT)}, got {unknown}")
            if "concept" not in edit:
                raise InputError(f"an edit needs a concept, got {dict(edit)!r}")
            region = {name: edit.get(name) for name in _REGION}
            own = _units(edit.get("units", units))
            edits.append(MapEdit(_column(edit["concept"], concepts), _beta(edit.get("beta")), own, region))
        return edits
    units = _units(units)
    names = list(concept) if many else [concept]
    if not names:
        raise InputError("no concept to edit was passed")
    betas = beta.tolist() if hasattr(beta, "tolist") else beta
    betas = list(betas) if isinstance(betas, (list, tuple)) else [betas] * len(names)
    if len(betas) != len(names):
        raise InputError(f"{len(betas)} betas for {len(names)} concepts; pass one number, or one per concept")
    return [MapEdit(_column(n, concepts), _beta(b), units, regions) for n, b in zip(names, betas, strict=True)]


def rule_edits(
    edits: Any, concepts: Sequence[str], num_classes: int, class_names: Sequence[str] | None
) -> list[RuleEdit]:
    """The edits of a call of ``SALFCBM.with_edits``.

    Raises:
        InputError: unknown concept or key, or not exactly one of ``weight`` and ``add``.
        TargetError: no such class.
    """
    if isinstance(edits, (str, Mapping)) or not isinstance(edits, Iterable):
        raise InputError(f"edits must be a list of dictionaries with the keys {list(_RULE_EDIT)}, got {edits!r}")
    checked = []
    for edit in edits:
        if not isinstance(edit, Mapping):
            raise InputError(f"each edit must be a dictionary with the keys {list(_RULE_EDIT)}, got {edit!r}")
        if unknown := sorted(set(edit) - set(_RULE_EDIT)):
            hint = " Edits of maps hold for one call of intervene only." if set(unknown) & set(_MAP_EDIT) else ""
            raise InputError(f"an edit of a rule has the keys {list(_RULE_EDIT)}, got {unknown}.{hint}")
        if "target" not in edit or "concept" not in edit or ("weight" in edit) == ("add" in edit):
            raise InputError(f"an edit of a rule needs target, concept, and either weight or add; got {dict(edit)!r}")
        target = int(target_indices(edit["target"], 1, num_classes, class_names or (), what="class")[0])
        add = "add" in edit
        weight = number("add" if add else "weight", edit["add" if add else "weight"], lambda _: True, "a finite number")
        checked.append(RuleEdit(target, _column(edit["concept"], concepts), weight, add))
    if not checked:
        raise InputError("no edit was passed")
    return checked


def _column(concept: Any, concepts: Sequence[str]) -> int:
    if isinstance(concept, (list, tuple, slice)) or concept is None:
        raise InputError(f"an edit has one concept, by name or index; got {concept!r}")
    return name_positions(concept, concepts)[0]


def _beta(beta: Any) -> float:
    if hasattr(beta, "tolist"):
        beta = beta.tolist()
    return number("beta", beta, lambda _: True, "a finite number (what is added to the map)")


def _units(units: Any) -> str:
    if units is None:
        raise InputError(
            "intervene needs units=: 'map' adds beta to the unscaled concept map (the default of earlier versions), "
            "'std' counts standard deviations of the concept's activation (formerly standardize=True)"
        )
    return one_of("units", units, UNITS)
