"""`audit_dataset`: what drives each class over a data set, which concepts come with errors, and suspected shortcuts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_concepts._artifacts import (
    Array,
    anything,
    list_of,
    mapping_of,
    nothing_or,
    open_artifact,
    save_artifact,
    table,
    text,
)
from captum_concepts._captum import target_indices
from captum_concepts._checks import integer, number, one_of, unique_names
from captum_concepts._undo import unharming
from captum_concepts.audit.rows import (
    Rows,
    class_probabilities,
    collect_rows,
    concept_presence,
    model_of,
    placed,
    prepared_folder,
)
from captum_concepts.audit.statistics import (
    Effect,
    Suspect,
    binomial_p,
    bootstrap_interval,
    holm,
    mean_effect,
    permutation_p,
    split_scores,
    stratified_difference,
    two_groups,
)
from captum_concepts.errors import InputError
from captum_concepts.explanation import SEEN, ConceptExplainer, ContributionExplainer
from captum_concepts.images import ImageSource, class_name, fingerprint, inputs_for

_FORMAT = "captum_concepts.ConceptAudit/1"
KINDS = ("drivers", "errors", "suspects", "images")
_SHOWN = 6  # images kept for each suspect, on either side


@dataclass(frozen=True, eq=False)
class ConceptAudit:
    """What an explainer says over a whole data set; made by :func:`audit_dataset`.

    Args:
        class_names: C names of the model's outputs.
        concepts: T names.
        image_names: N names.
        rows: the numbers of each image.
        labels: ``(N,)`` true classes, or None.
        drivers: one dictionary per class and concept that occurs: ``class``, ``concept``, ``images`` (predicted as the
            class), ``presence_rate``, and the mean contribution to the class, ``contribution`` with ``low`` and
            ``high``, where the prediction is ``right``, ``wrong`` or ``all``.
        errors: one dictionary per confused pair of classes and concept: ``true``, ``predicted``, ``concept``,
            ``presence_rate`` among these errors, ``expected_rate`` among correct images of the true class, ``lift``,
            ``p`` (one-sided binomial, Holm-adjusted), ``n``. Strongest first.
        suspected: see :meth:`suspects`; None without labels.
        settings: how it was made.

    Example:
        >>> audit = ConceptAudit.load("audit.safetensors")  # doctest: +SKIP
        >>> for suspect in audit.suspects():  # doctest: +SKIP
        ...     print(suspect.sentence())
    """

    class_names: list[str]
    concepts: list[str]
    image_names: list[str]
    rows: Rows
    labels: Tensor | None
    drivers: list[dict[str, Any]]
    errors: list[dict[str, Any]]
    suspected: tuple[Suspect, ...] | None
    settings: dict[str, Any]

    def __len__(self) -> int:
        """The number of images."""
        return len(self.rows)

    @property
    def predicted(self) -> Tensor:
        """``(N,)`` the predicted classes."""
        return self.rows.probabilities.argmax(1)

    @property
    def accuracy(self) -> float | None:
        """Fraction of images predicted as labeled, or None without labels."""
        return None if self.labels is None else float((self.predicted == self.labels).double().mean())

    def suspects(self) -> list[Suspect]:
        """Concepts that decide for a class without belonging to it, strongest first.

        A pair is suspected where the concept's presence raises the class's probability in images of *other* classes,
        and its absence lowers it in images of the class. Both differences are taken within true classes, in which the
        concept varies (between 5 and 95 % of the images), so that concepts that define a class are not tested; both
        must be at least ``min_effect`` and significant by permutation (the larger p counts), Holm-adjusted over all
        pairs that vary.

        Raises:
            InputError: the audit was made without labels.
        """
        if self.suspected is None:
            raise InputError("suspects need the true classes; pass labels= to audit_dataset, or a data set with labels")
        return list(self.suspected)

    def to_records(self, kind: str = "drivers") -> list[dict[str, Any]]:
        """Tidy long form: one dictionary per row.

        Args:
            kind: ``"drivers"``, ``"errors"``, ``"suspects"``, or ``"images"``: one row per image and present concept.
        """
        one_of("kind", kind, KINDS)
        if kind == "drivers":
            return [dict(row) for row in self.drivers]
        if kind == "errors":
            return [dict(row) for row in self.errors]
        if kind == "suspects":
            return [_flat(suspect) for suspect in self.suspects()]
        predicted = self.predicted.tolist()
        records = []
        for i, j in (self.rows.presence >= SEEN).nonzero().tolist():
            record = {
                "image": self.image_names[i],
                "predicted": self.class_names[predicted[i]],
                "concept": self.concepts[j],
                "presence": float(self.rows.presence[i, j]),
                "contribution": float(self.rows.contributions[i, j]),
            }
            if self.labels is not None:
                record["true"] = self.class_names[int(self.labels[i])]
            records.append(record)
        return records

    def to_frame(self, kind: str = "drivers") -> Any:
        """:meth:`to_records` as a ``pandas.DataFrame``; without pandas, as a dictionary of columns."""
        records = self.to_records(kind)
        columns = {key: [record.get(key) for record in records] for key in (records[0] if records else {})}
        try:
            import pandas
        except ImportError:
            return columns
        return pandas.DataFrame(columns)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file, atomically."""
        info = {
            "class_names": self.class_names,
            "concepts": self.concepts,
            "image_names": self.image_names,
            "drivers": _without_nan(self.drivers),
            "errors": _without_nan(self.errors),
            "suspected": None if self.suspected is None else _without_nan([asdict(s) for s in self.suspected]),
            "settings": self.settings,
        }
        tensors = self.rows.tensors()
        if self.labels is not None:
            tensors["labels"] = self.labels
        return save_artifact(path, _FORMAT, info, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ConceptAudit:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ArtifactError: damaged, or not an audit.
        """
        schema = table(
            {
                "class_names": list_of(text()),
                "concepts": list_of(text()),
                "image_names": list_of(text(longest=10_000), most=100_000_000),
                "drivers": list_of(mapping_of(anything)),
                "errors": list_of(mapping_of(anything)),
                "suspected": nothing_or(list_of(mapping_of(anything))),
                "settings": mapping_of(anything),
            }
        )
        arrays = {
            "probabilities": Array("float", ("N", "C")),
            "presence": Array("float", ("N", "T")),
            "contributions": Array("float", ("N", "T")),
            "digests": Array("integer", ("N", 16)),
            "labels": Array("integer", ("N",), optional=True),
        }

        def sizes(info: dict[str, Any]) -> dict[str, int]:
            return {"N": len(info["image_names"]), "C": len(info["class_names"]), "T": len(info["concepts"])}

        with open_artifact(path, _FORMAT, "a saved audit", info=schema, arrays=arrays, sizes=sizes) as (info, tensors):
            labels = tensors.pop("labels", None)
            suspected = info["suspected"]
            return cls(
                info["class_names"],
                info["concepts"],
                info["image_names"],
                Rows(**tensors),
                labels,
                _with_nan(info["drivers"]),
                _with_nan(info["errors"]),
                None if suspected is None else tuple(_suspect(one) for one in _with_nan(suspected)),
                info["settings"],
            )

    def report(self, path: str | os.PathLike[str], images: Any = None, *, title: str = "Concept audit") -> Path:
        """One standalone HTML page: suspects with their images, drivers of each class, confusions and their concepts.

        Args:
            path: an existing file is replaced, atomically.
            images: the audited images as people see them (RGB in [0, 1]; whatever ``images.open_images`` accepts), in
                the order of the audit; None leaves the pictures out.
            title: of the page.
        """
        from captum_concepts.audit.page import write_page

        return write_page(self, path, images, title)

    def __repr__(self) -> str:
        head = f"ConceptAudit({len(self)} images, {len(self.class_names)} classes, {len(self.concepts)} concepts"
        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy:.3f}"
        lines = [f"{head}{accuracy})"]
        if self.suspected is not None:
            lines.append(f"  {len(self.suspected)} suspects" + (":" if self.suspected else ""))
            lines += [f"    {suspect.sentence()}" for suspect in self.suspected[:5]]
        return "\n".join(lines)


@unharming
def audit_dataset(
    explainer: ConceptExplainer,
    data: Any,
    *,
    labels: Any = None,
    class_names: Sequence[str] | None = None,
    alpha: float = 0.05,
    min_effect: float = 0.05,
    n_bootstrap: int = 1000,
    seed: int = 0,
    top_k: int | None = 5,
    transform: Callable[[Any], Tensor] | None = None,
    batch_size: int = 32,
    store_path: str | os.PathLike[str] | None = None,
    show_progress: bool = False,
) -> ConceptAudit:
    """Explain every image of a data set, and say what drives each class and which concept is a suspected shortcut.

    Args:
        explainer: one of the methods, or any :class:`~captum_concepts.explanation.ConceptExplainer` of a classifier.
            Contributions and the confirmation by ablation need a ``ContributionExplainer``.
        data: a folder, files, a data set, a loader or tensors, read in order with the model's own preprocessing (see
            ``images.inputs_for``).
        labels: true classes, as numbers or names; None takes those that come with the data, if any.
        class_names: of the outputs; None takes ``explainer.class_names`` or those of the data's folders.
        alpha: family-wise error rate of the suspects.
        min_effect: least change of a class's probability that matters, in [0, 1].
        n_bootstrap: resamples of the intervals, over images.
        seed: of resamples and permutations.
        top_k: concepts per image whose contributions are computed; None: all.
        transform: from a file or PIL image to the model's input, in place of its own preprocessing.
        batch_size: images per forward pass.
        store_path: a folder in which parts of 256 images are written as they are done: a killed audit resumes there,
            and processes under ``torchrun`` share the work. None keeps the numbers in memory.
        show_progress: show a bar.

    Returns:
        A :class:`ConceptAudit`. Memory grows by 4 (C + 2 T) bytes per image.

    Raises:
        InputError: no images, labels that are not classes, an option out of range, a model that is no classifier.
        ArtifactError: ``store_path`` contains parts of another audit.
    """
    if not isinstance(explainer, ConceptExplainer):
        raise InputError(
            f"explainer must have concepts, scores, concept_maps and explain (captum_concepts.explanation."
            f"ConceptExplainer); {type(explainer).__name__} does not"
        )
    number("alpha", alpha, lambda a: 0 < a < 1, "between 0 and 1")
    number("min_effect", min_effect, lambda e: 0 <= e <= 1, "in [0, 1]")
    integer("n_bootstrap", n_bootstrap, 0)
    integer("batch_size", batch_size)
    if top_k is not None:
        integer("top_k", top_k)
    concepts = unique_names(explainer.concepts, "concept")
    given = {} if labels is None else {"labels": labels}
    source = inputs_for(model_of(explainer), data, transform=transform, **given)
    if source.streamed:
        raise InputError("an audit reads some images twice; pass a data set with items by number instead of a stream")
    if not len(source):
        raise InputError("data contains no images")
    known = class_names if class_names is not None else getattr(explainer, "class_names", None) or source.class_names
    outputs = class_probabilities(explainer, placed(explainer, source[0][None])).shape[1]
    names = [str(k) for k in range(outputs)] if known is None else [str(name) for name in known]
    if len(names) != outputs:
        raise InputError(f"{len(names)} class_names for a model with {outputs} outputs")
    true = _true_classes(source, names)
    first = placed(explainer, source[0][None])
    probe = [*class_probabilities(explainer, first)[0].tolist(), *explainer.scores(first)[0].tolist()]
    settings: dict[str, Any] = {
        "explainer": str(getattr(explainer, "get_name", lambda: type(explainer).__name__)()),
        "images": fingerprint(source),
        "concepts": concepts,
        "top_k": top_k,
        "probe": [round(value, 6) for value in probe],  # another model or another fit says something else
    }
    rows = collect_rows(
        explainer,
        source,
        top_k=top_k,
        batch_size=batch_size,
        part_size=256,
        folder=prepared_folder(store_path),
        settings=settings,
        show_progress=show_progress,
    )
    calibrated = concept_presence(explainer, first) is not None
    if not calibrated:
        split = np.stack([split_scores(column) for column in rows.presence.double().numpy().T], 1)
        rows = Rows(rows.probabilities, torch.from_numpy(split).float(), rows.contributions, rows.digests)
    settings |= {
        "alpha": alpha,
        "min_effect": min_effect,
        "n_bootstrap": n_bootstrap,
        "seed": seed,
        "presence": "calibrated" if calibrated else "scores split in two groups",
    }
    rng = np.random.default_rng(seed)
    suspected = None
    if true is not None:
        suspected = _suspects(rows, true, names, concepts, alpha, min_effect, n_bootstrap, rng)
        suspected = tuple(_confirmed(s, explainer, source, rows, true, names, concepts, rng) for s in suspected)
    return ConceptAudit(
        names,
        concepts,
        source.names,
        rows,
        true,
        _drivers(rows, true, names, concepts, rng, n_bootstrap),
        [] if true is None else _errors(rows, true, names, concepts),
        suspected,
        settings,
    )


def _true_classes(source: ImageSource, names: Sequence[str]) -> Tensor | None:
    """``(N,)`` numbers of classes: labels that are names, or belong to folders, are looked up by name."""
    labels = source.labels
    if labels is None:
        return None
    if source.class_names not in (None, list(names)):
        labels = [class_name(k, source.class_names) for k in labels]
    for label in labels:
        class_name(label, names)
    return target_indices(list(labels), len(source), len(names), names, what="class")


def _drivers(
    rows: Rows, true: Tensor | None, names: Sequence[str], concepts: Sequence[str], rng: Any, n_bootstrap: int
) -> list[dict[str, Any]]:
    predicted = rows.probabilities.argmax(1).numpy()
    present, contributions = rows.presence.numpy() >= SEEN, rows.contributions.double().numpy()
    groups = {"all": np.ones(len(rows), dtype=bool)}
    if true is not None:
        right = predicted == true.numpy()
        groups |= {"right": right, "wrong": ~right}
    found = []
    for c, name in enumerate(names):
        of_class = predicted == c
        for t, concept in enumerate(concepts):
            for where, group in groups.items():
                here = of_class & group
                known = contributions[here, t]
                known = known[np.isfinite(known)]
                if not here.any() or (not len(known) and not present[here, t].any()):
                    continue
                effect = mean_effect(known, rng, n_bootstrap)
                found.append(
                    {
                        "class": name,
                        "concept": concept,
                        "where": where,
                        "images": int(here.sum()),
                        "presence_rate": float(present[here, t].mean()),
                        "contribution": effect.value,
                        "low": effect.low,
                        "high": effect.high,
                        "n": effect.n,
                    }
                )
    return found


def _errors(rows: Rows, true: Tensor, names: Sequence[str], concepts: Sequence[str]) -> list[dict[str, Any]]:
    predicted, labels = rows.probabilities.argmax(1).numpy(), true.numpy()
    present = rows.presence.numpy() >= SEEN
    found: list[dict[str, Any]] = []
    for y, c in sorted({(int(y), int(c)) for y, c in zip(labels, predicted, strict=True) if y != c}):
        wrong, right = (labels == y) & (predicted == c), (labels == y) & (predicted == y)
        n, base = int(wrong.sum()), int(right.sum())
        for t, concept in enumerate(concepts):
            k = int(present[wrong, t].sum())
            # One pseudo-image on either side: a rate of 0 in few images is not impossibility.
            expected = (int(present[right, t].sum()) + 0.5) / (base + 1)
            if not k:
                continue
            found.append(
                {
                    "true": names[y],
                    "predicted": names[c],
                    "concept": concept,
                    "presence_rate": k / n,
                    "expected_rate": expected,
                    "lift": k / n / expected,
                    "p": binomial_p(k, n, expected),
                    "n": n,
                }
            )
    for row, p in zip(found, holm([row["p"] for row in found]), strict=True):
        row["p"] = p
    return sorted(found, key=lambda row: (row["p"], -row["lift"], -row["n"]))


def _suspects(
    rows: Rows,
    true: Tensor,
    names: Sequence[str],
    concepts: Sequence[str],
    alpha: float,
    min_effect: float,
    n_bootstrap: int,
    rng: np.random.Generator,
) -> tuple[Suspect, ...]:
    labels, probabilities = true.numpy(), rows.probabilities.double().numpy()
    present = rows.presence.numpy() >= SEEN
    tested: list[dict[str, Any]] = []
    permutations = max(1000, int(20 * len(names) * len(concepts) / alpha))
    for t in range(len(concepts)):
        seen = present[:, t]
        varies = [y for y in np.unique(labels) if two_groups(seen[labels == y])]
        for c in varies:
            others = np.isin(labels, [y for y in varies if y != c])
            own = labels == c
            if not others.any():
                continue
            values = probabilities[:, c]
            raises = stratified_difference(values[others], seen[others], labels[others])
            lowers = stratified_difference(values[own], seen[own], labels[own])
            p = 1.0
            if min(raises, lowers) > 0:
                p = max(
                    permutation_p(values[part], seen[part], labels[part], rng, permutations) for part in (others, own)
                )
            effects = {"raises": raises, "lowers": lowers, "p": p}
            tested.append({"c": int(c), "t": t, "others": others, "own": own, **effects})
    found = []
    for one, p in zip(tested, holm([one["p"] for one in tested]), strict=True):
        if p >= alpha or min(one["raises"], one["lowers"]) < min_effect:
            continue
        c, t = one["c"], one["t"]
        draws = np.full(n_bootstrap, np.nan)
        for b in range(n_bootstrap):
            parts = []
            for part in (one["others"], one["own"]):
                index = _resampled(labels, present[:, t], part, rng)
                parts.append(stratified_difference(probabilities[index, c], present[index, t], labels[index]))
            draws[b] = min(parts)
        low, high = bootstrap_interval(draws)
        n = int(one["others"].sum() + one["own"].sum())
        shown = np.flatnonzero(one["others"] & present[:, t])
        shown = shown[np.argsort(-probabilities[shown, c], kind="stable")]
        found.append(
            Suspect(
                names[c], concepts[t], one["raises"], one["lowers"],
                Effect(min(one["raises"], one["lowers"]), low, high, n), p, None, None,
                tuple(int(i) for i in shown[:_SHOWN]), tuple(int(i) for i in shown[::-1][:_SHOWN]),
            )
        )  # fmt: skip
    return tuple(sorted(found, key=lambda suspect: -suspect.effect.value))


def _resampled(labels: Any, seen: Any, part: Any, rng: np.random.Generator) -> Any:
    """Images drawn again within each true class, with and without the concept, so that no group gets lost."""
    index = []
    for y in np.unique(labels[part]):
        for flag in (True, False):
            here = np.flatnonzero(part & (labels == y) & (seen == flag))
            index.append(here[rng.integers(0, len(here), len(here))])
    return np.concatenate(index)


def _confirmed(
    suspect: Suspect,
    explainer: Any,
    source: ImageSource,
    rows: Rows,
    true: Tensor,
    names: Sequence[str],
    concepts: Sequence[str],
    rng: np.random.Generator,
) -> Suspect:
    """With the concept's contribution to the class, by ablation, in images of other classes that show it."""
    if not isinstance(explainer, ContributionExplainer):
        return suspect
    c, t = names.index(suspect.class_name), concepts.index(suspect.concept)
    wrong = (true != c) & (rows.presence[:, t] >= SEEN)
    places = wrong.nonzero().flatten()
    chosen = places[rows.probabilities[places, c].argsort(descending=True)][:24].tolist()
    if not chosen:
        return suspect
    first = placed(explainer, source[0][None])
    values = [
        explainer.contributions(source[i][None].to(first.device), target=c, concepts=[suspect.concept])[0, 0]
        for i in chosen
    ]
    effect = mean_effect(torch.stack(values).double().cpu().numpy(), rng, 1000)
    kept = {field: getattr(suspect, field) for field in Suspect.__dataclass_fields__}
    return Suspect(**(kept | {"contribution": effect, "confirmed": bool(effect.low > 0)}))


