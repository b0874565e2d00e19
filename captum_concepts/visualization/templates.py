"""HTML from jinja2 templates that lie beside the code as files: every value is escaped."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

# What HTML cannot contain, also not escaped.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def clean(value: Any) -> Any:
    """A text without control characters and lone surrogates, which become U+FFFD; other values as they are.

    >>> clean("nul\\x00")
    'nul\ufffd'
    """
    return _CONTROL.sub("\ufffd", value) if isinstance(value, str) and not isinstance(value, Markup) else value


_HERE = Path(__file__).parent


@cache
def template(name: str, folder: Path = _HERE) -> jinja2.Template:
    """A template of this room, such as ``"report/card.html"``, or of another ``folder``."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder, encoding="utf-8"),
        autoescape=True,
        finalize=clean,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.tests["fingerprint"] = lambda value: re.fullmatch("[0-9a-f]{12,}", value) is not None
    return environment.get_template(name)


@cache
def asset(name: str, folder: Path = _HERE) -> Markup:
    """A style sheet or script of this room (or of ``folder``), as it is: it is ours and is not escaped."""
    return Markup((folder / name).read_text(encoding="utf-8"))
