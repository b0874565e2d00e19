"""SALF-CBM: a classifier that decides through maps of named concepts only."""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn

from captum_concepts._captum import target_indices
from captum_concepts._checks import finite_images, integer, name_positions, one_of, unique_names
from captum_concepts._undo import of_the_model, unharming
from captum_concepts.activations import (
    LAYOUTS,
    Layer,
    check_images,
    evaluation_mode,
    full_precision,
    read_layer,
    unwrap,
)
from captum_concepts.activations.layout import ModelTraits
from captum_concepts.concepts import CLASS_TEMPLATE
from captum_concepts.errors import InputError, InputWarning, LayerError, LayoutError
from captum_concepts.explanation import RANKINGS, ConceptExplanation, Selection
from captum_concepts.images import ImageSource, Preprocessing, batches, inputs_for, open_images, thumbnails
from captum_concepts.models.salf_cbm import hub
from captum_concepts.models.salf_cbm.edits import UNITS, map_edits, rule_edits
from captum_concepts.models.salf_cbm.export import export_program
from captum_concepts.models.salf_cbm.presence import Reliability, fit_presence, reliabilities, trust_line, verdicts_of
from captum_concepts.models.salf_cbm.reading import Reading, freeze_unreached, name_in, probe, reading_of
from captum_concepts.models.salf_cbm.regions import coverage, pooled_upsampling, region_mask

if TYPE_CHECKING:
    from typing_extensions import Self

METHOD = "SALFCBM"
PRESENCE = ("presence_slope", "presence_offset")
STD_UNIT = "standard deviations"


class Segmentation(NamedTuple):
    """The result of :meth:`SALFCBM.zero_shot_segmentation`.

    Args:
        heatmaps: ``(N, H, W)`` in [0, 1].
        masks: ``(N, H, W)`` bool, the foreground.
        concepts: for each image, the concept whose map it is.
    """

    heatmaps: Tensor
    masks: Tensor
    concepts: list[str]


class _Seen(NamedTuple):
    """One forward pass over the images ``rows``: features, activations and logits."""

    rows: slice
    features: Tensor
    activations: Tensor
    logits: Tensor


