"""hd/preview.py: the picture shows the model's own pixels, the padding and what is dropped."""

import numpy as np
import pytest

from llava_hd.hd import preview
from llava_hd.hd.grid import PRESETS, HDConfig
from llava_hd.hd.image import from_array
from llava_hd.hd.plan import plan_image
from llava_hd.hd.preview import MARGIN_PX, draw_plan
from llava_hd.hd.tiler import canvas, global_view


def drawn(image, config):
    """(picture as int array without its margin, plan, enlargement)."""
    plan = plan_image((image.height, image.width), config)
    picture = np.asarray(draw_plan(image, plan)).astype(int)
    longest = max(*plan.canvas_size, config.tile_px)
    return picture[MARGIN_PX:, MARGIN_PX:], plan, max(1, round(preview.LONG_SIDE_PX / longest))


def noise(height, width):
    generator = np.random.default_rng(0)
    return from_array(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def inner(size, cell, *, band=3):
    """bool [height width]: pixels of a panel that lie under no patch line, tile line or frame."""
    masks = []
    for length in size:
        position = np.arange(length) % cell
        masks.append((position > band) & (position < cell - band))
    return masks[0][:, None] & masks[1][None, :]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("size", [(380, 570), (667, 100), (1, 1), (40, 2000)])
def test_every_plan_can_be_drawn(name, size):
    plan = plan_image(size, PRESETS[name])
    picture = draw_plan(noise(*size), plan)
    assert picture.mode == "RGB"
    assert min(picture.size) > PRESETS[name].tile_px and max(picture.size) < 2200


def test_the_canvas_shows_the_pixels_that_the_model_gets():
    image = noise(448, 448)
    picture, plan, scale = drawn(image, PRESETS["hd448"])
    expected = canvas(image, plan).repeat(scale, axis=0).repeat(scale, axis=1)
    clear = inner(expected.shape[:2], 14 * scale)
    assert np.array_equal(picture[: len(expected), : expected.shape[1]][clear], expected[clear])


def test_the_global_view_stands_beside_the_canvas():
    image = noise(448, 448)
    picture, plan, scale = drawn(image, PRESETS["hd448"])
    expected = global_view(image, plan).repeat(scale, axis=0).repeat(scale, axis=1)
    clear = inner(expected.shape[:2], 14 * scale)
    left = picture.shape[1] - MARGIN_PX - expected.shape[1]
    assert left > 448 * scale
    shown = picture[: len(expected), left : left + expected.shape[1]]
    assert np.array_equal(shown[clear], expected[clear])


def test_padding_is_hatched_and_the_image_is_not():
    white = from_array(np.full((100, 400, 3), 255, dtype=np.uint8))
    picture, plan, scale = drawn(white, HDConfig(keep="all"))
    clear = inner((448 * scale, 448 * scale), 14 * scale)
    panel = np.where(clear[..., None], picture[: 448 * scale, : 448 * scale], -1)
    top, height = plan.offset[0] * scale, plan.resized_size[0] * scale
    colours = np.unique(panel[:top][clear[:top]], axis=0)
    assert len(colours) == 2 and colours[0].tolist() == [0, 0, 0]  # black with lighter stripes
    middle = slice(top, top + height)
    assert (panel[middle][clear[middle]] == 255).all()


def test_the_padding_of_a_padded_view_is_hatched():
    picture, _, scale = drawn(noise(100, 300), PRESETS["base336"])
    clear = inner((336 * scale, 336 * scale), 14 * scale)
    band = slice(0, 100 * scale)
    stripes = np.unique(picture[band, : 336 * scale][clear[band]], axis=0)
    assert len(stripes) == 2 and stripes[0].tolist() == [122, 116, 104]


def test_dropped_cells_are_dimmed_and_kept_ones_are_not():
    black = from_array(np.zeros((224, 448, 3), dtype=np.uint8))
    picture, plan, scale = drawn(black, HDConfig())
    kept_all, _, _ = drawn(black, HDConfig(keep="all"))
    first, last = plan.kept_rows
    assert 0 < first < last < 32
    clear = inner((448 * scale, 448 * scale), 14 * scale)
    dimmed = picture[: 448 * scale, : 448 * scale] - kept_all[: 448 * scale, : 448 * scale]
    cells = np.arange(448 * scale) // (14 * scale)
    dropped = (cells < first) | (cells >= last)
    assert (dimmed[dropped][clear[dropped]] > 40).all()
    assert (dimmed[~dropped][clear[~dropped]] == 0).all()


@pytest.mark.parametrize("size", [(224, 448), (448, 448), (448, 100)])
def test_there_is_one_dot_for_every_row_end(size):
    picture, plan, scale = drawn(noise(*size), PRESETS["hd448"])
    column = picture[: 448 * scale, 448 * scale + preview.GUTTER_PX // 2]
    dots = (column == preview.ROW_END_DOT).all(axis=1)
    assert np.count_nonzero(dots[1:] & ~dots[:-1]) == plan.num_row_ends


def test_without_row_ends_there_are_no_dots():
    picture, _, _ = drawn(noise(448, 448), HDConfig(row_end=False))
    assert not (picture[: 2 * 448] == preview.ROW_END_DOT).all(axis=2).any()


def test_the_caption_tells_grid_canvas_and_tokens_of_each_part():
    plan = plan_image((667, 1000), PRESETS["hd448"])
    text = " ".join(preview._plain(line) for line in preview._caption(plan))
    for part in (
        "image 667 x 1000 px",
        "grid 2 x 2",
        "canvas 448 x 448 px",
        "982 visual tokens",
        "256 squashed global view",
        "704 map 22 x 32",
        "22 row-ends",
        "hatched: padding",
        "dimmed: cells that are dropped",
    ):
        assert part in text
    assert "hatched" not in str(preview._caption(plan_image((448, 448), PRESETS["hd448"])))
