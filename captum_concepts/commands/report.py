"""`report`: new or saved explanations as one HTML file."""

from __future__ import annotations

import datetime
import hashlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from captum_concepts._artifacts import (
    Unfit,
    either,
    flag,
    integer,
    list_of,
    mapping_of,
    nothing_or,
    number,
    read_json,
    table,
    text,
)
from captum_concepts.commands.image_files import Failed, folder_labels
from captum_concepts.commands.outputs import check_outputs, html
from captum_concepts.errors import (
    ArtifactError,
    CaptumConceptsError,
    InputError,
    InputWarning,
    listing,
    printable,
    shortened,
)
from captum_concepts.explanation import ConceptExplanation
from captum_concepts.images import find_images, load_image, names_of
from captum_concepts.images.files import EXPLAINED
from captum_concepts.images.pixels import RESIZES
from captum_concepts.store.manifest import fingerprint_module
from captum_concepts.visualization import ReportWriter


@dataclass(frozen=True)
class SavedSettings:
    """Options of a report of saved explanations.

    Args:
        explanations: the output folder of ``explain --save``, or a file of ``ConceptExplanation.save``.
        report: the HTML file.
        images: for a file, its images in order; for a folder, images outside of it that may be read.
        title, model, class_names, size, resize: override the values in the folder.
        top_k: concepts per image.
    """

    explanations: str
    report: str
    images: Sequence[str] = ()
    title: str | None = None
    model: str | None = None
    class_names: Sequence[str] | None = None
    size: int | None = None
    resize: str | None = None
    top_k: int = 8


_UNSHOWN = ("images", "report", "title", "save", "output", "top_k")


class OpenReport:
    """A report in progress, which is finished with the images so far even after Ctrl-C or an error."""

    def __init__(self, writer: ReportWriter, failed: Failed) -> None:
        self._writer, self._failed = writer, failed

    def add(
        self,
        picture: Tensor,
        explanation: ConceptExplanation,
        title: str,
        significant: Any = None,
        label: str | None = None,
        crop: Any = None,
    ) -> None:
        """Add one image; maps with NaN are reported on stderr and left uncolored."""
        flags = None if significant is None else torch.tensor(significant)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", InputWarning)
            self._writer.add(explanation, picture, name=title, label=label, significant=flags, crop=crop)
        for one in said:
            print(f"warning: {title}: {one.message}", file=sys.stderr)

    def __len__(self) -> int:
        return len(self._writer)

    def __enter__(self) -> OpenReport:
        return self

    def __exit__(self, *_: Any) -> None:
        if not len(self._writer):
            self._writer.discard()
            return
        for entry in self._failed:
            self._writer.add_failure(entry["image"], entry["reason"])
        self._writer.finish()


def open_report(
    settings: Any, class_names: Sequence[str] | None, shown: Mapping[str, Any], failed: Failed
) -> OpenReport:
    """A new report at ``settings.report``, in an existing folder."""
    title = settings.title or f"What {Path(str(settings.model)).name} saw"
    writer = ReportWriter(
        settings.report, title=title, class_names=class_names or None, top_k=settings.top_k, settings=shown
    )
    return OpenReport(writer, failed)


def facts(settings: Any, loaded: Any, explainer: Any) -> dict[str, Any]:
    """Settings and fingerprints of a run, for the table at the end of its report."""
    given = {name: value for name, value in vars(settings).items() if name not in _UNSHOWN and value is not None}
    prints: dict[str, Any] = {"model": fingerprint_module(loaded.model)}
    for name in ("weights", "explainer", "encoder_weights"):
        file = Path(str(getattr(settings, name, None)))
        if file.is_file():
            prints[f"{name.replace('_', ' ')} file"] = _digest(file)
    return {
        "made": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "Settings": {name.replace("_", " "): value for name, value in given.items()}
        | {"input": f"{loaded.size} x {loaded.size} pixels", "concepts": len(explainer.concepts)},
        "Fingerprints": prints,
    }


