"""The network of SALFCBM: features on a grid, concept maps, standardised activations, head."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_concepts.activations.capture import Layer
from captum_concepts.activations.layout import LAYOUTS
from captum_concepts.activations.spatial import full_precision
from captum_concepts.errors import InputError, LayerError, LayoutError
from captum_concepts.models._salf_features import (
    Reading,
    freeze_unreached,
    name_in,
    probe,
    read_layer,
    reading_of,
    watched,
)
from captum_concepts.models._salf_names import check_names, check_size, concept_positions


class SALFCore(nn.Module):
    """What computes; :class:`~captum_concepts.models.salf_cbm.SALFCBM` says what the arguments mean."""

    concept_mean: Tensor
    concept_std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        layer: Layer,
        concepts: Iterable[str],
        num_classes: int,
        grid: tuple[int, int] = (7, 7),
        *,
        cls_token: bool = False,
        class_names: Sequence[str] | None = None,
        freeze_backbone: bool = True,
        layout: str = "auto",
        prefix_tokens: int | None = None,
        feature_dim: int | None = None,
        input_size: int | tuple[int, int] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise InputError(f"backbone must be a torch.nn.Module, got {type(backbone).__name__}")
        self.concepts = check_names(concepts, "concept")
        self.grid = check_size(grid, "grid")
        self.num_classes = check_size((num_classes, 1), "num_classes")[0]
        self.class_names = None if class_names is None else check_names(class_names, "class", self.num_classes)
        self.cls_token = bool(cls_token)
        self.freeze_backbone = bool(freeze_backbone)
        if layout not in LAYOUTS:
            raise InputError(f"layout must be one of {LAYOUTS}, got {layout!r}")
        self.layout = layout
        self.prefix_tokens = prefix_tokens
        self.input_size = None if input_size is None else check_size(input_size, "input_size")
        if metadata is not None and not isinstance(metadata, dict):
            raise InputError(f"metadata must be a dictionary, got {type(metadata).__name__}")
        self.metadata = copy.deepcopy(metadata or {})
        self.layer = name_in(backbone, layer)
        self.backbone = backbone
        self._reading: Reading | None = None
        if feature_dim is None:
            self._reading, image = probe(backbone, self.layer, layout, prefix_tokens, self.input_size)
            self._check_reading(self._reading)
            feature_dim = self._reading.channels * (2 if cls_token else 1)
            if not freeze_backbone:
                freeze_unreached(backbone, self.layer, image)
        if freeze_backbone:
            backbone.requires_grad_(False).eval()
        self.feature_dim = check_size((feature_dim, 1), "feature_dim")[0]
        like = next((p for p in backbone.parameters() if p.is_floating_point()), torch.empty(0))
        place: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.bottleneck = nn.Conv2d(self.feature_dim, len(self.concepts), 1, bias=False, **place)
        self.head = nn.Linear(len(self.concepts), self.num_classes, **place)
        self.register_buffer("concept_mean", torch.zeros(len(self.concepts), **place))
        self.register_buffer("concept_std", torch.ones(len(self.concepts), **place))

    def features(self, x: Tensor) -> Tensor:
        """``(N, D, h, w)``: the layer's output on the grid; as it is, where it has that grid already.

        Args:
            x: images ``(N, C, H, W)`` as the backbone takes them, of any size that it takes.
        """
        if x.ndim != 4 or not x.is_floating_point():
            raise InputError(
                f"images must be a floating-point batch (N, C, H, W), got {tuple(x.shape)} of {x.dtype}; preprocess "
                "them as the backbone was trained"
            )
        output = read_layer(self.backbone, self.layer, x)
        size = (x.shape[-2], x.shape[-1])
        found = None if self._reading is None else self._reading.maps(output, size)
        if found is None:
            reading = reading_of(self.backbone, self.layer, output, x.shape[0], size, self.layout, self.prefix_tokens)
            self._check_reading(reading)
            self._reading = self._reading or reading
            found = reading.maps(output, size)
        maps, cls = found  # type: ignore[misc]
        if tuple(maps.shape[-2:]) != self.grid:
            maps = F.interpolate(maps, self.grid, mode="bilinear", align_corners=False)
        if self.cls_token:
            maps = torch.cat([maps, cls[:, :, None, None].expand(-1, -1, *self.grid)], 1)  # type: ignore[index]
        return maps

    def concept_maps(self, x: Tensor) -> Tensor:
        """``(N, M, h, w)``: where each concept is, in the units of the bottleneck (not standardised)."""
        return self.bottleneck(self.features(x))

    def concept_activations(self, x: Tensor) -> Tensor:
        """``(N, M)``: the standardised means of the maps, all that the head sees."""
        return self._standardize(self._pool(self.features(x)))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, num_classes)`` logits of images ``(N, C, H, W)``."""
        return self.head(self.concept_activations(x))

    def _pool(self, features: Tensor) -> Tensor:
        """``(N, M)`` means of the concept maps, in full precision.

        The mean of a 1 x 1 convolution is the convolution of the mean, which costs h*w times less; the maps themselves
        are only made for somebody who watches the bottleneck (Captum's layer attributions).
        """
        if self._is_pointwise() and not watched(self.bottleneck):
            mean = full_precision(features).mean((2, 3), keepdim=True)
            return full_precision(self.bottleneck(mean.to(features.dtype)).flatten(1))
        return full_precision(self.bottleneck(features)).mean((2, 3))

    def _is_pointwise(self) -> bool:
        """Whether the bottleneck is still a 1 x 1 convolution, not something a user put in its place."""
        g = self.bottleneck
        return isinstance(g, nn.Conv2d) and g.kernel_size == (1, 1) and g.stride == (1, 1) and g.padding == (0, 0)

    def _standardize(self, pooled: Tensor) -> Tensor:
        standard = (pooled - full_precision(self.concept_mean)) / full_precision(self.concept_std)
        return standard.to(self.concept_mean.dtype)

    def train(self, mode: bool = True) -> Any:
        """As in ``nn.Module``; a frozen backbone stays in evaluation mode, its batch statistics as they are."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    @torch.no_grad()
    def set_standardization(self, mean: Tensor | Sequence[float], std: Tensor | Sequence[float]) -> Any:
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
                    f"{name} must be {len(self.concepts)} finite numbers, one a concept, got {tuple(given.shape)}"
                )
            if name == "std" and not bool((given > 0).all()):
                constant = [self.concepts[i] for i in (given <= 0).nonzero().flatten().tolist()]
                raise InputError(f"std must be positive; these concepts never change, drop them: {constant[:10]}")
        self.concept_mean.copy_(torch.as_tensor(mean))
        self.concept_std.copy_(torch.as_tensor(std))
        return self

    @torch.no_grad()
    def select_concepts(self, concepts: str | int | Sequence[str | int] | Tensor) -> Any:
        """A new model with these concepts only, in this order; it shares the backbone, and copies the rest.

        Args:
            concepts: names or indices, or a mask of M booleans.

        Raises:
            InputError: none left, one twice, or unknown (the nearest names are offered).
        """
        rows = concept_positions(concepts, self.concepts)
        new = type(self)(
            self.backbone,
            self.layer,
            [self.concepts[i] for i in rows],
            self.num_classes,
            self.grid,
            cls_token=self.cls_token,
            class_names=self.class_names,
            freeze_backbone=self.freeze_backbone,
            layout=self.layout,
            prefix_tokens=self.prefix_tokens,
            feature_dim=self.feature_dim,
            input_size=self.input_size,
            metadata=self.metadata,
        ).to(device=self.concept_mean.device, dtype=self.concept_mean.dtype)
        new._reading = self._reading
        new.bottleneck.weight.copy_(self.bottleneck.weight[rows])
        new.head.weight.copy_(self.head.weight[:, rows])
        new.head.bias.copy_(self.head.bias)
        new.concept_mean.copy_(self.concept_mean[rows])
        new.concept_std.copy_(self.concept_std[rows])
        for module in (new, new.bottleneck, new.head):  # not the backbone, parts of which may be held in another mode
            module.training = self.training
        return new

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"layer={self.layer!r}, {len(self.concepts)} concepts, grid={self.grid}, cls_token={self.cls_token}"

    def _check_reading(self, reading: Reading) -> None:
        if self.cls_token and not reading.prefix_tokens:
            raise LayerError(
                f"cls_token=True, but layer {self.layer!r} has no token in front of its grid (layout {reading.kind}); "
                "choose a layer of a vision transformer with a class token, or cls_token=False"
            )
        if reading.grid == (1, 1) and self.grid != (1, 1):
            raise LayoutError(
                f"layer {self.layer!r} has a single position for images of {reading.image_size}, so it cannot say "
                "where; choose a layer before pooling"
            )
