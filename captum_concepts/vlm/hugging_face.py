"""`from_transformers`: CLIP and SigLIP models of the transformers library as encoders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts.errors import InputError
from captum_concepts.vlm.open_clip import OpenCLIPEncoder
from captum_concepts.vlm.towers import Tower, transformers_tower


def from_transformers(
    model: Any, processor: Any, *, templates: Sequence[str] | None = None, text_batch_size: int = 256
) -> OpenCLIPEncoder:
    """An encoder from a model of the ``transformers`` library.

    Args:
        model: a ``CLIPModel``, ``SiglipModel`` or ``Siglip2Model``, or another with ``get_image_features``,
            ``get_text_features`` and ``logit_scale``. It is frozen and set to evaluation mode.
        processor: the model's ``AutoProcessor.from_pretrained``, an object with an ``image_processor`` (whose size,
            mean, standard deviation and interpolation are used) and a ``tokenizer``.
        templates, text_batch_size: see :class:`~captum_concepts.vlm.OpenCLIPEncoder`.

    Returns:
        An :class:`~captum_concepts.vlm.OpenCLIPEncoder` with all its features, including dense regions.

    Raises:
        InputError: not such a model and processor.

    Example::

        from transformers import AutoModel, AutoProcessor

        name = "google/siglip2-base-patch16-224"
        encoder = from_transformers(AutoModel.from_pretrained(name), AutoProcessor.from_pretrained(name))
        encoder.encode_image(images), encoder.encode_text(["striped", "dotted"])
    """
    missing = [name for name in ("get_image_features", "get_text_features", "logit_scale") if not hasattr(model, name)]
    if missing:
        raise InputError(
            f"{type(model).__name__} has no {', '.join(missing)}: it must be a vision-language model of transformers, "
            "such as CLIPModel or SiglipModel, not its image or text half"
        )
    parts = [getattr(processor, name, None) for name in ("image_processor", "tokenizer")]
    if None in parts:
        raise InputError(
            f"processor {type(processor).__name__} must have an image_processor and a tokenizer, as "
            "AutoProcessor.from_pretrained returns it"
        )
    # CLIP reads up to the end of the text, and SigLIP was trained with padding; for others padding must be masked.
    own = str(getattr(model.config, "model_type", "")).startswith(("clip", "siglip"))
    adapter = _Adapter(model.requires_grad_(False), None if own else getattr(parts[1], "pad_token_id", None))
    length = min(model.config.text_config.max_position_embeddings, getattr(parts[1], "model_max_length", math.inf))
    tokenizer = _Tokenizer(parts[1], int(length))
    preprocess = _preprocessing(parts[0], adapter.patch_size)
    return OpenCLIPEncoder(adapter, tokenizer, preprocess, templates=templates, text_batch_size=text_batch_size)


class _Tokenizer:
    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self.tokenizer, self.context_length = tokenizer, context_length

    def __call__(self, texts: Sequence[str]) -> Tensor:
        found = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.context_length, return_tensors="pt"
        )
        ids = found["input_ids"]
        return ids if isinstance(ids, Tensor) else torch.as_tensor(ids)


class _Adapter(nn.Module):
    """A transformers model with the methods of an open_clip model."""

    def __init__(self, model: Any, padding: int | None = None) -> None:
        super().__init__()
        self.model, self.padding = model, padding
        embeddings = getattr(model.vision_model, "embeddings", None)
        #: Patch size of models that take patches of images of any aspect ratio (SigLIP 2, "NaFlex"), otherwise None.
        naflex = isinstance(getattr(embeddings, "patch_embedding", None), nn.Linear)
        self.patch_size: int | None = int(model.config.vision_config.patch_size) if naflex else None

    @property
    def visual(self) -> nn.Module:
        return self.model.vision_model

    @property
    def logit_scale(self) -> Tensor:
        return self.model.logit_scale

    @property
    def logit_bias(self) -> Tensor | None:
        return getattr(self.model, "logit_bias", None)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return _pooled(self.model.get_image_features(**self._inputs(pixels)))

    def encode_text(self, ids: Tensor) -> Tensor:
        mask = {} if self.padding is None else {"attention_mask": (ids != self.padding).long()}
        return _pooled(self.model.get_text_features(input_ids=ids, **mask))

    def dense_tower(self, **options: Any) -> Tower:
        return transformers_tower(self.model, self._inputs, **options)

    def _inputs(self, pixels: Tensor) -> dict[str, Tensor]:
        if self.patch_size is None:
            return {"pixel_values": pixels}
        side = self.patch_size
        n, channels, height, width = pixels.shape
        h, w = height // side, width // side
        patches = pixels.reshape(n, channels, h, side, w, side).permute(0, 2, 4, 3, 5, 1).reshape(n, h * w, -1)
        shape = torch.tensor([[h, w]], device=pixels.device).expand(n, 2)
        mask = torch.ones(n, h * w, dtype=torch.int32, device=pixels.device)
        return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shape}


def _pooled(found: Any) -> Tensor:
    """The embedding, which newer versions of transformers return inside an object."""
    return found if isinstance(found, Tensor) else found.pooler_output


def _preprocessing(processor: Any, patch_size: int | None) -> dict[str, Any]:
    """The settings of an image processor as ``preprocess`` of :class:`OpenCLIPEncoder`."""
    found: dict[str, Any] = {"mean": tuple(processor.image_mean), "std": tuple(processor.image_std)}
    given = getattr(processor, "resample", None)
    resample = 3 if given is None else int(given)
    if resample not in (2, 3):
        raise InputError(f"the processor resizes with PIL's method {resample}; known: 2 (bilinear) and 3 (bicubic)")
    found["interpolation"] = "bilinear" if resample == 2 else "bicubic"
    if patch_size is not None:
        return {**found, "resize_mode": "patches", "size": patch_size, "max_patches": int(processor.max_num_patches)}
    size = {key: int(value) for key, value in dict(processor.size).items() if value}
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", None) else None
    if crop and "shortest_edge" in size:
        crop = (int(dict(crop)["height"]), int(dict(crop)["width"]))
        return {
            **found,
            "resize_mode": "shortest",
            "size": crop,
            "resize_to": size["shortest_edge"],
            "round_down": True,
        }
    if not crop and {"height", "width"} <= set(size):
        return {**found, "resize_mode": "squash", "size": (size["height"], size["width"])}
    raise InputError(
        f"the processor resizes to {size} and crops to {crop}, which is not supported; supported are a shortest edge "
        "with a crop, and a height and width without one"
    )
