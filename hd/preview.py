"""A picture of what the model sees of an image: tiles, patches, padding, dropped cells, tokens."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .image import from_array
from .plan import TilePlan
from .tiler import canvas, global_view

LONG_SIDE_PX = 960  # the drawn canvas is enlarged by a whole factor up to about this
MARGIN_PX = 24
GAP_PX = 40
GUTTER_PX = 20  # right of the canvas, for the row-end dots
TEXT_PX = 20
LINE_PX = 30

PAPER = (250, 250, 247)
INK = (38, 42, 48)
WHITE = (255, 255, 255)
GREY = (120, 124, 130)
TILE_LINE = (255, 196, 0)
KEPT_LINE = (0, 158, 115)
ROW_END_DOT = (213, 94, 0)
GLOBAL_LINE = (0, 114, 178)


def draw_plan(image: Image.Image, plan: TilePlan, caption: bool = True) -> Image.Image:
    """RGB picture: the padded canvas under its grid, the global view beside it, a caption below.

    Tile lines are yellow, patches faint, padding hatched, dropped cells dimmed; the green frame
    holds the cells that become tokens and each orange dot is a row-end. `image` is RGB and of
    `plan.image_size`.
    """
    scale = _scale(plan)
    panels = []
    if plan.config.grids:
        panels.append(_canvas_panel(image, plan, scale))
    if plan.has_global_view:
        panels.append(_global_panel(image, plan, scale))
    lines = _caption(plan) if caption else []
    font = _font(TEXT_PX)
    body_width = sum(panel.width for panel in panels) + GAP_PX * (len(panels) - 1)
    text_width = max((int(font.getlength(_plain(line))) for line in lines), default=0)
    width = max(body_width, text_width) + 2 * MARGIN_PX
    body_height = max(panel.height for panel in panels)
    page = Image.new(
        "RGB", (width, body_height + len(lines) * LINE_PX + (3 if lines else 2) * MARGIN_PX), PAPER
    )
    left = MARGIN_PX
    for panel in panels:
        page.paste(panel, (left, MARGIN_PX))
        left += panel.width + GAP_PX
    for number, line in enumerate(lines):
        _write(page, line, body_height + 2 * MARGIN_PX + number * LINE_PX, font)
    return page


def _scale(plan: TilePlan) -> int:
    longest = max(*plan.canvas_size, plan.config.tile_px)
    return max(1, round(LONG_SIDE_PX / longest))


def _font(size_px: int) -> ImageFont.FreeTypeFont:
    """Pillow's built-in scalable font."""
    font = ImageFont.load_default(size_px)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow was built without FreeType; install Pillow's own wheel")
    return font


def _canvas_panel(image: Image.Image, plan: TilePlan, scale: int) -> Image.Image:
    """The canvas, enlarged, with all that is drawn over it and the row-end dots beside it."""
    pixels = _with_patches(canvas(image, plan), _canvas_padding(plan), plan, scale)
    _blend(pixels, _dropped(plan, scale), PAPER, 0.72)
    panel = from_array(np.rint(pixels).astype(np.uint8))
    gutter = GUTTER_PX if plan.config.row_end else 0
    page = Image.new("RGB", (panel.width + gutter, panel.height), PAPER)
    page.paste(panel, (0, 0))
    draw = ImageDraw.Draw(page)
    _tile_lines(draw, plan, scale)
    _kept_frame(draw, plan, scale)
    if plan.config.row_end:
        _row_end_dots(draw, plan, scale)
    return page


def _global_panel(image: Image.Image, plan: TilePlan, scale: int) -> Image.Image:
    pixels = _with_patches(global_view(image, plan), _view_padding(plan), plan, scale)
    panel = from_array(np.rint(pixels).astype(np.uint8))
    box = (0, 0, panel.width - 1, panel.height - 1)
    ImageDraw.Draw(panel).rectangle(box, outline=GLOBAL_LINE, width=3)
    return panel


def _with_patches(
    pixels: np.ndarray, padding: np.ndarray, plan: TilePlan, scale: int
) -> np.ndarray:
    """float `[height width 3]`: `pixels` enlarged, padding hatched, patches faintly outlined."""
    large = _enlarged(pixels, scale).astype(np.float32)
    _blend(large, _enlarged(padding, scale) & _stripes(large.shape[:2]), WHITE, 0.45)
    lines = _patch_lines(large.shape[:2], plan, scale)
    bright = large.mean(axis=2) > 150  # a faint line must differ from what lies below it
    _blend(large, lines & ~bright, WHITE, 0.22)
    _blend(large, lines & bright, INK, 0.16)
    return large


def _enlarged(pixels: np.ndarray, scale: int) -> np.ndarray:
    """Whole-number enlargement without smoothing: the pixels are the ones the model gets."""
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)


def _blend(
    pixels: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int], weight: float
) -> None:
    pixels[mask] += weight * (np.array(colour, dtype=np.float32) - pixels[mask])


def _canvas_padding(plan: TilePlan) -> np.ndarray:
    """bool `[canvas_height canvas_width]`: where no pixel of the image lies."""
    mask = np.ones(plan.canvas_size, dtype=bool)
    (top, left), (height, width) = plan.offset, plan.resized_size
    mask[top : top + height, left : left + width] = False
    return mask


