"""Image and plan -> uint8 tiles, and their normalisation for CLIP.

Bit for bit what transformers' PIL processors make: LlavaNext for the squashed view and the grid,
Llava with `do_pad=True` for the padded view.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from einops import rearrange

from .errors import UsageError
from .image import from_array, image_size, padded_rows, resize, to_array
from .plan import TilePlan

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Rows of a letterboxed image that are resized at a time: bounds the memory for thin images.
STRIP_PIXELS = 1 << 24
TALL = 10  # times as high as wide, above which Pillow resizes in any case


# RGB image and (height, width) -> uint8 `[height width 3]`, bicubic with antialiasing.
Resizer = Callable[["Image", tuple[int, int]], np.ndarray]
Resizing = Literal["auto", "pillow", "numba"]


def pillow_resizer(image: Image, size: tuple[int, int]) -> np.ndarray:
    """Pillow's own resize."""
    return to_array(resize(image, size))


def find_resizer(kind: Resizing) -> tuple[Resizer, str]:
    """What resizes, and its name in words; all give the same bytes. auto: the compiled one
    (hd/resample.py) where numba is. Raises UsageError for numba where it is not."""
    if kind == "pillow":
        return pillow_resizer, "Pillow"
    try:
        from .resample import resize_pixels  # compiles, and numba is optional
    except ModuleNotFoundError:
        reason = "numba is not installed (pip install 'llava-hd[fast]')"
    except ImportError as error:  # such as a numpy that is too new for it
        reason = f"numba cannot be loaded ({str(error).splitlines()[0]})"
    except RuntimeError as error:  # nowhere to keep what is compiled
        reason = f"numba cannot be used ({str(error).splitlines()[0]}; set NUMBA_CACHE_DIR)"
    else:

        def compiled(image: Image, size: tuple[int, int]) -> np.ndarray:
            # Pillow 12.3 takes the columns of very tall images first, which rounds differently.
            tall = image.height > TALL * image.width
            return pillow_resizer(image, size) if tall else resize_pixels(to_array(image), size)

        if _like_pillow(compiled):
            return compiled, "compiled loops"
        reason = "this version of Pillow resizes to other bytes than the compiled loops"
    if kind == "numba":
        raise UsageError(
            f"resizing by numba: {reason}; the slower way without it is data.resizing pillow"
        )
    return pillow_resizer, f"Pillow, the slower way: {reason}"


def _like_pillow(resizer: Resizer) -> bool:
    """Whether noise of some shapes comes out as from the Pillow that is installed: a later one may
    round in another order."""
    made = np.random.default_rng(0)
    shapes = (((97, 64), (40, 50)), ((TALL * 40, 40), (60, 30)), ((60, 200), (90, 31)))
    for old, new in shapes:
        image = from_array(made.integers(0, 256, (*old, 3), dtype=np.uint8))
        if not np.array_equal(resizer(image, new), pillow_resizer(image, new)):
            return False
    return True


def tile_image(image: Image, plan: TilePlan, resizer: Resizer = pillow_resizer) -> torch.Tensor:
    """uint8 `[num_tiles 3 tile_px tile_px]`; tile 0 is the global view when there is one.

    `image` is RGB and of `plan.image_size`; raises ValueError otherwise.
    """
    if image_size(image) != plan.image_size or image.mode != "RGB":
        raise ValueError(
            f"the plan is for an RGB image of {plan.image_size}, "
            f"this one is {image.mode} of {image_size(image)}"
        )
    rows, cols = plan.grid if plan.config.grids else (0, 0)
    first, tile_px = int(plan.has_global_view), plan.config.tile_px
    # Every pixel goes straight to its place: joining turned views costs as much as resizing.
    tiles = np.empty((first + rows * cols, 3, tile_px, tile_px), dtype=np.uint8)
    if first:
        tiles[0] = rearrange(global_view(image, plan, resizer), "y x c -> c y x")
    if rows:
        of_grid = rearrange(tiles[first:], "(r s) c y x -> r s c y x", r=rows)
        pattern = "(r y) (s x) c -> r s c y x"
        of_grid[:] = rearrange(canvas(image, plan, resizer), pattern, r=rows, s=cols)
    return torch.from_numpy(tiles)


def canvas(image: Image, plan: TilePlan, resizer: Resizer = pillow_resizer) -> np.ndarray:
    """uint8 `[canvas_height canvas_width 3]`: the resized image on its padding."""
    pixels = _filled(plan.canvas_size, plan)
    (top, left), (height, width) = plan.offset, plan.resized_size
    pixels[top : top + height, left : left + width] = resizer(image, plan.resized_size)
    return pixels


def global_view(image: Image, plan: TilePlan, resizer: Resizer = pillow_resizer) -> np.ndarray:
    """uint8 `[tile_px tile_px 3]`: the whole image squashed, or letterboxed and then resized."""
    tile_px = plan.config.tile_px
    if plan.config.global_view == "squash":
        return resizer(image, (tile_px, tile_px))
    return _letterboxed(image, plan, resizer)


def _letterboxed(image: Image, plan: TilePlan, resizer: Resizer) -> np.ndarray:
    """Pad to a square, then resize to the tile; equal to doing just that, in bounded memory.

    PIL resizes rows first and columns second, each row alone; so padding and resizing the rows
    strip by strip gives the same bytes without ever holding the square (a 1x60000 image would
    need 10 GB).
    """
    tile_px = plan.config.tile_px
    height = plan.image_size[0]
    side, top, left = plan.letterbox
    narrow = _filled((side, tile_px), plan)
    step = max(1, STRIP_PIXELS // side)
    for first in range(0, height, step):
        last = min(first + step, height)
        strip = padded_rows(image, (first, last), (left, side), plan.config.pad_rgb)
        narrow[top + first : top + last] = resizer(strip, (last - first, tile_px))
    return resizer(from_array(narrow), (tile_px, tile_px))


def _filled(size: tuple[int, int], plan: TilePlan) -> np.ndarray:
    """uint8 `[height width 3]` of the pad colour."""
    rgb = plan.config.pad_rgb
    # One number is written many times faster than three in turn.
    return np.full((*size, 3), rgb[0] if len(set(rgb)) == 1 else rgb, dtype=np.uint8)


def normalise(tiles: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 `[n 3 t t]` -> `[n 3 t t]` of `dtype`: x / 255, then CLIP's mean and deviation.

    Computed in fp32 on the device of `tiles` and rounded once.
    """
    mean = rearrange(torch.tensor(CLIP_MEAN, device=tiles.device), "c -> c 1 1")
    std = rearrange(torch.tensor(CLIP_STD, device=tiles.device), "c -> c 1 1")
    return ((tiles.to(torch.float32) / 255 - mean) / std).to(dtype)
