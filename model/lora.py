"""The one door to peft and bitsandbytes: low-rank adapters in a language model's linears.

An adapted linear computes `W x + (alpha / r) B A x` with W frozen; A `[r in]` starts at random,
B `[out r]` at zero, so an adapter begins as nothing (Hu et al., arXiv 2106.09685). W may be held
in 4 or 8 bits (QLoRA, arXiv 2305.14314). peft puts its modules into the causal LM in place, so
every other part of the model goes on as before; the head and the embeddings are never adapted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..hd.errors import DataError, UsageError
from .adapter_config import require_bitsandbytes

# bitsandbytes asks for a package "kernels" of kernels for CPUs, and logs a warning without it.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.getMessage()
)

import peft  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402

NAME = "default"  # peft's name of the one adapter in a model
MARK = ".lora_"  # in the names of an adapter's parameters
PEFT_PREFIX = "base_model.model."  # what peft's files put before the causal LM's own names
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def linears(causal_lm: Any) -> dict[str, nn.Linear]:
    """The linears of the decoder by their names in the causal LM; the head is not among them."""
    decoder = causal_lm.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    return {
        name: module
        for name, module in causal_lm.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside
    }


def add_lora(
    causal_lm: Any,
    *,
    r: int,
    alpha: int,
    dropout: float,
    target_modules: Sequence[str] | None,
    seed: int,
    dtype: torch.dtype,
) -> None:
    """Put a new adapter into a causal LM.

    target_modules: last parts of the names of linears; None is every linear of the decoder
    layers, as in LLaVA's script. dtype: of the adapter. UsageError for a name that none has.
    """
    known = sorted({name.rpartition(".")[2] for name in linears(causal_lm)})
    chosen = known if target_modules is None else sorted(set(target_modules))
    for name in chosen:
        if name not in known:
            raise UsageError(
                f"lora.target_modules: {name!r} is no linear of the decoder layers; "
                f"there is {', '.join(known)}"
            )
    config = peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=chosen,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(causal_lm, config, dtype)


def _inject(causal_lm: Any, config: peft.LoraConfig, dtype: torch.dtype) -> None:
    peft.inject_adapter_in_model(config, causal_lm, adapter_name=NAME)
    for parameter in adapter_parameters(causal_lm).values():
        parameter.data = parameter.data.to(dtype)


def adapter_parameters(causal_lm: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their names in the causal LM."""
    return {name: p for name, p in causal_lm.named_parameters() if MARK in name}


def to_peft_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an adapter under the names that peft's files have."""
    return {PEFT_PREFIX + name.replace(f".{NAME}.", "."): t for name, t in state.items()}


def save_config(causal_lm: Any, folder: Path, language: str) -> None:
    """Write peft's adapter_config.json; `language` is where it says that the base is."""
    config = causal_lm.peft_config[NAME]
    config.base_model_name_or_path = language
    config.inference_mode = True  # as peft writes it: who loads it does not train it
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = False


def read_adapter(causal_lm: Any, folder: Path, state: Mapping[str, Tensor], dtype: Any) -> None:
    """Put the adapter of a folder into a causal LM; `state` has the tensors of its file.

    Raises UsageError for a configuration that cannot be read, DataError for tensors that do not
    fit it.
    """
    config = _read_config(folder)
    try:
        _inject(causal_lm, config, dtype)
    except ValueError as error:
        text = " ".join(str(error).split())
        raise DataError(f"{folder / CONFIG_FILE} does not fit the base model: {text}") from error
    ours = adapter_parameters(causal_lm)
    due = to_peft_names(ours)
    for what, names in (
        ("lacks", due.keys() - state.keys()),
        ("has an unknown tensor", state.keys() - due.keys()),
        (
            "has a tensor of another shape:",
            {k for k in due.keys() & state.keys() if due[k].shape != state[k].shape},
        ),
    ):
        if names:
            raise DataError(
                f"{folder / WEIGHTS_FILE} {what} {min(names)} ({len(names)} such); it does not "
                f"belong to the {CONFIG_FILE} beside it or to this base model"
            )
    for name, parameter in zip(due, ours.values(), strict=True):
        parameter.data.copy_(state[name])


def _read_config(folder: Path) -> peft.LoraConfig:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UsageError(f"{path} is missing; copy or save the adapter again")
    try:
        config = peft.LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        text = " ".join(str(error).split())
        raise UsageError(f"{path} cannot be read ({text}); copy or save it again") from error
    if not isinstance(config, peft.LoraConfig):
        raise UsageError(f"{path} is not that of a LoRA adapter; give the output of a LoRA run")
    config.init_lora_weights = True  # other ways to begin would change the frozen weights
    config.inference_mode = False
    return config


def merge_lora(causal_lm: Any) -> int:
    """Add the adapter to the frozen linears, `W + (alpha / r) B A`, and take it out again.

    Returns the number of linears. The model computes the same as before, up to rounding. Raises
    UsageError for linears in 4 or 8 bits, DataError for an adapter that is not finite.
    """
    found = dict(_adapted(causal_lm))
    for name, layer in found.items():
        linear = layer.get_base_layer()
        if not linear.weight.is_floating_point():
            raise UsageError(
                f"{name} is held in few bits, so an adapter cannot be merged into it; load the "
                "adapter folder, which takes the base model as it is"
            )
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise DataError(f"the adapter of {name} is not finite; train again") from error
        parent, _, last = name.rpartition(".")
        setattr(causal_lm.get_submodule(parent), last, linear)
    del causal_lm.peft_config
    return len(found)


def _adapted(causal_lm: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((n, m) for n, m in causal_lm.named_modules() if isinstance(m, LoraLayer))


def quantise(
    causal_lm: Any,
    bits: int,
    *,
    quant_type: str,
    double_quant: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Hold the decoder's linears in 4 or 8 bits from now on, frozen; before `add_lora`.

    quant_type: "nf4" or "fp4", double_quant: the scales in 8 bits too (4 bits only). dtype: what
    they compute in. Embeddings, norms and head stay as they are. The linears move to `device`.
    """
    require_bitsandbytes(bits)
    import bitsandbytes

    for name, old in linears(causal_lm).items():
        weight, has_bias = old.weight.data.to(device), old.bias is not None
        new: Any
        with torch.device("meta"):
            if bits == 4:
                new = bitsandbytes.nn.Linear4bit(
                    old.in_features, old.out_features, has_bias, compute_dtype=dtype
                )
            else:
                new = bitsandbytes.nn.Linear8bitLt(
                    old.in_features, old.out_features, has_bias, has_fp16_weights=False
                )
        if bits == 4:
            new.weight = bitsandbytes.nn.Params4bit(
                weight,
                requires_grad=False,
                quant_type=quant_type,
                compress_statistics=double_quant,
                module=new,
            )
        else:
            new.weight = bitsandbytes.nn.Int8Params(
                weight, requires_grad=False, has_fp16_weights=False
            )
        if has_bias:
            new.bias = nn.Parameter(old.bias.data, requires_grad=False)
        parent, _, last = name.rpartition(".")
        setattr(causal_lm.get_submodule(parent), last, new.to(device))
    setattr(causal_lm, f"is_loaded_in_{bits}bit", True)  # how peft knows
