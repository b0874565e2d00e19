"""One section of the results page for every record: titles, words of explanation, and tables read off the JSON."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from _record import table
from map_tables import COLUMNS

Record = dict[str, Any]

#: Not results, but how they came about: shown in one line.
CIRCUMSTANCES = (
    "environment", "arguments", "seed", "seeds", "date", "python", "machine", "device", "threads", "versions", "torch",
    "benchmark", "details",
)  # fmt: skip


@dataclass(frozen=True)
class Section:
    title: str
    lines: list[str]

    @property
    def anchor(self) -> str:
        """As GitHub makes it."""
        return re.sub(r"[^\w\- ]", "", self.title.lower()).replace(" ", "-")


# ------------------------------------------------------------------------------------------------ cells


def is_interval(value: Any) -> bool:
    """``[value, low, high]``."""
    return isinstance(value, list) and len(value) == 3 and all(v is None or isinstance(v, (int, float)) for v in value)


def number(value: float, digits: int = 3) -> str:
    """Three significant digits, without an exponent where it can be avoided."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (abs(value) >= 1000 and float(value).is_integer()):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def fixed(value: float, digits: int = 2) -> str:
    """Without a minus before nothing but zeros."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def bracketed(value: list[Any] | float | None, digits: int = 2) -> str:
    """``0.43 [0.39, 0.50]``; a number without an interval alone."""
    middle, low, high = value if isinstance(value, list) else (value, None, None)
    if middle is None:
        return ""
    if low is None:
        return fixed(middle, digits)
    return f"{fixed(middle, digits)} [{fixed(low, digits)}, {fixed(high, digits)}]"


def cell(value: Any) -> str:
    """Anything a record holds, as one cell."""
    if value is None:
        return ""
    if is_interval(value):
        return bracketed(value)
    if isinstance(value, (int, float)):
        return number(value)
    if isinstance(value, list):
        return ", ".join(cell(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{k} {cell(v)}" for k, v in value.items())
    return str(value).replace("|", "\\|").replace("\n", " ")


def words(key: str) -> str:
    """A key as a heading."""
    return key.replace("_", " ")


# ------------------------------------------------------------------------------------------------ circumstances


def circumstances(record: Record) -> str:
    """When, where, with which versions, arguments and seeds: one line."""
    env = {**record, **record.get("environment", {})}
    parts = []
    if "date" in env:
        where = [str(env[k]) for k in ("machine", "device") if env.get(k) and env[k] != "cpu"]
        threads = env.get("threads")
        where += [f"{threads} thread{'s' if threads != 1 else ''}"] if threads else []
        where += ["no GPU"] if env.get("device") == "cpu" else []
        parts.append(f"Recorded {env['date']} on {', '.join(where)}")
    versions = {"Python": env.get("python"), **env.get("versions", {})}
    if env.get("torch"):
        versions["torch"] = env["torch"]
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    parts += [shown] if shown else []
    given = {k: v for k, v in record.get("arguments", {}).items() if v not in (None, {}, [])}
    for key in ("seed", "seeds"):
        if key in record:
            given[key] = record[key]
    given = {k: v for k, v in given.items() if not (isinstance(v, str) and "/" in v)}  # folders are nobody's business
    parts += ["; ".join(f"{words(k)} {cell(v)}" for k, v in given.items())] if given else []
    return f"<sub>{'. '.join(parts)}.</sub>" if parts else ""


# ------------------------------------------------------------------------------------------------ tables


def map_table(one: Record) -> list[str]:
    """A table made by :mod:`map_tables`."""
    rows = one["rows"]
    columns = [key for key in COLUMNS if any(row.get(key) for row in rows)]
    more = sorted({k for row in rows for k in row} - set(COLUMNS) - {"method", "seconds_a_map", "kind", "of"})
    timed = any(row.get("seconds_a_map") for row in rows)
    head = ["method", *(f"{COLUMNS[c][0]} {'↑' if COLUMNS[c][1] else '↓'}" for c in columns), *map(words, more)]
    body = []
    for row in rows:
        name = f"*{row['method']}*" if row.get("kind") == "degraded" else row["method"]
        line = [name, *(bracketed(row.get(c)) for c in columns), *(cell(row.get(k)) for k in more)]
        if timed:
            line.append("" if row.get("seconds_a_map") is None else number(1000 * row["seconds_a_map"]))
        body.append(line)
    note = [one["note"], ""] if one.get("note") else []
    return [f"### {one['title']}", "", *note, table([*head, *(["ms a map"] if timed else [])], body), ""]


def plain_table(rows: list[Record], first: str | None = None) -> str:
    """Any list of dicts; nested ones are flattened."""
    flat = [_flat(row) for row in rows]
    keys = list(dict.fromkeys(k for row in flat for k in row))
    if first in keys:
        keys = [first, *(k for k in keys if k != first)]
    return table([words(k) for k in keys], [[cell(row.get(k)) for k in keys] for row in flat])


def _flat(row: Record, before: str = "") -> Record:
    out: Record = {}
    for key, value in row.items():
        if isinstance(value, dict):
            out.update(_flat(value, f"{before}{key}, "))
        elif not (isinstance(value, list) and value and isinstance(value[0], (dict, list))):
            out[before + key] = value
    return out


def anything(record: Record, level: str = "###") -> list[str]:
    """A record whose shape is not known: every list of dicts, dict of dicts and dict of values as a table."""
    if isinstance(record.get("tables"), list):
        return [line for one in record["tables"] for line in one_table(one)]
    lines: list[str] = []
    loose = {k: v for k, v in record.items() if k not in CIRCUMSTANCES and not isinstance(v, (dict, list))}
    loose.update({k: v for k, v in record.items() if k not in CIRCUMSTANCES and is_interval(v)})
    if loose:
        lines += [table(["what", "value"], [[words(k), cell(v)] for k, v in loose.items()]), ""]
    for key, value in record.items():
        if key in CIRCUMSTANCES or key in loose:
            continue
        title = [f"{level} {words(key)}", ""]
        if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            lines += [*title, plain_table(value), ""]
        elif isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
            deep = any(isinstance(x, (dict, list)) and not is_interval(x) for v in value.values() for x in v.values())
            if deep or any("environment" in v for v in value.values()):
                for name, part in value.items():
                    lines += [f"{level} {words(key)}: {words(name)}", "", circumstances(part), "", *anything(part)]
            else:
                lines += [*title, plain_table([{words(key): k, **v} for k, v in value.items()]), ""]
        elif isinstance(value, dict) and value:
            if "environment" in value:
                lines += [*title, circumstances(value), "", *anything(value, level + "#")]
            else:
                lines += [*title, table(["what", "value"], [[words(k), cell(v)] for k, v in value.items()]), ""]
        elif isinstance(value, list) and value:
            lines += [*title, cell(value), ""]
    return [line for i, line in enumerate(lines) if line or (i and lines[i - 1])]


def one_table(one: Record) -> list[str]:
    """A table with title, note and rows: of maps, or of anything."""
    rows = one["rows"]
    if rows and any(key in row for row in rows for key in COLUMNS) and "method" in rows[0]:
        return map_table(one)
    note = [one["note"], ""] if one.get("note") else []
    return [f"### {one['title']}", "", *note, plain_table(rows), ""]


def parts(record: Record) -> list[str]:
    """A record of parts, each with its own environment and tables."""
    lines: list[str] = []
    for part in record["parts"].values():
        for one in part["tables"]:
            lines += one_table(one)
        lines += [circumstances(part), ""]
    return lines


def regions(record: Record) -> list[str]:
    """concept_regions: rows by method, and what deleting a region does."""
    data = record.get("data", {})
    rows = [{"method": name, **row} for name, row in record["rows"].items()]
    of = f"{data.get('images')} held-out images with {data.get('regions')} regions, {data.get('words')} words."
    lines = map_table({"title": "regions", "note": of, "rows": rows})
    if "deletion" in record:
        dropped = [[name, bracketed(value)] for name, value in record["deletion"].items()]
        lines += [
            "Drop of the concept's logit when the fifth of the pixels its map ranks highest becomes the mean colour:",
            "", table(["region deleted", "drop ↑"], dropped), "",
        ]  # fmt: skip
    return lines


def textures(record: Record) -> list[str]:
    """spatial_acv: means over textures, layer by layer."""
    lines = []
    for model, rows in record["models"].items():
        body = []
        for negatives, layer in dict.fromkeys((r["negatives"], r["layer"]) for r in rows):
            own = [r for r in rows if (r["negatives"], r["layer"]) == (negatives, layer)]
            mean = lambda key, own=own: sum(r[key] for r in own) / len(own)  # noqa: E731
            encoded = sum(r["p_holm"] < 0.05 for r in own)
            body.append([negatives, layer, number(mean("accuracy")), f"{encoded} of {len(own)}",
                         number(mean("auroc")), number(mean("auroc_random_directions_mean"))])  # fmt: skip
        head = ["negatives", "layer", "held-out accuracy ↑", "encoded (Holm p < 0.05)", "AUROC on photographs ↑",
                "AUROC of random directions"]  # fmt: skip
        lines += [f"### {model}, means over {len({r['texture'] for r in rows})} textures", "", table(head, body), ""]
    for key in ("cost", "calibration", "memory"):
        if key in record:
            lines += [f"### {key}", "", table(["what", "value"], [[k, cell(v)] for k, v in record[key].items()]), ""]
    return lines


def timings(record: Record) -> list[str]:
    """fam: seconds beside a bare forward pass."""
    seconds, ratios = record["median_seconds"], record["ratio_to_bare_forward"]
    body = [[name, number(seconds[name]), number(ratios[name])] for name in seconds]
    peak = ", ".join(f"{n} images {mib:,.0f} MiB" for n, mib in record["peak_mib_after_images"].items())
    return [
        f"{record['setting']}; medians of {record['repeats']}, in turn in one process.", "",
        table(["method", "seconds ↓", "x bare forward ↓"], body), "",
        f"Peak memory of the process after a stream of images: {peak}.", "",
    ]  # fmt: skip


def nra_speed(record: Record) -> list[str]:
    body = []
    for row in record["timings"]:
        ms = [number(row["ms_per_map"][k]) for k in ("published_loop", "plain_vectorised", "nra", "nra_exact")]
        body.append([row["maps"], *ms, number(row["times_faster_than_loop"]), number(row["times_faster_than_plain"]),
                     f"{row['largest_difference_from_loop']:.1e}"])  # fmt: skip
    head = ["maps", "published loop, ms", "plain vectorised, ms", "nra, ms ↓", "nra exact, ms ↓", "x loop ↑",
            "x plain ↑", "largest difference"]  # fmt: skip
    growth = ", ".join(f"{n} maps {mb:.1f} MB" for n, mb in record["peak_growth_mb"].items())
    return [
        f"{record['size']} px, ms a map. Where pixels tie (relu), the loop's value depends on the sort, ours does not.",
        "",
        table(head, body), "", f"Peak memory beyond the inputs: {growth}.", "",
    ]  # fmt: skip


def solver(record: Record) -> list[str]:
    lines: list[str] = []
    if "peers" in record:
        one = record["peers"]
        body = [[name, number(r["wall"]), number(r["cpu"]), number(r.get("factor_cpu", 1.0)), f"{r['objective']:.8f}",
                 f"{r['excess']:.1e}", r["passes"], r["runs"]] for name, r in one["solvers"].items()]  # fmt: skip
        head = [
            "solver",
            "s (wall) ↓",
            "s (CPU) ↓",
            "x ours (CPU)",
            "objective ↓",
            "above the bound ↓",
            "passes",
            "runs",
        ]
        setting = f"{one['rows']} x {one['columns']}, {one['classes']} classes, lam {one['lam']}"
        lines += [f"### peers: {setting}", "", table(head, body), "", circumstances(one), ""]
        lines += [f"- {goal}: {met}" for goal, met in one.get("goals", {}).items()] + [""]
    for key in ("correlated", "ridge"):
        if key in record:
            lines += [f"### {key}", "", plain_table(record[key]["cases"]), "", circumstances(record[key]), ""]
    if "growth" in record:
        rows = [{"axis": axis, **r} for axis in ("rows", "columns", "classes") for r in record["growth"][axis]]
        lines += ["### growth", "", plain_table(rows), "", circumstances(record["growth"]), ""]
    if "memory" in record:
        kept = {k: v for k, v in record["memory"].items() if k not in CIRCUMSTANCES}
        body = [[words(k), cell(v)] for k, v in kept.items()]
        lines += ["### larger than memory", "", table(["what", "value"], body), "", circumstances(record["memory"]), ""]
    return lines


def truth(record: Record) -> list[str]:
    """ce_fam_scenes: regions, and contributions of a planted ground."""
    rows = [
        {"method": name, **{k: v for k, v in row.items() if is_interval(v)}} for name, row in record["regions"].items()
    ]
    lines = map_table({"title": "regions on scenes with exact masks", "note": "", "rows": rows})
    body = [
        {"network": name, "accuracy on independent grounds": record[name]["accuracy_on_independent_grounds"],
         "setting": setting, **values}
        for name in ("unbiased", "biased") if name in record
        for setting, values in record[name]["contributions"].items()
    ]  # fmt: skip
    return [*lines, "### contributions of a planted background", "", plain_table(body), ""]


# ------------------------------------------------------------------------------------------------ the page

Renderer = Callable[[Record], list[str]]

#: Record -> title, words of explanation, how it is shown. The order is the page's.
KNOWN: dict[str, tuple[str, str, Renderer]] = {
    "fam_quality": (
        "FeatureActivationMap: quality",
        "Peers explain the same number, the cosine to the same reference; those that need classes are given the "
        "cosines as classes.",
        parts,
    ),
    "fam": ("FeatureActivationMap: cost", "", timings),
    "tcav": (
        "SpatialACV beside Captum's TCAV",
        "Both learn from the same guidance images on the same layer, in one process.",
        parts,
    ),
    "spatial_acv": ("SpatialACV on real textures and photographs", "", textures),
    "concept_words": (
        "Words on scenes, every method side by side",
        "The bundled classifier and image-text model, exact masks: needs no data, runs anywhere.",
        parts,
    ),
    "concept_regions_coco_half0": ("ConceptFusionMap on COCO, the half it was designed on", "", regions),
    "concept_regions_coco_half1": (
        "ConceptFusionMap on COCO, held out",
        "Real MobileNetV2 and a zero-shot image-text model in CLIP's text space.",
        regions,
    ),
    "concept_regions_vit": ("ConceptFusionMap on COCO, a vision transformer", "", regions),
    "concept_regions_sensitivity": ("ConceptFusionMap: its few constants, one changed at a time", "", anything),
    "ce_fam_scenes": ("ConceptFusionMap against truth", "", truth),
    "ce_fam": ("ConceptFusionMap: cost", "ResNet-50, one image, in bare forward passes.", anything),
    "region_store": ("RegionEmbeddingStore", "", anything),
    "solver": ("Elastic-net solver", "Objectives are computed by one function in float64.", solver),
    "nra": ("NRA: speed", "", nra_speed),
    "metrics_peers": (
        "Metrics beside quantus, torchmetrics and scikit-learn",
        "Agreement where definitions agree; where they differ the last column says how.",
        parts,
    ),
    "paper_tables": ("The papers' tables", "", parts),
}


def title_of(name: str) -> str:
    """Of a record that is not known."""
    for start, title in (("salf_cbm", "SALFCBM"), ("region_store", "RegionEmbeddingStore"), ("paper", "Papers' table")):
        if name.startswith(start):
            rest = words(name[len(start) :]).strip()
            return f"{title}: {rest}" if rest else title
    return words(name)


def sections(records: dict[str, Record], pictures: list[str]) -> list[Section]:
    """Known records in the page's order, then the others by name."""
    names = [n for n in KNOWN if n in records]
    after = names.index("region_store") if "region_store" in names else len(names)
    others = sorted(set(records) - set(KNOWN))
    names[after:after] = [n for n in others if n.startswith("salf")]
    names += [n for n in others if not n.startswith("salf")]
    out = []
    for name in names:
        record = records[name]
        title, text, render = KNOWN.get(name, (title_of(name), "", parts if "parts" in record else anything))
        lines = [text, ""] if text else []
        lines += [f"`{name}.json`", ""]
        about = circumstances(record)
        lines += [about, ""] if about else []
        lines += render(record)
        longer = [n for n in records if n != name and n.startswith(name)]
        for picture in pictures:
            if picture.startswith(name) and not any(picture.startswith(n) for n in longer):
                lines += [f"![{words(picture.removesuffix('.png'))}]({picture})", ""]
        out.append(Section(title, lines))
    return out
