"""Tiny checkpoints in every layout that is imported, written from key tables of this file.

The tables are written down here a second time on purpose: what the program calls a tensor is
compared with them, not with itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import IMAGE_ID, llava_next_config, text_config, tiny_tokenizer, vision_config
from torch import Tensor
from transformers import (
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
)

from llava_hd.hd.grid import HDConfig

Names = dict[str, Tensor]

# transformers' names in memory (5.x) -> those in the files of a version; first match counts.
LAYOUTS: dict[str, list[tuple[str, str]]] = {
    "4.47": [
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.vision_tower\.", "vision_tower.vision_model."),
        (r"^model\.", ""),
    ],
    "4.52": [(r"^model\.vision_tower\.", "model.vision_tower.vision_model.")],
    "5.x": [
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.", ""),
    ],
}
ORIGINAL = [
    (r"^model\.multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^model\.multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"^model\.language_model\.", "model."),
    (r"^model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
]


def renamed(state: Iterable[tuple[str, Tensor]], rules: list[tuple[str, str]]) -> Names:
    """A state dict under the names of a layout."""
    out = {}
    for name, tensor in state:
        for pattern, new in rules:
            if re.match(pattern, name):
                name = re.sub(pattern, new, name)
                break
        out[name] = tensor.detach().clone()
    return out


def write_safetensors(state: Names, folder: Path, shards: int = 1) -> list[Path]:
    """One file, or shards with an index."""
    return _write(
        state,
        folder,
        shards,
        "model{}.safetensors",
        lambda part, file: save_file(part, file, metadata={"format": "pt"}),
    )


def write_bin(state: Names, folder: Path, shards: int = 1) -> list[Path]:
    """The same as PyTorch's pickles."""
    return _write(state, folder, shards, "pytorch_model{}.bin", torch.save)


def _write(
    state: Names, folder: Path, shards: int, pattern: str, save: Callable[..., None]
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(state)
    parts = [names[i::shards] for i in range(shards)]
    files = []
    for number, part in enumerate(parts, start=1):
        mark = "" if shards == 1 else f"-{number:05}-of-{shards:05}"
        files.append(folder / pattern.format(mark))
        save({name: state[name] for name in part}, files[-1])
    if shards > 1:
        table = {name: files[i].name for i, part in enumerate(parts) for name in part}
        index = folder / (pattern.format("") + ".index.json")
        index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return files


def write_transformers(
    model: PreTrainedModel, folder: Path, layout: str, write: Callable[..., list[Path]], shards: int
) -> list[Path]:
    """A llava or llava_next folder in one of the layouts, with its tokenizer."""
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return write(renamed(model.state_dict().items(), LAYOUTS[layout]), folder, shards)


def original_config(model: PreTrainedModel, **changes: object) -> dict[str, object]:
    """config.json of LlavaLlamaForCausalLM, as the original repository writes it."""
    text, tower = model.config.text_config, model.config.vision_config
    values: dict[str, object] = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "mm_hidden_size": tower.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
        "torch_dtype": "float32",
        "transformers_version": "4.31.0",
    }
    for key in (
        "bos_token_id", "eos_token_id", "pad_token_id", "hidden_size", "intermediate_size",
        "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps",
        "max_position_embeddings", "vocab_size", "tie_word_embeddings",
    ):  # fmt: skip
        values[key] = getattr(text, key)
    return values | changes


def write_original(
    model: PreTrainedModel, folder: Path, write: Callable[..., list[Path]] = write_bin, **changes
) -> list[Path]:
    """A whole original folder, without the tower; it lies beside as a CLIP folder."""
    files = write(original_state(model), folder, 2)
    (folder / "config.json").write_text(json.dumps(original_config(model, **changes)))
    tiny_tokenizer().save_pretrained(folder)
    return files


def original_state(model: PreTrainedModel) -> Names:
    """The tensors of an original checkpoint, with the buffers that old versions wrote."""
    state = {
        name: tensor
        for name, tensor in renamed(model.state_dict().items(), ORIGINAL).items()
        if ".vision_tower." not in name
    }
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    return state


def write_clip(model: PreTrainedModel, folder: Path) -> Path:
    """The model's tower as OpenAI's folders are: a whole CLIP with its text half, as .bin."""
    tower: CLIPVisionModel = model.model.vision_tower
    state = {f"vision_model.{k}": v.detach().clone() for k, v in tower.state_dict().items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    state["text_model.final_layer_norm.weight"] = torch.ones(4)
    state["visual_projection.weight"] = torch.ones(4, 4)
    state["logit_scale"] = torch.tensor(2.0)
    write_bin(state, folder)
    values = {"model_type": "clip", "vision_config": tower.config.to_dict(), "text_config": {}}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def write_language(model: PreTrainedModel, folder: Path) -> Path:
    """The model's language model alone, with a tokenizer."""
    causal_lm = LlamaForCausalLM(model.config.text_config)
    state = model.state_dict()
    inner = {k: v for k, v in state.items() if k.startswith("model.language_model.")}
    causal_lm.model.load_state_dict(
        {k.removeprefix("model.language_model."): v for k, v in inner.items()}
    )
    causal_lm.lm_head.load_state_dict({"weight": state["lm_head.weight"]})
    causal_lm.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_lora(
    model: PreTrainedModel, folder: Path, rank: int = 4, alpha: int = 8
) -> tuple[Names, Names]:
    """An original LoRA folder for the model's language model; (lora_A by linear, lora_B)."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(original_config(model)))
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none",
             "target_modules": ["q_proj", "down_proj"], "fan_in_fan_out": False,
             "base_model_name_or_path": "lmsys/vicuna-7b-v1.5", "modules_to_save": None}
        )
    )  # fmt: skip
    torch.manual_seed(5)
    ups, downs, state = {}, {}, {}
    for name, weight in original_state(model).items():
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            module = name.removesuffix(".weight")
            downs[name] = torch.randn(rank, weight.shape[1])
            ups[name] = torch.randn(weight.shape[0], rank) * 0.1
            state[f"base_model.model.{module}.lora_A.weight"] = downs[name]
            state[f"base_model.model.{module}.lora_B.weight"] = ups[name]
    torch.save(state, folder / "adapter_model.bin")
    rest = {
        f"base_model.model.{k}": v
        for k, v in original_state(model).items()
        if "mm_projector" in k or "image_newline" in k
    }
    torch.save(rest, folder / "non_lora_trainables.bin")
    return downs, ups


def change(folder: Path, edit: Callable[[Names], object]) -> None:
    """Edit the tensors of a folder's one file."""
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def next_model() -> PreTrainedModel:
    """A random LlavaNext."""
    torch.manual_seed(1)
    return LlavaNextForConditionalGeneration(llava_next_config("hdflex")).eval()


def llava_model() -> PreTrainedModel:
    """A random LLaVA-1.5."""
    torch.manual_seed(2)
    config = LlavaConfig(
        vision_config=vision_config(84),
        text_config=text_config(),
        image_token_index=IMAGE_ID,
        vision_feature_layer=-2,
    )
    return LlavaForConditionalGeneration(config).eval()


SINGLE_VIEW = HDConfig(
    tile_px=84, grids=(), global_view="pad", keep="all", row_end=False, pad_colour="mean"
)
