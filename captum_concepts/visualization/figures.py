"""Figures of several concepts in one image, of decision rules, and of the images that activate a concept most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from captum_concepts._checks import integer, name_positions, number, one_of
from captum_concepts._undo import unharming
from captum_concepts.errors import InputError
from captum_concepts.explanation import RANKINGS, ConceptExplainer, ConceptExplanation
from captum_concepts.visualization.canvas import (
    DETAIL,
    FAINT,
    INK,
    LEADING,
    NAME,
    NEGATIVE,
    POSITIVE,
    TITLE,
    FigureCanvas,
    Fitted,
    at_print_size,
    fit,
    number as in_words,
    text_width,
)
from captum_concepts.visualization.inputs import strongest_images
from captum_concepts.visualization.overlay import as_images, filled, gray, upsample
from captum_concepts.visualization.panels import (
    NONE_SELECTED,
    check_explanation,
    check_selected,
    class_of,
    ordered,
    picture_size,
    significance,
)
from captum_concepts.visualization.regions import edges

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Paul Tol's bright scheme with two more colors, distinguishable with all common kinds of color blindness.
COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee7733", "#bbbbbb")
#: Maximum number of concepts in one figure.
_ROWS = 40
_MARGIN, _GAP = 0.14, 0.12
#: Minimum value to claim a pixel, as a fraction of an image's strongest map.
_FAINTEST = 0.2


def legend(
    explanation: ConceptExplanation,
    images: Any,
    *,
    top_k: int = 5,
    rank_by: str | None = None,
    threshold: float = 0.5,
    title: str | None = None,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    image_names: Sequence[str] | None = None,
    significant: Any = None,
    cell_size: float = 2.4,
) -> Figure:
    """Figure of several concepts per image as a segmentation, with each pixel in the color of its strongest concept.

    A concept claims the pixels where its map is at least ``threshold`` of its own maximum and a fifth of the maximum of
    the image's strongest map. If several concepts claim a pixel, the one nearest to its own maximum wins. Concepts that
    are not seen, not encoded, or (for standardized scores) weaker than average claim none.

    Args:
        explanation: an explanation of N images.
        images: these N images, as in :func:`panel`.
        top_k: concepts per image, at most 8.
        rank_by, class_names, image_names, significant: as in :func:`panel`.
        threshold: fraction of a concept's maximum, in (0, 1].
        title: title above the figure.
        cell_size: width of an image in inches.

    Returns:
        A figure with one row per image: the input, the colored image, and each concept's color, score and fraction of
        the area.

    Raises:
        InputError: as for :func:`panel`.

    Example:
        >>> e = ConceptExplanation(["sand", "grass"], torch.rand(1, 2), torch.rand(1, 2, 7, 7))
        >>> figure = legend(e, torch.rand(1, 3, 32, 32))
    """
    explanation = check_explanation("legend", explanation, images).to("cpu")
    n = len(explanation)
    check_selected(explanation)
    integer("top_k", top_k, most=len(COLORS))
    one_of("rank_by", rank_by, (*RANKINGS, None))
    number("threshold", threshold, lambda v: 0 < v <= 1, "in (0, 1]")
    number("cell_size", cell_size, lambda inches: 0.8 <= inches <= 20, "0.8 to 20 inches")
    pictures = as_images(images, n)
    names = explanation.image_names if image_names is None else image_names
    if names is not None and len(names) != n:
        raise InputError(f"{len(names)} image_names for {n} images")
    flags = significance(significant, explanation.concepts, n)
    rows = [ordered(explanation, i, flags[i], rank_by, top_k) for i in range(n)]
    sizes = [picture_size(picture, cell_size) for picture in pictures]
    large = [at_print_size(picture, max(size)) for picture, size in zip(pictures, sizes, strict=True)]
    segments = [
        _segments(one, states, (picture.shape[1], picture.shape[2]), threshold)
        for (one, states), picture in zip(rows, large, strict=True)
    ]
    areas = [
        [float((winner == j).float().mean()) for j in range(len(rows[i][1]))] for i, (winner, _) in enumerate(segments)
    ]
    lines = [
        [_line(one, j, state, areas[i][j]) for j, state in enumerate(states)] for i, (one, states) in enumerate(rows)
    ]
    widest = max(max(text_width(a, NAME, "bold"), text_width(b, DETAIL)) for own in lines for a, b in own)
    words = min(widest + 0.05, 3.0)
    width = 2 * _MARGIN + 2 * cell_size + 2 * _GAP + 0.22 + words
    head = fit(title, width - 2 * _MARGIN, TITLE, lines=4, weight="bold") if title else Fitted("", TITLE)
    note = "   ·   ".join(
        filter(None, [explanation.method, f"colored: at least {threshold:g} of a concept's maximum in the image"])
    )
    foot = fit(note, width - 2 * _MARGIN, DETAIL, lines=3)
    pitch = (NAME + DETAIL) * LEADING / 72 + 0.06
    heights = [max(size[1], pitch * len(own)) + 0.24 for size, own in zip(sizes, lines, strict=True)]
    top = _MARGIN + (head.height + 0.1 if title else 0.0)
    canvas = FigureCanvas(width, top + sum(heights) + _GAP * n + foot.height + _MARGIN)
    canvas.text(width / 2, _MARGIN, head, va="top", fontweight="bold")
    canvas.text(_MARGIN, canvas.height - _MARGIN, foot, ha="left", color=FAINT)
    for i, (one, states) in enumerate(rows):
        y, (wide, high) = top + 0.22, sizes[i]
        target = class_of(one, class_names)
        heading = str(names[i]) if names is not None else "input"
        heading += f", target: {target}" if target is not None else ""
        canvas.text(_MARGIN + cell_size / 2, y - 0.04, fit(heading, cell_size, NAME, lines=1, weight="bold"))
        indent = (cell_size - wide) / 2
        canvas.picture((_MARGIN + indent, y, wide, high), large[i], "input")
        winner, strength = segments[i]
        colored = _colored(large[i], winner, strength)
        axes = canvas.picture((_MARGIN + cell_size + _GAP + indent, y, wide, high), colored, "legend")
        for j in range(len(states)):
            axes.add_collection(_border(winner == j, COLORS[j]), autolim=False)
        x = _MARGIN + 2 * cell_size + 2 * _GAP
        if not states:
            canvas.text(x, y, fit(NONE_SELECTED, words + 0.22, DETAIL, lines=3), ha="left", va="top", color=FAINT)
        for j, (name, detail) in enumerate(lines[i]):
            area = float((winner == j).float().mean())
            place, color = (x, y + j * pitch + 0.02, 0.14, 0.14), COLORS[j] if area else "none"
            patch = canvas.axes(place, label="patch", facecolor=color)
            patch.set(xticks=[], yticks=[])
            for spine in patch.spines.values():
                spine.set(linewidth=0.6, color=FAINT)
            ink = INK if area else FAINT
            canvas.text(x + 0.22, y + j * pitch, fit(name, words, NAME, lines=1, weight="bold"), ha="left", va="top",
                        fontweight="bold" if area else "normal", color=ink)  # fmt: skip
            below = y + j * pitch + NAME * LEADING / 72
            canvas.text(x + 0.22, below, fit(detail, words, DETAIL, lines=1), ha="left", va="top", color=FAINT)
        top += heights[i] + _GAP
    return canvas.figure


def _line(one: ConceptExplanation, j: int, state: str, area: float) -> tuple[str, str]:
    score = f"score {in_words(float(one.scores[0, j]))} {one.score_unit}".strip()
    part = f"{max(100 * area, 1):.0f} % of the image" if area else "no pixels assigned"
    return one.concepts[j], f"{state or score} · {part}"


def _segments(
    one: ConceptExplanation, states: Sequence[str], size: tuple[int, int], threshold: float
) -> tuple[Tensor, Tensor]:
    """``(H, W)`` concept of each pixel (-1: none), and its value as a fraction of that concept's maximum."""
    large = [upsample(filled(one.maps[0, j].float()), size, mode="bilinear") for j in range(len(states))]
    usual = "deviation" in one.score_unit
    drawn = [not state and not (usual and one.scores[0, j] <= 0) for j, state in enumerate(states)]
    strongest = max((float(m.max()) for m, yes in zip(large, drawn, strict=True) if yes), default=0.0)
    relative = [torch.full(size, -1.0)] if not large else []
    for own, yes in zip(large, drawn, strict=True):
        top = float(own.max())
        claimed = yes and top > 0
        relative.append((own / top).where(own >= _FAINTEST * strongest, -1.0) if claimed else torch.full(size, -1.0))
    strength, winner = torch.stack(relative).max(0)
    return winner.where(strength >= threshold, -1), strength.clamp(0, 1)


