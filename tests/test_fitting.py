"""train/fitting.py: what the memory decides fits it, and no step learns anything else."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_feature_cache import Told
from train_data import tiny_config, write_data

from llava_hd.hd.errors import UsageError
from llava_hd.train import fitting
from llava_hd.train.estimate_memory import run_memory
from llava_hd.train.estimate_model import outline_run
from llava_hd.train.estimate_samples import largest_pass, measure_samples
from llava_hd.train.fitting import (
    Fitted,
    allowed,
    fit_to_memory,
    largest_that_fits,
    rank_memory,
)
from llava_hd.train.metrics import read_metrics
from llava_hd.train.packs import default_pack_tokens
from llava_hd.train.run import train
from llava_hd.train.sources import open_records

STEP = 12  # samples


@pytest.fixture(scope="module")
def base(tmp_path_factory, parts):
    data = write_data(tmp_path_factory.mktemp("data"))
    return tiny_config(
        data, parts, data / "out", stage="pretrain", data__batching="packs",
        per_device_batch_size=4, global_batch_size=STEP, max_steps=2,
    )  # fmt: skip


def fit(config, memory: int) -> Fitted:
    run = outline_run(replace(config, gradient_checkpointing=False))
    records = open_records(config.data.paths, config.data.images)
    return fit_to_memory(config, run.processor, records, 1, STEP, 1, memory, on_gpu=True)


def peak_of(config, checkpointing: bool, tokens: int) -> int:
    chosen = replace(
        config, gradient_checkpointing=checkpointing,
        data=replace(config.data, pack_tokens=tokens),
    )  # fmt: skip
    run = outline_run(chosen)
    records = open_records(config.data.paths, config.data.images)
    samples = measure_samples(chosen, run.processor, records, records.image)
    return run_memory(run, chosen, largest_pass(chosen, samples, STEP), 1, 3, on_gpu=True).peak


def test_activations_are_recomputed_only_where_they_do_not_fit(base):
    config = replace(base, gradient_checkpointing="auto")
    plenty = fit(config, 2**40)
    assert not plenty.checkpointing and plenty.fits and plenty.pack_tokens is None
    assert "activations kept" in plenty.words
    tight = fit(config, int(plenty.peak * 1.15) - 2**10)
    assert tight.checkpointing and tight.peak < plenty.peak and "recomputed" in tight.words
    assert fit(config, int(plenty.peak * 1.15) + 2**10) == replace(
        plenty, memory=int(plenty.peak * 1.15) + 2**10
    )
    nothing = fit(config, 2**20)
    assert nothing.checkpointing and not nothing.fits and "WARNING" in nothing.words


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packs_are_as_large_as_fits_and_no_larger(base, checkpointing):
    config = replace(
        base, gradient_checkpointing=checkpointing, data=replace(base.data, pack_tokens="auto")
    )
    largest = fit(config, 2**40)
    assert largest.pack_tokens % 128 == 0 and largest.fits
    memory = int(1.15 * peak_of(base, checkpointing, largest.pack_tokens - 256))
    found = fit(config, memory + 2**10)
    assert found.pack_tokens == largest.pack_tokens - 256
    assert found.peak == peak_of(base, checkpointing, found.pack_tokens) <= allowed(found.memory)
    assert peak_of(base, checkpointing, found.pack_tokens + 128) > allowed(found.memory)


def test_both_left_open_recompute_rather_than_make_small_packs(base):
    config = replace(
        base, gradient_checkpointing="auto", data=replace(base.data, pack_tokens="auto")
    )
    records = open_records(base.data.paths, base.data.images)
    processor = outline_run(base).processor
    lengths = measure_samples(base, processor, records, records.image).total
    usual = default_pack_tokens(lengths, base.per_device_batch_size, STEP)
    enough = fit(config, int(1.15 * peak_of(base, False, usual)) + 2**10)
    assert not enough.checkpointing and enough.pack_tokens == usual
    less = fit(config, int(1.15 * peak_of(base, False, usual)) - 2**10)
    assert less.checkpointing and less.fits and less.pack_tokens >= usual


def test_the_largest_multiple_is_found():
    for limit in (0, 127, 128, 500, 1000, 5000):
        expected = min(max(256, limit // 128 * 128), 1024)
        assert largest_that_fits(lambda tokens: tokens, limit, 200, 1000) == expected


def test_a_run_that_leaves_all_open_learns_the_same(base, tmp_path):
    told = Told()
    plain = replace(base, output_dir=str(tmp_path / "plain"))
    fitted = replace(
        base, output_dir=str(tmp_path / "auto"), gradient_checkpointing="auto",
        data=replace(base.data, pack_tokens="auto"),
    )  # fmt: skip
    train(plain)
    train(fitted, told)
    assert any(line.startswith("fitted to ") and "packs of" in line for line in told.lines)
    losses = [[m.loss for m in read_metrics(Path(c.output_dir))] for c in (plain, fitted)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    text = (tmp_path / "auto/train_config.yaml").read_text(encoding="utf-8")
    assert "pack_tokens: auto" in text and "gradient_checkpointing: auto" in text


@pytest.mark.parametrize("limit", ["max\n", "9223372036854771712\n", None])
def test_a_rank_has_its_share_of_machine_or_container(tmp_path, monkeypatch, limit):
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(fitting, "LIMITS", (tmp_path / "memory.max", tmp_path / "none"))
    assert rank_memory(torch.device("cpu"), 2) == machine // 2
    (tmp_path / "memory.max").write_text("1000000\n")
    assert rank_memory(torch.device("cpu"), 2) == 500_000


def test_packs_of_auto_size_need_packs(base):
    with pytest.raises(UsageError, match=r"data\.pack_tokens auto needs data\.batching packs"):
        replace(base.data, pack_tokens="auto", batching="plain")
