"""One pass over a data set that keeps a few values per image, written in parts so that a killed audit can resume."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_concepts._artifacts import Array, check_expanded, open_artifact, save_artifact
from captum_concepts._captum import output_tensor
from captum_concepts._checks import finite_images
from captum_concepts._undo import autocast_of_the_caller, hooked, warnings_filtered
from captum_concepts.activations import Layers, evaluation_mode, find_model, input_errors
from captum_concepts.attr import batches as attr_batches
from captum_concepts.attr.concept_fusion.ablation import class_link
from captum_concepts.errors import ArtifactError, InputError, InputWarning
from captum_concepts.explanation import ContributionExplainer, Selection
from captum_concepts.images import ImageSource, batches, digest
from captum_concepts.store.processes import all_or_none, world

_PART = "captum_concepts.AuditPart/1"
ARRAYS = {
    "probabilities": Array("float", ("N", "C")),
    "scores": Array("float", ("N", "T")),
    "presence": Array("float", ("N", "T")),
    "contributions": Array("float", ("N", "T")),
    "digests": Array("integer", ("N", 16)),
}


@dataclass(frozen=True)
class Rows:
    """Values of N images, for C classes and T concepts.

    Args:
        probabilities: ``(N, C)`` of the model.
        scores: ``(N, T)`` of the explainer.
        presence: ``(N, T)`` in [0, 1] of the concepts; NaN where it is unclear.
        contributions: ``(N, T)`` to the predicted class; NaN for concepts that are not among the image's ``top_k``.
        digests: ``(N, 16)`` uint8 digests of the model's input pixels.
    """

    probabilities: Tensor
    scores: Tensor
    presence: Tensor
    contributions: Tensor
    digests: Tensor

    def __len__(self) -> int:
        return len(self.probabilities)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {name: getattr(self, name) for name in ARRAYS}

    @classmethod
    def join(cls, parts: Sequence[Rows]) -> Rows:
        """Concatenated rows of several parts."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ARRAYS))


def model_of(explainer: Any) -> Callable[[Tensor], Any]:
    """The explained model, which is ``forward_func``, or the explainer itself if it is a classifier.

    Raises:
        InputError: the explainer has no ``forward_func`` and is not callable.
    """
    found = getattr(explainer, "forward_func", explainer)
    if not callable(found):
        raise InputError(f"{type(explainer).__name__} has neither forward_func nor its own forward method")
    return found


def placed(explainer: Any, images: Tensor) -> Tensor:
    """``images`` on the device and in the dtype of the explainer's model."""
    return attr_batches.placed(images, find_model(model_of(explainer)))


@torch.no_grad()
def class_probabilities(explainer: Any, inputs: Tensor) -> Tensor:
    """``(N, C)`` softmax of the model's outputs, or the outputs themselves if they are probabilities already.

    Raises:
        InputError: the outputs are not ``(N, C)`` with at least two classes.
    """
    function = model_of(explainer)
    model = find_model(function)
    with evaluation_mode(model), input_errors((inputs,), None if model is None else model.modules()):
        return _probabilities(output_tensor(function(inputs)), explainer)


def check_exclusive_classes(explainer: Any, image: Tensor) -> None:
    """Refuse labels that are independent of each other, whose probabilities do not sum to 1.

    Raises:
        InputError: the model has ``multi_label=True`` or ends in a sigmoid, or contributions are read by a sigmoid.
    """
    why = ""
    if getattr(explainer, "multi_label", False):
        why = "this model has multi_label=True"
    elif getattr(explainer, "class_probability", None) == "sigmoid":
        why = "the explainer has class_probability='sigmoid'"
    elif Layers.resolve(model_of(explainer), []).capture(image, logits=True).final == "sigmoid":
        why = "this model ends in a sigmoid"
    if why:
        raise InputError(f"an audit requires mutually exclusive classes, but {why}")


def _probabilities(outputs: Tensor, explainer: Any) -> Tensor:
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise InputError(f"an audit needs a classifier with outputs (N, classes), got {tuple(outputs.shape)}")
    with warnings_filtered("ignore", InputWarning):  # of contributions, which the explainer itself gives
        link = class_link(getattr(explainer, "class_probability", "auto"), outputs, None)
    outputs = outputs.detach().float()
    return outputs.softmax(1) if link == "softmax" else outputs


