"""The tidy table of an evaluation, with values, confidence intervals and counts, as CSV, JSON and Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from captum_concepts import _artifacts as schema
from captum_concepts._artifacts import check_json, parse_json, write_atomically
from captum_concepts._checks import integer, number
from captum_concepts.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from captum_concepts.metrics.streaming import ExampleMetric

__all__ = ["EvaluationTable"]

#: Minimum number of examples for an interval.
FEWEST = 5
_COLUMNS = (
    "explainer", "metric", "value", "ci_low", "ci_high", "examples", "counted", "skipped", "higher_is_better"
)  # fmt: skip
_NUMBER = schema.nothing_or(schema.number())
_COUNT = schema.integer()
_ROW = dict(zip(_COLUMNS, (schema.text(), schema.text(), *[_NUMBER] * 3, *[_COUNT] * 3), strict=False))
_SAVED = schema.table(
    {
        "rows": schema.list_of(schema.table({**_ROW, "higher_is_better": schema.nothing_or(schema.flag)}, more=True)),
        "confidence": schema.number(0, 1),
    },
    {"unmatched": schema.list_of(schema.text())},
    more=True,
)


class Samples:
    """Statistics per example of one explainer and metric: sums (n, width), counted and undefined values (n,).

    They are kept as raw bytes, since an array or tensor per image and metric takes a hundred times the memory.
    """

    def __init__(self) -> None:
        self._kept = bytearray(), bytearray(), bytearray()

    def add(self, total: Tensor, counted: Tensor, skipped: Tensor) -> None:
        """Add the statistics of a batch, from tensors on any device."""
        for kept, values in zip(self._kept, (total, counted, skipped), strict=True):
            kept += values.detach().cpu().double().numpy().tobytes()

    def __len__(self) -> int:
        return len(self._kept[1]) // 8

    @property
    def total(self) -> np.ndarray:
        """``(n, width)`` float64."""
        return np.frombuffer(self._kept[0]).reshape(len(self), -1)

    @property
    def counted(self) -> np.ndarray:
        """``(n,)`` float64."""
        return np.frombuffer(self._kept[1])

    @property
    def skipped(self) -> np.ndarray:
        """``(n,)`` float64."""
        return np.frombuffer(self._kept[2])


def check_resampling(n_bootstrap: int, confidence: float, seed: int) -> None:
    """Raise an ``InputError`` for options of the bootstrap that are out of range."""
    integer("n_bootstrap", n_bootstrap, 0)
    number("confidence", confidence, lambda c: 0 < c < 1, "between 0 and 1")
    integer("seed", seed, 0)


@dataclass(frozen=True)
class EvaluationTable:
    """Results of an evaluation, one row per explainer and metric.

    Args:
        rows: dicts with ``explainer``, ``metric``, ``value``, ``ci_low``, ``ci_high`` (NaN without bootstrap),
            ``examples``, ``counted`` and ``skipped`` (numbers of values and of undefined values; an example with T
            concepts has T values), ``higher_is_better`` (None if not known).
        confidence: coverage of the intervals.
        resamples: ``{(explainer, metric): (n_bootstrap,)}`` the metric of each resample of the examples.
        unmatched: names of concepts in the data that an explainer does not know, left out for all explainers.
    """

    rows: list[dict[str, Any]]
    confidence: float = 0.95
    resamples: Mapping[tuple[str, str], np.ndarray] = field(default_factory=dict, repr=False)
    unmatched: list[str] = field(default_factory=list)

    @classmethod
    def summarize(
        cls,
        samples: Mapping[tuple[str, str], Samples],
        metrics: Mapping[str, ExampleMetric],
        *,
        n_bootstrap: int,
        confidence: float,
        seed: int,
        unmatched: Sequence[str] = (),
    ) -> EvaluationTable:
        """Table of values and percentile intervals from the sums of every example; all rows share the resamples."""
        n = len(next(iter(samples.values())))
        drawn: dict[tuple[str, str], list[np.ndarray]] = {key: [] for key in samples}
        rng = np.random.default_rng(seed)
        for start in range(0, n_bootstrap, 64):
            size = min(64, n_bootstrap - start)
            weights = rng.multinomial(n, np.full(n, 1 / n), size=size).astype(float)
            for key, part in samples.items():
                drawn[key].append(_reduce(metrics[key[1]], weights, part))
        rows, resamples = [], {}
        for key, part in samples.items():
            low = high = math.nan
            if n_bootstrap:
                resamples[key] = np.concatenate(drawn[key])
                finite = resamples[key][~np.isnan(resamples[key])]
                tail = (1 - confidence) / 2
                if len(finite) and int((part.counted > 0).sum()) >= FEWEST:
                    low, high = (float(q) for q in np.quantile(finite, [tail, 1 - tail]))
            value = float(_reduce(metrics[key[1]], np.ones((1, n)), part)[0])
            counts = (n, int(part.counted.sum()), int(part.skipped.sum()))
            row = (*key, value, low, high, *counts, metrics[key[1]].higher_is_better)
            rows.append(dict(zip(_COLUMNS, row, strict=True)))
        return cls(rows, confidence, resamples, list(unmatched))

    def row(self, explainer: str, metric: str) -> dict[str, Any]:
        """The row of an explainer and a metric."""
        for row in self.rows:
            if (row["explainer"], row["metric"]) == (explainer, metric):
                return row
        known = [f"{row['explainer']}/{row['metric']}" for row in self.rows]
        raise InputError(f"no row {explainer!r}, {metric!r}.{did_you_mean(f'{explainer}/{metric}', known)}")

    def compare(self, metric: str, first: str, second: str) -> dict[str, float]:
        """Paired difference ``first`` minus ``second``, as ``difference``, ``ci_low`` and ``ci_high``."""
        a, b = self.row(first, metric), self.row(second, metric)
        keys = (first, metric), (second, metric)
        if any(key not in self.resamples for key in keys):
            raise InputError("compare requires bootstrap resamples; call evaluate with n_bootstrap above 0")
        differences = self.resamples[keys[0]] - self.resamples[keys[1]]
        differences = differences[~np.isnan(differences)]
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(differences, [tail, 1 - tail]) if len(differences) else (math.nan, math.nan)
        if math.isnan(a["ci_low"]) or math.isnan(b["ci_low"]):  # too few examples, however many values each has
            low = high = math.nan
        return {"difference": a["value"] - b["value"], "ci_low": float(low), "ci_high": float(high)}

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """The rows as CSV, also written to ``path`` if given; undefined values are empty.

        An apostrophe precedes names that a spreadsheet would read as a formula (those that start with =, +, - or @).
        """
        out = io.StringIO()
        writer = csv.DictWriter(out, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: "" if _missing(v) else _no_formula(v) for k, v in row.items()} for row in self.rows)
        return _written(out.getvalue(), path)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """``{"confidence": ..., "rows": [...]}``, also written to ``path`` if given; undefined values are null."""
        rows = [{k: None if _missing(v) else v for k, v in row.items()} for row in self.rows]
        return _written(
            json.dumps({"confidence": self.confidence, "rows": rows, "unmatched": self.unmatched}, indent=2) + "\n",
            path,
        )

    @classmethod
    def from_json(cls, text: str) -> EvaluationTable:
        """Table from the output of :meth:`to_json`, which does not contain resamples."""
        try:
            found = parse_json(text)
        except ValueError as error:
            raise InputError(f"not the JSON of an evaluation table: {error}") from error
        content = check_json(found, _SAVED, "the JSON of an evaluation table", InputError)
        numbers = ("value", "ci_low", "ci_high")
        rows = [
            {k: math.nan if k in numbers and row[k] is None else row[k] for k in _COLUMNS} for row in content["rows"]
        ]
        return cls(rows, content["confidence"], unmatched=content.get("unmatched", []))

    def to_markdown(self, path: str | os.PathLike[str] | None = None, *, digits: int = 3) -> str:
        """Markdown with one row per explainer, one column per metric, intervals in brackets, skipped values below."""
        integer("digits", digits, least=0)
        explainers = list(dict.fromkeys(row["explainer"] for row in self.rows))
        metrics = list(dict.fromkeys(row["metric"] for row in self.rows))
        arrows = {row["metric"]: {True: " ↑", False: " ↓"}.get(row["higher_is_better"], "") for row in self.rows}
        lines = ["| " + " | ".join(["explainer", *(_in_cell(m) + arrows[m] for m in metrics)]) + " |"]
        lines.append("|" + "---|" * (len(metrics) + 1))
        for explainer in explainers:
            cells = [_cell(self.row(explainer, metric), digits) for metric in metrics]
            lines.append("| " + " | ".join([_in_cell(explainer), *cells]) + " |")
        examples = self.rows[0]["examples"] if self.rows else 0
        note = f"{examples} examples."
        if any(not _missing(row["ci_low"]) for row in self.rows):
            note += f" In brackets: {self.confidence:.0%} interval, bootstrap over examples."
        elif self.resamples and examples < FEWEST:
            note += f" No intervals for fewer than {FEWEST} examples."
        if self.unmatched:
            shown = ", ".join(self.unmatched[:10]) + (", ..." if len(self.unmatched) > 10 else "")
            note += f" {len(self.unmatched)} concepts of the data are not among the explainers': {shown}."
        skipped = [row for row in self.rows if row["skipped"]]
        if skipped:
            parts = [f"{r['explainer']}/{r['metric']} {r['skipped']} (counted {r['counted']})" for r in skipped]
            note += " Undefined values (NaN map, empty or full mask): " + ", ".join(parts) + "."
        return _written("\n".join([*lines, "", note]), path)

    def __str__(self) -> str:
        return self.to_markdown()

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


def _reduce(metric: ExampleMetric, weights: np.ndarray, part: Samples) -> np.ndarray:
    total, counted = torch.from_numpy(weights @ part.total), torch.from_numpy(weights @ part.counted)
    return metric.reduce(total, counted).numpy()


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _cell(row: dict[str, Any], digits: int) -> str:
    if _missing(row["value"]):
        return "undefined"
    text = f"{row['value']:.{digits}f}"
    return text if _missing(row["ci_low"]) else f"{text} [{row['ci_low']:.{digits}f}, {row['ci_high']:.{digits}f}]"


def _no_formula(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.lstrip()[:1] in ("=", "+", "-", "@") else value


def _in_cell(name: str) -> str:
    """A name, escaped for a cell of a Markdown table."""
    return " ".join(name.replace("|", "\\|").split())


def _written(text: str, path: str | os.PathLike[str] | None) -> str:
    if path is not None:
        write_atomically(path, text)
    return text
