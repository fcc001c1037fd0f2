"""What a transformers folder says of images and prompts: obeyed, refused or noted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from export_files import exported, native
from interop_files import llava_model, next_model, write_safetensors, write_transformers

from llava_hd.cli.main import main
from llava_hd.hd.errors import LlavaHDError
from llava_hd.model.import_folder import import_folder

CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"


@pytest.fixture(name="theirs")
def theirs_fixture(tmp_path: Path) -> Path:
    write_transformers(next_model(), tmp_path / "theirs", "4.47", write_safetensors, 1)
    return tmp_path / "theirs"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"image_mean": [0.5, 0.5, 0.5]}, r"image_mean is \[0.5, 0.5, 0.5\], only"),
        ({"image_std": 3}, "image_std cannot be read"),
        ({"resample": 2}, "resample is 2, only 3"),
        ({"image_grid_pinpoints": [[56, 112]]}, "not those of config.json"),
        ({"do_normalize": False}, "do_normalize is False"),
    ],
)
def test_another_image_processor_is_refused(
    values: dict[str, object], words: str, nested: bool, theirs: Path, tmp_path: Path
) -> None:
    name = "processor_config.json" if nested else "preprocessor_config.json"
    (theirs / name).write_text(json.dumps({"image_processor": values} if nested else values))
    with pytest.raises(LlavaHDError, match=rf"{name}: .*{words}|{name}: {words}"):
        import_folder(theirs, tmp_path / "ours")


@pytest.mark.parametrize(("preset", "format"), [("hdflex", "llava_next"), ("base", "llava_hf")])
def test_our_own_exports_are_read_without_a_note(preset: str, format: str, tmp_path: Path) -> None:
    out = exported(native(tmp_path / "model", preset), tmp_path / "out", format)
    assert import_folder(out, tmp_path / "back").notes == ()
    (out / "chat_template.jinja").unlink()  # as transformers before 4.56 wrote it
    assert import_folder(out, tmp_path / "back2").notes == ()


def test_another_chat_template_is_noted(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (theirs / "chat_template.jinja").write_text(CHATML)
    assert main(["import", str(theirs), "--out", str(tmp_path / "ours")]) == 0
    said = capsys.readouterr().out
    assert "note: the folder's chat template writes" in said and "<|im_start|>user" in said
    assert "asked with vicuna_v1" in said


def test_a_chat_template_that_fails_is_noted(theirs: Path, tmp_path: Path) -> None:
    (theirs / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 1 / 0 }}"}))
    [note] = import_folder(theirs, tmp_path / "ours").notes
    assert "cannot be rendered" in note


def test_images_that_others_crop_are_noted(tmp_path: Path) -> None:
    write_transformers(llava_model(), tmp_path / "theirs", "4.47", write_safetensors, 1)
    (tmp_path / "theirs" / "preprocessor_config.json").write_text('{"do_center_crop": true}')
    [note] = import_folder(tmp_path / "theirs", tmp_path / "ours").notes
    assert "here they are padded" in note
