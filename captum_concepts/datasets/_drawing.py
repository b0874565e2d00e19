"""Drawing for :mod:`captum_concepts.datasets.scenes`: shapes, textures and grounds as vectorized NumPy functions.

All lengths are in units of the image side and sampled at pixel centers, so a scene looks the same at every size. A
shape is a signed distance function, whose sign at the pixel center is the exact mask and whose value anti-aliases the
edge.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.10, 0.12),
    "green": (0.08, 0.66, 0.20),
    "blue": (0.12, 0.25, 0.88),
    "yellow": (0.97, 0.88, 0.12),
    "purple": (0.58, 0.14, 0.72),
    "orange": (0.98, 0.50, 0.06),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
TEXTURES = ("plain", "striped", "dotted", "checkered")
GROUNDS = ("grass", "sand", "water", "brick", "snow", "wood")


@dataclass(frozen=True)
class ObjectSpec:
    """One object, with indices into the lists above, and its position and style in units of the image side."""

    shape: int
    colour: int
    texture: int
    x: float
    y: float
    radius: float  # of the bounding circle
    angle: float
    texture_angle: float
    period: float
    phase: tuple[float, float]
    rgb: tuple[float, float, float]


@lru_cache(maxsize=16)
def pixel_centres(size: int) -> tuple[Array, Array]:
    """x ``(1, size)`` and y ``(size, 1)`` of the pixel centers in units of the image side."""
    c = ((np.arange(size, dtype=np.float32) + 0.5) / size).astype(np.float32)
    return c[None, :], c[:, None]


@lru_cache(maxsize=64)
def _interpolation(size: int, cells: int) -> Array:
    """``(size, cells + 1)`` matrix that interpolates a lattice smoothly at the pixel centers."""
    u = (np.arange(size) + 0.5) / size * cells
    k = np.minimum(u.astype(int), cells - 1)
    t = u - k
    t = t * t * (3 - 2 * t)
    m = np.zeros((size, cells + 1), dtype=np.float32)
    m[np.arange(size), k] = 1 - t
    m[np.arange(size), k + 1] = t
    return m


def smooth_noise(rng: np.random.Generator, size: int, rows: int, columns: int) -> Array:
    """Value noise ``(size, size)`` in [-1, 1], the same at every size."""
    lattice = rng.uniform(-1, 1, (rows + 1, columns + 1)).astype(np.float32)
    return np.asarray(_interpolation(size, rows) @ lattice @ _interpolation(size, columns).T, dtype=np.float32)


# ---------------------------------------------------------------------------------------------------- shapes


def _box(x: Array, y: Array, a: float, b: float) -> Array:
    return np.maximum(np.abs(x) - np.float32(a), np.abs(y) - np.float32(b))


def _triangle(x: Array, y: Array) -> Array:
    # Equilateral, pointing up (y points down), circumradius .97, inradius half of that.
    d = np.float32(0.485)
    s = np.float32(np.sqrt(3) / 2)
    return np.maximum(y, np.maximum(s * x - y / 2, -s * x - y / 2)) - d


def _star(x: Array, y: Array) -> Array:
    # Fold into one half of one of the five points, then measure the distance to the line from tip to notch.
    tip, notch, wedge = 0.98, 0.46, np.pi / 5
    angle = np.arctan2(x, -y)
    angle = np.abs((angle + wedge) % (2 * wedge) - wedge)
    rho = np.hypot(x, y)
    px, py = rho * np.cos(angle), rho * np.sin(angle)
    ex, ey = notch * np.cos(wedge) - tip, notch * np.sin(wedge)
    length = np.hypot(ex, ey)
    return np.asarray(((px - tip) * ey - py * ex) / length, dtype=np.float32)


def signed_distance(shape: int, x: Array, y: Array) -> Array:
    """Signed distance (negative inside) to a shape in the unit circle; y points down."""
    name = SHAPES[shape]
    if name == "circle":
        return np.asarray(np.hypot(x, y) - np.float32(0.88))
    if name == "square":
        return _box(x, y, 0.69, 0.69)
    if name == "triangle":
        return _triangle(x, y)
    if name == "star":
        return _star(x, y)
    return np.minimum(_box(x, y, 0.93, 0.30), _box(x, y, 0.30, 0.93))


def _coverage(distance: Array, size: int) -> Array:
    """Anti-aliased coverage of a pixel whose center has this signed distance (in units of the image side)."""
    return np.clip(np.float32(0.5) - distance * np.float32(size), 0, 1)


def _texture(texture: int, x: Array, y: Array, period: float, size: int) -> Array:
    """Fraction of the base color, 1 where the object has its own color and 0 where it is dark."""
    name = TEXTURES[texture]
    if name == "plain":
        return np.ones(np.broadcast_shapes(x.shape, y.shape), dtype=np.float32)
    w = np.float32(2 * np.pi / period)
    if name == "striped":
        return _coverage(np.sin(w * x) / w, size)
    if name == "checkered":
        w = w * np.float32(0.75)
        return _coverage(np.sin(w * x) * np.sin(w * y) / w, size)
    dx, dy = (x / period) % 1 - 0.5, (y / period) % 1 - 0.5
    return 1 - _coverage(np.asarray((np.hypot(dx, dy) - 0.30) * period, dtype=np.float32), size)


def draw_object(image: Array, spec: ObjectSpec) -> NDArray[np.bool_]:
    """Draw one object into ``image`` ``(3, size, size)`` in place and return its exact mask ``(size, size)``."""
    size = image.shape[-1]
    px, py = pixel_centres(size)
    x, y = px - np.float32(spec.x), py - np.float32(spec.y)
    c, s = np.float32(np.cos(spec.angle)), np.float32(np.sin(spec.angle))
    r = np.float32(spec.radius)
    distance = signed_distance(spec.shape, (c * x + s * y) / r, (c * y - s * x) / r) * r
    alpha = _coverage(distance, size)
    c, s = np.float32(np.cos(spec.texture_angle)), np.float32(np.sin(spec.texture_angle))
    tx = c * x + s * y + np.float32(spec.phase[0] * spec.period)
    ty = c * y - s * x + np.float32(spec.phase[1] * spec.period)
    share = np.float32(0.22) + np.float32(0.78) * _texture(spec.texture, tx, ty, spec.period, size)
    # Slight shading from above, so that plain colors are not constant regions.
    share = share * (1 - np.float32(0.12) * y / r)
    rgb = np.asarray(spec.rgb, dtype=np.float32)[:, None, None]
    image += alpha * (rgb * share - image)
    return np.asarray(distance < 0)


# --------------------------------------------------------------------------------------------------- grounds


def draw_ground(ground: int, rng: np.random.Generator, size: int) -> Array:
    """A textured ground ``(3, size, size)`` in muted colors, so that color concepts belong only to objects."""
    name = GROUNDS[ground]
    x, y = pixel_centres(size)
    jitter = rng.uniform(-0.04, 0.04, 3).astype(np.float32)
    light = np.float32(0.05) * smooth_noise(rng, size, 2, 2)
    detail: Any
    if name == "grass":
        base = (0.34, 0.43, 0.25)
        detail = 0.16 * smooth_noise(rng, size, 14, 46) + 0.06 * smooth_noise(rng, size, 5, 5)
    elif name == "sand":
        base = (0.75, 0.68, 0.52)
        detail = 0.09 * smooth_noise(rng, size, 44, 44) + 0.05 * smooth_noise(rng, size, 4, 2)
    elif name == "water":
        base = (0.36, 0.49, 0.58)
        bend = 0.6 * smooth_noise(rng, size, 4, 5)
        detail = 0.11 * np.sin(2 * np.pi * (rng.uniform(8, 10) * y + bend + rng.uniform()))
    elif name == "brick":
        base = (0.50, 0.37, 0.33)
        rows, columns = 8.0, 4.0
        v = rows * y + rng.uniform()
        u = columns * x + rng.uniform() + 0.5 * (np.floor(v) % 2)
        gap = np.minimum(np.abs(v - np.round(v)) / rows, np.abs(u - np.round(u)) / columns)
        detail = 0.26 * _coverage(np.asarray(gap - 0.011, dtype=np.float32), size)
        detail = detail + 0.05 * smooth_noise(rng, size, 30, 30)
    elif name == "snow":
        base = (0.86, 0.88, 0.92)
        detail = 0.07 * smooth_noise(rng, size, 5, 5) + 0.03 * smooth_noise(rng, size, 30, 30)
    else:
        base = (0.47, 0.36, 0.26)
        grain = 1.1 * smooth_noise(rng, size, 2, 6)
        detail = 0.09 * np.sin(2 * np.pi * (rng.uniform(6, 8) * x + grain + rng.uniform()))
        detail = detail + 0.04 * smooth_noise(rng, size, 4, 40)
    tone = np.asarray(base, dtype=np.float32) * (1 + jitter)
    return np.clip(tone[:, None, None] + (light + detail).astype(np.float32), 0, 1)
