"""What the records say about themselves: do maps made worse on purpose fall, and where is each peer?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.record import table
from benchmarks.report.cells import COLUMNS, OTHER, SHUFFLED

Record = dict[str, Any]

#: Peers that a reader looks for, and what their rows are called: the beginning of a row's name or of a key.
PEERS = {
    "captum LayerGradCam": ("captum LayerGradCam", "LayerGradCam_x"),
    "captum LayerIntegratedGradients": ("captum LayerIntegratedGradients",),
    "captum TCAV": ("captum TCAV",),
    "pytorch-grad-cam GradCAM": ("pytorch-grad-cam GradCAM",),
    "pytorch-grad-cam ScoreCAM": ("pytorch-grad-cam ScoreCAM",),
    "pytorch-grad-cam deep_feature_factorization": ("pytorch-grad-cam deep_feature_factorization",),
    "CLIP-Dissect, single channel": ("CLIP-Dissect, single channel", "single channel (CLIP-Dissect"),
    "WWW, single channel": ("WWW, single channel", "single channel (WWW"),
    "P-CBM": ("P-CBM",),
    "LF-CBM": ("LF-CBM",),
    "glm_saga": ("glm_saga",),
    "scikit-learn saga": ("scikit-learn saga",),
    "quantus": ("quantus",),
    "torchmetrics": ("torchmetrics",),
    "random": ("random",),
    "centre Gaussian": ("centre Gaussian",),
    "activation energy": ("activation energy",),
}


def map_rows(record: Record) -> Iterator[tuple[str, list[Record]]]:
    """Title and rows of every table of maps that :mod:`benchmarks.run.map_tables` made."""
    for part in record.get("parts", {}).values():
        for one in part.get("tables", []):
            if any(row.get("kind") == "degraded" for row in one["rows"]):
                yield one["title"], one["rows"]


def falls(records: dict[str, Record]) -> dict[str, dict[str, tuple[int, int]]]:
    """For each way of making maps worse and each column: in how many tables the value is worse, and of how many."""
    out: dict[str, dict[str, tuple[int, int]]] = {}
    for record in records.values():
        for _, rows in map_rows(record):
            by_name = {row["method"]: row for row in rows}
            for row in rows:
                if row.get("kind") != "degraded" or row["of"] not in by_name:
                    continue
                way = SHUFFLED if row["method"].endswith(SHUFFLED) else OTHER
                for column, (_, more_is_better) in COLUMNS.items():
                    good, bad = by_name[row["of"]].get(column), row.get(column)
                    if not good or not bad or good[0] is None or bad[0] is None:
                        continue
                    worse, of = out.setdefault(way, {}).get(column, (0, 0))
                    fell = bad[0] < good[0] if more_is_better else bad[0] > good[0]
                    out[way][column] = (worse + fell, of + 1)
    return out


def worse_on_purpose(records: dict[str, Record]) -> str:
    """A table of :func:`falls`; empty without tables of maps."""
    found = falls(records)
    columns = [c for c in COLUMNS if any(c in row for row in found.values())]
    lines = [
        [way, *("{} of {}".format(*row[c]) if c in row else "" for c in columns)] for way, row in sorted(found.items())
    ]
    return table(["degraded by", *(COLUMNS[c][0] for c in columns)], lines) if lines else ""


def names(record: Any) -> Iterator[str]:
    """Keys of a record and texts of its rows, at any depth."""
    if isinstance(record, dict):
        for key, value in record.items():
            yield key
            yield from names(value)
    elif isinstance(record, list):
        for value in record:
            yield from names(value)
    elif isinstance(record, str):
        yield record


def whereabouts(records: dict[str, Record]) -> dict[str, list[str]]:
    """For each of ``PEERS``, the records that have a row of it."""
    texts = {name: set(names(record)) for name, record in records.items()}
    return {
        peer: sorted(n for n, found in texts.items() if any(text.startswith(starts) for text in found))
        for peer, starts in PEERS.items()
    }


def peers_table(records: dict[str, Record]) -> str:
    """A table of :func:`whereabouts`; a peer without a row says so."""
    lines = [
        [peer, ", ".join(f"`{name}`" for name in found) or "**no row: not installed when these were recorded**"]
        for peer, found in whereabouts(records).items()
    ]
    return table(["peer", "records"], lines)
