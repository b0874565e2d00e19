"""The metrics beside quantus, torchmetrics and scikit-learn: do they agree, and how long does each take?

    python -m benchmarks.run.metrics [--maps 64]

224 px maps, smooth, without ties, on random rectangles. quantus and scikit-learn come with the ``benchmark`` extra; a
peer that is not installed has no row, and the output says so. Agreement is the largest difference over all examples.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.record import environment, median_times, write
from benchmarks.run.nra import inputs
from captum_concepts import metrics

SEED = 0
STEPS = 16
Row = tuple[str, str, Callable[[], Tensor], Callable[[], Tensor], str]


def with_quantus(maps: Tensor, masks: Tensor) -> list[Row]:
    import quantus

    x = np.zeros((len(maps), 3, *maps.shape[1:]), dtype=np.float32)
    a, s, y = maps[:, None].numpy(), masks[:, None].numpy(), np.zeros(len(maps), dtype=int)
    quiet = {"abs": False, "normalise": False, "disable_warnings": True, "display_progressbar": False}

    def run(kind: str, **options: Any) -> Callable[[], Tensor]:
        metric = getattr(quantus, kind)(**quiet, **options)
        # copies: quantus writes into what it is given
        return lambda: torch.tensor(
            np.array(metric(model=None, x_batch=x.copy(), y_batch=y, a_batch=a.copy(), s_batch=s.copy()), dtype=float)
        ).flatten()

    net, images = _score_model(len(maps), maps.shape[-1])
    target, side = [0] * len(maps), maps.shape[-1]
    flipping = quantus.PixelFlipping(features_in_step=side * side // STEPS, perturb_baseline="black", **quiet)

    def flipped() -> Tensor:
        given = {"x_batch": images.numpy().copy(), "y_batch": y, "a_batch": a.copy(), "softmax": False}
        return torch.tensor(np.array(flipping(model=net, **given)))

    def deleted() -> Tensor:
        return metrics.deletion(net, images, maps, target=target, n_steps=STEPS, return_curve=True)[1][:, 1:]

    def spearman() -> Tensor:
        """What quantus' MPRT compares maps by."""
        similar = quantus.similarity_func.correlation_spearman
        others = maps.roll(1, 0)
        return torch.tensor(
            [similar(p.flatten().numpy(), q.flatten().numpy()) for p, q in zip(maps, others, strict=True)]
        )

    return [
        ("EPG without scaling", "quantus RelevanceMassAccuracy", lambda: metrics.epg(maps, masks, normalize="none"),
         run("RelevanceMassAccuracy"), "the same; epg scales to [0, 1] unless normalize='none'"),
        ("pointing game", "quantus PointingGame", lambda: metrics.pointing_game(maps, masks), run("PointingGame"),
         "the same without tolerance and without tied maxima"),
        ("share of the |M| largest inside (from IoU)", "quantus RelevanceRankAccuracy",
         lambda: rank_accuracy(maps, masks), run("RelevanceRankAccuracy"),
         "a single point p = |M| of the curve that NRA integrates"),
        ("deletion, the curve", "quantus PixelFlipping", deleted, flipped,
         "the same on one channel without ties; theirs lacks the first point, ranks every channel's values by "
         "themselves, and its black is the least value of the batch"),
        ("rank correlation of the sanity checks", "quantus correlation_spearman (in MPRT)",
         lambda: metrics.rank_correlation(maps, maps.roll(1, 0)), spearman,
         "the same; MPRT gives the correlations of all layers, the sanity checks judge them"),
    ]  # fmt: skip


def _score_model(n: int, side: int) -> tuple[torch.nn.Module, Tensor]:
    """A linear score in [0, 1] and ``n`` images of one channel whose least value is 0, quantus' black."""
    generator = torch.Generator().manual_seed(SEED)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(side * side, 2, bias=False)).eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.rand(2, side * side, generator=generator) / side**2)
    images = torch.rand(n, 1, side, side, generator=generator)
    images[:, :, 0, 0] = 0
    return net, images


