"""A tiny run to be estimated, its records and their sizes."""

from __future__ import annotations

from pathlib import Path

from train_data import tiny_config, write_data

from llava_hd.train.config import TrainConfig
from llava_hd.train.estimate_model import outline_run
from llava_hd.train.estimate_samples import Samples, measure_samples
from llava_hd.train.sources import RecordSet, open_records


def small_run(folder: Path, parts: Path) -> TrainConfig:
    """Stage 1 on the tiny data set."""
    return tiny_config(write_data(folder / "data"), parts, folder / "out", stage="pretrain")


def records_of(config: TrainConfig) -> RecordSet:
    """Its data, opened."""
    return open_records(config.data.paths, config.data.images)


def measured(config: TrainConfig) -> Samples:
    """The sizes of its samples."""
    records = records_of(config)
    processor = outline_run(config).processor
    assert processor is not None
    return measure_samples(config, processor, records, records.image)
