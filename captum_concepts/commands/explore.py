"""`explore` and `audit`: an interactive page of the user's images and model, and an audit of a data set."""

from __future__ import annotations

import json
import operator
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from captum_concepts.audit import ConceptAudit, audit_dataset, compare_audits
from captum_concepts.commands.explainers import build_explainer, new_explainer
from captum_concepts.commands.image_files import Failed, folder_labels
from captum_concepts.commands.outputs import artifact, check_outputs, html
from captum_concepts.commands.processes import is_first, processes
from captum_concepts.commands.settings import ExplainerSettings
from captum_concepts.errors import InputError, printable
from captum_concepts.images import class_folders, find_images

_COMPARED: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le, "==": operator.eq,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ExploreSettings(ExplainerSettings):
    """Options of ``explore``; every field is an option of the command line."""

    images: Sequence[str]
    output: str
    title: str | None = None


def explore_command(settings: ExploreSettings) -> dict[str, Any]:
    """Write one interactive HTML page for marking regions and editing concepts.

    Images in folders named after the model's classes have true labels, by which wrong predictions come first.

    Raises:
        InputError, LayerError, ArtifactError: nothing can be explained with these settings.
    """
    from captum_concepts.visualization.explorer import explore

    out = html("--output", settings.output)
    paths = find_images(settings.images)
    check_outputs(vars(settings), {"--output": out, "--explainer": new_explainer(settings)})
    loaded = settings.load()
    failed: Failed = []
    explainer = build_explainer(settings, loaded, failed)
    labels = folder_labels(paths, explainer.class_names)
    how = loaded.preprocessing
    source = loaded.open(paths, labels=False if labels is None else labels, normalize=how)
    title = settings.title or f"What {Path(settings.model).name} saw"
    page = explore(
        explainer.method,
        source,
        class_names=explainer.class_names,
        batch_size=settings.batch_size,
        title=title,
        setup=(
            f"from captum_concepts.images import Preprocessing, open_images\n\nhow = {how!r}\n"
            f"images = open_images({list(settings.images)!r}, size={loaded.size}, mode={source.reading.mode!r}, "
            "preprocessing=how, normalize=how)"
        ),
    )
    failed += source.skipped
    page.save(out)
    return {"output": str(out), "images": len(source), "method": explainer.name, "failed": failed}


@dataclass(frozen=True, kw_only=True)
class AuditSettings(ExplainerSettings):
    """Options of ``audit``; every field is an option of the command line.

    Args:
        data: a folder, with one folder of images per class if labels are known. If neither ``classes`` nor the model
            defines names of the outputs, the folders in sorted order do.
        output: the HTML page.
        save: file to which the audit is also saved, for ``against``.
        against: a saved audit of the same images to compare with.
        fail_on: a condition on ``suspects``, ``gained`` or ``accuracy_change``, such as ``"suspects>0"``.
        store: folder from which a killed audit resumes, and with which processes under ``torchrun`` split the work.
    """

    data: str
    output: str
    save: str | None = None
    against: str | None = None
    fail_on: str | None = None
    alpha: float = 0.05
    min_effect: float = 0.02
    top_k: int = 5
    seed: int = 0
    store: str | None = None


def audit_command(settings: AuditSettings) -> dict[str, Any]:
    """Audit a folder of images, write the page, and compare with an earlier audit.

    Returns:
        Counts and suspects, ``"against"`` if compared, ``"holds"`` (whether ``fail_on`` is true), and ``"first"``
        (whether this is the process that writes and prints).

    Raises:
        InputError, ArtifactError: nothing can be audited with these settings.
    """
    with processes(settings.device) as device:
        return _audited(replace(settings, device=device))


