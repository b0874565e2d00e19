"""Mutation check: does a test fail where the code says something else?

``python tools/mutation.py --sample 40 --seed 0`` (`make mutation`, hours; needs cosmic-ray) draws that many places of
each room, or of those named, with cosmic-ray's operators, changes one after the other in a copy of the checkout, and
runs the tests that reach the changed line, of the folder of ``tests/`` that mirrors the module's. Results go to
``build/mutation/ROOM.json``, with the difference of every mutant that no test noticed. A second run tries only those
again: write the test, delete ``ROOM_coverage.json``, run again, until each survivor is killed or shown to mean the
same.

The heavy libraries are imported once and each mutant gets a forked process, so a mutant costs its tests only.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "captum_concepts"
TESTS = ROOT / "tests"
ROOMS = (
    *("images", "activations", "solvers", "metrics", "visualization", "datasets", "vlm", "concepts", "store"),
    *("models", "attr", "audit", "demo", "commands"),
)
#: Tests of a room that lie in no folder of its own, because they ask the same of all methods.
SHARED = {
    "attr": ["contract/test_model_conditions.py", "contract/test_out_of_memory.py"],
    "models": ["attr/concept_fusion/test_concept_fusion_fit.py", "contract/test_out_of_memory.py"],
    "commands": ["docs/test_documentation.py"],
    "store": ["contract/test_hostile_files.py", "contract/test_loader_workers.py", "contract/test_out_of_memory.py"],
}
#: Operators that make no mutant worth a look.
LEFT_OUT = ("core/RemoveDecorator", "core/VariableReplacer", "core/VariableInserter")
UNSEEN = ("survived", "unclear")
MEMORY = 12 << 30  # a mutant that asks for more is ended by the system, not the machine


def tests_of(module: str) -> list[str]:
    """Files of the tests of ``room/module``, and the doctests of the module itself."""
    folder = (TESTS / module).parent
    while not folder.is_dir():
        folder = folder.parent
    found = [*sorted(folder.rglob("test_*.py")), *(TESTS / name for name in SHARED.get(module.split("/")[0], ()))]
    return [f"{PACKAGE}/{module}.py", *(str(path.relative_to(ROOT)) for path in found)]


def modules_of(room: str) -> list[str]:
    paths = sorted((ROOT / PACKAGE / room).rglob("*.py"))
    return [str(path.relative_to(ROOT / PACKAGE).with_suffix("")) for path in paths if path.stem != "__init__"]


def meaningless(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where a change cannot be seen: annotations (they are never evaluated), and imports for the type checker only."""
    nodes: list[ast.AST] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.returns is not None:
            nodes.append(node.returns)
        elif isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation is not None:
            nodes.append(node.annotation)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes.append(node)
    return [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in nodes]


def mutants(module: str) -> Iterator[tuple[tuple[int, int], str, int]]:
    """Position, operator and occurrence of every mutant of a module."""
    import parso.python.tree  # noqa: F401  (cosmic-ray cannot be imported before it)
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    source = (ROOT / PACKAGE / f"{module}.py").read_text()
    tree, hidden = get_ast(source), meaningless(source)
    for name in sorted(operator_names()):
        if name in LEFT_OUT or get_operator(name).arguments():
            continue
        operator = get_operator(name)()
        places = (place for node in ast_nodes(tree) for place in operator.mutation_positions(node))
        for occurrence, (start, _end) in enumerate(places):
            if not any(first <= start < last for first, last in hidden):
                yield start, name, occurrence


def mutated(module: str, operator: str, occurrence: int) -> str:
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = (ROOT / PACKAGE / f"{module}.py").read_text()
    return mutate_code(source, get_operator(operator)(), occurrence) or source


