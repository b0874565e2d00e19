"""open_clip's evaluation transform on tensors: resize, crop or pad, normalize."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from captum_concepts.errors import InputError, InputWarning, did_you_mean

_DEFAULTS: dict[str, Any] = {
    "size": 224,
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
    # For processors of transformers:
    "max_patches": 256,  # with "patches"
    "resize_to": None,  # the shorter side before the crop, with "shortest"; None takes that of size
    "round_down": False,  # round the crop's offset down if it is half a pixel
}
_RARE = ("max_patches", "resize_to", "round_down")
IMAGE_KEYS = tuple(_DEFAULTS)


def check_preprocess(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """The merged preprocessing dictionaries, with precedence for later ones, completed by OpenAI's defaults."""
    config = dict(_DEFAULTS)
    for number, layer in enumerate(layers):
        for key, value in layer.items():
            if key in _DEFAULTS and value is not None:
                config[key] = value
            elif key not in _DEFAULTS and number and key != "mode":
                raise InputError(f"preprocess has no key {key!r}; known: {IMAGE_KEYS}.{did_you_mean(key, IMAGE_KEYS)}")
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    config["size"] = (int(height), int(width))
    for key in ("mean", "std"):
        value = config[key]
        config[key] = tuple(float(v) for v in (value if isinstance(value, (tuple, list)) else (value,) * 3))
        if len(config[key]) != 3:
            raise InputError(f"preprocess[{key!r}]={value!r} must be three numbers, one for each of R, G, B")
    if config["interpolation"] not in ("bicubic", "bilinear", "random"):
        raise InputError(f"interpolation={config['interpolation']!r} must be 'bicubic' or 'bilinear'")
    if config["interpolation"] == "random":  # open_clip's training option; its evaluation transform is bicubic
        config["interpolation"] = "bicubic"
    if config["resize_mode"] not in ("shortest", "longest", "squash", "patches"):
        raise InputError(f"resize_mode={config['resize_mode']!r} must be 'shortest', 'longest', 'squash' or 'patches'")
    for key in _RARE:  # so that common settings, which stores record, stay the same
        if config[key] == _DEFAULTS[key] and config["resize_mode"] != "patches":
            del config[key]
    return config


def check_images(images: Tensor) -> Tensor:
    """``images`` if they are floating-point RGB ``(N, 3, H, W)``; warns if they are not in [0, 1]."""
    shape = tuple(images.shape)
    if images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"images of shape {shape} are not RGB images (N, 3, H, W)")
    if 0 in shape:
        raise InputError(f"images of shape {shape} have no pixels")
    if not images.is_floating_point():
        raise InputError(f"images have dtype {images.dtype}; pass RGB in [0, 1], for example images.float() / 255")
    low, high = images.detach().aminmax()
    if not (low >= -0.05 and high <= 1.05):
        warnings.warn(
            f"pixel values go from {float(low):.3g} to {float(high):.3g}, but the encoder takes RGB in [0, 1] and "
            "normalizes them itself; the embeddings of images that are already normalized are wrong",
            InputWarning,
            stacklevel=4,
        )
    return images


def resize_and_normalize(images: Tensor, config: Mapping[str, Any]) -> Tensor:
    """``(N, 3, H, W)`` images in [0, 1], resized and normalized for the model; float32, differentiable."""
    x = images.float()
    height, width = config["size"]
    mode, interpolation = config["resize_mode"], config["interpolation"]
    if mode == "patches":
        height, width = _patched(x.shape[-2], x.shape[-1], height, config["max_patches"])
        mode = "squash"
    if mode == "shortest" and height != width and not config.get("resize_to"):
        interpolation = "bicubic"  # open_clip ignores the setting in this one case
    before = config.get("resize_to") or 0
    target = _resized(x.shape[-2], x.shape[-1], before or height, before or width, mode)
    # Two passes, each clamped, because bicubic overshoots and PIL clips it to 8 bits in each of its two passes.
    for shape in ((x.shape[-2], target[1]), target):
        if shape != tuple(x.shape[-2:]):
            x = F.interpolate(x, shape, mode=interpolation, align_corners=False, antialias=True).clamp(0, 1)
    x = _center(x, height, width, config["fill_color"], round_down=config.get("round_down", False))
    mean = x.new_tensor(config["mean"])[:, None, None]
    return (x - mean) / x.new_tensor(config["std"])[:, None, None]


def _resized(h: int, w: int, height: int, width: int, mode: str) -> tuple[int, int]:
    if mode == "squash":
        return height, width
    if mode == "shortest" and height == width:  # torchvision.transforms.Resize(int) rounds down
        return (height, int(height * w / h)) if h <= w else (int(height * h / w), height)
    ratio = (max if mode == "longest" else min)(h / height, w / width)  # timm's ResizeKeepRatio rounds to nearest
    return max(1, round(h / ratio)), max(1, round(w / ratio))


def _patched(h: int, w: int, side: int, most: int) -> tuple[int, int]:
    """The largest size with about the image's aspect ratio and at most ``most`` patches (SigLIP 2, "NaFlex")."""
    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        scale = (low + high) / 2
        rows, columns = (max(1, math.ceil(scale * length / side)) for length in (h, w))
        low, high = (scale, high) if rows * columns <= most else (low, scale)
    rows, columns = (max(1, math.ceil(low * length / side)) for length in (h, w))
    return rows * side, columns * side


def _center(x: Tensor, height: int, width: int, fill: float, *, round_down: bool = False) -> Tensor:
    """``x`` padded and then cropped to ``(height, width)`` around the center."""
    h, w = x.shape[-2:]
    if h < height or w < width:
        dy, dx = max(height - h, 0), max(width - w, 0)
        x = F.pad(x, (dx // 2, (dx + 1) // 2, dy // 2, (dy + 1) // 2), value=fill / 255)
        h, w = x.shape[-2:]
    top, left = (
        ((h - height) // 2, (w - width) // 2) if round_down else (round((h - height) / 2), round((w - width) / 2))
    )
    return x[..., top : top + height, left : left + width]
