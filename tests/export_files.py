"""Tiny models of ours and their exports, for the tests of export and processor."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import sentencepiece
from tiny import save_parts, tiny_hd

from llava_hd.hd.grid import HDConfig
from llava_hd.model.assemble import assemble
from llava_hd.model.export import export_folder


def geometry(preset: str) -> tuple[HDConfig, int]:
    """A preset in small, with its tile; "base" is base336 with a tile of 84 px."""
    if preset == "base":
        return replace(tiny_hd("base336"), tile_px=84), 84
    return tiny_hd(preset), 56


def native(
    folder: Path, preset: str, tied: bool = False, legacy: bool | None = None, **options: object
) -> Path:
    """A random model folder of ours; legacy: with a Llama tokenizer of that setting."""
    hd, tile_px = geometry(preset)
    parts = save_parts(folder.with_name(f"{folder.name}-parts"), image_px=tile_px, tied=tied)
    if legacy is not None:
        write_llama_tokenizer(parts / "language", legacy)
    model, processor = assemble(
        vision=parts / "vision", language=parts / "language", hd=hd, **options
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_llama_tokenizer(folder: Path, legacy: bool) -> None:
    """A SentencePiece model in place of the folder's tokenizer, as Vicuna has one."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    words = "USER: is the cat red? ASSISTANT: Yes it is the dog No what colour"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words] * 50),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "unk_token": "<unk>"}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def exported(folder: Path, out: Path, format: str) -> Path:
    """The export of a model folder."""
    export_folder(folder, out, format)
    return out
