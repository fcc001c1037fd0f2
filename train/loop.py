"""The steps of a run, from where it begins to its end, or to where it is asked to stop.

The loss of a step is a mean over all its label tokens (or samples), on all ranks and passes, so
neither the number of ranks nor how samples fall into passes changes it. Every pass of every rank
runs the same modules (a pack without images reads one dummy tile, a rank without samples an empty
pack), so no collective waits for ever.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from ..hd.errors import DataError, Interrupted
from ..model.packing import PackedBatch
from ..model.processor import Processor
from .bad_samples import BadSample, BadSamples
from .batches import BatchOrder, PassSampler
from .checkpoint import SaveFailed, drop_oldest, save_checkpoint
from .checkpoint_state import TrainerState
from .dataset import Pass, read_passes, run_passes
from .feature_cache import CacheWriter
from .metrics import MetricsWriter, StepCounts, StepMetrics
from .nonfinite import NonFiniteSteps
from .optimizer import LearningRates
from .output_lock import OutputLock
from .prepare import CONFIG_FILE, Job
from .recipe import config_values, config_yaml
from .stop import StopRequest
from .together import StoppedByPeer, lost_peers, on_main, said_once
from .watchdog import Watchdog
from .zero import Engine, World, all_sum, barrier, gather_objects


class Listener(Protocol):
    """Who is told how the run goes (rank 0 only): a progress bar, or nobody."""

    def say(self, text: str) -> None: ...

    def start(self, first_step: int, num_steps: int) -> None: ...

    def step(self, metrics: StepMetrics) -> None: ...


@dataclass(frozen=True)
class StepData:
    """This rank's passes of a step, and over all ranks: counts, and whether one asks to stop."""

    batches: list[PackedBatch]
    counts: StepCounts
    stop: bool


