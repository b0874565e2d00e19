"""Cost of ConceptFusionMap beside the published loop, in bare forward passes of the same network.

    python -m benchmarks.run.ce_fam.cost [--concepts 16] [--size 224]
    python -m benchmarks.run.ce_fam.cost --peak '{"count": 64, "batch_size": 8}'     # memory of one setting

ResNet-50 and translator with random weights (time and memory do not depend on them, but for the layers that the
relevance rule picks: ``map_layer="auto"`` and the last layer are both timed), one image. The published loop runs, for
every concept, one forward and backward for the channel weights, K masked runs of the translator for every layer and K
masked forwards of the classifier; it is timed on one concept, since it does every concept alike. Ratios are of
processor time, which other programs on the machine disturb least; the bare forward is timed before and after each row.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from benchmarks.record import RESULTS, environment, peak_mib, write
from benchmarks.report import renderers
from captum_concepts.attr.concept_fusion_map import ConceptFusionMap
from captum_concepts.models import ConceptTranslator

matplotlib.use("Agg")
#: This script again, as a process of its own.
COMMAND = [sys.executable, "-W", "ignore", "-m", "benchmarks.run.ce_fam.cost"]
LAYERS = ["layer1", "layer2", "layer3", "layer4"]
CHANNELS = [256, 512, 1024, 2048]
K = 20


def published(model: Any, translator: Any, text: Tensor, x: Tensor, concept: int, target: int) -> float:
    """What, where and how much of one concept, as published: nothing shared, nothing batched."""
    kept: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    handles = [modules[n].register_forward_hook(lambda _m, _i, o, n=n: kept.__setitem__(n, o)) for n in LAYERS]
    logits = model(x)
    for handle in handles:
        handle.remove()
    pooled = [kept[n].mean((2, 3)) for n in LAYERS]
    score = (F.normalize(translator(pooled), dim=1) @ text.T * 100)[0, concept]
    gradients = torch.autograd.grad(score, [kept[n] for n in LAYERS])
    betas = [g.mean((2, 3))[0] for g in gradients]
    best, order = (-torch.inf, 0), []
    with torch.no_grad():
        s0 = (F.normalize(translator(pooled), dim=1) @ text.T * 100).softmax(1)[0, concept]
        for number, (z, beta) in enumerate(zip(pooled, betas, strict=True)):
            ranked = (beta * z[0]).argsort(descending=True)[:K].tolist()
            order.append(ranked)
            drops = 0.0
            for i in range(1, K + 1):
                masked = list(pooled)
                masked[number] = z.clone()
                masked[number][0, ranked[:i]] = z.mean()
                s = (F.normalize(translator(masked), dim=1) @ text.T * 100).softmax(1)[0, concept]
                drops += float((s0 - s) / s0) / K
            best = max(best, (drops, number))
        layer = best[1]
        (betas[layer][:, None, None] * kept[LAYERS[layer]][0]).sum(0).relu()
        fill, p0, total = float(pooled[layer].mean()), logits.softmax(1)[0, target], 0.0
        for i in range(1, K + 1):

            def mask(_m: Any, _i: Any, out: Tensor, channels: list[int] = order[layer][:i]) -> Tensor:
                out = out.clone()
                out[:, channels] = fill
                return out

            handle = modules[LAYERS[layer]].register_forward_hook(mask)
            total += float((p0 - model(x).softmax(1)[0, target]) / p0) / K
            handle.remove()
    return total


def seconds(function: Callable[[], Any], repeats: int = 1) -> float:
    """Median processor time, of all threads."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return sorted(times)[len(times) // 2]


class Setting:
    """The network, a translator of its last layers, random words."""

    def __init__(self, size: int, layers: int = len(LAYERS)) -> None:
        torch.manual_seed(0)
        self.model = torchvision.models.resnet50().eval()
        self.layers = LAYERS[-layers:]
        self.translator = ConceptTranslator(CHANNELS[-layers:], 512)
        self.x = torch.rand(1, 3, size, size)
        self.texts = F.normalize(torch.randn(1000, 512), dim=1)

    def make(self, count: int, **options: Any) -> ConceptFusionMap:
        names = [f"concept {i}" for i in range(count)]
        return ConceptFusionMap(self.model, self.layers, self.translator, names, self.texts[:count], **options)

    def bare(self) -> None:
        with torch.no_grad():
            self.model(self.x)

    def everything(self, cefam: ConceptFusionMap, contributions: bool = True) -> None:
        cefam.explain(self.x, target=0, top_k=len(cefam.concepts or ()), contributions=contributions)


