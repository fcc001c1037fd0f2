"""`llava-hd import`: others' checkpoints as a model folder of ours. A rename: no number changes
but for new rows of the vocabulary and a LoRA adapter that is added to its base.

Every tensor is placed or named in an error, and what no checkpoint holds is said to be untrained.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..hd.errors import DataError, UsageError
from ..hd.grid import HDConfig
from .adapter_config import ADAPTER_TYPE
from .assemble import VOCABULARY_MULTIPLE, as_saved, assemble, give_image_token
from .config import MODEL_TYPE, LlavaHDConfig, read_config_json
from .import_notes import check_preprocessor, template_note
from .import_original import original_state, projector_kind, read_projector, tower_config
from .key_names import EMBEDDING, HEAD, LANGUAGE, PROJECTOR
from .native_state import DTYPES, Gathered, check_complete, drop_tied_head, dtype_name, native_state
from .original import is_original
from .processor import Processor, read_sentencepiece, read_tokenizer
from .prompt import IMAGE_TAG, get_template
from .tensor_files import file_tensors, folder_tensors, weight_files
from .whole_folder import save_tensors, whole_folder, write_json


@dataclass(frozen=True)
class ImportReport:
    """What was written. left_out: tensors that no model needs (buffers, CLIP's text half, a tied
    head); untrained: tensors that no checkpoint held, new and random; rows: of the vocabulary;
    notes: what the folder says otherwise than the model that was made of it."""

    out: str
    kind: str
    tensors: int
    dtype: str
    rows: int
    left_out: tuple[str, ...]
    untrained: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Found:
    kind: str
    config: LlavaHDConfig
    state: dict[str, Tensor]
    tokenizer: Any
    left_out: list[str]
    sentencepiece: bytes | None
    untrained: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def import_folder(
    source: str | Path | None,
    out: str | Path,
    *,
    vision: str | Path | None = None,
    language: str | Path | None = None,
    projector: str | Path | None = None,
    hd: HDConfig | None = None,
    template: str | None = None,
    dtype: str = "auto",
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> ImportReport:
    """Write a checkpoint as a model folder of ours to `out`, a new folder: whole, or not at all.

    source: transformers' llava or llava_next, or an original LLaVA folder (whole, LoRA, stage 1);
    None: the parts `vision`, `language` and perhaps `projector`, with geometry `hd`. dtype: "auto"
    (as stored), "fp32", "bf16" or "fp16". Raises UsageError and DataError.
    """
    target = Path(out)
    paths = [None if path is None else Path(path) for path in (source, vision, language, projector)]
    folder, tower, base, linears = paths
    wanted = None if dtype == "auto" else DTYPES[dtype]
    say("reading")
    if folder is None:
        found = _parts(tower, base, linears, hd, template or "vicuna_v1", wanted, seed)
    else:
        if linears is not None or hd is not None:
            raise UsageError("--projector and --preset are for parts alone; the folder has its own")
        found = _folder(folder, tower, base, template, wanted)
    with whole_folder(target) as unfinished:
        say(f"writing {target}")
        save_tensors(found.state, unfinished)
        write_json(unfinished / "config.json", found.config.to_dict())
        processor = Processor(found.tokenizer, found.config, sentencepiece=found.sentencepiece)
        processor.save_pretrained(unfinished)
    return ImportReport(
        out=str(target),
        kind=found.kind,
        tensors=len(found.state),
        dtype=dtype_name(found.state),
        rows=found.config.text["vocab_size"],
        left_out=tuple(found.left_out),
        untrained=found.untrained,
        notes=found.notes,
    )


def _folder(
    folder: Path,
    vision: Path | None,
    language: Path | None,
    template: str | None,
    dtype: torch.dtype | None,
) -> _Found:
    values = read_config_json(folder)
    if values["model_type"] in (MODEL_TYPE, ADAPTER_TYPE):
        raise UsageError(f"{folder} is a model of ours already; every command reads it as it is")
    if is_original(values):
        return _original(folder, vision, language, template or "vicuna_v1", dtype)
    if vision is not None or language is not None:
        raise UsageError(f"{folder} holds all parts; --vision and --language are not for it")
    config, gathered = native_state(folder, dtype)
    notes = check_preprocessor(folder, config.hd)
    config = replace(config, template=_template(folder, template, config.text["model_type"]))
    config = _with_ends(config, folder)
    tokenizer = read_tokenizer(folder, config.text)
    notes += template_note(folder, tokenizer, config.template)
    # Some folders count on the row alone; here `<image>` must be a word of the tokenizer.
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TAG)
    if IMAGE_TAG not in tokenizer.get_vocab() or image_id != config.image_token_id:
        raise DataError(
            f"{folder}: the tokenizer has {IMAGE_TAG} as {image_id}, config.json says "
            f"{config.image_token_id} (image_token_index); copy the tokenizer files that fit"
        )
    give_image_token(tokenizer)
    tokenizer = as_saved(tokenizer)
    tied = bool(config.text.get("tie_word_embeddings"))
    rows = enlarge(folder, gathered, _words(tokenizer), tied)
    config = replace(config, text={**config.text, "vocab_size": rows})
    kind, pieces = f"transformers {values['model_type']}", read_sentencepiece(folder)
    return _Found(
        kind, config, gathered.state, tokenizer, gathered.left_out, pieces, notes=tuple(notes)
    )


def _template(folder: Path, template: str | None, kind: str) -> str:
    """The conversation template; Vicuna's for a LLaMA, which others must be told."""
    if template is None and kind != "llama":
        raise UsageError(
            f"{folder} has a language model of type {kind}, whose prompts may not be Vicuna's; "
            "give --template vicuna_v1 if it was trained with them"
        )
    get_template(template or "vicuna_v1")
    return template or "vicuna_v1"