def sample(room: str, count: int, seed: int) -> list[tuple[str, tuple[int, int], str, int]]:
    """``count`` places of the room, one mutant at each: many ways to change one ``+`` count as one place."""
    places: dict[tuple[str, tuple[int, int]], list[tuple[str, int]]] = {}
    for module in modules_of(room):
        for start, operator, occurrence in mutants(module):
            places.setdefault((module, start), []).append((operator, occurrence))
    rng = random.Random(f"{seed} {room}")
    chosen = rng.sample(sorted(places), min(count, len(places)))
    return [(module, start, *rng.choice(places[module, start])) for module, start in chosen]


class Coverage:
    """A pytest plugin: which lines of the package each test runs, and how long it takes."""

    def __init__(self, copy: Path) -> None:
        self.prefix, self.lines, self.seconds = f"{copy / PACKAGE}/", {}, {}

    def trace(self, frame, event, _argument):
        name = frame.f_code.co_filename
        if not name.startswith(self.prefix):
            return None
        if event == "line":
            self.hit.add((name, frame.f_lineno))
        return self.trace

    def pytest_runtest_protocol(self, item, nextitem):
        from _pytest.runner import runtestprotocol

        self.hit: set[tuple[str, int]] = set()
        begin = time.monotonic()
        sys.settrace(self.trace)
        threading.settrace(self.trace)
        try:
            reports = runtestprotocol(item, nextitem=nextitem)
        finally:
            sys.settrace(None)
            threading.settrace(None)
        if all(report.outcome == "passed" for report in reports):
            self.seconds[item.nodeid] = time.monotonic() - begin
            hit, self.hit = self.hit, set()  # threads that live on go on adding
            for name, line in hit:
                self.lines.setdefault(f"{name.removeprefix(self.prefix)}:{line}", []).append(item.nodeid)
        return True


def coverage(room: str, copy: Path, file: Path) -> dict:
    """Seconds of each test and the tests of each line, from one run of the room's tests; kept in ``file``."""
    if not file.is_file():
        files = sorted({name for module in modules_of(room) for name in tests_of(module)})
        plugin = Coverage(copy)

        def keep() -> None:
            file.write_text(json.dumps({"seconds": plugin.seconds, "lines": plugin.lines}))

        outcome, first = run_tests(copy, files, 3 * 3600, plugin, keep)
        if outcome != "survived":
            file.unlink(missing_ok=True)
            raise SystemExit(f"the tests of {room} fail without any change: {first}")
    return json.loads(file.read_text())


def tests_for(module: str, line: int, covered: dict, budget: float) -> list[str]:
    """Tests that run the statement around the line, quickest first; those of the module where it runs at import."""
    source = (ROOT / PACKAGE / f"{module}.py").read_text()
    around = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.stmt) and n.lineno <= line <= n.end_lineno]
    # None: a decorator at the module's level.
    inner = max(around, key=lambda n: (n.lineno, -n.end_lineno), default=None)
    body = getattr(inner, "body", None)
    last = line if inner is None else max(body[0].lineno - 1, inner.lineno) if body else inner.end_lineno
    first = line if inner is None else inner.lineno  # with a body: the head of a block, not the block
    found = {t for n in range(first, last + 1) for t in covered["lines"].get(f"{module}.py:{n}", [])}
    if not found or isinstance(inner, (ast.FunctionDef, ast.ClassDef)):
        found = {test for test in covered["seconds"] if test.split("::")[0] in tests_of(module)}
    chosen, spent = [], 0.0
    for test in sorted(found, key=covered["seconds"].__getitem__):
        spent += covered["seconds"][test]
        if chosen and spent > budget:
            break
        chosen.append(test)
    return chosen


def preload() -> None:
    """What the tests import and what takes seconds; never the package, which each process reads from the copy."""
    for name in ("captum.attr", "matplotlib.pyplot", "open_clip", "sklearn.linear_model", "sklearn.metrics", "timm"):
        with contextlib.suppress(ImportError):
            __import__(name)
    for name in ("torchmetrics", "torchvision.models", "torch._dynamo", "safetensors.torch"):
        with contextlib.suppress(ImportError):
            __import__(name)
    assert PACKAGE not in sys.modules


