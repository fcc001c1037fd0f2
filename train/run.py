"""One run of one stage, from top to bottom: `train(config)`.

The loss of a step is the mean over all its label tokens, on all ranks and passes, so neither the
number of ranks nor how samples fall into passes changes it. Every pass of every rank runs the same
modules (a pack without images reads one dummy tile), so no collective waits for ever.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from .zero import Engine, World, all_sum, barrier, join_world, start_engine

# isort: split
# (zero.py comes first: it tells DeepSpeed the accelerator before transformers starts it.)
from ..hd.errors import DataError, LlavaHDError
from ..model.assemble import assemble
from ..model.llava_hd import LlavaHD
from ..model.packing import PackedBatch
from ..model.processor import Processor
from .batches import PassSampler
from .checkpoint import load_checkpoint, save_checkpoint, save_model_folder
from .checkpoint_state import write_state
from .config import TrainConfig, part_folder
from .dataset import Passes, RecordReader, read_passes
from .metrics import MetricsWriter, StepMetrics, draw_loss_curve, read_metrics
from .optimizer import LearningRates, build_optimizer, freeze
from .prepare import CONFIG_FILE, Job, prepare
from .recipe import config_yaml

LOSS_CURVE = "loss_curve.png"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# How torch and gloo say that another rank is gone or stuck.
LOST_PEER = ("connection closed", "connection reset", "timed out", "timeout", "gloo", "nccl")


class Listener(Protocol):
    """Who is told how the run goes (rank 0 only): a progress bar, or nobody."""

    def say(self, text: str) -> None: ...

    def start(self, first_step: int, num_steps: int) -> None: ...

    def step(self, metrics: StepMetrics) -> None: ...


class Silence:
    """A listener that tells nobody."""

    def say(self, text: str) -> None:
        pass

    def start(self, first_step: int, num_steps: int) -> None:
        pass

    def step(self, metrics: StepMetrics) -> None:
        pass


class StoppedByPeer(LlavaHDError):
    """This rank stops because another one does, which tells the reason; carries its exit code."""

    def __init__(self, cause: type[LlavaHDError]) -> None:
        super().__init__("another rank has stopped the run and tells why")
        self.exit_code = cause.exit_code


@dataclass(frozen=True)
class TrainResult:
    """What a run left: its folder, its steps (with those done before a resumption), last loss."""

    output_dir: Path
    num_steps: int
    last_loss: float
    seconds: float


def train(config: TrainConfig, listener: Listener | None = None) -> TrainResult:
    """Run one stage, in this process as one rank of its world (a world of one without a launcher).

    Writes model, tokenizer, checkpoints, metrics, loss curve and configuration to `output_dir`.
    Raises UsageError or DataError before anything is written if something cannot work.
    """
    start = time.monotonic()
    world = join_world(config.timeout_minutes)
    listener = listener if listener is not None and world.is_main else Silence()
    with _said_once(world):
        job = prepare(config, world.size)
    barrier()
    if job.state.is_finished:
        listener.say(f"{job.checkpoint} is finished after {job.state.step} steps; nothing to do")
        return _result(job, start)

    listener.say(f"{len(job.records):,} records with {job.num_images:,} images; loading the model")
    with _said_once(world):
        model, processor = build_model(config, job.checkpoint)
    freeze(model, config.stage)
    if config.gradient_checkpointing:
        model.checkpoint_gradients()
    optimizer = build_optimizer(model, config.optimizer)
    engine = start_engine(model.train(), optimizer, config, world)
    rates = LearningRates(engine.optimizer, config.optimizer)
    if job.checkpoint is not None:
        load_checkpoint(engine, job.checkpoint)
        listener.say(f"going on from {job.checkpoint}, step {job.state.step}")

    try:
        with deterministic(config.deterministic):
            _loop(job, engine, rates, processor, world, listener)
        _finish(job, engine, processor, world)
    finally:
        engine.destroy()
    if world.is_main:
        listener.say(f"wrote {config.output_dir}")
    return _result(job, start)


def build_model(config: TrainConfig, checkpoint: Path | None) -> tuple[LlavaHD, Processor]:
    """The model that the run begins with: of a checkpoint, of a folder, or put together."""
    source, dtype = config.model, DTYPES[config.precision]
    whole = checkpoint if source.path is None else checkpoint or part_folder(source.path)
    if whole is not None:
        model = LlavaHD.from_pretrained(whole, dtype=dtype, attention=source.attention)
        return model, Processor.from_pretrained(whole)
    hd = source.geometry
    assert hd is not None and source.vision is not None and source.language is not None
    stage_1 = source.projector_from
    return assemble(
        vision=part_folder(source.vision),
        language=part_folder(source.language),
        hd=hd,
        projector=source.projector,
        projector_from=None if stage_1 is None else part_folder(stage_1),
        template=source.template,
        vision_layer=source.vision_layer,
        seed=config.seed,
        dtype=dtype,
        attention=source.attention,
    )


def _loop(
    job: Job,
    engine: Engine,
    rates: LearningRates,
    processor: Processor,
    world: World,
    listener: Listener,
) -> None:
    config, first, num_steps = job.config, job.state.step, job.state.num_steps
    passes, accumulation = _passes(job, processor, world), config.accumulation(world.size)
    # Before anything is written: a fault in the first step leaves no folder behind.
    ready = [_next_step(passes, accumulation, world)]
    with _open_output(job) if world.is_main else nullcontext() as writer:
        barrier()
        listener.start(first, num_steps)

        for step in range(first, num_steps):
            began = time.monotonic()
            batches, totals = ready.pop() if ready else _next_step(passes, accumulation, world)
            # Random numbers, if a model uses any, depend on the step alone, as in a resumed run.
            torch.manual_seed((config.seed * 1_000_003 + step) * 1_009 + world.rank)
            lr = rates.set(step, num_steps)
            loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
            with _lost_peers(world, step, batches):
                for number, batch in enumerate(batches, start=1):
                    output = engine(batch.to(world.device, non_blocking=True))
                    # DeepSpeed averages over ranks; undone here, for a mean over the label tokens.
                    share = world.size / totals.label_tokens
                    engine.backward(output.loss_sum * share, scale_wrt_gas=False)
                    loss_sum += output.loss_sum.detach()
                    if number == len(batches):
                        loss = float(all_sum(loss_sum)) / totals.label_tokens
                        _check_finite("loss", loss, step, batches, world)
                    engine.step()
            grad_norm = float(engine.get_global_grad_norm())
            _check_finite("gradient", grad_norm, step, batches, world)

            done = step + 1
            seconds = time.monotonic() - began
            metrics = StepMetrics(
                step=done,
                epoch=job.order.epoch(done),
                loss=loss,
                lr=lr,
                grad_norm=grad_norm,
                samples=job.state.samples_per_step,
                tokens=totals.tokens,
                label_tokens=totals.label_tokens,
                images=totals.images,
                seconds=seconds,
                tokens_per_second=totals.tokens / seconds,
                images_per_second=totals.images / seconds,
            )
            listener.step(metrics)
            if writer and (done % config.logging_steps == 0 or done == num_steps):
                writer.write(metrics)

            if config.save_steps and done % config.save_steps == 0 and done < num_steps:
                save_checkpoint(engine, processor, replace(job.state, step=done), config, world)


def _passes(job: Job, processor: Processor, world: World) -> Iterator[PackedBatch]:
    config = job.config
    reader = RecordReader(
        records=job.records,
        images=Path(config.data.images),
        processor=processor,
        template=config.sample_template,
        max_length=config.max_length,
    )
    sampler = PassSampler(job.order, world.rank, world.size, job.state.step, job.state.num_steps)
    pin_memory = world.device.type == "cuda"
    return read_passes(Passes(reader, processor), sampler, config.data.num_workers, pin_memory)


@dataclass(frozen=True)
class Totals:
    """Counts of a step over all ranks."""

    tokens: int
    label_tokens: int
    images: int


def _next_step(
    passes: Iterator[PackedBatch], accumulation: int, world: World
) -> tuple[list[PackedBatch], Totals]:
    """This rank's passes of a step, and its counts over all ranks.

    If any rank cannot read its samples, all stop here: that one by its DataError.
    """
    batches: list[PackedBatch] = []
    fault = None
    try:
        batches = [next(passes) for _ in range(accumulation)]
    except DataError as error:
        fault = error
    counts = [
        sum(batch.num_tokens for batch in batches),
        sum(batch.num_label_tokens for batch in batches),
        sum(batch.num_images for batch in batches),
        int(fault is not None),
    ]
    summed = all_sum(torch.tensor(counts, dtype=torch.int64, device=world.device)).tolist()
    if fault is not None:
        raise fault
    if summed[3]:
        raise StoppedByPeer(DataError)
    return batches, Totals(tokens=summed[0], label_tokens=summed[1], images=summed[2])


@contextmanager
def _said_once(world: World) -> Iterator[None]:
    """A fault inside is the same for all ranks: only the first of each machine tells it."""
    try:
        yield
    except LlavaHDError as error:
        if world.local_rank:
            raise StoppedByPeer(type(error)) from error
        raise


def _check_finite(
    what: str, value: float, step: int, batches: list[PackedBatch], world: World
) -> None:
    """Stop all ranks (the value is the same on each) rather than train on with NaN."""
    if math.isfinite(value):
        return
    if not world.is_main:
        raise StoppedByPeer(LlavaHDError)
    names = ", ".join(name for batch in batches for name in batch.names[:1])
    raise LlavaHDError(
        f"step {step + 1}: the {what} is {value}, the weights are those of the step before; lower "
        f"optimizer.lr or set gradient_clipping (rank 0 was at {names})"
    )


@contextmanager
def _lost_peers(world: World, step: int, batches: list[PackedBatch]) -> Iterator[None]:
    """Say where this rank stood when a collective failed: rank, step, records, tiles."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if world.size == 1 or not any(word in text.lower() for word in LOST_PEER):
            raise
        tiles = sum(len(batch.tiles) for batch in batches)
        raise LlavaHDError(
            f"rank {world.rank}, step {step + 1}: lost contact with another rank ({text:.200}); "
            f"this one was at {batches[0].names[0]} with {tiles} tiles; resume with --resume auto"
        ) from error


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Only deterministic kernels inside, if wanted."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _open_output(job: Job) -> MetricsWriter:
    """Create the output folder with the resolved configuration and the metrics files."""
    folder = Path(job.config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(config_yaml(job.config), encoding="utf-8")
    return MetricsWriter(folder, job.state.step)


def _finish(job: Job, engine: Engine, processor: Processor, world: World) -> None:
    """Write the model to the output folder, the loss curve, and that the run is finished."""
    folder = Path(job.config.output_dir)
    save_model_folder(engine, processor, folder, world)
    if world.is_main:
        title = f"{job.config.stage}: {folder.name}"
        draw_loss_curve(read_metrics(folder), folder / LOSS_CURVE, title)
        write_state(folder, replace(job.state, step=job.state.num_steps))
    barrier()


def _result(job: Job, start: float) -> TrainResult:
    folder = Path(job.config.output_dir)
    metrics = read_metrics(folder)
    return TrainResult(
        output_dir=folder,
        num_steps=job.state.num_steps,
        last_loss=metrics[-1].loss if metrics else math.nan,
        seconds=time.monotonic() - start,
    )
