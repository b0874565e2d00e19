"""`fit_salf_cbm`: train a SALFCBM from a backbone, a vision-language model and labeled images, in resumable steps."""

from __future__ import annotations

import copy
import errno
import inspect
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from captum_concepts._artifacts import Array, list_of, number, own_folder, table
from captum_concepts._checks import warn_of_same_embeddings, with_weights
from captum_concepts._undo import unharming
from captum_concepts.activations import Layer, evaluation_mode, layer_name
from captum_concepts.concepts import Vocabulary
from captum_concepts.errors import CaptumConceptsError, InputError, InputWarning
from captum_concepts.models.salf_cbm.fit.bottleneck import (
    PROGRESS_NOTES,
    RESULT_NOTES,
    BottleneckFit,
    fit_bottleneck,
    stored_arrays,
)
from captum_concepts.models.salf_cbm.fit.data import FEWEST, LabeledImages, labeled_images
from captum_concepts.models.salf_cbm.fit.features import (
    GridFeatures,
    LiveFeatures,
    check_first_image,
    open_features,
)
from captum_concepts.models.salf_cbm.fit.filters import (
    PUBLISHED_CUTOFF,
    TOP_IMAGES,
    WHOLE,
    columns_of,
    concept_presence,
    interpretable_concepts,
    present_concepts,
)
from captum_concepts.models.salf_cbm.fit.head import HEAD_NOTES, HeadFit, accuracy, compute_activations, fit_head
from captum_concepts.models.salf_cbm.fit.judge import (
    EVERYDAY_LEVEL,
    advice,
    check_everyday_words,
    check_words,
    everyday_texts,
    first_images,
    judged,
)
from captum_concepts.models.salf_cbm.fit.objective import Samples, Validation
from captum_concepts.models.salf_cbm.fit.options import (
    FitOptions,
    checked_options,
    checked_vocabulary,
    input_size,
    transform_fingerprint,
)
from captum_concepts.models.salf_cbm.fit.settings import BottleneckSettings
from captum_concepts.models.salf_cbm.fit.steps import StepFolder, StepResult, digest, first_decides, say, share_of
from captum_concepts.models.salf_cbm.salf_cbm import SALFCBM
from captum_concepts.store import (
    FolderLock,
    RegionEmbeddingStore,
    all_or_none,
    fingerprint_module,
    fingerprint_tensor,
    read_manifest,
    world,
)
from captum_concepts.store.processes import lost_peers_named
from captum_concepts.vlm import RegionPrompt, Regions, check_encoder

Transform = Callable[[Tensor], Tensor]


