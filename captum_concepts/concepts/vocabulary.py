"""`Vocabulary`: the concepts of a model, their sources, and a report of dropped concepts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from captum_concepts._artifacts import (
    check_json,
    integer,
    is_there,
    list_of,
    mapping_of,
    nothing_or,
    number,
    parse_json,
    table,
    text,
    write_atomically,
)
from captum_concepts.concepts import filters
from captum_concepts.concepts._report import Drop, VocabularyReport
from captum_concepts.concepts._words import tidy
from captum_concepts.concepts.similarity import Similarity, TextSimilarity, embed_texts, without_embedding
from captum_concepts.errors import ArtifactError, InputError, did_you_mean, shortened
from captum_concepts.images import read_text
from captum_concepts.images.text import names_in

#: The paper's template for zero-shot segmentation, with one concept per class.
CLASS_TEMPLATE = "An image of a {class}"
_NAMES = list_of(text())
_SAVED = table(
    {
        "concepts": _NAMES,
        "templates": nothing_or(_NAMES),
        "sources": mapping_of(_NAMES),
        "report": table(
            {
                "started": integer(),
                "kept": integer(),
                "counts": mapping_of(integer()),
                "drops": list_of(
                    table(
                        {
                            "concept": text(),
                            "reason": text(),
                            "value": nothing_or(number()),
                            "limit": nothing_or(number()),
                            "other": nothing_or(text()),
                        }
                    )
                ),
            }
        ),
    }
)
_PLACES = ("{}", "{class}", "{concept}")


class Vocabulary:
    """A list of concepts with their sources and a report of dropped concepts; every step returns a new vocabulary.

    Args:
        concepts: texts, kept unchanged and in order.
        templates: one or more texts with ``{}``, in which concepts are embedded; None embeds the concepts unchanged.
        sources: for each concept, the classes that it was generated for.
        report: of earlier drops.

    Raises:
        InputError: concepts that are not texts, or a template without a placeholder.

    Example:
        >>> vocabulary = Vocabulary(["wings", "a Wing", "  a long,  feathered tail ", "bird", "beak"])
        >>> vocabulary = vocabulary.clean().filter(["bird"], max_length=20)
        >>> list(vocabulary)
        ['wings', 'beak']
        >>> print(vocabulary.report)
        2 of 5 concepts kept; dropped: 1 duplicate, 1 too long, 1 class name
          'a Wing': duplicate 'wings'
          'a long, feathered tail': too long, 22 (limit 20)
          'bird': class name 'bird'
    """

    def __init__(
        self,
        concepts: Iterable[str],
        *,
        templates: str | Sequence[str] | None = None,
        sources: Mapping[str, Sequence[str]] | None = None,
        report: VocabularyReport | None = None,
    ) -> None:
        if isinstance(concepts, str):
            raise InputError(f"concepts must be a list of strings, got the single string {concepts!r}")
        if not isinstance(concepts, Iterable):
            raise InputError(f"concepts must be a list of strings, got {concepts!r}")
        self.concepts = tuple(concepts)
        if not all(isinstance(concept, str) for concept in self.concepts):
            wrong = next(concept for concept in self.concepts if not isinstance(concept, str))
            raise InputError(f"concepts must be strings, got {wrong!r}")
        given = (templates,) if isinstance(templates, str) else None if templates is None else tuple(templates)
        self.templates = None if given is None else tuple(_template(t) for t in given)
        self.sources = {name: tuple(classes) for name, classes in (sources or {}).items()}
        self.report = report or VocabularyReport(len(self.concepts))

    @classmethod
    def load(cls, *paths: str | os.PathLike[str], **options: Any) -> Vocabulary:
        """The vocabulary from one or more concept files, concatenated.

        A text file has one concept per line (LF-CBM's ``*_filtered.txt``; empty lines and lines that begin with ``#``
        are skipped). A JSON file is a list of concepts; a dictionary of class names and their concepts (LF-CBM's
        ``gpt3_*_important.json``, ``_around``, ``_superclass``), whose classes become the sources; or written by
        :meth:`save`.

        Raises:
            FileNotFoundError: no such file.
            ArtifactError: the file is not text, not valid JSON, or JSON of another structure.
        """
        if not paths:
            raise InputError("pass at least one file")
        concepts: list[str] = []
        sources: dict[str, list[str]] = {}
        if len(paths) == 1 and Path(paths[0]).suffix.lower() == ".json":
            found = _read_json(Path(paths[0]))
            if isinstance(found, dict) and "concepts" in found and "report" in found:
                return cls._restored(found, Path(paths[0]), options)
        for path in map(Path, paths):
            for concept, owner in _read(path):
                concepts.append(concept)
                if owner is not None and owner not in sources.setdefault(concept, []):
                    sources[concept].append(owner)
        return cls(concepts, sources=sources, **options)

    @classmethod
    def from_classes(cls, classes: Sequence[str], template: str = CLASS_TEMPLATE) -> Vocabulary:
        """The vocabulary with one concept per class, "An image of a {class}" as in the paper's zero-shot segmentation.

        >>> list(Vocabulary.from_classes(["zebra", "tench"]))
        ['An image of a zebra', 'An image of a tench']
        """
        _template(template)
        listed = isinstance(classes, Iterable) and not isinstance(classes, str)
        if not listed or not all(isinstance(name, str) for name in classes):
            raise InputError(f"classes must be a list of names, got {str(classes)[:60]!r}")
        texts = [_fill(template, name) for name in classes]
        return cls(texts, sources={text: [name] for text, name in zip(texts, classes, strict=True)})

    def clean(self, *, near_duplicates: bool = True, lowercase: bool = False) -> Vocabulary:
        """The concepts without bullets, quotes, final punctuation, double spaces, empty concepts and duplicates.

        Args:
            near_duplicates: also drop concepts that differ only in article, plural, hyphen or spacing; the first stays.
            lowercase: convert all to lower case (as CLIP's tokenizer does anyway).
        """
        written = [tidy(concept, lowercase=lowercase) for concept in self.concepts]
        kept, drops = filters.drop_duplicates(written, near=near_duplicates)
        sources: dict[str, list[str]] = {}
        owner = {drop.concept: drop.other for drop in drops if drop.other is not None}
        for old, new in zip(self.concepts, written, strict=True):
            place = sources.setdefault(new if new in kept else owner.get(new) or new, [])
            place += [name for name in self.sources.get(old, ()) if name not in place]
        return self._with(kept, drops, sources)

    def filter(
        self,
        classes: Sequence[str] = (),
        similarity: Similarity | Any = None,
        *,
        max_length: int | None = 30,
        class_cutoff: float = 0.85,
    ) -> Vocabulary:
        """The concepts after LF-CBM's filters, in its order.

        Concepts are dropped if they are too long, a class name, or too similar to a class or to another concept.
        :meth:`present_in`, which needs the images, drops those that are absent from the data.

        Args:
            classes: names of the classes.
            similarity: a text encoder, several, or a function ``(texts, texts) -> matrix``; see
                :class:`~captum_concepts.concepts.TextSimilarity`. None skips the two filters that need it.
            max_length: in characters; None for any.
            class_cutoff: see :func:`~captum_concepts.concepts.filters.drop_similar_to_classes`.

        Raises:
            InputError: no concept is left (the message reports the reasons), or one has no text embedding.
        """
        if isinstance(classes, str):
            raise InputError(f"classes must be a list of names, got the single string {classes!r}")
        now = self
        if max_length is not None:
            now = now._with(*filters.drop_too_long(now.concepts, max_length))
        now = now._with(*filters.drop_class_names(now.concepts, classes))
        if similarity is not None:
            measure = similarity
            if hasattr(similarity, "encode_text") or isinstance(similarity, (list, tuple)):
                measure = TextSimilarity(similarity)
            now = now._with(*filters.drop_similar_to_classes(now.concepts, classes, measure, class_cutoff))
            now = now._with(*filters.drop_similar(now.concepts, measure))
        return now._not_empty()

    def present_in(self, activations: Tensor, *, k: int = 5, cutoff: float = 0.25) -> Vocabulary:
        """The concepts that the data show; see :func:`~captum_concepts.concepts.filters.drop_absent`."""
        return self._with(*filters.drop_absent(self.concepts, activations, k=k, cutoff=cutoff))._not_empty()

    def known_to(self, encoder: Any) -> Vocabulary:
        """The concepts that an encoder with a fixed vocabulary can embed."""
        asked = {text: concept for concept in self.concepts for text in self._texts(concept)}
        gone = {asked[text] for text in without_embedding(encoder, list(asked))}
        drops = [Drop(concept, "no text embedding") for concept in self.concepts if concept in gone]
        return self._with([c for c in self.concepts if c not in gone], drops)._not_empty()

    def without(self, drops: Iterable[Drop]) -> Vocabulary:
        """The concepts without those of ``drops``, which are added to the report."""
        drops = list(drops)
        gone = {drop.concept for drop in drops}
        for name in gone:
            self.index(name)
        return self._with([c for c in self.concepts if c not in gone], drops)._not_empty()

    def encode(self, encoder: Any) -> Tensor:
        """Unit text embeddings ``(M, D)``, float32; with templates the normalized mean over them.

        Raises:
            InputError: the vocabulary is empty, or texts have no embedding (the message names them).
        """
        self._not_empty()
        texts = [text for concept in self.concepts for text in self._texts(concept)]
        unit = embed_texts(encoder, texts)
        return F.normalize(unit.view(len(self), -1, unit.shape[1]).mean(1), dim=1)

    def index(self, concept: str) -> int:
        """The index of a concept; the error for an unknown one suggests the nearest names."""
        if concept not in self.concepts:
            raise InputError(f"there is no concept {concept!r}.{did_you_mean(concept, self.concepts)}")
        return self.concepts.index(concept)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``.txt`` (one concept per line) or ``.json`` (with templates, sources and report), atomically."""
        path = Path(path)
        if path.suffix.lower() == ".txt":
            lost = [concept for concept in self.concepts if "\r" in concept or list(names_in(concept)) != [concept]]
            if lost:
                raise InputError(
                    f"{shortened(lost[0])} cannot be saved in a text file, where lines that begin with # are comments "
                    "and spaces around concepts are removed; clean() the vocabulary, or save it as .json"
                )
            write_atomically(path, "\n".join(self.concepts) + "\n")
        elif path.suffix.lower() == ".json":
            write_atomically(path, json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n")
        else:
            raise InputError(f"{path} must end in .txt or .json")

    def as_dict(self) -> dict[str, Any]:
        """The vocabulary as a JSON-serializable dictionary."""
        return {
            "concepts": list(self.concepts),
            "templates": None if self.templates is None else list(self.templates),
            "sources": {name: list(classes) for name, classes in self.sources.items()},
            "report": self.report.as_dict(),
        }

    def __len__(self) -> int:
        return len(self.concepts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.concepts)

    def __getitem__(self, index: int) -> str:
        return self.concepts[index]

    def __contains__(self, concept: object) -> bool:
        return concept in self.concepts

    def __repr__(self) -> str:
        return f"Vocabulary({self.report.summary()})"

    def _texts(self, concept: str) -> list[str]:
        return [concept] if self.templates is None else [_fill(template, concept) for template in self.templates]

    def _with(
        self, kept: Sequence[str], drops: Iterable[Drop], sources: Mapping[str, Sequence[str]] | None = None
    ) -> Vocabulary:
        origin = self.sources if sources is None else sources
        left = {name: origin[name] for name in kept if origin.get(name)}
        return Vocabulary(kept, templates=self.templates, sources=left, report=self.report.with_drops(drops))

    def _not_empty(self) -> Vocabulary:
        if not self.concepts:
            raise InputError(f"no concept is left: {self.report.summary()}; loosen the limits or pass more concepts")
        return self

    @classmethod
    def _restored(cls, found: Any, path: Path, options: Mapping[str, Any]) -> Vocabulary:
        saved = check_json(found, _SAVED, str(path))
        try:
            report = VocabularyReport.from_dict(saved["report"])
            stored = {"templates": saved["templates"], "sources": saved["sources"], "report": report}
            return cls(saved["concepts"], **{**stored, **options})
        except InputError as error:
            raise ArtifactError(f"{path} is not a vocabulary written by save(): {error}") from error


def _template(template: str) -> str:
    if not isinstance(template, str) or not any(place in template for place in _PLACES):
        raise InputError(f"template {template!r} must contain a placeholder: {', '.join(_PLACES)}")
    return template


def _fill(template: str, word: str) -> str:
    for place in _PLACES:
        if place in template:
            return template.replace(place, word)
    return template


def _text(path: Path) -> str:
    if not is_there(path):
        raise FileNotFoundError(f"there is no concept file at {path}")
    try:
        return read_text(path)
    except InputError as error:
        raise ArtifactError(str(error)) from error


def _read_json(path: Path) -> Any:
    try:
        return parse_json(_text(path))
    except ValueError as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}") from error


def _read(path: Path) -> Iterator[tuple[str, str | None]]:
    if path.suffix.lower() != ".json":
        yield from ((name, None) for name in names_in(_text(path)))
        return
    found = _read_json(path)
    groups = found.items() if isinstance(found, dict) else [(None, found)]
    for owner, concepts in groups:
        if not isinstance(concepts, list) or not all(isinstance(concept, str) for concept in concepts):
            raise ArtifactError(
                f"{path} must contain a list of strings, or a dictionary from class names to such lists"
            )
        yield from ((concept, owner) for concept in concepts)
