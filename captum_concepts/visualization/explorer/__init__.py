"""Interactive page of a region's concepts, with edits and their effect on the classes, as one standalone HTML file."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from markupsafe import Markup
from torch import Tensor

from captum_concepts._artifacts import check_destination, write_atomically
from captum_concepts._checks import integer, name_positions
from captum_concepts._undo import evaluation_mode, unharming
from captum_concepts.errors import InputError
from captum_concepts.explanation import SEEN, ConceptExplainer, ConceptExplanation
from captum_concepts.images import ImageSource
from captum_concepts.images.source import of_files
from captum_concepts.visualization.inputs import (
    TrueClass,
    check_targets,
    each_of,
    reader_of,
    shown_batches,
    targets_of,
    warn_of_unknown_class,
)
from captum_concepts.visualization.overlay import as_images
from captum_concepts.visualization.pictures import Picture, palette, photo
from captum_concepts.visualization.scale import ColorScale, schemes
from captum_concepts.visualization.templates import asset, clean, template

#: Default number of concepts per image for methods without edits.
_TOP = 40
#: Number of strongest concepts by which an image can be found.
_FOUND_BY = 5
_TITLE = "Concept explorer"
_STEPS = 65_534
_UNKNOWN = 65_535
_OBSERVES = (
    "This method observes a trained network: the decision does not pass through its concepts, so changing one has no "
    "defined effect on the classes. To edit concepts, fit a SALFCBM on the same backbone "
    "(captum_concepts.fit_salf_cbm) and pass it to explore()."
)
_SAVED = (
    "This page shows a saved explanation, without the model that it explains. To edit concepts, pass a SALFCBM and its "
    "images to explore()."
)
_HEAD = (
    "This model's head is not one linear layer, so the page cannot compute what an edit does. model.intervene() can, "
    "in Python."
)


@runtime_checkable
class EditableExplainer(Protocol):
    """Protocol of models whose decision is linear in pooled, standardized concept maps, such as ``SALFCBM``.

    With the maps c(x) in ``(N, M, h, w)``: ``logits = head((mean(c) - concept_mean) / concept_std)``.
    """

    concepts: Any
    class_names: Any
    concept_mean: Tensor
    concept_std: Tensor
    head: Any

    def concept_maps(self, inputs: Any) -> Tensor:
        """``(N, M, h, w)`` maps, not standardized."""
        ...


@unharming
def explore(
    explainer: EditableExplainer | ConceptExplainer | ConceptExplanation,
    images: Any,
    *,
    class_names: Sequence[str] | None = None,
    image_names: Iterable[str] | None = None,
    concepts: Any = None,
    labels: Iterable[int | str] | None = None,
    target: Any = None,
    top_k: int | None = _TOP,
    transform: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 32,
    title: str = _TITLE,
    setup: str = "",
) -> Explorer:
    r"""Interactive page on which users mark a region of an image, inspect and edit its concepts, and see the classes.

    For a :class:`~captum_concepts.SALFCBM`, the page contains the standardized concept maps
    :math:`z = (c(x) - \mu) / \sigma` and the head W, and computes regions and edits itself. With the region :math:`I`
    in pixels and the maps enlarged bilinearly to the image:

    .. math:: a(x, m \mid I) = \frac{\sum I \odot z_m}{\sum I}, \qquad
        \text{logits} \leftarrow \text{logits} + W_{\cdot m}\, \beta\, \overline{I}

    These are ``explain_region`` and ``intervene`` with ``units="std"``. For other methods and for explanations, the
    page shows the concepts of a region without edits and states why.

    Args:
        explainer: a SALFCBM, one of the methods, or an explanation of these images.
        images: anything that :func:`~captum_concepts.images.inputs_for` accepts; float tensors are the model's inputs.
            For an explanation, as in :func:`panel`.
        class_names: names of the model's outputs; None: the model's own.
        image_names: one per image; None: file names, if there are any.
        concepts: names or indices of the concepts to include; None: all for a SALFCBM, otherwise the ``top_k`` of each
            image.
        labels: true class of each image, by index or name; None: those of class folders or data sets. Wrong predictions
            come first; if the prediction is unknown (an explanation or ``target``), so do explained classes that are
            not the true one. A label that no output is named by is not compared.
        target: the output whose contributions are shown, or one per image; None: the predicted one.
        top_k: concepts per image by score, for methods without edits; None: all.
        transform: computes the model's inputs from a batch of images in [0, 1].
        batch_size: images per forward pass.
        title: title of the page.
        setup: Python code that creates ``images``, for the code in the page; empty: described as "as passed to
            explore()".

    Returns:
        An :class:`Explorer`, which displays itself in a notebook; write it with ``save``.

    Raises:
        InputError: no images, numbers of names, labels or targets that differ from that of images, an unknown concept,
            or a class index that the model does not have.

    Warns:
        InputWarning: labels are names that no output has.

    Example:
        >>> e = ConceptExplanation(["sand", "grass"], torch.rand(1, 2), torch.rand(1, 2, 7, 7))
        >>> explore(e, torch.rand(1, 3, 32, 32), image_names=["beach.jpg"])
        Explorer(1 image, 2 concepts, without edits)
    """
    batch_size = integer("batch_size", batch_size)
    if isinstance(images, ConceptExplanation):
        raise InputError("pass the explainer or explanation first: explore(explainer, images)")
    if isinstance(explainer, ConceptExplanation):
        page = _of_explanation(explainer, images, concepts)
    elif isinstance(explainer, EditableExplainer):
        page = _of_editable(explainer, shown_batches(explainer, images, batch_size, transform), concepts, target)
    elif isinstance(explainer, ConceptExplainer):
        batches = shown_batches(explainer, images, batch_size, transform)
        page = _of_explainer(explainer, batches, concepts, target, top_k)
    else:
        raise InputError(
            "explore requires a SALFCBM, another explainer or a ConceptExplanation, followed by images; got "
            f"{type(explainer).__name__}"
        )
    if not page.images:
        raise InputError("there is no image to explore")
    check_targets(target, len(page.images))
    page.asked, page.setup = target is not None, setup
    if page.reader:
        page.reader = _reader(page.reader, images, transform)
    if class_names is not None:
        page.classes = _named_classes(class_names, page)
        page.complete = True
    for what, values in (("image_names", image_names), ("labels", labels)):
        listed = None if values is None else each_of(what, values)
        if listed is not None and len(listed) != len(page.images):
            raise InputError(f"{len(listed)} {what} for {len(page.images)} images; pass one for each")
        for one, value in zip(page.images, listed or (), strict=bool(listed)):
            setattr(one, "name" if what == "image_names" else "label", str(value) if what == "image_names" else value)
    for one in page.images:
        one.true = None if one.label is None else TrueClass.of(one.label, page.classes if page.complete else None)
    unknown = next((one.true for one in page.images if one.true is not None and not one.true.outputs), None)
    if unknown is not None and page.classes:
        warn_of_unknown_class(unknown)
    return Explorer(page, title or _TITLE)


@dataclass
class _Image:
    """One image of the page; ``rows`` are its concepts as indices in the page's list, None: all of them."""

    picture: Picture
    thumb: Picture
    size: tuple[int, int]
    maps: Tensor
    scores: Tensor
    name: str = ""
    file: str = ""
    label: Any = None
    true: TrueClass | None = None
    inputs: tuple[int, int] | None = None
    rows: list[int] | None = None
    contributions: Tensor | None = None
    presence: Tensor | None = None
    logits: Tensor | None = None
    target: int | None = None
    predicted: int | None = None
    probability: float | None = None

    @classmethod
    def of(cls, picture: Tensor, maps: Tensor, scores: Tensor, **more: Any) -> _Image:
        size = (picture.shape[2], picture.shape[1])
        return cls(photo(picture, most=64_000), photo(picture, 96, 4_000), size, maps, scores.float(), **more)

    def strongest(self) -> list[int]:
        """Concepts by which the image can be found."""
        order = self.scores.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)[:_FOUND_BY].tolist()
        return order if self.rows is None else [self.rows[j] for j in order]


