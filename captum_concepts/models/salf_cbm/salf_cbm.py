"""SALF-CBM: a classifier whose logits are computed from maps of named concepts only."""

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
        masks: ``(N, H, W)`` bool, True on the foreground.
        concepts: the concept of each image's heatmap.
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

    The backbone's features :math:`f(x)`, resized bilinearly to the grid, are projected by a 1 x 1 convolution to one
    map per concept. The linear head sees only the means of the maps, standardized over the training data:

    .. math:: c(x) = g(f(x)) \in \mathbb{R}^{M \times h \times w}, \quad
        c^*_m = \frac{\operatorname{mean}_{ij} c_m(i, j) - \mu_m}{\sigma_m}, \quad z = W c^* + b

    A prediction is explained by :math:`S(x, m, l) = W_{lm} c^*_m` (what, how much) and :math:`c(x)_m` (where).

    Args:
        backbone: any module that takes images, e.g. from torchvision or timm, an open_clip tower, or your own.
        layer: the layer whose output provides the features, as a module of the backbone or its dotted name
            (``model.layer`` is the name). Nothing after it is computed.
        concepts: the M names, as a list or a :class:`~captum_concepts.concepts.Vocabulary`.
        num_classes: L.
        grid: ``(h, w)`` of the concept maps, the grid of the prompts they were trained with.
        cls_token: concatenate the CLS token to each patch along the channels; D is then twice the layer's width.
        hidden: width of a layer between features and concept maps; None: the paper's single 1 x 1 convolution.
        multi_label: the classes are independent (several or none may apply), so probabilities are sigmoids.
        class_names: L names, or None.
        freeze_backbone: freeze all parameters of the backbone (``requires_grad`` is set to False) and keep it in
            evaluation mode under ``train()``. If False, only parameters without influence on the layer, such as those
            of the old classifier, are frozen.
        layout: of the layer's output: ``"auto"``, ``"NCHW"``, ``"NHWC"``, ``"NLC"`` or ``"LNC"``.
        prefix_tokens: tokens before the grid; None infers it.
        feature_dim: D, if known; None infers it by one forward pass of an empty image.
        input_size: ``(height, width)`` of that image; None takes what the backbone declares, or tries common sizes.
        preprocessing: how images that are not float tensors (paths, PIL images) are read and normalized; None takes
            what the backbone's library specifies. Float tensors are used unchanged.
        batch_size: images per forward pass of the explaining methods.
        metadata: a JSON-serializable dictionary, shown on the model card.

    Attributes:
        bottleneck: ``nn.Conv2d(D, M, 1, bias=False)``; with ``hidden``, two of them and a GELU between.
        head: ``nn.Linear(M, L)``.
        concept_mean, concept_std: ``(M,)`` buffers, 0 and 1 until :meth:`set_standardization`.
        presence_slope, presence_offset: ``(M,)`` buffers; presence is ``sigmoid(slope * c* + offset)``. None until
            calibrated.
        metadata: see above.

    Raises:
        InputError: concepts are empty or repeated, or the grid or the number of classes is invalid.
        LayerError, LayoutError: the layer is unknown, or has no grid or no CLS token.

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

        What the model saw, where, and how much it changed a logit, in the whole image and in a region:

        >>> explanation = model.explain(images, target=0, top_k=2)
        >>> [len(one.concepts) for one in explanation]
        [2, 2, 2, 2]
        >>> model.explain_region(images[:1], boxes=(0, 0, 32, 32), top_k=1).scores.shape
        torch.Size([1, 1])

        What the model would predict with less grass in the lower half, and its rules:

        >>> before, after = model.intervene(images, "grass", beta=-1.0, units="std", boxes=(0, 32, 64, 64))
        >>> bool((before != after).any()), len(model.decision_rules(0))
        (True, 3)
    """

    concept_mean: Tensor
    concept_std: Tensor
    presence_slope: Tensor | None
    presence_offset: Tensor | None

    #: Explaining all concepts costs no more than explaining a few (``audit_dataset`` explains all at once).
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
            raise InputError("there is no concept; pass at least one (a filter may have dropped all of them)")
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
        # Read now, because a compiled forward pass cannot inspect types and code.
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
        """``(N, D, h, w)``: the layer's output, resized to the grid if it has another one.

        Args:
            inputs: images ``(N, C, H, W)`` as the backbone takes them, of any size that it accepts.
        """
        _check_batch(inputs)
        output = read_layer(unwrap(self.backbone), self.layer, inputs)
        size = (inputs.shape[-2], inputs.shape[-1])
        read = None if self._reading is None else self._reading.maps(output, size)
        if read is None:
            known = self._reading  # images of another size have the same layout and number of prefix tokens
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
        """``(N, M)``: the standardized means of the maps c*, the head's only input; differentiable."""
        return self._standardize(self._pool(self.features(inputs)))

    def forward(self, inputs: Tensor) -> Tensor:
        """``(N, num_classes)`` logits of images ``(N, C, H, W)``."""
        return self.head(self.concept_activations(inputs))

    def _pool(self, features: Tensor) -> Tensor:
        """``(N, M)`` means of the concept maps, in full precision.

        The mean of a 1 x 1 convolution is the convolution of the mean, which costs h*w times less. The maps themselves
        are computed only if the bottleneck has hooks (Captum's layer attributions).
        """
        if self.pointwise is not None and not _watched(self.bottleneck):
            mean = full_precision(features).mean((2, 3), keepdim=True)
            return full_precision(self.bottleneck(mean.to(features.dtype)).flatten(1))
        return full_precision(self.bottleneck(features)).mean((2, 3))

    @property
    def pointwise(self) -> nn.Conv2d | None:
        """The bottleneck if it is a 1 x 1 convolution (linear, independent per position), otherwise None."""
        g = self.bottleneck
        if isinstance(g, nn.Conv2d) and g.kernel_size == (1, 1) and g.stride == (1, 1) and g.padding == (0, 0):
            return g
        return None

    def _standardize(self, pooled: Tensor) -> Tensor:
        standard = (pooled - full_precision(self.concept_mean)) / full_precision(self.concept_std)
        return standard.to(self.concept_mean.dtype)

    def _maps_of(self, features: Tensor, columns: Sequence[int]) -> Tensor:
        """``(N, T, h, w)``: the maps of the concepts in ``columns``, differentiable."""
        linear = self.pointwise
        if linear is None or len(columns) == len(self.concepts):
            return self.bottleneck(features)[:, columns]
        bias = linear.bias
        return F.conv2d(features, linear.weight[columns], None if bias is None else bias[columns])

    def train(self, mode: bool = True) -> Self:
        """Set the training mode as ``nn.Module`` does; a frozen backbone stays in evaluation mode."""
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
            InputError: wrong shape, values that are not finite, or a standard deviation that is not positive.
        """
        for name, values in (("mean", mean), ("std", std)):
            given = torch.as_tensor(values).detach().cpu().double()  # not every device has doubles
            if given.shape != self.concept_mean.shape or not bool(given.isfinite().all()):
                raise InputError(
                    f"{name} must be {len(self.concepts)} finite numbers, one per concept, got {tuple(given.shape)}"
                )
            if name == "std" and not bool((given > 0).all()):
                constant = [self.concepts[i] for i in (given <= 0).nonzero().flatten().tolist()]
                raise InputError(f"std must be positive; these concepts are constant, so drop them: {constant[:10]}")
        self.concept_mean.copy_(torch.as_tensor(mean))
        self.concept_std.copy_(torch.as_tensor(std))
        return self

    def extra_repr(self) -> str:
        """The layer, number of concepts, grid and trust line that ``print(model)`` shows."""
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
                f"layer {self.layer!r} has a single position for images of {reading.image_size}, so it cannot locate "
                "concepts; choose a layer before pooling"
            )

    # ------------------------------------------------------------------------------------------------- explanations

    def scores(self, inputs: Any) -> Tensor:
        """``(N, M)``: :meth:`concept_activations` of anything that :meth:`explain` takes.

        Computed in batches, in evaluation mode and without gradients.
        """
        seen, _ = self._look(inputs)
        return torch.cat([one.activations for one in seen])

    def concept_maps(self, inputs: Any, concepts: str | int | Sequence[str | int] | None = None) -> Tensor:
        """``(N, T, h, w)``: the concept maps, in the units of the bottleneck (not standardized).

        Computed in evaluation mode and without gradients; ``model.bottleneck(model.features(images))`` is
        differentiable.

        Args:
            inputs: as in :meth:`explain`.
            concepts: names or indices; None for all. A linear bottleneck computes only their maps.

        Raises:
            InputError: unknown concept (the message suggests the nearest names).
        """
        columns = name_positions(concepts, self.concepts)
        seen, _ = self._look(inputs)
        with torch.no_grad(), evaluation_mode(self.bottleneck):
            return full_precision(torch.cat([self._maps_of(one.features, columns) for one in seen]))

    def contributions(
        self, inputs: Any, target: Any = None, concepts: str | int | Sequence[str | int] | None = None
    ) -> Tensor:
        r"""``(N, T)``: how much each concept changes the logit of ``target``, :math:`S(x, m, l) = W_{lm} c^*_m(x)`.

        The logit is the sum over all concepts plus the head's bias.

        Args:
            inputs: images.
            target: a class (index or name), or one per image; None takes the predicted ones.
            concepts: names or indices; None for all.

        Raises:
            TargetError: wrong type, length or range (also an ``AssertionError``).
            InputError: unknown concept (the message suggests the nearest names).
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
        """The concepts that the model saw, where, and how much each changed the logit of ``target``.

        Args:
            inputs: images as tensors that the backbone takes, or files, PIL images or data sets, which are read by
                :func:`~captum_concepts.images.inputs_for` and normalized by :attr:`preprocessing`.
            target: a class (index or name), or one per image; None takes the predicted ones.
            concepts: explain only these (names or indices), in this order; ``top_k`` is then ignored.
            top_k: number of strongest concepts per image, chosen for each image; None for all.
            rank_by: rank by ``"contributions"`` (absolute) or ``"scores"``.
            contributions: False omits them and ranks by scores.

        Returns:
            ``scores``, the standardized activations c*; ``maps``, the concept maps on the grid, in the units of the
            bottleneck; ``contributions`` in logits; ``presence`` if the model is calibrated.

        Raises:
            TargetError: as in :meth:`contributions`.
            InputError: ``top_k`` below 1, or unknown concept (the message suggests the nearest names).
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
        """One explanation per class of the same images, from one forward pass.

        Args:
            inputs: images.
            classes: names or indices.
            top_k: as in :meth:`explain`, for each class.

        Returns:
            ``{class: explanation}``, with the keys of ``classes``.
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
        r"""The concepts that the model saw in a region ("Explain Anything"), strongest first.

        With the region :math:`I` in pixels and the concept maps upsampled bilinearly to the image, the score is

        .. math:: a(x, m \mid I) = \frac{1}{\sum I} \sum I \odot \frac{c(x)_m - \mu_m}{\sigma_m}

        The published score is the plain sum :math:`\sum I \odot c(x)_m` (``units="map", reduction="sum"``). The
        training loss does not determine the scale and offset of each map, so plain sums are comparable across concepts
        only if training brought the maps to one scale, as :func:`~captum_concepts.fit_salf_cbm` does approximately.

        Args:
            inputs: images ``(N, C, H, W)``.
            target: class of the contributions, as in :meth:`contributions`.
            points: ``(x, y)`` in pixels, x the column from the left and y the row from the top, ``0 <= x < W``,
                ``0 <= y < H``. A point selects the grid cell that contains it. One for all images; ``(N, 2)``, one per
                image; or a list per image.
            boxes: ``(x0, y0, x1, y1)`` in pixels, the left, top, right and bottom borders (pixel x covers [x, x+1));
                one for all images, ``(N, 4)``, or a list per image.
            mask: ``(H, W)`` or ``(N, H, W)`` of the image's size: bool, integers (nonzero is the region), or the
                fraction in [0, 1] of each pixel.
            top_k: number of concepts per image; None for all.
            units: ``"std"``: standard deviations of a concept's pooled activation over the training data; ``"map"``:
                the units of the bottleneck.
            reduction: ``"mean"`` or ``"sum"`` over the region's pixels.

        Returns:
            ``scores`` a(x, m | I), ``maps`` as in :meth:`explain`; ``contributions`` is the region's part of
            :meth:`contributions` (over regions that tile the image, the parts sum to the whole).

        Raises:
            InputError: no region or two kinds of it, or a region that is outside the image, in fractions of the image
                size, empty, or of the wrong shape.
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
        r"""The logits before and after a concept is added or removed in a region.

        .. math:: c(x)_m \leftarrow c(x)_m + \beta I

        Args:
            inputs: images ``(N, C, H, W)``.
            concept: a name or index; a list of them, edited in the same region; or a list of edits with regions of
                their own: ``[{"concept": "wheel", "beta": 2.0, "boxes": (0, 0, 90, 60)}, ...]``. All edits act at once.
            beta: added to the map inside the region; one number, or one per concept of a list. Negative values remove
                the concept.
            units: required. ``"std"``: ``beta`` is in standard deviations ``concept_std`` of the concept, so 1 over the
                whole image raises its activation c* by 1. ``"map"``: the units of the map, as published.
            points, boxes, mask: the region, as in :meth:`explain_region`; none means the whole image.
            return_regions: also return :meth:`explain_region` of the union of the edited regions after the edit, with
                all concepts in standard deviations and their contributions to the class predicted after the edit.

        Returns:
            ``(logits_before, logits_after)``, each ``(N, num_classes)``; with ``return_regions`` a third entry, a
            :class:`~captum_concepts.ConceptExplanation`.

        Raises:
            InputError: unknown concept (the message suggests the nearest names); ``units`` missing; ``beta`` missing,
                not finite or not one per concept; an invalid region, as in :meth:`explain_region`.
        """
        edits = map_edits(concept, beta, units, {"points": points, "boxes": boxes, "mask": mask}, self.concepts)
        _check_batch(inputs)
        areas = [self._region(inputs, **edit.region) for edit in edits]
        std = full_precision(self.concept_std)
        steps = [edit.beta * (std[edit.column] if edit.units == "std" else 1.0) for edit in edits]
        shift = std.new_zeros(inputs.shape[0], len(self.concepts))
        for edit, area, step in zip(edits, areas, steps, strict=True):
            covered = area.mean((1, 2)).to(shift)  # the mean of I, as pooling sees it
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
        """The concepts that support or oppose a class, as ``(concept, weight)``, strongest first, without weights of 0.

        Args:
            target: index or name of the class.
            top_k: number of concepts; None for all.

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
        """A new model with these concepts only, in this order; it shares the backbone and copies the rest.

        Args:
            concepts: names, indices, or a mask.

        Raises:
            InputError: unknown concept (the message suggests the nearest names), none, or a repeated one.
        """
        columns = name_positions(concepts, self.concepts)
        return self._copy([self.concepts[j] for j in columns], columns)

    def without(self, concepts: str | int | Sequence[str | int] | Tensor) -> Self:
        """A new model without these concepts; the weights of the others are unchanged.

        :func:`~captum_concepts.models.salf_cbm.fit.refit_head` retrains the head of the result.

        Args:
            concepts: names, indices, or a mask.

        Raises:
            InputError: unknown concept (the message suggests the nearest names), none, or all.
        """
        removed = set(name_positions(concepts, self.concepts))
        if len(removed) == len(self.concepts):
            raise InputError(f"without() would remove all {len(removed)} concepts; keep at least one")
        return self.select_concepts([j for j in range(len(self.concepts)) if j not in removed])

    @torch.no_grad()
    def with_edits(self, edits: Iterable[Mapping[str, Any]]) -> Self:
        """A new model with edited rules, unlike :meth:`intervene`, whose edits apply to one call only.

        Args:
            edits: ``[{"target": "traffic light", "concept": "flashing light", "weight": 1.5}, ...]``. The weight of a
                concept for a class is set to ``weight``, or increased by ``add``.

        Returns:
            The new model; it shares the backbone. ``metadata["edits"]`` lists the changes.

        Raises:
            InputError: unknown concept or key, or not exactly one of ``weight`` and ``add``.
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
        for judged in ("accuracy", "head", "support", "advice"):  # computed for the old rules
            new.metadata.pop(judged, None)
        for judged in ("validation_similarity", "pooled_similarity"):
            if isinstance(of_each := new.metadata.get(judged), dict):
                new.metadata[judged] = {name: value for name, value in of_each.items() if name in concepts}
        *first, last = self._convolutions()
        *new_first, new_last = new._convolutions()
        for one, other in zip(first, new_first, strict=True):
            other.load_state_dict(one.state_dict())
        new_last.weight.copy_(last.weight[columns])
        new.head.weight.copy_(self._head_weight()[:, columns])
        new.head.bias.copy_(self.head.bias if self.head.bias is not None else torch.zeros_like(new.head.bias))
        for name in ("concept_mean", "concept_std", *PRESENCE):
            value = getattr(self, name)
            setattr(new, name, None if value is None else value[columns].clone())
        changed: list[nn.Module] = [new, *new.bottleneck.modules(), new.head]
        for module in changed:  # not the backbone, whose modules may be in different modes
            module.training = self.training
        return new

    def _convolutions(self) -> list[nn.Conv2d]:
        """The convolutions of the bottleneck; refuses a bottleneck that was replaced."""
        layers = [self.bottleneck] if self.hidden is None else list(self.bottleneck.children())
        mine = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
        if len(mine) != (1 if self.hidden is None else 2) or mine[-1].out_channels != len(self.concepts):
            raise InputError(
                f"this requires the model's own bottleneck, but it is now a {type(self.bottleneck).__name__}"
            )
        if mine[-1].kernel_size != (1, 1) or mine[-1].bias is not None:
            raise InputError(
                f"this requires the model's own bottleneck, 1 x 1 without a bias, but it is now {mine[-1]}"
            )
        return mine

    # ------------------------------------------------------------------------------------------------- presence

    @property
    def reliability_(self) -> dict[str, Reliability]:
        """How well each concept's activation agrees with the vision-language model (or, after :meth:`calibrate`, with
        the labels) on held-out images; empty if not measured."""
        return {
            name: Reliability.of(value)
            for name, value in self.metadata.get("reliability", {}).items()
            if name in self.concepts
        }

    @property
    def trust(self) -> str:
        """One sentence on whether the concepts' names can be trusted."""
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
        """Set the calibration of :meth:`presence` for all concepts or for some ``columns``.

        In an uncalibrated model, the presence of the other concepts is then 0.5.

        Raises:
            InputError: values are not finite, or not one per concept.
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
        # A calibration belongs to the activations: it is loaded with their state and dropped with that of others.
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
            images: as in :meth:`explain`, and not used for training.
            labels: the concepts in each image, as ``(N, M)`` bool or a list of names per image. A dictionary
                ``{concept: (N,) bool}`` calibrates these concepts and leaves the others unchanged.

        Raises:
            InputError: labels do not match the images or concepts.
        """
        activations = full_precision(self.scores(images)).cpu()
        finite_images(activations, range(len(activations)), "the score")
        columns, verdicts = verdicts_of(labels, self.concepts, len(activations))
        self.set_presence(*fit_presence(activations[:, columns], verdicts), columns)
        names = [self.concepts[j] for j in columns]
        measured = reliabilities(activations[:, columns], verdicts, names)
        self.metadata["reliability"] = {**self.metadata.get("reliability", {}), **measured}
        self.metadata["calibrated"] = sorted({*self.metadata.get("calibrated", ()), *names})
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
        """Yield one explanation per frame as frames arrive, keeping ``batch_size`` frames in memory.

        Args:
            frames: images ``(C, H, W)`` or batches of one, from any iterable, e.g. a tensor ``(T, C, H, W)`` or a
                decoder.
            target: class of the contributions; None takes the predicted one of each frame.
            concepts: explain these in every frame instead of each frame's ``top_k``.
            top_k: as in :meth:`explain`.
            batch_size: frames per forward pass. A frame of another size starts a new batch.

        Raises:
            InputError: immediately for an unknown concept or invalid number; during iteration for an invalid frame.
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
        """The images with the highest activation c* of each concept, to check what the concept responds to.

        Args:
            data: images, as in :meth:`explain`. A shuffling loader is read in its data set's order.
            concepts: names or indices; None for all.
            k: images per concept.
            batch_size: images per forward pass; None takes the model's. Memory does not grow with the data.
            show_progress: show a progress bar.

        Returns:
            ``{concept: [(index in data, activation), ...]}``, strongest first, ties in data order. Images whose
            activation is NaN are omitted.

        Raises:
            InputError: no image, or unknown concept.
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
        """Foreground masks from the map of a class prompt, by the paper's protocol on ImageNet-segmentation.

        The model's concepts must contain a prompt for each class ("An image of a {class}",
        :meth:`Vocabulary.from_classes <captum_concepts.concepts.Vocabulary.from_classes>`). Its map is upsampled
        bilinearly, scaled to [0, 1] by its own minimum and maximum, and binarized.

        Args:
            inputs: images.
            target: the class, or one per image, by name or index; a concept's own name is used directly. None takes
                the predicted classes.
            template: turns a class name into a concept.
            threshold: ``"mean"`` (the protocol), the heatmap's own mean; or a number in [0, 1].
            size: ``(H, W)`` of the result; None takes that of the images.

        Raises:
            InputError: no such concept (the message suggests the nearest names), an invalid threshold, or a model
                without ``class_names`` whose concepts are not one prompt per class, in the order of the classes.
            TargetError: an invalid target.
        """
        if threshold != "mean" and (isinstance(threshold, (str, bool)) or not 0 <= threshold <= 1):
            raise InputError(f"threshold must be 'mean' or a number in [0, 1], got {threshold!r}")
        if "{class}" not in template:
            raise InputError(f"template must contain the field {{class}}, got {template!r}")
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
            raise InputError("the model has no class_names to fill the template with; set them, or pass concepts")
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

        Files of an older model are replaced only after all new ones are complete.

        Args:
            save_directory: the folder; created if missing.
            save_backbone: also store the backbone's weights. None stores them if the backbone was trained, or if it
                can be rebuilt from its name (torchvision, timm, open_clip), so that loading needs only the folder.
                Otherwise a fingerprint is stored, and loading checks that the same backbone is passed.
            images: images as the model takes them; the card shows explanations of the first four.
            config: not used; ``config.json`` is written from the model.
            repo_id, push_to_hub, push_to_hub_kwargs: see ``huggingface_hub``.
            model_card_kwargs: ``{"name": ...}``, the title of the card; default is the folder's name.

        Returns:
            The URL on the Hub, or None.

        Raises:
            InputError: ``metadata`` is not valid JSON, or the bottleneck or head was replaced.
        """
        folder = Path(save_directory)
        card = {"name": repo_id or folder.resolve().name, **(model_card_kwargs or {})}
        before = self._save_backbone  # pushing to the Hub saves again, to a temporary folder
        self._save_backbone = before if save_backbone is None else save_backbone
        try:
            hub.save_folder(self, folder, card["name"], self._hub_mixin_info.model_card_data, images)
            if push_to_hub:
                return self.push_to_hub(repo_id or folder.name, model_card_kwargs=card, **push_to_hub_kwargs)
            return None
        finally:
            self._save_backbone = before

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write weights and configuration; called by ``push_to_hub``."""
        hub.write_files(self, hub.config_of(self), save_directory)

    def generate_model_card(self, name: str = "SALF-CBM", **_options: Any) -> ModelCard:
        """The model card, with rules, concepts, limits, and the data, accuracy and drops in :attr:`metadata`."""
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
        """The model that :meth:`save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: a folder, or the name of a repository on the Hub.
            backbone: the module that the model was trained with; stored weights are loaded into it. None builds the
                backbone from its name if the folder records it (torchvision, timm, open_clip).
            check_backbone: refuse a backbone whose weights differ from those the model was trained with.
            revision, cache_dir, local_files_only, token: see ``huggingface_hub``.

        Returns:
            The model in evaluation mode, on the backbone's device.

        Raises:
            InputError: the backbone must be passed.
            FileNotFoundError: the folder or a file is missing.
            ArtifactError: a file is truncated, corrupt or foreign, or the backbone does not match.
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
        (N,), -1 for the predicted one. N is dynamic. Names of concepts and classes are in the extra file
        ``captum_concepts.json``.

        Args:
            path: the file.
            size: ``(H, W)`` of the images; None takes :attr:`input_size`, or the size that the backbone was run with.
        """
        return export_program(self, Path(path), None if size is None else _size(size, "size"))

    # ------------------------------------------------------------------------------------------------- internals

    def _look(self, inputs: Any, *, batch_size: int | None = None) -> tuple[Iterator[_Seen], list[str]]:
        """Forward passes over ``inputs`` in evaluation mode without gradients, and the images' names, which are added
        as images are read (none for tensors)."""
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
        """Tensors unchanged, anything else as an :class:`ImageSource` preprocessed for the model."""
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
        """``seen``, after checking the targets; for tensors the check needs no forward pass."""
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
            raise InputError(f"contributions require a linear head, but head is a {type(self.head).__name__}")
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
        def values(one: _Seen, index: Tensor) -> tuple[Tensor, Tensor]:
            scores = full_precision(one.activations)
            # Without contributions the head may be nonlinear.
            return scores, self._shares(scores, index) if contributions else torch.zeros_like(scores)

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
        """The explanation of a region ``area`` (N, H, W), after optional map edits ``(column, step, area)``."""
        mean, std = full_precision(self.concept_mean), full_precision(self.concept_std)

        def values(one: _Seen, index: Tensor) -> tuple[Tensor, Tensor]:
            own = area[one.rows]
            weights = pooled_upsampling(own, self.grid).to(one.features.device)
            share = coverage(own, self.grid).to(one.features.device)
            total = weights.sum((1, 2))[:, None]
            scores = self._weighted(one.features, weights / total[..., None])
            inside = self._weighted(one.features, share / share[0].numel())
            for column, step, where in edits or ():
                both = (own * where[one.rows]).to(scores)  # the part of the edit inside the region
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
        """An explanation from forward passes and ``values(seen, target) -> (scores, contributions)``; only the maps of
        the concepts chosen for each image are computed."""
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
        """``(N, k, h, w)``: the maps of each image's concepts ``index`` (N, k); if linear, only these are computed."""
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
    """The module from features to concept maps: one 1 x 1 convolution, or two with a GELU between.

    >>> make_bottleneck(8, 3, None)
    Conv2d(8, 3, kernel_size=(1, 1), stride=(1, 1), bias=False)
    """
    if hidden is None:
        return nn.Conv2d(features, concepts, 1, bias=False)
    return nn.Sequential(nn.Conv2d(features, hidden, 1), nn.GELU(), nn.Conv2d(hidden, concepts, 1, bias=False))


def _frames(frames: Iterable[Any], size: int) -> Iterator[Tensor]:
    """Yield batches of consecutive frames of equal size, up to ``size`` frames each."""
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
    """Whether ``module`` has forward or backward hooks."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _size(size: Any, name: str) -> tuple[int, int]:
    """``(height, width)`` as positive integers; one integer is used for both."""
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
