"""The files beside the weights of an exported model: configuration, processor, tokenizer.

Old readers and new ones look in different places for the same value, so both are written:
`torch_dtype` and `dtype`, `rope_theta` and `rope_parameters`, `preprocessor_config.json` and the
`image_processor` inside `processor_config.json`, `chat_template.json` and `chat_template.jinja`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, CLIPVisionConfig, PreTrainedConfig
from transformers import __version__ as transformers_version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..hd.grid import HDConfig
from ..hd.tiler import CLIP_MEAN, CLIP_STD
from .chat_template import chat_template
from .config import LlavaHDConfig
from .foreign import config_dict
from .processor import Processor, with_bos
from .whole_folder import write_json

BICUBIC = 3  # PIL's number of it
END_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# transformers 5 writes special tokens that are not named as a list, which 4.x cannot read.
NEW_TOKENIZER_KEYS = ("backend", "is_local", "extra_special_tokens", "local_files_only")


def text_values(config: LlavaHDConfig, dtype: str) -> dict[str, Any]:
    """The language model's configuration for readers old and new."""
    values = dict(config.text)
    kind = values.pop("model_type")
    full = config_dict(AutoConfig.for_model(kind, **values))
    general = set(PreTrainedConfig().to_dict()) - {"tie_word_embeddings"}
    text = {k: v for k, v in full.items() if k not in general}
    text |= {key: full[key] for key in END_TOKENS if full.get(key) is not None}
    rope = full.get("rope_parameters")
    if (
        rope and "rope_theta" in rope
    ):  # some kinds have one for each kind of layer, new readers alone
        text["rope_theta"] = rope["rope_theta"]
        scaled = rope.get("rope_type", "default") != "default"
        others = {k: v for k, v in rope.items() if k != "rope_theta"}
        text["rope_scaling"] = others if scaled else None
    # vLLM builds the language model of these alone, and asks for the class by name
    architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
    named = {"model_type": kind, "architectures": architectures}
    return {**named, **text, "dtype": dtype, "torch_dtype": dtype}


def vision_values(config: LlavaHDConfig, dtype: str) -> dict[str, Any]:
    """The tower's configuration, every field of it."""
    full = config_dict(CLIPVisionConfig.from_dict(dict(config.vision)))
    general = set(PreTrainedConfig().to_dict())
    vision = {k: v for k, v in full.items() if k not in general}
    return {"model_type": "clip_vision_model", **vision, "dtype": dtype, "torch_dtype": dtype}


def pinpoints(hd: HDConfig) -> list[list[int]]:
    """The grids in pixels, (height, width), as transformers and vLLM have them."""
    return [[rows * hd.tile_px, cols * hd.tile_px] for rows, cols in hd.grids]


def transformers_config(config: LlavaHDConfig, kind: str, architecture: str, dtype: str) -> Any:
    """config.json of transformers' `llava_next` or `llava`."""
    text = text_values(config, dtype)
    values = {
        "architectures": [architecture],
        "model_type": kind,
        "image_token_index": config.image_token_id,
        "image_token_id": config.image_token_id,
        "image_seq_length": config.hd.patches_per_tile,
        "vision_feature_layer": config.vision_layer,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": bool(config.text.get("tie_word_embeddings", False)),
        "dtype": dtype,
        "torch_dtype": dtype,
        "transformers_version": transformers_version,
        "vision_config": vision_values(config, dtype),
        "text_config": text,
    }
    if config.hd.grids:
        values["image_grid_pinpoints"] = pinpoints(config.hd)
    return values


def image_processor_values(config: LlavaHDConfig, processor: str) -> dict[str, Any]:
    """preprocessor_config.json for `processor`: LlavaNext, Llava (a padded view) or CLIP."""
    side = config.hd.tile_px
    values = {
        "image_processor_type": f"{processor}ImageProcessor",
        "processor_class": "LlavaProcessor" if processor == "CLIP" else f"{processor}Processor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "do_convert_rgb": True,
    }
    if processor != "CLIP":
        values["do_pad"] = True
    if processor == "LlavaNext":
        values["image_grid_pinpoints"] = pinpoints(config.hd)
    return values


def write_processor(folder: Path, config: LlavaHDConfig, processor: str) -> None:
    """The files of a transformers processor but for its tokenizer."""
    image_processor = image_processor_values(config, processor)
    write_json(folder / "preprocessor_config.json", image_processor)
    if processor == "CLIP":
        return
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": f"{processor}Processor",
            "image_token": "<image>",
            "patch_size": config.hd.patch_px,
            # CLIP's CLS, which "default" takes off again; 0 would be one token short
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
            "image_processor": image_processor,
        },
    )


def write_tokenizer(folder: Path, processor: Processor) -> None:
    """Tokenizer files that transformers 4 reads too, and the chat template in all its places."""
    tokenizer = with_bos(processor.tokenizer)
    template = chat_template(processor.config.template, tokenizer.eos_token)
    Processor(tokenizer, processor.config, sentencepiece=processor.sentencepiece).save_pretrained(
        folder
    )
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    listed = [str(token) for token in getattr(tokenizer, "extra_special_tokens", ())]
    named = {
        key: str(token) for key, token in tokenizer.special_tokens_map.items() if key[-1] != "s"
    }
    values = {k: v for k, v in values.items() if k not in NEW_TOKENIZER_KEYS}
    is_llama = "Llama" in type(tokenizer).__name__
    values["tokenizer_class"] = "LlamaTokenizerFast" if is_llama else "PreTrainedTokenizerFast"
    values |= named | {"additional_special_tokens": listed, "chat_template": template}
    values["added_tokens_decoder"] = {
        str(number): _token(token) for number, token in tokenizer.added_tokens_decoder.items()
    }
    if tokenizer.bos_token is not None:
        values["add_bos_token"] = True
    write_json(path, values)
    write_json(folder / "special_tokens_map.json", named | {"additional_special_tokens": listed})
    added = {str(token): i for i, token in sorted(tokenizer.added_tokens_decoder.items())}
    write_json(folder / "added_tokens.json", added)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_json(folder / "chat_template.json", {"chat_template": template})


def _token(token: Any) -> dict[str, Any]:
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}


def generation_values(tokenizer: Any, text: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: greedy, ending where the tokenizer or the model ends."""
    own = text.get("eos_token_id")
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    pad = tokenizer.pad_token_id
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": ends[0] if pad is None else pad,
        "do_sample": False,
        "transformers_version": transformers_version,
    }
