"""Maps into rows of a table: quality against masks and scores with intervals, seconds a map, and two degraded rows.

Every table of maps made here has the rows without which it would mislead: random, centre Gaussian and activation energy
know no concept, and the first method's maps are shown made worse on purpose, once exchanged between images and once
made for a target that is not there. Where the image is changed, what the map hides becomes the image's mean colour.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.report.cells import COLUMNS, OTHER, SHUFFLED
from captum_concepts import metrics

Explainer = Callable[[Tensor, Tensor], Tensor]  # images (R, 3, H, W), targets (R,) -> maps (R, h, w)

WITH_MASKS = ("nra", "nra_exact", "specificity", "hit_rate", "iou", "box_iou", "epg")


@dataclass(frozen=True)
class Regions:
    """What is explained: R pairs of an image and a target, and where the target is.

    Args:
        images: ``(N, 3, H, W)``.
        index: ``(R,)`` the image of each pair; pairs of one image stand together.
        target: ``(R,)``.
        other: ``(R,)`` a target that is not in the image.
        masks: ``(R, H, W)`` bool, or None where nobody drew any.
    """

    images: Tensor
    index: Tensor
    target: Tensor
    other: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shuffled(self) -> Tensor:
        """For each pair, a pair of another image."""
        n = len(self)
        generator = torch.Generator().manual_seed(0)
        if len(set(self.index.tolist())) < 2:
            raise ValueError("maps cannot be exchanged between images: there is one image")
        order = torch.arange(n)
        for i in range(n):
            elsewhere = torch.nonzero(self.index != self.index[i]).squeeze(1)
            order[i] = elsewhere[torch.randint(len(elsewhere), (1,), generator=generator)]
        return order


@dataclass
class Table:
    """Rows of one table, as they are recorded."""

    title: str
    note: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    def record(self, **more: Any) -> dict[str, Any]:
        return {"title": self.title, "note": self.note, **more, "rows": self.rows}


def interval(
    values: Tensor, groups: Tensor | None = None, *, resamples: int = 1000, seed: int = 0
) -> list[float | None] | None:
    """Mean of the defined values and its 95 % bootstrap interval, resampling groups (images; by default each value is
    one of its own); None without values."""
    groups = torch.arange(len(values)) if groups is None else groups
    kept = ~values.isnan()
    if not bool(kept.any()):
        return None
    v, g = values[kept].double().numpy(), groups[kept].numpy()
    names, inverse = np.unique(g, return_inverse=True)
    sums = np.stack([np.bincount(inverse, v), np.bincount(inverse)], 1)
    draws = np.random.default_rng(seed).integers(0, len(names), (resamples, len(names)))
    drawn = sums[draws].sum(1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    return [float(v.mean()), float(low), float(high)]


def maps_of(explainer: Explainer, regions: Regions, targets: Tensor, batch: int, device: str = "cpu") -> Tensor:
    """``(R, h, w)`` in fp32 on the CPU, explained on ``device``."""
    found = []
    for rows in torch.arange(len(regions)).split(batch):
        out = explainer(regions.images[regions.index[rows]].to(device), targets[rows].to(device)).detach()
        found.append((out.squeeze(1) if out.ndim == 4 else out).float().cpu())
    return torch.cat(found)


def quality(
    maps: Tensor, regions: Regions, score: Callable[[Tensor], Tensor] | None, batch: int, device: str = "cpu"
) -> dict[str, list[float | None] | None]:
    """Every column that masks and scores allow, each as mean and interval over images."""
    values: dict[str, Tensor] = {}
    if regions.masks is not None:
        masks = regions.masks
        values["nra"] = metrics.nra(maps, masks)
        values["nra_exact"] = metrics.nra(maps, masks, baseline="exact")
        values["hit_rate"] = (values["nra"] > 0.5).float().masked_fill(values["nra"].isnan(), torch.nan)
        values["iou"] = metrics.iou(maps, masks, threshold="minmax:0.5")
        values["box_iou"] = metrics.box_iou(maps, masks)
        values["epg"] = metrics.epg(maps, masks)
        special = torch.full((len(regions),), torch.nan)
        for image in regions.index.unique():
            rows = torch.nonzero(regions.index == image).squeeze(1)
            if len(rows) > 1:
                special[rows] = metrics.concept_specificity(maps[rows][None], masks[rows][None])[0].float()
        values["specificity"] = special
    if score is not None:
        images = regions.images[regions.index].to(device)
        # As published for normalised images, whose zero is the mean colour. Black would be a shape of its own: before
        # it, the map of another class scored better than the right one.
        shared = {"target": regions.target, "batch_size": batch, "baseline": "mean", "scores": "raw"}  # cosines too
        heat = maps.to(images.device)
        values["average_drop"] = metrics.average_drop(score, images, heat, **shared).cpu()
        values["increase_in_confidence"] = metrics.increase_in_confidence(score, images, heat, **shared).cpu()
    return {key: interval(values[key].float(), regions.index) for key in COLUMNS if key in values}


def measure(
    title: str,
    note: str,
    explainers: Mapping[str, Explainer],
    regions: Regions,
    *,
    score: Callable[[Tensor], Tensor] | None = None,
    energy: Callable[[Tensor], Tensor] | None = None,
    blind: Mapping[str, Explainer] | None = None,
    batch: int = 16,
    degrade: str | None = None,
    device: str = "cpu",
) -> Table:
    """The table of several explainers; one of them is also shown made worse on purpose.

    Args:
        title, note: of the table.
        explainers: name -> explainer.
        regions: what is explained.
        score: images -> ``(N, K)`` scores of every target, for the columns that change the image.
        energy: images -> activations ``(N, C, h, w)`` of the explained layer.
        blind: name -> explainer that does not look at the target.
        batch: images at a time.
        degrade: the explainer that is made worse, the first by default; one that knows its target.
        device: where explainers, ``score`` and ``energy`` want their images.
    """
    table = Table(title, note)

    def add(name: str, maps: Tensor, seconds: float | None, **more: Any) -> None:
        row = {"method": name, **quality(maps, regions, score, batch, device), "seconds_a_map": seconds, **more}
        table.rows.append(row)
        shown = {k: round(v[0], 3) for k, v in row.items() if isinstance(v, list) and v[0] is not None}
        print(f"  {name}: {shown} {'' if seconds is None else f'{seconds:.3f} s'}", flush=True)

    print(title, flush=True)
    chosen = next(iter(explainers)) if degrade is None else degrade
    kept: dict[str, Tensor] = {}
    for name, explainer in explainers.items():
        start = time.perf_counter()
        maps = maps_of(explainer, regions, regions.target, batch, device)
        add(name, maps, (time.perf_counter() - start) / len(regions))
        kept.update({name: maps} if name == chosen else {})
    if energy is not None:
        with torch.no_grad():
            found = maps_of(lambda x, _: metrics.activation_energy(energy(x)), regions, regions.target, batch, device)
        add("activation energy", found, None, kind="blind")
    for name, explainer in (blind or {}).items():
        add(name, maps_of(explainer, regions, regions.target, batch, device), None, kind="blind")
    size = (56, 56)
    add("centre Gaussian", metrics.center_gaussian(len(regions), size), None, kind="blind")
    noise = torch.rand(len(regions), 7, 7, generator=torch.Generator().manual_seed(0))
    add("random", noise, None, kind="blind")
    add(f"{chosen}: {SHUFFLED}", kept[chosen][regions.shuffled], None, kind="degraded", of=chosen)
    other = maps_of(explainers[chosen], regions, regions.other, batch, device)
    add(f"{chosen}: {OTHER}", other, None, kind="degraded", of=chosen)
    return table


def pairs(items: Sequence[tuple[Tensor, Sequence[tuple[int, Tensor | None]]]], num_targets: int, seed: int) -> Regions:
    """From images and their (target, mask) pairs; the other target is drawn from those that are not in the image."""
    generator = torch.Generator().manual_seed(seed)
    images, index, target, other, masks = [], [], [], [], []
    for n, (image, found) in enumerate(items):
        images.append(image)
        present = {t for t, _ in found}
        absent = [t for t in range(num_targets) if t not in present]
        for t, mask in found:
            index.append(n)
            target.append(t)
            other.append(absent[int(torch.randint(len(absent), (1,), generator=generator))])
            masks.append(mask)
    drawn = [m for m in masks if m is not None]
    if drawn and len(drawn) < len(masks):
        raise ValueError("some of the pairs have a mask and some have none")
    stacked = torch.stack(drawn) if drawn else None
    return Regions(torch.stack(images), torch.tensor(index), torch.tensor(target), torch.tensor(other), stacked)
