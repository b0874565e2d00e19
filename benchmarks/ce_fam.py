"""Cost of ConceptFusionMap beside the published loop, in bare forward passes of the same network.

    python benchmarks/ce_fam.py [--concepts 16] [--size 224]

ResNet-50 and translator with random weights (time and memory do not depend on them, but for the layers that the
relevance rule picks: ``layer="auto"`` and the last layer are both timed), one image. The published loop runs, for every
concept, one forward and backward for the channel weights, K masked runs of the translator for every layer and K masked
forwards of the classifier; it is timed on one concept, since it does every concept alike.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
import torchvision
from _record import RESULTS, environment, table, write
from torch import Tensor

from captum_concepts.attr.concept_fusion_map import ConceptFusionMap
from captum_concepts.models import ConceptTranslator

matplotlib.use("Agg")
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
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = torchvision.models.resnet50().eval()
    translator = ConceptTranslator(CHANNELS, 512)
    x = torch.rand(1, 3, args.size, args.size)
    texts = F.normalize(torch.randn(1000, 512), dim=1)

    def make(count: int, **options: Any) -> ConceptFusionMap:
        names = [f"concept {i}" for i in range(count)]
        return ConceptFusionMap(model, LAYERS, translator, names, texts[:count], **options)

    def bare() -> None:
        with torch.no_grad():
            model(x)

    def everything(cefam: ConceptFusionMap, contributions: bool = True) -> None:
        cefam.explain(x, target=0, top_k=len(cefam.concepts or ()), contributions=contributions)

    bare()
    rows: list[dict[str, Any]] = []

    def add(name: str, count: int, function: Callable[[], Any], repeats: int = 1) -> None:
        unit = seconds(bare, args.repeats)
        spent = seconds(function, repeats)
        unit = (unit + seconds(bare, args.repeats)) / 2  # around it, so that a busy machine meets both
        rows.append(
            {"what": name, "concepts": count, "seconds": spent, "forwards": spent / unit, "peak_mib": peak_mib()}
        )
        print(rows[-1], flush=True)

    n = args.concepts
    for count in (1, 16, 1000):
        cefam = make(count, gradient="branch", layer=-1, probability="sigmoid")
        add("what + where, branch, last layer", count, lambda cefam=cefam: everything(cefam, False), args.repeats)
    for count in (1, 4, n):
        cefam = make(count, probability="sigmoid")
        add("what + where, total, auto layer", count, lambda cefam=cefam: everything(cefam, False))
    for gradient in ("total", "branch"):
        add(
            f"what + where + how, {gradient}, last layer",
            n,
            lambda g=gradient: everything(make(n, gradient=g, layer=-1)),
        )
        add(f"what + where + how, {gradient}, auto layer", n, lambda g=gradient: everything(make(n, gradient=g)))
    add("what + where, fused", n, lambda: make(n, layer="fused").attribute(x))
    add("published loop", 1, lambda: published(model, translator, texts[:n], x, 0, 0))
    loop = rows[-1]["forwards"] * n
    for row in rows:
        if row["what"].startswith("what + where + how"):
            row["times_faster_than_the_published_loop"] = loop / row["forwards"]
    record = {
        "environment": environment("torchvision"),
        "size": args.size,
        "channels_masked": K,
        "seed": 0,
        "rows": rows,
    }
    write("ce_fam", record)
    columns = ["what", "concepts", "forwards", "forwards a concept", "peak MiB so far", "faster than the loop"]
    lines = [
        [r["what"], r["concepts"], r["forwards"], r["forwards"] / r["concepts"], r["peak_mib"],
         r.get("times_faster_than_the_published_loop", "")] for r in rows
    ]  # fmt: skip
    report = f"# Cost of ConceptFusionMap (ResNet-50, one image, in bare forwards)\n\n{table(columns, lines)}\n"
    (RESULTS / "ce_fam.md").write_text(report)
    print(report)
    picture(rows)


def picture(rows: list[dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    for name in ("what + where, branch, last layer", "what + where, total, auto layer"):
        points = [(r["concepts"], r["forwards"]) for r in rows if r["what"] == name]
        axis.plot(*zip(*points, strict=True), marker="o", label=name)
    loop = next(r["forwards"] for r in rows if r["what"] == "published loop")
    axis.plot([1, 1000], [loop, 1000 * loop], "--", label="published loop (from one concept)")
    axis.set(xscale="log", yscale="log", xlabel="concepts", ylabel="bare forwards")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "ce_fam.png", dpi=80)


if __name__ == "__main__":
    main()
