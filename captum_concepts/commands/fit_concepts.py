"""`fit-concepts`: concept vectors from folders of images (SpatialACV), or text concepts with a VLM (CE-FAM)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captum_concepts.activations.survey import suggest_layer
from captum_concepts.attr.spatial_acv import SpatialACV
from captum_concepts.commands.explainers import fit_words
from captum_concepts.commands.image_files import Failed, readable
from captum_concepts.commands.models import LoadedModel
from captum_concepts.commands.outputs import artifact, check_outputs
from captum_concepts.commands.settings import ModelSettings
from captum_concepts.errors import InputError
from captum_concepts.images import ImageSource, class_folders, find_images


@dataclass(frozen=True, kw_only=True)
class FitConceptsSettings(ModelSettings):
    """Options of ``fit-concepts``; every field is an option of the command line."""

    output: str
    concepts: str | None = None
    negatives: str | None = None
    n_random: int = 20
    seed: int = 0


def fit_concepts(settings: FitConceptsSettings) -> dict[str, Any]:
    """Fit an explainer and write it to one file for ``--explainer`` of ``explain``, ``report`` and ``evaluate``.

    Returns:
        ``{"method", "output", "seconds", "failed", ...}``; for vectors, ``"concepts"`` with accuracy, interval, p-value
        and whether the layer encodes each; for text concepts, ``"words"``, ``"layers"`` and the last losses.

    Raises:
        InputError, LayerError: nothing can be fitted with these settings.
    """
    if (settings.concepts is None) == (settings.train is None):
        raise InputError(
            "pass either --concepts DIR (one folder of images per concept), or --train DIR with --encoder and --words"
        )
    out = Path(settings.output)
    check_outputs(vars(settings), {"--output": out})
    artifact("--output", settings.output)
    loaded = settings.load()
    failed: Failed = []
    started = time.monotonic()
    made = _vectors(settings, loaded, failed) if settings.concepts is not None else _words(settings, loaded, failed)
    explainer = made.pop("explainer")
    try:
        explainer.save(out)
    except OSError as error:  # a full disk: the results are still printed
        made["unsaved"] = str(error)
    seconds = round(time.monotonic() - started, 1)
    return {"method": explainer.get_name(), "model": settings.model, "output": str(out), "seconds": seconds, **made,
            "failed": failed}  # fmt: skip


def _vectors(settings: FitConceptsSettings, loaded: LoadedModel, failed: Failed) -> dict[str, Any]:
    if settings.words is not None or settings.layers is not None:
        raise InputError("--words and --layers are for --train; with --concepts DIR pass one --layer")
    settings.refuse(("encoder", "encoder_weights"), "they are for --train")

    def files(paths: list[Path], what: str) -> ImageSource:
        return readable(loaded.open(paths, normalize=loaded.preprocessing), failed, what)

    folders = class_folders(settings.concepts or "")
    concepts = {name: files(paths, f"concept {name!r}") for name, paths in folders.items()}
    negatives = None if settings.negatives is None else files(find_images(settings.negatives), "negatives")
    if negatives is None and len(concepts) == 1:
        raise InputError(
            f"{settings.concepts} contains a single concept; pass --negatives DIR with images to separate it from"
        )
    layer = settings.layer or suggest_layer(loaded.model, loaded.empty())
    acv = SpatialACV(loaded.model, layer, batch_size=settings.batch_size)
    acv.fit(concepts, negatives, n_random=settings.n_random, seed=settings.seed, show_progress=True)
    rows = []
    for k, name in enumerate(acv.concepts):
        low, high = acv.confidence_intervals_[k].tolist()
        rows.append(
            {
                "name": name,
                "images": len(concepts[name]),
                "accuracy": round(float(acv.accuracies_[k]), 4),
                "interval": [round(low, 4), round(high, 4)],
                "p_value": None if acv.p_values_ is None else float(acv.p_values_[k]),
                "encoded": None if acv.significant_ is None else bool(acv.significant_[k]),
            }
        )
    return {"explainer": acv, "layer": layer, "concepts": rows, "text": acv.summary()}


def _words(settings: FitConceptsSettings, loaded: LoadedModel, failed: Failed) -> dict[str, Any]:
    if settings.negatives is not None or settings.layer is not None:
        raise InputError("--negatives and --layer are for --concepts; with --train DIR pass --layers A,B,C")
    settings.refuse(("n_random", "seed"), "they are for --concepts")
    made = fit_words(settings, loaded, failed)
    history = made.history_ or {}
    last = {name: round(values[-1], 6) for name, values in history.items() if values}
    words = list(made.concepts or [])
    said = f"{len(words)} concepts" if words else "no concepts yet (pass --words to explain)"
    text = f"CE-FAM translator: {said}, layers {', '.join(map(str, made.layers))}\n" + "\n".join(
        f"{name.replace('_', ' ')}: {value:.4g}" for name, value in last.items()
    )
    return {"explainer": made, "layers": [str(layer) for layer in made.layers], "words": words, "last": last,
            "epochs": len(history.get("train_loss", [])), "text": text}  # fmt: skip
