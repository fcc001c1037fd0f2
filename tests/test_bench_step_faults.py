"""bench step where something goes wrong: what is finished is kept, what is told is true."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from llava_hd.bench import step, step_process
from llava_hd.bench.performance_steps import StepResult, find_steps, goals_table
from llava_hd.bench.step import RECORD, prepare, run_benchmark, sizes_of
from llava_hd.bench.step_competitors import build
from llava_hd.bench.step_data import read_data
from llava_hd.bench.step_options import OURS, RIVAL, Request, add_options, request_of
from llava_hd.bench.step_process import Taken, take_steps
from llava_hd.cli import bench_step
from llava_hd.hd.errors import DataError, Interrupted, LlavaHDError, UsageError

TWO = Request(
    geometry="nano", batch=1, step_samples=1, rounds=2, steps=1, workers=0,
    competitors=(OURS, RIVAL),
)  # fmt: skip
TAKEN = Taken([1.0, 2.0], [0.5, 1.0], [1.0, 2.0], [2.0] * 3, 200, 2, 2**20, {})


@pytest.fixture(autouse=True)
def no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks for the utilisation here, so nothing is multiplied for it."""
    monkeypatch.setattr(step, "peak_rate", lambda request: {"tflops": 1.0, "what": "given"})


def test_a_loss_that_is_no_number_is_a_fault_and_no_agreement(tmp_path):
    one = replace(TWO, stages=(1,))
    prepare(one, sizes_of(one), tmp_path)
    runner = build(OURS, one, 1, tmp_path, read_data(tmp_path, 1))
    with torch.no_grad():
        runner.model.projector.bias_1.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan"):
        take_steps(runner, one, torch.device("cpu"))


class Processes:
    """In place of `run_process`: what each start gives, an exception or what steps took."""

    def __init__(self, *given: object) -> None:
        self.given = list(given)

    def __call__(self, request: Request, name: str, folder: Path) -> dict:
        one = self.given.pop(0)
        if isinstance(one, BaseException):
            raise one
        assert isinstance(one, Taken)
        return {str(stage): asdict(one) for stage in request.stages}


def test_what_was_finished_is_kept_where_ours_fails_later(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "run_process", Processes(TAKEN, TAKEN, LlavaHDError("ours is out")))
    with pytest.raises(LlavaHDError, match=rf"ours is out; .* is in {tmp_path}/out/{RECORD}"):
        run_benchmark(replace(TWO, out=tmp_path / "out"), print)
    record = json.loads((tmp_path / "out" / RECORD).read_text(encoding="utf-8"))
    assert not record["complete"]
    assert [(one["rival"], one["ratio"]) for one in record["ratios"]] == [(RIVAL, 1.0)] * 2


def test_ctrl_c_before_anything_is_finished_says_that_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "run_process", Processes(KeyboardInterrupt()))
    with pytest.raises(Interrupted, match="nothing is kept"):
        step.finish(replace(TWO, out=tmp_path / "out"), False, lambda record: None)
    assert not (tmp_path / "out").exists()


def test_a_rival_that_the_system_kills_is_its_result_and_ours_is_an_error(tmp_path, monkeypatch):
    killed = subprocess.CompletedProcess([], -signal.SIGKILL, "", "a warning")
    monkeypatch.setattr(step_process.subprocess, "run", lambda *a, **k: killed)
    found = step_process.run_process(TWO, RIVAL, tmp_path)
    assert found.keys() == {"1", "2"}
    assert all("killed by SIGKILL" in one["reason"] for one in found.values())
    with pytest.raises(LlavaHDError, match="ours was killed by SIGKILL"):
        step_process.run_process(TWO, OURS, tmp_path)
    told = step_process.end_words(1, "Traceback\nKeyError: 'x'\n")
    assert told == "ended with code 1: KeyError: 'x'"


def test_goals_say_what_they_were_measured_with_and_count_on_an_h200_alone(tmp_path):
    what = "stage 2: useful tokens/s over llava_next's"
    record = {
        "request": {"quick": False, "geometry": "7b", "batch": 4},
        "model": {"layers": 8},
        "data": [{"stage": 1, "mean_tokens": 900.0}, {"stage": 2, "mean_tokens": 1561.3}],
        "targets": [{"what": what, "value": 2.5, "goal": ">= 2", "reached": True}],
        "environment": {"device": "NVIDIA H200", "device_type": "cuda"},
    }
    page = goals_table([StepResult(RECORD, tmp_path, record)])
    assert "| 2.5, met (NVIDIA H200, 8 of 32 layers, batches of 4, 1,561 tokens a sample) |" in page
    other = {**record, "environment": {"device": "NVIDIA A100", "device_type": "cuda"}}
    assert "met (" not in goals_table([StepResult(RECORD, tmp_path, other)])
    low = [{"what": what, "value": 1.5, "goal": ">= 2", "reached": False}]
    older = {**record, "targets": low}
    deeper = {**older, "model": {"layers": 32}}
    both = [StepResult(RECORD, tmp_path, one) for one in (record, older, deeper)]  # newest first
    page = goals_table(both)
    assert page.count("met (") == 2 and "2.5, met (NVIDIA H200, 8 of 32" in page
    assert "<br>1.5, not met (NVIDIA H200, 32 of 32 layers" in page


def test_no_figure_of_the_table_is_cut_off_in_a_pipe(tmp_path, monkeypatch, capsys):
    name = f"{RIVAL}-checkpointing"
    fast = replace(TAKEN, seconds=[1e-3], waited=[5e-4], cpu_seconds=[1e-3])
    monkeypatch.setattr(step, "run_process", Processes(*[fast] * 2))
    request = replace(TWO, competitors=(OURS, name), rounds=1, out=tmp_path / "out")
    record, _ = run_benchmark(request, lambda line: None)
    for row in record["rows"]:
        row |= {"images_per_second": 1234.5678, "peak_mib": 123456.7}
    capsys.readouterr()
    bench_step._print(Console(width=80), record)
    text = capsys.readouterr().out
    assert "…" not in text and name in text
    assert f"{record['rows'][0]['useful_tokens_per_second']:,.1f}" in text


def test_a_gpu_that_is_not_there_is_refused():
    parser = argparse.ArgumentParser()
    add_options(parser)
    args = parser.parse_args(["--device", "cuda:2"])
    for gpus, told in ((0, "torch finds no GPU here"), (2, "the last GPU here is cuda:1")):
        with pytest.raises(UsageError, match=told):
            request_of(args, "", gpus)
    assert request_of(args, "", 3).device == "cuda:2"


@pytest.mark.parametrize("words", [["--steps", "3"], ["--profile"], ["--stage", "1"]])
def test_growth_refuses_what_only_a_race_has(words):
    parser = argparse.ArgumentParser()
    add_options(parser)
    assert request_of(parser.parse_args(["--growth", "--quick"]), "", 0).growth
    with pytest.raises(UsageError, match=f"--growth is no race and has no {words[0]}; leave"):
        request_of(parser.parse_args(["--growth", *words]), "", 0)


def test_a_result_that_lacks_a_figure_is_bad_data(tmp_path):
    record = {name: [] for name in ("rows", "ratios", "losses", "targets", "data", "peak", "notes")}
    record |= {name: {} for name in ("environment", "request", "model")}
    record["rows"] = [{"stage": 1, "competitor": OURS, "reason": "", "mfu": 0.1}]
    (tmp_path / RECORD).write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(DataError, match=r"step\.json: not a result .*useful_tokens_per_second"):
        find_steps([tmp_path])
