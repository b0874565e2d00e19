"""The user study of SALF-CBM on whether a model's neurons match their names, with sampling, form and scores."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from captum_concepts._artifacts import (
    integer as whole,
    list_of,
    mapping_of,
    number as json_number,
    parse_json,
    read_json,
    table,
    text,
    write_atomically,
)
from captum_concepts._checks import integer, number
from captum_concepts.errors import ArtifactError, InputError
from captum_concepts.explanation import ConceptExplainer
from captum_concepts.visualization.inputs import Strong, strongest_images
from captum_concepts.visualization.pictures import photo
from captum_concepts.visualization.templates import asset, template

#: The questions that participants rate from 1 to 5, verbatim.
QUESTIONS = {
    "consistency": "Do these images share a common semantic concept?",
    "accuracy": "Does “{label}” describe a common concept shared by these images?",
}
STRATA = ("top", "rest")
FEWEST = 5  # ratings for an interval
_SIDE, _BYTES = 224, 24_000
_KEY = table(
    {
        "format": text("captum_concepts.UserStudy/1"),
        "title": text(),
        "settings": table(
            {"models": list_of(text())},
            {
                "n_neurons": whole(),
                "top_fraction": json_number(0, 1),
                "k": whole(),
                "seed": whole(-(2**63), 2**64),
            },
        ),
        "neurons": mapping_of(
            table(
                {
                    "model": text(),
                    "concept": text(),
                    "label": text(),
                    "stratum": text(*STRATA),
                    "images": list_of(whole()),
                }
            )
        ),
    }
)


class Neuron(NamedTuple):
    """One item of a study, with model, concept, label, the stratum it was drawn from, and the indices of its images."""

    model: str
    concept: str
    label: str
    stratum: str
    images: list[int]


@dataclass(frozen=True)
class UserStudy:
    """A blinded study, with its items, which only the key identifies, and its form.

    Args:
        neurons: neurons by the item's name in the form, in the order of the form.
        settings: arguments of :func:`user_study`.
        title: title of the form.
        pictures: images of each item, for :meth:`save`; a study that was read from its key has none.
    """

    neurons: dict[str, Neuron]
    settings: dict[str, Any]
    title: str = "Do these images belong together?"
    pictures: dict[str, list[Tensor]] = field(default_factory=dict, repr=False)

    @property
    def fingerprint(self) -> str:
        """Digest of the items, which answers contain so that those to another study are rejected."""
        return hashlib.sha256(json.dumps(self.neurons, sort_keys=True).encode()).hexdigest()[:16]

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``study.html`` for the participants, and ``key.json``, which they must not see.

        The form works from disk without network or server. It shows neither models nor strata, keeps the answers in the
        browser, and exports them as one JSON file.

        Returns:
            The path of the form.

        Raises:
            InputError: the study was read from its key and has no images.
        """
        if not self.pictures:
            raise InputError("this study was loaded from its key and has no images; create it again with user_study")
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        items = [
            {
                "name": name,
                "label": neuron.label,
                "pictures": [photo(picture, _SIDE, _BYTES) for picture in self.pictures[name]],
                "questions": {key: text.replace("{label}", neuron.label) for key, text in QUESTIONS.items()},
            }
            for name, neuron in self.neurons.items()
        ]
        page = template("user_study/study.html").render(
            title=self.title,
            items=items,
            fingerprint=self.fingerprint,
            style=asset("user_study/study.css"),
            script=asset("user_study/study.js"),
        )
        key = {
            "format": "captum_concepts.UserStudy/1",
            "title": self.title,
            "settings": self.settings,
            "neurons": {name: neuron._asdict() for name, neuron in self.neurons.items()},
        }
        write_atomically(root / "key.json", json.dumps(key, indent=2) + "\n")
        return write_atomically(root / "study.html", page)

    @classmethod
    def load(cls, key: str | os.PathLike[str]) -> UserStudy:
        """Study from its ``key.json``, without images.

        Raises:
            FileNotFoundError: there is no such file.
            ArtifactError: the file is damaged, or not the key of a study.
        """
        try:
            read = read_json(key, _KEY, "the key of a user study")
        except ArtifactError as error:
            raise ArtifactError(f"{key} is not the key of a user study: {error}") from error
        return cls({name: Neuron(**one) for name, one in read["neurons"].items()}, read["settings"], read["title"])


