"""Concepts, classes and random choices of the scenes in :mod:`captum_concepts.datasets.scenes`."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np

from captum_concepts.datasets._drawing import COLOURS, GROUNDS, SHAPES, TEXTURES, ObjectSpec

MAX_OBJECTS = 3
# Each class is two concepts of one object; its planted ground has the same index in GROUNDS. No single concept decides
# (circle, square, red and striped each belong to two classes), so a classifier must bind concepts to one object.
CLASSES = (("red", "circle"), ("striped", "circle"), ("red", "square"),
            ("striped", "square"), ("blue", "triangle"), ("dotted", "star"))  # fmt: skip
WORDS = (*SHAPES, *COLOURS, *TEXTURES, *GROUNDS)
INDEX = {word: i for i, word in enumerate(WORDS)}
# Radii of the bounding circles for 1, 2 and 3 objects, of which disjoint circles always fit.
_RADII = ((0.17, 0.30), (0.15, 0.22), (0.13, 0.18))


def _class_of(words: tuple[str, str, str]) -> list[int]:
    return [c for c, need in enumerate(CLASSES) if set(need) <= set(words)]


_TRIPLES = list(product(range(len(SHAPES)), range(len(COLOURS)), range(len(TEXTURES))))
_MAIN: list[list[tuple[int, int, int]]] = [[] for _ in CLASSES]
_OTHER: list[tuple[int, int, int]] = []
for _s, _c, _t in _TRIPLES:
    _hit = _class_of((SHAPES[_s], list(COLOURS)[_c], TEXTURES[_t]))
    if not _hit:
        _OTHER.append((_s, _c, _t))
    elif len(_hit) == 1:
        _MAIN[_hit[0]].append((_s, _c, _t))


class ScenePlan(NamedTuple):
    label: int
    objects: tuple[ObjectSpec, ...]
    ground: int
    ground_seed: int


def plan_scene(seed: int, index: int, spurious: float) -> ScenePlan:
    """Contents of scene ``index`` of ``seed``; only the ground depends on ``spurious``."""
    rng = np.random.default_rng((seed, index))
    # Always drawn, and first, so that `spurious` changes only the ground.
    label, coin, ground = int(rng.integers(len(CLASSES))), rng.random(), int(rng.integers(len(GROUNDS)))
    if coin < spurious:
        ground = label
    ground_seed = int(rng.integers(2**62))
    count = int(rng.integers(1, MAX_OBJECTS + 1))
    objects = []
    placed: list[tuple[float, float, float]] = []
    for k in range(count):
        pool = _MAIN[label] if k == 0 else _OTHER
        shape, colour, texture = pool[int(rng.integers(len(pool)))]
        x, y, r = _place(rng, placed, *_RADII[count - 1])
        placed.append((x, y, r))
        rgb = np.clip(np.array(list(COLOURS.values())[colour]) + rng.uniform(-0.05, 0.05, 3), 0, 1)
        objects.append(
            ObjectSpec(
                shape, colour, texture, x, y, r,
                angle=float(rng.uniform(-0.26, 0.26)),
                texture_angle=float(rng.uniform(0, np.pi)),
                period=float(rng.uniform(0.075, 0.095)),
                phase=(float(rng.random()), float(rng.random())),
                rgb=(float(rgb[0]), float(rgb[1]), float(rgb[2])),
            )
        )  # fmt: skip
    return ScenePlan(label, tuple(objects), ground, ground_seed)


def _place(
    rng: np.random.Generator, placed: list[tuple[float, float, float]], low: float, high: float
) -> tuple[float, float, float]:
    """A circle inside the unit square that touches none of ``placed``."""
    r = float(rng.uniform(low, high))
    candidates = rng.uniform(0, 1, (64, 2))
    while True:
        xy = r + 0.01 + candidates * (1 - 2 * r - 0.02)
        gap = np.full(len(xy), np.inf)
        for px, py, pr in placed:
            gap = np.minimum(gap, np.hypot(xy[:, 0] - px, xy[:, 1] - py) - pr - r)
        free = np.flatnonzero(gap > 0.01)
        if len(free):
            return float(xy[free[0], 0]), float(xy[free[0], 1]), r
        r *= 0.95  # rare; terminates because the placed circles never fill the square


def concept_indices(spec: ObjectSpec) -> tuple[int, int, int]:
    """Concept indices of an object's shape, color and texture."""
    return spec.shape, len(SHAPES) + spec.colour, len(SHAPES) + len(COLOURS) + spec.texture


def caption_of(plan: ScenePlan) -> str:
    names = [" ".join((WORDS[c], WORDS[t], WORDS[s])) for s, c, t in map(concept_indices, plan.objects)]
    phrases = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
    return f"{' and '.join(phrases)} on {GROUNDS[plan.ground]}"
