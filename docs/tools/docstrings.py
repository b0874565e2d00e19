"""A griffe extension: the docstrings' roles, formulas and doctests in the form that Markdown knows."""

from __future__ import annotations

import importlib.util
import re
import textwrap
from pathlib import Path
from typing import Any

import griffe

_spec = importlib.util.spec_from_file_location("formulas", Path(__file__).with_name("formulas.py"))
formulas = importlib.util.module_from_spec(_spec)  # type: ignore[arg-type]
_spec.loader.exec_module(formulas)  # type: ignore[union-attr]

_DISPLAY = re.compile(r"^( *)\.\. math::(.*)\n((?:\1 +.*\n?|\s*\n)*)", flags=re.MULTILINE)
_INLINE = re.compile(r":math:`([^`]+)`")
_ROLE = re.compile(r":(class|func|meth|attr|mod|data|exc):`~?([^`]+)`")
_DOCTEST = re.compile(r"^( *)>>> .*\n?(?:\1\S.*\n?|\1 .*\n?)*", flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Called by griffe for every object it has read."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """All modules are there: links can be resolved."""
        known = public_paths(pkg)
        for docstring in _docstrings(pkg, set()):
            docstring.value = to_markdown(docstring.value, known)


def public_paths(package: griffe.Module) -> dict[str, str]:
    """The last part of each documented name -> the identifier on its page, which is the one a user imports."""
    found: dict[str, str] = {}
    for room in (package, *package.modules.values()):
        if room.name.startswith("__"):
            continue
        for name, member in room.members.items():
            own = member.is_alias and str(member.target_path).startswith(package.name)
            if not name.startswith("_") and (
                own or (room.name == "errors" and not member.is_alias and member.is_class)
            ):
                found.setdefault(name, f"{room.path}.{name}")
    return found


def _docstrings(thing: Any, seen: set[int]) -> Any:
    if thing.is_alias or id(thing) in seen:
        return
    seen.add(id(thing))
    if thing.docstring is not None:
        yield thing.docstring
    for member in thing.members.values():
        yield from _docstrings(member, seen)


def to_markdown(text: str, known: dict[str, str]) -> str:
    """One docstring; ``known`` maps names to the identifiers that links lead to.

    >>> to_markdown("see :func:`nra`", {"nra": "captum_concepts.metrics.nra"})
    'see [`nra`][captum_concepts.metrics.nra]'
    """
    text = _DISPLAY.sub(lambda m: f"\n{m[1]}{_formula(m[2] + ' ' + m[3], True)}\n\n", text)
    text = _INLINE.sub(lambda m: _formula(m[1], False), text)
    text = _ROLE.sub(lambda m: _link(m[1], m[2], known), text)
    text = text.replace("::\n\n", ":\n\n").replace("``", "`")
    return _DOCTEST.sub(_fenced, text)


def _formula(latex: str, display: bool) -> str:
    return formulas.to_mathml(textwrap.dedent(latex).strip(), display)


def _link(role: str, name: str, known: dict[str, str]) -> str:
    title = re.fullmatch(r"(.+?) <(.+)>", name)
    if title:
        return f"`{title[1]}`"
    short, _, member = name.removeprefix("captum_concepts.").partition(".")
    last = name.rpartition(".")[2]
    shown = f"`{last if name.startswith('captum_concepts.') else name}{'()' if role == 'meth' else ''}`"
    if role == "meth" and short in known:
        return f"[{shown}][{known[short]}.{member}]"
    target = known.get(name if "." not in name else last)
    return f"[{shown}][{target}]" if target and role in ("class", "func") else shown


def _fenced(found: re.Match[str]) -> str:
    lines = textwrap.indent(textwrap.dedent(found[0]).rstrip(), found[1])
    return f"{found[1]}```pycon\n{lines}\n{found[1]}```\n"
