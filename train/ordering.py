"""The data order of a run: what its records and their lengths come to under its configuration."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..hd.errors import DataError
from ..model.processor import Processor
from .bad_samples import allowed_bad
from .batches import BatchOrder
from .config import TrainConfig
from .lengths import LengthReader, Lengths, token_lengths
from .packs import default_pack_tokens
from .sources import RecordSet
from .workers import Done, num_cores

if TYPE_CHECKING:
    from .prepare import Job

NEED_LENGTHS = ("packs", "modality")


def run_order(
    config: TrainConfig,
    records: RecordSet,
    samples_per_step: int,
    measured: Lengths | None = None,
) -> BatchOrder:
    """The order of a run. Without measured lengths it tells how many steps there are, but not how
    packs and batches by modality are made up.

    By modality, a sample whose text is kept without its image stays among those with images: the
    order, and so the number of steps, does not depend on which files are broken today.
    """
    batching, lengths = config.data.batching, None
    pack_tokens = has_image = None
    if batching in NEED_LENGTHS:
        lengths = np.zeros(len(records), dtype=np.int32) if measured is None else measured.total
        pack_tokens = 1
    if batching == "packs" and measured is not None:
        given = config.data.pack_tokens
        # `auto` has become a number where a run trains (fitting.py).
        pack_tokens = (
            given
            if isinstance(given, int)
            else default_pack_tokens(measured.total, config.per_device_batch_size, samples_per_step)
        )
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
    return token_lengths(reader, source, cache_folder(), workers, told_in_tenths(say), say)


def checked_lengths(job: Job, processor: Processor, say: Callable[[str], None]) -> Lengths:
    """The tokens of every record. What cannot be trained on is known before the first step:
    DataError where `data.bad_samples` or its limit do not allow it."""
    found = run_lengths(job.config, job.records, processor, say)
    check_faults(job.config, list(found.faults.values()), len(job.records), say)
    return found


def check_faults(
    config: TrainConfig, faults: Sequence[str], count: int, say: Callable[[str], None]
) -> None:
    """Raise DataError where so many faults in `count` samples are not allowed."""
    if not faults:
        return
    if config.data.bad_samples == "error":
        raise DataError(f"{faults[0]} ({len(faults)} of {count} samples are bad)")
    allowed = allowed_bad(config.data.bad_sample_limit, count)
    if len(faults) > allowed:
        raise DataError(
            f"{len(faults)} of {count} samples are bad, {allowed} are allowed "
            f"(data.bad_sample_limit); the first: {faults[0]}; run llava-hd data check"
        )
    say(f"{len(faults)} of {count} samples are bad, such as {faults[0]}")


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