@unharming
class SALFCBM(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="captum_concepts",
    pipeline_tag="image-classification",
    tags=["concept-bottleneck", "interpretability", "captum"],
):
    r"""Spatially-aware, label-free concept bottleneck model (SALF-CBM, "Show and Tell").

    The backbone's features :math:`f(x)`, resized bilinearly to the grid, are projected by a 1 x 1 convolution into one
    map per concept. The maps' means, standardized over the training data, are all that the linear head sees:

    .. math:: c(x) = g(f(x)) \in \mathbb{R}^{M \times h \times w}, \quad
        c^*_m = \frac{\operatorname{mean}_{ij} c_m(i, j) - \mu_m}{\sigma_m}, \quad z = W c^* + b

    so a decision explains itself by :math:`S(x, m, l) = W_{lm} c^*_m` (what, how much) and :math:`c(x)_m` (where).

    Args:
        backbone: any module that maps images to something; torchvision, timm, an open_clip tower, your own.
        layer: the layer whose output are the features: a module of the backbone or its dotted name (which
            ``model.layer`` then is). Nothing after it is computed.
        concepts: the M names: a list, or a :class:`~captum_concepts.concepts.Vocabulary`.
        num_classes: L.
        grid: ``(h, w)`` of the concept maps, the grid of the prompts they were trained with.
        cls_token: concatenate the CLS token to each patch along the channels; D is then twice the layer's width.
        hidden: width of a layer between features and concept maps; None: the paper's single 1 x 1 convolution.
        multi_label: the classes are independent (several or none may hold), so probabilities are sigmoids.
        class_names: L names, or None.
        freeze_backbone: no parameter of the backbone is trained, and it stays in evaluation mode under ``train()``.
            Sets ``requires_grad`` of its parameters to False. If False, only those are frozen that have no influence
            on the layer, such as the old classifier.
        layout: of the layer's output: ``"auto"``, ``"NCHW"``, ``"NHWC"``, ``"NLC"`` or ``"LNC"``.
        prefix_tokens: tokens before the grid; None infers it.
        feature_dim: D, if known; None infers it by one forward pass of an empty image.
        input_size: ``(height, width)`` of that image; None takes what the backbone declares, or tries.
        preprocessing: how images that are not float tensors (paths, PIL images) are read and normalized; None takes
            what the backbone's library says. Float tensors are taken as they are.
        batch_size: images per forward pass of the explaining methods.
        metadata: what the model card shall say: a JSON-able dictionary.

    Attributes:
        bottleneck: ``nn.Conv2d(D, M, 1, bias=False)``; with ``hidden``, two of them and a GELU between.
        head: ``nn.Linear(M, L)``.
        concept_mean, concept_std: ``(M,)`` buffers, 0 and 1 until :meth:`set_standardization`.
        presence_slope, presence_offset: ``(M,)`` buffers; presence is ``sigmoid(slope * c* + offset)``. None until
            calibrated.
        metadata: see above.

    Raises:
        InputError: concepts empty or named twice, a bad grid or number of classes, no CLS token.
        LayerError, LayoutError: unknown layer, or one without a grid.

    Reference:
        Benou, I., Riklin Raviv, T. *Show and Tell: Visually Explainable Deep Neural Nets via Spatially-Aware Concept
        Bottleneck Models.* CVPR 2025, arXiv:2502.20134.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from captum_concepts.models.salf_cbm import SALFCBM
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        >>> model = SALFCBM(net, "0", ["fur", "wheels", "grass"], num_classes=2, grid=(7, 7))
        >>> images = torch.rand(4, 3, 64, 64)
        >>> model(images).shape, model.concept_maps(images).shape, model.scores(images).shape
        (torch.Size([4, 2]), torch.Size([4, 3, 7, 7]), torch.Size([4, 3]))

        What it saw, where, and how much that moved a logit; in the whole image, and in a part of it:

        >>> explanation = model.explain(images, target=0, top_k=2)
        >>> [len(one.concepts) for one in explanation]
        [2, 2, 2, 2]
        >>> model.explain_region(images[:1], boxes=(0, 0, 32, 32), top_k=1).scores.shape
        torch.Size([1, 1])

        What it would say without grass in the lower half, and its rules:

        >>> before, after = model.intervene(images, "grass", beta=-1.0, units="std", boxes=(0, 32, 64, 64))
        >>> bool((before != after).any()), len(model.decision_rules(0))
        (True, 3)
    """

    concept_mean: Tensor
    concept_std: Tensor
    presence_slope: Tensor | None
    presence_offset: Tensor | None

    #: ``explain`` of all concepts costs what it costs of a few (``audit_dataset`` asks once).
    explains_all_at_once = True

    def __init__(
        self,
        backbone: nn.Module,
        layer: Layer,
        concepts: Iterable[str],
        num_classes: int,
        grid: tuple[int, int] = (7, 7),
        *,
        cls_token: bool = False,
        hidden: int | None = None,
        multi_label: bool = False,
        class_names: Sequence[str] | None = None,
        freeze_backbone: bool = True,
        layout: str = "auto",
        prefix_tokens: int | None = None,
        feature_dim: int | None = None,
        input_size: int | tuple[int, int] | None = None,
        preprocessing: Preprocessing | None = None,
        batch_size: int = 32,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise InputError(f"backbone must be a torch.nn.Module, got {type(backbone).__name__}")
        self.concepts = unique_names(concepts, "concept")
        if not self.concepts:
            raise InputError("there is no concept; pass at least one (did a filter drop them all?)")
        self.grid = _size(grid, "grid")
        self.num_classes = integer("num_classes", num_classes)
        self.class_names = None if class_names is None else unique_names(class_names, "class", self.num_classes)
        self.cls_token, self.multi_label = bool(cls_token), bool(multi_label)
        self.hidden = None if hidden is None else integer("hidden", hidden)
        self.freeze_backbone = bool(freeze_backbone)
        self.layout = one_of("layout", layout, LAYOUTS)
        self.prefix_tokens = None if prefix_tokens is None else integer("prefix_tokens", prefix_tokens, 0)
        self.input_size = None if input_size is None else _size(input_size, "input_size")
        if preprocessing is not None and not isinstance(preprocessing, Preprocessing):
            raise InputError(
                f"preprocessing must be a captum_concepts.images.Preprocessing, got {type(preprocessing).__name__}"
            )
        self.preprocessing = preprocessing
        self.batch_size = integer("batch_size", batch_size)
        if metadata is not None and not isinstance(metadata, Mapping):
            raise InputError(f"metadata must be a dictionary, got {type(metadata).__name__}")
        self.metadata: dict[str, Any] = copy.deepcopy(dict(metadata or {}))
        self.layer = name_in(backbone, layer)
        self.backbone = backbone
        self._reading: Reading | None = None
        # Read now, because a compiled forward pass cannot look at types and code.
        self._traits = ModelTraits.of(dict(unwrap(backbone).named_modules())) if feature_dim is not None else None
        self._save_backbone: bool | None = None
        if feature_dim is None:
            self._reading, image = probe(backbone, self.layer, layout, prefix_tokens, self.input_size)
            self._check_reading(self._reading)
            feature_dim = self._reading.channels * (2 if cls_token else 1)
            if not freeze_backbone:
                freeze_unreached(backbone, self.layer, image)
        if freeze_backbone:
            backbone.requires_grad_(False).eval()
        self.feature_dim = integer("feature_dim", feature_dim)
        like = next((p for p in backbone.parameters() if p.is_floating_point()), torch.empty(0))
        place: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        m = len(self.concepts)
        self.bottleneck = make_bottleneck(self.feature_dim, m, self.hidden).to(**place)
        self.head = nn.Linear(m, self.num_classes, **place)
        for name, value in (("concept_mean", 0.0), ("concept_std", 1.0)):
            self.register_buffer(name, torch.full((m,), value, **place))
        for name in PRESENCE:
            self.register_buffer(name, None)

    # ------------------------------------------------------------------------------------------------- the network

    @of_the_model
    def features(self, inputs: Tensor) -> Tensor:
        """``(N, D, h, w)``: the layer's output on the grid; unchanged if it has that grid already.

        Args:
            inputs: images ``(N, C, H, W)`` as the backbone takes them, of any size that it takes.
        """
        _check_batch(inputs)
        output = read_layer(unwrap(self.backbone), self.layer, inputs)
        size = (inputs.shape[-2], inputs.shape[-1])
        read = None if self._reading is None else self._reading.maps(output, size)
        if read is None:
            known = self._reading  # another size of images has the same layout and as many prefix tokens
            how = (self.layout, self.prefix_tokens) if known is None else (known.kind, known.prefix_tokens)
            batch = inputs.shape[0]
            reading = reading_of(self.backbone, self.layer, output, batch, size, how[0], how[1], self._traits)
            self._check_reading(reading)
            self._reading = self._reading or reading
            read = reading.maps(output, size)
        assert read is not None
        maps, cls = read
        if tuple(maps.shape[-2:]) != self.grid:
            maps = F.interpolate(maps, self.grid, mode="bilinear", align_corners=False)
        if self.cls_token:
            maps = torch.cat([maps, cls[:, :, None, None].expand(-1, -1, *self.grid)], 1)  # type: ignore[index]
        return maps

    @of_the_model
    def concept_activations(self, inputs: Tensor) -> Tensor:
        """``(N, M)``: the standardized means of the maps c*, all that the head sees; differentiable."""
        return self._standardize(self._pool(self.features(inputs)))

    def forward(self, inputs: Tensor) -> Tensor:
        """``(N, num_classes)`` logits of images ``(N, C, H, W)``."""
        return self.head(self.concept_activations(inputs))

    def _pool(self, features: Tensor) -> Tensor:
        """``(N, M)`` means of the concept maps, in full precision.

        The mean of a 1 x 1 convolution is the convolution of the mean, which costs h*w times less; the maps themselves
        are only computed if somebody watches the bottleneck (Captum's layer attributions).
        """
        if self.pointwise is not None and not _watched(self.bottleneck):
            mean = full_precision(features).mean((2, 3), keepdim=True)
            return full_precision(self.bottleneck(mean.to(features.dtype)).flatten(1))
        return full_precision(self.bottleneck(features)).mean((2, 3))

    @property
    def pointwise(self) -> nn.Conv2d | None:
        """The bottleneck, if it is a 1 x 1 convolution: linear, each position by itself; else None."""
        g = self.bottleneck
        if isinstance(g, nn.Conv2d) and g.kernel_size == (1, 1) and g.stride == (1, 1) and g.padding == (0, 0):
            return g
        return None

    def _standardize(self, pooled: Tensor) -> Tensor:
        standard = (pooled - full_precision(self.concept_mean)) / full_precision(self.concept_std)
        return standard.to(self.concept_mean.dtype)

    def _maps_of(self, features: Tensor, columns: Sequence[int]) -> Tensor:
        """The maps of some concepts, differentiable."""
        linear = self.pointwise
        if linear is None or len(columns) == len(self.concepts):
            return self.bottleneck(features)[:, columns]
        bias = linear.bias
        return F.conv2d(features, linear.weight[columns], None if bias is None else bias[columns])

    def train(self, mode: bool = True) -> Self:
        """As in ``nn.Module``; a frozen backbone stays in evaluation mode, its batch statistics unchanged."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    @torch.no_grad()
    def set_standardization(self, mean: Tensor | Sequence[float], std: Tensor | Sequence[float]) -> Self:
        """Set what :meth:`concept_activations` subtracts and divides by.

        Args:
            mean, std: ``(M,)`` of the maps' means over the training images.

        Raises:
            InputError: another shape, not finite, or a standard deviation that is not positive.
        """
        for name, values in (("mean", mean), ("std", std)):
            given = torch.as_tensor(values).detach().cpu().double()  # not every device has doubles
            if given.shape != self.concept_mean.shape or not bool(given.isfinite().all()):
                raise InputError(
                    f"{name} must be {len(self.concepts)} finite numbers, one per concept, got {tuple(given.shape)}"
                )
            if name == "std" and not bool((given > 0).all()):
                constant = [self.concepts[i] for i in (given <= 0).nonzero().flatten().tolist()]
                raise InputError(f"std must be positive; these concepts never change, drop them: {constant[:10]}")
        self.concept_mean.copy_(torch.as_tensor(mean))
        self.concept_std.copy_(torch.as_tensor(std))
        return self

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        about = f"layer={self.layer!r}, {len(self.concepts)} concepts, grid={self.grid}, cls_token={self.cls_token}"
        return f"{about}\ntrust: {self.trust}"

    def _check_reading(self, reading: Reading) -> None:
        if self.cls_token and not reading.prefix_tokens:
            raise LayerError(
                f"cls_token=True, but layer {self.layer!r} has no token before its grid (layout {reading.kind}); "
                "choose a layer of a vision transformer with a class token, or cls_token=False"
            )
        if reading.grid == (1, 1) and self.grid != (1, 1):
            raise LayoutError(
                f"layer {self.layer!r} has a single position for images of {reading.image_size}, so it cannot say "
                "where; choose a layer before pooling"
            )

    # ------------------------------------------------------------------------------------------------- explanations

    def scores(self, inputs: Any) -> Tensor:
        """``(N, M)``: :meth:`concept_activations` of anything that :meth:`explain` takes.

        In batches, in evaluation mode and without gradients.
        """
        seen, _ = self._look(inputs)
        return torch.cat([one.activations for one in seen])

    def concept_maps(self, inputs: Any, concepts: str | int | Sequence[str | int] | None = None) -> Tensor:
        """``(N, T, h, w)``: where each concept is, in the units of the bottleneck (not standardized).

        In evaluation mode and without gradients; ``model.bottleneck(model.features(images))`` is differentiable.

        Args:
            inputs: as in :meth:`explain`.
            concepts: names or indices; None for all. The maps of others are not computed.

        Raises:
            InputError: an unknown concept (the nearest names are offered).
        """
        columns = name_positions(concepts, self.concepts)
        seen, _ = self._look(inputs)
        with torch.no_grad(), evaluation_mode(self.bottleneck):
            return full_precision(torch.cat([self._maps_of(one.features, columns) for one in seen]))

    def contributions(
        self, inputs: Any, target: Any = None, concepts: str | int | Sequence[str | int] | None = None
    ) -> Tensor:
        r"""``(N, T)``: how much each concept moves the logit of ``target``, :math:`S(x, m, l) = W_{lm} c^*_m(x)`.

        The logit is the sum over all concepts plus the head's bias.

        Args:
            inputs: images.
            target: a class (index or name), or one per image; None takes the predicted ones.
            concepts: names or indices; None for all.

        Raises:
            TargetError: wrong type, length or range (an ``AssertionError`` as well).
            InputError: an unknown concept (the nearest names are offered).
        """
        columns = name_positions(concepts, self.concepts)
        seen, _ = self._look(inputs)
        parts = [
            self._shares(one.activations, self._target(target, one.logits, one.rows))[:, columns]
            for one in self._checked_target(seen, inputs, target)
        ]
        return torch.cat(parts)

    def explain(
        self,
        inputs: Any,
        target: Any = None,
        *,
        concepts: str | int | Sequence[str | int] | None = None,
        top_k: int | None = 5,
        rank_by: str = "contributions",
        contributions: bool = True,
    ) -> ConceptExplanation:
        """What the model saw, where, and how much it moved the logit of ``target``.

        Args:
            inputs: images: tensors as the backbone takes them, or files, PIL images, data sets, which are read by
                :func:`~captum_concepts.images.inputs_for` and normalized by :attr:`preprocessing`.
            target: a class (index or name), or one per image; None takes the predicted ones.
            concepts: explain just these (names or indices), in this order; ``top_k`` is then ignored.
            top_k: how many concepts of each image, its own strongest ones; None for all.
            rank_by: what they are ranked by: ``"contributions"`` (absolute) or ``"scores"``.
            contributions: False leaves them out and ranks by scores.

        Returns:
            ``scores``: the standardized activations c*; ``maps``: the concept maps on the grid, in the units of the
            bottleneck; ``contributions`` in logits; ``presence`` if the model is calibrated.

        Raises:
            TargetError: as in :meth:`contributions`.
            InputError: ``top_k`` below 1, or an unknown concept (the nearest names are offered).
        """
        how = {"concepts": concepts, "top_k": top_k, "rank_by": one_of("rank_by", rank_by, RANKINGS)}
        if not contributions:
            how["rank_by"] = "scores"
        inputs = self._opened(inputs)
        seen, names = self._look(inputs)
        made = self._explanation(
            self._checked_target(seen, inputs, target), target, names, contributions=contributions, **how
        )
        return dataclasses.replace(made, pictures=thumbnails(inputs))

    def explain_classes(
        self, inputs: Any, classes: Sequence[str | int], *, top_k: int | None = 5
    ) -> dict[str | int, ConceptExplanation]:
        """Several classes of the same images, from one forward pass.

        Args:
            inputs: images.
            classes: names or indices.
            top_k: as in :meth:`explain`, for each class.

        Returns:
            An explanation per class, under what it was called by.
        """
        if isinstance(classes, (str, int)):
            raise InputError(f"classes must be a list of classes, got {classes!r}")
        for one in classes:
            self._class(one)
        seen, names = self._look(inputs)
        kept = list(seen)
        return {key: self._explanation(kept, key, names, top_k=top_k) for key in classes}

    def explain_region(
        self,
        inputs: Tensor,
        target: Any = None,
        *,
        points: Any = None,
        boxes: Any = None,
        mask: Any = None,
        top_k: int | None = 5,
        units: str = "std",
        reduction: str = "mean",
    ) -> ConceptExplanation:
        r"""What the model saw in a region ("Explain Anything"), strongest concept first.

        With the region :math:`I` in pixels and the concept maps enlarged bilinearly to the image, a concept scores

        .. math:: a(x, m \mid I) = \frac{1}{\sum I} \sum I \odot \frac{c(x)_m - \mu_m}{\sigma_m}

        The published score is the plain sum :math:`\sum I \odot c(x)_m` (``units="map", reduction="sum"``). The loss
        of a bottleneck leaves scale and zero of each map free, so plain sums compare concepts only if training brought
        them to one scale, as :func:`~captum_concepts.fit_salf_cbm` does approximately.

        Args:
            inputs: images ``(N, C, H, W)``.
            target: class of the contributions, as in :meth:`contributions`.
            points: ``(x, y)`` in pixels, x the column from the left and y the row from the top, ``0 <= x < W``,
                ``0 <= y < H``. A point stands for the cell of the grid that contains it. One for all images;
                ``(N, 2)``, one per image; or a list per image.
            boxes: ``(x0, y0, x1, y1)`` in pixels, from the left and top border to the right and bottom one (pixel x
                covers [x, x+1)); one for all images, ``(N, 4)``, or a list per image.
            mask: ``(H, W)`` or ``(N, H, W)`` of the image's size: bool, integers (nonzero is the region), or the
                fraction in [0, 1] of each pixel.
            top_k: how many concepts of each image; None for all.
            units: ``"std"``: standard deviations of a concept's pooled activation over the training data; ``"map"``:
                the bottleneck's own.
            reduction: ``"mean"`` or ``"sum"`` over the region's pixels.

        Returns:
            ``scores`` a(x, m | I), ``maps`` as in :meth:`explain`; ``contributions`` is the region's part of
            :meth:`contributions`: over regions that tile the image, the parts add up to the whole.

        Raises:
            InputError: no region or two kinds, one outside of the image or in fractions of it, empty, or of a wrong
                shape.
        """
        if points is None and boxes is None and mask is None:
            raise InputError("pass the region as points=, boxes= or mask=; explain() explains the whole image")
        one_of("units", units, UNITS)
        one_of("reduction", reduction, ("mean", "sum"))
        _check_batch(inputs)
        area = self._region(inputs, points, boxes, mask)
        seen, _ = self._look(inputs)
        return self._region_explanation(
            self._checked_target(seen, inputs, target),
            area,
            target,
            None,
            top_k=top_k,
            units=units,
            reduction=reduction,
        )

    def intervene(
        self,
        inputs: Tensor,
        concept: Any,
        *,
        beta: Any = None,
        units: str | None = None,
        points: Any = None,
        boxes: Any = None,
        mask: Any = None,
        return_regions: bool = False,
    ) -> Any:
        r"""What the model would say if it saw more or less of a concept in a region.

        .. math:: c(x)_m \leftarrow c(x)_m + \beta I

        Args:
            inputs: images ``(N, C, H, W)``.
            concept: a name or index; a list of them, edited in the same region; or a list of edits with regions of
                their own: ``[{"concept": "wheel", "beta": 2.0, "boxes": (0, 0, 90, 60)}, ...]``. All edits act at once.
            beta: what is added to the map inside the region; one number, or one per concept of a list. Negative
                numbers remove.
            units: required. ``"std"``: ``beta`` counts the concept's standard deviations ``concept_std``, so 1 over the
                whole image raises its activation c* by 1. ``"map"``: the map's own units, as published.
            points, boxes, mask: the region, as in :meth:`explain_region`; none means the whole image.
            return_regions: also return what :meth:`explain_region` would say of the edited region(s), taken together,
                after the edit: all concepts, in standard deviations, and their contributions to the class that is
                predicted then.

        Returns:
            ``(logits_before, logits_after)``, each ``(N, num_classes)``; with ``return_regions`` a third entry, a
            :class:`~captum_concepts.ConceptExplanation`.

        Raises:
            InputError: unknown concept (the nearest names are offered); ``units`` missing; ``beta`` missing, not finite
                or not one per concept; a region as in :meth:`explain_region`.
        """
        edits = map_edits(concept, beta, units, {"points": points, "boxes": boxes, "mask": mask}, self.concepts)
        _check_batch(inputs)
        areas = [self._region(inputs, **edit.region) for edit in edits]
        std = full_precision(self.concept_std)
        steps = [edit.beta * (std[edit.column] if edit.units == "std" else 1.0) for edit in edits]
        shift = std.new_zeros(inputs.shape[0], len(self.concepts))
        for edit, area, step in zip(edits, areas, steps, strict=True):
            covered = area.mean((1, 2)).to(shift)  # that is what pooling leaves of I
            shift[:, edit.column] += step * covered / std[edit.column]
        seen, _ = self._look(inputs)
        parts = list(seen)
        before = torch.cat([one.logits for one in parts])
        with torch.no_grad(), evaluation_mode(self):
            edited = full_precision(torch.cat([one.activations for one in parts])) + shift
            after = self.head(edited.to(before.dtype))
        if not return_regions:
            return before, after
        union = torch.stack(areas).amax(0)
        change = [(edit.column, step, area) for edit, step, area in zip(edits, steps, areas, strict=True)]
        new = [one._replace(logits=after[one.rows], activations=edited[one.rows].to(before.dtype)) for one in parts]
        regions = self._region_explanation(new, union, None, change, top_k=None, units="std", reduction="mean")
        return before, after, regions

    def decision_rules(self, target: str | int, top_k: int | None = None) -> list[tuple[str, float]]:
        """The concepts that support or oppose a class: ``(concept, weight)``, strongest first, none of weight 0.

        Args:
            target: index or name of the class.
            top_k: how many; None for all.

        Raises:
            TargetError: no such class.
        """
        weights = full_precision(self._head_weight()[self._class(target)].detach())
        order = torch.argsort(weights.abs(), descending=True, stable=True).tolist()
        rules = [(self.concepts[j], float(weights[j])) for j in order if weights[j] != 0]
        return rules if top_k is None else rules[: integer("top_k", top_k)]

    # ------------------------------------------------------------------------------------------------- other models

    @torch.no_grad()
    def select_concepts(self, concepts: str | int | Sequence[str | int] | Tensor) -> Self:
        """A new model with these concepts only, in this order; it shares the backbone, and copies the rest.

        Args:
            concepts: names, indices, or a mask.

        Raises:
            InputError: unknown (the nearest are offered), none, or one twice.
        """
        columns = name_positions(concepts, self.concepts)
        return self._copy([self.concepts[j] for j in columns], columns)

    def without(self, concepts: str | int | Sequence[str | int] | Tensor) -> Self:
        """A new model without these concepts: it decides by the others, whose rules stay as they are.

        :func:`~captum_concepts.models.salf_cbm.fit.refit_head` trains the rules of the result again.

        Args:
            concepts: names, indices, or a mask.

        Raises:
            InputError: unknown (the nearest are offered), none, or all.
        """
        removed = set(name_positions(concepts, self.concepts))
        if len(removed) == len(self.concepts):
            raise InputError(f"without() of all {len(removed)} concepts leaves nothing to decide by")
        return self.select_concepts([j for j in range(len(self.concepts)) if j not in removed])

    @torch.no_grad()
    def with_edits(self, edits: Iterable[Mapping[str, Any]]) -> Self:
        """A new model whose rules are corrected for good; what :meth:`intervene` does, it does for one call only.

        Args:
            edits: ``[{"target": "traffic light", "concept": "flashing light", "weight": 1.5}, ...]``: the weight of a
                concept for a class is set to ``weight``, or raised by ``add``.

        Returns:
            The new model; it shares the backbone. ``metadata["edits"]`` lists what was changed.

        Raises:
            InputError: unknown concept or key, no weight or two.
            TargetError: no such class.
        """
        changes = rule_edits(edits, self.concepts, self.num_classes, self.class_names)
        self._head_weight()
        new = self._copy(self.concepts, list(range(len(self.concepts))))
        notes = []
        for target, column, weight, add in changes:
            old = float(new.head.weight[target, column])
            new.head.weight[target, column] = old + weight if add else weight
            name = target if self.class_names is None else self.class_names[target]
            after = float(new.head.weight[target, column])
            notes.append({"target": name, "concept": self.concepts[column], "before": old, "after": after})
        new.metadata["edits"] = [*new.metadata.get("edits", []), *notes]
        return new

    def _copy(self, concepts: Sequence[str], columns: Sequence[int]) -> Self:
        options = {name: getattr(self, name) for name in hub.ARGUMENTS if name not in ("layer", "concepts")}
        # The backbone is shared: neither frozen nor moved here.
        new = type(self)(self.backbone, self.layer, concepts, **{**options, "freeze_backbone": False})
        new.freeze_backbone = self.freeze_backbone
        for part in (new.bottleneck, new.head):
            part.to(device=self.concept_mean.device, dtype=self.concept_mean.dtype)
        new._reading = self._reading
        for judged in ("accuracy", "support", "advice"):  # of the rules as they were
            new.metadata.pop(judged, None)
        *first, last = self._convolutions()
        *new_first, new_last = new._convolutions()
        for one, other in zip(first, new_first, strict=True):
            other.load_state_dict(one.state_dict())
        new_last.weight.copy_(last.weight[columns])
        new.head.weight.copy_(self._head_weight()[:, columns])
        new.head.bias.copy_(self.head.bias)
        for name in ("concept_mean", "concept_std", *PRESENCE):
            value = getattr(self, name)
            setattr(new, name, None if value is None else value[columns].clone())
        changed: list[nn.Module] = [new, *new.bottleneck.modules(), new.head]
        for module in changed:  # not the backbone, whose parts may differ in mode
            module.training = self.training
        return new

    def _convolutions(self) -> list[nn.Conv2d]:
        """The convolutions of the bottleneck, which must be the model's own."""
        layers = [self.bottleneck] if self.hidden is None else list(self.bottleneck.children())
        mine = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
        if len(mine) != (1 if self.hidden is None else 2) or mine[-1].out_channels != len(self.concepts):
            raise InputError(f"this needs the model's own bottleneck, but it is a {type(self.bottleneck).__name__} now")
        if mine[-1].kernel_size != (1, 1) or mine[-1].bias is not None:
            raise InputError(f"this needs the model's own bottleneck, 1 x 1 without a bias, but it is {mine[-1]} now")
        return mine

    # ------------------------------------------------------------------------------------------------- presence

    @property
    def reliability_(self) -> dict[str, Reliability]:
        """For each concept, how well its activation agrees with the vision-language model (or, after
        :meth:`calibrate`, with the labels) on held-out images; empty if that was not measured."""
        return {
            name: Reliability.of(value)
            for name, value in self.metadata.get("reliability", {}).items()
            if name in self.concepts
        }

    @property
    def trust(self) -> str:
        """One sentence: whether the concepts' names can be believed."""
        return trust_line(self.reliability_, self.metadata)

    def presence(self, inputs: Any) -> Tensor:
        """``(N, M)``: calibrated probability that each concept is in the image.

        Raises:
            InputError: the model is not calibrated.
        """
        found = self._presence(self.scores(inputs))
        if found is None:
            raise InputError("the model is not calibrated; call calibrate(images, labels)")
        return found

    def _presence(self, activations: Tensor) -> Tensor | None:
        if self.presence_slope is None or self.presence_offset is None:
            return None
        slope, offset = full_precision(self.presence_slope), full_precision(self.presence_offset)
        return torch.sigmoid(full_precision(activations) * slope + offset)

    def set_presence(self, slope: Tensor, offset: Tensor, columns: Sequence[int] | None = None) -> Self:
        """Set the calibration of :meth:`presence`, of all concepts or of some ``columns``.

        The others of an uncalibrated model stay at 0.5, "no idea".

        Raises:
            InputError: not finite, or not one number per concept.
        """
        chosen = list(range(len(self.concepts))) if columns is None else list(columns)
        for name, values in zip(PRESENCE, (slope, offset), strict=True):
            given = torch.as_tensor(values)
            if given.shape != (len(chosen),) or not bool(given.isfinite().all()):
                raise InputError(f"{name} must be {len(chosen)} finite numbers, got {tuple(given.shape)}")
            current = getattr(self, name)
            new = torch.zeros_like(self.concept_mean) if current is None else current.clone()
            new[torch.tensor(chosen, device=new.device)] = given.to(new)
            setattr(self, name, new)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        # A calibration belongs to the activations: it comes with their state and goes with that of others.
        other = any(key.removeprefix(prefix).startswith(("bottleneck.", "concept_")) for key in state_dict)
        for name in PRESENCE:
            if prefix + name in state_dict:
                setattr(self, name, torch.zeros_like(self.concept_mean))
            elif other:
                setattr(self, name, None)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @torch.no_grad()
    def calibrate(self, images: Any, labels: Any) -> Self:
        """Fit :meth:`presence` and :attr:`reliability_` to your own labeled images, in place.

        Args:
            images: as in :meth:`explain`; images that were not trained on.
            labels: which concepts are in each image: ``(N, M)`` bool, or a list with the names of each image's. A
                dictionary ``{concept: (N,) bool}`` calibrates some concepts and leaves the others as they are.

        Raises:
            InputError: labels that do not fit.
        """
        activations = full_precision(self.scores(images)).cpu()
        finite_images(activations, range(len(activations)), "the score")
        columns, verdicts = verdicts_of(labels, self.concepts, len(activations))
        self.set_presence(*fit_presence(activations[:, columns], verdicts), columns)
        names = [self.concepts[j] for j in columns]
        measured = reliabilities(activations[:, columns], verdicts, names)
        self.metadata["reliability"] = {**self.metadata.get("reliability", {}), **measured}
        self.metadata["reliability_source"] = f"labels of {len(activations)} images"
        return self

    # ------------------------------------------------------------------------------------------------- exploration

    def explain_video(
        self,
        frames: Iterable[Tensor],
        target: Any = None,
        *,
        concepts: str | int | Sequence[str | int] | None = None,
        top_k: int | None = 5,
        batch_size: int = 1,
    ) -> Iterator[ConceptExplanation]:
        """One explanation per frame, as frames come: a generator that holds ``batch_size`` frames at a time.

        Args:
            frames: images ``(C, H, W)`` or batches of one, from any iterable: a tensor ``(T, C, H, W)``, a decoder.
            target: class of the contributions; None takes the predicted one of each frame.
            concepts: follow these through the video instead; columns then mean the same in every frame.
            top_k: as in :meth:`explain`.
            batch_size: frames per forward pass. Frames of another size begin a new one.

        Raises:
            InputError: at once for an unknown concept or bad number; while it runs for a frame that is not an image.
        """
        size = integer("batch_size", batch_size)
        if concepts is not None:
            name_positions(concepts, self.concepts)
        if top_k is not None:
            integer("top_k", top_k)
        if target is not None:
            self._class(target)

        def explained() -> Iterator[ConceptExplanation]:
            for images in _frames(frames, size):
                yield from self.explain(images.to(self.concept_mean.device), target, concepts=concepts, top_k=top_k)

        return explained()

    def most_activating(
        self,
        data: Any,
        concepts: str | int | Sequence[str | int] | None = None,
        k: int = 5,
        *,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> dict[str, list[tuple[int, float]]]:
        """The images with the highest activation c* of each concept: what its name really stands for in this model.

        Args:
            data: images, as in :meth:`explain`. A shuffling loader is read in its data set's order.
            concepts: names or indices; None for all.
            k: how many images per concept.
            batch_size: images per forward pass; None takes the model's. Memory does not grow with the data.
            show_progress: a bar.

        Returns:
            ``{concept: [(index in data, activation), ...]}``, strongest first; the earlier image first among equals.
            Images whose activation is NaN are left out.

        Raises:
            InputError: no image, or an unknown concept.
        """
        columns = name_positions(concepts, self.concepts)
        integer("k", k)
        best = torch.empty(0, len(columns), dtype=torch.float32)
        where = torch.empty(0, len(columns), dtype=torch.long)
        total = 0
        seen, _ = self._look(data, batch_size=batch_size)
        for one in _progress(seen, show_progress):
            values = one.activations[:, columns].float().cpu()
            values = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            rows = torch.arange(total, total + len(values))[:, None].expand_as(values)
            best, where = torch.cat([best, values]), torch.cat([where, rows])
            order = torch.argsort(best, dim=0, descending=True, stable=True)[:k]
            best, where = best.gather(0, order), where.gather(0, order)
            total += len(values)
        return {
            self.concepts[column]: [
                (int(i), float(v)) for i, v in zip(where[:, j], best[:, j], strict=True) if v != -torch.inf
            ]
            for j, column in enumerate(columns)
        }

    def zero_shot_segmentation(
        self,
        inputs: Tensor,
        target: Any = None,
        *,
        template: str = CLASS_TEMPLATE,
        threshold: float | str = "mean",
        size: tuple[int, int] | None = None,
    ) -> Segmentation:
        """Foreground by the map of a class prompt: the paper's protocol on ImageNet-segmentation.

        The model's concepts must contain a prompt for each class ("An image of a {class}",
        :meth:`Vocabulary.from_classes <captum_concepts.concepts.Vocabulary.from_classes>`). Its map is enlarged
        bilinearly, scaled to [0, 1] by its own minimum and maximum, and binarized.

        Args:
            inputs: images.
            target: the class, or one per image, by name or index; a concept's own name is taken as it is. None takes
                the predicted classes.
            template: how a class name becomes a concept.
            threshold: ``"mean"`` (the protocol): above the heatmap's own mean; or a number in [0, 1].
            size: ``(H, W)`` of the result; None takes the images'.

        Raises:
            InputError: no such concept (the nearest are offered), ``class_names`` missing, or a bad threshold.
            TargetError: a bad target.
        """
        if threshold != "mean" and (isinstance(threshold, (str, bool)) or not 0 <= threshold <= 1):
            raise InputError(f"threshold must be 'mean' or a number in [0, 1], got {threshold!r}")
        if "{class}" not in template:
            raise InputError(f"template needs the field {{class}}, got {template!r}")
        _check_batch(inputs)
        seen, _ = self._look(inputs)
        maps, columns = [], []
        for one in seen:
            column = self._prompts(target, one, len(inputs), template)
            maps.append(self._maps_at(one.features, torch.tensor(column)[:, None]))
            columns += column
        large = F.interpolate(torch.cat(maps), size or tuple(inputs.shape[-2:]), mode="bilinear", align_corners=False)
        large = large[:, 0]
        low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
        heat = (large - low) / torch.where(high > low, high - low, torch.ones_like(high))
        limit = heat.mean((1, 2), keepdim=True) if threshold == "mean" else torch.full_like(low, float(threshold))
        return Segmentation(heat, heat > limit, [self.concepts[column] for column in columns])

    def _prompts(self, target: Any, seen: _Seen, n: int, template: str) -> list[int]:
        """The column of each image's class prompt."""
        count = len(seen.logits)
        if isinstance(target, str) and target in self.concepts:
            return [self.concepts.index(target)] * count
        if isinstance(target, list) and len(target) == n and all(t in self.concepts for t in target):
            return [self.concepts.index(t) for t in target[seen.rows]]
        classes = self._target(target, seen.logits, seen.rows).tolist()
        if self.class_names is None:
            if len(self.concepts) == self.num_classes:  # one prompt per class, in their order
                return classes
            raise InputError("the model has no class_names to fill the template with; set them, or name concepts")
        return [name_positions(template.replace("{class}", self.class_names[c]), self.concepts)[0] for c in classes]

    # ------------------------------------------------------------------------------------------------- saving

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        save_backbone: bool | None = None,
        images: Tensor | None = None,
        config: Any = None,  # noqa: ARG002
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write ``model.safetensors``, ``config.json`` and a model card (``README.md``) into a folder.

        All are complete before the first of an older model is replaced.

        Args:
            save_directory: the folder; created if missing.
            save_backbone: store the backbone's weights, too. None stores them if the backbone was trained, or if it
                can be built again from its name (torchvision, timm): the folder is then all that loading needs.
                Otherwise a fingerprint is stored, and loading checks that the same backbone is given.
            images: some images as the model takes them; the card shows their explanations.
            config: not used; ``config.json`` is written from the model.
            repo_id, push_to_hub, push_to_hub_kwargs: of ``huggingface_hub``.
            model_card_kwargs: ``{"name": ...}``, the title of the card; else the folder's name.

        Returns:
            The address on the Hub, or None.

        Raises:
            InputError: ``metadata`` is not valid JSON, or bottleneck or head were replaced by something else.
        """
        folder = Path(save_directory)
        card = {"name": repo_id or folder.resolve().name, **(model_card_kwargs or {})}
        before = self._save_backbone  # pushing to the Hub saves once more, into a folder of its own
        self._save_backbone = before if save_backbone is None else save_backbone
        try:
            hub.save_folder(self, folder, card["name"], self._hub_mixin_info.model_card_data, images)
            if push_to_hub:
                return self.push_to_hub(repo_id or folder.name, model_card_kwargs=card, **push_to_hub_kwargs)
            return None
        finally:
            self._save_backbone = before

    def _save_pretrained(self, save_directory: Path) -> None:
        """What ``push_to_hub`` calls."""
        hub.write_files(self, hub.config_of(self), save_directory)

    def generate_model_card(self, name: str = "SALF-CBM", **_options: Any) -> ModelCard:
        """The model card: rules, concepts, limits, and data, accuracy and drops from :attr:`metadata`."""
        return hub.model_card(self, hub.config_of(self), name, self._hub_mixin_info.model_card_data)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        backbone: nn.Module | None = None,
        check_backbone: bool = True,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> Self:
        """Load what :meth:`save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: a folder, or the name of a repository on the Hub.
            backbone: the module that the model was trained with; if its weights were stored, they are loaded into it.
                None: the backbone is built from its name, if the folder says it (torchvision, timm).
            check_backbone: refuse a backbone with other weights than the one the model was trained with.
            revision, cache_dir, local_files_only, token: of ``huggingface_hub``.

        Returns:
            The model in evaluation mode, on the backbone's device.

        Raises:
            InputError: the backbone must be given.
            FileNotFoundError: no such folder, or a file is missing.
            ArtifactError: a file is truncated, corrupt or foreign, or the backbone is another one.
        """
        if backbone is not None and not isinstance(backbone, nn.Module):
            raise InputError(f"backbone must be a torch.nn.Module, got {type(backbone).__name__}")
        download = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
        folder = hub.find_folder(pretrained_model_name_or_path, download)
        return hub.load_folder(cls, folder, backbone, check_backbone)

    def export(self, path: str | os.PathLike[str], *, size: int | tuple[int, int] | None = None) -> Path:
        """Write a ``torch.export`` program (``.pt2``) that runs without this package and without the backbone's code.

        ``torch.export.load(path).module()(images, target)`` returns a dictionary with ``logits`` (N, L),
        ``concept_maps`` (N, M, h, w), ``activations`` (N, M) and ``contributions`` (N, M) to the classes ``target``
        (N,), -1 for the predicted one. N is free. Names of concepts and classes are in the file's extra file
        ``captum_concepts.json``.

        Args:
            path: the file.
            size: ``(H, W)`` of the images; None takes :attr:`input_size`, or the size that the backbone was read with.
        """
        return export_program(self, Path(path), None if size is None else _size(size, "size"))

    # ------------------------------------------------------------------------------------------------- how

    def _look(self, inputs: Any, *, batch_size: int | None = None) -> tuple[Iterator[_Seen], list[str]]:
        """Forward passes over ``inputs`` in evaluation mode, without gradients; names of the images are added to the
        list as they are read, and stay empty for tensors."""
        names: list[str] = []
        size = self.batch_size if batch_size is None else integer("batch_size", batch_size)
        inputs = self._opened(inputs)
        if isinstance(inputs, Tensor):
            check_images(inputs)
            parts: Iterator[Tensor] = iter(inputs.split(size))
        else:
            parts = self._read(inputs, size, names)
        return self._passes(parts), names

    def _opened(self, inputs: Any) -> Tensor | ImageSource:
        """Tensors as they are, anything else as images that the model wants to see."""
        if isinstance(inputs, Tensor):
            return inputs
        known = self.preprocessing or unwrap(self.backbone)
        return inputs_for(known, inputs, size=self.input_size if self.preprocessing is None else None)

    def _read(self, source: ImageSource, size: int, names: list[str]) -> Iterator[Tensor]:
        named = source.files is not None
        for batch in batches(source, size, device=self.concept_mean.device):
            names += batch.names if named else []
            check_images(batch.images)
            yield batch.images.to(self.concept_mean.dtype)

    def _passes(self, parts: Iterator[Tensor]) -> Iterator[_Seen]:
        start = 0
        for part in parts:
            with torch.no_grad(), evaluation_mode(self):
                features = self.features(part)
                activations = self._standardize(self._pool(features))
                seen = _Seen(slice(start, start + len(part)), features, activations, self.head(activations))
            if not bool(activations.isfinite().all()) and bool(part.isfinite().all()):
                warnings.warn(
                    "the concept activations contain NaN or infinite values although the images do not; scale the "
                    "images as the backbone was trained, and look for weights that are not finite",
                    InputWarning,
                    stacklevel=3,
                )
            start += len(part)
            yield seen
        if not start:
            raise InputError("there is no image")

    def _checked_target(self, seen: Iterator[_Seen], inputs: Any, target: Any) -> Iterable[_Seen]:
        """``seen``, after a check of targets of their number, which costs no forward pass for tensors."""
        if target is None:
            return seen
        if isinstance(inputs, Tensor):
            target_indices(target, len(inputs), self.num_classes, self.class_names or (), what="class")
            return seen
        many = isinstance(target, list) or (getattr(target, "ndim", 0) > 0 and len(target) > 1)
        if not many:
            self._class(target)
            return seen
        kept = list(seen)
        target_indices(target, kept[-1].rows.stop, self.num_classes, self.class_names or (), what="class")
        return kept

    def _class(self, target: Any) -> int:
        return int(target_indices(target, 1, self.num_classes, self.class_names or (), what="class")[0])

    def _target(self, target: Any, logits: Tensor, rows: slice) -> Tensor:
        """The class of each image of ``rows``."""
        if target is None:
            return logits.argmax(1)
        if isinstance(target, list) or (hasattr(target, "__getitem__") and getattr(target, "ndim", 0) == 1):
            target = target if len(target) == 1 else target[rows]
        return target_indices(target, len(logits), self.num_classes, self.class_names or (), what="class").to(
            logits.device
        )

    def _head_weight(self) -> Tensor:
        if not isinstance(self.head, nn.Linear):
            raise InputError(f"contributions need a linear head, but head is a {type(self.head).__name__}")
        return self.head.weight

    def _shares(self, activations: Tensor, target: Tensor) -> Tensor:
        return full_precision(self._head_weight().detach())[target] * full_precision(activations)

    def _explanation(
        self,
        seen: Iterable[_Seen],
        target: Any,
        names: Sequence[str] = (),
        *,
        contributions: bool = True,
        **how: Any,
    ) -> ConceptExplanation:
        """Of the whole images."""

        def values(one: _Seen, index: Tensor) -> tuple[Tensor, Tensor]:
            return full_precision(one.activations), self._shares(one.activations, index)

        return self._assemble(seen, target, names, values, contributions=contributions, unit=STD_UNIT, **how)

    def _region_explanation(
        self,
        seen: Iterable[_Seen],
        area: Tensor,
        target: Any,
        edits: Sequence[tuple[int, Any, Tensor]] | None,
        *,
        top_k: int | None,
        units: str,
        reduction: str,
    ) -> ConceptExplanation:
        """Of a region ``area`` (N, H, W), whose maps were edited by ``(column, step, area)`` perhaps."""
        mean, std = full_precision(self.concept_mean), full_precision(self.concept_std)

        def values(one: _Seen, index: Tensor) -> tuple[Tensor, Tensor]:
            own = area[one.rows]
            weights = pooled_upsampling(own, self.grid).to(one.features.device)
            share = coverage(own, self.grid).to(one.features.device)
            total = weights.sum((1, 2))[:, None]
            scores = self._weighted(one.features, weights / total[..., None])
            inside = self._weighted(one.features, share / share[0].numel())
            for column, step, where in edits or ():
                both = (own * where[one.rows]).to(scores)  # of the edit, what lies in the region
                scores[:, column] += step * both.sum((1, 2)) / own.sum((1, 2)).to(scores)
                inside[:, column] += step * both.mean((1, 2))
            if units == "std":
                scores = (scores - mean) / std
            if reduction == "sum":
                scores = scores * total
            inside = (inside - share.mean((1, 2))[:, None] * mean) / std
            return scores, self._shares(inside, index)

        unit = {"std": STD_UNIT, "map": "map units"}[units] + (" x pixels" if reduction == "sum" else "")
        return self._assemble(
            seen, target, (), values, top_k=top_k, rank_by="scores", unit=unit, edits=edits, presence=False
        )

    def _assemble(
        self,
        seen: Iterable[_Seen],
        target: Any,
        names: Sequence[str],
        values: Callable[[_Seen, Tensor], tuple[Tensor, Tensor]],
        *,
        unit: str,
        concepts: Any = None,
        top_k: int | None = None,
        rank_by: str = "contributions",
        contributions: bool = True,
        presence: bool = True,
        edits: Sequence[tuple[int, Any, Tensor]] | None = None,
    ) -> ConceptExplanation:
        """An explanation from forward passes and what each says of its images: ``values(seen, target) -> (scores,
        contributions)``. Each image's own concepts are chosen, and only their maps computed."""
        parts: list[tuple[Tensor, ...]] = []
        how = {"concepts": concepts, "top_k": top_k, "rank_by": rank_by}
        for one in seen:
            index = self._target(target, one.logits, one.rows)
            scores, shares = values(one, index)
            chosen = Selection.choose(self.concepts, shares if rank_by == "contributions" else scores, **how)
            maps = self._maps_at(one.features, chosen.index)
            for column, step, where in edits or ():
                own = step * coverage(where[one.rows], self.grid).to(maps)
                maps = maps + (chosen.index == column).to(maps)[..., None, None] * own[:, None]
            chance = full_precision(one.logits)
            chance = torch.sigmoid(chance) if self.multi_label else torch.softmax(chance, 1)
            chance = chance.gather(1, index[:, None])[:, 0]
            parts.append((scores, shares, maps, index, chance, one.activations))
        scores, shares, maps, index, chance, activations = (torch.cat(part) for part in zip(*parts, strict=True))
        chosen = Selection.choose(self.concepts, shares if rank_by == "contributions" else scores, **how)
        there = self._presence(activations) if presence else None
        return ConceptExplanation(
            [self.concepts[j] for j in chosen.columns],
            scores[:, chosen.columns],
            chosen.spread(maps),
            shares[:, chosen.columns] if contributions else None,
            index,
            self.layer,
            METHOD,
            presence=None if there is None else there[:, chosen.columns],
            selected=chosen.selected.to(scores.device),
            class_names=self.class_names,
            image_names=list(names) if names else None,
            target_probability=chance if bool(chance.isfinite().all()) else None,
            score_unit=unit,
            contribution_unit="logit" if contributions else "",
            rank_by=chosen.rank_by,
        )

    def _maps_at(self, features: Tensor, index: Tensor) -> Tensor:
        """``(N, k, h, w)``: the maps of each image's own concepts ``index`` (N, k); others are not computed."""
        index = index.to(features.device)
        with torch.no_grad(), evaluation_mode(self.bottleneck):
            shared = len(index) > 0 and bool((index == index[0]).all())
            linear = self.pointwise
            if shared or linear is None:
                columns = index[0].tolist() if shared else list(range(len(self.concepts)))
                maps = full_precision(self._maps_of(features, columns))
                return maps if shared else maps.gather(1, index[..., None, None].expand(-1, -1, *self.grid))
            weight, bias = linear.weight.flatten(1)[index], linear.bias
            maps = full_precision((weight @ features.flatten(2)).unflatten(2, self.grid))
            return maps if bias is None else maps + bias[index][..., None, None]

    def _weighted(self, features: Tensor, weights: Tensor) -> Tensor:
        """``(N, M)``: sums over the grid of the concept maps times ``weights`` (N, h, w)."""
        linear = self.pointwise
        with torch.no_grad():
            if linear is None or linear.bias is not None:
                with evaluation_mode(self.bottleneck):
                    maps = full_precision(self.bottleneck(features))
                return torch.einsum("nmhw,nhw->nm", maps, weights.to(maps))
            wide = full_precision(features)
            pooled = torch.einsum("ndhw,nhw->nd", wide, weights.to(wide)).to(features.dtype)
            with evaluation_mode(self.bottleneck):
                return full_precision(self.bottleneck(pooled[..., None, None]).flatten(1))

    def _region(self, inputs: Any, points: Any = None, boxes: Any = None, mask: Any = None) -> Tensor:
        size = (inputs.shape[-2], inputs.shape[-1])
        return region_mask(inputs.shape[0], size, self.grid, points=points, boxes=boxes, mask=mask)


def make_bottleneck(features: int, concepts: int, hidden: int | None) -> nn.Module:
    """From features to concept maps, each position by itself: one 1 x 1 convolution, or two with a GELU between.

    >>> make_bottleneck(8, 3, None)
    Conv2d(8, 3, kernel_size=(1, 1), stride=(1, 1), bias=False)
    """
    if hidden is None:
        return nn.Conv2d(features, concepts, 1, bias=False)
    return nn.Sequential(nn.Conv2d(features, hidden, 1), nn.GELU(), nn.Conv2d(hidden, concepts, 1, bias=False))


def _frames(frames: Iterable[Any], size: int) -> Iterator[Tensor]:
    """Batches of frames of one size, each as soon as it is full."""
    waiting: list[Tensor] = []
    for frame in open_images(frames, mode="any", labels=False):
        if waiting and frame.shape != waiting[0].shape:
            yield torch.stack(waiting)
            waiting = []
        waiting.append(frame)
        if len(waiting) == size:
            yield torch.stack(waiting)
            waiting = []
    if waiting:
        yield torch.stack(waiting)


def _watched(module: nn.Module) -> bool:
    """Whether somebody's hooks look at what goes into or comes out of ``module``."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _size(size: Any, name: str) -> tuple[int, int]:
    """A pair of positive integers; one integer stands for both."""
    pair = (size, size) if hasattr(size, "__index__") and not isinstance(size, bool) else size
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InputError(f"{name} must be two positive integers (height, width), got {size!r}")
    return integer(f"{name}[0]", pair[0]), integer(f"{name}[1]", pair[1])


def _progress(seen: Iterator[_Seen], show: bool) -> Iterator[_Seen]:
    if not show:
        return seen
    from tqdm.auto import tqdm

    return iter(tqdm(seen, desc="most activating images", unit="batch"))


def _check_batch(inputs: Any) -> None:
    if not isinstance(inputs, Tensor):
        raise InputError(
            f"images must be a tensor (N, C, H, W), got {type(inputs).__name__}; explain, scores and concept_maps read "
            "files and data sets, and so does images.inputs_for(backbone, source)"
        )
    if inputs.ndim != 4 or not inputs.is_floating_point():
        hint = "; it has no batch dimension, pass image[None]" if inputs.ndim == 3 else ""
        raise InputError(
            f"images must be a floating-point batch (N, C, H, W), got {tuple(inputs.shape)} of {inputs.dtype}"
            f"{hint or '; preprocess them as the backbone was trained'}"
        )
    if inputs.layout != torch.strided:
        raise InputError(f"images must be a dense tensor, got the layout {inputs.layout}")
