"""hd/resample.py: the bytes of Pillow's own resize, whatever the sizes."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from llava_hd.hd import tiler
from llava_hd.hd.errors import UsageError
from llava_hd.hd.grid import PRESETS
from llava_hd.hd.plan import plan_image
from llava_hd.hd.resample import resize_pixels
from llava_hd.hd.tiler import find_resizer, pillow_resizer, tile_image


def pillows(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def drawn(count: int):
    """Sizes before and after: everyday ones, thin ones, equal sides."""
    draw = random.Random(3)
    for number in range(count):
        if number % 4 == 0:
            old = int(2 ** draw.uniform(0, 5)), int(2 ** draw.uniform(0, 11))
        elif number % 4 == 1:
            old = int(2 ** draw.uniform(0, 9)), int(2 ** draw.uniform(2.4, 5))
        else:
            old = draw.randint(1, 700), draw.randint(1, 700)
        new = draw.randint(1, 500), draw.randint(1, 500)
        if number % 7 == 0:
            new = (old[0], new[1]) if number % 2 else (new[0], old[1])
        yield old, new


def test_the_bytes_are_pillows():
    made = np.random.default_rng(0)
    for number, (old, new) in enumerate(drawn(150)):
        pixels = made.integers(0, 256, (*old, 3), dtype=np.uint8)
        if number % 3 == 0:
            pixels = (pixels > 127).astype(np.uint8) * 255  # overshoots, so clamping shows
        assert np.array_equal(resize_pixels(pixels, new), pillows(pixels, new)), (old, new)


def test_pixels_that_may_not_be_written_or_lie_apart_are_taken():
    pixels = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    pixels.flags.writeable = False
    assert np.array_equal(resize_pixels(pixels, (20, 90)), pillows(pixels, (20, 90)))
    apart = pixels[::2, ::-1]
    expected = pillows(np.ascontiguousarray(apart), (33, 31))
    assert np.array_equal(resize_pixels(apart, (33, 31)), expected)
    assert np.array_equal(resize_pixels(pixels, (40, 60)), pixels)


def test_other_shapes_and_types_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        resize_pixels(np.zeros((4, 4, 4), dtype=np.uint8), (2, 2))
    with pytest.raises(ValueError, match="float64"):
        resize_pixels(np.zeros((4, 4, 3)), (2, 2))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_tiles_are_the_same(preset):
    resizer, words = find_resizer("numba")
    assert words == "compiled loops"
    for size in [(480, 640), (640, 427), (90, 700), (1, 1), (224, 224), (900, 3)]:
        pixels = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
        image, plan = Image.fromarray(pixels), plan_image(size, PRESETS[preset])
        assert torch.equal(tile_image(image, plan, resizer), tile_image(image, plan))


def test_a_pillow_that_resizes_otherwise_is_followed(monkeypatch):
    shifted = lambda image, size: np.roll(np.asarray(image.resize(size[::-1])), 1)  # noqa: E731
    monkeypatch.setattr(tiler, "pillow_resizer", shifted)
    resizer, words = find_resizer("auto")
    assert resizer is shifted and "other bytes" in words
    with pytest.raises(UsageError, match="other bytes"):
        find_resizer("numba")


def test_without_numba_pillow_resizes_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "llava_hd.hd.resample", None)
    resizer, words = find_resizer("auto")
    assert resizer is pillow_resizer and "numba is not installed" in words
    with pytest.raises(UsageError, match="resizing by numba: numba is not installed"):
        find_resizer("numba")
    assert tiler.find_resizer("pillow") == (pillow_resizer, "Pillow")


class TooNew:
    """Finds our loops and fails in them as numba does beside a numpy that it does not know."""

    def find_spec(self, name, path=None, target=None):
        if name == "llava_hd.hd.resample":
            raise ImportError("Numba needs NumPy 2.3 or less")


def test_numba_that_cannot_be_loaded_is_not_said_to_be_missing(monkeypatch):
    monkeypatch.delitem(sys.modules, "llava_hd.hd.resample")
    monkeypatch.delattr("llava_hd.hd.resample")
    monkeypatch.setattr(sys, "meta_path", [TooNew(), *sys.meta_path])
    resizer, words = find_resizer("auto")
    assert resizer is pillow_resizer
    assert "numba cannot be loaded (Numba needs NumPy 2.3 or less)" in words
