"""Tiny language models of several families, and one of them in a model of ours."""

from __future__ import annotations

import torch
from tiny import IMAGE_ID, tiny_hd, vision_config
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionModel, PreTrainedModel

from llava_hd.model.attention import implementation
from llava_hd.model.config import LlavaHDConfig
from llava_hd.model.foreign import config_dict
from llava_hd.model.llava_hd import LlavaHD

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def causal_lm(kind: str, attention: str = "auto", **options) -> PreTrainedModel:
    sizes = {k: v for k, v in SIZES.items() if not (kind == "falcon" and k == "head_dim")}
    config = AutoConfig.for_model(kind, **sizes, **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation(attention))
    return model.eval()


def build(language: PreTrainedModel) -> LlavaHD:
    config = LlavaHDConfig(
        hd=tiny_hd("hd448"),
        vision=config_dict(vision_config()),
        text=config_dict(language.config),
        image_token_id=IMAGE_ID,
    )
    return LlavaHD(config, CLIPVisionModel(vision_config()), language).eval()


FAMILIES = [
    ("llama", {}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("phi3", {}),
    ("olmo2", {}),
    ("gemma", {}),
]
