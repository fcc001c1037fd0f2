"""What a run will need, before it runs: memory of a rank, operations, traffic, time and price."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..hd.errors import UsageError
from .config import TrainConfig
from .estimate_memory import GIB, Memory, run_memory
from .estimate_model import Outline, open_words, outline_run
from .estimate_samples import (
    TYPICAL_SIZES,
    Samples,
    assumed_samples,
    largest_pass,
    measure_samples,
    pack_budget,
)
from .estimate_time import (
    Cost,
    Operations,
    Speed,
    Work,
    count_operations,
    measured_speed,
    run_cost,
)
from .estimate_trace import PassShape
from .estimate_zero import Traffic, step_traffic
from .sources import open_records
from .workers import Done, silent

# Of the memory; the bound that tests hold on CPUs, for runs whose allocator keeps nothing for
# later. No GPU has been compared, so there it is a margin and no more.
ACCURACY = 0.15
# What to change where a part is too large.
CHECKPOINTING = "gradient_checkpointing true, "
REMEDIES = {
    "weights": "zero.stage 3, or more GPUs",
    "fp32 copy of the weights": "more GPUs, or zero.offload_optimizer cpu",
    "gradients": "more GPUs, or zero.offload_optimizer cpu",
    "optimizer": "more GPUs, or zero.offload_optimizer cpu",
    "communication buckets": "zero.reduce_bucket_size",
    "gathered weights": "zero.stage3_max_reuse_distance and zero.stage3_prefetch_bucket_size",
    "batch": "per_device_batch_size",
    "activations kept": f"{CHECKPOINTING}per_device_batch_size or data.pack_tokens",
    "activations in work": "per_device_batch_size or data.pack_tokens",
}


@dataclass(frozen=True)
class Question:
    """What is asked beside the configuration.

    gpus: ranks. sizes: (height, width) px of images and text_tokens of a sample, where there is no
    data. num_samples: of the data, if it is not there. at_most: records that are measured; all by
    default. tflops, measured: speed of a rank, given or from a run's folder. gbps: gigabits per
    second that a rank sends. price: of a GPU for an hour. memory_gib: of a GPU.
    """

    gpus: int = 1
    on_gpu: bool = True
    sizes: tuple[tuple[int, int], ...] = TYPICAL_SIZES
    text_tokens: int = 256
    num_samples: int | None = None
    at_most: int | None = None
    tflops: float | None = None
    measured: Path | None = None
    gbps: float | None = None
    price: float | None = None
    memory_gib: float | None = None


@dataclass(frozen=True)
class Fit:
    """Whether the peak fits: "fits", "too close to call" (within the estimate's accuracy) or "does
    not fit"; bytes to spare (negative: lacking), the largest part and what to change."""

    verdict: str
    spare: int
    part: str
    remedy: str


@dataclass(frozen=True)
class Estimate:
    """The answer. step_operations, traffic: of one step, over all ranks and of one rank.
    missing: what was not given for more figures."""

    config: TrainConfig
    run: Outline
    samples: Samples
    shape: PassShape
    passes: int
    samples_per_step: int
    num_steps: int | None
    memory: Memory
    step_operations: Operations
    traffic: Traffic
    traffic_seconds: float | None
    speed: Speed | None
    cost: Cost | None
    fit: Fit | None
    missing: tuple[str, ...]

    @property
    def assumed(self) -> tuple[str, ...]:
        """What was taken for granted, in words."""
        return (*self.run.assumed, *open_words(self.config))


def estimate(config: TrainConfig, question: Question, done: Done = silent) -> Estimate:
    """Everything about a run; reads configurations, tokenizer and image headers, no weight.

    Raises UsageError for a configuration that cannot be, DataError for data that cannot be read.
    """
    samples_per_step = config.samples_per_step(question.gpus)
    passes = config.accumulation(question.gpus)
    run = outline_run(config)
    samples = find_samples(config, run, question, done)
    if config.data.batching == "packs":
        budget = pack_budget(config, samples, samples_per_step)
        step_tokens = float(samples.total.mean()) * samples_per_step
        passes = max(1, int(np.ceil(step_tokens / budget / question.gpus)))
    shape = largest_pass(config, samples, samples_per_step)
    memory = run_memory(run, config, shape, question.gpus, passes, question.on_gpu)
    num_steps = steps_of(config, samples, samples_per_step)
    traffic = step_traffic(run.weights, config.zero, question.gpus, passes)
    operations = step_operations(run, config, samples, samples_per_step)
    speed = _speed(question)
    seconds = None if question.gbps is None else traffic.seconds(question.gbps)
    cost = None
    if speed is not None:
        cost = run_cost(
            operations.total, seconds or 0.0, speed, question.gpus, num_steps, question.price
        )
    return Estimate(
        config, run, samples, shape, passes, samples_per_step, num_steps, memory, operations,
        traffic, seconds, speed, cost, _fit(config, memory, question.memory_gib),
        _missing(question, num_steps),
    )  # fmt: skip


def find_samples(config: TrainConfig, run: Outline, question: Question, done: Done) -> Samples:
    """Measured from the data where that and a tokenizer are there; else assumed, saying why."""
    root = config.data.images
    try:
        if run.processor is None:
            raise UsageError("there is no tokenizer")
        if root and not Path(root).is_dir():
            raise UsageError(f"data.images {root} is not a folder")
        records = open_records(config.data.paths, root or None, tolerant=True)
        records = records.share(config.data.share, config.seed)
    except UsageError as reason:
        hd, asked = run.model.config.hd, question
        return assumed_samples(
            config, hd, asked.sizes, asked.text_tokens, asked.num_samples, str(reason)
        )
    return measure_samples(config, run.processor, records, records.image, question.at_most, done)


def steps_of(config: TrainConfig, samples: Samples, samples_per_step: int) -> int | None:
    """Steps of the run; None where the number of samples is not known."""
    if config.max_steps is not None:
        return config.max_steps
    if samples.num_samples is None:
        return None
    return max(1, int(np.ceil(round(config.epochs * samples.num_samples / samples_per_step, 6))))


def step_operations(
    run: Outline, config: TrainConfig, samples: Samples, samples_per_step: int
) -> Operations:
    """Of a mean step, over all ranks."""
    work = Work.of_samples(samples.total, samples.visual, samples.tiles)
    work = work * (samples_per_step / max(1, len(samples)))
    return count_operations(run.model, work, config.gradient_checkpointing is True)


def _speed(question: Question) -> Speed | None:
    if question.tflops is not None and question.measured is not None:
        raise UsageError("--tflops and --measured both give the speed; leave one of them out")
    if question.measured is not None:
        return measured_speed(question.measured)
    return None if question.tflops is None else Speed(question.tflops, "as given")


def _fit(config: TrainConfig, memory: Memory, memory_gib: float | None) -> Fit | None:
    if memory_gib is None:
        return None
    spare = int(memory_gib * GIB) - memory.peak
    if spare < 0:
        verdict = "does not fit"
    elif memory.peak * (1 + ACCURACY) > memory_gib * GIB:
        verdict = "too close to call"
    else:
        verdict = "fits"
    remedy = REMEDIES[memory.largest_part]
    if config.gradient_checkpointing is True:
        remedy = remedy.removeprefix(CHECKPOINTING)
    return Fit(verdict, spare, memory.largest_part, remedy)


def _missing(question: Question, num_steps: int | None) -> tuple[str, ...]:
    wanted = [
        (
            question.tflops is None and question.measured is None,
            "--tflops X or --measured RUN_DIR for the time of a step",
        ),
        (question.gbps is None and question.gpus > 1, "--gbps X for the time of communication"),
        (num_steps is None, "--num-samples N (or the data) for the length of the run"),
        (question.price is None, "--price-per-gpu-hour X for the price"),
        (question.memory_gib is None, "--memory-gib X to know whether it fits"),
    ]
    return tuple(words for is_missing, words in wanted if is_missing)


def spread(values: Sequence[int] | np.ndarray) -> dict[str, float] | None:
    """Least, median, 95 %, greatest and mean; None of nothing."""
    if not len(values):
        return None
    found = np.quantile(values, (0, 0.5, 0.95, 1))
    names = ("min", "median", "p95", "max")
    return {**dict(zip(names, map(float, found), strict=True)), "mean": float(np.mean(values))}


def report_of(found: Estimate) -> dict[str, Any]:
    """All figures of an estimate, JSON-able; bytes and counts, no rounding."""
    memory = found.memory
    return {
        "parts": [asdict(part) for part in found.run.parts],
        "assumed": list(found.assumed),
        "samples": {
            "source": found.samples.source,
            "number": found.samples.num_samples,
            "faults": len(found.samples.faults),
            "tokens": spread(found.samples.total),
            "tokens_of_an_image": spread(found.samples.images),
            "tiles": spread(found.samples.tiles),
            "bytes_of_an_image_file": found.samples.image_bytes,
        },
        "largest_pass": {**asdict(found.shape), "tokens": found.shape.tokens},
        "passes_of_a_step": found.passes,
        "samples_of_a_step": found.samples_per_step,
        "steps": found.num_steps,
        "memory_bytes": {
            "parts": memory.parts,
            "totals": memory.totals,
            "peak": memory.peak,
            "peak_moment": memory.peak_moment,
            "host": memory.host,
        },
        "operations_of_a_step": {
            **asdict(found.step_operations),
            "total": found.step_operations.total,
        },
        "traffic_bytes_of_a_step": {**asdict(found.traffic), "total": found.traffic.total},
        "traffic_seconds_of_a_step": found.traffic_seconds,
        "speed": None if found.speed is None else asdict(found.speed),
        "cost": None if found.cost is None else asdict(found.cost),
        "fit": None if found.fit is None else asdict(found.fit),
        "missing": list(found.missing),
    }
