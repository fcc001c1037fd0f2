"""The original LLaVA layout, for SGLang's own class, LMDeploy and llama.cpp's converters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from .config import LlavaHDConfig
from .export_files import pinpoints, text_values, vision_values, write_processor
from .key_names import VISION, to_clip, to_original
from .original import ARCHITECTURE
from .whole_folder import save_tensors, write_json

CLIP_LARGE_WIDTH = 1024


def write_original(
    folder: Path, target: Path, config: LlavaHDConfig, state: dict[str, Tensor], dtype: str
) -> None:
    """Weights, config.json and, in a folder of its own, the tower with its image processor.

    `target` is where the folder will be: readers find the tower by an absolute path, and take it
    for CLIP only if that says "clip".
    """
    tower = tower_name(config)
    write_json(
        folder / "config.json", original_config(config, dtype, str(target.resolve() / tower))
    )
    # Readers cut tiles themselves and hand them to a plain CLIP processor, one by one.
    write_processor(folder, config, "CLIP")
    vision = {to_clip(name): t for name, t in state.items() if name.startswith(VISION)}
    (folder / tower).mkdir()
    save_tensors(vision, folder / tower)
    values = {"architectures": ["CLIPVisionModel"], **vision_values(config, dtype)}
    write_json(folder / tower / "config.json", values)
    write_processor(folder / tower, config, "CLIP")
    rest = {to_original(name): t for name, t in state.items() if not name.startswith(VISION)}
    save_tensors(rest, folder)


def tower_name(config: LlavaHDConfig) -> str:
    """The tower's folder, named as OpenAI's are."""
    size = "large-" if config.vision["hidden_size"] == CLIP_LARGE_WIDTH else ""
    return f"clip-vit-{size}patch{config.hd.patch_px}-{config.hd.tile_px}"


def original_config(config: LlavaHDConfig, dtype: str, tower: str) -> dict[str, Any]:
    """config.json: the language model's keys, and LLaVA's; pinpoints are (width, height) here."""
    text = text_values(config, dtype)
    values = {
        **text,
        "architectures": [ARCHITECTURE],
        "model_type": "llava",
        "mm_vision_tower": tower,
        "mm_hidden_size": config.vision["hidden_size"],
        "mm_projector_type": config.projector,
        "mm_vision_select_layer": config.vision_layer,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "spatial_unpad" if config.hd.grids else "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": "anyres" if config.hd.grids else "pad",
        "image_token_index": config.image_token_id,
        "tokenizer_model_max_length": text.get("max_position_embeddings"),
        "tokenizer_padding_side": "right",
    }
    if config.hd.grids:
        values["image_grid_pinpoints"] = [[width, height] for height, width in pinpoints(config.hd)]
    return values
