"""HTML from jinja2 templates, which are files next to the code; every value is escaped."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

# Characters that HTML cannot contain, even escaped.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def clean(value: Any) -> Any:
    """Text with control characters and lone surrogates replaced by U+FFFD; other values are unchanged.

    >>> clean("nul\\x00")
    'nul\ufffd'
    """
    return _CONTROL.sub("\ufffd", value) if isinstance(value, str) and not isinstance(value, Markup) else value


_HERE = Path(__file__).parent


@cache
def template(name: str, folder: Path = _HERE) -> jinja2.Template:
    """A template of this package, such as ``"report/card.html"``, or of another ``folder``."""
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
    """A style sheet or script of this package (or of ``folder``), which is trusted and not escaped."""
    return Markup((folder / name).read_text(encoding="utf-8"))
