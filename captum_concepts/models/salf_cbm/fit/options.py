"""The options of `fit_salf_cbm`, checked together before the long steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from captum_concepts._checks import integer, number, one_of
from captum_concepts.concepts import Vocabulary
from captum_concepts.errors import InputError, listing
from captum_concepts.models.salf_cbm.fit.data import LabeledImages, Transform
from captum_concepts.models.salf_cbm.fit.head import check_class_weights, check_head
from captum_concepts.models.salf_cbm.fit.settings import BottleneckSettings
from captum_concepts.store import fingerprint_callable, fingerprint_tensor
from captum_concepts.vlm import RegionPrompt
from captum_concepts.vlm.dense import AdaptiveRegions


@dataclass(frozen=True)
class FitOptions:
    """The options of :func:`~captum_concepts.models.salf_cbm.fit.fit_salf_cbm`, documented there."""

    prompt: Any
    lam: float | None
    nonzeros_per_class: float | None
    head: str
    alpha: float
    class_weights: Any
    head_tol: float
    cls_token: bool
    layout: str
    prefix_tokens: int | None
    class_names: list[str] | None
    model_transform: Transform | None
    encoder_transform: Transform | None
    presence_cutoff: float | str | None
    interpretability_cutoff: float | None
    validation_fraction: float
    train_backbone: bool
    bottleneck: BottleneckSettings
    cache_features: bool | str
    max_cache_bytes: int | None
    feature_dtype: torch.dtype
    batch_size: int
    prompt_batch_size: int | None
    num_workers: int
    show_progress: bool


def checked_options(given: Mapping[str, Any], vocabulary: Vocabulary) -> FitOptions:
    """The options among the arguments of ``fit_salf_cbm``.

    Raises:
        InputError: one is out of range, or two contradict each other.
    """
    check_head(given["head"], given["lam"], given["nonzeros_per_class"], len(vocabulary))
    check_class_weights(given["class_weights"], given["num_classes"])
    number("validation_fraction", given["validation_fraction"], lambda v: 0 < v < 1, "in (0, 1)")
    number("alpha", given["alpha"], lambda v: 0 < v <= 1, "in (0, 1]")
    number("head_tol", given["head_tol"], lambda v: v > 0, "positive")
    integer("batch_size", given["batch_size"])
    integer("num_workers", given["num_workers"], 0)
    integer("seed", given["seed"], None)
    if given["max_cache_bytes"] is not None:
        integer("max_cache_bytes", given["max_cache_bytes"], 0)
    one_of("cache_features", given["cache_features"], (True, False, "auto"))
    one_of("multi_label", given["multi_label"], (None, True, False))
    for name in ("cls_token", "train_backbone"):
        one_of(name, given[name], (True, False))
    if given["prompt_batch_size"] is not None:
        integer("prompt_batch_size", given["prompt_batch_size"])
    for name in ("presence_cutoff", "interpretability_cutoff"):
        if given[name] is not None and (name, given[name]) != ("presence_cutoff", "auto"):
            number(name, given[name], lambda _: True, "a number, or None for no such filter")
    bottleneck = given["bottleneck"]
    settings = bottleneck if isinstance(bottleneck, BottleneckSettings) else _settings(bottleneck or {})
    names = given["class_names"]
    if names is not None and len(names) != given["num_classes"]:
        raise InputError(f"{len(names)} class_names for num_classes={given['num_classes']}")
    own: dict[str, Any] = {
        "prompt": _prompt(given["grid"], given["prompt"], given["regions_per_image"]),
        "class_names": None if names is None else list(names),
        "bottleneck": replace(settings, seed=given["seed"]),
        "class_weights": _numbers(given["class_weights"]),
    }
    return FitOptions(**{f.name: own[f.name] if f.name in own else given[f.name] for f in fields(FitOptions)})


def _numbers(weights: Any) -> Any:
    """``weights`` as JSON represents them."""
    if weights is None or isinstance(weights, str):
        return weights
    return [float(weight) for weight in weights]


def checked_vocabulary(concepts: Vocabulary | Sequence[str]) -> Vocabulary:
    """The concepts as a vocabulary.

    Raises:
        InputError: no concepts, or a repeated one.
    """
    vocabulary = concepts if isinstance(concepts, Vocabulary) else Vocabulary(concepts)
    if not len(vocabulary):
        raise InputError(f"there is no concept: {vocabulary.report.summary()}; pass at least one")
    if len(set(vocabulary)) != len(vocabulary):
        twice = next(c for i, c in enumerate(vocabulary) if c in vocabulary.concepts[:i])
        raise InputError(f"concept {twice!r} occurs twice; Vocabulary(...).clean() removes duplicates")
    if any(concept != concept.strip() for concept in vocabulary):
        spaced = [concept for concept in vocabulary if concept != concept.strip()]
        raise InputError(
            f"concepts with spaces or line breaks around them: {listing(spaced, 5)}; "
            "Vocabulary(...).clean() removes them, and duplicates"
        )
    return vocabulary


def input_size(images: LabeledImages, transform: Transform | None) -> tuple[int, int]:
    """The height and width of the backbone's input."""
    image = images.source[0][None]
    shown = image if transform is None else transform(image)
    if not isinstance(shown, Tensor) or shown.ndim != 4 or len(shown) != 1:
        shape = tuple(shown.shape) if isinstance(shown, Tensor) else type(shown).__name__
        raise InputError(f"model_transform must map images {tuple(image.shape)} to a batch (N, C, H, W), got {shape}")
    return shown.shape[-2], shown.shape[-1]


def transform_fingerprint(transform: Transform | None, image: Tensor) -> str | None:
    """A fingerprint of the transform's effect on an image, rounded so that it is the same on other machines."""
    if transform is None:
        return None
    with torch.no_grad():
        shown = transform(image[None]).cpu().float().round(decimals=3)
    return f"{fingerprint_callable(transform)[:40]}:{fingerprint_tensor(shown)}"


def _settings(values: Mapping[str, Any]) -> BottleneckSettings:
    try:
        return BottleneckSettings(**values)
    except TypeError as error:
        known = list(BottleneckSettings.__dataclass_fields__)
        raise InputError(f"bottleneck={dict(values)!r} has an unknown setting ({error}); known: {known}") from None


def _prompt(grid: int | Sequence[int] | None, prompt: Any, regions_per_image: int | None) -> Any:
    if regions_per_image is not None:
        return AdaptiveRegions(_prompt(grid, prompt, None), regions_per_image)
    if prompt is None:
        return RegionPrompt("circle", (7, 7) if grid is None else grid)
    if not all(hasattr(prompt, name) for name in ("grid", "as_dict", "__len__")):
        raise InputError(f"prompt must be a RegionPrompt or DenseRegions, got {type(prompt).__name__}")
    if grid is not None and RegionPrompt(grid=grid).grid != tuple(prompt.grid):
        raise InputError(f"grid={grid} differs from the prompt's grid {prompt.grid}; pass only one of the two")
    return prompt
