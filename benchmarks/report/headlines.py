"""The few numbers a reader asks for first, read off the records: the summary of the page and of the README."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.record import table
from benchmarks.report.cells import bracketed, fixed, number

Record = dict[str, Any]
Line = tuple[str, str, str]


def _rows(record: Record, title: str) -> list[Record]:
    """The rows of the table with this title; none if it was not recorded."""
    for part in record.get("parts", {"": record}).values():
        for one in part.get("tables", []):
            if one["title"] == title:
                return list(one["rows"])
    return []


def _part(record: Record, title: str) -> dict[str, Record]:
    """The same by method."""
    return {row["method"]: row for row in _rows(record, title) if "method" in row}


def _beside(rows: dict[str, Record], key: str, names: dict[str, str], digits: int = 2) -> str:
    """The rows called ``names``, or whose names begin so, in the order of ``names``."""
    found = {}
    for start, shown in names.items():
        row = rows.get(start) or next((r for name, r in rows.items() if name.startswith(start)), {})
        if row.get(key):
            found[shown] = row[key]
    return "; ".join(f"{shown} {fixed(value[0], digits)}" for shown, value in found.items())


BLIND = {"activation energy": "activation energy", "centre Gaussian": "center Gaussian", "random": "random"}


def _fam_cost(r: Record) -> list[Line]:
    ratio = r["ratio_to_bare_forward"]
    peers = ("captum LayerGradCam", "pytorch-grad-cam GradCAM")
    beside = "; ".join(f"{n} {number(ratio[n])}" for n in peers if n in ratio)
    return [("FAM, cost of a map in forward passes (ResNet-50)", number(ratio["FAM, embedding = pooled maps"]), beside)]


def _fam_quality(r: Record) -> list[Line]:
    lines: list[Line] = []
    for title, what in (
        ("few-shot, COCO, mobilenet_v2", "few-shot on COCO"),
        ("few-shot, scenes, a CNN", "few-shot on scenes"),
        ("few-shot, scenes, a vision transformer", "few-shot on scenes, a ViT"),
    ):
        rows = _part(r, title)
        for method, name, others in (
            ("FAM", "FAM", {"captum LayerGradCam of the similarity": "captum LayerGradCam"}),
            ("FAM, refined", "FAM, `refine=True`", {"activation energy, refined": "refined activation energy"}),
        ):
            if method in rows:
                beside = _beside(rows, "nra", {**others, **BLIND})
                lines.append((f"{name}, {what}, NRA", bracketed(rows[method]["nra"]), beside))
    return lines


def _sacv_scenes(r: Record) -> list[Line]:
    lines = []
    asked = [row for row in _rows(r, "is it the texture?") if row["class"] == "all"]
    for layer in dict.fromkeys(row["layer"] for row in asked):
        own = {row["classes"]: row for row in asked if row["layer"] == layer}
        if {"textures", "grounds"} <= own.keys():
            none = bracketed(own["grounds"]["nothing claimed"])
            found = bracketed(own["textures"]["right texture claimed first"])
            lines.append((f"SACV, decisive texture of a class ranked first, {layer}", found,
                          f"classes without a decisive texture, none reported: {none}"))  # fmt: skip
    for row in _rows(r, "is the texture there?"):
        if row["texture"] == "all":
            beside = f"best constant {fixed(row['of the best constant'], 3)}"
            what = f"SACV, presence of textures, `lam={row['penalty']}`, Brier score, {row['layer']}"
            lines.append((what, bracketed(row["Brier score"], 3), beside))
    return lines


def _regions(r: Record) -> list[Line]:
    rows = r["rows"]
    names = {
        "published map and training, top-1": "published, top-1",
        "published map and training, top-4": "published, top-4 (uses the mask)",
        "HiResCAM": "HiResCAM",
        "LayerCAM": "LayerCAM",
        "single channel (CLIP-Dissect": "CLIP-Dissect",
        "single channel (WWW": "WWW",
        **BLIND,
    }
    name = 'CE-FAM, `map_layer="fused"`, text concepts on COCO'
    return [
        (f"{name}, {what}", bracketed(rows["fused"][key]), _beside(rows, key, names))
        for key, what in (("nra", "NRA"), ("specificity", "specificity"))
    ]


def _words(r: Record) -> list[Line]:
    rows = _part(r, "words, scenes")
    if not rows:
        return []
    names = {
        "CE-FAM, published map, top-1": "published map, top-1",
        "CLIP-Dissect, single channel": "CLIP-Dissect",
        "WWW, single channel": "WWW",
        **BLIND,
    }
    return [
        (f'CE-FAM, `map_layer="fused"`, text concepts on scenes, {what}', bracketed(rows["CE-FAM, fused"][key]),
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


def _salf(r: Record) -> list[Line]:
    heads = {(row["model"], row["head"]): row for row in _rows(r, "accuracy on scenes, 21 concepts")}
    few, lines = "sparse, at most 5 a class", []
    if ("SALF-CBM", few) in heads:
        known = (
            ("P-CBM", few),
            ("LF-CBM", few),
            ("backbone's features", few),
            ("backbone, its own head", "as trained"),
        )
        beside = "; ".join(f"{model} {bracketed(heads[model, head]['accuracy'])}" for model, head in known
                           if (model, head) in heads)  # fmt: skip
        own = bracketed(heads["SALF-CBM", few]["accuracy"])
        lines.append(("SALF-CBM, accuracy on scenes, at most 5 concepts per class", own, beside))
    rows = _part(r, "maps of the 21 words on scenes")
    if "SALF-CBM" in rows:
        names = {"LF-CBM, activation map of the concept unit": "LF-CBM, activation map of the unit", **BLIND}
        for key, what in (("nra", "NRA"), ("specificity", "specificity")):
            own = bracketed(rows["SALF-CBM"][key])
            lines.append((f"SALF-CBM, text concepts on scenes, {what}", own, _beside(rows, key, names)))
    return lines


def _solver(r: Record) -> list[Line]:
    if "peers" not in r:
        return []
    one = r["peers"]["solvers"]
    names = [n for n in ("plain FISTA", "scikit-learn saga", "glm_saga, its own stop") if n in one]
    beside = "; ".join(f"{n} {number(one[n]['cpu'])}" for n in names)
    return [("Elastic-net solver, CPU seconds to the duality-gap tolerance", number(one["ours"]["cpu"]), beside)]


def _nra(r: Record) -> list[Line]:
    row = r["timings"][0]["ms_per_map"]
    beside = f"published loop {number(row['published_loop'])}; vectorized {number(row['plain_vectorised'])}"
    return [("NRA of a 224 px map, ms", number(row["nra"]), beside)]


HEADLINES: dict[str, Callable[[Record], list[Line]]] = {
    "fam_quality": _fam_quality,
    "fam": _fam_cost,
    "tcav": _tcav,
    "sacv_scenes": _sacv_scenes,
    "concept_words": _words,
    "concept_regions_coco_half1": _regions,
    "salf_cbm_scenes": _salf,
    "solver": _solver,
    "nra": _nra,
}


QUESTIONS = ("which similarity", "which pooling", "which layer", "a classifier with a head")


def open_questions(record: Record) -> str:
    """What FAM's paper leaves open: its own setting (the first row), the best by NRA, and what knows no concept."""
    lines = []
    for part in record.get("parts", {}).values():
        for one in part.get("tables", []):
            rows = [r for r in one["rows"] if r.get("nra")]
            if not one["title"].startswith(QUESTIONS) or not rows:
                continue
            tried = [r for r in rows if r.get("kind") is None]
            best = max(tried, key=lambda r: round(r["nra"][0], 3))  # the first of those that are equal
            blind = max((r for r in rows if r.get("kind") == "blind"), key=lambda r: r["nra"][0])
            shown = [f"{r['method']} {bracketed(r['nra'])}" for r in (tried[0], best, blind)]
            lines.append([one["title"], *shown])
    head = ["question", "as published: NRA", "best tried", "best concept-agnostic baseline"]
    return table(head, lines) if lines else ""


def headlines(records: dict[str, Record]) -> str:
    """A Markdown table; a record that is missing, or has another shape, has no line."""
    lines: list[Line] = []
    for name, make in HEADLINES.items():
        try:
            lines += make(records[name])
        except (KeyError, TypeError, IndexError):
            continue
    return table(["measurement", "this package", "others, in the same run"], [list(line) for line in lines])
