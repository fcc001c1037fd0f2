"""Adapter folders: what LoRA training writes, read back with the base model that they belong to.

    adapter_config.json, adapter_model.safetensors   the language model's adapter, as peft has it
    projector.safetensors                            projector and row-end, under our names
    vision.safetensors                               the tower, only if that was trained too
    config.json                                      model/adapter_config.py; and the tokenizer

The frozen weights are not in it; a digest tells whether a base model is the one trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..hd.errors import DataError, UsageError
from .adapter_config import AdapterConfig, is_adapter, read_adapter_config
from .assemble import assemble
from .config import PASSING
from .llava_hd import LlavaHD
from .lora import (
    MARK,
    WEIGHTS_FILE,
    adapter_parameters,
    linears,
    read_adapter,
    save_config,
    to_peft_names,
)
from .weights import LANGUAGE, VISION, load_model

PROJECTOR_FILE, VISION_FILE = "projector.safetensors", "vision.safetensors"
PROJECTOR = "projector."
SAMPLED_ROWS = 16


def saved_names(model: LlavaHD) -> list[str]:
    """Names of the tensors of a model with an adapter that its folder holds."""
    assert model.adapter is not None
    whole = (PROJECTOR, VISION) if model.adapter.vision else (PROJECTOR,)
    return [name for name in model.state_dict() if name.startswith(whole) or MARK in name]


def save_adapter(model: LlavaHD, path: str | Path, state_dict: Mapping[str, Tensor] | None) -> None:
    """Write an adapter folder; `state_dict` replaces the model's own tensors (it may hold more
    than is written)."""
    config = model.adapter
    assert config is not None
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if state_dict is None else state_dict
    chosen = {name: state[name].detach().cpu().contiguous() for name in saved_names(model)}
    adapter = {k.removeprefix(LANGUAGE): t for k, t in chosen.items() if MARK in k}
    files = {WEIGHTS_FILE: to_peft_names(adapter)}
    files[PROJECTOR_FILE] = {k: t for k, t in chosen.items() if k.startswith(PROJECTOR)}
    if config.vision:
        files[VISION_FILE] = {k: t for k, t in chosen.items() if k.startswith(VISION)}
    for name, tensors in files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    language = config.base.language or config.base.path
    assert language is not None
    save_config(model.language.causal_lm, folder, language)
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def load_adapter(
    path: str | Path, dtype: torch.dtype, attention: str, base: str | Path | None = None
) -> LlavaHD:
    """The base model of an adapter folder with the adapter in it.

    base: the folder of a whole model, instead of the one that the adapter names. Raises UsageError
    where a folder is missing, DataError where base and adapter do not belong together.
    """
    folder = Path(path)
    config = read_adapter_config(folder)
    model = _base_model(folder, config, dtype, attention, base)
    found = base_digest(model)
    if found != config.base_digest:
        where = base or " and ".join(map(str, config.base.found(folder).values()))
        raise DataError(
            f"{folder}/config.json: the model in {where} is not the one that this adapter was "
            f"trained on (base_digest {found:.12}, not {config.base_digest:.12}); give that one"
        )
    attach(model, folder, config, dtype)
    return model


def _base_model(
    folder: Path, config: AdapterConfig, dtype: torch.dtype, attention: str, base: Any
) -> LlavaHD:
    folders = config.base.found(folder) if base is None else {"path": Path(base)}
    whole = folders.get("path")
    if whole is None:
        model, _ = assemble(
            vision=folders["vision"],
            language=folders["language"],
            hd=config.model.hd,
            projector=config.model.projector,
            template=config.model.template,
            vision_layer=config.model.vision_layer,
            dtype=dtype,
            attention=attention,
        )
        return model
    if is_adapter(whole):
        raise UsageError(f"{whole} is an adapter itself; give the whole model that it was added to")
    return load_model(whole, dtype, attention)


def attach(model: LlavaHD, folder: Path, config: AdapterConfig, dtype: torch.dtype) -> None:
    """Put the adapter of a folder into its base model, with the projector and tower beside it."""
    causal_lm = model.language.causal_lm
    read_adapter(causal_lm, folder, _read(folder / WEIGHTS_FILE), dtype)
    _take(model, PROJECTOR, folder / PROJECTOR_FILE)
    if config.vision:
        _take(model, VISION, folder / VISION_FILE)
    for parameter in causal_lm.parameters():
        parameter.requires_grad_(False)
    for parameter in adapter_parameters(causal_lm).values():
        parameter.requires_grad_(True)
    model.adapter = config


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing; copy or save the adapter again") from error
    except SafetensorError as error:
        raise DataError(f"{file} is damaged ({error}); copy or save it again") from error


def _take(model: LlavaHD, prefix: str, file: Path) -> None:
    """All tensors of a part of the model from a file, none missing, none left over."""
    part, state = model.get_submodule(prefix.rstrip(".")), _read(file)
    ours = {prefix + name: tensor.shape for name, tensor in part.state_dict().items()}
    theirs = {name: tensor.shape for name, tensor in state.items()}
    if ours != theirs:
        wrong = sorted(set(ours.items()) ^ set(theirs.items()))[0][0]
        raise DataError(f"{file}: {wrong} is missing, unknown or of another shape; save it again")
    part.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in state.items()})


def saved_dtype(folder: str | Path) -> torch.dtype:
    """The type in which an adapter folder's tensors are written."""
    return next(iter(_read(Path(folder) / PROJECTOR_FILE).values())).dtype


def base_digest(model: LlavaHD) -> str:
    """SHA-256 of what a base model is, taken before an adapter or fewer bits change it: the
    configuration, and a sample of tower and language model (vectors whole, the first rows of the
    embeddings and of one linear) rounded to bf16, so that it is the same in every type."""
    values = model.config.to_dict()
    for part in ("vision", "text"):
        values[part] = {k: v for k, v in values[part].items() if k not in PASSING}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for tensor in _sample(model):
        plain = tensor.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(plain.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _sample(model: LlavaHD) -> list[Tensor]:
    causal_lm = model.language.causal_lm
    parts: tuple[nn.Module, ...] = (model.vision.clip, causal_lm)
    vectors = [p for part in parts for p in part.parameters() if p.dim() == 1]
    tables = [
        model.vision.clip.embeddings.patch_embedding.weight,
        causal_lm.get_input_embeddings().weight,
        next(iter(linears(causal_lm).values())).weight,
    ]
    return vectors + [table[:SAMPLED_ROWS] for table in tables]
