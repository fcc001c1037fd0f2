"""Local workers: `--num-processes N` starts N copies of the command, which find each other.

Under torchrun or the deepspeed launcher (RANK and WORLD_SIZE are set) nothing is started: this
process is one of theirs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from ..hd.errors import Interrupted, UsageError

POLL_SECONDS = 0.05
SETTLE_SECONDS = 0.5
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
LAUNCHERS = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a launcher sets beside RANK
RESUMABLE = Interrupted.exit_code
GRACE_SECONDS = 10.0  # between asking a worker to stop and killing it


def check_num_processes(num_processes: int | None, environment: Mapping[str, str]) -> int:
    """How many workers to start here; 0 when this process is the run, or one of its ranks."""
    if num_processes is not None and num_processes < 1:
        raise UsageError(f"--num-processes must be 1 or more, not {num_processes}")
    if "RANK" in environment:
        missing = [name for name in LAUNCHERS if name not in environment]
        if missing:
            raise UsageError(
                f"RANK is set but {missing[0]} is not, so the other ranks cannot be found; start "
                "with torchrun, or unset RANK"
            )
        world = environment["WORLD_SIZE"]
        if num_processes is not None and str(num_processes) != world:
            raise UsageError(
                f"--num-processes {num_processes} inside a launcher with WORLD_SIZE {world}; "
                "leave --num-processes out, the launcher starts the workers"
            )
        return 0
    return num_processes if num_processes and num_processes > 1 else 0


def run_workers(command: Sequence[str], num_processes: int) -> int:
    """Run `command` once per rank; returns 0, or the exit code of the worker that failed.

    When one fails the others are stopped: they would wait for it in a collective. SIGINT, SIGTERM,
    SIGHUP and SIGUSR1 are passed on. A worker killed by a signal counts as 128 + its number.
    """
    port = _free_port()
    workers: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        for rank in range(num_processes):
            # A session of its own, so that Ctrl-C reaches a worker once, through us.
            environment = worker_environment(rank, num_processes, port)
            workers.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
            )
        return _watch(workers)
    finally:
        _stop(workers)
        for number, handler in before.items():
            signal.signal(number, handler)


def _die_with_parent() -> None:
    """In a new worker: be killed when the launcher is (Linux only), and not train on unseen, into
    a folder that the next run has taken over."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _watch(workers: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all workers, or for the first that fails."""
    while True:
        codes = [worker.poll() for worker in workers]
        if any(codes):
            # The cause may be a rank that ends a moment later; one that was asked to stop may.
            stopping = RESUMABLE in codes
            _wait(workers, GRACE_SECONDS if stopping else SETTLE_SECONDS)
            return exit_code([worker.poll() for worker in workers])
        if all(code == 0 for code in codes):
            return 0
        time.sleep(POLL_SECONDS)


def _wait(workers: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """Give the workers so long to end by themselves."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(worker.poll() is None for worker in workers):
        time.sleep(POLL_SECONDS)


def exit_code(codes: Sequence[int | None]) -> int:
    """The code that tells most: a named fault before a crash, a crash before a signal."""
    failed = [code for code in codes if code]
    named = [code for code in failed if code in (2, 3, RESUMABLE)]
    crashed = [code for code in failed if code > 0]
    return (named or crashed or [128 - code for code in failed] or [0])[0]


def _stop(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the workers that still run: first politely, then by force. A rank whose peers are gone
    cannot finish its step, so it is told twice, which means at once (train/stop.py)."""
    for _ in range(2):
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
        time.sleep(POLL_SECONDS)
    deadline = time.monotonic() + GRACE_SECONDS
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def worker_environment(rank: int, num_processes: int, port: int) -> dict[str, str]:
    """What a worker needs to find the others, and its share of the cores."""
    environment = dict(os.environ)
    environment.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_processes),
        LOCAL_WORLD_SIZE=str(num_processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    cores = len(os.sched_getaffinity(0))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_processes)))
    return environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def worker_command(words: Sequence[str]) -> list[str]:
    """The command line of a worker: `llava-hd` with these words, by this interpreter."""
    return [sys.executable, "-m", "llava_hd.cli.main", *words]
