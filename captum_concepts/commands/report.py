"""`report`: explanations as one HTML file, made now or from those that were saved."""

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

from captum_concepts._artifacts import check_json, flag, integer, list_of, nothing_or, parse_json, table, text
from captum_concepts.commands.image_files import Failed, folder_labels
from captum_concepts.errors import CaptumConceptsError, InputError, InputWarning
from captum_concepts.explanation import ConceptExplanation
from captum_concepts.images import find_images, load_image
from captum_concepts.store.manifest import fingerprint_module
from captum_concepts.visualization import ReportWriter


@dataclass(frozen=True)
class SavedSettings:
    """What a report of saved explanations is made from.

    Args:
        explanations: the output folder of ``explain --save``, or a file of ``ConceptExplanation.save``.
        report: the HTML file.
        images: the images of such a file, in its order.
        title, model, class_names, size: instead of what the folder says.
        top_k: concepts shown an image.
    """

    explanations: str
    report: str
    images: Sequence[str] = ()
    title: str | None = None
    model: str | None = None
    class_names: Sequence[str] | None = None
    size: int | None = None
    top_k: int = 8


#: ``explanations.json``, as far as it is used; an image is shown at ``size``.
_SUMMARY = table(
    {
        "explained": list_of(
            table({"image": text(), "explanation": text()}, {"significant": nothing_or(list_of(flag))}, more=True)
        )
    },
    {
        "classes": nothing_or(list_of(text())),
        **{name: nothing_or(text()) for name in ("model", "method", "layer")},
        "size": nothing_or(integer(1, 2048)),
    },
    more=True,
)
_UNSHOWN = ("images", "report", "title", "save", "output", "top_k")


class OpenReport:
    """A report being written; left by Ctrl-C or an error, it is finished with the images so far."""

    def __init__(self, writer: ReportWriter, failed: Failed) -> None:
        self._writer, self._failed = writer, failed

    def add(
        self,
        image: Tensor,
        explanation: ConceptExplanation,
        title: str,
        significant: Any = None,
        label: str | None = None,
    ) -> None:
        """One image; maps with NaN are said on stderr and left uncoloured."""
        flags = None if significant is None else torch.tensor(significant)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", InputWarning)
            self._writer.add(explanation, image, name=title, label=label, significant=flags)
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
    """A report at ``settings.report``, whose folder is made if need be."""
    path = Path(settings.report)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of an HTML file")
    path.parent.mkdir(parents=True, exist_ok=True)
    title = settings.title or f"What {Path(str(settings.model)).name} saw"
    writer = ReportWriter(path, title=title, class_names=class_names or None, top_k=settings.top_k, settings=shown)
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
    """A report of explanations that were saved; the images are read again from where they were.

    Returns:
        ``{"report": ..., "explained": n, "failed": [...]}``.

    Raises:
        InputError, ArtifactError: nothing there, or not as many images as explanations.
    """
    source = Path(settings.explanations)
    failed: Failed = []
    if source.is_dir():
        summary = _summary(source)
        entries = summary["explained"]
        names = settings.class_names or summary.get("classes") or None
        shown: dict[str, Any] = {key: summary[key] for key in ("model", "method", "layer", "size") if key in summary}
        settings = replace(settings, model=settings.model or str(summary.get("model", "the model")))
    else:
        whole = ConceptExplanation.load(source) if source.is_file() else None
        if whole is None:
            raise InputError(
                f"no saved explanations at {source}; give a folder of 'explain --save' or a .safetensors file"
            )
        paths = find_images(settings.images) if settings.images else []
        if len(paths) != len(whole):
            raise InputError(
                f"{len(paths)} images for the {len(whole)} explanations of {source}; give them in its order"
            )
        entries = [{"image": str(path), "explanation": one} for path, one in zip(paths, whole, strict=True)]
        names, shown = settings.class_names, {"explanations": source.name}
        settings = replace(settings, model=settings.model or "the model")
    prints = {} if source.is_dir() else {"Fingerprints": {"explanations file": _digest(source)}}
    with open_report(settings, names, {"Settings": shown, **prints}, failed) as page:
        truths = folder_labels([Path(entry["image"]) for entry in entries], names) or [None] * len(entries)
        for entry, truth in zip(tqdm(entries, unit="image", file=sys.stderr, disable=None), truths, strict=True):
            try:
                explanation = entry["explanation"]
                if not isinstance(explanation, ConceptExplanation):
                    explanation = ConceptExplanation.load(source / str(explanation))
                image = load_image(entry["image"], settings.size or (shown.get("size") if source.is_dir() else None))
            except (CaptumConceptsError, FileNotFoundError) as error:
                failed.append({"image": str(entry["image"]), "reason": str(error)})
                continue
            page.add(image[None], explanation, Path(entry["image"]).name, entry.get("significant"), truth)
        done = len(page)
    return {"report": settings.report, "explained": done, "failed": failed}


def _summary(folder: Path) -> dict[str, Any]:
    file = folder / "explanations.json"
    try:
        found = parse_json(file.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"no explanations.json in {folder}; it is written by 'explain --save --output {folder}'"
        ) from None
    except ValueError as error:
        raise InputError(f"{file} names no saved explanations ({error}); run 'explain' with --save") from error
    return dict(check_json(found, _SUMMARY, f"{file}, which 'explain --save' writes,", InputError))


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()[:32]
