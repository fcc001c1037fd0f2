"""llava-hd import of LoRA folders: what the adapter lacks, or asks for beyond W + scale B A."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from interop_files import Names, llava_model, write_clip, write_language, write_lora

from llava_hd.hd.errors import LlavaHDError
from llava_hd.model.import_folder import import_folder
from llava_hd.model.llava_hd import LlavaHD

LAYER = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


def folders(path: Path, settings: dict[str, object] | None = None) -> dict[str, Path]:
    """A LoRA folder with changed settings, its base and its tower."""
    model = llava_model()
    write_lora(model, path / "lora")
    file = path / "lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (settings or {})))
    return {
        "vision": write_clip(model, path / "clip"),
        "language": write_language(model, path / "base"),
    }


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 8}, r"of rank 4 and 4, adapter_config.json says r 8"),
        ({"r": 0}, "r 0 and lora_alpha 8.0 must be above 0"),
        ({"r": -4}, "r -4 and"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan must be"),
        ({"target_modules": ["q_proj", "v_proj", "down_proj"]}, "no adapter of .*v_proj"),
        ({"target_modules": ["q_proj", "down_proj", "experts"]}, "no adapter of experts"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is"),
        ({"lora_bias": True}, "lora_bias is True"),
    ],
)
def test_settings_that_the_tensors_do_not_have_are_refused(
    settings: dict[str, object], words: str, tmp_path: Path
) -> None:
    parts = folders(tmp_path, settings)
    with pytest.raises(LlavaHDError, match=words) as error:
        import_folder(tmp_path / "lora", tmp_path / "ours", **parts)
    assert "\n" not in str(error.value) and not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda s: s.clear(), "holds no tensors of an adapter"),
        (lambda s: s.pop(LAYER), "only one of lora_A, lora_B"),
        (
            lambda s: (s.pop(LAYER), s.pop(LAYER.replace("lora_A", "lora_B"))),
            r"no adapter of language.causal_lm.model.layers.1.self_attn.q_proj",
        ),
        (lambda s: s.update({"base_model.model.x.lora_magnitude": torch.ones(1)}), "unknown"),
    ],
)
def test_an_adapter_that_lacks_tensors_is_refused(
    edit: Callable[[Names], object], words: str, tmp_path: Path
) -> None:
    parts = folders(tmp_path)
    file = tmp_path / "lora" / "adapter_model.bin"
    state = torch.load(file, weights_only=True)
    edit(state)
    torch.save(state, file)
    with pytest.raises(LlavaHDError, match=words):
        import_folder(tmp_path / "lora", tmp_path / "ours", **parts)


def test_rslora_scales_by_the_root_of_the_rank(tmp_path: Path) -> None:
    parts = folders(tmp_path, {"use_rslora": True})
    state = torch.load(tmp_path / "lora" / "adapter_model.bin", weights_only=True)
    import_folder(tmp_path / "lora", tmp_path / "ours", **parts)
    name = "layers.1.self_attn.q_proj.weight"
    base = llava_model().state_dict()[f"model.language_model.{name}"]
    up, down = state[LAYER.replace("lora_A", "lora_B")], state[LAYER]
    found = LlavaHD.from_pretrained(tmp_path / "ours").state_dict()
    torch.testing.assert_close(
        found[f"language.causal_lm.model.{name}"], base + 8 / 4**0.5 * up @ down
    )


def test_a_trained_head_in_non_lora_trainables_counts(tmp_path: Path) -> None:
    parts = folders(tmp_path)
    file = tmp_path / "lora" / "non_lora_trainables.bin"
    head = torch.randn(320, 48)
    state = torch.load(file, weights_only=True)
    torch.save(state | {"base_model.model.lm_head.weight": head}, file)
    import_folder(tmp_path / "lora", tmp_path / "ours", **parts)
    found = LlavaHD.from_pretrained(tmp_path / "ours").state_dict()
    assert torch.equal(found["language.causal_lm.lm_head.weight"], head)
