"""The suite under the kernels that a CPU offers, and how much of their tolerances the comparisons use under each.

    python tools/kernels.py                             # `make test-kernels`: all tests under all settings (hours)
    python tools/kernels.py --numeric                   # only those that compare numbers
    python tools/kernels.py --numeric --settings NAME,NAME tests/metrics

Libraries choose their code by the machine: what is rounded elsewhere is rounded differently, and green on one machine
can be red on the next. Each setting is one run of pytest in which every comparison of numbers writes down what it used
of its tolerance (``tests/comparisons.py``). The table goes to the terminal and to ``FOLDER/README.md``; the exit status
is 1 where a test failed or a comparison has no head-room: what is left of a tolerance that is no stated bound must be
ten times what the settings move.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HEADROOM = 10
SETTINGS: dict[str, dict[str, str]] = {
    "plain": {},
    "MKL AVX2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "MKL SSE4.2": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "MKL compatible": {"MKL_CBWR": "COMPATIBLE"},
    "ATen default": {"ATEN_CPU_CAPABILITY": "default"},
    "ATen AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "oneDNN AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "oneDNN SSE4.1": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "compatible": {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default"},
    "2 threads": {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
    "4 threads": {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4", "OMP_WAIT_POLICY": "PASSIVE"},
}
"""Names and variables; every setting but the last two has one thread, "plain" nothing else.

