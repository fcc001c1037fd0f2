"""`llava-hd bench packing`: token-budget packs against padded batches, whole training steps.

The shipped nano parts make an HD model (`hdflex` with tiles of 56 px, projector and row-end fresh
from the seed). Every contestant has its own copy of it and its own AdamW, sees the same samples in
each step, and takes its turn at each step (the first one rotates): forward, backward and update
are timed; reading and packing are not, loader processes do that beside the training. One thread
computes, so that the processor's own time, which other work on the machine hardly changes, can
stand beside the clock's.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..hd.errors import UsageError
from ..hd.image import load_image
from ..model.assemble import assemble
from ..model.llava_hd import LlavaHD
from ..model.nano import SHIPPED
from ..model.packing import Sample
from ..model.processor import Processor
from ..train.batches import BatchOrder
from ..train.lengths import LengthReader, Lengths, token_lengths
from ..train.optimizer import build_optimizer, freeze
from ..train.packs import default_pack_tokens
from ..train.settings import OptimizerConfig
from .measure import (
    csv_text,
    device_name,
    environment,
    json_text,
    quantiles,
    result_folder,
    rotated,
    so_many_threads,
    write_results,
)
from .packing_data import NANO, SETTINGS, TEMPLATE, draw, picture, records_of
from .packing_passes import CONTESTANTS, RIVALS, Pass, make_passes, train_step

RECORD, TABLE = "packing.json", "packing.csv"
NOTES = (
    "nano model on one CPU thread in fp32; the tower, which is never padded, is a larger part of a "
    "nano step than of a 7B one",
    "lengths are drawn from rough tables (bench/packing_data.py), not from the real data sets",
)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """One run. batch: samples of a padded pass; step_samples: of a step, the window of the packs;
    steps: timed ones of each setting of lengths."""

    settings: tuple[str, ...] = SETTINGS
    batch: int = 16
    step_samples: int = 128
    steps: int = 10
    lr: float = 1e-3
    seed: int = 0
    out: Path | None = None
    command: str = ""

    def __post_init__(self) -> None:
        for name in ("batch", "step_samples", "steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be 1 or more")
        if self.step_samples % self.batch:
            raise UsageError(
                f"--step-samples {self.step_samples} is not a multiple of --batch {self.batch}"
            )
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed}: give a number from 0")


@dataclass
class Contestant:
    """One copy of the model, and what its steps took and gave."""

    model: LlavaHD
    optimizer: torch.optim.Optimizer
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    computed: int = 0
    passes: int = 0

    def step(self, passes: Sequence[Pass]) -> float:
        """One training step; returns its mean loss."""
        return train_step(self.model, self.optimizer, passes)

    def timed_step(self, passes: Sequence[Pass]) -> None:
        """One that counts."""
        begin, cpu_begin = time.perf_counter(), time.process_time()
        loss = self.step(passes)
        self.seconds.append(time.perf_counter() - begin)
        self.cpu_seconds.append(time.process_time() - cpu_begin)
        self.losses.append(loss)
        self.tokens += sum(one.num_useful_tokens for one in passes)
        self.computed += sum(one.num_tokens for one in passes)
        self.passes += len(passes)


@dataclass(frozen=True)
class Data:
    """The samples of a setting: how to read one, their lengths, and the order of packs."""

    read: Callable[[int], Sample]
    lengths: Lengths
    order: BatchOrder


def run_benchmark(request: Request, say: Say) -> tuple[dict[str, Any], Path]:
    """Measure, write both files, return the record and the folder.

    The record: environment, settings, rows (one for each setting of lengths and contestant),
    ratios (useful tokens/s of packs over a rival's: of all steps by the clock, by the processor's
    time, and quantiles over the steps; `bound`: of computed tokens). Raises UsageError for a
    folder with results.
    """
    out = result_folder(request.out, torch.device("cpu"), RECORD)
    with so_many_threads(1):
        record = _measure(request, say)
    record["request"]["out"] = str(out)
    table = csv_text(record["rows"], list(record["rows"][0]))
    write_results(out, {TABLE: table, RECORD: json_text(record)})
    return record, out


def _measure(request: Request, say: Say) -> dict[str, Any]:
    device = torch.device("cpu")
    record: dict[str, Any] = {
        "environment": environment(device, request.command, request.seed),
        "request": asdict(request),
        "notes": list(NOTES),
        "lengths": {},
        "rows": [],
        "ratios": [],
    }
    model, processor = nano_model(request.seed)
    say(f"{device_name(device)}, one thread")
    for setting in request.settings:
        data = prepare_data(setting, request, processor)
        record["lengths"][setting] = _summary(data.lengths, data.order)
        say(f"{setting}: {len(data.lengths):,} samples")
        found = race(data, request, model, say)
        record["rows"] += rows_of(setting, found, data.order)
        record["ratios"] += ratios_of(setting, found)
    return record


def nano_model(seed: int) -> tuple[LlavaHD, Processor]:
    """The HD model of the shipped parts, as stage 2 trains it."""
    model, processor = assemble(
        vision=SHIPPED / "tower56", language=SHIPPED / "lm", hd=NANO.hd, seed=seed
    )
    freeze(model, "finetune")
    return model.train(), processor


def prepare_data(setting: str, request: Request, processor: Processor) -> Data:
    """Samples for all steps and one more to warm up, read once."""
    count = request.step_samples * (request.steps + 1)
    records = records_of(draw(setting, count, request.seed))
    reader = LengthReader(records, picture, processor, TEMPLATE, NANO.max_length)
    lengths = token_lengths(reader, "")
    order = BatchOrder(
        num_samples=count,
        samples_per_step=request.step_samples,
        samples_per_pass=request.batch,
        seed=request.seed,
        batching="packs",
        has_image=lengths.visual > 0,
        lengths=lengths.total,
        pack_tokens=default_pack_tokens(lengths.total, request.batch, request.step_samples),
    )

    @lru_cache(maxsize=request.step_samples)
    def read(index: int) -> Sample:
        record = records[index]
        images = [load_image(picture(record, k)) for k in range(len(record.images))]
        return processor.conversation(record.turns, images, NANO.max_length, TEMPLATE)

    return Data(read, lengths, order)


def race(data: Data, request: Request, model: LlavaHD, say: Say) -> dict[str, Contestant]:
    """All steps of all contestants, in turns; step 0 warms up and is left out."""
    config = replace(OptimizerConfig(), lr=request.lr)
    found = {}
    for name in CONTESTANTS:
        own = copy.deepcopy(model)
        found[name] = Contestant(own, build_optimizer(own, config))
    for step in range(request.steps + 1):
        for name in rotated(list(CONTESTANTS), step):
            passes = make_passes(name, data.order, step, data.read, model)
            if step:
                found[name].timed_step(passes)
            else:
                found[name].step(passes)
        if step:
            took = ", ".join(f"{name} {one.seconds[-1]:.2f} s" for name, one in found.items())
            say(f"[{step}/{request.steps}] {took}")
    return found


def rows_of(
    setting: str, found: dict[str, Contestant], order: BatchOrder
) -> Iterator[dict[str, Any]]:
    """A row for each contestant."""
    for name, one in found.items():
        seconds = sum(one.seconds)
        fill = one.tokens / (one.passes * order.pack_tokens) if order.pack_tokens else None
        pairs = zip(one.losses, found["packs"].losses, strict=True)
        yield {
            "lengths": setting,
            "contestant": name,
            "useful_tokens_per_second": round(one.tokens / seconds, 1),
            "padding": round(1 - one.tokens / one.computed, 4),
            "pack_fill": round(fill, 4) if name == "packs" and fill is not None else None,
            "passes": one.passes,
            "useful_tokens": one.tokens,
            "computed_tokens": one.computed,
            "seconds": round(seconds, 3),
            "cpu_seconds": round(sum(one.cpu_seconds), 3),
            "last_loss": one.losses[-1],
            "largest_loss_difference": max(abs(a - b) / abs(b) for a, b in pairs),
        }


def ratios_of(setting: str, found: dict[str, Contestant]) -> Iterator[dict[str, Any]]:
    """Useful tokens/s of packs over each rival's: all steps together, and step by step."""
    packs = found["packs"]
    for name in RIVALS:
        rival = found[name]
        steps = [a / b for a, b in zip(rival.seconds, packs.seconds, strict=True)]
        median, low, high = quantiles(steps)
        yield {
            "lengths": setting,
            "rival": name,
            "ratio": round(sum(rival.seconds) / sum(packs.seconds), 4),
            "cpu_ratio": round(sum(rival.cpu_seconds) / sum(packs.cpu_seconds), 4),
            "median": round(median, 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "bound": round(rival.computed / packs.computed, 4),
        }


def _summary(lengths: Lengths, order: BatchOrder) -> dict[str, Any]:
    """What the samples are like, in nano tokens."""
    marks = (0, 5, 25, 50, 75, 95, 100)
    return {
        "samples": len(lengths),
        "mean": round(float(lengths.total.mean()), 1),
        "percentiles": {str(m): int(np.percentile(lengths.total, m)) for m in marks},
        "with_image": round(float((lengths.visual > 0).mean()), 4),
        "visual_share": round(float(lengths.visual.sum() / lengths.total.sum()), 4),
        "max_length": NANO.max_length,
        "cut": int((lengths.total == NANO.max_length).sum()),
        "pack_tokens": order.pack_tokens,
    }
