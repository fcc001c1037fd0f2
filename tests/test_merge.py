"""hd/merge.py: the gather table puts every feature where the image has it."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from llava_hd.hd.grid import FLEXIBLE_GRIDS, PRESETS, HDConfig
from llava_hd.hd.image import from_array
from llava_hd.hd.merge import ROW_END, merge_tiles, visual_source
from llava_hd.hd.plan import plan_image
from llava_hd.hd.tiler import tile_image

CONFIGS = {
    **PRESETS,
    "nano": HDConfig(tile_px=56),
    "map-only": HDConfig(tile_px=56, grids=FLEXIBLE_GRIDS, global_view="none", keep="touched"),
    "one-tile": HDConfig(grids=()),
}


@settings(max_examples=300)
@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from(sorted(CONFIGS)))
def test_there_is_one_source_for_every_visual_token(height, width, name):
    plan = plan_image((height, width), CONFIGS[name])
    source = visual_source(plan)
    assert source.dtype == np.int64 and source.shape == (plan.num_tokens,)
    assert (source == ROW_END).sum() == plan.num_row_ends
    rows = source[source != ROW_END]
    assert len(set(rows.tolist())) == len(rows)
    assert rows.min() >= 0 and rows.max() < plan.num_tiles * plan.config.patches_per_tile


@pytest.mark.parametrize("grid", FLEXIBLE_GRIDS)
def test_cut_then_merge_is_the_identity_on_an_image_of_coordinates(grid):
    """Each 2 px patch of the image holds its own (row, col); tokens must read them in order."""
    config = HDConfig(tile_px=14, patch_px=2, grids=FLEXIBLE_GRIDS, keep="all", row_end=False)
    rows, cols = grid[0] * 7, grid[1] * 7
    coordinates = np.zeros((rows, cols, 3), dtype=np.uint8)
    coordinates[..., 0], coordinates[..., 1] = np.indices((rows, cols))
    image = from_array(coordinates.repeat(2, axis=0).repeat(2, axis=1))
    plan = plan_image((rows * 2, cols * 2), config)
    assert plan.grid == grid
    features = rearrange(tile_image(image, plan), "n c (i p) (j q) -> (n i j) (p q) c", p=2, q=2)
    merged = features[visual_source(plan)[plan.num_global_tokens :]]
    assert (merged == merged[:, :1]).all()
    assert np.array_equal(merged[:, 0].numpy().reshape(rows, cols, 3), coordinates)


def test_merging_tiles_of_a_map_gives_the_map():
    whole = np.arange(8 * 12 * 5).reshape(2 * 4, 3 * 4, -1)
    tiles = rearrange(whole, "(r i) (c j) d -> (r c i j) d", r=2, c=3)
    assert np.array_equal(merge_tiles(tiles, (2, 3), 4), whole)


@pytest.mark.parametrize("name", ["hd448", "hdflex", "nano", "one-tile"])
def test_the_order_of_tokens_is_that_of_transformers(name):
    config = CONFIGS[name]
    side = config.tile_px
    pinpoints = [[rows * side, cols * side] for rows, cols in config.grids]
    vision = SimpleNamespace(image_size=side, patch_size=config.patch_px)
    model = SimpleNamespace(
        config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints)
    )
    draw = random.Random(3)
    for _ in range(150):
        size = (int(2 ** draw.uniform(0, 12)), int(2 ** draw.uniform(0, 12)))
        plan = plan_image(size, config)
        count = plan.num_tiles * config.patches_per_tile
        index = torch.arange(count, dtype=torch.float64).view(plan.num_tiles, -1, 1)
        newline = torch.tensor([float(ROW_END)], dtype=torch.float64)
        (theirs,), _ = LlavaNextModel.pack_image_features(
            model, [index], torch.tensor([size]), "default", newline
        )
        if config.grids and len(theirs) - plan.num_global_tokens in (0, plan.map_size[0]):
            assert plan.num_map_tokens > plan.num_row_ends  # the thin images, ours to decide
            continue
        assert np.array_equal(visual_source(plan), theirs.squeeze(1).numpy().astype(int)), size


def test_every_kept_row_is_followed_by_its_row_end():
    plan = plan_image((100, 300), CONFIGS["nano"])
    table = visual_source(plan)[plan.num_global_tokens :].reshape(plan.kept_size[0], -1)
    assert (table[:, -1] == ROW_END).all() and (table[:, :-1] >= plan.num_global_tokens).all()


def test_a_lone_view_without_row_ends_is_just_its_features():
    plan = plan_image((100, 300), CONFIGS["base224"])
    assert np.array_equal(visual_source(plan), np.arange(256))
