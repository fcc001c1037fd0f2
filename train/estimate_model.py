"""The model of a run without its weights: read from configurations, counted by part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..hd.errors import UsageError
from ..hd.limits import limited
from ..model.adapter_config import AdapterConfig, BaseFolders
from ..model.config import LlavaHDConfig, read_config_json
from ..model.foreign import read_config
from ..model.llava_hd import LlavaHD
from ..model.outline import image_tokenizer, outline, outline_config, processor_of
from ..model.processor import Processor
from .config import TrainConfig, part_folder
from .estimate_zero import Weights
from .optimizer import LANGUAGE, PROJECTOR, build_optimizer, freeze
from .settings import LoraConfig, ModelSource

WIDTHS = {"fp32": (torch.float32, 4), "bf16": (torch.bfloat16, 2)}
# Published configurations, by the names of their folders: what counts and shapes depend on.
_LLAMA = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}
_CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "clip-vit-large-patch14": {**_CLIP_L, "image_size": 224},
    "clip-vit-large-patch14-336": {**_CLIP_L, "image_size": 336},
    "vicuna-7b-v1.5": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "vicuna-13b-v1.5": {
        **_LLAMA,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
}
# Bytes per weight beside the weight itself: NF4 and FP4 have an fp32 scale for 64 weights, which
# double quantisation turns into one byte and an fp32 scale for 256 of them (arXiv 2305.14314).
SCALES_4_BIT = {False: 4 / 64, True: 1 / 64 + 4 / (64 * 256)}


@dataclass(frozen=True)
class Part:
    """A part of the model: its parameters, those that are trained, bytes of its weights."""

    name: str
    parameters: int
    trained: int
    bytes: int


@dataclass(frozen=True)
class Outline:
    """The model on the meta device as the run trains it, its parts, and what ZeRO sees.

    processor: None where the tokenizer's files are not there. assumed: what was not read but
    taken for granted, in words.
    """

    model: LlavaHD
    parts: tuple[Part, ...]
    weights: Weights
    processor: Processor | None
    assumed: tuple[str, ...]
    dequantised: int  # bytes of the largest weight that is unpacked to be used


def open_words(config: TrainConfig) -> tuple[str, ...]:
    """How what a recipe leaves to the memory (fitting.py) is counted where no machine is asked."""
    words = []
    if config.gradient_checkpointing == "auto":
        words.append("gradient_checkpointing auto counts as false")
    if config.data.pack_tokens == "auto":
        words.append("data.pack_tokens auto counts as its default")
    return tuple(f"{one} here; the run decides by its own memory, and says so" for one in words)


def outline_run(config: TrainConfig) -> Outline:
    """The model that a run trains, from config.json and tokenizer files; no weight is read.

    Raises UsageError for folders that hold no model and parts that do not fit.
    """
    found, processor, assumed = _model_config(config.model)
    dtype, width = WIDTHS[config.precision]
    model = outline(found, dtype)
    quantised = _quantise(model, config.lora) if config.lora is not None else {}
    if config.lora is not None:
        _add_adapters(model, config.lora, config, dtype)
    freeze(model, config.stage, config.train_vision, config.vision_layers)
    if config.gradient_checkpointing is True:  # auto: as if there were enough memory
        model.checkpoint_gradients()
    model.train()

    def held(name: str, parameter: nn.Parameter) -> int:
        return quantised.get(name, parameter.numel() * width)

    named = [(name.replace(".base_layer.", "."), p) for name, p in model.named_parameters()]
    weights = Weights(
        bytes=sum(held(name, p) for name, p in named),
        width=width,
        groups=tuple(
            tuple(p.numel() for p in group["params"])
            for group in build_optimizer(model, config.optimizer).param_groups
        ),
        frozen=tuple(p.numel() for _, p in named if not p.requires_grad),
        largest_module=max(
            sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()
        ),
        reused=sum(p.numel() for name, p in named if _is_reused(name, config)),
    )
    largest = max((p.numel() for name, p in named if name in quantised), default=0)
    return Outline(model, _parts(named, held), weights, processor, assumed, largest * width)


def _is_reused(name: str, config: TrainConfig) -> bool:
    return config.train_vision or name.startswith((LANGUAGE, PROJECTOR))


def _model_config(source: ModelSource) -> tuple[LlavaHDConfig, Processor | None, tuple[str, ...]]:
    if source.path is not None:
        folder = part_folder(source.path)
        try:
            config = read_config(folder)
            config = replace(config, hd=limited(config.hd, source.limits))
            return config, Processor.from_pretrained(folder, source.limits), ()
        except UsageError as error:
            raise UsageError(f"model.path: {error}") from error
        except OSError:  # transformers' word for a folder without a tokenizer
            return config, None, (f"{folder} has no tokenizer",)
    hd = source.geometry
    assert hd is not None and source.vision is not None and source.language is not None
    vision, told_vision = _part_config("vision", source.vision)
    language, told_language = _part_config("language", source.language)
    tokenizer = None
    told_tokenizer: tuple[str, ...] = ()
    if not told_language:
        try:
            tokenizer = image_tokenizer(part_folder(source.language))
        except UsageError as error:
            told_tokenizer = (f"{error}; its vocabulary is taken to lack <image>",)
    config = outline_config(
        vision,
        language,
        hd=hd,
        projector=source.projector,
        vision_layer=source.vision_layer,
        template=source.template,
        image_token_id=None if tokenizer is None else tokenizer.convert_tokens_to_ids("<image>"),
        vocabulary=None if tokenizer is None else len(tokenizer),
    )
    processor = None if tokenizer is None else processor_of(tokenizer, config)
    return config, processor, (*told_vision, *told_language, *told_tokenizer)


def _part_config(field: str, name: str) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """A part's config.json; the published one where its folder is not there but has a known name,
    which is said."""
    folder, known = part_folder(name), Path(name).name
    if not folder.exists() and known in PUBLISHED:
        return PUBLISHED[known], (f"{name} is not there: the published shape of {known}",)
    try:
        return read_config_json(folder), ()
    except UsageError as error:
        names = ", ".join(PUBLISHED)
        raise UsageError(f"model.{field}: {error} (or a name of {names})") from error


def _quantise(model: LlavaHD, lora: LoraConfig) -> dict[str, int]:
    """Bytes of every decoder linear's weight by its name, if it is held in few bits."""
    if lora.bits == 16:
        return {}
    from ..model.lora import linears

    found = {}
    for name, linear in linears(model.language.causal_lm).items():
        count = linear.weight.numel()
        if lora.bits == 4:
            size = round(count * (0.5 + SCALES_4_BIT[lora.double_quant]))
        else:
            size = count + 4 * linear.out_features  # an fp32 scale for each row
        found[f"{LANGUAGE}causal_lm.{name}.weight"] = size
    return found


def _add_adapters(
    model: LlavaHD, lora: LoraConfig, config: TrainConfig, dtype: torch.dtype
) -> None:
    from ..model.lora import add_lora

    add_lora(
        model.language.causal_lm,
        r=lora.r,
        alpha=lora.alpha,
        dropout=lora.dropout,
        target_modules=lora.target_modules,
        seed=config.seed,
        dtype=dtype,
    )
    base = BaseFolders(path="")
    model.adapter = AdapterConfig(model.config, base, "", lora.bits, config.train_vision)


def _parts(
    named: list[tuple[str, nn.Parameter]], held: Callable[[str, nn.Parameter], int]
) -> tuple[Part, ...]:
    parts: dict[str, Part] = {}
    for name, parameter in named:
        part = "adapter" if ".lora_" in name else name.partition(".")[0]
        old = parts.setdefault(part, Part(part, 0, 0, 0))
        count = parameter.numel()
        parts[part] = replace(
            old,
            parameters=old.parameters + count,
            trained=old.trained + (count if parameter.requires_grad else 0),
            bytes=old.bytes + held(name, parameter),
        )
    return tuple(parts.values())
