"""New models from parts: vocabulary, hand-over of the projector, and faults."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import torch
from tiny import random_image, save_parts, tiny_hd
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from llava_hd.hd.errors import DataError, UsageError
from llava_hd.model.assemble import add_image_token, assemble
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.processor import Processor
from llava_hd.model.prompt import Turn


def build(parts: Path, **options):
    options = {"hd": tiny_hd("hd448"), **options}
    return assemble(vision=parts / "vision", language=parts / "language", **options)


@pytest.mark.parametrize("tied", [False, True])
def test_image_and_pad_join_the_vocabulary_as_average_words(tied: bool, tmp_path: Path) -> None:
    parts = save_parts(tmp_path, tied=tied)
    model = AutoModelForCausalLM.from_pretrained(parts / "language")
    tokenizer = word_tokenizer(320)  # as many words as rows, no <image>, no padding
    tables = (model.get_input_embeddings, model.get_output_embeddings)
    before = [table().weight.detach().clone() for table in tables]
    image_id = add_image_token(tokenizer, model)
    assert image_id == 320 and len(tokenizer) == 322
    assert tokenizer("<image>", add_special_tokens=False).input_ids == [image_id]
    assert tokenizer.pad_token is not None
    for table, old in zip(tables, before, strict=True):
        new = table().weight
        assert new.shape[0] == 384  # the next multiple of 64
        assert torch.equal(new[:320], old)
        torch.testing.assert_close(new[320:], old.mean(0).expand(64, -1))
    assert model.config.vocab_size == 384


def word_tokenizer(count: int) -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", *(f"word{i}" for i in range(count - 3))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("legacy", [True, False])
def test_training_and_evaluation_split_a_llama_prompt_alike(legacy: bool, tmp_path: Path) -> None:
    parts = save_parts(tmp_path)
    language = parts / "language"
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (language / name).unlink(missing_ok=True)
    words = "USER: is the cat red? ASSISTANT: Yes it is the dog No what colour"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words] * 50),
        model_prefix=str(language / "tokenizer"),
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "unk_token": "<unk>"}
    settings |= {"bos_token": "<s>", "eos_token": "</s>"}
    (language / "tokenizer_config.json").write_text(json.dumps(settings))
    model, processor = build(parts)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    again = Processor.from_pretrained(tmp_path / "model")
    turns = [Turn("human", "<image>\nis the cat red?"), Turn("gpt", "Yes"), Turn("human", "what")]
    turns.append(Turn("gpt", "No </s> dog"))
    image = random_image((60, 60))
    trained, loaded = (p.conversation(turns, [image]) for p in (processor, again))
    assert trained.ids == loaded.ids and trained.labels == loaded.labels
    assert max(trained.ids) < model.language.causal_lm.config.vocab_size


def test_the_row_end_starts_at_the_size_of_a_unit_vector(parts: Path) -> None:
    ends = torch.cat([build(parts, seed=seed)[0].row_end.detach() for seed in range(40)])
    assert abs(ends.std() * 48**0.5 - 1) < 0.1 and abs(ends.mean()) < 0.02


def test_a_layer_outside_the_tower_is_refused(parts: Path) -> None:
    with pytest.raises(UsageError, match="vision_layer -5 is outside the tower's 3 layers"):
        build(parts, vision_layer=-5)


def test_a_language_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    parts = save_parts(tmp_path)
    for path in (parts / "language").glob("*token*"):
        path.unlink()
    with pytest.raises(
        UsageError, match=r"the tokenizer of model folder .* cannot be read"
    ) as error:
        build(parts)
    assert "\n" not in str(error.value)


def test_damaged_language_weights_are_named_in_one_line(tmp_path: Path) -> None:
    parts = save_parts(tmp_path)
    file = parts / "language" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UsageError, match="cannot be read as a part") as error:
        build(parts)
    assert "\n" not in str(error.value)


def test_the_seed_decides_the_projector_and_leaves_the_global_generator_alone(parts: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (build(parts, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.rand(1) == expected
    assert torch.equal(first.projector.weight_1, again.projector.weight_1)
    assert torch.equal(first.row_end, again.row_end)
    assert not torch.equal(first.projector.weight_1, other.projector.weight_1)


def test_stage_2_takes_over_projector_and_row_end(parts: Path, tmp_path: Path) -> None:
    one_tile = replace(tiny_hd("hd448"), grids=())
    stage_1, _ = build(parts, hd=one_tile, seed=1)
    stage_1.save_pretrained(tmp_path)
    stage_2, _ = build(parts, seed=2, projector_from=tmp_path)
    for name, tensor in stage_1.projector.state_dict().items():
        assert torch.equal(tensor, stage_2.projector.state_dict()[name])
    assert torch.equal(stage_1.row_end, stage_2.row_end)


def test_a_projector_of_another_kind_is_refused(parts: Path, tmp_path: Path) -> None:
    build(parts, projector="linear")[0].save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"need the same model\.projector"):
        build(parts, projector_from=tmp_path)


@pytest.mark.parametrize("part", ["vision", "language"])
def test_a_missing_part_is_named(parts: Path, tmp_path: Path, part: str) -> None:
    folders = {"vision": parts / "vision", "language": parts / "language"}
    folders[part] = tmp_path / "nowhere"
    with pytest.raises(UsageError, match="nowhere is not a folder"):
        assemble(**folders, hd=tiny_hd("hd448"))


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no config\.json"):
        LlavaHD.from_pretrained(tmp_path)
