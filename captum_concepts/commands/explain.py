"""`explain`: explanations of the user's images and model, as one figure per image and one HTML report."""

from __future__ import annotations

import gc
import io
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from captum_concepts._artifacts import write_atomically
from captum_concepts._checks import integer
from captum_concepts.commands.explainers import build_explainer, new_explainer
from captum_concepts.commands.image_files import each_image, folder_labels
from captum_concepts.commands.outputs import check_folder, check_outputs, html
from captum_concepts.commands.report import facts, open_report, read_index
from captum_concepts.commands.settings import ExplainerSettings
from captum_concepts.errors import InputError, InputWarning, printable, shortened
from captum_concepts.explanation import SEEN, ConceptExplanation, short
from captum_concepts.images import Photograph, find_images, load_photograph, names_of
from captum_concepts.images.files import EXPLAINED
from captum_concepts.store import FolderLock

#: Minimum number of seconds between two writes of the index.
_NOTED = 5.0


@dataclass(frozen=True, kw_only=True)
class ExplainSettings(ExplainerSettings):
    """Options of ``explain`` and ``report``; every field is an option of the command line.

    Args:
        output: folder for figures and ``explanations.json``; None writes neither.
        report: an HTML file; None writes none.
        save: whether to save each explanation as ``NAME.safetensors`` in ``output``.
    """

    images: Sequence[str]
    output: str | None = None
    top_k: int = 3
    report: str | None = None
    save: bool = False
    title: str | None = None


def explain(settings: ExplainSettings) -> dict[str, Any]:
    """Explain every readable image and write figures, ``explanations.json`` and an HTML report.

    With ``words`` (or a saved ``explainer``), concepts are explained by CE-FAM, SpatialACV or SALF-CBM. With
    ``references`` (one folder per class), FAM compares the model's embedding with the class prototypes. Without either,
    FAM explains the model's own outputs.

    Returns:
        ``{"explained": [...], "failed": [...], ...}``, as written to ``explanations.json``; ``"unsaved"`` contains the
        error if figures or the report could not be written.

    Raises:
        InputError, LayerError, ArtifactError: nothing can be explained with these settings.
    """
    read = vars(settings)
    if settings.report is None:
        settings.refuse(("title",), "it is for --report")
    named = "--report" if settings.output else "--output"
    page_file = None if settings.report is None else html(named, settings.report)
    paths = find_images(settings.images)
    files = dict(zip(names_of(paths), paths, strict=True))
    integer("--top-k", settings.top_k, 1)
    out = None if settings.output is None else check_folder(settings.output, read, paths)
    check_outputs(read, {named: page_file, "--explainer": new_explainer(settings)})
    loaded = settings.load()
    failed: list[dict[str, str]] = []
    explainer = build_explainer(settings, loaded, failed)
    summary: dict[str, Any] = {"model": settings.model, "method": explainer.name, "layer": explainer.layer}
    summary |= {"size": loaded.size, "resize": loaded.preprocessing.resize}
    summary |= {"classes": list(explainer.class_names or []), "explained": [], "failed": failed}
    truths = dict(zip(paths, folder_labels(paths, explainer.class_names) or [None] * len(paths), strict=True))
    try:
        with ExitStack() as stack:
            folder = None if out is None else stack.enter_context(PictureFolder(out, summary, _placed(paths, settings)))
            page = None
            if settings.report is not None:
                page = open_report(settings, explainer.class_names, facts(settings, loaded, explainer), failed)
                stack.push(page)
            progress = stack.enter_context(tqdm(total=len(paths), unit="image", file=sys.stderr, disable=None))
            source = loaded.open(list(files.values()))
            gc.freeze()  # figures create much garbage, for which the collector would traverse all loaded objects
            stack.callback(gc.unfreeze)
            for name, image in each_image(source, failed):
                path = files[name]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", InputWarning)  # already issued when the image was read
                    photograph = load_photograph(path, source.reading)
                inputs = loaded.prepare(image[None]).to(settings.device)
                explanation = explainer.explain(inputs, settings.top_k).to("cpu")
                entry: dict[str, Any] = {"image": str(path), "seen": [round(v, 1) for v in photograph.seen]}
                entry |= _entry(explanation, explainer.class_names)
                flags = explainer.significant(explanation)
                if folder is not None:
                    stem = folder.stem(path)
                    entry["picture"] = f"{stem}.png"
                    _draw(photograph, explanation, folder.path / entry["picture"], name, flags, explainer.class_names)
                    if settings.save:
                        entry |= {"explanation": f"{stem}.safetensors", "input": f"{stem}.input.png"}
                        explanation.save(folder.path / entry["explanation"])
                        write_atomically(folder.path / entry["input"], _png(photograph.picture))
                        entry |= {} if photograph.crop is None else {"crop": list(photograph.crop)}
                        entry["significant"] = flags
                if page is not None:
                    page.add(photograph.picture, explanation, name, flags, truths[path], photograph.crop)
                summary["explained"].append(entry)
                if folder is not None:
                    folder.note()
                progress.update()
    except OSError as error:  # a full disk: the results are still printed
        if not summary["explained"]:
            raise
        summary["unsaved"] = f"{error}; the files written so far are whole"
    return summary


