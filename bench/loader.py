"""`llava-hd bench loader`: images/s of our loader against transformers' processors.

The same JPEG files, the same prompts, the same batches and loader processes on the same cores; the
contestants take turns, a whole pass over the files each, whose first is not timed. Ours hands over
uint8 tiles in packs; transformers' hands over padded floats, already normalised, so ours is timed
once more with the normalisation in the training process, where it costs most.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from ..hd.errors import LlavaHDError, UsageError
from ..hd.grid import get_preset
from ..hd.image import load_image
from ..model.nano import SHIPPED
from ..model.processor import read_tokenizer
from ..model.rival_processor import has_rival
from ..train.dataset import Passes
from .loader_data import (
    NORMALISED,
    OURS,
    PILLOW,
    RIVAL,
    Contestant,
    contestants,
    draw_sizes,
    keep,
    pixel_differences,
    write_files,
)
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

RECORD, TABLE = "loader.json", "loader.csv"
PRESETS = ("hd448", "hdflex", "base336")
TARGET = 3.0  # times transformers' images/s
TOLERANCE = 1e-6  # of normalised pixels, whose range is about -1.8 to 2.2
CHECKED_BATCHES = 2
NOTES = (
    "files hold noise with the spectrum of photographs, in the sizes of the 665K mixture",
    "ours hands over uint8 tiles, which the device normalises; ours-normalised does it on the CPU",
    "transformers' image processor is the PIL one, whose pixels ours are equal to; the one built "
    "on torchvision, which it takes by itself where that is installed, is not measured",
)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """One run. workers: loader processes; images: files; batch: images of a batch; rounds: timed
    passes over the files of each contestant."""

    presets: tuple[str, ...] = PRESETS
    workers: tuple[int, ...] = (0, 1, 2)
    images: int = 96
    batch: int = 8
    rounds: int = 3
    seed: int = 0
    out: Path | None = None
    command: str = ""

    def __post_init__(self) -> None:
        for name in ("images", "batch", "rounds"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} must be 1 or more")
        if any(number < 0 for number in self.workers):
            raise UsageError("--workers must be 0 or more")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed}: give a number from 0")
        for name in self.presets:
            if not has_rival(get_preset(name)):
                raise UsageError(
                    f"--presets {name}: transformers has no such processor; give some of "
                    f"{', '.join(PRESETS)}"
                )


@dataclass
class Tally:
    """What a contestant's timed passes took."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)


def run_benchmark(request: Request, say: Say) -> tuple[dict[str, Any], Path]:
    """Measure, write both files, return the record and the folder.

    The record: environment, request, files, pixels (largest differences), rows (one for each
    preset, number of processes and contestant), ratios (images/s of ours over transformers') and
    parts (milliseconds of an image of ours). Raises UsageError for a folder with results,
    LlavaHDError where pixels differ.
    """
    out = result_folder(request.out, torch.device("cpu"), RECORD)
    with so_many_threads(1), TemporaryDirectory() as folder:
        record = _measure(request, Path(folder), say)
    record["request"]["out"] = str(out)
    table = csv_text(record["rows"], list(record["rows"][0]))
    write_results(out, {TABLE: table, RECORD: json_text(record)})
    return record, out


def _measure(request: Request, folder: Path, say: Say) -> dict[str, Any]:
    device = torch.device("cpu")
    sizes = draw_sizes(request.images, request.seed)
    say(f"{device_name(device)}; writing {len(sizes)} files")
    files = write_files(folder, sizes, request.seed)
    record: dict[str, Any] = {
        "environment": environment(device, request.command, request.seed),
        "request": asdict(request),
        "notes": list(NOTES),
        "files": _describe(files, sizes),
        "pixels": [],
        "rows": [],
        "ratios": [],
        "parts": [],
    }
    tokenizer = read_tokenizer(SHIPPED / "lm")
    batches = [
        tuple(range(first, min(first + request.batch, len(files))))
        for first in range(0, len(files), request.batch)
    ]
    for preset in request.presets:
        made = contestants(files, get_preset(preset), tokenizer)
        record["pixels"].append(check_pixels(preset, made, batches[:CHECKED_BATCHES]))
        for workers in request.workers:
            found = race(made, batches, workers, request.rounds)
            record["rows"] += rows_of(preset, workers, found, len(files))
            record["ratios"] += ratios_of(preset, workers, found)
            newest = record["ratios"][-3:]
            told = ", ".join(f"{one['contestant']} {one['ratio']:.2f}x" for one in newest)
            say(f"{preset}, {workers} loader processes: {told} of {RIVAL}")
        record["parts"].append(parts_of(preset, made[OURS], files))
    return record


