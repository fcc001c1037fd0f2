"""The gather table of an image: which feature row, or a row-end, stands at each visual token."""

from __future__ import annotations

import numpy as np
from einops import rearrange

from .plan import TilePlan

ROW_END = -2  # in the place of a feature row: the learned row-end token


def visual_source(plan: TilePlan) -> np.ndarray:
    """int64 `[num_tokens]`: for each visual token its feature row, or ROW_END.

    Feature rows are counted tile by tile in the order of `tile_image` (global view first), row by
    row inside a tile: row = tile * P + patch. Tokens: the global view, then the map row by row,
    each row followed by its row-end. Without a grid, a row-end (if any) stands once at the end.
    """
    parts = [np.arange(plan.num_global_tokens, dtype=np.int64)]
    if plan.config.grids:
        parts.append(_map_source(plan).reshape(-1))
    elif plan.config.row_end:
        parts.append(np.array([ROW_END], dtype=np.int64))
    return np.concatenate(parts)


def _map_source(plan: TilePlan) -> np.ndarray:
    """int64 `[kept rows, kept cols (+ 1)]`: the kept map with its column of row-ends."""
    rows, cols = plan.grid
    side = plan.config.patches_per_side
    features = plan.num_global_tokens + np.arange(rows * cols * side * side, dtype=np.int64)
    merged = merge_tiles(features, plan.grid, side)
    kept = merged[slice(*plan.kept_rows), slice(*plan.kept_cols)]
    if not plan.config.row_end:
        return kept
    return np.pad(kept, ((0, 0), (0, 1)), constant_values=ROW_END)


def merge_tiles(features: np.ndarray, grid: tuple[int, int], side: int) -> np.ndarray:
    """Tile-major `[r * c * i * j, ...]` -> the map `[r * i, c * j, ...]`.

    Tiles and the patches inside a tile are row-major, as the tiler cuts them.
    """
    pattern = "(r c i j) ... -> (r i) (c j) ..."
    return rearrange(features, pattern, r=grid[0], c=grid[1], i=side, j=side)
