"""llava-hd import: every layout, every tensor, no code, no random weight, little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interop_files import (
    LAYOUTS,
    SINGLE_VIEW,
    change,
    llava_model,
    next_model,
    original_state,
    write_bin,
    write_clip,
    write_language,
    write_lora,
    write_original,
    write_safetensors,
    write_transformers,
)
from safetensors.torch import load_file
from tiny import (
    IMAGE_ID,
    TILE,
    llava_next_config,
    tiny_hd,
    tiny_tokenizer,
)
from transformers import (
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
)

from llava_hd.cli.main import main
from llava_hd.hd.errors import UsageError
from llava_hd.model.import_folder import import_folder
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.processor import Processor

PROJECTOR = {
    "linear_1.weight": "weight_1",
    "linear_1.bias": "bias_1",
    "linear_2.weight": "weight_2",
    "linear_2.bias": "bias_2",
}


@pytest.fixture(scope="module", name="next_model")
def next_fixture() -> PreTrainedModel:
    return next_model()


@pytest.fixture(scope="module", name="llava_model")
def llava_fixture() -> PreTrainedModel:
    return llava_model()


def ours_of(theirs: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's tensors under our names, worked out here."""
    out = {}
    for name, tensor in theirs.state_dict().items():
        if name == "lm_head.weight":
            out["language.causal_lm.lm_head.weight"] = tensor
        elif name == "model.image_newline":
            out["projector.row_end"] = tensor
        elif name.startswith("model.multi_modal_projector."):
            part = name.removeprefix("model.multi_modal_projector.")
            out["projector." + PROJECTOR[part]] = tensor
        elif name.startswith("model.vision_tower."):
            out["vision.clip." + name.removeprefix("model.vision_tower.")] = tensor
        else:
            part = name.removeprefix("model.language_model.")
            out["language.causal_lm.model." + part] = tensor
    return out


def assert_same(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = LlavaHD.from_pretrained(folder).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("write", "shards"),
    [(write_safetensors, 1), (write_safetensors, 3), (write_bin, 1), (write_bin, 3)],
)
def test_llava_next_is_read_in_every_layout(
    next_model: PreTrainedModel, layout: str, write, shards: int, tmp_path: Path
) -> None:
    write_transformers(next_model, tmp_path / "theirs", layout, write, shards)
    report = import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert_same(tmp_path / "ours", ours_of(next_model))
    assert report.untrained == () and report.left_out == ()
    config = Processor.from_pretrained(tmp_path / "ours").config
    assert config.hd == tiny_hd("hdflex") and config.image_token_id == IMAGE_ID


@pytest.mark.parametrize("kind", ["llava_next", "llava"])
def test_what_transformers_itself_writes_is_read(
    kind: str, next_model: PreTrainedModel, llava_model: PreTrainedModel, tmp_path: Path
) -> None:
    model = next_model if kind == "llava_next" else llava_model
    model.save_pretrained(tmp_path / "theirs")
    tiny_tokenizer().save_pretrained(tmp_path / "theirs")
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert_same(tmp_path / "ours", ours_of(model))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_llava_is_read_in_every_layout(
    llava_model: PreTrainedModel, layout: str, tmp_path: Path
) -> None:
    write_transformers(llava_model, tmp_path / "theirs", layout, write_bin, 2)
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert_same(tmp_path / "ours", ours_of(llava_model))
    assert Processor.from_pretrained(tmp_path / "ours").config.hd == SINGLE_VIEW


@pytest.mark.parametrize("write", [write_bin, write_safetensors])
def test_an_original_folder_is_read(llava_model: PreTrainedModel, write, tmp_path: Path) -> None:
    write_original(llava_model, tmp_path / "theirs", write)
    clip = write_clip(llava_model, tmp_path / "clip")
    report = import_folder(tmp_path / "theirs", tmp_path / "ours", vision=clip)
    assert_same(tmp_path / "ours", ours_of(llava_model))
    assert Processor.from_pretrained(tmp_path / "ours").config.hd == SINGLE_VIEW
    assert sorted(report.left_out) == [
        "logit_scale",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "text_model.final_layer_norm.weight",
        "vision_model.embeddings.position_ids",
        "visual_projection.weight",
    ]


