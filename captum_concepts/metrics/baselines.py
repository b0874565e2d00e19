"""Concept-agnostic baselines, with which every table of maps should be compared."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from captum_concepts._checks import integer, number
from captum_concepts.errors import InputError
from captum_concepts.metrics._prepare import check_size

__all__ = ["CenterGaussian", "RandomMaps", "activation_energy", "center_gaussian"]


def center_gaussian(n: int, size: tuple[int, int], *, sigma: float = 0.25) -> Tensor:
    """``(n, h, w)`` Gaussians in the center, with ``sigma`` as a fraction of each side.

    >>> center_gaussian(1, (1, 3), sigma=0.5)
    tensor([[[0.8007, 1.0000, 0.8007]]])
    """
    number("sigma", sigma, lambda s: s > 0, "positive (a fraction of the image's side)")
    check_size(size)
    rows, cols = ((torch.arange(s) + 0.5) / s - 0.5 for s in size)
    heat = torch.exp(-(rows[:, None] ** 2 + cols**2) / (2 * sigma**2))
    return heat.expand(n, -1, -1).clone()


def activation_energy(activations: Tensor) -> Tensor:
    """``(N, h, w)`` Euclidean norm of ``(N, C, h, w)`` activations at each position, whatever the concept.

    >>> activation_energy(torch.tensor([[[[3.0]], [[4.0]]]]))
    tensor([[[5.]]])
    """
    if not isinstance(activations, Tensor) or activations.ndim != 4:
        got = tuple(activations.shape) if isinstance(activations, Tensor) else type(activations).__name__
        raise InputError(f"activations must be a torch.Tensor (N, C, h, w), got {got}")
    wide = activations if activations.dtype == torch.float64 else activations.float()
    return torch.linalg.vector_norm(wide, dim=1)


class Blind:
    """A concept-agnostic explainer for :func:`captum_concepts.metrics.evaluate`, whose maps ignore the target."""

    def __init__(self, n_maps: int | None) -> None:
        if n_maps is not None:
            integer("n_maps", n_maps)
        self.n_maps = n_maps

    def _one(self, image: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, inputs: Tensor, target: Any = None) -> Tensor:  # noqa: ARG002
        maps = torch.stack([self._one(image) for image in inputs]).to(inputs.device)
        return maps[:, 0] if self.n_maps is None else maps


class RandomMaps(Blind):
    """Uniform noise on a grid; an image always has the same maps, however images are batched.

    Args:
        size: the grid, by default that of a last convolutional layer.
        n_maps: None for ``(N, h, w)``, which ``evaluate`` compares with every mask of the image; T for
            ``(N, T, h, w)``.
        seed: random seed of the maps.

    Example:
        >>> images = torch.rand(2, 3, 8, 8)
        >>> maps = RandomMaps()(images)
        >>> maps.shape, bool((RandomMaps()(images[1:]) == maps[1:]).all())
        (torch.Size([2, 7, 7]), True)
    """

    def __init__(self, size: tuple[int, int] = (7, 7), *, n_maps: int | None = None, seed: int = 0) -> None:
        super().__init__(n_maps)
        check_size(size)
        self.size, self.seed = size, seed

    def _one(self, image: Tensor) -> Tensor:
        data = image.detach().cpu().float().contiguous().numpy().tobytes()
        digest = hashlib.blake2b(data, digest_size=6, key=str(self.seed).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        return torch.rand(self.n_maps or 1, *self.size, generator=generator)


class CenterGaussian(Blind):
    """A Gaussian in the center of every image (:func:`center_gaussian`), at the size of the image.

    Example:
        >>> CenterGaussian(n_maps=3)(torch.rand(2, 3, 8, 6)).shape
        torch.Size([2, 3, 8, 6])
    """

    def __init__(self, sigma: float = 0.25, *, n_maps: int | None = None) -> None:
        super().__init__(n_maps)
        self.sigma = sigma

    def _one(self, image: Tensor) -> Tensor:
        heat = center_gaussian(1, (image.shape[-2], image.shape[-1]), sigma=self.sigma)
        return heat.expand(self.n_maps or 1, -1, -1)
