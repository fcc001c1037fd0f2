"""Measuring: interleaved times, memory, the device's roofline, environment facts, whole files.

Imports torch, the standard library and two small files of ours, so that a benchmark built on it
runs on a bare GPU machine.

Times are milliseconds. On CUDA they lie between events, with the L2 cache overwritten before
every call (the convention of `triton.testing.do_bench`); the rivals of a case take turns, in a
rotating order, so that clocks and temperature drift for all of them alike. The cache write stands
in the queue before the call, so it hides up to its own length of the launch time; `host_ms` is
what the call costs the processor that launches it.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..hd.errors import UsageError
from ..hd.files import check_out, write_whole

WARM_UP_CALLS = 2
FEWEST_ROUNDS, MOST_ROUNDS = 5, 200
FLUSH_BYTES = 256 * 2**20  # several times the L2 of any GPU
# Steps of one call: each takes what the step before it returned, and each is timed on its own.
Steps = Sequence[Callable[[Any], Any]]


@dataclass(frozen=True)
class Times:
    """What the rounds of one call gave: `[round][step]` milliseconds on the device, on the host."""

    device_ms: list[list[float]]
    host_ms: list[list[float]]

    def total(self, first_step: int = 0) -> list[float]:
        """Milliseconds of each round from a step to the end."""
        return [sum(steps[first_step:]) for steps in self.device_ms]

    def host_total(self, first_step: int = 0) -> list[float]:
        """The same on the host."""
        return [sum(steps[first_step:]) for steps in self.host_ms]


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile, linear between neighbours (numpy's default)."""
    if not samples:
        raise ValueError("quantiles of no samples")
    ordered = sorted(samples)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return at(0.5), at(0.2), at(0.8)


class Stopwatch:
    """Times the steps of one call: CUDA events around each, or the processor's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = (
            torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
            if device.type == "cuda"
            else None
        )

    def run(self, steps: Steps) -> tuple[list[float], list[float]]:
        """Milliseconds of each step (on the device, on the host) of one call."""
        return self._run_cpu(steps) if self.flush is None else self._run_cuda(steps)

    def _run_cpu(self, steps: Steps) -> tuple[list[float], list[float]]:
        spent, value = [], None
        for step in steps:
            start = time.perf_counter()
            value = step(value)
            spent.append((time.perf_counter() - start) * 1e3)
        return spent, spent

    def _run_cuda(self, steps: Steps) -> tuple[list[float], list[float]]:
        assert self.flush is not None
        self.flush.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
        host, value = [], None
        events[0].record()
        for step, event in zip(steps, events[1:], strict=True):
            start = time.perf_counter()
            value = step(value)
            host.append((time.perf_counter() - start) * 1e3)
            event.record()
        events[-1].synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(events)], host


def time_interleaved(
    calls: Mapping[str, Steps], device: torch.device, budget_s: float
) -> dict[str, Times]:
    """Time several calls in turn for about `budget_s` seconds (at least FEWEST_ROUNDS rounds).

    Round i begins with call i, so none always follows the same neighbour.
    """
    watch = Stopwatch(device)
    round_ms = 0.0
    for steps in calls.values():
        for _ in range(WARM_UP_CALLS):
            watch.run(steps)
        round_ms += sum(watch.run(steps)[0])
    rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(budget_s * 1e3 / max(round_ms, 1e-6))))
    times = {name: Times([], []) for name in calls}
    for number in range(rounds):
        for name in rotated(list(calls), number):
            on_device, on_host = watch.run(calls[name])
            times[name].device_ms.append(on_device)
            times[name].host_ms.append(on_host)
    return times


def rotated(names: list[str], number: int) -> Iterator[str]:
    """The names in order, beginning with the one at `number`, modulo their count."""
    start = number % max(1, len(names))
    yield from names[start:] + names[:start]


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Most bytes allocated during a call above those before it; None where nobody counts (CPU)."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def saved_bytes(call: Callable[[], Tensor], inputs: Sequence[Tensor], device: torch.device) -> int:
    """Bytes that a forward keeps for its backward, the inputs and the output left out.

    Counts what autograd saves, whole storages once, however many views of them are saved. On CUDA,
    where the allocator counts, what is still allocated after the forward, if that is more: a
    function may keep tensors elsewhere.
    """
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    # The output is alive until here, so that no address was given out twice.
    result = output.untyped_storage()
    found.pop(result.data_ptr(), None)
    held = 0
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device) - before - result.nbytes()
    return max(sum(found.values()), held)


@dataclass(frozen=True)
class Roofline:
    """What the device does in this run: one large product (TFLOP/s), one large copy (GB/s)."""

    tflops: float
    gbps: float
    product: str
    copy: str

    def floor_ms(self, flops: float, num_bytes: float) -> float:
        """The least time of a task with so many operations and bytes, were nothing in the way."""
        return max(flops / self.tflops / 1e9, num_bytes / self.gbps / 1e6)


def measure_roofline(device: torch.device, dtype: torch.dtype, quick: bool, seed: int) -> Roofline:
    """Medians of a square product and a copy of random data (all-zero data runs faster)."""
    on_cuda = device.type == "cuda"
    side = (4096 if quick else 8192) if on_cuda else (1024 if quick else 2048)
    megabytes = (256 if quick else 1024) if on_cuda else (64 if quick else 256)
    made = torch.Generator(device).manual_seed(seed)
    a, b = (torch.randn(side, side, device=device, generator=made).to(dtype) for _ in range(2))
    # Random bits, as bytes: the copy does not ask what they mean.
    size = (megabytes * 2**20,)
    source = torch.randint(0, 255, size, generator=made, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    calls: dict[str, Steps] = {
        "product": (lambda _: torch.mm(a, b),),
        "copy": (lambda _: target.copy_(source),),
    }
    times = time_interleaved(calls, device, budget_s=1.0)
    product_ms = quantiles(times["product"].total())[0]
    copy_ms = quantiles(times["copy"].total())[0]
    return Roofline(
        tflops=2 * side**3 / product_ms / 1e9,
        gbps=2 * source.numel() / copy_ms / 1e6,
        product=f"{side} x {side} x {side}, {dtype_name(dtype)}",
        copy=f"{megabytes} MiB read and written",
    )


def short_error(error: BaseException) -> str:
    """Type and first line of an error, in at most 160 characters."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def dtype_name(dtype: torch.dtype) -> str:
    """'bfloat16' and the like."""
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return f"CPU {found[1].strip()}" if found else f"CPU {platform.machine()}"


