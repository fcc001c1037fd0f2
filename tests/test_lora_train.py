"""Training with adapters under real DeepSpeed: two processes, ZeRO-2 and ZeRO-3, few bits, tower.

One launch of two processes runs all runs, since starting them is what costs time.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lora_worker import STEPS, packs_of, seed_of, start
from safetensors.torch import load_file
from tiny import save_parts
from train_data import tiny_config, write_data

from llava_hd.hd.errors import DataError, UsageError
from llava_hd.model.adapter_config import read_adapter_config
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.lora import merge_lora
from llava_hd.model.merge import merge_folder
from llava_hd.model.processor import read_tokenizer
from llava_hd.train.config import TrainConfig
from llava_hd.train.launch import run_workers
from llava_hd.train.lora import check_lora
from llava_hd.train.optimizer import build_optimizer
from llava_hd.train.recipe import config_yaml

WORKER = Path(__file__).with_name("lora_worker.py")
LORA = {"lora": {"r": 4, "alpha": 8, "dropout": 0.1}}


@pytest.fixture(scope="module")
def config(tmp_path_factory, parts):
    folder = tmp_path_factory.mktemp("runs")
    data = write_data(folder / "data", num_records=1)

    def make(name: str, **settings: object) -> TrainConfig:
        chosen = {"model__projector_from": "unused", "gradient_clipping": 0.0, **LORA, **settings}
        return tiny_config(data, parts, folder / name, **chosen)

    return make


@pytest.fixture(scope="module")
def runs(config) -> dict[str, TrainConfig]:
    tower = {"train_vision": True, "optimizer__vision_lr": 1e-3}
    runs = {
        "zero2": config("zero2"),
        "zero3": config("zero3", zero__stage=3),
        "checkpointed": config("checkpointed", zero__stage=3, gradient_checkpointing=True),
        "bf16": config("bf16", zero__stage=3, precision="bf16"),
        "tower2": config("tower2", **tower),
        "tower3": config("tower3", **tower, zero__stage=3, gradient_checkpointing=True),
        "last3": config("last3", **tower, zero__stage=3, vision_layers=1, lora=None),
        "bits4": config("bits4", lora__bits=4),
        "bits8": config("bits8", lora__bits=8, precision="bf16"),
    }
    files = []
    for name, run in runs.items():
        file = Path(run.output_dir).with_name(f"{name}.yaml")
        file.write_text(config_yaml(run), encoding="utf-8")
        files.append(str(file))
    assert run_workers([sys.executable, str(WORKER), *files], 2) == 0
    return runs


def tensors(run: TrainConfig) -> dict[str, torch.Tensor]:
    files = sorted(Path(run.output_dir).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def result(run: TrainConfig) -> dict:
    return json.loads((Path(run.output_dir) / "result.json").read_text())


def assert_same(ours: TrainConfig, theirs: TrainConfig) -> None:
    assert result(ours)["losses"] == pytest.approx(result(theirs)["losses"], abs=1e-5)
    assert result(ours)["norms"] == pytest.approx(result(theirs)["norms"], rel=1e-4)
    one, other = tensors(ours), tensors(theirs)
    assert one.keys() == other.keys()
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-5


def test_zero_3_and_gradient_checkpointing_train_as_zero_2_does(runs):
    assert_same(runs["zero3"], runs["zero2"])
    assert_same(runs["checkpointed"], runs["zero2"])
    assert_same(runs["tower3"], runs["tower2"])


@pytest.mark.parametrize("name", ["zero2", "tower2"])
def test_two_processes_train_as_a_plain_torch_loop_does(runs, name):
    run = runs[name]
    model = start(run)
    optimizer = build_optimizer(model, run.optimizer)
    for step in range(STEPS):
        for rank in range(2):
            torch.manual_seed(seed_of(step, rank))
            output = model(packs_of(model.config, step, rank))
            (output.loss_sum / output.num_label_tokens / 2).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    found = LlavaHD.from_pretrained(run.output_dir).state_dict()
    due = model.state_dict()
    assert found.keys() == due.keys()
    assert max(float((found[name] - due[name]).abs().max()) for name in due) < 1e-5


def test_base_weights_stay_as_they_were_to_the_last_bit(runs):
    for name, run in runs.items():
        frozen = result(run)["frozen"]
        assert frozen and all(frozen.values()), name
    assert any("lm_head" in name for name in result(runs["zero3"])["frozen"])


def test_adapter_projector_and_row_end_all_move(runs):
    fresh = start(runs["zero3"])
    before, after = fresh.state_dict(), LlavaHD.from_pretrained(runs["zero3"].output_dir)
    moved = {n for n, t in after.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {n for n, p in fresh.named_parameters() if p.requires_grad}
    assert "projector.row_end" in moved


def test_the_folder_holds_what_was_trained_and_nothing_frozen(runs):
    for name in ("zero2", "zero3", "bits4"):
        folder = Path(runs[name].output_dir)
        assert {path.name for path in folder.glob("*.safetensors")} == {
            "adapter_model.safetensors",
            "projector.safetensors",
        }
        assert all(".lora_" in n or n.startswith("projector.") for n in tensors(runs[name]))
    for name in ("tower2", "tower3"):
        assert (Path(runs[name].output_dir) / "vision.safetensors").is_file()
    assert {tensor.dtype for tensor in tensors(runs["bf16"]).values()} == {torch.bfloat16}
    assert not (Path(runs["last3"].output_dir) / "adapter_config.json").exists()


def test_a_trained_tower_moves_as_far_as_it_is_read_and_asked_for(runs):
    depth = 2  # of three layers, the last but one is read
    for name, layers in (("tower2", {0, 1}), ("tower3", {0, 1}), ("last3", {1})):
        before = start(runs[name]).vision.state_dict()
        after = LlavaHD.from_pretrained(runs[name].output_dir).vision.state_dict()
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        numbers = {int(key.split("layers.")[1].split(".")[0]) for key in moved if "layers" in key}
        assert numbers == layers and max(numbers) < depth
        assert any("embeddings" in key for key in moved) == (name != "last3")
        assert not any("post_layernorm" in key for key in moved)


def test_an_adapter_trained_on_few_bits_loads_on_the_whole_base_and_merges(runs, tmp_path):
    for name, bits, dtype in (("bits4", 4, "float32"), ("bits8", 8, "bfloat16")):
        folder = Path(runs[name].output_dir)
        assert read_adapter_config(folder).bits == bits
        losses = result(runs[name])["losses"]
        assert losses == pytest.approx(result(runs["zero2"])["losses"], rel=0.05)
        report = merge_folder(with_tokenizer(runs[name]), tmp_path / name)
        assert report.max_relative < 1e-5 and report.dtype == dtype


def with_tokenizer(run: TrainConfig) -> Path:
    read_tokenizer(run.model.language).save_pretrained(run.output_dir)
    return Path(run.output_dir)


def test_linears_in_few_bits_are_frozen_small_and_close(config):
    # In training mode: on a CPU bitsandbytes repacks 4 bits for inference, for even shapes only.
    whole = start(config("w", lora__dropout=0.0))
    for bits, number in ((4, torch.uint8), (8, torch.int8)):
        model = start(config("q", lora__bits=bits, lora__dropout=0.0))
        bases = [m for n, m in model.named_modules() if n.endswith("base_layer")]
        assert len(bases) == 2 * 7 and all(m.weight.dtype == number for m in bases)
        assert not any(m.weight.requires_grad for m in bases)
        assert model.language.head.weight.dtype == torch.float32
        batch = packs_of(model.config, 0, 0)
        ours, due = model.logits(batch).detach(), whole.logits(batch).detach()
        assert 0 < (ours - due).norm() / due.norm() < (0.2 if bits == 4 else 0.05)
        model(batch).loss_sum.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        with pytest.raises(UsageError, match="held in few bits"):
            merge_lora(model.language.causal_lm)


def test_a_run_goes_on_from_the_adapter_of_its_checkpoint(runs):
    for name in ("zero3", "bits4", "tower2"):
        run, due = runs[name], tensors(runs[name])
        model = start(run, Path(run.output_dir))
        adapted = {n for n, p in model.named_parameters() if ".lora_" in n and p.requires_grad}
        assert len(adapted) == 2 * 2 * 7
        found = model.state_dict()
        for key, tensor in due.items():
            inner = key.replace("base_model.model.", "language.causal_lm.")
            inner = inner.replace(".lora_A.", ".lora_A.default.")
            inner = inner.replace(".lora_B.", ".lora_B.default.")
            assert torch.equal(found[inner], tensor), key


def test_a_checkpoint_of_another_base_is_refused(runs, tmp_path):
    other = save_parts(tmp_path / "other", seed=9)
    run = runs["zero2"]
    source = replace(run.model, vision=f"{other}/vision", language=f"{other}/language")
    with pytest.raises(DataError, match="trained on another base model"):
        start(replace(run, model=source), Path(run.output_dir))


def test_an_adapter_is_no_start_of_another_run(config, runs):
    folder = runs["zero2"].output_dir
    whole = config("x", model__path=folder, model__projector_from=None)
    with pytest.raises(UsageError, match=rf"model.path {folder} is an adapter; .* merge-lora"):
        check_lora(whole)
    check_lora(config("x"))


def test_few_bits_without_bitsandbytes_are_refused_before_a_model_is_read(config, monkeypatch):
    monkeypatch.setattr("llava_hd.model.adapter_config.find_spec", lambda name: None)
    check_lora(config("x"))
    with pytest.raises(UsageError, match=r"lora.bits 4 needs bitsandbytes; install llava-hd\[ql"):
        check_lora(config("x", lora__bits=4))


def test_an_adapter_is_put_on_a_model_in_its_own_type(config):
    model = start(config("x", precision="bf16", lora__bits=4))
    lora = [p for n, p in model.named_parameters() if ".lora_" in n]
    assert {p.dtype for p in lora} == {torch.bfloat16}
