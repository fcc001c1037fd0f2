"""hd/tiler.py: tiles equal to the last bit to those of transformers' PIL processors."""

import random
import tracemalloc

import numpy as np
import pytest
import torch
from transformers import LlavaImageProcessorPil, LlavaNextImageProcessorPil

from llava_hd.hd import tiler
from llava_hd.hd.grid import PRESETS, HDConfig
from llava_hd.hd.image import from_array
from llava_hd.hd.plan import plan_image
from llava_hd.hd.tiler import normalise, tile_image


def noise(size, seed=0):
    """Random pixels: every rounding and every tap of the resize shows."""
    generator = np.random.default_rng(seed)
    return from_array(generator.integers(0, 256, (*size, 3), dtype=np.uint8))


def random_sizes(count, seed):
    draw = random.Random(seed)
    for number in range(count):
        if number % 3:
            yield draw.randint(1, 600), draw.randint(1, 600)
        else:
            yield int(2 ** draw.uniform(0, 11)), int(2 ** draw.uniform(0, 8))


def next_processor(config, **kwargs):
    side = config.tile_px
    return LlavaNextImageProcessorPil(
        image_grid_pinpoints=[[rows * side, cols * side] for rows, cols in config.grids],
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        **kwargs,
    )


def llava_processor(side, **kwargs):
    return LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        **kwargs,
    )


RAW = {"do_rescale": False, "do_normalize": False}


@pytest.mark.parametrize(
    ("config", "count"),
    [(PRESETS["hdflex"], 200), (PRESETS["hd448"], 200), (HDConfig(tile_px=56), 100)],
    ids=["hdflex", "hd448", "nano"],
)
def test_tiles_equal_transformers_to_the_last_bit(config, count):
    processor = next_processor(config, **RAW)
    for number, size in enumerate(random_sizes(count, seed=5)):
        image = noise(size, number)
        theirs = processor(image, return_tensors="pt")["pixel_values"][0]
        ours = tile_image(image, plan_image(size, config))
        assert ours.dtype == torch.uint8
        assert torch.equal(ours, theirs.to(torch.uint8)), size


@pytest.mark.parametrize("side", [336, 224, 84])
def test_the_padded_view_equals_transformers_to_the_last_bit(side):
    config = HDConfig(
        tile_px=side, grids=(), global_view="pad", keep="all", row_end=False, pad_colour="mean"
    )
    processor = llava_processor(side, **RAW)
    for number, size in enumerate(random_sizes(200, seed=6)):
        image = noise(size, number)
        theirs = processor(image, return_tensors="pt")["pixel_values"]
        assert torch.equal(tile_image(image, plan_image(size, config)), theirs.to(torch.uint8)), (
            size
        )


def test_the_papers_global_view_is_the_padded_one():
    for size in [(480, 640), (640, 480), (50, 300), (224, 224), (3, 500)]:
        image = noise(size)
        theirs = llava_processor(224, **RAW)(image, return_tensors="pt")["pixel_values"][0]
        tiles = tile_image(image, plan_image(size, PRESETS["hdflex-paper"]))
        assert torch.equal(tiles[0], theirs.to(torch.uint8))


@pytest.mark.parametrize("preset", ["hdflex", "base336"])
def test_normalised_tiles_equal_transformers(preset):
    config = PRESETS[preset]
    processor = next_processor(config) if config.grids else llava_processor(config.tile_px)
    worst = 0.0
    for number, size in enumerate(random_sizes(20, seed=7)):
        image = noise(size, number)
        theirs = processor(image, return_tensors="pt")["pixel_values"]
        ours = normalise(tile_image(image, plan_image(size, config)), torch.float32)
        worst = max(worst, (ours - theirs.reshape(ours.shape)).abs().max().item())
    assert worst <= 1e-6


def test_normalisation_is_rounded_once_to_the_wanted_type():
    tiles = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 16, 16)
    exact = normalise(tiles, torch.float32)
    assert torch.equal(normalise(tiles, torch.bfloat16), exact.to(torch.bfloat16))
    assert exact[0, 0, 0, 0].item() == pytest.approx(-0.48145466 / 0.26862954)
    assert exact[0, 2, -1, -1].item() == pytest.approx((1 - 0.40821073) / 0.27577711)


@pytest.mark.parametrize("strip_pixels", [1, 100_000])
def test_resizing_in_strips_changes_no_bit(monkeypatch, strip_pixels):
    image, config = noise((700, 90)), PRESETS["base224"]
    plan = plan_image((700, 90), config)
    whole = tile_image(image, plan)
    monkeypatch.setattr(tiler, "STRIP_PIXELS", strip_pixels)
    assert torch.equal(tile_image(image, plan), whole)


@pytest.mark.parametrize("size", [(1, 12_000), (12_000, 1)])
def test_a_thin_image_is_padded_without_holding_the_square(size):
    image, plan = noise(size), plan_image(size, PRESETS["base224"])
    tracemalloc.start()
    tiles = tile_image(image, plan)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tiles.shape == (1, 3, 224, 224)
    assert peak < 150 * 2**20  # the square would be 432 MB


@pytest.mark.parametrize("name", PRESETS)
def test_there_are_as_many_tiles_as_planned(name):
    config = PRESETS[name]
    for size in [(1, 1), (380, 570), (1000, 100), (50, 900)]:
        plan = plan_image(size, config)
        shape = (plan.num_tiles, 3, config.tile_px, config.tile_px)
        assert tile_image(noise(size), plan).shape == shape


def test_padding_has_the_pad_colour_and_surrounds_the_image():
    config = HDConfig(grids=((1, 2),), global_view="none", pad_colour="mean")
    plan = plan_image((112, 112), config)
    tiles = tile_image(from_array(np.full((112, 112, 3), 255, dtype=np.uint8)), plan)
    row = torch.cat([tiles[0, :, 0], tiles[1, :, 0]], dim=1).T
    assert row[:112].unique(dim=0).tolist() == [[122, 116, 104]]
    assert row[112:336].unique(dim=0).tolist() == [[255, 255, 255]]
    assert row[336:].unique(dim=0).tolist() == [[122, 116, 104]]


def test_a_plan_of_another_image_is_refused_with_both_sizes():
    plan = plan_image((10, 20), PRESETS["hd448"])
    with pytest.raises(ValueError, match=r"\(10, 20\).*\(20, 10\)"):
        tile_image(noise((20, 10)), plan)
    with pytest.raises(ValueError, match="this one is L"):
        tile_image(noise((10, 20)).convert("L"), plan)
