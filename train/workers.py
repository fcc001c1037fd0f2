"""A function over many items in processes of its own, with results in the order of the items."""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

from ..hd.errors import LlavaHDError

CHUNK = 64  # items that a worker takes at a time
AHEAD = 4  # chunks that wait for each worker

Done = Callable[[str, int, int], None]  # what, how many are done, of how many
# (function, items, shared) -> the results of function(chunk, *shared), chunk after chunk
Run = Callable[[Callable[..., Any], Sequence[Any], tuple[Any, ...]], Iterator[Any]]


def silent(what: str, count: int, total: int) -> None:
    """Progress that nobody looks at."""


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@contextmanager
def workers(count: int, chunk: int = CHUNK) -> Iterator[Run]:
    """Runs a function over chunks of items, in `count` processes (0: in this one).

    LlavaHDError when a process dies.
    """
    if not count:
        yield lambda function, items, shared: (function(c, *shared) for c in _chunks(items, chunk))
        return
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"))
    try:
        with _ignored_interrupts():
            for _ in range(count):
                pool.submit(int)
        yield lambda function, items, shared: _in_order(
            pool, AHEAD * count, function, _chunks(items, chunk), shared
        )
    except BrokenProcessPool as error:
        raise LlavaHDError(
            "a worker process died, perhaps out of memory; try again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _ignored_interrupts() -> Iterator[None]:
    """Processes begun here leave Ctrl-C to the one that began them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _in_order(
    pool: ProcessPoolExecutor,
    ahead: int,
    function: Callable[..., Any],
    chunks: Iterator[Sequence[Any]],
    shared: tuple[Any, ...],
) -> Iterator[Any]:
    waiting: deque[Future] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(function, chunk, *shared))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