@unharming
@lost_peers_named()
def fit_salf_cbm(
    backbone: nn.Module,
    layer: Layer,
    images: Any,
    encoder: Any,
    concepts: Vocabulary | Sequence[str],
    num_classes: int,
    *,
    store_path: str | os.PathLike[str],
    val_data: Any = None,
    lam: float | None = None,
    nonzeros_per_class: float | None = None,
    head: str = "sparse",
    alpha: float = 0.99,
    class_weights: str | Sequence[float] | None = None,
    head_tol: float = 1e-4,
    grid: int | Sequence[int] | None = None,
    prompt: Regions | None = None,
    regions_per_image: int | None = None,
    cls_token: bool = False,
    layout: str = "auto",
    prefix_tokens: int | None = None,
    class_names: Sequence[str] | None = None,
    multi_label: bool | None = None,
    model_transform: Transform | None = None,
    encoder_transform: Transform | None = None,
    presence_cutoff: float | str | None = 0.25,
    interpretability_cutoff: float | None = 0.45,
    validation_fraction: float = 0.1,
    train_backbone: bool = False,
    bottleneck: BottleneckSettings | Mapping[str, Any] | None = None,
    seed: int = 0,
    cache_features: bool | str = "auto",
    max_cache_bytes: int | None = None,
    feature_dtype: torch.dtype = torch.float16,
    batch_size: int = 32,
    prompt_batch_size: int | None = None,
    num_workers: int = 0,
    show_progress: bool = False,
) -> SALFCBM:
    """Train a spatially-aware, label-free concept bottleneck model (Benou and Riklin Raviv, "Show and Tell", 2025).

    1. Drop concepts that the images, without visual prompts, do not show (:func:`present_concepts`).
    2. Embed every visual prompt of every image (:class:`~captum_concepts.store.RegionEmbeddingStore`).
    3. Compute the backbone's features on the grid, once if the disk has room (:func:`cache_features`).
    4. Train the 1 x 1 bottleneck by the cubic cosine similarity (:func:`fit_bottleneck`).
    5. Drop concepts that the bottleneck cannot predict on validation images (:func:`interpretable_concepts`).
    6. Pool, standardize, and fit a sparse or dense head (:func:`compute_activations`, :func:`fit_head`).

    Each step can be called alone. The result of a step is written atomically to ``store_path`` under the digest of
    what it was computed from. A killed fit therefore resumes when called again and ends with the same model. After a
    change of settings only the affected steps are recomputed, next to the old results, and the reason is logged
    (logger ``captum_concepts``). Regions of another encoder, prompt or data set are refused because they take longest
    to compute; use another ``store_path``.

    Under ``torch.distributed`` (``torchrun``; all processes call this with the same arguments and see one file system)
    each process embeds its part of the images and computes its part of every batch; all return the model that one
    process would have returned. Any number of processes can resume a fit. Embeddings and features then have the same
    bytes, and the bottleneck (whose gradients are summed over processes) agrees to rounding.

    Args:
        backbone: the network; it takes ``model_transform`` of the images. It becomes ``model.backbone``, frozen and in
            evaluation mode, unless ``train_backbone``; to train yours further pass ``copy.deepcopy(backbone)``.
        layer: the layer that provides the features (NCHW, NHWC or tokens), as a module or dotted name.
        images: labeled images, as a data set whose items begin with an image and its label, such as ``ImageFolder``
            with a transform; a loader of one; ``(images, labels)``; or a folder of class folders. All have one size and
            are the same at each access: normalize in ``model_transform``, and do not augment randomly. Labels are those
            of the items.
        encoder: an :class:`~captum_concepts.vlm.ImageTextEncoder`.
        concepts: texts, or a :class:`~captum_concepts.concepts.Vocabulary` with its templates and report of drops.
        num_classes: L; labels are 0..L-1 and every class has images.
        store_path: folder for all results. If it is read-only, finished results are used and new ones are not kept.
        val_data: for early stopping, the interpretability cutoff and the reported accuracy; None holds out
            ``validation_fraction`` of the training images for the first two.
        lam, nonzeros_per_class, head, alpha, class_weights: see :func:`fit_head`.
        head_tol: see :func:`~captum_concepts.solvers.fit_elastic_net`.
        grid: rows and columns; None takes the prompt's, or 7 x 7.
        prompt: how regions are shown to the encoder, a :class:`~captum_concepts.vlm.RegionPrompt` or
            ``DenseRegions``; None takes ``RegionPrompt("circle", grid)``.
        regions_per_image: number of cells per image whose prompts are drawn, those that differ most from the rest of
            the image; the others are estimated from one more pass (``vlm.dense.AdaptiveRegions``). This works best with
            encoders whose dense regions are good, such as ConvNets. None draws all.
        cls_token: concatenate a ViT's CLS token to every patch token.
        layout, prefix_tokens: how the layer's output is read, see :class:`~captum_concepts.FeatureActivationMap`.
        class_names: names of the classes; None takes those of the data if they fit.
        multi_label: the classes are not mutually exclusive. Labels are ``(N, L)`` of 0 and 1, and each class gets its
            own logistic head. None: True if some image has no class or several.
        model_transform: from a batch of images to the backbone's input, e.g. ``torchvision.transforms.Normalize``.
            The finished model takes transformed images, as the backbone does.
        encoder_transform: from a batch of images to the RGB images in [0, 1] that the encoder sees. None repeats the
            channel of one-channel images and leaves three-channel images unchanged; others need a transform.
        presence_cutoff: minimum mean of a concept's five highest similarities to the training images, without visual
            prompts. The default 0.25 is the published value for CLIP ViT-B/16. "auto": the 75th percentile of everyday
            words (apple, armchair, ...), on the encoder's own scale; it may drop concepts that few images show. With 20
            concepts or more "auto" also refuses, after a few percent of the images, concepts that fit them no better
            than everyday words. None disables this filter. It comes first and costs one encoder pass per image.
        interpretability_cutoff: minimum validation similarity of a concept's activations, the means of its maps
            (LF-CBM's 0.45). A concept is dropped only if its 95 % interval (bootstrap over the held-out images) ends
            below the cutoff; with fewer than 20 images none is dropped. None disables this filter. If no concept
            reaches the cutoff, all are kept, with a warning.
        validation_fraction: see ``val_data``.
        train_backbone: train a copy of the backbone together with the bottleneck, on features computed on the fly and
            with fixed batch statistics; otherwise the backbone is frozen.
        bottleneck: a :class:`BottleneckSettings`, or a dictionary of its fields.
        seed: random seed. The same seed, data, ``prompt_batch_size`` and number of processes give the same bits.
        cache_features: True, False, or "auto": True if the cache fits ``max_cache_bytes``, or half of the free disk.
        max_cache_bytes: see ``cache_features``.
        feature_dtype: of the cache, ``torch.float16`` or ``torch.float32``.
        batch_size: images per forward pass of the backbone.
        prompt_batch_size: visual prompts per forward pass of the encoder; None finds the fastest by a short trial.
        num_workers: processes that load images.
        show_progress: show progress bars.

    Returns:
        A :class:`~captum_concepts.SALFCBM` in evaluation mode. Its ``metadata`` records the training data, the dropped
        concepts with reasons, the validation similarity of each kept concept (of its maps cell by cell, and of their
        means as ``"pooled_similarity"``), the accuracies, and the training history (``metadata["history"]``, lists to
        plot). ``print(model)`` and ``metadata["advice"]`` report how far its rules can be trusted and what to change.

    Raises:
        InputError: unusable data or settings (raised before the long steps if possible), or no concept is present.
        ArtifactError: the regions in ``store_path`` do not match, or it is damaged or in use.

    Example:
        >>> import tempfile
        >>> from captum_concepts.vlm import RegionPrompt
        >>> class Colors:
        ...     logit_scale, logit_bias = 10.0, 0.0
        ...     def encode_image(self, images):
        ...         return images.mean((2, 3)) - images.mean((1, 2, 3))[:, None] + 0.01
        ...     def encode_text(self, texts):
        ...         return torch.stack([torch.eye(3)[["red", "green", "blue"].index(t)] for t in texts])
        >>> backbone = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> images = torch.rand(60, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 16, 16)
        >>> images = 0.7 * images + 0.3 * torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        >>> labels = images.mean((2, 3)).argmax(1)  # the class is the strongest color
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = fit_salf_cbm(backbone, "0", (images, labels), Colors(), ["red", "green", "blue"], 3,
        ...         store_path=folder, grid=2, prompt=RegionPrompt("crop", 2), head="dense")
        >>> model.concepts, bool((model(images).argmax(1) == labels).float().mean() > 0.9)
        (['red', 'green', 'blue'], True)
    """
    given, runs = dict(locals()), []
    with ExitStack() as stack:

        def begin() -> None:
            runs.append(prepare(given))
            if world()[0] == 0:
                try:
                    stack.enter_context(FolderLock(runs[0].path, "the results at"))
                except OSError as error:
                    if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM) or not runs[0].path.is_dir():
                        raise
                    runs[0].read_only = True

        all_or_none(begin)
        runs[0].read_only = first_decides(runs[0].read_only)
        if runs[0].read_only:
            say(f"{runs[0].path} cannot be written: what is there is used, what is missing is computed and not kept")
            runs[0].scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="captum_concepts-")))
        return runs[0].run()


