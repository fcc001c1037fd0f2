"""How the images and texts of a benchmark's pack lie: the tables of ours, the sizes of LLaVA's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from einops import rearrange

from ..kernels.place_rows import ROW_END, TEXT

GRID = (2, 2)  # tiles of an HD image, beside its global view
KEPT_AT_7_TENTHS = 5 / 8  # of the map's rows: (1 + 4 * 5/8) / 5 = 0.7 of all tiles' patches
ROWS_OF_A_SAMPLE, ROWS_OF_A_LINE = 1024, 32


@dataclass(frozen=True)
class Layout:
    """A pack of samples with one image each.

    images: samples. side: patches along a tile. kept: half-open span of map rows that are kept; the
    map has 2 * side rows and columns. text: tokens before and after the image, of each sample.
    lines: rows of each line and its row-end, for a pack whose rows are placed as they are
    (place_rows); empty where images are cut into tiles.
    """

    images: int
    side: int
    kept: tuple[int, int]
    text: tuple[tuple[int, int], ...]
    lines: tuple[tuple[int, ...], ...] = ()

    @property
    def all_rows(self) -> int:
        """Feature rows of all tiles."""
        if self.lines:
            return self.rows
        return self.images * (1 + GRID[0] * GRID[1]) * self.side**2

    @property
    def rows(self) -> int:
        """Feature rows kept."""
        if self.lines:
            return sum(sum(lines) for lines in self.lines)
        return self.images * (self.side**2 + (self.kept[1] - self.kept[0]) * self.map_width)

    @property
    def map_width(self) -> int:
        """Columns of the map."""
        return GRID[1] * self.side

    @property
    def text_tokens(self) -> int:
        """Text tokens of the pack."""
        return sum(before + after for before, after in self.text)

    @property
    def tokens(self) -> int:
        """Text tokens, kept rows and row-ends."""
        return self.text_tokens + self.rows + self.num_row_ends

    @property
    def num_row_ends(self) -> int:
        """One for each kept row of a map, or for each line."""
        if self.lines:
            return sum(len(lines) for lines in self.lines)
        return self.images * (self.kept[1] - self.kept[0])

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """(int64 `[R]` the kept feature rows in the order of their places, int64 `[T]` source)."""
        rows: list[np.ndarray] = []
        source: list[np.ndarray] = []
        for image in range(self.images):
            visual = self._visual(image)
            is_row = visual != ROW_END
            first = sum(len(part) for part in rows)
            rows.append(visual[is_row])
            placed = visual.copy()
            placed[is_row] = np.arange(first, first + int(is_row.sum()))
            before, after = self.text[image]
            source += [np.full(before, TEXT), placed, np.full(after, TEXT)]
        return np.concatenate(rows), np.concatenate(source)

    def _visual(self, image: int) -> np.ndarray:
        """int64: the feature rows and row-ends of an image in the order of its tokens."""
        if self.lines:
            start = sum(sum(lines) for lines in self.lines[:image])
            parts: list[np.ndarray] = []
            for length in self.lines[image]:
                parts += [np.arange(start, start + length), np.array([ROW_END])]
                start += length
            return np.concatenate(parts)
        patches = self.side**2
        first = image * (1 + GRID[0] * GRID[1]) * patches
        tiles = first + patches + np.arange(GRID[0] * GRID[1] * patches)
        pattern = "(r c i j) -> (r i) (c j)"
        merged = rearrange(tiles, pattern, r=GRID[0], c=GRID[1], i=self.side, j=self.side)
        kept = np.pad(merged[slice(*self.kept)], ((0, 0), (0, 1)), constant_values=ROW_END)
        return np.concatenate([first + np.arange(patches), kept.reshape(-1)])


def project_layout(rows: int, keep: float, side: int) -> Layout:
    """Images of five tiles that come nearest to `rows` feature rows; a share of the map's rows is
    dropped above and below, as for a landscape picture. Texts differ in length."""
    per_image = 5 * side**2
    images = max(1, round(rows / per_image))
    height = GRID[0] * side
    kept = height if keep == 1.0 else round(height * KEPT_AT_7_TENTHS)
    top = (height - kept) // 2
    text = tuple((per_image // 32, per_image // 16 * (1 + image % 3)) for image in range(images))
    return Layout(images, side, (top, top + kept), text)


def place_layout(rows: int) -> Layout:
    """Rows in lines of 32 with row-ends, samples of up to 1,024 rows with 16 and 64 to 192 text
    tokens (fewer in a short sample, so that tokens are about 1.2 times the rows)."""
    lines, text = [], []
    for image, start in enumerate(range(0, rows, ROWS_OF_A_SAMPLE)):
        length = min(ROWS_OF_A_SAMPLE, rows - start)
        whole, rest = divmod(length, ROWS_OF_A_LINE)
        lines.append((ROWS_OF_A_LINE,) * whole + ((rest,) if rest else ()))
        text.append((length // 64, length // 16 * (1 + image % 3)))
    return Layout(len(lines), 0, (0, 0), tuple(text), tuple(lines))