A thread that waits sleeps: with more of them than cores, those that spin would keep the others from their work.
"""


@dataclass(frozen=True)
class Run:
    """One setting: did pytest pass, and what each comparison, by ``folder/file.py:line``, used of its tolerance."""

    setting: str
    status: int
    seconds: float
    comparisons: Mapping[str, Mapping[str, Any]]


def collect(folder: Path) -> dict[str, dict[str, Any]]:
    """The comparisons that the processes of one run wrote, the worst of each place."""
    worst: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.json")):
        for site, entry in json.loads(file.read_text()).items():
            if site not in worst or entry["used"] > worst[site]["used"]:
                worst[site] = entry
    return worst


def run(setting: str, folder: Path, arguments: Sequence[str]) -> Run:
    """pytest with ``arguments`` under one setting."""
    shutil.rmtree(folder, ignore_errors=True)
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    status = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "--comparisons", str(folder)],
        cwd=ROOT, env=os.environ | one | SETTINGS[setting], check=False,
    ).returncode  # fmt: skip
    return Run(setting, status, time.monotonic() - start, collect(folder))


def without_headroom(runs: Iterable[Run]) -> dict[str, tuple[float, str, str]]:
    """Comparisons whose tolerance is no stated bound and nearly used up: how much of it, setting, test.

    What is left of the tolerance must be ten times what the settings move. A comparison that uses less than a tenth has
    that; one of what is no rounding (half precision with single, a sample with its mean) may use more of it.
    """
    seen: dict[str, list[tuple[float, str, str]]] = {}
    for one in runs:
        for site, entry in one.comparisons.items():
            if entry["kind"] == "tolerance" and entry["used"] <= 1:  # above it is a difference that a test asks for
                seen.setdefault(site, []).append((entry["used"], one.setting, entry["test"]))
    found = {}
    for site, entries in seen.items():
        worst, least = max(entries), min(entries)
        moved = worst[0] - least[0]
        if worst[0] > 1 / HEADROOM and HEADROOM * moved > 1 - worst[0]:
            found[site] = worst
    return found


def _moves(site: str, one: Run, plain: Run) -> bool:
    both = one.comparisons.get(site), plain.comparisons.get(site)
    return both[0] is not None and both[1] is not None and both[0]["largest"] != both[1]["largest"]


def changed(one: Run, plain: Run) -> float:
    """The fraction of comparisons whose largest difference is another one than under the plain setting."""
    both = one.comparisons.keys() & plain.comparisons.keys()
    return sum(_moves(site, one, plain) for site in both) / max(1, len(both))


def table(runs: Sequence[Run]) -> str:
    """Settings and results, then for each family of tests the largest difference and what of a tolerance was used."""
    lines = ["| setting | result | minutes | comparisons | changed |", "|---|---|---|---|---|"]
    for one in runs:
        result = "passed" if one.status == 0 else f"failed ({one.status})"
        moved = "" if one is runs[0] else f"{changed(one, runs[0]):.0%}"
        lines.append(f"| {one.setting} | {result} | {one.seconds / 60:.1f} | {len(one.comparisons)} | {moved} |")
    families = sorted({family(site) for one in runs for site in one.comparisons})
    moving = {site for one in runs[1:] for site in one.comparisons if _moves(site, one, runs[0])}
    lines += [
        "",
        "Of the comparisons that the settings move, by family of tests: the largest difference and (in parentheses)",
        "the largest part of a tolerance that was used; perhaps of two comparisons. What no setting moves",
        "is no rounding (a sample with its mean, pixels with their area).",
        "",
        "| tests | " + " | ".join(one.setting for one in runs) + " |",
        "|---|" + "---|" * len(runs),
    ]
    for name in families:
        cells = []
        for one in runs:
            own = [
                entry
                for site, entry in one.comparisons.items()
                if family(site) == name and (site in moving or len(runs) == 1)
            ]
            largest = max((entry["difference"] for entry in own if entry["used"] <= 1), default=0.0)
            used = max((entry["used"] for entry in own if entry["used"] <= 1), default=0.0)
            cells.append(f"{largest:.1e} ({used:.0%})" if own else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    bare = without_headroom(runs)
    if bare:
        lines += ["", f"Without head-room of {HEADROOM}:", "", "| place | used | setting | test |", "|---|---|---|---|"]
        lines += [f"| {site} | {bare[site][0]:.2f} | {bare[site][1]} | {bare[site][2]} |" for site in sorted(bare)]
    return "\n".join(lines) + "\n"


def family(site: str) -> str:
    """The folder of ``folder/file.py:line``."""
    return site.rpartition("/")[0] or "tests"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tests", nargs="*", help="files or folders (default: the whole suite)")
    parser.add_argument("--numeric", action="store_true", help="only tests that compare numbers")
    parser.add_argument("--without", metavar="NAME", help="leave out tests whose name contains this")
    parser.add_argument("--print-headroom", action="store_true", help="missing head-room is printed, but no failure")
    parser.add_argument("--settings", help=f"comma-separated, of: {', '.join(SETTINGS)} (default: all)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "kernels", help="default: %(default)s")
    parser.add_argument("--workers", default="auto", help="of pytest-xdist; 0: none (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="run nothing; the table of what lies in the folder")
    options = parser.parse_args(arguments)
    chosen = list(SETTINGS) if options.settings is None else [name.strip() for name in options.settings.split(",")]
    unknown = [name for name in chosen if name not in SETTINGS]
    if unknown:
        parser.error(f"no settings {unknown}; there are {list(SETTINGS)}")
    pytest = [*options.tests, "-n", options.workers, "--dist", "loadfile", "--no-loadscope-reorder"]
    if options.numeric:
        pytest += ["-m", "numeric"]
    if options.without:
        pytest += ["-k", f"not {options.without}"]
    runs = []
    for name in chosen:
        folder = options.folder / name.replace(" ", "-")
        summary = folder / "run"
        if options.again:
            if summary.is_file():
                status, seconds = summary.read_text().split()
                runs.append(Run(name, int(status), float(seconds), collect(folder)))
            continue
        print(f"--- {name}: {SETTINGS[name]}", flush=True)
        runs.append(run(name, folder, pytest))
        folder.mkdir(parents=True, exist_ok=True)
        summary.write_text(f"{runs[-1].status} {runs[-1].seconds}")
    text = table(runs)
    (options.folder / "README.md").write_text(text)
    print(text)
    bare = without_headroom(runs) and not options.print_headroom
    return int(any(one.status for one in runs) or bool(bare))


if __name__ == "__main__":
    sys.exit(main())
