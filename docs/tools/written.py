"""What the pages say that code knows better: numbers of records, helps of commands, names of the reference.

    python docs/tools/written.py    # `make pages`: writes it into docs/**/*.md; a test compares

It stands in the pages as they are in the repository, so that they read there, between comments that say where it is
from. ``.48<!-- fam.json ; rows ; FAM ; nra ; .2f -->`` is a number: a file in ``benchmarks/results``, the keys that
lead to it (an integer indexes a list; ``name=value & name=value`` finds the one row of a list), and a format.
``<!-- written: commands --> ... <!-- /written -->`` is every command's help, ``tutorials`` the table of tutorials,
``names`` the objects that the page's mkdocstrings directives, themselves in a comment, document in the site. Links to
notebooks and records lead to the files of the repository; :func:`for_site` makes pages of the site of them.
"""

from __future__ import annotations

import importlib
import inspect
import json
import posixpath
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
_VALUE = re.compile(r"(?P<shown>[^\s|<>(*]*)<!-- (?P<where>[\w.-]+\.json(?: ; [^;<>]+)+) -->")
_BLOCK = re.compile(r"<!-- written: (\w+) -->\n.*?<!-- /written -->", flags=re.DOTALL)
_DIRECTIVES = re.compile(r"<!--\n(:::.*?)-->\n?", flags=re.DOTALL)
_DIRECTIVE = re.compile(r"^::: (\S+)\n((?:[ ]+.*\n|\n(?=[ ]))*)", flags=re.MULTILINE)
_TUTORIAL = re.compile(r"\]\((?:\.\./)+tutorials/(\w+)\.ipynb\)")
_RESULTS = "All records, with plots: [benchmarks/results](../benchmarks/results/README.md)."
_ROLE = re.compile(r":\w+:`~?([^`]+)`")


@cache
def _record(name: str) -> Any:
    weights = ROOT / "captum_concepts" / "demo" / "weights" / name
    path = RESULTS / name if (RESULTS / name).is_file() else weights
    if not path.is_file():
        raise KeyError(f"no record {name} in {RESULTS}")
    return json.loads(path.read_text(encoding="utf-8"))


def value(expression: str) -> str:
    """The formatted value of ``file ; key ; ... ; format``.

    Raises:
        KeyError: there is no such record or entry.
    """
    name, *keys, form = (part.strip() for part in expression.split(";"))
    found = _record(name)
    for key in keys:
        wanted = [part.partition("=")[::2] for part in key.split(" & ")] if "=" in key else []
        try:
            if isinstance(found, list) and wanted:
                (found,) = (row for row in found if all(str(row[column]) == what for column, what in wanted))
            else:
                found = found[int(key)] if isinstance(found, list) else found[key]
        except (KeyError, IndexError, ValueError) as error:
            raise KeyError(f"{name} has no entry {key!r} in {' ; '.join(keys)}") from error
    text = format(found, form)
    return text if text.strip("-0.") else text.removeprefix("-")  # what is rounded to zero has no sign


def commands(_: str) -> str:
    """Every command's help under a heading."""
    import command_line

    return "\n".join(f"## {name}\n\n```text\n{text}\n```\n" for name, text in command_line.helps().items())


def tutorials(_: str) -> str:
    """The table of tutorials and their cost."""
    import notebooks

    rows = ["| tutorial | CPU seconds |", "| --- | --- |"]
    for path in notebooks.notebooks():
        about = json.loads(path.read_text(encoding="utf-8"))
        seconds = about["metadata"].get("captum_concepts", {}).get("cpu_seconds", float("nan"))
        rows.append(f"| [{notebooks.title(about)}](../../tutorials/{path.name}) | {seconds:.0f} |")
    return "\n".join(rows)


def documented(directives: str) -> Iterator[tuple[str, Any]]:
    """The objects of a page: the names that directives list, or all public ones of a module."""
    for path, options in _DIRECTIVE.findall(directives):
        found = _import(path)
        listed = re.search(r"members: \[(.*?)\]", options, flags=re.DOTALL)
        if listed:
            names = re.findall(r"\w+", listed[1])
        elif inspect.ismodule(found):
            names = getattr(found, "__all__", None) or [
                name for name, member in vars(found).items() if _own(found, name, member)
            ]
        else:
            yield path.rpartition(".")[2], found
            continue
        for name in names:
            yield name, getattr(found, name)


def _own(module: Any, name: str, member: Any) -> bool:
    own = getattr(member, "__module__", None) == module.__name__ or (name.isupper() and isinstance(member, dict))
    return own and not name.startswith("_")


def names(page: str) -> str:
    """A table of the documented objects, each with a link to its source and the first paragraph of its docstring."""
    rows = ["| name | what it is |", "| --- | --- |"]
    for name, thing in dict(documented("\n".join(_DIRECTIVES.findall(page)))).items():
        described = inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing)
        text = (
            (inspect.getdoc(thing) or "").split("\n\n")[0] if described else f"`{textwrap.shorten(repr(thing), 200)}`"
        )
        text = _ROLE.sub(lambda found: f"`{found[1].rpartition('.')[2]}`", " ".join(text.split()))
        text = text.replace("``", "`").replace("|", "\\|")
        file = _source(thing) if described else None
        rows.append(f"| {f'[`{name}`]({file})' if file else f'`{name}`'} | {text} |")
    return "\n".join(rows)


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), name)


def _source(thing: Any) -> str | None:
    file = Path(inspect.getsourcefile(inspect.unwrap(thing)) or "")
    return f"../../{file.relative_to(ROOT).as_posix()}" if file.is_relative_to(ROOT) else None


PARTS: dict[str, Callable[[str], str]] = {"commands": commands, "tutorials": tutorials, "names": names}


def write(page: str) -> str:
    """A page with its numbers, helps and names as they are now."""
    page = _VALUE.sub(lambda found: f"{value(found['where'])}<!-- {found['where']} -->", page)
    return _BLOCK.sub(lambda found: f"<!-- written: {found[1]} -->\n{PARTS[found[1]](page)}\n<!-- /written -->", page)


def for_site(page: str, address: str) -> str:
    """What MkDocs reads, for the page at ``address``: directives, not names, and links inside the site."""
    page = re.sub(r"<!-- written: names -->.*?<!-- /written -->\n*", "", page, flags=re.DOTALL)
    page = _DIRECTIVES.sub(lambda found: found[1], page)
    if _RESULTS in page:
        page = page.replace(_RESULTS, (RESULTS / "README.md").read_text(encoding="utf-8").split("\n", 1)[1].strip())
    here = posixpath.dirname(address) or "."
    return _TUTORIAL.sub(lambda found: f"]({posixpath.relpath(f'tutorials/{found[1]}.md', here)})", page)


def pictures() -> dict[str, bytes]:
    """The pictures of the page of records, by name."""
    page = (RESULTS / "README.md").read_text(encoding="utf-8")
    return {name: (RESULTS / name).read_bytes() for name in re.findall(r"!\[[^]]*\]\(([\w.-]+)\)", page)}


def main() -> None:
    """Write all pages."""
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    for page in sorted(DOCS.rglob("*.md")):
        before = page.read_text(encoding="utf-8")
        after = write(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"written: {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
