"""What every benchmark shares: the environment it ran in, interleaved timing, and the record it leaves."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

#: Where records go; another folder for a trial that must not replace them.
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results").resolve()


def best_device() -> str:
    """A GPU where there is one: for the scripts that can use it."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def environment(*packages: str, device: str = "cpu") -> dict[str, Any]:
    """Machine, versions, date and the device that was used, as every record states them."""
    import torch

    names = ("torch", "captum", "numpy", *packages)
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "versions": {name: version for name in names if (version := _version(name))},
    }


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