def grown(size: int, count: int, **options: Any) -> float:
    """MiB that maps of ``count`` concepts take at their peak, less the maps themselves; after a bare forward."""
    setting = Setting(size)
    setting.bare()
    cefam = setting.make(count, link="sigmoid", **options)
    before = peak_mib(start_again=True)
    maps = cefam.attribute(setting.x)
    return peak_mib() - before - maps.numel() * maps.element_size() / 2**20


MEMORY: list[dict[str, Any]] = [
    *({"count": count, "map_layer": layer} for layer in ("auto", "fused") for count in (16, 32, 64, 128)),
    *({"count": count, "map_layer": -1, "gradient": "branch"} for count in (16, 1000)),
    *({"count": 64, "batch_size": size} for size in (4, 8, 16)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", type=json.loads, help="print the memory that maps with these options take, and end")
    args = parser.parse_args()
    if args.peak:
        print(grown(args.size, **args.peak))
        return
    setting = Setting(args.size)
    make, everything = setting.make, setting.everything
    setting.bare()
    rows: list[dict[str, Any]] = []

    def add(name: str, count: int, function: Callable[[], Any], layers: int = len(LAYERS)) -> None:
        unit = seconds(setting.bare, args.repeats)
        spent = seconds(function, args.repeats)
        unit = (unit + seconds(setting.bare, args.repeats)) / 2
        rows.append({"what": name, "concepts": count, "layers": layers, "seconds": spent, "forwards": spent / unit})
        print(rows[-1], flush=True)

    n = args.concepts
    for count in (1, 16, 100, 1000):
        cefam = make(count, gradient="branch", map_layer=-1, link="sigmoid")
        add("what + where, branch, last layer", count, lambda cefam=cefam: everything(cefam, False))
    for count in sorted({1, 4, n}):
        cefam = make(count, link="sigmoid")
        add("what + where, total, auto layer", count, lambda cefam=cefam: everything(cefam, False))
    for gradient in ("total", "branch"):
        add(
            f"what + where + how, {gradient}, last layer",
            n,
            lambda g=gradient: everything(make(n, gradient=g, map_layer=-1)),
        )
        add(f"what + where + how, {gradient}, auto layer", n, lambda g=gradient: everything(make(n, gradient=g)))
    add("what + where, fused", n, lambda: make(n, map_layer="fused").attribute(setting.x))
    for layers in range(1, len(LAYERS)):
        fewer = Setting(args.size, layers)
        add("what + where, total, auto layer", n, lambda s=fewer: s.everything(s.make(n), False), layers)
        add("what + where, fused", n, lambda s=fewer: s.make(n, map_layer="fused").attribute(s.x), layers)
    add("published loop", 1, lambda: published(setting.model, setting.translator, setting.texts[:n], setting.x, 0, 0))
    loop = rows[-1]["forwards"] * n
    for row in rows:
        if row["what"].startswith("what + where + how"):
            row["times_faster_than_the_published_loop"] = loop / row["forwards"]
    memory = []
    for options in MEMORY:
        command = [*COMMAND, "--size", str(args.size), "--peak", json.dumps(options)]
        mib = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        memory.append({"concepts": options["count"], **{k: v for k, v in options.items() if k != "count"}, "mib": mib})
        print(memory[-1], flush=True)
    record = {
        "environment": environment("torchvision"),
        "size": args.size,
        "channels_masked": K,
        "repeats": args.repeats,
        "seed": 0,
        "rows": rows,
        "memory": memory,
    }
    write("ce_fam", record)
    print("\n".join(renderers.anything(record)))
    picture(rows)


def picture(rows: list[dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    every = len(LAYERS)
    for name in ("what + where, branch, last layer", "what + where, total, auto layer"):
        points = [(r["concepts"], r["forwards"]) for r in rows if r["what"] == name and r["layers"] == every]
        left.plot(*zip(*points, strict=True), marker="o", label=name)
    loop = next(r["forwards"] for r in rows if r["what"] == "published loop")
    left.plot([1, 1000], [loop, 1000 * loop], "--", label="published loop (from one concept)")
    left.set(xscale="log", yscale="log", xlabel="concepts", ylabel="bare forwards", ylim=(0.5, None))
    left.legend(fontsize=8)
    most = max(r["concepts"] for r in rows if r["what"] == "what + where, fused")
    for name in ("what + where, total, auto layer", "what + where, fused"):
        points = sorted((r["layers"], r["forwards"]) for r in rows if r["what"] == name and r["concepts"] == most)
        right.plot(*zip(*points, strict=True), marker="o", label=f"{name}, {most} concepts")
    right.set(xlabel="layers, from the last", ylabel="bare forwards", ylim=(0, None), xticks=range(1, every + 1))
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "ce_fam.png", dpi=80)


if __name__ == "__main__":
    main()
