"""Tiny random models for the tests, made by transformers and read through the real loading code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from llava_hd.hd.grid import PRESETS, HDConfig

TILE, PATCH, VOCABULARY = 56, 14, 320
WORDS = "the a cat dog is on mat Yes No in image there red green what colour USER: ASSISTANT:"


def tiny_hd(preset: str) -> HDConfig:
    """A preset's geometry with 56 px tiles."""
    return HDConfig(**{**PRESETS[preset].to_dict(), "tile_px": TILE, "patch_px": PATCH})


def vision_config(image_px: int = TILE) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=image_px,
        patch_size=PATCH,
        projection_dim=16,
    )


def text_config(tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Vicuna's special tokens at its ids, and <image>."""
    special = ["<unk>", "<s>", "</s>", "<image>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 8,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        additional_special_tokens=["<image>"],
    )


IMAGE_ID = 3


def llava_next_config(preset: str) -> LlavaNextConfig:
    """The configuration of a tiny LlavaNext with the preset's grids."""
    return LlavaNextConfig(
        vision_config=vision_config(),
        text_config=text_config(),
        image_grid_pinpoints=[[h * TILE, w * TILE] for h, w in PRESETS[preset].grids],
        image_token_index=IMAGE_ID,
        vision_feature_layer=-2,
    )


def save_llava_next(folder: Path, preset: str, seed: int = 0) -> LlavaNextForConditionalGeneration:
    """A random LlavaNext with the preset's grids, saved by transformers."""
    torch.manual_seed(seed)
    model = LlavaNextForConditionalGeneration(llava_next_config(preset)).eval()
    model.save_pretrained(folder)
    return model


def save_llava(folder: Path, image_px: int = 84, seed: int = 0) -> LlavaForConditionalGeneration:
    """A random LLaVA-1.5 saved by transformers."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=vision_config(image_px),
        text_config=text_config(),
        image_token_index=IMAGE_ID,
        vision_feature_layer=-2,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    return model


def save_parts(folder: Path, image_px: int = TILE, seed: int = 0, tied: bool = False) -> Path:
    """`folder/vision` (CLIP) and `folder/language` (Llama and tokenizer), saved by transformers."""
    torch.manual_seed(seed)
    CLIPVisionModel(vision_config(image_px)).save_pretrained(folder / "vision")
    LlamaForCausalLM(text_config(tied)).save_pretrained(folder / "language")
    tiny_tokenizer().save_pretrained(folder / "language")
    return folder


def random_image(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Noise of (height, width)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
