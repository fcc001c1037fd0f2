"""A small LLaVA data set on disk and configurations to train on it, for the training tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import random_image, tiny_hd

from llava_hd.train.config import TrainConfig
from llava_hd.train.recipe import config_from, config_values, with_values

COLOURS = ("red", "green")


def write_data(folder: Path, num_records: int = 12, text_every: int = 3) -> Path:
    """`folder/data.json` and `folder/images`: every `text_every`-th record has no image, every
    fifth two; sizes differ, so tile counts do."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(num_records):
        record: dict[str, Any] = {"id": f"r{i}"}
        tags = ""
        if i % text_every:
            count = 2 if i % 5 == 0 else 1
            names = [f"{i}-{k}.png" for k in range(count)]
            for k, name in enumerate(names):
                size = (40 + 13 * i, 60 + 29 * k + 7 * i)
                random_image(size, seed=10 * i + k).save(folder / "images" / name)
            record["image"] = names if count > 1 else names[0]
            tags = "<image>\n" * count
        record["conversations"] = [
            {"from": "human", "value": f"{tags}what colour is the mat in there?"},
            {"from": "gpt", "value": f"the mat is {COLOURS[i % 2]}"},
            {"from": "human", "value": "is the cat on the mat?"},
            {"from": "gpt", "value": "Yes" if i % 2 else "No"},
        ]
        records.append(record)
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    return folder


def tiny_config(data: Path, parts: Path, output_dir: Path, **settings: Any) -> TrainConfig:
    """Stage 2 of a tiny HD model in fp32, four samples a step; dotted settings replace values."""
    values = {
        "stage": "finetune",
        "output_dir": str(output_dir),
        "model": {
            "vision": str(parts / "vision"),
            "language": str(parts / "language"),
            "hd": tiny_hd("hdflex").to_dict(),
        },
        "data": {
            "path": str(data / "data.json"),
            "images": str(data / "images"),
            "num_workers": 0,
            "batching": "plain",
        },
        "optimizer": {"lr": 1e-2, "warmup_ratio": 0.2, "weight_decay": 0.1},
        "zero": {
            "stage": 2,
            "overlap_comm": False,
            "reduce_bucket_size": 10_000,
            "allgather_bucket_size": 10_000,
            "stage3_prefetch_bucket_size": 10_000,
            "stage3_param_persistence_threshold": 0,
        },
        "per_device_batch_size": 2,
        "global_batch_size": 4,
        "max_steps": 5,
        "precision": "fp32",
        "gradient_clipping": 1.0,
        "timeout_minutes": 2.0,
    }
    return config_from(with_values(values, {k.replace("__", "."): v for k, v in settings.items()}))


def changed(config: TrainConfig, **settings: Any) -> TrainConfig:
    """The configuration with dotted settings (`__` for the dot) replaced."""
    flags = {k.replace("__", "."): v for k, v in settings.items()}
    return config_from(with_values(config_values(config), flags))