def test_an_original_anyres_folder_is_read_with_its_own_tower(
    next_model: PreTrainedModel, tmp_path: Path
) -> None:
    grids = [[w * TILE, h * TILE] for h, w in tiny_hd("hdflex").grids]  # (width, height)
    write_original(
        next_model,
        tmp_path / "theirs",
        image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints=grids,
        mm_vision_tower="/elsewhere/clip-tiny",
    )
    write_clip(next_model, tmp_path / "theirs" / "clip-tiny")
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert_same(tmp_path / "ours", ours_of(next_model))
    assert Processor.from_pretrained(tmp_path / "ours").config.hd == tiny_hd("hdflex")


def test_a_tuned_tower_in_the_checkpoint_counts(
    llava_model: PreTrainedModel, tmp_path: Path
) -> None:
    clip = write_clip(llava_model, tmp_path / "clip")
    state, name = original_state(llava_model), "embeddings.class_embedding"
    for key, tensor in llava_model.model.vision_tower.state_dict().items():
        state[f"model.vision_tower.vision_tower.vision_model.{key}"] = tensor + 1
    write_original(llava_model, tmp_path / "theirs")
    write_bin(state, tmp_path / "theirs", 2)
    import_folder(tmp_path / "theirs", tmp_path / "ours", vision=clip)
    found = LlavaHD.from_pretrained(tmp_path / "ours").state_dict()[f"vision.clip.{name}"]
    assert torch.equal(found, llava_model.model.vision_tower.state_dict()[name] + 1)


def test_a_lora_folder_is_added_to_its_base(llava_model: PreTrainedModel, tmp_path: Path) -> None:
    downs, ups = write_lora(llava_model, tmp_path / "lora")
    clip = write_clip(llava_model, tmp_path / "clip")
    base = write_language(llava_model, tmp_path / "base")
    import_folder(tmp_path / "lora", tmp_path / "ours", vision=clip, language=base)
    expected = ours_of(llava_model)
    for name, down in downs.items():
        key = f"language.causal_lm.{name}"
        expected[key] = expected[key] + 8 / 4 * ups[name] @ down
    assert len(downs) == 4
    found = LlavaHD.from_pretrained(tmp_path / "ours").state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("use_dora", True, "use_dora is True"),
        ("bias", "all", "bias is 'all'"),
        ("rank_pattern", {"q_proj": 8}, "rank_pattern"),
    ],
)
def test_other_kinds_of_adapters_are_refused(
    llava_model: PreTrainedModel, key: str, value: object, words: str, tmp_path: Path
) -> None:
    write_lora(llava_model, tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    clip = write_clip(llava_model, tmp_path / "clip")
    base = write_language(llava_model, tmp_path / "base")
    with pytest.raises(UsageError, match=words):
        import_folder(tmp_path / "lora", tmp_path / "ours", vision=clip, language=base)
    assert not (tmp_path / "ours").exists()


def test_parts_alone_say_what_is_untrained(llava_model: PreTrainedModel, tmp_path: Path) -> None:
    clip = write_clip(llava_model, tmp_path / "clip")
    base = write_language(llava_model, tmp_path / "base")
    report = import_folder(None, tmp_path / "new", vision=clip, language=base, hd=SINGLE_VIEW)
    assert report.untrained == tuple(f"projector.{n}" for n in sorted(PROJECTOR.values()))
    stage_1 = {k: v for k, v in original_state(llava_model).items() if "mm_projector" in k}
    torch.save(stage_1, tmp_path / "mm_projector.bin")
    report = import_folder(
        None,
        tmp_path / "ours",
        vision=clip,
        language=base,
        projector=tmp_path / "mm_projector.bin",
        hd=SINGLE_VIEW,
    )
    assert report.untrained == ()
    assert_same(tmp_path / "ours", ours_of(llava_model))


def test_a_stage_1_folder_is_read_with_its_base(
    llava_model: PreTrainedModel, tmp_path: Path
) -> None:
    write_original(llava_model, tmp_path / "stage1")
    for file in (tmp_path / "stage1").glob("pytorch_model*"):
        file.unlink()
    stage_1 = {k: v for k, v in original_state(llava_model).items() if "mm_projector" in k}
    torch.save(stage_1, tmp_path / "stage1" / "mm_projector.bin")
    clip = write_clip(llava_model, tmp_path / "clip")
    base = write_language(llava_model, tmp_path / "base")
    import_folder(tmp_path / "stage1", tmp_path / "ours", vision=clip, language=base)
    assert_same(tmp_path / "ours", ours_of(llava_model))


def test_stage_1_without_row_end_leaves_only_that_untrained(
    next_model: PreTrainedModel, tmp_path: Path
) -> None:
    clip = write_clip(next_model, tmp_path / "clip")
    base = write_language(next_model, tmp_path / "base")
    stage_1 = {k: v for k, v in original_state(next_model).items() if "mm_projector" in k}
    torch.save(stage_1, tmp_path / "mm_projector.bin")
    report = import_folder(
        None,
        tmp_path / "ours",
        vision=clip,
        language=base,
        projector=tmp_path / "mm_projector.bin",
        hd=tiny_hd("hd448"),
    )
    assert report.untrained == ("projector.row_end",)


def test_new_words_get_average_rows(llava_model: PreTrainedModel, tmp_path: Path) -> None:
    write_original(llava_model, tmp_path / "theirs")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(320 - len(tokenizer) + 2)])
    tokenizer.save_pretrained(tmp_path / "theirs")
    clip = write_clip(llava_model, tmp_path / "clip")
    report = import_folder(tmp_path / "theirs", tmp_path / "ours", vision=clip)
    assert report.rows == 384
    found = LlavaHD.from_pretrained(tmp_path / "ours").state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old = ours_of(llava_model)[f"language.causal_lm.{name}"]
        new = found[f"language.causal_lm.{name}"]
        assert torch.equal(new[:320], old)
        torch.testing.assert_close(new[320:], old.mean(0).expand(64, -1))


