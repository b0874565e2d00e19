"""Detection of English concepts that differ only in article, plural or hyphen."""

from __future__ import annotations

import re
import unicodedata

ARTICLES = ("a ", "an ", "the ")
_IRREGULAR = {
    "men": "man", "women": "woman", "people": "person", "children": "child", "feet": "foot", "teeth": "tooth",
    "geese": "goose", "mice": "mouse", "leaves": "leaf", "knives": "knife", "wolves": "wolf", "shelves": "shelf",
    "halves": "half", "calves": "calf", "loaves": "loaf", "scarves": "scarf", "hooves": "hoof", "lives": "life",
    "wives": "wife", "oxen": "ox", "cacti": "cactus", "fungi": "fungus",
}  # fmt: skip
_SINGULAR = {
    "bus", "gas", "lens", "series", "species", "canvas", "octopus", "cactus", "iris", "trousers", "scissors", "glasses",
    "pants", "jeans", "shorts", "pyjamas", "pajamas", "tennis", "pancreas", "atlas", "christmas",
}  # fmt: skip
_BULLET = re.compile(r"^\s*(?:[-*•–—·]+|\(?\d{1,3}[.)](?!\d))\s*")
_QUOTES = "\"'`“”‘’«»"


def tidy(text: str, *, lowercase: bool = False) -> str:
    """``text`` without bullet, quotes, final punctuation, line breaks and double spaces.

    >>> tidy("  - 'A  Long Tail'. "), tidy("1) four legs;")
    ('A Long Tail', 'four legs')
    """
    text = unicodedata.normalize("NFC", text.replace("\ufeff", ""))
    text = _BULLET.sub("", " ".join(text.split()))
    text = text.strip().rstrip(".,;:").strip(_QUOTES).strip().rstrip(".,;:").strip()
    return text.lower() if lowercase else text


def singular(word: str) -> str:
    """The singular of an English noun, by rule; other words may be mangled, but consistently.

    >>> [singular(w) for w in ("wings", "boxes", "berries", "glass", "bus", "feet", "leash")]
    ['wing', 'box', 'berry', 'glass', 'bus', 'foot', 'leash']
    """
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word in _SINGULAR or len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("xes", "ches", "shes", "sses", "zzes")):
        return word[:-2]
    return word[:-1]


def strip_article(text: str) -> str:
    """``text`` without a leading "a", "an" or "the"."""
    return next((text[len(article) :] for article in ARTICLES if text.lower().startswith(article)), text)


def key(text: str) -> str:
    """A key that is equal for texts that differ only in case, article, plural of the last word, hyphens and spaces.

    >>> key("a bird-feeder") == key("Birdfeeders") == key("the bird feeder") != key("bird")
    True
    """
    words = re.sub(r"[-_/]", " ", strip_article(tidy(text, lowercase=True))).split()
    return "".join([*words[:-1], singular(words[-1])]) if words else ""
