"""What every benchmark shares: the environment it ran in, interleaved timing, and the record it leaves."""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.ran import PACKAGE, digest, functions_that_ran

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


def sources(ran: dict[str, list[str] | None] | None = None) -> dict[str, str | dict[str, Any]]:
    """``{file: {"digest": ..., "ran": names of functions}}`` of the package's modules: what is measured here.

    A file that was imported unwatched (see :mod:`benchmarks.ran`) has the digest of all its code instead. Messages,
    lazy tables of names, and how many images are embedded at a time change no result: ``errors``, ``_checks``,
    ``__init__`` and ``batching`` are left out.

    Args:
        ran: of other processes, from :func:`functions`; None: of this one.
    """
    found: dict[str, str | dict[str, Any]] = {}
    for file, names in sorted((functions() if ran is None else ran).items()):
        code = digest((ROOT / file).read_text(encoding="utf-8"), names)
        found[file] = code if names is None else {"digest": code, "ran": names}
    return found


def add_functions(ran: dict[str, list[str] | None], more: dict[str, list[str] | None]) -> None:
    """To ``ran``, what another process handed over."""
    for file, names in more.items():
        ran[file] = sorted({*(ran.get(file) or ()), *(names or ())})


def functions() -> dict[str, list[str] | None]:
    """The package's modules that this process has imported, with the functions that ran."""
    found = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is None or name.split(".")[0] != PACKAGE:
            continue
        path = Path(file).resolve()
        if path.suffix != ".py" or ROOT not in path.parents:
            continue
        if path.stem not in ("errors", "_checks", "__init__", "batching"):
            found[path.relative_to(ROOT).as_posix()] = functions_that_ran(file)
    return found


def changed(record: dict[str, Any]) -> list[str] | None:
    """Measured files that are another code now, or gone; None for a record that does not know what it measured."""
    measured = list(_measured(record))
    if not measured:
        return None
    known = set()
    for file, one in measured:
        known.add((file, one, None) if isinstance(one, str) else (file, one["digest"], tuple(one["ran"])))
    return sorted({file for file, code, ran in known if code != _digest_now(ROOT / file, ran)})


@functools.cache
def _digest_now(path: Path, ran: tuple[str, ...] | None) -> str | None:
    return digest(path.read_text(encoding="utf-8"), ran) if path.is_file() else None


def _measured(record: Any) -> Iterator[tuple[str, str | dict[str, Any]]]:
    """Files and their digests in all environments of a record; parts that were recorded apart may have several."""
    if isinstance(record, dict):
        measured = record.get("sources")
        if isinstance(measured, dict):
            yield from measured.items()
        for name, value in record.items():
            if name != "sources" or not isinstance(value, dict):
                yield from _measured(value)
    elif isinstance(record, list):
        for value in record:
            yield from _measured(value)


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


def peak_mib(start_again: bool = False) -> float:
    """The most memory so far; with ``start_again`` what is held now, and the peak is counted from here on."""
    status = Path("/proc/self/status")
    if status.exists():  # of this program alone: a new process inherits the other one's ru_maxrss
        if start_again:
            Path("/proc/self/clear_refs").write_text("5")
        return float(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


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