def test_the_type_stays_or_is_the_one_asked_for(
    next_model: PreTrainedModel, tmp_path: Path
) -> None:
    write_transformers(next_model, tmp_path / "theirs", "4.47", write_safetensors, 1)
    change(tmp_path / "theirs", lambda s: s.update({k: t.bfloat16() for k, t in s.items()}))
    assert import_folder(tmp_path / "theirs", tmp_path / "a").dtype == "bfloat16"
    assert import_folder(tmp_path / "theirs", tmp_path / "b", dtype="fp32").dtype == "float32"
    assert (
        load_file(tmp_path / "a" / "model.safetensors")["projector.row_end"].dtype == torch.bfloat16
    )


def test_the_command_prints_what_was_done(
    next_model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_transformers(next_model, tmp_path / "theirs", "5.x", write_safetensors, 2)
    assert main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "a"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tensors"] == len(ours_of(next_model)) and report["kind"].endswith("llava_next")
    assert main(["import", str(tmp_path / "none"), "--out", str(tmp_path / "b")]) == 2
    assert main(["import", "--out", str(tmp_path / "b"), "--preset", "hd449"]) == 2
    assert "did you mean 'hd448'" in capsys.readouterr().err
    assert main(["import", "--out", str(tmp_path / "b")]) == 2
    assert "parts alone need --vision, --language and --preset" in capsys.readouterr().err


MEMORY = """
import re, sys
from pathlib import Path
from llava_hd.model.import_folder import import_folder
status = Path("/proc/self/status")
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) / 1024
before = peak()
import_folder(sys.argv[1], sys.argv[2])
print(before, peak())
"""


@pytest.mark.parametrize("write", [write_bin, write_safetensors])
def test_reading_needs_no_more_than_a_shard_above_the_model(write, tmp_path: Path) -> None:
    config = llava_next_config("hd448")
    config.text_config.intermediate_size = 150_000  # 165 MiB in fp32
    model = LlavaNextForConditionalGeneration(config)
    files = write_transformers(model, tmp_path / "theirs", "4.47", write, 4)
    size = sum(p.numel() * 4 for p in model.parameters()) / 2**20
    shard = max(file.stat().st_size for file in files) / 2**20
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "theirs"), str(tmp_path / "ours")],
        capture_output=True, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    before, peak = map(float, done.stdout.split())
    print(f"model {size:.0f} MiB, largest shard {shard:.0f}, grew by {peak - before:.0f}")
    assert size > 150
    assert peak - before < size + shard + 16
