"""bench loader: everyone gets the same files, pixels are equal, figures add up."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from llava_hd.bench import loader_data
from llava_hd.bench.loader import PRESETS, RECORD, TABLE, Request, check_pixels, run_benchmark
from llava_hd.bench.loader_data import (
    NORMALISED,
    OURS,
    PILLOW,
    RIVAL,
    contestants,
    draw_sizes,
    photo_like,
    write_files,
)
from llava_hd.cli.main import main
from llava_hd.hd.errors import LlavaHDError, UsageError
from llava_hd.hd.grid import get_preset
from llava_hd.hd.image import read_size
from llava_hd.model.nano import SHIPPED
from llava_hd.model.processor import read_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"), draw_sizes(4, seed=0), seed=0)


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer(SHIPPED / "lm")


def test_files_have_real_sizes_and_weigh_what_photos_weigh(files):
    sizes = draw_sizes(4, seed=0)
    assert [read_size(file) for file in files] == sizes == draw_sizes(8, seed=0)[:4]
    per_pixel = sum(f.stat().st_size for f in files) / sum(h * w for h, w in sizes)
    assert 0.3 < per_pixel < 0.8  # COCO's files have about 0.5
    pixels = photo_like((96, 128), 1).astype(float)
    neighbours = np.corrcoef(pixels[:, 1:, 0].ravel(), pixels[:, :-1, 0].ravel())[0, 1]
    assert neighbours > 0.6  # noise that is not like a photo has 0


@pytest.mark.parametrize("preset", PRESETS)
def test_everyone_loads_the_same_pixels_and_as_many_tokens(preset, files, tokenizer):
    made = contestants(files, get_preset(preset), tokenizer)
    found = check_pixels(preset, made, [(0, 1), (2, 3)])
    assert found == {
        "preset": preset, "images": 4, "largest_difference": 0.0, "differing": 0
    }  # fmt: skip
    ours, theirs = made[OURS].passes[0, 1].batch, made[RIVAL].passes[0, 1]
    image = int((ours.ids == tokenizer.convert_tokens_to_ids("<image>")).sum())
    their_image = int((theirs["input_ids"] == tokenizer.convert_tokens_to_ids("<image>")).sum())
    assert image == their_image > 0
    assert made[NORMALISED].take(made[OURS].passes[(0,)]).dtype.is_floating_point
    assert (made[PILLOW].passes[0, 1].batch.tiles == ours.tiles).all()


def test_pixels_that_differ_end_the_run(files, tokenizer, monkeypatch):
    made = contestants(files, get_preset("base336"), tokenizer)
    right = loader_data.normalise
    monkeypatch.setattr(loader_data, "normalise", lambda tiles: right(tiles.clamp(min=90)))
    with pytest.raises(LlavaHDError, match=r"base336: .* differ from transformers'"):
        check_pixels("base336", made, [(0, 1)])


def test_a_run_leaves_its_record(tmp_path, capsys):
    words = ["--presets", "base336", "--workers", "0", "1", "--images", "4", "--batch", "2"]
    words += ["--rounds", "1", "--json", "--out", str(tmp_path)]
    assert main(["bench", "loader", *words]) == 0
    shown = json.loads(capsys.readouterr().out)
    record = json.loads((tmp_path / RECORD).read_text(encoding="utf-8"))
    assert shown["rows"] == record["rows"] and shown["ratios"] == record["ratios"]
    keys = [(row["workers"], row["contestant"]) for row in record["rows"]]
    names = [OURS, NORMALISED, PILLOW, RIVAL]
    assert keys == [(workers, name) for workers in (0, 1) for name in names]
    speeds = {key: row["images_per_second"] for key, row in zip(keys, record["rows"], strict=True)}
    for ratio in record["ratios"]:
        expected = speeds[ratio["workers"], ratio["contestant"]] / speeds[ratio["workers"], RIVAL]
        assert ratio["ratio"] == pytest.approx(expected, rel=0.01)
        assert (ratio["cpu_ratio"] is None) == (ratio["workers"] > 0)
    with (tmp_path / TABLE).open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 8
    with pytest.raises(UsageError, match=r"holds loader\.json already"):
        run_benchmark(Request(out=tmp_path), print)


def test_bad_usage_is_told_before_anything_is_measured():
    with pytest.raises(UsageError, match="--rounds must be 1 or more"):
        Request(rounds=0)
    with pytest.raises(UsageError, match="--workers must be 0 or more"):
        Request(workers=(0, -1))
    with pytest.raises(UsageError, match="--presets hd448-paper: transformers has no such"):
        Request(presets=("hd448-paper",))