@dataclass
class _Page:
    concepts: list[str]
    classes: list[str]
    images: list[_Image] = field(default_factory=list)
    head: Tensor | None = None
    why: str = ""
    method: str = ""
    score_unit: str = ""
    contribution_unit: str = ""
    map_unit: str = ""
    complete: bool = False
    independent: bool = False
    asked: bool = False
    predicts: bool = True
    reader: str = ""
    setup: str = ""
    trust: str = ""


def _reader(reader: str, images: Any, transform: Any) -> str:
    """Python code that reads image K (file FILE) of ``images`` as the model's input."""
    if isinstance(images, ImageSource):
        one = "images[images.names.index(FILE)][None]" if of_files(images) else "images[K][None]"
    elif isinstance(images, Tensor):
        one = "images[[K]]"
    else:
        one = f"{reader if transform is None else 'open_images(images)'}[K][None]"
    return one if transform is None else f"transform({one})"


def _named_classes(names: Any, page: _Page) -> list[str]:
    """One name per output; two outputs may share a name, as ImageNet's two kinds of crane do."""
    found = [] if isinstance(names, str) else list(names)
    if not found or not all(isinstance(name, str) for name in found):
        raise InputError(f"class_names must be a list of names, got {names!r}"[:300])
    least = max((one.target + 1 for one in page.images if one.target is not None), default=0)
    if len(found) != len(page.classes) if page.complete else len(found) < least:
        raise InputError(
            f"{len(found)} class names for {'' if page.complete else 'at least '}{len(page.classes)}; pass one for each"
        )
    return found


