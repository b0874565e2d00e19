"""The preprocessing a model was trained with, from the metadata of its library."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from captum_concepts._artifacts import check_json, either, flag, integer, list_of, nothing_or, number, table
from captum_concepts.errors import InputError
from captum_concepts.images.text import read_json

_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "bicubic"}
_FILE = "preprocessor_config.json"
_SIDE = integer(1, 1 << 14)
_SIZE = either(
    table({}, dict.fromkeys(("shortest_edge", "height", "width"), nothing_or(_SIDE)), more=True),
    list_of(_SIDE, length=2),
    nothing_or(_SIDE),
)
_VALUES = nothing_or(either(list_of(number(-1e6, 1e6), least=1, most=1024), number(-1e6, 1e6)))
_DEVIATION = nothing_or(either(list_of(number(1e-6, 1e6), least=1, most=1024), number(1e-6, 1e6)))
#: The fields that are used of an image processor's file.
_PROCESSOR = table(
    {},
    {
        **dict.fromkeys(("size", "crop_size"), _SIZE),
        "resample": nothing_or(integer(0, 5)),
        "crop_pct": nothing_or(number(1e-3, 1)),
        "image_mean": _VALUES,
        "image_std": _DEVIATION,
        "rescale_factor": nothing_or(number(1e-9, 1e9)),
        "rescale_offset": nothing_or(either(flag, number())),
        **dict.fromkeys(("do_center_crop", "do_normalize", "do_rescale"), nothing_or(flag)),
    },
    more=True,
)


@dataclass(frozen=True)
class Preprocessing:
    r"""A model's input format: images of ``size`` whose channels are ``(image - mean) / std``.

    Calling it normalizes images in [0, 1]; ``open_images(source, preprocessing=p)`` reads them at its size.

    Args:
        size: ``(H, W)``, or None for any size.
        mean, std: per channel, or one value for all.
        interpolation: see :class:`~captum_concepts.images.Reading`.
        crop: fraction of the covering side that is kept.
        resize: ``"crop"``, ``"squash"`` or ``"pad"``.
        source: description of where it was found.

    Example:
        >>> import torch
        >>> p = Preprocessing((224, 224), (0.5,) * 3, (0.25,) * 3)
        >>> p(torch.ones(1, 3, 2, 2)).unique()
        tensor([2.])
    """

    size: tuple[int, int] | None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    interpolation: str = "bicubic"
    crop: float = 1.0
    resize: str = "crop"
    source: str = ""

    def __call__(self, images: Tensor) -> Tensor:
        """Normalized images; channels are the third dimension from the end."""
        mean, std = self._moments(images)
        return (images - mean) / std

    @property
    def geometry(self) -> dict[str, Any]:
        """The options of ``Reading`` for images of this size (size, resize, interpolation and crop)."""
        return {name: getattr(self, name) for name in ("size", "resize", "interpolation", "crop")}

    def undo(self, images: Tensor) -> Tensor:
        """Images in [0, 1] from normalized ones, for figures."""
        mean, std = self._moments(images)
        return images * std + mean

    def __str__(self) -> str:
        size = "any size" if self.size is None else "{} x {}".format(*self.size)
        how = "" if self.size is None else f", {self.interpolation}, {self.resize}"
        how += f" {self.crop:.3g}" if self.crop != 1 and self.size is not None else ""
        mean, std = (", ".join(f"{v:.3g}" for v in values) for values in (self.mean, self.std))
        return f"{size}{how}, mean ({mean}), std ({std}){self.source and f' from {self.source}'}"

    def _moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        channels = images.shape[-3]
        if len(self.mean) not in (1, channels):
            raise InputError(f"images have {channels} channels, but the preprocessing has {len(self.mean)} means")
        return images.new_tensor(self.mean).view(-1, 1, 1), images.new_tensor(self.std).view(-1, 1, 1)


def input_channels(model: Any) -> int | None:
    """The number of channels of a model's images, from its first image convolution; None if it has none.

    12, 48 and 192 are read as three channels of blocks of 2, 4 or 8 pixels (space to depth).
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = next((m.in_channels for m in modules if isinstance(m, nn.Conv2d | nn.Conv3d)), None)
    return 3 if found in (12, 48, 192) else found


