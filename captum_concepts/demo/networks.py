"""The architectures behind :func:`captum_concepts.demo.load`: standard timm classes, built small."""

from __future__ import annotations

from typing import Any

import timm.models.resnet
import timm.models.vision_transformer
from torch import Tensor

#: RGB in [0, 1] is brought to about zero mean and unit variance inside the models.
MEAN, STD = 0.5, 0.25
SIZE = 64


class SmallResNet(timm.models.resnet.ResNet):
    """A ResNet-10 with few channels and total stride 8, so that 64 px give 8 x 8 positions.

    Layers have timm's names: ``layer1`` (16 x 16 positions) to ``layer4`` (8 x 8), ``global_pool``, ``fc``. Takes
    RGB in [0, 1], ``(N, 3, H, W)``; returns logits.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(
            timm.models.resnet.BasicBlock,  # type: ignore[arg-type]
            (1, 1, 1, 1),
            num_classes=num_classes,
            output_stride=8,
            channels=(32, 64, 96, 128),
            stem_width=32,
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """Logits' features ``(N, C, h, w)`` of RGB images in [0, 1]."""
        features: Tensor = super().forward_features((x - MEAN) / STD)
        return features


class SmallViT(timm.models.vision_transformer.VisionTransformer):
    """A vision transformer, 64 px in patches of 8, whose patch tokens are averaged before the head.

    Layers have timm's names: ``blocks.0`` to ``blocks.3`` (tokens: one class token, then 8 x 8 patches), ``fc_norm``,
    ``head``. Averaging lets every patch of the last block reach the output, so its maps mean something. Takes RGB in
    [0, 1]; returns logits.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(
            img_size=SIZE,
            patch_size=8,
            embed_dim=128,
            depth=4,
            num_heads=4,
            num_classes=num_classes,
            global_pool="avg",
        )

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens ``(N, 1 + h*w, D)`` of RGB images in [0, 1]."""
        features: Tensor = super().forward_features((x - MEAN) / STD, *args, **kwargs)
        return features
