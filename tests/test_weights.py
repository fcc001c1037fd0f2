"""Model folders: shards, damage, missing and surplus tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import llava_next_config, save_llava, save_llava_next, tiny_hd
from transformers import LlavaNextForConditionalGeneration

from llava_hd.hd.errors import DataError, UsageError
from llava_hd.model.assemble import assemble
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.packing import Sample, pack
from llava_hd.model.weights import save_model


@pytest.fixture
def folder(parts: Path, tmp_path: Path) -> Path:
    model, processor = assemble(
        vision=parts / "vision", language=parts / "language", hd=tiny_hd("hd448")
    )
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name", ["projector.bias_1", "projector.row_end", "vision.clip.pre_layrnorm.weight",
             "language.causal_lm.model.norm.weight"],
)  # fmt: skip
def test_a_missing_tensor_is_named_and_nothing_stays_random(folder: Path, name: str) -> None:
    edit(folder, lambda state: state.pop(name))
    with pytest.raises(DataError, match=f"lacks {name}"):
        LlavaHD.from_pretrained(folder)


def test_a_surplus_tensor_is_named(folder: Path) -> None:
    edit(folder, lambda state: state.update({"projector.bias_9": torch.zeros(2)}))
    with pytest.raises(DataError, match=r"unknown tensor projector\.bias_9"):
        LlavaHD.from_pretrained(folder)


def test_a_damaged_file_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"model\.safetensors is damaged"):
        LlavaHD.from_pretrained(folder)


def test_shards_are_read_and_a_missing_one_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_hd.model import weights

    model = LlavaHD.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    whole = weights.save_torch_state_dict
    monkeypatch.setattr(
        weights, "save_torch_state_dict", lambda *a, **k: whole(*a, **k, max_shard_size=50_000)
    )
    save_model(model, folder)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    again = LlavaHD.from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    shards[0].unlink()
    with pytest.raises(DataError, match=f"lacks {shards[0].name}"):
        LlavaHD.from_pretrained(folder)


def test_a_gathered_state_dict_is_written_in_place_of_the_models(folder: Path) -> None:
    model = LlavaHD.from_pretrained(folder)
    state = {name: torch.full_like(x, 0.5) for name, x in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    assert LlavaHD.from_pretrained(folder).row_end.eq(0.5).all()


def test_the_type_decides_the_dtype_but_not_of_the_rotary_frequencies(folder: Path) -> None:
    wide = LlavaHD.from_pretrained(folder)
    model = LlavaHD.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    frequencies = [dict(m.named_buffers()) for m in (wide, model)]
    [name] = [name for name in frequencies[0] if name.endswith("rotary_emb.inv_freq")]
    assert torch.equal(frequencies[0][name], frequencies[1][name])


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    name = "language.causal_lm.model.norm.weight"
    edit(folder, lambda state: state.update({name: torch.zeros(7)}))
    with pytest.raises(DataError, match=f"another shape: {name}") as error:
        LlavaHD.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_a_broken_index_is_named(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(DataError, match=r"index\.json is damaged"):
        LlavaHD.from_pretrained(folder)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("image_token_id", 99999, "outside the vocabulary of 320"),
        ("template", "vicuna", "did you mean 'vicuna_v1'"),
        ("text", {"model_type": "llama"}, "no vocab_size"),
        ("projector", "mlp", "model.projector 'mlp' is unknown"),
    ],
)
def test_a_wrong_value_in_config_json_is_named_with_its_folder(
    folder: Path, key: str, value: object, words: str
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UsageError, match=words) as error:
        LlavaHD.from_pretrained(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(("outer", "inner"), [(True, False), (False, True), (True, True)])
@torch.no_grad()
def test_an_imported_model_keeps_its_logits_however_its_head_is_tied(
    outer: bool, inner: bool, tmp_path: Path
) -> None:
    config = llava_next_config("hd448")
    config.tie_word_embeddings = outer
    config.text_config.tie_word_embeddings = inner
    torch.manual_seed(0)
    theirs = LlavaNextForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ids = torch.arange(10, 30)
    expected = theirs(input_ids=ids[None]).logits[0]
    ours = LlavaHD.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    batch = pack([Sample(ids.tolist(), ids.tolist())], ours.config)
    assert torch.equal(ours.logits(batch), expected)
    assert torch.equal(LlavaHD.from_pretrained(tmp_path / "ours").logits(batch), expected)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("image_grid_pinpoints", [[84, 140]], "not a multiple of the tower's 56 px"),
        ("vision_feature_layer", [-2, -1], "only one layer is read"),
    ],
)
def test_geometry_that_cannot_be_expressed_is_refused(
    key: str, value: object, words: str, tmp_path: Path
) -> None:
    save_llava_next(tmp_path, "hd448")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UsageError, match=words):
        LlavaHD.from_pretrained(tmp_path)


def test_an_unknown_setting_gets_a_suggestion(folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | {"visoin_layer": -2}
    path.write_text(json.dumps(values))
    with pytest.raises(UsageError, match="did you mean 'vision_layer'"):
        LlavaHD.from_pretrained(folder)


def test_a_foreign_model_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UsageError, match="'bert' cannot be read"):
        LlavaHD.from_pretrained(tmp_path)


def test_a_transformers_model_with_another_activation_is_refused(tmp_path: Path) -> None:
    save_llava_next(tmp_path, "hd448")
    path = tmp_path / "config.json"
    values = json.loads(path.read_text()) | {"projector_hidden_act": "gelu_new"}
    path.write_text(json.dumps(values))
    with pytest.raises(UsageError, match="projector_hidden_act is 'gelu_new'"):
        LlavaHD.from_pretrained(tmp_path)


def test_a_transformers_folder_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    save_llava(tmp_path)
    edit(tmp_path, lambda state: state.pop(next(k for k in state if "linear_1.weight" in k)))
    with pytest.raises(DataError, match="lacks"):
        LlavaHD.from_pretrained(tmp_path)
