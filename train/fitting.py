"""What a recipe leaves to the memory: `gradient_checkpointing: auto` and `data.pack_tokens: auto`.

The estimate (estimate_memory.py) traces the largest pass that the data can make and says what a
rank's memory holds at its peak. Activations are recomputed only where the passes would not fit
otherwise; packs become as large as fits. Neither changes what a step learns from, nor its loss.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..model.processor import Processor
from .config import TrainConfig
from .estimate import ACCURACY
from .estimate_memory import GIB, run_memory
from .estimate_model import outline_run
from .estimate_samples import Samples, largest_pass, measure_samples
from .packs import ROUND_TO, default_pack_tokens
from .sources import RecordSet

# Where Linux says what a container may have: cgroup 2, and 1.
LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
MEASURED = 2_000  # samples that are looked at, evenly spread over the data


@dataclass(frozen=True)
class Fitted:
    """What was chosen: checkpointing, and the tokens of a pack (None: not asked for). peak: bytes
    of a rank as estimated, of `memory` bytes; fits: whether that leaves the estimate its margin."""

    checkpointing: bool
    pack_tokens: int | None
    peak: int
    memory: int

    @property
    def fits(self) -> bool:
        return self.peak <= allowed(self.memory)

    @property
    def words(self) -> str:
        """The choice for the user."""
        packs = "" if self.pack_tokens is None else f"packs of {self.pack_tokens:,} tokens, "
        activations = "recomputed" if self.checkpointing else "kept"
        warning = "" if self.fits else "; WARNING: this may not fit, see llava-hd estimate"
        return (
            f"fitted to {self.memory / GIB:.1f} GiB: {packs}activations {activations}, estimated "
            f"peak {self.peak / GIB:.2f} GiB{warning}"
        )


def allowed(memory: int) -> int:
    """Bytes that an estimate may come to: the rest is its inaccuracy."""
    return int(memory / (1 + ACCURACY))


def is_left_open(config: TrainConfig) -> bool:
    """Whether a recipe leaves anything to the memory."""
    return "auto" in (config.gradient_checkpointing, config.data.pack_tokens)


def rank_memory(device: torch.device, local_ranks: int) -> int:
    """Bytes that a rank may use: its GPU's, or its share of the machine's, or of its container's
    limit where that is less."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    told = [file.read_text(encoding="ascii").strip() for file in LIMITS if file.is_file()]
    found += [int(limit) for limit in told if limit.isdecimal()]  # "max" is none
    return min(found) // local_ranks


def fit_to_memory(
    config: TrainConfig,
    processor: Processor,
    records: RecordSet,
    longest: int,
    samples_per_step: int,
    world_size: int,
    memory: int,
    on_gpu: bool,
) -> Fitted:
    """Choose what the recipe leaves open. longest: tokens of the longest sample.

    Where packs are open too, activations are kept if that lets a pack hold per_device_batch_size
    mean samples; smaller packs would cost more than computing activations twice.
    """
    samples = measure_samples(config, processor, records, records.image, at_most=MEASURED)
    open_checkpointing = config.gradient_checkpointing == "auto"
    choices = (False, True) if open_checkpointing else (config.gradient_checkpointing is True,)
    usual = default_pack_tokens(samples.total, config.per_device_batch_size, samples_per_step)
    fitted = None
    most = int(np.ceil(samples.total.mean() * samples_per_step / world_size))
    for checkpointing in choices:
        peak = _peaks(config, samples, checkpointing, samples_per_step, world_size, on_gpu)
        tokens = None
        if config.data.pack_tokens == "auto":
            least = max(longest, int(samples.total.max()))
            tokens = largest_that_fits(peak, allowed(memory), least, most)
        fitted = Fitted(checkpointing, tokens, peak(tokens), memory)
        if fitted.fits and (tokens is None or tokens >= min(usual, _rounded(most))):
            break
    assert fitted is not None
    return fitted


def _peaks(
    config: TrainConfig,
    samples: Samples,
    checkpointing: bool,
    samples_per_step: int,
    world_size: int,
    on_gpu: bool,
) -> Callable[[int | None], int]:
    """Tokens of a pack (None: as the recipe says) -> estimated peak of a rank in bytes."""
    run = outline_run(replace(config, gradient_checkpointing=checkpointing))
    passes = config.accumulation(world_size)

    def peak(tokens: int | None) -> int:
        data = config.data if tokens is None else replace(config.data, pack_tokens=tokens)
        shape = largest_pass(replace(config, data=data), samples, samples_per_step)
        return run_memory(run, config, shape, world_size, passes, on_gpu).peak

    return peak


def largest_that_fits(peak: Callable[[int], int], limit: int, least: int, most: int) -> int:
    """The largest multiple of 128 between `least` and `most`, rounded up, whose peak, which grows
    with it, is within the limit; the least one where none is."""
    low, high = _rounded(least) // ROUND_TO, _rounded(max(least, most)) // ROUND_TO
    while low < high:
        middle = (low + high + 1) // 2
        if peak(middle * ROUND_TO) <= limit:
            low = middle
        else:
            high = middle - 1
    return low * ROUND_TO


def _rounded(tokens: int) -> int:
    return -(-tokens // ROUND_TO) * ROUND_TO