def _original(
    folder: Path,
    vision: Path | None,
    language: Path | None,
    template: str,
    dtype: torch.dtype | None,
) -> _Found:
    original, gathered = original_state(folder, vision, language, dtype)
    own = any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))
    home = folder if own or language is None else language
    tokenizer = read_tokenizer(home, original.text)
    give_image_token(tokenizer)
    tokenizer = as_saved(tokenizer)
    text = dict(original.text)
    tied = bool(text.get("tie_word_embeddings"))
    text["vocab_size"] = enlarge(folder, gathered, _words(tokenizer), tied)
    assert original.vision is not None
    config = LlavaHDConfig(
        hd=original.hd,
        vision=tower_config(original.vision),
        text=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TAG),
        projector=original.projector,
        vision_layer=original.vision_layer,
        template=template,
    )
    config = _with_ends(config, home)
    drop_tied_head(folder, gathered, config)
    check_complete(folder, gathered.state, config)
    pieces = read_sentencepiece(home)
    return _Found("original LLaVA", config, gathered.state, tokenizer, gathered.left_out, pieces)


def _words(tokenizer: Any) -> int:
    """The rows that a tokenizer needs; its ids may have holes."""
    return max(tokenizer.get_vocab().values()) + 1


def enlarge(folder: Path, gathered: Gathered, words: int, tied: bool) -> int:
    """Make room for `words` in the vocabulary's tables: a multiple of 64 rows, new ones the mean of
    the old, as assemble.py does; the number of rows."""
    names = [EMBEDDING] if tied else [EMBEDDING, HEAD]
    for name in names:
        if name not in gathered.state:
            raise DataError(f"model folder {folder} lacks {name.removeprefix(LANGUAGE)}")
    old = len(gathered.state[EMBEDDING])
    rows = max(old, -(-words // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE) if words > old else old
    for name in names if rows > old else ():
        table = gathered.state[name]
        new = table.float().mean(0).to(table.dtype).expand(rows - len(table), -1)
        gathered.state[name] = torch.cat([table, new])
    return rows


def _with_ends(config: LlavaHDConfig, folder: Path) -> LlavaHDConfig:
    """The end tokens of generation_config.json, where some models name all of theirs."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return config
    try:
        ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}); copy the model again") from error
    return config if ends is None else replace(config, text={**config.text, "eos_token_id": ends})


def _parts(
    vision: Path | None,
    language: Path | None,
    projector: Path | None,
    hd: HDConfig | None,
    template: str,
    dtype: torch.dtype | None,
    seed: int,
) -> _Found:
    if vision is None or language is None or hd is None:
        raise UsageError("parts alone need --vision, --language and --preset; or give a folder")
    for folder in (vision, language):
        read_config_json(folder)
        _refuse_code(folder)
    taken = {} if projector is None or _is_ours(projector) else read_projector(projector)
    ours = projector if projector is not None and not taken else None
    if dtype is None:
        dtype = next(tensor.dtype for _, tensor in folder_tensors(language))
    model, processor = assemble(
        vision=vision,
        language=language,
        hd=hd,
        projector=projector_kind(taken) if ours is None else read_config_json(ours)["projector"],
        projector_from=ours,
        template=template,
        seed=seed,
        dtype=dtype,
        attention="sdpa",
    )
    state = dict(model.state_dict())
    own = {name for name in state if name.startswith(PROJECTOR)}
    for name, tensor in taken.items():
        if name not in own or state[name].shape != tensor.shape:
            raise DataError(
                f"{projector}: {name} {tuple(tensor.shape)} does not fit the parts; "
                "it was made for another tower or language model"
            )
        state[name] = tensor.to(dtype)
    held = set(taken) if ours is None else {name for name, _ in folder_tensors(ours)}
    untrained = tuple(sorted(own - held))
    gathered = Gathered(state)
    drop_tied_head(language, gathered, model.config)
    check_complete(language, gathered.state, model.config)
    return _Found(
        "parts",
        model.config,
        state,
        processor.tokenizer,
        gathered.left_out,
        processor.sentencepiece,
        untrained,
    )


def _is_ours(projector: Path) -> bool:
    config = projector / "config.json"
    return config.is_file() and read_config_json(projector)["model_type"] == MODEL_TYPE


def _refuse_code(folder: Path) -> None:
    """DataError for a .bin that is more than tensors, before any library opens it."""
    for file in weight_files(folder):
        if file.suffix == ".bin":
            for _ in file_tensors(file):
                break
