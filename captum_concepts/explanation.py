"""`ConceptExplanation`, the result of all methods, and the protocols of explainers."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from captum_concepts._artifacts import Array, either, list_of, nothing_or, open_artifact, save_artifact, table, text
from captum_concepts._checks import integer, listed, name_positions, one_of, positions, unique_names
from captum_concepts.errors import InputError, did_you_mean

_FORMAT = "captum_concepts.ConceptExplanation/2"
#: Format 1 lacks the keys that have a default; the others have the same names.
_READABLE: dict[str, dict[str, str]] = {_FORMAT: {}, "captum_concepts.ConceptExplanation/1": {}}
_BY_CONCEPT = ("scores", "maps", "contributions", "presence", "selected")
_BY_IMAGE = ("target", "target_probability")
_TENSORS = (*_BY_CONCEPT, *_BY_IMAGE)
_REQUIRED = ("scores", "maps")
_WORDS = ("layer", "method", "class_names", "image_names", "score_unit", "contribution_unit", "rank_by")
RANKINGS = ("scores", "contributions")
_NAMES = list_of(text())
_SAVED_WORDS = table(
    {"concepts": _NAMES},
    {
        "layer": either(text(), list_of(_NAMES)),
        "method": text(),
        "class_names": nothing_or(_NAMES),
        "image_names": nothing_or(_NAMES),
        "score_unit": text(),
        "contribution_unit": text(),
        "rank_by": text("", *RANKINGS),
    },
)
_SAVED_TENSORS = {
    "scores": Array("float", ("N", "T")),
    "maps": Array("float", ("N", "T", None, None)),
    "contributions": Array("float", ("N", "T"), optional=True),
    "presence": Array("float", ("N", "T"), optional=True),
    "selected": Array("bool", ("N", "T"), optional=True),
    "target": Array("integer", ("N",), optional=True),
    "target_probability": Array("float", ("N",), optional=True),
}
#: A concept of lower presence is drawn as "not seen".
SEEN = 0.5


@runtime_checkable
class ConceptExplainer(Protocol):
    """Protocol of explainers, the four methods or your own, for report, evaluate, explore and audit_dataset."""

    concepts: Any

    def scores(self, inputs: Any) -> Tensor:
        """``(N, T)`` *what*: how strongly each concept is present."""
        ...

    def concept_maps(self, inputs: Any, concepts: Any = None) -> Tensor:
        """``(N, T, h, w)`` *where*: class-independent maps of ``concepts`` (names or indices; None: all)."""
        ...

    def explain(
        self,
        inputs: Any,
        target: Any = None,
        *,
        concepts: Any = None,
        top_k: int | None = 5,
        rank_by: str = "scores",
        contributions: bool = True,
    ) -> ConceptExplanation:
        """Explanation of the ``top_k`` concepts of each image (None: all), with the maps of :meth:`concept_maps`."""
        ...


@runtime_checkable
class ContributionExplainer(ConceptExplainer, Protocol):
    """A :class:`ConceptExplainer` that also reports *how much* each concept changes the output ``target``."""

    def contributions(self, inputs: Any, target: Any = None, concepts: Any = None) -> Tensor:
        """``(N, T)`` signed contributions to the model's output ``target`` (None: the predicted one)."""
        ...


