"""Memory by formula: the bytes that a real model and its cache take."""

from __future__ import annotations

import pytest
import torch
from test_language import FAMILIES, build, causal_lm
from transformers import DynamicCache

from llava_hd.hd.grid import PRESETS
from llava_hd.model.needs import needs_of
from llava_hd.model.outline import outline_config
from llava_hd.train.estimate_model import PUBLISHED


@pytest.mark.parametrize(("kind", "options"), FAMILIES, ids=[kind for kind, _ in FAMILIES])
@torch.inference_mode()
def test_a_familys_keys_values_and_weights_are_those_of_the_formula(kind, options) -> None:
    model = build(causal_lm(kind, **options))
    cache = DynamicCache()
    model.language.causal_lm(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache)
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    needs = needs_of(model.config, torch.float32)
    assert 3 * needs.kv_bytes_per_token == held
    assert needs.weight_bytes == sum(p.nbytes for p in model.parameters())
    assert needs_of(model.config, torch.bfloat16).kv_bytes_per_token * 2 == held // 3


def test_vicuna_7b_needs_half_a_mebibyte_a_token() -> None:
    config = outline_config(
        PUBLISHED["clip-vit-large-patch14"], PUBLISHED["vicuna-7b-v1.5"], hd=PRESETS["hd448"]
    )
    needs = needs_of(config, torch.bfloat16)
    assert needs.kv_bytes_per_token == 2 * 32 * 4096 * 2 == 2**19
    assert 13.0 * 10**9 < needs.weight_bytes < 14.5 * 10**9