def _class_list(explainer: Any, count: int) -> list[str]:
    names = getattr(explainer, "class_names", None)
    return list(names) if names else [f"class {i}" for i in range(count)]


def _of_editable(model: Any, batches: Iterator[Any], concepts: Any, target: Any) -> _Page:
    """Standardized maps, activations, logits and head of a model with a linear head."""
    linear = isinstance(model.head, torch.nn.Linear)
    rows = name_positions(concepts, list(model.concepts))
    page = _Page(
        [model.concepts[i] for i in rows], [], complete=True, method=type(model).__name__,
        score_unit="standard deviations", contribution_unit="logit", map_unit="standard deviations",
        why="" if linear else _HEAD,
    )  # fmt: skip
    known, size = reader_of(model)
    own = "model.preprocessing" if known is getattr(model, "preprocessing", 0) else "model.backbone"
    page.reader = f"inputs_for({own}, images{'' if size is None else f', size={size!r}'})"
    page.trust = _trust(model)
    page.independent = bool(getattr(model, "multi_label", False))
    mean, std = (v.detach().double().cpu()[rows, None, None] for v in (model.concept_mean, model.concept_std))
    weight = model.head.weight.detach().float().cpu() if linear else None
    start = 0
    for batch in batches:
        inputs = batch.inputs.to(model.concept_mean)
        maps, logits = _looked(model, inputs)
        maps = (maps[:, rows] - mean) / std
        targets = _targets(target, logits, start, model)
        finite = logits.isfinite().all(1).tolist()
        presence = _presence(model, inputs, rows)
        for i, picture in enumerate(batch.pictures):
            scores = maps[i].mean((1, 2)).float()
            one = _Image.of(picture, maps[i].float(), scores, logits=logits[i].float(), target=targets[i])
            one.predicted = int(logits[i].argmax()) if finite[i] else None
            one.name = batch.names[i] if batch.names else f"image {start + i}"
            one.file, one.inputs = one.name, (inputs.shape[-1], inputs.shape[-2])
            one.label = batch.labels[i] if batch.labels else None
            one.presence = None if presence is None else presence[i]
            page.images.append(one)
        start += len(batch.pictures)
        page.classes = page.classes or _class_list(model, logits.shape[1])
    page.head = None if weight is None else weight[:, rows]
    return page


def _trust(explainer: Any) -> str:
    """The explainer's sentence on how reliable its concepts' names are; empty if it has none."""
    said = getattr(explainer, "trust", "")
    return said if isinstance(said, str) else ""


def _presence(model: Any, inputs: Tensor, rows: list[int]) -> Tensor | None:
    """Calibrated presence of each concept; None for a model without calibration."""
    if getattr(model, "presence_slope", None) is None:
        return None
    return model.presence(inputs).detach().float().cpu()[:, rows]


