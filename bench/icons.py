"""The icons of the synthetic scenes, as coverage masks drawn from implicit shapes.

Coordinates run from -1 to 1, x to the right and y downwards; a shape is a boolean numpy array on a
grid of 4 x 4 samples per mask cell, and its mask is the mean of each cell's samples.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

CELLS = 64
SAMPLES = 4  # per cell and axis

Array = np.ndarray


def _box(x: Array, y: Array, left: float, top: float, right: float, bottom: float) -> Array:
    return (x >= left) & (x <= right) & (y >= top) & (y <= bottom)


def _disc(x: Array, y: Array, cx: float, cy: float, radius: float) -> Array:
    return (x - cx) ** 2 + (y - cy) ** 2 <= radius**2


def _polygon(x: Array, y: Array, *points: tuple[float, float]) -> Array:
    """Even-odd rule."""
    inside = np.zeros(x.shape, dtype=bool)
    for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1], strict=True):
        if y1 == y2:
            continue
        crosses = (y1 > y) != (y2 > y)
        inside ^= crosses & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
    return inside


def _star(x: Array, y: Array) -> Array:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    points = [
        (float(r * np.cos(a)), float(r * np.sin(a))) for a, r in zip(angles, radii, strict=True)
    ]
    return _polygon(x, y, *points)


def _moon(x: Array, y: Array) -> Array:
    return _disc(x, y, -0.05, 0, 0.95) & ~_disc(x, y, 0.42, -0.1, 0.8)


def _house(x: Array, y: Array) -> Array:
    walls = _box(x, y, -0.7, -0.1, 0.7, 0.95) & ~_box(x, y, -0.22, 0.35, 0.22, 0.95)
    return walls | _polygon(x, y, (-1.0, -0.05), (0.0, -1.0), (1.0, -0.05))


def _tree(x: Array, y: Array) -> Array:
    crown = _polygon(x, y, (0.0, -1.0), (0.5, -0.3), (-0.5, -0.3))
    skirt = _polygon(x, y, (0.0, -0.7), (0.85, 0.5), (-0.85, 0.5))
    return crown | skirt | _box(x, y, -0.15, 0.5, 0.15, 1.0)


def _fish(x: Array, y: Array) -> Array:
    body = ((x + 0.25) / 0.72) ** 2 + (y / 0.5) ** 2 <= 1
    tail = _polygon(x, y, (0.3, 0.0), (1.0, -0.6), (1.0, 0.6))
    return (body | tail) & ~_disc(x, y, -0.6, -0.12, 0.12)


def _key(x: Array, y: Array) -> Array:
    head = _disc(x, y, -0.5, -0.05, 0.48) & ~_disc(x, y, -0.5, -0.05, 0.22)
    bit = _box(x, y, 0.45, 0.0, 0.62, 0.5) | _box(x, y, 0.82, 0.0, 1.0, 0.5)
    return head | _box(x, y, -0.1, -0.15, 1.0, 0.08) | bit


def _cup(x: Array, y: Array) -> Array:
    body = _polygon(x, y, (-0.9, -0.6), (0.4, -0.6), (0.25, 0.8), (-0.75, 0.8))
    handle = _disc(x, y, 0.45, 0.0, 0.5) & ~_disc(x, y, 0.45, 0.0, 0.27)
    return body | (handle & (x > 0.3))


def _boat(x: Array, y: Array) -> Array:
    hull = _polygon(x, y, (-1.0, 0.4), (1.0, 0.4), (0.6, 0.95), (-0.6, 0.95))
    sail = _polygon(x, y, (0.0, -1.0), (0.8, 0.2), (0.0, 0.2))
    return hull | sail | _box(x, y, -0.12, -1.0, 0.02, 0.5)


def _flag(x: Array, y: Array) -> Array:
    return _box(x, y, -0.8, -1.0, -0.6, 1.0) | _box(x, y, -0.6, -0.95, 0.85, -0.05)


def _heart(x: Array, y: Array) -> Array:
    lobes = _disc(x, y, -0.45, -0.35, 0.5) | _disc(x, y, 0.45, -0.35, 0.5)
    return lobes | _polygon(x, y, (-0.9, -0.15), (0.9, -0.15), (0.0, 0.95))


def _arrow(x: Array, y: Array) -> Array:
    return _box(x, y, -1.0, -0.2, 0.2, 0.2) | _polygon(x, y, (0.1, -0.75), (1.0, 0.0), (0.1, 0.75))


def _ring(x: Array, y: Array) -> Array:
    return _disc(x, y, 0, 0, 0.95) & ~_disc(x, y, 0, 0, 0.6)


def _cross(x: Array, y: Array) -> Array:
    return (np.abs(x - y) <= 0.4) & (np.abs(x + y) <= 1.7) | (np.abs(x + y) <= 0.4) & (
        np.abs(x - y) <= 1.7
    )


def _anchor(x: Array, y: Array) -> Array:
    arc = _disc(x, y, 0, 0.1, 0.9) & ~_disc(x, y, 0, 0.0, 0.68) & (y > 0.15)
    eye = _disc(x, y, 0, -0.75, 0.25) & ~_disc(x, y, 0, -0.75, 0.1)
    return arc | eye | _box(x, y, -0.13, -0.55, 0.13, 0.95) | _box(x, y, -0.5, -0.4, 0.5, -0.2)


def _bolt(x: Array, y: Array) -> Array:
    return _polygon(
        x, y, (0.15, -1.0), (-0.6, 0.15), (-0.08, 0.15), (-0.3, 1.0), (0.6, -0.25), (0.08, -0.25),
        (0.55, -1.0),
    )  # fmt: skip


def _ladder(x: Array, y: Array) -> Array:
    rails = _box(x, y, -0.65, -1.0, -0.42, 1.0) | _box(x, y, 0.42, -1.0, 0.65, 1.0)
    rungs = np.zeros(x.shape, dtype=bool)
    for middle in (-0.66, 0.0, 0.66):
        rungs |= _box(x, y, -0.5, middle - 0.11, 0.5, middle + 0.11)
    return rails | rungs


ICONS: dict[str, Callable[[Array, Array], Array]] = {
    "anchor": _anchor,
    "arrow": _arrow,
    "boat": _boat,
    "bolt": _bolt,
    "cross": _cross,
    "cup": _cup,
    "fish": _fish,
    "flag": _flag,
    "heart": _heart,
    "house": _house,
    "key": _key,
    "ladder": _ladder,
    "moon": _moon,
    "ring": _ring,
    "star": _star,
    "tree": _tree,
}


@cache
def icon_masks() -> dict[str, Array]:
    """Word -> float32 mask [CELLS CELLS] of values 0..1."""
    count = CELLS * SAMPLES
    axis = ((np.arange(count) + 0.5) / count * 2 - 1) * 1.02
    x, y = np.meshgrid(axis, axis)
    masks = {}
    for word, shape in ICONS.items():
        samples = shape(x, y).reshape(CELLS, SAMPLES, CELLS, SAMPLES)
        masks[word] = samples.mean(axis=(1, 3)).astype(np.float32)
    return masks