@autocast_of_the_caller()
def look(explainer: Any, inputs: Tensor, top_k: int | None) -> Rows:
    """Rows of some images, on the CPU.

    A method that explains all concepts at the cost of a few (``explains_all_at_once``) is called once, and hooks record
    the model's outputs meanwhile, so an audit costs no more than ``explain``.
    """
    names = list(explainer.concepts)
    contributions = torch.full((len(inputs), len(names)), torch.nan, dtype=torch.float32)
    if getattr(explainer, "explains_all_at_once", False):
        heard: list[Tensor] = []
        function = model_of(explainer)
        listening = [function] if isinstance(function, torch.nn.Module) else []
        with hooked(listening, lambda _m, _a, _k, output: heard.append(output_tensor(output).detach())):
            made = explainer.explain(inputs, top_k=None)
        order = [made.concepts.index(name) for name in names]
        scores, presence = made.scores[:, order], None if made.presence is None else made.presence[:, order]
        if sum(map(len, heard)) == len(inputs):
            probabilities = _probabilities(torch.cat(heard), explainer)
        elif model_of(explainer) is explainer and hasattr(explainer, "head"):
            with torch.no_grad():
                dtype = next(explainer.head.parameters()).dtype  # the scores of a model in half precision are not
                probabilities = _probabilities(explainer.head(scores.to(dtype)), explainer)
        else:
            probabilities = class_probabilities(explainer, inputs)
        moved = made.contributions[:, order].float().cpu()
        values = moved if made.rank_by == "contributions" else scores
        strongest = Selection.of(values, top_k, made.rank_by).index.cpu()
        contributions.scatter_(1, strongest, moved.gather(1, strongest))
    else:
        probabilities = class_probabilities(explainer, inputs)
        scores, presence = explainer.scores(inputs), _presence(explainer, inputs)
        if isinstance(explainer, ContributionExplainer):
            made = explainer.explain(inputs, target=probabilities.argmax(1).tolist(), top_k=top_k)
            if made.contributions is not None:
                columns = [names.index(name) for name in made.concepts]
                contributions[:, columns] = made.contributions.float().cpu()
    codes = torch.stack([_code(image) for image in inputs])
    unknown = torch.full_like(scores, torch.nan, dtype=torch.float32) if presence is None else presence
    kept = dict(zip(ARRAYS, (probabilities, scores, unknown, contributions), strict=False))
    return Rows(**{name: value.detach().float().cpu() for name, value in kept.items()}, digests=codes)


def _presence(explainer: Any, inputs: Tensor) -> Tensor | None:
    """``(N, T)`` calibrated presence, or None if the explainer has none."""
    function = getattr(explainer, "presence", None)
    try:
        found: Tensor | None = function(inputs) if callable(function) else None
    except InputError:  # not calibrated
        return None
    return found


def collect_rows(
    explainer: Any,
    source: ImageSource,
    *,
    top_k: int | None,
    batch_size: int,
    part_size: int,
    folder: Path | None,
    settings: dict[str, Any],
    show_progress: bool,
) -> Rows:
    """The rows of all images; parts in ``folder`` are read instead of computed if their images are unchanged.

    Under ``torch.distributed``, rank r computes the parts r, r + n, ..., and all ranks then read all parts.

    Raises:
        ArtifactError: ``folder`` contains parts of another audit.
    """
    from tqdm import tqdm

    rank, size = world()
    if size > 1 and folder is None:
        raise InputError("several processes require store_path=, a folder that all of them can access")
    starts = list(range(0, len(source), part_size))
    made: dict[int, Rows] = {}

    def compute() -> None:
        mine = [(k, start) for k, start in enumerate(starts) if k % size == rank]
        for k, start in tqdm(mine, desc="audit", unit="part", disable=not show_progress):
            path = None if folder is None else folder / f"part-{k:06d}.safetensors"
            stop = min(start + part_size, len(source))
            if path is not None and path.is_file():
                found = batches(source.select(range(start, stop)), batch_size)
                shown = (pair for one in found for pair in zip(one.names, placed(explainer, one.images), strict=True))
                _check_images(path, _read(path, settings | {"start": start}), shown)
                continue
            rows = _part(explainer, source.select(range(start, stop)), top_k, batch_size)
            if path is None:
                made[k] = rows
            else:
                save_artifact(path, _PART, settings | {"start": start}, rows.tensors())

    all_or_none(compute)
    if folder is None:
        return Rows.join([made[k] for k in range(len(starts))])
    paths = [folder / f"part-{k:06d}.safetensors" for k in range(len(starts))]
    return Rows.join([_read(path, settings | {"start": s}) for path, s in zip(paths, starts, strict=True)])


def _part(explainer: Any, source: ImageSource, top_k: int | None, batch_size: int) -> Rows:
    parts = []
    for batch in batches(source, batch_size):
        parts.append(look(explainer, placed(explainer, batch.images), top_k))
        finite_images(torch.cat([parts[-1].probabilities, parts[-1].scores], 1), batch.names, "the model's output")
    return Rows.join(parts)


def _check_images(path: Path, rows: Rows, images: Iterator[tuple[str, Tensor]]) -> None:
    """Raise an ``ArtifactError`` if the pixels of the part's images differ."""
    codes = rows.digests.tolist()
    for k, (name, image) in enumerate(images):
        if k >= len(codes) or _code(image).tolist() != codes[k]:
            raise ArtifactError(
                f"{path} belongs to another audit: {name} has different pixels, or was not in it; use another "
                "store_path"
            )


def _read(path: Path, settings: dict[str, Any]) -> Rows:
    with open_artifact(path, _PART, "a part of an audit", arrays=ARRAYS) as (info, tensors):
        settings = json.loads(json.dumps(settings))
        changed = {key for key in {*info, *settings} if not _same(info.get(key), settings.get(key), key)}
        if changed:
            what = ", ".join(sorted(changed))[:200]
            raise ArtifactError(f"{path} belongs to another audit, with different {what}; use another store_path")
        return Rows(**tensors)


def _code(image: Tensor) -> Tensor:
    return torch.frombuffer(bytearray(digest(image, 16)), dtype=torch.uint8)


def _same(a: Any, b: Any, key: str) -> bool:
    """Whether two settings are equal; the probe is compared within numerical tolerance."""
    if key != "probe" or not isinstance(a, list) or not isinstance(b, list) or len(a) != len(b):
        return bool(a == b)
    return all(abs(x - y) <= 1e-4 + 1e-3 * abs(y) for x, y in zip(a, b, strict=True))


def prepared_folder(path: str | os.PathLike[str] | None) -> Path | None:
    """Folder of the parts, created if needed; None for None."""
    if path is None:
        return None
    folder = Path(path)
    check_expanded(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