def _colored(picture: Tensor, winner: Tensor, strength: Tensor) -> Tensor:
    background = torch.lerp(torch.ones_like(picture), gray(picture), 0.7)
    palette = torch.tensor([[int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)] for color in COLORS])
    colors = palette[winner.clamp(min=0)].permute(2, 0, 1)
    opacity = (0.35 + 0.4 * strength).where(winner >= 0, 0.0)
    return torch.lerp(background, colors, opacity)


def _border(mask: Tensor, color: str) -> Any:
    from matplotlib.collections import LineCollection

    ends = [[(x0 - 0.5, y0 - 0.5), (x1 - 0.5, y1 - 0.5)] for x0, y0, x1, y1 in edges(mask)]
    return LineCollection(ends, colors=color, linewidths=1.4, capstyle="projecting")


@runtime_checkable
class RuleModel(Protocol):
    """Protocol of models whose classes are weighted sums of concepts, such as ``SALFCBM``."""

    class_names: Any

    def decision_rules(self, target: Any, top_k: Any = None) -> list[tuple[str, float]]:
        """``(concept, weight)`` of a class, strongest first."""
        ...


def sankey(
    model: RuleModel, classes: Any = None, *, top_k: int = 5, title: str | None = None, width: float = 6.5
) -> Figure:
    """Sankey diagram of decision rules, with bands from concepts (left) to classes (right) as wide as their weights.

    Args:
        model: a SALFCBM, or any model with ``decision_rules`` and ``class_names``.
        classes: names or indices, at most 12; None: all.
        top_k: concepts per class.
        title: title above the figure.
        width: width in inches.

    Returns:
        A figure, in which red bands support a class and blue bands oppose it.

    Raises:
        InputError: an unknown class, too many classes, or no class with a rule.

    Reference:
        Figure 3 of Benou, I., Riklin Raviv, T. *Show and Tell.* CVPR 2025, arXiv:2502.20134.
    """
    if not isinstance(model, RuleModel):
        raise InputError(f"sankey requires a model with decision_rules, such as a SALFCBM; got {type(model).__name__}")
    integer("top_k", top_k)
    number("width", width, lambda inches: 3 <= inches <= 40, "3 to 40 inches")
    rules = class_rules(model, classes, top_k)
    if not any(rules.values()):
        raise InputError("all weights of these classes are 0, so there is nothing to draw")
    concepts = _by_barycenter(rules)
    totals = {name: sum(abs(w) for rule in rules.values() for c, w in rule if c == name) for name in concepts}
    per_class = {name: sum(abs(w) for _, w in rule) for name, rule in rules.items()}
    pad, most = 0.1, max(len(concepts), len(rules))
    body = max(0.24 * most, 1.6)
    scale = (body - pad * (most - 1)) / sum(totals.values())
    labels = [max(min(text_width(n, NAME), 2.4) for n in names) + 0.1 for names in (concepts, rules)]
    width = max(width, sum(labels) + 2.2)
    head = fit(title, width - 2 * _MARGIN, TITLE, lines=3, weight="bold") if title else Fitted("", TITLE)
    foot = fit(f"band width: weight; up to {top_k} concepts per class; red supports the class, blue opposes it",
               width - 2 * _MARGIN, DETAIL, lines=3)  # fmt: skip
    top = _MARGIN + (head.height + 0.12 if title else 0.0)
    canvas = FigureCanvas(width, top + body + 0.12 + foot.height + _MARGIN)
    canvas.text(width / 2, _MARGIN, head, va="top", fontweight="bold")
    canvas.text(_MARGIN, canvas.height - _MARGIN, foot, ha="left", color=FAINT)
    x0, x1 = _MARGIN + labels[0], width - _MARGIN - labels[1]
    axes = canvas.axes((x0, top, x1 - x0, body), label="bands", facecolor="none")
    axes.set(xlim=(0, x1 - x0), ylim=(body, 0))
    axes.set_axis_off()
    left = _stacked(concepts, totals, scale, body)
    right = _stacked(list(rules), per_class, scale, body)
    for side, places, names in ((0.0, left, totals), (x1 - x0 - 0.09, right, per_class)):
        for name, y in places.items():
            axes.add_patch(_rectangle(side, y, 0.09, names[name] * scale))
    for places, names, x, ha in ((left, totals, x0 - 0.06, "right"), (right, per_class, x1 + 0.06, "left")):
        for name, y in places.items():
            words = fit(name, 2.4, NAME, lines=1)
            canvas.text(x, top + y + names[name] * scale / 2, words, ha=ha, va="center")
    start, end = dict(left), dict(right)
    for concept in concepts:
        for name, rule in rules.items():
            for own, weight in rule:
                if own != concept:
                    continue
                thick = abs(weight) * scale
                axes.add_patch(_band(0.09, start[concept], x1 - x0 - 0.09, end[name], thick, weight >= 0))
                start[concept] += thick
                end[name] += thick
    return canvas.figure


