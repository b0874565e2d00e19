"""Training pairs for the bundled VLM, of images with visual prompts and texts that describe the prompted region.

An image is an unmarked scene, a scene with a red circle, a scene blurred outside a disc, or a crop. The exact masks
decide which things a text may name: a circled or cropped object, the ground if the circle contains no object, or
everything in an unmarked scene. A text is true of an image if each of its phrases matches one of these things.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_concepts.datasets import CaptionedScenes

PLAIN, CIRCLE, BLUR, CROP = 0, 1, 2, 3


def draw_circles(images: Tensor, centres: Tensor, radii: Tensor, width: Tensor | float) -> Tensor:
    """Images with an anti-aliased red circle each.

    Args:
        images: ``(N, 3, H, W)`` in [0, 1].
        centres: ``(N, 2)`` x, y in pixels.
        radii: ``(N,)`` radii of the line's middle, in pixels.
        width: width of the line in pixels, a number or ``(N,)``; below 1 the line is fainter.
    """
    distance = (_distances(images.shape[-2:], centres, images) - radii[:, None, None]).abs()
    half = torch.as_tensor(width, dtype=images.dtype, device=images.device).reshape(-1, 1, 1) / 2
    # A pixel covers [distance - 1/2, distance + 1/2]; its fraction inside the line [-half, half].
    cover = (torch.minimum(distance + 0.5, half) - torch.maximum(distance - 0.5, -half)).clamp(0, 1)[:, None]
    red = images.new_tensor([1.0, 0.0, 0.0])[:, None, None]
    return images + cover * (red - images)


def _distances(shape: torch.Size, centres: Tensor, like: Tensor) -> Tensor:
    y = torch.arange(shape[0], dtype=like.dtype, device=like.device) + 0.5
    x = torch.arange(shape[1], dtype=like.dtype, device=like.device) + 0.5
    return torch.hypot(x[None, None, :] - centres[:, 0, None, None], y[None, :, None] - centres[:, 1, None, None])


class Scenes(NamedTuple):
    """Rendered scenes, with uint8 images, object masks, and concept vectors of the K objects and the ground."""

    images: Tensor  # (N, 3, H, W) uint8
    masks: Tensor  # (N, K, H, W) bool
    boxes: Tensor  # (N, K, 4)
    things: Tensor  # (N, K + 1, T) bool: concepts of each object (all False without one), the ground last
    labels: Tensor  # (N,)

    @classmethod
    def render(cls, data: CaptionedScenes) -> Scenes:
        """All scenes of ``data``, with 8 bits per channel."""
        n, k, t, size = len(data), 3, len(data.concepts), data.size
        out = cls(
            torch.empty(n, 3, size, size, dtype=torch.uint8),
            torch.empty(n, k, size, size, dtype=torch.bool),
            torch.empty(n, k, 4),
            torch.zeros(n, k + 1, t, dtype=torch.bool),
            torch.empty(n, dtype=torch.long),
        )
        for i, scene in enumerate(data):
            out.images[i] = (scene.image * 255 + 0.5).to(torch.uint8)
            out.masks[i], out.boxes[i], out.labels[i] = scene.object_masks, scene.boxes, scene.label
            for j, words in enumerate(scene.objects):
                if words[0] >= 0:
                    out.things[i, j, words] = True
            out.things[i, k, scene.ground] = True
        return out


def mark(scenes: Scenes, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images ``(n, 3, H, W)`` of ``rows``, each in a random mode, and which things may be named ``(n, K + 1)``."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape or (n,), generator=generator)

    n, size = len(rows), scenes.images.shape[-1]
    every = torch.arange(n)
    images = scenes.images[rows].float() / 255
    masks = scenes.masks[rows].float()
    exists = scenes.things[rows].any(2)
    mode = torch.multinomial(torch.tensor([0.24, 0.58, 0.08, 0.10]), n, replacement=True, generator=generator)

    chosen = torch.multinomial(exists[:, :-1].float(), 1, generator=generator)[:, 0]
    box = scenes.boxes[rows, chosen]
    object_centre, object_radius = (box[:, :2] + box[:, 2:]) / 2, (box[:, 2] - box[:, 0]) / 2
    # Either around an object, or anywhere with the size of the circles of a prompt grid (32 px at 224).
    around = uniform(0, 1) < 0.65
    radii = torch.where(around, object_radius * uniform(0.9, 1.4), size * uniform(0.11, 0.18))
    jitter = uniform(-0.15, 0.15, n, 2) * object_radius[:, None]
    centres = torch.where(around[:, None], object_centre + jitter, size * uniform(0.02, 0.98, n, 2))

    distance = _distances(images.shape[-2:], centres, images)
    offset = (torch.stack(torch.meshgrid(*[torch.arange(size) + 0.5] * 2, indexing="xy"))[None]
              - centres[..., None, None]).abs().amax(1)  # fmt: skip
    inside = torch.where((mode == CROP)[:, None, None], offset, distance) < radii[:, None, None]
    region = inside.float()
    overlap = (masks * region[:, None]).flatten(2).sum(2)
    share = overlap / region.flatten(1).sum(1, keepdim=True).clamp_min(1)
    contained = overlap / masks.flatten(2).sum(2).clamp_min(1)
    clear = (share >= 0.25) | (contained >= 0.7)
    best = torch.where(clear, share, -1).max(1)
    is_object, is_ground = best.values > 0, share.sum(1) <= 0.05
    mode = torch.where((is_object | is_ground) | (mode == PLAIN), mode, PLAIN)  # ambiguous: leave unmarked

    named = torch.zeros_like(exists)
    named[every[is_object], best.indices[is_object]] = True
    named[:, -1] = is_ground | ((mode == CROP) & (share.sum(1) < 0.7))
    named = torch.where((mode == PLAIN)[:, None], exists, named)

    circled = draw_circles(images, centres, radii, uniform(0.5, 1.6))
    blurred = F.avg_pool2d(F.avg_pool2d(F.pad(images, [6] * 4, mode="replicate"), (13, 1), 1), (1, 13), 1)
    blurred = torch.where(inside[:, None], images, blurred)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 2 * radii / size
    theta[:, :, 2] = 2 * centres / size - 1
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    cropped = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    stacked = torch.stack([images, circled, blurred, cropped])
    out = stacked[mode, every]
    out = (out * uniform(0.9, 1.1)[:, None, None, None]).clamp(0, 1)
    flip = uniform(0, 1) < 0.5
    return torch.where(flip[:, None, None, None], out.flip(3), out), named


def describe(
    things: Tensor, named: Tensor, concepts: list[str], groups: dict[str, list[str]], rng: random.Random
) -> tuple[list[str], Tensor]:
    """One random true text per image, and the concepts of its phrases, ``(n, K + 1, T)`` bool.

    A text names one thing by one, two or all of its concepts, or everything that may be named.
    """
    asks = torch.zeros_like(things)
    ground = things.shape[1] - 1
    texts = []
    for i in range(len(things)):
        candidates = [k for k in range(ground + 1) if named[i, k]]
        rng.shuffle(candidates)
        scene = len(candidates) > 1 and rng.random() < 0.3
        phrases = []
        for k in [k for k in candidates if k != ground or len(candidates) == 1] if scene else candidates[:1]:
            words = things[i, k].nonzero().flatten().tolist()
            words = words if scene else rng.sample(words, min(len(words), rng.choice([1, 1, 2, 3, 3])))
            asks[i, k, words] = True
            phrases.append(_phrase([concepts[t] for t in sorted(words)], groups, rng))
        text = " and ".join(phrases)
        if scene and named[i, ground] and rng.random() < 0.7:
            word = int(things[i, ground].nonzero()[0, 0])
            asks[i, ground, word] = True
            text += f" on {concepts[word]}"
        if rng.random() < 0.2 and not text.startswith("on "):
            text = f"{rng.choice(['a photo', 'an image', 'a picture', 'the scene'])} of {text}"
        texts.append(text)
    return texts, asks


def _phrase(words: list[str], groups: dict[str, list[str]], rng: random.Random) -> str:
    if words[0] in groups["ground"]:
        return rng.choice([words[0], words[0], f"on {words[0]}", f"a {words[0]} background", f"the {words[0]}"])
    shape = [w for w in words if w in groups["shape"]] or rng.choice([[], ["object"]])
    phrase = " ".join([w for kind in ("colour", "texture") for w in words if w in groups[kind]] + shape)
    if not shape or rng.random() < 0.5:
        return phrase
    return f"{rng.choice(['an' if phrase[0] in 'aeiou' else 'a', 'the'])} {phrase}"


def truth(things: Tensor, named: Tensor, asks: Tensor) -> Tensor:
    """``(n, m)`` bool, whether text j (``asks`` (m, R, T)) is true of image i.

    One thing that may be named must have all concepts of each nonempty phrase.
    """
    missing = torch.einsum("nkt,mrt->nmkr", (~things).float(), asks.float())
    fits = ((missing == 0) & named[:, None, :, None]).any(2)
    return (fits | ~asks.any(2)[None]).all(2)
