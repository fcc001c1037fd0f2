"""Configurations of model folders: our own, and transformers' `llava_next` and `llava` as ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..hd.errors import UsageError
from ..hd.grid import HDConfig, suggest
from .adapter_config import ADAPTER_TYPE, read_adapter_config
from .config import MODEL_TYPE, LlavaHDConfig, read_config_json, readable

# What our forward computes; a folder that asks for something else is refused.
REQUIRED = {
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
}
TOWER = "clip_vision_model"
PARTS = ("clip", TOWER, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def read_config(folder: str | Path) -> LlavaHDConfig:
    """The configuration of a model folder, whoever wrote it; of an adapter's, that of base and
    adapter together. Raises UsageError."""
    values = read_config_json(folder)
    kind = values["model_type"]
    if kind == ADAPTER_TYPE:
        return read_adapter_config(folder).model
    if kind == MODEL_TYPE:
        try:
            with readable("it", "save the model again"):
                return LlavaHDConfig.from_dict(values)
        except UsageError as error:
            raise UsageError(f"{folder}/config.json: {error}") from error
    if "mm_vision_tower" in values:
        raise UsageError(
            f"{folder} is in the original LLaVA's layout; make it a model of ours first: "
            f"llava-hd import {folder} --out DIR"
        )
    readers = {"llava_next": _llava_next_geometry, "llava": _llava_geometry}
    if kind in PARTS:
        raise UsageError(
            f"{folder}: model_type {kind!r} cannot be read as a whole model; llava-hd import puts "
            "parts together: --vision DIR --language DIR --preset NAME --out DIR"
        )
    if kind not in readers:
        hint = suggest(kind, (MODEL_TYPE, ADAPTER_TYPE, *readers))
        raise UsageError(f"{folder}: model_type {kind!r} cannot be read; {hint}")
    with readable(f"{folder}/config.json"):
        return _foreign_config(folder, readers[kind])


def _foreign_config(folder: str | Path, geometry: Callable[[Any], HDConfig]) -> LlavaHDConfig:
    theirs = AutoConfig.from_pretrained(folder)
    for name, ours in REQUIRED.items():
        value = getattr(theirs, name)
        if value != ours:
            raise UsageError(f"{folder}/config.json: {name} is {value!r}, only {ours!r} is read")
    if not isinstance(theirs.vision_feature_layer, int):
        raise UsageError(
            f"{folder}/config.json: vision_feature_layer is {theirs.vision_feature_layer!r}, "
            "only one layer is read"
        )
    if theirs.vision_config.model_type != TOWER:
        raise UsageError(
            f"{folder}/config.json: vision_config is a {theirs.vision_config.model_type}, only "
            f"{TOWER} is read"
        )
    text = config_dict(theirs.text_config)
    return LlavaHDConfig(
        hd=geometry(theirs),
        vision=config_dict(theirs.vision_config),
        text=text | {"tie_word_embeddings": theirs.tie_word_embeddings},
        image_token_id=theirs.image_token_id,
        projector="mlp2x_gelu",
        vision_layer=theirs.vision_feature_layer,
    )


def config_dict(config: PreTrainedConfig) -> dict[str, Any]:
    """A transformers configuration as JSON-able values, every field written out."""
    return json.loads(config.to_json_string(use_diff=False))


def _llava_next_geometry(theirs: Any) -> HDConfig:
    """LLaVA-1.6 and 1.5-HD: pinpoints are (height, width) in pixels, multiples of the tile."""
    tile_px = theirs.vision_config.image_size
    if not theirs.image_grid_pinpoints:
        raise UsageError("config.json: image_grid_pinpoints is empty, so no image can be cut")
    for pinpoint in theirs.image_grid_pinpoints:
        if any(length % tile_px for length in pinpoint):
            raise UsageError(
                f"config.json: image_grid_pinpoints has {list(pinpoint)}, which is not a multiple "
                f"of the tower's {tile_px} px"
            )
    return HDConfig(
        tile_px=tile_px,
        patch_px=theirs.vision_config.patch_size,
        grids=tuple((h // tile_px, w // tile_px) for h, w in theirs.image_grid_pinpoints),
        global_view="squash",
        keep="llava_next",
        row_end=True,
        pad_colour="black",
    )


def _llava_geometry(theirs: Any) -> HDConfig:
    """LLaVA-1.5: one padded view."""
    return HDConfig(
        tile_px=theirs.vision_config.image_size,
        patch_px=theirs.vision_config.patch_size,
        grids=(),
        global_view="pad",
        keep="all",
        row_end=False,
        pad_colour="mean",
    )