def class_rules(model: RuleModel, classes: Any, top_k: int) -> dict[str, list[tuple[str, float]]]:
    """Leading concepts of each class, by name.

    Raises:
        InputError: an unknown class, or too many classes.
    """
    count = len(model.class_names) if model.class_names else int(getattr(model, "num_classes", 0))
    names = list(model.class_names or [f"class {k}" for k in range(count)])
    chosen = name_positions(classes, names, "class")
    if len(chosen) > 12:
        raise InputError(f"{len(chosen)} classes are too many for one figure; pass at most 12 in classes=")
    return {names[k]: model.decision_rules(k, top_k) for k in chosen}


def _by_barycenter(rules: Mapping[str, Sequence[tuple[str, float]]]) -> list[str]:
    """Concepts sorted by the weighted mean position of their classes, so that few bands cross."""
    places: dict[str, list[tuple[float, float]]] = {}
    for k, rule in enumerate(rules.values()):
        for concept, weight in rule:
            places.setdefault(concept, []).append((abs(weight), k * abs(weight)))
    return sorted(places, key=lambda c: sum(b for _, b in places[c]) / max(sum(a for a, _ in places[c]), 1e-12))


def _stacked(names: Sequence[str], totals: Mapping[str, float], scale: float, body: float) -> dict[str, float]:
    """Top of each node, with all nodes spread over the height."""
    free = body - scale * sum(totals[name] for name in names)
    gap = free / max(len(names) - 1, 1)
    y, found = (free / 2 if len(names) == 1 else 0.0), {}
    for name in names:
        found[name] = y
        y += totals[name] * scale + gap
    return found


