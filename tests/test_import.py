"""llava-hd import: every layout, every tensor, no code, no random weight, little memory."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interop_files import (
    LAYOUTS,
    original_state,
    write_bin,
    write_clip,
    write_language,
    write_lora,
    write_original,
    write_safetensors,
    write_transformers,
)
from safetensors.torch import load_file, save_file
from tiny import (
    IMAGE_ID,
    TILE,
    llava_next_config,
    save_llava,
    save_parts,
    text_config,
    tiny_hd,
    tiny_tokenizer,
    vision_config,
)
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
)

from llava_hd.cli.main import main
from llava_hd.hd.errors import DataError, LlavaHDError, UsageError
from llava_hd.hd.grid import HDConfig
from llava_hd.model.assemble import assemble
from llava_hd.model.import_folder import import_folder
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.processor import Processor
from llava_hd.model.tensor_files import file_tensors

SINGLE_VIEW = HDConfig(
    tile_px=84, grids=(), global_view="pad", keep="all", row_end=False, pad_colour="mean"
)
PROJECTOR = {
    "linear_1.weight": "weight_1",
    "linear_1.bias": "bias_1",
    "linear_2.weight": "weight_2",
    "linear_2.bias": "bias_2",
}


@pytest.fixture(scope="module")
def next_model() -> PreTrainedModel:
    torch.manual_seed(1)
    return LlavaNextForConditionalGeneration(llava_next_config("hdflex")).eval()


@pytest.fixture(scope="module")
def llava_model() -> PreTrainedModel:
    torch.manual_seed(2)
    config = LlavaConfig(
        vision_config=vision_config(84),
        text_config=text_config(),
        image_token_index=IMAGE_ID,
        vision_feature_layer=-2,
    )
    return LlavaForConditionalGeneration(config).eval()


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


class Touch:
    """A pickle of this touches a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    "kind", ["zip", "legacy", "plain pickle", "in a part", "non_lora", "stage 1"]
)
def test_code_in_a_pickle_is_refused_and_not_run(
    kind: str, llava_model: PreTrainedModel, tmp_path: Path
) -> None:
    trap = tmp_path / "touched"
    bad = {"model.norm.weight": torch.ones(3), "x": Touch(trap)}
    clip = write_clip(llava_model, tmp_path / "clip")
    base = write_language(llava_model, tmp_path / "base")
    source: Path | None = tmp_path / "theirs"
    options = {"vision": clip}
    if kind in ("zip", "legacy", "plain pickle"):
        [first, *_] = write_original(llava_model, source)
        if kind == "plain pickle":
            first.write_bytes(pickle.dumps(bad))
        else:
            torch.save(bad, first, _use_new_zipfile_serialization=kind == "zip")
    elif kind == "in a part":
        torch.save(bad, clip / "pytorch_model.bin")
        source, options = None, {"vision": clip, "language": base, "hd": SINGLE_VIEW}
    elif kind == "non_lora":
        write_lora(llava_model, source)
        torch.save(bad, source / "non_lora_trainables.bin")
        options["language"] = base
    else:
        torch.save(bad, tmp_path / "mm_projector.bin")
        source, options = None, {"vision": clip, "language": base, "hd": SINGLE_VIEW}
        options["projector"] = tmp_path / "mm_projector.bin"
    with pytest.raises(DataError, match=r"more than tensors in it .*refused") as error:
        import_folder(source, tmp_path / "ours", **options)
    assert "\n" not in str(error.value)
    assert not trap.exists() and not (tmp_path / "ours").exists()
    pickle.loads(pickle.dumps(Touch(trap)))  # the trap itself works
    assert trap.exists()


def test_odd_objects_in_a_bin_are_named(tmp_path: Path) -> None:
    for value in (3, "text", torch.ones(2).to_sparse(), [torch.ones(1)]):
        torch.save({"a": value}, tmp_path / "x.bin")
        with pytest.raises(DataError, match="'a' is not an ordinary tensor"):
            list(file_tensors(tmp_path / "x.bin"))
    torch.save([1], tmp_path / "x.bin")
    with pytest.raises(DataError, match="holds a list"):
        list(file_tensors(tmp_path / "x.bin"))


@pytest.mark.parametrize("keep", [0, 1, 0.3, 0.9, -1])
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_file_cut_off_is_named(
    next_model: PreTrainedModel, keep: float, suffix: str, tmp_path: Path
) -> None:
    write = write_bin if suffix == "bin" else write_safetensors
    files = write_transformers(next_model, tmp_path / "theirs", "4.47", write, 2)
    data = files[1].read_bytes()
    files[1].write_bytes(data[: int(len(data) * keep) if 0 < keep < 1 else keep])
    with pytest.raises(DataError, match=files[1].name) as error:
        import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert "\n" not in str(error.value) and not (tmp_path / "ours").exists()


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_named(
    next_model: PreTrainedModel, suffix: str, index: bool, tmp_path: Path
) -> None:
    write = write_bin if suffix == "bin" else write_safetensors
    files = write_transformers(next_model, tmp_path / "theirs", "4.52", write, 3)
    files[1].unlink()
    if not index:
        next((tmp_path / "theirs").glob("*.index.json")).unlink()
    with pytest.raises(DataError, match=r"lacks|2 shards of 3"):
        import_folder(tmp_path / "theirs", tmp_path / "ours")


