"""`fit_salf_cbm`: from a backbone, an image-text encoder and labelled images to a SALFCBM, step by step, resumable."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts.activations.capture import Layer
from captum_concepts.concepts import Vocabulary
from captum_concepts.models._salf_bottleneck_fit import BottleneckFit, fit_bottleneck
from captum_concepts.models._salf_concepts import concept_presence, interpretable_concepts, present_concepts
from captum_concepts.models._salf_data import Data, LabelledImages
from captum_concepts.models._salf_feature_cache import CachedFeatures, LiveFeatures, cache_features
from captum_concepts.models._salf_head import Activations, HeadFit, compute_activations, fit_head
from captum_concepts.models._salf_objective import Samples
from captum_concepts.models._salf_options import checked_options, checked_vocabulary
from captum_concepts.models._salf_plan import FitPlan, make_plan
from captum_concepts.models._salf_run import FitRun
from captum_concepts.models._salf_settings import BottleneckSettings
from captum_concepts.models._salf_steps import world
from captum_concepts.models.salf_cbm import SALFCBM
from captum_concepts.store import FolderLock, all_or_none
from captum_concepts.vlm import RegionPrompt

__all__ = [
    "Activations",
    "BottleneckFit",
    "BottleneckSettings",
    "CachedFeatures",
    "FitPlan",
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
    "plan_salf_cbm",
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

    1. Drop concepts that the images, unmarked, do not show (:func:`present_concepts`).
    2. Embed every marked region of every image (:class:`~captum_concepts.store.RegionEmbeddingStore`).
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
        presence_cutoff: least mean of a concept's five highest similarities among the training images as they are,
            unmarked, as published. 0.25 belongs to CLIP ViT-B/16; None leaves this filter out. It costs one pass of the
            encoder per image and comes first.
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
    given, runs = dict(locals()), []
    with ExitStack() as stack:

        def begin() -> None:
            runs.append(prepare(given))
            if world()[0] == 0:
                stack.enter_context(FolderLock(runs[0].path, "the results at"))

        all_or_none(begin)
        return runs[0].run()


def plan_salf_cbm(*arguments: Any, within_hours: float = 24.0, **options: Any) -> FitPlan:
    """What :func:`fit_salf_cbm` with the same arguments would take: disk, time and processes. Writes nothing.

    A few images go through encoder and backbone, and a few steps of the bottleneck are taken on random numbers; the
    rest is multiplication. Times are those of this machine as busy as it is now, without reading from a slow disk or
    talking between processes.

    Args:
        arguments, options: as for :func:`fit_salf_cbm`.
        within_hours: for which the number of processes is worked out.

    Returns:
        A :class:`FitPlan`: ``print`` it, or take ``as_dict()``.
    """
    bound = inspect.signature(fit_salf_cbm).bind(*arguments, **options)
    bound.apply_defaults()
    return make_plan(prepare(bound.arguments), within_hours)


def prepare(given: Mapping[str, Any]) -> FitRun:
    """Check the arguments of :func:`fit_salf_cbm`, and open the data."""
    vocabulary = checked_vocabulary(given["concepts"])
    options = checked_options(given, vocabulary)
    count, first = given["num_classes"], world()[0] == 0
    reading: dict[str, Any] = {
        "num_workers": options.num_workers,
        "show_progress": options.show_progress and first,
    }
    train = LabelledImages(given["train_data"], count, **reading)
    val = None
    if given["val_data"] is not None:
        val = LabelledImages(given["val_data"], count, what="val_data", all_classes=False, **reading)
    path = Path(given["store_path"])
    return FitRun(given["backbone"], given["layer"], given["encoder"], train, val, vocabulary, count, path, options)