def bound_arguments(arguments: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of :func:`fit_salf_cbm`, with its defaults."""
    bound = inspect.signature(fit_salf_cbm).bind(*arguments, **options)
    bound.apply_defaults()
    return bound.arguments


def prepare(given: Mapping[str, Any]) -> FitRun:
    """The run of :func:`fit_salf_cbm` with these arguments, checked and with the data opened."""
    if hasattr(given["images"], "encode_image"):
        raise InputError(
            "fit_salf_cbm takes the images before the encoder: fit_salf_cbm(backbone, layer, images, encoder, "
            "concepts, num_classes, store_path=...)"
        )
    with_weights("backbone", given["backbone"])
    check_encoder(given["encoder"], words=True)
    vocabulary = checked_vocabulary(given["concepts"])
    options = checked_options(given, vocabulary)
    reading: dict[str, Any] = {
        "class_names": given["class_names"],
        "encoder_transform": given["encoder_transform"],
        "num_workers": options.num_workers,
        "show_progress": options.show_progress and world()[0] == 0,
    }
    count = given["num_classes"]
    train = labeled_images(given["images"], count, multi_label=given["multi_label"], **reading)
    val = None
    if given["val_data"] is not None:
        reading["multi_label"] = train.multi_label or None
        val = labeled_images(given["val_data"], count, what="val_data", all_classes=False, **reading)
    path = Path(given["store_path"])
    return FitRun(given["backbone"], given["layer"], given["encoder"], train, val, vocabulary, count, path, options)


class Split:
    """One data set in the course of a fit: images, regions, features."""

    def __init__(self, name: str, images: LabeledImages, live: LiveFeatures) -> None:
        self.name, self.images, self.live = name, images, live
        self.features: GridFeatures = live
        self.regions: Any = None
        self.made_from: dict[str, Any] = {}

    def samples(self, rows: Tensor) -> Samples:
        """Features and regions of these images."""
        return Samples(self.features, self.regions, rows)


class FitRun:
    """One fit. The constructor runs all fast checks, and :meth:`run` does the work."""

    def __init__(
        self,
        backbone: nn.Module,
        layer: Layer,
        encoder: Any,
        train: LabeledImages,
        val: LabeledImages | None,
        vocabulary: Vocabulary,
        num_classes: int,
        path: Path,
        options: FitOptions,
    ) -> None:
        if options.train_backbone and not any(parameter.requires_grad for parameter in backbone.parameters()):
            raise InputError(
                "train_backbone=True, but every parameter of the backbone is frozen, for example by an earlier fit; "
                "call backbone.requires_grad_(True) first"
            )
        self.encoder, self.num_classes, self.path, self.options = encoder, num_classes, path, options
        self.read_only, self.scratch = False, path
        self.layer = layer_name(backbone, layer)
        self.backbone = copy.deepcopy(backbone) if options.train_backbone else backbone
        self.place: Layer = self.layer if options.train_backbone else layer
        self.vocabulary = vocabulary
        self.text = vocabulary.encode(encoder)  # fails early if a concept has no text
        warn_of_same_embeddings(list(vocabulary), self.text)
        self.class_names = options.class_names or _fitting(train.class_names, num_classes)
        self.multi_label = train.multi_label
        self.input_size = input_size(train, options.model_transform)
        self.model = self._model(vocabulary)
        parts = [("train", train), *([("val", val)] if val is not None else [])]
        self.splits = [
            Split(name, images, LiveFeatures(self.model, images, options.model_transform, options.batch_size))
            for name, images in parts
        ]
        self.rows = self._rows()
        self.device = self.splits[0].live.device
        self.text = self.text.to(self.device)

    def run(self) -> SALFCBM:
        """The fitted model."""
        steps = StepFolder(self.path, read_only=self.read_only)
        vocabulary = self._present(steps)  # first, because it needs one encoder pass per image
        for split in self.splits:
            self._embed(split)
        for split in self.splits:
            self._features(split)
        fit, made_from = self._bottleneck(steps)
        (pooled, upper), cutoff = self._pooled_similarity(fit.weight), self.options.interpretability_cutoff
        unreached = cutoff is not None and float(upper.max()) < cutoff
        if unreached:
            warnings.warn(
                f"no concept's validation similarity reaches interpretability_cutoff={cutoff:g} (the best is "
                f"{float(pooled.max()):.3g}), so all are kept and their names are unreliable",
                InputWarning,
                stacklevel=2,
            )
        kept = interpretable_concepts(vocabulary, pooled, None if unreached else cutoff, upper=upper)
        chosen = torch.tensor(columns_of(kept, vocabulary))
        weight = fit.weight[chosen.to(fit.weight.device)].contiguous()
        head, accuracies = self._head(steps, weight, made_from)
        model = self._model(kept)
        with torch.no_grad():
            model.get_parameter("bottleneck.weight").copy_(weight[:, :, None, None])
            model.head.weight.copy_(head.weight)
            model.head.bias.copy_(head.bias)
        model.set_standardization(head.mean, head.std)
        model.metadata.update(self._metadata(kept, fit, chosen, head, accuracies))
        model.metadata["pooled_similarity"] = dict(zip(kept, pooled[chosen].tolist(), strict=True))
        model.metadata["unreached_cutoff"] = cutoff if unreached else None
        model.metadata.update(self._judged(kept, weight, head.weight, self.text[chosen.to(self.text.device)]))
        model.metadata["advice"] = advice(model.metadata)
        return model.eval()

    def _pooled_similarity(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        held_out = self.splits[-1].samples(self.rows[1])
        with evaluation_mode(self.backbone, autocast=False):
            similarity, upper = Validation(held_out, self.text).pooled(weight)
        return similarity.cpu(), upper.cpu()

    def _judged(self, kept: Vocabulary, weight: Tensor, head: Tensor, text: Tensor) -> dict[str, Any]:
        train = self.splits[0]
        classes = self.class_names or [f"class {k}" for k in range(self.num_classes)]
        held_out = self.splits[-1].samples(self.rows[1])
        with torch.no_grad(), evaluation_mode(self.backbone, autocast=False):
            return judged(held_out, train.regions, train.images.labels, list(kept), classes, weight, head, text)

    def _model(self, vocabulary: Vocabulary) -> SALFCBM:
        o = self.options
        with torch.random.fork_rng(devices=[]):  # its first weights are replaced
            model = SALFCBM(
                self.backbone,
                self.place,
                list(vocabulary),
                self.num_classes,
                o.prompt.grid,
                cls_token=o.cls_token,
                multi_label=self.multi_label,
                class_names=self.class_names,
                layout=o.layout,
                prefix_tokens=o.prefix_tokens,
                freeze_backbone=not o.train_backbone,
                input_size=self.input_size,
            )
        parameter = next(self.backbone.parameters(), None)
        return model if parameter is None else model.to(parameter.device)

    def _store(self, name: str, split: Split, prompt: Any, images: Any = None) -> RegionEmbeddingStore:
        o = self.options
        return RegionEmbeddingStore.build(
            own_folder(self.path / f"{name}-{split.name}"),
            split.images.shown if images is None else images,
            self.encoder,
            prompt,
            batch_size=o.prompt_batch_size,
            num_workers=o.num_workers,
            show_progress=o.show_progress,
        )

    def _embed(self, split: Split) -> None:
        prompt = self.options.prompt
        if read_manifest(self.path / f"regions-{split.name}") is None and isinstance(prompt, RegionPrompt):
            fewer = "regions_per_image draws fewer, DenseRegions needs one"
            say(f"regions-{split.name}: {len(prompt)} passes of the encoder for each image ({fewer})")
        split.regions = self._store("regions", split, self.options.prompt)
        split.regions.similarity(self.text)  # refuses a text of another width
        split.made_from = _origin(split.regions)

    def _present(self, steps: StepFolder) -> Vocabulary:
        cutoff = self.options.presence_cutoff
        if cutoff is None:
            return self.vocabulary
        train, m, texts, known = self.splits[0], len(self.text), self.text, None
        if isinstance(cutoff, str):  # "auto"
            known, cutoff = everyday_texts(self.vocabulary, self.encoder), PUBLISHED_CUTOFF
            check_everyday_words(known)
            if known is not None:
                texts = torch.cat([self.text, known.to(self.device)])
        self._look_first(train, texts, cutoff if known is None else None)
        images = self._store("images", train, WHOLE)
        presence = steps.run(
            "presence",
            {**_origin(images), "text": fingerprint_tensor(texts.cpu()), "k": TOP_IMAGES},
            lambda: StepResult({"presence": concept_presence(images, texts).cpu()}, {}),
            arrays={"presence": Array("float", (len(texts),))},
            notes=table({}),
        ).tensors["presence"]
        if known is not None:
            cutoff = float(presence[m:].quantile(EVERYDAY_LEVEL))
        kept = present_concepts(self.vocabulary, presence[:m], cutoff)
        self.text = self.text[torch.tensor(columns_of(kept, self.vocabulary), device=self.text.device)]
        return kept

    def _look_first(self, train: Split, texts: Tensor, cutoff: Any) -> None:
        """Refuse, after a few percent of the images, concepts that do not fit them."""
        rows = first_images(len(train.images))
        if not rows or first_decides(read_manifest(self.path / "images-train") is not None):
            return
        try:
            store = self._store("first", train, WHOLE, Subset(train.images.shown, rows))
        except CaptumConceptsError:  # the pass over all images reports it with the right image index
            return
        m, k = len(self.text), max(1, round(TOP_IMAGES * len(rows) / len(train.images)))
        presence = concept_presence(store, texts, k=k).cpu()
        say(check_words(self.vocabulary, presence[:m], presence[m:], len(rows)))
        present_concepts(self.vocabulary, presence[:m], cutoff)

    def _features(self, split: Split) -> None:
        o = self.options
        made_from = self._features_from(split)
        split.made_from |= {"features": digest(made_from)}
        check_first_image(
            self.path / f"first-{split.name}-{digest(made_from)}.safetensors", split.live, keep=not self.read_only
        )
        if o.train_backbone:
            return
        split.features = open_features(
            self.path,
            f"features-{split.name}",
            split.live,
            made_from,
            cache="finished" if self.read_only and o.cache_features == "auto" else o.cache_features,
            max_bytes=o.max_cache_bytes,
            dtype=o.feature_dtype,
            show_progress=o.show_progress,
        )

    def _features_from(self, split: Split) -> dict[str, Any]:
        o = self.options
        return {
            "images": split.images.digest(split.made_from["images"]),
            "backbone": fingerprint_module(self.backbone),
            "layer": self.layer,
            "grid": list(o.prompt.grid),
            "cls_token": o.cls_token,
            "layout": o.layout,
            "prefix_tokens": o.prefix_tokens,
            "transform": transform_fingerprint(o.model_transform, split.images.source[0]),
            "dtype": str(o.feature_dtype).removeprefix("torch."),
        }

    def _rows(self) -> tuple[Tensor, Tensor]:
        """The training and validation rows of the bottleneck (all of ``val_data``, or held-out training images)."""
        everything = torch.arange(len(self.splits[0].images))
        if len(self.splits) > 1:
            return everything, torch.arange(len(self.splits[1].images))
        generator = torch.Generator().manual_seed(self.options.bottleneck.seed)
        order = torch.randperm(len(everything), generator=generator)
        held = max(FEWEST, round(len(order) * self.options.validation_fraction))
        if len(order) - held < FEWEST:
            raise InputError(
                f"images contains {len(order)} images, too few to hold out {held} for validation; pass val_data, or "
                "more images"
            )
        return order[held:].sort().values, order[:held].sort().values

    def _bottleneck(self, steps: StepFolder) -> tuple[BottleneckFit, dict[str, Any]]:
        o = self.options
        train, validation = self.splits[0].samples(self.rows[0]), self.splits[-1].samples(self.rows[1])
        made_from = {
            **{split.name: split.made_from for split in self.splits},
            "rows": fingerprint_tensor(torch.cat([train.rows, torch.tensor([-1]), validation.rows])),
            "text": fingerprint_tensor(self.text.cpu()),
            "settings": asdict(o.bottleneck),
            "train_backbone": o.train_backbone,
        }
        backbone = self.backbone if o.train_backbone else None
        arrays, progress = stored_arrays(len(self.text), train.features.dim, backbone)

        def compute() -> StepResult:
            fit = fit_bottleneck(
                train,
                validation,
                self.text,
                o.bottleneck,
                backbone=backbone,
                resume=steps.load("bottleneck.progress", made_from, arrays=progress, notes=PROGRESS_NOTES),
                checkpoint=lambda state: steps.save("bottleneck.progress", made_from, state),
                show_progress=o.show_progress,
            )
            tensors = {"weight": fit.weight, "similarity": fit.validation_similarity}
            tensors |= {f"backbone.{name}": value for name, value in fit.backbone.items()}
            notes = {"history": fit.history, "best_epoch": fit.best_epoch, "stopped": fit.stopped}
            return StepResult(tensors, notes | {"start_similarity": fit.start_similarity})

        with evaluation_mode(self.backbone, autocast=False):
            result = steps.run("bottleneck", made_from, compute, arrays=arrays, notes=RESULT_NOTES)
        steps.remove("bottleneck.progress", made_from)
        trained = {n.removeprefix("backbone."): v for n, v in result.tensors.items() if n.startswith("backbone.")}
        if trained:
            self.backbone.load_state_dict(trained, strict=False)
        weight, similarity = (result.tensors[name].to(self.device) for name in ("weight", "similarity"))
        return BottleneckFit(weight, similarity, **result.notes, backbone=trained), made_from

    def _head(
        self, steps: StepFolder, weight: Tensor, bottleneck_from: Mapping[str, Any]
    ) -> tuple[HeadFit, dict[str, float | None]]:
        o = self.options
        made_from = {"weight": fingerprint_tensor(weight.cpu()), "bottleneck": digest(bottleneck_from)}
        activations = [
            compute_activations(
                self.path,
                f"activations-{split.name}",
                split.features,
                weight,
                {**made_from, "data": split.made_from},
                scratch=self.scratch,
                show_progress=o.show_progress,
            )
            for split in self.splits
        ]
        labels = [split.images.labels[torch.tensor(share_of(len(split.images)))] for split in self.splits]
        head_from = {
            **made_from,
            "labels": [fingerprint_tensor(split.images.labels) for split in self.splits],
            "head": [o.head, o.lam, o.nonzeros_per_class, o.alpha, o.head_tol, self.num_classes],
            **({} if o.head == "sparse" else {"penalty": "features"}),
            **({} if o.class_weights is None else {"class_weights": o.class_weights}),
        }

        def compute() -> StepResult:
            fit = fit_head(
                activations[0].rows(),
                labels[0],
                self.num_classes,
                lam=o.lam,
                nonzeros_per_class=o.nonzeros_per_class,
                head=o.head,
                alpha=o.alpha,
                class_weights=o.class_weights,
                bottleneck=weight,
                tol=o.head_tol,
                show_progress=o.show_progress,
            )
            scores = [accuracy(a, y, fit) for a, y in zip(activations, labels, strict=True)]
            tensors = {"weight": fit.weight, "bias": fit.bias, "mean": fit.mean, "std": fit.std}
            return StepResult(tensors, {"fit": fit.notes, "accuracy": scores})

        m = len(weight)
        shapes = {"weight": (self.num_classes, m), "bias": (self.num_classes,), "mean": (m,), "std": (m,)}
        accuracy_of_each = list_of(number(0, 1), length=len(self.splits))
        kept = steps.run(
            "head",
            head_from,
            compute,
            arrays={name: Array("float", shape) for name, shape in shapes.items()},
            notes=table({"fit": HEAD_NOTES, "accuracy": accuracy_of_each}),
        )
        t, scores = kept.tensors, kept.notes["accuracy"]
        head = HeadFit(t["weight"], t["bias"], t["mean"], t["std"], kept.notes["fit"])
        return head, {"train": scores[0], "validation": scores[1] if len(scores) > 1 else None}

    def _metadata(
        self, kept: Vocabulary, fit: BottleneckFit, chosen: Tensor, head: HeadFit, accuracies: Mapping[str, Any]
    ) -> dict[str, Any]:
        o = self.options
        plain = replace(o, model_transform=None, encoder_transform=None)
        settings = {**asdict(plain), "feature_dtype": str(o.feature_dtype)}
        unsaid = ("prompt", "model_transform", "encoder_transform", "class_names", "num_workers", "show_progress")
        similarity = fit.validation_similarity.cpu()[chosen].tolist()
        return {
            "data": {split.name: {"count": len(split.images), **split.made_from} for split in self.splits},
            "encoder": type(self.encoder).__name__,
            "prompt": o.prompt.as_dict(),
            "settings": {k: v for k, v in settings.items() if k not in (*unsaid, "max_cache_bytes")},
            "vocabulary": kept.as_dict(),
            "validation_similarity": dict(zip(kept, similarity, strict=True)),
            "bottleneck": {"start": fit.start_similarity, "best_epoch": fit.best_epoch, "stopped": fit.stopped},
            "history": fit.history,
            "head": head.notes,
            "accuracy": dict(accuracies),
        }


def _origin(store: RegionEmbeddingStore) -> dict[str, Any]:
    """What a store was computed from."""
    return {
        "images": fingerprint_tensor(store.digests()),
        "encoder": store.fingerprint["encoder"],
        "prompt": store.prompt.as_dict(),
    }


def _fitting(names: Sequence[str] | None, count: int) -> list[str] | None:
    return list(names) if names is not None and len(names) == count else None
