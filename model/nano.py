"""The nano counterparts of CLIP and Vicuna: fresh, untrained, and their tokenizer.

Only what must import transformers or tokenizers is here; the training is in bench/.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

PATCH_PX = 14
WIDTH = 128
LAYERS = 4
HEADS = 4
VOCABULARY = 512
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")

# Captions of the contrastive training are sets of words: ids 0..2 begin, end and pad a caption.
CAPTION_BEGIN, CAPTION_END, CAPTION_PAD, CAPTION_FIRST_WORD = 0, 1, 2, 3

SHIPPED = Path(__file__).parent / "shipped"  # tower56/, tower84/, lm/


def new_clip(tile_px: int, num_words: int, max_words: int) -> CLIPModel:
    """An untrained CLIP: a `tile_px` image tower and a text tower for captions of a few words."""
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": tile_px,
        "patch_size": PATCH_PX,
        "hidden_act": "quick_gelu",
        "projection_dim": WIDTH,
    }
    text = {
        "vocab_size": CAPTION_FIRST_WORD + num_words,
        "hidden_size": WIDTH // 2,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": max_words + 2,
        "projection_dim": WIDTH,
        "bos_token_id": CAPTION_BEGIN,
        "eos_token_id": CAPTION_END,
        "pad_token_id": CAPTION_PAD,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


@torch.no_grad()
def scale_tower(clip: CLIPModel, factor: float) -> None:
    """Multiply the image tower's residual stream by `factor` and change nothing else.

    Every block reads the stream through a layer norm, which does not see its scale; so it is
    enough to scale what is written to it: the first norm, the attention outputs, the second MLP
    layers. Hidden states grow by `factor`, pooled outputs stay.
    """
    vision = clip.vision_model
    written = [vision.pre_layrnorm]
    for layer in vision.encoder.layers:
        written += [layer.self_attn.out_proj, layer.mlp.fc2]
    for module in written:
        module.weight.mul_(factor)
        module.bias.mul_(factor)


@torch.no_grad()
def scale_language(language: LlamaForCausalLM, factor: float) -> None:
    """Multiply the residual stream, embeddings included, by `factor`; logits stay (see above)."""
    language.model.embed_tokens.weight.mul_(factor)
    for layer in language.model.layers:
        layer.self_attn.o_proj.weight.mul_(factor)
        layer.mlp.down_proj.weight.mul_(factor)


def save_tower(clip: CLIPModel, path: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write the image tower alone as a CLIPVisionModel folder, weights in `dtype`."""
    tower = CLIPVisionModel(clip.config.vision_config)
    tower.load_state_dict(clip.vision_model.state_dict())
    tower.to(dtype).save_pretrained(path)


def new_tokenizer(corpus: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `corpus`: nothing is ever unknown, `<s>` is put in front.

    The vocabulary has at most VOCABULARY entries; specials take the first ids.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", begin)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def new_language(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """An untrained LLaMA of WIDTH; its input and output embeddings are apart."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def save_language(
    language: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write the language model and its tokenizer as one folder, weights in `dtype`."""
    language.to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)
