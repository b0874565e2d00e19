"""What every benchmark shares: the environment it ran in, interleaved timing, and the record it leaves."""

from __future__ import annotations

import ast
import datetime
import hashlib
import io
import json
import os
import platform
import statistics
import sys
import time
import tokenize
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = "captum_concepts"
ROOT = Path(__file__).resolve().parents[1]
#: Where records go; another folder for a trial that must not replace them.
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results").resolve()


def best_device() -> str:
    """A GPU where there is one: for the scripts that can use it."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def environment(*packages: str, device: str = "cpu") -> dict[str, Any]:
    """Machine, versions, date, the device and the code that was used, as every record states them."""
    import torch

    names = ("torch", "captum", "numpy", *packages)
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "versions": {name: version for name in names if (version := _version(name))},
        "sources": sources(),
    }


def sources() -> dict[str, str]:
    """The package's modules that this process has imported, as ``{file: digest}``: what is measured here.

    Messages and lazy tables of names change no measurement: ``errors``, ``_checks`` and ``__init__`` are left out.
    """
    found = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is None or name.split(".")[0] != PACKAGE:
            continue
        path = Path(file).resolve()
        if path.suffix == ".py" and path.stem not in ("errors", "_checks", "__init__") and ROOT in path.parents:
            found[path.relative_to(ROOT).as_posix()] = digest(path.read_text(encoding="utf-8"))
    return dict(sorted(found.items()))


def digest(source: str) -> str:
    """Eight hexadecimal digits of a module's code: comments, docstrings and empty lines do not count."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            match node.body[0]:
                case ast.Expr(value=ast.Constant(value=str()), lineno=first, end_lineno=int(last)):
                    lines[first - 1 : last] = [""] * (last - first + 1)
    code = "\n".join(line.rstrip() for line in lines if line.strip())
    return hashlib.sha256(code.encode()).hexdigest()[:8]


def changed(record: dict[str, Any]) -> list[str] | None:
    """Measured files that are another code now, or gone; None for a record that does not know what it measured."""
    measured = dict(_measured(record))
    if not measured:
        return None
    found = []
    for file, known in measured.items():
        path = ROOT / file
        if not path.is_file() or known != {digest(path.read_text(encoding="utf-8"))}:
            found.append(file)
    return sorted(found)


def _measured(record: Any, known: dict[str, set[str]] | None = None) -> dict[str, set[str]]:
    """Files and their digests in all environments of a record; parts that were recorded apart may have several."""
    known = {} if known is None else known
    if isinstance(record, dict):
        for file, code in record.get("sources", {}).items() if isinstance(record.get("sources"), dict) else ():
            known.setdefault(file, set()).add(code)
        for value in record.values():
            _measured(value, known)
    elif isinstance(record, list):
        for value in record:
            _measured(value, known)
    return known


def _version(package: str) -> str | None:
    """None where it is not installed: its rows are missing then."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def median_times(functions: dict[str, Callable[[], Any]], *, repeats: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each function, run in turn so that a busy moment of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(warmup + repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            _wait()
            if round_ >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _wait() -> None:
    """A GPU works on after the call that started it has come back."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def write(name: str, record: dict[str, Any]) -> Path:
    """Write ``results/<name>.json`` whole or not at all."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(path)
    return path


def table(columns: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
