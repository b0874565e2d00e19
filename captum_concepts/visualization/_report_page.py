"""A report as HTML: every text that comes from outside passes through `text` or `attribute`."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from captum_concepts.visualization._parts import NOT_ENCODED
from captum_concepts.visualization._report_pictures import Picture
from captum_concepts.visualization._report_style import style
from captum_concepts.visualization._text import number

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_NO_NETWORK = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True)
class ConceptRow:
    """One concept of one image.

    Args:
        name: as given.
        detail: below the name: the layer, or that the concept is not encoded.
        encoded: False draws it pale, and without its region over the input.
        score, contribution: the numbers; None where there is none.
        place: where the region is, in words.
        thumb, overlay: the region, over the input and alone.
    """

    name: str
    detail: str
    encoded: bool
    score: float
    contribution: float | None
    place: str
    thumb: Picture
    overlay: Picture | None


@dataclass(frozen=True)
class Example:
    """One image: what its card shows."""

    title: str
    target: str | None
    picture: Picture
    rows: Sequence[ConceptRow]
    low: str
    high: str
    ramp: str
    detail: str


def text(value: object) -> str:
    """Any value as HTML text, safe in an attribute as well; what XML cannot hold becomes U+FFFD.

    >>> text('<img src=x onerror="alert(1)">')
    '&lt;img src=x onerror=&quot;alert(1)&quot;&gt;'
    """
    return html.escape(_CONTROL.sub("\ufffd", str(value)), quote=True)


def name(value: object) -> str:
    """A name from outside in a sentence of ours: its writing direction stays its own."""
    return f"<bdi>{text(value)}</bdi>"


def card(index: int, example: Example) -> str:
    """One image."""
    key, shown = f"e{index}", example.picture
    target = (
        ""
        if example.target is None
        else f'<p class="for soft">for the class <strong>{name(example.target)}</strong></p>'
    )
    pixels = " pixels" if shown.uri.startswith("data:image/png") else ""
    title = text(example.title)
    size = f'width="{shown.width}" height="{shown.height}"'
    frame = [f'<img class="base{pixels}" src="{shown.uri}" {size} alt="Input: {title}">']
    for k, row in enumerate(example.rows):
        if row.overlay is not None:
            alt = f"Region of {text(row.name)} over the input: {row.place}"
            frame.append(f'<img class="map m{k}" src="{row.overlay.uri}" alt="{alt}">')
    how = any(row.contribution is not None for row in example.rows)
    said = "contribution" if example.target is None else f"contribution to {name(example.target)}"
    head = '<th scope="col">region</th><th scope="col">concept</th><th scope="col">score</th>'
    head += f'<th scope="col">{said}</th>' if how else ""
    body = [
        f'<tr class="input"><td class="pick"><label><input type="radio" name="{key}" id="{key}-input" checked>'
        f'<span class="hidden">Show the input alone</span></label></td><th scope="row" colspan="{2 + how}">input alone'
        "</th></tr>"
    ]
    body += [_row(f"{key}-c{k}", key, k, row, how) for k, row in enumerate(example.rows)]
    return f"""<article class="example" id="{key}" aria-labelledby="{key}-title">
