"""A run looked at before it starts: the lengths of its samples, its heaviest passes really read and
packed, their memory. Nothing is written, no weight is read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..hd.errors import DataError, UsageError
from .batches import BatchOrder
from .dataset import BadPass, run_passes
from .estimate_memory import Memory, run_memory
from .estimate_model import Outline, outline_run
from .estimate_samples import PlacedPass, Samples, heaviest_passes, measure_samples
from .estimate_trace import PassShape
from .lengths import Lengths
from .ordering import check_faults, run_order
from .prepare import Job
from .workers import Done, silent

LOOKED_AT = 200  # steps that figures of passes are taken from, evenly spread


@dataclass(frozen=True)
class ReadPass:
    """A pass of the run, read: where it is, what it is, and a rank's memory in it."""

    place: PlacedPass
    shape: PassShape
    memory: Memory


@dataclass(frozen=True)
class OrderFigures:
    """passes: mean of a rank's step. padding: share of computed tokens that belong to no sample.
    fill: of packs of pack_tokens; None without a limit."""

    passes: float
    padding: float
    pack_tokens: int | None
    fill: float | None


@dataclass(frozen=True)
class DryRun:
    """What a run would do.

    at_limit: samples as long as max_length, so cut or just full. most_tokens, most_tiles: the
    heaviest passes; the same one if they coincide.
    """

    samples: Samples
    at_limit: int
    order: OrderFigures
    most_tokens: ReadPass
    most_tiles: ReadPass


def dry_run(job: Job, world_size: int, done: Done = silent) -> DryRun:
    """Look at a run that `prepare` found good.

    Measures every sample, orders them as training will, and reads the images of the pass with most
    tokens and of the one with most tiles. Raises UsageError without a tokenizer, DataError for
    samples of these passes that cannot be read.
    """
    config, state = job.config, job.state
    run = outline_run(config)
    if run.processor is None:
        raise UsageError(f"the words cannot be counted: {'; '.join(run.assumed)}")
    samples = measure_samples(config, run.processor, job.records, job.records.image, done=done)
    check_faults(config, samples.faults, len(samples), lambda text: None)  # told by the figures
    lengths = Lengths(samples.total.astype(np.int32), samples.visual.astype(np.int32))
    order = run_order(config, job.records, state.samples_per_step, lengths)
    steps = range(state.step, state.num_steps)
    padded = config.data.batching == "padded"
    heaviest = heaviest_passes(order, samples, world_size, steps, padded)
    passes = max(order.num_passes(step, world_size) for step in spread_steps(steps))
    most_tokens, most_tiles = (_read(job, run, place, world_size, passes) for place in heaviest)
    return DryRun(
        samples=samples,
        at_limit=int((samples.total >= config.max_length).sum()),
        order=_figures(order, samples, world_size, steps, padded),
        most_tokens=most_tokens,
        most_tiles=most_tiles,
    )


def spread_steps(steps: range) -> list[int]:
    """At most LOOKED_AT of them, evenly spread."""
    count = min(len(steps), LOOKED_AT)
    return np.unique(np.linspace(steps[0], steps[-1], count).astype(int)).tolist()


def _figures(
    order: BatchOrder, samples: Samples, world_size: int, steps: range, padded: bool
) -> OrderFigures:
    """Means over some steps of all ranks."""
    looked_at = spread_steps(steps)
    passes = useful = computed = packs = 0
    for step in looked_at:
        passes += order.num_passes(step, world_size)
        for rank in range(world_size):
            for chosen in order.passes_of_rank(step, rank, world_size):
                lengths = samples.total[chosen]
                packs += int(len(chosen) > 0)
                useful += int(lengths.sum())
                computed += int(len(lengths) * lengths.max()) if padded and len(lengths) else 0
    filled = None if order.pack_tokens is None else useful / max(1, packs * order.pack_tokens)
    return OrderFigures(
        passes=passes / len(looked_at),
        padding=1 - useful / computed if computed else 0.0,
        pack_tokens=order.pack_tokens,
        fill=filled,
    )


def _read(job: Job, run: Outline, place: PlacedPass, world_size: int, passes: int) -> ReadPass:
    config, processor = job.config, run.processor
    assert processor is not None
    found = run_passes(config, job.records, processor)[place.samples]
    if isinstance(found, BadPass):
        raise DataError(found.message)
    batch = found.batch
    shape = PassShape(
        lengths=tuple(torch.diff(batch.cu_seqlens).tolist()),
        tiles=len(batch.tiles),
        rows=len(batch.rows),
        labels=batch.num_label_tokens,
    )
    on_gpu = torch.cuda.is_available()
    return ReadPass(place, shape, run_memory(run, config, shape, world_size, passes, on_gpu))
