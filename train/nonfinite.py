"""Steps whose loss or gradient is not finite: skipped by all ranks, written down, bounded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..hd.errors import LlavaHDError
from ..model.packing import PackedBatch
from .config import NONFINITE_FILE, TrainConfig
from .journal import append_journal, cut_journal
from .zero import Engine, World, gather_objects


class NonFiniteSteps:
    """Judges each step. in_a_row: steps skipped one after another, part of the trainer's state."""

    def __init__(self, config: TrainConfig, world: World, in_a_row: int) -> None:
        self.path = Path(config.output_dir) / NONFINITE_FILE
        self.config = config
        self.world = world
        self.in_a_row = in_a_row

    def open(self, first_step: int) -> None:
        """Drop the lines of steps that will be taken again (rank 0)."""
        cut_journal(self.path, first_step)

    def judge(
        self,
        step: int,
        loss: float,
        local_losses: Sequence[float],
        batches: Sequence[PackedBatch],
        engine: Engine,
    ) -> bool:
        """Whether step `step` (from 0), just taken, was skipped; a collective if it was.

        loss is the same on all ranks, and so is what DeepSpeed found in the gradients: it leaves
        weights and moments untouched when any of them is not finite. Raises LlavaHDError when the
        run must stop: `on_nonfinite` stop, too many in a row, or a loss that is not finite beside
        gradients that are (the weights have moved then).
        """
        skipped = bool(engine.optimizer.overflow)
        if math.isfinite(loss) and not skipped:
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        what = f"step {step + 1}: the {'loss' if not math.isfinite(loss) else 'gradient'}"
        everyone = gather_objects((list(local_losses), [list(batch.names) for batch in batches]))
        if self.world.is_main:
            self._write(step, loss, everyone)
        if not skipped:
            raise LlavaHDError(
                f"{what} is {loss} beside finite gradients, the weights have moved; go on from the "
                "last checkpoint with a lower optimizer.lr"
            )
        if self.config.on_nonfinite == "stop" or self.in_a_row >= self.config.nonfinite_limit:
            often = f", {self.in_a_row} steps in a row" if self.in_a_row > 1 else ""
            raise LlavaHDError(
                f"{what} is not finite{often}; the weights are those before; its records are in "
                f"{self.path}; lower optimizer.lr, or set gradient_clipping"
            )
        return True

    def _write(
        self, step: int, loss: float, everyone: Sequence[tuple[list[float], list[list[str]]]]
    ) -> None:
        """Each rank's records, pass by pass, and the loss of the pass: who was not finite."""
        line = {
            "step": step + 1,
            "loss": str(loss),
            "ranks": [
                [
                    {"loss": str(value), "records": names}
                    for value, names in zip(losses, passes, strict=True)
                ]
                for losses, passes in everyone
            ],
        }
        append_journal(self.path, [line])
