"""Ablation runs: a result's folder stands for all that it follows from; the command, end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from llava_hd.bench.ablate import Run, check_folder, estimated_seconds, run_plan, runs_of
from llava_hd.bench.ablate_plan import Plan, Variant, load_plan
from llava_hd.bench.nano_steps import read_seconds, run_steps
from llava_hd.cli.main import main
from llava_hd.hd.errors import UsageError
from llava_hd.train.recipe import config_from

FULL, LESS = Variant(), Variant(global_view=False)


def two(first: Variant, second: Variant, **settings) -> list[Run]:
    plan = Plan({"a": first, "b": second}, seeds=(0,), **settings)
    return runs_of(plan, Path("out"))


def config(run: Run, stage: int):
    return config_from(yaml.safe_load(list(run.recipes.values())[stage - 1]))


@pytest.mark.parametrize(
    ("variant", "shared"),
    [
        (Variant(projector="linear"), False),
        (Variant(row_ends=False), False),
        (Variant(resolution=336), False),
        (Variant(resolution=224), False),
        (Variant(steps_1=7), False),
        (Variant(global_view=False), True),
        (Variant(data_share=0.5), True),
        (Variant(format_prompt=False), True),
        (Variant(steps_2=7), True),
    ],
)
def test_variants_share_a_stage_1_exactly_where_it_is_the_same(
    variant: Variant, shared: bool
) -> None:
    a, b = two(FULL, variant)
    assert (a.stage1 == b.stage1) == shared
    assert a.stage2 != b.stage2 and a.pope != b.pope and a.data == b.data
    assert [s.name for s in a.steps] == ["pretrain", "finetune", "eval"]
    assert [s.name for s in b.steps] == [s.name for s in a.steps][shared:]
    finetune = b.steps[-2]
    assert finetune.needs == [(a if shared else b).steps[0].done]


def test_each_choice_is_what_the_trainer_is_told() -> None:
    full, linear = two(FULL, Variant(projector="linear"))
    assert [config(full, s).model.projector for s in (1, 2)] == ["mlp2x_gelu"] * 2
    assert [config(linear, s).model.projector for s in (1, 2)] == ["linear"] * 2
    hd = config(full, 2).model.hd
    assert (hd.grids, hd.global_view, hd.row_end, hd.tile_px) == (((2, 2),), "squash", True, 56)
    assert config(full, 2).model.projector_from == str(full.stage1)
    no_view, no_ends = two(LESS, Variant(row_ends=False))
    assert [config(no_view, s).model.hd.global_view for s in (1, 2)] == ["squash", "none"]
    assert [config(no_ends, s).model.hd.row_end for s in (1, 2)] == [False, False]
    large, small = two(Variant(resolution=336), Variant(resolution=224))
    for run, side, tower in ((large, 84, "tower84"), (small, 56, "tower56")):
        source = config(run, 2).model
        assert (source.hd.tile_px, source.vision) == (side, f"shipped:{tower}")
        assert source.hd.grids == () and not source.hd.row_end
    half, silent = two(Variant(data_share=0.5), Variant(format_prompt=False))
    assert [config(half, s).data.share for s in (1, 2)] == [1.0, 0.5]
    assert config(half, 2).max_steps == 100 and config(silent, 2).max_steps == 200
    assert config(silent, 2).data.path.endswith("finetune_unprompted.json")
    assert list(silent.steps[-1].words[-2:]) == ["--prompt", ""]
    assert "--prompt" not in half.steps[-1].words


def test_a_changed_plan_never_meets_older_results_and_an_equal_run_is_found_again() -> None:
    plan = Plan({"a": FULL, "b": LESS}, seeds=(0, 1))
    before = {(run.variant, run.seed): run for run in runs_of(plan, Path("out"))}
    renamed = Plan({"x": FULL, "y": LESS}, seeds=(1, 2))
    after = {(run.variant, run.seed): run for run in runs_of(renamed, Path("out"))}
    assert after["y", 1].pope == before["b", 1].pope
    folders = {name: set() for name in ("data", "stage1", "stage2", "pope")}
    changed = [plan, replace(plan, train_scenes=9), replace(plan, test_scenes=9)]
    changed += [replace(plan, seeds=(5, 6))]
    for one in changed:
        for name, seen in folders.items():
            found = {getattr(run, name) for run in runs_of(one, Path("out"))}
            assert not found & seen
            seen |= found
    first, second = (runs_of(replace(plan, steps_2=n), Path("out")) for n in (8, 9))
    assert {run.stage1 for run in first} == {run.stage1 for run in second}
    assert not {run.stage2 for run in first} & {run.stage2 for run in second}


def test_a_variant_alone_brings_its_own_stage_1() -> None:
    plan = Plan({"a": FULL, "b": LESS}, seeds=(0,))
    [alone] = runs_of(plan, Path("out"), ["b"])
    assert [step.name for step in alone.steps] == ["pretrain", "finetune", "eval"]
    assert alone.pope == runs_of(plan, Path("out"))[1].pope


def test_time_is_estimated_by_what_was_measured(tmp_path: Path) -> None:
    plan = Plan({"a": FULL, "b": LESS}, seeds=(0,), steps_1=10, steps_2=10, test_scenes=1)
    a, b = runs_of(plan, tmp_path)
    usual = estimated_seconds([a, b], {})
    assert usual[a.name] > usual[b.name] > 0
    for step in a.steps:
        step.done.parent.mkdir(parents=True, exist_ok=True)
        step.done.touch()
    measured = {a.name: {"pretrain": 5.0, "finetune": 30.0, "eval": 9.0}}
    left = estimated_seconds([a, b], measured)
    assert left == pytest.approx({a.name: 0.0, b.name: 39.0})


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="holds no ablations"):
        check_folder(tmp_path)


def test_a_step_waits_for_what_it_needs(tmp_path: Path) -> None:
    a, b = runs_of(Plan({"a": FULL, "b": LESS}, seeds=(0,)), tmp_path)
    for step in [*a.steps, *b.steps[1:]]:
        step.done.parent.mkdir(parents=True, exist_ok=True)
        step.done.touch()
    assert b.steps[0].may_start
    a.steps[0].done.unlink()
    assert not b.steps[0].may_start
    with pytest.raises(Exception, match=r"waits for .*stage1"):
        run_steps({b.name: b.steps}, 1, tmp_path / "t.json", lambda *_: None, "ablate")


@pytest.mark.timeout(600)
def test_the_tiny_plan_runs_from_end_to_end_and_only_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "out", tmp_path / "docs" / "ablations.md"
    words = ["ablate", "tiny", "--out", str(out)]
    assert main([*words, "--dry-run", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["steps"] for entry in listed["runs"]] == [
        {"pretrain": 1, "finetune": 2, "eval": 36},
        {"finetune": 1, "eval": 36},
    ]
    assert not out.exists() and listed["minutes_left"] > 0

    record = tmp_path / "results" / "tiny.json"
    assert main([*words, "--json", "--page", str(page), "--record", str(record)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "report.json").read_text()) == json.loads(record.read_text())
    assert set(report["variants"]) == {"full", "less"}
    assert report["variants"]["less"]["difference"]["verdict"] == "too few scenes to tell"
    [full, less] = runs_of(load_plan("tiny"), out)
    kept = json.loads((less.stage2 / "config.json").read_text())
    assert kept["hd"]["global_view"] == "none"
    assert json.loads((less.stage2 / "trainer_state.json").read_text())["num_samples"] == 20
    assert json.loads((less.pope / "run.json").read_text())["prompt"] == ""
    assert json.loads((full.pope / "run.json").read_text())["prompt"] != ""
    assert "word or phrase" not in (less.data / "finetune_unprompted.json").read_text()
    text = page.read_text()
    assert "images/ablations.png" in text and (page.parent / "images/ablations.png").is_file()
    assert str(record) in text and "| less |" in text
    assert "<svg" in (out / "report.html").read_text()

    written = {path: path.stat().st_mtime_ns for path in (out / "logs").iterdir()}
    assert main([*words, "--only", "less"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "logs").iterdir()} == written
    assert set(read_seconds(out / "seconds.json")) == {"full seed 0", "less seed 0"}
    assert main([*words, "--only", "lest"]) == 2
    assert "did you mean 'less'" in capsys.readouterr().err


def test_nothing_is_run_where_everything_is_done(tmp_path: Path) -> None:
    plan = Plan({"a": FULL, "b": LESS}, seeds=(0,))
    runs = runs_of(plan, tmp_path)
    for run in runs:
        for step in run.steps:
            step.done.parent.mkdir(parents=True, exist_ok=True)
            step.done.touch()
    assert run_plan(plan, runs, tmp_path, 2, lambda *_: None) == {}
    assert not (tmp_path / "logs").exists() and not runs[0].data.exists()
