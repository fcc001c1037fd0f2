"""Limits of resolution: the same grid and count as trying every shape, by transformers' figures."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_image, tiny_hd, tiny_tokenizer
from train_data import changed, write_data
from transformers import LlavaNextProcessor
from transformers.image_processing_utils import select_best_resolution

from llava_hd.hd.errors import DataError, UsageError
from llava_hd.hd.grid import FLEXIBLE_GRIDS, PRESETS, HDConfig, grids_up_to
from llava_hd.hd.limits import (
    NO_LIMITS,
    ResolutionLimits,
    beyond_training,
    limited,
    parse_grid,
)
from llava_hd.hd.plan import TooManyTokens, plan_image
from llava_hd.model.assemble import assemble
from llava_hd.model.export import refuse_inexpressible
from llava_hd.model.foreign import read_config
from llava_hd.model.generate import answer
from llava_hd.model.packing import pack
from llava_hd.model.processor import Processor
from llava_hd.train.data_check import check_data
from llava_hd.train.data_check_report import report_of
from llava_hd.train.data_check_tokens import CheckSettings
from llava_hd.train.dataset import run_passes
from llava_hd.train.estimate_model import outline_run
from llava_hd.train.estimate_samples import largest_image
from llava_hd.train.prepare import check_model_source, resolution_words
from llava_hd.train.recipe import config_from
from llava_hd.train.run import build_model
from llava_hd.train.settings import ModelSource
from llava_hd.train.sources import open_records

HDFLEX = PRESETS["hdflex"]
SIDES = st.integers(1, 4000)


def every_shape(max_tiles: int) -> list[tuple[int, int]]:
    sides = range(1, max_tiles + 1)
    return [(rows, cols) for rows in sides for cols in sides if rows * cols <= max_tiles]


def tokens_of(size: tuple[int, int], grid: tuple[int, int], config: HDConfig) -> int:
    """transformers' count for an image on a grid, with the global view."""
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    side = config.patches_per_side
    unpadded, row_ends = processor._get_unpadded_features(*size, side, side, *grid)
    return unpadded + row_ends + side**2


