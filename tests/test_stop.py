"""Asked to stop: a signal is noted once, the second one acts; and a rank that stands still ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from llava_hd.train.stop import SIGNALS, StopRequest


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_the_handlers_come_back(number, capfd):
    before = [signal.getsignal(one) for one in SIGNALS]
    with StopRequest(announce=True) as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.signal == number
    assert [signal.getsignal(one) for one in SIGNALS] == before
    assert signal.Signals(number).name in capfd.readouterr().err


def test_only_one_rank_announces_it(capfd):
    with StopRequest(announce=False) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.signal == signal.SIGUSR1 and not capfd.readouterr().err


SECOND = """
import os, signal
from llava_hd.train.stop import StopRequest
with StopRequest(announce=False):
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("not here", flush=True)
"""


def test_a_second_signal_ends_the_process_at_once():
    done = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM and done.stdout == "still here\n"


def test_outside_the_main_thread_nothing_is_caught():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def work() -> None:
        with StopRequest(announce=False):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


STUCK = """
import time, torch
from llava_hd.train.watchdog import Watchdog
from llava_hd.train.zero import World
with Watchdog(World(3, 3, 4, torch.device("cpu")), minutes=0.5 / 60) as watchdog:
    for _ in range(4):
        watchdog.at(6, "in a pass")
        time.sleep(0.3)
    print("moving", flush=True)
    watchdog.at(6, "saving")
    time.sleep(60)
"""


def test_a_rank_that_stands_still_ends_and_says_where():
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "moving\n"
    line = next(line for line in done.stderr.splitlines() if line.startswith("llava-hd: error"))
    assert "rank 3, step 7, saving: stood still for" in line
    assert "File " in done.stderr  # where, of every thread
