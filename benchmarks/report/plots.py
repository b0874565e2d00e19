"""The plots of the results page, drawn from the recorded JSONs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.report.cells import COLUMNS, is_interval
from benchmarks.report.sections import topic_of

Record = dict[str, Any]

#: What is drawn of a table of maps, if it is there.
SHOWN = ("nra", "specificity", "average_drop")
BLIND = ("random", "centre Gaussian", "activation energy")
#: Tables that get a plot, by record.
PLOTTED = {
    "fam_quality": (
        "few-shot, scenes, a CNN", "few-shot, COCO, mobilenet_v2", "a classifier with a head, COCO, MobileNetV2",
        "which similarity, COCO, MobileNetV2",
    ),
    "concept_words": ("words, scenes",),
}  # fmt: skip


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def tables(record: Record) -> dict[str, list[Record]]:
    """Tables of maps by title."""
    found = {}
    for part in record.get("parts", {}).values():
        for one in part["tables"]:
            if one["rows"] and "method" in one["rows"][0]:
                found[one["title"]] = one["rows"]
    return found


def colour(row: Record) -> str:
    if row.get("kind") == "degraded":
        return "tab:red"
    return "0.55" if row.get("kind") == "blind" or row["method"] in BLIND else "tab:blue"


def forest(title: str, rows: list[Record], path: Path) -> None:
    """A dot and its interval for every method, a panel for every quantity."""
    from matplotlib.figure import Figure

    keys = [key for key in SHOWN if any(is_interval(row.get(key)) for row in rows)]
    figure = Figure(figsize=(3.2 + 2.2 * len(keys), 0.9 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for axis, key in zip(axes, keys, strict=True):
        for place, row in enumerate(rows):
            if not is_interval(row.get(key)):
                continue
            middle, low, high = row[key]
            axis.plot([low, high], [place, place], color=colour(row), linewidth=1.5)
            axis.plot(middle, place, "o", color=colour(row), markersize=4)
        heading, up = COLUMNS[key]
        axis.set_xlabel(f"{heading} ({'more' if up else 'less'} is better)", fontsize=8)
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(labelsize=7)
        if key == "specificity":
            axis.axvline(0, color="0.7", linewidth=0.8)
    axes[0].set_yticks(range(len(rows)), [row["method"] for row in rows], fontsize=7)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.suptitle(f"{title} (95 % intervals; grey: knows no concept; red: made worse)", fontsize=8)
    save(figure, path)


def plane(title: str, rows: list[Record], path: Path) -> None:
    """NRA against specificity: finding the object is not finding the concept. Points are numbered, best NRA first."""
    from matplotlib.figure import Figure

    drawn = [row for row in rows if is_interval(row.get("nra")) and is_interval(row.get("specificity"))]
    drawn = sorted(drawn, key=lambda row: -row["nra"][0])
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axis = figure.subplots()
    for i, row in enumerate(drawn, 1):
        (x, x0, x1), (y, y0, y1) = row["nra"], row["specificity"]
        axis.errorbar(x, y, xerr=[[x - x0], [x1 - x]], yerr=[[y - y0], [y1 - y]], fmt="o", markersize=5,
                      linewidth=0.5, color=colour(row), label=f"{i}  {row['method']}")  # fmt: skip
    axis.axhline(0, color="0.7", linewidth=0.8)
    axis.set_xlabel("NRA: it finds the region", fontsize=8)
    axis.set_ylabel("specificity: of this concept, not of any", fontsize=8)
    axis.tick_params(labelsize=7)
    figure.suptitle(f"{title} (95 % intervals; grey knows no concept)", fontsize=8)
    handles = [one.lines[0] for one in axis.containers]
    axis.legend(handles, [one.get_label() for one in axis.containers], fontsize=7, loc="center left",
                bbox_to_anchor=(1.01, 0.5), frameon=False)  # fmt: skip
    number_points(figure, axis, [(row["nra"][0], row["specificity"][0]) for row in drawn])
    save(figure, path)


def number_points(figure: Any, axis: Any, points: list[tuple[float, float]]) -> None:
    """A number beside every point, on the side where no other point or number is near."""
    figure.canvas.draw()  # places the axes
    pixels = [tuple(axis.transData.transform(point)) for point in points]
    taken: list[tuple[float, float]] = []
    sides = [(r * dx, r * dy) for r in (8, 14, 20) for dx, dy in ((0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8))]
    scale = figure.dpi / 72
    for i, (point, (x, y)) in enumerate(zip(points, pixels, strict=True), 1):
        others = [p for j, p in enumerate(pixels, 1) if j != i] + taken

        def room(side: tuple[float, float], x: float = x, y: float = y, others: Any = others) -> float:
            at = x + scale * side[0], y + scale * side[1]
            near = min((abs(at[0] - p[0]) + abs(at[1] - p[1]) for p in others), default=99.0)
            return min(near, 16 * scale) - 0.1 * (abs(side[0]) + abs(side[1]))

        side = max(sides, key=room)
        taken.append((x + scale * side[0], y + scale * side[1]))
        axis.annotate(str(i), point, textcoords="offset points", xytext=side, ha="center", va="center", fontsize=7)


def times(title: str, heading: str, values: dict[str, float], path: Path) -> None:
    """Times, on a logarithmic axis."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(6.5, 0.9 + 0.27 * len(values)), layout="constrained")
    axis = figure.subplots()
    places = range(len(values))
    for place, (name, value) in enumerate(values.items()):
        own = "tab:blue" if name.startswith(("ours", "nra")) else "0.5"
        axis.plot(value, place, "o", color=own, markersize=6)
        axis.annotate(
            f"{value:.3g}", (value, place), xytext=(7, 0), textcoords="offset points", va="center", fontsize=7
        )
    axis.grid(axis="x", alpha=0.3)
    axis.set_yticks(places, list(values), fontsize=7)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())  # labels of the minor ticks overlap
    axis.set_ylim(len(values) - 0.5, -0.5)
    axis.set_xlim(min(values.values()) / 1.5, max(values.values()) * 2)
    axis.set_xlabel(heading, fontsize=8)
    axis.tick_params(labelsize=7)
    axis.set_title(title, fontsize=8)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    partial = path.with_name(f".{path.stem}.partial.png")
    figure.savefig(partial, dpi=110, metadata={"Software": None})
    partial.replace(path)
    print(path.name)


def draw(records: dict[str, Record], folder: Path) -> None:
    """Every plot whose record is there, as ``<record>_<what>.png``."""
    for name, titles in PLOTTED.items():
        found = tables(records.get(name, {}))
        for title in titles:
            if title in found:
                forest(title, found[title], folder / f"{name}_{slug(title)}.png")
    for name, record in records.items():
        if name.startswith("concept_regions") and isinstance(record.get("rows"), dict):
            rows = [{"method": method, **row} for method, row in record["rows"].items()]
            plane(f"regions of words, {topic_of(name).title}", rows, folder / f"{name}_plane.png")
    if "peers" in records.get("solver", {}):
        one = records["solver"]["peers"]
        title = f"Elastic net, {one['rows']:,} x {one['columns']}, {one['classes']} classes"
        seconds = {name: r["cpu"] for name, r in one["solvers"].items()}
        times(title, "seconds of CPU", seconds, folder / "solver_peers.png")
    if "nra" in records:
        ms = records["nra"]["timings"][0]["ms_per_map"]
        order = ("nra", "nra_exact", "plain_vectorised", "published_loop")
        times(
            f"NRA of a {records['nra']['size']} px map",
            "milliseconds",
            {k.replace("_", " "): ms[k] for k in order},
            folder / "nra_ms.png",
        )
