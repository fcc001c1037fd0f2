"""bench step: both models compute the same losses of the same samples, and figures add up."""

from __future__ import annotations

import csv
import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llava_hd.bench import step_data
from llava_hd.bench.packing_data import Drawn, Scale
from llava_hd.bench.packing_passes import AllLogitsPass, DensePass, PackedPass, train_step
from llava_hd.bench.performance import BEGIN, END
from llava_hd.bench.performance_steps import (
    find_steps,
    goals_table,
    step_parts,
    write_step_chart,
)
from llava_hd.bench.step import RECORD, TABLE, prepare, sizes_of, totals_of
from llava_hd.bench.step_competitors import EveryRowProjector, TorchProjector, build, refusal
from llava_hd.bench.step_data import StepData, read_data
from llava_hd.bench.step_flops import datasheet_tflops, work_of
from llava_hd.bench.step_options import COMPETITORS, OURS, RIVAL, Request
from llava_hd.bench.step_process import Job, Taken, read_job, take_steps, write_job
from llava_hd.bench.step_rows import Totals, loss_difference, ratios_of, rows_of, targets_of
from llava_hd.cli.main import main
from llava_hd.hd.errors import UsageError
from llava_hd.hd.grid import PRESETS
from llava_hd.model.attention import IMPLEMENTATIONS
from llava_hd.model.rival import SIZES