def user_study(
    models: Mapping[str, ConceptExplainer],
    images: Any,
    interpretability: Mapping[str, Tensor],
    *,
    labels: Mapping[str, Mapping[str, str]] | None = None,
    n_neurons: int = 10,
    top_fraction: float = 0.3,
    k: int = 5,
    seed: int = 0,
    title: str = "Do these images belong together?",
    transform: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 32,
) -> UserStudy:
    """User study of SALF-CBM (section 4.3), which follows that of CLIP-Dissect.

    For each model, ``n_neurons`` are drawn from the ``top_fraction`` most interpretable ones and as many from the rest.
    For each neuron, participants see the k images that activate it most and rate semantic consistency and concept
    accuracy from 1 to 5. The paper uses 10 and 10 neurons, 30 %, 5 test images and 25 participants.

    Args:
        models: explainers by name, e.g.
            ``{"SALF-CBM": model, "backbone": LayerChannels(net, "layer4", images, labels=words)}``.
        images: test images that no model was trained on, as in :func:`strongest_images`.
        interpretability: by model, ``(T,)`` numbers, one per concept; higher is better. The paper uses CLIP-Dissect's
            soft-WPMI of each neuron and its label.
        labels: labels of concepts by model, if they differ from the names; None: ``model.labels`` if it exists.
        n_neurons: neurons per model and stratum.
        top_fraction: fraction of the concepts in the top stratum, in (0, 1).
        k: images per neuron.
        seed: random seed of the draw and of the order of the form.
        title: title of the form.
        transform, batch_size: as in :func:`strongest_images`.

    Raises:
        InputError: names or numbers that do not match, or a stratum with fewer than ``n_neurons`` neurons.

    Reference: Benou and Riklin Raviv, Show and Tell, CVPR 2025, arXiv:2502.20134; Oikarinen and Weng, CLIP-Dissect,
    ICLR 2023.
    """
    integer("n_neurons", n_neurons)
    integer("seed", seed, None)
    number("top_fraction", top_fraction, lambda f: 0 < f < 1, "in (0, 1)")
    for what, given in (("models", models), ("interpretability", interpretability)):
        if not isinstance(given, Mapping):
            wanted = "by the names of the models, such as {'SALF-CBM': ...}"
            raise InputError(f"{what} must be a mapping {wanted}, got {type(given).__name__}")
    if set(models) != set(interpretability) or not models:
        raise InputError(f"interpretability is of {sorted(interpretability)}, but the models are {sorted(models)}")
    draw = torch.Generator().manual_seed(seed)
    found: list[tuple[Neuron, list[Strong]]] = []
    for name, model in models.items():
        chosen = _drawn(name, list(model.concepts), interpretability[name], n_neurons, top_fraction, draw)
        words = (labels or {}).get(name, getattr(model, "labels", None) or {})
        strongest = strongest_images(model, images, list(chosen), k, transform=transform, batch_size=batch_size)
        for concept, own in strongest.items():
            neuron = Neuron(name, concept, words.get(concept, concept), chosen[concept], [one.index for one in own])
            found.append((neuron, own))
    order = torch.randperm(len(found), generator=draw).tolist()
    items = {f"item{place + 1:03d}": found[i] for place, i in enumerate(order)}
    settings = {"models": list(models), "n_neurons": n_neurons, "top_fraction": top_fraction, "k": k, "seed": seed}
    pictures = {name: [one.picture for one in own] for name, (_, own) in items.items()}
    return UserStudy({name: neuron for name, (neuron, _) in items.items()}, settings, title, pictures)


def _drawn(
    name: str, concepts: Sequence[str], scores: Any, n: int, fraction: float, draw: torch.Generator
) -> dict[str, str]:
    """Drawn concepts with their strata."""
    values = torch.as_tensor(scores).detach().double().flatten().cpu()
    if len(values) != len(concepts) or not bool(values.isfinite().all()):
        raise InputError(f"interpretability of {name!r} must be {len(concepts)} finite numbers, got {len(values)}")
    order = values.argsort(descending=True, stable=True)
    top = math.ceil(fraction * len(concepts))
    found = {}
    for stratum, members in zip(STRATA, (order[:top], order[top:]), strict=True):
        if len(members) < n:
            raise InputError(
                f"{name!r} has {len(concepts)} concepts, {len(members)} of them in the stratum {stratum!r}; "
                f"n_neurons={n} is more"
            )
        found.update({concepts[int(i)]: stratum for i in members[torch.randperm(len(members), generator=draw)[:n]]})
    return found


@dataclass(frozen=True)
class StudyRow:
    """Mean rating of one model, stratum (``"top"``, ``"rest"`` or ``"all"``) and question, with its interval."""

    model: str
    stratum: str
    question: str
    mean: float
    low: float
    high: float
    neurons: int
    participants: int


@dataclass(frozen=True)
class StudyScores:
    """Results of a study.

    Args:
        rows: one per model, stratum and question.
        differences: ``{(first, second, stratum, question): (difference, low, high)}`` of two models.
        incomplete: participants who skipped a question.
        confidence: coverage of the intervals.
    """

    rows: list[StudyRow]
    differences: dict[tuple[str, str, str, str], tuple[float, float, float]]
    incomplete: list[str]
    confidence: float

    def to_markdown(self) -> str:
        """The rows as a Markdown table."""
        lines = ["| model | neurons | question | mean rating | participants |", "| --- | --- | --- | --- | --- |"]
        for r in self.rows:
            interval = "" if math.isnan(r.low) else f" [{r.low:.2f}, {r.high:.2f}]"
            rating = "no rating" if math.isnan(r.mean) else f"{r.mean:.2f}{interval}"
            lines.append(f"| {r.model} | {r.stratum} ({r.neurons}) | {r.question} | {rating} | {r.participants} |")
        note = f"In brackets: {self.confidence:.0%} interval, bootstrap over neurons and participants"
        note += f"; none for fewer than {FEWEST} ratings." if any(math.isnan(r.low) for r in self.rows) else "."
        return "\n".join([*lines, "", note])

    def to_frame(self) -> Any:
        """The rows as a ``pandas.DataFrame``; needs pandas."""
        import pandas

        return pandas.DataFrame([asdict(row) for row in self.rows])

    _repr_markdown_ = to_markdown


