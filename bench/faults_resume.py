"""Runs that are stopped and gone on with: the same bits at the same number of ranks, the same
samples and nearly the same losses at another.

Stopped in three places: in the middle of an epoch and at its end by SIGKILL right after a save,
and in the middle of a step's passes by SIGTERM, which finishes the step and saves.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ..train.config import TrainConfig
from ..train.metrics import read_metrics
from .fault_lab import Hook, Lab, losses, losses_hex, run_ranks, weight_hash

# 24 records in steps of 8: an epoch has three steps.
STEPS = 7
PLACES = {"mid-epoch": 2, "epoch end": 3, "mid-accumulation": 4}  # steps done when it stops
RESUMABLE = 75
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """One line of the matrix."""

    stage: int
    precision: str
    workers: int
    place: str
    ranks: tuple[int, int]  # before and after
    bit_identical: bool
    worst_loss: float  # largest difference of a step's loss
    fault: str = ""

    def row(self) -> dict[str, Any]:
        return {**self.__dict__, "ranks": list(self.ranks)}


def resume_matrix(lab: Lab, quick: bool, progress: Progress) -> list[Case]:
    """All cases; `quick` takes one for each stage and precision, of all places and numbers of
    workers, and one change of ranks for each stage."""
    cases = []
    for number, (stage, precision) in enumerate(product((2, 3), ("fp32", "bf16"))):
        settings = {"zero__stage": stage, "precision": precision, "max_steps": STEPS}
        whole = lab.config(f"whole-{stage}-{precision}", **settings)
        if run_ranks(whole, 2, lab.log) != [0, 0]:
            raise RuntimeError(f"the undisturbed run failed; see {lab.log}")
        kinds = [(workers, place, (2, 2)) for workers in (0, 2) for place in PLACES]
        changes = [(0, "mid-epoch", (2, 1)), (0, "mid-epoch", (1, 2))]
        if quick:
            kinds = [kinds[4 * number % 6]]
            changes = [changes[stage - 2]] if precision == "fp32" else []
        for workers, place, ranks in kinds + changes:
            cases.append(_resumed(lab, settings, whole, workers, place, ranks))
            progress(f"resume: {len(cases)} cases")
    return cases


def _resumed(
    lab: Lab,
    settings: dict[str, Any],
    whole: TrainConfig,
    workers: int,
    place: str,
    ranks: tuple[int, int],
) -> Case:
    """Stop a run in a place, go on, and compare it with the one that ran through."""
    stage, precision = settings["zero__stage"], settings["precision"]
    name = f"resume-{stage}-{precision}-{workers}-{place}-{ranks[0]}{ranks[1]}"
    done = PLACES[place]
    by_signal = place == "mid-accumulation"
    saves = {} if by_signal else {"save_steps": 1}
    config = lab.config(name, **settings, **saves, resume="auto", data__num_workers=workers)
    stopped = run_ranks(config, ranks[0], lab.log, _stop_after(done, by_signal))
    due = [RESUMABLE] * ranks[0] if by_signal else [-signal.SIGKILL] * ranks[0]
    went_on = run_ranks(config, ranks[1], lab.log)
    folder, reference = Path(config.output_dir), Path(whole.output_dir)
    fault = ""
    if stopped != due:
        fault = f"stopped with {stopped}, not {due}"
    elif went_on != [0] * ranks[1]:
        fault = f"went on with {went_on}"
    elif [m.samples for m in read_metrics(folder)] != [m.samples for m in read_metrics(reference)]:
        fault = "other samples"
    same = losses_hex(folder) == losses_hex(reference)
    pairs = zip(losses(folder), losses(reference), strict=False)
    return Case(
        stage=stage,
        precision=precision,
        workers=workers,
        place=place,
        ranks=ranks,
        bit_identical=same and weight_hash(folder) == weight_hash(reference),
        worst_loss=max((abs(a - b) for a, b in pairs), default=float("inf")),
        fault=fault,
    )


def _stop_after(done: int, by_signal: bool) -> Hook:
    """After `done` steps: SIGKILL each rank when it reads the next; or, in the second pass of the
    step before, SIGTERM to one of them."""
    passes = 0

    def hook(rank: int, step: int, doing: str) -> None:
        nonlocal passes
        if by_signal:
            passes += step == done - 1 and doing == "in a pass"
            if passes == 2 and rank == 1 % int(os.environ["WORLD_SIZE"]):
                os.kill(os.getpid(), signal.SIGTERM)
                passes += 1
        elif step == done and doing == "reading its samples":
            os.kill(os.getpid(), signal.SIGKILL)

    return hook
