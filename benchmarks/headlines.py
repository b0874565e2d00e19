"""The few numbers a reader asks for first, read off the records: the summary of the page and of the README."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from _record import table
from sections import bracketed, number

Record = dict[str, Any]
Line = tuple[str, str, str]


def _part(record: Record, title: str) -> dict[str, Record]:
    """The rows, by method, of the table with this title; empty if it was not recorded."""
    for part in record["parts"].values():
        for one in part["tables"]:
            if one["title"] == title:
                return {row["method"]: row for row in one["rows"] if "method" in row}
    return {}


def _beside(rows: dict[str, Record], key: str, names: dict[str, str], digits: int = 2) -> str:
    return "; ".join(f"{shown} {rows[n][key][0]:.{digits}f}" for n, shown in names.items() if rows.get(n, {}).get(key))


BLIND = {"activation energy": "activation energy", "centre Gaussian": "centre Gaussian", "random": "random"}


def _fam_cost(r: Record) -> list[Line]:
    ratio = r["ratio_to_bare_forward"]
    peers = ("captum LayerGradCam", "pytorch-grad-cam GradCAM")
    beside = "; ".join(f"{n} {number(ratio[n])}" for n in peers if n in ratio)
    return [("FAM, cost of a map in bare forwards (ResNet-50)", number(ratio["FAM, embedding = pooled maps"]), beside)]


def _fam_quality(r: Record) -> list[Line]:
    lines: list[Line] = []
    for title, what in (
        ("few-shot, COCO, mobilenet_v2", "FAM, few-shot on COCO, NRA"),
        ("few-shot, scenes, a CNN", "FAM, few-shot on scenes, NRA"),
    ):
        rows = _part(r, title)
        if "FAM" in rows:
            names = {"captum LayerGradCam of the similarity": "captum LayerGradCam", **BLIND}
            lines.append((what, bracketed(rows["FAM"]["nra"]), _beside(rows, "nra", names)))
    return lines


def _regions(r: Record) -> list[Line]:
    rows = r["rows"]
    names = {"published (auto layer)": "as published", "single channel": "single channel", **BLIND}
    return [
        (f'CE-FAM, `layer="fused"`, words on COCO, {what}', bracketed(rows["fused"][key]), _beside(rows, key, names))
        for key, what in (("nra", "NRA"), ("specificity", "specificity"))
    ]


def _words(r: Record) -> list[Line]:
    rows = _part(r, "words, scenes")
    if not rows:
        return []
    names = {"CLIP-Dissect, single channel": "CLIP-Dissect", "WWW, single channel": "WWW", **BLIND}
    return [
        (f'CE-FAM, `layer="fused"`, words on scenes, {what}', bracketed(rows["CE-FAM, fused"][key]),
         _beside(rows, key, names))
        for key, what in (("nra", "NRA"), ("specificity", "specificity"))
        if "CE-FAM, fused" in rows
    ]  # fmt: skip


def _tcav(r: Record) -> list[Line]:
    rows = _part(r, "which concepts move which class")
    ours, theirs = rows.get("SpatialACV.tcav"), rows.get("captum TCAV")
    if not ours or not theirs:
        return []
    return [
        ("SACV, AUROC of the class's own concepts", bracketed(ours["auroc_magnitude"]),
         f"captum TCAV {bracketed(theirs['auroc_magnitude'])}"),
        ("SACV, seconds for all concepts and classes", number(ours["seconds"]),
         f"captum TCAV {number(theirs['seconds'])}"),
    ]  # fmt: skip


def _solver(r: Record) -> list[Line]:
    if "peers" not in r:
        return []
    one = r["peers"]["solvers"]
    names = [n for n in ("plain FISTA", "scikit-learn saga", "glm_saga, its own stop") if n in one]
    beside = "; ".join(f"{n} {number(one[n]['cpu'])}" for n in names)
    return [("Elastic-net solver, CPU seconds to a certificate", number(one["ours"]["cpu"]), beside)]


def _nra(r: Record) -> list[Line]:
    row = r["timings"][0]["ms_per_map"]
    beside = f"published loop {number(row['published_loop'])}; vectorised {number(row['plain_vectorised'])}"
    return [("NRA of a 224 px map, ms", number(row["nra"]), beside)]


HEADLINES: dict[str, Callable[[Record], list[Line]]] = {
    "fam_quality": _fam_quality,
    "fam": _fam_cost,
    "tcav": _tcav,
    "concept_words": _words,
    "concept_regions_coco_half1": _regions,
    "solver": _solver,
    "nra": _nra,
}


def headlines(records: dict[str, Record]) -> str:
    """A Markdown table; a record that is missing has no line."""
    lines = [line for name, make in HEADLINES.items() if name in records for line in make(records[name])]
    return table(["what", "here", "beside it, in the same run"], [list(line) for line in lines])
