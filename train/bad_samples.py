"""Samples that cannot be read: stopped at, left out, or kept without their image; never unseen.

Policy (`data.bad_samples`): `error` stops at the first; `skip` leaves the sample out of its step,
whose loss is the mean over what is left; `text_only` keeps the words of one whose image is bad,
without the image tag, and leaves out one whose record is bad. Each is told in bad_samples.jsonl,
and the run stops when more than `data.bad_sample_limit` of the data are bad.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..hd.errors import DataError
from .config import BAD_SAMPLES_FILE
from .journal import append_journal, cut_journal, read_journal


def allowed_bad(limit: float, num_samples: int) -> int:
    """How many samples may be bad: the share `limit`, rounded up."""
    return math.ceil(round(limit * num_samples, 6))


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read: its index in the data, why, and whether its text stayed."""

    index: int
    reason: str
    kept_text: bool


class BadSamples:
    """Counts the bad samples of a run, on every rank alike, and (rank 0) writes them down.

    A sample that comes again in a later epoch counts once.
    """

    def __init__(self, output_dir: Path, num_samples: int, limit: float, first_step: int) -> None:
        """Lines of steps behind `first_step` belong to a run that was cut off; they are dropped
        by `open`."""
        self.path = output_dir / BAD_SAMPLES_FILE
        self.allowed = allowed_bad(limit, num_samples)
        self.num_samples = num_samples
        self.first_step = first_step
        self.seen = {
            line["index"] for line in read_journal(self.path) if line["step"] <= first_step
        }
        self.is_open = False

    def open(self) -> None:
        """Bring the file to the state of the step that the run goes on from (rank 0), once: the
        first step may have told of bad samples before."""
        if not self.is_open:
            cut_journal(self.path, self.first_step)
        self.is_open = True

    def add(self, step: int, found: Sequence[BadSample], write: bool) -> list[BadSample]:
        """Note the bad samples of step `step` (from 1), of all ranks; returns the new ones.

        Raises DataError, on every rank alike, when more are bad than the limit allows.
        """
        # A step that reaches into the next epoch may hold a sample twice.
        new = list({bad.index: bad for bad in found if bad.index not in self.seen}.values())
        self.seen.update(bad.index for bad in new)
        if write and new:
            self.open()
            append_journal(self.path, ({"step": step, **asdict(bad)} for bad in new))
        if len(self.seen) > self.allowed:
            raise DataError(
                f"{len(self.seen)} of {self.num_samples} samples are bad, {self.allowed} are "
                f"allowed (data.bad_sample_limit); the last: {found[-1].reason}; see {self.path}, "
                "or run llava-hd data check"
            )
        return new
