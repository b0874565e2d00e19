"""`ImageTextEncoder`: what this package asks of a vision-language model."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class ImageTextEncoder(Protocol):
    """Any object with two methods and two numbers: images and texts into one space of D dimensions.

    The score of a text for an image is ``logit_scale * cos(image, text) + logit_bias``; a softmax over texts turns it
    into probabilities for models trained like CLIP, a sigmoid for models trained like SigLIP. Embeddings need not have
    unit length. :class:`captum_concepts.vlm.OpenCLIPEncoder` is one; so is anything else of this shape.

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
