"""Display of explanations in notebooks, as images, each image's own concepts with maps, and bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_concepts._checks import integer
from captum_concepts.explanation import ConceptExplanation, show_with
from captum_concepts.visualization.canvas import NOT_ENCODED, number as in_words
from captum_concepts.visualization.overlay import as_images, blend
from captum_concepts.visualization.panels import check_explanation, class_of, ordered, significance
from captum_concepts.visualization.pictures import photo, place_in_words
from captum_concepts.visualization.report import bar, bar_end
from captum_concepts.visualization.scale import ColorScale, schemes
from captum_concepts.visualization.templates import template

_SIDE, _INPUT = 112, 168
#: Maximum number of displayed images; panel and report show all.
_MOST = 8


class Shown:
    """The result of :func:`show`, which displays as HTML in a notebook and as the explanation's text elsewhere."""

    def __init__(self, explanation: ConceptExplanation, html: str) -> None:
        self.explanation = explanation
        self._html = html

    def __repr__(self) -> str:
        return repr(self.explanation)

    def _repr_html_(self) -> str:
        return self._html


def show(
    explanation: ConceptExplanation,
    images: Any,
    *,
    top_k: int = 5,
    rank_by: str | None = None,
    significant: Any = None,
    class_names: Sequence[str] | None = None,
) -> Shown:
    """An explanation with its images, displayed as the output of a notebook cell.

    Explanations also display themselves, with thumbnails of their first images if they were computed from tensors or
    files.

    Args:
        explanation, images, rank_by, significant, class_names: as in :func:`panel`.
        top_k: concepts per image.

    Example:
        >>> e = ConceptExplanation(["sand", "grass"], torch.rand(1, 2), torch.rand(1, 2, 7, 7))
        >>> show(e, torch.rand(1, 3, 32, 32)).explanation is e
        True
    """
    check_explanation("show", explanation, images)
    pictures = as_images(images, len(explanation))
    integer("top_k", top_k)
    page = _html(explanation, pictures, significant, top_k=top_k, rank_by=rank_by, class_names=class_names)
    return Shown(explanation, page)


def _html(
    explanation: ConceptExplanation,
    pictures: Sequence[Tensor | None] | None,
    significant: Any = None,
    *,
    top_k: int = 5,
    rank_by: str | None = None,
    class_names: Any = None,
) -> str:
    explanation = explanation.to("cpu")
    n = len(explanation)
    flags = significance(significant, explanation.concepts, n)
    signed = schemes([[m.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).float() for m in explanation.maps]])
    images = []
    for i in range(min(n, _MOST)):
        one, states = ordered(explanation, i, flags[i], rank_by, top_k)
        picture = None if pictures is None else pictures[i]
        if picture is not None and not picture.is_floating_point():
            picture = picture.float() / 255
        target, sure = class_of(one, class_names), one.target_probability
        images.append(
            {
                "name": f"image {i}" if one.image_names is None else one.image_names[0],
                "target": target and f"{target}{'' if sure is None else ' ' + in_words(float(sure))}",
                "picture": None if picture is None else photo(picture, 2 * _INPUT, 16_000),
                "width": _INPUT,
                "concepts": _concepts(one, states, picture, signed),
            }
        )
    left = n - len(images)
    return template("notebook.html").render(
        images=images,
        summary=repr(explanation).split("\n", 1)[0],
        more=f"{left} more images; panel() and report() show all of them" if left else "",
    )


def _concepts(one: ConceptExplanation, states: list[str], picture: Tensor | None, signed: bool) -> list[dict[str, Any]]:
    maps = one.maps[0].float()
    encoded = [state != NOT_ENCODED for state in states]
    scale = ColorScale.of([m for m, yes in zip(maps, encoded, strict=True) if yes], signed)
    scores = one.scores[0].float().tolist()
    how = None if one.contributions is None else one.contributions[0].float().tolist()
    ends = bar_end(scores, encoded), bar_end(how or [], encoded)
    found = []
    for j, state in enumerate(states):
        drawn = None
        if encoded[j]:
            drawn = blend(_background(picture, maps[j]), maps[j], scale)
        found.append(
            {
                "name": one.concepts[j],
                "state": state,
                "picture": None if drawn is None else photo(drawn, 2 * _SIDE, 9_000),
                "width": _SIDE,
                "alt": f"Map of {one.concepts[j]}: {place_in_words(maps[j])}",
                "score": bar(scores[j], ends[0], encoded[j], min(scores) < 0),
                "contribution": None if how is None else bar(how[j], ends[1], encoded[j], True),
            }
        )
    return found


def _background(picture: Tensor | None, heatmap: Tensor) -> Tensor:
    """The image at the size of a thumbnail, or a light gray one for None."""
    height, width = heatmap.shape if picture is None else picture.shape[1:]
    factor = 2 * _SIDE / max(height, width)
    size = (max(round(height * factor), 1), max(round(width * factor), 1))
    if picture is None:
        return torch.full((3, *size), 0.93)
    if factor < 1:
        small = torch.nn.functional.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]
        return small.clamp(0, 1)
    return torch.nn.functional.interpolate(picture[None], size, mode="nearest-exact")[0]


show_with(_html)
