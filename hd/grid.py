"""What the model is shown of an image: the configuration, its presets, and the choice of a grid.

All of it is integer geometry in (height, width) order; `plan.py` works the rest out. Formulas are
those of LLaVA-1.6 and transformers (`select_best_resolution`), float evaluation included: it
decides between grids for some sizes, so the brackets below must stay as they are.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from .errors import UsageError

GlobalView = Literal["squash", "pad", "none"]
Keep = Literal["llava_next", "touched", "all"]
PadColour = Literal["black", "mean"]

# floor(255 * mean of CLIP): the colour that LLaVA-1.5 pads a square with.
RGB: dict[str, tuple[int, int, int]] = {"black": (0, 0, 0), "mean": (122, 116, 104)}


@dataclass(frozen=True)
class HDConfig:
    """How an image becomes tiles, and which of their features become visual tokens.

    tile_px: side of a tile, the tower's input; patch_px: side of a patch, one feature each.
    grids: the allowed (rows, cols) of tiles; empty means no grid, the global view alone.
    global_view: tile 0. "squash" resizes the image to the tile, "pad" letterboxes it to a square
        in the pad colour first, "none" leaves it out.
    keep: which cells of the merged map become tokens. "llava_next" rounds as transformers does,
        "touched" drops a cell only if it is padding entirely, "all" keeps every cell.
    row_end: one learned token after each kept map row; without a grid there is one, at the end.
    pad_colour: "black", or the mean colour of CLIP's training images.
    max_visual_tokens: only grids that give an image at most so many tokens (`plan_image` raises
        TooManyTokens for an image that none fits); None is no limit.

    Raises UsageError when the fields do not fit together.
    """

    tile_px: int = 224
    patch_px: int = 14
    grids: tuple[tuple[int, int], ...] = ((2, 2),)
    global_view: GlobalView = "squash"
    keep: Keep = "llava_next"
    row_end: bool = True
    pad_colour: PadColour = "black"
    max_visual_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("tile_px", "patch_px", "max_visual_tokens"):
            unlimited = name == "max_visual_tokens" and self.max_visual_tokens is None
            if not unlimited and not is_count(getattr(self, name)):
                raise UsageError(
                    f"hd.{name} must be a whole number from 1, not {_show(self, name)}"
                )
        if self.tile_px % self.patch_px:
            raise UsageError(
                f"hd.tile_px {self.tile_px} is not a multiple of hd.patch_px {self.patch_px}; "
                "a tile is cut into whole patches"
            )
        object.__setattr__(self, "grids", _checked_grids(self.grids))
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise UsageError(f"hd.{name} {value!r} is unknown; {suggest(str(value), choices)}")
        if not isinstance(self.row_end, bool):
            raise UsageError(f"hd.row_end must be true or false, not {_show(self, 'row_end')}")
        if self.global_view == "none" and not self.grids:
            raise UsageError(
                "hd.global_view is none and hd.grids is empty, so the model would see nothing; "
                "allow a grid or choose the global view squash or pad"
            )

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a tile (16 for 224/14)."""
        return self.tile_px // self.patch_px

    @property
    def patches_per_tile(self) -> int:
        """Features of one tile, `P` in the shapes (256 for 224/14)."""
        return self.patches_per_side**2

    @property
    def pad_rgb(self) -> tuple[int, int, int]:
        """The padding colour in 8-bit RGB, before normalisation."""
        return RGB[self.pad_colour]

    def reads_like(self, other: HDConfig) -> bool:
        """Whether a model of the one geometry takes the tokens of the other: all is alike but
        which grids an image may have."""
        return all(
            getattr(self, name) == getattr(other, name)
            for name in ("tile_px", "patch_px", *CHOICES, "row_end")
        ) and bool(self.grids) == bool(other.grids)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values; `from_dict` reads them back. Without a limit of tokens
        there is no word of it, as in folders written before there was one."""
        values = {**asdict(self), "grids": [list(grid) for grid in self.grids]}
        if self.max_visual_tokens is None:
            del values["max_visual_tokens"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HDConfig:
        """The configuration written by `to_dict`; all keys but max_visual_tokens are required, no
        other is allowed.

        Raises UsageError naming the unknown or missing key.
        """
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise UsageError(f"hd.{key} is not a setting; {suggest(str(key), known)}")
        missing = [name for name in known if name not in (*values, "max_visual_tokens")]
        if missing:
            raise UsageError(f"hd.{missing[0]} is missing; a written configuration has every field")
        return cls(**values)


CHOICES: dict[str, tuple[str, ...]] = {
    "global_view": get_args(GlobalView),
    "keep": get_args(Keep),
    "pad_colour": get_args(PadColour),
}


def is_count(value: object) -> bool:
    """Whether a value is a whole number from 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _show(config: HDConfig, name: str) -> str:
    return repr(getattr(config, name))


