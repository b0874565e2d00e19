"""Concept examples and negative examples as named sets of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from captum.concept import Concept
from torch import Tensor

from captum_concepts._checks import unique_names
from captum_concepts.errors import InputError
from captum_concepts.images import ImageSource

Read = Callable[[Any], ImageSource]


def named_sets(given: Any, what: str, read: Read) -> dict[str, ImageSource]:
    """Sets of images by name.

    Args:
        given: ``{name: images}``, a ``captum.concept.Concept`` or a list of them; for negatives also one set alone.
        what: ``"concepts"`` or ``"negatives"``, for messages.
        read: opens the images of a set.

    Raises:
        InputError: there is no set, a name repeats, or the type is not supported.
    """
    listed = isinstance(given, (list, tuple)) and all(isinstance(item, Concept) for item in given)
    if isinstance(given, Mapping):
        sets = list(given.items())
    elif listed or isinstance(given, Concept):
        sets = [(item.name, item) for item in (given if listed else [given])]
    elif what == "negatives":
        sets = [("negatives", given)]
    else:
        kind = f"a tensor {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise InputError(
            f"{what} must be a dict of name -> images (tensor, list, data set or folder) or a list of "
            f"captum.concept.Concept, got {kind}"
        )
    if not sets:
        raise InputError(f"{what} are empty; pass at least one set of images")
    names = unique_names([name for name, _ in sets], what.rstrip("s"))
    return {name: _opened(name, source, read) for name, (_, source) in zip(names, sets, strict=True)}


def _opened(name: str, source: Any, read: Read) -> ImageSource:
    if isinstance(source, Concept):
        if source.data_iter is None:
            raise InputError(f"the captum Concept {name!r} has no data_iter; construct it with a DataLoader of images")
        source = source.data_iter
    if hasattr(source, "__next__") and not hasattr(source, "read"):
        raise InputError(f"{name!r} is an iterator, which can be read only once; pass a list or a DataLoader")
    try:
        return read(source)
    except InputError as error:
        raise InputError(f"{name!r}: {error}") from error