def _suspect(info: dict[str, Any]) -> Suspect:
    kept = dict(info)
    kept["effect"] = Effect(**kept["effect"])
    kept["contribution"] = None if kept["contribution"] is None else Effect(**kept["contribution"])
    kept["images"], kept["counterexamples"] = tuple(kept["images"]), tuple(kept["counterexamples"])
    return Suspect(**kept)


def _flat(suspect: Suspect) -> dict[str, Any]:
    contribution = suspect.contribution
    return {
        "class": suspect.class_name,
        "concept": suspect.concept,
        "effect": suspect.effect.value,
        "low": suspect.effect.low,
        "high": suspect.effect.high,
        "raises": suspect.raises,
        "lowers": suspect.lowers,
        "p": suspect.p,
        "contribution": None if contribution is None else contribution.value,
        "confirmed": suspect.confirmed,
    }


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: it is None there."""
    if isinstance(value, float) and value != value:
        return {"nan": True}
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    return [_without_nan(one) for one in value] if isinstance(value, (list, tuple)) else value


def _with_nan(value: Any) -> Any:
    if value == {"nan": True}:
        return float("nan")
    if isinstance(value, dict):
        return {key: _with_nan(one) for key, one in value.items()}
    return [_with_nan(one) for one in value] if isinstance(value, list) else value