@pytest.mark.parametrize("max_tiles", [1, 2, 4, 6, 9, 16])
def test_max_tiles_allows_every_shape_and_the_best_is_taken(max_tiles: int) -> None:
    config = limited(PRESETS["hd448"], ResolutionLimits(max_tiles=max_tiles))
    assert sorted(config.grids) == sorted(every_shape(max_tiles))
    pixels = [[rows * 224, cols * 224] for rows, cols in config.grids]
    draw = random.Random(max_tiles)
    for _ in range(200):
        size = draw.randint(1, 3000), draw.randint(1, 3000)
        height, width = select_best_resolution(size, pixels)
        assert plan_image(size, config).grid == (height // 224, width // 224)


def test_six_tiles_are_the_flexible_preset() -> None:
    assert limited(PRESETS["hd448"], ResolutionLimits(max_tiles=6)) == HDFLEX
    assert grids_up_to(6) == FLEXIBLE_GRIDS
    assert limited(HDFLEX, NO_LIMITS) == HDFLEX


@settings(max_examples=200)
@given(SIDES, SIDES, st.integers(1, 9), st.integers(250, 2600))
def test_max_visual_tokens_takes_the_best_grid_that_fits(
    height: int, width: int, max_tiles: int, most: int
) -> None:
    size = (height, width)
    if max(size) > 10 * min(size):  # transformers keeps nothing of these
        return
    config = limited(HDFLEX, ResolutionLimits(max_tiles=max_tiles, max_visual_tokens=most))
    counts = {grid: tokens_of(size, grid, HDFLEX) for grid in config.grids}
    fitting = [grid for grid in config.grids if counts[grid] <= most]
    if not fitting:
        with pytest.raises(TooManyTokens, match=f"at least {min(counts.values())} visual tokens"):
            plan_image(size, config)
        return
    pixels = [[rows * 224, cols * 224] for rows, cols in fitting]
    best_height, best_width = select_best_resolution(size, pixels)
    plan = plan_image(size, config)
    assert plan.grid == (best_height // 224, best_width // 224)
    assert plan.num_tokens == counts[plan.grid] <= most


@pytest.mark.parametrize("preset", ["hdflex", "hdflex-paper"])
def test_a_fitting_plan_is_that_of_its_grid_alone(preset: str) -> None:
    config = limited(PRESETS[preset], ResolutionLimits(max_visual_tokens=900))
    draw = random.Random(5)
    for _ in range(100):
        size = draw.randint(1, 2000), draw.randint(1, 2000)
        plan = plan_image(size, config)
        alone = plan_image(size, replace(PRESETS[preset], grids=(plan.grid,)))
        assert replace(plan, config=alone.config) == alone
        others = [plan_image(size, replace(PRESETS[preset], grids=(g,))) for g in config.grids]
        assert plan.num_tokens <= 900 and plan in [replace(o, config=config) for o in others]


def test_one_grid_is_forced_and_may_be_limited_too() -> None:
    config = limited(HDFLEX, ResolutionLimits(grid=(2, 3)))
    assert plan_image((2000, 30), config).grid == (2, 3)
    tight = limited(HDFLEX, ResolutionLimits(grid=(2, 2), max_visual_tokens=1000))
    with pytest.raises(
        TooManyTokens,
        match=r"an image of 480x640 px needs at least 1048 visual tokens \(grid 2x2\), more than "
        r"max_visual_tokens 1000; raise it to 1048, or allow smaller grids",
    ):
        plan_image((480, 640), tight)
    assert plan_image((100, 900), tight).num_tokens <= 1000


def test_one_view_has_one_count_and_no_tiles() -> None:
    base = PRESETS["base336"]
    exact = limited(base, ResolutionLimits(max_visual_tokens=576))
    assert plan_image((480, 640), exact).num_tokens == 576
    with pytest.raises(TooManyTokens, match="at least 576 visual tokens, more than"):
        plan_image((480, 640), limited(base, ResolutionLimits(max_visual_tokens=575)))
    for limits in (ResolutionLimits(max_tiles=4), ResolutionLimits(grid=(2, 2))):
        with pytest.raises(UsageError, match="sees one view of 336 px and no tiles; leave it out"):
            limited(base, limits)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tiles": 0}, "max_tiles must be a whole number from 1, not 0"),
        ({"max_tiles": True}, "max_tiles must be a whole number"),
        ({"max_tiles": 145}, "too many; give at most 144"),
        ({"max_visual_tokens": -1}, "max_visual_tokens must be a whole number from 1"),
        ({"grid": (0, 2)}, "grid must be rows and columns from 1"),
        ({"grid": (2, 2, 2)}, "grid must be rows and columns"),
        ({"grid": "2x2"}, "grid must be rows and columns"),
        ({"grid": (100, 100)}, "grid 100x100 has too many tiles; at most 144"),
        ({"grid": (2, 2), "max_tiles": 4}, "max_tiles 4 has no place; leave one of them out"),
    ],
)
def test_limits_that_make_no_sense_are_refused(values: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ResolutionLimits(**values)


def test_a_grid_is_written_rows_x_columns() -> None:
    assert parse_grid("2x3") == (2, 3) and parse_grid(" 12X1 ") == (12, 1)
    for wrong in ("2", "2x", "x", "2x3x4", "-1x2", "2,3", "", "٢x٣"):
        with pytest.raises(UsageError, match="is not ROWSxCOLS; give one such as 2x3"):
            parse_grid(wrong)


def test_what_goes_beyond_training_is_told_in_one_line() -> None:
    def told(trained: HDConfig, **limits: object) -> str | None:
        return beyond_training(trained, limited(trained, ResolutionLimits(**limits)))

    assert told(HDFLEX) is None and told(HDFLEX, max_tiles=6) is None
    assert told(HDFLEX, max_tiles=4) is None and told(HDFLEX, grid=(1, 6)) is None
    assert told(HDFLEX, max_visual_tokens=800) is None
    line = told(HDFLEX, max_tiles=9)
    assert line is not None and "trained on grids of at most 6 tiles, used with at most 9" in line
    assert "(9 new: 1x7, 1x8, 1x9, 7x1, ...)" in line
    assert "4 tiles, used with at most 2 (1 new: 1x2)" in str(told(PRESETS["hd448"], grid=(1, 2)))
    tight = limited(HDFLEX, ResolutionLimits(max_visual_tokens=800))
    assert told(tight, max_visual_tokens=700) is None
    assert "at most 800 visual tokens" in str(told(tight, max_visual_tokens=900))
    assert "used with any number" in str(beyond_training(tight, HDFLEX))


def test_a_limited_geometry_survives_json_and_older_files_mean_no_limit() -> None:
    tight = limited(HDFLEX, ResolutionLimits(max_visual_tokens=800))
    assert HDConfig.from_dict(tight.to_dict()) == tight
    assert "max_visual_tokens" not in HDFLEX.to_dict()
    with pytest.raises(UsageError, match=r"hd\.max_visual_tokens must be a whole number"):
        replace(HDFLEX, max_visual_tokens=0)


@torch.inference_mode()
def test_a_model_answers_with_limits_as_a_model_of_that_geometry(parts) -> None:
    limits = ResolutionLimits(max_tiles=9, max_visual_tokens=60)
    image = random_image((150, 200))
    known = {"vision": parts / "vision", "language": parts / "language"}
    model, processor = assemble(**known, hd=tiny_hd("hdflex"))
    native, own = assemble(**known, hd=limited(tiny_hd("hdflex"), limits))
    small = processor.limited(limits)
    assert small.config.hd == own.config.hd
    cut = small.cut(image)
    assert cut.plan.num_tokens <= 60 < processor.cut(image).plan.num_tokens
    one, two = small.question("red?", [cut]), own.question("red?", [image])
    torch.testing.assert_close(
        model.eval().logits(pack([one], model.config)),
        native.eval().logits(pack([two], native.config)),
        rtol=0,
        atol=0,
    )
    assert answer(model, small, image, "red?", 8) == answer(native, own, image, "red?", 8)


def test_limits_are_given_when_a_folder_is_read(parts, tmp_path) -> None:
    model, processor = assemble(
        vision=parts / "vision", language=parts / "language", hd=tiny_hd("hdflex")
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    read = Processor.from_pretrained(tmp_path, ResolutionLimits(grid=(1, 2)))
    assert read.cut(random_image((100, 100))).plan.grid == (1, 2)
    assert Processor.from_pretrained(tmp_path).config.hd == model.config.hd


def test_plans_of_another_reading_still_go_into_no_pack(parts) -> None:
    model, processor = assemble(
        vision=parts / "vision", language=parts / "language", hd=tiny_hd("hdflex")
    )
    other = replace(processor.config, hd=tiny_hd("hdflex-paper"))
    sample = Processor(tiny_tokenizer(), other).question("red?", [random_image((60, 90))])
    with pytest.raises(ValueError, match="planned for another geometry"):
        pack([sample], model.config)


def test_a_limit_of_tokens_is_not_exported(parts) -> None:
    model, _ = assemble(vision=parts / "vision", language=parts / "language", hd=tiny_hd("hdflex"))
    for format in ("llava_next", "llava"):
        refuse_inexpressible(model.config, format)
        hd = limited(model.config.hd, ResolutionLimits(max_visual_tokens=60))
        with pytest.raises(UsageError, match=r"cannot express hd\.max_visual_tokens 60"):
            refuse_inexpressible(replace(model.config, hd=hd), format)


def trained_folder(parts, folder) -> Path:
    model, processor = assemble(
        vision=parts / "vision", language=parts / "language", hd=tiny_hd("hdflex")
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_training_goes_on_within_other_limits_and_saves_them(parts, tmp_path) -> None:
    folder = trained_folder(parts, tmp_path / "old")
    data = write_data(tmp_path / "data")
    values = {
        "stage": "finetune",
        "output_dir": str(tmp_path / "out"),
        "model": {"path": str(folder), "max_tiles": 9, "max_visual_tokens": 120},
        "data": {"path": str(data / "data.json"), "images": str(data / "images")},
        "precision": "fp32",
    }
    config = config_from(values)
    words = resolution_words(config.model)
    assert words is not None and "at most 6 tiles, used with at most 9" in words
    model, processor = build_model(config, None)
    expected = limited(tiny_hd("hdflex"), ResolutionLimits(9, 120))
    assert model.config.hd == processor.config.hd == expected
    model.save_pretrained(tmp_path / "new")
    assert read_config(tmp_path / "new").hd == expected
    outlined = outline_run(config)
    assert outlined.model.config.hd == expected
    assert largest_image(expected) == (120, 10)  # nine tiles and the global view
    # What fits nowhere is a bad sample, with its record and the remedy.
    records = open_records(config.data.paths, config.data.images, False)
    reader = run_passes(changed(config, model__max_visual_tokens=20), records, processor).read
    small = replace(reader, processor=processor.limited(ResolutionLimits(max_visual_tokens=20)))
    with pytest.raises(DataError, match=r"data.json.*needs at least \d+ visual tokens"):
        small(1)
    assert resolution_words(replace(config.model, max_tiles=4)) is None
    with pytest.raises(UsageError, match=r"model\.max_tiles must be"):
        replace(config.model, max_tiles=0)


def test_a_whole_model_without_tiles_takes_no_limit_of_tiles(parts, tmp_path) -> None:
    hd = replace(tiny_hd("base224"), tile_px=56, patch_px=14)
    model, processor = assemble(vision=parts / "vision", language=parts / "language", hd=hd)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"model\.max_tiles has no meaning"):
        check_model_source(ModelSource(path=str(tmp_path), max_tiles=4))


def test_data_check_tells_images_that_no_grid_brings_within_the_limit(parts, tmp_path) -> None:
    data = write_data(tmp_path / "data")
    hd = replace(tiny_hd("hdflex"), max_visual_tokens=20)
    checked = check_data([str(data / "data.json")], data / "images", CheckSettings(hd))
    assert checked.count("sample") == sum(bool(record.images) for record in checked.records)
    report = report_of(checked, CheckSettings(hd))
    assert report["tiles"] == {"none fits": checked.num_images}
    assert "max_visual_tokens 20; raise it to" in report["faults"][0]["reason"]