def _view_padding(plan: TilePlan) -> np.ndarray:
    """bool `[tile_px tile_px]`: the padding of the global view, none if it is squashed."""
    tile_px = plan.config.tile_px
    if plan.config.global_view != "pad":
        return np.zeros((tile_px, tile_px), dtype=bool)
    side, top, left = plan.letterbox
    centres = (np.arange(tile_px) + 0.5) * side / tile_px
    rows = (centres < top) | (centres >= top + plan.image_size[0])
    cols = (centres < left) | (centres >= left + plan.image_size[1])
    return rows[:, None] | cols[None, :]


def _dropped(plan: TilePlan, scale: int) -> np.ndarray:
    """bool `[height width]` of the enlarged canvas: the cells that become no token."""
    mask = np.ones(plan.map_size, dtype=bool)
    mask[slice(*plan.kept_rows), slice(*plan.kept_cols)] = False
    return _enlarged(mask, plan.config.patch_px * scale)


def _stripes(size: tuple[int, ...]) -> np.ndarray:
    """bool `[height width]`: diagonal stripes, 3 px of every 12."""
    return np.add.outer(np.arange(size[0]), np.arange(size[1])) % 12 < 3


def _patch_lines(size: tuple[int, ...], plan: TilePlan, scale: int) -> np.ndarray:
    """bool `[height width]`: the first pixel row and column of every patch."""
    cell = plan.config.patch_px * scale
    mask = np.zeros(size, dtype=bool)
    mask[::cell] = True
    mask[:, ::cell] = True
    return mask


def _tile_lines(draw: ImageDraw.ImageDraw, plan: TilePlan, scale: int) -> None:
    height, width = (side * scale for side in plan.canvas_size)
    tile = plan.config.tile_px * scale
    for row in range(1, plan.grid[0]):
        draw.line((0, row * tile, width - 1, row * tile), fill=TILE_LINE, width=3)
    for col in range(1, plan.grid[1]):
        draw.line((col * tile, 0, col * tile, height - 1), fill=TILE_LINE, width=3)
    draw.rectangle((0, 0, width - 1, height - 1), outline=TILE_LINE, width=3)


def _kept_frame(draw: ImageDraw.ImageDraw, plan: TilePlan, scale: int) -> None:
    cell = plan.config.patch_px * scale
    (top, bottom), (left, right) = plan.kept_rows, plan.kept_cols
    box = (left * cell, top * cell, right * cell - 1, bottom * cell - 1)
    draw.rectangle(box, outline=KEPT_LINE, width=3)


def _row_end_dots(draw: ImageDraw.ImageDraw, plan: TilePlan, scale: int) -> None:
    cell = plan.config.patch_px * scale
    x = plan.canvas_size[1] * scale + GUTTER_PX / 2
    radius = min(cell / 5, GUTTER_PX / 4)
    for row in range(*plan.kept_rows):
        y = (row + 0.5) * cell
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ROW_END_DOT)


# A caption line is a list of (text, colour) runs.
Line = list[tuple[str, tuple[int, int, int]]]


def _caption(plan: TilePlan) -> list[Line]:
    config = plan.config
    height, width = plan.image_size
    lines: list[Line] = []
    head = f"image {height} x {width} px"
    if config.grids:
        rows, cols = plan.grid
        head += (
            f"   ·   grid {rows} x {cols} of {config.tile_px} px tiles"
            f"   ·   canvas {plan.canvas_size[0]} x {plan.canvas_size[1]} px"
        )
    lines.append([(head, INK)])
    parts: Line = [(f"{plan.num_tokens} visual tokens  =  ", INK)]
    for text, colour in _token_parts(plan):
        parts += [("  +  ", INK), (text, colour)] if len(parts) > 1 else [(text, colour)]
    lines.append(parts)
    legend = []
    if _canvas_padding(plan).any() or _view_padding(plan).any():
        legend.append("hatched: padding")
    if plan.kept_size != plan.map_size:
        legend.append("dimmed: cells that are dropped")
    return [*lines, [("   ·   ".join(legend), GREY)]] if legend else lines


def _token_parts(plan: TilePlan) -> Line:
    parts: Line = []
    if plan.has_global_view:
        side = plan.config.patches_per_side
        how = {"squash": "squashed", "pad": "padded"}[plan.config.global_view]
        parts.append((f"{plan.num_global_tokens} {how} global view {side} x {side}", GLOBAL_LINE))
    if plan.config.grids:
        rows, cols = plan.kept_size
        parts.append((f"{rows * cols} map {rows} x {cols}", KEPT_LINE))
    if plan.num_row_ends:
        word = "row-end" if plan.num_row_ends == 1 else "row-ends"
        parts.append((f"{plan.num_row_ends} {word}", ROW_END_DOT))
    return parts


def _plain(line: Line) -> str:
    return "".join(text for text, _ in line)


def _write(page: Image.Image, line: Line, top: int, font: ImageFont.FreeTypeFont) -> None:
    draw = ImageDraw.Draw(page)
    left = float(MARGIN_PX)
    for text, colour in line:
        draw.text((left, top), text, fill=colour, font=font)
        left += font.getlength(text)
