"""Runs with two processes, named, and how two of them are held against each other."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_data import tiny_config, write_data

from llava_hd.model.llava_hd import LlavaHD
from llava_hd.train.config import TrainConfig
from llava_hd.train.launch import run_workers
from llava_hd.train.metrics import read_metrics
from llava_hd.train.recipe import config_yaml

WORKER = Path(__file__).with_name("train_worker.py")


class Runs:
    """The configurations of the runs below, by name; `ready` ones have been trained."""

    def __init__(self, folder: Path, parts: Path) -> None:
        self.folder = folder
        data = write_data(folder / "data")
        stage_1 = str(folder / "stage1")

        def config(name: str, **settings: object) -> TrainConfig:
            return tiny_config(data, parts, folder / name, **settings)

        both = {"model__projector_from": stage_1}
        self.stage1 = config("stage1", stage="pretrain")
        self.zero2 = config("zero2", **both)
        self.zero3 = config("zero3", **both, zero__stage=3, save_steps=2)
        self.resumed = replace(
            self.zero3,
            output_dir=str(folder / "resumed"),
            resume=str(folder / "zero3/checkpoint-2"),
            save_steps=0,
        )
        self.zero2_saved = replace(self.zero2, output_dir=str(folder / "zero2-s"), save_steps=3)
        self.zero2_resumed = replace(
            self.zero2_saved,
            output_dir=str(folder / "zero2-r"),
            resume=str(folder / "zero2-s/checkpoint-3"),
        )
        # Two ranks of two passes each.
        passes = {**both, "global_batch_size": 8}
        self.passes2 = config("passes2", **passes)
        self.passes3 = config("passes3", **passes, zero__stage=3)
        self.bf16_2 = config("bf16-2", **passes, precision="bf16")
        self.bf16_3 = config("bf16-3", **passes, precision="bf16", zero__stage=3)
        self.checkpointing = replace(
            self.zero3, output_dir=str(folder / "gc"), gradient_checkpointing=True, save_steps=0
        )
        adapters = {"lora": {"r": 4, "alpha": 8, "dropout": 0.1}, "save_steps": 2}
        self.lora = config("lora", **both, **adapters, zero__stage=3, train_vision=True)
        self.lora_resumed = replace(
            self.lora,
            output_dir=str(folder / "lora-r"),
            resume=str(folder / "lora/checkpoint-2"),
            save_steps=0,
        )
        self.packs = config("packs", **both, data__batching="packs", data__pack_tokens=400)
        self.workers = replace(
            self.zero2,
            output_dir=str(folder / "workers"),
            data=replace(self.zero2.data, num_workers=2),
        )

    def two_processes(self, *configs: TrainConfig) -> int:
        files = []
        for config in configs:
            file = self.folder / f"{Path(config.output_dir).name}.yaml"
            file.write_text(config_yaml(config), encoding="utf-8")
            files.append(str(file))
        return run_workers([sys.executable, str(WORKER), *files], 2)


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return LlavaHD.from_pretrained(config.output_dir).state_dict()


def losses(config: TrainConfig) -> list[float]:
    return [metrics.loss for metrics in read_metrics(Path(config.output_dir))]


def norms(config: TrainConfig) -> list[float]:
    return [metrics.grad_norm for metrics in read_metrics(Path(config.output_dir))]


def assert_same_run(ours: TrainConfig, theirs: TrainConfig, tolerance: float = 1e-5) -> None:
    assert losses(ours) == pytest.approx(losses(theirs), abs=tolerance)
    # Adam hides a wrong scale of the gradients, their norm does not.
    assert norms(ours) == pytest.approx(norms(theirs), rel=1e-4)
    assert_same_weights(weights(ours), weights(theirs), tolerance)


def assert_same_weights(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    assert ours.keys() == theirs.keys()
    worst = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    assert worst <= tolerance
