"""The points of a curve of `bench step --growth`, measured in processes of their own.

`python -m llava_hd.bench.step_growth_points JOB`, once for each rank (train/launch.py).
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..hd.errors import Interrupted
from ..hd.files import write_whole
from ..hd.grid import PRESETS, HDConfig
from ..hd.plan import plan_image
from ..model.llava_hd import LlavaHD
from ..model.packing import PackedBatch, Sample, pack
from ..model.prompt import IGNORE
from ..train.optimizer import freeze
from .measure import quantiles
from .packing_data import Scale
from .step_competitors import adamw
from .step_options import DTYPES, Request
from .step_process import Job, peak_held, read_job, reset_peak

# Of images without padding: 1 to 24 tiles, the global view not counted.
GRIDS = ((1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (3, 4), (4, 4), (4, 6))
PACK = "pack tokens"
WORDS = 256  # of a sample at 224 px tiles, where words are not what grows
STEP_SAMPLES = 4  # of the step that ranks share


@dataclass(frozen=True)
class Axis:
    """What grows: its values for a request, and the samples of one pass at a value."""

    values: Callable[[Request], Sequence[int]]
    samples: Callable[[Request, HDConfig, int], list[Sample]]


def geometry(tile_px: int) -> HDConfig:
    """`hdflex` with tiles of that size and the grids above."""
    return replace(PRESETS["hdflex"], tile_px=tile_px, grids=GRIDS)


def sample(hd: HDConfig, grid: tuple[int, int], words: int, seed: int) -> Sample:
    """A picture that fills its grid, of random pixels, and so many learned words."""
    rng = np.random.default_rng(seed)
    plan = plan_image((grid[0] * hd.tile_px, grid[1] * hd.tile_px), hd)
    tiles = rng.integers(0, 256, (plan.num_tiles, 3, hd.tile_px, hd.tile_px), dtype=np.uint8)
    text = rng.integers(5, 400, words).tolist()
    ids = [1, *[4] * plan.num_tokens, *text]  # the shipped tokenizer's <s> and <image>
    labels = [IGNORE] * (1 + plan.num_tokens) + text
    return Sample(ids, labels, (plan,), (torch.from_numpy(tiles),))


def words_of(request: Request) -> int:
    """WORDS at the request's scale."""
    return max(1, WORDS // Scale(request.tile_px).tokens)


def _tiles(request: Request, hd: HDConfig, tiles: int) -> list[Sample]:
    grid = next(one for one in GRIDS if one[0] * one[1] == tiles)
    return [sample(hd, grid, words_of(request), tiles)]


def _tokens(request: Request, hd: HDConfig, tokens: int) -> list[Sample]:
    visual = len(sample(hd, (1, 1), 0, 0).ids)
    return [sample(hd, (1, 1), tokens - visual, tokens)]


def _pack(request: Request, hd: HDConfig, count: int) -> list[Sample]:
    return [sample(hd, (1, 2), words_of(request), number) for number in range(count)]


def _token_counts(request: Request) -> list[int]:
    """Tokens of a sample: from one tile and a few words on, doubling."""
    first = 768 // Scale(request.tile_px).tokens
    return [first * 2**power for power in range(4 if request.quick else 6)]


AXES = {
    "tiles": Axis(lambda request: [r * c for r, c in GRIDS][:: 2 if request.quick else 1], _tiles),
    "sample tokens": Axis(_token_counts, _tokens),
    PACK: Axis(lambda request: [1, 2, 4, 8] if request.quick else [1, 2, 4, 8, 16, 32], _pack),
    "ranks": Axis(
        lambda request: [1, 2] if request.device == "cpu" else [1],
        lambda request, hd, ranks: _pack(request, hd, STEP_SAMPLES // ranks),
    ),
}


def main(words: list[str] | None = None) -> int:
    """Measure the points of the axis that a job names and write them, a line each. Returns the
    code of an interrupted run after Ctrl-C."""
    (path,) = sys.argv[1:] if words is None else words
    job = read_job(Path(path))
    torch.set_num_threads(job.request.threads)
    try:
        points = list(measure(job))
    except KeyboardInterrupt:
        return Interrupted.exit_code
    if os.environ.get("RANK", "0") == "0":
        write_whole(job.result, "".join(json.dumps(point) + "\n" for point in points))
    return 0


def measure(job: Job) -> Iterator[dict[str, Any]]:
    """The points, smallest first, so that none inherits a larger one's memory."""
    request, device = job.request, torch.device(job.request.device)
    torch.manual_seed(request.seed)
    model = LlavaHD.from_pretrained(job.folder, getattr(torch, DTYPES[request.dtype]), device)
    freeze(model, "finetune")
    model.train()
    axis = AXES[job.competitor]
    if job.competitor == "ranks":
        yield _rank(request, model, axis, device)
        return
    for value in axis.values(request):
        batch = pack(axis.samples(request, model.config.hd, value), model.config)
        x = batch.num_tokens if job.competitor == PACK else value
        yield _point(request, model, batch.to(device), x, device)


def _point(
    request: Request, model: LlavaHD, batch: PackedBatch, x: int, device: torch.device
) -> dict[str, Any]:
    seconds, cpu, peaks = [], [], []
    for number in range(1 + (2 if request.quick else 5)):  # the first one warms up
        gc.collect()
        reset_peak(device)
        before, begin, cpu_begin = peak_held(device), time.perf_counter(), time.process_time()
        out = model(batch)
        (out.loss_sum / out.loss_units).backward()
        _wait(device)
        seconds.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - cpu_begin)
        peak = peak_held(device)
        # Without the gradients of the first pass, which later ones find there.
        if number and peak is not None and before is not None:
            peaks.append(max(peak - before, 1))
    return {
        "x": x,
        "tokens": batch.num_tokens,
        **_times(seconds, cpu, device),
        "peak_mib": round(quantiles(peaks)[0] / 2**20, 3) if peaks else None,
    }


def _rank(request: Request, model: LlavaHD, axis: Axis, device: torch.device) -> dict[str, Any]:
    """Steps of this rank with all others: its samples, the gradients' sum, the update."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        dist.init_process_group("gloo")
    batch = pack(axis.samples(request, model.config.hd, size), model.config).to(device)
    optimizer = adamw(model, 2)
    seconds, cpu = [], []
    reset_peak(device)
    before = peak_held(device)
    for _ in range(1 + (2 if request.quick else 5)):
        begin, cpu_begin = time.perf_counter(), time.process_time()
        out = model(batch)
        (out.loss_sum / (out.loss_units * size)).backward()
        if size > 1:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        _wait(device)
        seconds.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - cpu_begin)
    peak = peak_held(device)
    if size > 1:
        dist.destroy_process_group()
    above = None if peak is None or before is None else round(max(peak - before, 1) / 2**20, 3)
    tokens = batch.num_tokens * size
    return {"x": size, "tokens": tokens, **_times(seconds, cpu, device), "peak_mib": above}


def _times(
    seconds: Sequence[float], cpu_seconds: Sequence[float], device: torch.device
) -> dict[str, float | None]:
    """Medians without the first; the processor's own only where it does the work."""
    own = quantiles(cpu_seconds[1:])[0] if device.type == "cpu" else None
    return {"seconds": quantiles(seconds[1:])[0], "cpu_seconds": own}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