def run_tests(copy: Path, tests: list[str], limit: float, plugin=None, after=lambda: None) -> tuple[str, str]:
    """``survived``, ``killed``, ``timeout`` or ``unclear``, and the first failing test, of a process of its own."""
    with tempfile.TemporaryFile("w+") as output:
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                os.chdir(copy)
                resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                sys.path.insert(0, str(copy))
                import pytest

                options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--tb=no"]
                options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # what is preloaded
                code = int(pytest.main([*options, *tests], plugins=[plugin] if plugin else None))
                after()
                sys.stdout.flush()
            except BaseException as error:
                print(repr(error), flush=True)
                code = 1
            os._exit(code)
        status = wait(pid, limit)
        output.seek(0)
        lines = output.read().splitlines()
    first = [line for line in lines if line.startswith(("FAILED", "ERROR", "INTERNALERROR"))]
    if status is None:
        return "timeout", ""
    # 1: a test failed, 2: a file of tests could not be imported, below 0: a crash. Else pytest itself failed.
    outcome = "survived" if status == 0 else "killed" if status in (1, 2) or status < 0 else "unclear"
    return outcome, (first or lines[-1:] or [f"exit {status}"])[0][:160]


def wait(pid: int, limit: float) -> int | None:
    """The exit status, or None where the process group had to be ended."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def check(chosen: list, copy: Path, results: Path, covered: dict, budget: float) -> list[dict]:
    """Run every mutant that the file of results does not yet call killed; the file is written after each."""
    known = {tuple(row["mutant"]): row for row in (json.loads(results.read_text()) if results.is_file() else [])}
    rows = []
    for module, start, operator, occurrence in chosen:
        key = (module, *start, operator, occurrence)
        row = known.get(key)
        if row is None or row["outcome"] in UNSEEN:
            path = copy / PACKAGE / f"{module}.py"
            before, after = path.read_text(), mutated(module, operator, occurrence)
            tests = tests_for(module, start[0], covered, budget)
            limit = 60 + 5 * sum(covered["seconds"][test] for test in tests)
            path.write_text(after)
            begin = time.monotonic()
            try:
                outcome, first = run_tests(copy, tests, limit)
            finally:
                path.write_text(before)
            changes = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
            diff = [line for line in changes if not line.startswith(("---", "+++"))]
            row = {"mutant": list(key), "outcome": outcome, "by": first, "tests": len(tests), "diff": diff}
            print(f"{outcome:8} {time.monotonic() - begin:4.0f} s  {module}:{start[0]} {operator} {first}", flush=True)
            if outcome == "survived":
                print("\n".join(f"    {line}" for line in diff), flush=True)
        rows.append(row)
        known[key] = row
        results.write_text(json.dumps(list(known.values()), indent=1))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rooms", nargs="*", default=ROOMS, metavar="room", help=f"of {', '.join(ROOMS)}")
    parser.add_argument("--sample", type=int, default=50, help="places of each room (default 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=120, help="seconds of tests a mutant, quickest first (120)")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "mutation")
    arguments = parser.parse_args()
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # a file changed twice in a second would be read from its old bytecode
    sys.dont_write_bytecode = True
    arguments.output.mkdir(parents=True, exist_ok=True)
    preload()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        names = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
        )
        for name in names.stdout.decode().splitlines():
            if (ROOT / name).is_file():  # all of them: tests read pages of the documentation
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
        for room in arguments.rooms:
            chosen = sample(room, arguments.sample, arguments.seed)
            covered = coverage(room, copy, arguments.output / f"{room}_coverage.json")
            rows = check(chosen, copy, arguments.output / f"{room}.json", covered, arguments.budget)
            killed = sum(row["outcome"] not in UNSEEN for row in rows)
            print(f"{room}: {killed} of {len(rows)} mutants killed ({killed / len(rows):.0%})", flush=True)


if __name__ == "__main__":
    main()