def report_saved(settings: SavedSettings) -> dict[str, Any]:
    """Write a report of saved explanations.

    The model's inputs are read from the folder of ``explain --save``. An image outside the folder is read only if it is
    in ``settings.images``, because an untrusted index may name any file of this machine.

    Returns:
        ``{"report": ..., "explained": n, "failed": [...]}``.

    Raises:
        InputError, ArtifactError: there are no explanations, or the numbers of images and explanations differ.
    """
    source = Path(settings.explanations)
    check_outputs(vars(settings), {"--output": html("--output", settings.report)})
    failed: Failed = []
    paths = find_images(settings.images) if settings.images else []
    if source.is_dir():
        summary = read_index(source)
        entries = [entry for entry in summary["explained"] if "explanation" in entry]
        if not entries:
            raise InputError(f"{source / EXPLAINED} lists no saved explanations; run 'explain' with --save")
        known = {Path(entry.get("path", entry["image"])).name for entry in entries}
        named = [path for path in map(Path, settings.images) if path.is_file()]  # a folder may contain others
        if unknown := [path.name for path in named if path.name not in known]:
            raise InputError(f"{source} contains no explanation of {listing(unknown)}")
        names = settings.class_names or summary.get("classes") or None
        shown: dict[str, Any] = {
            key: summary[key] for key in ("model", "method", "layer", "size", "resize") if key in summary
        }
        settings = replace(
            settings, model=settings.model or shown.get("model"), size=settings.size or shown.get("size"),
            resize=settings.resize or shown.get("resize"),
        )  # fmt: skip
    else:
        if not source.is_file():
            raise InputError(
                f"there are no saved explanations at {source}; pass a folder written by 'explain --save' or a "
                ".safetensors file"
            )
        whole = ConceptExplanation.load(source)
        if len(paths) != len(whole):
            raise InputError(
                f"{len(paths)} images for the {len(whole)} explanations of {source}; pass one image per explanation, "
                "in the same order"
            )
        if (order := _other_order(paths, whole.image_names)) is not None:
            raise InputError(f"{source} explains {order}; pass the images in that order")
        entries = [{"image": str(path), "explanation": one} for path, one in zip(paths, whole, strict=True)]
        names, shown = settings.class_names, {"explanations": source.name}
    settings = replace(settings, model=settings.model or "the model")
    prints = {} if source.is_dir() else {"Fingerprints": {"explanations file": _digest(source)}}
    with open_report(settings, names, {"Settings": shown, **prints}, failed) as page:
        truths = folder_labels([Path(entry["image"]) for entry in entries], names) or [None] * len(entries)
        shown_names = names_of([Path(entry["image"]) for entry in entries])
        progress = tqdm(entries, unit="image", file=sys.stderr, disable=None)
        for entry, name, truth in zip(progress, shown_names, truths, strict=True):
            try:
                explanation = entry["explanation"]
                if isinstance(explanation, str):
                    explanation = ConceptExplanation.load(_inside(source, explanation))
                picture = _picture(entry, source, paths, settings.size, settings.resize or "crop")
                page.add(picture, explanation, name, entry.get("significant"), truth, entry.get("crop"))
            except (CaptumConceptsError, FileNotFoundError) as error:
                failed.append({"image": printable(entry["image"]), "reason": str(error)})
        done = len(page)
    return {"report": settings.report, "explained": done, "failed": failed}


def _other_order(paths: Sequence[Path], names: Sequence[str] | None) -> str | None:
    """The first saved names, if one of them belongs to another image than the one in its place; otherwise None."""
    ends = [path.as_posix() for path in paths]
    for end, name in zip(ends, names or (), strict=False):
        if not end.endswith(name) and any(other.endswith(name) for other in ends):
            return ", ".join(map(printable, (names or ())[:5])) + (", ..." if len(ends) > 5 else "")
    return None


def _picture(entry: Mapping[str, Any], folder: Path, given: Sequence[Path], size: int | None, resize: str) -> Tensor:
    """The saved photograph, or the model's view of it, read again from its original location."""
    if "input" in entry:
        return load_image(_inside(folder, entry["input"]))
    path, size = Path(entry.get("path", entry["image"])), None if size is None else min(size, 2048)
    named = [one for one in given if one == path or _resolved(one) == _resolved(path)]
    named = named or [one for one in given if one.name == path.name]
    if len(named) == 1:
        return load_image(named[0], size, resize=resize)
    if folder.is_dir() and _resolved(path).is_relative_to(folder.resolve()):
        return load_image(path, size, resize=resize)
    raise InputError(f"{printable(path)} is not in {folder}; pass it by name: report IMAGE --explanations DIR")


def _inside(folder: Path, name: str) -> Path:
    """Path of a file in the folder or its subfolders."""
    file = folder / name
    if _resolved(file) != folder.resolve() / name:  # through a link or a parent folder
        raise ArtifactError(f"{folder / EXPLAINED} names {shortened(name)}, which is not a file in its folder")
    return file


def _resolved(path: Path) -> Path:
    """The path without links; an empty path for an invalid one (too long, with a null byte)."""
    try:
        return path.resolve()
    except (OSError, ValueError):
        return Path()


def _below(value: Any, where: str) -> str:
    """Check for the name of a file in the folder or its subfolders."""
    name = text()(value, where)
    parts = name.split("/")
    if "\0" in name or {".", "..", ""} & set(parts) or any(len(part.encode(errors="replace")) > 255 for part in parts):
        raise Unfit(where, value, "a file in its folder")
    return name


_NUMBERS = mapping_of(nothing_or(number()))
_FIELDS = {
    "path": text(), "picture": _below, "explanation": _below, "input": _below, "top": _NUMBERS, "presence": _NUMBERS,
    "contributions": _NUMBERS, "target": either(integer(), text()), "target_probability": nothing_or(number()),
    "significant": nothing_or(list_of(flag)), **dict.fromkeys(("seen", "crop"), list_of(number(), length=4)),
}  # fmt: skip
_INDEX = table(
    {"explained": list_of(table({"image": text()}, _FIELDS))},
    {
        "model": text(), "method": text(), "layer": text(), "size": integer(1, 10_000), "resize": text(*RESIZES),
        "classes": list_of(text()),
        "failed": list_of(table({"image": text(), "reason": text()})), "begun": mapping_of(_below), "unsaved": text(),
    },
)  # fmt: skip


def read_index(folder: Path) -> dict[str, Any]:
    """Content of ``explanations.json`` in an output folder of ``explain``.

    Raises:
        InputError: there is no such file.
        ArtifactError: the file is damaged or foreign.
    """
    try:
        return dict(read_json(folder / EXPLAINED, _INDEX, "an index of 'explain'"))
    except FileNotFoundError:
        raise InputError(
            f"there is no {EXPLAINED} in {folder}; write it with 'explain --save --output {folder}'"
        ) from None


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()[:32]