def rank_accuracy(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the |M| most salient pixels that are in the mask, from this package's IoU at that threshold."""
    out = []
    for heat, mask in zip(maps, masks, strict=True):
        size = int(mask.sum())
        cut = float(heat.flatten().topk(size + 1).values[-1])
        one = metrics.iou(heat[None], mask[None], threshold=cut)
        out.append(2 * one / (1 + one))  # |B| = |M|: the share is the Dice coefficient
    return torch.cat(out)


def with_torchmetrics(maps: Tensor, masks: Tensor) -> list[Row]:
    from torchmetrics.functional.classification import binary_accuracy, binary_jaccard_index

    drawn = maps > maps.mean((1, 2), keepdim=True)
    each = lambda f: lambda: torch.stack([f(d, m) for d, m in zip(drawn, masks, strict=True)])  # noqa: E731
    return [
        ("IoU", "torchmetrics binary_jaccard_index", lambda: metrics.iou(maps, masks),
         each(lambda d, m: binary_jaccard_index(d, m.int())), "an image at a time; theirs sums a batch, 0 / 0 is 0"),
        ("pixel accuracy", "torchmetrics binary_accuracy", lambda: metrics.pixel_accuracy(maps, masks),
         each(lambda d, m: binary_accuracy(d, m.int())), "the same, an image at a time"),
        ("mean IoU", "torchmetrics multiclass_jaccard_index", lambda: metrics.mean_iou(maps, masks)[None],
         lambda: _mean_iou(drawn, masks)[None], "both from summed intersections and unions"),
    ]  # fmt: skip


def _mean_iou(drawn: Tensor, masks: Tensor) -> Tensor:
    from torchmetrics.functional.classification import multiclass_jaccard_index

    return multiclass_jaccard_index(drawn.long(), masks.long(), num_classes=2, average="macro")


def with_sklearn(maps: Tensor, masks: Tensor) -> list[Row]:
    from sklearn.metrics import average_precision_score

    def foreground() -> Tensor:
        pairs = zip(maps, masks, strict=True)
        return torch.tensor([average_precision_score(m.flatten().numpy(), a.flatten().numpy()) for a, m in pairs])

    def both() -> Tensor:
        """The ImageNet-segmentation protocol: map and 1 - map of the scaled map against mask and ground."""
        out = []
        for heat, mask in zip(maps, masks, strict=True):
            a = (heat - heat.min()) / (heat.max() - heat.min())
            scores, truth = torch.cat([1 - a.flatten(), a.flatten()]), torch.cat([~mask.flatten(), mask.flatten()])
            out.append(average_precision_score(truth.numpy(), scores.numpy()))
        return torch.tensor(out)

    name = "scikit-learn average_precision_score"
    return [
        ("average precision, foreground", name,
         lambda: metrics.average_precision(maps, masks, classes="foreground"), foreground, "the same"),
        ("average precision, both (published)", name, lambda: metrics.average_precision(maps, masks), both, "the same"),
    ]  # fmt: skip


PEERS: dict[str, Callable[[Tensor, Tensor], list[Row]]] = {
    "quantus": with_quantus,
    "torchmetrics": with_torchmetrics,
    "sklearn": with_sklearn,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    maps, masks = inputs("smooth", args.maps)
    rows, missing = [], []
    for package, make in PEERS.items():
        if importlib.util.find_spec(package) is None:
            missing.append(package)
            print(f"{package} is not installed (pip install '.[benchmark]'): its rows are missing")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the peers' own
            for what, peer, ours, theirs, how in make(maps, masks):
                difference = float((ours().double() - theirs().double()).abs().max())
                seconds = median_times({"ours": ours, "theirs": theirs}, repeats=args.repeats)
                per = {name: 1e3 * value / args.maps for name, value in seconds.items()}
                rows.append({"metric": what, "peer": peer, "largest_difference": difference,
                             "ms_a_map": per["ours"], "peer_ms_a_map": per["theirs"],
                             "times_faster": per["theirs"] / per["ours"], "definitions": how})  # fmt: skip
                print(rows[-1], flush=True)
    packages = {"quantus": "quantus", "torchmetrics": "torchmetrics", "sklearn": "scikit-learn"}
    part = {
        "environment": environment(*(packages[p] for p in PEERS if p not in missing)),
        "arguments": {"maps": args.maps, "repeats": args.repeats, "seed": SEED, "not installed": missing},
        "tables": [{"title": "agreement and speed", "note": "Smooth 224 px maps, one thread.", "rows": rows}],
    }
    write("metrics_peers", {"parts": {"peers": part}})


if __name__ == "__main__":
    main()
