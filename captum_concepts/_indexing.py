"""Which rows or columns an index, slice, list or mask selects."""

from __future__ import annotations

import operator
from typing import Any

from captum_concepts.errors import InputError


def listed(key: Any) -> Any:
    """Arrays and tensors as Python lists, the rest as it is."""
    return key.tolist() if hasattr(key, "tolist") else list(key) if isinstance(key, (tuple, range)) else key


def positions(key: Any, n: int, what: str) -> list[int]:
    """Positions among ``n`` that an index, a slice, a list of indices or a mask selects."""
    key = listed(key)
    if key is ...:
        key = slice(None)
    if isinstance(key, slice):
        try:
            return list(range(n))[key]
        except (TypeError, ValueError) as error:
            raise InputError(f"{what} index {key!r} does not fit {n} {what}s: {error}") from error
    keys = key if isinstance(key, list) else [key]
    if isinstance(key, list) and keys and all(isinstance(k, bool) for k in keys):
        if len(keys) != n:
            raise InputError(f"the mask has {len(keys)} entries for {n} {what}s")
        return [i for i, chosen in enumerate(keys) if chosen]
    if not all(hasattr(k, "__index__") and not isinstance(k, bool) for k in keys):
        raise InputError(f"{what}s are selected by an integer, slice, list of integers or mask, got {key!r}")
    indices = [operator.index(k) for k in keys]
    if not all(-n <= i < n for i in indices):
        raise InputError(f"{what} index {key!r} is out of range for {n} {what}s")
    return [i % n for i in indices]