class PictureFolder:
    """The output folder, whose index lists its files, including those of earlier runs; no other files are overwritten.

    Subfolders of the images are kept. The index is written first, with the names of all figures to come, so that the
    next run knows every file that a killed run has left.

    Args:
        path: the folder.
        summary: summary of this run, whose list ``"explained"`` grows.
        images: images of this run, with their subfolders.

    Raises:
        InputError: the folder contains explanations of another model or method.
        ArtifactError: the index is damaged or foreign, or another process is writing into the folder.
    """

    def __init__(self, path: Path, summary: dict[str, Any], images: Mapping[Path, PurePosixPath]) -> None:
        self.path = path
        self._summary, self._images = summary, images
        path.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(path, "the output folder")

    def __enter__(self) -> PictureFolder:
        self._lock.__enter__()
        try:
            self._earlier = read_index(self.path) if os.path.lexists(self.path / EXPLAINED) else {}
            for key in ("model", "method", "layer", "size", "resize", "classes") if self._earlier else ():
                if self._earlier.get(key, self._summary[key]) != self._summary[key]:
                    raise InputError(
                        f"{printable(self.path)} contains explanations of another run ({key}: "
                        f"{shortened(self._earlier[key])}, not {shortened(self._summary[key])}); pass another folder"
                    )
            self._stems = self._named()
            self._begun = {str(path.absolute()): self._stems[path] for path in self._images}
            self._write(begun=self._begun)
            self._next = time.monotonic() + _NOTED
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self._write()
        finally:
            self._lock.__exit__(None, None, None)

    def note(self) -> None:
        """Write the index from time to time, so that a killed run leaves what it has explained so far."""
        begun = time.monotonic()
        if begun >= self._next:
            self._write(begun=self._begun)
            took = time.monotonic() - begun  # grows with the index
            self._next = begun + took + max(_NOTED, 50 * took)

    def stem(self, image: Path) -> str:
        """Stem of the files of an image, relative to the folder; creates its subfolder."""
        (self.path / self._stems[image]).parent.mkdir(parents=True, exist_ok=True)
        return self._stems[image]

    def _named(self) -> dict[Path, str]:
        """One name per image, the one from an earlier run, or a new one that no file in the folder has."""
        known = {_place(entry): entry["picture"].removesuffix(".png") for entry in self._earlier.get("explained", [])}
        known = {**self._earlier.get("begun", {}), **known}
        used = {stem.casefold() for stem in known.values()}
        there: dict[PurePosixPath, set[str]] = {}
        named: dict[Path, str] = {}
        for path, folder in self._images.items():
            stem = known.get(str(path.absolute()))
            if stem is None:
                if folder not in there:
                    own = self.path / folder
                    there[folder] = {name.casefold() for name in os.listdir(own)} if own.is_dir() else set()  # noqa: PTH208
                name = _file_name(path.stem)
                candidates = (name if k == 1 else f"{name}-{k}" for k in count(1))
                stem = next(
                    str(folder / candidate)
                    for candidate in candidates
                    if str(folder / candidate).casefold() not in used
                    and not _files(candidate.casefold()) & there[folder]
                )
                used.add(stem.casefold())
            named[path] = stem
        return named

    def _write(self, **begun: Any) -> None:
        done = [{**entry, "path": _place(entry)} for entry in self._summary["explained"]]
        failed = list(self._summary["failed"])
        again = {entry["path"] for entry in done}
        kept = [entry for entry in self._earlier.get("explained", []) if _place(entry) not in again]
        again |= {_place(entry) for entry in failed}
        lost = [one for one in self._earlier.get("failed", []) if _place(one) not in again]
        index = {**self._summary, "explained": [*kept, *done], "failed": [*lost, *failed], **begun}
        write_atomically(self.path / EXPLAINED, json.dumps(index, indent=2) + "\n")


