"""Concepts written by a language model that the user brings: the paper's three questions about every class."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from captum_concepts._artifacts import list_of, mapping_of, read_json, text, write_atomically
from captum_concepts.concepts._words import tidy
from captum_concepts.concepts.vocabulary import Vocabulary
from captum_concepts.errors import InputError, InputWarning

#: The questions of LF-CBM and SALF-CBM (section 3.1).
PROMPTS: dict[str, str] = {
    "important": "List the most important features for recognizing something as a {class}",
    "around": "List the things most commonly seen around a {class}",
    "superclass": "Give superclasses for the word {class}",
}
_ITEM = re.compile(r"^\s*(?:[-*•–—·]|\(?\d{1,3}[.)](?!\d))\s*")


@runtime_checkable
class ConceptGenerator(Protocol):
    """Any callable that answers a question in words: a function around a language model, local or remote.

    Nothing here opens a connection; the callable may.
    """

    def __call__(self, prompt: str) -> str:
        """The answer to ``prompt``, usually a list with one item a line."""
        ...


def generate_concepts(
    classes: Sequence[str],
    generator: ConceptGenerator,
    *,
    prompts: Mapping[str, str] = PROMPTS,
    repeats: int = 1,
    cache: str | os.PathLike[str] | None = None,
    show_progress: bool = False,
) -> Vocabulary:
    """Ask about every class and collect the answers: the initial concept list, to be cleaned and filtered.

    Args:
        classes: names of the classes.
        generator: answers a question.
        prompts: questions by name; ``{class}`` stands for the class.
        repeats: how often each is asked; LF-CBM asks twice, at temperature 0.7.
        cache: a JSON file that keeps the answers as they come: what is there is not asked again, so that an
            interrupted run loses one answer at most.
        show_progress: show a bar.

    Returns:
        Every concept once, in order of first appearance, with the classes it was named for as sources.

    Raises:
        InputError: no class, a question without ``{class}``, or an answer that is not text.
        ArtifactError: the cache is not one.

    Example:
        >>> answers = {"feat": "- a beak\\n- wings", "thin": "1. a nest\\n2. Wings", "supe": "animal"}
        >>> def model(prompt):
        ...     return next(answer for word, answer in answers.items() if word in prompt)
        >>> list(generate_concepts(["bird"], model))
        ['a beak', 'wings', 'a nest', 'Wings', 'animal']
    """
    if isinstance(classes, str) or not len(classes):
        raise InputError(f"classes must be a list of names, at least one; got {classes!r}")
    if repeats < 1:
        raise InputError(f"repeats={repeats} must be at least 1")
    for name, prompt in prompts.items():
        if "{class}" not in prompt:
            raise InputError(f"the prompt {name!r} has no placeholder {{class}}: {prompt!r}")
    path = None if cache is None else Path(cache)
    answers = _read_cache(path)
    sources: dict[str, list[str]] = {}
    for name in _progress(classes, show_progress):
        for prompt in prompts.values():
            question = prompt.replace("{class}", name)
            known = answers.setdefault(question, [])
            while len(known) < repeats:
                answer = generator(question)
                if not isinstance(answer, str):
                    raise InputError(
                        f"the generator must answer with text, got {type(answer).__name__} to {question!r}"
                    )
                known.append(answer)
                if path is not None:
                    write_atomically(path, json.dumps(answers, indent=1, ensure_ascii=False) + "\n")
            found = [concept for answer in known[:repeats] for concept in parse_list(answer)]
            if not found:
                warnings.warn(f"no concept in the answer to {question!r}", InputWarning, stacklevel=2)
            for concept in found:
                owners = sources.setdefault(concept, [])
                if name not in owners:
                    owners.append(name)
    return Vocabulary(sources, sources=sources)


def parse_list(answer: str) -> list[str]:
    """The items of a list as language models write it: lines, with bullets or numbers, or one line with commas.

    If some lines are marked as items, the others (an introduction, a closing remark) are passed over; without any,
    lines that end in a colon are.

    >>> parse_list("Here are some:\\n\\n- a beak\\n* **wings**\\n3) feathers.\\nHope this helps!")
    ['a beak', 'wings', 'feathers']
    >>> parse_list("animal, vertebrate, bird")
    ['animal', 'vertebrate', 'bird']
    """
    lines = [line for line in answer.splitlines() if line.strip()]
    marked = [line for line in lines if _ITEM.match(line)]
    if not marked and len(lines) == 1 and "," in lines[0]:
        marked = lines[0].split(",")
    chosen = marked or [line for line in lines if not line.rstrip().endswith(":")]
    found = [tidy(line.replace("**", "")) for line in chosen]
    return [concept for concept in dict.fromkeys(found) if concept]


def _read_cache(path: Path | None) -> dict[str, list[str]]:
    if path is None or not path.exists():
        return {}
    return read_json(path, mapping_of(list_of(text(longest=1_000_000))), "a cache of answers")


def _progress(classes: Sequence[str], show: bool) -> Any:
    if not show:
        return classes
    from tqdm.auto import tqdm

    return tqdm(classes, desc="concepts", unit="class")