@dataclass(frozen=True)
class Selection:
    """The concepts that an explanation contains, selected per image and therefore independent of the batch.

    Args:
        index: ``(N, k)`` indices among all T concepts of each image's own, strongest first.
        columns: the indices that occur in ``index``, strongest first, which are the concepts of the whole explanation.
        rank_by: the values that ranked them; empty if the caller named the concepts.

    >>> chosen = Selection.of(torch.tensor([[0.9, 0.1, 0.5], [0.0, 0.8, 0.1]]), top_k=1)
    >>> chosen.index.tolist(), chosen.columns, chosen.selected.tolist()
    ([[0], [1]], [0, 1], [[True, False], [False, True]])
    >>> chosen.spread(torch.tensor([[3.0], [4.0]]))
    tensor([[3., nan],
            [nan, 4.]])
    """

    index: Tensor
    columns: list[int]
    rank_by: str = ""

    @classmethod
    def of(cls, values: Tensor, top_k: int | None, rank_by: str = "scores") -> Selection:
        """The ``top_k`` of the ``(N, T)`` values of each image; contributions rank by magnitude, NaN last.

        Raises:
            InputError: ``top_k`` is not a positive integer or None.
        """
        n, t = values.shape
        k = t if top_k is None else min(integer("top_k", top_k), t)
        values = values.detach().float()
        values = values.abs() if rank_by == "contributions" else values
        # +inf ranks first, -inf after all finite values, and NaN last.
        known = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=torch.finfo(values.dtype).min)
        order = torch.argsort(known, dim=1, descending=True, stable=True)
        index = order[:, :k]
        best = known.amax(0) if n else known.new_zeros(t)
        ranked = torch.argsort(best, descending=True, stable=True).tolist()
        present = set(index.flatten().tolist()) if n else set(ranked[:k])
        return cls(index, [column for column in ranked if column in present], rank_by)

    @classmethod
    def named(cls, columns: Sequence[int], n: int) -> Selection:
        """The same ``columns`` for each of n images, in the caller's order."""
        return cls(torch.tensor(list(columns), dtype=torch.long).expand(n, -1), list(columns))

    @classmethod
    def choose(
        cls,
        names: Sequence[str],
        values: Tensor,
        *,
        concepts: Any = None,
        top_k: int | None = 5,
        rank_by: str = "scores",
    ) -> Selection:
        """``concepts`` if the caller names them, otherwise the ``top_k`` of ``values`` (see :meth:`of`)."""
        one_of("rank_by", rank_by, RANKINGS)
        if concepts is not None:
            return cls.named(name_positions(concepts, names), len(values))
        return cls.of(values, top_k, rank_by)

    @property
    def place(self) -> Tensor:
        """``(N, k)`` position in ``columns`` of each entry of ``index``."""
        size = max(self.columns, default=-1) + 1
        lookup = torch.zeros(size, dtype=torch.long)
        lookup[torch.tensor(self.columns, dtype=torch.long)] = torch.arange(len(self.columns))
        return lookup[self.index.cpu()]

    @property
    def selected(self) -> Tensor:
        """``(N, J)`` bool for the J ``columns``, whether the concept is one of the image's own."""
        flags = torch.zeros(len(self.index), len(self.columns), dtype=torch.bool)
        return flags.scatter_(1, self.place, True) if self.columns else flags

    def spread(self, values: Tensor) -> Tensor:
        """``(N, k, ...)`` values of ``index`` as ``(N, J, ...)`` for ``columns``, NaN where not selected."""
        n, k = self.index.shape
        wide = values.new_full((n, len(self.columns), *values.shape[2:]), torch.nan)
        rows = torch.arange(n, device=values.device)[:, None].expand(n, k)
        wide[rows, self.place.to(values.device)] = values
        return wide


