"""Image and plan -> uint8 tiles, and their normalisation for CLIP.

Bit for bit what transformers' PIL processors make: LlavaNext for the squashed view and the grid,
Llava with `do_pad=True` for the padded view.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange

from .image import from_array, image_size, resize, to_array
from .plan import TilePlan

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Rows of a letterboxed image that are resized at a time: bounds the memory for thin images.
STRIP_PIXELS = 1 << 24


def tile_image(image: Image, plan: TilePlan) -> torch.Tensor:
    """uint8 `[num_tiles 3 tile_px tile_px]`; tile 0 is the global view when there is one.

    `image` is RGB and of `plan.image_size`; raises ValueError otherwise.
    """
    if image_size(image) != plan.image_size or image.mode != "RGB":
        raise ValueError(
            f"the plan is for an RGB image of {plan.image_size}, "
            f"this one is {image.mode} of {image_size(image)}"
        )
    parts = []
    if plan.has_global_view:
        parts.append(rearrange(global_view(image, plan), "y x c -> 1 c y x"))
    if plan.config.grids:
        pattern = "(r y) (s x) c -> (r s) c y x"
        rows, cols = plan.grid
        parts.append(rearrange(canvas(image, plan), pattern, r=rows, s=cols))
    return torch.from_numpy(np.concatenate(parts))


def canvas(image: Image, plan: TilePlan) -> np.ndarray:
    """uint8 `[canvas_height canvas_width 3]`: the resized image on its padding."""
    pixels = _filled(plan.canvas_size, plan)
    (top, left), (height, width) = plan.offset, plan.resized_size
    pixels[top : top + height, left : left + width] = to_array(resize(image, plan.resized_size))
    return pixels


def global_view(image: Image, plan: TilePlan) -> np.ndarray:
    """uint8 `[tile_px tile_px 3]`: the whole image squashed, or letterboxed and then resized."""
    tile_px = plan.config.tile_px
    if plan.config.global_view == "squash":
        return to_array(resize(image, (tile_px, tile_px)))
    return _letterboxed(image, plan)


def _letterboxed(image: Image, plan: TilePlan) -> np.ndarray:
    """Pad to a square, then resize to the tile; equal to doing just that, in bounded memory.

    PIL resizes rows first and columns second, each row alone; so padding and resizing the rows
    strip by strip gives the same bytes without ever holding the square (a 1x60000 image would
    need 10 GB).
    """
    tile_px = plan.config.tile_px
    height, width = plan.image_size
    side, top, left = plan.letterbox
    narrow = _filled((side, tile_px), plan)
    step = max(1, STRIP_PIXELS // side)
    pixels = to_array(image)
    for first in range(0, height, step):
        strip = _filled((min(step, height - first), side), plan)
        strip[:, left : left + width] = pixels[first : first + step]
        resized = to_array(resize(from_array(strip), (len(strip), tile_px)))
        narrow[top + first : top + first + len(strip)] = resized
    return to_array(resize(from_array(narrow), (tile_px, tile_px)))


def _filled(size: tuple[int, int], plan: TilePlan) -> np.ndarray:
    """uint8 `[height width 3]` of the pad colour."""
    return np.full((*size, 3), plan.config.pad_rgb, dtype=np.uint8)


def normalise(tiles: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 `[n 3 t t]` -> `[n 3 t t]` of `dtype`: x / 255, then CLIP's mean and deviation.

    Computed in fp32 on the device of `tiles` and rounded once.
    """
    mean = rearrange(torch.tensor(CLIP_MEAN, device=tiles.device), "c -> c 1 1")
    std = rearrange(torch.tensor(CLIP_STD, device=tiles.device), "c -> c 1 1")
    return ((tiles.to(torch.float32) / 255 - mean) / std).to(dtype)
