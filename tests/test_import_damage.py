"""llava-hd import: folders whose parts contradict each other, and damaged configurations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from export_files import write_llama_tokenizer
from interop_files import (
    SINGLE_VIEW,
    change,
    llava_model,
    next_model,
    write_clip,
    write_language,
    write_original,
    write_safetensors,
    write_transformers,
)
from safetensors.torch import load_file
from tiny import tiny_tokenizer

from llava_hd.cli.main import main
from llava_hd.hd.errors import LlavaHDError
from llava_hd.model.import_folder import import_folder
from llava_hd.model.processor import Processor


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    values = json.loads(file.read_text())
    edit(values)
    file.write_text(json.dumps(values))


def refused(words: str, source: Path | None, out: Path, **options: Any) -> None:
    """Importing raises one line with these words and writes nothing."""
    with pytest.raises(LlavaHDError, match=words) as error:
        import_folder(source, out, **options)
    assert "\n" not in str(error.value) and not out.exists()


@pytest.fixture(name="theirs")
def theirs_fixture(tmp_path: Path) -> Path:
    write_transformers(next_model(), tmp_path / "theirs", "4.47", write_safetensors, 1)
    return tmp_path / "theirs"


def test_a_head_that_is_said_to_be_tied_and_is_not_is_never_dropped(
    theirs: Path, tmp_path: Path
) -> None:
    edit_json(theirs / "config.json", lambda v: v.update(tie_word_embeddings=True))
    refused("says tie_word_embeddings.*set it to false", theirs, tmp_path / "a")
    model = llava_model()
    clip = write_clip(model, tmp_path / "clip")
    write_original(model, tmp_path / "original", tie_word_embeddings=True)
    refused("says tie_word_embeddings", tmp_path / "original", tmp_path / "b", vision=clip)
    base = write_language(model, tmp_path / "base")
    edit_json(base / "config.json", lambda v: v.update(tie_word_embeddings=True))
    parts = {"vision": clip, "language": base, "hd": SINGLE_VIEW}
    refused("tie_word_embeddings is true", None, tmp_path / "c", **parts)


def test_a_tied_head_that_is_stored_again_is_left_out(theirs: Path, tmp_path: Path) -> None:
    edit_json(theirs / "config.json", lambda v: v.update(tie_word_embeddings=True))
    head, table = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    change(theirs, lambda s: s.update({head: s[table].clone()}))
    report = import_folder(theirs, tmp_path / "ours")
    assert report.left_out == ("language.causal_lm.lm_head.weight",)


def test_layers_that_a_parts_configuration_does_not_have_are_named(tmp_path: Path) -> None:
    model = llava_model()
    parts = {
        "vision": write_clip(model, tmp_path / "clip"),
        "language": write_language(model, tmp_path / "base"),
        "hd": SINGLE_VIEW,
    }
    edit_json(tmp_path / "base" / "config.json", lambda v: v.update(num_hidden_layers=1))
    refused(r"base has an unknown tensor model.layers.1\.", None, tmp_path / "ours", **parts)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(
    value: float, theirs: Path, tmp_path: Path
) -> None:
    change(theirs, lambda s: s["image_newline"].__setitem__(3, value))
    refused("projector.row_end holds numbers that are not finite", theirs, tmp_path / "ours")


def test_numbers_too_large_for_the_wanted_type_are_refused(theirs: Path, tmp_path: Path) -> None:
    change(theirs, lambda s: s["image_newline"].__setitem__(3, 1e5))
    refused("not finite as torch.float16", theirs, tmp_path / "ours", dtype="fp16")


def test_words_beyond_the_vocabulary_get_rows(theirs: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(330 - len(tokenizer))])
    tokenizer.save_pretrained(theirs)
    assert import_folder(theirs, tmp_path / "ours").rows == 384
    state = load_file(tmp_path / "ours" / "model.safetensors")
    assert len(state["language.causal_lm.model.embed_tokens.weight"]) == 384
    config = Processor.from_pretrained(tmp_path / "ours").config
    assert config.text["vocab_size"] == 384


def test_a_tokenizer_without_words_or_end_is_named(theirs: Path, tmp_path: Path) -> None:
    edit_json(theirs / "tokenizer_config.json", lambda v: v.pop("eos_token"))
    refused("names no eos_token", theirs, tmp_path / "ours")
    write_llama_tokenizer(theirs, legacy=True)
    (theirs / "tokenizer.model").unlink()
    refused("no tokenizer with words; copy tokenizer.json", theirs, tmp_path / "ours")


def test_the_sentencepiece_file_goes_along(tmp_path: Path) -> None:
    model = llava_model()
    write_original(model, tmp_path / "theirs")
    write_llama_tokenizer(tmp_path / "theirs", legacy=True)
    pieces = (tmp_path / "theirs" / "tokenizer.model").read_bytes()
    import_folder(
        tmp_path / "theirs", tmp_path / "ours", vision=write_clip(model, tmp_path / "clip")
    )
    out = tmp_path / "out"
    words = ["export", str(tmp_path / "ours"), "--format", "llava", "--out", str(out)]
    assert main(words) == 0
    assert (out / "tokenizer.model").read_bytes() == pieces


@pytest.mark.parametrize(
    "edit",
    [
        lambda v: v["text_config"].update(num_attention_heads="four"),
        lambda v: v["text_config"].update(hidden_act="x"),
        lambda v: v["text_config"].update(model_type=None),
        lambda v: v["vision_config"].update(hidden_size=-1),
        lambda v: v["vision_config"].update(model_type="siglip_vision_model"),
        lambda v: v.update(image_grid_pinpoints=[[56]]),
        lambda v: v.update(image_grid_pinpoints=[]),
        lambda v: v.update(vision_config=3),
        lambda v: v.update(tie_word_embeddings={}),
        lambda v: v.update(model_type=3),
    ],
)
def test_a_damaged_config_is_one_line(
    edit: Callable[[dict[str, Any]], object], theirs: Path, tmp_path: Path
) -> None:
    edit_json(theirs / "config.json", edit)
    refused("config.json", theirs, tmp_path / "ours")


@pytest.mark.parametrize("text", ["", "[]", "null", '{"tokenizer_class": 3}', '{"eos_token": 3}'])
def test_a_damaged_tokenizer_config_is_one_line(text: str, theirs: Path, tmp_path: Path) -> None:
    (theirs / "tokenizer_config.json").write_text(text)
    refused("token", theirs, tmp_path / "ours")


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": 3}, {"hidden_size": "x"}, {"hidden_act": "x"}, {"torch_dtype": "x"},
        {"num_attention_heads": 0}, {"image_aspect_ratio": "anyres", "image_grid_pinpoints": 3,
        "mm_patch_merge_type": "spatial_unpad"},
    ],
)  # fmt: skip
def test_a_damaged_original_config_is_one_line(changes: dict[str, object], tmp_path: Path) -> None:
    model = llava_model()
    write_original(model, tmp_path / "theirs", **changes)
    clip = write_clip(model, tmp_path / "clip")
    refused("config.json|lacks", tmp_path / "theirs", tmp_path / "ours", vision=clip)


def test_a_part_alone_is_told_how_parts_are_put_together(tmp_path: Path) -> None:
    base = write_language(llava_model(), tmp_path / "base")
    refused("--vision DIR --language DIR --preset", base, tmp_path / "ours")
