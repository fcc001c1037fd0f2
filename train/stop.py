"""Asked to stop: SIGTERM, SIGUSR1 (SLURM's warning before the time is up) or Ctrl-C.

The first signal only raises a flag. All ranks learn of it before the next step, save a checkpoint
and end with exit code 75, "resumable". A second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """A context manager in which the signals are noted; `signal` is the first that came, or None.

    announce: tell the user (one rank of a run does). Outside the main thread Python delivers no
    signals, so nothing is caught there.
    """

    def __init__(self, announce: bool) -> None:
        self.announce = announce
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
            if self.announce:
                text = "the step is finished and saved first; once more ends at once"
                os.write(2, f"llava-hd: {self.signal.name}: {text}\n".encode())
            return
        self._restore()
        os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
