"""Drawing of visual prompts on tensors: coverage of rings and discs, crops, and blurs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def distances(centers: Tensor, height: int, width: int) -> Tensor:
    """``(B, H, W)`` float32 distances from the center of every pixel to ``centers`` (B, 2), given as (row, column)."""
    rows = torch.arange(height, device=centers.device) + 0.5 - centers[:, :1]
    columns = torch.arange(width, device=centers.device) + 0.5 - centers[:, 1:]
    return torch.hypot(rows[:, :, None], columns[:, None, :])


def ring(centers: Tensor, radius: float, width: float, height: int, width_px: int) -> Tensor:
    """``(B, H, W)``: the fraction of every pixel that a circular line covers."""
    d = distances(centers, height, width_px)
    outer = torch.clamp(d + 0.5, max=radius + width / 2)
    return outer.sub_(torch.clamp(d - 0.5, min=radius - width / 2)).clamp_(0, 1)


class Rings(NamedTuple):
    """The pixels that circular lines touch, a small fraction of each image."""

    starts: Tensor  # (B + 1,): the first pixel of each circle
    rows: Tensor
    columns: Tensor
    cover: Tensor

    @classmethod
    def of(cls, centers: Tensor, radius: float, width: float, height: int, width_px: int) -> Rings:
        """The touched pixels of every circle, computed in batches of circles."""
        counts, found = [], []
        for part in centers.split(max(1, 4_000_000 // (height * width_px))):
            cover = ring(part, radius, width, height, width_px)
            circle, row, column = cover.nonzero(as_tuple=True)
            counts.append(circle.bincount(minlength=len(part)))
            found.append((row, column, cover[circle, row, column]))
        starts = F.pad(torch.cat(counts).cumsum(0), [1, 0])
        return cls(starts, *(torch.cat(values) for values in zip(*found, strict=True)))

    def paint(self, images: Tensor, circles: Tensor, color: Tensor) -> Tensor:
        """``images`` (B, 3, H, W) with circle ``circles[b]`` drawn on image b, in place."""
        counts = (self.starts[1:] - self.starts[:-1])[circles]
        image = torch.arange(len(circles), device=images.device).repeat_interleave(counts)
        first = self.starts[circles] - (counts.cumsum(0) - counts)
        entry = first.repeat_interleave(counts) + torch.arange(len(image), device=images.device)
        row, column = self.rows[entry], self.columns[entry]
        pixels = images[image, :, row, column]
        images[image, :, row, column] = torch.lerp(pixels, color, self.cover[entry, None].to(images.dtype))
        return images


def disc(centers: Tensor, radius: float, height: int, width: int) -> Tensor:
    """``(B, H, W)``: the fraction of every pixel inside a circle."""
    return (radius + 0.5 - distances(centers, height, width)).clamp_(0, 1)


def crop_windows(centers: Tensor, radius: float, height: int, width: int, *, inside: bool) -> Tensor:
    """``(B, 4)``: centers (row, column) and half sides of windows with the image's aspect ratio.

    ``inside`` shrinks a window to the size of the image and moves it inside.
    """
    short = min(height, width)
    if inside:
        radius = min(radius, short / 2)
    half = centers.new_tensor([radius * height / short, radius * width / short]).expand_as(centers)
    if inside:
        size = centers.new_tensor([height, width])
        centers = torch.minimum(torch.maximum(centers, half), size - half)
    return torch.cat([centers, half], 1)


def resample(images: Tensor, windows: Tensor) -> Tensor:
    """The window of each image, bilinearly enlarged to the image's size; border pixels are repeated outside."""
    height, width = images.shape[-2:]
    size = windows.new_tensor([height, width])
    theta = windows.new_zeros(len(windows), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = (2 * windows[:, 3] / width), (2 * windows[:, 2] / height)
    theta[:, :, 2] = (2 * windows[:, :2] / size - 1).flip(1)
    grid = F.affine_grid(theta, [len(windows), 3, height, width], align_corners=False)
    # Coordinates in half precision would be off by pixels, so half-precision images are cropped in float32.
    small = images.dtype in (torch.float16, torch.bfloat16)
    source = images.float() if small else images
    out = F.grid_sample(source, grid.to(source.dtype), mode="bilinear", padding_mode="border", align_corners=False)
    return out.to(images.dtype)


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur, truncated at three sigma (or twice the image size), with border pixels repeated."""
    reach = max(1, min(math.ceil(3 * sigma), 2 * max(images.shape[-2:])))
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    small = images.dtype in (torch.float16, torch.bfloat16)
    out = images.float() if small else images
    kernel = kernel.to(out.dtype).expand(3, 1, -1)
    out = F.conv2d(F.pad(out, [0, 0, reach, reach], mode="replicate"), kernel[:, :, :, None], groups=3)
    out = F.conv2d(F.pad(out, [reach, reach, 0, 0], mode="replicate"), kernel[:, :, None, :], groups=3)
    return out.to(images.dtype)