def _looked(model: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Maps and logits in evaluation mode."""
    with evaluation_mode(model if isinstance(model, torch.nn.Module) else [], autocast=False), torch.no_grad():
        return model.concept_maps(inputs).double().cpu(), model(inputs).double().cpu()


def _targets(target: Any, logits: Tensor, start: int, model: Any) -> list[int]:
    n = len(logits)
    if target is None:
        return logits.argmax(1).tolist()
    from captum_concepts._captum import target_indices  # Captum imports matplotlib's pyplot

    own = targets_of(target, slice(start, start + n))
    return target_indices(own, n, logits.shape[1], _class_list(model, logits.shape[1]), what="class").tolist()


def _of_explainer(explainer: Any, batches: Iterator[Any], concepts: Any, target: Any, top_k: int | None) -> _Page:
    page, start = _Page([], [], why=_OBSERVES), 0
    for batch in batches:
        own = targets_of(target, slice(start, start + len(batch.pictures)))
        options = {"top_k": top_k} if concepts is None else {"concepts": concepts}
        explained = explainer.explain(batch.inputs, own, **options).to("cpu")
        _extend(page, explained, batch.pictures, batch.names, batch.labels)
        start += len(batch.pictures)
    if not any(one.target is not None for one in page.images):
        page.classes = []
    own = next((f"explainer.{n}" for n in ("backbone", "forward_func") if hasattr(explainer, n)), "explainer")
    page.reader, page.trust = f"inputs_for({own}, images)", _trust(explainer)
    page.predicts = target is None
    return page


def _of_explanation(explanation: ConceptExplanation, images: Any, concepts: Any) -> _Page:
    pictures = as_images(images, len(explanation))
    page = _Page([], [], why=_SAVED, predicts=False)
    chosen = explanation
    if concepts is not None:
        columns = name_positions(concepts, explanation.concepts, "concept")
        chosen = explanation[[explanation.concepts[j] for j in columns]]
    _extend(page, chosen.to("cpu"), pictures, explanation.image_names, None)
    return page


def _extend(
    page: _Page, explanation: ConceptExplanation, pictures: list[Tensor], names: list[str] | None, labels: Any
) -> None:
    """Add the images of one explanation, each with its own concepts."""
    known = {name: i for i, name in enumerate(page.concepts)}
    for name in explanation.concepts:
        if name not in known:
            known[name] = len(page.concepts)
            page.concepts.append(name)
    page.method, page.score_unit = explanation.method, explanation.score_unit
    page.contribution_unit = explanation.contribution_unit
    if explanation.class_names is not None:
        page.classes = list(explanation.class_names)
        page.complete = True
    for i, one in enumerate(explanation):
        target = None if one.target is None else int(one.target)
        if target is not None and not page.complete:
            page.classes += [f"class {k}" for k in range(len(page.classes), target + 1)]
        page.images.append(
            _Image.of(
                pictures[i], one.maps[0].float(), one.scores[0], rows=[known[name] for name in one.concepts],
                contributions=None if one.contributions is None else one.contributions[0].float(),
                presence=None if one.presence is None else one.presence[0].float(), target=target,
                probability=None if one.target_probability is None else float(one.target_probability),
                predicted=target,
                name=names[i] if names else f"image {len(page.images)}", file=names[i] if names else "",
                label=labels[i] if labels else None,
            )
        )  # fmt: skip


class Explorer:
    """The page of :func:`explore`, which displays itself in a notebook and is written by :meth:`save`.

    In a notebook with the extra ``notebook`` (anywidget), edits are available in Python as :attr:`edits`.
    """

    def __init__(self, page: _Page, title: str) -> None:
        self.title = str(title)
        self._page = page
        self._html: str | None = None
        self._widget: Any = None
        self._state: dict[str, Any] = {}

    def __repr__(self) -> str:
        n, t = len(self._page.images), len(self._page.concepts)
        editable = "edits of concepts" if self._page.head is not None else "without edits"
        return f"Explorer({n} image{'s' * (n != 1)}, {t} concept{'s' * (t != 1)}, {editable})"

    @property
    def html(self) -> str:
        """The page as standalone HTML."""
        if self._html is None:
            self._html = _rendered(self._page, self.title)
        return self._html

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page atomically as one HTML file, which opens from disk without network or server.

        Raises:
            FileNotFoundError: the folder does not exist.
        """
        path = Path(path)
        check_destination(path)
        return write_atomically(path, self.html)

    @property
    def edits(self) -> list[dict[str, Any]]:
        """Edits of the displayed image, in the form of ``SALFCBM.intervene``; empty without anywidget.

        ``before, after = model.intervene(images[[explorer.image]], explorer.edits, units="std")``
        """
        self._read()
        return [dict(edit) for edit in self._state.get("edits", {}).get(str(self.image), [])]

    @property
    def image(self) -> int:
        """Index of the displayed image."""
        self._read()
        return int(self._state.get("image", 0))

    @property
    def region(self) -> dict[str, Any]:
        """The marked region, as keywords of ``SALFCBM.explain_region``; empty for the whole image."""
        self._read()
        return dict(self._state.get("region") or {})

    def _read(self) -> None:
        """Update the state from the widget, with masks as tensors of the image's size."""
        if self._widget is None:
            return
        said = dict(self._widget.state)
        sizes = [one.size for one in self._page.images]

        def mask(entry: dict[str, Any], number: int) -> dict[str, Any]:
            if "mask" not in entry:
                return {key: value for key, value in entry.items() if value is not None}
            width, height = sizes[number]
            flags = torch.zeros(height, width, dtype=torch.bool)
            for y, start, stop in entry["mask"]:
                flags[y, start:stop] = True
            return {**entry, "mask": flags}

        edits = {key: [mask(edit, int(key)) for edit in own] for key, own in said.get("edits", {}).items()}
        self._state = {**said, "edits": edits, "region": mask(said.get("region") or {}, int(said.get("image", 0)))}

    def widget(self) -> Any:
        """The page as an anywidget, which returns edits to Python and is created once.

        Raises:
            ImportError: anywidget is not installed (extra ``notebook``).
        """
        if self._widget is None:
            self._widget = _make_widget(self.html)
        return self._widget

    def _repr_mimebundle_(self, **options: Any) -> Any:
        plain = {"text/plain": repr(self), "text/html": self._repr_html_()}  # for notebooks without a kernel
        try:
            shown = self.widget()._repr_mimebundle_(**options)
        except ImportError:
            return plain
        data, *more = shown if isinstance(shown, tuple) else (shown,)
        return ({**data, **plain}, *more) if more else {**data, **plain}

    def _repr_html_(self) -> str:
        return (
            f'<iframe title="{html.escape(clean(self.title), quote=True)}" sandbox="allow-scripts" '
            'style="width:100%;height:880px;border:0;border-radius:8px;resize:vertical" '
            f'srcdoc="{html.escape(self.html, quote=True)}"></iframe>'
        )


_ESM = """
export default { render({ model, el }) {
  const frame = document.createElement("iframe");
  frame.sandbox = "allow-scripts";
  frame.title = "Concept explorer";
  frame.style.cssText = "width:100%;height:880px;border:0;border-radius:8px";
  frame.srcdoc = model.get("page");
  const heard = (event) => {
    if (event.source !== frame.contentWindow || event.data?.from !== "captum_concepts") return;
    model.set("state", event.data.state);
    model.save_changes();
  };
  window.addEventListener("message", heard);
  el.append(frame);
  return () => window.removeEventListener("message", heard);
} };
"""


def _make_widget(page: str) -> Any:
    import anywidget
    import traitlets

    kind = type(
        "ExplorerWidget",
        (anywidget.AnyWidget,),
        {
            "_esm": _ESM,
            "page": traitlets.Unicode().tag(sync=True),
            "state": traitlets.Dict().tag(sync=True),
        },
    )
    return kind(page=page)


def _rendered(page: _Page, title: str) -> str:
    signed = page.head is not None or schemes(
        ([m.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)] for one in page.images for m in one.maps), "auto"
    )
    colors, opacity = palette(ColorScale(-1.0 if signed else 0.0, 1.0, signed), 1.0, 256)
    strongest = [one.strongest() for one in page.images]
    about = {
        "title": title,
        "editable": page.head is not None,
        "independent": page.independent,
        "why": page.why,
        "method": page.method,
        "scoreUnit": page.score_unit,
        "contributionUnit": page.contribution_unit,
        "mapUnit": page.map_unit,
        "seen": SEEN,
        "concepts": page.concepts,
        "classes": page.classes,
        "head": None if page.head is None else _head(page.head),
        "signed": signed,
        "palette": _packed(bytes(value for k in range(256) for value in (*colors[3 * k : 3 * k + 3], opacity[k]))),
        "asked": page.asked,
        "predicts": page.predicts,
        "reader": page.reader,
        "setup": page.setup,
        "trust": page.trust,
        "images": [_filed(one, own) for one, own in zip(page.images, strongest, strict=True)],
    }
    script, style = asset("explorer/explorer.js"), asset("explorer/explorer.css")
    return template("explorer/explorer.html").render(
        script=script,
        style=style,
        script_hash=_hash(script),
        style_hash=_hash(style),
        about=_json(about),
        images=[_json(_loaded(one)) for one in page.images],
    )


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> Markup:
    """JSON for a script element, in which no ``<`` can end it."""
    text = json.dumps(_cleaned(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _cleaned(value: Any) -> Any:
    """The value with all text cleaned of characters that HTML cannot contain."""
    if isinstance(value, dict):
        return {key: _cleaned(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cleaned(item) for item in value]
    return clean(value)


def _filed(one: _Image, strongest: list[int]) -> dict[str, Any]:
    """Data of an image for the filmstrip."""
    return {
        "name": one.name,
        "file": one.file,
        "label": None if one.true is None else one.true.name,
        "true": [] if one.true is None else list(one.true.outputs),
        "predicted": one.predicted,
        "verdict": "" if one.true is None else one.true.verdict(one.predicted),
        "thumb": one.thumb.uri,
        "thumbSize": [one.thumb.width, one.thumb.height],
        "strongest": strongest,
    }


def _loaded(one: _Image) -> dict[str, Any]:
    """Data that the page reads when an image is selected.

    Maps are stored in steps of 1 / 65,534 of their range, which is as small as half precision and more precise.
    """
    maps = one.maps.double()
    finite = maps.isfinite()
    low = maps.where(finite, torch.inf).flatten(1).amin(1)
    high = maps.where(finite, -torch.inf).flatten(1).amax(1)
    low, high = low.where(low.isfinite(), 0.0), high.where(high.isfinite(), 0.0)
    step = ((high - low) / _STEPS).clamp_min(1e-30).float()
    low = low.float()
    index = ((maps - low.double()[:, None, None]) / step.double()[:, None, None]).round().clamp(0, _STEPS)
    stored = index.where(finite, float(_UNKNOWN)).to(torch.int32).numpy().astype("<u2")
    known = maps[finite].abs()
    end = float(known.kthvalue(math.ceil(0.995 * len(known))).values) if len(known) else 1.0
    values = {
        "scores": one.scores, "contributions": one.contributions, "presence": one.presence, "logits": one.logits,
        "low": low, "step": step,
    }  # fmt: skip
    packed = {name: None if v is None else _packed(_f32(v)) for name, v in values.items()}
    return {
        **packed,
        "picture": one.picture.uri,
        "pixelated": one.picture.pixelated,
        "size": list(one.size),
        "inputs": None if one.inputs is None else list(one.inputs),
        "grid": [maps.shape[2], maps.shape[1]],
        "rows": one.rows,
        "maps": _packed(stored.tobytes()),
        "end": end or 1.0,
        "target": one.target,
        "probability": one.probability,
    }


def _f32(values: Tensor) -> bytes:
    return bytes(values.float().contiguous().numpy().astype("<f4").tobytes())


def _packed(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _head(weight: Tensor) -> dict[str, Any]:
    """``(L, M)`` weights, either all of them or, if that is shorter, only the nonzero ones with their indices."""
    column, row = weight.T.nonzero(as_tuple=True)
    if 3 * len(row) < weight.numel():
        counts = torch.bincount(column, minlength=weight.shape[1]).int()
        return {
            "starts": _packed(torch.cat([counts.new_zeros(1), counts.cumsum(0).int()]).numpy().astype("<i4").tobytes()),
            "classes": _packed(row.int().numpy().astype("<i4").tobytes()),
            "weights": _packed(_f32(weight.T[column, row])),
        }
    return {"weights": _packed(_f32(weight.T))}
