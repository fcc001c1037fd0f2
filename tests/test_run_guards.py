"""What keeps a run from harming itself: broken and later checkpoints, two runs in one folder, steps
without samples, settings that do not fit the checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from train_data import changed, tiny_config, write_data

from llava_hd.hd.errors import DataError, LlavaHDError, UsageError
from llava_hd.train import checkpoint
from llava_hd.train.config import TrainConfig
from llava_hd.train.launch import worker_command
from llava_hd.train.metrics import MetricsWriter, read_metrics
from llava_hd.train.output_lock import OutputLock
from llava_hd.train.recipe import config_yaml
from llava_hd.train.run import train

DEVICE_FULL = Path("/dev/full")


class Said:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def start(self, first_step: int, num_steps: int) -> None:
        pass

    def step(self, metrics: object) -> None:
        pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory, parts) -> TrainConfig:
    """A run of stage 1 with a checkpoint after each of its steps but the last."""
    folder = tmp_path_factory.mktemp("guards")
    data = write_data(folder / "data")
    config = tiny_config(data, parts, folder / "out", stage="pretrain", save_steps=1, max_steps=4)
    train(config)
    return config


@pytest.fixture
def cut_off(finished, tmp_path) -> TrainConfig:
    """A copy of that run, as if it had been killed before its end."""
    folder = tmp_path / "out"
    shutil.copytree(finished.output_dir, folder)
    (folder / "trainer_state.json").unlink()
    return replace(finished, output_dir=str(folder), resume="auto")


def names(config: TrainConfig) -> set[str]:
    return {path.name for path in Path(config.output_dir).glob("checkpoint-*")}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_a_later_checkpoint_is_put_aside_and_the_one_just_saved_is_kept(cut_off):
    folder, said = Path(cut_off.output_dir), Said()
    named = replace(cut_off, resume=str(folder / "checkpoint-1"), save_total_limit=1)
    train(named, said)
    assert names(cut_off) == {"checkpoint-3"}
    assert {path.name for path in (folder / "quarantine").iterdir()} == {
        "checkpoint-2",
        "checkpoint-3",
    }
    assert sum("is later than step 1" in line for line in said.lines) == 2


def test_where_all_checkpoints_are_broken_no_run_begins_anew_by_itself(cut_off):
    folder, said = Path(cut_off.output_dir), Said()
    before = (folder / "metrics.jsonl").read_bytes()
    for name in names(cut_off):
        flip(folder / name / "model.safetensors")
    for _ in range(2):  # also when they have been put aside already
        with pytest.raises(DataError, match="holds no whole checkpoint any more"):
            train(cut_off, said)
    assert sum("BROKEN CHECKPOINT" in line for line in said.lines) == 3
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_disk_that_cannot_be_read_does_not_put_a_checkpoint_aside(cut_off, monkeypatch):
    def fails(*args: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "fault_in", fails)
    with pytest.raises(LlavaHDError, match=r"cannot be read by rank 0 \(Input/output error\)"):
        train(cut_off)
    assert len(names(cut_off)) == 3


def test_two_runs_do_not_write_into_one_folder(cut_off):
    lock = OutputLock(Path(cut_off.output_dir), print)
    lock.take()
    with pytest.raises(UsageError, match="another run is writing there"):
        train(cut_off)
    lock.release()
    train(cut_off)
    OutputLock(Path(cut_off.output_dir), print).take()  # the run has let it go


def test_a_setting_that_differs_is_named_even_if_the_batches_cannot_be_made(cut_off):
    with pytest.raises(UsageError, match="another per_device_batch_size"):
        train(changed(cut_off, per_device_batch_size=16, global_batch_size=16))


@pytest.mark.skipif(not DEVICE_FULL.exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_metrics_is_told_once_and_outlived(cut_off, monkeypatch):
    said, real = Said(), MetricsWriter.__init__

    def on_a_full_disk(self: MetricsWriter, output_dir: Path, first_step: int) -> None:
        real(self, output_dir, first_step)
        self.path = DEVICE_FULL

    monkeypatch.setattr(MetricsWriter, "__init__", on_a_full_disk)
    train(changed(cut_off, resume=str(Path(cut_off.output_dir) / "checkpoint-1")), said)
    warnings = [line for line in said.lines if "metrics cannot be written" in line]
    assert len(warnings) == 1 and "/dev/full" in warnings[0]


def test_a_step_without_a_sample_leaves_the_weights_alone(parts, tmp_path):
    data = write_data(tmp_path / "data", num_records=5, text_every=100)  # record 0 has no image
    for path in (data / "images").glob("*.png"):
        path.write_bytes(path.read_bytes()[:-40])  # those of all others cannot be decoded
    settings = {"data__bad_samples": "skip", "data__bad_sample_limit": 1.0}
    config = tiny_config(
        data, parts, tmp_path / "out", stage="pretrain", max_steps=3, per_device_batch_size=1,
        global_batch_size=1, **settings,
    )  # fmt: skip
    said = Said()
    result = train(config, said)
    metrics = read_metrics(tmp_path / "out")
    assert [entry.samples for entry in metrics].count(0) == result.skipped >= 2
    assert all((entry.samples == 0) == (entry.loss != entry.loss) for entry in metrics)
    assert all(json.loads(line) for line in (tmp_path / "out/metrics.jsonl").open())
    assert sum("was left out" in line for line in said.lines) == result.skipped


def test_sigterm_to_all_processes_of_a_run_saves_and_ends_resumable(finished, tmp_path):
    """As systemd, scancel or a container's end send it: to launcher, ranks and loader processes."""
    out = tmp_path / "out"
    config = changed(
        finished, output_dir=str(out), max_steps=100_000, save_steps=0, data__num_workers=2
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config_yaml(config), encoding="utf-8")
    words = ["pretrain", "--config", str(recipe)]
    run = subprocess.Popen(
        worker_command(words), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not read_metrics(out):
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGTERM)
        _, errors = run.communicate(timeout=120)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 75, errors
    assert "Traceback" not in errors and len(list(out.glob("checkpoint-*"))) == 1


KEEPING = """
import os, signal, sys
from llava_hd.hd.errors import Interrupted
from llava_hd.train.recipe import load_config
from llava_hd.train.run import Silence, train

class Stopping(Silence):
    def step(self, metrics):
        os.kill(os.getpid(), signal.SIGTERM)

try:
    train(load_config(sys.argv[1], "pretrain"), Stopping())
except Interrupted as error:
    kept = error  # and with it every frame of the run
"""


def test_loader_processes_end_with_a_run_whose_error_is_kept(finished, tmp_path):
    """They have no ear for the signal that multiprocessing sends at exit, and then waits."""
    config = changed(
        finished, output_dir=str(tmp_path / "out"), max_steps=100_000, data__num_workers=2
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config_yaml(config), encoding="utf-8")
    script = [sys.executable, "-c", KEEPING, str(recipe)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == 1


def test_a_loader_process_that_dies_is_one_line(finished, tmp_path):
    out = tmp_path / "out"
    config = changed(finished, output_dir=str(out), max_steps=100_000, data__num_workers=1)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config_yaml(config), encoding="utf-8")
    run = subprocess.Popen(
        worker_command(["pretrain", "--config", str(recipe)]), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not read_metrics(out):
        time.sleep(0.05)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 1, errors
    assert "a loader process died" in errors and "Traceback" not in errors
