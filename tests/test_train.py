"""Training with real DeepSpeed: two processes equal one, ZeRO-2 equals ZeRO-3 equals plain torch.

One launch of two processes runs all two-process runs, since starting them is what costs time.
`stage3_param_persistence_threshold` is 0, so that ZeRO-3 partitions even the smallest tensor.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from train_data import tiny_config, write_data
from train_runs import Runs, assert_same_run, assert_same_weights, losses, norms, weights

from llava_hd.hd.errors import UsageError
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.packing import pack
from llava_hd.train.config import TrainConfig
from llava_hd.train.dataset import RecordReader
from llava_hd.train.metrics import read_metrics
from llava_hd.train.optimizer import build_optimizer, freeze, lr_factor
from llava_hd.train.ordering import run_order
from llava_hd.train.recipe import config_yaml
from llava_hd.train.run import build_model, train
from llava_hd.train.sources import open_records


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, parts: Path) -> Runs:
    """All runs with two processes; stage 1 is handed over to the others."""
    runs = Runs(tmp_path_factory.mktemp("two"), parts)
    ready = (
        runs.stage1,
        runs.zero2,
        runs.zero3,
        runs.resumed,
        runs.zero2_saved,
        runs.zero2_resumed,
        runs.passes2,
        runs.passes3,
        runs.bf16_2,
        runs.bf16_3,
        runs.checkpointing,
        runs.lora,
        runs.lora_resumed,
        runs.packs,
        runs.workers,
    )
    assert runs.two_processes(*ready) == 0
    return runs


def order(config: TrainConfig):
    records = open_records(config.data.paths, config.data.images)
    return records, run_order(config, records, 4)


def test_the_data_puts_a_text_only_pack_on_one_rank_beside_images_on_the_other(runs):
    records, data = order(runs.zero2)
    kinds = [
        tuple(
            any(records[i].images for i in np.concatenate(data.passes_of_rank(step, rank, 2)))
            for rank in (0, 1)
        )
        for step in range(5)
    ]
    assert {(False, True), (True, False)} & set(kinds), kinds
    assert (True, True) in kinds


def in_one_process(config: TrainConfig, tmp_path: Path, **changes: object) -> TrainConfig:
    alone = replace(config, output_dir=str(tmp_path / "one"), **changes)
    train(alone)
    return alone


def test_two_processes_train_stage_1_as_one_does(runs, tmp_path):
    assert_same_run(in_one_process(runs.stage1, tmp_path), runs.stage1)


def test_two_processes_under_zero_2_train_stage_2_as_one_does(runs, tmp_path):
    assert_same_run(in_one_process(runs.zero2, tmp_path), runs.zero2)


def test_zero_3_equals_zero_2(runs):
    assert_same_run(runs.zero3, runs.zero2)


def test_the_number_of_passes_does_not_matter(runs, tmp_path):
    one_pass = in_one_process(runs.zero2, tmp_path, per_device_batch_size=4)
    assert_same_run(one_pass, runs.zero2)


def test_deepspeed_equals_a_plain_torch_loop_over_the_same_batches(runs):
    config = runs.zero2
    model, processor = build_model(config, None)
    freeze(model.train(), config.stage)
    optimizer = build_optimizer(model, config.optimizer)
    peaks = [group["lr"] for group in optimizer.param_groups]
    records, data = order(config)
    read = RecordReader(records, Path(config.data.images), processor, None, config.max_length)
    found, found_norms = [], []
    for step in range(5):
        batch = pack([read(int(i)) for i in data.samples(step)], model.config)
        loss = model(batch).loss_sum / batch.num_label_tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clipping)
        found_norms.append(norm.item())
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * lr_factor(step, 5, config.optimizer)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert losses(config) == pytest.approx(found, abs=1e-5)
    assert norms(config) == pytest.approx(found_norms, rel=1e-4)
    assert_same_weights(weights(config), model.state_dict())


def test_stage_1_changes_projector_and_row_end_only(runs):
    fresh, _ = build_model(runs.stage1, None)
    before, after = fresh.state_dict(), weights(runs.stage1)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("projector.")}


def test_stage_2_goes_on_with_the_projector_and_leaves_the_tower(runs):
    start, _ = build_model(runs.zero2, None)
    stage_1, before = weights(runs.stage1), start.state_dict()
    for name in before:
        if name.startswith("projector."):
            assert torch.equal(before[name], stage_1[name])
    after = weights(runs.zero3)
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if name.startswith("vision.")}


def test_a_resumed_run_ends_with_the_same_bits(runs):
    for whole, resumed in (
        (runs.zero3, runs.resumed),
        (runs.zero2_saved, runs.zero2_resumed),
        (runs.lora, runs.lora_resumed),
    ):
        first = 5 - len(losses(resumed))
        assert first > 0 and losses(whole)[first:] == losses(resumed)
        assert_same_weights(weights(whole), weights(resumed), tolerance=0.0)


def test_packs_train_as_passes_of_so_many_samples_do(runs):
    assert_same_run(runs.packs, runs.zero2)
    metrics = read_metrics(Path(runs.packs.output_dir))
    assert all(0.3 < entry.pack_fill <= 1 for entry in metrics)
    assert [entry.samples for entry in metrics] == [4] * 5
    assert all(entry.pack_fill is None for entry in read_metrics(Path(runs.zero2.output_dir)))


def test_loader_processes_do_not_change_the_run(runs):
    assert losses(runs.workers) == losses(runs.zero2)
    assert_same_weights(weights(runs.workers), weights(runs.zero2), tolerance=0.0)


def test_gradient_checkpointing_does_not_change_the_run(runs):
    assert_same_run(runs.checkpointing, runs.zero3)


def test_two_passes_on_two_processes_train_as_four_on_one_do(runs, tmp_path):
    alone = in_one_process(runs.passes2, tmp_path)
    assert_same_run(runs.passes2, alone)
    assert_same_run(runs.passes3, alone)


def test_bf16_trains_as_fp32_does_and_saves_in_bf16(runs):
    for bf16 in (runs.bf16_2, runs.bf16_3):
        assert losses(bf16) == pytest.approx(losses(runs.passes2), rel=0.01)
        assert norms(bf16) == pytest.approx(norms(runs.passes2), rel=0.02)
        assert losses(bf16)[-1] < losses(bf16)[0]
        assert saved_dtypes(Path(bf16.output_dir)) == {"BF16"}
    assert saved_dtypes(Path(runs.passes2.output_dir)) == {"F32"}


def saved_dtypes(folder: Path) -> set[str]:
    """The dtypes in the headers of a model folder's safetensors files."""
    dtypes = set()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        dtypes |= {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    return dtypes


def test_every_checkpoint_is_a_model_folder(runs):
    folder = Path(runs.zero3.output_dir)
    for name in ("checkpoint-2", "checkpoint-4"):
        assert LlavaHD.from_pretrained(folder / name).config.hd == runs.zero3.model.hd
    assert not list(folder.glob(".unfinished*"))


def test_a_lora_run_holds_adapter_projector_and_tower_and_is_a_model(runs):
    folder = Path(runs.lora.output_dir)
    for place in (folder, folder / "checkpoint-4"):
        found = {path.name for path in place.glob("*.safetensors")}
        assert found == {"adapter_model.safetensors", "projector.safetensors", "vision.safetensors"}
    start, _ = build_model(runs.zero2, None)
    before, after = start.state_dict(), weights(runs.lora)
    moved = {
        name for name in before if name in after and not torch.equal(before[name], after[name])
    }
    assert moved and all(name.startswith(("projector.", "vision.")) for name in moved)
    assert any("lora_B" in name and tensor.any() for name, tensor in after.items())


def test_a_finished_run_holds_metrics_tensorboard_curve_and_configuration(runs):
    folder = Path(runs.zero3.output_dir)
    metrics = read_metrics(folder)
    assert [entry.step for entry in metrics] == [1, 2, 3, 4, 5]
    assert metrics[0].lr == 0.0 and metrics[1].lr == 1e-2
    assert all(entry.samples == 4 and entry.tokens > entry.label_tokens > 0 for entry in metrics)
    assert (folder / "loss_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert list((folder / "runs").glob("events.*"))
    assert (folder / "train_config.yaml").read_text(encoding="utf-8") == config_yaml(runs.zero3)
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    assert (state["step"], state["num_steps"], state["world_size"]) == (5, 5, 2)


def test_resume_auto_takes_the_newest_whole_checkpoint(runs, tmp_path):
    cut_off = in_one_process(runs.zero2, tmp_path, save_steps=1, save_total_limit=3)
    folder = Path(cut_off.output_dir)
    whole = weights(cut_off)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-4",
    ]
    (folder / "trainer_state.json").unlink()  # as if killed before the end
    (folder / "checkpoint-4").rename(folder / ".unfinished-checkpoint-4")
    shutil.rmtree(folder / "checkpoint-2")
    result = train(replace(cut_off, resume="auto"))
    assert result.num_steps == 5
    assert [metrics.step for metrics in read_metrics(folder)] == [1, 2, 3, 4, 5]
    assert_same_weights(whole, weights(cut_off), tolerance=0.0)
    assert train(replace(cut_off, resume="auto")).seconds < 5  # finished: nothing is done again


def test_a_checkpoint_of_other_settings_is_refused(runs, tmp_path):
    other = replace(runs.zero3, optimizer=replace(runs.zero3.optimizer, lr=1.0))
    resumed = replace(other, output_dir=str(tmp_path / "r"), resume=runs.resumed.resume)
    with pytest.raises(UsageError, match=r"optimizer\.lr"):
        train(resumed)
    assert not (tmp_path / "r").exists()


def test_a_bad_image_stops_all_ranks_with_one_line(parts, tmp_path):
    data, out = write_data(tmp_path / "data"), tmp_path / "out"
    config = tiny_config(data, parts, out, stage="pretrain", save_steps=1)
    records, order_of_data = order(config)
    # One of the second step, so that the first is done and saved.
    bad = next(int(i) for i in order_of_data.samples(1) if records[int(i)].images)
    name = records[bad].images[0]
    path = data / "images" / name
    path.write_bytes(path.read_bytes()[:-40])  # its header can be read, and its size counted
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config_yaml(config), encoding="utf-8")
    command = [sys.executable, "-m", "llava_hd.cli.main", "pretrain", "--config", str(recipe)]
    done = subprocess.run(
        [*command, "--num-processes", "2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith(f"llava-hd: error: {data}/data.json: record {bad} (id 'r{bad}'): ")
    assert name in line and "Traceback" not in done.stderr
    assert [metrics.step for metrics in read_metrics(out)] == [1]
    assert (out / "checkpoint-1/trainer_state.json").is_file()
    assert not (out / "trainer_state.json").exists() and not list(out.glob("*.safetensors"))


def test_an_interrupted_first_stretch_starts_again_from_the_beginning(runs, tmp_path):
    config = replace(runs.stage1, output_dir=str(tmp_path / "o"), resume="auto", max_steps=2)
    train(config)
    folder = Path(config.output_dir)
    (folder / "trainer_state.json").unlink()
    train(config)
    assert [metrics.step for metrics in read_metrics(folder)] == [1, 2]
