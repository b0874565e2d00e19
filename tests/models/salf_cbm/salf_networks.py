"""Small backbones for the tests of SALFCBM, and SALFCBM written out slowly from the paper."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_concepts.models.salf_cbm import SALFCBM

CONCEPTS = ["striped fur", "wheels", "grass", "a beak", "windows"]


class ConvNet(nn.Module):
    """Stride 4; in-place ReLUs behind every layer; an old classifier behind the grid."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8))
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.relu(self.body(self.stem(x)))
        return self.fc(self.drop(maps.mean((2, 3))))


class Tokens(nn.Module):
    """A vision transformer of one block: CLS, then patches of 4 px; batch first, or tokens first as in CLIP."""

    def __init__(self, *, batch_first: bool = True) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.batch_first = batch_first
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), tokens], 1)
        if not self.batch_first:
            tokens = tokens.transpose(0, 1)
        tokens = self.block(tokens)
        return self.fc(tokens[:, 0] if self.batch_first else tokens[0])


class ChannelsLast(nn.Module):
    """Gives (N, h, w, C), as Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x).permute(0, 2, 3, 1)).mean((1, 2)))


def awake(net: nn.Module) -> nn.Module:
    """Batch statistics as after some training."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


def conv_model(layer: str = "body", classes: int = 3, **options) -> SALFCBM:
    """A standardised SALFCBM on :class:`ConvNet`."""
    torch.manual_seed(0)
    options.setdefault("class_names", ["cat", "car", "bird"])
    return standardised(SALFCBM(awake(ConvNet()), layer, CONCEPTS, classes, **options))


def token_model(batch_first: bool = True, **options) -> SALFCBM:
    """A standardised SALFCBM on :class:`Tokens`."""
    torch.manual_seed(0)
    net = Tokens(batch_first=batch_first).eval()
    return standardised(SALFCBM(net, "block", CONCEPTS, 3, input_size=(16, 16), **options))


def standardised(model: SALFCBM) -> SALFCBM:
    m = len(model.concepts)
    model.set_standardization(torch.linspace(-0.2, 0.3, m), torch.linspace(0.1, 0.9, m))
    return model.eval()


def pictures(n: int = 4, height: int = 32, width: int = 24, seed: int = 1) -> Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def slow_features(model: SALFCBM, x: Tensor) -> Tensor:
    """f(x): the layer's output by an ordinary hook and a whole forward, resized."""
    seen = []
    layer = model.backbone.get_submodule(model.layer)
    handle = layer.register_forward_hook(lambda _m, _a, output: seen.append(output.clone()))
    try:
        with torch.no_grad():
            model.backbone(x)
    finally:
        handle.remove()
    return F.interpolate(seen[0], model.grid, mode="bilinear", align_corners=False)


def slow_maps(model: SALFCBM, x: Tensor) -> Tensor:
    """c(x): for each concept and position the inner product of the bottleneck's row and the features."""
    features = slow_features(model, x)
    weight = model.bottleneck.weight.detach()
    maps = torch.zeros(len(x), len(model.concepts), *model.grid)
    for n in range(len(x)):
        for m in range(len(model.concepts)):
            for i in range(model.grid[0]):
                for j in range(model.grid[1]):
                    maps[n, m, i, j] = torch.dot(weight[m, :, 0, 0], features[n, :, i, j])
    return maps


def slow_activations(model: SALFCBM, x: Tensor) -> Tensor:
    """c*: the mean over the map, normalised by mean and standard deviation of the training data."""
    return (slow_maps(model, x).flatten(2).sum(2) / (model.grid[0] * model.grid[1]) - model.concept_mean) / (
        model.concept_std
    )
