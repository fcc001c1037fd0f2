"""New models from parts: vocabulary, hand-over of the projector, and faults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import save_parts, tiny_hd, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from llava_hd.hd.errors import DataError, UsageError
from llava_hd.model.assemble import add_image_token, assemble
from llava_hd.model.llava_hd import LlavaHD


def build(parts: Path, **options):
    options = {"hd": tiny_hd("hd448"), **options}
    return assemble(vision=parts / "vision", language=parts / "language", **options)


@pytest.mark.parametrize("tied", [False, True])
def test_image_and_pad_join_the_vocabulary_as_average_words(tied: bool, tmp_path: Path) -> None:
    parts = save_parts(tmp_path, tied=tied)
    model = AutoModelForCausalLM.from_pretrained(parts / "language")
    tokenizer = AutoTokenizer.from_pretrained(parts / "language")
    backend = tiny_tokenizer()  # the same words without <image> and without padding
    tokenizer = type(tokenizer)(
        tokenizer_object=backend.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_tokens([f"extra{i}" for i in range(320 - len(tokenizer))])
    before = model.get_input_embeddings().weight.detach().clone()
    image_id = add_image_token(tokenizer, model)
    after = model.get_input_embeddings().weight
    assert tokenizer.convert_ids_to_tokens(image_id) == "<image>"
    assert image_id < after.shape[0] and after.shape[0] % 64 == 0
    assert torch.equal(after[:320], before)
    if after.shape[0] > 320:
        torch.testing.assert_close(after[-1], before.mean(0))
    assert tokenizer("<image>", add_special_tokens=False).input_ids == [image_id]
    assert tokenizer.pad_token is not None


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