@dataclass
class Loop:
    """A run's steps. `run` takes them all; the parts are methods because they share all of this."""

    job: Job
    order: BatchOrder
    engine: Engine
    rates: LearningRates
    processor: Processor
    world: World
    listener: Listener
    stop: StopRequest
    lock: OutputLock
    cache: CacheWriter | None = None

    def __post_init__(self) -> None:
        config, state = self.job.config, self.job.state
        self.output_dir = Path(config.output_dir)
        self.passes = self._open_passes()
        self.bad_samples = BadSamples(
            self.output_dir, len(self.job.records), config.data.bad_sample_limit, state.step
        )
        self.nonfinite = NonFiniteSteps(config, self.world, state.skipped_in_a_row)
        self.skipped = self.damaged = 0
        # Of all ranks: entries and bytes that the cache was given, ranks that stopped giving.
        self.stored: tuple[int, ...] = (0, 0, 0)
        self.log_failed = False

    def run(self) -> None:
        """All steps that are left. Raises Interrupted where a signal has asked to stop."""
        first, num_steps = self.job.state.step, self.job.state.num_steps
        self.watchdog = Watchdog(self.world, self.job.config.timeout_minutes)
        # Closed in any case: a loader process that is alive at exit is waited for without end.
        with (
            closing(self.passes),
            self.watchdog,
            lost_peers(self.world, lambda: self.watchdog.where),
        ):
            # Before anything is written: a fault in the first step leaves no folder behind.
            data = self._read(first)
            with self._open_output() as writer:
                self.listener.start(first, num_steps)
                for step in range(first, num_steps):
                    began = time.monotonic()  # waiting for samples counts, saving does not
                    if step > first:
                        data = self._read(step)
                    if data.stop:
                        self._stop_here(step)
                    metrics = self._step(step, data, began)
                    self.listener.step(metrics)
                    is_last = step + 1 == num_steps
                    if writer and (metrics.step % self.job.config.logging_steps == 0 or is_last):
                        self._log(writer, metrics)
                    every = self.job.config.save_steps
                    if every and metrics.step % every == 0 and not is_last:
                        self._save_or_warn(metrics.step)
        if self.cache is not None:
            mine = [self.cache.entries, self.cache.size, self.cache.stopped]
            total = all_sum(torch.tensor(mine, dtype=torch.float64).to(self.world.device))
            self.stored = tuple(int(number) for number in total.tolist())

    def _step(self, step: int, data: StepData, began: float) -> StepMetrics:
        """Forward and backward of this rank's passes, and the update that all ranks make."""
        config, world, engine = self.job.config, self.world, self.engine
        # Random numbers, if a model uses any, depend on step and rank alone, as in a resumed run.
        torch.manual_seed(((config.seed * 1_000_003 + step) * 1_009 + world.rank) % 2**63)
        lr = self.rates.set(step, self.job.state.num_steps)
        if not data.counts.loss_units:
            self.skipped += 1
            self.listener.say(f"step {step + 1} was left out: none of its samples can be used")
            return self._metrics(step, math.nan, math.nan, lr, data.counts, began)
        losses: list[torch.Tensor] = []
        for number, batch in enumerate(data.batches, start=1):
            self.watchdog.at(step, "in a pass", batch)
            output = engine(batch.to(world.device, non_blocking=True))
            engine.set_gradient_accumulation_boundary(number == len(data.batches))
            # DeepSpeed averages over ranks; undone here, for a mean over all ranks' labels.
            share = world.size / data.counts.loss_units
            engine.backward(output.loss_sum * share, scale_wrt_gas=False)
            losses.append(output.loss_sum.detach().double())
            if self.cache is not None:
                self.cache.store(batch, output.features)
            engine.step()
        loss = float(all_sum(torch.stack(losses).sum())) / data.counts.loss_units
        locals_ = [float(value) for value in losses]
        with said_once(world):
            skipped = self.nonfinite.judge(step, loss, locals_, data.batches, engine)
        if skipped:
            self.skipped += 1
            self.listener.say(
                f"step {step + 1} was skipped: its loss or gradient is not finite "
                f"({self.nonfinite.path})"
            )
        norm = float(engine.get_global_grad_norm())
        return self._metrics(step, loss, norm, lr, data.counts, began)

    def _metrics(
        self, step: int, loss: float, norm: float, lr: float, counts: StepCounts, began: float
    ) -> StepMetrics:
        seconds = time.monotonic() - began
        return StepMetrics(
            step=step + 1,
            epoch=self.order.epoch(step + 1),
            loss=loss,
            lr=lr,
            grad_norm=norm,
            samples=counts.samples,
            tokens=counts.tokens,
            label_tokens=counts.label_tokens,
            images=counts.images,
            seconds=seconds,
            tokens_per_second=counts.tokens / seconds,
            images_per_second=counts.images / seconds,
            padding=counts.padding_share,
            pack_fill=counts.fill(self.order.pack_tokens),
            cached_images=counts.cached_images,
        )

    def _read(self, step: int) -> StepData:
        """This rank's passes of a step, and what all ranks have of it together.

        If any rank cannot read its samples, all stop here: that one by its DataError.
        """
        self.watchdog.at(step, "reading its samples")
        read: list[Pass] = []
        fault = None
        try:
            count = self.order.num_passes(step, self.world.size)
            read = [next(self.passes) for _ in range(count)]
        except DataError as error:
            fault = error
        counts = StepCounts.of(one.batch for one in read)
        bad = tuple(sample for one in read for sample in one.bad)
        damaged = tuple(line for one in read for line in one.damaged)
        flags = [fault is not None, self.stop.signal is not None, len(bad), len(damaged)]
        numbers = torch.tensor([*counts.values(), *flags], dtype=torch.float64)
        *summed, faults, stops, bad_ones, damages = all_sum(numbers.to(self.world.device)).tolist()
        if bad_ones:
            bad = tuple(sample for each in gather_objects(bad) for sample in each)
        if fault is not None:
            raise fault
        if faults:
            raise StoppedByPeer(DataError)
        if damages:
            lines = [line for each in gather_objects(damaged) for line in each]
            self.damaged += len(lines)
            self.listener.say(
                f"step {step + 1}: feature cache, {len(lines)} entries made again: {lines[0]}"
            )
        if bad:
            self._note_bad(step, bad)
        total = StepCounts(*(int(value) for value in summed))
        return StepData([one.batch for one in read], total, stops > 0)

    def _note_bad(self, step: int, bad: tuple[BadSample, ...]) -> None:
        if self.world.is_main:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        with said_once(self.world):
            new = self.bad_samples.add(step + 1, bad, write=self.world.is_main)
        for one in new[:1]:
            done = "kept as text" if one.kept_text else "left out"
            self.listener.say(
                f"step {step + 1}: {len(new)} new bad sample(s), {len(self.bad_samples.seen)} of "
                f"at most {self.bad_samples.allowed} so far; {done}: {one.reason}"
            )

    def _log(self, writer: MetricsWriter, metrics: StepMetrics) -> None:
        """A run outlives a full disk; what could not be logged is missing in the metrics."""
        try:
            writer.write(metrics)
            self.log_failed = False
        except OSError as error:
            if not self.log_failed:
                self.listener.say(f"WARNING: metrics cannot be written ({error}); training goes on")
            self.log_failed = True

    def state(self, step: int) -> TrainerState:
        """Where the run stands after `step` steps."""
        return replace(
            self.job.state,
            step=step,
            world_size=self.world.size,
            config=config_values(self.job.config),
            skipped_in_a_row=self.nonfinite.in_a_row,
        )

    def _save(self, step: int) -> Path:
        """Write a checkpoint and drop the oldest; a collective. Raises SaveFailed."""
        self.watchdog.at(step - 1, "saving")
        state = self.state(step)
        folder = save_checkpoint(self.engine, self.processor, state, self.output_dir, self.world)
        try:
            drop_oldest(self.output_dir, self.job.config.save_total_limit, self.world)
        except OSError as error:
            self.listener.say(f"WARNING: an old checkpoint could not be removed ({error})")
        barrier()  # a rank that ends now would have the launcher end this one
        return folder

    def _save_or_warn(self, step: int) -> None:
        """A run outlives a failed save: the next one may work, and the older ones are there."""
        try:
            self._save(step)
        except SaveFailed as error:
            self.listener.say(f"WARNING: {error}; training goes on, the next save may work")

    def _stop_here(self, step: int) -> None:
        """Save after `step` steps and end, resumable, on all ranks."""
        names = [
            name for name in gather_objects(self.stop.signal and self.stop.signal.name) if name
        ]
        with said_once(self.world):
            if step == self.job.state.step:
                raise Interrupted(
                    f"stopped by {names[0]} before the first step of this start; go on with "
                    "--resume auto, or start again if there is no checkpoint"
                )
            folder = self._save(step)
            raise Interrupted(
                f"stopped by {names[0]} after step {step}; saved {folder}, go on with --resume auto"
            )

    def _open_passes(self) -> Generator[Pass, None, None]:
        job, config = self.job, self.job.config
        cache = None if self.cache is None else self.cache.cache
        passes = run_passes(config, job.records, self.processor, cache)
        sampler = PassSampler(
            self.order, self.world.rank, self.world.size, job.state.step, job.state.num_steps
        )
        pin_memory = self.world.device.type == "cuda"
        return read_passes(passes, sampler, config.data.num_workers, pin_memory)

    def _open_output(self) -> MetricsWriter | nullcontext[None]:
        """Create the output folder with the resolved configuration and the metrics files (rank 0).
        A collective: what fails there stops all."""
        first_step = self.job.state.step

        def create() -> None:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self.lock.take()
            text = config_yaml(self.job.config)
            (self.output_dir / CONFIG_FILE).write_text(text, encoding="utf-8")
            self.bad_samples.open()
            self.nonfinite.open(first_step)

        on_main(self.world, create)
        return MetricsWriter(self.output_dir, first_step) if self.world.is_main else nullcontext()
