"""`ConceptExplanation`: the one value that methods make and that metrics, pictures and reports read."""

from __future__ import annotations

import dataclasses
import html
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_concepts._artifacts import open_artifact, save_artifact
from captum_concepts._indexing import listed, positions
from captum_concepts.errors import InputError, did_you_mean

_FORMAT = "captum_concepts.ConceptExplanation/1"
_TENSORS = ("scores", "maps", "contributions", "target")


@dataclass(frozen=True, eq=False)
class ConceptExplanation:
    r"""What was seen, where, and how much it moved the prediction, for N examples and T concepts.

    Args:
        concepts: the T names, unique, one for each column.
        scores: ``(N, T)`` *what*: how present the concept is; the method states the scale.
        maps: ``(N, T, h, w)`` *where*: in the grid of the explained layer, not of the pixels.
        contributions: ``(N, T)`` *how much* the concept moved the score of ``target`` (signed), or None.
        target: ``(N,)`` index of the output that was explained, or None.
        layer: the name of the explained layer, or one name for each (example, concept).
        method: the name of the method that made this.

    Tensors are detached at construction and must lie on one device. Instances are immutable: every method
    returns a new one.

    Raises:
        InputError: a shape, dtype, device or name does not fit the others.

    Example:
        >>> import torch
        >>> from captum_concepts import ConceptExplanation
        >>> e = ConceptExplanation(["stripes", "grass"], torch.tensor([[0.9, 0.2]]), torch.rand(1, 2, 7, 7))
        >>> e
        ConceptExplanation(1 example, 2 concepts, maps 7 x 7)
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

    def __post_init__(self) -> None:
        if isinstance(self.concepts, str) or not isinstance(self.concepts, Iterable):
            raise InputError(f"concepts must be a list of names, got {self.concepts!r}")
        concepts = list(self.concepts)
        object.__setattr__(self, "concepts", concepts)
        if not all(isinstance(name, str) and name for name in concepts):
            raise InputError(f"concepts must be non-empty strings, got {concepts!r}")
        if len(set(concepts)) != len(concepts):
            twice = sorted({name for name in concepts if concepts.count(name) > 1})
            raise InputError(f"each concept may appear once; named more than once: {twice}")
        for name in _TENSORS:
            value = getattr(self, name)
            if value is None and name in ("contributions", "target"):
                continue
            if not isinstance(value, Tensor):
                raise InputError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
            object.__setattr__(self, name, value.detach())
        self._check_shapes()
        if not isinstance(self.method, str):
            raise InputError(f"method must be a name, got {self.method!r}")
        if not isinstance(self.layer, str):
            rows = list(self.layer) if isinstance(self.layer, Iterable) else [None]
            good = len(rows) == len(self) and all(
                isinstance(row, (list, tuple)) and len(row) == len(concepts) and all(isinstance(x, str) for x in row)
                for row in rows
            )
            if not good:
                raise InputError(
                    f"layer must be one name or {len(self)} rows of {len(concepts)} names, got {self.layer!r}"
                )
            object.__setattr__(self, "layer", tuple(tuple(row) for row in rows))

    def _check_shapes(self) -> None:
        t = len(self.concepts)
        if self.scores.ndim != 2 or self.scores.shape[1] != t:
            raise InputError(f"scores must be (N, {t}) for {t} concepts, got {tuple(self.scores.shape)}")
        n = self.scores.shape[0]
        if self.maps.ndim != 4 or self.maps.shape[:2] != (n, t) or 0 in self.maps.shape[2:]:
            raise InputError(f"maps must be ({n}, {t}, h, w), got {tuple(self.maps.shape)}")
        if self.contributions is not None and self.contributions.shape != (n, t):
            raise InputError(f"contributions must be ({n}, {t}), got {tuple(self.contributions.shape)}")
        if self.target is not None and self.target.shape != (n,):
            raise InputError(f"target must be ({n},), got {tuple(self.target.shape)}")
        for name in ("scores", "maps", "contributions"):
            value = getattr(self, name)
            if value is not None and not value.is_floating_point():
                raise InputError(f"{name} must be floating point, got {value.dtype}")
        if self.target is not None and (self.target.is_floating_point() or self.target.dtype == torch.bool):
            raise InputError(f"target must hold integer indices, got {self.target.dtype}")
        devices = {str(v.device) for v in (getattr(self, name) for name in _TENSORS) if v is not None}
        if len(devices) > 1:
            raise InputError(f"all tensors must lie on one device, got {sorted(devices)}; use .to(device)")

    def __len__(self) -> int:
        """The number of examples N."""
        return int(self.scores.shape[0])

    def __iter__(self) -> Iterator[ConceptExplanation]:
        """One explanation of a single example after another."""
        return (self[i] for i in range(len(self)))

    def index(self, concept: str | int) -> int:
        """The column of a concept, by name or (possibly negative) index."""
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
        """``e[i]``, ``e[2:5]``, ``e[mask]`` select examples; ``e["stripes"]``, ``e[["a", "b"]]`` concepts;
        ``e[i, "stripes"]`` both. The result always keeps both dimensions."""
        if isinstance(key, tuple):
            if len(key) != 2:
                raise InputError(f"index with [examples] or [examples, concepts], got {len(key)} parts")
            return self._rows(key[0])._columns(key[1])
        is_names = isinstance(key, str) or (isinstance(key, list) and key and isinstance(key[0], str))
        return self._columns(key) if is_names else self._rows(key)

    def _rows(self, key: int | slice | Sequence[int] | Tensor) -> ConceptExplanation:
        rows = torch.tensor(positions(key, len(self), "example"), dtype=torch.long)
        layer = self.layer if isinstance(self.layer, str) else tuple(self.layer[i] for i in rows.tolist())
        device_rows = rows.to(self.scores.device)
        pick = {name: v[device_rows] for name in _TENSORS if (v := getattr(self, name)) is not None}
        return dataclasses.replace(self, layer=layer, **pick)

    def _columns(self, key: str | int | slice | Sequence[str | int]) -> ConceptExplanation:
        names = [key] if isinstance(key, str) else listed(key)
        if isinstance(names, list) and any(isinstance(name, str) for name in names):
            columns = [self.index(name) for name in names]
        else:
            columns = positions(key, len(self.concepts), "concept")
        layer = self.layer
        if not isinstance(layer, str):
            layer = tuple(tuple(row[j] for j in columns) for row in layer)
        contributions = None if self.contributions is None else self.contributions[:, columns]
        return dataclasses.replace(
            self,
            concepts=[self.concepts[j] for j in columns],
            scores=self.scores[:, columns],
            maps=self.maps[:, columns],
            contributions=contributions,
            layer=layer,
        )

    def top(self, k: int, *, by: str = "scores") -> ConceptExplanation:
        """The ``k`` leading concepts, strongest first.

        Args:
            k: how many; all of them if there are fewer.
            by: ``"scores"``, or ``"contributions"`` (by absolute value).

        The columns are shared by all examples: a concept ranks by its best value over them, so with one
        example this is that example's own top ``k``; for each example's own use ``[e.top(k) for e in batch]``.
        NaN ranks last.
        """
        if not hasattr(k, "__index__") or k < 1:
            raise InputError(f"k must be an integer of at least 1, got {k!r}")
        if by not in ("scores", "contributions"):
            raise InputError(f"by must be 'scores' or 'contributions', got {by!r}")
        values = self.scores if by == "scores" else self.contributions
        if values is None:
            raise InputError("this explanation has no contributions to rank by; use by='scores'")
        values = values.float().abs() if by == "contributions" else values.float()
        unknown = values.isnan().all(0)
        values = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        best = values.amax(0) if len(self) else values.new_zeros(len(self.concepts))
        ranked = torch.argsort(best, descending=True, stable=True)
        if len(self):
            ranked = ranked[torch.argsort(unknown[ranked].int(), stable=True)]
        return self._columns(ranked[:k].tolist())

    def to(self, device: torch.device | str) -> ConceptExplanation:
        """The same explanation with its tensors on ``device``."""
        moved = {name: v.to(device) for name in _TENSORS if (v := getattr(self, name)) is not None}
        return dataclasses.replace(self, **moved)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file (names and settings as JSON in its header), atomically.

        Returns:
            The path written; ``ConceptExplanation.load`` reads it back exactly.
        """
        info = {"concepts": self.concepts, "layer": self.layer, "method": self.method}
        present = {n: v for n in _TENSORS if (v := getattr(self, n)) is not None}
        return save_artifact(path, _FORMAT, info, present)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> ConceptExplanation:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ArtifactError: the file is truncated, corrupt, or not a saved explanation.
        """
        device = torch.device(device)  # a bad device is no fault of the file
        with open_artifact(path, _FORMAT, "a saved explanation", device=str(device), allowed=_TENSORS) as (
            info,
            tensors,
        ):
            return cls(info["concepts"], layer=info["layer"], method=info["method"], **tensors)

    def _summary(self) -> str:
        n, t, h, w = self.maps.shape
        parts = [f"{n} example{'s' * (n != 1)}", f"{t} concept{'s' * (t != 1)}", f"maps {h} x {w}"]
        if self.method:
            parts.append(self.method)
        if isinstance(self.layer, str) and self.layer:
            parts.append(f"layer {self.layer}")
        return ", ".join(parts)

    def __repr__(self) -> str:
        lines = [f"ConceptExplanation({self._summary()})"]
        for i, one in enumerate(self[:5]):
            shown = one.top(5) if self.concepts else one
            words = [
                f"{name} {score:.3g}" for name, score in zip(shown.concepts, shown.scores[0].tolist(), strict=True)
            ]
            for j, value in enumerate([] if shown.contributions is None else shown.contributions[0].tolist()):
                words[j] += f" ({value:+.3g})"
            target = "" if one.target is None else f" [target {int(one.target)}]"
            more = ", ..." if len(self.concepts) > 5 else ""
            lines.append(f"  {i}{target}: " + ", ".join(words) + more)
        if len(self) > 5:
            lines.append(f"  ... {len(self) - 5} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head = "<tr><th>example</th><th>target</th><th>concept</th><th>score</th><th>contribution</th></tr>"
        rows = []
        for i, one in enumerate(self[:10]):
            shown = one.top(5) if self.concepts else one
            target = "" if one.target is None else str(int(one.target))
            for j, name in enumerate(shown.concepts):
                how = "" if shown.contributions is None else f"{float(shown.contributions[0, j]):+.3g}"
                cells = (str(i), target, html.escape(name), f"{float(shown.scores[0, j]):.3g}", how)
                rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        title = html.escape(f"ConceptExplanation({self._summary()})")
        return f"<table><caption>{title}</caption>{head}{''.join(rows)}</table>"
