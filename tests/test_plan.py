"""hd/plan.py: the integers of transformers, the paper's rule proved on pixels."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

from llava_hd.hd.grid import FLEXIBLE_GRIDS, PRESETS, HDConfig
from llava_hd.hd.plan import plan_image

CONFIGS = {
    **PRESETS,
    "nano": HDConfig(tile_px=56),
    "nano-base": HDConfig(tile_px=84, grids=(), global_view="pad", keep="all", row_end=False),
    "map-only": HDConfig(tile_px=56, grids=FLEXIBLE_GRIDS, global_view="none", keep="touched"),
    "one-tile": HDConfig(grids=()),
}


def random_sizes(count, seed, longest=3000):
    """Half uniform, half log-uniform: everyday shapes and extreme ones."""
    draw = random.Random(seed)
    top = np.log2(longest)
    for number in range(count):
        if number % 2:
            yield draw.randint(1, longest), draw.randint(1, longest)
        else:
            yield int(2 ** draw.uniform(0, top)), int(2 ** draw.uniform(0, top))


def oracle_processor(config):
    """Transformers' processor for this configuration, without a tokenizer."""
    side = config.tile_px
    processor = object.__new__(LlavaNextProcessor)
    processor.image_processor = LlavaNextImageProcessorPil(
        image_grid_pinpoints=[[rows * side, cols * side] for rows, cols in config.grids]
    )
    processor.patch_size = config.patch_px
    processor.num_additional_image_tokens = 1  # the CLS token, which never becomes a token
    return processor


@pytest.mark.parametrize("name", ["hd448", "hdflex", "nano"])
def test_the_plan_equals_transformers_on_twenty_thousand_sizes(name):
    config = CONFIGS[name]
    processor = oracle_processor(config)
    canvases = [(rows * config.tile_px, cols * config.tile_px) for rows, cols in config.grids]
    compared = thin = 0
    for size in random_sizes(32_000, seed=1):
        plan = plan_image(size, config)
        assert plan.canvas_size == select_best_resolution(size, canvases), size
        image = np.broadcast_to(np.uint8(0), (3, *size))
        fitted = get_patch_output_size(image, plan.canvas_size, "channels_first")
        (top, _), (left, _) = processor.image_processor._get_padding_size(fitted, plan.canvas_size)
        assert (plan.resized_size, plan.offset) == (fitted, (top, left)), size
        cells = torch.arange(plan.map_size[0] * plan.map_size[1]).view(1, *plan.map_size)
        theirs = unpad_image(cells, size)
        if theirs.numel() == 0:
            thin += 1  # the deviation: the touched cells, instead of none
            assert np.array_equal(kept_mask(plan), touched_by_brute_force(plan)), size
            continue
        ours = cells[:, slice(*plan.kept_rows), slice(*plan.kept_cols)]
        assert ours.shape == theirs.shape and ours[0, 0, 0] == theirs[0, 0, 0], size
        count = processor._get_number_of_features(*size, config.tile_px, config.tile_px) - 1
        assert plan.num_tokens == count, size
        compared += 1
    assert compared >= 20_000 and thin > 0


def touched_by_brute_force(plan):
    """bool [map rows, map cols]: paint the resized image on the canvas, look at every cell."""
    painted = np.zeros(plan.canvas_size, dtype=bool)
    (top, left), (height, width) = plan.offset, plan.resized_size
    painted[top : top + height, left : left + width] = True
    rows, cols = plan.map_size
    patch = plan.config.patch_px
    return painted.reshape(rows, patch, cols, patch).any(axis=(1, 3))


def kept_mask(plan):
    mask = np.zeros(plan.map_size, dtype=bool)
    mask[slice(*plan.kept_rows), slice(*plan.kept_cols)] = True
    return mask


@pytest.mark.parametrize("name", ["hd448-paper", "hdflex-paper", "map-only"])
def test_touched_keeps_a_cell_exactly_if_it_holds_a_real_pixel(name):
    for size in random_sizes(1500, seed=2):
        plan = plan_image(size, CONFIGS[name])
        assert np.array_equal(kept_mask(plan), touched_by_brute_force(plan)), size


