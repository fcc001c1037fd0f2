"""`llava-hd bench kernels` as a user calls it, and on a bare machine: files, refusals, stops."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llava_hd.bench import kernels, kernels_trial
from llava_hd.bench.kernels_cases import Case
from llava_hd.bench.kernels_rows import Row, row_from_text
from llava_hd.bench.kernels_trial import try_case
from llava_hd.cli.main import main

SMALL = ["--rows", "64", "--providers", "ours", "eager", "llava"]
FOUR = ["gelu_mlp", "place_rows", "project_place", "linear_loss"]  # attention: test_bench_attention


@pytest.fixture(autouse=True)
def quick_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fewest rounds: tests ask whether there is a time, not which."""
    monkeypatch.setitem(kernels_trial.BUDGET_S, "cpu", 0.0)


def test_command_writes_results_and_prints_ratios(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    words = ["bench", "kernels", "--quick", "--json", "--seed", "7", "--out", str(out), *SMALL]
    words += ["--ops", *FOUR]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert "CPU figures" in printed.err and "[1/5]" in printed.err
    record = json.loads((out / "kernels.json").read_text())
    assert json.loads(printed.out) == {key: record[key] for key in ("rows", "ratios")}
    facts = record["environment"]
    assert record["complete"] and facts["seed"] == 7 and facts["versions"]["torch"]
    assert record["rooflines"]["fp32"]["tflops"] > 0
    rows = [Row(**row) for row in record["rows"]]
    with (out / "kernels.csv").open(newline="") as file:
        assert [row_from_text(line) for line in csv.DictReader(file)] == rows
    assert {r.op for r in rows} == set(FOUR)
    timed = [r for r in rows if r.ms is not None]
    assert all(r.error_output is not None for r in timed)  # an error beside every time
    assert {r.provider for r in timed if r.op == "project_place"} == {"ours", "eager", "llava"}
    assert {r.mode for r in timed if r.op == "linear_loss"} == {"forward", "both"}
    assert not [path for path in out.iterdir() if "unfinished" in path.name]
    assert main(words) == 2  # results are never overwritten
    assert "holds kernels.json already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ops", "gelu"], "--ops 'gelu' is unknown; there is gelu_mlp"),
        (["--dtype", "int8"], "--dtype 'int8' is unknown"),
        (["--rows", "0"], "--rows 0: give numbers from 1"),
        (["--seed", "-1"], "--seed -1"),
        (["--device", "tpu"], "--device 'tpu': give cpu"),
        (["--device", "meta"], "--device 'meta': give cpu"),
        (["--providers", "ours"], "add eager"),
    ],
)
def test_refusals_name_the_option_and_the_remedy(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "kernels", *words]) == 2
    assert said in capsys.readouterr().err
    assert kernels.main(words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_what_was_finished_is_kept(
    stop: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def try_two(case: Case, *args: Any) -> Any:
        if len(done) == 2:
            raise stop("stopped")
        done.append(case.op)
        return try_case(case, *args)

    monkeypatch.setattr(kernels, "try_case", try_two)
    words = ["--quick", "--ops", "gelu_mlp", "place_rows", "linear_loss", "--out", str(tmp_path)]
    if stop is KeyboardInterrupt:
        assert kernels.main([*words, *SMALL]) == 75
    else:
        with pytest.raises(RuntimeError):
            kernels.main([*words, *SMALL])
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert not record["complete"]
    assert {row["op"] for row in record["rows"]} == {"gelu_mlp", "place_rows"}


def test_interrupted_command_has_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "try_case", stop)
    assert main(["bench", "kernels", "--quick", "--out", str(tmp_path / "out"), *SMALL]) == 75
    assert "interrupted; nothing is kept" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


BARE = """
import runpy, sys

class Refuse:
    names = {names}

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ImportError(f"{{name}} is not on a bare machine")

sys.meta_path.insert(0, Refuse())
sys.argv = {argv}
try:
    runpy.run_module("llava_hd.bench.kernels", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    ours = sorted(n.split(".")[1] for n in sys.modules if n.startswith("llava_hd."))
    print(stop.code, ",".join(dict.fromkeys(ours)))
"""


def test_it_runs_on_a_bare_machine(tmp_path: Path) -> None:
    absent = {"PIL", "transformers", "deepspeed", "rich", "jsonargparse", "matplotlib", "scipy"}
    absent |= {"huggingface_hub", "safetensors", "yaml", "sentencepiece", "gradio", "tensorboard"}
    ops = ["gelu_mlp", "project_place", "attention_dense", "attention_packed"]
    argv = ["kernels", "--quick", "--ops", *ops, "--out", str(tmp_path)]
    code = BARE.format(names=absent, argv=[*argv, *SMALL])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["0", "bench,hd,kernels"], done.stderr
    assert (tmp_path / "kernels.csv").is_file()
