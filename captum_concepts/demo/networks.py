"""Architectures of :func:`captum_concepts.demo.load`, small instances of standard timm classes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import timm.models
import timm.models.resnet
import timm.models.vision_transformer
from torch import Tensor, nn

#: The models normalize RGB in [0, 1] to about zero mean and unit variance.
MEAN, STD = 0.5, 0.25
SIZE = 64


class SmallResNet(timm.models.resnet.ResNet):
    """A ResNet-10 with few channels and total stride 8, so that 64 px yield 8 x 8 positions.

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
        """Features ``(N, C, h, w)`` of RGB images in [0, 1], before pooling."""
        features: Tensor = super().forward_features((x - MEAN) / STD)
        return features


@timm.models.register_model
def captum_concepts_resnet10(pretrained: bool = False, **options: Any) -> timm.models.resnet.ResNet:
    """Trunk of the bundled VLM's image tower, registered under a name for open_clip's configuration.

    It is like :class:`SmallResNet` with more channels; open_clip normalizes the input and adds attention pooling.
    """
    del pretrained  # open_clip loads the weights of both towers together
    model = timm.models.resnet.ResNet(
        timm.models.resnet.BasicBlock,  # type: ignore[arg-type]
        (1, 1, 1, 1),
        num_classes=int(options.get("num_classes", 0)),
        output_stride=8,
        channels=(32, 64, 128, 192),
        stem_width=32,
    )
    model.default_cfg = {"input_size": (3, SIZE, SIZE), "pool_size": (8, 8)}  # type: ignore[assignment]
    return model


class ConvStem(nn.Module):
    """Embedding of 8 x 8 px patches by three strided convolutions instead of one (Xiao et al., 2021).

    With it, vision transformers learn from far fewer images.
    """

    def __init__(self, img_size: int = SIZE, in_chans: int = 3, embed_dim: int = 128, **options: Any) -> None:
        super().__init__()
        del options  # timm also passes patch_size, bias etc., which are fixed here
        self.img_size, self.patch_size = (img_size, img_size), (8, 8)
        self.grid_size = (img_size // 8, img_size // 8)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        channels = [in_chans, embed_dim // 4, embed_dim // 2, embed_dim]
        layers: list[nn.Module] = []
        for before, after in pairwise(channels):
            layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.proj = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, H, W)`` to tokens ``(N, H * W / 64, embed_dim)``."""
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


class SmallViT(timm.models.vision_transformer.VisionTransformer):
    """A vision transformer for 64 px with a convolutional stem, patches of 8 px, and average pooling of patch tokens.

    Layers have timm's names: ``patch_embed``, ``blocks.0`` to ``blocks.3`` (tokens: one class token, then 8 x 8
    patches), ``fc_norm``, ``head``. With average pooling, every patch of the last block affects the output, so its maps
    are meaningful. Takes RGB in [0, 1], ``(N, 3, 64, 64)``; returns logits.
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
            embed_layer=ConvStem,
        )

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens ``(N, 1 + h*w, D)`` of RGB images in [0, 1]."""
        features: Tensor = super().forward_features((x - MEAN) / STD, *args, **kwargs)
        return features
