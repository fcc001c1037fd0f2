"""The processes of torch's loader: how they begin, which signals they hear, how they die."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

# Those that go to all processes of a job: Ctrl-C in a terminal, SLURM's warning, the launcher's end
TO_ALL = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)


def quiet_worker(worker: int) -> None:
    """What a loader process does first: one thread, since there are several of them beside the
    model; and no ear for signals to all processes of a job: a run that is asked to stop still wants
    its samples, and they end with their rank in any case."""
    torch.set_num_threads(1)
    for number in TO_ALL:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TO_ALL)


def start(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches. Its processes begin with the signals held back that `quiet_worker` has
    them ignore: one sent while they begin would find torch's own handlers, and end them."""
    with _held_back():
        return iter(loader)


@contextmanager
def _held_back() -> Iterator[None]:
    """Signals to all processes wait; processes begun here inherit that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TO_ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def is_dead_worker(error: BaseException) -> bool:
    """Whether torch's loader says that one of its processes is gone."""
    return "exited unexpectedly" in str(error) or "killed by signal" in str(error)
