"""Names that readers look for in an export: tensors, fields of config.json, vLLM's rules."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from export_files import exported, native
from safetensors import safe_open
from transformers.image_processing_utils import select_best_resolution

from llava_hd.hd.grid import PRESETS
from llava_hd.hd.plan import plan_image

# What readers look for. A name that changes here is a checkpoint that somebody cannot read.
CLIP_NAMES = """
embeddings.class_embedding embeddings.patch_embedding.weight embeddings.position_embedding.weight
pre_layrnorm.{weight,bias} post_layernorm.{weight,bias}
encoder.layers.{0,1,2}.{layer_norm1,layer_norm2,mlp.fc1,mlp.fc2}.{weight,bias}
encoder.layers.{0,1,2}.self_attn.{q_proj,k_proj,v_proj,out_proj}.{weight,bias}
"""
LLAMA_NAMES = """
model.embed_tokens.weight model.norm.weight lm_head.weight
model.layers.{0,1}.{input_layernorm,post_attention_layernorm}.weight
model.layers.{0,1}.mlp.{gate_proj,up_proj,down_proj}.weight
model.layers.{0,1}.self_attn.{q_proj,k_proj,v_proj,o_proj}.weight
"""
HF_PROJECTOR = "multi_modal_projector.linear_{1,2}.{weight,bias}"


def spelled_out(text: str, prefix: str = "") -> set[str]:
    """`{a,b}` written out, each word behind `prefix`."""
    names, done = [prefix + word for word in text.split()], set()
    while names:
        name = names.pop()
        choice = re.search(r"\{([^}]*)\}", name)
        if choice is None:
            done.add(name)
        else:
            names += [name.replace(choice[0], part, 1) for part in choice[1].split(",")]
    return done


def names_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def test_names_of_tensors_are_those_that_readers_know(tmp_path: Path) -> None:
    flex, base = native(tmp_path / "flex", "hdflex"), native(tmp_path / "base", "base")
    hf = (
        spelled_out(CLIP_NAMES, "vision_tower.vision_model.")
        | spelled_out(LLAMA_NAMES, "language_model.")
        | spelled_out(HF_PROJECTOR)
    )
    assert names_in(exported(base, tmp_path / "a", "llava_hf")) == hf
    assert names_in(exported(flex, tmp_path / "b", "llava_next")) == hf | {"image_newline"}
    original = exported(flex, tmp_path / "c", "llava")
    assert names_in(original) == (
        spelled_out(LLAMA_NAMES)
        | spelled_out("model.mm_projector.{0,2}.{weight,bias} model.image_newline")
    )
    [tower] = original.glob("clip-vit-patch14-56")
    assert names_in(tower) == spelled_out(CLIP_NAMES, "vision_model.")


def vllm_modules(name: str) -> str | None:
    """vLLM's prefix rules of LlavaNext, restated: old names pass, 4.52's are mapped."""
    for old, new in (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.image_newline", "image_newline"),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(old):
            name = new + name.removeprefix(old)
    known = ("language_model.model.", "language_model.lm_head.", "vision_tower.vision_model.")
    fits = name.startswith((*known, "multi_modal_projector.linear_")) or name == "image_newline"
    return name if fits else None


def test_vllms_prefix_rules_leave_every_name_as_it_is(tmp_path: Path) -> None:
    model = native(tmp_path / "model", "hd448")
    for name in names_in(exported(model, tmp_path / "out", "llava_next")):
        assert vllm_modules(name) == name


def vllm_tokens(height: int, width: int, pinpoints: list[list[int]], tile: int, patch: int) -> int:
    """vLLM's rule for LlavaNext's image tokens, restated (get_num_image_tokens, 0.33)."""
    canvas = select_best_resolution((height, width), pinpoints)
    side = tile // patch
    rows, cols = side * (canvas[0] // tile), side * (canvas[1] // tile)
    if width / height > cols / rows:
        new = int(round(height * (cols / width), 7))
        rows -= 2 * ((rows - new) // 2)
    else:
        new = int(round(width * (rows / height), 7))
        cols -= 2 * ((cols - new) // 2)
    return side * side + rows * cols + rows


@pytest.mark.parametrize(("preset", "count"), [("hdflex", 100_000), ("hd448", 20_000)])
def test_vllm_counts_the_tokens_that_we_plan(preset: str, count: int) -> None:
    config = PRESETS[preset]
    tile, patch = config.tile_px, config.patch_px
    pinpoints = [[rows * tile, cols * tile] for rows, cols in config.grids]
    draw = random.Random(7)
    compared, thin = 0, 0
    while compared < count:
        height, width = (int(2 ** draw.uniform(2, 12)) for _ in range(2))
        plan = plan_image((height, width), config)
        due = vllm_tokens(height, width, pinpoints, tile, patch)
        rows, cols = plan.map_size
        wide = width / height > cols / rows
        left = height * cols / width if wide else width * rows / height
        if left < 1:  # nothing of the map is left there; we keep what the image touches
            thin += 1
            continue
        assert plan.num_tokens == due, (height, width)
        compared += 1
    assert thin < count


@pytest.mark.parametrize(("preset", "format"), [("hd448", "llava_next"), ("base", "llava_hf")])
def test_the_language_model_names_its_class_since_vllm_builds_it_of_text_config_alone(
    preset: str, format: str, tmp_path: Path
) -> None:
    out = exported(native(tmp_path / "model", preset), tmp_path / "out", format)
    values = json.loads((out / "config.json").read_text())
    assert values["text_config"]["architectures"] == ["LlamaForCausalLM"]
    assert values["text_config"]["model_type"] == "llama"
    # every field that docs of llava_next list, in the form that readers before 5 look for
    assert {
        "architectures", "image_token_index", "image_seq_length", "vision_feature_layer",
        "vision_feature_select_strategy", "projector_hidden_act", "tie_word_embeddings",
        "torch_dtype", "vision_config", "text_config",
    } <= values.keys()  # fmt: skip
    assert {"rope_theta", "rope_parameters", "eos_token_id", "bos_token_id", "vocab_size"} <= (
        values["text_config"].keys()
    )
