"""Saves that fail on one rank: the run goes on, the older checkpoint stays, the next save works.

The faults are real where the system can make them (a limit on the size of a file, a name that is
taken by a folder), else the write of one rank raises what a full or broken disk would.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..train import checkpoint
from ..train.config import TrainConfig
from ..train.run import train
from .fault_lab import Lab, run_ranks, start_ranks, weight_hash

Progress = Callable[[str], None]
QUICK_CASES = ((0, 2, 0), (1, 3, 1))  # rank, stage, number of the fault
FAILING_STEP = 2  # the save after this many steps fails; those after 1 and 3 do not


@dataclass(frozen=True)
class SaveCase:
    """A save that failed on one rank."""

    fault: str
    rank: int
    stage: int
    went_on: bool  # to the end, with the weights of a run without faults
    older_kept: bool
    failed_absent: bool  # nothing of the failed one is left
    warned: bool
    codes: list[int] | None  # exit codes of the ranks; None where they did not end in time

    def row(self) -> dict[str, Any]:
        return dict(self.__dict__)


def failed_saves(lab: Lab, quick: bool, progress: Progress) -> list[SaveCase]:
    """Every fault on either rank under both stages; `quick` takes two."""
    cases = []
    for stage in (2, 3):
        settings = {"zero__stage": stage, "max_steps": 4}
        whole = lab.config(f"save-whole{stage}", **settings)
        if run_ranks(whole, 2, lab.log) != [0, 0]:
            raise RuntimeError(f"the run failed; see {lab.log}")
        due = weight_hash(Path(whole.output_dir))
        for number, fault in enumerate(FAULTS):
            for rank in (0, 1):
                if quick and (rank, stage, number) not in QUICK_CASES:
                    continue
                config = lab.config(f"save{stage}-{number}-{rank}", **settings, save_steps=1)
                log = lab.folder / f"save{stage}-{number}-{rank}.log"

                body = partial(_train_with_fault, config, rank, FAULTS[fault])
                codes = start_ranks(2, body, log).wait(120.0)
                folder = Path(config.output_dir)
                names = {path.name for path in folder.glob("*checkpoint-*")}
                cases.append(
                    SaveCase(
                        fault,
                        rank,
                        stage,
                        went_on=codes == [0, 0] and weight_hash(folder) == due,
                        older_kept="checkpoint-1" in names and "checkpoint-3" in names,
                        failed_absent=not any("checkpoint-2" in name for name in names),
                        warned="was not saved" in log.read_text(encoding="utf-8"),
                        codes=codes,
                    )
                )
                progress(f"failed saves: {len(cases)}")
    return cases


def _train_with_fault(config: TrainConfig, rank: int, fault: Callable[[], None]) -> None:
    if int(os.environ["RANK"]) == rank:
        _break_save(fault)
    train(config, _Printing())


class _Printing:
    """A listener whose lines go to the log."""

    def say(self, text: str) -> None:
        print(text, flush=True)

    def start(self, first_step: int, num_steps: int) -> None:
        pass

    def step(self, metrics: object) -> None:
        pass


def _break_save(fault: Callable[[], None]) -> None:
    """Let the write of this rank in the save after step FAILING_STEP meet the fault."""
    real, saves = checkpoint.save_fragments, 0

    def save_fragments(engine: Any, folder: Path, world: Any) -> list[str]:
        nonlocal saves
        saves += 1
        if saves == FAILING_STEP:
            fault()
        try:
            return real(engine, folder, world)
        finally:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    checkpoint.save_fragments = save_fragments  # this process exists for this run only


def _raises(number: int) -> Callable[[], None]:
    def fault() -> None:
        raise OSError(number, os.strerror(number))

    return fault


def _small_files() -> None:
    """From here on a file ends after 10,000 bytes: the write itself fails, half done."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))


FAULTS: dict[str, Callable[[], None]] = {
    "file too large, half written (real)": _small_files,
    "no space left on device": _raises(errno.ENOSPC),
    "input/output error": _raises(errno.EIO),
    "permission denied": _raises(errno.EACCES),
}
