"""An audit as one HTML page of suspects with their images, drivers of each class, and confusions with concepts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_concepts import __version__
from captum_concepts._artifacts import write_atomically
from captum_concepts.errors import InputError
from captum_concepts.images import open_images
from captum_concepts.visualization.overlay import overlay
from captum_concepts.visualization.pictures import photo
from captum_concepts.visualization.templates import asset, template

if TYPE_CHECKING:
    from captum_concepts.audit.concept_audit import ConceptAudit

_HERE = Path(__file__).parent
_DRIVERS = 8  # concepts shown per class
_THUMBNAIL = 160  # pixels


def write_page(audit: ConceptAudit, path: str | os.PathLike[str], images: Any, title: str) -> Path:
    """Write the page of :meth:`ConceptAudit.report`.

    Raises:
        InputError: the number of images differs from that of the audit.
    """
    source = None if images is None else open_images(images)
    if source is not None and len(source) != len(audit):
        raise InputError(
            f"{len(source)} images for an audit of {len(audit)}; pass the audited images in the same order"
        )

    def picture(i: int, heatmap: Tensor | None, top: float) -> dict[str, Any]:
        shown = None
        if source is not None:
            image = source[i][:3]
            image = image if len(image) == 3 else image[:1].expand(3, -1, -1)
            if heatmap is not None and top > 0:
                image = overlay(image.clamp(0, 1), heatmap, signed=bool((heatmap < 0).any()), vmax=top)
            shown = photo(image, _THUMBNAIL, 12_000)
        predicted = int(audit.predicted[i])
        return {
            "picture": shown,
            "name": audit.image_names[i],
            "predicted": audit.class_names[predicted],
            "true": None if audit.labels is None else audit.class_names[int(audit.labels[i])],
        }

    suspects = []
    for k, suspect in enumerate(audit.suspected or ()):
        c = audit.class_names.index(suspect.class_name)
        maps: Sequence[Iterable[Tensor | None]]
        maps = [repeat(None), repeat(None)] if audit.maps is None else audit.maps[k].chunk(2)
        top = 0.0 if audit.maps is None else float(audit.maps[k].nan_to_num(-torch.inf).max())
        best, worst = (
            [
                picture(i, heatmap, top) | {"p": float(audit.rows.probabilities[i, c])}
                for i, heatmap in zip(images, of, strict=False)
            ]
            for images, of in zip((suspect.images, suspect.counterexamples), maps, strict=True)
        )
        suspects.append({"suspect": suspect, "best": best, "worst": worst})
    html = template("page.html", _HERE).render(
        title=title,
        css=asset("page.css", _HERE),
        audit=audit,
        version=__version__,
        suspects=suspects,
        judged=audit.suspected is not None,
        classes=_classes(audit),
        confusion=_confusion(audit),
        errors=audit.errors[:40],
        interval=lambda low, high: "" if math.isnan(low) else f"[{low:+.2f}, {high:+.2f}]",
    )
    return write_atomically(path, html)


def _classes(audit: ConceptAudit) -> list[dict[str, Any]]:
    """Strongest drivers of each class, with bars and intervals as fractions of one scale per class."""
    found = []
    for name in audit.class_names:
        rows = [row for row in audit.drivers if row["class"] == name and row["where"] == "all"]
        known = [row for row in rows if not math.isnan(row["contribution"])]
        known.sort(key=lambda row: -abs(row["contribution"]) * row["n"])
        rows = known[:_DRIVERS] or sorted(rows, key=lambda row: -row["presence_rate"])[:_DRIVERS]
        if not rows:
            continue
        ends = [abs(row[key]) for row in rows for key in ("contribution", "low", "high") if not math.isnan(row[key])]
        scale = max(ends, default=1.0) or 1.0
        bars = []
        for row in rows:
            value, low, high = (row[key] / scale for key in ("contribution", "low", "high"))
            wrong = next(
                (r for r in audit.drivers if (r["class"], r["concept"], r["where"]) == (name, row["concept"], "wrong")),
                None,
            )
            bars.append(row | {"bar": value, "bar_low": low, "bar_high": high, "where_wrong": wrong})
        found.append({"name": name, "images": rows[0]["images"], "bars": bars})
    return found


def _confusion(audit: ConceptAudit) -> list[dict[str, Any]]:
    """Confusion matrix, true by predicted classes; each error cell has its most significant concepts."""
    if audit.labels is None or len(audit.class_names) > 40:
        return []
    counts = torch.zeros(len(audit.class_names), len(audit.class_names), dtype=torch.long)
    counts.index_put_((audit.labels, audit.predicted), torch.ones(len(audit), dtype=torch.long), accumulate=True)
    words: dict[tuple[str, str], list[str]] = {}
    for row in audit.errors:
        if row["p"] < 0.05:
            words.setdefault((row["true"], row["predicted"]), []).append(row["concept"])
    return [
        {
            "name": name,
            "cells": [
                {"count": int(counts[y, p]), "right": y == p, "words": words.get((name, other), [])[:3]}
                for p, other in enumerate(audit.class_names)
            ],
        }
        for y, name in enumerate(audit.class_names)
    ]
