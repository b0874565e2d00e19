"""Which functions of the package ran, so that a record belongs to the code it measured and to no other.

``watch`` makes each function of the package note its name as it starts. It must come before the package is imported;
``benchmarks/__init__.py`` calls it. What ran in other processes is not seen: they hand it over, as
``run/audit/streaming.py`` does.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.abc
import importlib.machinery
import io
import sys
import tokenize
from collections.abc import Collection, Iterator
from types import CodeType, ModuleType
from typing import Any

PACKAGE = "captum_concepts"
_NOTE = "__ran__"
_RAN: dict[str, set[str]] = {}


def watch() -> None:
    """From now on modules of the package are imported so that their functions note that they ran."""
    if PACKAGE not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def functions_that_ran(file: str) -> list[str] | None:
    """Names such as ``fit`` or ``SALFCBM.explain`` (functions inside of functions count as these); None for a file that
    was imported unwatched."""
    return sorted(_RAN[file]) if file in _RAN else None


def digest(source: str, ran: Collection[str] | None = None) -> str:
    """Eight hexadecimal digits of a module's code: comments, docstrings, empty lines, checks and messages do not count.

    A check is an ``if`` that ends in ``raise``, a function named ``check_...``, or a call of one or of
    :mod:`captum_concepts._checks` whose result is not used: where something was measured, it passed. Messages are the
    arguments of ``raise`` and of ``warnings.warn``.

    Args:
        source: the module's text.
        ran: only these functions count, what stands outside of functions, and the names of all methods; None: all.
    """
    lines = list(_without_comments(source))
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            match node.body[0]:
                case ast.Expr(value=ast.Constant(value=str()), lineno=first, end_lineno=int(last)):
                    lines[first - 1 : last] = [""] * (last - first + 1)
    _blank(lines, tree, ran)
    code = "\n".join(line.rstrip() for line in lines if line.strip())
    return hashlib.sha256(code.encode()).hexdigest()[:8]


@functools.cache
def _without_comments(source: str) -> tuple[str, ...]:
    """Its lines. A record has dozens of parts, each with the functions that ran in it, and a tokenizer is slow."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return tuple(lines)


def _blank(lines: list[str], tree: ast.Module, ran: Collection[str] | None) -> None:
    """Without checks, functions that did not run, and imports that only these need. Of a method its name stays, since a
    new one may replace a base's."""
    dropped: set[ast.AST] = set()
    for name, function in _functions(tree):
        if (ran is not None and name not in ran) or name.startswith("check_"):
            dropped.add(function)
            first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
            _replace(lines, first, function, f"def {name}" if "." in name else "")
    for check in _checks(tree):
        dropped.add(check)
        _replace(lines, check.lineno, check, "")
    for node in list(_nodes(tree, dropped)):
        match node:
            case ast.Raise(exc=ast.Call(func=ast.Name(id=name))):
                _replace(lines, node.lineno, node, f"raise {name}")
                dropped.add(node)
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="warnings"), attr="warn"))):
                _replace(lines, node.lineno, node, "warnings.warn")
                dropped.add(node)
    names = {node.id for node in _nodes(tree, dropped) if isinstance(node, ast.Name)}
    for node in _nodes(tree, dropped):
        if isinstance(node, ast.Import | ast.ImportFrom):
            used = [a for a in node.names if (a.asname or a.name).split(".")[0] in names]
            source = "" if isinstance(node, ast.Import) else f"{'.' * node.level}{node.module or ''}."
            _replace(lines, node.lineno, node, " ".join(sorted(f"{source}{a.name}:{a.asname}" for a in used)))


def _checks(tree: ast.AST) -> Iterator[ast.stmt]:
    """Statements that let pass or raise."""
    known = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == f"{PACKAGE}._checks"
        for alias in node.names
    }
    for node in ast.walk(tree):
        match node:
            case ast.If(test=test, body=[*_, ast.Raise()], orelse=[]):
                if not any(isinstance(part, ast.NamedExpr) for part in ast.walk(test)):
                    yield node
            case ast.Expr(value=ast.Call(func=ast.Name(id=name))) if name in known or name.startswith("check_"):
                yield node


def _replace(lines: list[str], first: int, node: ast.stmt, text: str) -> None:
    last = node.end_lineno or first
    lines[first - 1 : last] = [text] + [""] * (last - first)


def _nodes(tree: ast.AST, without: Collection[ast.AST]) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if node not in without:
            yield node
            yield from _nodes(node, without)


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Functions and methods with their names, not those inside of functions. A property and its setter share one."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.")
        elif not isinstance(node, ast.expr):
            yield from _functions(node, prefix)


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles a module anew (no cache of bytecode is read or written), with the notes in it."""

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002
        tree = ast.parse(self.get_data(self.path))
        for name, node in list(_functions(tree)):
            note = ast.Expr(ast.Call(ast.Name(_NOTE, ast.Load()), [ast.Constant(name)], []))
            at = 1 if ast.get_docstring(node, clean=False) is not None else 0
            node.body.insert(at, ast.copy_location(note, node.body[0]))
        code: CodeType = compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)
        return code

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__[_NOTE] = _RAN.setdefault(self.path, set()).add
        super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] != PACKAGE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec
