"""Numbers of the recorded benchmarks, put into pages when they are built, so that no page can be stale.

``{{ fam.json | ratio_to_bare_forward | FAM, linear head | .2f }}`` is a value: a file in ``benchmarks/results``, the
keys that lead to it (an integer indexes a list; ``name=value & name=value`` finds the
one row of a list), and a format.
``{{ include all }}`` is the page that ``python -m benchmarks.report.page`` makes of all records, without its title; its
pictures are :func:`pictures`.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
_VALUE = re.compile(r"\{\{ *([\w.-]+\.json(?: *\|[^{}]+?)+) *\}\}")
_INCLUDE = "{{ include all }}"


@cache
def _record(name: str) -> Any:
    weights = ROOT / "captum_concepts" / "demo" / "weights" / name
    path = RESULTS / name if (RESULTS / name).is_file() else weights
    if not path.is_file():
        raise KeyError(f"no record {name} in {RESULTS}")
    return json.loads(path.read_text(encoding="utf-8"))


def value(expression: str) -> str:
    """The formatted value of ``file | key | ... | format``.

    Raises:
        KeyError: there is no such record or entry.
    """
    name, *keys, form = (part.strip() for part in expression.split("|"))
    found = _record(name)
    for key in keys:
        wanted = [part.partition("=")[::2] for part in key.split(" & ")] if "=" in key else []
        try:
            if isinstance(found, list) and wanted:
                (found,) = (row for row in found if all(str(row[column]) == what for column, what in wanted))
            else:
                found = found[int(key)] if isinstance(found, list) else found[key]
        except (KeyError, IndexError, ValueError) as error:
            raise KeyError(f"{name} has no entry {key!r} in {' | '.join(keys)}") from error
    return format(found, form)


def render(markdown: str) -> str:
    """A page with its numbers and records."""
    if _INCLUDE in markdown:
        markdown = markdown.replace(_INCLUDE, _page().split("\n", 1)[1].strip())
    return _VALUE.sub(lambda found: value(found[1]), markdown)


def pictures() -> dict[str, bytes]:
    """The pictures of the included page, by name."""
    names = re.findall(r"!\[[^]]*\]\(([\w.-]+)\)", _page())
    return {name: (RESULTS / name).read_bytes() for name in names}


def _page() -> str:
    return (RESULTS / "README.md").read_text(encoding="utf-8")
