"""A report of any length, written one image after another."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from captum_concepts import __version__
from captum_concepts.errors import InputError, InputWarning
from captum_concepts.explanation import ConceptExplanation
from captum_concepts.visualization._parts import NOT_ENCODED, round_up
from captum_concepts.visualization._report_page import ConceptRow, Example, card, page_foot, page_head
from captum_concepts.visualization._report_pictures import (
    gradient,
    input_picture,
    map_picture,
    place_in_words,
    thumbnail,
)
from captum_concepts.visualization._text import number
from captum_concepts.visualization.overlay import as_image
from captum_concepts.visualization.panels import _class_name, _flags
from captum_concepts.visualization.scale import ColorScale


class ReportWriter:
    """A report written image by image: only the current one is in memory, so any number of images can pass.

    The file appears when the report is finished, whole or not at all. As a context manager it finishes at the end of
    the ``with`` block, and leaves an older file untouched where the block raises; call :meth:`finish` yourself to keep
    what was done.

    Args:
        path, title, class_names, top_k, by, settings, scale, alpha, cmap, signed, mode: see :func:`report`.

    Raises:
        InputError: an option that does not exist.
        FileNotFoundError: the folder of ``path`` does not exist.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> with ReportWriter(folder / "report.html", title="Two scenes") as writer:
        ...     for name in ("first", "second"):
        ...         e = ConceptExplanation(["sand", "grass"], torch.rand(1, 2), torch.rand(1, 2, 7, 7))
        ...         writer.add(torch.rand(3, 32, 32), e, title=name)
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
        by: str | None = "scores",
        settings: Mapping[str, Any] | None = None,
        scale: str = "row",
        alpha: float = 0.55,
        cmap: Any = None,
        signed: bool | str = "auto",
        mode: str = "bicubic",
    ) -> None:
        if not hasattr(top_k, "__index__") or isinstance(top_k, bool) or top_k < 1:
            raise InputError(f"top_k must be an integer of at least 1, got {top_k!r}")
        if by not in ("scores", "contributions", None):
            raise InputError(f"by must be 'scores', 'contributions' or None, got {by!r}")
        if scale not in ("row", "map"):
            raise InputError(f"scale must be 'row' or 'map', got {scale!r}")
        if not 0 <= alpha <= 1:
            raise InputError(f"alpha must be in [0, 1], got {alpha}")
        if settings is not None and not isinstance(settings, Mapping):
            raise InputError(f"settings must be a mapping of names to values, got {type(settings).__name__}")
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"no folder {self.path.parent} to write {self.path.name} into")
        self.title, self.class_names, self.top_k, self.by = title, class_names, top_k, by
        self.settings = dict(settings or {})
        self.scale, self.alpha, self.cmap, self.signed, self.mode = scale, alpha, cmap, signed, mode
        # The cards wait here, because what is above them is known last; the system removes this file whatever happens.
        self._cards: IO[bytes] | None = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115
        self._index: list[tuple[str, str]] = []
        self._images: list[tuple[str, str, str]] = []
        self._failed: list[tuple[str, str]] = []
        self._seen: dict[str, dict[str, None]] = {"method": {}, "layer": {}, "maps": {}}
        self._most, self._score, self._contribution, self._how = 0, 0.0, 0.0, False

    def __len__(self) -> int:
        """Images so far."""
        return len(self._index)

    def __enter__(self) -> ReportWriter:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.finish()
        else:
            self.discard()

    def add(
        self, images: Any, explanation: ConceptExplanation, *, title: str | None = None, significant: Any = None
    ) -> None:
        """Add the N examples of one explanation.

        Args:
            images: N images as for :func:`panel`, or one where there is one example.
            explanation: of these images.
            title: over the card; with several examples, one for all with their number behind it.
            significant: ``(T,)`` or ``(N, T)`` bool; False draws the concept pale, without a region.

        Raises:
            InputError: other numbers of images than examples, no concept, or the report is finished.

        Warns:
            InputWarning: maps hold NaN or infinite values, which are left uncoloured.
        """
        if self._cards is None:
            raise InputError(f"the report {self.path} is finished; nothing can be added")
        n, t = len(explanation), len(explanation.concepts)
        if not t:
            raise InputError("nothing to show: the explanation has no concepts")
        single = hasattr(images, "convert") or (getattr(images, "ndim", 4) in (2, 3) and n == 1)
        pictures = [images] if single else list(images)
        if len(pictures) != n:
            raise InputError(f"{len(pictures)} images for an explanation of {n} examples")
        flags = _flags(significant, n, t)
        for i, one in enumerate(explanation.to("cpu")):
            own = f"image {len(self) + 1}" if title is None else title if n == 1 else f"{title} ({i + 1})"
            self._add_one(self._cards, as_image(pictures[i]), one, own, flags[i])

    def add_failure(self, name: str, reason: str) -> None:
        """List an image that could not be explained."""
        self._failed.append((str(name), str(reason)))

    def finish(self) -> Path:
        """Write the file; afterwards nothing can be added.

        Returns:
            The path written.

        Raises:
            InputError: there is neither an image nor a failure to report, or the report is finished already.
        """
        if self._cards is None:
            raise InputError(f"the report {self.path} is finished already")
        if not (self._index or self._failed):
            self.discard()
            raise InputError(f"nothing to report: no example was added to {self.path}")
        ends = (self._score or 1.0, round_up(self._contribution))
        methods, layers = (list(self._seen[part]) for part in ("method", "layer"))
        said = [] if not layers else [f"layer {layers[0]}"] if len(layers) == 1 else [f"{len(layers)} layers"]
        summary = " · ".join([f"{len(self)} image{'s' * (len(self) != 1)}", *methods, *said])
        head = page_head(self.title, summary, self._index, most=self._most, ends=ends, how=self._how)
        foot = page_foot(self._facts(), self._images, self._failed)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.{threading.get_ident()}.partial")
        try:
            with partial.open("wb") as file:
                file.write(head.encode())
                self._cards.seek(0)
                shutil.copyfileobj(self._cards, file)
                file.write(foot.encode())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path)
        finally:
            partial.unlink(missing_ok=True)
            self.discard()
        return self.path

    def discard(self) -> None:
        """Give up: no file is written, and an older one stays."""
        if self._cards is not None:
            self._cards.close()
            self._cards = None

    def _add_one(self, cards: IO[bytes], picture: Tensor, one: ConceptExplanation, title: str, flags: Tensor) -> None:
        order = one.top(len(one.concepts), by=self.by).concepts if self.by else list(one.concepts)
        order.sort(key=lambda concept: not flags[one.index(concept)])
        shown = one[order[: self.top_k]]
        encoded = [bool(flags[one.index(concept)]) for concept in shown.concepts]
        maps = shown.maps[0].float()
        drawn = [m for m, yes in zip(maps, encoded, strict=True) if yes]
        if not all(bool(m.isfinite().all()) for m in drawn):
            warnings.warn("maps hold NaN or infinite values; they are left uncoloured", InputWarning, stacklevel=4)
        scale = ColorScale.of(drawn, self.signed, cmap=self.cmap)
        contributions = None if shown.contributions is None else shown.contributions[0].float().tolist()
        scores = shown.scores[0].float().tolist()
        layers = [""] * len(scores) if isinstance(shown.layer, str) else shown.layer[0]
        rows = []
        for k, concept in enumerate(shown.concepts):
            own = (
                scale if self.scale == "row" or not encoded[k] else ColorScale.of(maps[k], self.signed, cmap=self.cmap)
            )
            rows.append(
                ConceptRow(
                    concept,
                    layers[k] if encoded[k] else NOT_ENCODED,
                    encoded[k],
                    scores[k],
                    None if contributions is None else contributions[k],
                    place_in_words(maps[k]),
                    thumbnail(picture, maps[k] if encoded[k] else None, own, self.alpha, self.mode),
                    map_picture(maps[k], own, self.alpha, self.mode) if encoded[k] else None,
                )
            )
        target = None if one.target is None else _class_name(int(one.target), self.class_names)
        low, high, detail = number(scale.low), number(scale.high), "map values, one scale for this image"
        if self.scale == "map":
            low, high, detail = "low", "high", "each map has its own scale"
        example = Example(title, target, input_picture(picture), rows, low, high, gradient(scale), detail)
        cards.write(card(len(self) + 1, example).encode())
        self._note(picture, one, title, target, rows)

    def _note(
        self, picture: Tensor, one: ConceptExplanation, title: str, target: str | None, rows: Sequence[ConceptRow]
    ) -> None:
        """What the head and the foot of the page need of this example."""
        best = rows[0]
        self._index.append((title, " · ".join(filter(None, (target, f"{best.name} {number(best.score)}")))))
        pixels = (picture * 255).round().byte().contiguous()
        digest = hashlib.sha256(str(tuple(pixels.shape)).encode() + pixels.numpy().tobytes()).hexdigest()[:32]
        self._images.append((title, f"{picture.shape[2]} x {picture.shape[1]}", digest))
        self._seen["method"][one.method] = None
        names = [one.layer] if isinstance(one.layer, str) else [layer for row in one.layer for layer in row]
        self._seen["layer"].update(dict.fromkeys(names))
        self._seen["maps"][f"{one.maps.shape[2]} x {one.maps.shape[3]}"] = None
        for seen in self._seen.values():
            seen.pop("", None)
        self._most = max(self._most, len(rows))
        self._how = self._how or one.contributions is not None
        finite = torch.tensor([[r.score, r.contribution or 0.0] for r in rows if r.encoded] or [[0.0, 0.0]])
        finite = finite.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        self._score = max(self._score, float(finite[:, 0].max()))
        self._contribution = max(self._contribution, float(finite[:, 1].abs().max()))

    def _facts(self) -> dict[str, Any]:
        own = {
            "images": len(self),
            "not explained": len(self._failed) or None,
            "method": list(self._seen["method"]),
            "layer": list(self._seen["layer"]),
            "grid of the maps": list(self._seen["maps"]),
            "concepts shown an image": f"up to {self.top_k}"
            + (f", by {self.by}" if self.by else ", in their own order"),
            "colour scale": "one for the maps of an image" if self.scale == "row" else "one for each map",
            "captum_concepts": __version__,
            "torch": torch.__version__,
            "Python": platform.python_version(),
        }
        return {**self.settings, "Report": {key: value for key, value in own.items() if value}}