def _rectangle(x: float, y: float, width: float, height: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=INK, linewidth=0)


def _band(x0: float, y0: float, x1: float, y1: float, thick: float, positive: bool) -> Any:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    middle = (x0 + x1) / 2
    points = [
        (x0, y0), (middle, y0), (middle, y1), (x1, y1), (x1, y1 + thick), (middle, y1 + thick), (middle, y0 + thick),
        (x0, y0 + thick), (x0, y0),
    ]  # fmt: skip
    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
    return PathPatch(Path(points, codes), facecolor=POSITIVE if positive else NEGATIVE, alpha=0.55, linewidth=0)


@unharming
def most_activating(
    explainer: ConceptExplainer,
    images: Any,
    concepts: Any = None,
    *,
    k: int = 5,
    title: str | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 32,
    cell_size: float = 1.2,
) -> Figure:
    """Figure of the images with the highest score of each concept, which show what its name means in this model.

    Args:
        explainer: any of the methods.
        images: anything that :func:`~captum_concepts.images.inputs_for` accepts, read once in batches.
        concepts: names or indices, at most 40; None: all.
        k: images per concept.
        title: title above the figure.
        transform: computes the model's inputs from a batch of images in [0, 1].
        batch_size: images per forward pass.
        cell_size: width of an image in inches.

    Returns:
        A figure with one row per concept and a score per image, strongest first; pixels below half of the maximum of
        the concept's map are darkened.

    Raises:
        InputError: no images, an unknown concept, or too many concepts.
    """
    if not isinstance(explainer, ConceptExplainer):
        raise InputError(f"most_activating requires an explainer, got {type(explainer).__name__}")
    integer("k", k)
    number("cell_size", cell_size, lambda inches: 0.5 <= inches <= 20, "0.5 to 20 inches")
    names = list(explainer.concepts)
    columns = name_positions(concepts, names)
    if len(columns) > _ROWS:
        raise InputError(f"{len(columns)} concepts are too many for one figure; pass at most {_ROWS} in concepts=")
    best = list(strongest_images(explainer, images, columns, k, transform=transform, batch_size=batch_size).values())
    label = max(text_width(line, NAME, "bold") for c in columns for line in fit(names[c], 1.5, NAME).text.split("\n"))
    width = 2 * _MARGIN + label + 0.12 + k * (cell_size + 0.06)
    head = fit(title, width - 2 * _MARGIN, TITLE, lines=4, weight="bold") if title else Fitted("", TITLE)
    foot = fit("score above each image; bright: the concept's map is above half of its maximum",
               width - 2 * _MARGIN, DETAIL, lines=3)  # fmt: skip
    heights = [max([picture_size(one.picture, cell_size)[1] for one in own] or [0.3]) + 0.22 for own in best]
    top = _MARGIN + (head.height + 0.08 if title else 0.0)
    canvas = FigureCanvas(width, top + sum(heights) + 0.1 + foot.height + _MARGIN)
    canvas.text(width / 2, _MARGIN, head, va="top", fontweight="bold")
    canvas.text(_MARGIN, canvas.height - _MARGIN, foot, ha="left", color=FAINT)
    for column, own, height in zip(columns, best, heights, strict=True):
        words = fit(names[column], 1.5, NAME, weight="bold")
        canvas.text(_MARGIN + label, top + height / 2 + 0.1, words, ha="right", va="center", fontweight="bold")
        for j, one in enumerate(own):
            picture = one.picture
            wide, high = picture_size(picture, cell_size)
            x = _MARGIN + label + 0.12 + j * (cell_size + 0.06) + (cell_size - wide) / 2
            large = at_print_size(picture, max(wide, high))
            mask = _strong(explainer.concept_maps(one.inputs, [column])[0, 0], (large.shape[1], large.shape[2]))
            axes = canvas.picture((x, top + 0.2, wide, high), large * torch.where(mask, 1.0, 0.4), names[column])
            canvas.outline(axes, [(a - 0.5, b - 0.5, c - 0.5, d - 0.5) for a, b, c, d in edges(mask)])
            canvas.text(x + wide / 2, top + 0.18, Fitted(in_words(one.score), DETAIL), color=FAINT)
        top += height
    return canvas.figure


def _strong(heatmap: Tensor, size: tuple[int, int]) -> Tensor:
    """Mask of the pixels at or above half of the map's maximum; empty if the maximum is not positive."""
    large = upsample(filled(heatmap.detach().float().cpu()), size, mode="bilinear")
    top = float(large.max())
    return large >= top / 2 if top > 0 else torch.zeros(size, dtype=torch.bool)
