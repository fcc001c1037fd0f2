"""LoRA folders of the original LLaVA: `adapter_model` and `non_lora_trainables.bin`, added to the
base's tensors under our names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..hd.errors import DataError, UsageError
from .key_names import LANGUAGE
from .tensor_files import file_tensors

ADAPTER_CONFIG, TRAINABLES = "adapter_config.json", "non_lora_trainables.bin"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# What peft can do beyond W + scale B A; a folder that asks for it is refused.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
}


def is_lora(folder: Path) -> bool:
    """Whether a folder holds an adapter of peft's."""
    return (folder / ADAPTER_CONFIG).is_file()


def plain_name(name: str) -> str:
    """A tensor's name as the original model has it, without the wrappers that it was saved in."""
    name = name.removeprefix("base_model.")
    while name.startswith("model.model."):
        name = name.removeprefix("model.")
    return f"model.{name}" if name.startswith("mm_projector.") else name


def add_adapter(folder: Path, state: dict[str, Tensor]) -> int:
    """W + scale B A for every adapted linear of `state`, in fp32, rounded to its type; the number
    of linears. Raises UsageError and DataError."""
    scale = _scale(folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    file = next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    if file is None:
        raise DataError(f"{folder} lacks {' or '.join(ADAPTER_FILES)}; copy the adapter again")
    for name, tensor in file_tensors(file):
        module, mark, end = name.partition(".lora_")
        if not mark or end.split(".")[0] not in ("A", "B") or end.split(".")[-1] != "weight":
            raise DataError(f"{file} has an unknown tensor {name}; only plain LoRA is read")
        inner = module.removeprefix("base_model.model.")
        pairs.setdefault(LANGUAGE + inner + ".weight", {})[end[0]] = tensor
    for name, pair in pairs.items():
        if name not in state or set(pair) != {"A", "B"}:
            raise DataError(f"{file}: {name} is not in the base, or has only one of lora_A, lora_B")
        a, b, weight = pair["A"].float(), pair["B"].float(), state[name]
        if (b.shape[0], a.shape[1]) != tuple(weight.shape) or a.shape[0] != b.shape[1]:
            raise DataError(
                f"{file}: the adapter of {name} is for {b.shape[0]}x{a.shape[1]}, the base has "
                f"{'x'.join(map(str, weight.shape))}; give the base that it was trained on"
            )
        state[name] = (weight.float() + scale * (b @ a)).to(weight.dtype)
    return len(pairs)


def _scale(folder: Path) -> float:
    path = folder / ADAPTER_CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = int(values["r"]), float(values["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); copy the adapter again") from error
    for key, allowed in PLAIN.items():
        if values.get(key, allowed[0]) not in allowed:
            raise UsageError(f"{path}: {key} is {values[key]!r}, only {allowed[0]!r} is read")
    return float(alpha / (rank**0.5 if values.get("use_rslora") else rank))
