"""bench packing: the same samples and the same loss for everyone, and figures that add up."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch

from llava_hd.bench.measure import result_folder
from llava_hd.bench.packing import (
    RECORD,
    TABLE,
    Request,
    nano_model,
    prepare_data,
    run_benchmark,
)
from llava_hd.bench.packing_data import (
    NANO,
    SETTINGS,
    draw,
    picture,
    records_of,
)
from llava_hd.bench.packing_passes import CONTESTANTS, RIVALS, make_passes
from llava_hd.cli.main import main
from llava_hd.hd.errors import UsageError
from llava_hd.hd.grid import PRESETS
from llava_hd.hd.image import read_size
from llava_hd.hd.plan import plan_image

SMALL = Request(batch=4, step_samples=12, steps=2)


@pytest.fixture(scope="module")
def nano():
    return nano_model(0)


@pytest.mark.parametrize("setting", SETTINGS)
def test_drawn_pictures_get_the_grid_that_they_get_at_full_size(setting):
    drawn = draw(setting, 60, seed=1)
    assert drawn == draw(setting, 60, seed=1) != draw(setting, 60, seed=2)
    for one, record in zip(drawn, records_of(drawn), strict=True):
        assert bool(record.images) == (one.size is not None)
        if one.size is None:
            continue
        size = read_size(picture(record, 0))
        assert size == tuple(max(1, round(side / NANO.image)) for side in one.size)
        if all(side % NANO.image == 0 for side in one.size):  # else a pixel may be rounded off
            nano_grid, grid = plan_image(size, NANO.hd).grid, PRESETS["hdflex"]
            assert nano_grid == plan_image(one.size, grid).grid


def test_the_settings_have_the_lengths_that_they_promise():
    words = {name: np.array([one.words for one in draw(name, 4000, 0)]) for name in SETTINGS}
    assert 230 <= np.median(words["hd"]) <= 360 and words["hd"].max() > 1500
    text = [one.words for one in draw("mix665k", 4000, 0) if one.size is None]
    assert 0.045 < len(text) / 4000 < 0.08 and np.median(text) > 800  # ShareGPT's share


@pytest.mark.parametrize("setting", SETTINGS)
def test_everyone_computes_the_same_samples_and_the_same_loss(setting, nano):
    model, processor = nano
    data = prepare_data(setting, SMALL, processor)
    expected = sorted(data.lengths.total[data.order.samples(1)].tolist())
    losses = {}
    for name in CONTESTANTS:
        passes = make_passes(name, data.order, 1, data.read, model)
        lengths = []
        for one in passes:
            own = one.batch.cu_seqlens.diff()
            begins = one.batch.ids[one.batch.cu_seqlens[:-1]]
            real = own[begins != 0]  # a sample begins with its start token, padding is all zeros
            lengths += real.tolist()
            assert one.num_tokens >= one.batch.num_useful_tokens
            if name in ("padded", "padded-rows"):
                assert one.batch.num_samples == SMALL.batch
                assert one.num_tokens == SMALL.batch * int(real.max())
            if name == "modality":
                parts = one.batch.source.ge(0).split(own.tolist())
                assert len({bool(part.any()) for part in parts}) == 1
        assert sorted(lengths) == expected
        units = sum(one.batch.loss_units for one in passes)
        with torch.no_grad():
            losses[name] = float(sum(one.loss_sum(model).double() for one in passes)) / units
    for name in RIVALS:
        assert losses[name] == pytest.approx(losses["packs"], rel=1e-6)


def test_the_dense_batch_has_the_packs_gradients(nano):
    model, processor = nano
    data = prepare_data("hd", SMALL, processor)
    gradients = {}
    for name in ("packs", "padded"):
        model.zero_grad(set_to_none=True)
        for one in make_passes(name, data.order, 0, data.read, model):
            one.loss_sum(model).backward()
        gradients[name] = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad(set_to_none=True)
    for a, b in zip(gradients["packs"], gradients["padded"], strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max() + 1e-6


def test_a_run_leaves_its_record_and_its_threads(tmp_path, capsys):
    threads = torch.get_num_threads()
    words = ["--lengths", "hd", "--batch", "4", "--step-samples", "8", "--steps", "2", "--json"]
    assert main(["bench", "packing", *words, "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    shown = json.loads(capsys.readouterr().out)
    record = json.loads((tmp_path / RECORD).read_text(encoding="utf-8"))
    assert shown["rows"] == record["rows"] and shown["ratios"] == record["ratios"]
    rows = {row["contestant"]: row for row in record["rows"]}
    assert list(rows) == list(CONTESTANTS)
    assert len({row["useful_tokens"] for row in rows.values()}) == 1
    assert rows["packs"]["padding"] == 0 and 0 < rows["packs"]["pack_fill"] <= 1
    assert max(row["largest_loss_difference"] for row in rows.values()) < 1e-5
    for ratio in record["ratios"]:
        packs, rival = rows["packs"], rows[ratio["rival"]]
        assert ratio["ratio"] == pytest.approx(rival["seconds"] / packs["seconds"], rel=0.01)
        assert ratio["bound"] == pytest.approx(
            rival["computed_tokens"] / packs["computed_tokens"], rel=1e-3
        )
    with (tmp_path / TABLE).open(encoding="utf-8") as file:
        assert [row["contestant"] for row in csv.DictReader(file)] == list(CONTESTANTS)
    assert {"command", "device", "versions", "seed"} <= record["environment"].keys()


def test_bad_usage_is_told_before_anything_is_measured(tmp_path):
    with pytest.raises(UsageError, match="--step-samples 10 is not a multiple of --batch 4"):
        Request(batch=4, step_samples=10)
    with pytest.raises(UsageError, match="--steps must be 1 or more"):
        Request(steps=0)
    (tmp_path / RECORD).write_text("{}")
    with pytest.raises(UsageError, match=r"holds packing\.json already"):
        run_benchmark(Request(out=tmp_path), print)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        result_folder(tmp_path / "file", torch.device("cpu"), RECORD)
