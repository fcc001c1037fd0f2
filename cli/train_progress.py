"""How a training run is shown: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from ..train.metrics import StepMetrics

LINE_SECONDS = 10.0  # between two lines where there is no terminal
LINE_SHARE = 0.1  # or after this share of the steps
SMOOTHING = 0.9  # of the shown loss and speeds


class TrainProgress:
    """A listener of `train.run.train` (rank 0): loss, tokens/s, images/s and the time left.

    Use it as a context manager, so that the bar is gone when an error is printed.
    """

    def __init__(self, shown: bool = True, title: str = "", console: Console | None = None) -> None:
        self.console = console if console is not None else Console(stderr=True, highlight=False)
        self.shown = shown
        self.title = title
        self.averages: dict[str, float] = {}
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.num_steps = self.first_step = 0
        self.began = self.last_line = 0.0
        self.last_share = 0.0

    def __enter__(self) -> TrainProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, text: str) -> None:
        """One line above the bar."""
        if self.shown:
            self.console.print(self._titled(text), markup=False, soft_wrap=True)

    def start(self, first_step: int, num_steps: int) -> None:
        """The steps begin."""
        self.first_step, self.num_steps = first_step, num_steps
        self.began = self.last_line = time.monotonic()
        self.last_share = 0.0
        self.averages = {}
        if self.shown and self.console.is_terminal:
            if self.bar is not None:
                self.bar.stop()
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(compact=True),
                TextColumn("left"),
                console=self.console,
            )
            self.bar.start()
            self.task = self.bar.add_task(
                self.title or "steps", total=num_steps, completed=first_step, numbers=""
            )

    def step(self, metrics: StepMetrics) -> None:
        """One step is done."""
        self._average("loss", metrics.loss)
        self._average("tokens", metrics.tokens_per_second)
        self._average("images", metrics.images_per_second)
        if not self.shown:
            return
        if self.bar is not None:
            self.bar.update(self.task, completed=metrics.step, numbers=self.numbers())
            if metrics.step == self.num_steps:
                self.bar.stop()
        elif not self.console.is_terminal:
            self._line(metrics.step)

    def numbers(self) -> str:
        """Loss and speeds, smoothed."""
        return (
            f"loss {self.averages['loss']:.4f}  {self.averages['tokens']:,.0f} tokens/s  "
            f"{self.averages['images']:,.1f} images/s"
        )

    def _line(self, step: int) -> None:
        now, share = time.monotonic(), step / self.num_steps
        is_last = step == self.num_steps
        due = share - self.last_share >= LINE_SHARE or now - self.last_line >= LINE_SECONDS
        if not (is_last or due):
            return
        self.last_line, self.last_share = now, share
        left = (now - self.began) / (step - self.first_step) * (self.num_steps - step)
        text = f"step {step}/{self.num_steps}  {self.numbers()}  {left:.0f} s left"
        self.console.print(self._titled(text), markup=False, soft_wrap=True)

    def _titled(self, text: str) -> str:
        return f"{self.title}: {text}" if self.title else text

    def _average(self, name: str, value: float) -> None:
        before = self.averages.get(name, value)
        self.averages[name] = SMOOTHING * before + (1 - SMOOTHING) * value