CPU = torch.device("cpu")
SMALL = Request(
    geometry="nano", tile_px=56, batch=3, step_samples=6, steps=2, workers=0, competitors=(OURS,)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("step")
    prepare(SMALL, sizes_of(SMALL), path)
    return path


@pytest.fixture(scope="module")
def data(folder: Path) -> dict[int, StepData]:
    return {stage: read_data(folder, stage) for stage in SMALL.stages}


def losses(name: str, stage: int, folder: Path, data: dict[int, StepData]) -> Taken:
    return take_steps(build(name, SMALL, stage, folder, data[stage]), SMALL, CPU)


@pytest.mark.parametrize("stage", [1, 2])
def test_everyone_learns_the_same_from_the_same_samples(stage, folder, data):
    ours = losses(OURS, stage, folder, data)
    assert len(ours.losses) == 3 and ours.losses[-1] < ours.losses[0]
    rivals = [RIVAL, f"{RIVAL}-checkpointing"]
    if stage == 2:
        rivals += ["no-packing", "no-kept-rows", "no-attention", "no-label-rows"]
    for name in rivals:
        assert loss_difference(losses(name, stage, folder, data).losses, ours.losses) < 1e-5, name


def test_the_steps_hold_what_the_facts_say(folder, data):
    for stage, one in data.items():
        totals = totals_of(SMALL, one, sizes_of(SMALL), stage)
        runner = build(OURS, SMALL, stage, folder, one)
        rival = build(RIVAL, SMALL, stage, folder, one)
        steps, theirs = list(runner.steps)[1:], list(rival.steps)[1:]
        packs = [made.batch for step in steps for made in step]
        assert totals.samples == sum(pack.num_samples for pack in packs) == 12
        assert totals.tokens == sum(pack.num_useful_tokens for pack in packs)
        assert totals.tokens == sum(made.num_useful_tokens for step in theirs for made in step)
        assert all(len(step) == 2 for step in theirs)
        facts = [one.facts[int(i)] for s in (1, 2) for i in one.order(SMALL, False).samples(s)]
        tiles = [0 if pack.has_dummy else len(pack.tiles) for pack in packs]
        assert sum(fact.tiles for fact in facts) == sum(tiles)
        assert sum(fact.labels for fact in facts) == sum(pack.num_label_tokens for pack in packs)
        rows = [0 if pack.has_dummy else len(pack.rows) for pack in packs]
        assert sum(fact.rows for fact in facts) == sum(rows)


def test_the_longest_samples_are_cut_for_nobody(tmp_path, monkeypatch):
    longest = Drawn((1987, 1267), 2093)  # at this scale three tokens more than the recipes allow
    monkeypatch.setattr(step_data, "draw", lambda setting, count, seed: [longest] * count)
    request = replace(SMALL, stages=(2,), batch=1, step_samples=1, steps=1)
    made = prepare(request, sizes_of(request), tmp_path)[2]
    assert made.lengths[0] == 259 > Scale(56).max_length
    steps = [next(build(name, request, 2, tmp_path, made).steps) for name in (OURS, RIVAL)]
    assert [[one.num_useful_tokens for one in step] for step in steps] == [[259], [259]]
    assert [[one.loss_units for one in step] for step in steps] == [[made.facts[0].labels]] * 2


def test_frozen_parts_get_no_gradients_in_either_model(folder, data):
    for name in (OURS, RIVAL):
        runner = build(name, SMALL, 1, folder, data[1])
        before = {k: v.clone() for k, v in runner.model.state_dict().items()}
        train_step(runner.model, runner.optimizer, next(runner.steps))
        after = runner.model.state_dict()
        changed = {k for k, v in before.items() if not torch.equal(v, after[k])}
        own = ("projector.", "model.multi_modal_projector.", "model.image_newline")
        assert changed and all(k.startswith(own) for k in changed)
        assert len(changed) == 5  # two layers and the row-end


def test_no_loader_process_outlives_its_steps(folder, data):
    before = set(multiprocessing.active_children())
    runner = build(OURS, replace(SMALL, workers=1), 2, folder, data[2])
    next(runner.steps)
    assert set(multiprocessing.active_children()) - before
    runner.steps.close()  # in the middle, as where a step fails, and while the runner is kept
    assert not set(multiprocessing.active_children()) - before


def test_the_variants_of_ours_compute_the_same_gradients(folder, data):
    expected = None
    for name in (OURS, "no-label-rows", "no-kept-rows", "no-fused-projector"):
        runner = build(name, SMALL, 2, folder, data[2])
        made = next(runner.steps)
        kind = AllLogitsPass if name == "no-label-rows" else PackedPass
        assert all(type(one) is kind for one in made)
        (made[0].loss_sum(runner.model) / made[0].loss_units).backward()
        found = {
            key.replace("projector.inner.", "projector."): p.grad
            for key, p in runner.model.named_parameters()
            if p.grad is not None
        }
        expected = expected or found
        assert found.keys() == expected.keys()
        for key, grad in found.items():
            limit = 2e-5 * expected[key].abs().max() + 1e-7
            assert (grad - expected[key]).abs().max() <= limit, (name, key)
    assert isinstance(runner.model.projector, TorchProjector)
    assert isinstance(build("no-kept-rows", SMALL, 2, folder, data[2]).model.projector,
                      EveryRowProjector)  # fmt: skip


def test_operations_are_those_that_torch_counts(folder, data):
    """torch's own counter sees the products of one sample in one pack, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    one = replace(SMALL, batch=1, step_samples=1)
    sizes = sizes_of(one)
    for stage in (1, 2):
        order = data[stage].order(one, packs=True)
        fact = data[stage].facts[int(order.samples(0)[0])]
        counted = {}
        for name in (OURS, "no-label-rows"):
            runner = build(name, one, stage, folder, data[stage])
            made = next(runner.steps)
            with FlopCounterMode(display=False) as counter:
                (made[0].loss_sum(runner.model) / made[0].loss_units).backward()
            counts = {str(k): v for k, v in counter.get_flop_counts()["Global"].items()}
            attention = sum(v for k, v in counts.items() if "attention" in k)
            counted[name] = sum(counts.values()) - attention
        work = work_of([fact], sizes, PRESETS["hdflex"].__class__(
            **{**PRESETS["hdflex"].to_dict(), "tile_px": 56}), stage)  # fmt: skip
        places = 17
        tower_scores = 3 * places * 4 * places * sizes.vision_width * fact.tiles
        scores = 3 * sizes.layers * 2 * fact.length**2 * sizes.width
        left_out = scores + tower_scores
        assert counted["no-label-rows"] == pytest.approx(work.every_token - left_out, rel=0.02)
        assert counted[OURS] == pytest.approx(work.needed - left_out, rel=0.02)
        assert work.needed < work.every_token


def test_what_cannot_run_here_says_why():
    assert refusal(OURS, CPU, torch.float32) is None
    for name in (f"{RIVAL}-liger", "no-fused-norms", "no-fused-projector"):
        assert refusal(name, CPU, torch.float32)


def test_jobs_come_back_as_they_were(tmp_path):
    job = Job("ours", replace(SMALL, competitors=(OURS, RIVAL)), tmp_path, tmp_path / "r.json")
    write_job(job, tmp_path / "job.json")
    assert read_job(tmp_path / "job.json") == job


def test_cut_geometries_keep_their_widths():
    cut = SIZES["1b"].cut(4)
    assert (cut.layers, cut.vision_layers, cut.width) == (4, 4, 2048)
    assert SIZES["7b"].cut(32) == SIZES["7b"] and SIZES["7b"].cut(1).vision_layers == 2


def taken(seconds: list[float], loss: float = 2.0, peak: int = 2**20) -> Taken:
    half = [value / 2 for value in seconds]
    return Taken(seconds, half, seconds, [loss] * 3, 200, 2, peak, {})


def test_rows_ratios_and_targets_by_hand():
    found = {OURS: [taken([1.0, 3.0])], RIVAL: [taken([3.0, 6.0], 2.002, 2**21)]}
    totals = Totals(10, 8, 100, work_of([], SIZES["nano"], PRESETS["hdflex"], 2))
    rows = list(rows_of(2, found, {"compile": "failed: x"}, totals, 1.0))
    assert [row["competitor"] for row in rows] == [OURS, RIVAL, "compile"]
    assert rows[0]["useful_tokens_per_second"] == 25 and rows[0]["images_per_second"] == 2
    assert rows[0]["loading_share"] == 0.5 and rows[0]["padding"] == 0.5
    assert rows[1]["largest_loss_difference"] == pytest.approx(1e-3)
    [ratio] = ratios_of(2, found)
    assert ratio["ratio"] == 2.25 and ratio["memory_share"] == 0.5
    [same] = ratios_of(2, {**found, RIVAL: [*found[RIVAL], taken([9.0, 9.0])]})
    assert same["ratio"] == 2.25  # a round that ours has not finished is left out
    speed, difference = targets_of(rows, [ratio], False, "1b")
    assert speed["reached"] and speed["value"] == 2.25 and difference["goal"] == "<= 0.001"
    assert len(targets_of(rows, [ratio], True, "7b")) == 4
    assert len(targets_of(rows, [ratio], True, "nano")) == 1
    assert datasheet_tflops("NVIDIA H200", "bf16") == 989
    assert datasheet_tflops("NVIDIA H200", "fp32") is datasheet_tflops("CPU", "bf16") is None


@pytest.mark.timeout(900)  # starts two processes; half a minute on two cores of its own
def test_a_run_leaves_record_table_chart_and_section(tmp_path, capsys):
    words = ["--quick", "--competitors", OURS, RIVAL, f"{RIVAL}-liger", "--batch", "2"]
    words += ["--steps", "2", "--workers", "1", "--json", "--out", str(tmp_path)]
    assert main(["bench", "step", *words]) == 0
    shown = json.loads(capsys.readouterr().out)
    record = json.loads((tmp_path / RECORD).read_text(encoding="utf-8"))
    assert shown["ratios"] == record["ratios"] and shown["largest_loss_difference"] < 1e-3
    assert {(one["stage"], one["rival"]) for one in shown["ratios"]} == {(1, RIVAL), (2, RIVAL)}
    with (tmp_path / TABLE).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and [row["reason"] != "" for row in rows] == [False, False, True] * 2
    for row in record["rows"]:
        if not row["reason"]:
            assert row["useful_tokens_per_second"] > 0 and 0 < row["mfu"] <= row["mfu_every_head"]
            assert 0 <= row["loading_share"] < 1 and row["peak_mib"] > 50
    [result] = find_steps([tmp_path])
    assert write_step_chart(result).read_bytes()[:4] == b"\x89PNG"
    page = "\n".join(step_parts([result], tmp_path))
    assert "## Whole steps" in page
    goal = "| CPU, 1b | stage 2: useful tokens/s over llava_next's | >= 2 |"
    assert f"{goal} not measured |" in page  # a quick run of a nano model reaches nothing
    full = {**record, "request": {**record["request"], "quick": False, "geometry": "1b"}}
    full["targets"] = targets_of(record["rows"], record["ratios"], False, "1b")
    value = next(one for one in full["targets"] if "stage 2" in one["what"])["value"]
    assert f"{goal} {value:.3g}, " in goals_table([replace(result, record=full)])
    assert COMPETITORS[RIVAL] in page and f"{record['losses'][0]['losses'][OURS][0]:.6f}" in page
    docs = tmp_path / "page.md"
    docs.write_text(f"# By hand\n\n{BEGIN}\n{END}\n", encoding="utf-8")
    assert main(["bench", "report", str(tmp_path), "--docs", str(docs)]) == 0
    assert page.split("\n")[-1] in docs.read_text(encoding="utf-8")
    assert main(["bench", "step", *words]) == 2  # holds a result already


def test_every_variant_leaves_out_what_its_name_says(folder, data):
    def made(name: str, stage: int = 2):
        return build(name, replace(SMALL, workers=1), stage, folder, data[stage])

    ours, sdpa = made(OURS), made("no-attention")
    attention = [one.model.language.causal_lm.config._attn_implementation for one in (ours, sdpa)]
    assert attention[0] == IMPLEMENTATIONS["auto"] != attention[1] == "sdpa"
    dense = made("no-packing")
    assert all(type(one) is DensePass for one in next(dense.steps))
    assert multiprocessing.active_children()
    dense.steps.close()
    alone = made("no-overlap")
    before = set(multiprocessing.active_children())
    next(alone.steps)
    assert set(multiprocessing.active_children()) == before
    for name, wanted in ((RIVAL, False), (f"{RIVAL}-checkpointing", True)):
        model = made(name).model
        assert model.training and model.is_gradient_checkpointing == wanted
        layers = model.model.language_model.layers
        assert all(layer.gradient_checkpointing == wanted for layer in layers)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--device", "xyz"], "--device xyz: give cpu, cuda or cuda:N"),
        (["--device", "cuda:"], "--device cuda:: give cpu, cuda or cuda:N"),
        (["--out", f"{__file__}/sub"], "is a file; give a folder"),
        (["--batch", "3", "--step-samples", "8"], "not a multiple"),
        (["--competitors", "llava_nxt", OURS], "llava_next"),
        (["--competitors", RIVAL], "everyone is compared with it"),
        (["--steps", "0"], "--steps must be 1 or more"),
        (["--out", ""], "--out is empty"),
    ],
)
def test_bad_usage_is_told_in_one_line(words, told, capsys):
    assert main(["bench", "step", *words]) == 2
    assert told in capsys.readouterr().err


def test_a_request_without_ours_is_refused():
    with pytest.raises(UsageError, match="ours is missing"):
        replace(SMALL, competitors=(RIVAL,))
