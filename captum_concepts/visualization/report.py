"""Explanations as one HTML file that opens anywhere: what, where and how much, to look at, to keep and to print."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from captum_concepts.errors import InputError
from captum_concepts.explanation import ConceptExplanation
from captum_concepts.visualization.report_writer import ReportWriter

_NOTHING = object()


def report(
    explanations: ConceptExplanation | Iterable[ConceptExplanation],
    images: Any,
    path: str | os.PathLike[str],
    *,
    title: str = "Concept explanations",
    image_titles: Iterable[str] | None = None,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    top_k: int = 8,
    by: str | None = "scores",
    significant: Any = None,
    settings: Mapping[str, Any] | None = None,
    scale: str = "row",
    alpha: float = 0.55,
    cmap: Any = None,
    signed: bool | str = "auto",
    mode: str = "bicubic",
    show_progress: bool = False,
) -> Path:
    """One standalone HTML file: for each image its leading concepts with score, region and signed contribution.

    It opens from disk, needs no network and runs no script; a region appears over the input where its concept is
    pointed at, tapped or chosen by keyboard. Light and dark, readable on a phone, on paper and by a screen reader.
    Twenty images of up to eight concepts take less than 5 MB whatever they show.

    Args:
        explanations: one of N examples, or an iterable of them, which is read one by one.
        images: as many images, in the same order: a tensor ``(N, 3, H, W)``, a list or a generator of images or of
            batches, as :func:`overlay` takes them; one image where there is one example. RGB in [0, 1] or uint8, before
            the network's normalisation.
        path: an existing file is replaced, whole or not at all.
        title: of the page.
        image_titles: one an image, such as file names.
        class_names: names of the targets, by index.
        top_k: concepts shown an image.
        by: what ranks them: ``"scores"``, ``"contributions"`` (magnitude), or None for the explanation's order.
        significant: ``(T,)`` bool, such as ``SpatialACV.significant_``: where False, the concept is pale and called
            "not encoded here". With one explanation also ``(N, T)``.
        settings: what to keep of the run, shown in a table; nested mappings become parts. Hexadecimal fingerprints are
            set as such. Versions, method, layers and a fingerprint of each input's pixels are added.
        scale: ``"row"``: the maps of an image share one colour scale, so that their strengths compare; ``"map"``: each
            has its own.
        alpha: share of the map's colour; half of it where the map is zero, so that the input stays visible.
        cmap, signed, mode: as for :func:`overlay`.
        show_progress: a tqdm bar.

    Returns:
        The path written.

    Raises:
        InputError: other numbers of images or titles than examples, nothing to show, an option that does not exist.
        FileNotFoundError: the folder does not exist.

    Warns:
        InputWarning: maps hold NaN or infinite values; images are not in [0, 1].

    Example:
        >>> e = ConceptExplanation(["sand", "grass"], torch.rand(2, 2), torch.rand(2, 2, 7, 7), torch.randn(2, 2))
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> path = report(e, torch.rand(2, 3, 32, 32), folder / "report.html", title="On the beach")
        >>> path.stat().st_size < 200_000
        True
    """
    writer = ReportWriter(
        path, title=title, class_names=class_names, top_k=top_k, by=by, settings=settings,
        scale=scale, alpha=alpha, cmap=cmap, signed=signed, mode=mode,
    )  # fmt: skip
    flat = significant is None or torch.as_tensor(significant).ndim == 1
    several = not flat and isinstance(explanations, ConceptExplanation) and len(explanations) > 1
    with writer:
        names: Iterator[Any] = iter(()) if image_titles is None else iter(image_titles)
        pairs = zip_longest(_examples(explanations), _pictures(images), fillvalue=_NOTHING)
        for i, (example, picture) in enumerate(_progress(pairs, explanations, show_progress)):
            if example is _NOTHING or picture is _NOTHING:
                raise InputError(f"{'more' if example is _NOTHING else 'fewer'} images than explained examples ({i})")
            own = next(names, _NOTHING) if image_titles is not None else None
            if own is _NOTHING:
                raise InputError(f"fewer image_titles than examples ({i})")
            flags = significant[i] if several else significant
            writer.add([picture], example, title=None if own is None else str(own), significant=flags)
        if next(names, _NOTHING) is not _NOTHING:
            raise InputError(f"more image_titles than examples ({len(writer)})")
    return writer.path


def _examples(explanations: Any) -> Iterator[ConceptExplanation]:
    for one in [explanations] if isinstance(explanations, ConceptExplanation) else explanations:
        if not isinstance(one, ConceptExplanation):
            raise InputError(f"explanations must be ConceptExplanation, got {type(one).__name__}")
        yield from one


def _pictures(images: Any) -> Iterator[Any]:
    if hasattr(images, "convert") or getattr(images, "ndim", 0) in (2, 3):
        images = [images]
    for image in images:
        if getattr(image, "ndim", 0) == 4:
            yield from image
        else:
            yield image


def _progress(pairs: Iterable[Any], explanations: Any, show: bool) -> Iterable[Any]:
    if not show:
        return pairs
    from tqdm.auto import tqdm

    total = len(explanations) if isinstance(explanations, ConceptExplanation) else None
    return tqdm(pairs, desc="report", unit="image", total=total)
