"""Progress of steps that run side by side: a bar for each chain, or a line for each step."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class StepBars:
    """Called with chain, step and how much of it is done (bench/nano_steps.py).

    One bar per chain; plain lines, one per step, where there is no terminal. finished: the step
    that a chain's bar goes away with; none stays away by default.
    """

    def __init__(self, console: Console, finished: str = "") -> None:
        self.console = console
        self.finished = finished
        self.tasks: dict[str, TaskID] = {}
        self.said: set[tuple[str, str]] = set()
        self.progress = Progress(
            TextColumn("{task.description:<6}"),
            TextColumn("{task.fields[step]:<9}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> StepBars:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def __call__(self, chain: str, step: str, share: float) -> None:
        """Show it."""
        if not self.console.is_terminal:
            if (chain, step) not in self.said:
                self.said.add((chain, step))
                self.console.print(f"{chain}: {step}", highlight=False)
            return
        if chain not in self.tasks:
            self.tasks[chain] = self.progress.add_task(chain, total=1.0, step=step)
        hidden = step == self.finished
        self.progress.update(self.tasks[chain], completed=share, step=step, visible=not hidden)
