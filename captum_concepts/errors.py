"""The package's exceptions and warnings: one place, so that users can catch what they mean.

Every message names what was given, what is allowed, and what to do. All exceptions derive from
:class:`CaptumConceptsError`; each also derives from the built-in type that Python programmers expect.
"""

from __future__ import annotations

import difflib
import reprlib
import unicodedata
from collections.abc import Iterable
from typing import Any

#: The longest message of an exception or a warning of this package, in characters.
LONGEST_MESSAGE = 600


class CaptumConceptsError(Exception):
    """Base class of every exception this package raises on purpose; the middle of a long message is left out."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(_cut(arg) if isinstance(arg, str) else arg for arg in args))


class InputError(CaptumConceptsError, ValueError):
    """An argument has a value, shape, dtype or range that the called function does not accept."""


class TargetError(InputError, AssertionError):
    """A ``target`` is of the wrong type, length or range.

    It is an ``AssertionError`` as well, because Captum raises that for bad targets and its users catch it.
    """


class LayerError(InputError):
    """A layer is unknown, not reached, called twice, or its positions do not reach the model's output."""


class LayoutError(LayerError):
    """A layer's output cannot be read as one grid of positions without a hint from the user."""


class ArtifactError(CaptumConceptsError, ValueError):
    """A saved file is broken, foreign, or belongs to another model, layer or data set."""


class NotFittedError(CaptumConceptsError, RuntimeError):
    """A method was used before ``fit`` (or without the references, concepts or texts it needs)."""


class CaptumConceptsWarning(UserWarning):
    """Base class of every warning this package gives; the middle of a long message is left out."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(_cut(arg) if isinstance(arg, str) else arg for arg in args))


class InputWarning(CaptumConceptsWarning):
    """The input is usable but probably not meant: NaN, infinite or out-of-range values."""


class ConvergenceWarning(CaptumConceptsWarning):
    """An optimiser stopped before its certificate reached the asked tolerance."""


def did_you_mean(name: str, known: Iterable[str], *, limit: int = 5) -> str:
    """Return `` Did you mean ...?`` with the nearest of ``known``, or an empty string.

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
    """The first ``limit`` of some names and how many more there are, for a message.

    >>> listing(["a", "b"]), listing(range(1000), 3)
    ("'a', 'b'", '0, 1, 2 and 997 more')
    """
    every = list(names)
    more = f" and {len(every) - limit:,} more" if len(every) > limit else ""
    return ", ".join(shortened(name) for name in every[:limit]) + more


def shortened(value: Any, longest: int = 100) -> str:
    """``repr(value)`` in at most about ``longest`` characters, also of a huge or deep one.

    >>> shortened(list(range(1000))), shortened("x" * 1000, 20)
    ('[0, 1, 2, 3, 4, 5, ...]', "'xxxxxxx...xxxxxxxx'")
    """
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = longest
    text = short.repr(value)
    return text if len(text) <= 2 * longest else f"{text[:longest]}..."


def printable(text: object) -> str:
    r"""Text from outside, such as a file's name, as it may be printed: what moves a terminal's cursor or is no
    character becomes an escape.

    >>> printable("a\x1b[31m.png"), printable(b"caf\xe9".decode(errors="surrogateescape"))
    ('a\\x1b[31m.png', 'caf\\xe9')
    """
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else _escape(c) for c in str(text))


def _escape(letter: str) -> str:
    byte = ord(letter) - 0xDC00  # of a name that is no UTF-8, as Python reads it
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else ascii(letter)[1:-1]


def _cut(message: str) -> str:
    """The start and the end of a message that is too long: they say what is wrong, and what to do."""
    if len(message) <= LONGEST_MESSAGE:
        return message
    end = LONGEST_MESSAGE // 3
    start = LONGEST_MESSAGE - end - len(" [...] ")
    return f"{message[:start]} [...] {message[-end:]}"