def test_an_index_that_leads_outside_is_refused(
    next_model: PreTrainedModel, tmp_path: Path
) -> None:
    write_transformers(next_model, tmp_path / "theirs", "4.47", write_bin, 2)
    (tmp_path / "theirs" / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {"a": "../evil.bin"}})
    )
    (tmp_path / "evil.bin").touch()
    with pytest.raises(DataError, match="outside its folder"):
        import_folder(tmp_path / "theirs", tmp_path / "ours")


def change(folder: Path, edit) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


LAYER = "language_model.model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda s: s.pop(LAYER), r"lacks language\.causal_lm\.model\.layers\.1\.mlp\.up_proj"),
        (lambda s: s.pop("image_newline"), r"lacks projector\.row_end"),
        (lambda s: s.update({LAYER: torch.zeros(2, 3)}), r"shape: .*\(2, 3\), not \(64, 48\)"),
        (lambda s: s.update({"language_model.model.new": torch.ones(1)}), "unknown tensor .*new"),
        (lambda s: s.update({"optimizer.x": torch.ones(1)}), "unknown tensor optimizer.x"),
        (lambda s: s.update({"model.image_newline": s["image_newline"].clone()}), "twice"),
        (lambda s: s.update({LAYER: torch.zeros(64, 48, dtype=torch.int8)}), "is torch.int8"),
    ],
)  # fmt: skip
def test_every_tensor_is_placed_or_named(
    next_model: PreTrainedModel, edit, words: str, tmp_path: Path
) -> None:
    write_transformers(next_model, tmp_path / "theirs", "4.47", write_safetensors, 1)
    change(tmp_path / "theirs", edit)
    with pytest.raises(DataError, match=words):
        import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert not list(tmp_path.glob("*ours*"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_aspect_ratio": "square"}, "image_aspect_ratio is 'square'"),
        ({"image_aspect_ratio": "anyres"}, "mm_patch_merge_type is 'flat'"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type is 'mlp3x_gelu'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
        ({"architectures": ["LlavaMptForCausalLM"]}, "only LlavaLlamaForCausalLM is read"),
        ({"mm_vision_select_layer": None}, "mm_vision_select_layer must be one layer"),
    ],
)  # fmt: skip
def test_what_an_original_folder_may_not_ask_is_named(
    llava_model: PreTrainedModel, changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    write_original(llava_model, tmp_path / "theirs", **changes)
    clip = write_clip(llava_model, tmp_path / "clip")
    with pytest.raises(UsageError, match=words):
        import_folder(tmp_path / "theirs", tmp_path / "ours", vision=clip)


def test_a_folder_without_tower_base_or_tokenizer_is_told_the_remedy(
    llava_model: PreTrainedModel, tmp_path: Path
) -> None:
    write_original(llava_model, tmp_path / "theirs")
    with pytest.raises(UsageError, match="give the folder of that CLIP as --vision"):
        import_folder(tmp_path / "theirs", tmp_path / "ours")
    clip = write_clip(llava_model, tmp_path / "clip")
    write_lora(llava_model, tmp_path / "lora")
    with pytest.raises(UsageError, match="as --language"):
        import_folder(tmp_path / "lora", tmp_path / "ours", vision=clip)
    for path in (tmp_path / "theirs").glob("*token*"):
        path.unlink()
    with pytest.raises(UsageError, match="no tokenizer that can be read"):
        import_folder(tmp_path / "theirs", tmp_path / "ours", vision=clip)
    with pytest.raises(UsageError, match=r"original LLaVA's layout.*llava-hd import"):
        LlavaHD.from_pretrained(tmp_path / "theirs")


def test_a_tokenizer_of_another_image_token_is_refused(tmp_path: Path) -> None:
    save_llava(tmp_path / "theirs")
    tiny_tokenizer().save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_token_index": 7}))
    with pytest.raises(DataError, match=r"<image> as 3, config.json says 7"):
        import_folder(tmp_path / "theirs", tmp_path / "ours")


def test_a_model_of_ours_needs_no_import(tmp_path: Path) -> None:
    parts = save_parts(tmp_path)
    model, _ = assemble(vision=parts / "vision", language=parts / "language", hd=tiny_hd("hd448"))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match="a model of ours already"):
        import_folder(tmp_path / "model", tmp_path / "out")


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


def test_a_target_that_holds_something_is_left_alone(
    next_model: PreTrainedModel, tmp_path: Path
) -> None:
    write_transformers(next_model, tmp_path / "theirs", "4.47", write_safetensors, 1)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match="is not empty"):
        import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["mine.txt"]


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


def test_a_full_disk_leaves_no_target(next_model: PreTrainedModel, tmp_path: Path) -> None:
    write_transformers(next_model, tmp_path / "theirs", "4.47", write_safetensors, 1)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "theirs"), str(tmp_path / "ours")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == LlavaHDError.exit_code, done.stderr
    assert "could not be written" in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from llava_hd.cli.main import main
sys.exit(main(["import", sys.argv[1], "--out", sys.argv[2]]))
"""
