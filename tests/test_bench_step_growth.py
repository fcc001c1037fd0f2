"""bench step --growth: fits find the powers that are there; samples have the wanted sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_hd.bench import step_growth, step_growth_points
from llava_hd.bench.performance_steps import find_steps, step_parts, write_step_chart
from llava_hd.bench.step import prepare, sizes_of
from llava_hd.bench.step_growth import RECORD, curves_of, fit, run_growth, slope
from llava_hd.bench.step_growth_points import AXES, GRIDS, geometry, main, sample
from llava_hd.bench.step_options import Request
from llava_hd.bench.step_process import Job, read_job, write_job
from llava_hd.hd.errors import LlavaHDError
from llava_hd.hd.files import write_whole
from llava_hd.model.nano import SHIPPED
from llava_hd.model.processor import read_tokenizer
from llava_hd.model.rival import save_random

QUICK = Request(geometry="nano", tile_px=56, quick=True, growth=True)


@pytest.mark.parametrize(("fixed", "exponent"), [(0.0, 1.0), (3.0, 1.0), (0.5, 1.7), (10.0, 2.0)])
def test_a_fit_finds_the_power_that_is_there(fixed, exponent):
    x = np.array([1, 2, 4, 6, 9, 12, 16, 24])
    found = fit(x, fixed + 0.3 * x**exponent)
    assert found.exponent == pytest.approx(exponent, abs=0.011)
    assert found.fixed == pytest.approx(fixed, abs=0.05) and found.error < 1e-3


def test_two_points_give_their_slope():
    assert slope([1, 2], [8.0, 4.0]).exponent == pytest.approx(-1)


def test_curves_leave_out_memory_that_nobody_counted():
    points = [
        {"x": x, "seconds": float(x), "cpu_seconds": None, "peak_mib": None} for x in (1, 2, 4, 8)
    ]
    [curve] = curves_of("tiles", points)
    assert curve["measure"] == "seconds" and curve["exponent"] == pytest.approx(1, abs=0.02)


def test_pictures_fill_their_grids_and_ranks_share_the_same_samples():
    hd = geometry(56)
    for grid in GRIDS:
        made = sample(hd, grid, 3, 0)
        assert made.plans[0].grid == grid and len(made.tiles[0]) == grid[0] * grid[1] + 1
        assert len(made.ids) == 1 + made.plans[0].num_tokens + 3 == len(made.labels)
    assert max(r * c for r, c in GRIDS) == 24
    full = replace(QUICK, quick=False)
    for tokens in AXES["sample tokens"].values(full):
        assert len(AXES["sample tokens"].samples(full, hd, tokens)[0].ids) == tokens
    one, two = (AXES["ranks"].samples(QUICK, hd, ranks) for ranks in (1, 2))
    assert len(one) == 2 * len(two)
    assert AXES["ranks"].values(replace(QUICK, device="cuda")) == [1]


def test_points_are_measured_and_drawn(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    sizes, hd = sizes_of(QUICK), geometry(56)
    tokenizer = read_tokenizer(SHIPPED / "lm")
    save_random(tmp_path, sizes, hd, tokenizer, torch.float32, torch.device("cpu"), 0)
    threads = torch.get_num_threads()
    points = []
    try:
        for axis in ("tiles", "ranks"):
            job = Job(axis, QUICK, tmp_path, tmp_path / f"{axis}.jsonl")
            write_job(job, tmp_path / "job.json")
            assert main([str(tmp_path / "job.json")]) == 0
            lines = job.result.read_text(encoding="utf-8").splitlines()
            points += [{"axis": axis, **json.loads(line)} for line in lines]
    finally:
        torch.set_num_threads(threads)
    tiles = [point for point in points if point["axis"] == "tiles"]
    assert [point["x"] for point in tiles] == [1, 4, 9, 16]
    assert all(point["seconds"] > 0 for point in points)
    assert [point["tokens"] for point in tiles] == sorted(point["tokens"] for point in tiles)
    curves = [curve for axis in ("tiles",) for curve in curves_of(axis, tiles)]
    environment = {
        "device": "CPU Example", "device_type": "cpu", "time": "2026-11-30T10:00:00+00:00",
        "command": "llava-hd bench step --growth", "seed": 0, "threads": 1, "versions": {},
    }  # fmt: skip
    record = {
        "environment": environment, "request": {"threads": 1},
        "model": {"layers": sizes.layers, "width": sizes.width},
        "points": tiles, "curves": curves, "notes": ["a note"],
    }  # fmt: skip
    (tmp_path / RECORD).write_text(json.dumps(record), encoding="utf-8")
    [result] = find_steps([tmp_path])
    assert write_step_chart(result).read_bytes()[:4] == b"\x89PNG"
    page = "\n".join(step_parts([result], tmp_path))
    assert "### Growth: CPU Example" in page and f"**{curves[0]['exponent']:.2f}**" in page


def points_of(job: Job) -> str:
    """Two points of an axis, as its process writes them."""
    values = {"tokens": 1, "seconds": 1.0, "cpu_seconds": 1.0, "peak_mib": 1.0}
    return "".join(json.dumps({"x": x, **values}) + "\n" for x in (1, 2))


@pytest.mark.parametrize("code", [75, 130, 1])
def test_axes_that_are_finished_are_kept(tmp_path, monkeypatch, code):
    jobs = []

    def workers(command: list[str], count: int) -> int:
        job = read_job(Path(command[-1]))
        jobs.append(job)
        if len(jobs) > 1:
            return code  # what is left of Ctrl-C, which the workers hear, or of a fault
        write_whole(job.result, points_of(job))
        return 0

    monkeypatch.setattr(step_growth, "run_workers", workers)
    request, said = replace(QUICK, out=tmp_path / "out"), []
    if code == 1:
        with pytest.raises(LlavaHDError, match=rf"sample tokens ended with code 1; .*{RECORD}"):
            run_growth(request, said.append)
    else:
        assert not run_growth(request, said.append)[0]["complete"]
    record = json.loads((tmp_path / "out" / RECORD).read_text(encoding="utf-8"))
    assert {point["axis"] for point in record["points"]} == {"tiles"} and not record["complete"]
    assert [job.competitor for job in jobs] == ["tiles", "sample tokens"]


def test_a_process_that_is_stopped_ends_as_resumable(tmp_path, monkeypatch):
    def stop(job: Job) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(step_growth_points, "measure", stop)
    write_job(Job("tiles", QUICK, tmp_path, tmp_path / "r.jsonl"), tmp_path / "job.json")
    assert main([str(tmp_path / "job.json")]) == 75
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.parametrize(("cores", "told"), [(1, True), (2, False)])
def test_ranks_that_share_a_core_are_told(tmp_path, cores, told):
    environment = {
        "device": "CPU Example", "device_type": "cpu", "time": "2026-11-30T10:00:00+00:00",
        "command": "x", "seed": 0, "threads": 1, "versions": {}, "cores": cores,
    }  # fmt: skip
    points = [{"axis": "ranks", "x": x, "seconds": 1.0, "peak_mib": 1.0} for x in (1, 2)]
    record = {
        "environment": environment, "request": {"threads": 1},
        "model": {"layers": 4, "width": 8}, "points": points, "curves": [], "notes": [],
    }  # fmt: skip
    (tmp_path / RECORD).write_text(json.dumps(record), encoding="utf-8")
    page = "\n".join(step_parts(find_steps([tmp_path]), tmp_path))
    assert ("The 2 ranks shared 1 core:" in page) == told


def test_the_race_and_growth_read_the_same_geometry(tmp_path):
    data = prepare(replace(QUICK, batch=2, step_samples=2, steps=1), sizes_of(QUICK), tmp_path)
    assert set(data) == {1, 2}
