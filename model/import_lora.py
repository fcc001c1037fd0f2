"""LoRA folders of the original LLaVA: `adapter_model` and `non_lora_trainables.bin`, added to the
base's tensors under our names."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
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
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
}


def is_lora(folder: Path) -> bool:
    """Whether a folder holds an adapter of peft's."""
    return (folder / ADAPTER_CONFIG).is_file()


def plain_name(name: str) -> str:
    """A tensor's name as the original model has it, without the wrappers that it was saved in."""
    name = name.removeprefix("base_model.")
    if name.startswith("model.lm_head."):
        return name.removeprefix("model.")
    while name.startswith("model.model."):
        name = name.removeprefix("model.")
    return f"model.{name}" if name.startswith("mm_projector.") else name


def add_adapter(folder: Path, state: dict[str, Tensor]) -> int:
    """W + scale B A for every adapted linear of `state`, in fp32, rounded to its type; the number
    of linears. Raises UsageError and DataError."""
    config = _read(folder)
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
    _check_whole(file, config.get("target_modules"), config, pairs, state)
    for name, pair in pairs.items():
        if name not in state or set(pair) != {"A", "B"}:
            raise DataError(f"{file}: {name} is not in the base, or has only one of lora_A, lora_B")
        a, b, weight = pair["A"].float(), pair["B"].float(), state[name]
        if a.shape[0] != config["r"] or b.shape[1] != config["r"]:
            raise DataError(
                f"{file}: the adapter of {name} is of rank {a.shape[0]} and {b.shape[1]}, "
                f"{ADAPTER_CONFIG} says r {config['r']}; copy both from one folder"
            )
        if (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise DataError(
                f"{file}: the adapter of {name} is for {b.shape[0]}x{a.shape[1]}, the base has "
                f"{'x'.join(map(str, weight.shape))}; give the base that it was trained on"
            )
        state[name] = (weight.float() + _scale(config) * (b @ a)).to(weight.dtype)
    return len(pairs)


def _check_whole(
    file: Path,
    targets: Any,
    config: Mapping[str, Any],
    pairs: Mapping[str, Any],
    state: Mapping[str, Tensor],
) -> None:
    """DataError for an adapter without tensors, or without those of a linear that it targets."""
    if not pairs:
        raise DataError(f"{file} holds no tensors of an adapter; copy the adapter again")
    if not isinstance(targets, list) or config.get("layers_to_transform") is not None:
        return  # a pattern, or some of the layers: which linears it meant is not ours to guess
    left_out = config.get("exclude_modules") or ()
    for target in targets:
        due = [name for name in state if name.endswith(f".{target}.weight")]
        missing = [name for name in due if name not in pairs]
        if (missing or not due) and target not in left_out:
            first = missing[0] if missing else target
            raise DataError(
                f"{file} has no adapter of {first}, which {ADAPTER_CONFIG} names in "
                "target_modules; copy the adapter again, or give the base that it was trained on"
            )


def _read(folder: Path) -> dict[str, Any]:
    """adapter_config.json, refused where it asks for more than W + scale B A."""
    path = folder / ADAPTER_CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = values["r"], float(values["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); copy the adapter again") from error
    if not isinstance(rank, int) or rank < 1 or not (math.isfinite(alpha) and alpha > 0):
        raise DataError(
            f"{path}: r {rank!r} and lora_alpha {alpha!r} must be above 0; copy the adapter again"
        )
    for key, allowed in PLAIN.items():
        if values.get(key, allowed[0]) not in allowed:
            raise UsageError(f"{path}: {key} is {values[key]!r}, only {allowed[0]!r} is read")
    return values


def _scale(config: Mapping[str, Any]) -> float:
    root = 0.5 if config.get("use_rslora") else 1.0
    return float(config["lora_alpha"]) / config["r"] ** root
