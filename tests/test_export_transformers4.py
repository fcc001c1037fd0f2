"""Exports in transformers 4.57.1, which is not the version that wrote them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_files import exported, native
from tiny import random_image

from llava_hd.model.import_folder import import_folder
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.packing import pack
from llava_hd.model.processor import Processor
from llava_hd.model.prompt import Turn, prompt_text

ROOT = Path(__file__).resolve().parent.parent
VERSION = "4.57.1"
OLD = ROOT / ".venv" / f"transformers-{VERSION}"
QUESTION = "What is in the image?"
SIZE = (120, 160)

pytestmark = pytest.mark.skipif(
    not (OLD / "transformers").is_dir(),
    reason=f"transformers {VERSION} is not in .venv/{OLD.name}; `make test` puts it there where "
    "pip reaches a package index",
)


@torch.inference_mode()
def test_transformers_4_reads_the_exports_to_the_same_logits_and_what_it_writes_is_imported(
    tmp_path: Path,
) -> None:
    models = [
        native(tmp_path / "hd448", "hd448"),
        native(tmp_path / "hdflex", "hdflex", legacy=False),
        native(tmp_path / "base", "base"),
    ]
    formats = ("llava_next", "llava_next", "llava_hf")
    folders = [
        exported(model, tmp_path / f"{model.name}-out", format)
        for model, format in zip(models, formats, strict=True)
    ]
    original = exported(models[0], tmp_path / "original", "llava")
    [tower] = original.glob("clip-vit-*")
    picture = tmp_path / "picture.png"
    random_image(SIZE).save(picture)
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("transformers4_worker.py"), picture,
         tmp_path / "again", *folders, "--tower", tower],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(OLD), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["version"] == VERSION
    for found in answer["found"]:
        assert len(found["wrong"]) == 4 and not any(found["wrong"].values()), found["wrong"]
    for folder, found in zip(models, answer["found"], strict=False):
        ours = LlavaHD.from_pretrained(folder, attention="sdpa")
        processor = Processor.from_pretrained(folder)
        sample = processor.question(QUESTION, [random_image(SIZE)])
        assert found["prompt"] == prompt_text(
            [Turn("human", f"<image>\n{QUESTION}")], ours.config.template, "</s>"
        )
        assert found["ids"] == list(sample.ids)
        logits = ours.logits(pack([sample], ours.config))[-1]
        torch.testing.assert_close(torch.tensor(found["logits"]), logits, rtol=1e-5, atol=1e-6)
    report = import_folder(tmp_path / "again", tmp_path / "back")
    assert report.notes == () and report.left_out == ()
    expected = LlavaHD.from_pretrained(models[0])
    back = LlavaHD.from_pretrained(tmp_path / "back")
    assert back.config.hd == expected.config.hd
    for name, tensor in expected.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
