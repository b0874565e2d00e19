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
from inputs import (
    COUNT,
    FILE_ROWS,
    IMAGE_ROWS,
    IMAGES,
    LABEL_ROWS,
    RUNS,
    SIDE,
    WORD_ROWS,
    Net,
    Outcome,
    Row,
    refused,
)

import captum_concepts
from captum_concepts import ConceptExplanation, images
from captum_concepts.concepts import Vocabulary
from captum_concepts.metrics import average_drop, deletion, evaluate, increase_in_confidence, insertion
from captum_concepts.visualization import as_image, panel


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


def score(inputs: Any) -> Any:
    """The network's probabilities."""
    return net()(inputs).softmax(1).detach()


def explanation() -> ConceptExplanation:
    """An explanation of the images."""
    return ConceptExplanation(["red sky", "green sea"], torch.ones(COUNT, 2), torch.rand(COUNT, 2, 4, 4))


def drawn(figure: Any) -> torch.Tensor:
    """The pictures of the images in a panel."""
    shown = [torch.as_tensor(ax.images[0].get_array()) for ax in figure.axes if ax.images]
    return torch.stack([image.float() for image in shown if image.shape == shown[0].shape][:: 3])


def saved_words(path: Path) -> list[str]:
    """Words of a file, one of these that have no other kind of line."""
    return list(Vocabulary.load(path))


def size(inputs: Any) -> int:
    """How many images there are, where that can be told."""
    return len(inputs) if hasattr(inputs, "shape") else COUNT


def masked(source: Any) -> Any:
    """Images with a mask each, for `evaluate`."""
    masks = torch.zeros(len(source), SIDE, SIDE)
    masks[:, :50, 50:100] = 1
    return evaluate(lambda x: x.mean(1), list(zip(source, masks, strict=True)), ["epg"], n_bootstrap=0).to_markdown()


MAPS = torch.rand(COUNT, 7, 7, generator=torch.Generator().manual_seed(0))
FORMS = ("list of tensors", "list of PIL images", "list of arrays", "list of paths")  # one image after another
ONE_BY_ONE = tuple(row for row in IMAGE_ROWS if row not in (*FORMS, "float tensor", "channels last memory", "strided"))
SCORED = ("four channels", "channels last")  # refused by the network, which is the caller's own here

COLUMNS = [
    Column("images.open_images", "any images", lambda x, _: torch.stack(list(images.open_images(x)))),
    Column("images.batches", "any images", lambda x, _: torch.cat([b.images for b in images.batches(x, 3)])),
    Column("images.fingerprint", "any images", lambda x, _: images.fingerprint(x)),
    Column("images.inputs_for", "any images", lambda x, _: torch.stack(list(images.inputs_for(net(), x)))),
    Column("images.to_tensor", "any images", lambda x, _: torch.stack([images.to_tensor(one) for one in x]),
           without=ONE_BY_ONE),
    Column("images.open_images", "labels", lambda y, _: images.open_images(IMAGES, labels=y).labels),
    Column("images.checked_labels", "labels", lambda y, _: images.checked_labels(y, len(IMAGES))),
    Column("images.read_words", "files of words", lambda path, _: images.read_words(path)),
    Column("concepts.Vocabulary.load", "files of words", lambda path, _: saved_words(path),
           {"JSON index": refused("list of texts")}),
    Column("concepts.Vocabulary", "words", lambda words, _: list(Vocabulary(words)),
           {"twice": RUNS, "blank": RUNS, "empty": RUNS}),
    Column("concepts.Vocabulary.from_classes", "words", lambda words, _: list(Vocabulary.from_classes(words)),
           {"twice": RUNS, "blank": RUNS, "empty": RUNS}),
    Column("metrics.evaluate", "any images", lambda x, _: masked(x), without=ONE_BY_ONE),
    Column("metrics.average_drop", "tensors", lambda x, _: average_drop(score, x, MAPS[: size(x)], target=1), without=SCORED),
    Column("metrics.increase_in_confidence", "tensors", lambda x, _: increase_in_confidence(score, x, MAPS[: size(x)], target=1), without=SCORED),
    Column("metrics.insertion", "tensors", lambda x, _: insertion(score, x, MAPS[: size(x)], target=1, n_steps=4),
           without=SCORED),
    Column("metrics.deletion", "tensors", lambda x, _: deletion(score, x, MAPS[: size(x)], target=1, n_steps=4),
           without=SCORED),
    Column("visualization.as_image", "any images", lambda x, _: torch.stack([as_image(one) for one in x]),
           without=ONE_BY_ONE),
    Column("visualization.panel", "any images", lambda x, _: drawn(panel(explanation(), x)), without=ONE_BY_ONE),
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
