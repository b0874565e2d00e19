"""The columns of the table of inputs: public entry points, and how each is called with one kind of input.

``python tests/contract/columns.py`` prints ``docs/inputs.md``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from inputs import FILE_ROWS, IMAGE_ROWS, IMAGES, LABEL_ROWS, WORD_ROWS, Net, Outcome, Row

import captum_concepts
from captum_concepts import images


@dataclass(frozen=True)
class Family:
    """Columns that are given the same kinds of things.

    Args:
        what: in words, for the documentation.
        rows: the kinds.
    """

    what: str
    rows: dict[str, Row]


FAMILIES = {
    "any images": Family("Whatever holds images", IMAGE_ROWS),
    "tensors": Family("Tensors, as Captum's `attribute` takes them", IMAGE_ROWS),
    "labels": Family("Labels", LABEL_ROWS),
    "words": Family("Concepts", WORD_ROWS),
    "files of words": Family("Files of words", FILE_ROWS),
}


@dataclass(frozen=True)
class Column:
    """A public entry point.

    Args:
        name: as users write it.
        family: what it is given.
        call: with the input and a folder for files, returns what is compared.
        outcomes: of rows for which it differs from its family.
        without: rows that cannot be given to it.
    """

    name: str
    family: str
    call: Callable[[Any, Path], Any]
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    without: tuple[str, ...] = ()


@cache
def net() -> torch.nn.Module:
    """The explained network."""
    return Net().eval()


COLUMNS = [
    Column("images.open_images", "any images", lambda x, _: torch.stack(list(images.open_images(x)))),
    Column("images.batches", "any images", lambda x, _: torch.cat([b.images for b in images.batches(x, 3)])),
    Column("images.fingerprint", "any images", lambda x, _: images.fingerprint(x)),
    Column("images.inputs_for", "any images", lambda x, _: torch.stack(list(images.inputs_for(net(), x)))),
    Column("images.open_images", "labels", lambda y, _: images.open_images(IMAGES, labels=y).labels),
    Column("images.checked_labels", "labels", lambda y, _: images.checked_labels(y, len(IMAGES))),
    Column("images.read_words", "files of words", lambda path, _: images.read_words(path)),
]
NOT_COLUMNS: dict[str, str] = {}


#: Names of parameters, by what people put there.
KINDS = {
    "images": {"inputs", "images", "image", "source", "data", "frames", "train_data", "val_data"},
    "labels": {"labels"},
    "words": {"concepts", "words", "classes", "texts"},
    "model": {"forward_func", "model", "backbone"},
    "files": {"path", "paths"},
}


def entry_points() -> dict[str, list[str]]:
    """Public functions, classes and methods by name, with the kinds of things they take from people."""
    found: dict[str, list[str]] = {}
    for room in captum_concepts._ROOMS:
        module = importlib.import_module(f"captum_concepts.{room}")
        for name in getattr(module, "__all__", ()):
            _add(f"{room}.{name}", getattr(module, name), found)
    for name in captum_concepts._NAMES:
        _add(name, getattr(captum_concepts, name), found)
    return found


def _add(name: str, thing: Any, found: dict[str, list[str]]) -> None:
    if inspect.isclass(thing) and (issubclass(thing, Exception) or thing.__module__.split(".")[0] != "captum_concepts"):
        return
    members = {name: thing} if callable(thing) else {}
    if inspect.isclass(thing):
        members |= {f"{name}.{key}": getattr(thing, key) for key in vars(thing) if not key.startswith("_")}
    for key, member in members.items():
        if not callable(member):
            continue
        try:
            parameters = inspect.signature(member).parameters
        except (TypeError, ValueError):
            continue
        kinds = [kind for kind, names in KINDS.items() if names & set(parameters)]
        if kinds:
            found[key] = kinds


def page() -> str:
    return ""
