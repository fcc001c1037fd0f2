"""llava-hd import: bad folders, code in pickles, full disks: named, and nothing is written."""

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
    SINGLE_VIEW,
    change,
    llava_model,
    next_model,
    write_bin,
    write_clip,
    write_language,
    write_lora,
    write_original,
    write_safetensors,
    write_transformers,
)
from tiny import (
    save_llava,
    save_parts,
    tiny_hd,
    tiny_tokenizer,
)
from transformers import (
    PreTrainedModel,
)

from llava_hd.hd.errors import DataError, LlavaHDError, UsageError
from llava_hd.model.assemble import assemble
from llava_hd.model.import_folder import import_folder
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.tensor_files import file_tensors


@pytest.fixture(scope="module", name="next_model")
def next_fixture() -> PreTrainedModel:
    return next_model()


@pytest.fixture(scope="module", name="llava_model")
def llava_fixture() -> PreTrainedModel:
    return llava_model()


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
    with pytest.raises(UsageError, match=r"the tokenizer of model folder .* cannot be read"):
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


def test_a_target_that_holds_something_is_left_alone(
    next_model: PreTrainedModel, tmp_path: Path
) -> None:
    write_transformers(next_model, tmp_path / "theirs", "4.47", write_safetensors, 1)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match="is not empty"):
        import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["mine.txt"]


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
