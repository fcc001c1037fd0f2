"""bench step --profile: what a step of ours spends its time on, beside the record."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from llava_hd.bench import step, step_process, step_profile
from llava_hd.bench.performance_steps import LONGEST_NAME, find_steps, step_parts
from llava_hd.bench.step import prepare, run_benchmark, sizes_of
from llava_hd.bench.step_options import OURS, Request
from llava_hd.bench.step_process import Job, Taken, write_job
from llava_hd.bench.step_profile import LARGEST, REST, TABLE


def small(stage: int, out: Path | None = None) -> Request:
    return Request(
        stages=(stage,), geometry="nano", batch=2, step_samples=2, steps=1, workers=0,
        competitors=(OURS,), out=out,
    )  # fmt: skip


@pytest.mark.parametrize("largest", [LARGEST, 1000])
def test_a_profile_names_what_takes_most_time_and_adds_up(tmp_path, monkeypatch, largest):
    monkeypatch.setattr(step_profile, "LARGEST", largest)
    request = small(2)
    prepare(request, sizes_of(request), tmp_path)
    job = Job(OURS, request, tmp_path, tmp_path / "result.json", profiled=True)
    write_job(job, tmp_path / "job.json")
    threads = torch.get_num_threads()
    try:
        assert step_process.main([str(tmp_path / "job.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(job.result.read_text(encoding="utf-8"))["2"]["profile"]
    assert rows[-1]["name"] == REST
    spent = [row["ms"] for row in rows[:-1]]
    assert spent == sorted(spent, reverse=True)
    if largest == LARGEST:
        assert len(spent) == LARGEST and spent[-1] > 0
    else:  # forward, backward and the optimizer, however small
        assert rows[-1]["calls"] == 0
        assert {"aten::mm", "aten::_fused_adamw_"} <= {row["name"] for row in rows}
    assert sum(row["share"] for row in rows) == pytest.approx(1, abs=1e-3)


def test_a_profile_is_written_beside_the_record_and_shown(tmp_path, monkeypatch):
    kernel = {"name": "a|b" * 40, "calls": 3, "ms": 1.5, "share": 0.25}
    steps = asdict(Taken([1.0], [0.5], [1.0], [2.0] * 2, 200, 2, 2**20, {}))

    def start(request: Request, name: str, folder: Path, profiled: bool = False) -> dict:
        return {"1": {"profile": [kernel]} if profiled else steps}

    monkeypatch.setattr(step, "run_process", start)
    monkeypatch.setattr(step, "peak_rate", lambda request: {"tflops": 1.0, "what": "given"})
    for profiled in (False, True):
        out = tmp_path / str(profiled)
        run_benchmark(small(1, out), print, profiled)
        assert (out / TABLE).exists() == profiled
        page = "\n".join(step_parts(find_steps([out]), tmp_path))
        name = ("a|b" * 40)[:LONGEST_NAME].replace("|", "\\|")
        assert (f"| 1 | {name} | 3 | 1.5 | 25.0% |" in page) == profiled