def test_a_thin_image_keeps_its_touched_cells_where_transformers_keeps_none():
    config = PRESETS["hdflex"]
    plan = plan_image((3791, 39), config)
    cells = torch.zeros(1, *plan.map_size)
    assert unpad_image(cells, plan.image_size).numel() == 0
    assert np.array_equal(kept_mask(plan), touched_by_brute_force(plan))
    assert plan.num_map_tokens > 0


@settings(max_examples=500)
@given(st.integers(1, 70_000), st.integers(1, 70_000), st.sampled_from(sorted(CONFIGS)))
def test_no_image_loses_its_map_and_all_integers_fit(height, width, name):
    config = CONFIGS[name]
    plan = plan_image((height, width), config)
    assert plan.num_tiles == plan.grid[0] * plan.grid[1] + (config.global_view != "none")
    assert plan.num_tokens == plan.num_global_tokens + plan.num_map_tokens > 0
    if not config.grids:
        assert plan.grid == plan.canvas_size == plan.kept_rows == plan.kept_cols == (0, 0)
        return
    assert plan.canvas_size == (plan.grid[0] * config.tile_px, plan.grid[1] * config.tile_px)
    for axis in (0, 1):
        before, length = plan.offset[axis], plan.resized_size[axis]
        after = plan.canvas_size[axis] - before - length
        assert length >= 1 and 0 <= before <= after <= before + 1
        first, last = (plan.kept_rows, plan.kept_cols)[axis]
        assert 0 <= first < last <= plan.map_size[axis]


@settings(max_examples=200)
@given(st.integers(1, 3000), st.integers(1, 3000))
def test_touched_never_keeps_fewer_cells_than_llava_next(height, width):
    ours = plan_image((height, width), PRESETS["hdflex-paper"])
    theirs = plan_image((height, width), PRESETS["hdflex"])
    assert (kept_mask(ours) | ~kept_mask(theirs)).all()


@pytest.mark.parametrize(
    ("grid", "tokens"),
    [
        *(((1, cols), 512 + 256 * (cols - 1) + 16) for cols in range(1, 7)),
        *(((rows, 1), 256 + 272 * rows) for rows in range(2, 7)),
        ((2, 2), 1312),
        ((2, 3), 1824),
        ((3, 2), 1840),
    ],
)
def test_a_full_canvas_has_the_published_token_count(grid, tokens):
    plan = plan_image((grid[0] * 224, grid[1] * 224), PRESETS["hdflex"])
    assert (plan.grid, plan.num_tokens) == (grid, tokens)


@pytest.mark.parametrize(
    ("size", "preset", "tokens"),
    [
        ((480, 640), "hdflex", 1632),
        ((480, 640), "hdflex-paper", 1696),
        ((480, 640), "hd448", 1048),
        ((480, 640), "base336", 576),
        ((1, 1), "base224", 256),
        ((1, 1), "hdflex", 528),
    ],
)
def test_known_token_counts(size, preset, tokens):
    assert plan_image(size, PRESETS[preset]).num_tokens == tokens


def test_keep_all_keeps_the_padding_too():
    plan = plan_image((100, 300), HDConfig(keep="all"))
    assert plan.kept_size == plan.map_size == (32, 32)


def test_the_global_view_has_no_row_ends_and_a_lone_view_has_one_at_most():
    assert plan_image((480, 640), PRESETS["hd448"]).num_global_tokens == 256
    assert plan_image((480, 640), HDConfig(grids=())).num_tokens == 257
    assert plan_image((480, 640), HDConfig(grids=(), row_end=False)).num_tokens == 256


def test_a_size_without_pixels_is_refused():
    with pytest.raises(ValueError, match="0x5"):
        plan_image((0, 5), PRESETS["hd448"])


def test_equal_sizes_give_equal_plans_whatever_their_type():
    one = plan_image((480, 640), PRESETS["hd448"])
    other = plan_image(tuple(np.array([480, 640])), PRESETS["hd448"])
    assert one == other and hash(one) == hash(other)
    assert all(type(side) is int for side in other.image_size)
