"""A record as Markdown tables: one function for each shape of record, and one for shapes that are not known."""

from __future__ import annotations

from benchmarks.record import table
from benchmarks.report.cells import (
    CIRCUMSTANCES,
    COLUMNS,
    Record,
    bracketed,
    cell,
    circumstances,
    is_interval,
    number,
    words,
)


def map_table(one: Record) -> list[str]:
    """A table made by :mod:`benchmarks.run.map_tables`."""
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
    if "words" in record:
        lines += ["Is the word there? Present: at least 1 % of the image.", ""]
        lines += [plain_table(record["words"], "what"), ""]
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


def shortcuts(record: Record) -> list[str]:
    """audit_shortcuts: what was planted, what was suspected, and how often nothing where there is nothing."""
    body, found = [], []
    for name, case in record["cases"].items():
        biased, fair = case["biased"], case["resampled"]
        body.append([
            name, f"{biased['planted_found']} of {biased['planted']}", cell(biased["precision"]),
            cell(biased["precision_by_exact_presence"]), number(biased["accuracy"]),
            number(case["unbiased"]["accuracy"]), f"{fair['without_suspects']} of {fair['audits']}",
        ])  # fmt: skip
        planted = set(case["pairs"].items())
        for row in biased["suspects"]:
            mark = "planted" if (row[0], row[1]) in planted else "not planted"
            found.append([name, row[0], row[1], number(row[2]), number(row[3]), cell(row[4]), mark])
    head = ["case", "planted pairs suspected ↑", "precision ↑", "precision by exact presence ↑", "accuracy, biased",
            "accuracy, unbiased", "unbiased: audits without suspects ↑"]  # fmt: skip
    pairs = ["case", "class", "concept", "effect", "p (Holm)", "confirmed by ablation", ""]
    lines = [table(head, body), "", "Suspects of the biased networks:", "", table(pairs, found), ""]
    return [
        *lines,
        *(line for name, case in record["cases"].items() for line in (f"{name}: {circumstances(case)}", "")),
    ]


def removal(record: Record) -> list[str]:
    """audit_removal: accuracy before and after suspects, and planted pairs, are taken away."""
    body = [["nothing", "", bracketed(record["before"]["independent"]), "", "", "",
             bracketed(record["before"]["planted"])]]  # fmt: skip
    keys: list[str] = []
    for name, entry in record["after"].items():
        keys = list(entry["independent"])
        body.append(
            [*name.split(", "), *(bracketed(entry["independent"][k]) for k in keys), bracketed(entry["planted"])]
        )
    head = ["removed", "how", *(words(k) for k in keys), "accuracy, planted grounds"]
    return [table(head, body), ""]


def discovery(record: Record) -> list[str]:
    """audit_discovery: the share of encoded concepts that are found, method by method."""
    rows = [
        {"method": name.rsplit(", ", 1)[0], "seed": name.rsplit(" ", 1)[1],
         **{k: v for k, v in entry.items() if not isinstance(v, dict)}}
        for name, entry in record["methods"].items()
    ]  # fmt: skip
    photographs = [
        {"method": method, "network": network, "seed": seed.rsplit(" ", 1)[1], **entry}
        for name, entry in record.get("photographs", {}).items()
        for method, network, seed in [name.split(", ")]
    ]
    return [plain_table(rows, "method"), "", *([plain_table(photographs, "method"), ""] if photographs else [])]
