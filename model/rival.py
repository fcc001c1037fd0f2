"""transformers' own LlavaNext, to be measured against: made at random, asked greedily.

It is asked as its users ask it: whole prompts, each with its own pixels, padded on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from ..hd.grid import HDConfig
from ..hd.tiler import normalise
from .packing import Sample
from .weights import quiet_transformers


@dataclass(frozen=True)
class Sizes:
    """Widths and depths of a language model (vision_: of the tower) that is made at random.
    kv_heads: heads of key and value, as many as of queries where it is None."""

    width: int
    mlp: int
    layers: int
    heads: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    vocabulary: int = 32_064
    positions: int = 4096
    spread: float = 0.02  # of random weights; a narrow model's answers depend on it, see SIZES
    kv_heads: int | None = None

    def cut(self, layers: int) -> Sizes:
        """The same widths with so many layers, and the tower's share of its own (2 or more)."""
        tower = max(2, round(self.vision_layers * layers / self.layers))
        return replace(self, layers=layers, vision_layers=tower)


# In narrow models with LLaMA's usual spread every question gets the same answer, which would hide
# mistakes. The tower of `small` is about a tenth of the work; CLIP-L is a twentieth of 7b's. `1b`
# has TinyLlama-1.1B's widths (Zhang et al. 2024, table 1), `nano` those of the shipped parts.
SIZES = {
    "tiny": Sizes(64, 128, 2, 1, 64, 3, 1, vocabulary=512, spread=0.2),
    "small": Sizes(512, 1376, 4, 8, 128, 6, 2, spread=0.06),
    "nano": Sizes(128, 384, 4, 4, 128, 4, 4, vocabulary=512, spread=0.06),
    "1b": Sizes(2048, 5632, 22, 32, 1024, 24, 16, kv_heads=4),
    "7b": Sizes(4096, 11_008, 32, 32, 1024, 24, 16),
}


def save_random(
    folder: Path,
    sizes: Sizes,
    hd: HDConfig,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> None:
    """Write a llava_next folder with random weights, made on `device`, and the tokenizer."""
    vision = CLIPVisionConfig(
        hidden_size=sizes.vision_width,
        intermediate_size=4 * sizes.vision_width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
        image_size=hd.tile_px,
        patch_size=hd.patch_px,
    )
    text = LlamaConfig(
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads if sizes.kv_heads is None else sizes.kv_heads,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=sizes.positions,
        initializer_range=sizes.spread,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_grid_pinpoints=[[hd.tile_px * r, hd.tile_px * c] for r, c in hd.grids],
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
    )
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device), quiet_transformers():
        torch.manual_seed(seed)
        model = LlavaNextForConditionalGeneration._from_config(config, dtype=dtype)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_rival(
    folder: Path, dtype: torch.dtype, device: torch.device
) -> LlavaNextForConditionalGeneration:
    """A llava_next folder as transformers reads it, with the attention that it takes by itself."""
    with quiet_transformers():
        model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    model.generation_config = GenerationConfig()  # what a folder asks for (sampling) is not meant
    return model.to(device).eval()


@dataclass(frozen=True)
class RivalBatch:
    """What transformers' processor would make: prompts padded on the left `[S longest]`, their
    mask, pixels `[S n 3 px px]` and (height, width) of each prompt's image `[S 2]`."""

    ids: Tensor
    mask: Tensor
    pixels: Tensor
    image_sizes: Tensor


def rival_batch(
    samples: Sequence[Sample], padding: int, dtype: torch.dtype, device: torch.device
) -> RivalBatch:
    """A batch of prompts with one image each, all of as many tiles."""
    longest = max(len(sample.ids) for sample in samples)
    ids = torch.full((len(samples), longest), padding)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, longest - len(sample.ids) :] = torch.tensor(sample.ids)
        mask[row, longest - len(sample.ids) :] = 1
    pixels = torch.stack([normalise(sample.tiles[0], dtype) for sample in samples])
    sizes = torch.tensor([sample.plans[0].image_size for sample in samples])
    return RivalBatch(*(x.to(device) for x in (ids, mask, pixels, sizes)))


@torch.inference_mode()
def rival_answers(
    model: Any, batch: RivalBatch, max_new_tokens: int, ends: Sequence[int]
) -> list[list[int]]:
    """transformers' greedy tokens, up to and without an end token."""
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
    )
    out = model.generate(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        pixel_values=batch.pixels,
        image_sizes=batch.image_sizes,
        generation_config=config,
    )
    rows = out[:, batch.ids.shape[1] :].tolist()
    return [list(takewhile(lambda token: token not in ends, row)) for row in rows]