def _checked_grids(grids: object) -> tuple[tuple[int, int], ...]:
    """`grids` (lists from JSON or YAML too) as tuples; raises UsageError."""
    if not isinstance(grids, (tuple, list)):
        raise UsageError(f"hd.grids must be a list of (rows, cols), not {grids!r}")
    checked = []
    for grid in grids:
        if not isinstance(grid, (tuple, list)) or len(grid) != 2 or not all(map(is_count, grid)):
            raise UsageError(f"hd.grids: {grid!r} is not (rows, cols) of at least 1 tile each")
        checked.append((grid[0], grid[1]))
    if len(set(checked)) != len(checked):
        raise UsageError(f"hd.grids names a grid twice: {checked}")
    return tuple(checked)


def suggest(word: str, known: Collection[str]) -> str:
    """The remedy for an unknown name: the nearest known one, or all of them."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"there is {', '.join(known)}"


def grids_up_to(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (rows, cols) of at most so many tiles: rows, then columns, then the others."""
    counts = range(1, max_tiles + 1)
    return (
        *((1, cols) for cols in counts),
        *((rows, 1) for rows in counts[1:]),
        *((r, c) for r in counts[1:] for c in range(2, max_tiles // r + 1)),
    )


# The paper's shapes: up to six tiles in a row or a column, and 2x2, 2x3, 3x2.
FLEXIBLE_GRIDS = grids_up_to(6)

PRESETS: dict[str, HDConfig] = {
    "hd448": HDConfig(),
    "hdflex": HDConfig(grids=FLEXIBLE_GRIDS),
    "hd448-paper": HDConfig(global_view="pad", keep="touched", pad_colour="mean"),
    "hdflex-paper": HDConfig(
        grids=FLEXIBLE_GRIDS, global_view="pad", keep="touched", pad_colour="mean"
    ),
    "base336": HDConfig(
        tile_px=336, grids=(), global_view="pad", keep="all", row_end=False, pad_colour="mean"
    ),
    "base224": HDConfig(
        tile_px=224, grids=(), global_view="pad", keep="all", row_end=False, pad_colour="mean"
    ),
}


def get_preset(name: str) -> HDConfig:
    """The preset called `name`; raises UsageError with the nearest name."""
    if name not in PRESETS:
        raise UsageError(f"preset {name!r} is unknown; {suggest(name, PRESETS)}")
    return PRESETS[name]


def select_grid(size: tuple[int, int], config: HDConfig) -> tuple[int, int] | None:
    """The allowed grid (rows, cols) that keeps most detail of an image of `size` (height, width).

    The largest effective resolution wins, then the least waste, then the first listed; None
    without grids. The same choice as transformers' `select_best_resolution` (floats included).
    """
    height, width = size
    best, best_effective, best_waste = None, -1, 0
    for rows, cols in config.grids:
        canvas_height, canvas_width = rows * config.tile_px, cols * config.tile_px
        scale = min(canvas_width / width, canvas_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        waste = canvas_height * canvas_width - effective
        if effective > best_effective or (effective == best_effective and waste < best_waste):
            best, best_effective, best_waste = (rows, cols), effective, waste
    return best