def preprocessing_of(model: Any) -> Preprocessing | None:
    """The preprocessing that a model was trained with, from the model or a description; None if unknown.

    Args:
        model: a timm model; a torchvision model, weights (``ResNet50_Weights.DEFAULT``) or ``weights.transforms()``;
            an open_clip model; a Hugging Face model whose image processor is in the local cache or folder, an image
            processor or its configuration as a dict; the name of a model, ``"resnet50"`` or
            ``"timm/resnet50"`` (torchvision's, if both have one). Nothing is downloaded.

    A torchvision model does not store the name of its weights. It is recognized by its architecture, and the default
    weights of that architecture are assumed. ``source`` of the result reports what was used.

    Raises:
        InputError: the name is unknown.

    Example:
        >>> print(preprocessing_of("efficientnet_b1"))  # doctest: +NORMALIZE_WHITESPACE
        240 x 240, bilinear, crop 0.941, mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)
        from torchvision EfficientNet_B1_Weights.IMAGENET1K_V2
    """
    if isinstance(model, Preprocessing):
        return model
    if isinstance(model, str):
        return _of_name(model)
    if isinstance(model, Mapping):
        return _of_processor(model, "an image processor's configuration")
    if hasattr(model, "transforms") and hasattr(model, "meta"):
        return _of_transforms(model.transforms(), f"torchvision {model}")
    if not isinstance(model, nn.Module) or type(model).__module__.startswith("torchvision.transforms"):
        if hasattr(model, "to_dict") and hasattr(model, "image_mean"):
            return _of_processor(model.to_dict(), type(model).__name__)
        return _of_transforms(model, type(model).__name__) if hasattr(model, "crop_size") else None
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch.compile
        wrapper = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
        inner = getattr(model, "module", None) if wrapper else inner
        if not isinstance(inner, nn.Module):
            break
        model = inner
    for read in (_of_open_clip, _of_timm, _of_torchvision, _of_hugging_face):
        found = read(model)
        if found is not None:
            return _for_channels(found, model)
    return None


def _of_name(name: str) -> Preprocessing:
    import timm
    import torchvision

    library, _, name = name.rpartition("/")
    if library in ("", "torchvision") and name in torchvision.models.list_models(module=torchvision.models):
        weights = torchvision.models.get_model_weights(name).DEFAULT
        return _of_transforms(weights.transforms(), f"torchvision {weights}")
    if library not in ("", "timm") or not timm.is_model(name):
        raise InputError(f"neither torchvision nor timm has a model {name!r}")
    config = timm.get_pretrained_cfg(name)
    return _of_timm_config({} if config is None else config.to_dict(), f"timm {name}")


def _of_transforms(transforms: Any, source: str) -> Preprocessing:
    """The preprocessing of torchvision's presets, of which those for detection only convert to floats."""
    crop, resize = (_side(getattr(transforms, name, None)) for name in ("crop_size", "resize_size"))
    size = crop or resize
    return Preprocessing(
        None if size is None else (size, size),
        tuple(getattr(transforms, "mean", (0.0, 0.0, 0.0))),
        tuple(getattr(transforms, "std", (1.0, 1.0, 1.0))),
        getattr(getattr(transforms, "interpolation", None), "value", "bilinear"),
        crop / resize if crop and resize and crop < resize else 1.0,
        source=source,
    )


def _side(value: Any) -> int | None:
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return None if value is None else int(value)


def _of_torchvision(model: nn.Module) -> Preprocessing | None:
    """The preprocessing by the number of parameters, unique to each architecture for any number of classes."""
    if not type(model).__module__.startswith("torchvision.models"):
        return None
    import torchvision

    head = next((m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear | nn.Conv2d)), None)
    if head is None:
        return None
    outputs = head.weight.shape[0]
    heads = [m for m in model.modules() if isinstance(m, type(head)) and m.weight.shape[0] == outputs]  # auxiliary too
    change = sum((1000 - outputs) * (m.weight[0].numel() + (m.bias is not None)) for m in heads if outputs != 1000)
    counts = {name: p.numel() for name, p in model.named_parameters()}
    auxiliary = sum(n for name, n in counts.items() if name.lower().startswith("aux"))
    own = (1000 - outputs) * (head.weight[0].numel() + (head.bias is not None))
    sizes = {sum(counts.values()) + change, sum(counts.values()) - auxiliary + own}
    for name in torchvision.models.list_models(module=torchvision.models):
        weights = torchvision.models.get_model_weights(name)
        fits = [w for w in weights if w.meta["num_params"] in sizes]
        if fits:
            chosen = weights.DEFAULT if weights.DEFAULT in fits else fits[0]
            return _of_transforms(chosen.transforms(), f"torchvision {chosen}")
    return None


def _of_timm(model: nn.Module) -> Preprocessing | None:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not isinstance(config, Mapping) or "input_size" not in config:
        return None
    import timm

    found = _of_timm_config(
        timm.data.resolve_model_data_config(model), f"timm {config.get('architecture', '')}".strip()
    )
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)  # timm.create_model(..., img_size=64)
    return replace(found, size=tuple(built)) if isinstance(built, (tuple, list)) and len(built) == 2 else found


