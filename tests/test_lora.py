"""LoRA: adapter folders, merging, and their oracle, peft on a plain transformers model."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import peft
import pytest
import torch
from lora_models import built, give_adapter
from safetensors.torch import load_file
from tiny import save_parts
from transformers import AutoModelForCausalLM

from llava_hd.hd.errors import DataError, LlavaHDError, UsageError
from llava_hd.model import merge
from llava_hd.model.adapter import base_digest, load_adapter
from llava_hd.model.adapter_config import BaseFolders
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.lora import adapter_parameters, add_lora, linears
from llava_hd.model.merge import merge_folder, random_packs
from llava_hd.model.processor import Processor
from llava_hd.train.optimizer import freeze

ROOT = Path(__file__).resolve().parent.parent
LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, parts) -> Path:
    """The folder of an adapter on the tiny parts."""
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    model, processor = built(parts)
    give_adapter(model, BaseFolders(vision=f"{parts}/vision", language=f"{parts}/language"))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def logits(model: LlavaHD) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model.eval().logits(batch) for batch in random_packs(model.config)]


def test_every_linear_of_the_decoder_is_adapted_and_nothing_else(parts):
    model, _ = built(parts)
    causal_lm = model.language.causal_lm
    assert {name.rpartition(".")[2] for name in linears(causal_lm)} == LLAMA
    count = len(linears(causal_lm))
    give_adapter(model, BaseFolders(path="."))
    adapted = {name.partition(".lora_")[0] for name in adapter_parameters(causal_lm)}
    assert len(adapted) == count == 2 * len(LLAMA)
    assert not any("lm_head" in name or "embed" in name for name in adapted)
    assert causal_lm.get_output_embeddings() is model.language.head


def test_a_new_adapter_changes_nothing_and_depends_on_the_seed_alone(parts):
    model, _ = built(parts)
    before = logits(model)
    twins = [copy.deepcopy(model.language.causal_lm) for _ in range(3)]
    rng = torch.get_rng_state()
    for twin, seed in zip(twins, (1, 1, 2), strict=True):
        add_lora(
            twin, r=4, alpha=8, dropout=0.5, target_modules=None, seed=seed, dtype=torch.float32
        )
    assert torch.equal(rng, torch.get_rng_state())
    one, same, other = ([*adapter_parameters(twin).values()] for twin in twins)
    assert all(map(torch.equal, one, same)) and not all(map(torch.equal, one, other))
    model.language.causal_lm = twins[0]
    assert all(map(torch.equal, before, logits(model)))


def test_a_target_that_is_no_linear_of_the_decoder_is_named(parts):
    model, _ = built(parts)
    with pytest.raises(UsageError, match=r"target_modules: 'lm_head' is no linear .* down_proj"):
        add_lora(
            model.language.causal_lm,
            r=4,
            alpha=8,
            dropout=0.0,
            target_modules=["q_proj", "lm_head"],
            seed=0,
            dtype=torch.float32,
        )


def test_an_adapter_comes_back_with_its_base_to_the_last_bit(adapter, parts):
    model, _ = built(parts)
    give_adapter(model, BaseFolders(path="."))
    loaded = LlavaHD.from_pretrained(adapter)
    assert all(map(torch.equal, logits(model), logits(loaded)))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert {p.name for p in adapter.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "projector.safetensors",
        "config.json",
    }
    assert Processor.from_pretrained(adapter).config == loaded.config
    names = set(load_file(adapter / "projector.safetensors"))
    assert "projector.row_end" in names and all(name.startswith("projector.") for name in names)


def test_a_loaded_adapter_is_saved_again_the_same(adapter, tmp_path):
    LlavaHD.from_pretrained(adapter).save_pretrained(tmp_path / "again")
    for file in ("adapter_model.safetensors", "projector.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (adapter / file).read_bytes(), file


def plain_with_peft(adapter: Path, parts: Path) -> peft.PeftModel:
    """The oracle: the untouched language model with our folder, read by peft alone."""
    plain = AutoModelForCausalLM.from_pretrained(parts / "language", dtype=torch.float32)
    return peft.PeftModel.from_pretrained(plain, str(adapter)).eval()


@torch.no_grad()
def test_peft_reads_the_folder_and_computes_the_same(adapter, parts):
    theirs = plain_with_peft(adapter, parts)
    ours = LlavaHD.from_pretrained(adapter)
    (_, text) = random_packs(ours.config)
    found = ours.logits(text)
    for start, stop in zip(text.cu_seqlens[:-1], text.cu_seqlens[1:], strict=True):
        due = theirs(input_ids=text.ids[None, start:stop]).logits[0]
        torch.testing.assert_close(found[start:stop, : due.shape[1]], due, atol=1e-5, rtol=1e-5)


def test_the_merged_weights_are_those_of_pefts_own_merge_and_of_the_formula(
    adapter, parts, tmp_path
):
    report = merge_folder(adapter, tmp_path / "merged")
    assert report.max_relative <= 1e-5 and report.linears == 2 * len(LLAMA)
    merged = LlavaHD.from_pretrained(tmp_path / "merged")
    assert merged.adapter is None
    ours = merged.language.causal_lm.state_dict()
    theirs = plain_with_peft(adapter, parts).merge_and_unload().state_dict()
    before = AutoModelForCausalLM.from_pretrained(parts / "language").state_dict()
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in before:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0)
        due = before[name].double()
        low = "base_model.model." + name.removesuffix("weight") + "lora_{}.weight"
        if low.format("A") in tensors:
            b, a = tensors[low.format("B")].double(), tensors[low.format("A")].double()
            due = due + 8 / 4 * b @ a
            assert not torch.equal(ours[name], before[name])
        torch.testing.assert_close(ours[name].double(), due, atol=1e-6, rtol=0)


def test_the_merged_model_answers_as_the_adapter_does(adapter, tmp_path):
    report = merge_folder(adapter, tmp_path / "merged")
    pairs = zip(
        logits(LlavaHD.from_pretrained(adapter)),
        logits(LlavaHD.from_pretrained(tmp_path / "merged")),
        strict=True,
    )
    worst = max(float((one - other).abs().max()) for one, other in pairs)
    assert worst <= 2 * report.max_difference + 1e-6
    assert Processor.from_pretrained(tmp_path / "merged").tokenizer("the cat").input_ids


def test_merged_weights_may_be_written_in_bf16(adapter, tmp_path):
    report = merge_folder(adapter, tmp_path / "merged", dtype=torch.bfloat16)
    assert report.dtype == "bfloat16" and report.max_relative < 1e-4 < report.rounded
    state = load_file(tmp_path / "merged/model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


def test_a_wrong_merge_writes_nothing(adapter, tmp_path, monkeypatch):
    right = merge.merge_lora

    def wrong(causal_lm):
        count = right(causal_lm)
        next(iter(linears(causal_lm).values())).weight.data.mul_(1.01)
        return count

    monkeypatch.setattr(merge, "merge_lora", wrong)
    with pytest.raises(LlavaHDError, match=r"differ .* nothing was written"):
        merge_folder(adapter, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_leaves_nothing(adapter, tmp_path, monkeypatch):
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Processor, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        merge_folder(adapter, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_is_refused(adapter, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is not empty; give a new folder"):
        merge_folder(adapter, tmp_path)


def moved(adapter: Path, target: Path, **changes: object) -> Path:
    """A copy of an adapter folder with changes to its config.json."""
    target.mkdir()
    for file in adapter.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    values = json.loads((adapter / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(values | changes))
    return target


def test_a_base_that_has_moved_is_named_with_the_remedy(adapter, parts, tmp_path):
    lost = {"vision": "/nowhere/clip", "language": f"{parts}/language"}
    folder = moved(adapter, tmp_path / "a", base=lost)
    with pytest.raises(UsageError) as caught:
        LlavaHD.from_pretrained(folder)
    text = str(caught.value)
    assert text.startswith(f"{folder}/config.json: base.vision /nowhere/clip is not there; ")
    assert "--base" in text and "\n" not in text


def test_the_base_may_be_given_as_a_whole_model_instead(adapter, parts, tmp_path):
    whole, processor = built(parts)
    whole.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    folder = moved(adapter, tmp_path / "a", base={"path": "../whole"})  # relative to the adapter
    due = logits(LlavaHD.from_pretrained(adapter))
    assert all(map(torch.equal, due, logits(LlavaHD.from_pretrained(folder))))
    loaded = load_adapter(adapter, torch.float32, "auto", base=tmp_path / "whole")
    assert all(map(torch.equal, due, logits(loaded)))
    with pytest.raises(UsageError, match="is an adapter itself"):
        load_adapter(adapter, torch.float32, "auto", base=folder)


def test_another_base_of_the_same_shape_is_refused(adapter, tmp_path):
    other = save_parts(tmp_path / "other", seed=7)
    folders = {"vision": f"{other}/vision", "language": f"{other}/language"}
    folder = moved(adapter, tmp_path / "a", base=folders)
    with pytest.raises(DataError, match="not the one that this adapter was trained on"):
        LlavaHD.from_pretrained(folder)


def test_the_digest_of_a_base_is_the_same_in_every_type(parts):
    digests = {base_digest(built(parts, dtype=t)[0]) for t in (torch.float32, torch.bfloat16)}
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is miss"),
        (lambda f: (f / "projector.safetensors").write_bytes(b"x"), "projector.safetensors is dam"),
        (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json cannot be r"),
        (lambda f: edit(f / "adapter_config.json", r=8), "has a tensor of another shape: base_mod"),
        (
            lambda f: edit(f / "adapter_config.json", target_modules=["q_proj"]),
            "has an unknown tensor base_model",
        ),
        (lambda f: edit(f / "config.json", bits=None), "'bits' is missing or damaged"),
        (lambda f: edit(f / "config.json", more=1), "'more' is not a setting"),
        (lambda f: edit(f / "config.json", base={}), "base must name path, or vision and language"),
    ],
)
def test_a_damaged_adapter_is_named(adapter, tmp_path, damage, message):
    folder = moved(adapter, tmp_path / "a")
    damage(folder)
    with pytest.raises((UsageError, DataError), match=re.escape(message)) as caught:
        LlavaHD.from_pretrained(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_whole_model_is_not_merged(parts, tmp_path):
    built(parts)[0].save_pretrained(tmp_path / "whole")
    with pytest.raises(UsageError, match="is a whole model, not an adapter"):
        merge_folder(tmp_path / "whole", tmp_path / "out")


def gradients(model: LlavaHD) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for batch in random_packs(model.config):
        torch.manual_seed(3)  # dropout
        model.logits(batch).square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_gradients_reach_adapter_projector_and_row_end_only_and_survive_checkpointing(parts):
    model, _ = built(parts)
    give_adapter(model, BaseFolders(path="."), dropout=0.3)
    freeze(model, "finetune")
    kept = gradients(model.train())
    assert all(grad is not None and grad.abs().max() > 0 for grad in kept.values())
    assert {name.split(".")[0] for name in kept} == {"projector", "language"}
    assert all(".lora_" in name for name in kept if name.startswith("language"))
    model.checkpoint_gradients()
    again = gradients(model)
    for name, grad in kept.items():
        torch.testing.assert_close(again[name], grad, atol=1e-6, rtol=1e-5)


def test_peft_and_bitsandbytes_have_one_door():
    doors = {
        path.relative_to(ROOT).as_posix()
        for room in ("hd", "kernels", "model", "train", "bench", "cli")
        for path in (ROOT / room).glob("*.py")
        if re.search(r"^\s*(import|from) (peft|bitsandbytes)\b", path.read_text(), re.MULTILINE)
    }
    assert doors == {"model/lora.py"}
