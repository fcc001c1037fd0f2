"""A model without numbers: its modules and shapes on the meta device, built from configurations
alone. It can be counted, and run on shapes: a forward and backward that allocate nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from ..hd.errors import UsageError
from ..hd.grid import HDConfig
from .assemble import VOCABULARY_MULTIPLE, as_saved
from .config import LlavaHDConfig
from .foreign import config_dict
from .llava_hd import LlavaHD
from .processor import Processor, read_tokenizer
from .prompt import IMAGE_TAG

ATTENTION = "llava_hd_outline"  # transformers' name of the attention below


def outline(config: LlavaHDConfig, dtype: torch.dtype) -> LlavaHD:
    """The model of a configuration on the meta device, every floating tensor of `dtype`.

    Its attention keeps for backward what a fused one keeps (torch's path over packs). UsageError
    for a language model that cannot be used.
    """
    text = dict(config.text)
    vision = CLIPVisionConfig.from_dict(dict(config.vision))
    with torch.device("meta"):
        clip = CLIPVisionModel(vision)
        causal_lm = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(text.pop("model_type"), **text)
        )
        model = LlavaHD(config, clip, causal_lm)
    for part in (clip, causal_lm):
        part.set_attn_implementation(ATTENTION)
    return model.to(dtype)


def outline_config(
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    *,
    hd: HDConfig,
    projector: str = "mlp2x_gelu",
    vision_layer: int = -2,
    template: str = "vicuna_v1",
    image_token_id: int | None = None,
    vocabulary: int | None = None,
) -> LlavaHDConfig:
    """The configuration of two parts put together, from what their config.json hold.

    image_token_id and vocabulary (its size with `<image>`): as the tokenizer has them. By default
    the vocabulary is taken to lack `<image>`, so that its table is enlarged as assemble.py does.
    """
    vision_values = config_dict(
        CLIPVisionConfig.from_dict(dict(vision.get("vision_config", vision)))
    )
    values = dict(text)
    try:
        text_values = config_dict(AutoConfig.for_model(values.pop("model_type"), **values))
    except ValueError as error:
        line = str(error).strip().splitlines()[0]
        raise UsageError(f"the language model's config.json cannot be used: {line}") from error
    rows = text_values["vocab_size"]
    due = rows + 1 if vocabulary is None else vocabulary
    if due > rows:
        rows = -(-due // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return LlavaHDConfig(
        hd=hd,
        vision=vision_values,
        text=text_values | {"vocab_size": rows},
        image_token_id=rows - 1 if image_token_id is None else image_token_id,
        projector=projector,
        vision_layer=vision_layer,
        template=template,
    )


def image_tokenizer(language: str | Path) -> Any:
    """The tokenizer of a language model's folder with `<image>` in it, as training will have it."""
    tokenizer = read_tokenizer(language)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [IMAGE_TAG]}, replace_extra_special_tokens=False
    )
    return as_saved(tokenizer)


def processor_of(tokenizer: Any, config: LlavaHDConfig) -> Processor:
    """The processor of a configuration whose image token is the tokenizer's."""
    return Processor(tokenizer, config)


class _KeepsLikeFused(torch.autograd.Function):
    """`[B H S d]` queries, keys and values -> `[B S H d]`; keeps q, k, v, the output and the
    softmax's normaliser for backward, as fused attention does, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        normaliser = q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, normaliser)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _outline_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' signature. Of a pack, torch's path keeps the sequences' outputs and their
    concatenation; the tower's batch has one output."""
    out = _KeepsLikeFused.apply(query, key, value)
    return (torch.cat([out]) if module.is_causal else out), None


# Without a mask function of the same name, transformers builds no mask and reads no positions,
# which the meta device does not have.
AttentionInterface.register(ATTENTION, _outline_attention)