def _audited(settings: AuditSettings) -> dict[str, Any]:
    out = html("--output", settings.output)
    condition = None if settings.fail_on is None else _condition(settings.fail_on)
    written = {"--output": out, "--save": settings.save, "--explainer": new_explainer(settings)}
    check_outputs(vars(settings), written)
    artifact("--save", settings.save)
    settings.refuse(("references", "similarity"), "an audit explains a classifier's outputs, not similarities")
    before = None if settings.against is None else ConceptAudit.load(settings.against)
    if condition is not None and condition[0] != "suspects" and before is None:
        raise InputError(f"--fail-on {settings.fail_on!r} compares with an earlier audit; pass --against FILE")
    has_concepts = settings.explainer is not None or settings.words is not None
    if condition is not None and condition[0] != "accuracy_change" and not has_concepts:
        raise InputError(
            f"--fail-on {settings.fail_on!r} needs concepts other than the model's own classes, since a class cannot "
            "be a shortcut to another; pass --explainer or --words"
        )
    loaded = settings.load()
    failed: Failed = []
    explainer = build_explainer(settings, loaded, failed)
    folders = _by_class(settings.data)
    if condition is not None and not folders:
        raise InputError(
            f"--fail-on {settings.fail_on!r} needs the true classes: one folder of images per class in "
            f"{printable(settings.data)}"
        )
    names = explainer.class_names
    if (
        folders
        and settings.classes is None
        and not loaded.classes
        and getattr(explainer.method, "class_names", None) is None
    ):
        if names is not None and len(names) != len(folders):
            raise InputError(
                f"{settings.data} has {len(folders)} class folders, but the model has {len(names)} outputs; pass "
                "--classes FILE with the names of the outputs, as the folders are named"
            )
        names = list(folders)  # in order, as torchvision's ImageFolder numbers them
    paths = [path for files in folders.values() for path in files] or find_images([settings.data])
    labels = [name for name, files in folders.items() for _ in files] or False
    shown = loaded.open(paths, labels=labels)
    prepared = loaded.open(paths, labels=labels, normalize=loaded.preprocessing)
    audit = audit_dataset(
        explainer.method,
        prepared,
        class_names=names,
        alpha=settings.alpha,
        min_effect=settings.min_effect,
        top_k=settings.top_k,
        seed=settings.seed,
        batch_size=settings.batch_size,
        store_path=settings.store,
        show_progress=is_first(),
    )
    failed += prepared.skipped
    unsaved = None
    try:
        if settings.save is not None and is_first():
            audit.save(settings.save)
        if is_first():
            audit.report(out, shown, title=f"What drives {Path(settings.model).name}")
    except OSError as error:  # a full disk: the results are still printed
        unsaved = str(error)
    suspects = [] if audit.suspected is None else audit.to_records("suspects")
    made: dict[str, Any] = {
        "output": str(out), "images": len(audit), "accuracy": audit.accuracy, "suspects": suspects, "failed": failed,
        "text": repr(audit), "first": is_first(), **({} if unsaved is None else {"unsaved": unsaved}),
    }  # fmt: skip
    facts = {"suspects": float(len(suspects))}
    if before is not None:
        change = compare_audits(before, audit)
        made["text"] += f"\n{change!r}"
        made["against"] = {
            kind: [[s.class_name, s.concept] for s in getattr(change, kind)] for kind in ("gained", "lost", "kept")
        } | {"accuracy_change": change.accuracy_change}
        facts |= {"gained": float(len(change.gained))}
        facts |= {} if change.accuracy_change is None else {"accuracy_change": change.accuracy_change[0]}
    if condition is not None:
        name, compare, number = condition
        if name not in facts:
            raise InputError(f"--fail-on {settings.fail_on!r}: the audit of --against {settings.against} has no labels")
        made["holds"] = bool(compare(facts[name], number))
    return made


def _by_class(data: str) -> dict[str, list[Path]]:
    """Images by class; empty if no subfolder contains images."""
    try:
        return class_folders(data)
    except InputError:
        if os.path.isdir(data) and any(path.parent != Path(data) for path in find_images(data)):  # noqa: PTH112
            raise  # a class without images would shift the indices of the others
        return {}


def _condition(text: str) -> tuple[str, Callable[[float, float], bool], float]:
    match = re.fullmatch(r"\s*(suspects|gained|accuracy_change)\s*(>=|<=|==|>|<)\s*(-?[0-9.]+)\s*", text)
    if match is None:
        raise InputError(
            f"--fail-on {text!r} is not a condition; pass for example 'suspects>0', 'gained>0' or "
            "'accuracy_change<-0.01'"
        )
    try:
        return match[1], _COMPARED[match[2]], float(match[3])
    except ValueError:
        raise InputError(f"--fail-on {text!r}: {match[3]!r} is not a number") from None


def as_json(made: dict[str, Any]) -> str:
    """The result as JSON, for ``--json``."""
    return json.dumps({key: value for key, value in made.items() if key not in ("text", "first")}, indent=2)