def check_pixels(
    preset: str, made: dict[str, Contestant], batches: Sequence[tuple[int, ...]]
) -> dict[str, Any]:
    """How far the pixels of some batches differ; LlavaHDError above TOLERANCE."""
    found = list(pixel_differences(made, batches))
    worst, differ = max(one for one, _ in found), sum(count for _, count in found)
    if differ or not worst <= TOLERANCE:
        raise LlavaHDError(
            f"{preset}: {differ} pixels differ from transformers', by up to {worst:.1e} (allowed: "
            f"{TOLERANCE:.0e}); please report this"
        )
    images = sum(len(samples) for samples in batches)
    return {"preset": preset, "images": images, "largest_difference": worst, "differing": differ}


def race(
    made: dict[str, Contestant], batches: Sequence[tuple[int, ...]], workers: int, rounds: int
) -> dict[str, Tally]:
    """All passes over the files, in turns; the first of each starts processes and is left out."""
    found = {name: Tally() for name in made}
    with ExitStack() as stack:
        loaders = {}
        for name, one in made.items():
            loaders[name] = one.loader(batches, workers)
            stack.callback(loaders.pop, name)
        for number in range(rounds + 1):
            for name in rotated(list(made), number):
                begin, cpu_begin = time.perf_counter(), time.process_time()
                for batch in loaders[name]:
                    made[name].take(batch)
                took = time.perf_counter() - begin, time.process_time() - cpu_begin
                if number:
                    found[name].seconds.append(took[0])
                    found[name].cpu_seconds.append(took[1])
    return found


def rows_of(
    preset: str, workers: int, found: dict[str, Tally], images: int
) -> Iterator[dict[str, Any]]:
    """A row for each contestant. cpu_ms_per_image: of the training process alone."""
    for name, one in found.items():
        median, low, high = quantiles(one.seconds)
        yield {
            "preset": preset,
            "workers": workers,
            "contestant": name,
            "images_per_second": round(images / median, 1),
            "low": round(images / high, 1),
            "high": round(images / low, 1),
            "ms_per_image": round(1e3 * median / images, 3),
            "cpu_ms_per_image": round(1e3 * quantiles(one.cpu_seconds)[0] / images, 3),
        }


def ratios_of(preset: str, workers: int, found: dict[str, Tally]) -> Iterator[dict[str, Any]]:
    """Images/s over transformers': of the median passes, and quantiles over the rounds; by the
    processor's time where all of the work is the training process's own."""
    rival = found[RIVAL]
    for name in (OURS, NORMALISED, PILLOW):
        one = found[name]
        rounds = [a / b for a, b in zip(rival.seconds, one.seconds, strict=True)]
        _, low, high = quantiles(rounds)
        cpu = quantiles(rival.cpu_seconds)[0] / quantiles(one.cpu_seconds)[0]
        ratio = quantiles(rival.seconds)[0] / quantiles(one.seconds)[0]
        yield {
            "preset": preset,
            "workers": workers,
            "contestant": name,
            "ratio": round(ratio, 3),
            "low": round(low, 3),
            "high": round(high, 3),
            "cpu_ratio": None if workers else round(cpu, 3),
            "target": TARGET,
            "reached": ratio >= TARGET,
        }


def parts_of(preset: str, ours: Contestant, files: Sequence[Path]) -> dict[str, Any]:
    """Milliseconds of this process's CPU time for an image: reading and decoding, resizing and
    cutting, and words and packing (what is left of a whole pass)."""
    passes = ours.passes
    assert isinstance(passes, Passes)
    spent = dict.fromkeys(("decode", "cut"), 0.0)
    for file in files:
        begin = time.process_time()
        image = load_image(file)
        between = time.process_time()
        passes.processor.cut(image)
        spent["decode"] += between - begin
        spent["cut"] += time.process_time() - between
    begin = time.process_time()
    keep(passes[tuple(range(len(files)))])
    whole = time.process_time() - begin
    spent["words_and_packing"] = max(0.0, whole - sum(spent.values()))
    return {"preset": preset, **{k: round(1e3 * v / len(files), 3) for k, v in spent.items()}}


def _describe(files: Sequence[Path], sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """What the files are like."""
    num_bytes = sum(file.stat().st_size for file in files)
    pixels = np.array([height * width for height, width in sizes], dtype=float)
    aspects = np.array([width / height for height, width in sizes])
    return {
        "images": len(files),
        "bytes_per_pixel": round(num_bytes / float(pixels.sum()), 3),
        "mean_megapixels": round(float(pixels.mean()) / 1e6, 3),
        "aspect_width_to_height": [round(float(np.percentile(aspects, p)), 2) for p in (5, 50, 95)],
    }