def score_user_study(
    study: UserStudy | str | os.PathLike[str],
    answers: Iterable[Any],
    *,
    n_bootstrap: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> StudyScores:
    """Mean ratings by model, stratum and question, with intervals, and differences between models.

    Args:
        study: the study, or its ``key.json``.
        answers: the participants' JSON files, or their contents.
        n_bootstrap: number of resamples, of neurons and participants together because both are samples.
        confidence: coverage of the intervals.
        seed: random seed of the resampling.

    Raises:
        InputError: no answers, answers to another study, a duplicate participant, or a rating outside 1 to 5.
    """
    study = study if isinstance(study, UserStudy) else UserStudy.load(study)
    integer("n_bootstrap", n_bootstrap)
    integer("seed", seed, 0)
    number("confidence", confidence, lambda c: 0 < c < 1, "between 0 and 1")
    names = list(study.neurons)
    people: dict[str, np.ndarray[Any, Any]] = {}
    for one in answers:
        who, ratings = _ratings(one, study, names)
        if who in people:
            raise InputError(f"participant {who!r} answered twice; pass one file per participant")
        people[who] = ratings
    if not people:
        raise InputError("there are no answers")
    table = np.stack(list(people.values()))  # participants x items x questions
    rng = np.random.default_rng(seed)
    persons = rng.integers(0, len(table), (n_bootstrap, len(table)))
    rows, drawn = [], {}
    models = list(study.settings["models"])
    for model in models:
        for stratum in (*STRATA, "all"):
            own = [
                i for i, n in enumerate(names)
                if study.neurons[n].model == model and stratum in (study.neurons[n].stratum, "all")
            ]  # fmt: skip
            items = rng.integers(0, len(own), (n_bootstrap, len(own)))
            for q, question in enumerate(QUESTIONS):
                part = table[:, own, q]
                again = np.array([_mean(part[np.ix_(p, i)]) for p, i in zip(persons, items, strict=True)])
                mean, (low, high) = _mean(part), _ends(again, confidence)
                if np.isfinite(part).sum() < FEWEST:
                    low = high = math.nan
                rows.append(StudyRow(model, stratum, question, mean, low, high, len(own), len(table)))
                drawn[model, stratum, question] = (mean, again)
    differences = {}
    for a, first in enumerate(models):
        for second in models[a + 1 :]:
            for stratum in (*STRATA, "all"):
                for question in QUESTIONS:
                    (x, xs), (y, ys) = drawn[first, stratum, question], drawn[second, stratum, question]
                    differences[first, second, stratum, question] = (x - y, *_ends(xs - ys, confidence))
    incomplete = [who for who, ratings in people.items() if np.isnan(ratings).any()]
    return StudyScores(rows, differences, incomplete, confidence)


def _mean(values: np.ndarray[Any, Any]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _ends(values: np.ndarray[Any, Any], confidence: float) -> tuple[float, float]:
    """Percentile interval of the resamples."""
    known, tail = values[~np.isnan(values)], 100 * (1 - confidence) / 2
    if not len(known):
        return math.nan, math.nan
    low, high = np.percentile(known, [tail, 100 - tail])
    return float(low), float(high)


def _ratings(given: Any, study: UserStudy, names: Sequence[str]) -> tuple[str, np.ndarray[Any, Any]]:
    """A participant, and ``(items, questions)`` ratings, NaN where skipped."""
    where = "the answers" if isinstance(given, Mapping) else str(given)
    try:
        read = given if isinstance(given, Mapping) else parse_json(Path(given).read_text(encoding="utf-8"))
        who, said, kept = str(read["participant"]), str(read["study"]), dict(read["answers"])
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{where} is not a file saved by the form of a study: {error}") from error
    if said != study.fingerprint:
        raise InputError(f"{where} answers the study {said}, not {study.fingerprint}")
    table = np.full((len(names), len(QUESTIONS)), np.nan)
    for name, ratings in kept.items():
        if name not in study.neurons or not isinstance(ratings, Mapping) or set(ratings) - set(QUESTIONS):
            raise InputError(f"{where} rates {name!r}, which is not an item of the study")
        for question, value in ratings.items():
            if isinstance(value, bool) or value not in (1, 2, 3, 4, 5):
                raise InputError(f"{where} rates {name!r} with {value!r}; ratings are 1 to 5")
            table[names.index(name), list(QUESTIONS).index(question)] = value
    return who, table
