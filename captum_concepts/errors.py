"""Exceptions and warnings of the package.

Every message states what was passed, what is allowed, and what to do. All exceptions derive from
:class:`CaptumConceptsError` and from the built-in type that Python programmers expect.
"""

from __future__ import annotations

import difflib
import reprlib
import unicodedata
from collections.abc import Iterable
from typing import Any

#: Maximum length of an exception's or a warning's message, in characters.
LONGEST_MESSAGE = 600


class CaptumConceptsError(Exception):
    """Base class of all exceptions that this package raises on purpose; long messages are cut in the middle."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(_cut(arg) if isinstance(arg, str) else arg for arg in args))


class InputError(CaptumConceptsError, ValueError):
    """An argument has a value, shape, dtype or range that the called function does not accept."""


class TargetError(InputError, AssertionError):
    """A ``target`` has the wrong type, length or range.

    It is also an ``AssertionError``, which Captum raises for bad targets and its users catch.
    """


class LayerError(InputError):
    """A layer is unknown, not reached or called twice, or its positions do not affect the model's output."""


class LayoutError(LayerError):
    """A layer's output cannot be read as one grid of positions without a hint from the user."""


class ArtifactError(CaptumConceptsError, ValueError):
    """A saved file is damaged, in another format, or belongs to another model, layer or data set."""


class NotFittedError(CaptumConceptsError, RuntimeError):
    """A method was used before ``fit`` (or without the references, concepts or texts it needs)."""


class CaptumConceptsWarning(UserWarning):
    """Base class of all warnings of this package; long messages are cut in the middle."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(_cut(arg) if isinstance(arg, str) else arg for arg in args))


class InputWarning(CaptumConceptsWarning):
    """The input is usable but probably unintended, such as NaN, infinite or out-of-range values."""


class ConvergenceWarning(CaptumConceptsWarning):
    """An optimizer stopped before the duality gap reached the requested tolerance."""


def did_you_mean(name: str, known: Iterable[str], *, limit: int = 5) -> str:
    """Hint `` Did you mean ...?`` with the closest of ``known``, or an empty string.

    >>> did_you_mean("layer5", ["layer3", "layer4", "fc"])
    " Did you mean 'layer4' or 'layer3'?"
    >>> did_you_mean("qqq", ["layer3"])
    ''
    """
    near = difflib.get_close_matches(name[:100], list(known), n=limit)
    if not near:
        return ""
    quoted = [f"'{n}'" for n in near]
    head = ", ".join(quoted[:-1])
    return f" Did you mean {head + ' or ' if head else ''}{quoted[-1]}?"


def listing(names: Iterable[object], limit: int = 8) -> str:
    """The first ``limit`` names and the number of further ones, for a message.

    >>> listing(["a", "b"]), listing(range(1000), 3)
    ("'a', 'b'", '0, 1, 2 and 997 more')
    """
    every = list(names)
    more = f" and {len(every) - limit:,} more" if len(every) > limit else ""
    return ", ".join(shortened(name) for name in every[:limit]) + more


def shortened(value: Any, longest: int = 100) -> str:
    """``repr(value)`` in at most about ``longest`` characters, even of huge or deeply nested values.

    >>> shortened(list(range(1000))), shortened("x" * 1000, 20)
    ('[0, 1, 2, 3, 4, 5, ...]', "'xxxxxxx...xxxxxxxx'")
    """
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = longest
    text = short.repr(value)
    return text if len(text) <= 2 * longest else f"{text[:longest]}..."


def printable(text: object) -> str:
    r"""Untrusted text, such as a file name, made safe to print by escaping control and invalid characters.

    >>> printable("a\x1b[31m.png"), printable(b"caf\xe9".decode(errors="surrogateescape"))
    ('a\\x1b[31m.png', 'caf\\xe9')
    """
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else _escape(c) for c in str(text))


def _escape(letter: str) -> str:
    byte = ord(letter) - 0xDC00  # a surrogate escape, of a name that is not UTF-8
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else ascii(letter)[1:-1]


def _cut(message: str) -> str:
    """A long message without its middle; the start states what is wrong, and the end what to do."""
    if len(message) <= LONGEST_MESSAGE:
        return message
    end = LONGEST_MESSAGE // 3
    start = LONGEST_MESSAGE - end - len(" [...] ")
    return f"{message[:start]} [...] {message[-end:]}"
