"""`ImageTextEncoder`: the interface that a vision-language model must implement."""

from __future__ import annotations

import warnings
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from captum_concepts._checks import number, with_weights
from captum_concepts.errors import InputError, InputWarning


@runtime_checkable
class ImageTextEncoder(Protocol):
    """Any object that embeds images and texts into one D-dimensional space and has a logit scale and bias.

    The score of a text for an image is ``logit_scale * cos(image, text) + logit_bias``; a softmax over texts turns it
    into probabilities for models trained like CLIP, a sigmoid for models trained like SigLIP. Embeddings need not have
    unit length. :class:`captum_concepts.vlm.OpenCLIPEncoder` implements this protocol.

    Attributes:
        logit_scale: factor of the cosine, already exponentiated (100 for OpenAI's CLIP).
        logit_bias: added to the scaled cosine; 0 for CLIP.

    Example:
        >>> import torch
        >>> from captum_concepts.vlm import ImageTextEncoder
        >>> class MeanColor:
        ...     logit_scale, logit_bias = 10.0, 0.0
        ...     def encode_image(self, images):
        ...         return images.mean((2, 3))
        ...     def encode_text(self, texts):
        ...         return torch.stack([torch.eye(3)[["red", "green", "blue"].index(t)] for t in texts])
        >>> isinstance(MeanColor(), ImageTextEncoder)
        True
    """

    @property
    def logit_scale(self) -> float:
        """Factor of the cosine."""
        ...

    @property
    def logit_bias(self) -> float:
        """Added to the scaled cosine."""
        ...

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed RGB images ``(N, 3, H, W)`` in [0, 1], of any size; returns ``(N, D)``."""
        ...

    def encode_text(self, texts: list[str]) -> Tensor:
        """Embed T texts; returns ``(T, D)``."""
        ...


def check_encoder(encoder: Any, *, words: bool = False) -> None:
    """Raise an error if ``encoder`` is not an :class:`ImageTextEncoder`, before any work.

    Args:
        encoder: the object to check.
        words: whether texts will also be embedded.

    Raises:
        InputError: methods are missing (for a model of transformers the message names ``vlm.from_transformers``), the
            logit scale or bias is not a number, or the weights are not loaded.

    Warns:
        InputWarning: texts will be embedded with dropout.
    """
    if isinstance(encoder, type):
        raise InputError(f"encoder is the class {encoder.__name__}; pass an instance of it, {encoder.__name__}(...)")
    needed = ["encode_image", "encode_text"] if words else ["encode_image"]
    absent = [name for name in needed if not callable(getattr(encoder, name, None))]
    if not absent:
        with_weights("encoder", getattr(encoder, "model", encoder))
        for name, allowed in (("logit_scale", "a positive number"), ("logit_bias", "a number")):
            value = getattr(encoder, name, None)
            value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            if value is not None:
                number(f"encoder.{name}", value, lambda v, name=name: v > 0 or name == "logit_bias", allowed)  # type: ignore[misc]
        module = encoder if isinstance(encoder, nn.Module) else getattr(encoder, "model", None)
        parts = module.modules() if words and isinstance(module, nn.Module) else ()
        if any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in parts):
            warnings.warn(
                "the encoder is in training mode and contains dropout, so its text embeddings are random; call its "
                "module's eval() first",
                InputWarning,
                stacklevel=3,
            )
        return
    kind = type(encoder).__name__
    if callable(getattr(encoder, "get_image_features", None)):
        raise InputError(
            f"{kind} is a Hugging Face model, which has no {' and no '.join(absent)}; pass "
            "vlm.from_transformers(model, processor) as the encoder"
        )
    raise InputError(
        f"encoder must be a vision-language model with {' and '.join(needed)} (vlm.ImageTextEncoder, for example "
        f"vlm.OpenCLIPEncoder); {kind} has no {' and no '.join(absent)}"
    )
