"""Tiny models with an adapter, for the LoRA tests."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import tiny_hd

from llava_hd.model.adapter import base_digest
from llava_hd.model.adapter_config import AdapterConfig, BaseFolders
from llava_hd.model.assemble import assemble
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.lora import adapter_parameters, add_lora
from llava_hd.model.processor import Processor


def built(parts: Path, **options: object) -> tuple[LlavaHD, Processor]:
    return assemble(
        vision=parts / "vision", language=parts / "language", hd=tiny_hd("hd448"), **options
    )


def give_adapter(model: LlavaHD, base: BaseFolders, seed: int = 0, dropout: float = 0.0) -> None:
    """A random adapter that changes the model (a new one is nothing), projector and row-end too."""
    adapter = AdapterConfig(model.config, base, base_digest(model))
    add_lora(
        model.language.causal_lm,
        r=4,
        alpha=8,
        dropout=dropout,
        target_modules=None,
        seed=seed,
        dtype=torch.float32,
    )
    model.adapter = adapter
    torch.manual_seed(seed)
    for parameter in adapter_parameters(model.language.causal_lm).values():
        parameter.data = torch.randn_like(parameter) * 0.2
    for parameter in model.projector.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
