"""A thread that ends a rank which has stood still for too long, and says where it stood.

A collective that waits for a rank which will never come does not return to Python (NCCL), or only
after its own time is up; so the one who tells must stand beside it.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType

from ..model.packing import PackedBatch
from .zero import World

STUCK_EXIT_CODE = 1


class Watchdog:
    """A context manager around the steps of a run; `at` says that the rank has moved."""

    def __init__(self, world: World, minutes: float) -> None:
        self.rank = world.rank
        self.minutes = minutes
        self.where = "before the first step"
        self._due = time.monotonic() + 60 * minutes
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, step: int, doing: str, batch: PackedBatch | None = None) -> None:
        """The rank begins something in step `step` (from 0): reading, a pass, an update, a save."""
        self.where = f"step {step + 1}, {doing}" + ("" if batch is None else f" {standing(batch)}")
        self._due = time.monotonic() + 60 * self.minutes

    def _watch(self) -> None:
        while not self._done.wait(max(0.05, min(1.0, self._due - time.monotonic()))):
            if time.monotonic() >= self._due:
                print(
                    f"llava-hd: error: rank {self.rank}, {self.where}: stood still for "
                    f"{self.minutes:g} minutes (another rank hangs, or timeout_minutes is too "
                    "short); where it stood follows; go on with --resume auto",
                    file=sys.stderr,
                )
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                sys.stderr.flush()
                os._exit(STUCK_EXIT_CODE)

    def __enter__(self) -> Watchdog:
        self._due = time.monotonic() + 60 * self.minutes
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()


def standing(batch: PackedBatch) -> str:
    """A pack in a few words: its first record, how many more, its tiles."""
    if not batch.names:
        return "with an empty pack"
    more = f" and {len(batch.names) - 1} more" if len(batch.names) > 1 else ""
    return f"with {batch.names[0]}{more}, {len(batch.tiles)} tiles"
