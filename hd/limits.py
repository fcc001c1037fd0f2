"""Flexible resolution in use: which grids an image may have, by three limits.

A model reads any grid: the map is only longer or shorter. So the set of grids that it was trained
on can be replaced, by a smaller one to save tokens, or by a larger one, which nobody trained it on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .errors import UsageError
from .grid import HDConfig, grids_up_to, is_count

MOST_TILES = 144  # of a grid; beyond that a limit is a mistake


@dataclass(frozen=True)
class ResolutionLimits:
    """None is no limit of its kind.

    max_tiles: all grids of at most so many tiles, instead of the configuration's own (the global
        view is not counted).
    max_visual_tokens: of each image; the best allowed grid within it is taken.
    grid: (rows, cols), this one alone, instead of the configuration's own.

    Raises UsageError for values that are no counts, and for grid beside max_tiles.
    """

    max_tiles: int | None = None
    max_visual_tokens: int | None = None
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("max_tiles", "max_visual_tokens"):
            value = getattr(self, name)
            if value is not None and not is_count(value):
                raise UsageError(f"{name} must be a whole number from 1, not {value!r}")
        if self.max_tiles is not None and self.max_tiles > MOST_TILES:
            raise UsageError(f"max_tiles {self.max_tiles} is too many; give at most {MOST_TILES}")
        if self.grid is None:
            return
        right = isinstance(self.grid, (tuple, list)) and len(self.grid) == 2
        if not right or not all(map(is_count, self.grid)):
            raise UsageError(f"grid must be rows and columns from 1, such as 2x3, not {self.grid}")
        rows, cols = self.grid
        if rows * cols > MOST_TILES:
            raise UsageError(f"grid {rows}x{cols} has too many tiles; at most {MOST_TILES}")
        if self.max_tiles is not None:
            raise UsageError(
                f"grid {rows}x{cols} allows no other, so max_tiles {self.max_tiles} has no place; "
                "leave one of them out"
            )
        object.__setattr__(self, "grid", (rows, cols))

    def __bool__(self) -> bool:
        """Whether anything is limited."""
        return self != NO_LIMITS


NO_LIMITS = ResolutionLimits()


def parse_grid(text: str) -> tuple[int, int]:
    """ "2x3" -> (2, 3), rows x columns. Raises UsageError."""
    found = re.fullmatch(r"(\d{1,4})[xX](\d{1,4})", text.strip(), re.ASCII)
    if found is None:
        raise UsageError(f"grid {text!r} is not ROWSxCOLS; give one such as 2x3")
    return int(found[1]), int(found[2])


def limited(config: HDConfig, limits: ResolutionLimits) -> HDConfig:
    """The geometry with other grids or another limit of tokens; `plan_image` does the rest.

    Raises UsageError for a limit of tiles where there are none (base336: one view).
    """
    for name in ("max_tiles", "grid"):
        if getattr(limits, name) is not None and not config.grids:
            raise UsageError(
                f"{name} has no meaning for a model that sees one view of {config.tile_px} px and "
                "no tiles; leave it out"
            )
    grids = config.grids
    if limits.max_tiles is not None:
        grids = grids_up_to(limits.max_tiles)
    elif limits.grid is not None:
        grids = (limits.grid,)
    most = limits.max_visual_tokens
    return replace(
        config, grids=grids, max_visual_tokens=config.max_visual_tokens if most is None else most
    )


def beyond_training(trained: HDConfig, used: HDConfig) -> str | None:
    """One line of warning where images may get grids that the model was not trained on, or more
    tokens than its limit then; None where they may not."""
    reasons = []
    new = [grid for grid in used.grids if grid not in trained.grids]
    if new:
        most = [max(rows * cols for rows, cols in grids) for grids in (trained.grids, used.grids)]
        shown = ", ".join(f"{rows}x{cols}" for rows, cols in new[:4])
        reasons.append(
            f"trained on grids of at most {most[0]} tiles, used with at most {most[1]} "
            f"({len(new)} new: {shown}{', ...' if len(new) > 4 else ''})"
        )
    before, now = trained.max_visual_tokens, used.max_visual_tokens
    if before is not None and (now is None or now > before):
        reasons.append(
            f"trained on at most {before} visual tokens of an image, used with "
            f"{'any number' if now is None else f'at most {now}'}"
        )
    return "; ".join(reasons) or None
