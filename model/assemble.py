"""A new model from a CLIP folder, a language model folder and, for stage 2, a stage-1 folder."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    PreTrainedModel,
)

from ..hd.errors import DataError, UsageError
from ..hd.grid import HDConfig
from .attention import implementation
from .config import LlavaHDConfig, read_config_json
from .foreign import config_dict
from .key_names import NOT_THE_TOWER, ROW_END, is_computed
from .language import check_supported
from .llava_hd import LlavaHD
from .processor import Processor, read_sentencepiece, read_tokenizer
from .prompt import IMAGE_TAG, get_template
from .weights import cast_own_parts, quiet_transformers, read_state

VOCABULARY_MULTIPLE = 64


def assemble(
    *,
    vision: str | Path,
    language: str | Path,
    hd: HDConfig,
    projector: str = "mlp2x_gelu",
    projector_from: str | Path | None = None,
    template: str = "vicuna_v1",
    vision_layer: int = -2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attention: str = "auto",
) -> tuple[LlavaHD, Processor]:
    """A model and its processor.

    The tower and the language model are read as transformers reads them; a vocabulary without
    `<image>` and padding is enlarged (to a multiple of 64, new rows = mean of the old ones). The
    projector and the row-end begin at random from `seed`, or come from `projector_from`.
    """
    get_template(template)
    for folder in (vision, language):
        read_config_json(folder)
    _check_language(language, attention)
    with quiet_transformers():
        clip = _load(CLIPVisionModel, vision, dtype, attention)
        causal_lm = _load(AutoModelForCausalLM, language, dtype, attention)
        tokenizer = read_tokenizer(language)
        image_token_id = add_image_token(tokenizer, causal_lm)
        tokenizer = as_saved(tokenizer)
    ends = causal_lm.generation_config.eos_token_id
    if ends is not None:
        causal_lm.config.eos_token_id = ends  # some models name all their end tokens only there
    config = LlavaHDConfig(
        hd=hd,
        vision=config_dict(clip.config),
        text=config_dict(causal_lm.config),
        image_token_id=image_token_id,
        projector=projector,
        vision_layer=vision_layer,
        template=template,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaHD(config, clip, causal_lm)
    if projector_from is not None:
        take_projector(model, projector_from)
    return cast_own_parts(model, dtype), Processor(
        tokenizer, config, sentencepiece=read_sentencepiece(language)
    )


def add_image_token(tokenizer: Any, causal_lm: PreTrainedModel) -> int:
    """Make sure of `<image>` and a padding token inside the vocabulary; the id of `<image>`."""
    new = give_image_token(tokenizer)
    rows = causal_lm.get_input_embeddings().num_embeddings
    if new or len(tokenizer) > rows:
        wanted = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        _enlarge(causal_lm, max(wanted, rows))
    return tokenizer.convert_tokens_to_ids(IMAGE_TAG)


def give_image_token(tokenizer: Any) -> list[str]:
    """Make sure that a tokenizer knows `<image>` and a padding token; the words that are new."""
    vocabulary = tokenizer.get_vocab()
    new = [IMAGE_TAG] if IMAGE_TAG not in vocabulary else []
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [IMAGE_TAG]}, replace_extra_special_tokens=False
    )
    if tokenizer.pad_token is None:
        new.append("<pad>")
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return new


def take_projector(model: LlavaHD, folder: str | Path) -> None:
    """Copy projector and row-end from a stage-1 folder of ours."""
    read_config_json(folder)
    state = read_state(Path(folder), prefixes=("projector.",))
    ours = {k: v for k, v in model.state_dict().items() if k.startswith("projector.")}
    if not set(state) - {ROW_END}:
        raise UsageError(f"model folder {folder} holds no projector; give the folder of a stage 1")
    for name, tensor in state.items():
        if name in ours and ours[name].shape != tensor.shape:
            raise DataError(
                f"model folder {folder}: {name} is {tuple(tensor.shape)}, this model's is "
                f"{tuple(ours[name].shape)}; stage 1 was made for other parts"
            )
    # A stage 1 without row-ends may precede a model that has them: theirs is learned in stage 2.
    missing = [k for k in ours if k not in state and k != ROW_END]
    unknown = [k for k in state if k not in ours and k != ROW_END]
    if missing or unknown:
        raise DataError(
            f"model folder {folder}: its projector has other tensors ({(missing + unknown)[0]}); "
            "stage 1 and stage 2 need the same model.projector"
        )
    model.load_state_dict({k: v for k, v in state.items() if k in ours}, strict=False)


def _check_language(folder: str | Path, attention: str) -> None:
    """Refuse a kind of language model that cannot be used, before its weights are read."""
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    except ValueError as error:
        text = str(error).strip().splitlines()[0]
        raise UsageError(f"model folder {folder} holds no causal language model: {text}") from error
    check_supported(empty, implementation(attention))


def as_saved(tokenizer: Any) -> Any:
    """The tokenizer as it comes back from a saved model folder.

    transformers drops settings (Llama's `legacy`) when it saves, so the two may split words
    differently behind special tokens; training must use what evaluation will load.
    """
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)


def _load(kind: Any, folder: str | Path, dtype: torch.dtype, attention: str) -> Any:
    """A part from its folder; DataError when a tensor would stay random, or has no place.

    Published parts are safetensors or .bin files; transformers unpickles the latter with
    weights_only, which runs no code of theirs.
    """
    try:
        # what transformers would report about tensors is refused, or known, below
        with quiet_transformers(reports=False):
            part, info = kind.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=implementation(attention),
                output_loading_info=True,
            )
    except (OSError, ValueError, SafetensorError) as error:
        text = str(error).strip().splitlines()[0]
        raise UsageError(f"model folder {folder} cannot be read as a part: {text}") from error
    random = [*info["missing_keys"], *info["mismatched_keys"]]
    if random:
        raise DataError(f"model folder {folder} lacks {random[0]} ({len(random)} such)")
    known = NOT_THE_TOWER if kind is CLIPVisionModel else ()
    strange = sorted(
        name
        for name in info["unexpected_keys"]
        if not (name.startswith(known) or is_computed(name))
    )
    if strange:
        raise DataError(
            f"model folder {folder} has an unknown tensor {strange[0]} ({len(strange)} such); its "
            "config.json and its weights do not belong together"
        )
    return part


def _enlarge(causal_lm: PreTrainedModel, size: int) -> None:
    """Resize the vocabulary; new rows are the mean of the old ones, an average word."""
    old = causal_lm.get_input_embeddings().num_embeddings
    causal_lm.resize_token_embeddings(size, mean_resizing=False)
    for table in (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()):
        table.weight.data[old:] = table.weight.data[:old].float().mean(0).to(table.weight.dtype)
