"""Commands run in order and side by side: what the demo and the ablations have in common.

A step is a command that a user could type. One that has finished is not run again; an interrupted
training stops at a checkpoint and goes on from it (`--resume auto`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..hd.errors import LlavaHDError
from ..train.checkpoint_state import STATE_FILE
from ..train.config import METRICS_FILE
from .files import write_json
from .pope_data import ANSWERS, SPLITS
from .pope_run import SCORES

TRAINING = ("pretrain", "finetune")
EVAL, DONE = "eval", "done"
QUESTIONS_PER_SCENE = 18  # six in each of three splits
POLL_SECONDS = 0.3
# (chain, step, how much of it is done from 0 to 1); behind a chain's last step (chain, DONE, 1)
Progress = Callable[[str, str, float], None]
Seconds = dict[str, dict[str, float]]  # chain -> step -> seconds


@dataclass(frozen=True)
class Step:
    """A command of a chain.

    done: the file that exists once it has finished. log: its output. progress: the file whose
    lines count what is done, out of `total`. needs: files of other chains' steps that it reads.
    """

    name: str
    words: Sequence[str]
    done: Path
    log: Path
    progress: Path
    total: int
    needs: Sequence[Path] = ()

    @property
    def is_done(self) -> bool:
        return self.done.is_file()

    @property
    def share(self) -> float:
        """How much is done, 0 to 1."""
        if self.is_done:
            return 1.0
        if not self.progress.is_file():
            return 0.0
        return min(1.0, self.progress.read_bytes().count(b"\n") / self.total)

    @property
    def may_start(self) -> bool:
        """Whether everything that it needs is there."""
        return all(path.is_file() for path in self.needs)


def train_step(
    stage: str,
    words: Sequence[str],
    folder: Path,
    log: Path,
    steps: int,
    needs: Sequence[Path] = (),
) -> Step:
    """A training of so many steps into `folder`; `words` follow the stage's name."""
    return Step(
        stage, [stage, *words], folder / STATE_FILE, log, folder / METRICS_FILE, steps, needs
    )


def pope_step(
    model: Path, data: Path, out: Path, log: Path, scenes: int, words: Sequence[str] = ()
) -> Step:
    """POPE's questions about the held-out scenes of `data` (scenes.py), all of an image at once."""
    questions = sorted(str(data / "pope" / f"nano_pope_{split}.json") for split in SPLITS)
    asked = ["eval", "pope", "--model", str(model), "--questions", *questions]
    asked += ["--images", str(data / "images"), "--out", str(out), "--batch-size", "72"]
    asked += ["--max-new-tokens", "8", *words]
    return Step(EVAL, asked, out / SCORES, log, out / ANSWERS, QUESTIONS_PER_SCENE * scenes)


def read_seconds(times: Path) -> Seconds:
    """What the steps have taken so far, over all runs of the command; empty before the first."""
    return json.loads(times.read_text(encoding="utf-8")) if times.is_file() else {}


def run_steps(
    chains: Mapping[str, Sequence[Step]],
    at_once: int,
    times: Path,
    progress: Progress,
    command: str,
) -> Seconds:
    """Run what is not done of the chains, `at_once` of them side by side, each with its part of
    the cores; returns the seconds of each step, which `times` keeps from run to run.

    When a step fails the others are stopped (trainings with a checkpoint), and LlavaHDError names
    command, step and log.
    """
    waiting = {name: [s for s in steps if not s.is_done] for name, steps in chains.items()}
    threads = max(1, len(os.sched_getaffinity(0)) // at_once)
    running: dict[str, tuple[Step, subprocess.Popen[bytes], float]] = {}
    seconds = read_seconds(times)

    def note(name: str, step: Step, start: float) -> None:
        of_chain = seconds.setdefault(name, {})
        of_chain[step.name] = round(of_chain.get(step.name, 0.0) + time.monotonic() - start, 1)
        write_json(times, seconds)

    try:
        while running or any(waiting.values()):
            for name, steps in waiting.items():
                free = len(running) < at_once and name not in running
                if free and steps and steps[0].may_start:
                    step = steps.pop(0)
                    running[name] = (step, _start(step, threads), time.monotonic())
            if not running:
                raise LlavaHDError(f"{command}: {_stuck(waiting)}")
            for name, (step, process, start) in list(running.items()):
                code = process.poll()
                progress(name, step.name, step.share)
                if code is None:
                    continue
                if code or not step.is_done:
                    raise LlavaHDError(_failure(command, name, step, code))
                del running[name]
                note(name, step, start)
                if not waiting[name]:
                    progress(name, DONE, 1.0)
            time.sleep(POLL_SECONDS)
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for name, (step, process, start) in running.items():
            process.wait()
            note(name, step, start)
    return seconds


def _start(step: Step, threads: int) -> subprocess.Popen[bytes]:
    step.log.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "DS_ACCELERATOR": "cpu",
        # glibc keeps freed memory: handing pages back costs small models a tenth of a step.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    }
    with step.log.open("ab") as log:
        log.write(f"$ llava-hd {' '.join(step.words)}\n".encode())
        log.flush()
        return subprocess.Popen(
            [sys.executable, "-m", "llava_hd.cli.main", *step.words],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def _stuck(waiting: Mapping[str, Sequence[Step]]) -> str:
    """Why none of the waiting chains may go on."""
    name, step = next((name, steps[0]) for name, steps in waiting.items() if steps)
    missing = next(path for path in step.needs if not path.is_file())
    return f"{name} {step.name} waits for {missing}, which no step here makes; run all variants"


def _failure(command: str, chain: str, step: Step, code: int) -> str:
    lines = step.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = lines[-1] if lines else "no output"
    return f"{command}: {chain} {step.name} ended with code {code}: {last} (all of it: {step.log})"