def _placed(paths: Sequence[Path], settings: ExplainSettings) -> dict[Path, PurePosixPath]:
    """Folder of each image, relative to the given folder that contains it."""
    roots = [Path(given) for given in settings.images if os.path.isdir(given)]  # noqa: PTH112
    placed = {}
    for path in paths:
        parents = [path.parent.relative_to(root) for root in roots if path.is_relative_to(root)]
        folder = min(parents, key=lambda parent: len(parent.parts), default=Path())
        placed[path] = PurePosixPath(*map(_file_name, folder.parts))
    return placed


def _file_name(name: str) -> str:
    """A printable name that leaves room for suffixes within the limit of 255 bytes."""
    return printable(name).encode()[:200].decode(errors="ignore")


def _place(entry: dict[str, Any]) -> str:
    """Path of an entry's image."""
    return str(entry.get("path", Path(entry["image"]).absolute()))


def _files(stem: str) -> set[str]:
    return {f"{stem}{ending}" for ending in (".png", ".safetensors", ".input.png")}


def _png(image: Tensor) -> bytes:
    """PNG of the displayed photograph, for a later report."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().byte()
    shown = Image.fromarray((pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).contiguous().numpy())
    file = io.BytesIO()
    shown.save(file, "PNG")
    return file.getvalue()


def _entry(explanation: ConceptExplanation, names: Sequence[str] | None) -> dict[str, Any]:
    """An image's entry in ``explanations.json``."""
    entry: dict[str, Any] = {
        "top": {c: _number(s) for c, s in zip(explanation.concepts, explanation.scores[0], strict=True)}
    }
    if explanation.presence is not None:
        values = zip(explanation.concepts, explanation.presence[0], strict=True)
        entry["presence"] = {c: _number(v) for c, v in values}
    if explanation.target is not None:
        target = int(explanation.target[0])
        entry["target"] = names[target] if names else target
    if explanation.target_probability is not None:
        entry["target_probability"] = _number(explanation.target_probability[0])
    if explanation.contributions is not None:
        values = zip(explanation.concepts, explanation.contributions[0], strict=True)
        entry["contributions"] = {c: _number(v) for c, v in values}
    return entry


def line_of(entry: dict[str, Any]) -> str:
    """Line on one image with its prediction and concepts; those that are not seen are marked."""
    predicted = ""
    if "target" in entry and entry.get("target_probability") is not None:
        predicted = f"{entry['target']} {entry['target_probability']:.2f} <- "
    chances = {name: chance for name, chance in entry.get("presence", {}).items() if chance is not None}
    words = [
        f"{name} {'n/a' if score is None else short(score)}" + (" (not seen)" if chances.get(name, 1) < SEEN else "")
        for name, score in entry["top"].items()
    ]
    return f"{printable(entry['image'])}: {predicted}" + ", ".join(words)


def _number(value: Tensor) -> float | None:
    """A number with six decimals, or None, which JSON can represent, if it is not finite."""
    number = float(value)
    return round(number, 6) if math.isfinite(number) else None


def _draw(
    shown: Photograph, explanation: ConceptExplanation, path: Path, title: str, flags: Any, names: Sequence[str] | None
) -> None:
    from captum_concepts.visualization import panel_image, save_figure

    k = len(explanation.concepts)
    image = panel_image(
        explanation, shown.picture, top_k=k, title=title, crop=shown.crop, significant=flags, class_names=names
    )
    save_figure(image, path)