@dataclass(frozen=True, eq=False)
class ConceptExplanation:
    r"""Concepts in N images: what was detected, where, and how much each concept changed the prediction.

    Args:
        concepts: the T unique names, the union of the concepts selected for the images.
        scores: ``(N, T)`` *what*, in ``score_unit``.
        maps: ``(N, T, h, w)`` *where*, on the grid of the explained layer.
        contributions: ``(N, T)`` signed, *how much* the concept changed the output ``target``, or None.
        target: ``(N,)`` index of the explained output, or None.
        layer: the name of the explained layer, or one name per (image, concept).
        method: the name of the method.
        presence: ``(N, T)`` *how sure*: calibrated probability in [0, 1] that the concept is present, or None.
        selected: ``(N, T)`` bool, the concepts of each image; None: all of them. Maps and contributions of the others
            are NaN.
        class_names: names of the model's outputs by index, or None.
        image_names: N names, such as file names, or None.
        target_probability: ``(N,)`` the model's probability of ``target``, or None.
        score_unit, contribution_unit: units such as ``"probability"`` or ``"logit"``; values in different units are not
            comparable.
        rank_by: the values that ranked each image's concepts (``"scores"`` or ``"contributions"``); empty if the caller
            named them. A single image indexed from a batch is sorted by them.
        pictures: thumbnails of the first images, ``(3, h, w)`` in uint8, for notebooks; they are not saved.

    Tensors are detached at construction and must be on one device. Instances are immutable, and every method returns a
    new one. Iterating, or an integer index, returns the explanation of one image with its own concepts, strongest
    first.

    Raises:
        InputError: a shape, dtype, device, range or name does not match the others.

    Example:
        >>> import torch
        >>> from captum_concepts import ConceptExplanation
        >>> e = ConceptExplanation(["stripes", "grass"], torch.tensor([[0.9, 0.2]]), torch.rand(1, 2, 7, 7))
        >>> e
        ConceptExplanation(1 image, 2 concepts, maps 7 x 7)
          0: stripes 0.9, grass 0.2
        >>> e.top(1).concepts, e[0, "grass"].maps.shape
        (['stripes'], torch.Size([1, 1, 7, 7]))
    """

    concepts: list[str]
    scores: Tensor
    maps: Tensor
    contributions: Tensor | None = None
    target: Tensor | None = None
    layer: str | tuple[tuple[str, ...], ...] = ""
    method: str = ""
    presence: Tensor | None = None
    selected: Tensor = None  # type: ignore[assignment]  # all of them, once constructed
    class_names: list[str] | None = None
    image_names: list[str] | None = None
    target_probability: Tensor | None = None
    score_unit: str = ""
    contribution_unit: str = ""
    rank_by: str = ""
    pictures: Sequence[Tensor | None] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "concepts", unique_names(self.concepts, "concept"))
        for name in _TENSORS:
            value = getattr(self, name)
            if value is None and name not in _REQUIRED:
                continue
            if not isinstance(value, Tensor):
                raise InputError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
            object.__setattr__(self, name, value.detach())
        self._check_tensors()
        n, t = self.scores.shape
        if self.selected is None:
            object.__setattr__(self, "selected", self.scores.new_ones(n, t, dtype=torch.bool))
        elif not bool(self.selected.all()):
            hidden = ~self.selected
            object.__setattr__(self, "maps", self.maps.masked_fill(hidden[:, :, None, None], torch.nan))
            if self.contributions is not None:
                object.__setattr__(self, "contributions", self.contributions.masked_fill(hidden, torch.nan))
        object.__setattr__(self, "pictures", list(self.pictures)[:n])
        for name in ("method", "score_unit", "contribution_unit"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name} must be a string, got {getattr(self, name)!r}")
        one_of("rank_by", self.rank_by, ("", *RANKINGS))
        self._check_names()
        self._check_layer()

    def _check_tensors(self) -> None:
        t = len(self.concepts)
        if self.scores.ndim != 2 or self.scores.shape[1] != t:
            raise InputError(f"scores must be (N, {t}) for {t} concepts, got {tuple(self.scores.shape)}")
        n = self.scores.shape[0]
        if self.maps.ndim != 4 or self.maps.shape[:2] != (n, t) or 0 in self.maps.shape[2:]:
            raise InputError(f"maps must be ({n}, {t}, h, w), got {tuple(self.maps.shape)}")
        for name in _TENSORS[2:]:
            value, shape = getattr(self, name), (n, t) if name in _BY_CONCEPT else (n,)
            if value is not None and tuple(value.shape) != shape:
                raise InputError(f"{name} must be {shape}, got {tuple(value.shape)}")
        for name in ("scores", "maps", "contributions", "presence", "target_probability"):
            value = getattr(self, name)
            if value is not None and not value.is_floating_point():
                raise InputError(f"{name} must be floating point, got {value.dtype}")
        if self.target is not None and (self.target.is_floating_point() or self.target.dtype == torch.bool):
            raise InputError(f"target must contain integer indices, got {self.target.dtype}")
        if self.selected is not None and self.selected.dtype != torch.bool:
            raise InputError(f"selected must be bool, got {self.selected.dtype}")
        devices = {str(v.device) for v in (getattr(self, name) for name in _TENSORS) if v is not None}
        if len(devices) > 1:
            raise InputError(f"all tensors must be on one device, got {sorted(devices)}; use .to(device)")
        for name in ("presence", "target_probability"):
            value = getattr(self, name)
            if value is not None and bool(((value < 0) | (value > 1)).any()):
                raise InputError(f"{name} must be probabilities in [0, 1], got {value.min():.3g} to {value.max():.3g}")

    def _check_names(self) -> None:
        for name, count in (("class_names", None), ("image_names", len(self))):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, str) or not all(isinstance(one, str) for one in value):
                raise InputError(f"{name} must be a list of strings, got {value!r}"[:300])
            if count is not None and len(value) != count:
                raise InputError(f"{len(value)} {name} for {count} images; pass one for each")
            object.__setattr__(self, name, list(value))
        if self.class_names is not None and self.target is not None and len(self):
            least, most = int(self.target.min()), int(self.target.max())
            if least < 0 or most >= len(self.class_names):
                wrong = least if least < 0 else most
                raise InputError(f"target {wrong} has no name among the {len(self.class_names)} class_names")

    def _check_layer(self) -> None:
        if isinstance(self.layer, str):
            return
        rows = list(self.layer) if isinstance(self.layer, Iterable) else [None]
        good = len(rows) == len(self) and all(
            isinstance(row, (list, tuple)) and len(row) == len(self.concepts) and all(isinstance(x, str) for x in row)
            for row in rows
        )
        if not good:
            wanted = f"one name or {len(self)} rows of {len(self.concepts)} names"
            raise InputError(f"layer must be {wanted}, got {self.layer!r}"[:300])
        object.__setattr__(self, "layer", tuple(tuple(row) for row in rows))

    def __len__(self) -> int:
        """Number of images N."""
        return int(self.scores.shape[0])

    def __iter__(self) -> Iterator[ConceptExplanation]:
        """Iterate over images, each with its own concepts, strongest first."""
        return (self[i] for i in range(len(self)))

    def index(self, concept: str | int) -> int:
        """Column of a concept, by name or (possibly negative) index."""
        t = len(self.concepts)
        if isinstance(concept, str):
            if concept not in self.concepts:
                hint = did_you_mean(concept, self.concepts)
                raise InputError(f"no concept {concept!r} among the {t} explained ones.{hint}")
            return self.concepts.index(concept)
        if isinstance(concept, (list, tuple, slice)):
            raise InputError(f"index takes one concept, got {concept!r}")
        return positions(concept, t, "concept")[0]

    def __getitem__(self, key: Any) -> ConceptExplanation:
        """Explanation of some images or concepts; both dimensions are always kept.

        ``e[i]`` is one image with its own concepts, and ``e[2:5]`` or ``e[mask]`` are images with the union of their
        concepts. ``e["stripes"]`` or ``e[["a", "b"]]`` are concepts, and ``e[i, "stripes"]`` is a concept of an image,
        selected or not.
        """
        if isinstance(key, tuple):
            if len(key) != 2:
                raise InputError(f"index an explanation with [images] or [images, concepts]; got {len(key)} indices")
            return self._columns(key[1])._rows(key[0])
        if isinstance(key, str) or (isinstance(key, list) and key and isinstance(key[0], str)):
            return self._columns(key)
        return self._rows(key)._own()

    def _rows(self, key: int | slice | Sequence[int] | Tensor) -> ConceptExplanation:
        rows = torch.tensor(positions(key, len(self), "image"), dtype=torch.long)
        layer = self.layer if isinstance(self.layer, str) else tuple(self.layer[i] for i in rows.tolist())
        names = None if self.image_names is None else [self.image_names[i] for i in rows.tolist()]
        device_rows = rows.to(self.scores.device)
        pick = {name: v[device_rows] for name in _TENSORS if (v := getattr(self, name)) is not None}
        pictures = [self.pictures[i] if i < len(self.pictures) else None for i in rows.tolist()]
        return dataclasses.replace(self, layer=layer, image_names=names, pictures=pictures, **pick)

    def _own(self) -> ConceptExplanation:
        """The explanation without concepts that no image selected; those of a single image are ranked."""
        kept = self.selected.any(0).nonzero().flatten().tolist() if len(self) else list(range(len(self.concepts)))
        if len(self) == 1 and self.rank_by and kept:
            values = self.scores if self.rank_by == "scores" or self.contributions is None else self.contributions
            order = Selection.of(values[:, kept], None, self.rank_by).index[0].tolist()
            kept = [kept[j] for j in order]
        return self if kept == list(range(len(self.concepts))) else self._columns(kept)

    def _columns(self, key: str | int | slice | Sequence[str | int]) -> ConceptExplanation:
        names = [key] if isinstance(key, str) else listed(key)
        if isinstance(names, list) and any(isinstance(name, str) for name in names):
            columns = [self.index(name) for name in names]
        else:
            columns = positions(key, len(self.concepts), "concept")
        layer = self.layer
        if not isinstance(layer, str):
            layer = tuple(tuple(row[j] for j in columns) for row in layer)
        pick = {name: v[:, columns] for name in _BY_CONCEPT if (v := getattr(self, name)) is not None}
        return dataclasses.replace(self, concepts=[self.concepts[j] for j in columns], layer=layer, **pick)

    def top(self, k: int, *, by: str = "scores") -> ConceptExplanation:
        """Explanation of each image's top ``k`` selected concepts, strongest first.

        Args:
            k: number of concepts per image; all if there are fewer.
            by: ``"scores"``, or ``"contributions"`` (by absolute value). NaN ranks last.
        """
        integer("k", k)
        one_of("by", by, RANKINGS)
        values = self.scores if by == "scores" else self.contributions
        if values is None:
            raise InputError("this explanation has no contributions to rank by; use by='scores'")
        chosen = Selection.of(values.float().masked_fill(~self.selected, torch.nan), k, by)
        fewer = self._columns(chosen.columns)
        own = fewer.selected & chosen.selected.to(fewer.selected.device)
        return dataclasses.replace(fewer, selected=own, rank_by=by)._own()

    def to(self, device: torch.device | str) -> ConceptExplanation:
        """The same explanation with its tensors on ``device``."""
        moved = {name: v.to(device) for name in _TENSORS if (v := getattr(self, name)) is not None}
        return dataclasses.replace(self, **moved)

    def class_name(self, target: int) -> str:
        """Name of an output, from ``class_names``, or ``class 3`` without them.

        >>> ConceptExplanation(["a"], torch.rand(1, 1), torch.rand(1, 1, 2, 2)).class_name(3)
        'class 3'
        """
        return f"class {target}" if self.class_names is None else self.class_names[target]

    def to_records(self) -> list[dict[str, Any]]:
        """One dictionary per image and concept of its own, strongest first (tidy long format).

        >>> ConceptExplanation(["a"], torch.ones(1, 1), torch.rand(1, 1, 2, 2)).to_records()
        [{'image': 0, 'concept': 'a', 'score': 1.0}]
        """
        records = []
        for i, one in enumerate(self):
            about: dict[str, Any] = {"image": i if self.image_names is None else self.image_names[i]}
            if one.target is not None:
                about["class"] = one.class_name(int(one.target))
            if one.target_probability is not None:
                about["class_probability"] = float(one.target_probability)
            for j, name in enumerate(one.concepts):
                record = {**about, "concept": name, "score": float(one.scores[0, j])}
                if one.presence is not None:
                    record["presence"] = float(one.presence[0, j])
                if one.contributions is not None:
                    record["contribution"] = float(one.contributions[0, j])
                if one.layer:
                    record["layer"] = one.layer if isinstance(one.layer, str) else one.layer[0][j]
                records.append(record)
        return records

    def to_frame(self) -> Any:
        """:meth:`to_records` as a ``pandas.DataFrame``; without pandas, as a dictionary of columns."""
        records = self.to_records()
        columns = {key: [record[key] for record in records] for key in (records[0] if records else {})}
        try:
            import pandas
        except ImportError:
            return columns
        return pandas.DataFrame(columns)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file atomically, with names and settings as JSON in its header.

        Returns:
            The path; ``ConceptExplanation.load`` restores the explanation exactly.
        """
        info = {"concepts": self.concepts, **{name: getattr(self, name) for name in _WORDS}}
        present = {n: v for n in _TENSORS if (v := getattr(self, n)) is not None}
        return save_artifact(path, _FORMAT, info, present)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> ConceptExplanation:
        """Explanation from a file written by :meth:`save`.

        Raises:
            FileNotFoundError: there is no such file.
            ArtifactError: the file is truncated, corrupt, or not a saved explanation.
        """
        device = torch.device(device)  # raises for an invalid device before the file is blamed
        schema: dict[str, Any] = {"info": _SAVED_WORDS, "arrays": _SAVED_TENSORS, "sizes": _saved_sizes}
        with open_artifact(path, _READABLE, "a saved explanation", device=str(device), **schema) as (info, tensors):
            return cls(**info, **tensors)

    def _summary(self) -> str:
        n, t, h, w = self.maps.shape
        parts = [f"{n} image{'s' * (n != 1)}", f"{t} concept{'s' * (t != 1)}", f"maps {h} x {w}"]
        if self.method:
            parts.append(self.method)
        if isinstance(self.layer, str) and self.layer:
            parts.append(f"layer {self.layer}")
        return ", ".join(parts)

    def _heading(self) -> str:
        """Name and prediction of the only image."""
        name = "" if self.image_names is None else f" {self.image_names[0]}"
        if self.target is None:
            return name
        sure = "" if self.target_probability is None else f" {short(float(self.target_probability))}"
        return f"{name} [target {self.class_name(int(self.target))}{sure}]"

    def __repr__(self) -> str:
        units = [f"scores: {self.score_unit}"] if self.score_unit else []
        units += [f"contributions: {self.contribution_unit}"] if self.contribution_unit else []
        lines = [f"ConceptExplanation({self._summary()})" + (f" {'; '.join(units)}" if units else "")]
        for i in range(min(len(self), 5)):
            one = self[i]
            words = []
            for j, name in enumerate(one.concepts[:5]):
                word = f"{name} {short(float(one.scores[0, j]))}"
                if one.contributions is not None:
                    word += f" ({short(float(one.contributions[0, j]), sign=True)})"
                if one.presence is not None and float(one.presence[0, j]) < SEEN:
                    word += " not seen"
                words.append(word)
            more = ", ..." if len(one.concepts) > 5 else ""
            lines.append(f"  {i}{one._heading()}: " + ", ".join(words) + more)
        if len(self) > 5:
            lines.append(f"  ... {len(self) - 5} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        if not _displays:  # imports matplotlib only when something is shown
            importlib.import_module("captum_concepts.visualization.notebook")
        return _displays[-1](self, [*self.pictures, *[None] * (len(self) - len(self.pictures))])


_displays: list[Callable[[ConceptExplanation, Any], str]] = []


def show_with(display: Callable[[ConceptExplanation, Any], str]) -> None:
    """Register ``display(explanation, pictures)``, which returns the HTML of an explanation in notebooks.

    ``visualization`` imports this module, so it registers its display when it is imported.
    """
    _displays.append(display)


def _saved_sizes(info: dict[str, Any]) -> dict[str, int]:
    return {"T": len(info["concepts"])}


def short(value: float, *, sign: bool = False) -> str:
    """A number with three digits; magnitudes below 0.001 are shown as such.

    >>> short(0.12345), short(8.6e-14), short(-0.25, sign=True), short(-1e-9, sign=True), short(-0.0)
    ('0.123', '< 0.001', '-0.25', '-0', '0')
    """
    if 0 < abs(value) < 0.001:
        return ("+0" if value > 0 else "-0") if sign else "< 0.001" if value > 0 else "> -0.001"
    value += 0.0  # -0.0 becomes 0.0
    return f"{value:+.3g}" if sign else f"{value:.3g}"