def slug(name: str) -> str:
    """A name as a folder: 'NVIDIA H200' -> 'nvidia-h200'."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment(device: torch.device, command: str, seed: int) -> dict[str, Any]:
    """What another person needs to know to measure the same again."""
    return {
        "command": command,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": seed,
        "device": device_name(device),
        "device_type": device.type,
        "driver": _driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "triton", "numpy", "einops", "llava-hd")},
        },
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: nvidia-smi does not answer ({type(error).__name__})"
    return done.stdout.split("\n")[0].strip()


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The rows as CSV with a heading; None is an empty cell."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def write_results(out: Path, files: Mapping[str, str]) -> None:
    """Write texts into a folder, each whole or not at all; the last named is the record, and comes
    last, so that a folder with a record has everything."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_whole(out / name, text)


def json_text(record: Mapping[str, Any]) -> str:
    """A record as JSON, each object of a list on a line; ValueError for NaN and infinity."""
    return "{\n" + ",\n".join(f"{_json(k)}: {_json_field(v)}" for k, v in record.items()) + "\n}\n"


def _json_field(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(_json(item) for item in value) + "\n]"
    return _json(value, indent=1)


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)


def result_folder(out: Path | None, device: torch.device, record: str) -> Path:
    """A folder without `record`: the given one, or bench/results/DEVICE/DATE and a number.

    Raises UsageError for a given folder that has it, and for one that could not be written when
    all has been measured.
    """
    if out is not None and (out / record).exists():
        raise UsageError(f"--out {out}: holds {record} already; give another folder")
    if out is None:
        day = Path("bench", "results", slug(device_name(device)), f"{datetime.now():%Y-%m-%d}")
        names = (day if n == 1 else day.with_name(f"{day.name}-{n}") for n in count(1))
        out = next(folder for folder in names if not (folder / record).exists())
    check_out(out)
    return out


@contextmanager
def so_many_threads(number: int) -> Iterator[None]:
    """torch computes with so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
