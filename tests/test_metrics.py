"""Counts of a step add up over passes and ranks, and the metrics that are written of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import IMAGE_ID, text_config, tiny_hd, vision_config

from llava_hd.model.config import LlavaHDConfig
from llava_hd.model.packing import Sample, pack
from llava_hd.train.config import BOARD_FOLDER, METRICS_FILE
from llava_hd.train.metrics import MetricsWriter, StepCounts, StepMetrics, read_metrics

CONFIG = LlavaHDConfig(
    hd=tiny_hd("hdflex"),
    vision=vision_config().to_dict(),
    text=text_config().to_dict(),
    image_token_id=IMAGE_ID,
)


def text(length: int) -> Sample:
    return Sample(range(9, 9 + length), range(9, 9 + length))


def test_counts_tell_useful_tokens_from_padding_and_packs_from_dummies():
    packs = [
        pack([text(5), text(3)], CONFIG, padded=True),
        pack([], CONFIG),
        pack([text(4)], CONFIG),
    ]
    counts = StepCounts.of(packs)
    assert counts == StepCounts(
        samples=3, tokens=12, padding=3, packs=2, label_tokens=9, loss_units=9, images=0
    )
    assert counts.padding_share == 3 / 15
    assert counts.fill(8) == 12 / 16 and counts.fill(None) is None
    assert StepCounts.of([pack([text(5), text(3)], CONFIG, "sample")]).loss_units == 2


def test_counts_of_ranks_add_up():
    packs = [pack([text(n), text(2)], CONFIG) for n in (3, 4, 6)]
    ranks = [StepCounts.of(packs[:1]), StepCounts.of(packs[1:]), StepCounts.of([])]
    summed = [sum(values) for values in zip(*(rank.values() for rank in ranks), strict=True)]
    assert StepCounts(*summed) == ranks[0] + ranks[1] + ranks[2] == StepCounts.of(packs)


def test_nothing_computed_is_no_padding():
    assert StepCounts().padding_share == 0 and StepCounts().fill(100) is None


METRICS = StepMetrics(
    step=1, epoch=0.1, loss=2.0, lr=1e-3, grad_norm=1.0, samples=4, tokens=100, label_tokens=20,
    images=3, seconds=2.0, tokens_per_second=50.0, images_per_second=1.5, padding=0.25,
    pack_fill=0.9,
)  # fmt: skip


def test_padding_and_fill_are_written_and_read(tmp_path):
    steps = [METRICS, replace(METRICS, step=2, padding=0.0, pack_fill=None)]
    with MetricsWriter(tmp_path, 0) as writer:
        for metrics in steps:
            writer.write(metrics)
    assert read_metrics(tmp_path) == steps
    lines = (tmp_path / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[1])["pack_fill"] is None
    board = EventAccumulator(str(tmp_path / BOARD_FOLDER))
    board.Reload()
    padding = [event.value for event in board.Scalars("train/padding")]
    assert padding == pytest.approx([0.25, 0.0])
    assert [event.step for event in board.Scalars("train/pack_fill")] == [1]
