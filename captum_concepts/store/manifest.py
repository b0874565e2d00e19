"""What a stored artifact was made from, and the refusal of one that was made from something else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts.errors import ArtifactError


def fingerprint_tensor(tensor: Tensor) -> str:
    """A hexadecimal digest of dtype, shape and bits.

    >>> fingerprint_tensor(torch.zeros(2)) == fingerprint_tensor(torch.zeros(2)) != fingerprint_tensor(torch.zeros(3))
    True
    """
    digest = hashlib.sha256()
    _update(digest, tensor)
    return digest.hexdigest()[:32]


def fingerprint_module(module: nn.Module) -> str:
    """A digest of a module's class, parameter names, shapes, dtypes and values; training mode and device do not
    count.

    >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> fingerprint_module(a) == fingerprint_module(b)
    False
    """
    digest = hashlib.sha256(type(module).__qualname__.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        if isinstance(tensor, Tensor):
            _update(digest, tensor)
    return digest.hexdigest()[:32]


def fingerprint_callable(function: Any) -> str:
    """:func:`fingerprint_module` of the module behind ``function``; its qualified name where there is none."""
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    for candidate in (owner, *(vars(owner).values() if owner is not None else ()), *vars_of(function)):
        if isinstance(candidate, nn.Module):
            method = "" if candidate is function else f"{getattr(function, '__name__', type(function).__name__)}:"
            return method + fingerprint_module(candidate)
    return f"callable:{getattr(function, '__qualname__', type(function).__qualname__)}"


def vars_of(value: Any) -> tuple[Any, ...]:
    """The attributes of an object, or nothing for one without any."""
    return tuple(vars(value).values()) if hasattr(value, "__dict__") else ()


def check_fingerprint(expected: Mapping[str, Any], found: Mapping[str, Any], what: str) -> None:
    """Refuse ``found`` where an entry differs from ``expected``.

    Args:
        expected: what the artifact must have been made from; entries that are None are not compared.
        found: what it says that it was made from.
        what: how the message calls the artifact.

    Raises:
        ArtifactError: names every entry that differs.

    >>> check_fingerprint({"layer": "a"}, {"layer": "b"}, "the cache")
    Traceback (most recent call last):
    ...
    captum_concepts.errors.ArtifactError: the cache was made from something else: layer is 'b', not 'a'
    """
    differences = [
        f"{key} is {found.get(key)!r}, not {value!r}"
        for key, value in json.loads(json.dumps(expected)).items()
        if value is not None and found.get(key) != value
    ]
    if differences:
        raise ArtifactError(f"{what} was made from something else: " + "; ".join(differences))


def _update(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
