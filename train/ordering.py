"""The data order of a run: what its records and their lengths come to under its configuration."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..model.processor import Processor
from .batches import BatchOrder
from .config import TrainConfig
from .lengths import LengthReader, Lengths, token_lengths
from .packs import default_pack_tokens
from .sources import RecordSet
from .workers import Done, num_cores

NEED_LENGTHS = ("packs", "modality")


def run_order(
    config: TrainConfig,
    records: RecordSet,
    samples_per_step: int,
    lengths: np.ndarray | None = None,
) -> BatchOrder:
    """The order of a run. lengths: int `[records]`, tokens; without them the order tells how many
    steps there are, but not how packs and batches by modality are made up."""
    batching = config.data.batching
    pack_tokens = None
    if batching in NEED_LENGTHS and lengths is None:
        lengths = np.zeros(len(records), dtype=np.int32)
        pack_tokens = 1
    elif batching == "packs" and lengths is not None:
        pack_tokens = config.data.pack_tokens or default_pack_tokens(
            lengths, config.per_device_batch_size, samples_per_step
        )
    has_image = None
    if batching == "modality":
        has_image = np.array([records.has_image(i) for i in range(len(records))])
    return BatchOrder(
        num_samples=len(records),
        samples_per_step=samples_per_step,
        samples_per_pass=config.per_device_batch_size,
        seed=config.seed,
        batching=batching,
        has_image=has_image,
        lengths=lengths if batching in NEED_LENGTHS else None,
        pack_tokens=pack_tokens,
    )


def run_lengths(
    config: TrainConfig, records: RecordSet, processor: Processor, say: Callable[[str], None]
) -> Lengths:
    """The tokens of every record, counted by as many processes as there are cores, or taken from
    the user's cache; `say` tells how far it is."""
    reader = LengthReader(
        records, records.image, processor, config.sample_template, config.max_length
    )
    source = f"{records.digest()} {Path(config.data.images).resolve()}"
    workers = num_cores() if len(records) > FEW else 0
    return token_lengths(reader, source, cache_folder(), workers, told_in_tenths(say))


FEW = 2_000  # records that are counted sooner than processes start


def told_in_tenths(say: Callable[[str], None]) -> Done:
    """Progress as a line for each tenth."""
    told = 0

    def done(what: str, count: int, total: int) -> None:
        nonlocal told
        if total > FEW and 10 * count // total > told:
            told = 10 * count // total
            say(f"counting tokens: {count:,} of {total:,} records")

    return done


def cache_folder() -> Path:
    """The user's cache of what was counted."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "llava-hd"
