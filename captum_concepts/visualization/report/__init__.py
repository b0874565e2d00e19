"""Reports of explanations as standalone HTML files."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count, zip_longest
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import torch
from markupsafe import Markup
from torch import Tensor

from captum_concepts import __version__
from captum_concepts._artifacts import check_destination, naming, replacing
from captum_concepts._checks import integer, number, one_of
from captum_concepts.errors import InputError, InputWarning
from captum_concepts.explanation import RANKINGS, ConceptExplainer, ConceptExplanation
from captum_concepts.visualization.canvas import NOT_ENCODED, number as in_words, round_up
from captum_concepts.visualization.figures import class_rules, sankey
from captum_concepts.visualization.inputs import (
    TrueClass,
    check_targets,
    each_of,
    shown_batches,
    source_of,
    targets_of,
    warn_of_unknown_class,
)
from captum_concepts.visualization.overlay import ALPHA, MODES, as_images, each_image
from captum_concepts.visualization.panels import (
    NONE_SELECTED,
    absence,
    check_explanation,
    class_of,
    crop_boxes,
    ordered,
    significance,
)
from captum_concepts.visualization.pictures import Picture, figure_uri, gradient, map_picture, photo, place_in_words
from captum_concepts.visualization.regions import outlines
from captum_concepts.visualization.scale import ColorScale, schemes
from captum_concepts.visualization.templates import asset, template

_NOTHING: Any = object()
#: Maximum number of classes, and of concepts, to filter by; the most frequent ones are kept.
_FILTERS = 300
#: Images per page, so that each page opens instantly.
PER_PAGE = 200
#: Part of the head of every page of this package.
_OURS = b'<meta name="generator" content="captum_concepts">'
#: Placeholder of the cards; no text can contain it, because control characters are replaced.
_MARK = "\0"
_BLOCK = 1 << 20


def report(
    source: ConceptExplanation | Iterable[ConceptExplanation] | ConceptExplainer,
    images: Any,
    path: str | os.PathLike[str],
    *,
    title: str = "Concept explanations",
    target: Any = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 32,
    labels: Iterable[int | str] | None = None,
    image_names: Iterable[str] | None = None,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    top_k: int = 8,
    rank_by: str | None = None,
    significant: Any = None,
    crop: Any = None,
    settings: Mapping[str, Any] | None = None,
    explorer: Any = None,
    images_per_page: int | None = PER_PAGE,
    scale: str = "row",
    alpha: float = ALPHA,
    cmap: Any = None,
    signed: bool | str = "auto",
    mode: str = "bicubic",
    show_progress: bool = False,
) -> Path:
    """Write a standalone HTML report of each image's own concepts with score, map and signed contribution.

    The page opens from disk and needs neither network nor scripts. Pointing at a concept, tapping it or selecting it by
    keyboard shows its map over the input. Images can be filtered by class, concept and agreement with the true label.
    The page has light and dark modes and works on phones, on paper and with screen readers. It is written image by
    image, so memory does not grow with their number. Twenty images of up to eight concepts take less than 5 MB. More
    than 200 images are split into several files: ``report.html`` contains the summary and an index of all images, which
    the filters also apply to, and links to ``report.2.html`` and so on.

    Args:
        source: the explanation of N images; an iterable of explanations, which is consumed one by one; or an explainer
            (one of the methods), which explains the images in batches.
        images: the explained images in the same order: a tensor ``(N, 3, H, W)``, a list or a generator of images or
            batches, as in :func:`overlay`, or a single image for one example. RGB in [0, 1] or uint8, before the
            network's normalization. For an explainer, anything that :func:`~captum_concepts.images.inputs_for` accepts
            (folders, files, PIL images, loaders; float tensors are the model's inputs).
        path: where to write; an existing file is replaced atomically.
        title: title of the page.
        target: for an explainer, the output to explain, or one per image; None: the predicted one.
        transform: for an explainer, computes the model's inputs from a batch of images in [0, 1], such as its
            normalization; None: the explainer's own preprocessing.
        batch_size: for an explainer, images per batch.
        labels: true class of each image, by index or name; None: for an explainer, those of class folders or data sets.
        image_names: one per image, such as file names; None: those of the files, or the explanation's own.
        class_names: names of the targets, by index; None: the explanation's own.
        top_k: concepts per image.
        rank_by: ``"scores"``, ``"contributions"`` (by magnitude), or None for the explanation's own order.
        significant: as in :func:`panel`, in the order of the concepts of ``source``; where False, the concept is pale
            and labeled "not encoded here".
        crop: the part of the photograph that the model saw, ``(x0, y0, x1, y1)`` in pixels, for all images.
        settings: settings of the run to show in a table; nested mappings become sections. Versions, method, layers and
            a fingerprint of each input's pixels are added.
        explorer: result of :func:`explore`, written next to the report as ``NAME.explorer.html`` and linked by a
            button.
        images_per_page: images per file; None: all.
        scale: ``"row"``: the maps of an image share one color scale, so their strengths are comparable; ``"map"``: each
            has its own.
        alpha, cmap, signed, mode: as in :func:`panel`.
        show_progress: show a tqdm bar.

    Returns:
        The path.

    Raises:
        InputError: the numbers of images or names differ from that of examples, there is nothing to show, or an option
            is unknown.
        FileNotFoundError: the folder does not exist.

    Warns:
        InputWarning: maps contain NaN or infinite values; images are not in [0, 1].

    Example:
        >>> e = ConceptExplanation(["sand", "grass"], torch.rand(2, 2), torch.rand(2, 2, 7, 7), torch.randn(2, 2))
        >>> folder = Path(tempfile.mkdtemp())
        >>> path = report(e, torch.rand(2, 3, 32, 32), folder / "report.html", title="On the beach")
        >>> path.stat().st_size < 200_000
        True
    """
    if isinstance(images, ConceptExplanation):
        raise InputError("pass the explanation first: report(explanation, images, path)")
    writer = ReportWriter(
        path, title=title, class_names=class_names, top_k=top_k, rank_by=rank_by, settings=settings,
        images_per_page=images_per_page, scale=scale, alpha=alpha, cmap=cmap, signed=signed, mode=mode,
    )  # fmt: skip
    total = len(source) if isinstance(source, ConceptExplanation) else None
    rows: Iterable[tuple[Any, Any, dict[str, Any]]]
    if isinstance(source, ConceptExplainer):
        how = {"top_k": top_k, **({} if rank_by is None else {"rank_by": rank_by})}
        images = source_of(source, images, transform)
        total = None if images.streamed or images.skip_broken else len(images)  # else unknown
        flags = _by_name(significant, source.concepts, 1)[0]
        explained = _explained(source, images, target, transform, integer("batch_size", batch_size), how)
        rows = ((example, picture, {**found, "significant": flags}) for example, picture, found in explained)
    else:
        pairs = zip_longest(_examples(source, significant), each_image(images), fillvalue=_NOTHING)
        rows = ((_NOTHING, picture, {}) if pair is _NOTHING else (pair[0], picture, {"significant": pair[1]})
                for pair, picture in pairs)  # fmt: skip
    if isinstance(source, ConceptExplanation):
        writer.fix_scheme([source])
    if hasattr(source, "decision_rules"):
        writer.add_rules(source)
    said = getattr(source, "trust", "")
    writer.trust = said if isinstance(said, str) else ""
    if explorer is not None:
        page = explorer.save(writer.path.with_name(f"{writer.path.stem}.explorer.html"))
        writer.explorer = quote(os.fsencode(page.name))
    with writer:
        names = None if image_names is None else iter(each_of("image_names", image_names))
        truths = None if labels is None else iter(each_of("labels", labels))
        for i, (example, picture, found) in enumerate(_progress(rows, total, show_progress)):
            if example is _NOTHING or picture is _NOTHING:
                raise InputError(f"{'more' if example is _NOTHING else 'fewer'} images than explained examples ({i})")
            given = {"name": _next(names, "image_names", i), "label": _next(truths, "labels", i)}
            own = {**found, **{key: value for key, value in given.items() if value is not None}}
            writer.add(example, [picture], crop=crop, **own)
        for what, left in (("image_names", names), ("labels", truths)):
            if left is not None and next(left, _NOTHING) is not _NOTHING:
                raise InputError(f"more {what} than examples ({len(writer)})")
    return writer.path


def _next(values: Iterator[Any] | None, what: str, i: int) -> Any:
    value = None if values is None else next(values, _NOTHING)
    if value is _NOTHING:
        raise InputError(f"fewer {what} than examples ({i})")
    return value


def _by_name(significant: Any, concepts: Sequence[str], n: int) -> list[dict[str, bool]]:
    """The flags of each of n images by concept, because an image's own concepts have another order."""
    return [dict(zip(concepts, row, strict=True)) for row in significance(significant, concepts, n).tolist()]


def _examples(explanations: Any, significant: Any) -> Iterator[tuple[ConceptExplanation, dict[str, bool]]]:
    """Iterate over explanations of one image and their flags."""
    if not isinstance(explanations, Iterable):
        raise InputError(
            "source must be a ConceptExplanation, an iterable of them or an explainer, "
            f"got {type(explanations).__name__}"
        )
    for one in [explanations] if isinstance(explanations, ConceptExplanation) else explanations:
        if not isinstance(one, ConceptExplanation):
            raise InputError(f"source must contain ConceptExplanation, got {type(one).__name__}")
        flags = _by_name(significant, one.concepts, len(one))
        for i in range(len(one)):
            own = one[i]  # with its own concepts; without any, the card shows the image and says so
            yield own if own.concepts else one[i, :], flags[i]


def _explained(
    explainer: ConceptExplainer, images: Any, target: Any, transform: Any, batch_size: int, how: dict[str, Any]
) -> Iterator[tuple[ConceptExplanation, Any, dict[str, Any]]]:
    """Iterate over explanation, image, and name and label; a batch is explained when its first image is requested."""
    start = 0
    for batch in shown_batches(explainer, images, batch_size, transform):
        own = targets_of(target, slice(start, start + len(batch.pictures)))
        explained = explainer.explain(batch.inputs, own, **how).to("cpu")
        for i, (one, picture) in enumerate(zip(explained, batch.pictures, strict=True)):
            found = {"name": batch.names and batch.names[i], "label": batch.labels[i] if batch.labels else None}
            yield one, picture, found
        start += len(batch.pictures)
    check_targets(target, start)


def _progress(pairs: Iterable[Any], total: int | None, show: bool) -> Iterable[Any]:
    if not show:
        return pairs
    from tqdm.auto import tqdm

    return tqdm(pairs, desc="report", unit="image", total=total)


class ReportWriter:
    """A report that is written image by image and keeps only the current image in memory.

    The file appears atomically when the report is finished, after its further pages. As a context manager, the writer
    finishes at the end of the ``with`` block, and if the block raises, it leaves an older file unchanged; call
    :meth:`finish` yourself to keep what was added.

    Args:
        path, title, class_names, top_k, rank_by, settings, images_per_page, scale, alpha, cmap, signed, mode: see
            :func:`report`. ``signed="auto"`` switches to the diverging color scheme at the first explanation in which
            negative values matter.

    Attributes:
        trust: a sentence below the title on how reliable the concepts' names are.
        explorer: address of an explorer's page, for a button.

    Raises:
        InputError: an unknown option.
        FileNotFoundError: the folder of ``path`` does not exist.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> with ReportWriter(folder / "report.html", title="Two scenes") as writer:
        ...     for name in ("first", "second"):
        ...         e = ConceptExplanation(["sand", "grass"], torch.rand(1, 2), torch.rand(1, 2, 7, 7))
        ...         writer.add(e, torch.rand(3, 32, 32), name=name)
        >>> (folder / "report.html").read_text(encoding="utf-8").count("<article")
        2
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        title: str = "Concept explanations",
        class_names: Sequence[str] | Mapping[int, str] | None = None,
        top_k: int = 8,
        rank_by: str | None = None,
        settings: Mapping[str, Any] | None = None,
        images_per_page: int | None = PER_PAGE,
        scale: str = "row",
        alpha: float = ALPHA,
        cmap: Any = None,
        signed: bool | str = "auto",
        mode: str = "bicubic",
    ) -> None:
        self.top_k = integer("top_k", top_k)
        self.rank_by = one_of("rank_by", rank_by, (*RANKINGS, None))
        self.images_per_page = None if images_per_page is None else integer("images_per_page", images_per_page)
        self.scale = one_of("scale", scale, ("row", "map"))
        self.alpha = number("alpha", alpha, lambda a: 0 <= a <= 1, "in [0, 1]")
        self.mode = one_of("mode", mode, MODES)
        ColorScale.of([], signed, cmap=cmap).colormap()
        if settings is not None and not isinstance(settings, Mapping):
            raise InputError(f"settings must be a mapping of names to values, got {type(settings).__name__}")
        self.path = Path(path)
        check_destination(self.path)
        self.title, self.class_names, self.cmap, self.signed = title, class_names, cmap, signed
        self.settings = dict(settings or {})
        # Cards are buffered because the content above them is known last; the system always removes this file.
        self._cards: IO[bytes] | None = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115
        self._known = _Known()
        self._starts: list[int] = []
        self._failed: list[tuple[str, str]] = []
        self._rules: tuple[Any, Any] | None = None
        self._warned = False  # about labels that no output is named by
        self.explorer: str | None = None
        self.trust = ""

    def __len__(self) -> int:
        """Number of images so far."""
        return len(self._known.index)

    def __enter__(self) -> ReportWriter:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.finish()
        else:
            self.discard()

    def add(
        self,
        explanation: ConceptExplanation,
        images: Any,
        *,
        name: str | None = None,
        label: int | str | None = None,
        significant: Any = None,
        crop: Any = None,
        points: Any = None,
        boxes: Any = None,
        mask: Any = None,
    ) -> None:
        """Add the N examples of one explanation.

        Args:
            explanation: an explanation of these images.
            images: N images as in :func:`panel`, or a single image for one example.
            name: heading of the card, followed by a number if there are several examples; None: the explanation's own.
            label: true class of the image, by index or name; only for a single example.
            significant: as in :func:`panel`; where False, the concept is pale, without a map.
            crop, points, boxes, mask: as in :func:`panel`.

        Raises:
            InputError: the numbers of images and examples differ, there is no concept, or the report is finished.

        Warns:
            InputWarning: maps contain NaN or infinite values, which are left uncolored.
        """
        if self._cards is None:
            raise InputError(f"the report {self.path} is finished, so no example can be added")
        explanation = check_explanation("add", explanation, images).to("cpu")
        n, t = len(explanation), len(explanation.concepts)
        if not t:
            raise InputError("nothing to show: the explanation has no concepts")
        if label is not None and n != 1:
            raise InputError(f"a label applies to one image, but the explanation has {n}; add them one by one")
        pictures = as_images(images, n)
        flags = significance(significant, explanation.concepts, n)
        self.fix_scheme([explanation])
        sizes = [(p.shape[1], p.shape[2]) for p in pictures]
        regions = outlines(sizes, (explanation.maps.shape[2], explanation.maps.shape[3]), points, boxes, mask)
        crops = [None] * n if crop is None else crop_boxes(crop, sizes)
        for i, picture in enumerate(pictures):
            one, states = ordered(explanation, i, flags[i], self.rank_by, self.top_k)
            own = f"image {len(self) + 1}" if one.image_names is None else one.image_names[0]
            if name is not None:
                own = name if n == 1 else f"{name} ({i + 1})"
            card = self._card(picture, one, states, own, label)
            card.region = " ".join(f"M{x0:.6g} {y0:.6g}L{x1:.6g} {y1:.6g}" for x0, y0, x1, y1 in regions[i])
            if crops[i] is not None:
                card.crop = crops[i]
                card.rows = [
                    replace(row, place=f"{row.place}, of the part that the model received") for row in card.rows
                ]
            if not len(self) or (self.images_per_page and len(self) % self.images_per_page == 0):
                self._starts.append(self._cards.tell())
            self._known.note(card, picture, one)
            with naming(self.path):
                self._cards.write(template("report/card.html").render(card=card, index=len(self)).encode())

    def fix_scheme(self, explanations: Iterable[ConceptExplanation]) -> None:
        """Use the diverging color scheme from here on if negative values matter in any map of ``explanations``."""
        if self.signed == "auto":
            groups = (m.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).float() for e in explanations for m in e.maps)
            self.signed = True if schemes(groups) else "auto"

    def add_failure(self, name: str, reason: str) -> None:
        """List an image that could not be explained."""
        self._failed.append((str(name), str(reason)))

    def add_rules(self, model: Any, classes: Any = None) -> None:
        """Show the decision rules of classes as the diagram of :func:`sankey` and as a table.

        Args:
            model: a SALFCBM, or any model that :func:`sankey` accepts.
            classes: names or indices; None: the most frequently explained classes, at most 8.
        """
        self._rules = (model, classes)

    def finish(self) -> Path:
        """Write the file, after which nothing can be added.

        Returns:
            The path.

        Raises:
            InputError: there is neither an image nor a failure to report, or the report is already finished.
        """
        if self._cards is None:
            raise InputError(f"the report {self.path} is finished already")
        if not (self._known.index or self._failed):
            self.discard()
            raise InputError(f"nothing to report: no example was added to {self.path}")
        paths = self._paths()
        pages = [_Page(k, quote(os.fsencode(path.name)), *self._span(k)) for k, path in enumerate(paths)]
        links = [
            f"{'' if page is pages[0] else page.file}#e{i + 1}" for page in pages for i in range(page.first, page.stop)
        ]
        shown = {
            "title": self.title,
            "css": asset("report/report.css"),
            "mark": Markup(_MARK),
            "known": self._known,
            "summary": self._known.summary(),
            "class_filter": self._known.filter(self._known.by_class),
            "concept_filter": self._known.filter(self._known.by_concept),
            "failed": self._failed,
            "rules": self._drawn_rules(),
            "explorer": self.explorer,
            "trust": self.trust,
            "facts_of_run": self._facts(),
            "pages": pages,
            "links": links,
        }
        try:
            with naming(self.path):
                ends = [*self._starts[1:], self._cards.seek(0, os.SEEK_END)]
            for page, path in reversed(list(zip(pages, paths, strict=True))):  # the first last: it links to the others
                before, after = template("report/page.html").render(**shown, page=page).split(_MARK)
                start = self._starts[page.number] if self._starts else 0
                _write(path, before, self._cards, (start, ends[page.number]), after)
        finally:
            self.discard()
        return self.path

    def _span(self, page: int) -> tuple[int, int]:
        """First and last (exclusive) image of a page."""
        size = self.images_per_page or len(self)
        return page * size, min((page + 1) * size, len(self))

    def _paths(self) -> list[Path]:
        """Files of the pages; files that this package did not write are never replaced, except ``path`` itself."""
        found = [self.path]
        for k in range(2, len(self._starts) + 1):
            names = (f"{self.path.stem}.{k}{'' if j == 1 else f'-{j}'}{self.path.suffix}" for j in count(1))
            found.append(next(path for name in names if _free(path := self.path.with_name(name))))
        return found

    def discard(self) -> None:
        """Discard the report; no file is written, and an older one is unchanged."""
        if self._cards is not None:
            with suppress(OSError):  # closing flushes, which fails on a full disk
                self._cards.close()
            self._cards = None

    def _card(self, picture: Tensor, shown: ConceptExplanation, states: list[str], name: str, label: Any) -> Card:
        maps = shown.maps[0].float()
        drawn = [m for m, state in zip(maps, states, strict=True) if state != NOT_ENCODED]
        if not all(bool(m.isfinite().all()) for m in drawn):
            warnings.warn("maps contain NaN or infinite values; they are left uncolored", InputWarning, stacklevel=3)
        signed = self.signed is True
        scale = ColorScale.of(drawn, signed, cmap=self.cmap)
        target = class_of(shown, self.class_names)
        scores = shown.scores[0].float().tolist()
        how = None if shown.contributions is None else shown.contributions[0].float().tolist()
        counted = [state != NOT_ENCODED for state in states]
        score_end = bar_end(scores, counted)
        how_end = bar_end(how or [], counted)
        rows = []
        for k, (concept, state) in enumerate(zip(shown.concepts, states, strict=True)):
            own = ColorScale.of(maps[k], signed, cmap=self.cmap) if self.scale == "map" else scale
            encoded = state != NOT_ENCODED
            layer = "" if isinstance(shown.layer, str) else shown.layer[0][k]
            detail = [state, layer if encoded else "", absence(shown, k, target or "the output") if encoded else ""]
            rows.append(
                ConceptRow(
                    concept,
                    " · ".join(filter(None, detail)),
                    state,
                    bar(scores[k], score_end, encoded, min(scores) < 0),
                    None if how is None else bar(how[k], how_end, encoded, True),
                    place_in_words(maps[k]),
                    map_picture(maps[k], own, self.alpha, self.mode) if encoded else None,
                )
            )
        true = None if label is None else TrueClass.of(label, self.class_names or shown.class_names)
        verdict = "" if true is None or shown.target is None else true.verdict(int(shown.target))
        if true is not None and shown.target is not None and not verdict and not self._warned:
            self._warned = True
            warn_of_unknown_class(true)
        sure = None if shown.target_probability is None else in_words(float(shown.target_probability))
        return Card(
            name, target, sure, None if true is None else true.name, verdict, photo(picture), rows,
            tuple(picture.shape[2:0:-1]),
            (in_words(scale.low), in_words(scale.high)), gradient(scale), self.scale == "row",
            shown.score_unit, shown.contribution_unit, in_words(score_end), in_words(how_end),
        )  # fmt: skip

    def _drawn_rules(self) -> dict[str, Any] | None:
        """Rules of the selected classes, and their diagram."""
        if self._rules is None:
            return None
        model, classes = self._rules
        if classes is None:
            known = list(model.class_names or [])
            often = [name for name, _ in self._known.by_class.most_common(8)]
            classes = [name for name in often if name in known] or list(range(min(model.num_classes, 8)))
        rules = class_rules(model, classes, 6)
        if not any(rules.values()):
            return None
        shown = {name: [(c, in_words(w, sign=True)) for c, w in rule] for name, rule in rules.items()}
        return {"classes": shown, "picture": figure_uri(sankey(model, classes, top_k=6))}

    def _facts(self) -> dict[str, Any]:
        seen = self._known.seen
        own = {
            "images": len(self),
            "not explained": len(self._failed) or None,
            "method": list(seen["method"]),
            "layer": list(seen["layer"]),
            "grid of the maps": list(seen["maps"]),
            "scores": list(seen["score unit"]),
            "contributions": list(seen["contribution unit"]),
            "concepts shown per image": f"up to {self.top_k}"
            + (f", ranked by {self.rank_by}" if self.rank_by else ", in the explanation's own order"),
            "color scale": "one for all maps of an image" if self.scale == "row" else "one for each map",
            "captum_concepts": __version__,
            "torch": torch.__version__,
            "Python": platform.python_version(),
        }
        return {**self.settings, "Report": {key: value for key, value in own.items() if value}}


@dataclass(frozen=True)
class _Page:
    """One file of a report, with images ``first`` to ``stop - 1``, counted from 0, and its name ``file`` in a link."""

    number: int
    file: str
    first: int
    stop: int


def _free(path: Path) -> bool:
    """Whether a page may be written to ``path``, because it does not exist or is an older page of this package."""
    try:
        with path.open("rb") as file:
            return _OURS in file.read(2_000)
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _write(path: Path, before: str, cards: IO[bytes], part: tuple[int, int], after: str) -> None:
    """Write one page atomically, copying its cards in blocks."""
    with replacing(path) as file:
        file.write(before.encode(errors="backslashreplace"))
        cards.seek(part[0])
        for start in range(*part, _BLOCK):
            file.write(cards.read(min(_BLOCK, part[1] - start)))
        file.write(after.encode(errors="backslashreplace"))


@dataclass(frozen=True)
class Bar:
    """A number and its bar of ``width`` from ``start``, in percent of the axis."""

    text: str
    start: float
    width: float
    sign: str
    middle: bool


@dataclass(frozen=True)
class ConceptRow:
    """One concept of one image; ``overlay`` is its map, or None if the layer does not encode it."""

    name: str
    detail: str
    state: str
    score: Bar
    contribution: Bar | None
    place: str
    overlay: Picture | None

    @property
    def pale(self) -> bool:
        """Whether it is not seen or not encoded."""
        return bool(self.state)

    @property
    def alt(self) -> str:
        """Text alternative of the map."""
        return f"Map of {self.name}: {NOT_ENCODED if self.overlay is None else self.place}"


@dataclass
class Card:
    """Contents of the card of one image."""

    name: str
    target: str | None
    probability: str | None
    truth: str | None
    verdict: str
    picture: Picture
    rows: Sequence[ConceptRow]
    size: tuple[int, ...]
    ends: tuple[str, str]
    ramp: str
    shared: bool
    score_unit: str
    contribution_unit: str
    score_end: str
    contribution_end: str
    region: str = ""
    crop: tuple[float, float, float, float] | None = None
    class_index: int = -1
    concept_indices: list[int] = field(default_factory=list)

    @property
    def marks(self) -> str:
        """CSS classes that the filters select."""
        return " ".join(filter(None, [self.verdict, f"k{self.class_index}", *(f"t{t}" for t in self.concept_indices)]))

    @property
    def how(self) -> bool:
        """Whether there are contributions."""
        return any(row.contribution is not None for row in self.rows)


def bar_end(values: Sequence[float], counted: Sequence[bool]) -> float:
    """Axis limit of an image's bars, a round number at or just above the largest magnitude."""
    return round_up(max((abs(v) for v, yes in zip(values, counted) if yes and math.isfinite(v)), default=0.0))  # noqa: B905


def bar(value: float, end: float, encoded: bool, middle: bool) -> Bar:
    """A number with its bar; with ``middle``, zero is in the middle of the axis."""
    text = in_words(value, sign=middle) if encoded else "–"
    length = min(abs(value) / end, 1.0) if encoded and math.isfinite(value) else 0.0
    width = 100 * length / (2 if middle else 1)
    start = (50.0 if value >= 0 else 50.0 - width) if middle else 0.0
    return Bar(text, start, width, "for" if value >= 0 else "against", middle)


@dataclass
class _Known:
    """Counts and names for the head and foot of the page, a few bytes per image."""

    index: list[tuple[str, str, str, str]] = field(default_factory=list)
    images: list[tuple[str, str, str]] = field(default_factory=list)
    seen: dict[str, dict[str, None]] = field(
        default_factory=lambda: {part: {} for part in ("method", "layer", "maps", "score unit", "contribution unit")}
    )
    numbers: dict[str, int] = field(default_factory=dict)
    by_class: Counter[str] = field(default_factory=Counter)
    by_concept: Counter[str] = field(default_factory=Counter)
    first: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[tuple[str, str]] = field(default_factory=Counter)
    most: int = 0
    how: bool = False

    def note(self, card: Card, picture: Tensor, one: ConceptExplanation) -> None:
        best = f"{card.rows[0].name} {card.rows[0].score.text}" if card.rows else NONE_SELECTED
        said = [card.target or "", best]
        pixels = (picture * 255).round().byte().contiguous()
        digest = hashlib.sha256(str(tuple(pixels.shape)).encode() + pixels.numpy().tobytes()).hexdigest()[:32]
        self.images.append((card.name, f"{picture.shape[2]} x {picture.shape[1]}", digest))
        layers = [one.layer] if isinstance(one.layer, str) else [layer for row in one.layer for layer in row]
        size = f"{one.maps.shape[2]} x {one.maps.shape[3]}"
        units = (one.score_unit, one.contribution_unit)
        for part, values in zip(self.seen.values(), ([one.method], layers, [size], *([u] for u in units)), strict=True):
            part.update(dict.fromkeys(filter(None, values)))
        card.concept_indices = [self._number(row.name) for row in card.rows if not row.pale]
        if card.target is not None:
            card.class_index = self._number(card.target)
            self.by_class[card.target] += 1
            self.verdicts[card.target, card.verdict] += 1
        self.index.append((card.name, " · ".join(filter(None, said)), card.verdict, card.marks))
        shown = [row.name for row in card.rows if not row.pale]
        self.by_concept.update(shown)
        self.first.update(shown[:1])
        self.most, self.how = max(self.most, len(card.rows)), self.how or card.how

    def _number(self, name: str) -> int:
        """A number for each name of a class or concept, used in the CSS classes of the filters."""
        return self.numbers.setdefault(name, len(self.numbers))

    def filter(self, names: Counter[str]) -> list[tuple[str, int]]:
        """The most frequent names with their numbers, in alphabetical order."""
        return [(name, self.numbers[name]) for name in sorted(name for name, _ in names.most_common(_FILTERS))]

    def summary(self) -> dict[str, Any]:
        """Summary above the cards."""
        layers = list(self.seen["layer"])
        said = [f"layer {layers[0]}"] if len(layers) == 1 else [f"{len(layers)} layers"] * bool(layers)
        judged = sum(count for (_, verdict), count in self.verdicts.items() if verdict)
        wrong = sum(count for (_, verdict), count in self.verdicts.items() if verdict == "wrong")
        return {
            "line": " · ".join([f"{len(self.index)} image{'s' * (len(self.index) != 1)}", *self.seen["method"], *said]),
            "judged": judged,
            "wrong": wrong,
            "classes": [(name, count, self.verdicts[name, "wrong"]) for name, count in self.by_class.most_common(8)],
            "concepts": [(name, count, self.first[name]) for name, count in self.by_concept.most_common(8)],
        }
