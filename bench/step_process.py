"""One competitor of `bench step` in a process of its own: `python -m llava_hd.bench.step_process`.

It reads job.json, takes all steps of the wanted stages, each from the same weights, and writes what
they took and gave. So nobody inherits another's memory, threads or patched modules.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..hd.errors import LlavaHDError
from .files import write_json
from .measure import short_error
from .packing_passes import train_step
from .step_competitors import Runner, build
from .step_data import read_data
from .step_options import OURS, Request
from .step_profile import profile_step

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")  # Linux


@dataclass(frozen=True)
class Job:
    """A competitor's work. folder: of weights and data; result: the file to write; profiled: one
    step is looked into (step_profile.py), and none is timed."""

    competitor: str
    request: Request
    folder: Path
    result: Path
    profiled: bool = False


@dataclass(frozen=True)
class Taken:
    """What the steps of a stage took: seconds by the clock (of them waiting for data), seconds of
    the processor in this process (loader processes have their own), losses of all steps (those
    before the clock started too), tokens that were computed, passes, and the most memory that was
    held."""

    seconds: list[float]
    waited: list[float]
    cpu_seconds: list[float]
    losses: list[float]
    computed_tokens: int
    passes: int
    peak_bytes: int | None
    notes: dict[str, str]


def write_job(job: Job, path: Path) -> None:
    """Write a job for `main`."""
    request = asdict(job.request) | {"out": None}
    values: dict[str, Any] = {"competitor": job.competitor, "request": request}
    values |= {"folder": str(job.folder), "result": str(job.result), "profiled": job.profiled}
    write_json(path, values)


def read_job(path: Path) -> Job:
    """What `write_job` has written."""
    values = json.loads(path.read_text(encoding="utf-8"))
    own = values["request"]
    own |= {name: tuple(own[name]) for name in ("stages", "competitors")}
    folder, result = Path(values["folder"]), Path(values["result"])
    return Job(values["competitor"], Request(**own), folder, result, values.get("profiled", False))


def run_process(
    request: Request, name: str, folder: Path, profiled: bool = False
) -> dict[str, Any]:
    """One process of a competitor; what it has written of each stage, or of every stage why it has
    died (without memory the system kills it). LlavaHDError where ours dies."""
    job, result = folder / "job.json", folder / "result.json"
    write_job(Job(name, request, folder, result, profiled), job)
    command = [sys.executable, "-m", "llava_hd.bench.step_process", str(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = end_words(done.returncode, done.stderr)
        if name == OURS:
            raise LlavaHDError(f"bench step: {name} {why}")
        return {str(stage): {"reason": why} for stage in request.stages}
    return json.loads(result.read_text(encoding="utf-8"))


def end_words(code: int, stderr: str) -> str:
    """How a process has ended that should have ended with 0."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name} (SIGKILL: often for want of memory)"
    last = stderr.strip().splitlines()[-1:] or ["without a word"]
    return f"ended with code {code}: {last[0][:160]}"


def main(words: list[str] | None = None) -> int:
    """Do the job of the file that is named; what goes wrong with a rival is its result."""
    (path,) = sys.argv[1:] if words is None else words
    job = read_job(Path(path))
    torch.set_num_threads(job.request.threads)
    stages: dict[str, Any] = {}
    for stage in job.request.stages:
        try:
            stages[str(stage)] = run_stage(job, stage)
        except Exception as error:
            if job.competitor == OURS:
                raise
            stages[str(stage)] = {"reason": short_error(error)}
    write_json(job.result, stages)
    return 0


def run_stage(job: Job, stage: int) -> dict[str, Any]:
    """All steps of a stage from the folder's weights: what they took, or the profile of one."""
    gc.collect()
    device = torch.device(job.request.device)
    reset_peak(device)
    runner = build(job.competitor, job.request, stage, job.folder, read_data(job.folder, stage))
    try:
        if job.profiled:
            return {"profile": profile_step(runner, job.request.warm_up, device)}
        return asdict(take_steps(runner, job.request, device))
    finally:
        # Loader processes ignore SIGTERM; were one left (compiled code keeps its inputs alive),
        # this process would wait for it at its end.
        runner.steps.close()


def take_steps(runner: Runner, request: Request, device: torch.device) -> Taken:
    """The steps one after the other; the first `warm_up` have no time. FloatingPointError where a
    loss is not finite: what comes after is no training that could be compared."""
    seconds, waited, cpu, losses = [], [], [], []
    computed = passes = 0
    for step in range(request.num_steps):
        begin, cpu_begin = time.perf_counter(), time.process_time()
        made = next(runner.steps)
        ready = time.perf_counter()
        losses.append(train_step(runner.model, runner.optimizer, made))  # waits for the device
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss of step {step + 1} is {losses[-1]}")
        if step < request.warm_up:
            continue
        seconds.append(time.perf_counter() - begin)
        waited.append(ready - begin)
        cpu.append(time.process_time() - cpu_begin)
        computed += sum(one.num_tokens for one in made)
        passes += len(made)
    peak = peak_held(device)
    return Taken(seconds, waited, cpu, losses, computed, passes, peak, runner.notes)


def reset_peak(device: torch.device) -> None:
    """Forget the most memory that was held."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc: give back what is free
        if trim is not None:
            trim(0)
        CLEAR.write_text("5", encoding="ascii")  # VmHWM starts again at what is held now


def peak_held(device: torch.device) -> int | None:
    """The most memory that was held: by the GPU's allocator, or resident (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not STATUS.exists():
        return None
    lines = STATUS.read_text(encoding="ascii").splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kib) * 1024


if __name__ == "__main__":
    sys.exit(main())
