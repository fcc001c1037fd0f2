"""Model folders: shards, damage, missing and surplus tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_llava, save_llava_next, tiny_hd

from llava_hd.hd.errors import DataError, UsageError
from llava_hd.model.assemble import assemble
from llava_hd.model.llava_hd import LlavaHD
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
    "name", ["projector.bias_1", "placer.row_end", "vision.clip.pre_layrnorm.weight",
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


def test_the_type_decides_the_dtype(folder: Path) -> None:
    model = LlavaHD.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


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