<header><h2 id="{key}-title">{name(example.title)}</h2>{target}</header>
<div class="body">
<figure class="stage"><div class="frame" style="--w:{shown.width};--h:{shown.height}">
{chr(10).join(frame)}
</div>
<figcaption class="soft"><div class="legend"><span>{text(example.low)}</span><span class="ramp" \
style="background:linear-gradient(90deg,{example.ramp})"></span><span>{text(example.high)}</span></div>
{text(example.detail)}</figcaption></figure>
<table class="concepts"><caption class="hidden">Concepts in {title}</caption>
<thead><tr>{head}</tr></thead>
<tbody>
{chr(10).join(body)}
</tbody></table>
</div>
</article>
"""


def _row(key: str, group: str, k: int, row: ConceptRow, how: bool) -> str:
    kind = f"c{k}" if row.encoded else f"c{k} absent"
    width, height = _fit(row.thumb.width, row.thumb.height, 76)
    alt = f"Region of {text(row.name)}: {row.place if row.encoded else NOT_ENCODED}"
    detail = f"<small>{text(row.detail)}</small>" if row.detail else ""
    cells = [
        f'<td class="pick"><label><input type="radio" name="{group}" id="{key}"><img src="{row.thumb.uri}" '
        f'width="{width}" height="{height}" alt="{alt}"></label></td>',
        f'<th scope="row">{name(row.name)}{detail}</th>',
    ]
    bar = ""
    if row.encoded and math.isfinite(row.score):
        bar = f'<span class="bar" aria-hidden="true"><i style="--v:{max(row.score, 0.0):.6g}"></i></span>'
    cells.append(f'<td class="score"><span class="number">{number(row.score) if row.encoded else "–"}</span>{bar}</td>')
    if how:
        value = math.nan if row.contribution is None else row.contribution
        bar = ""
        if row.encoded and math.isfinite(value):
            side = "for" if value >= 0 else "against"
            bar = f'<span class="bar" aria-hidden="true"><i class="{side}" style="--v:{abs(value):.6g}"></i></span>'
        said = number(value, sign=True) if row.encoded else "–"
        cells.append(f'<td class="how"><span class="number">{said}</span>{bar}</td>')
    return f'<tr class="{kind}">{"".join(cells)}</tr>'


def page_head(
    title: str, summary: str, index: Sequence[tuple[str, str]], *, most: int, ends: tuple[float, float], how: bool
) -> str:
    """Everything before the cards.

    Args:
        title: of the page.
        summary: one line below it.
        index: title and text of each card.
        most: see :func:`style`.
        ends: values at the ends of the bars of scores and of contributions.
        how: whether there are contributions.
    """
    themes = ""
    for value in ("auto", "light", "dark"):
        checked = " checked" if value == "auto" else ""
        themes += f'<label><input type="radio" name="theme" id="theme-{value}"{checked}>{value}</label>'
    guide = "<span>Point at a concept, tap it, or use Tab and the arrow keys, to see its region over the input.</span>"
    if how:
        guide += f"<span>Contributions: red for the class, blue against it; all bars end at ±{number(ends[1])}.</span>"
    items = ""
    for i, (one, more) in enumerate(index, 1):
        items += f'<li><a href="#e{i}">{name(one)}</a> <span class="soft">{text(more)}</span></li>'
    opened = " open" if len(index) <= 12 else ""
    contents = f"""<nav class="index" aria-label="Images"><details{opened}><summary>{len(index)} images</summary>
<ol>{items}</ol></details></nav>"""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_NO_NETWORK}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="captum_concepts">
<title>{text(title)}</title>
<style>
{style(most, *ends)}</style>
</head>
<body>
<a class="skip" href="#images">Skip to the images</a>
<header><div><h1>{name(title)}</h1><p class="soft">{text(summary)}</p></div>
<fieldset class="theme"><legend class="hidden">Colours</legend>{themes}</fieldset></header>
<main id="images">
<p class="guide soft">{guide}</p>
{contents if len(index) > 1 else ""}
"""


def page_foot(settings: Mapping[str, Any], images: Sequence[Sequence[str]], failed: Sequence[tuple[str, str]]) -> str:
    """Everything after the cards: what could not be explained, the settings, and which pixels they were made from."""
    parts = []
    if failed:
        rows = [f'<th scope="row">{name(one)}</th><td>{text(reason)}</td>' for one, reason in failed]
        table = _table(("image", "reason"), rows)
        parts.append(f'<section class="about" id="failed"><h2>Not explained</h2>{table}</section>')
    lines = []
    for i, (title, size, digest) in enumerate(images, 1):
        lines.append(
            f'<td><a href="#e{i}">{name(title)}</a></td><td>{text(size)}</td><td><code>{text(digest)}</code></td>'
        )
    inputs = ""
    if lines:
        table = _table(("image", "pixels", "fingerprint of the pixels"), lines)
        inputs = f"<details><summary>The inputs ({len(lines)})</summary>{table}</details>"
    about = f'<section class="about" id="about"><h2>About this run</h2>{_facts(settings)}{inputs}</section>'
    foot = "One file, no network, no script. Made with captum_concepts."
    return f'{"".join(parts)}{about}\n</main>\n<footer class="soft">{foot}</footer>\n</body>\n</html>\n'


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    top = "".join(f'<th scope="col">{head}</th>' for head in heads)
    lines = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table class="facts"><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def _facts(settings: Mapping[str, Any]) -> str:
    """Nested mappings become parts with a heading."""
    plain = {key: value for key, value in settings.items() if not isinstance(value, Mapping)}
    out = ""
    if plain:
        rows = "".join(
            f'<tr><th scope="row">{name(key)}</th><td>{_value(value)}</td></tr>' for key, value in plain.items()
        )
        out = f'<div class="wide"><table class="facts"><tbody>{rows}</tbody></table></div>'
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            out += f"<h3>{name(key)}</h3>{_facts(value)}"
    return out


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(item) for item in value)
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{12,}", value):
        return f"<code>{text(value)}</code>"
    return name(value)


def _fit(width: int, height: int, side: int) -> tuple[int, int]:
    factor = side / max(width, height)
    return max(round(width * factor), 1), max(round(height * factor), 1)
