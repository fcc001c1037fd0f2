"""One run of one stage, from top to bottom: `train(config)`; its steps are in loop.py."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .zero import World, gather_objects, join_world, start_engine

# isort: split
# (zero.py comes first: it tells DeepSpeed the accelerator before transformers starts it.)
from ..hd.tiler import find_resizer
from ..model.assemble import assemble
from ..model.fused import compile_layers, fuse_layers
from ..model.llava_hd import LlavaHD
from ..model.processor import Processor
from .batches import BatchOrder
from .checkpoint import (
    check_whole,
    load_optimizer,
    newest_whole,
    put_later_aside,
    save_model_folder,
)
from .checkpoint_state import read_state, write_state
from .config import TrainConfig, part_folder
from .feature_cache import GIB, CacheWriter, FeatureCache
from .fitting import fit_to_memory, is_left_open, rank_memory
from .loop import Listener, Loop
from .lora import start_adapter
from .manifest import MANIFEST_FILE
from .metrics import StepMetrics, draw_loss_curve, read_metrics
from .optimizer import LearningRates, build_optimizer, freeze, trained_words
from .ordering import NEED_LENGTHS, checked_lengths, run_order
from .output_lock import OutputLock
from .prepare import Job, is_finished, prepare, resolution_words
from .stop import StopRequest
from .together import lost_peers, on_all, on_main, said_once

LOSS_CURVE = "loss_curve.png"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Silence:
    """A listener that tells nobody."""

    def say(self, text: str) -> None:
        pass

    def start(self, first_step: int, num_steps: int) -> None:
        pass

    def step(self, metrics: StepMetrics) -> None:
        pass


@dataclass(frozen=True)
class CacheUse:
    """What a feature cache did. images: of the logged steps; read: those among them that it had.
    stored, stored_bytes: entries that all ranks added since this start; stopped: ranks that stopped
    adding; damaged: entries made again."""

    images: int
    read: int
    stored: int
    stored_bytes: int
    stopped: int
    damaged: int


@dataclass(frozen=True)
class TrainResult:
    """What a run left: its folder, its steps (with those done before a resumption), last loss.

    tokens_per_second: useful ones, of the logged steps. padding: share of all computed tokens.
    pack_fill: of packs, on average; None for other batches. skipped: steps that left the weights as
    they were since this start; bad_samples: left out or kept as text in the whole run. cache: what
    the feature cache did in the logged steps, None without one.
    """

    output_dir: Path
    num_steps: int
    last_loss: float
    seconds: float
    tokens_per_second: float
    padding: float
    pack_fill: float | None
    skipped: int = 0
    bad_samples: int = 0
    cache: CacheUse | None = None


def train(config: TrainConfig, listener: Listener | None = None) -> TrainResult:
    """Run one stage, in this process as one rank of its world (a world of one without a launcher).

    Writes model, tokenizer, checkpoints, metrics, loss curve and configuration to `output_dir`.
    Raises UsageError or DataError before anything is written if something cannot work.
    """
    start = time.monotonic()
    world = join_world(config.timeout_minutes)
    listener = listener if listener is not None and world.is_main else Silence()
    lock = OutputLock(Path(config.output_dir), listener.say)
    with StopRequest(announce=world.is_main) as stop, lost_peers(world, lambda: "between steps"):
        try:
            on_main(world, lock.take)
            checkpoint = _checkpoint(config, world, listener)
            job = on_all(world, lambda: prepare(config, world.size, checkpoint))
            if job.state.is_finished:
                listener.say(
                    f"{checkpoint} is finished after {job.state.step} steps; nothing to do"
                )
                return _result(job, start)
            loop = start_loop(job, world, listener, stop, lock)
            try:
                with deterministic(config.deterministic):
                    loop.run()
                finish(loop)
            finally:
                loop.engine.destroy()
        finally:
            lock.release()
    listener.say(f"wrote {config.output_dir}")
    return _result(job, start, loop)


def _checkpoint(config: TrainConfig, world: World, listener: Listener) -> Path | None:
    """The folder that `resume` asks for, every byte of it verified; None to begin at the start.

    A collective. A run that is finished is found as its output folder.
    """
    output_dir = Path(config.output_dir)
    if config.resume == "none":
        return None
    if config.resume == "auto":
        if on_main(world, lambda: is_finished(output_dir)):
            return output_dir
        return newest_whole(output_dir, world, listener.say)
    found = _named_checkpoint(Path(config.resume), world)
    step = on_main(world, lambda: read_state(found).step)
    put_later_aside(output_dir, step, world, listener.say)
    return found


def _named_checkpoint(folder: Path, world: World) -> Path:
    """The folder that the user named, if it is a whole checkpoint or a finished run."""

    def finished() -> bool:
        if not (folder / MANIFEST_FILE).exists():
            read_state(folder)  # UsageError where this is no checkpoint at all
        return is_finished(folder)

    if not on_main(world, finished):
        check_whole(folder, world)
    return folder


def start_loop(
    job: Job, world: World, listener: Listener, stop: StopRequest, lock: OutputLock
) -> Loop:
    """Everything that the steps need: the model, sharded, where the run begins or goes on."""
    config = job.config
    _, resizer_name = find_resizer(config.data.resizing)
    listener.say(f"{job.data_words}; loading the model")
    model, processor = on_all(world, lambda: build_model(config, job.checkpoint))
    told = resolution_words(config.model)
    if told is not None:
        listener.say(told)
    order, checkpointing = _order(job, processor, world, listener)
    freeze(model, config.stage, config.train_vision, config.vision_layers)
    listener.say(f"{trained_words(model)}; images are resized by {resizer_name}")
    if checkpointing:
        model.checkpoint_gradients()
    cache = open_cache(config, model, world, listener)
    _speed_up(model, config, listener)
    optimizer = build_optimizer(model, config.optimizer)
    engine = start_engine(model.train(), optimizer, config, world)
    rates = LearningRates(engine.optimizer, config.optimizer)
    if job.checkpoint is not None:
        load_optimizer(engine, job.checkpoint, world)
        of = job.state.world_size
        ranks = "" if of == world.size else f" (written by {of} ranks, now there are {world.size})"
        listener.say(f"going on from {job.checkpoint}, step {job.state.step}{ranks}")
    return Loop(job, order, engine, rates, processor, world, listener, stop, lock, cache)


def _speed_up(model: LlavaHD, config: TrainConfig, listener: Listener) -> None:
    """Fused and compiled layers, where the recipe asks for them."""
    causal_lm = model.language.causal_lm
    if config.model.fused == "liger":
        listener.say(f"{fuse_layers(causal_lm)} modules are Liger Kernel's")
    if config.model.compile:
        listener.say(f"{compile_layers(causal_lm)} layers are compiled when they are first run")


def open_cache(
    config: TrainConfig, model: LlavaHD, world: World, listener: Listener
) -> CacheWriter | None:
    """The cache of the tower's features, if the run keeps one; a collective. Rank 0 counts what
    the folder holds, and the ranks share what the limit leaves."""
    if config.data.feature_cache is None:
        return None
    cache = FeatureCache.of(Path(config.data.feature_cache), model.vision, world.device)
    entries, size = on_main(world, cache.held)
    limit = config.data.feature_cache_gib
    room = None if limit is None else max(0, int(limit * GIB) - size) // world.size
    of = "no limit" if limit is None else f"limit {limit:g} GiB"
    listener.say(f"feature cache {cache.folder}: {entries:,} entries, {size / GIB:.2f} GiB, {of}")
    return CacheWriter(cache, room, listener.say)


def _order(
    job: Job, processor: Processor, world: World, listener: Listener
) -> tuple[BatchOrder, bool]:
    """The data order, and whether activations are recomputed. Rank 0 counts the lengths that the
    order needs, chooses what the recipe leaves to the memory, and tells the other ranks."""
    config, lengths = job.config, None
    if config.data.batching in NEED_LENGTHS:
        lengths = on_main(world, lambda: checked_lengths(job, processor, listener.say))
    checkpointing = config.gradient_checkpointing is True
    if is_left_open(config):
        memory = min(gather_objects(rank_memory(world.device, world.size)))
        longest = 1 if lengths is None else int(lengths.total.max())
        fitted = on_main(
            world,
            lambda: fit_to_memory(
                config, processor, job.records, longest, job.state.samples_per_step, world.size,
                memory, world.device.type == "cuda",
            ),
        )  # fmt: skip
        listener.say(fitted.words)
        checkpointing = fitted.checkpointing
        if fitted.pack_tokens is not None:
            config = replace(config, data=replace(config.data, pack_tokens=fitted.pack_tokens))
    order = run_order(config, job.records, job.state.samples_per_step, lengths)
    return order, checkpointing


def build_model(config: TrainConfig, checkpoint: Path | None) -> tuple[LlavaHD, Processor]:
    """The model that the run begins with: of a checkpoint, of a folder, or put together.

    With LoRA a checkpoint holds the adapter alone, so the base comes from the recipe.
    """
    if config.lora is not None:
        model, processor = build_model(replace(config, lora=None), None)
        start_adapter(model, config, checkpoint)
        return model, processor
    source, dtype = config.model, DTYPES[config.precision]
    whole = checkpoint if source.path is None else checkpoint or part_folder(source.path)
    if whole is not None:
        model = LlavaHD.from_pretrained(whole, dtype=dtype, attention=source.attention)
        processor = Processor.from_pretrained(whole, source.limits)
        model.config = processor.config  # what is trained on is what is saved
        return model, processor
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


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Only deterministic kernels inside, if wanted."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def finish(loop: Loop) -> None:
    """Write the model to the output folder, the loss curve, and that the run is finished."""
    folder, job = loop.output_dir, loop.job
    with said_once(loop.world):
        save_model_folder(loop.engine, loop.processor, folder, loop.world)

    def end() -> None:
        title = f"{job.config.stage}: {folder.name}"
        draw_loss_curve(read_metrics(folder), folder / LOSS_CURVE, title)
        write_state(folder, loop.state(job.state.num_steps))

    on_main(loop.world, end)


def _result(job: Job, start: float, loop: Loop | None = None) -> TrainResult:
    folder = Path(job.config.output_dir)
    metrics = read_metrics(folder)
    tokens, seconds = sum(m.tokens for m in metrics), sum(m.seconds for m in metrics)
    computed = sum(m.tokens / (1 - m.padding) for m in metrics if m.padding < 1)
    fills = [m.pack_fill for m in metrics if m.pack_fill is not None]
    return TrainResult(
        output_dir=folder,
        num_steps=job.state.num_steps,
        last_loss=metrics[-1].loss if metrics else math.nan,
        seconds=time.monotonic() - start,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        padding=1 - tokens / computed if computed else 0.0,
        pack_fill=sum(fills) / len(fills) if fills else None,
        skipped=loop.skipped if loop else 0,
        bad_samples=len(loop.bad_samples.seen) if loop else 0,
        cache=_cache_use(metrics, loop),
    )


def _cache_use(metrics: list[StepMetrics], loop: Loop | None) -> CacheUse | None:
    if loop is None or loop.cache is None:
        return None
    return CacheUse(
        images=sum(m.images for m in metrics),
        read=sum(m.cached_images for m in metrics),
        stored=loop.stored[0],
        stored_bytes=loop.stored[1],
        stopped=loop.stored[2],
        damaged=loop.damaged,
    )
