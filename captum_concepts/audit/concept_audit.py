"""`audit_dataset` reports what drives each class of a data set, concepts of errors, and suspected shortcuts."""

from __future__ import annotations

import hashlib
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_concepts import _artifacts as schema
from captum_concepts._artifacts import Array, open_artifact, save_artifact
from captum_concepts._captum import target_indices
from captum_concepts._checks import integer, name_positions, number, one_of, unique_names
from captum_concepts._undo import autocast_of_the_caller, unharming
from captum_concepts.audit.rows import (
    ARRAYS,
    Rows,
    check_exclusive_classes,
    collect_rows,
    look,
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
    partial_effect,
    permutation_p,
    resampled_differences,
    stratified_difference,
    told_apart,
    two_groups,
)
from captum_concepts.errors import InputError, InputWarning, listing
from captum_concepts.explanation import SEEN, ConceptExplainer, ContributionExplainer
from captum_concepts.images import ImageSource, batches, class_name, inputs_for

_FORMAT = "captum_concepts.ConceptAudit/1"
KINDS = ("drivers", "errors", "suspects", "images")
_SHOWN = 6  # images per suspect, and as many counterexamples


_ENTRY = schema.either(schema.nothing_or(schema.flag), schema.number(), schema.text())


def _settings(value: Any, where: str) -> Any:
    found = schema.mapping_of(schema.either(_ENTRY, schema.list_of(_ENTRY)))(value, where)
    schema.list_of(schema.text())(found.get("not_told_apart", []), f"{where}.not_told_apart")
    return found


_NUMBER = schema.either(schema.table({"nan": schema.flag}), schema.number())
_EFFECT = schema.table({"value": _NUMBER, "low": _NUMBER, "high": _NUMBER, "n": schema.integer()})
_DRIVER = {
    **dict.fromkeys(("class", "concept"), schema.text()),
    "where": schema.text("all", "right", "wrong"),
    **dict.fromkeys(("images", "n"), schema.integer()),
    **dict.fromkeys(("presence_rate", "contribution", "low", "high"), _NUMBER),
}
_ERROR = {
    **dict.fromkeys(("true", "predicted", "concept"), schema.text()),
    **dict.fromkeys(("presence_rate", "expected_rate", "lift", "p"), _NUMBER),
    "n": schema.integer(),
}
_SUSPECT = {
    **dict.fromkeys(("class_name", "concept"), schema.text()),
    **dict.fromkeys(("raises", "lowers", "p"), _NUMBER),
    "effect": _EFFECT,
    "contribution": schema.nothing_or(_EFFECT),
    "confirmed": schema.nothing_or(schema.flag),
    **dict.fromkeys(("images", "counterexamples"), schema.list_of(schema.integer(), most=1000)),
}
_INFO = schema.table(
    {
        "class_names": schema.list_of(schema.text()),
        "concepts": schema.list_of(schema.text()),
        "image_names": schema.list_of(schema.text(longest=10_000), most=100_000_000),
        "drivers": schema.list_of(schema.table(_DRIVER)),
        "errors": schema.list_of(schema.table(_ERROR)),
        "suspected": schema.nothing_or(schema.list_of(schema.table(_SUSPECT))),
        "settings": _settings,
    }
)


