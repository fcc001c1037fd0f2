"""A place to break training runs in: data, recipes, and ranks that start in a moment.

Everything is imported once; a rank is then a fork of this process, which starts in milliseconds
where a command needs seconds. So a run can be killed and resumed some hundred times. The ranks are
real: real DeepSpeed over gloo, real files, real signals. What they run is `train`, as the command
does; only its watchdog, which is told of every pass and save, also tells the one who breaks.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..hd.errors import LlavaHDError
from ..model.packing import PackedBatch
from ..train import loop
from ..train.config import TrainConfig
from ..train.launch import PR_SET_PDEATHSIG
from ..train.metrics import read_metrics
from ..train.recipe import config_from, with_values
from ..train.run import train
from ..train.watchdog import Watchdog
from ..train.zero import World
from .scenes import draw_dataset

POLL_SECONDS = 0.01
Hook = Callable[[int, int, str], None]  # rank, step (from 0), what begins


def write_data(folder: Path, scenes: int, text_every: int = 4) -> None:
    """The nano data set; every `text_every`-th record of stage 2 loses its image."""
    draw_dataset(folder, scenes, 2, seed=0)
    path = folder / "finetune.json"
    records = json.loads(path.read_text(encoding="utf-8"))
    for record in records[::text_every]:
        record.pop("image")
        for turn in record["conversations"]:
            turn["value"] = turn["value"].replace("<image>", "").strip()
    path.write_text(json.dumps(records), encoding="utf-8")


HD = {
    "tile_px": 56,
    "patch_px": 14,
    "grids": [[1, 2], [2, 1], [2, 2]],
    "global_view": "squash",
    "keep": "llava_next",
    "row_end": True,
    "pad_colour": "black",
}


@dataclass(frozen=True)
class Lab:
    """A folder with data and a stage 1 to go on from; the logs of the ranks go there too."""

    folder: Path

    @classmethod
    def build(cls, folder: Path, scenes: int = 24) -> Lab:
        """Draw the data and train one step of stage 1."""
        lab = cls(folder)
        folder.mkdir(parents=True, exist_ok=True)
        in_child(lambda: write_data(folder / "data", scenes), lab.log)
        codes = run_ranks(lab.config("stage1", stage="pretrain", max_steps=1), 1, lab.log)
        if codes != [0]:
            raise RuntimeError(f"the lab could not be set up; see {lab.log}")
        return lab

    @property
    def log(self) -> Path:
        return self.folder / "ranks.log"

    def config(self, name: str, **settings: Any) -> TrainConfig:
        """Stage 2 of the nano HD model into `folder/name`, two samples a pass and eight a step;
        `__` stands for the dot in the names of settings."""
        data = self.folder / "data"
        parts = {"vision": "shipped:tower56", "language": "shipped:lm", "hd": HD}
        if settings.get("stage", "finetune") == "finetune":
            parts["projector_from"] = str(self.folder / "stage1")
        values = {
            "stage": "finetune",
            "output_dir": str(self.folder / name),
            "model": parts,
            "data": {
                "path": str(data / "finetune.json"),
                "images": str(data / "images"),
                "template": "vicuna_v1",
                "num_workers": 0,
            },
            "optimizer": {"lr": 1e-3, "warmup_ratio": 0.1},
            "zero": ZERO,
            "per_device_batch_size": 2,
            "global_batch_size": 8,
            "precision": "fp32",
            "gradient_clipping": 1.0,
            "timeout_minutes": 1.0,
        }
        flags = {name.replace("__", "."): value for name, value in settings.items()}
        return config_from(with_values(values, flags))


ZERO = {
    "stage": 2,
    "overlap_comm": False,
    "reduce_bucket_size": 1_000_000,
    "allgather_bucket_size": 1_000_000,
    "stage3_prefetch_bucket_size": 1_000_000,
    "stage3_param_persistence_threshold": 0,  # even the smallest tensor is shared out
}


@dataclass
class Ranks:
    """The forked ranks of one run."""

    pids: list[int]
    events: int  # a pipe on which the hook's events arrive, one line each
    log: Path

    def kill(self, order: Sequence[int], pause: float = 0.0) -> None:
        """SIGKILL to the ranks in this order, with a pause in between."""
        for rank in order:
            with suppress(ProcessLookupError):
                os.kill(self.pids[rank], signal.SIGKILL)
            time.sleep(pause)

    def send(self, number: signal.Signals) -> None:
        """A signal to all ranks."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, seconds: float) -> list[int] | None:
        """Exit codes (minus the signal's number for a killed rank); None where they do not end in
        time: those are killed."""
        deadline = time.monotonic() + seconds
        codes: dict[int, int] = {}
        while len(codes) < len(self.pids) and time.monotonic() < deadline:
            for pid in self.pids:
                if pid not in codes:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        codes[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(POLL_SECONDS)
        hung = [pid for pid in self.pids if pid not in codes]
        for pid in hung:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(self.events)
        return None if hung else [codes[pid] for pid in self.pids]

    def watch(self, seconds: float) -> None:
        """Return after so many seconds, or as soon as all have ended; nothing is collected."""
        deadline = time.monotonic() + seconds
        how = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while time.monotonic() < deadline:
            if all(os.waitid(os.P_PID, pid, how) is not None for pid in self.pids):
                return
            time.sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))

    def next_event(self, seconds: float) -> str | None:
        """The next event, or None where none comes in time."""
        os.set_blocking(self.events, False)
        deadline, line = time.monotonic() + seconds, b""
        while time.monotonic() < deadline:
            with suppress(BlockingIOError):
                byte = os.read(self.events, 1)
                if not byte:
                    return None
                if byte == b"\n":
                    return line.decode()
                line += byte
                continue
            time.sleep(POLL_SECONDS / 10)
        return None


