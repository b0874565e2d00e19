"""The options of `fit_salf_cbm`: checked together, before anything long begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from captum_concepts.concepts import Vocabulary
from captum_concepts.errors import InputError
from captum_concepts.models._salf_data import LabelledImages
from captum_concepts.models._salf_feature_cache import Transform
from captum_concepts.models._salf_head import check_head
from captum_concepts.models._salf_settings import BottleneckSettings
from captum_concepts.store.manifest import fingerprint_callable, fingerprint_tensor
from captum_concepts.vlm import RegionPrompt


@dataclass(frozen=True)
class FitOptions:
    """The options of :func:`~captum_concepts.models.salf_cbm_fit.fit_salf_cbm`, as it describes them."""

    prompt: RegionPrompt
    lam: float | None = None
    nonzeros_per_class: float | None = None
    head: str = "sparse"
    alpha: float = 0.99
    head_tol: float = 1e-4
    cls_token: bool = False
    layout: str = "auto"
    prefix_tokens: int | None = None
    class_names: tuple[str, ...] | None = None
    model_transform: Transform | None = None
    presence_cutoff: float | None = 0.25
    interpretability_cutoff: float | None = 0.45
    validation_fraction: float = 0.1
    train_backbone: bool = False
    bottleneck: BottleneckSettings = field(default_factory=BottleneckSettings)
    cache_features: bool | str = "auto"
    max_cache_bytes: int | None = None
    feature_dtype: torch.dtype = torch.float16
    batch_size: int = 32
    prompt_batch_size: int = 64
    num_workers: int = 0
    show_progress: bool = False


def checked_options(given: Mapping[str, Any], vocabulary: Vocabulary) -> FitOptions:
    """The options among the arguments of ``fit_salf_cbm``.

    Raises:
        InputError: one is out of range, or two contradict each other.
    """
    check_head(given["head"], given["lam"], given["nonzeros_per_class"], len(vocabulary))
    fraction = given["validation_fraction"]
    if not 0 < fraction < 1:
        raise InputError(f"validation_fraction must lie in (0, 1), got {fraction!r}")
    bottleneck = given["bottleneck"]
    settings = bottleneck if isinstance(bottleneck, BottleneckSettings) else _settings(bottleneck or {})
    own: dict[str, Any] = {
        "prompt": _prompt(given["grid"], given["prompt"]),
        "class_names": _class_names(given["class_names"], given["train_data"], given["num_classes"]),
        "bottleneck": replace(settings, seed=given["seed"]),
    }
    return FitOptions(**{f.name: own[f.name] if f.name in own else given[f.name] for f in fields(FitOptions)})


def checked_vocabulary(concepts: Vocabulary | Sequence[str]) -> Vocabulary:
    """The concepts as a vocabulary.

    Raises:
        InputError: none, or one twice.
    """
    vocabulary = concepts if isinstance(concepts, Vocabulary) else Vocabulary(concepts)
    if not len(vocabulary):
        raise InputError(f"there is no concept: {vocabulary.report.summary()}; give at least one")
    if len(set(vocabulary)) != len(vocabulary):
        twice = next(c for i, c in enumerate(vocabulary) if c in vocabulary.concepts[:i])
        raise InputError(f"concept {twice!r} is there twice; Vocabulary(...).clean() removes duplicates")
    return vocabulary


def input_size(images: LabelledImages, transform: Transform | None) -> tuple[int, int]:
    """Height and width of what the backbone sees."""
    image = images.pictures[0][None]
    found = image if transform is None else transform(image)
    if not isinstance(found, Tensor) or found.ndim != 4 or len(found) != 1:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"model_transform must map images {tuple(image.shape)} to such a batch, got {shape}")
    return found.shape[-2], found.shape[-1]


def transform_fingerprint(transform: Transform | None, image: Tensor) -> str | None:
    """By what it does to an image: rounded, so that another machine's last bit makes no difference."""
    if transform is None:
        return None
    with torch.no_grad():
        found = transform(image[None]).cpu().float().round(decimals=3)
    return f"{fingerprint_callable(transform)[:40]}:{fingerprint_tensor(found)}"


def _settings(values: Mapping[str, Any]) -> BottleneckSettings:
    try:
        return BottleneckSettings(**values)
    except TypeError as error:
        known = list(BottleneckSettings.__dataclass_fields__)
        raise InputError(f"bottleneck={dict(values)!r} has an unknown setting ({error}); there are {known}") from None


def _prompt(grid: int | Sequence[int] | None, prompt: RegionPrompt | None) -> RegionPrompt:
    if prompt is None:
        return RegionPrompt("circle", (7, 7) if grid is None else grid)
    if not isinstance(prompt, RegionPrompt):
        raise InputError(f"prompt must be a RegionPrompt, got {type(prompt).__name__}")
    if grid is not None and RegionPrompt(grid=grid).grid != prompt.grid:
        raise InputError(f"grid={grid} is not the prompt's {prompt.grid}; give one of the two")
    return prompt


def _class_names(names: Sequence[str] | None, data: Any, num_classes: int) -> tuple[str, ...] | None:
    if names is not None:
        if len(names) != num_classes:
            raise InputError(f"{len(names)} class_names for num_classes={num_classes}")
        return tuple(names)
    found = getattr(getattr(data, "dataset", data), "classes", None)
    fits = isinstance(found, (list, tuple)) and len(found) == num_classes and all(isinstance(n, str) for n in found)
    return tuple(found) if fits and found is not None else None