@dataclass(frozen=True, eq=False)
class ConceptAudit:
    """Results of an explainer over a whole data set, as returned by :func:`audit_dataset`.

    Args:
        class_names: C names of the model's outputs.
        concepts: T names.
        image_names: N names.
        rows: the values of each image.
        labels: ``(N,)`` true classes, or None.
        drivers: one dictionary per class, concept and ``where`` (``"right"``, ``"wrong"`` or ``"all"`` predictions):
            ``class``, ``concept``, ``images`` (predicted as the class), ``presence_rate`` (NaN for concepts in
            :attr:`not_told_apart`), ``contribution`` (mean, to the class) with ``low`` and ``high``, ``n``.
        errors: one dictionary per confused pair of classes and concept: ``true``, ``predicted``, ``concept``,
            ``presence_rate`` among these errors, ``expected_rate`` among correct images of the true class, ``lift``,
            ``p`` (one-sided binomial, Holm-adjusted), ``n``; sorted by ``p``.
        suspected: see :meth:`suspects`; None without labels.
        settings: options and provenance of the audit.
        maps: ``(S, 12, h, w)`` concept maps of each suspect, six for its ``images`` and six for its
            ``counterexamples``; NaN where there are fewer. None without suspects.

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
    maps: Tensor | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.rows)

    @property
    def predicted(self) -> Tensor:
        """``(N,)`` the predicted classes."""
        return self.rows.probabilities.argmax(1)

    @property
    def accuracy(self) -> float | None:
        """Fraction of images predicted as labeled, or None without labels."""
        return None if self.labels is None else float((self.predicted == self.labels).double().mean())

    @property
    def not_told_apart(self) -> list[str]:
        """Concepts whose presence is unclear in these images, and NaN in ``rows``.

        Presence is clear if it was calibrated, lies on both sides of .5 and is .5 apart on average. Otherwise it is
        clear if the scores (log odds of probabilities) split into two groups that explain at least .75 of their
        variance (.64 for a normal distribution). Networks usually encode the concepts they use clearly; for others,
        ``explainer.calibrate`` on labeled images or another layer may help.
        """
        return list(self.settings.get("not_told_apart", []))

    def suspects(self) -> list[Suspect]:
        """Concepts that support a class without belonging to it (suspected shortcuts), strongest first.

        A pair is suspected if the concept's presence raises the class's probability in images of *other* classes, and
        its absence lowers it in images of the class. Both differences are computed within true classes in which the
        concept varies (between 5 and 95 % of the images), so concepts that define a class are not tested, nor are those
        in ``belongs``. Both must be at least ``min_effect`` and significant by permutation (the larger p counts),
        Holm-adjusted over all tested pairs. Of two correlated concepts, the weaker is a suspect only if both
        differences remain when all stronger suspects are held constant, by linear regression within true classes, or if
        the stronger suspects determine it, as all backgrounds but one determine the last.

        Concepts with unclear presence are not tested (see :attr:`not_told_apart`).

        Raises:
            InputError: the audit was made without labels.
        """
        if self.suspected is None:
            raise InputError(
                "suspects require the true classes; pass labels= to audit_dataset, or a data set with labels"
            )
        return list(self.suspected)

    def to_records(self, kind: str = "drivers") -> list[dict[str, Any]]:
        """One dictionary per row (tidy long format).

        Args:
            kind: ``"drivers"``, ``"errors"``, ``"suspects"``, or ``"images"`` (one row per image and present concept).
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
        """Write one safetensors file atomically and return its path."""
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
        tensors |= {name: value for name in ("labels", "maps") if (value := getattr(self, name)) is not None}
        return save_artifact(path, _FORMAT, info, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ConceptAudit:
        """Audit from a file written by :meth:`save`.

        Raises:
            FileNotFoundError: there is no such file.
            ArtifactError: the file is damaged, or not an audit.
        """
        arrays = ARRAYS | {
            "labels": Array("integer", ("N",), optional=True),
            "maps": Array("float", ("S", 2 * _SHOWN, None, None), optional=True),
        }

        def sizes(info: dict[str, Any]) -> dict[str, int]:
            counts = {"N": len(info["image_names"]), "C": len(info["class_names"]), "T": len(info["concepts"])}
            return counts | {"S": len(info["suspected"] or ())}

        with open_artifact(path, _FORMAT, "a saved audit", info=_INFO, arrays=arrays, sizes=sizes) as (info, tensors):
            labels, maps = tensors.pop("labels", None), tensors.pop("maps", None)
            suspected = info["suspected"]
            _check_names(info)
            if labels is not None and not bool(((labels >= 0) & (labels < len(info["class_names"]))).all()):
                raise ValueError("its labels are not among its classes")
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
                maps,
            )

    def report(self, path: str | os.PathLike[str], images: Any = None, *, title: str = "Concept audit") -> Path:
        """Write one standalone HTML page of suspects with images, drivers of each class, and confusions with concepts.

        Args:
            path: where to write; an existing file is replaced atomically.
            images: the audited images for display (RGB in [0, 1], in any form that ``images.open_images`` accepts), in
                the order of the audit; None for a page without images.
            title: title of the page.
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
        if self.not_told_apart:
            lines.append(
                "  not tested, because the explainer does not separate images that show them: "
                f"{len(self.not_told_apart)} of {len(self.concepts)} concepts ({listing(self.not_told_apart, 5)})"
            )
        return "\n".join(lines)


@unharming
def audit_dataset(
    explainer: ConceptExplainer,
    data: Any,
    *,
    labels: Any = None,
    class_names: Sequence[str] | None = None,
    alpha: float = 0.05,
    min_effect: float = 0.02,
    belongs: Mapping[str, Sequence[str]] | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
    top_k: int | None = 5,
    transform: Callable[[Any], Tensor] | None = None,
    batch_size: int = 32,
    store_path: str | os.PathLike[str] | None = None,
    show_progress: bool = False,
) -> ConceptAudit:
    """Explain every image of a data set and report what drives each class and which concepts are suspected shortcuts.

    Args:
        explainer: one of the methods, or any :class:`~captum_concepts.explanation.ConceptExplainer` of a classifier.
            Contributions and the confirmation by ablation need a ``ContributionExplainer``.
        data: a folder, files, a data set, a loader or tensors, read in order with the model's own preprocessing (see
            ``images.inputs_for``).
        labels: true classes, as numbers or names; None: those of the data, if any (a custom data set is then read
            twice).
        class_names: names of the outputs; None: ``explainer.class_names`` or those of the data's folders.
        alpha: family-wise error rate of the suspects.
        min_effect: minimum change of a class's probability, in [0, 1].
        belongs: ``{class: concepts}`` that legitimately support a class and are not suspected; None: those whose words
            are in the name of the class, such as "striped" for "striped circle".
        n_bootstrap: number of resamples of the intervals, over images.
        seed: random seed of resamples and permutations.
        top_k: concepts per image whose contributions are computed; None: all.
        transform: maps a file or PIL image to the model's input, instead of the model's own preprocessing.
        batch_size: images per forward pass.
        store_path: a folder for finished parts of 256 images. A killed audit resumes from it, and processes under
            ``torchrun`` split the work, even if their number has changed. None keeps all values in memory.
        show_progress: show a progress bar.

    Returns:
        A :class:`ConceptAudit`. Memory grows by 4 (C + 3 T) bytes per image.

    Raises:
        InputError: no images, labels that are not classes, an option out of range, or a model that is not a classifier.
        ArtifactError: ``store_path`` contains parts of another audit.

    Warns:
        InputWarning: there are labels, but no concept could be tested.
    """
    if not isinstance(explainer, ConceptExplainer):
        raise InputError(
            f"explainer must have concepts, scores, concept_maps and explain (captum_concepts.explanation."
            f"ConceptExplainer); {type(explainer).__name__} does not"
        )
    number("alpha", alpha, lambda a: 0 < a < 1, "between 0 and 1")
    number("min_effect", min_effect, lambda e: 0 <= e <= 1, "in [0, 1]")
    integer("n_bootstrap", n_bootstrap, 0)
    integer("seed", seed, 0)
    integer("batch_size", batch_size)
    if top_k is not None:
        integer("top_k", top_k)
    concepts = unique_names(explainer.concepts, "concept")
    given = {} if labels is None else {"labels": labels}
    source = inputs_for(model_of(explainer), data, transform=transform, **given)
    if source.streamed:
        raise InputError("an audit reads some images twice; pass an indexable data set instead of a stream")
    if not len(source):
        raise InputError("data contains no images")
    known = class_names if class_names is not None else getattr(explainer, "class_names", None) or source.class_names
    image = placed(explainer, source[0][None])
    check_exclusive_classes(explainer, image)
    first = look(explainer, image, top_k)
    outputs = first.probabilities.shape[1]
    names = [str(k) for k in range(outputs)] if known is None else [str(name) for name in known]
    if len(names) != outputs:
        raise InputError(f"{len(names)} class_names for a model with {outputs} outputs")
    true = _true_classes(source, names)
    names = [
        name if names.count(name) == 1 else f"{name} ({k})" for k, name in enumerate(names)
    ]  # as ImageNet's cranes
    proper = _belonging(belongs, names, concepts)
    probe = [*first.probabilities[0].tolist(), *first.scores[0].tolist()]
    settings: dict[str, Any] = {
        "explainer": str(getattr(explainer, "get_name", lambda: type(explainer).__name__)()),
        "images": _digest("\n".join(source.names).encode()),
        "concepts": concepts,
        "top_k": top_k,
        "probe": [round(value, 6) for value in probe],  # differs for another model or another fit
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
    rows, calibrated = _told(rows)
    unclear = [name for name, column in zip(concepts, rows.presence.T, strict=True) if bool(column.isnan().any())]
    by_score = len(concepts) - sum(calibrated)
    how = {0: "calibrated", len(concepts): "scores split in two groups"}
    settings |= {
        "images": _digest(rows.digests.numpy().tobytes()),
        "alpha": alpha,
        "min_effect": min_effect,
        "n_bootstrap": n_bootstrap,
        "seed": seed,
        "presence": how.get(by_score, f"calibrated; scores split in two groups for {by_score} concepts"),
        "not_told_apart": unclear,
    }
    rng = np.random.default_rng(seed)
    suspected, maps = None, None
    if true is not None:
        if len(unclear) == len(concepts):
            warnings.warn(
                "no concept could be tested, because the explainer does not separate images that show one from "
                "images that do not. See ConceptAudit.not_told_apart",
                InputWarning,
                stacklevel=2,
            )
        suspected = _suspects(rows, true, names, concepts, proper, alpha, min_effect, n_bootstrap, rng)
        suspected = tuple(
            _confirmed(s, explainer, source, rows, true, names, concepts, rng, batch_size) for s in suspected
        )
        if suspected:
            maps = torch.stack([_maps(s, explainer, source, batch_size) for s in suspected])
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
        maps,
    )


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _told(rows: Rows) -> tuple[Rows, list[bool]]:
    """Rows with the presence used in the statistics, and for which concepts it is the calibrated one."""
    scores, presence = rows.scores.double().numpy(), rows.presence.double().numpy()
    if ((scores >= 0) & (scores <= 1)).all():  # log odds separate probabilities close to 0 or 1
        scores = np.log(scores.clip(1e-12)) - np.log((1 - scores).clip(1e-12))
    told = [told_apart(*columns) for columns in zip(scores.T, presence.T, strict=True)]
    found = torch.from_numpy(np.stack([column for column, _ in told], 1)).float()
    return replace(rows, presence=found), [calibrated for _, calibrated in told]


def _belonging(given: Any, names: Sequence[str], concepts: Sequence[str]) -> set[tuple[int, int]]:
    """Pairs (class, concept) that are never suspects."""
    if given is None:
        words = [[set(re.findall(r"\w+", name.casefold())) for name in of] for of in (names, concepts)]
        return {(c, t) for c, a in enumerate(words[0]) for t, b in enumerate(words[1]) if b and b <= a}
    unknown = [name for name in given if name not in names]
    if unknown:
        raise InputError(f"belongs names {unknown[:5]}, which are not among the classes ({listing(list(names), 5)})")
    return {(list(names).index(name), t) for name, own in given.items() for t in name_positions(list(own), concepts)}


def _true_classes(source: ImageSource, names: Sequence[str]) -> Tensor | None:
    """``(N,)`` class indices; labels that are names, or belong to folders, are matched by name."""
    labels = source.labels
    if labels is None:
        return None
    if source.class_names not in (None, list(names)):
        labels = [class_name(k, source.class_names) for k in labels]
    for label in labels:
        if class_name(label, names) not in names:  # the name of a folder, if the images lie in folders
            raise InputError(
                f"label {label!r} is not the name of a class; known: {listing(list(names), 5)}. Pass the names of the "
                "model's outputs as class_names, name the folders after them, or pass images without labels"
            )
        if isinstance(label, str) and names.count(label) > 1:
            raise InputError(f"label {label!r} is the name of {names.count(label)} classes; pass indices as labels")
    return target_indices(list(labels), len(source), len(names), names, what="class")


def _drivers(
    rows: Rows, true: Tensor | None, names: Sequence[str], concepts: Sequence[str], rng: Any, n_bootstrap: int
) -> list[dict[str, Any]]:
    predicted = rows.probabilities.argmax(1).numpy()
    presence, contributions = rows.presence.numpy(), rows.contributions.double().numpy()
    present, told = presence >= SEEN, ~np.isnan(presence).any(0)
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
                        "presence_rate": float(present[here, t].mean()) if told[t] else math.nan,
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
            # Half a pseudo-image with the concept and half without keep the rate off 0 and 1.
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
    proper: set[tuple[int, int]],
    alpha: float,
    min_effect: float,
    n_bootstrap: int,
    rng: np.random.Generator,
) -> tuple[Suspect, ...]:
    labels, probabilities = true.numpy(), rows.probabilities.double().numpy()
    present, told = rows.presence.numpy() >= SEEN, ~rows.presence.isnan().any(0).numpy()
    tested: list[dict[str, Any]] = []
    for t in np.flatnonzero(told):
        seen = present[:, t]
        varies = [y for y in np.unique(labels) if two_groups(seen[labels == y])]
        others_vary = np.isin(labels, varies)
        for c in varies:
            others, own = others_vary & (labels != c), labels == c
            if not others.any() or (int(c), int(t)) in proper:
                continue
            raises, lowers = (
                stratified_difference(probabilities[part, c], seen[part], labels[part]) for part in (others, own)
            )
            tested.append({"c": int(c), "t": int(t), "parts": (others, own), "raises": raises, "lowers": lowers})
    permutations = max(1000, int(20 * len(tested) / alpha))
    p = [_p(one, probabilities, present, labels, rng, permutations) for one in tested]
    for one, adjusted in zip(tested, holm(p), strict=True):
        one["p"], one["effect"] = adjusted, min(one["raises"], one["lowers"])
    clear = [one for one in tested if one["p"] < alpha and one["effect"] >= min_effect]
    found: list[Suspect] = []
    stronger: list[int] = []
    for one in sorted(clear, key=lambda one: -one["effect"]):
        c, t, (others, own) = one["c"], one["t"], one["parts"]
        known = present[:, [k for k in stronger if k != t]]
        partial = [
            partial_effect(probabilities[part, c], present[part, t], known[part], labels[part])
            for part in (others, own)
        ]
        if known.shape[1] and any(e is not None and (e[0] < min_effect or e[1] >= alpha) for e in partial):
            continue
        stronger += [t] if t not in stronger else []
        low, high = math.nan, math.nan
        if n_bootstrap:
            draws = [
                resampled_differences(probabilities[part, c], present[part, t], labels[part], rng, n_bootstrap)
                for part in (others, own)
            ]
            low, high = bootstrap_interval(np.minimum(*draws))
        shown = np.flatnonzero(others & present[:, t])
        shown = shown[np.argsort(-probabilities[shown, c], kind="stable")]
        found.append(
            Suspect(
                names[c], concepts[t], one["raises"], one["lowers"],
                Effect(one["effect"], low, high, int(others.sum() + own.sum())), one["p"], None, None,
                tuple(int(i) for i in shown[:_SHOWN]), tuple(int(i) for i in shown[::-1][:_SHOWN]),
            )
        )  # fmt: skip
    return tuple(found)


def _p(one: dict[str, Any], probabilities: Any, present: Any, labels: Any, rng: Any, permutations: int) -> float:
    """The larger p of the two differences."""
    if min(one["raises"], one["lowers"]) <= 0:
        return 1.0
    c, t = one["c"], one["t"]
    return max(
        permutation_p(probabilities[part, c], present[part, t], labels[part], rng, permutations)
        for part in one["parts"]
    )


def _confirmed(
    suspect: Suspect,
    explainer: Any,
    source: ImageSource,
    rows: Rows,
    true: Tensor,
    names: Sequence[str],
    concepts: Sequence[str],
    rng: np.random.Generator,
    batch_size: int,
) -> Suspect:
    """The suspect with the contribution, by ablation, of its concept in images of other classes that show it."""
    if not isinstance(explainer, ContributionExplainer):
        return suspect
    c, t = names.index(suspect.class_name), concepts.index(suspect.concept)
    wrong = (true != c) & (rows.presence[:, t] >= SEEN)
    places = wrong.nonzero().flatten()
    chosen = places[rows.probabilities[places, c].argsort(descending=True)][:24].tolist()
    if not chosen:
        return suspect
    shown = (placed(explainer, part.images) for part in batches(source.select(chosen), batch_size))
    values = [
        explainer.contributions(images, target=[c] * len(images), concepts=[suspect.concept])[:, 0] for images in shown
    ]
    effect = mean_effect(torch.cat(values).double().cpu().numpy(), rng, 1000)
    return replace(suspect, contribution=effect, confirmed=bool(effect.low > 0))


@autocast_of_the_caller()
def _maps(suspect: Suspect, explainer: Any, source: ImageSource, batch_size: int) -> Tensor:
    """``(12, h, w)`` concept maps of the suspect's images and counterexamples."""
    found = [[], []]  # type: list[list[Tensor]]
    for side, chosen in zip(found, (suspect.images, suspect.counterexamples), strict=True):
        for part in batches(source.select(chosen), batch_size):
            shown = placed(explainer, part.images)
            side += explainer.concept_maps(shown, concepts=[suspect.concept])[:, 0].detach().float().cpu()
    maps = torch.full((2 * _SHOWN, *found[0][0].shape), torch.nan)
    for start, side in zip((0, _SHOWN), found, strict=True):
        maps[start : start + len(side)] = torch.stack(side)
    return maps


def _check_names(info: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` if a row names a class, concept or image that is not listed."""
    known = {"class": set(info["class_names"]), "concept": set(info["concepts"])}
    of = {"true": "class", "predicted": "class", "class_name": "class", "class": "class", "concept": "concept"}
    rows = [*info["drivers"], *info["errors"], *(info["suspected"] or ())]
    wrong = next((row[key] for row in rows for key in of if key in row and row[key] not in known[of[key]]), None)
    shown = [i for row in info["suspected"] or () for i in (*row["images"], *row["counterexamples"])]
    if wrong is not None or any(i >= len(info["image_names"]) for i in shown):
        raise ValueError("its rows name a class, a concept or an image that is not listed")


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
    """``value`` with NaN, which JSON lacks, replaced by ``{"nan": True}``."""
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
