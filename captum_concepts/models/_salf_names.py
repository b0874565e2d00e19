"""Checks of names, sizes and selections that SALFCBM is given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from captum_concepts._checks import listed, positions
from captum_concepts.errors import InputError, did_you_mean


def check_names(names: Iterable[str], what: str, count: int | None = None) -> list[str]:
    """The names as a list.

    Raises:
        InputError: no text, none, empty, twice, or not as many as ``count``.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise InputError(f"{what} names must be a list of texts, got {names!r}")
    found = list(names)
    if not found:
        raise InputError(f"there is no {what}; give at least one (did a filter drop them all?)")
    wrong = [name for name in found if not isinstance(name, str) or not name.strip()]
    if wrong:
        raise InputError(f"{what} names must be texts that are not empty, got {wrong[0]!r}")
    if len(set(found)) != len(found):
        twice = sorted({name for name in found if found.count(name) > 1})
        raise InputError(f"each {what} may appear once; more than once: {twice[:10]}")
    if count is not None and len(found) != count:
        raise InputError(f"{len(found)} {what} names for {count}")
    return found


def check_size(size: Any, name: str) -> tuple[int, int]:
    """A pair of positive integers; one integer stands for both."""
    pair = (size, size) if hasattr(size, "__index__") and not isinstance(size, bool) else size
    if (
        not isinstance(pair, (tuple, list))
        or len(pair) != 2
        or not all(hasattr(side, "__index__") and not isinstance(side, bool) and int(side) > 0 for side in pair)
    ):
        raise InputError(f"{name} must be positive and whole, got {size!r}")
    return int(pair[0]), int(pair[1])


def concept_position(concept: Any, concepts: Sequence[str]) -> int:
    """The index of one concept, by name or (possibly negative) index.

    Raises:
        InputError: unknown; the nearest names are offered.
    """
    if isinstance(concept, str):
        if concept not in concepts:
            raise InputError(
                f"the model has no concept {concept!r} among its {len(concepts)}.{did_you_mean(concept, concepts)}"
            )
        return list(concepts).index(concept)
    if isinstance(concept, (list, tuple, slice)):
        raise InputError(f"give one concept, by name or index, got {concept!r}")
    return positions(concept, len(concepts), "concept")[0]


def concept_positions(selected: Any, concepts: Sequence[str]) -> list[int]:
    """The indices of several concepts: names, indices, a mask or a slice.

    Raises:
        InputError: none, unknown, or one twice.
    """
    keys = [selected] if isinstance(selected, str) else listed(selected)
    if isinstance(keys, list) and any(isinstance(key, str) for key in keys):
        rows = [concept_position(key, concepts) for key in keys]
    else:
        rows = positions(keys, len(concepts), "concept")
    if not rows:
        raise InputError(f"no concept is selected of {len(concepts)}")
    if len(set(rows)) != len(rows):
        twice = sorted({concepts[i] for i in rows if rows.count(i) > 1})
        raise InputError(f"each concept may be selected once; more than once: {twice[:10]}")
    return rows
