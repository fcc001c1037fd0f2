"""What answering needs in memory, from a configuration alone: weights, and keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig

from .config import LlavaHDConfig
from .outline import outline


@dataclass(frozen=True)
class Needs:
    """Bytes of the weights (without an adapter's own), and of one token's keys and values in all
    layers."""

    weight_bytes: int
    kv_bytes_per_token: int


def needs_of(config: LlavaHDConfig, dtype: torch.dtype) -> Needs:
    """weights: every parameter in `dtype`; keys and values: 2 x layers x key heads x head width x
    bytes of a number. No weight is read."""
    model = outline(config, dtype)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    text = dict(config.text)
    language = AutoConfig.for_model(text.pop("model_type"), **text)
    heads = language.to_dict().get("num_key_value_heads") or language.num_attention_heads
    numbers = 2 * language.num_hidden_layers * heads * head_width(language)
    return Needs(weights, numbers * dtype.itemsize)


def head_width(language: Any) -> int:
    """Numbers in a key of one head, of a language model's configuration."""
    values = language.to_dict()
    return values.get("head_dim") or language.hidden_size // language.num_attention_heads