def start_ranks(
    count: int, body: Callable[[], object], log: Path, hook: Hook | None = None
) -> Ranks:
    """Fork `count` ranks that run `body`; what they print goes to `log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    read, write = os.pipe()
    pids = []
    for rank in range(count):
        pid = os.fork()
        if not pid:
            os.close(read)
            _become_rank(rank, count, port, body, log, write, hook)
        pids.append(pid)
    os.close(write)
    return Ranks(pids, read, log)


def _become_rank(
    rank: int,
    count: int,
    port: int,
    body: Callable[[], object],
    log: Path,
    events: int,
    hook: Hook | None,
) -> None:
    """The life of a forked rank; never returns."""
    code = 1
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(count),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        torch.set_num_threads(1)
        with _told(rank, events, hook):
            body()
        code = 0
    except LlavaHDError as error:
        print(f"rank {rank}: {error}", file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def _told(rank: int, events: int, hook: Hook | None) -> Iterator[None]:
    """Let the loop's watchdog tell of what begins: on the pipe, and to the hook."""

    class Telling(Watchdog):
        def at(self, step: int, doing: str, batch: PackedBatch | None = None) -> None:
            super().at(step, doing, batch)
            if rank == 0:
                os.write(events, f"{step} {doing}\n".encode())
            if hook is not None:
                hook(rank, step, doing)

    loop.Watchdog = Telling  # type: ignore[misc]  # this process exists for this run only
    yield


def run_ranks(
    config: TrainConfig, count: int, log: Path, hook: Hook | None = None, seconds: float = 120.0
) -> list[int] | None:
    """Train with `count` ranks to the end; exit codes, None for a hang."""
    return start_ranks(count, partial(train, config), log, hook).wait(seconds)


def in_child(work: Callable[[], None], log: Path) -> None:
    """Do something with tensors in a process of its own, so that this one stays without threads."""
    pid = os.fork()
    if not pid:
        _become_rank(0, 1, 0, work, log, os.open(os.devnull, os.O_WRONLY), None)
    _, status = os.waitpid(pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"the lab could not be set up; see {log}")


def weight_hash(folder: Path) -> str:
    """One hash over a model folder's weight files, byte for byte."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def losses(folder: Path) -> list[float]:
    """The losses of a run's steps."""
    return [entry.loss for entry in read_metrics(folder)]


def losses_hex(folder: Path) -> list[str]:
    """The losses of a run's steps, to the last bit."""
    return [entry.loss.hex() for entry in read_metrics(folder)]


def world_of_one() -> World:
    """This process as a world of its own, for what needs one."""
    return World(0, 0, 1, torch.device("cpu"))
