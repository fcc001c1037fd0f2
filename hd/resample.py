"""Pillow's bicubic resize once more, as compiled loops that a processor's vector units can run.

The same integers as Pillow's own (ImagingResample of its 8-bit images: rows first, columns second;
coefficients in double precision, rounded to 22 bits; sums in 32 bits, rounded and clamped after
each of the two passes), so the same bytes: the tests compare them on noise of random sizes. Pillow
multiplies one value at a time; here one coefficient meets a whole row. The one door to numba, which
is optional (`pip install 'llava-hd[fast]'`).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numba import njit, types

PRECISION = 22  # bits of a coefficient: 32 less 8 of a pixel less 2 for what overshoots
SUPPORT = 2.0  # of the cubic, in pixels of the smaller of the two images
BLOCK = 32  # rows that are turned round together, so that they stay in the nearest cache

# Types are given, so that all is compiled (or read from numba's cache) when this is imported, and
# loader processes that are forked have it.
PIXELS = types.Array(types.uint8, 3, "C", readonly=True)
ROWS = types.Array(types.uint8, 2, "C", readonly=True)
INDICES, TAPS = types.int64[::1], types.int32[:, ::1]


def resize_pixels(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 `[height width 3]` at `size` (height, width): the bytes of Pillow's
    `Image.resize(..., BICUBIC)`, but for images above 100 times as high as wide, whose passes
    Pillow 12.3 takes the other way round. Raises ValueError for another shape or type."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"expected uint8 [height width 3], got {pixels.dtype} {pixels.shape}")
    (height, width), (new_height, new_width) = pixels.shape[:2], size
    made = np.ascontiguousarray(pixels)
    if new_width != width:
        made = _columns(made, *_coefficients(width, new_width))
    if new_height != height:
        rows = made.reshape(height, -1)
        made = _rows(rows, *_coefficients(height, new_height)).reshape(new_height, new_width, 3)
    return made


@lru_cache(maxsize=256)
def _coefficients(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `new` pixels: the first of the `old` ones that it is made of, int64 `[new]`, how
    many, int64 `[new]`, and their coefficients, int32 `[new most]`. The order of every operation
    is Pillow's (precompute_coeffs, normalize_coeffs_8bpc)."""
    scale = old / new
    wide = max(scale, 1.0)
    reach = SUPPORT * wide
    centre = (np.arange(new) + 0.5) * scale
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    count = np.minimum((centre + reach + 0.5).astype(np.int64), old) - first
    tap = np.arange(int(np.ceil(reach)) * 2 + 1)
    weight = _cubic((tap + first[:, None] - centre[:, None] + 0.5) * (1.0 / wide))
    weight[tap >= count[:, None]] = 0.0
    total = np.zeros(new)
    for column in weight.T:  # one after another, as Pillow adds them
        total += column
    weight = np.where(total[:, None] != 0.0, weight / total[:, None], weight)
    half = np.where(weight < 0, -0.5, 0.5)
    return first, count, (half + weight * (1 << PRECISION)).astype(np.int32)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic with a = -0.5."""
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


@njit(cache=True, nogil=True)
def _sum_rows(
    source: np.ndarray, first: int, count: int, taps: np.ndarray, sums: np.ndarray, out: np.ndarray
) -> None:
    """One row: the sum of `count` rows of `source` from `first` on, each times its coefficient.
    sums: int32, as long as a row, for what comes between."""
    for x in range(len(sums)):
        sums[x] = np.int32(1 << (PRECISION - 1))
    for tap in range(count):
        factor, row = taps[tap], source[first + tap]
        for x in range(len(sums)):
            sums[x] += factor * np.int32(row[x])
    for x in range(len(sums)):
        value = sums[x] >> PRECISION
        out[x] = np.uint8(min(max(value, 0), 255))


@njit(types.uint8[:, ::1](ROWS, INDICES, INDICES, TAPS), cache=True, nogil=True)
def _rows(source: np.ndarray, first: np.ndarray, count: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """The second pass: uint8 `[rows n]` -> `[new n]`."""
    out = np.empty((len(first), source.shape[1]), dtype=np.uint8)
    sums = np.empty(source.shape[1], dtype=np.int32)
    for row in range(len(first)):
        _sum_rows(source, first[row], count[row], taps[row], sums, out[row])
    return out


@njit(types.uint8[:, :, ::1](PIXELS, INDICES, INDICES, TAPS), cache=True, nogil=True)
def _columns(
    source: np.ndarray, first: np.ndarray, count: np.ndarray, taps: np.ndarray
) -> np.ndarray:
    """The first pass: uint8 `[height width 3]` -> `[height new 3]`, some rows at a time, turned so
    that their pixels of one column lie side by side."""
    height, width = source.shape[:2]
    out = np.empty((height, len(first), 3), dtype=np.uint8)
    turned = np.zeros((width, BLOCK * 3), dtype=np.uint8)
    made = np.empty(BLOCK * 3, dtype=np.uint8)
    sums = np.empty(BLOCK * 3, dtype=np.int32)
    for top in range(0, height, BLOCK):
        rows = min(BLOCK, height - top)
        for row in range(rows):
            for x in range(width):
                for colour in range(3):
                    turned[x, 3 * row + colour] = source[top + row, x, colour]
        for column in range(len(first)):
            _sum_rows(turned, first[column], count[column], taps[column], sums, made)
            for row in range(rows):
                for colour in range(3):
                    out[top + row, column, colour] = made[3 * row + colour]
    return out
