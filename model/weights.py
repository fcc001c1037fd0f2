"""Model folders: our own, written and read; transformers' llava_next and llava, read.

Ours is `config.json` (LlavaHDConfig) and safetensors whose names are the module's own
(`vision.clip.…`, `projector.…`, `language.causal_lm.…`), in shards of 5 GB with
an index. Nothing is unpickled, nothing stays random: every tensor is placed or named in an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from ..hd.errors import DataError
from .adapter_config import is_adapter
from .attention import implementation
from .config import MODEL_TYPE, LlavaHDConfig, read_config_json
from .foreign import read_config
from .key_names import HEAD, LANGUAGE, VISION
from .llava_hd import LlavaHD

FOREIGN = {
    "llava_next": LlavaNextForConditionalGeneration,
    "llava": LlavaForConditionalGeneration,
}


def load_model(path: str | Path, dtype: torch.dtype, attention: str) -> LlavaHD:
    """The model of a folder, by the `model_type` in its config.json."""
    if is_adapter(path):
        from .adapter import load_adapter  # reads its base model from here; peft takes seconds

        return load_adapter(path, dtype, attention)
    read = _load_native if read_config_json(path)["model_type"] == MODEL_TYPE else _load_foreign
    with quiet_transformers():
        return read(Path(path), dtype, implementation(attention))


def save_model(
    model: LlavaHD, path: str | Path, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write a folder that `load_model` reads."""
    if model.adapter is not None:
        from .adapter import save_adapter

        save_adapter(model, path, state_dict)
        return
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(model.state_dict() if state_dict is None else state_dict)
    if model.config.text.get("tie_word_embeddings"):
        state.pop(HEAD, None)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_torch_state_dict(state, folder, metadata={"format": "pt"})
    text = json.dumps(model.config.to_dict(), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


@contextmanager
def quiet_transformers(reports: bool = True) -> Iterator[None]:
    """Without transformers' loading bars; its warnings stay, but for its `reports` of tensors."""
    was_on = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    if not reports:
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if was_on:
            transformers_logging.enable_progress_bar()


def read_state(folder: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """The tensors of a folder's safetensors files whose names begin with one of `prefixes`."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(f"model folder {folder} has no .safetensors file; save the model again")
    _check_shards(folder, files)
    state = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                names = [name for name in tensors.keys() if name.startswith(prefixes)]  # noqa: SIM118
                state.update({name: tensors.get_tensor(name) for name in names})
        except SafetensorError as error:
            raise DataError(f"{file} is damaged ({error}); copy or save it again") from error
    return state


def _check_shards(folder: Path, files: list[Path]) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index} is damaged; copy or save the model again") from error
    missing = sorted(named - {file.name for file in files})
    if missing:
        raise DataError(f"model folder {folder} lacks {missing[0]} ({len(missing)} shards missing)")


def _require_all(folder: Path, missing: Any, unexpected: Any, mismatched: Any = ()) -> None:
    for what, names in (
        ("lacks", missing),
        ("has an unknown tensor", unexpected),
        ("has a tensor of another shape:", mismatched),
    ):
        if names:
            first = sorted(map(str, names))[0]
            raise DataError(
                f"model folder {folder} {what} {first} ({len(names)} such); "
                "its config.json and its weights do not belong together"
            )


def _load_native(folder: Path, dtype: torch.dtype, attention: str) -> LlavaHD:
    return model_of(read_config(folder), read_state(folder), folder, dtype, attention)


def model_of(
    config: LlavaHDConfig,
    state: Mapping[str, Tensor],
    folder: Path,
    dtype: torch.dtype,
    attention: str,
) -> LlavaHD:
    """The model of a configuration and its tensors under our names; attention is transformers'
    word. DataError names `folder` where tensors are missing or left over."""
    clip = _from_state(
        CLIPVisionModel,
        CLIPVisionConfig.from_dict(dict(config.vision)),
        state,
        VISION,
        folder,
        dtype,
        attention,
    )
    text_values = dict(config.text)
    text = AutoConfig.for_model(text_values.pop("model_type"), **text_values)
    causal_class = type(_on_meta(text))
    causal_lm = _from_state(causal_class, text, state, LANGUAGE, folder, dtype, attention)
    model = LlavaHD(config, clip, causal_lm)
    own = {k: v for k, v in state.items() if not k.startswith((VISION, LANGUAGE))}
    found = model.load_state_dict(own, strict=False)
    missing = [k for k in found.missing_keys if not k.startswith((VISION, LANGUAGE))]
    _require_all(folder, missing, found.unexpected_keys)
    return cast_own_parts(model, dtype)


def cast_own_parts(model: LlavaHD, dtype: torch.dtype) -> LlavaHD:
    """Projector and row-end in `dtype`; transformers' parts were loaded in it. Casting the whole
    model would also cast the rotary frequencies, which must stay fp32: in bf16 the rotation is off
    by more than a radian at position 1,500."""
    model.projector.to(dtype)
    return model


def _on_meta(text: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(text)


def _from_state(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    state: Mapping[str, Tensor],
    prefix: str,
    folder: Path,
    dtype: torch.dtype,
    attention: str,
) -> Any:
    """A transformers module from the tensors below `prefix`, none missing, none left over."""
    part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    model, info = model_class.from_pretrained(
        None,
        config=config,
        state_dict=part,
        dtype=dtype,
        attn_implementation=attention,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused below, in one line
    )
    found = (info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    _require_all(folder, *([prefix + _name(key) for key in keys] for keys in found))
    return model


def _from_transformers(
    model_class: type[PreTrainedModel], folder: Path, dtype: torch.dtype, attention: str
) -> Any:
    model, info = model_class.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    found = (info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    _require_all(folder, *([_name(key) for key in keys] for keys in found))
    return model


def _name(key: Any) -> str:
    """A tensor's name; transformers reports a mismatched one with its two shapes."""
    return key if isinstance(key, str) else str(key[0])


def _load_foreign(folder: Path, dtype: torch.dtype, attention: str) -> LlavaHD:
    """Our model around the loaded modules of transformers' one; no tensor is copied twice."""
    config = read_config(folder)
    model_class = FOREIGN[read_config_json(folder)["model_type"]]
    theirs = _from_transformers(model_class, folder, dtype, attention)
    text = theirs.config.text_config
    text.tie_word_embeddings = theirs.config.tie_word_embeddings  # transformers obeys the outer one
    causal_lm = _on_meta(text)
    setattr(causal_lm, causal_lm.base_model_prefix, theirs.model.language_model)
    causal_lm.set_output_embeddings(theirs.lm_head)
    causal_lm.set_attn_implementation(attention)
    model = LlavaHD(config, theirs.model.vision_tower, causal_lm)
    linears = theirs.model.multi_modal_projector
    model.projector.weight_1.data = linears.linear_1.weight.data
    model.projector.bias_1.data = linears.linear_1.bias.data
    model.projector.weight_2.data = linears.linear_2.weight.data
    model.projector.bias_2.data = linears.linear_2.bias.data
    if config.hd.row_end:
        model.projector.row_end = torch.nn.Parameter(theirs.model.image_newline.data)
    return cast_own_parts(model, dtype)
