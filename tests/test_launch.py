"""Local workers: their codes, their world, and that none outlives its launcher."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from processes import is_running, wait_for

from llava_hd.hd.errors import UsageError
from llava_hd.train.launch import check_num_processes, exit_code, run_workers, worker_environment


def run_script(script: str, num_processes: int = 2) -> int:
    return run_workers([sys.executable, "-c", script], num_processes)


def test_a_failed_worker_stops_the_others_and_gives_its_code():
    script = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)"
    start = time.monotonic()
    assert run_script(script) == 3
    assert time.monotonic() - start < 20


def test_workers_that_end_well_give_code_0_and_know_each_other():
    script = (
        "import os; e = os.environ\n"
        "assert e['WORLD_SIZE'] == '3' and e['RANK'] == e['LOCAL_RANK'] and int(e['RANK']) < 3\n"
        "assert e['MASTER_ADDR'] == '127.0.0.1' and int(e['MASTER_PORT']) > 0"
    )
    assert run_script(script, 3) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's prctl")
def test_workers_end_with_a_launcher_that_is_killed(tmp_path):
    worker = f"import os, time; open({str(tmp_path)!r} + f'/{{os.getpid()}}', 'w'); time.sleep(60)"
    code = (
        f"from llava_hd.train.launch import *; run_workers([sys.executable, '-c', {worker!r}], 2)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    launcher.kill()
    launcher.wait()
    pids = [int(path.name) for path in tmp_path.iterdir()]
    wait_for(lambda: not any(is_running(pid) for pid in pids))


def test_the_most_telling_exit_code_is_given():
    assert exit_code([0, None]) == 0
    assert exit_code([1, 3]) == 3 and exit_code([-15, 1]) == 1 and exit_code([-9, None]) == 137
    assert exit_code([1, 75]) == 75


def test_a_launcher_is_joined_and_its_world_must_fit():
    launched = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "::1", "MASTER_PORT": "1"}
    assert check_num_processes(None, launched) == check_num_processes(4, launched) == 0
    assert check_num_processes(None, {}) == check_num_processes(1, {}) == 0
    assert check_num_processes(2, {}) == 2
    with pytest.raises(Exception, match="inside a launcher with WORLD_SIZE 4"):
        check_num_processes(2, launched)
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        with pytest.raises(UsageError, match=f"RANK is set but {name} is not"):
            check_num_processes(None, {k: v for k, v in launched.items() if k != name})


def test_workers_share_the_cores_unless_told_otherwise(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert worker_environment(0, 2, 1)["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert worker_environment(0, 2, 1)["OMP_NUM_THREADS"] == "5"
