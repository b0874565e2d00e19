"""Do two processes embed regions twice as fast as one?

    python -m benchmarks.run.store_processes [--images 8] [--repeats 3]

Each process has one thread and, where the system allows it, a core of its own. One process and two embed the same
regions in turn: the bare encoder with pictures held in memory, which is what two cores of this machine give, and a
store, each process its shards. They wait for each other before each of the two, and the slower one counts. What a build
costs once, however many images (hashing the weights, checking what is there), is measured apart and taken off.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing as processes

from benchmarks import record as _record
from benchmarks.run.region_store import BATCH, bare, vit
from captum_concepts.store import RegionEmbeddingStore
from captum_concepts.vlm import RegionPrompt

PROMPT = RegionPrompt("circle", (7, 7), 32)


def _share(rank: int, size: int, count: int, folder: str, together: Any, said: Any) -> None:
    """Of one process: seconds of its share of the bare encoder's work and of the store's, and what ran."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    torch.manual_seed(0)  # one encoder
    encoder = vit()
    images = torch.rand(count, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    views = PROMPT.draw(images[rank::size]).flatten(0, 1)
    bare(encoder, views[:BATCH])
    together.wait()
    seconds = {"bare": bare(encoder, views)}
    for what in ("store", "once"):
        together.wait()
        start = time.perf_counter()
        RegionEmbeddingStore.build_part(
            folder, images, encoder, PROMPT, rank=rank, num_replicas=size, batch_size=BATCH, shard_rows=1
        )
        seconds[what] = time.perf_counter() - start
    seconds["store"] -= seconds.pop("once")
    said.put((seconds, _record.functions()))


def measure(size: int, count: int, ran: dict[str, list[str] | None]) -> dict[str, float]:
    """Pictures a second of ``size`` processes."""
    start = processes.get_context("spawn")
    together, said = start.Barrier(size), start.Queue()
    with tempfile.TemporaryDirectory() as folder:
        started = [
            start.Process(target=_share, args=(rank, size, count, folder, together, said)) for rank in range(size)
        ]
        for process in started:
            process.start()
        found = [said.get(timeout=900) for _ in started]
        for process in started:
            process.join()
        store = RegionEmbeddingStore.open(Path(folder))
        assert len(store) == count
    for _, functions in found:
        _record.add_functions(ran, functions)
    pictures = count * len(PROMPT)
    return {what: pictures / max(seconds[what] for seconds, _ in found) for what in ("bare", "store")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    ran: dict[str, list[str] | None] = {}
    rates: dict[str, list[dict[str, float]]] = {"one": [], "two": []}
    for _ in range(arguments.repeats):
        for name, size in (("one", 1), ("two", 2)):
            rates[name].append(measure(size, arguments.images, ran))
            print(name, rates[name][-1], flush=True)
    rows = []
    for what, label in (("bare", "bare encoder"), ("store", "store")):
        ratios = [two[what] / one[what] for one, two in zip(rates["one"], rates["two"], strict=True)]
        row: dict[str, Any] = {"what": label}
        for name, found in rates.items():
            row[f"{name}: pictures a second"] = statistics.median(rate[what] for rate in found)
        rows.append(row | {"two / one": [statistics.median(ratios), min(ratios), max(ratios)]})
    print(_record.table(list(rows[0]), [list(row.values()) for row in rows]))
    record: dict[str, Any] = {"arguments": vars(arguments), "rows": rows}
    record["environment"] = {**_record.environment("open-clip-torch"), "threads": 1, "sources": _record.sources(ran)}
    print(_record.write("region_store_processes", record))


if __name__ == "__main__":
    main()
