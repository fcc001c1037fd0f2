"""hd/grid.py: configurations are checked values, presets are as documented, grids fit images."""

import dataclasses
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.image_processing_utils import select_best_resolution

from llava_hd.hd.errors import UsageError
from llava_hd.hd.grid import FLEXIBLE_GRIDS, PRESETS, HDConfig, get_preset, select_grid

SIDES = st.integers(1, 5000)


def test_the_flexible_set_is_the_fourteen_shapes_of_up_to_six_tiles():
    assert len(FLEXIBLE_GRIDS) == len(set(FLEXIBLE_GRIDS)) == 14
    assert {(cols, rows) for rows, cols in FLEXIBLE_GRIDS} == set(FLEXIBLE_GRIDS)
    assert max(rows * cols for rows, cols in FLEXIBLE_GRIDS) == 6


def test_presets_are_the_documented_configurations():
    assert list(PRESETS) == ["hd448", "hdflex", "hd448-paper", "hdflex-paper", "base336", "base224"]
    for name in ("hd448", "hdflex"):
        config = PRESETS[name]
        assert (config.global_view, config.keep, config.pad_colour) == (
            ("squash", "llava_next", "black")
        )
        paper = PRESETS[f"{name}-paper"]
        assert paper.grids == config.grids
        assert (paper.global_view, paper.keep, paper.pad_rgb) == ("pad", "touched", (122, 116, 104))
    assert PRESETS["base336"].patches_per_tile == 576
    assert PRESETS["base224"].patches_per_tile == 256
    assert not PRESETS["base336"].grids and not PRESETS["base336"].row_end


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_survives_json(name):
    config = PRESETS[name]
    assert HDConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_grids_from_json_lists_are_hashable_tuples():
    config = HDConfig(grids=[[1, 2], [2, 1]])
    assert config.grids == ((1, 2), (2, 1))
    assert hash(config) == hash(HDConfig(grids=((1, 2), (2, 1))))


def test_an_unknown_key_names_the_nearest_one():
    values = HDConfig().to_dict() | {"tilepx": 3}
    with pytest.raises(UsageError, match=r"hd\.tilepx is not a setting; did you mean 'tile_px'\?"):
        HDConfig.from_dict(values)


def test_a_missing_key_is_named_and_not_guessed():
    values = HDConfig().to_dict()
    del values["keep"]
    with pytest.raises(UsageError, match=r"hd\.keep is missing"):
        HDConfig.from_dict(values)


def test_an_unknown_preset_names_the_nearest_one():
    assert get_preset("hd448") is PRESETS["hd448"]
    with pytest.raises(UsageError, match=r"'hdflx' is unknown; did you mean 'hdflex'\?"):
        get_preset("hdflx")
    with pytest.raises(UsageError, match="there is hd448, hdflex"):
        get_preset("zzz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile_px": 225}, "tile_px 225 is not a multiple of hd.patch_px 14"),
        ({"tile_px": 0}, "tile_px must be a whole number from 1"),
        ({"tile_px": "224"}, "tile_px must be a whole number from 1, not '224'"),
        ({"patch_px": True}, "patch_px must be a whole number"),
        ({"patch_px": 14.0}, "patch_px must be a whole number"),
        ({"grids": ((2, 0),)}, r"\(2, 0\) is not \(rows, cols\)"),
        ({"grids": ((2, 2, 2),)}, r"is not \(rows, cols\)"),
        ({"grids": "2x2"}, "hd.grids must be a list"),
        ({"grids": ((2, 2), (2, 2))}, "names a grid twice"),
        ({"global_view": "squashed"}, "'squashed' is unknown; did you mean 'squash'"),
        ({"keep": "touch"}, "did you mean 'touched'"),
        ({"pad_colour": "blue"}, "hd.pad_colour 'blue' is unknown"),
        ({"row_end": "yes"}, "hd.row_end must be true or false"),
        ({"grids": (), "global_view": "none"}, "the model would see nothing"),
    ],
)
def test_fields_that_do_not_fit_are_refused_in_one_line(change, message):
    with pytest.raises(UsageError, match=message) as caught:
        HDConfig(**change)
    assert "\n" not in str(caught.value)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        HDConfig().tile_px = 112


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((224, 224), (1, 1)),
        ((225, 225), (2, 2)),
        ((480, 640), (2, 3)),
        ((720, 1280), (2, 3)),
        ((640, 640), (2, 2)),
        ((640, 480), (3, 2)),
        ((200, 1300), (1, 6)),
        ((1300, 200), (6, 1)),
        ((1528, 1529), (2, 2)),  # decided by float rounding: exact arithmetic picks 2x3
        ((1, 5000), (1, 1)),  # every grid has effective resolution 0
    ],
)
def test_the_grid_follows_the_shape_of_the_image(size, grid):
    assert select_grid(size, PRESETS["hdflex"]) == grid


def test_without_grids_there_is_no_grid():
    assert select_grid((480, 640), PRESETS["base336"]) is None


@given(SIDES, SIDES)
def test_a_transposed_image_gets_the_transposed_grid(height, width):
    rows, cols = select_grid((height, width), PRESETS["hdflex"])
    assert select_grid((width, height), PRESETS["hdflex"]) == (cols, rows)


@pytest.mark.parametrize("tile_px", [56, 224, 336])
def test_the_choice_equals_transformers_on_ten_thousand_sizes(tile_px):
    config = HDConfig(tile_px=tile_px, grids=FLEXIBLE_GRIDS)
    canvases = [[rows * tile_px, cols * tile_px] for rows, cols in FLEXIBLE_GRIDS]
    draw = random.Random(tile_px)
    for _ in range(10_000):
        size = (draw.randint(1, 2500), draw.randint(1, 2500))
        rows, cols = select_grid(size, config)
        assert (rows * tile_px, cols * tile_px) == select_best_resolution(size, canvases), size
