"""Run the benchmarks one after another, then make the results page.

    python -m benchmarks.run.suite                        # the short ones: minutes
    python -m benchmarks.run.suite --full                 # the long ones too: about two hours on 2 cores
    python -m benchmarks.run.suite --only nra fam         # some
    python -m benchmarks.run.suite --stale                # those whose records measured another code than this
    python -m benchmarks.run.suite --list                 # what there is, and what each would run
    python -m benchmarks.run.suite --results /tmp/trial   # leaves the records of the repository alone

Scripts that need photographs get ``--data`` (by default ``../shared/data`` beside the checkout); where it is not there
they are left out, which the end of the output says, and the page keeps what was recorded last. Each script runs in a
process of its own and writes its own record, so one that fails takes nothing with it. Where there is a GPU, scripts use
it and their records say so.

Run by hand, in no run of this: ``audit.*``, ``salf_cbm.epoch``, ``salf_cbm.tables grid prompts caltech``,
``ce_fam.regions --sensitivity``, what ``solver`` has besides ``peers``, and the papers' tables.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, changed
from benchmarks.report.page import load

DATA = "{data}"


@dataclass(frozen=True)
class Job:
    """One script with its arguments: short, as ``make bench`` runs it, and full.

    Args:
        name: how it is asked for, and how the names of its records begin.
        short, full: arguments; None leaves it out of that run. ``{data}`` is the folder of photographs; a job that
            names it is left out where there is none.
        module: below ``benchmarks.run``; by default the name's.
        records: how the names of its records begin, if not as its own.
        minutes: what the full one took at most, on 2 cores with other work on them.
    """

    name: str
    short: str | None
    full: str | None
    module: str = ""
    minutes: float = 1
    records: str = ""

    def command(self, full: bool, data: Path | None) -> list[str] | None:
        """The command line, or None if it is left out."""
        given = self.full if full else self.short
        if given is None or (DATA in given and data is None):
            return None
        parts = [part.replace(DATA, str(data)) for part in shlex.split(given)]
        return [sys.executable, "-W", "ignore", "-m", f"benchmarks.run.{self.module or self.name}", *parts]

    def stale(self, records: dict[str, dict[str, Any]]) -> bool:
        """Is one of its records of another code than this, or missing?"""
        start = self.records or self.name
        own = [record for name, record in records.items() if name == start or name.startswith(f"{start}_")]
        return not own or any(changed(record) != [] for record in own)


SCENES = "scenes-few-shot scenes-pairs with-head questions cost"
PHOTOS = "coco-few-shot coco-pairs caltech coco-questions coco-with-head"
SALF = "--train 600 --test 300 --grid-train 300 --planted-test 100"
JOBS = [
    Job("nra", "--repeats 3 --maps 16", "", minutes=1),
    Job("metrics_peers", "--maps 8 --repeats 3", "", "metrics", minutes=1),
    Job("fam", "--repeats 5", "", "fam.cost", minutes=2),
    Job("fam_quality", f"--images 24 --parts {SCENES}", f"--images 60 --parts {SCENES}", "fam.quality", minutes=2),
    Job("fam_photos", None, f"--data {DATA} --parts {PHOTOS}", "fam.quality", 50, "fam_quality"),
    Job("tcav", "--images 6 --scenes 10", "--images 15 --scenes 30", minutes=1),
    Job("sacv_scenes", "--images 40 --train 1200 --epochs 4", "", minutes=3),
    Job("spatial_acv", None, f"{DATA} --parts cost mobilenet_v2 squeezenet1_0", minutes=9),
    Job("concept_words", "--train 600 --scenes 12", "--train 2000 --scenes 40", "ce_fam.words", minutes=1),
    Job("ce_fam", "--concepts 4 --repeats 1", "", "ce_fam.cost", minutes=4),
    Job("ce_fam_scenes", None, "", "ce_fam.scenes", minutes=6),
    Job("concept_regions", None, f"--data {DATA}", "ce_fam.regions", 45, "concept_regions_coco"),
    Job("concept_regions_scenes", None, "--task scenes", "ce_fam.regions", minutes=2),
    Job("concept_regions_vit", None, "--task vit", "ce_fam.regions", minutes=2),
    Job(
        "salf_cbm",
        "scenes speed --train 300 --test 200 --epochs 15",
        f"scenes planted speed {SALF}",
        "salf_cbm.tables",
        minutes=9,
    ),
    Job("defaults", None, "", "papers.defaults", minutes=5),
    Job("explain_command", None, DATA, minutes=4),
    Job("commands_memory", None, "", minutes=15),
    Job("region_store", None, "--images 4 --repeats 3", minutes=2),
    Job("store_processes", None, "", minutes=6, records="region_store_processes"),
    Job("solver", "--only peers", "", minutes=8),
]


def jobs(only: list[str] | None) -> list[Job]:
    """By name; scripts of the same folder that this list does not know are still run by hand."""
    known = {job.name: job for job in JOBS}
    unknown = [name for name in only or () if name not in known]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return [known[name] for name in only] if only else JOBS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--stale", action="store_true", help="only those with a record of another code")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--list", action="store_true", help="say what would be run, and run nothing")
    parser.add_argument("--results", type=Path, help="another folder for records, page and plots")
    parser.add_argument("--timeout", type=float, default=30, help="minutes a script may take; long ones 1.5 of theirs")
    args = parser.parse_args()
    data = args.data.resolve() if (args.data / "real_models.py").is_file() else None
    folder = ROOT / "benchmarks" / "results" if args.results is None else args.results.resolve()
    where = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # not installed: still found
    env = {**os.environ, "BENCHMARK_RESULTS": str(folder), "PYTHONPATH": where}
    outcome: dict[str, str] = {}
    begun = time.perf_counter()
    records = load(folder)
    for job in jobs(args.only):
        if args.stale and not job.stale(records):
            outcome[job.name] = "left out: its records are of this code"
            continue
        command = job.command(args.full, data)
        if command is None:
            given = job.full if args.full else job.short
            outcome[job.name] = "left out: part of --full" if given is None else "left out: no photographs (--data)"
            continue
        if args.list:
            print(job.name, f"(about {job.minutes:g} min)" if args.full else "", *command[4:])
            continue
        print(f"== {job.name}", flush=True)
        start = time.perf_counter()
        outcome[job.name] = run(command, 60 * max(args.timeout, 1.5 * job.minutes), start, env)
    if not args.list:
        own = [] if args.results is None else ["--no-readme"]
        page = [sys.executable, "-m", "benchmarks.report.page", *own]
        subprocess.run(page, cwd=ROOT, check=True, env=env)
    for name, how in outcome.items():
        print(f"{name}: {how}")
    print(f"{(time.perf_counter() - begun) / 60:.1f} min")
    if any(how.startswith("failed") for how in outcome.values()):
        raise SystemExit(1)


def run(command: list[str], limit: float, start: float, env: dict[str, str]) -> str:
    """How it ended."""
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=limit, check=False, env=env).returncode
    except subprocess.TimeoutExpired:
        return f"failed: took more than {limit / 60:g} min"
    spent = f"{time.perf_counter() - start:.0f} s"
    return f"done in {spent}" if code == 0 else f"failed with exit code {code} after {spent}"


if __name__ == "__main__":
    main()