def _of_timm_config(config: Mapping[str, Any], source: str) -> Preprocessing:
    crop, mode = float(config.get("crop_pct") or 0.875), config.get("crop_mode", "center")
    return Preprocessing(
        tuple(config.get("input_size", (3, 224, 224))[-2:]),
        tuple(config.get("mean", (0.485, 0.456, 0.406))),
        tuple(config.get("std", (0.229, 0.224, 0.225))),
        config.get("interpolation") or "bicubic",
        crop,
        {"squash": "squash", "border": "pad"}.get(mode, "crop"),
        source,
    )


def _of_open_clip(model: nn.Module) -> Preprocessing | None:
    visual = getattr(model, "visual", model)
    config = getattr(visual, "preprocess_cfg", None)
    if not isinstance(config, Mapping):
        return None
    size = config["size"]
    resize = {"shortest": "crop", "longest": "pad", "squash": "squash"}.get(
        config.get("resize_mode", "shortest"), "crop"
    )
    return Preprocessing(
        (size, size) if isinstance(size, int) else tuple(size),
        tuple(config["mean"]),
        tuple(config["std"]),
        config.get("interpolation", "bicubic"),
        resize=resize,
        source="open_clip",
    )


def _of_hugging_face(model: nn.Module) -> Preprocessing | None:
    """The preprocessing in the image processor's file next to the weights, in a folder or the local cache."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    path: Any = Path(name) / _FILE
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            path = try_to_load_from_cache(name, _FILE)
        except HFValidationError:  # a path that does not exist
            return None
    if not isinstance(path, (str, os.PathLike)):
        return None
    config = check_json(read_json(path, dict), _PROCESSOR, f"{_FILE} of {name}", InputError)
    return _of_processor(config, f"{_FILE} of {name}")


def _of_processor(config: Mapping[str, Any], source: str) -> Preprocessing:
    """The preprocessing in an image processor's configuration of Hugging Face transformers."""
    size, interpolation = config.get("size"), _RESAMPLE.get(config.get("resample", 3), "bicubic")
    sides, short = _sides(size)
    crop_sides = _sides(config.get("crop_size"))[0] if config.get("do_center_crop", False) else None
    crop, resize = 1.0, "squash" if sides and not short else "crop"
    if config.get("crop_pct") and sides and short and sides[0] < 384:  # ConvNeXt
        crop = float(config["crop_pct"])
    elif config.get("crop_pct") and sides and short:
        resize = "squash"
    if crop_sides is not None:
        crop = min(1.0, crop_sides[0] / sides[0]) if sides else 1.0
        sides = crop_sides
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    given = [config.get(f"image_{name}") for name in ("mean", "std")]
    if config.get("do_normalize", True) and all(values is not None for values in given):
        mean, std = (_three(values) for values in given)
        if len(mean) != len(std):
            raise InputError(f"{source} has {len(mean)} means and {len(std)} deviations; it must have one per channel")
    factor = 255 * float(config.get("rescale_factor") or 1 / 255) if config.get("do_rescale", True) else 1.0
    shift = 1.0 if config.get("rescale_offset") else 0.0
    mean = tuple((m + shift) / factor for m in mean)
    std = tuple(s / factor for s in std)
    return Preprocessing(sides, mean, std, interpolation, crop, resize, source)


def _three(values: Any) -> tuple[float, ...]:
    return (float(values),) * 3 if isinstance(values, (int, float)) else tuple(float(v) for v in values)


def _sides(size: Any) -> tuple[tuple[int, int] | None, bool]:
    """(height, width), and whether only the shorter side was specified."""
    if isinstance(size, int):
        return (size, size), True
    if isinstance(size, Mapping):
        if size.get("shortest_edge") is not None:
            return (int(size["shortest_edge"]),) * 2, True
        if size.get("height") is not None and size.get("width") is not None:
            return (int(size["height"]), int(size["width"])), False
    if isinstance(size, Sequence) and len(size) == 2:
        return (int(size[0]), int(size[1])), False
    return None, False


def _for_channels(found: Preprocessing, model: nn.Module) -> Preprocessing:
    """``found`` with averaged mean and deviation if the model has another number of channels."""
    channels = input_channels(model) or len(found.mean)
    if channels == len(found.mean) or len(found.mean) == 1:
        return found
    mean, std = (((sum(values) / len(values)),) * channels for values in (found.mean, found.std))
    return replace(
        found,
        mean=mean,
        std=std,
        source=f"{found.source}, averaged for {channels} channels",
    )
