"""What an audit of many images costs beside ``explain``, and whether its memory grows. Needs no data.

    python -m benchmarks.run.audit.streaming [--images 10000]

Tiny images, made when they are read, so that nothing else holds them. Each method explains all of them in batches, and
audits all of them with parts written to a folder; peak memory is that of a process of its own. A process that is killed
in the middle and started again, and two processes, must leave the same bytes as one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.record import add_functions, environment, functions, peak_mib, sources, write

SIDE = 24
METHODS = ["SpatialACV", "SALFCBM", "DiscoveredConcepts", "ConceptFusionMap"]
#: Functions that ran in the processes that were measured; this one imports none of them.
MEASURED: dict[str, list[str] | None] = {}


class Spots(Dataset[tuple[Tensor, int]]):
    """Red or blue spots on a light or dark ground."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        g = torch.Generator().manual_seed(i)
        image = torch.rand((), generator=g).round() * 0.7 + 0.1 + 0.1 * torch.rand(3, SIDE, SIDE, generator=g)
        label = i % 2
        y, x = torch.randint(0, SIDE - 8, (2,), generator=g).tolist()
        image[:, y : y + 8, x : x + 8] = 0.1
        image[2 * label, y : y + 8, x : x + 8] = 0.9
        return image, label


def network() -> nn.Sequential:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 64)):
        parts += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2)).eval()


class Colors:
    """An image-text model that sees mean colors."""

    logit_scale, logit_bias = 10.0, 0.0

    def encode_image(self, images: Tensor) -> Tensor:
        return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)

    def encode_text(self, texts: list[str]) -> Tensor:
        return torch.randn(len(texts), 6, generator=torch.Generator().manual_seed(len(texts)))


def explainer(method: str) -> Any:
    from captum_concepts import SALFCBM, ConceptFusionMap, SpatialACV, discover_concepts

    net, data = network(), Spots(128)
    images = torch.stack([data[i][0] for i in range(len(data))])
    names = [f"word {k}" for k in range(20)]
    if method == "SpatialACV":
        examples = {name: images[3 * k : 3 * k + 40] * (1 - 0.04 * k) for k, name in enumerate(names)}
        return SpatialACV(net, "5").fit(examples)
    if method == "SALFCBM":
        return SALFCBM(net, "8", names, num_classes=2, grid=(6, 6)).eval()
    if method == "DiscoveredConcepts":
        return discover_concepts(net, "8", images, n_concepts=20)
    return ConceptFusionMap(net, ["5", "8"], map_layer=-1).fit(images, Colors(), names)


def child(args: argparse.Namespace) -> None:
    """One audit, or one pass of explain, in this process; prints seconds an image, peak memory in MB and what ran."""
    from captum_concepts import audit_dataset
    from captum_concepts.images import batches, inputs_for

    torch.set_num_threads(1)
    method = explainer(args.method)
    data = Spots(args.images)
    if args.world > 1:
        meet = f"file://{args.folder}/meet"
        torch.distributed.init_process_group("gloo", init_method=meet, rank=args.rank, world_size=args.world)
    method.explain(torch.stack([data[i][0] for i in range(32)]))
    start = time.process_time()
    if args.child == "explain":
        for batch in batches(inputs_for(network(), data), 32):
            method.explain(batch.images)
    else:
        labels = [i % 2 for i in range(args.images)]
        folder = Path(args.folder)
        audit = audit_dataset(method, data, labels=labels, n_bootstrap=args.bootstrap, store_path=folder / "parts")
        audit.save(Path(args.folder) / f"audit{args.rank}.safetensors")
    spent = (time.process_time() - start) / args.images
    peak = peak_mib()
    print("RESULT", json.dumps([spent, peak, functions()]), flush=True)
    if args.world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def start(method: str, what: str, images: int, folder: str, **options: Any) -> subprocess.Popen[str]:
    more = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.run.audit.streaming", "--child", what]
    command += ["--method", method, "--images", str(images), "--folder", folder, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def ended(process: subprocess.Popen[str]) -> tuple[float, float]:
    """Seconds an image and peak memory; what ran in the process is added to ``MEASURED``."""
    said, _ = process.communicate()
    line = next((line for line in said.splitlines() if line.startswith("RESULT")), "")
    if process.returncode or not line:
        raise SystemExit(f"a process failed: {said[-2000:]}")
    spent, peak, ran = json.loads(line.removeprefix("RESULT"))
    add_functions(MEASURED, ran)
    return spent, peak


def same_bytes(images: int) -> dict[str, bool]:
    """Killed and resumed, and two processes, against one."""
    with (
        tempfile.TemporaryDirectory() as one,
        tempfile.TemporaryDirectory() as two,
        tempfile.TemporaryDirectory() as three,
    ):
        ended(start("SpatialACV", "audit", images, one, bootstrap=200))
        whole = (Path(one) / "audit0.safetensors").read_bytes()
        process = start("SpatialACV", "audit", images, two, bootstrap=200)
        parts = Path(two) / "parts"
        while process.poll() is None and len(list(parts.glob("part-*.safetensors"))) < 2:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        made = len(list(parts.glob("part-*.safetensors")))
        ended(start("SpatialACV", "audit", images, two, bootstrap=200))
        both = [start("SpatialACV", "audit", images, three, bootstrap=200, rank=r, world=2) for r in range(2)]
        for process in both:
            ended(process)
        return {
            "parts_before_the_kill": made,
            "parts": len(list(parts.glob("part-*.safetensors"))),
            "killed_and_resumed": (Path(two) / "audit0.safetensors").read_bytes() == whole,
            "two_processes": all((Path(three) / f"audit{r}.safetensors").read_bytes() == whole for r in range(2)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--cost-images", type=int, default=1000, help="of the comparison with explain")
    parser.add_argument("--repeats", type=int, default=3, help="of that comparison")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--child", choices=("explain", "audit"))
    parser.add_argument("--method")
    parser.add_argument("--folder")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--bootstrap", type=int, default=0)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    arguments = {"images": args.images, "cost_images": args.cost_images, "repeats": args.repeats}
    record: dict[str, Any] = {"arguments": arguments, "methods": []}
    for name in args.methods:
        found: dict[str, list[float]] = {"explain": [], "audit": []}
        for _ in range(args.repeats):  # in turn: other work on the machine takes its time from both
            for what, seconds in found.items():
                with tempfile.TemporaryDirectory() as folder:
                    seconds.append(ended(start(name, what, args.cost_images, folder))[0])
        ratios = [audit / explain for explain, audit in zip(*found.values(), strict=True)]
        entry = {
            "method": name,
            "explain, ms per image": 1000 * statistics.median(found["explain"]),
            "audit, ms per image": 1000 * statistics.median(found["audit"]),
            "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
        }
        record["methods"].append(entry)
        print(entry, flush=True)
    memory = {}
    for n in (args.images // 10, args.images):
        with tempfile.TemporaryDirectory() as folder:
            spent, peak = ended(start("SpatialACV", "audit", n, folder))
            memory[str(n)] = {"peak_mb": peak, "ms_an_image": 1000 * spent}
            print(n, memory[str(n)], flush=True)
    record["memory"] = memory
    record["same_bytes"] = same_bytes(1500)
    print(record["same_bytes"])
    record["environment"] = {**environment(), "sources": sources(MEASURED)}
    write("audit_streaming", record)


if __name__ == "__main__":
    main()
