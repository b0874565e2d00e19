"""`fit_salf_cbm`: from a backbone, an image-text encoder and labelled images to a SALFCBM, step by step, resumable."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts.activations.capture import Layer
from captum_concepts.concepts import Vocabulary
from captum_concepts.errors import InputError
from captum_concepts.models._salf_bottleneck_fit import BottleneckFit, fit_bottleneck
from captum_concepts.models._salf_concepts import concept_presence, interpretable_concepts, present_concepts
from captum_concepts.models._salf_data import Data, LabelledImages
from captum_concepts.models._salf_feature_cache import CachedFeatures, LiveFeatures, cache_features
from captum_concepts.models._salf_head import Activations, HeadFit, check_head, compute_activations, fit_head
from captum_concepts.models._salf_objective import Samples
from captum_concepts.models._salf_run import FitOptions, FitRun
from captum_concepts.models._salf_settings import BottleneckSettings
from captum_concepts.models._salf_steps import world
from captum_concepts.models.salf_cbm import SALFCBM
from captum_concepts.store.lock import FolderLock
from captum_concepts.vlm import RegionPrompt

__all__ = [
    "Activations",
    "BottleneckFit",
    "BottleneckSettings",
    "CachedFeatures",
    "HeadFit",
    "LabelledImages",
    "LiveFeatures",
    "Samples",
    "cache_features",
    "compute_activations",
    "concept_presence",
    "fit_bottleneck",
    "fit_head",
    "fit_salf_cbm",
    "interpretable_concepts",
    "present_concepts",
]


def fit_salf_cbm(
    backbone: nn.Module,
    layer: Layer,
    encoder: Any,
    train_data: Data,
    concepts: Vocabulary | Sequence[str],
    num_classes: int,
    *,
    store_path: str | os.PathLike[str],
    val_data: Data | None = None,
    lam: float | None = None,
    nonzeros_per_class: float | None = None,
    head: str = "sparse",
    alpha: float = 0.99,
    head_tol: float = 1e-4,
    grid: int | Sequence[int] | None = None,
    prompt: RegionPrompt | None = None,
    cls_token: bool = False,
    layout: str = "auto",
    prefix_tokens: int | None = None,
    class_names: Sequence[str] | None = None,
    model_transform: Callable[[Tensor], Tensor] | None = None,
    presence_cutoff: float | None = 0.25,
    presence_k: int = 5,
    interpretability_cutoff: float | None = 0.45,
    validation_fraction: float = 0.1,
    train_backbone: bool = False,
    bottleneck: BottleneckSettings | Mapping[str, Any] | None = None,
    seed: int = 0,
    cache_features: bool | str = "auto",
    max_cache_bytes: int | None = None,
    feature_dtype: torch.dtype = torch.float16,
    batch_size: int = 32,
    prompt_batch_size: int = 64,
    num_workers: int = 0,
    show_progress: bool = False,
) -> SALFCBM:
    """Make a spatially-aware, label-free concept bottleneck model (Benou and Riklin Raviv, "Show and Tell", 2025).

    1. Embed every marked region of every image (:class:`~captum_concepts.store.RegionEmbeddingStore`).
    2. Drop concepts that the data do not show (:func:`present_concepts`).
    3. Compute the backbone's features on the grid, once where the disk has room (:func:`cache_features`).
    4. Train the 1x1 bottleneck by the cubic cosine similarity (:func:`fit_bottleneck`).
    5. Drop concepts that it cannot follow on validation images (:func:`interpretable_concepts`).
    6. Pool, standardise, and fit a sparse or dense head (:func:`compute_activations`, :func:`fit_head`).

    Each step can be called alone. What a step gives is written whole into ``store_path`` under the digest of what it
    was made from. So a fit that was killed goes on where it was when it is called again, and ends with the same model;
    after a change of settings only what depends on them is computed anew, beside the old results, and why is logged
    (logger ``captum_concepts``). Regions of another encoder, prompt or data set are refused, because they are what
    takes long: use another ``store_path``.

    Under ``torch.distributed`` (``torchrun``; all processes call this with the same arguments and see one file system)
    each embeds its share and computes its share of every batch; all return the model that one process would have made.

    Args:
        backbone: the network; it takes ``model_transform`` of the images.
        layer: where its features are read, a module or dotted name; NCHW, NHWC or tokens.
        encoder: an :class:`~captum_concepts.vlm.ImageTextEncoder`.
        train_data: a data set whose items begin with an image and its label, such as ``ImageFolder`` with a transform;
            a loader of one; or ``(images, labels)``. RGB in [0, 1] or uint8, of one size, the same each time:
            normalising belongs into ``model_transform``, random augmentation nowhere.
        concepts: texts, or a :class:`~captum_concepts.concepts.Vocabulary` with its templates and its report of drops.
        num_classes: K; labels are 0..K-1 and every class has images.
        store_path: folder for all results.
        val_data: for early stopping, the interpretability cutoff and the reported accuracy; None holds out
            ``validation_fraction`` of the training images for the first two.
        lam, nonzeros_per_class, head, alpha: of the head, see :func:`fit_head`.
        head_tol: see :func:`~captum_concepts.solvers.fit_elastic_net`.
        grid: rows and columns; None takes the prompt's, or 7 x 7.
        prompt: how regions are marked; None takes ``RegionPrompt("circle", grid)``.
        cls_token: join a ViT's CLS token to every patch token.
        layout, prefix_tokens: how the layer's output is read, see :class:`~captum_concepts.FeatureActivationMap`.
        class_names: names of the classes; None takes ``train_data.classes`` where they fit.
        model_transform: from a batch of RGB images to the backbone's input, e.g. ``torchvision.transforms.Normalize``.
            The finished model takes transformed images, as the backbone does.
        presence_cutoff: least mean of the ``presence_k`` highest similarities of a concept. The published 0.25 belongs
            to CLIP ViT-B/16; None leaves this filter out.
        interpretability_cutoff: least validation similarity of a concept (LF-CBM's 0.45); None leaves it out.
        validation_fraction: see ``val_data``.
        train_backbone: train a copy of the backbone together with the bottleneck, on features computed on the fly;
            otherwise the backbone is frozen.
        bottleneck: a :class:`BottleneckSettings`, or a dictionary of its fields.
        seed: of everything random. Same seed, data and number of processes: same bits.
        cache_features: True, False, or "auto": where the cache fits ``max_cache_bytes``, or half of the free disk.
        feature_dtype: of the cache, ``torch.float16`` or ``torch.float32``.
        batch_size: images in one pass of the backbone.
        prompt_batch_size: marked pictures in one pass of the encoder.
        num_workers: processes that read images ahead.
        show_progress: show bars.

    Returns:
        A :class:`~captum_concepts.SALFCBM` in evaluation mode. Its ``metadata`` says what it was made from, which
        concepts were dropped and why, the validation similarity of each one kept, the accuracies, and the history of
        the training (``metadata["history"]``, lists to plot).

    Raises:
        InputError: unusable data or settings, found before the long steps where possible; no concept left.
        ArtifactError: ``store_path`` holds the regions of something else, is damaged, or is in use.

    Example:
        >>> import tempfile
        >>> class Colours:
        ...     logit_scale, logit_bias = 10.0, 0.0
        ...     def encode_image(self, images):
        ...         return images.mean((2, 3)) - images.mean((1, 2, 3))[:, None] + 0.01
        ...     def encode_text(self, texts):
        ...         return torch.stack([torch.eye(3)[["red", "green", "blue"].index(t)] for t in texts])
        >>> backbone = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> images = torch.rand(60, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 16, 16)
        >>> images = 0.7 * images + 0.3 * torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        >>> labels = images.mean((2, 3)).argmax(1)  # the class is the strongest colour
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = fit_salf_cbm(backbone, "0", Colours(), (images, labels), ["red", "green", "blue"], 3,
        ...         store_path=folder, grid=2, prompt=RegionPrompt("crop", 2), head="dense")
        >>> model.concepts, bool((model(images).argmax(1) == labels).float().mean() > 0.9)
        (['red', 'green', 'blue'], True)
    """
    vocabulary = concepts if isinstance(concepts, Vocabulary) else Vocabulary(concepts)
    _check_vocabulary(vocabulary)
    check_head(head, lam, nonzeros_per_class, len(vocabulary))
    if not 0 < validation_fraction < 1:
        raise InputError(f"validation_fraction must lie in (0, 1), got {validation_fraction!r}")
    settings = bottleneck if isinstance(bottleneck, BottleneckSettings) else _settings(bottleneck or {})
    options = FitOptions(
        prompt=_prompt(grid, prompt),
        lam=lam,
        nonzeros_per_class=nonzeros_per_class,
        head=head,
        alpha=alpha,
        head_tol=head_tol,
        cls_token=cls_token,
        layout=layout,
        prefix_tokens=prefix_tokens,
        class_names=_class_names(class_names, train_data, num_classes),
        model_transform=model_transform,
        presence_cutoff=presence_cutoff,
        presence_k=presence_k,
        interpretability_cutoff=interpretability_cutoff,
        validation_fraction=validation_fraction,
        train_backbone=train_backbone,
        bottleneck=replace(settings, seed=seed),
        cache_features=cache_features,
        max_cache_bytes=max_cache_bytes,
        feature_dtype=feature_dtype,
        batch_size=batch_size,
        prompt_batch_size=prompt_batch_size,
        num_workers=num_workers,
        show_progress=show_progress,
    )
    path = Path(store_path)
    first = world()[0] == 0
    with FolderLock(path, "the results at") if first else nullcontext():
        reading: dict[str, Any] = {"num_workers": num_workers, "show_progress": show_progress and first}
        train = LabelledImages(train_data, num_classes, **reading)
        val = (
            None
            if val_data is None
            else LabelledImages(val_data, num_classes, what="val_data", all_classes=False, **reading)
        )
        run = FitRun(backbone, layer, encoder, train, val, vocabulary, num_classes, path, options)
        return run.run()


def _check_vocabulary(vocabulary: Vocabulary) -> None:
    if not len(vocabulary):
        raise InputError(f"there is no concept: {vocabulary.report.summary()}; give at least one")
    if len(set(vocabulary)) != len(vocabulary):
        twice = next(c for i, c in enumerate(vocabulary) if c in vocabulary.concepts[:i])
        raise InputError(f"concept {twice!r} is there twice; Vocabulary(...).clean() removes duplicates")


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
