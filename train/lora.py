"""A run with adapters: what a recipe's `lora` table does to the model that it starts from."""

from __future__ import annotations

from pathlib import Path

import torch

from ..hd.errors import DataError, UsageError
from ..model.adapter_config import (
    AdapterConfig,
    BaseFolders,
    is_adapter,
    read_adapter_config,
    require_bitsandbytes,
)
from ..model.llava_hd import LlavaHD
from .config import TrainConfig, part_folder
from .settings import ModelSource


def check_lora(config: TrainConfig) -> None:
    """What can be wrong before a model is loaded. Raises UsageError."""
    path = config.model.path
    if path is not None and is_adapter(part_folder(path)):
        raise UsageError(
            f"model.path {path} is an adapter; make it a whole model first (llava-hd merge-lora "
            f"{path} --out DIR), or go on with its own run (resume)"
        )
    if config.lora is not None:
        require_bitsandbytes(config.lora.bits)


def start_adapter(model: LlavaHD, config: TrainConfig, checkpoint: Path | None) -> None:
    """Put the adapter of a run into its base model: a new one, or that of a checkpoint.

    Call it on the whole model, in the run's precision, before `freeze` and before an engine takes
    the weights. With `lora.bits` below 16 the frozen linears go to the GPU here, if there is one.
    """
    from ..model.adapter import attach, base_digest
    from ..model.lora import add_lora, quantise

    lora = config.lora
    assert lora is not None and model.adapter is None
    adapter = AdapterConfig(
        model=model.config,
        base=base_folders(config.model),
        base_digest=base_digest(model),
        bits=lora.bits,
        vision=config.train_vision,
    )
    causal_lm, dtype = model.language.causal_lm, next(model.projector.parameters()).dtype
    if lora.bits < 16:
        on_gpu = torch.cuda.is_available()
        quantise(
            causal_lm,
            lora.bits,
            quant_type=lora.quant_type,
            double_quant=lora.double_quant,
            dtype=dtype,
            device=torch.device("cuda", torch.cuda.current_device()) if on_gpu else model.device,
        )
    if checkpoint is not None:
        found = read_adapter_config(checkpoint)
        if found.base_digest != adapter.base_digest:
            raise DataError(
                f"{checkpoint}: its adapter was trained on another base model; give the model "
                "settings the folders that its run began with"
            )
        attach(model, checkpoint, adapter, dtype)
        return
    add_lora(
        causal_lm,
        r=lora.r,
        alpha=lora.alpha,
        dropout=lora.dropout,
        target_modules=lora.target_modules,
        seed=config.seed,
        dtype=dtype,
    )
    model.adapter = adapter


def base_folders(source: ModelSource) -> BaseFolders:
    """Where the frozen weights of a run are, as absolute paths."""

    def absolute(name: str | None) -> str | None:
        return None if name is None else str(part_folder(name).resolve())

    return BaseFolders(absolute(source.path), absolute(source.vision), absolute(source.language))
