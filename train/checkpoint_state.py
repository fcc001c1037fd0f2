"""Where a run stands, as a file: `trainer_state.json`, in a checkpoint or a finished run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..hd.errors import DataError, UsageError
from .recipe import changed_settings

STATE_FILE = "trainer_state.json"
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands. `step` steps are done; with the configuration it says all about data
    order and learning rate, whatever the number of ranks. data_digest: of the data files.
    samples_per_step: as the run began. world_size: the ranks that wrote this. skipped_in_a_row:
    steps just before this one whose loss or gradient was not finite."""

    step: int
    num_steps: int
    num_samples: int
    data_digest: str
    samples_per_step: int
    world_size: int
    config: dict[str, Any]
    skipped_in_a_row: int = 0

    @property
    def is_finished(self) -> bool:
        return self.step >= self.num_steps


def write_state(folder: Path, state: TrainerState) -> None:
    """Write trainer_state.json into `folder`, whole or not at all."""
    unfinished = folder / f".{STATE_FILE}.unfinished"
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"format": 1, **asdict(state)}, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / STATE_FILE)


def read_state(folder: Path) -> TrainerState:
    """The state in `folder`. UsageError where there is none, DataError where it is damaged."""
    path = folder / STATE_FILE
    if not path.is_file():
        raise UsageError(
            f"{folder} is not a checkpoint (no {STATE_FILE}); give resume a checkpoint"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != 1:
            raise ValueError("of another format")
        return TrainerState(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}); remove {folder}") from error


def data_digest(paths: Sequence[str | Path]) -> str:
    """SHA-256 over that of each data file, in order: two files are not one of the same bytes."""
    whole = hashlib.sha256()
    for path in paths:
        one = hashlib.sha256()
        with Path(path).open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                one.update(block)
        whole.update(one.digest())
    return whole.hexdigest()


def check_resumable(folder: Path, fresh: TrainerState) -> TrainerState:
    """The state of a checkpoint that the run beginning at `fresh` may go on from, with any number
    of ranks. UsageError names what differs."""
    state = read_state(folder)
    changed = changed_settings(state.config, fresh.config)
    if changed:
        more = f" ({len(changed)} settings differ)" if len(changed) > 1 else ""
        raise UsageError(
            f"{folder} was written with another {changed[0]}{more}; "
            "resume with the train_config.yaml of its run, or take a new output_dir"
        )
    if state.num_samples != fresh.num_samples:
        raise UsageError(
            f"{folder} was written with {state.num_samples} records, data.path has "
            f"{fresh.num_samples} now; resume with the same data, or take a new output_dir"
        )
    if state.data_digest != fresh.data_digest:
        raise UsageError(
            f"{folder} was written with other contents of data.path (as many records); resume with "
            "the same data, or take a new output_dir"
        )
    return state
