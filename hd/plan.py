"""The geometry of one image, worked out once: `plan_image(size, config) -> TilePlan`.

Tiler, prompt, packer, model and preview read the plan and compute nothing themselves. Formulas
are transformers' (`get_patch_output_size`, `unpad_image`), evaluated in float64 exactly as
bracketed there; the one deviation is written at `_kept_span`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from .errors import DataError
from .grid import HDConfig, select_grid


class TooManyTokens(DataError):
    """An image that no allowed grid brings within max_visual_tokens; the message says how many
    would do."""


@dataclass(frozen=True)
class TilePlan:
    """Where an image lies on its canvas and which cells of its map become tokens.

    All sizes are (height, width). Without a grid, everything from `grid` to `kept_cols` is zero.

    image_size: the image, in pixels.
    grid: (rows, cols) of tiles; canvas_size: the same in pixels.
    resized_size: the image on the canvas, in pixels; offset: its (top, left) corner there.
    kept_rows, kept_cols: half-open spans (first, last) of map patches that become tokens.
    """

    config: HDConfig
    image_size: tuple[int, int]
    grid: tuple[int, int]
    canvas_size: tuple[int, int]
    resized_size: tuple[int, int]
    offset: tuple[int, int]
    kept_rows: tuple[int, int]
    kept_cols: tuple[int, int]

    @property
    def has_global_view(self) -> bool:
        """Whether tile 0 is the global view."""
        return self.config.global_view != "none"

    @property
    def letterbox(self) -> tuple[int, int, int]:
        """(side, top, left) in pixels: the square of the padded global view, the image in it."""
        height, width = self.image_size
        side = max(height, width)
        return side, (side - height) // 2, (side - width) // 2

    @property
    def map_size(self) -> tuple[int, int]:
        """(rows, cols) of the merged map in patches, before any cell is dropped."""
        side = self.config.patches_per_side
        return self.grid[0] * side, self.grid[1] * side

    @property
    def kept_size(self) -> tuple[int, int]:
        """(rows, cols) of the map that become tokens."""
        return self.kept_rows[1] - self.kept_rows[0], self.kept_cols[1] - self.kept_cols[0]

    @property
    def num_tiles(self) -> int:
        """Tiles to encode, global view included."""
        return self.grid[0] * self.grid[1] + self.has_global_view

    @property
    def num_tokens(self) -> int:
        """Visual tokens of the image: global view, kept map cells, row-ends."""
        return self.num_global_tokens + self.num_map_tokens

    @property
    def num_global_tokens(self) -> int:
        """Tokens of the global view (it has no row-ends)."""
        return self.config.patches_per_tile if self.has_global_view else 0

    @property
    def num_row_ends(self) -> int:
        """Row-end tokens: one after each kept map row; one in all when there is no grid."""
        if not self.config.row_end:
            return 0
        return self.kept_size[0] if self.config.grids else 1

    @property
    def num_map_tokens(self) -> int:
        """Tokens of the map, row-ends included; the global view is all the rest."""
        return self.kept_size[0] * self.kept_size[1] + self.num_row_ends


def plan_image(size: tuple[int, int], config: HDConfig) -> TilePlan:
    """The plan of an image of `size` (height, width): on the grid that keeps most detail, of those
    within the configuration's limit of tokens.

    Raises ValueError for a size below 1x1, TooManyTokens where no allowed grid is within it.
    """
    height, width = size
    return _plan(int(height), int(width), config)


@lru_cache(maxsize=16384)
def _plan(height: int, width: int, config: HDConfig) -> TilePlan:
    if height < 1 or width < 1:
        raise ValueError(f"an image of {height}x{width} pixels cannot be planned")
    if config.max_visual_tokens is None:
        return _on_grid((height, width), config, select_grid((height, width), config))
    return _within(height, width, config, config.max_visual_tokens)


def _within(height: int, width: int, config: HDConfig, limit: int) -> TilePlan:
    """The plan on the best grid of those that give at most `limit` tokens."""
    size = (height, width)
    plans = {grid: _on_grid(size, config, grid) for grid in config.grids or (None,)}
    fitting = [plan for plan in plans.values() if plan.num_tokens <= limit]
    if not fitting:
        least = min(plans.values(), key=lambda plan: plan.num_tokens)
        where = f" (grid {least.grid[0]}x{least.grid[1]})" if config.grids else ""
        smaller = ", or allow smaller grids (max_tiles)" if math.prod(least.grid) > 1 else ""
        raise TooManyTokens(
            f"an image of {height}x{width} px needs at least {least.num_tokens} visual tokens"
            f"{where}, more than max_visual_tokens {limit}; raise it to {least.num_tokens}{smaller}"
        )
    if not config.grids:
        return fitting[0]
    chosen = select_grid(size, replace(config, grids=tuple(plan.grid for plan in fitting)))
    return plans[chosen]


def _on_grid(size: tuple[int, int], config: HDConfig, grid: tuple[int, int] | None) -> TilePlan:
    rows, cols = grid or (0, 0)
    canvas = (rows * config.tile_px, cols * config.tile_px)
    resized = _fit(size, canvas) if grid else (0, 0)
    offset = ((canvas[0] - resized[0]) // 2, (canvas[1] - resized[1]) // 2)
    kept_rows, kept_cols = _kept(size, canvas, resized, offset, config)
    return TilePlan(
        config=config,
        image_size=size,
        grid=(rows, cols),
        canvas_size=canvas,
        resized_size=resized,
        offset=offset,
        kept_rows=kept_rows,
        kept_cols=kept_cols,
    )


def _fit(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """The size of the image when it touches two sides of the canvas, aspect ratio kept."""
    (height, width), (canvas_height, canvas_width) = size, canvas
    scale_width, scale_height = canvas_width / width, canvas_height / height
    if scale_width < scale_height:
        return min(math.ceil(height * scale_width), canvas_height), canvas_width
    return canvas_height, min(math.ceil(width * scale_height), canvas_width)


def _kept(
    size: tuple[int, int],
    canvas: tuple[int, int],
    resized: tuple[int, int],
    offset: tuple[int, int],
    config: HDConfig,
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The kept spans (rows, cols) of the map."""
    map_rows, map_cols = canvas[0] // config.patch_px, canvas[1] // config.patch_px
    if config.keep == "all" or not map_rows:
        return (0, map_rows), (0, map_cols)
    touched_rows = _touched(offset[0], resized[0], config.patch_px)
    touched_cols = _touched(offset[1], resized[1], config.patch_px)
    if config.keep == "touched":
        return touched_rows, touched_cols
    height, width = size
    if width / height > map_cols / map_rows:
        return _kept_span(map_rows, height * (map_cols / width), touched_rows), (0, map_cols)
    return (0, map_rows), _kept_span(map_cols, width * (map_rows / height), touched_cols)


def _touched(start_px: int, length_px: int, patch_px: int) -> tuple[int, int]:
    """The cells along one axis that hold at least one real pixel."""
    return start_px // patch_px, -(-(start_px + length_px) // patch_px)


def _kept_span(cells: int, real_cells: float, touched: tuple[int, int]) -> tuple[int, int]:
    """Transformers' symmetric cut of one axis, down to `real_cells` rounded (one more if odd).

    Where that keeps nothing (an image thinner than about the map's side to one) the touched cells
    stay: our one deviation, so that no image loses its whole map.
    """
    cut = (cells - int(round(real_cells, 7))) // 2
    return (cut, cells - cut) if cut < cells - cut else touched
