"""`CaptionedScenes`: seeded synthetic scenes with exact concepts, masks, captions and classes."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from captum_concepts.datasets._drawing import COLOURS, GROUNDS, SHAPES, TEXTURES, draw_ground, draw_object
from captum_concepts.datasets._sampling import (
    CLASSES,
    INDEX,
    MAX_OBJECTS,
    WORDS,
    ScenePlan,
    caption_of,
    concept_indices,
    plan_scene,
)
from captum_concepts.errors import InputError, did_you_mean


class Scene(NamedTuple):
    """One scene of :class:`CaptionedScenes`, with T concepts and at most K=3 objects, the main object first.

    Every field has the same shape in every scene, so ``torch.utils.data.DataLoader`` batches scenes without a collate
    function. A batch is again a ``Scene``, with a leading N, a tensor ``label`` and a list of strings ``caption``.

    Attributes:
        image: ``(3, H, W)`` float32 RGB in [0, 1].
        label: index into ``CaptionedScenes.classes``.
        masks: ``(T, H, W)`` bool, True at the pixels whose center shows the concept.
        caption: a description of the scene, main object first.
        presence: ``(T,)`` bool, whether the concept is in the scene.
        objects: ``(K, 3)`` int64, concept indices of each object's shape, color and texture; -1 in unused rows.
        object_masks: ``(K, H, W)`` bool, the mask of each object; empty in unused rows.
        boxes: ``(K, 4)`` float32 box x0, y0, x1, y1 around each object's bounding circle, in pixels; 0 in unused rows.
        ground: concept index of the ground.
    """

    # Any: an int or a string in one scene, a tensor or a list in a batch.
    image: Tensor
    label: Any
    masks: Tensor
    caption: Any
    presence: Tensor
    objects: Tensor
    object_masks: Tensor
    boxes: Tensor
    ground: Any


class CaptionedScenes(Dataset[Scene]):
    """Seeded scenes of one to three objects (shape x color x texture) on a textured ground, with exact masks.

    There are 21 *concepts*: 5 shapes, 6 colors and 4 textures, which describe objects, and 6 grounds. Colors belong
    only to objects, as the grounds are muted and grass is not "green". A textured object has its own color and a dark
    shade of it, both of which belong to the mask. Objects lie entirely inside the image and never overlap; the mask of
    a ground is everything outside the objects.

    *Classes* are conjunctions of two concepts of one object: "red circle", "striped circle", "red square", "striped
    square", "blue triangle", "dotted star". Exactly one object of a scene, the main one, satisfies exactly one class,
    and the others satisfy none, so a red square next to a blue circle is not a "red circle". Labels are uniform.

    *Spurious grounds* are planted for classes 0 to 5, in this order: grass, sand, water, brick, snow, wood. With
    probability ``spurious`` the ground is the planted one, otherwise it is uniformly random, so ``spurious=0`` makes
    ground and class independent, and P(planted | class) = s + (1 - s) / 6. Nothing else in a scene depends on it.

    Item i depends only on ``(seed, i)``, never on ``n`` or on the order of access, and ``size`` only changes the
    sampling of the same scene.

    Args:
        n: number of scenes.
        seed: non-negative integer.
        size: side of the square image in pixels, at least 16 (textures are distinguishable from 48 on).
        spurious: probability in [0, 1] that the planted ground of the class is used.

    Raises:
        InputError: a value out of range.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from captum_concepts.datasets import CaptionedScenes
        >>> scenes = CaptionedScenes(100, seed=0, size=64)
        >>> scene = scenes[0]
        >>> scene.image.shape, scene.masks.shape, scenes.classes[scene.label]
        (torch.Size([3, 64, 64]), torch.Size([21, 64, 64]), 'dotted star')
        >>> batch = next(iter(DataLoader(scenes, batch_size=8)))
        >>> batch.image.shape, batch.label.shape, len(batch.caption)
        (torch.Size([8, 3, 64, 64]), torch.Size([8]), 8)
    """

    concepts: list[str]
    classes: list[str]

    def __init__(self, n: int, *, seed: int, size: int, spurious: float = 0.0) -> None:
        self.n = _whole("n", n, 0)
        self.seed = _whole("seed", seed, 0)
        self.size = _whole("size", size, 16)
        if isinstance(spurious, str) or not 0.0 <= float(spurious) <= 1.0:
            raise InputError(f"spurious={spurious!r} must be a probability in [0, 1]")
        self.spurious = float(spurious)
        self.concepts = list(WORDS)
        self.classes = [" ".join(words) for words in CLASSES]
        #: For each class, its two concept indices.
        self.class_concepts = [tuple(INDEX[w] for w in words) for words in CLASSES]
        #: For each class, the concept index of the ground that ``spurious`` plants.
        self.planted_grounds = [INDEX[GROUNDS[c]] for c in range(len(CLASSES))]
        #: The concepts by kind: "shape", "colour", "texture", "ground".
        self.concept_groups = {
            "shape": list(SHAPES), "colour": list(COLOURS), "texture": list(TEXTURES), "ground": list(GROUNDS),
        }  # fmt: skip

    def __len__(self) -> int:
        return self.n

    def __repr__(self) -> str:
        return f"CaptionedScenes({self.n}, seed={self.seed}, size={self.size}, spurious={self.spurious:g})"

    def __getitem__(self, index: int) -> Scene:
        return self.draw(index)

    def __iter__(self) -> Iterator[Scene]:
        return (self[i] for i in range(self.n))

    def draw(self, index: int, *, ground: str | None = None) -> Scene:
        """Scene ``index``, optionally with the same objects on another ``ground``.

        Raises:
            IndexError: ``index`` is outside the data set.
            InputError: ``ground`` is not one of ``concept_groups["ground"]``.
        """
        plan = self._plan(self._position(index))
        if ground is not None:
            if ground not in GROUNDS:
                raise InputError(f"ground={ground!r} must be one of {list(GROUNDS)}.{did_you_mean(ground, GROUNDS)}")
            plan = plan._replace(ground=GROUNDS.index(ground))
        image = draw_ground(plan.ground, np.random.default_rng(plan.ground_seed), self.size)
        masks = np.zeros((len(WORDS), self.size, self.size), dtype=bool)
        object_masks = np.zeros((MAX_OBJECTS, self.size, self.size), dtype=bool)
        objects = np.full((MAX_OBJECTS, 3), -1, dtype=np.int64)
        boxes = np.zeros((MAX_OBJECTS, 4), dtype=np.float32)
        for k, spec in enumerate(plan.objects):
            object_masks[k] = draw_object(image, spec)
            objects[k] = concept_indices(spec)
            masks[objects[k]] |= object_masks[k]
            x, y, r = spec.x, spec.y, spec.radius
            boxes[k] = np.array([x - r, y - r, x + r, y + r]) * self.size
        ground_index = INDEX[GROUNDS[plan.ground]]
        masks[ground_index] = ~object_masks.any(0)
        return Scene(
            image=torch.from_numpy(np.clip(image, 0, 1, out=image)),
            label=plan.label,
            masks=torch.from_numpy(masks),
            caption=caption_of(plan),
            presence=torch.from_numpy(masks.any((1, 2))),
            objects=torch.from_numpy(objects),
            object_masks=torch.from_numpy(object_masks),
            boxes=torch.from_numpy(boxes),
            ground=ground_index,
        )

    def stack(self, indices: Sequence[int] | None = None) -> Scene:
        """Several scenes (default: all) as one batched :class:`Scene`.

        Example:
            >>> CaptionedScenes(5, seed=1, size=32).stack([0, 3]).masks.shape
            torch.Size([2, 21, 32, 32])
        """
        chosen = list(range(self.n)) if indices is None else list(indices)
        if not chosen:
            raise InputError("stack needs at least one scene; the list of indices (or the data set) is empty")
        batch: Scene = default_collate([self[i] for i in chosen])
        return batch

    @cached_property
    def labels(self) -> Tensor:
        """``(n,)`` class of every scene, computed without drawing."""
        return torch.tensor([self._plan(i).label for i in range(self.n)], dtype=torch.long)

    @cached_property
    def captions(self) -> list[str]:
        """Captions of the n scenes, computed without drawing."""
        return [caption_of(self._plan(i)) for i in range(self.n)]

    @cached_property
    def presence(self) -> Tensor:
        """``(n, T)`` bool, which concepts are in which scene, computed without drawing."""
        out = torch.zeros(self.n, len(WORDS), dtype=torch.bool)
        for i in range(self.n):
            plan = self._plan(i)
            for spec in plan.objects:
                out[i, list(concept_indices(spec))] = True
            out[i, INDEX[GROUNDS[plan.ground]]] = True
        return out

    def _plan(self, i: int) -> ScenePlan:
        return plan_scene(self.seed, i, self.spurious)

    def _position(self, index: int) -> int:
        i = operator.index(index)
        if not -self.n <= i < self.n:
            raise IndexError(f"scene {i} of {self.n}")
        return i % self.n


def _whole(name: str, value: int, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{name}={value!r} must be an integer of at least {least}") from None
    if isinstance(value, bool) or number < least:
        raise InputError(f"{name}={value!r} must be an integer of at least {least}")
    return number
